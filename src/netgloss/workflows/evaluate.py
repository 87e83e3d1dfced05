"""A fitted run judged: scores with baselines and controls, and the gloss that the report shows."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from netgloss.activations import CaptureOptions, Store, capture
from netgloss.activations.layer import Layer, check_origin, class_labels, make_tail, split_store
from netgloss.errors import UserError
from netgloss.evaluation.measure import (
    dictionary_scores,
    explainer_subject,
    image_scores,
    make_controls,
    mean_subject,
    measure,
    partial_subject,
    per_concept_stability,
    shuffled_subject,
)
from netgloss.explainers.base import Explainer
from netgloss.explanations import GlossOptions, make_gloss
from netgloss.processes import part
from netgloss.progress import Progress, Silent
from netgloss.runs.run import Run
from netgloss.training import ActivationStream, build_explainer, fit
from netgloss.training.fit import pick_device
from netgloss.training.inputs import open_stream, upper_layers
from netgloss.training.stream import moments

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from netgloss.classifiers import Classifier
    from netgloss.data import ImageSource
    from netgloss.metrics import ImageMetric


@dataclass(frozen=True)
class EvaluationOptions:
    """What to judge an explainer with."""

    untrained_images: int = 256
    """Images for the untrained-network control (half to fit, half to judge); 0 leaves the control out."""
    max_images: int | None = None
    """Judge on at most this many held-out images."""

    def __post_init__(self) -> None:
        check_image_counts(max_images=self.max_images, untrained_images=self.untrained_images)


def check_image_counts(*, max_images: int | None, **others: int) -> None:
    """Raises :class:`UserError` for a negative number of images, or none to judge on."""
    if max_images is not None and max_images < 1:
        raise UserError(f"max_images must be at least 1, got {max_images}")
    for name, count in others.items():
        if count < 0:
            raise UserError(f"{name} must not be negative, got {count}")


@contextmanager
def _timed(run: Run, name: str, *, writes: bool = True) -> Iterator[None]:
    start = time.perf_counter()
    yield
    if writes:
        run.add_time(name, time.perf_counter() - start)


def evaluate_run(
    run: Run,
    *,
    store: Store | None = None,
    source: ImageSource | None = None,
    classifier: Classifier | None = None,
    options: EvaluationOptions | None = None,
    gloss: GlossOptions | None = None,
    device: str | None = None,
    fabric: Fabric | None = None,
    progress: Progress | None = None,
) -> Run:
    """Scores a fitted run on its held-out images, with baselines, and writes what the report shows.

    With several processes of a launched ``fabric`` (instead of ``device``), all must call it: they share the judged
    images; then they part, process 0 goes on alone and the others return.

    ``source`` is needed for thumbnails, for the untrained-network control and for layers inside a block; without it
    these are left out and the report says so.
    """

    progress = progress or Silent()
    options = options or EvaluationOptions()
    run.network = run.network or classifier
    store = store or Store.open(run.store)
    run.check_store(store)
    store.require_complete()
    writes = fabric is None or fabric.is_global_zero
    if writes:
        run.remove_leftovers()
    if store.is_subsampled(run.layer):
        raise UserError(f"layer {run.layer!r} was captured with --positions; evaluation needs whole maps")
    classifier = classifier or run.classifier()
    check_origin(store, classifier=classifier, source=source)
    if fabric is not None:
        classifier = classifier.to(fabric.device)
    elif device is not None:
        classifier = classifier.to(pick_device(device))
    fit_images, heldout = split_store(store)
    warnings = list(dict.fromkeys(note for e in run.explainers() for note in getattr(e, "notes", [])))
    judged = heldout
    if len(judged) == 0:
        judged = fit_images
        warnings.append("too few images to hold any out: the scores are measured on the images of the fit")
    if options.max_images is not None and len(judged) > options.max_images:
        judged = np.sort(np.random.default_rng(0).choice(judged, size=options.max_images, replace=False))
    explainers = [e.to(classifier.device) for e in run.explainers()]
    pooled = explainers[0].reads == "pooled"
    stream = ActivationStream(store, run.layer, fit_images, reads="pooled" if pooled else "rows")
    tail = make_tail(classifier, run.layer, source)
    above = tuple(explainers[0].spec.upper) if explainers[0].target == "upper" else ()
    above_tail = make_tail(classifier, above[-1], source) if above else None
    layer = Layer(store, run.layer, tail, classifier, source, pooled, above, above_tail)
    affine = not above and tail.mode == "graph" and tail.is_affine(store.shapes[run.layer])
    if store.info.class_names and (layer.labels < 0).all():
        warnings.append("the images' class names are not among the classifier's: accuracies are left out")
    if store.info.model.get("random_weights"):
        warnings.append("the network has random weights: its concepts and scores say nothing of a trained one")
    if tail.mode != "graph":
        warnings.append(f"logits are computed by replaced forwards: {tail.reason}")
    warnings += _uncovered(explainers[0], store, judged)
    if explainers[0].target == "image":
        if fabric is not None:
            part(fabric)
        if not writes:
            return run
        warnings += _judge_decoder(run, explainers, layer, fit_images, heldout, judged, gloss, progress)
        run.update(
            status="evaluated",
            tail={"mode": tail.mode, "affine": affine, "reason": tail.reason},
            warnings=warnings,
            num_judged=len(judged),
            judged_with=judged_with(options, gloss),
        )
        return run
    with _timed(run, "evaluate", writes=writes):
        mean, variance = moments(stream)
        controls = make_controls(stream, explainers[0].spec, num_concepts=explainers[0].num_concepts, seeds=run.seeds)
        subjects = {
            f"seed {s}": explainer_subject(e, contributions=pooled) for s, e in zip(run.seeds, explainers, strict=True)
        }
        for name, found in controls.items():
            for i, control in enumerate(found):
                subjects[f"{name} {i}"] = explainer_subject(control.to(classifier.device), contributions=pooled)
        ways = [e.partial() for e in explainers]
        for i, way in enumerate(ways):
            subjects |= {f"{name} {i}": partial_subject(rebuild) for name, rebuild in way.items()}
        subjects["shuffled_codes"] = shuffled_subject(explainers[0], layer, judged, seed=run.seeds[0])
        subjects["mean_activation"] = mean_subject(mean)
        measured = measure(subjects, layer, judged, progress=progress, fabric=fabric)
        if fabric is not None:
            part(fabric)
        if not writes:
            return run
        baselines: dict[str, Sequence[dict[str, ImageMetric]]] = {
            name: [measured[f"{name} {i}"] for i in range(len(found))] for name, found in controls.items()
        }
        baselines |= {name: [measured[f"{name} {i}"] for i in range(len(ways))] for name in ways[0]}
        baselines |= {name: [measured[name]] for name in ("shuffled_codes", "mean_activation")}
        if options.untrained_images and source is not None:
            untrained = _untrained_control(run, classifier, source, options.untrained_images, progress)
            if untrained is not None:
                baselines["untrained_network"] = [untrained]
        scores = image_scores([measured[f"seed {s}"] for s in run.seeds], baselines)
        scores += dictionary_scores(explainers, controls, scale=variance.sqrt())
        run.write_scores(scores)
    with _timed(run, "gloss"):
        content, thumbnails = make_gloss(
            explainers[0],
            layer,
            fit_images=fit_images,
            heldout_images=heldout,
            stability=per_concept_stability(explainers, layer, judged),
            affine=affine,
            options=gloss,
            progress=progress,
        )
        if source is not None:
            _write_thumbnails(run, classifier, source, thumbnails)
        else:
            warnings.append("the report has no pictures: the images were not given to evaluate")
        run.write_concepts(content)
    run.update(
        status="evaluated",
        tail={"mode": tail.mode, "affine": affine, "reason": tail.reason},
        warnings=warnings,
        num_judged=len(judged),
        judged_with=judged_with(options, gloss),
    )
    return run


def judged_with(options: EvaluationOptions | None, gloss: GlossOptions | None) -> dict[str, Any]:
    """What run.json keeps of the options of a judgement."""
    return {
        "evaluation": dataclasses.asdict(options or EvaluationOptions()),
        "gloss": dataclasses.asdict(gloss or GlossOptions()),
    }


def _judge_decoder(
    run: Run,
    explainers: list[Explainer],
    layer: Layer,
    fit_images: np.ndarray,
    heldout: np.ndarray,
    judged: np.ndarray,
    gloss: GlossOptions | None,
    progress: Progress,
) -> list[str]:
    """Scores, pictures and the gloss of explainers that decode into images; returns warnings."""
    from netgloss.evaluation.decoded import Pictures, ShownUnits, decoded_notes, decoded_scores, triple_figures
    from netgloss.explainers.cladec import ClaDec

    decoders = [e for e in explainers if isinstance(e, ClaDec)]
    warnings: list[str] = []
    with _timed(run, "evaluate"):
        if layer.source is None or not decoders:
            run.write_scores([])
            warnings.append("decoded images were not judged: evaluate needs the images (--images)")
        else:
            pictures = Pictures.of(decoders[0], layer.classifier, layer.source)
            scores = decoded_scores(decoders, layer, pictures, fit_images=fit_images, judged=judged, progress=progress)
            run.write_scores(scores)
            warnings += decoded_notes(scores)
            drawn = triple_figures(decoders[0], layer, pictures, judged, seed=run.seeds[0])
            run.write_figures(drawn)
    with _timed(run, "gloss"):
        shown = ShownUnits(decoders[0]) if decoders else explainers[0]
        content, thumbnails = make_gloss(
            shown,
            layer,
            fit_images=fit_images,
            heldout_images=heldout,
            stability=None,
            affine=False,
            options=gloss,
            progress=progress,
        )
        if layer.source is not None:
            _write_thumbnails(run, layer.classifier, layer.source, thumbnails)
        run.write_concepts(content)
    if decoders and shown.num_concepts < decoders[0].num_units:
        warnings.append(
            f"the concepts listed are the {shown.num_concepts} units that vary most, of {decoders[0].num_units}"
        )
    return warnings


def _uncovered(explainer: Explainer, store: Store, images: np.ndarray) -> list[str]:
    """Says how many predictions lie outside the classes whose scores the explainer rebuilds."""
    logits, told = store.read_logits(images), explainer.explained_classes
    missing = 0 if logits is None or told is None else int((~np.isin(logits.argmax(axis=1), told)).sum())
    if not missing:
        return []
    return [
        f"{missing} of {len(images)} judged images are predicted as classes that are not explained: their winning "
        "logit is left as it is, which counts as agreement and as no error"
    ]


def _untrained_control(
    run: Run, classifier: Classifier, source: ImageSource, count: int, progress: Progress
) -> dict[str, ImageMetric] | None:
    """The same method on the same architecture with random weights, its activations in a temporary store."""
    fitted = run.explainer
    cls, config = type(fitted), fitted.config
    picks = np.sort(np.random.default_rng(0).choice(len(source), size=min(count, len(source)), replace=False))
    if len(picks) < 4:
        return None
    control = classifier.untrained(seed=0)
    with tempfile.TemporaryDirectory() as folder:
        try:
            store = capture(
                control,
                source.subset(picks),
                [run.layer, *upper_layers(cls, config, control, run.layer)],
                Path(folder) / "untrained",
                options=CaptureOptions(dtype="float32"),
                progress=progress,
            )
            valid = store.valid
            fit_images, judged = valid[::2], valid[1::2]
            part = source.subset(picks)
            labels = class_labels(store, classifier.class_names, classifier.wnids)
            stream = open_stream(
                cls, config, store, run.layer, fit_images, classifier=lambda: control, source=part, labels=labels
            )
            spec = stream.spec(num_classes=len(classifier.class_names), image=classifier.input_shape)
            explainer = fit(build_explainer(cls, config, spec, seed=0), stream, seed=0, progress=progress)
        except UserError as error:
            progress.say(f"untrained-network control left out: {error}")
            return None
        tail = make_tail(control, run.layer, source)
        above = tuple(spec.upper) if cls.target == "upper" else ()
        above_tail = make_tail(control, above[-1], source) if above else None
        layer = Layer(store, run.layer, tail, control, part, cls.reads == "pooled", above, above_tail)
        subject = explainer_subject(explainer.to(control.device))
        measured = measure({"untrained": subject}, layer, judged, progress=progress)
    # a network that was never trained predicts nearly one class: scores of its logits would look perfect
    return {name: metric for name, metric in measured["untrained"].items() if "logits" not in metric.inputs}


def _write_thumbnails(
    run: Run, classifier: Classifier, source: ImageSource, names: dict[str, int], side: int = 144
) -> None:
    from torchvision.transforms.v2.functional import to_pil_image

    for name, index in names.items():
        pixels = classifier.preprocessing.pixels(source.image(index))
        picture = to_pil_image(pixels.clamp(0, 1)).convert("RGB")
        scale = side / max(picture.size)
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        run.write_image(name, picture.resize(size, 3 if scale < 1 else 0))

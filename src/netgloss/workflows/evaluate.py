"""Evaluate: a fitted run scored on held-out images, with baselines and controls, and explained for its report."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from netgloss.activations import Store
from netgloss.activations.layer import Layer, check_origin, make_tail, split_store
from netgloss.class_names import compare_classes
from netgloss.data.sources import open_sources
from netgloss.errors import UserError
from netgloss.evaluation.context import EvaluationContext
from netgloss.evaluation.faithful import FAITHFULNESS, FaithfulnessOptions
from netgloss.evaluation.judge import evaluate_subjects
from netgloss.evaluation.scores import subject_scores
from netgloss.evaluation.subjects import Subject, per_concept_stability
from netgloss.explainers.base import Explainer
from netgloss.explanations import ExplanationOptions, explain_layer
from netgloss.explanations.accumulators import accumulate_concepts
from netgloss.processes import part
from netgloss.progress import Silent
from netgloss.report import write_report
from netgloss.runs.run import Run
from netgloss.runs.verdicts import NOT_EXPLAINED
from netgloss.training.execution import Execution
from netgloss.workflows.annotate import annotate
from netgloss.workflows.control_networks import add_untrained_network
from netgloss.workflows.decode import decode
from netgloss.workflows.rehearsal import IMAGES as REHEARSED
from netgloss.workflows.rehearsal import Failed

if TYPE_CHECKING:
    from netgloss.classifiers import Classifier
    from netgloss.data import ImageSource


@dataclass(frozen=True)
class EvaluationOptions:
    """What an explainer is evaluated on."""

    untrained_images: int = 256
    """Images for the untrained-network control (half to fit, half to evaluate); 0 leaves the control out."""
    max_images: int | None = None
    """Evaluate on at most this many held-out images."""
    explanations: ExplanationOptions = field(default_factory=ExplanationOptions)
    """How much the report shows."""

    def __post_init__(self) -> None:
        check_image_counts(max_images=self.max_images, untrained_images=self.untrained_images)


def check_image_counts(*, max_images: int | None, **others: int) -> None:
    """Raises :class:`UserError` for a negative number of images, or none to evaluate on."""
    if max_images is not None and max_images < 1:
        raise UserError(f"max_images must be at least 1, got {max_images}")
    for name, count in others.items():
        if count < 0:
            raise UserError(f"{name} must not be negative, got {count}")


def choose_images(store: Store, max_images: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """Images of the fit, held-out images, those of them to evaluate on, and warnings."""
    fit_images, heldout = split_store(store)
    warnings = []
    images = heldout
    if len(images) == 0:
        images = fit_images
        warnings.append("too few images to hold any out: the scores are measured on the images of the fit")
    if max_images is not None and len(images) > max_images:
        images = np.sort(np.random.default_rng(0).choice(images, size=max_images, replace=False))
    return fit_images, heldout, images, warnings


@dataclass
class _Opened:
    """A run with all that an evaluation of it reads."""

    run: Run
    store: Store
    classifier: Classifier
    source: ImageSource | None
    options: EvaluationOptions
    execution: Execution

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Records the time of a step in the run."""
        start = time.perf_counter()
        yield
        if self.execution.leads:
            self.run.add_time(name, time.perf_counter() - start)


def evaluate(
    run: Run | str | Path,
    *,
    images: ImageSource | str | Path | None = None,
    eval_images: ImageSource | str | Path | None = None,
    store: Store | None = None,
    classifier: Classifier | None = None,
    annotations: str | None = None,
    decoder: Run | str | Path | None = None,
    faithfulness: FaithfulnessOptions | None = None,
    options: EvaluationOptions | None = None,
    device: str | Execution = "auto",
) -> Run:
    """Scores a fitted run on its held-out images, with baselines and controls, and writes what the report shows.

    ``annotations``, ``decoder`` and ``faithfulness`` add to a run. One that was scored before is not scored again for
    them, unless ``images`` is given (and no decoder). An existing report is then written again.

    Parameters
    ----------
    run : a fitted run.
    images, eval_images : the images of the run again. They are needed for pictures, for the untrained-network control
        and for layers inside a block; without them these are left out and the report says so.
    store, classifier : the activations and the network; default: opened as the run names them.
    annotations : masks or landmarks that label the concepts, see :func:`netgloss.annotate`.
    decoder : a run of ClaDec on the same layer, see :func:`netgloss.decode`.
    faithfulness : also delete, insert and share out concepts on a part of the held-out images.
    device : a device, or an :class:`~netgloss.Execution`. With several processes all of them must call ``evaluate``:
        they share the images; then the first goes on alone and the others return.

    Raises
    ------
    UserError : the run's files are missing or damaged; store, network or images are not those of the run; a method that
        does not rebuild the activation is asked for faithfulness.
    """
    execution = Execution.of(device)
    run = run if isinstance(run, Run) else Run(run)
    run.network = run.network or classifier
    source = open_sources(images, eval_images) if images is not None else None
    adds = annotations is not None or decoder is not None or faithfulness is not None
    if not adds or (source is not None and decoder is None) or not run.scores:
        _score(_open(run, source, store, classifier, options, execution))
    if not adds or not execution.leads:
        return run
    opened = _open(run, source, store, classifier, options, execution)
    common: dict[str, Any] = {"store": opened.store, "source": source, "classifier": opened.classifier}
    if annotations is not None:
        annotate(run, annotations, **common, progress=execution.shown)
    if decoder is not None:
        decoder = decoder if isinstance(decoder, Run) else Run(decoder)
        decode(run, decoder, **common, progress=execution.shown)
    if faithfulness is not None:
        _add_faithfulness(opened, faithfulness)
    if (run.path / "report.html").exists():
        write_report(run)
    return run


def is_evaluated_with(run: Run, options: EvaluationOptions | None) -> bool:
    """True if the scores of a run were measured with these options."""
    return bool(run.manifest.get("judged_with") == _options_record(options or EvaluationOptions()))


def _options_record(options: EvaluationOptions) -> dict[str, Any]:
    """What run.json records of the options."""
    fields = dataclasses.asdict(options)
    return {"gloss": fields.pop("explanations"), "evaluation": fields}


def _open(
    run: Run,
    source: ImageSource | None,
    store: Store | None,
    classifier: Classifier | None,
    options: EvaluationOptions | None,
    execution: Execution,
) -> _Opened:
    store = store or Store.open(run.store)
    run.check_store(store)
    store.require_complete()
    if execution.leads:
        run.remove_leftovers()
    if store.is_subsampled(run.layer):
        raise UserError(f"layer {run.layer!r} was captured with --positions; evaluation needs whole maps")
    classifier = classifier or run.network or run.classifier()
    check_origin(store, classifier=classifier, source=source)
    classifier = classifier.to(execution.torch_device)
    return _Opened(run, store, classifier, source, options or EvaluationOptions(), execution)


def _score(opened: _Opened) -> None:
    """Scores and explanations of a run, written into its folder."""
    run, store, execution, options = opened.run, opened.store, opened.execution, opened.options
    explainers = [e.to(opened.classifier.device) for e in run.explainers()]
    fit_images, heldout, images, few = choose_images(store, options.max_images)
    context = EvaluationContext(
        store,
        run.layer,
        opened.classifier,
        opened.source,
        make_tail(opened.classifier, run.layer, opened.source),
        fit_images,
        images,
        fabric=execution.fabric,
        strict=True,
        progress=execution.shown,
    )
    subject = Subject.of_run(run, every_seed=True)
    subject.explainers = explainers
    layer = context.layer(subject.view)
    affine = context.affine and not layer.above
    warnings = [*subject.notes, *few, *_warnings(context, layer, explainers[0])]
    if explainers[0].target == "image":
        part(execution.fabric)
        if not execution.leads:
            return
        warnings += _score_decoder(opened, explainers, layer, fit_images, heldout, images)
    else:
        _try_explanations(explainers[0], layer, images)
        with opened.timed("evaluate"):
            evaluate_subjects(context, [subject])
            part(execution.fabric)
            if not execution.leads:
                return
            if options.untrained_images and opened.source is not None:
                add_untrained_network(context, subject, options.untrained_images)
            scores = subject_scores(subject, outputs=opened.classifier.outputs)
            run.write_scores(scores + subject.dictionary)
        with opened.timed("explanations"):
            stability = per_concept_stability(explainers, layer, images)
            _write_explanations(opened, explainers[0], layer, fit_images, heldout, stability, affine=affine)
        if opened.source is None:
            warnings.append("the report has no pictures: the images were not given to evaluate")
    run.update(
        status="evaluated",
        tail={"mode": context.tail.mode, "affine": affine, "reason": context.tail.reason},
        warnings=warnings,
        num_judged=len(images),
        num_by_construction=_by_construction(context, explainers[0]),
        judged_with=_options_record(options),
    )


def _try_explanations(explainer: Explainer, layer: Layer, images: np.ndarray) -> None:
    """Contributions of a few images, which come after all scores: a network without gradient must not fail there.

    Raises
    ------
    UserError : they cannot be computed.
    """
    for count in REHEARSED:
        try:
            accumulate_concepts(explainer, layer, images[:count], gallery=1, progress=Silent())
        except Exception as error:
            failed = Failed("explanations", error)
            if failed.final or count == REHEARSED[-1] or count >= len(images):
                raise UserError(
                    f"{failed.reason(layer.name)} [stage: explanations; found before the scores]"
                ) from error
        else:
            return


def _suspicious_logits(logits: np.ndarray, *, several: bool, least: int = 10) -> list[str]:
    """Signs that the network does not see the images as it was trained to.

    Parameters
    ----------
    logits : (n, classes). several : the images are of several classes. least : images below which nothing is said.
    """
    if len(logits) < least:
        return []
    advice = "check the preprocessing (mean, std, order of colours) and the checkpoint"
    if logits.std(axis=0).max() < 1e-3 * max(float(logits.std(axis=1).mean()), 1e-12):
        return [f"the logits are nearly the same for all {len(logits)} evaluated images: {advice}"]
    if several and len(np.unique(logits.argmax(axis=1))) == 1:
        return [f"all {len(logits)} evaluated images are predicted as one class, and they are of several: {advice}"]
    return []


def _warnings(context: EvaluationContext, layer: Layer, explainer: Explainer) -> list[str]:
    """What a reader of the scores must know first."""
    store, tail = context.store, context.tail
    warnings = context.notes
    match = compare_classes(store.info.class_names, layer.classifier.class_names, layer.classifier.wnids)
    if match.missing and layer.classifier.outputs not in ("multilabel", "none"):
        warnings.append(match.line + ("; accuracies are left out" if (layer.labels < 0).all() else ""))
    if store.info.model.get("random_weights"):
        warnings.append("the network has random weights: its concepts and scores say nothing about a trained one")
    if tail.mode != "graph":
        warnings.append(f"logits are computed by replaced forwards: {tail.reason}")
    if tail.ignores_layer:
        parts = (
            ("class token", "patches reach") if tail.layout.pool == "cls" else ("patch tokens", "class token reaches")
        )
        warnings.append(
            f"the logits do not depend on the {parts[0]} of {tail.layer!r}: only its {parts[1]} the head, so "
            "contributions are 0; explain an earlier layer"
        )
    logits = store.read_logits(context.images)
    if logits is not None and not store.info.model.get("random_weights"):
        several = len(store.info.class_names or ()) > 1 and layer.classifier.outputs != "multilabel"
        warnings += _suspicious_logits(logits, several=several)
    missing = _by_construction(context, explainer)
    if missing:
        warnings.append(
            f"{missing} of {len(context.images)} {NOT_EXPLAINED}: their "
            "largest logit stays unchanged, which counts as agreement and as no error"
        )
    return warnings


def _by_construction(context: EvaluationContext, explainer: Explainer) -> int:
    """Evaluated images that keep their prediction by construction: their class is not among those explained."""
    logits, explained = context.store.read_logits(context.images), explainer.explained_classes
    if logits is None or explained is None:
        return 0
    return int((~np.isin(logits.argmax(axis=1), explained)).sum())


def _score_decoder(
    opened: _Opened,
    explainers: list[Explainer],
    layer: Layer,
    fit_images: np.ndarray,
    heldout: np.ndarray,
    images: np.ndarray,
) -> list[str]:
    """Scores, pictures and explanations of explainers that decode into images; returns warnings."""
    from netgloss.evaluation.decoded import Pictures, ShownUnits, decoded_notes, decoded_scores, triple_figures
    from netgloss.explainers.cladec import ClaDec

    run, progress = opened.run, opened.execution.shown
    decoders = [e for e in explainers if isinstance(e, ClaDec)]
    warnings: list[str] = []
    with opened.timed("evaluate"):
        if layer.source is None or not decoders:
            run.write_scores([])
            warnings.append("decoded images were not evaluated: evaluate needs the images (--images)")
        else:
            pictures = Pictures.of(decoders[0], layer.classifier, layer.source)
            scores = decoded_scores(decoders, layer, pictures, fit_images=fit_images, judged=images, progress=progress)
            run.write_scores(scores)
            warnings += decoded_notes(scores)
            run.write_figures(triple_figures(decoders[0], layer, pictures, images, seed=run.seeds[0]))
    shown = ShownUnits(decoders[0]) if decoders else explainers[0]
    with opened.timed("explanations"):
        _write_explanations(opened, shown, layer, fit_images, heldout, None, affine=False)
    if decoders and shown.num_concepts < decoders[0].num_units:
        warnings.append(
            f"the concepts listed are the {shown.num_concepts} units that vary most, of {decoders[0].num_units}"
        )
    return warnings


def _write_explanations(
    opened: _Opened,
    explainer: Explainer,
    layer: Layer,
    fit_images: np.ndarray,
    heldout: np.ndarray,
    stability: list[float] | None,
    *,
    affine: bool,
    side: int = 224,
) -> None:
    """concepts.json and its thumbnails."""
    from torchvision.transforms.v2.functional import to_pil_image

    content, thumbnails = explain_layer(
        explainer,
        layer,
        fit_images=fit_images,
        heldout_images=heldout,
        stability=stability,
        affine=affine,
        options=opened.options.explanations,
        progress=opened.execution.shown,
    )
    source = opened.source
    for name, index in thumbnails.items() if source is not None else ():
        assert source is not None
        pixels = opened.classifier.preprocessing.pixels(source.image(index))
        picture = to_pil_image(pixels.clamp(0, 1)).convert("RGB")
        scale = side / max(picture.size)
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        opened.run.write_image(name, picture.resize(size, 3 if scale < 1 else 0))
    opened.run.write_concepts(content)


def _add_faithfulness(opened: _Opened, options: FaithfulnessOptions) -> None:
    """Adds C-deletion, ConceptSHAP, Sobol indices and the agreement of importances to the scores of a run."""
    run = opened.run
    opened.classifier.require_head("faithfulness")
    subject = Subject.of_run(run)
    if subject.explainers[0].target != "activation":
        raise UserError(f"{run.method} does not rebuild the activation: its concepts cannot be deleted one by one")
    fit_images, _, images, _ = choose_images(opened.store, None)
    context = EvaluationContext(
        opened.store,
        run.layer,
        opened.classifier,
        opened.source,
        make_tail(opened.classifier, run.layer, opened.source),
        fit_images,
        images,
        run.path / "measured",
        options,
        progress=opened.execution.shown,
    )
    evaluate_subjects(context, [subject], only="faithfulness")
    if not subject.results:
        raise UserError(subject.notes[-1] if subject.notes else "no faithfulness was measured (0 images?)")
    added = subject_scores(subject, "faithfulness", outputs=opened.classifier.outputs)
    run.write_scores([score for score in run.scores if score.metric not in FAITHFULNESS] + added)

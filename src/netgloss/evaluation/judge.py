"""The judge: every metric on every subject, over the same held-out images.

:func:`evaluate_subjects` asks its questions of each subject and its controls. A question about one explainer is a
:class:`Job`; its :class:`Result` holds, for every metric, the value and its bootstrap replicates. Results are kept on
disk by the hash of all that they depend on, so that an interrupted evaluation continues and an added method is the only
one that is measured. Most questions share one pass over the images: a batch is read once, and only encoding, decoding
and the tail run for each job.

Questions:

- "scores" : all image metrics of an explainer, or of a control;
- "track NAME" : the same for one track of a method that rebuilds by several;
- "shuffled", "mean" : the same for shuffled codes and for the mean activation;
- "faithfulness" : concepts deleted, inserted and shared out (``evaluation/faithful.py``);
- "dissection" : agreement with annotated masks.

Shape letters: B images, R replicates.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from netgloss.activations.layer import BATCH, Layer, LayerBatch
from netgloss.errors import UserError
from netgloss.evaluation.context import EvaluationContext, digest
from netgloss.evaluation.faithful import measure_faithfulness
from netgloss.evaluation.subjects import (
    Rebuild,
    Subject,
    View,
    dictionaries,
    encode,
    from_explainer,
    from_mean,
    from_shuffled_codes,
    from_track,
)
from netgloss.explainers.base import Explainer
from netgloss.memory import Halving
from netgloss.metrics import (
    ImageMetric,
    Score,
    Stability,
    UpperError,
    dictionary_metrics,
    dictionary_score,
    image_metrics,
    random_stability,
    shuffled_stability,
)
from netgloss.metrics.base import REPLICATES
from netgloss.processes import add_up
from netgloss.progress import Progress, Silent
from netgloss.runs.run import write_atomically

if TYPE_CHECKING:
    from lightning_fabric import Fabric

_AT_ONCE = 16
"""Subjects of one pass."""
FORMAT = 1
"""Part of every hash: raised when what is measured changes."""
DISSECTION = "dissection_mean_iou"


@dataclass(frozen=True)
class Result:
    """By metric, the value and its replicates (1 + R,), and the number of images."""

    numbers: dict[str, Tensor]
    counts: dict[str, int]


@dataclass(frozen=True)
class Job:
    """One question about one explainer (none for "mean")."""

    question: str
    explainer: Explainer | None
    view: View
    key: str
    seed: int = 0


def evaluate_subjects(context: EvaluationContext, subjects: Sequence[Subject], *, only: str | None = None) -> None:
    """Fills in the results of the subjects and of their controls; a subject that fails gets a reason instead.

    Parameters
    ----------
    only : the one question to ask; default all that apply.

    Raises
    ------
    UserError : with ``context.strict``, for whatever fails.
    """
    asked = [
        (subject, control, question, [make_job(context, question, e, view=subject.view, seed=seed) for e in explainers])
        for subject in subjects
        if not subject.reason
        for control, question, explainers, seed in _questions(context, subject)
        if only in (None, question)
    ]
    for pooled in (False, True):
        chosen = [row for row in asked if row[0].view.pooled == pooled]
        mean = partial(_mean, context, pooled)
        results, reasons = run_jobs(context, [job for *_, jobs in chosen for job in jobs], mean=mean)
        for subject, control, question, jobs in chosen:
            _hand_out(subject, control, question, jobs, results, reasons)
    if only is None:
        for subject in subjects:
            if not subject.reason and all(e.dictionary is not None for e in subject.explainers):
                scale = context.moments(subject.view.pooled)[1].sqrt()
                subject.dictionary = dictionary_scores(subject.explainers, context.controls(subject), scale=scale)


def _mean(context: EvaluationContext, pooled: bool) -> Tensor:
    return context.moments(pooled)[0].float()


def _questions(
    context: EvaluationContext, subject: Subject
) -> Iterator[tuple[str, str, Sequence[Explainer | None], int]]:
    """Control ("" for the subject itself), question, explainers and seed of everything to ask of a subject."""
    rebuilds = subject.explainers[0].target == "activation"
    dissects = context.annotated is not None and not subject.view.pooled and subject.kind != "foreign"
    for control, explainers in ({"": subject.explainers} | context.controls(subject)).items():
        yield control, "scores", explainers, 0
        if context.faithfulness.images and rebuilds and context.classifier.num_classes:
            yield control, "faithfulness", explainers[: context.faithfulness.fits], 0
        if dissects:
            yield control, "dissection", explainers, 0
    for track in subject.explainers[0].partial():
        yield track, f"track {track}", subject.explainers, 0
    yield "shuffled_codes", "shuffled", subject.explainers[:1], subject.seeds[0]
    yield "mean_activation", "mean", [None], 0


def _hand_out(
    subject: Subject,
    control: str,
    question: str,
    jobs: Sequence[Job],
    results: Mapping[str, Result],
    reasons: Mapping[str, str],
) -> None:
    """Gives a subject its results, or the reason why there are none."""
    failed = [reasons[job.key] for job in jobs if job.key in reasons]
    if failed:
        if not control:
            note = f"{question} could not be measured: {failed[0]}"
            subject.reason = note if question == "scores" else subject.reason
            subject.notes.append(note)
        return
    answered = [results[job.key] for job in jobs]
    kind = question if question in ("scores", "faithfulness", "dissection") else "scores"
    if control:
        subject.baselines.setdefault(control, {})[kind] = answered
    else:
        subject.results[kind] = answered


# -- jobs -------------------------------------------------------------------------------------------------------------


def make_job(
    context: EvaluationContext, question: str, explainer: Explainer | None, *, view: View, seed: int = 0
) -> Job:
    """A job with the hash of everything that its result depends on."""
    parts: list[Any] = [FORMAT, REPLICATES, question, context.name, context.images_of(question), *view]
    if context.classifier.outputs == "multilabel":
        parts.append("multilabel")
    if question == "shuffled":
        parts.append(seed)
    if question == "faithfulness":
        parts += [dataclasses.asdict(context.faithfulness), seed]
    if question == "dissection":
        assert context.annotated is not None
        parts += [digest(context.annotated.label.tobytes()), context.annotated.rule]
    return Job(question, explainer, view, digest(json.dumps(parts).encode(), *_content(explainer)), seed)


def _content(explainer: Explainer | None) -> Iterator[bytes]:
    """Everything that the results of an explainer depend on."""
    if explainer is None:
        return
    yield type(explainer).__qualname__.encode()
    yield Path(inspect.getfile(type(explainer))).read_bytes()
    yield json.dumps(dataclasses.asdict(explainer.config), default=str, sort_keys=True).encode()
    for name, value in sorted(explainer.state_dict().items()):
        yield name.encode()
        yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def run_jobs(
    context: EvaluationContext, jobs: Sequence[Job], *, mean: Callable[[], Tensor]
) -> tuple[dict[str, Result], dict[str, str]]:
    """Results by key, and reasons by key for jobs that failed.

    Parameters
    ----------
    mean : () -> (C,) mean activation over the fit, for the question "mean".
    """
    results: dict[str, Result] = {}
    reasons: dict[str, str] = {}
    pending: dict[str, Job] = {}
    for job in jobs:
        known = _load(context.folder, job.key)
        if known is not None:
            results[job.key] = known
        else:
            pending.setdefault(job.key, job)
    alone = [job for job in pending.values() if job.question in ("faithfulness", "dissection")]
    shared = [job for job in pending.values() if job not in alone]
    for view in dict.fromkeys(job.view for job in shared):
        layer, rebuilds = context.layer(view), dict[str, Rebuild]()
        for job in (job for job in shared if job.view == view):
            try:
                rebuilds[job.key] = _checked_rebuild(context, job, layer, mean)
            except Exception as error:
                _refuse(context, error, [job.key], reasons)
        keys = list(rebuilds)
        for start in range(0, len(keys), _AT_ONCE):
            group = {key: rebuilds[key] for key in keys[start : start + _AT_ONCE]}
            for key, metrics in _pass(context, group, layer, reasons).items():
                results[key] = _keep(context.folder, key, metrics)
    if alone:
        context.progress.start("faithfulness", len(alone), unit="fits")
        for job in alone:
            try:
                results[job.key] = (
                    _faithfulness(context, job) if job.question == "faithfulness" else _dissection(context, job)
                )
            except Exception as error:
                _refuse(context, error, [job.key], reasons)
            context.progress.advance()
        context.progress.finish()
    return results, reasons


def _refuse(context: EvaluationContext, error: Exception, keys: Sequence[str], reasons: dict[str, str]) -> None:
    """Notes why jobs failed; with ``context.strict`` the error is raised."""
    if context.strict:
        raise error
    reasons |= dict.fromkeys(keys, reason_of(error))


def reason_of(error: Exception) -> str:
    """One line on what went wrong; a failure that is not the user's mistake names its kind."""
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def _checked_rebuild(context: EvaluationContext, job: Job, layer: Layer, mean: Callable[[], Tensor]) -> Rebuild:
    """What the job computes from a batch, tried on the first images: one that fails must not spoil a pass of many."""
    if job.question == "mean":
        return from_mean(mean())
    assert job.explainer is not None
    explainer = job.explainer.to(context.classifier.device)
    if job.question == "shuffled":
        rebuild = from_shuffled_codes(explainer, layer, context.images, seed=job.seed)
    elif job.question.startswith("track "):
        rebuild = from_track(explainer.partial()[job.question.removeprefix("track ")])
    else:
        rebuild = from_explainer(explainer, contributions=job.view.pooled)
    if not context.strict:
        with torch.no_grad():
            rebuild(next(iter(layer.batches(context.images))))
    return rebuild


def _pass(
    context: EvaluationContext, rebuilds: dict[str, Rebuild], layer: Layer, reasons: dict[str, str]
) -> dict[str, dict[str, ImageMetric]]:
    """One pass for all subjects; if it fails, one for each, so that the others are measured."""
    try:
        return measure(rebuilds, layer, context.images, progress=context.progress, fabric=context.fabric)
    except Exception as error:
        context.progress.finish()
        if context.strict or len(rebuilds) == 1:
            _refuse(context, error, list(rebuilds), reasons)
            return {}
    metrics: dict[str, dict[str, ImageMetric]] = {}
    for key, rebuild in rebuilds.items():
        metrics |= _pass(context, {key: rebuild}, layer, reasons)
    return metrics


# -- one pass over the images -----------------------------------------------------------------------------------------


def measure(
    rebuilds: Mapping[str, Rebuild],
    layer: Layer,
    images: np.ndarray,
    *,
    progress: Progress | None = None,
    fabric: Fabric | None = None,
) -> dict[str, dict[str, ImageMetric]]:
    """One pass over ``images``: every image metric on every subject that provides its inputs.

    The processes of ``fabric`` share the batches, and each gets the metrics of all images. The batches are those of a
    single process, so that only the order of float64 sums differs: scores agree to about 1e-9.

    Returns
    -------
    For each subject its metrics by name, ready to ``compute()``.
    """
    progress = progress or Silent()
    metrics: dict[str, dict[str, ImageMetric]] = {name: {} for name in rebuilds}
    classes = image_metrics(layer.classifier.outputs)
    world = fabric.world_size if fabric is not None and len(images) > (fabric.world_size - 1) * BATCH else 1
    rank = fabric.global_rank if fabric is not None and world > 1 else 0
    halving = Halving(BATCH)
    progress.start("evaluate", len(images), unit="images")
    with torch.no_grad():
        for batch in layer.batches(images, rank=rank, world=world):
            for name, rebuild in rebuilds.items():
                for index, inputs, above in halving(len(batch.index), partial(_inputs, rebuild, layer, batch)):
                    _update(metrics[name], classes, index, inputs, above)
            progress.advance(min(len(batch.index) * world, len(images)))
    progress.finish()
    if fabric is not None and world > 1:
        for of_subject in metrics.values():
            for name in sorted(of_subject):
                add_up(of_subject[name], fabric.device)
    return metrics


def _inputs(
    rebuild: Rebuild, layer: Layer, batch: LayerBatch, part: slice
) -> tuple[Tensor, dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]:
    """Indices of a part of a batch and the inputs of metrics there, on the CPU: of the layer, and of each layer above
    that the subject rebuilds (the network's activation and the rebuilt one).
    """
    index = batch.index[part]
    if len(index) < len(batch.index):
        batch = next(layer.batches(index.numpy(), batch_size=len(index)))
    rebuilt = rebuild(batch)
    logits = rebuilt.logits
    if logits is None and rebuilt.reconstruction is not None:
        logits = batch.tail(rebuilt.reconstruction)
    given = {
        "activation": batch.activation,
        "concepts": rebuilt.concepts,
        "reconstruction": rebuilt.reconstruction,
        "contributions": rebuilt.contributions,
        "logits": batch.logits,
        "logits_rebuilt": logits,
        "labels": batch.labels,
    }
    if not batch.logits.shape[1]:  # a network without a head
        given |= {"logits": None, "logits_rebuilt": None}
    above = {name: (batch.upper[name].cpu(), values.cpu()) for name, values in rebuilt.upper.items()}
    return index, {key: value.cpu() for key, value in given.items() if value is not None}, above


def _update(
    metrics: dict[str, ImageMetric],
    classes: Sequence[type[ImageMetric]],
    index: Tensor,
    inputs: Mapping[str, Tensor],
    above: Mapping[str, tuple[Tensor, Tensor]],
) -> None:
    for cls in classes:
        if all(key in inputs for key in cls.inputs):
            metrics.setdefault(cls.name, cls(sync_on_compute=False)).update(index, **inputs)
    for layer, (own, rebuilt) in above.items():
        error = metrics.setdefault(f"{UpperError.name}:{layer}", UpperError(layer, sync_on_compute=False))
        error.update(index, upper=own, upper_rebuilt=rebuilt)


# -- questions with passes of their own -------------------------------------------------------------------------------


def _faithfulness(context: EvaluationContext, job: Job) -> Result:
    assert job.explainer is not None
    explainer, layer = job.explainer.to(context.classifier.device), context.layer(job.view)

    def batches() -> Iterator[tuple[Tensor, Tensor, Tensor, Callable[[Tensor], Tensor], bool]]:
        for images, importances in ((context.importance_images, True), (context.deletion_images, False)):
            for b in layer.batches(images, batch_size=8):
                yield b.index, b.activation, b.logits, b.tail, importances

    metrics = measure_faithfulness(
        explainer,
        batches(),
        encode=partial(encode, explainer),
        options=context.faithfulness,
        affine=context.affine,
        outputs=context.classifier.outputs,
        seed=job.seed,
    )
    return _keep(context.folder, job.key, metrics)


def _dissection(context: EvaluationContext, job: Job) -> Result:
    """Mean IoU of the concepts with their labels on the score images, at the on-rate that all methods share."""
    from netgloss.evaluation.dissect import dissect

    at = context.annotated
    assert job.explainer is not None
    assert at is not None
    dissected = dissect(
        job.explainer.cpu(), (at.data, at.label), (at.data, at.score), [at.rule], replicates=REPLICATES
    )[at.rule]
    detectors = dissected.detectors
    numbers = {
        DISSECTION: torch.cat([detectors.phi.mean()[None], dissected.phi_replicates.mean(1)]),
        f"layout_chance {DISSECTION}": detectors.layout.mean()[None],
        f"scattered_chance {DISSECTION}": detectors.chance.mean()[None],
    }
    numbers = {name: values.double() for name, values in numbers.items()}
    return _save(context.folder, job.key, Result(numbers, dict.fromkeys(numbers, len(at.score))))


def dictionary_scores(
    explainers: Sequence[Explainer], controls: Mapping[str, Sequence[Explainer]], *, scale: Tensor
) -> list[Score]:
    """Scores of the decoder's directions, which need no images; none for methods without a dictionary.

    Parameters
    ----------
    scale : (C,) standard deviation of each feature, for random directions that favour the layer's features.
    """
    atoms = dictionaries(explainers)
    if atoms is None:
        return []
    others = {name: dictionaries(fitted) for name, fitted in controls.items()}
    scores = []
    for cls in dictionary_metrics():
        if cls is Stability:
            continue
        metric = cls()
        baselines = {name: metric.estimate(control)[0] for name, control in others.items() if control is not None}
        score = dictionary_score(metric, atoms, baselines=baselines)
        if score.value is not None and np.isfinite(score.value):
            scores.append(score)
    if len(atoms) > 1:
        nonnegative = all(bool((d >= 0).all()) for d in atoms)
        k, c = atoms[0].shape
        baselines = {
            "random_dictionary": random_stability(k, c, scale=scale, nonnegative=nonnegative),
            "shuffled_dictionary": shuffled_stability(atoms),
        }
        score = dictionary_score(Stability(), atoms, baselines=baselines)
        if explainers[0].deterministic:
            note = " This method does not depend on the seed: 1 holds by construction."
            score = dataclasses.replace(score, definition=score.definition + note)
        scores.append(score)
    return scores


# -- results on disk --------------------------------------------------------------------------------------------------


def _keep(folder: Path | None, key: str, metrics: Mapping[str, ImageMetric]) -> Result:
    numbers = {n: torch.cat([m.compute()[None], m.replicates()]).double().cpu() for n, m in metrics.items()}
    return _save(folder, key, Result(numbers, {name: metric.num_images for name, metric in metrics.items()}))


def _save(folder: Path | None, key: str, result: Result) -> Result:
    from safetensors.torch import save

    if folder is not None:
        tensors = {name: values.contiguous() for name, values in result.numbers.items()}
        write_atomically(folder / f"{key}.safetensors", save(tensors, metadata={"counts": json.dumps(result.counts)}))
    return result


def _load(folder: Path | None, key: str) -> Result | None:
    from safetensors import SafetensorError, safe_open

    if folder is None or not (path := folder / f"{key}.safetensors").exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            numbers = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return Result(numbers, json.loads((file.metadata() or {})["counts"]))
    except (SafetensorError, OSError, KeyError, ValueError):
        return None

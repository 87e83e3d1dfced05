"""Measures fits on the same held-out images, each once: what was measured is kept beside its content's hash.

A :class:`Job` is one explainer with one question (scores, scores with shuffled codes, faithfulness, dissection). Its
answer is, for every metric, the value and its bootstrap replicates; it is written as soon as it is known, under the
hash of everything that it depends on. So an interrupted comparison continues, a second one with one method more
measures that method only, and equal controls of several methods are measured once.

All pending jobs share the passes over the activations: a batch is read once, and only encoding, decoding and the tail
run for each job.

Shape letters: B images, R replicates.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from netgloss.activations.layer import BATCH, Layer, LayerBatch, make_tail
from netgloss.errors import UserError
from netgloss.evaluation.faithful import FaithfulnessOptions, measure_faithfulness
from netgloss.evaluation.measure import Rebuild, Rebuilt, explainer_subject, mean_subject, measure, shuffled_subject
from netgloss.evaluation.paired import Measured
from netgloss.explainers.base import Explainer
from netgloss.metrics.base import REPLICATES, ImageMetric
from netgloss.metrics.faithfulness.importance import explain_class
from netgloss.progress import Progress, Silent
from netgloss.runs.run import write_atomically

if TYPE_CHECKING:
    from netgloss.activations import Store
    from netgloss.activations.annotated import MaskedLayer
    from netgloss.classifiers import Classifier, Tail
    from netgloss.data import ImageSource

_HELD_BYTES = 1 << 30
_AT_ONCE = 8
FORMAT = 1
"""Goes into every hash: raised when what is measured changes."""

Question = Literal["scores", "shuffled", "mean", "faithfulness", "dissection"]


class View(NamedTuple):
    """How a method sees the layer: its mean over the grid or whole, and with which layers above that it rebuilds."""

    pooled: bool = False
    above: tuple[str, ...] = ()


@dataclass(frozen=True)
class Annotated:
    """Annotated images of the layer: labels and thresholds come from some, scores from others."""

    data: MaskedLayer
    label: np.ndarray
    score: np.ndarray
    address: str
    rule: str


@dataclass
class Bench:
    """What all methods are judged on: one layer of one network, and its held-out images.

    Parameters
    ----------
    judged : images of the store that scores are measured on.
    folder : where measured numbers are kept.
    """

    store: Store
    name: str
    classifier: Classifier
    source: ImageSource | None
    tail: Tail
    judged: np.ndarray
    folder: Path
    faithfulness: FaithfulnessOptions
    annotated: Annotated | None = None
    progress: Progress = field(default_factory=Silent)

    def __post_init__(self) -> None:
        self.affine = self.tail.mode == "graph" and self.tail.is_affine(self.store.shapes[self.name])
        order = np.random.default_rng(0).permutation(self.judged)
        some = order[: self.faithfulness.images]
        count = min(self.faithfulness.importance_images, len(some))
        self.importance_images, self.deletion_images = np.sort(some[:count]), np.sort(some[count:])
        self._held: dict[View, _Held] = {}

    def layer(self, view: View) -> Layer:
        """The layer's held-out batches as some methods see them, kept in memory if they fit."""
        if view not in self._held:
            tail = make_tail(self.classifier, view.above[-1], self.source) if view.above else None
            parts = (self.store, self.name, self.tail, self.classifier, self.source, view.pooled, view.above, tail)
            self._held[view] = _Held(*parts)
        return self._held[view]

    def images_of(self, question: Question) -> str:
        """Names the set of images that a question is about: only equal ones can be paired."""
        if question == "dissection":
            assert self.annotated is not None
            return f"{self.annotated.address} {_digest(self.annotated.score.tobytes())}"
        chosen: tuple[np.ndarray, ...] = (self.judged,)
        if question == "faithfulness":
            chosen = (self.importance_images, self.deletion_images)
        return f"{self.store.key.address} {_digest(*(c.astype(np.int64).tobytes() for c in chosen))}"


class _Held(Layer):
    """A :class:`Layer` whose batches stay in memory after the first pass, if they are small enough."""

    def batches(
        self, images: np.ndarray, *, batch_size: int = BATCH, rank: int = 0, world: int = 1
    ) -> Iterator[LayerBatch]:
        kept: dict[Any, list[LayerBatch]] = self.__dict__.setdefault("_kept", {})
        key = (images.tobytes(), batch_size, rank, world)
        if key in kept:
            yield from kept[key]
            return
        pixels = int(np.prod(self.classifier.input_shape)) if self.tail.mode != "graph" else 0
        layers = sum(int(np.prod(self.store.shapes[name])) for name in (self.name, *self.above))
        size = 4 * (layers + pixels) * len(images)
        if size > _HELD_BYTES:
            yield from super().batches(images, batch_size=batch_size, rank=rank, world=world)
            return
        kept[key] = list(super().batches(images, batch_size=batch_size, rank=rank, world=world))
        yield from kept[key]


@dataclass(frozen=True)
class Answer:
    """What a job found: by metric, the value and its replicates (1 + R,), and the number of images."""

    numbers: dict[str, Tensor]
    counts: dict[str, int]


@dataclass(frozen=True)
class Job:
    """One explainer (or, for "mean", none) and one question."""

    question: Question
    explainer: Explainer | None
    view: View
    key: str
    seed: int = 0


def make_job(bench: Bench, question: Question, explainer: Explainer | None, *, view: View, seed: int = 0) -> Job:
    """A job with the hash of everything that its answer depends on."""
    parts: list[Any] = [FORMAT, REPLICATES, question, bench.name, bench.images_of(question), *view]
    if question == "shuffled":
        parts.append(seed)
    if question == "faithfulness":
        parts += [dataclasses.asdict(bench.faithfulness), seed]
    if question == "dissection":
        assert bench.annotated is not None
        parts += [_digest(bench.annotated.label.tobytes()), bench.annotated.rule]
    return Job(question, explainer, view, _digest(json.dumps(parts).encode(), *_content(explainer)), seed)


def _content(explainer: Explainer | None) -> Iterator[bytes]:
    """Everything that an explainer's answers depend on."""
    if explainer is None:
        return
    yield type(explainer).__qualname__.encode()
    yield Path(inspect.getfile(type(explainer))).read_bytes()
    yield json.dumps(dataclasses.asdict(explainer.config), default=str, sort_keys=True).encode()
    for name, value in sorted(explainer.state_dict().items()):
        yield name.encode()
        yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _digest(*parts: bytes) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little") + part)
    return found.hexdigest()[:24]


def concepts_of(explainer: Explainer, index: Tensor, activation: Tensor) -> Tensor:
    """Concepts of some images: ``encode``, or for codes that were made elsewhere a look-up by image."""
    lookup = getattr(explainer, "concepts_of_images", None)
    return explainer.encode(activation) if lookup is None else lookup(index)


def answer_all(
    bench: Bench, jobs: Sequence[Job], *, mean: Callable[[], Tensor]
) -> tuple[dict[str, Answer], dict[str, str]]:
    """Answers by key, and reasons by key for jobs that could not be answered.

    Parameters
    ----------
    mean : () -> (C,) mean activation of the fit rows, for the question "mean".
    """
    answers: dict[str, Answer] = {}
    reasons: dict[str, str] = {}
    pending: dict[str, Job] = {}
    for job in jobs:
        known = _load(bench.folder, job.key)
        if known is not None:
            answers[job.key] = known
        else:
            pending.setdefault(job.key, job)
    in_passes = [job for job in pending.values() if job.question in ("scores", "shuffled", "mean")]
    for view in dict.fromkeys(job.view for job in in_passes):
        layer = bench.layer(view)
        subjects: dict[str, Rebuild] = {}
        for job in in_passes:
            if job.view == view:
                try:
                    subjects[job.key] = _checked_subject(bench, job, layer, mean)
                except Exception as error:
                    reasons[job.key] = reason_of(error)
        keys = list(subjects)
        for start in range(0, len(keys), _AT_ONCE):
            group = {key: subjects[key] for key in keys[start : start + _AT_ONCE]}
            found, failed = _pass(group, layer, bench)
            reasons |= failed
            for key, metrics in found.items():
                answers[key] = _keep(bench.folder, key, metrics)
    others = [job for job in pending.values() if job.question in ("faithfulness", "dissection")]
    if others:
        bench.progress.start("faithfulness", len(others), unit="fits")
        for job in others:
            try:
                if job.question == "faithfulness":
                    answers[job.key] = _keep(bench.folder, job.key, _faithfulness(bench, job))
                else:
                    answers[job.key] = _dissection(bench, job)
            except Exception as error:
                reasons[job.key] = reason_of(error)
            bench.progress.advance()
        bench.progress.finish()
    return answers, reasons


def _pass(
    subjects: dict[str, Rebuild], layer: Layer, bench: Bench
) -> tuple[dict[str, dict[str, ImageMetric]], dict[str, str]]:
    """One pass for all subjects; if it fails, one for each, so that the others are measured."""
    try:
        return measure(subjects, layer, bench.judged, progress=bench.progress), {}
    except Exception as error:
        bench.progress.finish()
        if len(subjects) == 1:
            return {}, dict.fromkeys(subjects, reason_of(error))
    found: dict[str, dict[str, ImageMetric]] = {}
    failed: dict[str, str] = {}
    for key, subject in subjects.items():
        one, reason = _pass({key: subject}, layer, bench)
        found |= one
        failed |= reason
    return found, failed


def reason_of(error: Exception) -> str:
    """One line on what went wrong; a failure that is no user's mistake says its kind."""
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def _checked_subject(bench: Bench, job: Job, layer: Layer, mean: Callable[[], Tensor]) -> Rebuild:
    """The job's subject, tried on the first images, so that one that fails does not spoil a pass of many."""
    if job.question == "mean":
        return mean_subject(mean())
    assert job.explainer is not None
    explainer = job.explainer.to(bench.classifier.device)
    subject = (
        shuffled_subject(explainer, layer, bench.judged, seed=job.seed)
        if job.question == "shuffled"
        else _subject(explainer, contributions=job.view.pooled)
    )
    with torch.no_grad():
        subject(next(iter(layer.batches(bench.judged))))
    return subject


def _subject(explainer: Explainer, *, contributions: bool) -> Rebuild:
    """As ``evaluation.explainer_subject``, for codes made elsewhere too."""
    if not hasattr(explainer, "concepts_of_images"):
        return explainer_subject(explainer, contributions=contributions)

    def rebuild(batch: LayerBatch) -> Rebuilt:
        concepts = concepts_of(explainer, batch.index, batch.activation)
        values = None
        if contributions:
            values = explain_class(explainer, batch.tail, concepts, batch.logits, batch.logits.argmax(dim=1)).values
        return Rebuilt(
            concepts,
            explainer.decode(concepts),
            None,
            values,
        )

    return rebuild


def _faithfulness(bench: Bench, job: Job) -> dict[str, ImageMetric]:
    assert job.explainer is not None
    explainer, layer = job.explainer.to(bench.classifier.device), bench.layer(job.view)

    def batches() -> Iterator[tuple[Tensor, Tensor, Tensor, Callable[[Tensor], Tensor], bool]]:
        for images, importances in ((bench.importance_images, True), (bench.deletion_images, False)):
            for b in layer.batches(images, batch_size=8):
                yield b.index, b.activation, b.logits, b.tail, importances

    return measure_faithfulness(
        explainer,
        batches(),
        encode=lambda index, activation: concepts_of(explainer, index, activation),
        options=bench.faithfulness,
        affine=bench.affine,
        seed=job.seed,
    )


def _dissection(bench: Bench, job: Job) -> Answer:
    """Mean IoU of the concepts with their labels on the score images, at the on-rate that all methods share."""
    from netgloss.evaluation.dissect import dissect

    assert job.explainer is not None
    assert bench.annotated is not None
    at = bench.annotated
    rule = at.rule
    found = dissect(job.explainer.cpu(), (at.data, at.label), (at.data, at.score), [rule], replicates=REPLICATES)[rule]
    columns = {
        "dissection_mean_iou": torch.cat([found.detectors.phi.mean()[None], found.phi_replicates.mean(1)]),
        "layout_chance dissection_mean_iou": found.detectors.layout.mean()[None],
        "scattered_chance dissection_mean_iou": found.detectors.chance.mean()[None],
    }
    numbers = {name: values.double() for name, values in columns.items()}
    return _save(bench.folder, job.key, Answer(numbers, dict.fromkeys(numbers, len(at.score))))


def _keep(folder: Path, key: str, metrics: Mapping[str, ImageMetric]) -> Answer:
    numbers = {n: torch.cat([m.compute()[None], m.replicates()]).double().cpu() for n, m in metrics.items()}
    return _save(folder, key, Answer(numbers, {name: metric.num_images for name, metric in metrics.items()}))


def _save(folder: Path, key: str, answer: Answer) -> Answer:
    from safetensors.torch import save

    tensors = {name: values.contiguous() for name, values in answer.numbers.items()}
    write_atomically(folder / f"{key}.safetensors", save(tensors, metadata={"counts": json.dumps(answer.counts)}))
    return answer


def _load(folder: Path, key: str) -> Answer | None:
    from safetensors import SafetensorError, safe_open

    path = folder / f"{key}.safetensors"
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            numbers = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return Answer(numbers, json.loads((file.metadata() or {})["counts"]))
    except (SafetensorError, OSError, KeyError, ValueError):
        return None


def together(answers: Sequence[Answer], metric: str, images: str) -> Measured | None:
    """One metric over the fits of a method; None if a fit lacks it."""
    if not answers or any(metric not in answer.numbers for answer in answers):
        return None
    rows = torch.stack([answer.numbers[metric] for answer in answers])
    return Measured(rows[:, 0], rows[:, 1:], images)

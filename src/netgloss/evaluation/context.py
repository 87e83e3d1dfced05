"""What all subjects of an evaluation share: a layer of a network, the held-out images, and where results are kept."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from netgloss.activations.annotated import MaskedLayer
from netgloss.activations.layer import BATCH, Layer, LayerBatch, make_tail
from netgloss.evaluation.faithful import FaithfulnessOptions
from netgloss.evaluation.subjects import Subject, View, make_controls
from netgloss.explainers.base import Explainer
from netgloss.progress import Progress, Silent
from netgloss.training import ActivationStream
from netgloss.training.stream import moments

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from netgloss.activations import Store
    from netgloss.classifiers import Classifier, Tail
    from netgloss.data import ImageSource

_KEPT_BYTES = 1 << 30


@dataclass(frozen=True)
class Annotated:
    """Annotated images of the layer.

    Attributes
    ----------
    label, score : indices of the images that labels and thresholds, and the scores, come from.
    address : of the store of their activations. rule : when a concept counts as on, such as "rate:0.005".
    """

    data: MaskedLayer
    label: np.ndarray
    score: np.ndarray
    address: str
    rule: str


@dataclass
class EvaluationContext:
    """A layer of a network with its held-out images, as all subjects are evaluated on it.

    Parameters
    ----------
    name : of the layer. tail : its path to the logits.
    fit_images, images : indices of the store: what methods were fitted on, what scores are measured on.
    folder : where results are kept, to be read by the next call; None keeps nothing.
    faithfulness : how many images concepts are deleted on; 0 images leave faithfulness out.
    annotated : adds the question "dissection".
    fabric : the processes that share the images; only with ``strict``.
    strict : a subject that fails ends the evaluation; otherwise it gets a reason and the others continue.
    """

    store: Store
    name: str
    classifier: Classifier
    source: ImageSource | None
    tail: Tail
    fit_images: np.ndarray
    images: np.ndarray
    folder: Path | None = None
    faithfulness: FaithfulnessOptions = field(default_factory=lambda: FaithfulnessOptions(images=0))
    annotated: Annotated | None = None
    fabric: Fabric | None = None
    strict: bool = False
    progress: Progress = field(default_factory=Silent)

    def __post_init__(self) -> None:
        self.affine = self.tail.mode == "graph" and self.tail.is_affine(self.store.shapes[self.name])
        order = np.random.default_rng(0).permutation(self.images)
        some = order[: self.faithfulness.images]
        count = min(self.faithfulness.importance_images, len(some))
        self.importance_images, self.deletion_images = np.sort(some[:count]), np.sort(some[count:])
        self._layers: dict[View, _CachedLayer] = {}
        self._streams: dict[bool, ActivationStream] = {}
        self._moments: dict[bool, tuple[torch.Tensor, torch.Tensor]] = {}
        self._controls: dict[tuple[View, int, tuple[int, ...]], dict[str, list[Explainer]]] = {}

    @property
    def notes(self) -> list[str]:
        """What the kind of the classifier's logits means for the scores."""
        if self.classifier.outputs == "none":
            return [
                "the network has no head: predictions, contributions and scores of its logits are left out, and "
                "concepts have no order of importance"
            ]
        if self.classifier.outputs != "multilabel":
            return []
        return [
            "an image may have several labels: agreement is the share of labels whose logit keeps its sign, "
            "probabilities are sigmoids, and the prediction that is explained is the strongest label; accuracy_change, "
            "completeness and mistakes are left out, since they need all labels of every image"
        ]

    def layer(self, view: View) -> Layer:
        """The layer as some methods read it; its batches stay in memory if they fit."""
        if view not in self._layers:
            tail = make_tail(self.classifier, view.above[-1], self.source) if view.above else None
            parts = (self.store, self.name, self.tail, self.classifier, self.source, view.pooled, view.above, tail)
            self._layers[view] = _CachedLayer(*parts)
        return self._layers[view]

    def stream(self, pooled: bool) -> ActivationStream:
        """The rows that controls are fitted on."""
        if pooled not in self._streams:
            self._streams[pooled] = ActivationStream(
                self.store, self.name, self.fit_images, reads="pooled" if pooled else "rows"
            )
        return self._streams[pooled]

    def moments(self, pooled: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance (C,) of the features over the fit."""
        if pooled not in self._moments:
            self._moments[pooled] = moments(self.stream(pooled))
        return self._moments[pooled]

    def controls(self, subject: Subject) -> dict[str, list[Explainer]]:
        """Control explainers with as many concepts as the subject has."""
        seeds = tuple(subject.seeds) if self.strict else tuple(range(max(len(subject.seeds), 1)))
        if not self.strict and len(seeds) == 1:
            seeds = (0, 1, 2)
        first = subject.explainers[0]
        key = (subject.view, first.num_concepts, seeds)
        if key not in self._controls:
            stream = self.stream(subject.view.pooled)
            self._controls[key] = make_controls(stream, first.spec, num_concepts=first.num_concepts, seeds=seeds)
        return self._controls[key]

    def images_of(self, question: str) -> str:
        """Identifies the set of images that a question is about: only results on equal sets can be paired."""
        if question == "dissection":
            assert self.annotated is not None
            return f"{self.annotated.address} {digest(self.annotated.score.tobytes())}"
        chosen: tuple[np.ndarray, ...] = (self.images,)
        if question == "faithfulness":
            chosen = (self.importance_images, self.deletion_images)
        return f"{self.store.key.address} {digest(*(c.astype(np.int64).tobytes() for c in chosen))}"


class _CachedLayer(Layer):
    """A :class:`Layer` whose batches stay in memory after the first pass, if they are small enough."""

    def batches(
        self, images: np.ndarray, *, batch_size: int = BATCH, rank: int = 0, world: int = 1
    ) -> Iterator[LayerBatch]:
        cache: dict[Any, list[LayerBatch]] = self.__dict__.setdefault("_cache", {})
        key = (images.tobytes(), batch_size, rank, world)
        if key in cache:
            yield from cache[key]
            return
        pixels = int(np.prod(self.classifier.input_shape)) if self.tail.mode != "graph" else 0
        layers = sum(int(np.prod(self.store.shapes[name])) for name in (self.name, *self.above))
        if 4 * (layers + pixels) * len(images) > _KEPT_BYTES:
            yield from super().batches(images, batch_size=batch_size, rank=rank, world=world)
            return
        cache[key] = list(super().batches(images, batch_size=batch_size, rank=rank, world=world))
        yield from cache[key]


def digest(*parts: bytes) -> str:
    """A short hash of byte strings."""
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(len(part).to_bytes(8, "little") + part)
    return hashed.hexdigest()[:24]

"""A layer of a classifier as fits, metrics and explanations read it: stored activations, logits, and its tail.

Shape letters: B images, C H W the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from netgloss.activations.capture import image_batches
from netgloss.activations.store import Store
from netgloss.class_names import match_classes
from netgloss.classifiers import Outputs, Tail, Taps, probabilities
from netgloss.errors import UserError

if TYPE_CHECKING:
    from netgloss.classifiers import Classifier
    from netgloss.data import ImageSource
    from netgloss.explainers.base import Explainer


BATCH = 64


@dataclass(frozen=True)
class Layer:
    """A layer of a classifier: its activations on disk and the path to the logits.

    With ``pooled``, an activation is the mean (B, C) over the grid, and the tail reads it spread evenly over the grid.
    For an explainer that rebuilds layers above, ``above`` names them and ``above_tail`` is the tail of the last one;
    the batches' tail then takes a dict of their activations too.
    """

    store: Store
    name: str
    tail: Tail
    classifier: Classifier
    source: ImageSource | None = None
    pooled: bool = False
    above: tuple[str, ...] = ()
    above_tail: Tail | None = None

    def batches(
        self, images: np.ndarray, *, batch_size: int = BATCH, rank: int = 0, world: int = 1
    ) -> Iterator[LayerBatch]:
        """Activations, logits and class labels of some images, with the tail ready for each batch; every ``world``-th
        batch from ``rank`` on.
        """
        for start in range(rank * batch_size, len(images), world * batch_size):
            index = images[start : start + batch_size]
            activation = torch.from_numpy(self.store.read(self.name, index)).float().to(self.classifier.device)
            tail = tail_for(self.tail, self.classifier, self.source, index)
            stored = self.store.read_logits(index)
            with torch.no_grad():
                logits = tail(activation) if stored is None else torch.from_numpy(stored).to(activation.device)
            labels = torch.from_numpy(self.labels[index]).to(activation.device)
            if self.pooled:
                tail = spread_tail(tail, tuple(activation.shape[2:]))
                activation = activation.mean(dim=(2, 3)) if activation.ndim == 4 else activation
            upper = {
                name: torch.from_numpy(self.store.read(name, index)).float().to(activation.device)
                for name in self.above
            }
            if self.above_tail is not None:
                tail = either_tail(tail, tail_for(self.above_tail, self.classifier, self.source, index), self.above[-1])
            outputs = self.classifier.outputs
            yield LayerBatch(torch.from_numpy(index).long(), activation, logits, labels, tail, upper, outputs=outputs)

    def maps(self, images: np.ndarray, *, batch_size: int = 64) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Image indices and activations before pooling, (B, C, H, W), of a pooled map layer; nothing of others."""
        if self.pooled and len(self.store.shapes[self.name]) == 3:
            for start in range(0, len(images), batch_size):
                index = images[start : start + batch_size]
                yield index, torch.from_numpy(self.store.read(self.name, index)).float().to(self.classifier.device)

    @cached_property  # matching 1,000 class names takes 40 ms
    def labels(self) -> np.ndarray:
        """(N,) class index of the classifier for every image of the store, -1 where it is unknown.

        All are -1 for a classifier of several labels: the one label that comes with an image does not say that it has
        none of the others.
        """
        if self.classifier.outputs == "multilabel":
            return np.full(len(self.store), -1)
        return class_labels(self.store, self.classifier.class_names, self.classifier.wnids)


@dataclass(frozen=True)
class LayerBatch:
    """A batch of images at a layer.

    Attributes
    ----------
    index : (B,) places of the images in the store. activation : as the explainer reads it.
    logits : (B, classes). labels : (B,), -1 for unknown.
    tail : from the activation, or a dict of the layers above, to logits.
    upper : activations of the layers above, where the explainer rebuilds them.
    maps : (B, C, H, W) before pooling, only from a :class:`LayerReader` of a pooled map layer.
    outputs : the kind of the logits.
    """

    index: Tensor
    activation: Tensor
    logits: Tensor
    labels: Tensor
    tail: Callable[[Any], Tensor]
    upper: dict[str, Tensor] = field(default_factory=dict)
    maps: Tensor | None = None
    outputs: Outputs = "multiclass"

    @property
    def probabilities(self) -> Tensor:
        """(B, classes), by the kind of the logits."""
        return probabilities(self.logits, self.outputs)


def check_origin(store: Store, *, classifier: Classifier | None = None, source: ImageSource | None = None) -> None:
    """Checks that a store holds the activations of ``classifier`` and of the images of ``source``.

    Raises
    ------
    UserError : the activations are those of another network or of other images.
    """
    if classifier is not None and classifier.weights_hash != store.key.weights_hash:
        raise UserError(f"the classifier {classifier.name!r} is not the one whose activations {store.path} holds")
    if source is not None and not store.is_of(source):
        raise UserError(f"{source.description} are not the images whose activations {store.path} holds")


def class_labels(store: Store, class_names: Sequence[str], wnids: Sequence[str] | None) -> np.ndarray:
    """(N,) class index of the classifier for every image of a store, -1 where it is unknown."""
    names = list(store.info.class_names)
    if not names:
        return np.full(len(store), -1)
    mapping = match_classes(names, class_names, wnids)
    return np.where(store.targets >= 0, np.asarray(mapping)[np.maximum(store.targets, 0)], -1)


def tail_for(
    tail: Tail, classifier: Classifier, source: ImageSource | None, index: np.ndarray
) -> Callable[[Tensor], Tensor]:
    """The tail for the activations of images ``index`` of ``source``, which it needs unless its mode is "graph"."""
    if tail.mode == "graph":
        return tail
    if source is None:
        raise UserError(f"layer {tail.layer!r} needs the images to compute logits ({tail.reason})")
    from netgloss.activations import image_batches

    pixels, _ = next(image_batches(classifier, source, list(index), batch_size=len(index), workers=0))
    return _bound(tail, pixels)


def either_tail(
    tail: Callable[[Tensor], Tensor], above: Callable[[Tensor], Tensor], name: str
) -> Callable[[Any], Tensor]:
    """Logits of an activation of the layer, or of a dict with that of the layer ``name`` above it."""
    return lambda given: above(given[name]) if isinstance(given, dict) else tail(given)


def spread_tail(tail: Callable[[Tensor], Tensor], grid: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """The tail of a pooled activation (B, C), spread evenly over the grid (H, W) of the layer (() for vectors)."""
    return lambda pooled: tail(pooled.reshape(*pooled.shape, *(1 for _ in grid)).expand(*pooled.shape, *grid))


_FIT_SHARE = 0.8


def split_store(store: Store) -> tuple[np.ndarray, np.ndarray]:
    """Readable images of a store as (fit, held-out).

    As given, if the images were joined from two sources; else four fifths of each class, by the hash of the id, fit.
    """
    from netgloss.data import split_ids

    valid = store.valid
    num_fit = store.info.images.get("num_fit")
    if num_fit is not None:
        return valid[valid < num_fit], valid[valid >= num_fit]
    fit_part, held = split_ids([store.ids[i] for i in valid], store.targets[valid], fraction=_FIT_SHARE)
    return valid[fit_part], valid[held]


def make_tail(classifier: Classifier, layer: str, source: ImageSource | None) -> Tail:
    """The path from ``layer`` to the logits, verified on two images of ``source`` (on noise without one)."""
    if source is not None:
        example = next(image_batches(classifier, source, range(min(2, len(source))), workers=0))[0]
    else:
        generator = torch.Generator().manual_seed(0)
        example = torch.randn(2, *classifier.input_shape, generator=generator)
    return Tail(classifier, classifier.check_layer(layer), example=example.to(classifier.device))


class LayerReader:
    """Reads a layer for images that no store holds, as an explainer sees it.

    Parameters
    ----------
    name : of the layer.
    source : images that the tails are verified on; default noise.
    """

    def __init__(
        self, classifier: Classifier, name: str, explainer: Explainer, source: ImageSource | None = None
    ) -> None:
        self.classifier, self.name, self.pooled = classifier, name, explainer.reads == "pooled"
        self.tail = make_tail(classifier, name, source)
        self.above = list(explainer.spec.upper)[-1] if explainer.target == "upper" else ""
        self.above_tail = make_tail(classifier, self.above, source) if self.above else None

    def batch(self, pixels: Tensor) -> LayerBatch:
        """The layer's batch for pixels (B, m, S, S') as the network reads them.

        Raises
        ------
        UserError : the network answers with NaN or Inf.
        """
        pixels = pixels.to(self.classifier.device)
        with torch.no_grad(), Taps(self.classifier.net, [self.name], stop=False) as taps:
            activation, logits = taps(pixels)[self.name], taps.logits
        if not (activation.isfinite().all() and logits.isfinite().all()):
            raise UserError("the network answers with NaN or Inf for this picture")
        tail = _bound(self.tail, pixels)
        maps = None
        if self.pooled:
            tail = spread_tail(tail, tuple(activation.shape[2:]))
            if activation.ndim == 4:
                maps, activation = activation, activation.mean(dim=(2, 3))
        if self.above_tail is not None:
            tail = either_tail(tail, _bound(self.above_tail, pixels), self.above)
        index, labels = torch.arange(len(pixels)), torch.full((len(pixels),), -1, device=pixels.device)
        outputs = self.classifier.outputs
        return LayerBatch(index, activation, logits, labels, tail, maps=maps, outputs=outputs)


def _bound(tail: Tail, pixels: Tensor) -> Callable[[Tensor], Tensor]:
    """The tail for the activations of images with these pixels, or of several versions of each."""
    if tail.mode == "graph":
        return tail
    return lambda activation: tail(activation, images=pixels.repeat(len(activation) // len(pixels), 1, 1, 1))

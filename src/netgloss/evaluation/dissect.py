"""Dissects explainers with the masks of a data set: thresholds and labels from some images, scores from others.

The store holds the activations, the annotations follow the images through the network's preprocessing onto the mask
grid, and every explainer goes over both twice: the *label* images give thresholds and labels, the *score* images the
numbers. Definitions and what they cannot show: ``netgloss.metrics.dissection``.

Shape letters: B images, C features, I concepts, h w the layer's map, H W the mask grid, L labels, N rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from netgloss.activations import Store
from netgloss.classifiers import Preprocessing
from netgloss.data import ImageAnnotation, ImageSource, place, to_grid
from netgloss.errors import UserError, nearest
from netgloss.explainers.base import Explainer, to_rows
from netgloss.metrics.dissection import GRID, Detectors, Dissection, Masks, Overlaps, Vocabulary
from netgloss.metrics.dissection_rates import extent, on_rates, rate_thresholds, shared_thresholds
from netgloss.metrics.dissection_significance import PermutationTest, blocks_of

_HELD = 1 << 26
"""Numbers of the label rows that are kept in memory between passes (256 MiB); more are computed again."""
LABEL_SHARE = 0.6
"""Share of the annotated images that gives labels and thresholds, where there is one set only."""


def mask_grid(annotation: ImageAnnotation, labels: Sequence[str], grid: tuple[int, int]) -> np.ndarray:
    """(L, H, W) bool of a placed annotation: masks by the pixel nearest to each cell's centre, boxes and keypoints by
    half coverage."""
    found = np.zeros((len(labels), *grid), bool)
    number = {label: i for i, label in enumerate(labels)}
    if annotation.mask is not None:
        width, height = annotation.size
        rows = ((np.arange(grid[0]) + 0.5) * height / grid[0]).astype(int)
        columns = ((np.arange(grid[1]) + 0.5) * width / grid[1]).astype(int)
        values = annotation.mask[np.ix_(rows, columns)]
        for value, label in annotation.mask_labels.items():
            if label in number:
                found[number[label]] |= values == value
    if annotation.boxes or annotation.keypoints:
        for label, cover in to_grid(annotation, grid).items():
            if label in number and label not in annotation.mask_labels.values():
                found[number[label]] |= cover >= 0.5
    return found


class MaskedLayer:
    """A layer's activations of annotated images, with their masks.

    Parameters
    ----------
    store : activations of whole maps.
    source : the store's images, with annotations.
    preprocessing : of the network.
    labels : which labels; default all that the annotations name.
    merge : turns a label into another one (left and right into one, say); None drops it.

    Attributes
    ----------
    images : (n,) indices of the readable images that have an annotation.
    vocabulary : labels; one category for all, or one a label where some images leave labels unannotated.
    """

    def __init__(
        self,
        store: Store,
        layer: str,
        source: ImageSource,
        preprocessing: Preprocessing,
        *,
        labels: Sequence[str] | None = None,
        merge: Callable[[str], str | None] | None = None,
        grid: tuple[int, int] = GRID,
    ) -> None:
        if store.is_subsampled(layer):
            raise UserError(f"layer {layer!r} was captured with --positions; dissection needs whole maps")
        self.store, self.layer, self.grid = store, store.check_layer(layer), grid
        merge = merge or (lambda label: label)
        annotated, packed, told = [], [], []
        chosen = labels is not None
        if labels is None and source.annotations is not None:
            labels = [m for label in source.annotations.labels if (m := merge(label)) is not None]
        names: dict[str, None] = dict.fromkeys(labels or ())
        placed: list[ImageAnnotation] = []
        told_of = source.annotations.labels if source.annotations is not None else ()
        known = {m for label in told_of if (m := merge(label)) is not None}
        for i in store.valid.tolist():
            annotation = source.annotation(i)
            if annotation is None:
                continue
            annotation = place(annotation, preprocessing.geometry(*source.size(i)))
            seen = [*annotation.mask_labels.values(), *(b[0] for b in annotation.boxes)]
            seen += [k[0] for k in annotation.keypoints]
            merged_seen = [m for label in seen if (m := merge(label)) is not None]
            known |= set(merged_seen)
            if labels is None:
                names |= dict.fromkeys(merged_seen)
            annotated.append(i)
            placed.append(annotation)
        if not annotated:
            raise UserError(f"none of the {len(store)} images has an annotation")
        if not names:
            raise UserError(f"the annotations of {len(annotated)} images hold no label")
        own = {name: [] for name in names}  # type: dict[str, list[str]]
        for annotation in placed:
            for label in dict.fromkeys(
                [
                    *annotation.mask_labels.values(),
                    *(b[0] for b in annotation.boxes),
                    *(k[0] for k in annotation.keypoints),
                ]
            ):
                if (merged := merge(label)) in own and label not in own[merged]:
                    own[merged].append(label)
        unknown = [name for name in names if chosen and name not in known]
        if unknown:
            close = nearest(unknown[0], known) or sorted(known)
            raise UserError(f"no annotation has a label {unknown[0]!r}; did you mean {', '.join(close)}?")
        raw = [(label, k) for k, merged in enumerate(own) for label in own[merged]]
        partial = any(annotation.annotated is not None for annotation in placed)
        for annotation in placed:
            fine = mask_grid(annotation, [label for label, _ in raw], grid)
            masks = np.zeros((len(names), *grid), bool)
            for row, (_, k) in zip(fine, raw, strict=True):
                masks[k] |= row
            packed.append(np.packbits(masks.reshape(-1)))
            told.append([all(annotation.tells(label) for label in own[name]) for name in names] if partial else [True])
        self.images = np.array(annotated)
        self._packed = dict(zip(annotated, packed, strict=True))
        self._told = dict(zip(annotated, told, strict=True))
        all_names = tuple(names)
        self.vocabulary = (
            Vocabulary(all_names, all_names, tuple(range(len(all_names)))) if partial else Vocabulary(all_names)
        )

    def masks(self, images: np.ndarray) -> Masks:
        """Masks of some annotated images."""
        number = len(self.vocabulary.labels)
        size = number * self.grid[0] * self.grid[1]
        bits = np.stack([np.unpackbits(self._packed[i], count=size) for i in images.tolist()])
        labels = torch.from_numpy(bits.reshape(-1, number, *self.grid)).bool()
        return Masks(labels, torch.tensor([self._told[i] for i in images.tolist()]))

    def batches(self, images: np.ndarray, *, batch_size: int = 32) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Indices and activations (B, C[, h, w]) of some images."""
        for start in range(0, len(images), batch_size):
            index = images[start : start + batch_size]
            yield index, torch.from_numpy(self.store.read(self.layer, index)).float()

    def rows(self, images: np.ndarray) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All rows of some images as a supervised method reads them: rows (N, C), labels (N, L) and which count (N,
        L), by the mask cell nearest to each position's centre, and the image of each row (N,)."""
        shape = self.store.shapes[self.layer]
        h, w = shape[1:] if len(shape) == 3 else (1, 1)
        ys = ((np.arange(h) + 0.5) * self.grid[0] / h).astype(int)
        xs = ((np.arange(w) + 0.5) * self.grid[1] / w).astype(int)
        values, labels, counted = [], [], []
        for index, activation in self.batches(images):
            masks = self.masks(index)
            assert masks.annotated is not None
            values.append(to_rows(activation).to(getattr(torch, self.store.key.dtype)))
            labels.append(to_rows(masks.labels[:, :, ys][:, :, :, xs]))
            counted.append(masks.annotated[:, list(self.vocabulary.category)].repeat_interleave(h * w, 0))
        image = torch.from_numpy(images).repeat_interleave(h * w)
        return torch.cat(values), torch.cat(labels), torch.cat(counted), image


def split_annotated(data: MaskedLayer) -> tuple[np.ndarray, np.ndarray]:
    """The annotated images as (label, score), by the hash of their names."""
    from netgloss.data import split_ids

    ids = [data.store.ids[i] for i in data.images]
    label, score = split_ids(ids, data.store.targets[data.images], fraction=LABEL_SHARE)
    if not len(label) or not len(score):
        raise UserError(f"dissection needs at least 2 annotated images of a class, got {len(ids)}")
    return data.images[label], data.images[score]


@dataclass(frozen=True)
class Dissected:
    """What one rule gives for one explainer.

    Attributes
    ----------
    rule : ``own``, ``rate:R`` or ``shared:R``. thresholds : (I,).
    label_rate, label_pixel_rate : mean on-rate over the rows, and over the mask pixels, of the label images.
    detectors : labelled concepts on the score images.
    label_iou, runner_up, runner_up_iou : (I,) on the label images.
    phi_replicates : (K, I) bootstrap of phi over score images.
    """

    rule: str
    thresholds: Tensor
    label_rate: float
    label_pixel_rate: float
    detectors: Detectors
    label_iou: Tensor
    runner_up: Tensor
    runner_up_iou: Tensor
    phi_replicates: Tensor

    def scores(self) -> dict[str, float]:
        """The scores of the rule, with its on-rates."""
        return {**self.detectors.scores(), "label_rate": self.label_rate, "label_pixel_rate": self.label_pixel_rate}


def own_thresholds(explainer: Explainer, lowest: Tensor) -> Tensor | None:
    """(I,) what the method itself calls on: its thresholds, 0 for codes that are never negative; None if it has
    none."""
    told = getattr(explainer, "thresholds", None)
    if told is not None:
        return told().detach().cpu().float()
    return torch.zeros_like(lowest) if bool((lowest >= 0).all()) else None


@torch.no_grad()
def dissect(
    explainer: Explainer,
    label: tuple[MaskedLayer, np.ndarray],
    score: tuple[MaskedLayer, np.ndarray],
    rules: Sequence[str],
    *,
    replicates: int = 0,
    batch_size: int = 32,
) -> dict[str, Dissected]:
    """Every rule on one explainer: two passes over the label images, one over the score images (and one for
    thresholds).

    Parameters
    ----------
    label, score : annotated data and image indices; the two must not share an image.
    rules : ``"own"`` (left out of the result where the method has none), ``"rate:0.005"``, ``"shared:0.01"``.

    Raises
    ------
    UserError : score images among the label images, other labels in the two sets, or an unknown rule.
    """
    (label_data, label_images), (score_data, score_images) = label, score
    if label_data is score_data and len(np.intersect1d(label_images, score_images)):
        raise UserError("score images must not be among the label images: choose disjoint images")
    if label_data.vocabulary != score_data.vocabulary:
        raise UserError("label and score images must be annotated with the same labels: pass the same labels=")

    held: list[Tensor] = []

    def chunks() -> Iterator[Tensor]:
        if held:
            yield from held
            return
        parts: list[Tensor] = []
        elements = 0
        for _, activation in label_data.batches(label_images, batch_size=batch_size):
            rows = to_rows(explainer.encode(activation))
            elements += rows.numel()
            if elements <= _HELD:
                parts.append(rows)
            yield rows
        if elements <= _HELD:
            held.extend(parts)

    names, thresholds = _thresholds(explainer, chunks, rules)
    rates = on_rates(chunks, thresholds).mean(1)
    first = Dissection(thresholds, label_data.vocabulary, grid=label_data.grid)
    _stream(first, explainer, label_data, label_images, batch_size)
    counted: Overlaps = first.compute()
    chosen, label_iou, second, second_iou = counted.best()
    last = Dissection(thresholds, label_data.vocabulary, grid=score_data.grid, chosen=chosen, replicates=replicates)
    _stream(last, explainer, score_data, score_images, batch_size)
    found: Overlaps = last.compute()
    return {
        name: Dissected(
            name,
            thresholds[r],
            float(rates[r]),
            float(counted.on_rate()[r].mean()),
            found.detectors(r),
            label_iou[r],
            second[r],
            second_iou[r],
            found.replicate_phi(r),
        )
        for r, name in enumerate(names)
    }


def _stream(metric: Dissection, explainer: Explainer, data: MaskedLayer, images: np.ndarray, batch_size: int) -> None:
    for index, activation in data.batches(images, batch_size=batch_size):
        metric.update(torch.from_numpy(index), explainer.encode(activation), data.masks(index))


def _thresholds(
    explainer: Explainer, chunks: Callable[[], Iterator[Tensor]], rules: Sequence[str]
) -> tuple[list[str], Tensor]:
    """Names and thresholds (R, I) of the rules that apply."""
    known = extent(chunks)
    wanted: dict[str, list[float]] = {"rate": [], "shared": []}
    for rule in rules:
        kind, _, rate = rule.partition(":")
        if rule != "own":
            if kind not in wanted or not _is_rate(rate):
                raise UserError(f"unknown rule {rule!r}; use own, rate:0.005 or shared:0.01")
            wanted[kind].append(float(rate))
    found: dict[str, Tensor] = {}
    for kind, function in (("rate", rate_thresholds), ("shared", shared_thresholds)):
        if wanted[kind]:
            values = function(chunks, wanted[kind], known=known)
            found |= {f"{kind}:{rate:g}": row for rate, row in zip(wanted[kind], values, strict=True)}
    own = own_thresholds(explainer, known.low)
    if own is not None:
        found["own"] = own
    names = [name for rule in rules if (name := _plain(rule)) in found]
    if not names:
        raise UserError(f"{type(explainer).__name__} has no threshold of its own: ask for a rate, such as rate:0.005")
    return names, torch.stack([found[name] for name in names])


def _plain(rule: str) -> str:
    kind, _, rate = rule.partition(":")
    return f"{kind}:{float(rate):g}" if rate else rule


def _is_rate(text: str) -> bool:
    try:
        return 0 <= float(text) < 1 and math.isfinite(float(text))
    except ValueError:
        return False


@torch.no_grad()
def significance(
    explainer: Explainer, found: Dissected, data: MaskedLayer, images: np.ndarray, *, seed: int = 0
) -> dict[str, Tensor]:
    """The permutation test of one rule's labels on the score images, one block of them after the other; see
    :class:`~netgloss.metrics.dissection_significance.PermutationTest`."""
    test = PermutationTest(found.thresholds, found.detectors.labels, data.vocabulary, seed=seed)
    for block in blocks_of(len(images), seed=seed):
        some = np.sort(images[block.numpy()])
        maps = torch.cat([explainer.encode(activation) for _, activation in data.batches(some)])
        test.add(maps, data.masks(some))
    return test.compute()

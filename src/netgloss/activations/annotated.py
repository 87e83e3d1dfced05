"""A layer with the annotations of its images: masks on a common grid, placed as the network sees the images.

Shape letters: C features, h w the map of the layer, H W the mask grid, L labels, N rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from netgloss.activations.store import Store
from netgloss.classifiers import Preprocessing
from netgloss.data import ImageAnnotation, place, to_grid
from netgloss.data.masks import GRID, Masks, Vocabulary
from netgloss.errors import UserError, nearest
from netgloss.explainers.base import to_rows

if TYPE_CHECKING:
    from netgloss.data import ImageSource


LABEL_SHARE = 0.6
"""Share of the annotated images that gives labels and thresholds, where there is one set only."""


def mask_grid(annotation: ImageAnnotation, labels: Sequence[str], grid: tuple[int, int]) -> np.ndarray:
    """(L, H, W) bool of a placed annotation: masks by the pixel nearest to each cell's centre, boxes and keypoints by
    half coverage.
    """
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
    vocabulary : labels; one category for all, or one per label where some images leave labels unannotated.
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
        annotated, packed, complete = [], [], []
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
            complete.append(
                [all(annotation.covers(label) for label in own[name]) for name in names] if partial else [True]
            )
        self.images = np.array(annotated)
        self._packed = dict(zip(annotated, packed, strict=True))
        self._complete = dict(zip(annotated, complete, strict=True))
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
        return Masks(labels, torch.tensor([self._complete[i] for i in images.tolist()]))

    def batches(self, images: np.ndarray, *, batch_size: int = 32) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Indices and activations (B, C[, h, w]) of some images."""
        for start in range(0, len(images), batch_size):
            index = images[start : start + batch_size]
            yield index, torch.from_numpy(self.store.read(self.layer, index)).float()

    def rows(self, images: np.ndarray) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All rows of some images as a supervised method reads them: rows (N, C), labels (N, L) and which count (N,
        L), by the mask cell nearest to each position's centre, and the image of each row (N,).
        """
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

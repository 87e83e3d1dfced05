"""From a store to training batches.

Data is cut into *blocks* of whole chunks that fit a memory budget; each epoch shuffles the chunks into blocks and the
rows inside a block. Data that fits is one block that stays in memory. Which rows make up step k depends on the seed
and k only, so that a resumed fit sees the rows that the undisturbed one would have seen.

Shape letters: N rows, C features, B images, H W grid.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from netgloss.activations import Store
from netgloss.errors import UserError
from netgloss.explainers.base import Batch, LayerSpec, from_rows, to_rows

DEFAULT_MEMORY = 2 << 30
_EXAMPLES = 2048
_POOLED = 256
_WHOLE = 16

Logits = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Surroundings:
    """What a fit may need of the network around the layer; ``training/inputs.py`` fills it in.

    Parameters
    ----------
    upper : layers of the store whose activations come along.
    pixels : uint8 (n, m, S, S') of images of the store, by their indices.
    image : (m, S, S').
    tail : differentiable logits of the layer's whole activations, for the images with the given indices.
    to_logits, to_code : differentiable logits, and activations of the layer, of images (., m, S, S') in [0, 1].
    section : makes a fresh copy of the network's part from the layer to ``upper``.
    """

    upper: tuple[str, ...] = ()
    pixels: Callable[[np.ndarray], Tensor] | None = None
    image: tuple[int, ...] = ()
    tail: Callable[[np.ndarray], Logits] | None = None
    to_logits: Logits | None = None
    to_code: Logits | None = None
    section: Callable[[], nn.Module] | None = None


class ActivationStream:
    """Training entries of one layer of a store: rows or whole activations of some images.

    Parameters
    ----------
    images : indices into the store (the fit split); unreadable ones are left out.
    reads : "rows" (every stored position is an entry), "pooled" (the mean over each image's grid is one) or "maps"
        (every image is one).
    labels : (N,) the classifier's class of every image of the store, -1 where it is unknown; default all unknown.
    memory : bytes that a block may take.
    around : what the batches hold besides the layer's activations.

    Attributes
    ----------
    labelled, mask_labels : where a method asked for masks, the rows with the labels they show, and the labels.
    """

    def __init__(
        self,
        store: Store,
        layer: str,
        images: np.ndarray,
        *,
        reads: Literal["rows", "pooled", "maps"] = "rows",
        labels: np.ndarray | None = None,
        memory: int = DEFAULT_MEMORY,
        around: Surroundings | None = None,
    ) -> None:
        self.store, self.layer, self.reads = store, store.check_layer(layer), reads
        self.images = np.intersect1d(images, store.valid)
        if len(self.images) == 0:
            raise UserError(f"no readable images to fit on in {store.path}")
        self.around = around or Surroundings()
        self.labelled: Callable[[], tuple[Tensor, Tensor, Tensor, Tensor]] | None = None
        self.mask_labels: tuple[str, ...] = ()
        wholly = [name for name in (layer, *self.around.upper) if store.is_subsampled(name)]
        if (reads != "rows" or self.around.upper or self.around.tail) and wholly:
            raise UserError(
                f"layer {wholly[0]!r} was captured with --positions; this method needs whole maps: capture it again"
            )
        self.labels = np.full(len(store), -1) if labels is None else labels
        shape = store.shapes[layer]
        stored = store.key.positions if store.is_subsampled(layer) else int(np.prod(shape[1:]))
        self.entries_per_image = int(stored or 1) if reads == "rows" else 1
        bytes_per_image = int(np.prod(shape)) * np.dtype(store.key.dtype).itemsize
        if store.is_subsampled(layer):
            bytes_per_image = self.entries_per_image * shape[0] * np.dtype(store.key.dtype).itemsize
        item = np.dtype(store.key.dtype).itemsize
        bytes_per_image += sum(int(np.prod(store.shapes[name])) * item for name in self.around.upper)
        bytes_per_image += int(np.prod(self.around.image)) if self.around.image else 0
        self._images_per_block = max(store.chunk_images, memory // max(bytes_per_image, 1))
        self._cache: tuple[object, Tensor, Tensor] | None = None
        self._logits: tuple[np.ndarray, Tensor | None] = (np.empty(0), None)
        self._beside: tuple[np.ndarray, dict[str, Tensor]] = (np.empty(0), {})

    def spec(self, *, num_classes: int, image: tuple[int, ...]) -> LayerSpec:
        """What the explainer may know of the layer."""
        return LayerSpec(
            name=self.layer,
            shape=self.store.shapes[self.layer][: 1 if self.reads == "pooled" else None],
            nonnegative=self.store.is_nonnegative(self.layer),
            num_classes=num_classes,
            upper={name: self.store.shapes[name] for name in self.around.upper},
            image=image,
        )

    # -- the protocol of explainers.base.Rows ---------------------------------------------------------------------

    @property
    def num_rows(self) -> int:
        return len(self.images) * self.entries_per_image

    @property
    def num_features(self) -> int:
        return self.store.shapes[self.layer][0]

    def chunks(self) -> Iterator[Tensor]:
        """Every entry once, in order of the images, float32."""
        for block in self._in_order():
            yield self._load(block)[0].float()

    def sample(self, max_rows: int, *, seed: int) -> Tensor:
        """Rows drawn without replacement over all images, float32 (n, C)."""
        if max_rows >= self.num_rows:
            picks = torch.arange(self.num_rows)
        else:
            generator = torch.Generator().manual_seed(seed)
            picks = torch.randperm(self.num_rows, generator=generator)[:max_rows].sort().values
        parts, first = [], 0
        for block in self._in_order():
            entries = len(block) * self.entries_per_image
            inside = picks[(picks >= first) & (picks < first + entries)] - first
            if len(inside):
                parts.append(self._load(block)[0][inside].float())
            first += entries
        return torch.cat(parts)

    def examples(self, fields: Collection[str] = ("logits", "labels")) -> Iterator[Batch]:
        """Every entry once, in order of the images, with some fields of a batch (the tail only with maps)."""
        for block in self._in_order():
            values, index = self._load(block)
            for part in torch.arange(len(index)).split(_WHOLE if self.reads == "maps" else _EXAMPLES):
                batch = self._batch(values[part].float(), index[part], block, 0, fields)
                if "tail" in fields and self.reads == "maps":
                    self._add_tail(batch, values, block, np.random.default_rng(0))
                yield batch

    def decisions(self, images: np.ndarray) -> np.ndarray:
        """Class of each image: its label, or the network's prediction where it has none (-1 without stored logits)."""
        logits = self.store.read_logits(images)
        predicted = np.full(len(images), -1) if logits is None else logits.argmax(axis=1)
        return np.where(self.labels[images] >= 0, self.labels[images], predicted)

    # -- batches --------------------------------------------------------------------------------------------------

    def batches(
        self,
        batch_size: int,
        *,
        seed: int,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
        fields: Collection[str] = (),
        balance: tuple[Sequence[int], float] = ((), 0.0),
    ) -> Iterator[Batch]:
        """Endless batches from step ``start`` on; ``batch_size`` entries a step, of which this rank takes its share.

        Parameters
        ----------
        fields : of :class:`~netgloss.explainers.base.Batch`, besides the activation, to fill in.
        balance : classes and the share of each batch that is drawn evenly from images of theirs, with replacement; the
            rest are all entries in turn.
        """
        step = 0
        classes, share = balance
        for epoch in range(1 << 62):
            rng = np.random.default_rng([seed, epoch])
            for number, block in enumerate(self._epoch_blocks(rng)):
                entries = len(block) * self.entries_per_image
                size = min(batch_size, entries)
                drawn = round(size * share) if classes else 0
                steps = entries // (size - drawn)
                if step + steps <= start:
                    step += steps
                    continue
                values, index = self._load(block)
                order = torch.from_numpy(np.random.default_rng([seed, epoch, number]).permutation(entries))
                pools = self._pools(block, index, classes) if drawn else []
                for k in range(steps):
                    if step >= start:
                        picks = order[k * (size - drawn) : (k + 1) * (size - drawn)]
                        if pools:
                            choose = np.random.default_rng([seed, epoch, number, k])
                            turn = (pools[(k * drawn + j) % len(pools)] for j in range(drawn))
                            picks = torch.cat([picks, torch.tensor([int(choose.choice(pool)) for pool in turn])])
                        picks = picks[rank::world]
                        batch = self._batch(values[picks].float(), index[picks], block, step, fields)
                        if "tail" in fields:
                            self._add_tail(batch, values, block, np.random.default_rng([seed, epoch, number, k, rank]))
                        yield batch
                    step += 1

    def _pools(self, block: np.ndarray, index: Tensor, classes: Sequence[int]) -> list[np.ndarray]:
        """Entries of a block that belong to each class; classes without any are left out."""
        decided = self.decisions(block)[np.searchsorted(block, index.numpy())]
        found = [np.flatnonzero(decided == c) for c in classes]
        return [pool for pool in found if len(pool)]

    def _batch(self, values: Tensor, index: Tensor, block: np.ndarray, step: int, fields: Collection[str]) -> Batch:
        batch = Batch(activation=values, index=index, step=step)
        place = np.searchsorted(block, index.numpy())
        if "logits" in fields or "labels" in fields:
            logits = self._block_logits(block)
            if logits is not None:
                batch.logits = logits[place]
            batch.labels = torch.from_numpy(self.labels[index.numpy()])
        if "upper" in fields or "image" in fields:
            others = self._other_block(block)
            batch.upper = {name: others[name][place].float() for name in self.around.upper}
            if self.around.pixels is not None:
                batch.image = others[""][place].float().div_(255)
        if "to_logits" in fields:
            batch.to_logits = self.around.to_logits
        if "to_code" in fields:
            batch.to_code = self.around.to_code
        return batch

    def _add_tail(self, batch: Batch, values: Tensor, block: np.ndarray, rng: np.random.Generator) -> None:
        """Whole activations and their tail: the batch's own, or some images of the block in use."""
        assert self.around.tail is not None
        if self.reads == "maps":
            batch.whole, images = batch.activation, batch.index.numpy()
        else:
            assert self.reads == "rows"
            picks = np.sort(rng.choice(len(block), size=min(_WHOLE, len(block)), replace=False))
            rows = values.reshape(len(block), self.entries_per_image, -1)[picks].flatten(0, 1)
            batch.whole = from_rows(rows, self.store.shapes[self.layer][1:]).float()
            images = block[picks]
        batch.tail = self.around.tail(images)

    def _other_block(self, block: np.ndarray) -> dict[str, Tensor]:
        """Upper activations by layer, and the pixels under "", of the block in use, kept until another one is."""
        if not np.array_equal(self._beside[0], block):
            found = {name: torch.from_numpy(self.store.read(name, block)) for name in self.around.upper}
            if self.around.pixels is not None:
                found[""] = self.around.pixels(block)
            self._beside = (block, found)
        return self._beside[1]

    def _block_logits(self, block: np.ndarray) -> Tensor | None:
        """(n, classes) of the block in use, kept until another one is asked for."""
        if not np.array_equal(self._logits[0], block):
            stored = self.store.read_logits(block)
            self._logits = (block, None if stored is None else torch.from_numpy(stored))
        return self._logits[1]

    def _in_order(self) -> list[np.ndarray]:
        size = self._images_per_block
        return [self.images[i : i + size] for i in range(0, len(self.images), size)]

    def _epoch_blocks(self, rng: np.random.Generator) -> list[np.ndarray]:
        if len(self.images) <= self._images_per_block:
            return [self.images]
        chunk_of = self.images // self.store.chunk_images
        by_chunk = [self.images[chunk_of == c] for c in np.unique(chunk_of)]
        order = rng.permutation(len(by_chunk))
        blocks: list[np.ndarray] = []
        current: list[np.ndarray] = []
        count = 0
        for c in order:
            if current and count + len(by_chunk[c]) > self._images_per_block:
                blocks.append(np.sort(np.concatenate(current)))
                current, count = [], 0
            current.append(by_chunk[c])
            count += len(by_chunk[c])
        return [*blocks, np.sort(np.concatenate(current))]

    def _load(self, block: np.ndarray) -> tuple[Tensor, Tensor]:
        """Entries (n, ...) in the stored dtype and the image of each (n,)."""
        whole = len(block) == len(self.images)
        if whole and self._cache is not None:
            return self._cache[1], self._cache[2]
        index = torch.from_numpy(block).long()
        if self.reads == "pooled":
            parts = [self.store.read(self.layer, part) for part in np.split(block, range(_POOLED, len(block), _POOLED))]
            values = torch.cat([torch.from_numpy(_with_grid(part)).float().mean(2) for part in parts])
        else:
            values = torch.from_numpy(self.store.read(self.layer, block))
        if self.reads == "rows":
            index = index.repeat_interleave(self.entries_per_image)
            values = values.flatten(0, 1) if self.store.is_subsampled(self.layer) else to_rows(values).contiguous()
        if whole:
            self._cache = (None, values, index)
        return values, index


def _with_grid(values: np.ndarray) -> np.ndarray:
    """(n, C) or (n, C, H, W) -> (n, C, positions)."""
    return values.reshape(*values.shape[:2], -1)


def moments(stream: ActivationStream) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance (C,) of the layer's features over the fit rows, float64."""
    first = torch.zeros(stream.num_features, dtype=torch.float64)
    second = torch.zeros_like(first)
    for rows in stream.chunks():
        first += rows.sum(dim=0, dtype=torch.float64)
        second += rows.square().sum(dim=0, dtype=torch.float64)
    mean = first / stream.num_rows
    return mean, (second / stream.num_rows - mean**2).clamp_min(0)

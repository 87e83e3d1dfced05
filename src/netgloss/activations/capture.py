"""Streaming capture: images -> classifier up to the layers -> store, in one pass.

Memory holds a few chunks whatever the number of images: workers decode ahead, the network runs on whole batches, one
thread compresses and writes the chunk before. Chunks are independent, so that a killed capture continues with the
chunks that are missing, and ranks of a distributed capture take every ``world``-th chunk.

Shape letters: B images of a batch, C H W a layer's map, P sampled positions.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from netgloss.activations.key import StoreInfo, StoreKey, estimate_bytes, stored_shape
from netgloss.activations.locations import is_taken, place_of, remove_leftovers
from netgloss.activations.store import Store
from netgloss.data.images import few, remark
from netgloss.errors import UserError, one_line
from netgloss.memory import Halving
from netgloss.progress import Progress, Silent

if TYPE_CHECKING:
    from netgloss.classifiers import Classifier, Taps
    from netgloss.data import ImageSource


@dataclass(frozen=True)
class CaptureOptions:
    """How to capture; the fields are flags of the command line."""

    dtype: str = "float16"
    """Number format on disk: float16 or float32."""
    logits: bool = True
    """Keep the classifier's logits too; without them the forward stops after the last layer."""
    positions: int | None = None
    """Keep only this many random positions of each image's map (for fitting; such a layer cannot be evaluated)."""
    precision: str = "float32"
    """Precision of the forward: float32, or bfloat16 (autocast; faster on GPUs and recent CPUs, about 1 % off)."""
    batch_size: int = 32
    """Images a forward; halved where they do not fit in the device's memory."""
    workers: int | None = None
    """Processes that decode images ahead; default: none for arrays, up to 8 for files."""
    strict: bool = False
    """Make an unreadable image an error instead of skipping and listing it."""
    seed: int = 0
    """Seed of the sampled positions."""
    verify: bool = False
    """Read every image file again before an existing store is used, even if no file seems to have changed."""

    def __post_init__(self) -> None:
        if self.dtype not in ("float16", "float32"):
            raise UserError(f"dtype must be float16 or float32, got {self.dtype!r}")
        if self.precision not in ("float32", "bfloat16"):
            raise UserError(f"precision must be float32 or bfloat16, got {self.precision!r}")
        for name in ("batch_size", "positions"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        if self.workers is not None and self.workers < 0:
            raise UserError(f"workers must not be negative, got {self.workers}")


Check = Callable[[str, Tensor], None]
_PROBED = 4
"""Images that are looked at, twice, before a store is made."""
_REPEATABLE = 0.01
"""Values that differ by more of the largest one from pass to pass are random."""
_LOSS = 0.01
"""Relative error of float16 above which a store is made in float32."""


def store_key(classifier: Classifier, source: ImageSource, layers: Sequence[str], options: CaptureOptions) -> StoreKey:
    """The content address of what :func:`capture` would write."""
    return StoreKey(
        weights_hash=classifier.weights_hash,
        preprocessing=json.loads(json.dumps(classifier.preprocessing.to_dict())),
        layers=tuple(layers),
        data_fingerprint=source.fingerprint,
        dtype=options.dtype,
        logits=options.logits and classifier.num_classes > 0,
        positions=options.positions,
        seed=options.seed if options.positions is not None else 0,
        precision=options.precision,
        pool=classifier.pool,
    )


def origin(classifier: Classifier, source: ImageSource) -> StoreInfo:
    """What a store remembers of the network and the images."""
    from netgloss.data import Joined

    given = {"num_fit": source.num_fit} if isinstance(source, Joined) else {}
    return StoreInfo(
        model=classifier.spec(),
        images={"description": source.description, "notes": list(source.notes), **given},
        class_names=tuple(source.class_names),
    )


def prepare_store(
    classifier: Classifier,
    source: ImageSource,
    layers: Sequence[str],
    out: str | Path,
    *,
    options: CaptureOptions | None = None,
    info: StoreInfo | None = None,
    progress: Progress | None = None,
    world: int = 1,
) -> Store:
    """The store at ``out`` that :func:`capture` fills: a new one, or the one of an interrupted capture.

    With ``world = 1``, what killed captures left half-written at ``out`` is removed: no other process may write there.

    Raises
    ------
    UserError
        If ``out`` holds something else, the disk is too small, there are no images, or a layer is unknown or gives
        neither vectors nor maps.
    """
    options = options or CaptureOptions()
    progress = progress or Silent()
    if len(source) == 0:
        raise UserError(f"there are no images in {source.description}")
    layers = [classifier.check_layer(name) for name in dict.fromkeys(layers)]
    source.verify |= options.verify
    out = place_of(out)
    if world == 1 and isinstance(out, Path):
        remove_leftovers(out.parent, out.name)
    if is_taken(out) if isinstance(out, Path) else Store.exists(out):
        known = Store.open(out)
        same = known.is_of(source)  # before the key, which reads all files otherwise
        if known.key.dtype == "float32":  # holds all that float16 would
            options = dataclasses.replace(options, dtype="float32")
        key = store_key(classifier, source, layers, options)
        if same and known.key.data_fingerprint != key.data_fingerprint:
            progress.say(
                f"{out} was captured by an earlier version, which looked at samples of the files only: if images were "
                "edited since, capture them again"
            )
            key = dataclasses.replace(key, data_fingerprint=known.key.data_fingerprint)
        store = Store.open(out, expect=key)
        several = classifier.outputs == "multilabel"
        if store.info.model and bool(store.info.model.get("multi_label")) != several:
            how = ("without", "with") if several else ("with", "without")
            raise UserError(
                f"the store {out} was captured {how[0]} --multi-label (multi_label), and the network is now read "
                f"{how[1]} it: write to another path, or delete the store"
            )
        if world == 1 and store.pending:
            store.remove_leftovers()
        return store
    probe = _probe(classifier, source, layers)
    if probe.coarse and options.dtype == "float16":
        options = dataclasses.replace(options, dtype="float32")
        progress.say(f"note: the store is kept in float32: layer {probe.coarse!r} {probe.why}, out of float16's range")
    key = store_key(classifier, source, layers, options)
    shapes = probe.shapes
    size = estimate_bytes(shapes, len(source), dtype=options.dtype, positions=options.positions)
    shown = ", ".join(f"{name} {' x '.join(map(str, shape))}" for name, shape in shapes.items())
    progress.say(f"{len(source)} images, {shown}: up to {size / 1e6:,.0f} MB before compression")
    info = info or origin(classifier, source)
    return Store.create(
        out,
        key=key,
        info=dataclasses.replace(info, images={**info.images, "state": source.known_state}),
        shapes=shapes,
        ids=source.ids,
        targets=source.targets,
        num_classes=probe.num_classes,
    )


def capture(
    classifier: Classifier,
    source: ImageSource,
    layers: Sequence[str],
    out: str | Path,
    *,
    options: CaptureOptions | None = None,
    info: StoreInfo | None = None,
    progress: Progress | None = None,
    check: Check | None = None,
    rank: int = 0,
    world: int = 1,
) -> Store:
    """Captures ``layers`` for all images of ``source`` into a store at ``out``; continues an interrupted capture.

    Parameters
    ----------
    classifier : runs on its own device.
    layers : dotted names; all are read in one pass.
    check : called with the name and the activations of each layer for every batch; what it raises ends the capture.
    rank, world : this process writes the chunks ``rank, rank + world, ...``; the store must be prepared then.

    Returns
    -------
    The store (complete once all ranks are done).

    Raises
    ------
    UserError
        As :func:`prepare_store`; also if an activation is NaN, Inf or too large for the dtype, the disk is full, or no
        image (``strict``: not every image) could be read.
    """
    options = options or CaptureOptions()
    progress = progress or Silent()
    options = dataclasses.replace(options, logits=options.logits and classifier.num_classes > 0)
    store = prepare_store(classifier, source, layers, out, options=options, info=info, progress=progress, world=world)
    pending = [c for c in store.pending if c % world == rank]
    if pending:
        _capture_chunks(store, classifier, source, pending, options, progress, check)
    if not store.pending and len(store.valid) == 0:
        reason = next(iter(store.problems.values()), "no reason known")
        raise UserError(f"none of the {len(source)} images of {source.description} could be read; the first: {reason}")
    return store


@dataclass(frozen=True)
class _Probe:
    """What the first images say: shapes (C,) or (C, H, W) of the layers, the number of classes, and the layer that
    float16 would spoil ("" if none), with why.
    """

    shapes: dict[str, tuple[int, ...]]
    num_classes: int
    coarse: str
    why: str


def _probe(classifier: Classifier, source: ImageSource, layers: Sequence[str]) -> _Probe:
    """Looks at the first images twice (at a blank one where none can be read).

    Raises
    ------
    UserError : a layer of neither vectors nor maps, or a network that answers the same images differently, whose
        explanations would be those of noise.
    """
    from netgloss.classifiers import Taps

    first = range(min(_PROBED, len(source)))
    pixels, reasons = next(image_batches(classifier, source, first, workers=0))
    readable = [i for i, reason in enumerate(reasons) if not reason]
    pixels = pixels[readable or [0]]
    passes = []
    with torch.inference_mode(), Taps(classifier.net, layers, stop=False) as taps:
        for _ in range(2):
            passes.append({**{f"layer {name!r}": v for name, v in taps(pixels).items()}, "the output": taps.logits})
    _check_repeatable(*passes)
    shapes: dict[str, tuple[int, ...]] = {}
    coarse, why = "", ""
    for name in layers:
        values = passes[0][f"layer {name!r}"].float()
        if values.ndim not in (2, 4):
            raise UserError(f"layer {name!r} gives {tuple(values.shape)}, neither vectors (B, C) nor maps (B, C, H, W)")
        shapes[name] = tuple(values.shape[1:])
        lost = (values.half().float() - values).abs().sum() / values.abs().sum().clamp_min(1e-38)
        if values.isfinite().all() and not coarse and not lost <= _LOSS:
            coarse, why = name, f"reaches {float(values.abs().max()):.2g}"
    return _Probe(shapes, int(passes[0]["the output"].shape[1]), coarse, why)


def _check_repeatable(first: dict[str, Tensor], again: dict[str, Tensor]) -> None:
    for name, values in first.items():
        size = float(values.float().abs().max()) if values.numel() else 0.0
        apart = float((values.float() - again[name].float()).abs().max()) if values.numel() else 0.0
        if apart > _REPEATABLE * size:
            raise UserError(
                f"the network is random: {name} differs by {apart / size:.2g} of its largest value when the same "
                "images are given twice. Dropout or stochastic depth stays on in its eval mode: switch it off"
            )


def _capture_chunks(
    store: Store,
    classifier: Classifier,
    source: ImageSource,
    pending: Sequence[int],
    options: CaptureOptions,
    progress: Progress,
    check: Check | None,
) -> None:
    from netgloss.classifiers import Taps

    total = len(store)
    todo = sum(len(range(total)[store.chunk_slice(c)]) for c in pending)
    progress.start("capture", total, unit="images", done=total - todo)
    remarks: dict[str, str] = {}
    loader = _chunk_batches(store, classifier, source, pending, options, remarks)
    skipped = 0
    halving = Halving(options.batch_size)
    last: Future[None] | None = None
    with (
        torch.inference_mode(),
        torch.autocast(classifier.device.type, torch.bfloat16, enabled=options.precision == "bfloat16"),
        Taps(classifier.net, store.layers, stop=not options.logits) as taps,
        ThreadPoolExecutor(max_workers=1) as writer,
    ):
        taps(torch.zeros(1, *classifier.input_shape, device=classifier.device))  # learns how often each layer runs
        for chunk in pending:
            buffer = _ChunkBuffer(store, chunk, options)
            while not buffer.full:
                pixels, reasons = next(loader)
                skipped += sum(r != "" for r in reasons)
                if options.strict and any(reasons):
                    raise UserError(next(r for r in reasons if r))
                for part, outputs, logits in halving(len(reasons), partial(_forward, taps, pixels, options.logits)):
                    buffer.add(outputs, logits, reasons[part])
                    readable = [i for i, reason in enumerate(reasons[part]) if not reason]
                    for name, values in outputs.items() if check and readable else ():
                        check(name, values[readable])  # type: ignore[misc]
                progress.advance(len(reasons), note=f"{skipped} skipped" if skipped else "")
            if last is not None:
                last.result()
            last = writer.submit(buffer.write)
        if last is not None:
            last.result()
    progress.finish()
    for line in odd_images(remarks):
        progress.say(f"note: {line}")


def _forward(
    taps: Taps, pixels: Tensor, with_logits: bool, part: slice
) -> tuple[slice, dict[str, Tensor], Tensor | None]:
    """The layers' outputs and the logits of a part of a batch."""
    outputs = taps(pixels[part])
    return part, outputs, taps.logits if with_logits else None


class _ChunkBuffer:
    """The arrays of one chunk, filled batch by batch."""

    def __init__(self, store: Store, chunk: int, options: CaptureOptions) -> None:
        self.store, self.chunk, self.options = store, chunk, options
        self.first = store.chunk_slice(chunk).start
        self.size = store.chunk_slice(chunk).stop - self.first
        self.filled = 0
        dtype = getattr(torch, store.key.dtype)
        self.activations = {
            name: torch.zeros(self.size, *stored_shape(shape, options.positions), dtype=dtype)
            for name, shape in store.shapes.items()
        }
        self.positions: dict[str, np.ndarray] = {}
        for name, shape in store.shapes.items():
            if store.is_subsampled(name):
                assert options.positions is not None
                ids = store.ids[self.first : self.first + self.size]
                cells = shape[1] * shape[2]
                picks = [sample_positions(i, cells, options.positions, seed=options.seed) for i in ids]
                self.positions[name] = np.stack(picks).astype(np.int32)
        self.logits: Tensor | None = None
        self.reasons: list[str] = []

    @property
    def full(self) -> bool:
        return self.filled == self.size

    def add(self, outputs: dict[str, Tensor], logits: Tensor | None, reasons: Sequence[str]) -> None:
        """Takes a batch; slots of unreadable images become zero."""
        where = slice(self.filled, self.filled + len(reasons))
        unreadable = torch.tensor([r != "" for r in reasons])
        for name, values in outputs.items():
            if name in self.positions:
                picks = torch.from_numpy(self.positions[name][where]).long().to(values.device)
                rows_BCN = values.flatten(2)
                values = rows_BCN.gather(2, picks[:, None, :].expand(-1, rows_BCN.shape[1], -1)).transpose(1, 2)
            target = self.activations[name][where]
            target.copy_(values)
            target[unreadable] = 0
            if not torch.isfinite(target).all():
                self._explain_nonfinite(name, values.cpu(), target)
        if logits is not None:
            if self.logits is None:
                self.logits = torch.zeros(self.size, logits.shape[1])
            self.logits[where] = logits.float().cpu()
            self.logits[where][unreadable] = 0
            bad = ~torch.isfinite(self.logits[where]).all(dim=1)
            if bad.any():
                image = self.store.ids[self.first + self.filled + int(bad.nonzero()[0])]
                raise UserError(f"the classifier's logits are NaN or Inf for image {image!r}")
        self.reasons += reasons
        self.filled += len(reasons)

    def _explain_nonfinite(self, name: str, values: Tensor, target: Tensor) -> None:
        row = int((~torch.isfinite(target.flatten(1)).all(dim=1)).nonzero()[0])
        image = self.store.ids[self.first + self.filled + row]
        if torch.isfinite(values[row]).all():
            largest = float(values[row].abs().max())
            raise UserError(
                f"layer {name!r} reaches {largest:.4g} at image {image!r}, too large for {self.store.key.dtype}: "
                "use --dtype float32"
            )
        raise UserError(f"layer {name!r} gives NaN or Inf at image {image!r} (chunk {self.chunk})")

    def write(self) -> None:
        self.store.write_chunk(
            self.chunk,
            activations={name: a.numpy() for name, a in self.activations.items()},
            positions=self.positions,
            logits=None if self.logits is None else self.logits.numpy(),
            problems=self.reasons,
        )


def sample_positions(image_id: str, num_positions: int, count: int, *, seed: int) -> np.ndarray:
    """``count`` of ``num_positions`` cells without replacement, sorted; depends on the image's id and the seed only."""
    digest = hashlib.sha256(f"{seed}:{image_id}".encode()).digest()
    generator = np.random.default_rng(int.from_bytes(digest[:8], "little"))
    return np.sort(generator.choice(num_positions, size=count, replace=False))


class PreparedImages(Dataset[tuple[Tensor, str, str]]):
    """Images of a source, resized and cropped, as bytes, with why one is unreadable (it gives a blank) and what is odd
    about it.
    """

    def __init__(self, source: ImageSource, preprocessing: Any, indices: Sequence[int], blank: Sequence[int]) -> None:
        self.source, self.preprocessing, self.indices, self.blank = source, preprocessing, indices, tuple(blank)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int) -> tuple[Tensor, str, str]:
        try:
            image = self.source.image(self.indices[item])
            return self.preprocessing.bytes(image), "", remark(image)
        except UserError as error:
            reason = str(error) or "unreadable"
        except MemoryError:
            reason = f"unreadable image {one_line(self.source.ids[self.indices[item]])}: it does not fit in memory"
        return torch.zeros(self.blank, dtype=torch.uint8), reason, ""


def _stack(items: list[tuple[Tensor, str, str]]) -> tuple[Tensor, list[str], list[str]]:
    """Batch (B, C, H, W) in channels-last memory, as the images have it: nothing is rearranged."""
    images_BHWC = torch.stack([image.permute(1, 2, 0) for image, _, _ in items])
    return images_BHWC.permute(0, 3, 1, 2), [reason for _, reason, _ in items], [odd for _, _, odd in items]


def odd_images(remarks: dict[str, str]) -> list[str]:
    """One line for each thing that was odd about images, with how many and which.

    Parameters
    ----------
    remarks : id of an image -> what is odd about it.
    """
    by_remark: dict[str, list[str]] = defaultdict(list)
    for image_id, text in remarks.items():
        by_remark[text].append(one_line(image_id))
    return [f"{len(ids)} image{'s' * (len(ids) > 1)}: {text} ({few(ids)})" for text, ids in sorted(by_remark.items())]


class _BatchList:
    """Batches of positions that never cross a chunk's border."""

    def __init__(self, batches: list[list[int]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def _chunk_batches(
    store: Store,
    classifier: Classifier,
    source: ImageSource,
    pending: Sequence[int],
    options: CaptureOptions,
    remarks: dict[str, str],
) -> Iterator[tuple[Tensor, list[str]]]:
    indices: list[int] = []
    batches: list[list[int]] = []
    for chunk in pending:
        images = range(len(store))[store.chunk_slice(chunk)]
        for start in range(0, len(images), options.batch_size):
            part = images[start : start + options.batch_size]
            batches.append(list(range(len(indices), len(indices) + len(part))))
            indices.extend(part)
    return image_batches(classifier, source, indices, batches=batches, workers=options.workers, remarks=remarks)


def image_batches(
    classifier: Classifier,
    source: ImageSource,
    indices: Sequence[int],
    *,
    batch_size: int = 32,
    batches: list[list[int]] | None = None,
    workers: int | None = None,
    remarks: dict[str, str] | None = None,
) -> Iterator[tuple[Tensor, list[str]]]:
    """Network inputs (B, channels, height, width) on the classifier's device, in channels-last memory, with the reason
    of each unreadable image, in order. Images travel as bytes and are normalised a batch at a time. ``remarks``
    receives what is odd about an image, by its id.
    """
    dataset = PreparedImages(source, classifier.preprocessing, indices, classifier.input_shape)
    if batches is None:
        everything = list(range(len(indices)))
        batches = [everything[i : i + batch_size] for i in range(0, len(everything), batch_size)]
    if workers is None:
        workers = min(8, (os.cpu_count() or 1) - 1) if source.decodes and len(indices) > 256 else 0
    loader = DataLoader(
        dataset,
        batch_sampler=_BatchList(batches),
        num_workers=workers,
        collate_fn=_stack,
        pin_memory=classifier.device.type == "cuda",
        persistent_workers=False,
    )
    for batch, (pixels, reasons, odd) in zip(batches, loader, strict=True):
        if remarks is not None:
            remarks |= {source.ids[indices[i]]: text for i, text in zip(batch, odd, strict=True) if text}
        pixels = pixels.to(classifier.device, non_blocking=True)
        yield classifier.preprocessing.batch(pixels), reasons

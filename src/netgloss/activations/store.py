"""The activation store: one zarr v3 group on disk, readable without netgloss.

Layout (N images, chunked along images, one chunk grid for all arrays)::

    activations/<layer>  (N, C), (N, C, H, W) or, sub-sampled, (N, P, C)    float16 by default
    positions/<layer>    (N, P) int32: row-major cells y*W + x of the sub-sample     (only then)
    logits               (N, classes) float32                                       (unless captured without)
    targets              (N,) int64: class of the source's class_names, -1 unknown
    ids                  (N,) str: image ids
    problems             (N,) str: "" or why the image could not be read
    complete             (chunks,) uint8: 1 once every array of that chunk is on disk
    minimum              (chunks, layers) float32: smallest activation of the chunk

Every chunk carries a crc32c, and missing float chunks read as NaN, so that damage is found and never read as data. The
group's attributes hold the :class:`StoreKey`, whose hash is the store's address: opening a store with another key is an
error that names the field, never a silent reuse. Files are written here and in ``netgloss.runs`` only.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec

from netgloss.activations.key import StoreInfo, StoreKey, estimate_bytes, stored_shape
from netgloss.activations.locations import Place, is_taken, open_group, place_of, writing_to
from netgloss.errors import UserError, nearest

if TYPE_CHECKING:
    from netgloss.data import ImageSource

FORMAT_VERSION = 1
_CHUNK_BYTES = 8 << 20  # aim of one chunk of the largest layer, before compression


class Store:
    """An activation store on disk; see the module's text for its layout.

    Attributes
    ----------
    path, key, info : where it lies, what it depends on, what it remembers.
    shapes : per-image shape (C,) or (C, H, W) of each layer, as the network gives it.
    """

    def __init__(self, path: Place, group: zarr.Group) -> None:
        self.path = path
        self._group = group
        attributes: Any = group.attrs.asdict()
        if attributes.get("netgloss_store") != FORMAT_VERSION:
            raise UserError(
                f"{path} is not an activation store of format {FORMAT_VERSION} "
                f"(it says {attributes.get('netgloss_store')!r})"
            )
        try:
            self.key = StoreKey.from_dict(attributes["key"])
            self.info = StoreInfo(**attributes["info"])
            self.shapes = {name: tuple(int(n) for n in shape) for name, shape in attributes["shapes"].items()}
            self.chunk_images = int(attributes["chunk_images"])
            self._check_attributes()
            self.ids: list[str] = [str(i) for i in np.asarray(self._array("ids")[:])]
            self.targets = np.asarray(self._array("targets")[:])
            self._check_arrays()
        except UserError:
            raise
        except Exception as error:  # anybody may have written it, and zarr raises many kinds
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(f"the activation store {path} is damaged: {reason}") from error

    def _check_attributes(self) -> None:
        """Values that a netgloss writes; what a file only claims must not be believed."""
        key, images = self.key, self.info.images
        num_fit = images.get("num_fit")
        right = {
            "dtype": key.dtype in ("float16", "float32"),
            "precision": key.precision in ("float32", "bfloat16"),
            "logits": isinstance(key.logits, bool),
            "positions": key.positions is None or (type(key.positions) is int and key.positions > 0),
            "layers": bool(key.layers) and set(key.layers) == set(self.shapes),
            "shapes": all(len(s) in (1, 3) and min(s) > 0 for s in self.shapes.values()),
            "chunk_images": self.chunk_images > 0,
            "num_fit": num_fit is None or (type(num_fit) is int and num_fit >= 0),
            "model": isinstance(self.info.model, dict),
            "class_names": all(isinstance(name, str) for name in self.info.class_names),
        }
        wrong = [name for name, fine in right.items() if not fine]
        if wrong:
            raise ValueError(f"{', '.join(wrong)} make no sense")

    def _check_arrays(self) -> None:
        """Every array has the shape and kind that follow from the ids and the attributes."""
        num, chunks = len(self.ids), self.num_chunks
        expected: dict[str, tuple[tuple[int, ...], str]] = {
            "targets": ((num,), "i"),
            "problems": ((num,), "T"),
            "complete": ((chunks,), "u"),
            "minimum": ((chunks, len(self.layers)), "f"),
        }
        for layer in self.layers:
            inner = stored_shape(self.shapes[layer], self.key.positions)
            expected[f"activations/{layer}"] = ((num, *inner), "f")
            if inner != self.shapes[layer]:
                expected[f"positions/{layer}"] = ((num, inner[0]), "i")
        for name, (shape, kind) in expected.items():
            array = self._array(name)
            if array.shape != shape or array.dtype.kind != kind:
                raise ValueError(f"{name} is {array.dtype} {array.shape}, not as its attributes say ({shape})")
        if self.key.logits and len(self._array("logits").shape) != 2:
            raise ValueError("logits are not (images, classes)")

    # -- making and opening ---------------------------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        key: StoreKey,
        info: StoreInfo,
        shapes: Mapping[str, Sequence[int]],
        ids: Sequence[str],
        targets: np.ndarray,
        num_classes: int,
    ) -> Store:
        """A new, empty store; raises UserError if something occupies the place or the disk is too small."""
        path = place_of(path)
        if is_taken(path) and not (isinstance(path, str) and _is_unfinished(path)):
            raise UserError(f"{path} exists and is not an activation store of netgloss; choose another --out")
        attributes: dict[str, Any] = {
            "netgloss_store": FORMAT_VERSION,
            "address": key.address,
            "key": dataclasses.asdict(key),
            "info": dataclasses.asdict(info),
            "shapes": {name: list(shape) for name, shape in shapes.items()},
            "chunk_images": _chunk_images(shapes, key),
        }
        arrays: dict[str, Any] = {
            "key": key,
            "shapes": shapes,
            "ids": ids,
            "targets": targets,
            "num_classes": num_classes,
            "chunk": attributes["chunk_images"],
        }
        if isinstance(path, str):  # the attributes come last: without them it is not a store yet
            try:
                group = open_group(path, "w")
                group.attrs["netgloss_creating"] = True
                _create_arrays(group, **arrays)
                group.attrs.put(attributes)
            except Exception as error:
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                raise UserError(f"cannot write to {path}: {reason}") from error
            return cls.open(path)
        total = estimate_bytes(shapes, len(ids), dtype=key.dtype, positions=key.positions)
        with writing_to(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(path.parent).free
            if total > free:
                raise UserError(
                    f"the activations need up to {total / 1e9:.1f} GB, {path.parent} has {free / 1e9:.1f} GB free; "
                    "sub-sample with --positions, or write elsewhere"
                )
            part = path.with_name(path.name + f".part{os.getpid()}")
            shutil.rmtree(part, ignore_errors=True)
            group = open_group(part, "w")
            _create_arrays(group, **arrays)
            group.attrs.update(attributes)
            if path.exists():
                path.rmdir()
            part.rename(path)
        return cls.open(path)

    @classmethod
    def open(cls, path: str | Path, *, expect: StoreKey | None = None) -> Store:
        """An existing store; with ``expect``, an error unless its content is exactly what that key says."""
        path = place_of(path)
        if not (path.exists() if isinstance(path, Path) else is_taken(path)):
            raise UserError(f"no activation store at {path}")
        try:
            group = open_group(path, "r" if isinstance(path, Path) and not os.access(path, os.W_OK) else "r+")
        except Exception as error:  # zarr raises many kinds for foreign or damaged folders
            raise UserError(f"{path} is not an activation store of netgloss ({type(error).__name__})") from error
        store = cls(path, group)
        if expect is not None and store.key != expect:
            raise UserError(
                f"the store {path} holds something else: {'; '.join(store.key.differences(expect))}. "
                "Write to another path, or delete it"
            )
        return store

    @staticmethod
    def exists(url: str) -> bool:
        """Whether a URL holds a finished store."""
        try:
            return is_taken(url) and "netgloss_store" in open_group(url, "r").attrs
        except UserError:
            raise
        except Exception:  # something else is there
            return False

    # -- what it holds --------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def layers(self) -> list[str]:
        return list(self.key.layers)

    @property
    def num_chunks(self) -> int:
        return -(-len(self) // self.chunk_images)

    def chunk_slice(self, chunk: int) -> slice:
        """Images of one chunk."""
        return slice(chunk * self.chunk_images, min((chunk + 1) * self.chunk_images, len(self)))

    @property
    def pending(self) -> list[int]:
        """Chunks that are not complete yet."""
        return [int(c) for c in np.flatnonzero(self._whole("complete") != 1)]

    def remove_leftovers(self) -> None:
        """Removes the halves of chunk files that a killed capture left; not while another process captures."""
        for folder, _, names in os.walk(self.path) if isinstance(self.path, Path) else ():
            for name in names:
                if name.endswith(".partial"):
                    with suppress(OSError):
                        os.unlink(os.path.join(folder, name))

    def require_complete(self) -> None:
        """UserError if the capture was interrupted."""
        missing = len(self.pending)
        if missing:
            raise UserError(
                f"the store {self.path} is incomplete ({missing} of {self.num_chunks} chunks missing): "
                "run the capture command again, it continues where it stopped"
            )

    @property
    def problems(self) -> dict[str, str]:
        """Images that could not be read, with the reason."""
        reasons = self._whole("problems")
        return {self.ids[i]: str(reasons[i]) for i in np.flatnonzero(reasons != "")}

    @property
    def valid(self) -> np.ndarray:
        """Indices of the images that were read."""
        return np.flatnonzero(self._whole("problems") == "")

    def is_of(self, source: ImageSource) -> bool:
        """Whether the store holds the activations of these images, by what their files hold now.

        Files whose sizes, times and inodes are those of the capture are not read again (unless ``source.verify``).
        """
        source.recall(str(self.info.images.get("state", "")), self.key.data_fingerprint)
        return source.is_of(self.key.data_fingerprint)

    def check_layer(self, layer: str) -> str:
        """``layer`` if it is stored, else a UserError with the nearest names."""
        if layer not in self.shapes:
            hint = nearest(layer, self.layers) or self.layers
            raise UserError(f"the store {self.path} has no layer {layer!r}; it has {', '.join(hint)}")
        return layer

    def is_nonnegative(self, layer: str) -> bool:
        """True if no stored activation of the layer is below zero."""
        column = self.layers.index(self.check_layer(layer))
        return bool(self._whole("minimum")[:, column].min() >= 0)

    def is_subsampled(self, layer: str) -> bool:
        """True if only some positions of the layer's maps are stored."""
        return stored_shape(self.shapes[layer], self.key.positions) != self.shapes[layer]

    def read(self, layer: str, images: np.ndarray | slice) -> np.ndarray:
        """Activations of some images (indices or a slice), in the stored dtype; NaN or a bad checksum is an error."""
        return self._read(f"activations/{self.check_layer(layer)}", images)

    def read_positions(self, layer: str, images: np.ndarray | slice) -> np.ndarray:
        """(n, P) cells of a sub-sampled layer."""
        return self._read(f"positions/{self.check_layer(layer)}", images)

    def read_logits(self, images: np.ndarray | slice) -> np.ndarray | None:
        """(n, classes), or None if the store was captured without logits."""
        return self._read("logits", images) if self.key.logits else None

    def _read(self, name: str, images: np.ndarray | slice) -> np.ndarray:
        array = self._array(name)
        try:
            if isinstance(images, slice):
                values = np.asarray(array[images])
            else:
                values = np.asarray(array.oindex[np.asarray(images)])
        except Exception as error:  # zarr and its codecs raise many kinds
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(f"the store {self.path} is damaged in {name}: {reason}") from error
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise UserError(f"the store {self.path} is damaged in {name}: a chunk is missing or holds NaN")
        return values

    def _array(self, name: str) -> Any:
        return self._group[name]

    def _whole(self, name: str) -> np.ndarray:
        """A small array, all of it."""
        try:
            return np.asarray(self._array(name)[:])
        except Exception as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(f"the store {self.path} is damaged in {name}: {reason}") from error

    # -- writing (capture only) -----------------------------------------------------------------------------------

    def write_chunk(
        self,
        chunk: int,
        *,
        activations: Mapping[str, np.ndarray],
        positions: Mapping[str, np.ndarray],
        logits: np.ndarray | None,
        problems: Sequence[str],
    ) -> None:
        """Writes every array of one chunk, then marks it complete. Slots of unreadable images hold zeros."""
        where = self.chunk_slice(chunk)
        usable = np.array([p == "" for p in problems])
        with writing_to(self.path):
            minimum = np.zeros(len(self.layers), np.float32)
            for column, layer in enumerate(self.layers):
                values = activations[layer]
                self._array(f"activations/{layer}")[where] = values
                minimum[column] = values[usable].min() if usable.any() else 0
                if layer in positions:
                    self._array(f"positions/{layer}")[where] = positions[layer]
            if logits is not None:
                self._array("logits")[where] = logits
            self._array("problems")[where] = np.array(list(problems), dtype=np.dtypes.StringDType())
            self._array("minimum")[chunk] = minimum
            self._array("complete")[chunk] = 1


def _is_unfinished(url: str) -> bool:
    """Whether a store was begun at a URL and its making was cut short."""
    try:
        return "netgloss_creating" in open_group(url, "r").attrs
    except Exception:  # nothing of netgloss
        return False


def _chunk_images(shapes: Mapping[str, Sequence[int]], key: StoreKey) -> int:
    largest = max(int(np.prod(stored_shape(s, key.positions))) for s in shapes.values()) * np.dtype(key.dtype).itemsize
    return int(np.clip(_CHUNK_BYTES // max(largest, 1), 8, 256))


def _create_arrays(
    group: zarr.Group,
    *,
    key: StoreKey,
    shapes: Mapping[str, Sequence[int]],
    ids: Sequence[str],
    targets: np.ndarray,
    num_classes: int,
    chunk: int,
) -> None:
    num = len(ids)
    chunks = -(-num // chunk)

    def add(name: str, shape: tuple[int, ...], dtype: Any, *, fill: Any, per_chunk: bool = False) -> Any:
        first = 1 if per_chunk else min(chunk, max(num, 1))
        packed = [BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle"), Crc32cCodec()]
        return group.create_array(
            name, shape=shape, dtype=dtype, chunks=(first, *shape[1:]), compressors=packed, fill_value=fill
        )

    for layer, shape in shapes.items():
        inner = stored_shape(shape, key.positions)
        add(f"activations/{layer}", (num, *inner), key.dtype, fill=float("nan"))
        if inner != tuple(shape):
            add(f"positions/{layer}", (num, inner[0]), "int32", fill=-1)
    if key.logits:
        add("logits", (num, num_classes), "float32", fill=float("nan"))
    add("complete", (chunks,), "uint8", fill=0, per_chunk=True)
    add("minimum", (chunks, len(key.layers)), "float32", fill=float("nan"), per_chunk=True)
    add("targets", (num,), "int64", fill=-1)[:] = targets
    for name in ("ids", "problems"):
        array = group.create_array(name, shape=(num,), dtype=str, chunks=(min(chunk, max(num, 1)),))
        if name == "ids":
            array[:] = np.array(list(ids), dtype=np.dtypes.StringDType())

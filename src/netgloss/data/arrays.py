"""Pictures held in memory: arrays, tensors and ``.npz`` files.

Shape letters: N images, H and W pixels, C channels.
"""

from __future__ import annotations

import math
import tokenize
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from netgloss.class_names import class_list
from netgloss.data.base import ImageSource
from netgloss.data.images import printable
from netgloss.errors import UserError

_ARCHIVE_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    OSError,
    ValueError,
    EOFError,
    RuntimeError,
    SyntaxError,
    TypeError,
    OverflowError,
    tokenize.TokenError,
)
_MOST_CLASSES = 1_000_000  # class indices beyond it are taken for a mistake: a name is made up for each


class ArraySource(ImageSource):
    """Pictures in memory.

    Parameters
    ----------
    images : (N, H, W), (N, H, W, C) or (N, C, H, W) with C = 1 or 3; uint8, or floats in [0, 1] (kept as 8 bits). Where
        both orders are possible, tensors are read channels first and arrays channels last.
    targets : (N,) class indices, -1 unknown.
    class_names : names in order, or a dict {index: name} or {name: index}; default ``class 0``, ``class 1``, ...

    Raises
    ------
    UserError : a shape, type, value or length that does not fit.
    """

    def __init__(
        self,
        images: NDArray[Any] | Tensor,
        targets: Any = None,
        class_names: Sequence[str] | Mapping[Any, Any] | None = None,
        *,
        description: str = "array",
    ) -> None:
        self.pixels = _pixels(images)
        n = len(self.pixels)
        class_names = None if class_names is None else class_list(class_names)
        if targets is not None:
            targets = np.asarray(targets)
            if targets.size != n or targets.dtype.kind not in "iu":
                raise UserError(f"{n} images need {n} whole numbers as targets, got {targets.dtype} {targets.shape}")
            targets = targets.reshape(n).astype(np.int64)
            if int(targets.max()) >= _MOST_CLASSES:
                raise UserError(f"targets must be class indices below {_MOST_CLASSES}, got {targets.max()}")
            if class_names is None:
                class_names = [f"class {i}" for i in range(int(targets.max()) + 1)]
            if targets.min() < -1 or targets.max() >= len(class_names):
                found = f"{targets.min()} to {targets.max()}"
                raise UserError(f"targets must be -1 or the index of one of {len(class_names)} classes, got {found}")
        super().__init__(
            [f"{i:06d}" for i in range(n)],
            description=f"{n} images of {description}",
            class_names=list(class_names or ()),
            targets=targets,
        )
        self.decodes = False

    def image(self, i: int) -> Image.Image:
        return Image.fromarray(self.pixels[i]).convert("RGB")

    def size(self, i: int) -> tuple[int, int]:
        return self.pixels.shape[2], self.pixels.shape[1]

    def _digest(self, i: int) -> bytes:
        return repr(self.pixels.shape[1:]).encode() + self.pixels[i].tobytes()


def open_npz(path: Path, part: str) -> ArraySource:
    """``x``, ``y`` and ``classes`` of an archive, or ``x_PART``, ``y_PART`` and ``classes``.

    Raises
    ------
    UserError : not an archive, no such array, or arrays that are no images.
    """
    x, y = (f"{name}_{part}" if part else name for name in ("x", "y"))
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
            if x not in names:
                parts = [name.removeprefix("x_") for name in names if name.startswith("x_")]
                hint = f"; say {path.name}:{parts[0]}" if parts and not part else ""
                raise UserError(f"it has no array {x!r}, but {', '.join(names) or 'none at all'}{hint}")
            arrays = {name: _read_array(archive, name) for name in (x, y, "classes") if name in names}
    except UserError as error:
        raise UserError(f"{printable(path)}: {error}") from error
    except MemoryError as error:
        raise UserError(f"the arrays of {printable(path)} do not fit in memory") from error
    except _ARCHIVE_ERRORS as error:
        raise UserError(f"{printable(path)} is not a readable .npz archive: {printable(error)}") from error
    classes = None if "classes" not in arrays else [str(name) for name in arrays["classes"].ravel()]
    return ArraySource(arrays[x], arrays.get(y), classes, description=f"{path.name}{part and ':' + part}")


def _read_array(archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    """One array without pickle; what its header promises is checked against the archive before memory is taken."""
    member = archive.getinfo(f"{name}.npy")
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise UserError(f"the array {name!r} has the unknown format version {version}")
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(file)
        if dtype.hasobject:
            raise UserError(f"the array {name!r} holds Python objects, which are not read")
        if math.prod(shape) * dtype.itemsize != member.file_size - file.tell():
            raise UserError(f"the array {name!r} claims the shape {shape}, but its data have another length")
    with archive.open(member) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _pixels(images: NDArray[Any] | Tensor) -> NDArray[np.uint8]:
    """To uint8 (N, H, W) or (N, H, W, 3)."""
    channels, tensor, array = {1, 3}, isinstance(images, Tensor), images
    if isinstance(images, Tensor):
        array = (images.float() if images.is_floating_point() else images).detach().cpu().numpy()
    assert isinstance(array, np.ndarray)
    shape = array.shape
    if array.ndim == 4:
        first, last = shape[1] in channels, shape[3] in channels
        if first and (tensor or not last):
            array = np.moveaxis(array, 1, 3)
        elif not last:
            array = array[:0]
        array = array[..., 0] if array.shape[3] == 1 else array
    if array.ndim not in (3, 4) or 0 in array.shape or (array.ndim == 3 and len(shape) == 3 and shape[2] in channels):
        expected = "(N, H, W), (N, H, W, 1 or 3) or (N, 1 or 3, H, W)"
        raise UserError(f"images must have the shape {expected}, got {shape}")
    if array.dtype.kind == "f":
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= 1):
            raise UserError(f"images of type {array.dtype} must lie in [0, 1], got {low:g} to {high:g}")
        array = np.rint(array * array.dtype.type(255)).astype(np.uint8)
    if array.dtype != np.uint8:
        raise UserError(f"images must be uint8, or floats in [0, 1], got {array.dtype}")
    return np.ascontiguousarray(array)

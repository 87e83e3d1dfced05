"""Image files to pixels: one way to open any picture, and one clear line for those that cannot be opened.

Every picture comes out upright (EXIF orientation applied) as 8-bit RGB: grey is repeated over the channels, 16-bit
values are scaled (65535 is white), transparency is laid on white, an animation gives its first frame. Embedded colour
profiles are ignored, as torchvision and timm do. Pillow's limit against decompression bombs stays in force.
"""

from __future__ import annotations

import os
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from netgloss.errors import UserError, nearest

_DECODERS = (
    JpegImagePlugin.JpegImageFile,
    PngImagePlugin.PngImageFile,
    BmpImagePlugin.BmpImageFile,
    GifImagePlugin.GifImageFile,
    WebPImagePlugin.WebPImageFile,
    TiffImagePlugin.TiffImageFile,
    PpmImagePlugin.PpmImageFile,
)
FORMATS = tuple(decoder.format for decoder in _DECODERS)
"""What Pillow may take a file for; its other decoders are never tried."""

ImageFile = str | os.PathLike[str] | BinaryIO

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_WARNINGS_LOCK = threading.Lock()


class UnreadableImage(UserError):
    """A file that cannot be read as a picture; the line names it and says why."""


def printable(name: object) -> str:
    """``name`` fit for one line of text: quoted and escaped if it holds line breaks or other control characters."""
    text = str(name)
    return text if text.isprintable() else ascii(text)


def missing(path: Path) -> UserError:
    """The error for a path that does not exist, with the nearest names to the first part of it that is absent."""
    while not path.parent.exists():
        path = path.parent
    near = nearest(path.name, sorted(p.name for p in path.parent.iterdir())) if path.parent.is_dir() else []
    hint = f"; near it: {', '.join(map(printable, near))}" if near else ""
    return UserError(f"no such file or folder: {printable(path)}{hint}")


def list_files(root: Path) -> tuple[list[str], list[str]]:
    """Every regular file below a folder and what was passed over.

    Returns
    -------
    files : relative POSIX paths, sorted folder by folder. Hidden files and folders are left out; so are links, except
        those to a file inside ``root``.
    notes : what else was left out.

    Raises
    ------
    UserError : the folder cannot be listed.
    """
    root = Path(os.path.realpath(root))
    files: list[str] = []
    closed: list[str] = []
    links = 0
    for folder, folders, names in os.walk(root, onerror=lambda error: closed.append(str(error.filename))):
        links += sum(os.path.islink(os.path.join(folder, name)) for name in folders)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = os.path.join(folder, name)
            mode = os.lstat(path).st_mode
            if stat.S_ISLNK(mode):
                target = Path(os.path.realpath(path))
                ok = target.is_file() and target.is_relative_to(root)
                links += not ok
            else:
                ok = stat.S_ISREG(mode)
            if ok and not name.startswith("."):
                files.append(os.path.relpath(path, root).replace(os.sep, "/"))
    if str(root) in closed:
        raise UserError(f"the folder {printable(root)} cannot be listed: no permission")
    notes = [f"no permission to list the folder {printable(path)}" for path in closed]
    if links:
        notes.append(f"{links} links to folders or out of {printable(root)} were not followed")
    return sorted(files, key=lambda file: file.split("/")), notes


def open_image(file: ImageFile, *, name: str | None = None) -> Image.Image:
    """Read a picture as upright 8-bit RGB.

    Parameters
    ----------
    file : path, or a binary file object that can seek; it is read from its start.
    name : what to call it in an error; default: the path.

    Raises
    ------
    UnreadableImage : missing, empty, truncated, not a picture, too large, or of values with no defined white.
    """
    with as_unreadable(_name(file, name)):
        return _rgb(_load(file))


def open_mask(file: ImageFile, *, name: str | None = None) -> NDArray[np.uint8]:
    """Read a label image, palette indices or grey values as they are stored: (h, w) uint8, values below 256.

    Raises
    ------
    UnreadableImage : as :func:`open_image`, or a colour image, or a value above 255.
    """
    with as_unreadable(_name(file, name)):
        image = _load(file)
        if image.mode not in ("P", "L", "1") and not image.mode.startswith("I"):
            raise ValueError(f"a mask must be a grey or palette image, got mode {image.mode}")
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 255:
            raise ValueError(f"mask values must be between 0 and 255, got {values.min()} to {values.max()}")
        return values.astype(np.uint8)


def image_size(file: ImageFile, *, name: str | None = None) -> tuple[int, int]:
    """Width and height of the upright picture, from the file's header where the format allows it.

    Raises
    ------
    UnreadableImage : as :func:`open_image`, as far as the header shows.
    """
    with as_unreadable(_name(file, name)), _opened(file) as image:
        width, height = image.size
        return (height, width) if _orientation(image) >= 5 else (width, height)


def sample_bytes(file: BinaryIO) -> bytes:
    """What distinguishes a file from another at little cost: its length and 4 KiB from its middle."""
    length = file.seek(0, os.SEEK_END)
    file.seek(max(length // 2 - 2048, 0))
    return f"{length}:".encode() + file.read(4096)


@contextmanager
def as_unreadable(name: str) -> Iterator[None]:
    """Any failure inside becomes an UnreadableImage: a decoder that is fed hostile bytes may raise nearly anything."""
    try:
        yield
    except UnreadableImage:
        raise
    except Exception as error:
        raise UnreadableImage(f"unreadable image {printable(name)}: {_reason(error)}") from error


def _name(file: ImageFile, name: str | None) -> str:
    return name or (os.fspath(file) if isinstance(file, str | os.PathLike) else str(getattr(file, "name", "image")))


def _reason(error: Exception) -> str:
    match error:
        case FileNotFoundError():
            return "no such file"
        case IsADirectoryError():
            return "it is a folder"
        case PermissionError():
            return "no permission to read it"
        case UnidentifiedImageError():
            return f"not a picture that Pillow knows ({', '.join(FORMATS)})"
        case MemoryError():
            return "it does not fit in memory"
        case Image.DecompressionBombError():
            return f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels, Pillow's limit (Image.MAX_IMAGE_PIXELS)"
    return " ".join(printable(error).split()) or type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Pillow's warnings; under a lock, as the list of filters belongs to the process and not to the thread."""
    with _WARNINGS_LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _opened(file: ImageFile) -> Iterator[Image.Image]:
    if isinstance(file, str | os.PathLike):
        if not os.path.isfile(file) and os.path.exists(file) and not os.path.isdir(file):
            raise ValueError("it is not a regular file")
        with open(file, "rb") as stream, _opened(stream) as image:
            yield image
        return
    file.seek(0)
    if not file.read(1):
        raise ValueError("the file is empty")
    file.seek(0)
    with _quiet():
        image = Image.open(file, formats=FORMATS)
    yield image


def _load(file: ImageFile) -> Image.Image:
    """Decoded and upright, in the mode of the file."""
    with _opened(file) as image:
        image.load()
        turn = _UPRIGHT.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> int:
    try:
        with _quiet():
            value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # damaged metadata is no reason to refuse the picture
        return 1
    return value if value in _UPRIGHT else 1


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_grey8(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _grey8(values: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Grey of more than 8 bits, (h, w), to 8 bits: integers with white = 65535, floats with white = 1."""
    white = 1.0 if values.dtype.kind == "f" else 65535.0
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= white):
        raise ValueError(f"{values.dtype} values must be between 0 and {white:g}, got {low:g} to {high:g}")
    return np.rint(values.astype(np.float64) * (255.0 / white)).astype(np.uint8)

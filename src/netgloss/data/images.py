"""Image files to pixels: one way to open any picture, and one clear line for those that cannot be opened.

Every picture comes out upright (EXIF orientation applied) as 8-bit RGB: grey is repeated over the channels,
transparency is laid on white, an animation gives its first frame. 16-bit values are scaled so that 65535 is white; if
none of a file needs more than 8, 10, 12 or 14 bits, the largest value of so many bits is white (cameras and scanners
of 12 bits write such files). ``remark`` says where a file was read in a way that a user may not expect. Embedded
colour profiles are ignored, as torchvision and timm do. Pillow's limit against decompression bombs stays in force;
beyond the pixels of the picture itself, memory is bounded, as values are converted in strips.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import stat
import threading
import warnings
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import (  # the plug-ins register what they read
    BmpImagePlugin,  # noqa: F401
    GifImagePlugin,  # noqa: F401
    Image,
    JpegImagePlugin,  # noqa: F401
    PngImagePlugin,  # noqa: F401
    PpmImagePlugin,  # noqa: F401
    TiffImagePlugin,  # noqa: F401
    UnidentifiedImageError,
    WebPImagePlugin,  # noqa: F401
    features,
)

from netgloss.errors import UserError, nearest


def _formats() -> dict[str, tuple[str, ...]]:
    """Each format that can be read here, with the endings of its files."""
    found = {
        "JPEG": ("jpg", "jpeg", "jpe", "jfif", "mpo"),
        "PNG": ("png", "apng"),
        "BMP": ("bmp", "dib"),
        "GIF": ("gif",),
        "WEBP": ("webp",),
        "TIFF": ("tif", "tiff"),
        "PPM": ("ppm", "pgm", "pbm", "pnm"),
    }
    if features.check("jpg_2000"):
        from PIL import Jpeg2KImagePlugin

        found[Jpeg2KImagePlugin.Jpeg2KImageFile.format] = ("jp2", "j2k", "jpx", "jpf")
    if features.check("avif"):
        from PIL import AvifImagePlugin

        found[AvifImagePlugin.AvifImageFile.format] = _PLUGINS["pillow-avif-plugin"]
    if importlib.util.find_spec("pillow_heif") is not None:
        import pillow_heif

        pillow_heif.register_heif_opener()
        found["HEIF"] = _PLUGINS["pillow-heif"]
    return found


_PLUGINS = {"pillow-avif-plugin": ("avif", "avifs"), "pillow-heif": ("heic", "heif", "hif")}
_ENDINGS = _formats()
FORMATS = tuple(_ENDINGS)
"""What Pillow may take a file for; its other decoders are never tried."""
EXTENSIONS = tuple(ending for endings in _ENDINGS.values() for ending in endings)
"""Endings of the files that are taken for pictures, without regard to case."""
_UNREAD = {"jp2", "j2k", "jpx", "jpf", "tga", "psd", "ico", "icns", "svg", "eps", "pdf", "exr", "hdr", "dcm", "dng"}
"""Endings of pictures that may not be readable here."""

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
_REMARK = "netgloss remark"
_STRIP = 2**22
"""Pixels that are converted at a time."""


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


def few(names: Sequence[str], limit: int = 5) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(printable, names[:limit])) + more


_RESULTS = ("run.json", "result.json", "comparison.json", "audit.json", "zarr.json")
"""One of these lies in every folder that netgloss writes; their pictures are no images to explain."""


def list_files(root: Path) -> tuple[list[str], list[str]]:
    """Every regular file below a folder and what was passed over.

    Links to files and to folders are followed, but no folder is read twice: a link to a folder that was read already,
    or that holds the link, is passed over. Folders that are no links come first, so the names do not depend on where
    links point.

    Returns
    -------
    files : relative POSIX paths, sorted folder by folder. Hidden files and folders are left out.
    notes : what was passed over, each kind with its number and names.

    Raises
    ------
    UserError : the folder cannot be listed.
    """
    root = Path(os.path.realpath(root))
    files: list[str] = []
    outside: list[str] = []
    passed: dict[str, list[str]] = defaultdict(list)
    waiting, links, read = [""], deque[str](), {str(root)}
    while waiting or links:
        folder = waiting.pop() if waiting else links.popleft()
        place = os.path.join(root, folder)
        if folder and (os.path.realpath(place) in read):
            passed["links to folders that are read already"].append(folder)
            continue
        read.add(os.path.realpath(place))
        try:
            entries = sorted(os.scandir(place), key=lambda entry: entry.name)
        except OSError as error:
            if not folder:
                raise UserError(f"the folder {printable(root)} cannot be listed: {_listing(error)}") from error
            passed["folders without permission to list them"].append(folder)
            continue
        if folder and any(entry.name in _RESULTS for entry in entries):
            passed["folders of results of netgloss"].append(folder)
            continue
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            kind = _kind(entry)
            if kind in ("folder", "file") and entry.is_symlink() and not _is_inside(entry.path, root):
                outside.append(name)
            if kind == "folder":
                (links if entry.is_symlink() else waiting).append(name)
            elif kind == "file":
                files.append(name)
            else:
                passed[kind].append(name)
    notes = [f"{len(names)} {kind} passed over: {few(sorted(names))}" for kind, names in sorted(passed.items())]
    if outside:
        notes.append(f"{len(outside)} links out of {printable(root)} were followed: {few(sorted(outside))}")
    return sorted(files, key=lambda file: file.split("/")), notes


def _is_inside(path: str, root: Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(root)


def _kind(entry: os.DirEntry[str]) -> str:
    """What an entry is: "folder", "file", or the kind of what is passed over."""
    try:
        if entry.name.startswith("._"):
            return "files of macOS (._NAME)"
        if entry.name.startswith("."):
            return "hidden folders" if entry.is_dir() else "hidden files"
        if entry.is_dir():
            return "folder"
        if stat.S_ISREG(os.stat(entry.path).st_mode):
            return "file"
    except OSError:
        return "broken links" if entry.is_symlink() else "files that cannot be reached"
    return "files that are not regular (pipes, devices)"


def _listing(error: OSError) -> str:
    return "no permission" if isinstance(error, PermissionError) else (error.strerror or "unknown reason")


def pictures_of(files: Sequence[str]) -> tuple[list[str], list[str]]:
    """The files whose endings say that they are pictures, and notes on the others."""
    chosen: list[str] = []
    passed: dict[str, list[str]] = defaultdict(list)
    for file in files:
        ending = file.rpartition("/")[2].lower().rpartition(".")[2]
        plugin = next((name for name, endings in _PLUGINS.items() if ending in endings), None)
        if ending in EXTENSIONS:
            chosen.append(file)
        elif plugin is not None:
            passed[f"pictures that need a plug-in (pip install {plugin})"].append(file)
        elif ending in _UNREAD:
            passed["pictures of formats that are not read (convert them to PNG or JPEG)"].append(file)
        else:
            passed["files with other endings"].append(file)
    return chosen, [f"{len(names)} {kind} passed over: {few(names)}" for kind, names in sorted(passed.items())]


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
        decoded = _load(file)
        scale = _range(decoded, file)
        several = "the first of several frames or pages was read" if _is_animated(decoded, file) else ""
        found = _rgb(decoded.image, scale)
        found.info[_REMARK] = "; ".join(filter(None, [several, scale.remark]))
        return found


def remark(image: Image.Image) -> str:
    """What :func:`open_image` did that a user may not expect: one line, mostly ""."""
    return str(image.info.get(_REMARK, ""))


def open_mask(file: ImageFile, *, name: str | None = None) -> NDArray[np.uint8]:
    """Read a label image, palette indices or grey values as they are stored: (h, w) uint8, values below 256.

    Raises
    ------
    UnreadableImage : as :func:`open_image`, or a colour image, or a value above 255.
    """
    with as_unreadable(_name(file, name)):
        image = _load(file).image
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
        turned = _orientation(image) >= 5 and image.format != "TIFF"  # whose size Pillow turns itself
        return (height, width) if turned else (width, height)


FileState = tuple[int, int, int, int]
"""Size, time of the last change of the content and of the inode in nanoseconds, and inode."""


def file_state(file: int | str | os.PathLike[str]) -> FileState:
    """What changes when a file is written, even if its modification time is set back; zeros if it cannot be seen."""
    try:
        found = os.stat(file)
    except (OSError, ValueError):
        return 0, 0, 0, 0
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def content_digest(file: BinaryIO) -> bytes:
    """sha256 of a file's content, which is read whole."""
    file.seek(0)
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.digest()


def sample_bytes(file: BinaryIO) -> bytes:
    """The length of a file and 4 KiB from its middle: what identified a file up to version 0.1.0."""
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


@dataclass(frozen=True)
class _Decoded:
    """A decoded, upright picture in the mode of its file, and what Pillow knows of it only while it is open.

    Attributes
    ----------
    rawmode : how the file holds the pixels ("RGB;16B"), "" if unknown. animated : as the header says.
    """

    image: Image.Image
    format: str
    rawmode: str
    animated: bool


def _load(file: ImageFile, *, rawmode: str = "") -> _Decoded:
    """Decode a picture; ``rawmode`` is how the pixels are to be read, if not as the file says."""
    with _opened(file) as image:
        tiles = list(getattr(image, "tile", ()))
        args = [tile[3] if isinstance(tile[3], tuple) else (tile[3],) for tile in tiles]
        if rawmode:
            parts = [
                (*tile[:3], (rawmode, *arg[1:]) if isinstance(tile[3], tuple) else rawmode)
                for tile, arg in zip(tiles, args, strict=True)
            ]
            image.tile = [type(tile)(*part) for tile, part in zip(tiles, parts, strict=True)]  # type: ignore[attr-defined]
        in_file = args[0][0] if args and args[0] else ""
        kind = image.format or ""
        animated = kind not in _SEEKING and bool(getattr(image, "is_animated", False))
        image.load()
        turn = _UPRIGHT.get(_orientation(image))
    upright = image if turn is None else image.transpose(turn)
    return _Decoded(upright, kind, in_file if isinstance(in_file, str) else "", animated)


_SEEKING = ("GIF", "TIFF")
"""Formats in which a look for further frames moves to them."""


def _orientation(image: Image.Image) -> int:
    try:
        with _quiet():
            value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # damaged metadata is no reason to refuse the picture
        return 1
    return value if value in _UPRIGHT else 1


@dataclass(frozen=True)
class _Range:
    """The value that is white.

    Attributes
    ----------
    remark : what is unusual about it. low : the lower 8 of 16 bits a channel, which Pillow leaves out of colour.
    """

    white: int = 255
    remark: str = ""
    low: Image.Image | None = None


def _range(decoded: _Decoded, file: ImageFile) -> _Range:
    image, low = decoded.image, None
    if image.mode.startswith("I"):
        bottom, top = _extrema(image)
        if not 0 <= bottom <= top <= 65535:
            kind = np.asarray(image.crop((0, 0, 1, 1))).dtype
            raise ValueError(f"{kind} values must be between 0 and 65535, got {bottom} to {top}")
        bits = 16 if decoded.format == "PPM" else _bits(top)  # a PPM says its range, and Pillow scales by it
    elif image.mode == "RGB" and decoded.rawmode.startswith("RGB;16"):
        bits = _bits(_extrema(image)[1] * 256 + 255)
        if bits < 16:
            low = _load(file, rawmode="RGB;16L" if decoded.rawmode == "RGB;16B" else "RGB;16B").image
    else:
        return _Range()
    text = f"values of {bits} bits in a 16-bit file were scaled so that {2**bits - 1} is white"
    return _Range(2**bits - 1, "" if bits == 16 else text, low)


def _strips(image: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    """Boxes of whole rows, from the top."""
    width, height = image.size
    rows = max(_STRIP // width, 1)
    return ((0, top, width, min(top + rows, height)) for top in range(0, height, rows))


def _extrema(image: Image.Image) -> tuple[int, int]:
    found = [(int(strip.min()), int(strip.max())) for strip in (np.asarray(image.crop(b)) for b in _strips(image))]
    return min(low for low, _ in found), max(high for _, high in found)


def _bits(top: int) -> int:
    return next(bits for bits in (8, 10, 12, 14, 16) if top < 2**bits)


def _is_animated(decoded: _Decoded, file: ImageFile) -> bool:
    if decoded.format not in _SEEKING:
        return decoded.animated
    try:
        with _opened(file) as again, _quiet():
            return bool(getattr(again, "is_animated", False))
    except Exception:  # what follows the first frame is damaged
        return False


def _rgb(image: Image.Image, scale: _Range) -> Image.Image:
    """8-bit RGB, converted in strips, so that no copy of a large picture in a wide mode is made."""
    if image.mode == "RGB" and not image.has_transparency_data and scale.low is None:
        return image
    found = Image.new("RGB", image.size)
    for box in _strips(image):
        strip = image.crop(box)
        if scale.low is not None:
            values = np.asarray(strip).astype(np.uint16) * 256 + np.asarray(scale.low.crop(box))
            strip = Image.fromarray(_eight_bits(values, scale.white))
        elif image.mode == "F" or image.mode.startswith("I"):
            strip = Image.fromarray(_eight_bits(np.asarray(strip), 1 if image.mode == "F" else scale.white))
        elif image.has_transparency_data:
            strip = strip.convert("RGBA")
            strip = Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip)
        found.paste(strip.convert("RGB"), box)
    return found


def _eight_bits(values: NDArray[np.generic], white: int) -> NDArray[np.uint8]:
    """Values of more than 8 bits, or floats, to 8 bits."""
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= white):
        raise ValueError(f"{values.dtype} values must be between 0 and {white:g}, got {low:g} to {high:g}")
    return np.rint(values.astype(np.float64) * (255.0 / white)).astype(np.uint8)

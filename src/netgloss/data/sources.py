"""Opening image sources (folders, files, arrays, timm data sets, Critters), splitting them, naming their classes."""

from __future__ import annotations

import copy
import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from netgloss.data.annotations import open_annotations
from netgloss.data.arrays import ArraySource, open_npz
from netgloss.data.base import ImageSource, Joined
from netgloss.data.images import (
    EXTENSIONS,
    FileState,
    content_digest,
    file_state,
    image_size,
    list_files,
    missing,
    open_image,
    pictures_of,
    printable,
    sample_bytes,
)
from netgloss.data.named import CrittersSource, open_critters, open_timm
from netgloss.errors import UserError

if TYPE_CHECKING:
    from netgloss.data.annotation_files import Annotations
    from netgloss.data.critters import Critters

_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "images", "masks"}

__all__ = [
    "EXTENSIONS",
    "ArraySource",
    "FileSource",
    "ImageSource",
    "open_images",
    "split",
    "split_ids",
]


class FileSource(ImageSource):
    """Image files below a folder.

    Parameters
    ----------
    root : the folder.
    files : relative POSIX paths.
    labelled : the first folder of each path is its class.
    """

    def __init__(
        self, root: Path, files: Sequence[str], *, labelled: bool, description: str, notes: Iterable[str] = ()
    ) -> None:
        classes = [_text(file.split("/")[0]) if labelled and "/" in file else None for file in files]
        names = sorted({name for name in classes if name is not None})
        index = {name: i for i, name in enumerate(names)}
        targets = np.array([-1 if name is None else index[name] for name in classes], np.int64)
        ids = [_text(file) for file in files]
        super().__init__(ids, description=description, class_names=names, targets=targets, notes=notes)
        self.root = Path(os.path.abspath(root))
        self._files = list(files)

    def image(self, i: int) -> Image.Image:
        return open_image(self.root / self._files[i])

    def size(self, i: int) -> tuple[int, int]:
        return image_size(self.root / self._files[i])

    def _digest(self, i: int) -> bytes:
        return self._read(i, content_digest)

    def _sample(self, i: int) -> bytes:
        return self._read(i, sample_bytes)

    def _read(self, i: int, read: Callable[[BinaryIO], bytes]) -> bytes:
        try:
            with open(self.root / self._files[i], "rb") as file:
                return read(file)
        except OSError:
            return b"unreadable"

    def _file_state(self, i: int) -> FileState:
        return file_state(self.root / self._files[i])


def _text(name: str) -> str:
    """A file's name as text, whatever its bytes are."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def open_images(
    spec: str | os.PathLike[str] | ImageSource | Critters | NDArray[Any] | Tensor,
    *,
    annotations: str | os.PathLike[str] | Annotations | None = None,
) -> ImageSource:
    """Open an image source.

    Parameters
    ----------
    spec : a folder of images (its sub-folders are the classes), an image file, ``file.npz`` (arrays ``x``, ``y``,
        ``classes``) or ``file.npz:test`` (``x_test``, ``y_test``), ``timm:NAME,root=...,split=...`` (any data set of
        ``timm.data.create_dataset`` that can be read by number), ``critters``, ``critters:N`` or
        ``critters:N,seed=1,size=64``; in Python also an array, a tensor or a source.
    annotations : what ``open_annotations`` reads, or its result.

    Raises
    ------
    UserError : nothing there, nothing in it, or not one of these forms.
    """
    source = _open(spec)
    if annotations is not None:
        if isinstance(annotations, str | os.PathLike):
            annotations = open_annotations(annotations, source.ids)
        source = copy.copy(source)
        source.annotations = annotations
    return source


def _open(spec: Any) -> ImageSource:
    if isinstance(spec, ImageSource):
        return spec
    if isinstance(spec, np.ndarray | Tensor):
        return ArraySource(spec)
    if not isinstance(spec, str | os.PathLike):
        from netgloss.data.critters import Critters

        if not isinstance(spec, Critters):
            raise UserError(
                f"cannot open a {type(spec).__name__} as images: pass a path, an array, a tensor or a source"
            )
        return CrittersSource(spec)
    text, path = os.fspath(spec), Path(spec)
    if path.is_dir():
        return _open_folder(path)
    if text.startswith("timm:"):
        return open_timm(text)
    if re.match(r"critters(:|$)", text) and not path.exists():
        return open_critters(text)
    part = ""
    if not path.exists() and (match := re.fullmatch(r"(.+\.npz):(\w+)", text)):
        path, part = Path(match[1]), match[2]
    if not path.exists():
        raise missing(path)
    if path.suffix.lower() == ".npz":
        return open_npz(path, part)
    if path.suffix.lower()[1:] not in EXTENSIONS:
        raise UserError(
            f"{printable(path)} is neither a folder nor an .npz file nor an image ({', '.join(EXTENSIONS)})"
        )
    return FileSource(path.parent, [path.name], labelled=False, description=printable(path.name))


def refuse_among_images(out: str | os.PathLike[str], source: ImageSource) -> None:
    """Refuses to write pictures into a folder of images, where the next command would read them as images.

    Raises
    ------
    UserError : ``out`` lies in a folder that ``source`` reads.
    """
    place = Path(os.path.realpath(out))
    for part in (source.fit, source.heldout) if isinstance(source, Joined) else (source,):
        if isinstance(part, FileSource) and len(part) > 1 and place.is_relative_to(os.path.realpath(part.root)):
            raise UserError(
                f"{printable(out)} lies among the images in {printable(part.root)}: pictures written there would be "
                "read as images the next time; choose another folder"
            )


def _open_folder(root: Path) -> FileSource:
    found, passed = list_files(root)
    files, others = pictures_of(found)
    notes = [*others, *passed]
    if not files:
        other = "; ".join(notes) or "no files at all"
        raise UserError(f"no images in {printable(root)}: looked for {', '.join(EXTENSIONS)}, found {other}")
    classes = {file.split("/")[0] for file in files if "/" in file}
    if classes:
        folders = {entry.name for entry in os.scandir(root) if entry.is_dir()}
        empty = sorted(name for name in folders - classes if not name.startswith("."))
        if empty:
            notes.append(f"class folders without images: {', '.join(map(printable, empty))}")
        if loose := sum("/" not in file for file in files):
            notes.append(f"{loose} images lie next to the class folders and have no class")
        if classes <= _SPLITS:
            notes.append(f"the classes are called {', '.join(sorted(classes))}: was one of these folders meant?")
    description = f"{len(files)} images of {printable(root.resolve().name)}"
    return FileSource(root, files, labelled=bool(classes), description=description, notes=notes)


def split(source: ImageSource, fraction: float = 0.8) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """:func:`split_ids` of a source's ids and targets."""
    return split_ids(source.ids, source.targets, fraction=fraction)


def split_ids(
    ids: Sequence[str], targets: NDArray[np.int64], *, fraction: float = 0.8
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Numbers of the images to fit on and of those held out, in rising order.

    Within each class the images are ordered by the sha256 of their ids and the first ``fraction`` is for fitting; a
    class of two or more has at least one in each part. A class of one is for fitting only.

    Parameters
    ----------
    ids : N names.
    targets : (N,) classes; -1, unknown, counts as a class.

    Raises
    ------
    UserError : ``fraction`` is not between 0 and 1.
    """
    if not 0 < fraction < 1:
        raise UserError(f"the fraction to fit on must lie between 0 and 1, got {fraction}")
    by_class: dict[int, list[tuple[bytes, int]]] = defaultdict(list)
    for i, (image_id, target) in enumerate(zip(ids, targets.tolist(), strict=True)):
        by_class[target].append((hashlib.sha256(image_id.encode()).digest(), i))
    fit: list[int] = []
    for members in by_class.values():
        count = min(max(round(fraction * len(members)), 1), max(len(members) - 1, 1))
        fit += [i for _, i in sorted(members)[:count]]
    fit_indices = np.array(sorted(fit), np.int64)
    return fit_indices, np.setdiff1d(np.arange(len(ids), dtype=np.int64), fit_indices)


def open_sources(
    images: ImageSource | str | Path, eval_images: ImageSource | str | Path | None = None, *, verify: bool = False
) -> ImageSource:
    """The images to fit on, joined with those to evaluate on where these are given.

    Parameters
    ----------
    verify : compare the whole content of every file with what a store was made of.

    Raises
    ------
    UserError : both are the same images.
    """
    from netgloss.data import ImageSource, Joined, open_images

    source, heldout = (s if s is None or isinstance(s, ImageSource) else open_images(s) for s in (images, eval_images))
    assert source is not None
    if heldout is not None and heldout.fingerprint == source.fingerprint:
        raise UserError(
            f"the images to evaluate on are those to fit on ({source.description}): explainers are evaluated on other "
            "images; without --eval-images a fifth of the images is held out"
        )
    opened = source if heldout is None else Joined(source, heldout)
    opened.verify |= verify
    return opened

"""Sources with a name instead of a path: ``timm:NAME,root=...,split=...`` and ``critters:N,seed=...``."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from PIL import Image

from netgloss.class_names import class_list
from netgloss.data.annotations import ImageAnnotation
from netgloss.data.base import ImageSource
from netgloss.data.images import (
    FileState,
    UnreadableImage,
    as_unreadable,
    content_digest,
    file_state,
    missing,
    open_image,
    printable,
    sample_bytes,
)
from netgloss.errors import UserError, nearest

if TYPE_CHECKING:
    from netgloss.data.critters import Critters


_MOST_DIGITS = 7  # of a number of scenes: their names are held in memory
_ROOTLESS = ("hfds", "hfids", "tfds")
"""Kinds of timm data sets that know themselves where they lie."""


class TimmSource(ImageSource):
    """A data set of timm (or, through it, of torchvision or Hugging Face) that can be read by number."""

    def __init__(self, dataset: Any, *, description: str) -> None:
        self.dataset = dataset
        reader: Any = getattr(dataset, "reader", None)
        if reader is not None and hasattr(reader, "cache_tarfiles"):
            reader.cache_tarfiles = False  # an open archive cannot be shared with data-loading processes
        self._reader: Any = reader
        n = len(dataset)
        if self._reader is not None:
            names = [str(name) for name in self._reader.filenames()]
            index = (
                getattr(self._reader, "class_to_idx", None) or getattr(self._reader, "class_name_to_idx", None) or {}
            )
        else:
            names, index = [], getattr(dataset, "class_to_idx", {})
        ids = names if len(set(names)) == n else [f"{i:06d}" for i in range(n)]
        targets = np.array(_timm_targets(dataset, self._reader), np.int64)
        known = class_list(index)
        super().__init__(
            ids,
            description=f"{n} images of {description}",
            class_names=known + [f"class {i}" for i in range(len(known), max([*targets.tolist(), -1]) + 1)],
            targets=targets,
        )

    def image(self, i: int) -> Image.Image:
        with as_unreadable(self.ids[i]):
            if self._reader is None:
                return self.dataset[i][0].convert("RGB")
            with self._reader[i][0] as file:  # the data set itself puts the next image in the place of a broken one
                return open_image(file, name=self.ids[i])

    def _digest(self, i: int) -> bytes:
        return self._read(i, content_digest)

    def _sample(self, i: int) -> bytes:
        return self._read(i, sample_bytes)

    def _read(self, i: int, read: Callable[[BinaryIO], bytes]) -> bytes:
        try:
            if self._reader is None:
                image = self.image(i)
                return repr(image.size).encode() + image.tobytes()
            with self._reader[i][0] as file:
                return read(file)
        except (OSError, UnreadableImage):
            return b"unreadable"

    def _file_state(self, i: int) -> FileState | None:
        if self._reader is None:
            return None
        try:
            with self._reader[i][0] as file:
                return file_state(file.fileno())
        except FileNotFoundError:
            return 0, 0, 0, 0
        except (OSError, AttributeError):  # a member of an archive
            return None


class CrittersSource(ImageSource):
    """The project's procedural scenes, which annotate themselves."""

    def __init__(self, scenes: Critters) -> None:
        super().__init__(
            scenes.ids, description=scenes.description, class_names=scenes.class_names, targets=scenes.targets
        )
        self.scenes = scenes

    def image(self, i: int) -> Image.Image:
        return self.scenes.image(i)

    def size(self, i: int) -> tuple[int, int]:
        return self.scenes.config.size, self.scenes.config.size

    def annotation(self, i: int) -> ImageAnnotation | None:
        return self.scenes.annotation(i) if self.annotations is None else super().annotation(i)

    def _digest(self, i: int) -> bytes:
        return self.scenes.fingerprint.encode()


def open_timm(spec: str) -> TimmSource:
    """Any data set of ``timm.data.create_dataset`` that can be read by number.

    Raises
    ------
    UserError : no such data set, or one that streams.
    """
    from timm.data import create_dataset
    from torch.utils.data import IterableDataset

    name, options = spec_options(spec)
    root = options.get("root")
    if root is not None and not Path(str(root)).exists():
        raise missing(Path(str(root)))
    if root is None and name.partition("/")[0] not in _ROOTLESS:
        raise UserError(f"{printable(spec)}: say where the images lie, timm:{name},root=FOLDER")
    try:
        dataset = create_dataset(name, **options)
        if not isinstance(dataset, IterableDataset):
            return TimmSource(dataset, description=printable(spec))
    except Exception as error:  # whatever the many back ends of timm raise
        reason = " ".join(printable(error).split()) or type(error).__name__
        raise UserError(f"timm cannot open {printable(spec)}: {reason}") from error
    raise UserError(f"{printable(spec)} can only be read in sequence: netgloss needs a data set that is read by number")


def _timm_targets(dataset: Any, reader: Any) -> list[int]:
    holder = dataset if reader is None else reader
    if getattr(holder, "targets", None) is not None:
        return [int(target) for target in holder.targets]
    if reader is not None and hasattr(reader, "iter_targets"):
        return [int(target) for target in reader.iter_targets()]
    if getattr(holder, "samples", None) is not None:
        return [int(sample[1]) for sample in holder.samples]
    return [int(dataset[i][1]) for i in range(len(dataset))]


def open_critters(spec: str) -> CrittersSource:
    """``critters``, ``critters:N`` or ``critters:N,option=value,...``.

    Raises
    ------
    UserError : an option that does not exist or does not fit.
    """
    from netgloss.data.critters import Critters, CrittersConfig

    count, options = spec_options(spec)
    known = {field.name: type(field.default) for field in fields(CrittersConfig)}
    for key, value in options.items():
        if key not in known:
            hint = ", ".join(nearest(key, known) or known)
            raise UserError(f"{spec}: critters have no option {key!r}; did you mean {hint}?")
        if not isinstance(value, known[key]) and not (known[key] is float and isinstance(value, int)):
            raise UserError(f"{spec}: {key} must be of type {known[key].__name__}, got {value!r}")
    if count and not count.isdecimal():
        raise UserError(f"{spec}: critters:N wants the number of scenes, got {count!r}")
    if len(count) > _MOST_DIGITS:
        raise UserError(f"{printable(spec)}: at most {10**_MOST_DIGITS - 1} scenes")
    config = CrittersConfig(**options)
    return CrittersSource(Critters(config, int(count)) if count else Critters(config))


def spec_options(text: str) -> tuple[str, dict[str, Any]]:
    """``HEAD,key=value,...`` after the first colon of a spec; the values are Python literals or plain text."""
    head, *rest = text.partition(":")[2].split(",")
    options: dict[str, Any] = {}
    for item in rest:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise UserError(f"{printable(text)}: expected key=value, got {item!r}")
        try:
            options[key.strip()] = ast.literal_eval({"true": "True", "false": "False"}.get(value.lower(), value))
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            options[key.strip()] = value
    return head, options

"""Where stores lie: folders, zip archives (to read), and any URL that fsspec knows (``s3://bucket/name``, ``memory://x``).

A folder is read through :class:`RegularFiles`, so that a pipe or a device inside it is an error and not a trap.
"""

from __future__ import annotations

import errno
import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import zarr
from zarr.storage import LocalStore

from netgloss.errors import UserError

Place = Path | str
"""A local path, or a URL as text (a ``Path`` would drop one of its slashes)."""


class RegularFiles(LocalStore):
    """A folder whose entries are read only if they are regular files."""

    async def get(self, key: str, *arguments: Any, **options: Any) -> Any:
        path = Path(self.root) / key
        if path.exists() and not path.is_file() and not path.is_dir():
            raise OSError(f"{key} is not a regular file")
        return await super().get(key, *arguments, **options)


def place_of(where: str | os.PathLike[str]) -> Place:
    """A URL stays text, ``file://`` and anything else becomes a path."""
    if isinstance(where, str) and "://" in where and not where.startswith("file://"):
        return where
    return Path(where.removeprefix("file://")) if isinstance(where, str) else Path(where)


def open_group(place: Place, mode: Any) -> zarr.Group:
    """The zarr group at a place; whatever zarr and fsspec raise comes through."""
    if isinstance(place, str):
        return zarr.open_group(place, mode=mode, zarr_format=3)
    if place.suffix == ".zip" and place.is_file():
        return zarr.open_group(zarr.storage.ZipStore(place, mode="r"), mode="r", zarr_format=3)
    return zarr.open_group(RegularFiles(place), mode=mode, zarr_format=3)


def is_taken(place: Place) -> bool:
    """Whether anything is there already.

    Raises
    ------
    UserError : the URL's file system is unknown, needs a package that is not installed, or cannot be reached.
    """
    if isinstance(place, Path):
        return place.exists() and any(place.iterdir() if place.is_dir() else [place])
    import fsspec

    try:
        system, root = fsspec.core.url_to_fs(place)
        return bool(system.exists(root) and system.find(root, maxdepth=1))
    except Exception as error:  # each file system of fsspec raises its own
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"cannot reach {place}: {reason}") from error


@contextmanager
def writing_to(path: Place) -> Iterator[None]:
    """Turns the operating system's refusals into one clear line."""
    try:
        yield
    except OSError as error:
        reasons = {
            errno.ENOSPC: "the disk is full",
            errno.EDQUOT: "the disk quota is used up",
            errno.EROFS: "the file system is read-only",
            errno.EACCES: "permission denied",
            errno.EPERM: "permission denied",
            errno.ENOTDIR: "a part of the path is a file, not a folder",
            errno.EISDIR: "it is a folder",
            errno.EEXIST: "a file of that name is in the way",
            errno.ENOENT: "there is no such place",
            errno.ENAMETOOLONG: "the name is too long",
            errno.ELOOP: "it is a link to itself",
        }
        reason = reasons.get(error.errno or 0)
        if reason is None:
            raise
        raise UserError(f"cannot write to {path}: {reason}") from error


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Removes what killed writers left in ``folder``: neighbours ``NAME.partPID`` of processes that live no more.

    Only for the process that writes to ``folder``, before it does: a live writer on another machine looks dead here.
    """
    escaped = "*" if name == "*" else glob.escape(name)
    for part in [*folder.glob(f"{escaped}.part[0-9]*"), *folder.glob(f".{escaped}.part[0-9]*")]:
        pid = part.name.rpartition(".part")[2]
        if not pid.isdecimal() or _lives(int(pid)):
            continue
        if part.is_dir() and not part.is_symlink():
            shutil.rmtree(part, ignore_errors=True)
        else:
            with suppress(OSError):
                part.unlink()


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return pid != os.getpid()

"""The contract of every image source: pictures by number, with ids, targets, annotations and a fingerprint.

A fingerprint depends on what the pictures are and not on where they lie: files are read whole for it. As that costs the
reading of all of them, the source takes the fingerprint again only if a file's size, times or inode changed (its
``state``, which a store keeps too). Sources hold no open files and can be pickled for data-loading processes.

Shape letters: N images, w and h pixels.
"""

from __future__ import annotations

import hashlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from netgloss.data.annotations import ImageAnnotation
from netgloss.data.images import FileState, printable
from netgloss.errors import UserError

if TYPE_CHECKING:
    from netgloss.data.annotation_files import Annotations

_CLOCK = 2_000_000_000
"""Nanoseconds within which two changes of a file may get the same time (the coarsest clock of a file system)."""
_READERS = 8


class ImageSource(ABC):
    """Pictures by number.

    Attributes
    ----------
    ids : N unique names, relative POSIX paths.
    class_names : names of the classes, [] if unlabelled.
    targets : (N,) int64 indices into ``class_names``, -1 where unknown.
    description : the source in a few words.
    notes : what was passed over or looks odd.
    annotations : what ``annotation`` reads, or None.
    verify : read every file again before a store is used, even if no file's size, times or inode changed.
    decodes : whether ``image`` takes real work, so that processes that read ahead pay.
    """

    def __init__(
        self,
        ids: Sequence[str],
        *,
        description: str,
        class_names: Sequence[str] = (),
        targets: NDArray[np.int64] | None = None,
        notes: Iterable[str] = (),
    ) -> None:
        assert len(set(ids)) == len(ids), "ids must be unique"
        self.ids = list(ids)
        self.class_names = list(class_names)
        self.targets = np.full(len(ids), -1, np.int64) if targets is None else targets.astype(np.int64)
        self.description = description
        self.notes = list(notes)
        self.annotations: Annotations | None = None
        self.decodes = True
        self.verify = False
        self._seen: tuple[str, str] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.description})"

    @abstractmethod
    def image(self, i: int) -> Image.Image:
        """Picture ``i`` as upright 8-bit RGB.

        Raises
        ------
        UnreadableImage : it cannot be read.
        """

    @abstractmethod
    def _digest(self, i: int) -> bytes:
        """What distinguishes picture ``i`` from another one of the same id."""

    def size(self, i: int) -> tuple[int, int]:
        """(w, h) of picture ``i``."""
        return self.image(i).size

    def annotation(self, i: int) -> ImageAnnotation | None:
        """What is marked in picture ``i``; None if it is not annotated.

        Raises
        ------
        UserError : the annotation cannot be read or belongs to an image of another size.
        """
        annotation = None if self.annotations is None else self.annotations.for_image(self.ids[i])
        if annotation is not None and annotation.size != (size := self.size(i)):
            (w, h), name = annotation.size, printable(self.ids[i])
            raise UserError(f"the annotation of {name} is for {w} x {h} pixels, the image has {size[0]} x {size[1]}")
        return annotation

    def _sample(self, i: int) -> bytes:
        """What versions up to 0.1.0 took for the digest of picture ``i``."""
        return self._digest(i)

    def _file_state(self, i: int) -> FileState | None:
        """The state of the file of picture ``i``; None if it is no file by itself."""
        return None

    @property
    def state(self) -> str:
        """sha256 over the files' sizes, times and inodes: as long as it stays, so does the fingerprint.

        "" if that cannot be said: pictures that are no files, or a file that changed so lately that another change
        could get the same time.
        """
        digest, newest = hashlib.sha256(repr(self.class_names).encode()), 0
        for i, (image_id, target) in enumerate(zip(self.ids, self.targets.tolist(), strict=True)):
            file = self._file_state(i)
            if file is None:
                return ""
            newest = max(newest, file[1], file[2])
            digest.update(f"\n{image_id}\0{target}\0{file}".encode())
        return digest.hexdigest() if newest < time.time_ns() - _CLOCK else ""

    @property
    def fingerprint(self) -> str:
        """sha256 over ids, targets, class names and the pictures' contents."""
        return self._state_and_fingerprint()[1]

    @property
    def known_state(self) -> str:
        """The ``state`` that the files had when the fingerprint was taken."""
        return self._state_and_fingerprint()[0]

    def _state_and_fingerprint(self) -> tuple[str, str]:
        state = self.state
        if self._seen is None or ((self._seen[0] != state or not state) and self._has_files()):
            self._seen = (state, self._hash(self._digest))
        return self._seen

    def _has_files(self) -> bool:
        return any(self._file_state(i) is not None for i in range(len(self)))

    def recall(self, state: str, fingerprint: str) -> None:
        """Take ``fingerprint`` as the one of the pictures if their files are still in that ``state``."""
        if state and self._seen is None and not self.verify:
            self._seen = (state, fingerprint)

    def is_of(self, fingerprint: str) -> bool:
        """Whether ``fingerprint`` is of these pictures, be it one that version 0.1.0 made from samples of the files."""
        return fingerprint == self.fingerprint or fingerprint == self._hash(self._sample)

    def _hash(self, digest_of: Callable[[int], bytes]) -> str:
        digest = hashlib.sha256(repr(self.class_names).encode())
        in_threads = len(self) > 0 and self._file_state(0) is not None
        with ThreadPoolExecutor(_READERS) as pool:
            parts = (pool.map if in_threads else map)(digest_of, range(len(self)))
            for image_id, target, part in zip(self.ids, self.targets.tolist(), parts, strict=True):
                digest.update(f"\n{image_id}\0{target}\0".encode())
                digest.update(hashlib.sha256(part).digest())
        return digest.hexdigest()

    def subset(self, indices: Iterable[int]) -> ImageSource:
        """The pictures of these numbers, in this order."""
        return Subset(self, [int(i) for i in indices])


class Subset(ImageSource):
    """Some pictures of another source; its fingerprint is that of a source of just these."""

    def __init__(self, source: ImageSource, indices: Sequence[int]) -> None:
        super().__init__(
            [source.ids[i] for i in indices],
            description=f"{len(indices)} of {source.description}",
            class_names=source.class_names,
            targets=source.targets[np.asarray(indices, np.int64)],
            notes=source.notes,
        )
        self.source, self.indices, self.decodes = source, indices, source.decodes

    def image(self, i: int) -> Image.Image:
        return self.source.image(self.indices[i])

    def size(self, i: int) -> tuple[int, int]:
        return self.source.size(self.indices[i])

    def annotation(self, i: int) -> ImageAnnotation | None:
        return self.source.annotation(self.indices[i]) if self.annotations is None else super().annotation(i)

    def _digest(self, i: int) -> bytes:
        return self.source._digest(self.indices[i])

    def _sample(self, i: int) -> bytes:
        return self.source._sample(self.indices[i])

    def _file_state(self, i: int) -> FileState | None:
        return self.source._file_state(self.indices[i])


class Joined(ImageSource):
    """Pictures to fit on followed by pictures to evaluate on; ids say which (``fit/...``, ``held-out/...``).

    Attributes
    ----------
    num_fit : how many of the pictures are for fitting.
    """

    def __init__(self, fit: ImageSource, heldout: ImageSource) -> None:
        names = list(dict.fromkeys([*fit.class_names, *heldout.class_names]))
        targets = [
            np.array([names.index(s.class_names[t]) if t >= 0 else -1 for t in s.targets.tolist()], np.int64)
            for s in (fit, heldout)
        ]
        super().__init__(
            [f"{part}/{image_id}" for part, s in (("fit", fit), ("held-out", heldout)) for image_id in s.ids],
            description=f"{fit.description} and {heldout.description}",
            class_names=names,
            targets=np.concatenate(targets),
            notes=[*fit.notes, *heldout.notes],
        )
        self.fit, self.heldout, self.num_fit = fit, heldout, len(fit)
        self.decodes = fit.decodes or heldout.decodes

    def _find(self, i: int) -> tuple[ImageSource, int]:
        return (self.fit, i) if i < self.num_fit else (self.heldout, i - self.num_fit)

    def image(self, i: int) -> Image.Image:
        source, own = self._find(i)
        return source.image(own)

    def size(self, i: int) -> tuple[int, int]:
        source, own = self._find(i)
        return source.size(own)

    def annotation(self, i: int) -> ImageAnnotation | None:
        source, own = self._find(i)
        return source.annotation(own) if self.annotations is None else super().annotation(i)

    def _digest(self, i: int) -> bytes:
        source, own = self._find(i)
        return source._digest(own)

    def _sample(self, i: int) -> bytes:
        source, own = self._find(i)
        return source._sample(own)

    def _file_state(self, i: int) -> FileState | None:
        source, own = self._find(i)
        return source._file_state(own)

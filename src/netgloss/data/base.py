"""The contract of every image source: pictures by number, with ids, targets, annotations and a fingerprint.

A fingerprint depends on what the pictures are and not on where they lie. Sources hold no open files and can be pickled
for data-loading processes.

Shape letters: N images, w and h pixels.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from netgloss.data.annotations import ImageAnnotation
from netgloss.data.images import printable
from netgloss.errors import UserError

if TYPE_CHECKING:
    from netgloss.data.annotation_files import Annotations


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

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over ids, targets, class names and the pictures' digests."""
        digest = hashlib.sha256(repr(self.class_names).encode())
        for i, (image_id, target) in enumerate(zip(self.ids, self.targets.tolist(), strict=True)):
            digest.update(f"\n{image_id}\0{target}\0".encode())
            digest.update(hashlib.sha256(self._digest(i)).digest())
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

"""Labelled images as the bytes that a classifier's own resize and crop gives, before normalisation.

Shape letters: N images.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from netgloss.activations.capture import PreparedImages
from netgloss.class_names import compare_classes
from netgloss.errors import UserError
from netgloss.metrics.consistency.units import stratified
from netgloss.progress import Progress, Silent

if TYPE_CHECKING:
    from netgloss.classifiers import Classifier
    from netgloss.data import ImageSource

LARGEST = 4 << 30
"""Bytes of images that are held in memory."""


@dataclass(frozen=True)
class LabelledPixels:
    """Images in memory.

    Attributes
    ----------
    bytes : (N, channels, H, W) uint8.
    probe_labels : (N,) indices into ``class_names``.
    labels : (N,) the same classes as the classifier numbers them.
    ids : N names.
    class_names : C names of the source's classes that occur.
    net_classes : (C,) the classifier's class of each.
    problems : unreadable images and why.
    titles : C names to show: the classifier's where the source has WordNet ids; empty for ``class_names``.
    """

    bytes: Tensor
    probe_labels: Tensor
    labels: Tensor
    ids: list[str]
    class_names: list[str]
    net_classes: Tensor
    problems: dict[str, str] = field(default_factory=dict)
    titles: list[str] = field(default_factory=list)

    def title(self, c: int) -> str:
        """What a reader calls class ``c`` of the probe set."""
        return (self.titles or self.class_names)[c]

    def __len__(self) -> int:
        return len(self.ids)

    def pixels(self, index: Tensor | slice = slice(None)) -> Tensor:
        """(B, channels, H, W) float32 in [0, 1]."""
        return self.bytes[index].float() / 255

    def subset(self, index: Tensor) -> LabelledPixels:
        """Some of the images, in this order; classes keep their numbers."""
        return LabelledPixels(
            self.bytes[index],
            self.probe_labels[index],
            self.labels[index],
            [self.ids[i] for i in index.tolist()],
            self.class_names,
            self.net_classes,
            self.problems,
            self.titles,
        )

    def stratified(self, number: int | None, *, seed: int = 0) -> LabelledPixels:
        """Equally many images of every class, ``number`` at most in all (None: as many as the smallest class has)."""
        index = stratified(self.probe_labels, seed=seed)
        if number is not None and number < len(index):
            each = _each(number, len(self.class_names))
            index = index[stratified(self.probe_labels[index], each=each, seed=seed)]
        return self.subset(index)


def load_pixels(
    classifier: Classifier,
    source: ImageSource,
    *,
    number: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> LabelledPixels:
    """Reads the labelled images of a source; with ``number`` equally many of every class, drawn with ``seed``.

    Raises
    ------
    UserError : no labelled images, fewer than two classes, a class that the classifier does not have, or too many
        bytes for memory.
    """
    classifier.require_head("an attack")
    if classifier.outputs == "multilabel":
        raise UserError(
            f"{classifier.name} gives several labels per image (--multi-label); attacks need one class of each"
        )
    progress = progress or Silent()
    targets = torch.from_numpy(np.asarray(source.targets))
    chosen = (targets >= 0).nonzero().squeeze(1)
    if not len(chosen):
        raise UserError(f"{source.description} has no labels; adversarial work needs the true class of every image")
    if number is not None and number < len(chosen):
        chosen = stratified(targets, each=_each(number, len(targets[chosen].unique())), seed=seed)
    size = len(chosen) * int(np.prod(classifier.input_shape))
    if size > LARGEST:
        raise UserError(
            f"{len(chosen)} images of {classifier.input_shape} take {size / 2**30:.1f} GiB, more than the "
            f"{LARGEST >> 30} GiB that are held in memory: use fewer images"
        )
    data = PreparedImages(source, classifier.preprocessing, chosen.tolist(), classifier.input_shape)
    found = torch.zeros(len(chosen), *classifier.input_shape, dtype=torch.uint8)
    kept: list[int] = []
    problems: dict[str, str] = {}
    progress.start("read", len(chosen), unit="images")
    for i in range(len(chosen)):
        image, reason, _ = data[i]
        if reason:
            problems[source.ids[int(chosen[i])]] = reason
        else:
            found[len(kept)] = image
            kept.append(int(chosen[i]))
        progress.advance()
    progress.finish()
    if not kept:
        reason = next(iter(problems.values()))
        raise UserError(f"none of the {len(chosen)} images of {source.description} could be read; the first: {reason}")
    return _numbered(classifier, source, found[: len(kept)], targets[kept], [source.ids[i] for i in kept], problems)


def _numbered(
    classifier: Classifier,
    source: ImageSource,
    pixels: Tensor,
    targets: Tensor,
    ids: list[str],
    problems: dict[str, str],
) -> LabelledPixels:
    present = targets.unique()
    names = [source.class_names[c] for c in present.tolist()]
    if len(names) < 2:
        raise UserError(f"at least two classes are needed, {source.description} has {len(names)}")
    match = compare_classes(names, classifier.class_names, classifier.wnids)
    of_net = torch.from_numpy(match.index)
    if match.missing:
        raise UserError(
            f"{len(match.missing)} of {len(names)} classes of {source.description} are none of {classifier.name}: "
            f"{match.listed}; give both the same names (--class-names)"
        )
    if len(of_net.unique()) < len(of_net):
        raise UserError(f"several classes of {source.description} are the same class of {classifier.name}")
    probe = torch.searchsorted(present, targets)
    titles = [
        classifier.class_names[c] if re.fullmatch(r"n\d{8}", name) else name
        for name, c in zip(names, of_net.tolist(), strict=True)
    ]
    return LabelledPixels(pixels, probe, of_net[probe], ids, names, of_net, problems, titles)


def _each(number: int, classes: int) -> int:
    """Images per class, ``number`` at most in all."""
    if number < classes:
        raise UserError(f"{number} images are too few for {classes} classes")
    return number // classes

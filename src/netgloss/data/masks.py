"""Annotated labels and the masks of a batch of images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from netgloss.errors import UserError

GRID = (56, 56)
"""Mask grid: as fine as a quarter of a 224-pixel input."""


@dataclass(frozen=True)
class Vocabulary:
    """What the masks show.

    Parameters
    ----------
    labels : names of the L labels.
    categories : names of the A categories.
    category : for each label, its index in ``categories``. A concept is evaluated on a label in the images that are
        annotated for the label's category.
    """

    labels: tuple[str, ...]
    categories: tuple[str, ...] = ("all",)
    category: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.labels:
            raise UserError("dissection needs at least one label, got none")
        if not self.category:
            object.__setattr__(self, "category", (0,) * len(self.labels))
        if len(self.category) != len(self.labels) or not all(0 <= a < len(self.categories) for a in self.category):
            raise UserError(
                f"{len(self.labels)} labels need as many categories out of {len(self.categories)}, got {self.category}"
            )


@dataclass(frozen=True)
class Masks:
    """Annotations of a batch on the mask grid.

    Parameters
    ----------
    labels : (B, L, H, W) bool; labels may overlap.
    annotated : (B, A) bool: images in which the absence of a category's labels means something; None: all.
    ignore : (B, H, W) bool: pixels that never count; None: none.
    """

    labels: Tensor
    annotated: Tensor | None = None
    ignore: Tensor | None = None

    def columns(self, vocabulary: Vocabulary) -> Tensor:
        """(B, L + A, P) float32: each label, then the pixels that count for each category."""
        batch, number = self.labels.shape[:2]
        if number != len(vocabulary.labels):
            raise UserError(f"masks of {number} labels do not fit a vocabulary of {len(vocabulary.labels)}")
        labels = self.labels.reshape(batch, number, -1).bool()
        counts = torch.ones(batch, len(vocabulary.categories), labels.shape[2], dtype=torch.bool, device=labels.device)
        if self.annotated is not None:
            counts &= self.annotated[:, :, None]
        if self.ignore is not None:
            counts &= ~self.ignore.reshape(batch, 1, -1)
        return torch.cat([labels & counts[:, list(vocabulary.category)], counts], dim=1).float()

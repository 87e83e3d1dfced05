"""Whether concepts look at different places of an image, or all at the same one.

Shape letters: B images, K concepts, H W grid, P positions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from netgloss.errors import UserError
from netgloss.metrics.base import ImageMetric


def coinciding_pairs(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs of concepts that peak in the same cell or in neighbouring ones, and all pairs that have a peak.

    Parameters
    ----------
    maps : (B, K, H, W). A map that is the same everywhere has no peak.

    Returns
    -------
    Two tensors (B,) float64, ordered pairs of different concepts.

    Raises
    ------
    UserError : concepts without a map.
    """
    if maps.ndim != 4:
        raise UserError(f"concepts without a map have no place: expected (B, K, H, W), got {tuple(maps.shape)}")
    flat = maps.flatten(2)
    height, cell = flat.max(dim=2)
    active = (height > flat.amin(dim=2)).double()
    peaks = torch.zeros(len(maps), flat.shape[2], dtype=torch.float64, device=maps.device)
    peaks = peaks.scatter_add_(1, cell, active).reshape(len(maps), 1, *maps.shape[2:])
    around = avg_pool2d(peaks, 3, stride=1, padding=1, divisor_override=1)
    count = active.sum(dim=1)
    return (peaks * around).sum(dim=(1, 2, 3)) - count, count * (count - 1)


class Coincidence(ImageMetric):
    """Share of pairs of concepts that peak at the same place of an image."""

    name = "coincidence"
    higher_is_better = False
    bounds = (0.0, 1.0)
    inputs = ("concepts",)
    definition = (
        "Share of pairs of concepts whose peaks lie in the same or in neighbouring cells of an image, over all pairs "
        "that have a peak: 1 if all concepts look at one place. Random places give about 9 cells out of the grid. It "
        "cannot show whether the places mean anything: random directions are low too."
    )

    def statistics(self, *, concepts: Tensor) -> Tensor:
        if concepts.ndim != 4:  # vectors have no place: undefined
            return torch.zeros(len(concepts), 2, dtype=torch.float64, device=concepts.device)
        return torch.stack(coinciding_pairs(concepts), dim=1)

    def score(self, sums: Tensor, count: Tensor) -> Tensor:
        return torch.where(sums[..., 1] > 0, sums[..., 0] / sums[..., 1], math.nan)

"""The collapse watch of part maps: which are dead, which always peak at one place, and which peak where others do.

Shape letters: B images, C filters, H W grid, P positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

FROZEN = 0.95
"""A map is frozen if it peaks at one place in more than this share of the images where it is active."""
ALIKE = 0.5
"""Part maps are alike if the peaks of more than this share of their pairs coincide, mean over images."""


def watch(maps: Tensor) -> dict[str, Tensor]:
    """Shares of dead maps (never above 0) and of frozen ones (one peak in over 95 % of the images where they are
    active) in a batch (B, C, H, W)."""
    dead, frozen = dead_and_frozen(peak_counts(maps))
    return {"dead_share": dead.float().mean(), "frozen_share": frozen.float().mean()}


def peak_counts(maps: Tensor) -> Tensor:
    """(C, P): in how many images (B, C, H, W) each map has its peak, above 0, in each cell."""
    height, peak = maps.detach().flatten(2).max(dim=2)
    counts = maps.new_zeros(maps.shape[1], maps.shape[2] * maps.shape[3])
    return counts.scatter_add_(1, peak.T, (height > 0).T.to(counts))


def dead_and_frozen(counts: Tensor) -> tuple[Tensor, Tensor]:
    """(C,) bool each, from :func:`peak_counts`: active nowhere; one peak in over 95 % of at least two images."""
    active = counts.sum(dim=1)
    return active == 0, (active > 1) & (counts.amax(dim=1) > FROZEN * active)


def coinciding_peaks(maps: Tensor) -> tuple[Tensor, Tensor]:
    """(C, C) twice: in how many images (B, C, H, W) two maps peak within one cell of each other, and in how many both
    have a peak."""
    flat = maps.detach().flatten(2)
    cell = flat.argmax(dim=2)
    place_BC2 = torch.stack([cell // maps.shape[3], cell % maps.shape[3]], dim=2).short()
    active_BC = flat.amax(dim=2) > flat.amin(dim=2)
    near = torch.zeros(maps.shape[1], maps.shape[1])
    both = torch.zeros_like(near)
    for place_C2, active_C in zip(place_BC2.cpu(), active_BC.cpu(), strict=True):
        pair = active_C[:, None] & active_C
        near += pair & ((place_C2[:, None] - place_C2).abs().amax(dim=2) <= 1)
        both += pair
    return near, both


def mean_of_pairs(near: Tensor, both: Tensor) -> float:
    """Share of the images in which two different maps coincide, mean over pairs; 1 if all look at the same place, NaN
    of a single map."""
    shares = near / both
    return float(shares[~torch.eye(len(shares), dtype=torch.bool)].nanmean())

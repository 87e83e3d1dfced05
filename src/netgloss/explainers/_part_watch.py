"""The collapse watch of part maps: which are dead, and which always peak at one place.

Shape letters: B images, C filters, H W grid, P positions.
"""

from __future__ import annotations

from torch import Tensor

FROZEN = 0.95
"""A map is frozen if it peaks at one place in more than this share of the images where it is active."""


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

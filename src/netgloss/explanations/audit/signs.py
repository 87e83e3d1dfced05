"""Signs that a region which decides for a class is not the object: its place, its pixels, its position off the object.

Shape letters: N images, S side of a patch in pixels, T tries.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from scipy.stats import fisher_exact
from torch import Tensor

_SIDE = 24
_REACH = 8
_SAME = 0.06
_LEAD = 0.75
_FAR = 0.25
_STARTS = 5


def share_at_place(corners: Sequence[tuple[int, int]], place: tuple[int, int], size: int) -> tuple[int, int]:
    """How many windows lie within half their side of ``place``, and how many there are."""
    near = sum(max(abs(y - place[0]), abs(x - place[1])) <= size / 2 for y, x in corners)
    return near, len(corners)


def place_p_value(own: tuple[int, int], others: tuple[int, int]) -> float:
    """One-sided Fisher test that windows of the class lie at the place more often than those of other classes."""
    (near, total), (other_near, other_total) = own, others
    table = [[near, total - near], [other_near, other_total - other_near]]
    return float(fisher_exact(table, alternative="greater").pvalue)


def covers_middle(row: int, column: int, size: int, shape: Sequence[int]) -> bool:
    """True if a window covers the middle of the picture, where photographs show their object."""
    height, width = shape
    return row <= height / 2 <= row + size and column <= width / 2 <= column + size


def same_pixels(patches: Tensor) -> float:
    """Share of a patch's pixels that are the same in nearly all images, once the patches are aligned.

    Patches of one object vary; those of one tag, watermark or frame do not. Patches (N, 3, S, S), in 0..1, come with a
    margin of a half of the inner window on each side; each is shifted to fit a template (first one of the patches, then
    their median), and a pixel counts as the same if three quarters of the images lie within .06 of the median in every
    channel. A template without contrast (sky, a black margin) does not count.

    Returns
    -------
    In 0..1; the largest over the templates tried.
    """
    small = F.interpolate(patches, size=(_SIDE + 2 * _REACH, _SIDE + 2 * _REACH), mode="bilinear", antialias=True)
    best = 0.0
    for start in range(min(_STARTS, len(small))):
        template = small[start : start + 1, :, _REACH : _REACH + _SIDE, _REACH : _REACH + _SIDE]
        for _ in range(2):
            aligned = _aligned(small, template)
            template = aligned.median(dim=0, keepdim=True).values
        near = ((aligned - template).abs().amax(dim=1) < _SAME).float().mean(dim=0) >= _LEAD
        if float(template.std(dim=(2, 3)).amax()) > _SAME:  # a plain patch (sky, a black margin) says nothing
            best = max(best, float(near.float().mean()))
    return best


def _aligned(patches: Tensor, template: Tensor) -> Tensor:
    """(N, 3, T, T) each patch at the shift where it differs least from the template; all large differences are one."""
    side = template.shape[-1]
    views = patches.unfold(2, side, 2).unfold(3, side, 2)  # (N, 3, shifts, shifts, side, side)
    n, channels, rows, columns = views.shape[:4]
    views = views.permute(0, 2, 3, 1, 4, 5).reshape(n, rows * columns, channels, side, side)
    apart = (views - template[:, None]).abs().clamp_(max=_FAR).mean(dim=(2, 3, 4))
    best = apart.argmin(dim=1)
    return views[torch.arange(n), best]


def outside_share(masks: Tensor, objects: Tensor) -> float:
    """Share of the regions' pixels (N, 1, H, W) that lie off the objects (N, H, W)."""
    inside = masks[:, 0] * objects.to(masks.dtype)
    return float(1 - inside.sum() / masks.sum().clamp_min(1))

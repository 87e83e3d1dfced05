"""Swap tests: which region of a picture makes the network answer with a class.

An image A of class c and an image B of another class exchange the pixels of a region m::

    A' = (1 - m) A + m B        B' = (1 - m) B + m A

If A' is no longer c (*lost*) and B' has become c (*gained*), the region decides, whatever else the pictures show. Both
rates have a control with the same seams: A with the region of another image of c, and B with that of a third class;
where the region lies at another place in each image, the first control is another region of the same size.

Where to look comes from integrated gradients (Sundararajan et al. 2017, eq. 1) of the margin of c along the line from B
to A, by captum: their sum over a window is, to first order, what exchanging it does to the margin.

Shape letters: N pairs, H W pixels of the network's input (H = W is not assumed).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Forward = Callable[[Tensor], Tensor]
"""Normalised pixels (N, 3, H, W) to logits (N, classes)."""

WINDOWS = (1 / 6, 1 / 4, 1 / 3)
"""Sides of the square windows that are tried, as shares of the shorter side of the picture."""
BORDERS = (1 / 10, 1 / 5)
"""Widths of the borders that are tried."""
_PIXELS = 8 * 224 * 224


@dataclass(frozen=True)
class Region:
    """A kind of region; ``masks`` gives it for given pairs.

    Parameters
    ----------
    kind : "place" (one window for all images), "patch" (a window in each image), "border" or "background".
    size : side of the window or width of the border in pixels; 0 for the background.
    corner : row and column of a "place".
    """

    kind: str
    size: int = 0
    corner: tuple[int, int] = (0, 0)

    @property
    def is_window(self) -> bool:
        """True for a square window, False for the border and the background."""
        return self.kind in ("place", "patch")

    def masks(self, support: Tensor, objects: Tensor | None = None) -> Tensor:
        """(N, 1, H, W), 1 inside the region.

        Parameters
        ----------
        support : (N, H, W) attributions of :func:`swap_attribution`; read by "patch" only.
        objects : (N, H, W) True on the object; read by "background" only.
        """
        n, height, width = support.shape
        masks = torch.zeros(n, 1, height, width, device=support.device)
        if self.kind == "background":
            assert objects is not None
            return (~objects)[:, None].float()
        if self.kind == "border":
            masks += 1
            masks[:, :, self.size : height - self.size, self.size : width - self.size] = 0
            return masks
        corners = [self.corner] * n if self.kind == "place" else best_windows(support, self.size)
        for i, (y, x) in enumerate(corners):
            masks[i, :, y : y + self.size, x : x + self.size] = 1
        return masks


def best_windows(support: Tensor, size: int) -> list[tuple[int, int]]:
    """Upper left corner (row, column) of each image's window with the largest sum of ``support`` (N, H, W)."""
    sums = F.avg_pool2d(support[:, None], size, stride=1)[:, 0]
    return [divmod(int(i), sums.shape[2]) for i in sums.flatten(1).argmax(dim=1)]


def margin(logits: Tensor, target: int) -> Tensor:
    """(N,) logit of ``target`` minus the log-sum-exp of the others: the log odds of the class."""
    others = logits.index_fill(1, torch.tensor([target], device=logits.device), -torch.inf)
    return logits[:, target] - others.logsumexp(dim=1)


def swap_attribution(forward: Forward, own: Tensor, other: Tensor, target: int, *, steps: int = 6) -> Tensor:
    """(N, H, W): what each pixel of ``own`` adds to the margin of ``target`` compared with ``other``.

    Parameters
    ----------
    own, other : (N, channels, H, W) images of the class and of other classes.
    steps : points of the integral; the sum over pixels is the difference of the margins, up to its error.
    """
    from captum.attr import IntegratedGradients

    at_once = _batch(own)
    integrated = IntegratedGradients(lambda pixels: margin(forward(pixels), target))
    parts = [
        integrated.attribute(a, baselines=b, n_steps=steps, internal_batch_size=at_once)
        for a, b in zip(own.split(at_once), other.split(at_once), strict=True)
    ]
    return torch.cat(parts).sum(dim=1).detach()


def window_sizes(shape: Sequence[int]) -> list[int]:
    """Sides of the windows that are tried, in pixels of a picture (H, W)."""
    return [max(round(share * min(shape)), 1) for share in WINDOWS]


def regions_to_try(support: Tensor, *, masked: bool) -> list[Region]:
    """The regions that a search compares, from the attributions (N, H, W) of some pairs of the class."""
    _, height, width = support.shape
    shorter = min(height, width)
    mean = support.mean(dim=0, keepdim=True)
    found = []
    for size in window_sizes((height, width)):
        found += [Region("place", size, best_windows(mean, size)[0]), Region("patch", size)]
    found += [Region("border", max(round(share * shorter), 1)) for share in BORDERS]
    return [*found, Region("background")] if masked else found


def elsewhere(masks: Tensor, generator: torch.Generator) -> Tensor:
    """Windows (N, 1, H, W) moved, around the edges of the picture, by a third to two thirds of its sides."""
    height, width = masks.shape[2:]
    moved = []
    for mask in masks:
        down, right = ((torch.rand(2, generator=generator) + 1) / 3).tolist()
        moved.append(mask.roll((round(down * height), round(right * width)), dims=(1, 2)))
    return torch.stack(moved)


def exchange(host: Tensor, donor: Tensor, masks: Tensor) -> Tensor:
    """``host`` with the pixels of ``donor`` inside ``masks``."""
    return host * (1 - masks) + donor * masks


def _batch(pixels: Tensor) -> int:
    """Images that go through the network at once: few large ones, so that a processor's caches hold them."""
    return max(4, min(256, _PIXELS // (pixels.shape[2] * pixels.shape[3])))


@torch.no_grad()
def decided(forward: Forward, pixels: Tensor, target: int) -> Tensor:
    """(N,) True where the network answers ``target``."""
    return torch.cat([forward(part).argmax(dim=1) == target for part in pixels.split(_batch(pixels))])


@dataclass(frozen=True)
class Swaps:
    """Outcomes of the pairs, each (N,) bool: see the head of this file."""

    lost: Tensor
    lost_control: Tensor
    gained: Tensor
    gained_control: Tensor


def swap(
    forward: Forward,
    own: Tensor,
    other: Tensor,
    masks: Tensor,
    target: int,
    *,
    third: Tensor,
    same: Tensor | None = None,
    elsewhere: Tensor | None = None,
) -> Swaps:
    """Exchanges the region in both directions, with the controls.

    Parameters
    ----------
    own, same : (N, channels, H, W) images of the class; other, third : of other classes.
    masks : (N, 1, H, W) the region. elsewhere : another region of the same size, for regions that lie at another place
        in each image, where ``same`` would not show what ``own`` shows there; one of the two is given.
    """
    if same is not None:
        control = exchange(own, same, masks)
    else:
        assert elsewhere is not None
        control = exchange(own, other, elsewhere)
    return Swaps(
        ~decided(forward, exchange(own, other, masks), target),
        ~decided(forward, control, target),
        decided(forward, exchange(other, own, masks), target),
        decided(forward, exchange(other, third, masks), target),
    )

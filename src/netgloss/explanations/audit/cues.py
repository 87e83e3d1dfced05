"""Cues that have no place: tint, brightness, contrast, sharpness, grain.

For each of them an image has a level, and a change of strength s moves it. A class whose images have another level than
the rest may be recognised by it. The test moves the images of other classes to the class's level (do they become the
class?) and its own to the level of the others (is the class lost?); the control moves them as far the other way.

Shape letters: N images, H W pixels in 0..1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_EPS = 1e-4
_BISECTIONS = 10
_MEASURED = 16


@dataclass(frozen=True)
class Cue:
    """A property of whole images.

    Parameters
    ----------
    level : (N, 3, H, W) to (N,).
    change : images and a strength to images with a higher level (s > 0) or a lower one (s < 0); 0 changes nothing.
    limit : largest strength that is tried.
    more, less : what a picture is called that has more or less of it.
    """

    name: str
    level: Callable[[Tensor], Tensor]
    change: Callable[[Tensor, float], Tensor]
    limit: float
    more: str
    less: str

    def strength(self, pixels: Tensor, level: float) -> float:
        """The strength that brings the median level of some of ``pixels`` to ``level``: bisection, up to the limit."""
        pixels = pixels[:_MEASURED]
        low, high = -self.limit, self.limit
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            if float(self.level(self.change(pixels, middle)).median()) < level:
                low = middle
            else:
                high = middle
        return (low + high) / 2


def _luminance(pixels: Tensor) -> Tensor:
    weights = (0.299, 0.587, 0.114) if pixels.shape[1] == 3 else (1 / pixels.shape[1],) * pixels.shape[1]
    return (pixels * pixels.new_tensor(weights)[:, None, None]).sum(dim=1)


def _ratio(first: int, second: int) -> Callable[[Tensor], Tensor]:
    def level(pixels: Tensor) -> Tensor:
        means = pixels.mean(dim=(2, 3)).clamp_min(_EPS)
        return (means[:, first] / means[:, second]).log()

    return level


def _gain(*signs: float) -> Callable[[Tensor, float], Tensor]:
    def change(pixels: Tensor, strength: float) -> Tensor:
        gains = torch.tensor([math.exp(strength * s) for s in signs], device=pixels.device)
        return (pixels * gains[:, None, None]).clamp(0, 1)

    return change


def _brighter(pixels: Tensor, strength: float) -> Tensor:
    return (pixels * math.exp(strength)).clamp(0, 1)


def _more_contrast(pixels: Tensor, strength: float) -> Tensor:
    mean = pixels.mean(dim=(1, 2, 3), keepdim=True)
    return (mean + (pixels - mean) * math.exp(strength)).clamp(0, 1)


def _blurred(pixels: Tensor, sigma: float) -> Tensor:
    """A Gaussian blur in two passes (torchvision's takes one, with a square kernel)."""
    radius = max(math.ceil(3 * sigma), 1)
    offsets = torch.arange(-radius, radius + 1, device=pixels.device, dtype=pixels.dtype)
    kernel = (-0.5 * (offsets / sigma) ** 2).exp()
    kernel = (kernel / kernel.sum()).expand(pixels.shape[1], 1, 1, -1)
    padded = F.pad(pixels, (radius, radius, radius, radius), mode="replicate")
    rows = F.conv2d(padded, kernel, groups=pixels.shape[1])
    return F.conv2d(rows, kernel.transpose(2, 3), groups=pixels.shape[1])


def _sharper(pixels: Tensor, strength: float) -> Tensor:
    side = min(pixels.shape[2:])
    if abs(strength) < 1e-3:
        return pixels
    if strength < 0:
        return _blurred(pixels, -strength * side / 40)
    return (pixels + strength * (pixels - _blurred(pixels, side / 60))).clamp(0, 1)


def _sharpness(pixels: Tensor) -> Tensor:
    grey = _luminance(pixels)
    edges = 4 * grey[:, 1:-1, 1:-1] - grey[:, :-2, 1:-1] - grey[:, 2:, 1:-1] - grey[:, 1:-1, :-2] - grey[:, 1:-1, 2:]
    return (edges.abs().mean(dim=(1, 2)).clamp_min(_EPS) / grey.std(dim=(1, 2)).clamp_min(_EPS)).log()


_NOISE = torch.tensor([[1.0, -2.0, 1.0], [-2.0, 4.0, -2.0], [1.0, -2.0, 1.0]]) / 6
"""A difference of two Laplacians, blind to edges and slopes (Immerkaer 1996, "Fast noise variance estimation")."""


def _grain(pixels: Tensor) -> Tensor:
    residual = F.conv2d(_luminance(pixels)[:, None], _NOISE.to(pixels)[None, None])
    return residual.abs().mean(dim=(1, 2, 3)).clamp_min(_EPS).log()


def _grainier(pixels: Tensor, strength: float) -> Tensor:
    if strength < 0:
        share = min(-strength / 0.2, 1.0)
        smooth = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        return pixels * (1 - share) + smooth * share
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0)).to(pixels.device)
    return (pixels + strength * noise).clamp(0, 1)


def _greenness(pixels: Tensor) -> Tensor:
    return _ratio(1, 0)(pixels) + _ratio(1, 2)(pixels)


def _brightness(pixels: Tensor) -> Tensor:
    return _luminance(pixels).mean(dim=(1, 2)).clamp_min(_EPS).log()


def _contrast(pixels: Tensor) -> Tensor:
    return _luminance(pixels).std(dim=(1, 2)).clamp_min(_EPS).log()


CUES = (
    Cue("tint red-blue", _ratio(0, 2), _gain(0.5, 0.0, -0.5), 1.0, "warmer (redder)", "colder (bluer)"),
    Cue("tint green", _greenness, _gain(-0.5, 0.5, -0.5), 1.0, "greener", "more magenta"),
    Cue("brightness", _brightness, _brighter, 1.0, "brighter", "darker"),
    Cue("contrast", _contrast, _more_contrast, 1.0, "richer in contrast", "poorer in contrast"),
    Cue("sharpness", _sharpness, _sharper, 2.0, "sharper", "more blurred"),
    Cue("grain", _grain, _grainier, 0.2, "grainier", "smoother"),
)


def level_difference(own: Tensor, others: Tensor) -> float:
    """Probability that an image of the class has a higher level than another one (area under the ROC curve)."""
    from scipy.stats import mannwhitneyu

    statistic = mannwhitneyu(own.cpu().numpy(), others.cpu().numpy()).statistic
    return float(statistic) / (len(own) * len(others))

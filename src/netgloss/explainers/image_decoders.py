"""Decoders from a layer's code to images, and the compact encoder of the reference autoencoder.

Two decoders, both driven by the code's shape and the image's:

- :class:`GeneralDecoder` (netgloss's default): any code to any size by resizing and convolving; batch norm, linear
  output. Resizing reaches any side without checkerboards; group or instance norm would rescale each image and hide
  that a removed concept dims it.
- :class:`PublishedDecoder`: transposed convolutions as in the public code of Schneider & Vlachos (doi
  10.1007/978-3-030-74251-5_6; own implementation): image side = code side x 2^n, sigmoid, no norm.

Shape letters: B images, c channels of the code, h w its grid, m channels of the image, H W its sides, n up-samplings.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from netgloss.errors import UserError

_SEED = 4  # vectors become maps of 4 x 4: resizing a 1 x 1 map would give equal values everywhere
_WIDEST = 256


def up_sides(grid: Sequence[int], size: Sequence[int]) -> list[tuple[int, int]]:
    """Sides (h, w) after each up-sampling of the general decoder, the last one ``size``.

    Parameters
    ----------
    grid : (h, w) of the code; ``()`` or (1, 1) for a vector, which starts at 4 x 4.
    size : (H, W) of the image.

    Returns
    -------
    n entries; none if the grid is as large as the image.
    """
    start = _start(grid)
    count = max(0, *(math.ceil(math.log2(large / small)) for large, small in zip(size, start, strict=True)))
    return [(math.ceil(size[0] / 2 ** (count - k)), math.ceil(size[1] / 2 ** (count - k))) for k in range(1, count + 1)]


def default_width(size: Sequence[int]) -> int:
    """Channels before the last convolution: 64 up to 32 px, else 32."""
    return 64 if max(size) <= 32 else 32


def _is_vector(grid: Sequence[int]) -> bool:
    return tuple(grid) in ((), (1, 1))


def _start(grid: Sequence[int]) -> tuple[int, int]:
    return (_SEED, _SEED) if _is_vector(grid) else (grid[0], grid[1])


class GeneralDecoder(nn.Module):
    """Any code (B, c) or (B, c, h, w) to images (B, m, H, W) of any size; the output is linear.

    Parameters
    ----------
    code : (c,) or (c, h, w).
    image : (m, H, W).
    width : channels before the last convolution; 0 for the default (64 up to 32 px, else 32).
    """

    def __init__(self, code: Sequence[int], image: Sequence[int], *, width: int = 0) -> None:
        super().__init__()
        channels, grid = code[0], tuple(code[1:])
        width = width or default_width(image[1:])
        self.size = (image[1], image[2])
        self.sides = up_sides(grid, self.size)
        count = len(self.sides)
        first = min(_WIDEST, width * 2 ** max(count - 1, 0))
        self.vector = _is_vector(grid)
        self.first = first
        if self.vector:
            self.stem: nn.Module = nn.Linear(channels, first * _SEED * _SEED, bias=False)
        else:
            kernel = 1 if channels > _WIDEST else 3
            self.stem = nn.Conv2d(channels, first, kernel, padding=kernel // 2, bias=False)
        self.stem_norm = nn.BatchNorm2d(first)
        widths = [first] + [min(_WIDEST, width * 2 ** (count - 1 - k)) for k in range(1, count)]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in itertools.pairwise(widths))
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for b in widths[1:])
        self.last = nn.Conv2d(widths[-1], image[0], 3, padding=1)

    def set_colour(self, colour: Tensor) -> None:
        """Starts the output at ``colour`` (m,), the mean of the training images."""
        with torch.no_grad():
            assert self.last.bias is not None
            self.last.bias.copy_(colour)

    def forward(self, code: Tensor) -> Tensor:
        """(B, c) or (B, c, h, w) -> (B, m, H, W)."""
        x = self.stem(code.flatten(1) if self.vector else code)
        x = x.reshape(-1, self.first, _SEED, _SEED) if self.vector else x
        x = self.stem_norm(x).relu()
        for side, conv, norm in zip(self.sides, self.convs, self.norms, strict=False):
            x = norm(conv(_resize(x, side))).relu()
        return self.last(_resize(x, self.size))


def _resize(x: Tensor, side: tuple[int, int]) -> Tensor:
    if x.shape[2:] == side:
        return x
    if x.shape[2] >= side[0] and x.shape[3] >= side[1]:
        return adaptive_avg_pool2d(x, side)
    return interpolate(x, side, mode="bilinear", align_corners=False)


class PublishedDecoder(nn.Module):
    """The decoder of the public code: a stem and n transposed convolutions of 4 x 4, stride 2.

    Parameters
    ----------
    code : (c,) or (c, s, s).
    image : (m, S, S) with S = s * 2^n (s = 1 for vectors).
    norm : batch norm after each layer but the last (which then has no bias before it).
    output : "sigmoid" (as published) or "linear".

    Raises
    ------
    UserError : if S is not s * 2^n, or the maps or images are not square.
    """

    def __init__(
        self, code: Sequence[int], image: Sequence[int], *, norm: bool = False, output: str = "sigmoid"
    ) -> None:
        super().__init__()
        channels, grid = code[0], tuple(code[1:])
        self.vector = _is_vector(grid)
        start = 1 if self.vector else grid[0]
        count = int(math.log2(max(1, image[1] / start)))
        if image[1] != image[2] or len(set(grid)) > 1 or start * 2**count != image[1]:
            raise UserError(
                f"the published decoder needs square images of side {start} * 2^n for a code of shape "
                f"{tuple(code)}, got {image[1]} x {image[2]}: choose another --size, or --preset general"
            )
        self.output = output
        if self.vector:
            wide = max(channels, 64)
            self.stem: nn.Module = nn.Linear(channels, wide, bias=not norm)
        else:
            wide = channels
            self.stem = nn.Conv2d(channels, channels, 3, padding=1, bias=not norm)
        widths = [wide] + [64 * 2 ** (count - 2 - k) for k in range(count - 1)]
        self.ups = nn.ModuleList(
            nn.ConvTranspose2d(a, b, 4, stride=2, padding=1, bias=not norm) for a, b in itertools.pairwise(widths)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) if norm else nn.Identity() for width in widths)
        if count == 0:
            self.last: nn.Module = nn.Conv2d(widths[-1], image[0], 3, padding=1)
        else:
            self.last = nn.ConvTranspose2d(widths[-1], image[0], 4, stride=2, padding=1)

    def set_colour(self, colour: Tensor) -> None:
        """Starts a linear output at ``colour`` (m,); a sigmoid one is left as published."""
        if self.output == "linear":
            with torch.no_grad():
                assert isinstance(self.last.bias, Tensor)
                self.last.bias.copy_(colour)

    def forward(self, code: Tensor) -> Tensor:
        """(B, c) or (B, c, s, s) -> (B, m, S, S)."""
        x = self.stem(code.flatten(1))[:, :, None, None] if self.vector else self.stem(code)
        x = self.norms[0](x).relu()
        for up, norm in zip(self.ups, self.norms[1:], strict=False):
            x = norm(up(x)).relu()
        x = self.last(x)
        return x.sigmoid() if self.output == "sigmoid" else x


class CompactEncoder(nn.Module):
    """Images (B, m, H, W) to a code of a given shape by a few strided convolutions.

    It replaces the classifier's own architecture where a fresh copy of that could not be trained on the images at
    hand; it does not control for the architecture.

    Parameters
    ----------
    code : (c,) or (c, h, w).
    image : (m, H, W).
    """

    def __init__(self, code: Sequence[int], image: Sequence[int]) -> None:
        super().__init__()
        channels, grid = code[0], tuple(code[1:])
        self.vector, self.grid = _is_vector(grid), grid
        height, width = image[1], image[2]
        target = _start(grid)
        layers: list[nn.Module] = []
        before, wide = image[0], 32
        while height >= 2 * max(target[0], _SEED) and width >= 2 * max(target[1], _SEED):
            layers += _conv_block(before, wide, stride=2)
            height, width = (height + 1) // 2, (width + 1) // 2
            before, wide = wide, min(2 * wide, _WIDEST)
        if not layers:
            layers += _conv_block(before, wide, stride=1)
            before = wide
        self.convs = nn.Sequential(*layers)
        if self.vector:
            self.last: nn.Module = nn.Linear(before * height * width, channels)
        else:
            self.last = nn.Conv2d(before, channels, 1)

    def forward(self, image: Tensor) -> Tensor:
        """(B, m, H, W) -> (B, c) or (B, c, h, w)."""
        x = self.convs(image)
        if self.vector:
            code = self.last(x.flatten(1))
            return code.reshape(len(code), -1, *self.grid)
        return self.last(interpolate(x, self.grid, mode="bilinear", align_corners=False))


def _conv_block(before: int, after: int, *, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]

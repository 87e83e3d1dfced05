"""I-GOS: the smallest blurred area that takes a concept away, by optimisation; slow, for single images.

With image I, its blur B, a mask m in [0, 1] (1 keeps) of half the image's size and u its bilinear enlargement,
minimise over m::

    f(u I + (1 - u) B) + 3 mean |1 - m| + 60 TV(m)        TV: mean squared difference of neighbours, rows plus columns

f is the concept's code over its code in the unchanged image. The step follows the gradient of the two penalties plus
the mean gradient of f over the twenty masks m/20, 2m/20, .. m on noisy images (sd 0.2), its length found by
backtracking from 200 (factor 0.2, Armijo constant 1e-4, at least 1e-5); 15 steps from m = 1. If f has fallen by at
most 0.001 halfway, the weight of the first penalty is divided by 10; if by at most 0.01 at step 12, by 5. The heatmap
is 1 - m.

Sources: Qi, Khorram & Fuxin, "Visualizing Deep Networks by Optimizing with Integrated Gradients", AAAI 2020, and its
published code for the numbers; f for concepts is ours. Kernel 51 and sigma 50 of the blur are for 224 pixels and scale
with the image; so does the weight 60, with the number of cells: the same mask drawn coarser costs the same. Captum has
no such method.

Shape letters: m channels, S S' pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import interpolate

_STEPS = 15
_PATH = 20
_NOISE = 0.2
_SPARSE, _SMOOTH = 3.0, 60.0
_FIRST, _SHRINK, _ARMIJO, _LAST = 200.0, 0.2, 1e-4, 1e-5
_SIDE = 224


def total_variation(mask: Tensor) -> Tensor:
    """Mean squared difference of vertical neighbours plus that of horizontal ones, of (1, 1, s, s')."""
    return (mask[..., 1:, :] - mask[..., :-1, :]).square().mean() + (mask[..., 1:] - mask[..., :-1]).square().mean()


def optimised_heat(concept: Callable[[Tensor], Tensor], pixels: Tensor, *, seed: int = 0, chunk: int = 10) -> Tensor:
    """Heat (S, S') in [0, 1] of one concept in one image; zeros where the concept is absent.

    Parameters
    ----------
    concept : images (B, m, S, S') as the network reads them -> codes (B,), differentiable.
    pixels : (1, m, S, S').
    chunk : images of a forward pass.
    """
    from torchvision.transforms.v2.functional import gaussian_blur

    size = (pixels.shape[2], pixels.shape[3])
    pixels = pixels.detach()
    with torch.no_grad():
        whole = concept(pixels)[0]
    if not whole > 0:
        return torch.zeros(size, device=pixels.device)
    ratio = min(size) / _SIDE
    blurred = gaussian_blur(pixels, [2 * max(1, round(25 * ratio)) + 1] * 2, [50 * ratio] * 2)
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(1, 1, max(2, size[0] // 2), max(2, size[1] // 2), device=pixels.device)
    share = torch.arange(1, _PATH + 1, device=pixels.device)[:, None, None, None] / _PATH

    def mixed(mask: Tensor) -> Tensor:
        up = interpolate(mask, size=size, mode="bilinear", align_corners=False)
        return blurred + up * (pixels - blurred)

    smooth = _SMOOTH * mask.shape[2] * mask.shape[3] / (_SIDE // 2) ** 2

    def penalty(mask: Tensor, sparse: float) -> Tensor:
        return sparse * (1 - mask).abs().mean() + smooth * total_variation(mask)

    @torch.no_grad()
    def left(mask: Tensor) -> float:
        return float(concept(mixed(mask))[0] / whole)

    sparse, begin = _SPARSE, 1.0
    now = left(mask)
    for step in range(_STEPS):
        if step == _STEPS // 2 and begin - now <= 0.001:
            sparse /= 10
        if step == 12 and begin - now <= 0.01:
            sparse /= 5
        free = mask.clone().requires_grad_(True)
        (slope,) = torch.autograd.grad(penalty(free, sparse), free)
        for part in share.split(chunk):
            noise = _NOISE * torch.randn(len(part), *pixels.shape[1:], generator=generator).to(pixels)
            along = concept(mixed(part * free) + noise).sum() / (whole * _PATH)
            slope = slope + torch.autograd.grad(along, free)[0]
        value, length, steep = now + float(penalty(mask, sparse)), _FIRST, float(slope.square().sum())
        while True:
            trial = (mask - length * slope).clamp(0, 1)
            then = left(trial)
            if then + float(penalty(trial, sparse)) <= value - _ARMIJO * length * steep or length * _SHRINK < _LAST:
                break
            length *= _SHRINK
        mask, now = trial, then
    return interpolate(1 - mask, size=size, mode="bilinear", align_corners=False)[0, 0]

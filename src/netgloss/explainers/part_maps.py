"""What a part map is asked for, and whether a set of them is any good.

Two losses ask a map to mark one place of an image. :func:`concentration` is the spatial variance of the map's mass: it
asks for one place in each image, wherever that is. (The concentration term of unsupervised part discovery, Huang & Li
2020 and PDiscoNet, arXiv 2309.03173; the last term of the information loss asks for the same.)

:func:`information_loss` is the filter loss of interpretable CNNs, the negative mutual information of images and places.
It also asks for a different place in every image, all cells alike: a part that has a usual place (the eyes of centred
faces) is penalised, and maps gather at what moves most.

Templates on an H x W map, mu each cell in turn, d the L1 distance in cells, n = max(H, W)::

    T_mu(i, j) = kappa max(1 - beta d((i, j), mu) / n, -1)          T-(i, j) = -kappa
    p(T) = 1 / (P + 1),  P = H W          s_xT = sum_ij x_ij T_ij          p(x | T) = softmax of s_xT over the images x
    loss = -MI(X; T) = -sum_T p(T) sum_x p(x | T) r_xT,     r_xT = log p(x | T) - log p(x),  p(x) = sum_T p(T) p(x | T)

The loss lies in [-log min(B, P + 1), 0]. Its gradient in closed form, with q = p(T) and p = p(x | T)::

    d loss / d s_xT = -q p (r_xT - sum_x' p(x' | T) r_x'T)

``single`` keeps one template an image, that of its peak, and holds the denominator of the softmax fixed, as the
published gradient does: -q p r for that template, 0 for the others. The paper takes T- for images of other categories;
that needs labels and is left out.

Source: Zhang, Wu & Zhu, "Interpretable Convolutional Neural Networks" (arXiv 1710.00935); the templates' amplitude
kappa on activations of mean mass 1 stands for tau = 0.5 / n^2 on raw ones, with which the loss vanishes for networks of
normalised inputs.

Memory: channels are worked off in slices, so that besides the gradient (as large as the maps) no more than
three tensors of ``_SLICE`` numbers live at a time; (B, C, P + 1) never exists as a whole.

The collapse watch counts maps that are dead, that always peak at one place, and that peak where others do.

Shape letters: B images, C filters, H W grid, P positions, t = P + 1 templates.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

_SLICE = 1 << 18
"""Numbers (B x channels x templates) worked off at a time: small enough for the cache."""
_TINY = 1e-38
_LOUDEST = 3.0
_NEGLIGIBLE = 1e-20
"""A gradient below this, on maps of mean mass 1, is zero."""


@lru_cache(maxsize=16)
def _cones(height: int, width: int, beta: float) -> Tensor:
    """(P, P) float32: ``max(1 - beta d / n, -1)``, row mu."""
    rows, columns = torch.arange(height), torch.arange(width)
    cells = torch.cartesian_prod(rows, columns).float()
    distance = torch.cdist(cells, cells, p=1)
    return (1 - beta * distance / max(height, width)).clamp_min(-1)


def templates(height: int, width: int, *, beta: float = 4.0, kappa: float = 1.0) -> Tensor:
    """(P + 1, P) float32: the templates of all cells in row-major order, then the negative one."""
    cones = _cones(height, width, beta)
    return kappa * torch.cat([cones, -torch.ones_like(cones[:1])])


def peak_mask(maps: Tensor, *, beta: float = 4.0) -> Tensor:
    """(B, C, H, W) in [0, 1]: the unit-height cone around the largest value of each map, constant in the gradient."""
    height, width = maps.shape[2:]
    cones = _cones(height, width, beta).clamp_min(0).to(maps)
    return cones[maps.detach().flatten(2).argmax(dim=2)].reshape(maps.shape)


def concentration(maps: Tensor, mass: Tensor) -> Tensor:
    """Spatial variance (C,) of the maps' mass, as a share of the longer side squared, mean over images.

    Parameters
    ----------
    maps : (B, C, H, W) >= 0.
    mass : (C,) usual mass of each map; an image counts by its own mass in these units, at most ``_LOUDEST``.
    """
    height, width = maps.shape[2:]
    rows, columns = torch.arange(height), torch.arange(width)
    place_P2 = torch.cartesian_prod(rows, columns).reshape(-1, 2).to(maps) / max(height, width)
    flat_BCP = maps.flatten(2).float()
    own_BC = flat_BCP.sum(dim=2)
    share_BCP = flat_BCP / own_BC.clamp_min(1e-6)[..., None]
    variance_BC = (share_BCP @ place_P2.float().square() - (share_BCP @ place_P2.float()).square()).sum(dim=2)
    return (variance_BC * (own_BC / mass).detach().clamp_max(_LOUDEST)).mean(dim=0)


def information_loss(maps: Tensor, *, kappa: float, beta: float = 4.0, single: bool = False) -> Tensor:
    """The loss (C,) of each filter, float32 whatever the maps' type; differentiable in ``maps``.

    Parameters
    ----------
    maps : (B, C, H, W) >= 0, of mean mass 1 an image (``sum_ij``) for ``kappa`` to be the templates' amplitude.
    single : the published one-template gradient instead of the exact one (the value is exact in both cases).
    """
    table = templates(*maps.shape[2:], beta=beta, kappa=kappa).to(maps.device)
    with torch.autocast(maps.device.type, enabled=False):
        return _Information.apply(maps.float(), table, single)


class _Information(torch.autograd.Function):
    """Value and gradient in one pass over slices of channels; the backward pass only scales the gradient."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, table: Tensor, single: bool) -> Tensor:
        batch, channels = maps.shape[:2]
        x_BCP = maps.flatten(2)
        wanted = ctx.needs_input_grad[0]
        loss_C = maps.new_empty(channels)
        gradient_BCP = torch.empty_like(x_BCP) if wanted else None
        step = max(1, _SLICE // (batch * len(table)))
        for start in range(0, channels, step):
            part = slice(start, start + step)
            x_BcP = x_BCP[:, part]
            s_Bct = x_BcP @ table.T
            s_Bct -= s_Bct.amax(dim=0)
            p_Bct = s_Bct.exp()
            total_ct = p_Bct.sum(dim=0)
            p_Bct /= total_ct
            s_Bct -= total_ct.log_()
            s_Bct -= p_Bct.mean(dim=2, keepdim=True).clamp_min_(_TINY).log_()
            r_Bct = s_Bct
            weighted_Bct = p_Bct * r_Bct
            mean_ct = weighted_Bct.sum(dim=0)
            loss_C[part] = -mean_ct.mean(dim=1)
            if gradient_BCP is not None:
                if single:
                    peak = x_BcP.argmax(dim=2, keepdim=True)
                    p_Bct = torch.zeros_like(p_Bct).scatter_(2, peak, weighted_Bct.gather(2, peak))
                else:
                    p_Bct = weighted_Bct.sub_(p_Bct.mul_(mean_ct))
                gradient_BCP[:, part] = p_Bct @ table
        if gradient_BCP is not None:
            # subnormal numbers would make the convolutions' backward pass four times as slow
            gradient_BCP.masked_fill_(gradient_BCP.abs() < _NEGLIGIBLE, 0.0)
            ctx.save_for_backward(gradient_BCP.mul_(-1 / len(table)).reshape(maps.shape))
        return loss_C

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0][None, :, None, None], None, None


FROZEN = 0.95
"""A map is frozen if it peaks at one place in more than this share of the images where it is active."""


def watch(maps: Tensor) -> dict[str, Tensor]:
    """Shares of dead maps (never above 0) and of frozen ones (one peak in over 95 % of the images where they are
    active) in a batch (B, C, H, W).
    """
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
    have a peak.
    """
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
    of a single map.
    """
    shares = near / both
    return float(shares[~torch.eye(len(shares), dtype=torch.bool)].nanmean())

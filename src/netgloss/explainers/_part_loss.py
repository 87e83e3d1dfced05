"""The filter loss of interpretable CNNs: a filter's maps tell one place, or nothing, of each image.

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


def filter_loss(maps: Tensor, *, kappa: float, beta: float = 4.0, single: bool = False) -> Tensor:
    """The loss (C,) of each filter, float32 whatever the maps' type; differentiable in ``maps``.

    Parameters
    ----------
    maps : (B, C, H, W) >= 0, of mean mass 1 an image (``sum_ij``) for ``kappa`` to be the templates' amplitude.
    single : the published one-template gradient instead of the exact one (the value is exact either way).
    """
    table = templates(*maps.shape[2:], beta=beta, kappa=kappa).to(maps.device)
    with torch.autocast(maps.device.type, enabled=False):
        return _FilterLoss.apply(maps.float(), table, single)


class _FilterLoss(torch.autograd.Function):
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
            ctx.save_for_backward(gradient_BCP.mul_(-1 / len(table)).reshape(maps.shape))
        return loss_C

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0][None, :, None, None], None, None

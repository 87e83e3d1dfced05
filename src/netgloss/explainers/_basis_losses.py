"""The terms of the interpretable basis: what makes a rotated space readable, as pure functions of logits.

With logits l_i = (z_i - b) / M of the I detectors of a row, y = sigmoid(l), q = y / sum_j y_j, log base 2, E_p the mean
over rows and E_i over detectors::

    L_s  = E_p[-sum_i q_i log2 q_i]         sparsity, 0 .. log2 I; 2^L_s = effective concepts of a row      (UIBE)
    L_ma = E_p[-sum_i q_i log2 y_i]         maximum activation; = L_s - E_p[log2 sum_i y_i]                 (UIBE)
    L_mm = E_i[1 / M_i]                     maximum margin                                                  (UIBE)
    L_ic = E_i[ReLU(nu - E_p[y_i^gamma]) / nu],  nu = tau / I       inactive classifier                     (CBE)

Sources: UIBE = Doumanoglou, Asteriadis & Zarpalas, IEEE Trans. AI 5(4), 2024 (arXiv 2303.10523); CBE = the same
authors, VISAPP 2024. The equations are as their follow-up (arXiv 2509.23926) restates them.

Shape letters: N rows, I detectors.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_LN2 = math.log(2)


class _SparsityAndActivity(torch.autograd.Function):
    """``(L_s, L_ma)`` from log y (N, I), with the gradient by hand: three passes over (N, I) instead of a dozen.

    With t = sum_i q_i ln y_i and s = ln sum_i y_i of a row: L_ma = -E[t] / ln 2, L_s = E[s - t] / ln 2,
    ds/dln y_i = q_i and dt/dln y_i = q_i (1 + ln y_i - t).
    """

    @staticmethod
    def forward(ctx: Any, log_y: Tensor) -> tuple[Tensor, Tensor]:
        total_N1 = log_y.logsumexp(dim=1, keepdim=True)
        q = (log_y - total_N1).exp_()
        activity_N1 = (q * log_y).sum(dim=1, keepdim=True)
        ctx.save_for_backward(log_y, q, activity_N1)
        return (total_N1 - activity_N1).mean() / _LN2, -activity_N1.mean() / _LN2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        log_y, q, activity_N1 = ctx.saved_tensors
        sparsity, activation = grads
        slope = -(sparsity + activation)
        gradient = (log_y - activity_N1).mul_(slope).add_(sparsity + slope)
        return gradient.mul_(q).mul_(1 / (_LN2 * len(log_y)))


def sparsity_and_activation(log_y: Tensor) -> tuple[Tensor, Tensor]:
    """``(L_s, L_ma)`` in bits from log y (N, I); finite for log y down to -1e4 and beyond."""
    found: tuple[Tensor, Tensor] = _SparsityAndActivity.apply(log_y)
    return found


def maximum_margin(log_margin: Tensor) -> Tensor:
    """``L_mm`` from log M, () or (I,)."""
    return (-log_margin).exp().mean()


def mean_power(log_y: Tensor, gamma: float) -> Tensor:
    """``E_p[y_i^gamma]`` (I,) from log y (N, I)."""
    return (gamma * log_y).exp().mean(dim=0)


def inactive_classifier(activity: Tensor, nu: float, *, running: Tensor | None = None) -> Tensor:
    """``L_ic`` from the activities E_p[y_i^gamma] (I,) of a batch.

    Parameters
    ----------
    nu : the floor of every detector, tau / I.
    running : (I,) running means of the activities. If given, they decide which detectors are below the floor (the
        batch is too small to tell) and those are pushed whatever the batch says.
    """
    if running is None:
        return F.relu(nu - activity).mean() / nu
    return torch.where(running < nu, nu - activity, 0.0).mean() / nu


def network_step(z: Tensor, basis: Tensor, bias: Tensor, *, kappa: Tensor | float | None = None) -> Tensor:
    """Change of standardised rows (N, I) that takes concepts out, for the network term of CBE and EDDP.

    ``kappa`` None (``cnn``): ``-sum_i ReLU(z_i - b) w_i``, which puts every positive detector of an orthonormal basis
    on its boundary. Else (``uur``): ``-kappa (W^T)^+ (z - b)``; ``kappa`` a number or (N, 1).
    """
    away = F.relu(z - bias) if kappa is None else kappa * (z - bias)
    return -away @ basis.T

"""The terms of the interpretable basis: what makes a rotated space readable, as pure functions of logits.

With logits l_i = (z_i - b) / M of the I detectors of a row, y = sigmoid(l), q = y / sum_j y_j, log base 2, E_p the mean
over rows and E_i over detectors::

    L_s  = E_p[-sum_i q_i log2 q_i]         sparsity, 0 .. log2 I; 2^L_s = effective concepts of a row      (UIBE)
    L_ma = E_p[-sum_i q_i log2 y_i]         maximum activation; = L_s - E_p[log2 sum_i y_i]                 (UIBE)
    L_mm = E_i[1 / M_i]                     maximum margin                                                  (UIBE)
    L_ic = E_i[ReLU(nu - E_p[y_i^gamma]) / nu],  nu = tau / I       inactive classifier                     (CBE)
    L_net = -E[H(f+(x'))]                  network: without the concepts (x', ``network_step``) the rest of the network
                                           f+ is undecided; H the entropy of the softmax                   (CBE, EDDP)

Sources: UIBE = Doumanoglou, Asteriadis & Zarpalas, IEEE Trans. AI 5(4), 2024 (arXiv 2303.10523); CBE = the same
authors, VISAPP 2024. The equations are as their follow-up (arXiv 2509.23926) restates them.

Shape letters: N rows, I detectors.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_LN2 = math.log(2)
_CACHED = 1 << 17
"""Numbers worked on at once."""
_FLAT = {torch.float64: -600.0, torch.float32: -80.0, torch.bfloat16: -80.0, torch.float16: -8.0}
"""Logits below which sigmoids or their sum may underflow."""


class _Assignment(torch.autograd.Function):
    """``lambda_s L_s + lambda_ma L_ma`` and E_p[y^gamma] of logits (N, I), with what else :class:`RowTerms` holds.

    The gradient is worked out with the value, in pieces that stay in the cache: with t = sum_i q_i ln y_i and
    s = ln sum_i y_i of a row, L_ma = -E[t] / ln 2, L_s = E[s - t] / ln 2, ds/dln y_i = q_i, dt/dln y_i =
    q_i (1 + ln y_i - t) and dln y_i/dl_i = 1 - y_i.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, weights: tuple[float, float], gamma: float | None) -> tuple[Tensor, ...]:
        rows, detectors = logits.shape
        gradient = torch.empty_like(logits)
        by_power = torch.empty_like(logits) if gamma is not None else None
        sparsity, activation, none = logits.new_zeros(3).unbind()
        activity, on = logits.new_zeros(2, detectors).unbind()
        slope, rest = -sum(weights) / (_LN2 * rows), -weights[1] / (_LN2 * rows)
        size = max(1, _CACHED // detectors)
        for logits_NI, gradient_NI, power_NI in zip(
            logits.split(size),
            gradient.split(size),
            by_power.split(size) if by_power is not None else itertools.repeat(None),
            strict=False,
        ):
            y = torch.sigmoid(logits_NI)
            if bool(logits_NI.amin() < _FLAT[logits.dtype]):  # y or their sum may underflow: go by the logarithms
                log_y = F.logsigmoid(logits_NI)
                log_sum = log_y.logsumexp(dim=1, keepdim=True)
                q = (log_y - log_sum).exp_()
            else:
                log_y = y.log()
                total = y.sum(dim=1, keepdim=True)
                q = y / total
                log_sum = total.log_()
            mean_log = torch.linalg.vecdot(q, log_y)[:, None]
            sparsity += (log_sum - mean_log).sum()
            activation -= mean_log.sum()
            is_on = torch.gt(y, 0.5, out=torch.empty_like(y))
            on += is_on.sum(0)
            none += (is_on.sum(1) == 0).sum()
            left = 1 - y
            if power_NI is not None and gamma is not None:
                power = torch.mul(y * y, y, out=power_NI) if gamma == 3 else torch.exp(gamma * log_y, out=power_NI)
                activity += power.sum(0)
                power.mul_(left)
            torch.sub(log_y, mean_log, out=gradient_NI)
            gradient_NI.mul_(slope).add_(rest).mul_(q).mul_(left)
        ctx.save_for_backward(gradient, by_power)
        ctx.gamma = gamma
        sparsity, activation = sparsity / (_LN2 * rows), activation / (_LN2 * rows)
        ctx.mark_non_differentiable(sparsity, activation, on, none)
        value = weights[0] * sparsity + weights[1] * activation
        return value, activity / rows, sparsity, activation, on, none

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        gradient, by_power = ctx.saved_tensors
        found = gradient * grads[0]
        if by_power is not None:
            found.addcmul_(by_power, grads[1] / len(found), value=ctx.gamma)
        return found, None, None


class RowTerms(NamedTuple):
    """What one batch of logits says.

    Parameters
    ----------
    value : () lambda_s L_s + lambda_ma L_ma. activity : (I,) E_p[y_i^gamma], zero without a gamma. These two have
        gradients.
    sparsity, activation : () L_s and L_ma in bits.
    on : (I,) rows in which each detector is on. none : () rows in which none is.
    """

    value: Tensor
    activity: Tensor
    sparsity: Tensor
    activation: Tensor
    on: Tensor
    none: Tensor


def row_terms(logits: Tensor, weights: tuple[float, float] = (1.0, 1.0), gamma: float | None = None) -> RowTerms:
    """The terms over rows from logits (N, I); finite for logits down to -1e4 and beyond.

    ``weights`` are those of sparsity and of maximum activation; ``gamma`` the power of the activities.
    """
    return RowTerms(*_Assignment.apply(logits, weights, gamma))


def maximum_margin(log_margin: Tensor) -> Tensor:
    """``L_mm`` from log M, () or (I,)."""
    return (-log_margin).exp().mean()


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


def network_certainty(logits: Tensor) -> Tensor:
    """``L_net``: minus the mean entropy, in bits, of the classes that logits (B, classes) stand for."""
    log_p = logits.log_softmax(dim=1)
    return (log_p.exp() * log_p).sum(dim=1).mean() / _LN2

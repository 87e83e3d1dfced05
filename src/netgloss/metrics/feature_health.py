"""What hardening does to the features of a layer, apart from consistency.

    effective rank             exp of the entropy of the singular values' shares           Roy & Vetterli 2007
    class mean ratio           |phi* - mean_y| / |phi* - mean_t|
    source / nearest target    |phi* - phi(x)| / |phi* - nearest real phi of class t|

phi* belongs to an adversarial image made from x (class y) towards t; below 1 is the good side. Dong et al., arXiv
1708.05493, print two distance ratios whose definitions are unknown: these two are ours and are not theirs.

A shrunken or collapsed phi can raise consistency and lower any distance, so norms and ranks are reported with the
scores.

Shape letters: N, M images, D features, U units.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from netgloss.errors import UserError


def effective_rank(features: Tensor) -> float:
    """exp(entropy of s / sum s), s the singular values of the features (N, D): 1 to min(N, D); NaN for zeros."""
    singular = torch.linalg.svdvals(features.double())
    if not float(singular.sum()) > 0:
        return math.nan
    shares = singular / singular.sum()
    shares = shares[shares > 0]
    return float((-(shares * shares.log()).sum()).exp())


def class_mean_ratio(adversarial: Tensor, real: Tensor, labels: Tensor, true: Tensor, targets: Tensor) -> Tensor:
    """(M,) of adversarial features (M, D); ``real`` (N, D) with ``labels`` (N,) give the class means.

    Raises
    ------
    UserError : a class of ``true`` or ``targets`` (M,) without a real image.
    """
    classes = labels.unique()
    missing = sorted(set(torch.cat([true, targets]).tolist()) - set(classes.tolist()))
    if missing:
        raise UserError(f"class means need real images of every class; there are none of {missing[:8]}")
    means = torch.stack([real[labels == c].double().mean(0) for c in classes])
    phi = adversarial.double()
    to_true, to_target = ((phi - means[torch.searchsorted(classes, c)]).norm(dim=1) for c in (true, targets))
    return to_true / to_target.clamp_min(1e-12)


def source_vs_nearest_target_ratio(
    adversarial: Tensor, real: Tensor, labels: Tensor, sources: Tensor, targets: Tensor
) -> Tensor:
    """(M,): distance to the own source in ``real`` (N, D) over that to the nearest real image of the target class."""
    ratios = torch.empty(len(adversarial), dtype=torch.float64)
    own = (adversarial - real[sources]).double().norm(dim=1)
    for c in targets.unique():
        candidates = real[labels == c].double()
        if not len(candidates):
            raise UserError(f"there is no real image of the target class {int(c)}")
        chosen = targets == c
        nearest = torch.cdist(adversarial[chosen].double(), candidates).amin(1)
        ratios[chosen] = own[chosen] / nearest.clamp_min(1e-12)
    return ratios


def response_correlation(before: Tensor, after: Tensor) -> Tensor:
    """(U,) Pearson correlation of the responses (N, U) of the same units before and after; NaN for constant ones."""
    a, b = (_standardised(values) for values in (before, after))
    return (a * b).sum(0)


def _standardised(values: Tensor) -> Tensor:
    """Columns of mean 0 and norm 1; NaN where constant."""
    centred = values.double() - values.double().mean(0)
    norms = centred.norm(dim=0)
    return centred / norms.masked_fill(norms < 1e-12, math.nan)

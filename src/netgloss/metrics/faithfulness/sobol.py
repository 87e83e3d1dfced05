"""Total Sobol indices of concepts: the share of a score's variance that a concept is part of.

CRAFT (Fel et al. 2023, arXiv 2211.10154). Concepts are multiplied by masks m with independent uniform
entries in [0, 1]; with v the score and ~k all entries but k::

    S_k = E[ Var(v(m) | m_~k) ] / Var(v(m))
        ~ mean_n (v(a_n) - v(a_n with entry k of b_n))^2 / 2 / Var_n(v(a_n))        (Jansen 1999)

a and b are the halves of scrambled Sobol sequences (scipy): N (K + 1) values. Each of ``scrambles`` independent
scrambles gives an estimate of numerators and variance; the spread over them gives the standard error.

Indices add up to 1 only without interactions, and are at least the first-order share. They have no sign (a concept that
speaks against the class counts as one for it), and they are about masks that scale concepts down, independently and
evenly: not about the values that concepts take in images.

Shape letters: K concepts, N points, R scrambles; "..." is the shape of one value (images, say).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from netgloss.errors import UserError
from netgloss.metrics.faithfulness.masking import Value


def sobol_total(
    value: Value, num_concepts: int, *, points: int = 32, scrambles: int = 4, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Total indices (K, ...) and their standard errors (K, ...), float64; NaN where the value does not vary.

    Parameters
    ----------
    value : masks (M, K) in [0, 1] to values (M, ...).
    points : N of each scramble, a power of two.
    scrambles : R >= 2; the number of values is R N (K + 1).

    Raises
    ------
    UserError : if ``points`` is no power of two, or there are fewer than two scrambles.
    """
    from scipy.stats import qmc

    if points < 2 or points & (points - 1):
        raise UserError(f"points must be a power of two (2, 4, 8, ...), got {points}")
    if scrambles < 2:
        raise UserError(f"scrambles must be at least 2 (the error is their spread), got {scrambles}")
    halves, spreads = [], []
    for seeds in np.random.SeedSequence(seed).spawn(scrambles):
        sequence = qmc.Sobol(2 * num_concepts, scramble=True, seed=np.random.default_rng(seeds))
        both = torch.from_numpy(sequence.random(points))
        a_NK, b_NK = both[:, :num_concepts], both[:, num_concepts:]
        plain = value(a_NK).double()
        changed = []
        for k in range(num_concepts):
            mixed = a_NK.clone()
            mixed[:, k] = b_NK[:, k]
            changed.append((plain - value(mixed).double()).square().mean(0) / 2)
        halves.append(torch.stack(changed))
        spreads.append(plain.var(0, correction=0))
    numerator, variance = torch.stack(halves), torch.stack(spreads)
    total = torch.where(variance.mean(0) > 0, numerator.mean(0) / variance.mean(0), torch.nan)
    # error of a ratio of means (delta method)
    residual = (numerator - total * variance[:, None]) / variance.mean(0)
    return total, residual.std(0) / scrambles**0.5

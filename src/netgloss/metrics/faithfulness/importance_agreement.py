"""Whether two ways to measure importance rank the concepts in the same order.

Rank correlation image by image: Spearman's rho (of ranks, ties share theirs) or Kendall's tau-b. High agreement does
not make either right: both may follow the size of the codes. Concepts that are zero in an image are tied at 0 for most
measures and would make any two agree: leave them out with ``active``.

Shape letters: B images, K concepts, M measures.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from netgloss.errors import UserError

Kind = Literal["spearman", "kendall"]


def rank_correlation(a: Tensor, b: Tensor, *, kind: Kind = "spearman", active: Tensor | None = None) -> Tensor:
    """Rank correlation of two importances (B, K), for each image (B,) float64; NaN where one has no order.

    Parameters
    ----------
    active : (B, K) concepts that count; default all.
    """
    from scipy.stats import kendalltau, rankdata

    if a.shape != b.shape or a.ndim != 2:
        raise UserError(f"expected two importances (B, K), got {tuple(a.shape)} and {tuple(b.shape)}")
    if kind not in ("spearman", "kendall"):
        raise UserError(f"rank correlations are 'spearman' or 'kendall', got {kind!r}")
    if a.isnan().any() or b.isnan().any():
        raise UserError("cannot rank concepts: NaN among their importances")
    chosen = torch.ones(a.shape, dtype=torch.bool) if active is None else active.cpu()
    rows = zip(*(t.detach().double().cpu().numpy() for t in (a, b)), chosen.numpy(), strict=True)
    found = np.full(len(a), np.nan)
    for i, (x, y, used) in enumerate(rows):
        x, y = x[used], y[used]
        if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
            continue
        found[i] = kendalltau(x, y).statistic if kind == "kendall" else np.corrcoef(rankdata(x), rankdata(y))[0, 1]
    return torch.from_numpy(found)


def importance_agreement(
    importances: Mapping[str, Tensor], *, kind: Kind = "spearman", active: Tensor | None = None
) -> dict[tuple[str, str], float]:
    """Mean rank correlation over images for every pair of named importances (B, K), images without order left out."""
    names = list(importances)
    return {
        (a, b): float(rank_correlation(importances[a], importances[b], kind=kind, active=active).nanmean())
        for i, a in enumerate(names)
        for b in names[i + 1 :]
    }

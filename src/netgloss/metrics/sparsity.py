"""How few concepts explain a row (one position of a map, or a vector), and how many are never used.

Shape letters: B images, K concepts, P positions.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from netgloss.metrics.base import ImageMetric, by_position


def l0(codes: Tensor, *, tolerance: float = 0.0) -> Tensor:
    """Number of codes with ``|z| > tolerance`` in each row (..., K) -> (...), float64."""
    return (codes.abs() > tolerance).sum(-1).double().where(codes.isfinite().all(-1), math.nan)


def hoyer(codes: Tensor) -> Tensor:
    """Hoyer sparsity ``(sqrt(K) - l1 / l2) / (sqrt(K) - 1)`` of each row (..., K) -> (...), float64, in [0, 1].

    0 where all codes are equally strong, 1 where a single one is active (always so for K = 1, the limit), NaN for rows
    of zeros. Signs and scale of the row do not matter. Hoyer 2004, "Non-negative matrix factorization with sparseness
    constraints", JMLR 5, section 3.1.
    """
    size = codes.double().abs()
    size = size / size.amax(-1, keepdim=True)
    root = math.sqrt(codes.shape[-1])
    if root == 1:
        return size.squeeze(-1)
    return ((root - size.sum(-1) / size.square().sum(-1).sqrt()) / (root - 1)).clamp(0, 1)


def dead_share(codes: Tensor, *, tolerance: float = 0.0) -> Tensor:
    """Share of concepts with ``|z| <= tolerance`` in every row of (B, K) or (B, K, H, W); () float64."""
    active_K = (by_position(codes, what="concepts").abs() > tolerance).any(2).any(0)
    return (~active_K).double().mean().where(codes.isfinite().all(), math.nan)


class L0(ImageMetric):
    """Mean number of active concepts a row.

    Parameters
    ----------
    tolerance : a concept is active where ``|z|`` is above it.
    """

    name = "l0"
    higher_is_better = False
    bounds = (0.0, math.inf)
    inputs = ("concepts",)
    definition = (
        "Mean number of concepts that are not zero at a position (or in a vector). Fewer are easier to read, but only "
        "at equal fidelity: a dead explainer has 0. It is the number of concepts for methods whose codes are never "
        "exactly zero (PCA, ICA), and cannot show how unequal the active ones are: see hoyer."
    )

    def __init__(self, *, tolerance: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.tolerance = tolerance

    def statistics(self, *, concepts: Tensor) -> Tensor:
        active_BP = l0(by_position(concepts, what="concepts").transpose(1, 2), tolerance=self.tolerance)
        return torch.stack([active_BP.sum(1), torch.full_like(active_BP[:, 0], active_BP.shape[1])], dim=1)

    def score(self, sums: Tensor, count: Tensor) -> Tensor:
        return sums[..., 0] / sums[..., 1]


class L0Share(L0):
    """:class:`L0` as a share of the number of concepts."""

    name = "l0_share"
    bounds = (0.0, 1.0)
    definition = (
        "Mean share of the concepts that are not zero at a position (or in a vector): l0 divided by the number of "
        "concepts. Comparable only between explainers with similar numbers of concepts, and only at equal fidelity."
    )

    def statistics(self, *, concepts: Tensor) -> Tensor:
        active, rows = super().statistics(concepts=concepts).unbind(1)
        return torch.stack([active / concepts.shape[1], rows], dim=1)


class Hoyer(ImageMetric):
    """Mean Hoyer sparsity of the rows with any activity."""

    name = "hoyer"
    higher_is_better = True
    bounds = (0.0, 1.0)
    inputs = ("concepts",)
    definition = (
        "Hoyer sparsity of the concepts at a position (or in a vector), averaged over positions with any activity: 0 "
        "if all are equally strong, 1 if only one is active. It depends on the units of the concepts (one concept on a "
        "large scale looks sparse), does not count positions that nothing explains, and says nothing about fidelity."
    )

    def statistics(self, *, concepts: Tensor) -> Tensor:
        sparsity_BP = hoyer(by_position(concepts, what="concepts").transpose(1, 2))
        return torch.stack([sparsity_BP.nansum(1), (~sparsity_BP.isnan()).double().sum(1)], dim=1)

    def score(self, sums: Tensor, count: Tensor) -> Tensor:
        return sums[..., 0] / sums[..., 1]


class DeadShare(ImageMetric):
    """Share of concepts that are active in no image.

    Parameters
    ----------
    tolerance : a concept is active where ``|z|`` is above it.
    """

    name = "dead_share"
    higher_is_better = False
    bounds = (0.0, 1.0)
    inputs = ("concepts",)
    definition = (
        "Share of the concepts that are zero everywhere in all evaluated images. It falls as images are added, and the "
        "interval understates that: a concept of a rare thing looks dead where the thing is absent. It cannot show "
        "concepts that are active everywhere, or too weak to matter."
    )

    def __init__(self, *, tolerance: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.tolerance = tolerance

    def statistics(self, *, concepts: Tensor) -> Tensor:
        return (by_position(concepts, what="concepts").abs() > self.tolerance).any(2).double()

    def score(self, sums: Tensor, count: Tensor) -> Tensor:
        dead = (sums == 0).double().mean(-1)
        return dead.where((count > 0) & sums.isfinite().all(-1), math.nan)

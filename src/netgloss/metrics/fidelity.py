"""How much of the layer the reconstruction keeps: the share of variance explained.

With rows x (every position of every image), reconstruction y, features f and the mean mu_f over all rows::

    SSE_f = sum (x_f - y_f)^2        SST_f = sum (x_f - mu_f)^2
    r2              = 1 - sum_f SSE_f / sum_f SST_f          (features weighted by their variance)
    r2_feature_mean = mean over live f of 1 - SSE_f / SST_f  (every feature counts the same)

Streamed as sums of (x - a), (x - a)^2 and (x - y)^2 in float64 around a fixed reference a: SST_f = S2_f - S1_f^2 / N.

Shape letters: B images, C features, P positions.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from netgloss.metrics.base import ImageMetric, by_position, check_same_shape

LIVE_FLOOR = 1e-6
"""A feature is live if its variance is above this share of the mean variance of the layer's features."""

_ROUNDING = 1e-12
"""Sums of squares around the mean that are smaller than this share of the plain ones are rounding, so zero."""


def feature_sums(activation: Tensor, reconstruction: Tensor) -> tuple[Tensor, Tensor]:
    """``(SSE, SST)``, each (C,) float64, over all rows of (B, C) or (B, C, H, W), by two passes."""
    check_same_shape("activation", activation, "reconstruction", reconstruction)
    x_BCP, y_BCP = by_position(activation, what="activation"), by_position(reconstruction)
    spread_BCP = x_BCP - x_BCP.mean((0, 2), keepdim=True)
    return (x_BCP - y_BCP).square().sum((0, 2)), spread_BCP.square().sum((0, 2))


def r2_score(activation: Tensor, reconstruction: Tensor) -> Tensor:
    """Share of the variance explained, features weighted by their variance; () float64, NaN if nothing varies."""
    return _r2(*feature_sums(activation, reconstruction))


def r2_per_feature(activation: Tensor, reconstruction: Tensor, *, floor: float = LIVE_FLOOR) -> Tensor:
    """``1 - SSE_f / SST_f`` (C,) float64, NaN for dead features (see :data:`LIVE_FLOOR`)."""
    sse_C, sst_C = feature_sums(activation, reconstruction)
    return torch.where(_live(sst_C, floor), 1 - sse_C / sst_C, math.nan)


def r2_feature_mean(activation: Tensor, reconstruction: Tensor, *, floor: float = LIVE_FLOOR) -> Tensor:
    """Mean of :func:`r2_per_feature` over live features, () float64; NaN if there are none."""
    return _r2_feature_mean(*feature_sums(activation, reconstruction), floor)


def _r2(sse_C: Tensor, sst_C: Tensor) -> Tensor:
    sse, sst = sse_C.sum(-1), sst_C.sum(-1)
    return torch.where(sst > 0, 1 - sse / sst, math.nan)


def _live(sst_C: Tensor, floor: float) -> Tensor:
    return (sst_C > 0) & (sst_C > floor * sst_C.mean(-1, keepdim=True))


def _r2_feature_mean(sse_C: Tensor, sst_C: Tensor, floor: float) -> Tensor:
    live_C = _live(sst_C, floor)
    return torch.where(live_C, 1 - sse_C / sst_C, 0.0).sum(-1) / live_C.sum(-1)


class R2(ImageMetric):
    """Variance-weighted R2 of (B, C) or (B, C, H, W).

    Parameters
    ----------
    reference : (C,) numbers near the features' means, the same in all processes; only needed if means exceed standard
        deviations by a factor of more than 10^5. Default zero.
    """

    name = "r2"
    higher_is_better = True
    bounds = (-math.inf, 1.0)
    inputs = ("activation", "reconstruction")
    definition = (
        "Share of the layer's variance that the reconstruction keeps, over all positions of all images; features count "
        "by their variance. 1 is perfect, 0 is no better than the mean activation, below 0 is worse. It cannot show "
        "whether the kept part matters to the classifier or means anything to people."
    )

    def __init__(self, *, reference: Tensor | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        centre = torch.zeros(1) if reference is None else reference
        self.register_buffer("reference", centre.double(), persistent=False)

    def statistics(self, *, activation: Tensor, reconstruction: Tensor) -> Tensor:
        check_same_shape("activation", activation, "reconstruction", reconstruction)
        x_BCP, y_BCP = by_position(activation, what="activation"), by_position(reconstruction)
        error_BC = (x_BCP - y_BCP).square_().sum(2)
        assert isinstance(self.reference, Tensor)
        x_BCP = x_BCP - self.reference[:, None]
        rows_B1 = torch.full_like(error_BC[:, :1], x_BCP.shape[2])
        return torch.cat([rows_B1, x_BCP.sum(2), x_BCP.square().sum(2), error_BC], dim=1)

    def score(self, sums: Tensor, count: Tensor) -> Tensor:
        return _r2(*self.feature_sums(sums))

    def feature_sums(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """``(SSE, SST)``, each (..., C), of summed statistics (..., 1 + 3 C)."""
        rows, (s1_C, s2_C, sse_C) = sums[..., :1], sums[..., 1:].unflatten(-1, (3, -1)).unbind(-2)
        sst_C = s2_C - s1_C.square() / rows
        return sse_C, torch.where(sst_C <= _ROUNDING * s2_C, 0.0, sst_C)


class R2FeatureMean(R2):
    """Mean R2 over live features.

    Parameters
    ----------
    floor : features with a variance of at most ``floor`` times the layer's mean variance are dead and left out.
    """

    name = "r2_feature_mean"
    definition = (
        "R2 of each feature by itself, averaged over the features that vary (variance above a millionth of the layer's "
        "mean variance); every feature counts the same. 1 is perfect, 0 is no better than the mean activation; one "
        "badly rebuilt rare feature can push it far below 0. It cannot show which features matter to the classifier."
    )

    def __init__(self, *, floor: float = LIVE_FLOOR, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.floor = floor

    def score(self, sums: Tensor, count: Tensor) -> Tensor:
        return _r2_feature_mean(*self.feature_sums(sums), self.floor)

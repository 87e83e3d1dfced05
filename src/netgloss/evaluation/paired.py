"""Differences between methods measured on the same images, with a paired bootstrap.

An :class:`~netgloss.metrics.ImageMetric` weighs image i in replicate r by a Poisson count that is a hash of (i, r) and
of nothing else. So replicate r of two methods is the same resample of the images, and the difference of two replicates
is the difference on that resample: what makes an image hard for both cancels. With methods a and b, S_a and S_b fits::

    d         = mean_s a_s - mean_s b_s
    images    = 1.96 sd over r of (mean_s a_sr - mean_s b_sr)
    fits      = t sqrt(var a_s / S_a + var b_s / S_b)        Welch: the fits of two methods are not paired
    interval  = d -+ sqrt(images^2 + fits^2)

t is Student's 97.5 % point at Welch's degrees of freedom, rounded down. A method that does not depend on the seed has
no variance of fits. One fit of a method that does depend on it says nothing about the spread over fits: it counts as
none, and the interval is too narrow. An interval holds 95 % for one pair; with many pairs some miss by chance.

Shape letters: S fits, R replicates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from netgloss.errors import UserError
from netgloss.metrics.base import ImageMetric, student_t
from netgloss.runs.verdicts import ROUNDING

Verdict = Literal["better", "worse", "higher", "lower", "same", "unknown"]


@dataclass(frozen=True)
class Measured:
    """One metric of one method: values (S,) and bootstrap replicates (S, R), over the images of ``images``.

    ``images`` names the set of images; two sets that are not the same cannot be paired.
    """

    values: Tensor
    replicates: Tensor
    images: str

    @classmethod
    def of(cls, runs: Sequence[ImageMetric], images: str) -> Measured:
        """From one filled metric a fit."""
        values = torch.stack([run.compute() for run in runs]).double()
        return cls(values, torch.stack([run.replicates() for run in runs]).double(), images)

    @property
    def defined(self) -> bool:
        return bool(self.values.isfinite().all())


@dataclass(frozen=True)
class Difference:
    """``value`` = a - b with its 95 % interval; NaN where there is none."""

    value: float
    low: float
    high: float

    def verdict(self, higher_is_better: bool | None) -> Verdict:
        """Of a against b: "same" if the interval holds 0; "higher" or "lower" where neither direction is better."""
        if not math.isfinite(self.low + self.high):
            return "unknown"
        if self.low <= 0 <= self.high or max(abs(self.low), abs(self.high)) <= ROUNDING:
            return "same"
        if higher_is_better is None:
            return "higher" if self.value > 0 else "lower"
        return "better" if (self.value > 0) == higher_is_better else "worse"


def difference(a: Measured, b: Measured) -> Difference:
    """A minus b, paired over images (module docstring).

    Raises
    ------
    UserError : the two were measured on different images, or with different numbers of replicates.
    """
    if a.images != b.images or a.replicates.shape[1] != b.replicates.shape[1]:
        raise UserError("only scores of the same images and replicates can be paired")
    value = float(a.values.mean() - b.values.mean())
    paired_R = a.replicates.mean(0) - b.replicates.mean(0)
    paired_R = paired_R[paired_R.isfinite()]
    of_images = 1.96 * float(paired_R.std()) if len(paired_R) > 1 else math.nan
    half = math.sqrt(of_images**2 + _of_fits(a.values, b.values) ** 2)
    return Difference(value, value - half, value + half)


def _of_fits(a: Tensor, b: Tensor) -> float:
    """Half-width from the spread over fits (S_a,) and (S_b,)."""
    parts = [(float(v.var()) / len(v), len(v) - 1) for v in (a, b) if len(v) > 1]
    total = sum(part for part, _ in parts)
    if not total > 0:
        return 0.0
    degrees = total**2 / sum(part**2 / free for part, free in parts)
    return student_t(max(1, int(degrees + 1e-9))) * math.sqrt(total)

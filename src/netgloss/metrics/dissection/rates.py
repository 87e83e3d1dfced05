"""Thresholds for dissection: each method's own, or those that give every method the same on-rate.

A direction's rule is one of

- ``own``: what the method itself calls on (b of a basis, p > 0.5 of a probe, > 0 of a sparse code);
- ``rate(r)``: its own quantile, on in the share r of the rows; r = 0.005 is the rule of network dissection;
- ``shared_b(r)``: one threshold for all directions, at which they are on in the share r of the rows on average.

Thresholds come from the native-resolution maps of the *label* images. The threshold of rate r over n values is the k-th
largest with k = floor(r n) + 1, and on is strictly greater: without ties exactly floor(r n) values are on.

Shape letters: n rows of a chunk, I concepts, R rates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from netgloss.errors import UserError

PUBLISHED_RATE = 0.005
_LARGEST_EXACT_RATE = 0.05
_MEMORY = 2 << 30
_BINS = 4096

Chunks = Callable[[], Iterable[Tensor]]
"""Every call gives all rows (n, I) of the label images again, in chunks."""


@dataclass(frozen=True)
class Extent:
    """What one pass over the rows gives: number of rows, and (I,) smallest and largest value."""

    rows: int
    low: Tensor
    high: Tensor


def extent(chunks: Chunks) -> Extent:
    """Number of rows and the range of each concept."""
    rows, low, high = 0, torch.tensor(torch.inf), torch.tensor(-torch.inf)
    for chunk in chunks():
        rows += len(chunk)
        low, high = torch.minimum(low, chunk.amin(0)), torch.maximum(high, chunk.amax(0))
    if not rows:
        raise UserError("thresholds need at least one row, got none")
    return Extent(rows, low, high)


def rate_thresholds(
    chunks: Chunks, rates: Sequence[float], *, known: Extent | None = None, memory: int = _MEMORY
) -> Tensor:
    """Thresholds (R, I) at which each concept is on in the share ``rates`` of the rows.

    Exact (the k largest values of each concept, merged chunk by chunk) up to a rate of 5 % and ``memory`` bytes;
    above, from a histogram of 4,096 bins between the exact extremes. Concepts that are never negative are never on at
    0.

    Raises
    ------
    UserError : a rate outside 0 .. 1, or no rows.
    """
    _check(rates)
    known = known or extent(chunks)
    keep = int(max(rates) * known.rows) + 1
    if max(rates) > _LARGEST_EXACT_RATE or 4 * keep * known.low.numel() > memory:
        found = _by_histogram(chunks, rates, known)
    else:
        top = torch.empty(0, known.low.numel())
        for chunk in chunks():
            merged = torch.cat([top, chunk.float()])
            top = merged.topk(min(keep, len(merged)), dim=0).values
        found = torch.stack([top[min(int(rate * known.rows), len(top) - 1)] for rate in rates])
    return torch.where(known.low >= 0, found.clamp_min(0), found)


def shared_thresholds(chunks: Chunks, rates: Sequence[float], *, known: Extent | None = None) -> Tensor:
    """One threshold for all concepts at which they are on in the share ``rates`` of the rows on average: (R, I), rows
    equal.
    """
    known = known or extent(chunks)
    number = known.low.numel()
    together = Extent(known.rows * number, known.low.min()[None], known.high.max()[None])

    def flat() -> Iterable[Tensor]:
        return (chunk.reshape(-1, 1) for chunk in chunks())

    return rate_thresholds(flat, rates, known=together).expand(-1, number).contiguous()


def on_rates(chunks: Chunks, thresholds: Tensor) -> Tensor:
    """Share of the rows above the thresholds (R, I) or (I,), in the same shape."""
    rows, count = 0, torch.zeros(thresholds.shape, dtype=torch.float64)
    several = torch.atleast_2d(thresholds)
    for chunk in chunks():
        rows += len(chunk)
        count += torch.stack([(chunk > t).sum(0) for t in several]).reshape(thresholds.shape)
    return count / max(rows, 1)


def _by_histogram(chunks: Chunks, rates: Sequence[float], known: Extent) -> Tensor:
    """Upper quantiles from counts in equal bins, linear inside a bin."""
    number = known.low.numel()
    width = ((known.high - known.low) / _BINS).double().clamp_min(1e-30)
    counts = torch.zeros(number * _BINS, dtype=torch.float64)
    offset = torch.arange(number) * _BINS
    for chunk in chunks():
        place = ((chunk.double() - known.low) / width).long().clamp_(0, _BINS - 1)
        counts += torch.bincount((place + offset).flatten(), minlength=len(counts))
    above = counts.reshape(number, _BINS).flip(1).cumsum(1)  # values in the j + 1 highest bins
    found = []
    for rate in rates:
        wanted = rate * known.rows
        bins = (above < wanted).sum(1).clamp_max(_BINS - 1)  # the highest bins that fit whole
        before = torch.where(bins > 0, above.gather(1, (bins - 1).clamp_min(0)[:, None]).squeeze(1), 0.0)
        inside = above.gather(1, bins[:, None]).squeeze(1) - before
        part = torch.where(inside > 0, (wanted - before) / inside.clamp_min(1), 0.0)
        found.append((known.high.double() - (bins + part) * width).float())
    return torch.stack(found)


def _check(rates: Sequence[float]) -> None:
    wrong = [rate for rate in rates if not 0 <= rate < 1]
    if wrong or not rates:
        raise UserError(f"on-rates lie between 0 and 1, got {', '.join(map(str, wrong)) or 'none'}")

"""Whether a method found what was planted (``planted.py``): directions, places and strengths.

Planted concepts have no common order with found ones: each is matched to one of them so that the total similarity is
largest (Hungarian algorithm), by cosine of directions, or by correlation of codes for methods without a dictionary. Of
the pairs::

    cosine       cos(planted direction, found direction)
    correlation  Pearson correlation of planted and found codes over rows
    f1           of "the found code is above t" as a statement on where the planted concept is present

``f1`` takes t = 0 (as the method says) and ``best_f1`` the t, one a concept, that fits the planted truth best: what the
codes hold at most. A concept said to be everywhere has F1 = 2 p / (1 + p), with p the share of rows that hold it.

Planted concepts that stay without partner count 0. Extra found concepts cost nothing, and help: with many, random
directions have a high cosine with some. Read each number beside the same one of a random dictionary of the same size.

Shape letters: N rows, K planted concepts, M found ones, C features.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from netgloss.errors import UserError
from netgloss.metrics.dictionary import cosines
from netgloss.metrics.stability import CodeCorrelation


@dataclass(frozen=True)
class Recovery:
    """One number for each planted concept, (K,) float64; ``partner`` (K,) is the found concept or -1."""

    partner: Tensor
    cosine: Tensor
    correlation: Tensor
    f1: Tensor
    best_f1: Tensor

    def means(self) -> dict[str, float]:
        """The mean over planted concepts of each number."""
        return {f.name: float(getattr(self, f.name).mean()) for f in fields(self) if f.name != "partner"}


def recovery(
    planted_codes: Tensor,
    found_codes: Tensor,
    *,
    planted_dictionary: Tensor | None = None,
    found_dictionary: Tensor | None = None,
    signed: bool = True,
) -> Recovery:
    """How well found codes (N, M) and directions (M, C) give back planted codes (N, K) >= 0 and directions (K, C).

    Parameters
    ----------
    planted_dictionary, found_dictionary : without either, codes are matched by correlation and ``cosine`` is NaN.
    signed : False also takes a found concept for the planted one with its sign turned, for methods without signs (PCA).

    Raises
    ------
    UserError : if the codes differ in rows, or NaN or Inf are among the numbers.
    """
    if planted_codes.ndim != 2 or found_codes.ndim != 2 or len(planted_codes) != len(found_codes):
        raise UserError(
            f"expected codes (N, K) and (N, M) of the same rows, got {tuple(planted_codes.shape)} and "
            f"{tuple(found_codes.shape)}"
        )
    moments = CodeCorrelation(planted_codes.shape[1], found_codes.shape[1])
    moments.update(planted_codes.detach().cpu(), found_codes.detach().cpu())
    correlation_KM = moments.compute()
    cosine_KM, similarity = torch.full_like(correlation_KM, torch.nan), correlation_KM
    if planted_dictionary is not None and found_dictionary is not None:
        similarity = cosine_KM = cosines(planted_dictionary.cpu(), found_dictionary.cpu())
    partner = match_concepts(similarity, signed=signed)
    paired = partner >= 0
    rows = torch.arange(len(partner))
    sign = torch.where(similarity[rows, partner] < 0, -1.0, 1.0) if not signed else torch.ones(len(partner)).double()
    chosen = found_codes.detach().cpu().double()[:, partner] * sign
    present = planted_codes.detach().cpu() > 0
    numbers = {
        "cosine": cosine_KM[rows, partner] * sign,
        "correlation": correlation_KM[rows, partner] * sign,
        "f1": support_f1(present, chosen > 0),
        "best_f1": best_support_f1(present, chosen),
    }
    return Recovery(partner, **{name: torch.where(paired, value, 0.0) for name, value in numbers.items()})


def match_concepts(similarity: Tensor, *, signed: bool = True) -> Tensor:
    """The partner (K,) among M of each of K concepts in the best one-to-one matching of (K, M); -1 if it has none."""
    from scipy.optimize import linear_sum_assignment

    if not similarity.isfinite().all():
        raise UserError(f"cannot match concepts: their similarities {tuple(similarity.shape)} hold NaN or Inf")
    rows, columns = linear_sum_assignment((similarity if signed else similarity.abs()).cpu().numpy(), maximize=True)
    partner = torch.full((len(similarity),), -1)
    partner[torch.from_numpy(rows)] = torch.from_numpy(columns)
    return partner


def support_f1(present: Tensor, said: Tensor) -> Tensor:
    """F1 of each column of bools ``said`` (N, K) about ``present`` (N, K): (K,) float64; 0 if neither is ever true."""
    both = (present & said).sum(0).double()
    return 2 * both / (present.sum(0) + said.sum(0)).clamp_min(1)


def best_support_f1(present: Tensor, codes: Tensor) -> Tensor:
    """The largest F1 of ``codes > t`` about ``present`` over all thresholds t, column by column: (K,) float64."""
    codes_NK, order_NK = codes.sort(0, descending=True)
    hits_NK = present.gather(0, order_NK).cumsum(0).double()
    said_N1 = torch.arange(1, len(codes) + 1)[:, None]
    f1_NK = 2 * hits_NK / (said_N1 + present.sum(0))
    last_of_its_value = torch.cat([codes_NK.diff(dim=0) != 0, torch.ones(1, codes.shape[1], dtype=torch.bool)])
    return torch.where(last_of_its_value, f1_NK, 0.0).amax(0)

"""Whether another seed finds the same concepts.

Concepts of two fits have no common order: each is matched to one of the other fit so that the total similarity is
largest (Hungarian algorithm), and the similarity of the matched pairs is averaged. Similarity is ``|cos|`` of the
directions for linear decoders (:class:`Stability`) and ``|Pearson correlation|`` of the codes over images where there
is no dictionary (:class:`CodeCorrelation`). Fel et al. 2023, "A holistic approach to unifying automatic concept
extraction and concept importance estimation", measures the same up to the choice of similarity.

Both are above zero for dictionaries without meaning, more so if they are non-negative or low-dimensional: read them
compared with :func:`random_stability` and :func:`shuffled_stability`.

Shape letters: B images, K concepts, C features, N rows, S seeds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from netgloss.errors import UserError
from netgloss.metrics.base import Bounds, DictionaryMetric, around, by_position, student_t
from netgloss.metrics.dictionary import cosines, random_dictionary


def matched_similarity(similarity: Tensor, *, signed: bool = False) -> Tensor:
    """Similarity of each concept to its partner under the best one-to-one matching.

    Parameters
    ----------
    similarity : (K, K') cosines or correlations of two sets of concepts.
    signed : False compares absolute values, for methods whose concepts have no sign of their own.

    Returns
    -------
    (K,) float64; 0 for concepts that are left over if K > K'.

    Raises
    ------
    UserError : if the similarities hold NaN or Inf.
    """
    from scipy.optimize import linear_sum_assignment

    if not similarity.isfinite().all():
        raise UserError(f"cannot match concepts: their similarities {tuple(similarity.shape)} hold NaN or Inf")
    similarity = similarity.double() if signed else similarity.double().abs()
    rows, columns = linear_sum_assignment(similarity.cpu().numpy(), maximize=True)
    matched = torch.zeros(len(similarity), dtype=torch.float64)
    matched[rows] = similarity.cpu()[rows, columns]
    return matched


def stability(dictionaries: Sequence[Tensor], *, signed: bool = False) -> float:
    """Mean matched cosine over all pairs of dictionaries (K, C) and all concepts; NaN for a single dictionary."""
    pairs = _pairs(dictionaries, signed)
    return fmean(pairs.values()) if pairs else math.nan


def concept_stability(dictionaries: Sequence[Tensor], *, signed: bool = False) -> Tensor:
    """For each concept of the first dictionary, its mean matched cosine in the others: (K,) float64."""
    if len(dictionaries) < 2:
        return torch.full((len(dictionaries[0]),), math.nan, dtype=torch.float64)
    first, *others = dictionaries
    return torch.stack([matched_similarity(cosines(first, other), signed=signed) for other in others]).mean(0)


def _pairs(dictionaries: Sequence[Tensor], signed: bool) -> dict[tuple[int, int], float]:
    return {
        (i, j): float(matched_similarity(cosines(a, b), signed=signed).mean())
        for (i, a), (j, b) in itertools.combinations(enumerate(dictionaries), 2)
    }


def pair_interval(pairs: Mapping[tuple[int, int], float], *, bounds: Bounds) -> tuple[float, float]:
    """95 % interval of the mean over pairs of seeds ``{(i, j): value}``; NaN for fewer than three seeds.

    Pairs that share a seed are not independent, so the variance is the jackknife's over seeds, with Student's t:
    ``var = (S - 1) / S * sum_s (mean without seed s - mean of these)^2``.
    """
    seeds = sorted({seed for pair in pairs for seed in pair})
    if len(seeds) < 3:
        return math.nan, math.nan
    without = torch.tensor([fmean(v for pair, v in pairs.items() if seed not in pair) for seed in seeds]).double()
    variance = (len(seeds) - 1) * without.var(correction=0)
    return around(fmean(pairs.values()), student_t(len(seeds) - 1) * math.sqrt(variance), bounds)


def random_stability(
    num_concepts: int,
    num_features: int,
    *,
    scale: Tensor | None = None,
    nonnegative: bool = False,
    signed: bool = False,
    draws: int = 5,
    seed: int = 0,
) -> float:
    """Stability of random dictionaries of the same size: the mean over ``draws`` independent pairs.

    ``scale`` and ``nonnegative`` as in :func:`netgloss.metrics.dictionary.random_dictionary`: give the layer's standard
    deviations, and the sign of the dictionaries to compare with, for the harder baselines.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        return random_dictionary(num_concepts, num_features, generator=generator, scale=scale, nonnegative=nonnegative)

    return fmean(stability([draw(), draw()], signed=signed) for _ in range(draws))


def shuffled_stability(dictionaries: Sequence[Tensor], *, signed: bool = False, draws: int = 5, seed: int = 0) -> float:
    """Stability after the values of each feature are shuffled among the concepts, in each dictionary by itself.

    Signs, sparsity and strength of the features stay as they are in the dictionaries, only what made concepts is gone.
    """
    generator = torch.Generator().manual_seed(seed)

    def shuffle(dictionary: Tensor) -> Tensor:
        order = torch.rand(dictionary.shape, generator=generator, dtype=torch.float64).argsort(0)
        return dictionary.detach().cpu().gather(0, order)

    return fmean(stability([shuffle(d) for d in dictionaries], signed=signed) for _ in range(draws))


class Stability(DictionaryMetric):
    """Mean matched cosine over pairs of seeds.

    Parameters
    ----------
    signed : False compares absolute cosines, for methods whose concepts have no sign of their own.
    """

    name = "stability"
    higher_is_better = True
    bounds = (-1.0, 1.0)
    definition = (
        "Mean cosine between the direction of a concept and its partner in a fit with another seed (initialisation and "
        "data order), after the best one-to-one matching; absolute value where concepts have no sign. 1 if every seed "
        "finds the same concepts. It cannot show that they are right: a biased method is stable, and so is any "
        "dictionary of non-negative or few features; compare with the random and shuffled baselines."
    )

    def __init__(self, *, signed: bool = False) -> None:
        self.signed = signed

    def estimate(self, dictionaries: Sequence[Tensor]) -> tuple[float, float, float]:
        pairs = _pairs(dictionaries, self.signed)
        bounds = self.bounds if self.signed else (0.0, 1.0)
        return (fmean(pairs.values()) if pairs else math.nan), *pair_interval(pairs, bounds=bounds)


class CodeCorrelation(Metric):
    """Pearson correlation between the codes of two fits over the rows of the same images.

    For explainers without a dictionary: ``matched_similarity(metric.compute())`` is each concept's stability. Streamed
    as co-moments in float64; ``update(codes, other)`` takes (B, K[, H, W]) and (B, K'[, H, W]), ``compute()`` gives
    (K, K'). A concept that never varies correlates 0 with everything; NaN or Inf in the codes makes its correlations
    NaN.
    """

    full_state_update = False

    def __init__(self, num_concepts: int, num_other: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        other = num_concepts if num_other is None else num_other
        self.sizes = (num_concepts, other)
        for name, shape in [("rows", ()), ("moments", (2, num_concepts)), ("other", (2, other)), ("cross", self.sizes)]:
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    rows: Tensor
    moments: Tensor
    other: Tensor
    cross: Tensor

    def update(self, codes: Tensor, other: Tensor) -> None:
        a_NK, b_NK = (by_position(c, what="codes").transpose(1, 2).flatten(0, 1) for c in (codes, other))
        if (a_NK.shape[1], b_NK.shape[1]) != self.sizes or len(a_NK) != len(b_NK):
            raise UserError(
                f"expected codes of {self.sizes} concepts, got {tuple(codes.shape)} and {tuple(other.shape)}"
            )
        self.rows = self.rows + len(a_NK)
        self.moments = self.moments + torch.stack([a_NK.sum(0), a_NK.square().sum(0)])
        self.other = self.other + torch.stack([b_NK.sum(0), b_NK.square().sum(0)])
        self.cross = self.cross + a_NK.T @ b_NK

    def compute(self) -> Tensor:
        covariance = self.cross - torch.outer(self.moments[0], self.other[0]) / self.rows
        spread = torch.outer(self._spread(self.moments), self._spread(self.other))
        return torch.where(spread == 0, 0.0, covariance / spread).clamp(-1, 1)

    def _spread(self, moments: Tensor) -> Tensor:
        total = moments[1] - moments[0].square() / self.rows
        return torch.where(total <= 1e-12 * moments[1], 0.0, total).sqrt()

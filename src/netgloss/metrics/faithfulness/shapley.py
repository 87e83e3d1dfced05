"""Shapley values of concepts: ConceptSHAP, and the same for any value of a subset.

Shapley 1953; Yeh et al. 2020 (arXiv 1910.07969) with v = completeness. With v a value of subsets of the
K concepts::

    phi_k = sum over S without k of |S|! (K - |S| - 1)! / K! (v(S + k) - v(S))

and ``sum_k phi_k = v(all) - v(none)`` (efficiency), equal concepts get equal shares (symmetry), and one that never
changes v gets 0 (dummy). Exact from all 2^K subsets up to :data:`EXACT` concepts. Above, the mean over random orders of
what each concept adds when it joins (Castro, Gómez and Tejada 2009), each order together with its reverse (antithetic;
Mitchell et al. 2022, JMLR 23): efficiency then holds exactly, and standard errors come from the spread over independent
pairs.

A share says nothing on how concepts act together: of two concepts of which either is enough, each gets half.

Shape letters: K concepts, M masks, P pairs of orders; "..." is the shape of one value (images, say).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from netgloss.errors import UserError
from netgloss.metrics.faithfulness.masking import Value

EXACT = 12
"""Concepts up to which all subsets are asked."""


@dataclass(frozen=True)
class Shapley:
    """Shares of the concepts.

    Attributes
    ----------
    values : (K, ...) float64. errors : (K, ...) their standard errors; 0 if exact.
    none, everything : (...) value without any and with all concepts.
    """

    values: Tensor
    errors: Tensor
    none: Tensor
    everything: Tensor


def shapley(value: Value, num_concepts: int, *, pairs: int = 64, seed: int = 0) -> Shapley:
    """Shapley values: exact for up to :data:`EXACT` concepts, else sampled.

    Parameters
    ----------
    value : masks (M, K) of zeros and ones to values (M, ...); see ``metrics/masking.py`` and ``completeness_value``.
    pairs, seed : as in :func:`sampled_shapley`.
    """
    if num_concepts <= EXACT:
        return exact_shapley(value, num_concepts)
    return sampled_shapley(value, num_concepts, pairs=pairs, seed=seed)


def exact_shapley(value: Value, num_concepts: int) -> Shapley:
    """From the values of all 2^K subsets.

    Raises
    ------
    UserError : for no concept, or more than 20 of them.
    """
    if not 1 <= num_concepts <= 20:
        raise UserError(f"exact Shapley values need 1 to 20 concepts (2^K subsets), got {num_concepts}")
    subsets = torch.arange(2**num_concepts)
    masks_MK = (subsets[:, None] >> torch.arange(num_concepts)) & 1
    sizes_M = masks_MK.sum(1)
    values = value(masks_MK.double()).double()
    weights = [1 / (num_concepts * math.comb(num_concepts - 1, size)) for size in range(num_concepts)]
    weight_of_size = torch.tensor(weights, dtype=torch.float64, device=values.device)
    shares = []
    for k in range(num_concepts):
        without = subsets[masks_MK[:, k] == 0]
        added = values[without + 2**k] - values[without]
        shares.append(torch.tensordot(weight_of_size[sizes_M[without]], added, dims=1))
    phi = torch.stack(shares)
    return Shapley(phi, torch.zeros_like(phi), values[0], values[-1])


def sampled_shapley(value: Value, num_concepts: int, *, pairs: int = 64, seed: int = 0) -> Shapley:
    """From ``pairs`` random orders and their reverses: 2 pairs (K - 1) + 2 subsets.

    Raises
    ------
    UserError : for fewer than 2 pairs (no standard error).
    """
    if pairs < 2:
        raise UserError(f"sampled Shapley values need at least 2 pairs of orders, got {pairs}")
    generator = torch.Generator().manual_seed(seed)
    none, everything = value(torch.tensor([[0.0], [1.0]]).double().expand(2, num_concepts)).double()
    mean, squares = torch.zeros(num_concepts, *none.shape).to(none), torch.zeros(num_concepts, *none.shape).to(none)
    for pair in range(1, pairs + 1):
        order = torch.randperm(num_concepts, generator=generator)
        place = order.argsort()
        size = torch.arange(1, num_concepts)[:, None]
        masks = torch.cat([place < size, num_concepts - 1 - place < size])
        forward, backward = value(masks.double()).double().split(num_concepts - 1)
        ends = [torch.cat([none[None], chain, everything[None]]).diff(dim=0) for chain in (forward, backward)]
        added = (ends[0][place] + ends[1][num_concepts - 1 - place]) / 2
        shift = added - mean
        mean = mean + shift / pair
        squares = squares + shift * (added - mean)
    return Shapley(mean, (squares / (pairs - 1) / pairs).sqrt(), none, everything)

"""Whether the atoms of a dictionary are different from one another, and random dictionaries to compare with.

Shape letters: K concepts, C features.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from netgloss.errors import UserError
from netgloss.metrics.base import DictionaryMetric


def cosines(dictionary: Tensor, other: Tensor) -> Tensor:
    """Cosine of every atom of (K, C) with every atom of (K', C): (K, K') float64; atoms of length zero get 0.

    Raises
    ------
    UserError : if a dictionary is not a finite matrix, or the two differ in C.
    """
    for atoms in (dictionary, other):
        if atoms.ndim != 2 or not atoms.isfinite().all():
            flaw = "" if atoms.isfinite().all() else " with NaN or Inf"
            raise UserError(f"expected a dictionary (K, C) of finite numbers, got shape {tuple(atoms.shape)}{flaw}")
    if dictionary.shape[1] != other.shape[1]:
        raise UserError(f"dictionaries of {dictionary.shape[1]} and {other.shape[1]} features cannot be compared")
    return (_unit(dictionary) @ _unit(other).T).clamp(-1, 1)


def _unit(atoms_KC: Tensor) -> Tensor:
    atoms_KC = atoms_KC.detach().double()
    atoms_KC = atoms_KC / atoms_KC.abs().amax(1, keepdim=True)  # squares neither overflow nor vanish
    return (atoms_KC / atoms_KC.norm(dim=1, keepdim=True)).nan_to_num(0.0)


def nearest_cosine(dictionary: Tensor) -> Tensor:
    """Largest ``|cos|`` of each atom of (K, C) to another one: (K,) float64, NaN if K = 1."""
    if len(dictionary) == 1:
        return cosines(dictionary, dictionary)[0] * math.nan
    return cosines(dictionary, dictionary).abs().fill_diagonal_(0).amax(1)


def collinearity(dictionary: Tensor) -> float:
    """Mean of :func:`nearest_cosine` over the atoms of (K, C)."""
    return float(nearest_cosine(dictionary).mean())


def random_dictionary(
    num_concepts: int,
    num_features: int,
    *,
    generator: torch.Generator,
    scale: Tensor | None = None,
    nonnegative: bool = False,
) -> Tensor:
    """A Gaussian dictionary (K, C) float64: directions without any structure, to hold others against.

    Parameters
    ----------
    scale : (C,) standard deviation of each feature in the layer, so that the random directions favour the same features
        as the layer does; default 1 (uniform directions).
    nonnegative : take absolute values. Dictionaries of one sign (NMF, cluster centres after a ReLU) point into one
        orthant, where random directions are similar as well: |cos| near 2 / pi.
    """
    atoms = torch.randn(num_concepts, num_features, generator=generator, dtype=torch.float64)
    atoms = atoms if scale is None else atoms * scale.detach().cpu().double()
    return atoms.abs() if nonnegative else atoms


class Collinearity(DictionaryMetric):
    """Mean over atoms of the largest ``|cos|`` to another atom."""

    name = "collinearity"
    higher_is_better = False
    bounds = (0.0, 1.0)
    definition = (
        "Mean over concepts of the largest |cosine| between its direction and that of another concept. "
        "0 if all are orthogonal (PCA is so by construction), 1 if each has a double. It grows with the number of "
        "concepts and cannot show whether two similar directions mean different things."
    )

    def value(self, dictionary: Tensor) -> float:
        return collinearity(dictionary)


class CollinearityMax(DictionaryMetric):
    """Largest ``|cos|`` between two atoms."""

    name = "collinearity_max"
    higher_is_better = False
    bounds = (0.0, 1.0)
    definition = (
        "Largest |cosine| between the directions of two concepts: 1 if a concept has an exact double. "
        "A single pair decides it; it cannot show how common doubles are."
    )

    def value(self, dictionary: Tensor) -> float:
        return float(nearest_cosine(dictionary).max())

"""Activations with known concepts: rows that are sums of planted directions, to see which methods find them again.

    row = codes @ dictionary + noise            (then max(0, row) if non-negative)

Which concepts a row holds is drawn first, then how strong each is (uniform in 0.5 .. 1.5, independent):

- *frequency*: concept k is in a share p_k of the rows; the p_k fall like rank^-long_tail and add up to ``active``;
- *correlation*: concepts come in groups of ``group_size`` (ranks 0, 1, ...). A concept is present where a standard
  normal number is below the p_k quantile, and the numbers of one group correlate by ``correlation`` (Gaussian copula):
  the frequencies stay what they are;
- *hierarchy*: with ``children`` = m, every 1 + m concepts are a parent and m children; a child is there only where its
  parent is, and then with probability 1/2, independently. Parents correlate as above; groups are of parents.

Directions are unit vectors: Gaussian ones, or, if non-negative, absolute Gaussians on a random quarter of the features
(parts in the sense of NMF). The order of concepts is shuffled, so that frequency says nothing about position.

Planted rows are kind to methods that assume what is planted (sums of independent sparse parts). A method that fails
here fails; one that succeeds has not shown that networks are like this.

Shape letters: N rows, K concepts, C features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from netgloss.errors import UserError

_PART = 0.25  # share of the features that a non-negative direction uses


@dataclass(frozen=True)
class PlantedConfig:
    """Options of :func:`plant`.

    Raises
    ------
    UserError : an option out of range, or options that contradict each other.
    """

    num_rows: int = 5000
    """Rows N."""
    num_features: int = 64
    """Features C."""
    num_concepts: int = 24
    """Concepts K; more than features is overcomplete."""
    active: float = 3.0
    """Mean number of concepts in a row."""
    correlation: float = 0.0
    """Correlation, 0 to below 1, of the normal numbers behind the presence of concepts of one group."""
    group_size: int = 4
    """Concepts (or parents) that go together if correlation is above 0."""
    children: int = 0
    """Concepts that appear only with their parent, for each parent; 0 is a flat dictionary."""
    noise: float = 0.0
    """Standard deviation of Gaussian noise, as a share of the root mean square of the noiseless entries."""
    long_tail: float = 0.0
    """Exponent of the fall of frequencies with rank; 0 is even, 1 is Zipf's law."""
    nonnegative: bool = True
    """Directions and rows >= 0, as after a ReLU."""
    seed: int = 0
    """Every number of another seed is another one."""

    def __post_init__(self) -> None:
        for name in ("num_rows", "num_features", "num_concepts", "group_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("children", "noise", "long_tail", "seed"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.correlation < 1:
            raise UserError(f"correlation must be at least 0 and below 1, got {self.correlation}")
        if self.num_concepts % (1 + self.children):
            raise UserError(
                f"num_concepts = {self.num_concepts} is no whole number of families of 1 + {self.children} concepts"
            )
        if not 0 < self.active < self.num_concepts:
            raise UserError(f"active must be between 0 and num_concepts = {self.num_concepts}, got {self.active}")
        highest = float(self._frequencies().max())
        if highest > 1:
            raise UserError(
                f"active = {self.active} with long_tail = {self.long_tail} and children = {self.children} would put a "
                f"concept into {highest:.0%} of the rows: lower active or long_tail, or plant more concepts"
            )

    def _frequencies(self) -> Tensor:
        """(K,) float64: families of a parent and its children, most frequent family first."""
        families = torch.arange(1, self.num_concepts // (1 + self.children) + 1, dtype=torch.float64)
        within = torch.full((1 + self.children,), 0.5, dtype=torch.float64)
        within[0] = 1
        shape = torch.outer(families**-self.long_tail, within).flatten()
        return self.active * shape / shape.sum()


@dataclass(frozen=True)
class Planted:
    """Rows and what is in them.

    Attributes
    ----------
    rows : (N, C) float32. codes : (N, K) float32 >= 0, exactly zero where a concept is absent.
    dictionary : (K, C) float32, unit rows. frequency : (K,) float64, share of rows that hold each concept, in
    expectation.
    group : (K,) long, concepts with the same number go together. parent : (K,) long, -1 for concepts without one.
    """

    rows: Tensor
    codes: Tensor
    dictionary: Tensor
    frequency: Tensor
    group: Tensor
    parent: Tensor


def plant(config: PlantedConfig, *, rows_seed: int | None = None) -> Planted:
    """Draws a dictionary, codes and rows.

    Parameters
    ----------
    rows_seed : draws other rows of the same dictionary (a held-out set); default ``config.seed``.
    """
    k, family = config.num_concepts, 1 + config.children
    fixed = torch.Generator().manual_seed(2 * config.seed)
    drawn = torch.Generator().manual_seed(2 * (config.seed if rows_seed is None else rows_seed) + 1)
    dictionary = _directions(config, fixed)
    shuffle = torch.randperm(k, generator=fixed)
    frequency = config._frequencies()
    family_of = torch.arange(k) // family
    present = _present(config, frequency[::family], drawn).repeat_interleave(family, dim=1)
    if config.children:
        kept = torch.rand(present.shape, generator=drawn) < 0.5
        kept[:, ::family] = True
        present = present & kept
    codes = (0.5 + torch.rand(config.num_rows, k, generator=drawn)) * present
    codes = codes[:, shuffle.argsort()]
    rows = codes @ dictionary
    if config.noise:
        scale = config.noise * rows.double().square().mean().sqrt().float()
        rows = rows + scale * torch.randn(rows.shape, generator=drawn)
    first = torch.arange(k) % family == 0
    parent = torch.where(first, -1, shuffle[family_of * family])
    at = shuffle.argsort()
    return Planted(
        rows=rows.clamp_min(0) if config.nonnegative else rows,
        codes=codes,
        dictionary=dictionary,
        frequency=frequency[at],
        group=(family_of // config.group_size)[at],
        parent=parent[at],
    )


def _present(config: PlantedConfig, frequency: Tensor, generator: torch.Generator) -> Tensor:
    """(N, number of families) bool by the Gaussian copula."""
    families = len(frequency)
    groups = math.ceil(families / config.group_size)
    own = torch.randn(config.num_rows, families, generator=generator, dtype=torch.float64)
    shared = torch.randn(config.num_rows, groups, generator=generator, dtype=torch.float64)
    shared = shared.repeat_interleave(config.group_size, dim=1)[:, :families]
    number = math.sqrt(config.correlation) * shared + math.sqrt(1 - config.correlation) * own
    return number < torch.special.ndtri(frequency)


def _directions(config: PlantedConfig, generator: torch.Generator) -> Tensor:
    """(K, C) unit rows."""
    directions = torch.randn(config.num_concepts, config.num_features, generator=generator)
    if config.nonnegative:
        used = torch.rand(directions.shape, generator=generator).argsort(1) < max(1, round(_PART * config.num_features))
        directions = directions.abs() * used
    return F.normalize(directions, dim=1)

"""k-means as dictionary learning: each row is replaced by the nearest of K centroids.

In the view of Fel et al. 2023 (arXiv 2306.07304, section 3) k-means is the dictionary with the sparsest codes::

    min over z, D of sum_n |x_n - z_n D|^2   with z_n one-hot
    encode(x) = one-hot of argmin_k |x - d_k|          decode(z) = z D

Up to ``max_rows`` rows: Lloyd's algorithm from ``n_init`` k-means++ starts, the best kept (scikit-learn's KMeans).
With more rows, ``mini_batch`` refines the centroids of a sample on all rows (MiniBatchKMeans, one pass); the
sample itself goes first, so that the order of the rows, often sorted by class, does not drag the centroids along.

``encode`` is piecewise constant: its gradient is zero everywhere, so it carries no gradient. ``decode`` is linear.
Soft assignments are left out.

Shape letters: C features, N rows, K concepts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from netgloss.errors import UserError
from netgloss.explainers.base import ExplainerConfig, Rows
from netgloss.explainers.rows import LinearExplainer, sklearn_seed


@dataclass(frozen=True)
class KMeansConfig(ExplainerConfig):
    """Options of :class:`KMeans`."""

    max_rows: int = 50_000
    """Rows in the exact fit; with more rows the fit starts from a random sample of so many."""
    mini_batch: bool = True
    """With more rows than max_rows: refine on all rows in mini-batches (else: stop at the sample)."""
    n_init: int = 3
    """Number of k-means++ starts, of which the best is kept."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_init < 1:
            raise UserError(f"n_init must be at least 1, got {self.n_init}")


class KMeans(LinearExplainer):
    """One-hot nearest centroid (module docstring).

    Raises
    ------
    UserError : more concepts than rows; NaN or Inf among the rows.
    """

    Config = KMeansConfig
    config: KMeansConfig

    def fit_rows(self, rows: Rows, *, seed: int) -> None:
        from sklearn import cluster

        self._start(rows, self.config.max_rows, at_least=self.num_concepts)
        sample = self._sample(rows, self.config.max_rows, seed=seed)
        state = sklearn_seed(seed)
        kmeans = cluster.KMeans(self.num_concepts, n_init=self.config.n_init, random_state=state)
        with self._warnings_as_notes():
            centroids = kmeans.fit(sample.numpy()).cluster_centers_
        if len(sample) < rows.num_rows and self.config.mini_batch:
            refined = cluster.MiniBatchKMeans(
                self.num_concepts, init=centroids, n_init=1, reassignment_ratio=0, random_state=state
            )
            refined.partial_fit(sample.numpy())  # moves no centroid, but weighs each by its rows
            for batch in self._batches(rows, max(4096, self.num_concepts)):
                refined.partial_fit(batch.numpy())
            centroids = refined.cluster_centers_
            self.notes.append(f"then refined on all {rows.num_rows:,} rows in mini-batches")
        self.atoms.copy_(torch.from_numpy(centroids))

    @torch.no_grad()
    def encode_rows(self, rows: Tensor) -> Tensor:
        """Rows (N, C) -> one-hot codes (N, K); no gradient; a tie goes to the lower index."""
        centre = self.atoms.mean(0)
        atoms = self.atoms - centre
        closeness = torch.addmm(-0.5 * atoms.square().sum(1), rows.to(atoms.dtype) - centre, atoms.T)
        return torch.nn.functional.one_hot(closeness.argmax(1), self.num_concepts).to(atoms.dtype)

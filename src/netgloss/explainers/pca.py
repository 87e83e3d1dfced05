"""Principal components of a layer's rows: the orthogonal directions of largest variance.

With rows x, mean m and covariance S = E[(x - m)(x - m)^T], the components are the leading eigenvectors of S::

    S v_k = lambda_k v_k,  V = [v_1 .. v_K]^T,  V V^T = I,  lambda_1 >= lambda_2 >= ...
    encode(x) = (x - m) V^T          decode(z) = z V + m

Of all linear codes of K numbers these lose the least squared error (Eckart and Young 1936), which makes PCA the upper
bound of R2 for linear explainers. An eigenvector has no sign; here the third moment of each score is >= 0, so that a
concept's rare, strong side is positive. Whitening is left out: it changes the codes' scale, not the directions.

Up to ``max_rows`` rows the fit is scikit-learn's PCA in float64, in memory. Above, one pass over the rows sums up their
covariance (C, C) in float64, whose eigenvectors are the same components: exact as well, at any number of rows.
scikit-learn's IncrementalPCA is not used: truncated between batches it lost the last of 32 components (73,500 rows of
MobileNetV2 features.18, sorted by class; cosine 0.03), and without truncation it took ten times as long.

Shape letters: C features, N rows, K concepts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from netgloss.explainers.base import ExplainerConfig, LayerSpec, Rows
from netgloss.explainers.rows import LinearExplainer, principal_components, third_moment_signs


@dataclass(frozen=True)
class PCAConfig(ExplainerConfig):
    """Options of :class:`PCA`."""

    max_rows: int = 100_000
    """Up to so many rows the fit is in memory (100,000 x 1280: 1.5 GB); above, the rows are streamed."""


class PCA(LinearExplainer):
    """Principal components (module docstring). ``encode`` and ``decode`` are linear and differentiable.

    Raises
    ------
    UserError : more concepts than features or rows; fewer than two rows; NaN or Inf among the rows.
    """

    Config = PCAConfig
    deterministic = True
    config: PCAConfig

    def __init__(self, config: PCAConfig, spec: LayerSpec) -> None:
        super().__init__(config, spec)
        self._limit_concepts(spec.num_features)

    def fit_rows(self, rows: Rows, *, seed: int) -> None:
        """The whole fit; ``seed`` changes nothing."""
        self._start(rows, self.config.max_rows, at_least=max(2, self.num_concepts))
        chunks: Iterator[Tensor]
        if rows.num_rows <= self.config.max_rows:
            sample = self._sample(rows, self.config.max_rows, seed=0)
            mean, components, variance = principal_components(sample, self.num_concepts)
            chunks = iter(sample.split(8192))
        else:
            mean, components, variance = self._streamed(rows)
            chunks = rows.chunks()
        empty = int((variance <= 1e-12 * variance[0]).sum())
        if empty:
            self.notes.append(f"{empty} of {self.num_concepts} components have no variance: the rows have a lower rank")
        self.atoms.copy_(components * third_moment_signs(chunks, mean, components)[:, None])
        self.offset.copy_(mean)

    def _streamed(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """Mean (C,), components (K, C) and variances (K,), float64, from one pass over the rows."""
        features = rows.num_features
        total, products, origin = torch.zeros(features).double(), torch.zeros(features, features).double(), None
        for chunk in rows.chunks():
            shifted = self._finite(chunk.cpu()).double()
            origin = shifted.mean(0) if origin is None else origin
            shifted -= origin
            total += shifted.sum(0)
            products.addmm_(shifted.T, shifted)
        assert origin is not None
        centre = total / rows.num_rows
        covariance = (products - rows.num_rows * torch.outer(centre, centre)) / (rows.num_rows - 1)
        variance, vectors = torch.linalg.eigh(covariance)
        largest = slice(-self.num_concepts, None)
        return origin + centre, vectors[:, largest].T.flip(0), variance[largest].flip(0)

    def encode_rows(self, rows: Tensor) -> Tensor:
        """Rows (N, C) -> scores (N, K)."""
        return (rows.to(self.atoms.dtype) - self.offset) @ self.atoms.T

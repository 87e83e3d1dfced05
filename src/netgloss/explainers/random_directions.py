"""Control: random directions, with the best linear codes for them.

D (K, C) has random orthonormal rows, uniform in the sense of Haar (the QR decomposition of a Gaussian matrix with the
signs of R's diagonal taken out: Mezzadri 2007); with more concepts than features its rows are Gaussian, of unit
length. With the mean m of the rows::

    encode(x) = (x - m) D^+          decode(z) = z D + m

D^+ is the pseudo-inverse, so the codes are the least-squares codes (of least norm when K > C): nothing in this control
is worse than it must be. A score that it reaches says nothing about concepts. Which D is drawn depends on the seed
only.

Shape letters: C features, N rows, K concepts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from netgloss.explainers.base import ExplainerConfig, LayerSpec, Rows
from netgloss.explainers.rows import LinearExplainer, feature_moments


class RandomDirections(LinearExplainer):
    """Random directions (module docstring). ``encode`` and ``decode`` are linear and differentiable.

    Raises
    ------
    UserError : no rows; NaN or Inf among them.
    """

    filters: Tensor

    def __init__(self, config: ExplainerConfig, spec: LayerSpec) -> None:
        super().__init__(config, spec)
        self.register_buffer("filters", torch.zeros_like(self.atoms))

    def fit_rows(self, rows: Rows, *, seed: int) -> None:
        self._start(rows, at_least=1)
        _, mean, _ = feature_moments(map(self._finite, rows.chunks()))
        generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(*self.atoms.shape, generator=generator, dtype=torch.float64)
        if self.num_concepts <= self.spec.num_features:
            q, r = torch.linalg.qr(directions.T)
            directions = (q * r.diagonal().sign()).T
            filters = directions
        else:
            directions = torch.nn.functional.normalize(directions, dim=1)
            filters = torch.linalg.pinv(directions).T
        self.atoms.copy_(directions)
        self.filters.copy_(filters)
        self.offset.copy_(mean)

    def encode_rows(self, rows: Tensor) -> Tensor:
        """Rows (N, C) -> least-squares codes (N, K)."""
        return (rows.to(self.atoms.dtype) - self.offset) @ self.filters.T

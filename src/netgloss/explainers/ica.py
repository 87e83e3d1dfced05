"""Independent components of a layer's rows: directions whose scores are as independent (as little Gaussian) as they
can be.

FastICA (Hyvarinen and Oja 2000) in the K leading principal directions. With P the whitening of those (K x C, unit
variance) and R a rotation (K x K)::

    s = R P (x - m),   R maximises sum_k |E[G(s_k)] - E[G(gauss)]|,  G(s) = log cosh s
    encode(x) = (x - m) F^T,  F = R P          decode(s) = s M + m,  M = R P^+^T

The sources have unit variance (``whiten="unit-variance"``) and, since an independent component has no sign, a third
moment >= 0 (sparse concepts point at their rare, strong side). The decoder inverts the encoder on the span of the K
principal directions, so the reconstruction of ICA equals that of PCA with the same K: the two differ in the axes only.

Left out: other contrasts than log cosh, and deflation (one component at a time), which piles up errors. There is no
mini-batch FastICA in scikit-learn: above ``max_rows`` rows a random sample is used.

Shape letters: C features, N rows, K concepts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from netgloss.errors import UserError
from netgloss.explainers.base import ExplainerConfig, LayerSpec, Rows
from netgloss.explainers.rows import LinearExplainer, principal_components, sklearn_seed, third_moment_signs


@dataclass(frozen=True)
class ICAConfig(ExplainerConfig):
    """Options of :class:`ICA`."""

    max_rows: int = 30_000
    """Rows in the fit; above, a random sample of so many."""
    max_iter: int = 500
    """Most iterations of FastICA."""
    tol: float = 1e-4
    """FastICA stops when no direction turns by more than this (1 - |cosine|)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_iter < 1 or not self.tol > 0:
            raise UserError(f"max_iter must be at least 1 and tol positive, got {self.max_iter} and {self.tol}")


class ICA(LinearExplainer):
    """Independent components (module docstring). ``encode`` and ``decode`` are linear and differentiable.

    Raises
    ------
    UserError : more concepts than features, than rows - 1 or than the rank of the rows; NaN or Inf among the rows.
    """

    Config = ICAConfig
    config: ICAConfig
    filters: Tensor

    def __init__(self, config: ICAConfig, spec: LayerSpec) -> None:
        super().__init__(config, spec)
        self._limit_concepts(spec.num_features)
        self.register_buffer("filters", torch.zeros_like(self.atoms))

    def fit_rows(self, rows: Rows, *, seed: int) -> None:
        from sklearn.decomposition import FastICA

        self._start(rows, self.config.max_rows, at_least=self.num_concepts + 1)
        sample = self._sample(rows, self.config.max_rows, seed=seed)
        mean, components, variance = principal_components(sample, self.num_concepts)
        rank = int((variance > 1e-12 * variance[0]).sum())
        if rank < self.num_concepts:
            raise UserError(
                f"ICA needs activations of rank num_concepts = {self.num_concepts}, but the {len(sample)} rows of "
                f"layer {self.spec.name!r} have rank {rank}; use num_concepts <= {rank}"
                if rank
                else f"ICA has nothing to fit: all {len(sample)} rows of layer {self.spec.name!r} are equal"
            )
        scores = (sample.double() - mean) @ components.T
        ica = FastICA(
            whiten="unit-variance",
            whiten_solver="eigh",
            max_iter=self.config.max_iter,
            tol=self.config.tol,
            random_state=sklearn_seed(seed),
        )
        with self._warnings_as_notes():
            ica.fit(scores.numpy())
        filters = torch.from_numpy(ica.components_) @ components
        signs = third_moment_signs(sample.split(8192), mean, filters)[:, None]
        self.filters.copy_(filters * signs)
        self.atoms.copy_(torch.from_numpy(ica.mixing_).T @ components * signs)
        self.offset.copy_(mean)

    def encode_rows(self, rows: Tensor) -> Tensor:
        """Rows (N, C) -> sources (N, K), of unit variance over the training rows."""
        return (rows.to(self.atoms.dtype) - self.offset) @ self.filters.T

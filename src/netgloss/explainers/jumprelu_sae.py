"""JumpReLU sparse autoencoder: each atom has a threshold of its own, and the number in use is trained directly.

Rajamanoharan et al. 2024 (arXiv 2407.14435). With H the unit step and rect the indicator of [-1/2, 1/2]::

    a  = (y - b) W_enc^T + b_enc                         y, b, W_dec and scaling back: ``sparse_autoencoder.py``
    z  = a H(a - t),    t = exp(log_threshold)           encode (the JumpReLU)
    L0 = mean over rows of sum_k H(a_k - t_k)

    reconstruction = mean (y^ - y)^2
    sparsity       = l0_weight (L0 / target_l0 - 1)^2    (the paper's variant that aims at a given L0)
                   = l0_weight L0 / K                    with target_l0 = 0

H has no useful gradient. Straight-through estimators replace it, of the gradient of the *expected* loss (a kernel
density
estimate of how many rows lie at a threshold), with bandwidth e::

    d z / d t = -(t / e) rect((a - t) / e),     d H(a - t) / d t = -(1 / e) rect((a - t) / e),     d z / d a = H(a - t)

The paper's e = 0.001 is for rows of unit length; here y has C times the squared length, and e its units. Ours: the
thresholds start where ``target_l0`` atoms a row are in use at the start (quantiles over a sample of rows) instead of at
0.001. Left out: the warm-up of the weight (no need with that start), Adam without momentum, resampling of dead atoms
(there is none in the paper either).

Shape letters: C features, N rows, K concepts, M triples (``_sae.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from netgloss.errors import UserError
from netgloss.explainers.base import Batch, LayerSpec, Rows, TrainingConfig
from netgloss.explainers.sparse_autoencoder import SparseAutoencoder, read, write

_START_ROWS = 8192
_SMALLEST = 1e-3


@dataclass(frozen=True)
class JumpReLUSAEConfig(TrainingConfig):
    """Options of :class:`JumpReLUSAE`."""

    num_concepts: int = 256
    """Number of atoms K; may exceed the number of features."""
    target_l0: float = 16.0
    """Atoms that a row should use on average; 0: no aim, the number itself is penalised."""
    l0_weight: float = 1.0
    """Weight of the sparsity loss."""
    bandwidth: float = 0.1
    """Width e of the window around a threshold whose rows move it, in units of the scaled rows."""
    dead_steps: int = 100
    """An atom that no row has used for so many steps is counted as dead in the history."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.target_l0 <= self.num_concepts:
            raise UserError(f"target_l0 must be in 0 .. num_concepts = {self.num_concepts}, got {self.target_l0}")
        if not self.l0_weight >= 0:
            raise UserError(f"l0_weight must not be negative, got {self.l0_weight}")
        if not self.bandwidth > 0:
            raise UserError(f"bandwidth must be positive, got {self.bandwidth}")
        if self.dead_steps < 1:
            raise UserError(f"dead_steps must be at least 1, got {self.dead_steps}")


class JumpReLUSAE(SparseAutoencoder):
    """JumpReLU sparse autoencoder (module docstring). ``encode`` passes gradients to the atoms in use.

    Attributes
    ----------
    log_threshold : parameter (K,), log t.

    Raises
    ------
    UserError : all rows are equal; NaN or Inf among them; ``target_l0`` above ``num_concepts``.
    """

    Config = JumpReLUSAEConfig
    config: JumpReLUSAEConfig

    def __init__(self, config: JumpReLUSAEConfig, spec: LayerSpec) -> None:
        super().__init__(config, spec)
        self.log_threshold = nn.Parameter(torch.zeros(config.num_concepts))

    @torch.no_grad()
    def fit_rows(self, rows: Rows, *, seed: int) -> None:
        """Mean and scale, random unit atoms, and thresholds that ``target_l0`` atoms a row pass."""
        super().fit_rows(rows, seed=seed)
        before_NK = self._before(self._scaled(rows.sample(_START_ROWS, seed=seed).to(self.mean)))
        passing = (self.config.target_l0 or self.num_concepts) / self.num_concepts
        start = before_NK.quantile(1 - passing, dim=0).clamp(min=_SMALLEST)
        self.log_threshold.copy_(start.log())

    def encode_rows(self, rows: Tensor) -> Tensor:
        """Rows (N, C) -> codes (N, K) >= 0, those above their thresholds."""
        before = self._before(self._scaled(rows))
        return torch.where(before > self.log_threshold.exp(), before, 0)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """``reconstruction`` and ``sparsity`` (module docstring) of rows (N, C)."""
        scaled_NC = self._scaled(batch.activation)
        values_M, triples = read(scaled_NC, self.encoder, self._at_zero(), self._near_or_above)
        threshold_M = self.log_threshold.exp()[triples.atom]
        codes_M, active_M = _Jump.apply(values_M, threshold_M, self.config.bandwidth)
        error_NC = scaled_NC - self.bias - write(codes_M, F.normalize(self.decoder, dim=1), triples)
        self._count(triples.atom[active_M.detach() > 0])
        l0 = active_M.sum() / len(scaled_NC)
        aim = self.config.target_l0
        sparsity = (l0 / aim - 1).square() if aim else l0 / self.num_concepts
        return {"reconstruction": error_NC.square().mean(), "sparsity": self.config.l0_weight * sparsity}

    def _near_or_above(self, before: Tensor) -> tuple[Tensor, Tensor]:
        """Atoms in use, and those within half a bandwidth below their thresholds: no others have a gradient."""
        row, atom = (before > self.log_threshold.exp() - self.config.bandwidth / 2).nonzero(as_tuple=True)
        return row, atom


class _Jump(torch.autograd.Function):
    """Codes and whether they are in use (both (M,)), with the straight-through estimators for the threshold."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, threshold: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
        active = (values > threshold).to(values.dtype)
        ctx.save_for_backward(values, threshold, active)
        ctx.bandwidth = bandwidth
        return values * active, active

    @staticmethod
    def backward(ctx: Any, of_codes: Tensor, of_active: Tensor) -> tuple[Tensor | None, ...]:
        values, threshold, active = ctx.saved_tensors
        near = ((values - threshold).abs() <= ctx.bandwidth / 2).to(values.dtype) / ctx.bandwidth
        return of_codes * active, -near * (threshold * of_codes + of_active), None

"""TopK sparse autoencoder: an overcomplete dictionary of which each row may use k atoms.

Gao et al. 2024 (arXiv 2406.04093, sections 2 and A). Rows are brought to one scale first, with the mean m of the rows
and one number s, the root mean square of x - m over rows and features, so that the learning rate does not depend on
the layer::

    y  = (x - m) / s
    z  = TopK(ReLU((y - b) W_enc^T + b_enc))            encode
    y^ = z W_dec + b,   x^ = s y^ + m                    decode (affine in z; dictionary = s W_dec)

    reconstruction = mean (y^ - y)^2                     = share of the variance that is lost (FVU), as mean y^2 = 1
    auxk = aux_weight * mean (e^ - e)^2 / mean e^2,      e = y - y^ (a constant here),  e^ = z_dead W_dec

where z_dead holds the ``aux_k`` largest activations of the dead atoms, those that no row has used for ``dead_steps``
steps: the residual is what they can still learn. W_dec has unit rows: the loss reads W_dec / |W_dec|, so that the
gradient has no part along a row (the paper's projection), and each step ends with a renormalisation. W_enc starts as
W_dec (tied).

Left out: the geometric median as the start of b (the mean makes the loss an FVU), the scaling laws, gradient clipping,
the running average of the weights, Multi-TopK, and the GPU kernels; atoms are gathered by ``embedding_bag``, which
touches k rows of W_dec instead of K, forward and backward.

Shape letters: C features, N rows, K concepts, D dead concepts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from netgloss.errors import UserError
from netgloss.explainers._rows import RowsExplainer, feature_moments
from netgloss.explainers.base import Batch, LayerSpec, Rows, TrainingConfig


@dataclass(frozen=True)
class TopKSAEConfig(TrainingConfig):
    """Options of :class:`TopKSAE`."""

    num_concepts: int = 256
    """Number of atoms K; may exceed the number of features."""
    top_k: int = 16
    """Atoms that one row may use."""
    aux_k: int | None = None
    """Dead atoms that explain the residual of one row; default half the number of features."""
    aux_weight: float = 1 / 32
    """Weight of the loss that revives dead atoms; 0 turns it off."""
    dead_steps: int = 100
    """An atom that no row has used for so many steps is dead."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.top_k <= self.num_concepts:
            raise UserError(f"top_k must be in 1 .. num_concepts = {self.num_concepts}, got {self.top_k}")
        if self.aux_k is not None and self.aux_k < 1:
            raise UserError(f"aux_k must be at least 1, got {self.aux_k} (aux_weight = 0 turns the loss off)")
        if not self.aux_weight >= 0:
            raise UserError(f"aux_weight must not be negative, got {self.aux_weight}")
        if self.dead_steps < 1:
            raise UserError(f"dead_steps must be at least 1, got {self.dead_steps}")


class TopKSAE(RowsExplainer):
    """TopK sparse autoencoder (module docstring). ``encode`` passes gradients to the chosen atoms.

    Attributes
    ----------
    encoder, decoder : parameters (K, C); ``decoder`` has unit rows after every step.
    encoder_bias : parameter (K,).
    bias : parameter (C,), the b of the equations, in units of ``scale``.
    mean, scale : buffers (C,) and (), the m and s of the equations.
    silent_steps : buffer (K,), steps since any row used an atom.

    Raises
    ------
    UserError : all rows are equal; NaN or Inf among them; ``top_k`` above ``num_concepts``.
    """

    Config = TopKSAEConfig
    learned = True
    config: TopKSAEConfig
    mean: Tensor
    scale: Tensor
    silent_steps: Tensor

    def __init__(self, config: TopKSAEConfig, spec: LayerSpec) -> None:
        super().__init__(config, spec)
        shape = (config.num_concepts, spec.num_features)
        self.encoder = nn.Parameter(torch.zeros(shape))
        self.decoder = nn.Parameter(torch.zeros(shape))
        self.encoder_bias = nn.Parameter(torch.zeros(shape[0]))
        self.bias = nn.Parameter(torch.zeros(shape[1]))
        self.register_buffer("mean", torch.zeros(shape[1]))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("silent_steps", torch.zeros(shape[0], dtype=torch.long))

    @property
    def dictionary(self) -> Tensor:
        """(K, C): ``s W_dec``."""
        return self.scale * F.normalize(self.decoder, dim=1)

    @torch.no_grad()
    def fit_rows(self, rows: Rows, *, seed: int) -> None:
        """Mean and scale of the rows, and random unit atoms; one pass."""
        self._start(rows, at_least=1)
        _, mean, variance = feature_moments(map(self._finite, rows.chunks()))
        if not variance.mean() > 0:
            raise UserError(
                f"TopKSAE has nothing to learn: all {rows.num_rows} rows of layer {self.spec.name!r} are equal"
            )
        self.mean.copy_(mean)
        self.scale.copy_(variance.mean().sqrt())
        atoms = torch.randn(self.decoder.shape, generator=torch.Generator().manual_seed(seed))
        self.decoder.copy_(F.normalize(atoms, dim=1))
        self.encoder.copy_(self.decoder)
        for zeroed in (self.encoder_bias, self.bias, self.silent_steps):
            zeroed.zero_()

    def encode_rows(self, rows: Tensor) -> Tensor:
        """Rows (N, C) -> codes (N, K) >= 0, at most ``top_k`` of a row above zero."""
        values, index, before = self._top(self._scaled(rows))
        return torch.zeros_like(before).scatter(1, index, values)

    def decode_rows(self, codes: Tensor) -> Tensor:
        """Codes (N, K) -> rows (N, C); affine and differentiable."""
        return torch.addmm(self.mean + self.scale * self.bias, codes.to(self.decoder.dtype), self.dictionary)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """``reconstruction`` and ``auxk`` (module docstring) of rows (N, C); counts which atoms were used."""
        scaled_NC = self._scaled(batch.activation)
        values, index, before_NK = self._top(scaled_NC)
        atoms_KC = F.normalize(self.decoder, dim=1)
        error_NC = scaled_NC - self.bias - _combine(values, index, atoms_KC)
        dead_D = (self.silent_steps >= self.config.dead_steps).nonzero().squeeze(1)
        self._count(values.detach(), index)
        auxiliary = error_NC.new_zeros(())
        if len(dead_D) and self.config.aux_weight:
            target_NC = error_NC.detach()
            aux_k = min(len(dead_D), self.config.aux_k or max(1, self.spec.num_features // 2))
            aux_values, aux_index = before_NK[:, dead_D].topk(aux_k, dim=1, sorted=False)
            guess_NC = _combine(aux_values.relu(), aux_index, atoms_KC[dead_D])
            lost = F.mse_loss(guess_NC, target_NC) / target_NC.square().mean().clamp(min=1e-12)
            auxiliary = self.config.aux_weight * lost
        return {"reconstruction": error_NC.square().mean(), "auxk": auxiliary}

    def optimizer(self) -> torch.optim.Optimizer:
        """Adam with the paper's epsilon: rare atoms have small gradients."""
        return torch.optim.Adam(self.parameters(), lr=self.config.lr, eps=6.25e-10, fused=True)

    @torch.no_grad()
    def after_step(self, step: int) -> dict[str, float]:
        """Unit atoms again; returns the share of dead ones."""
        self.decoder.copy_(F.normalize(self.decoder, dim=1))
        return {"dead_share": float((self.silent_steps >= self.config.dead_steps).float().mean())}

    def _scaled(self, rows: Tensor) -> Tensor:
        """The y (N, C) of rows (N, C)."""
        return (rows.to(self.mean.dtype) - self.mean) / self.scale

    def _top(self, scaled: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Values (N, top_k) >= 0 and indices of the strongest atoms; activations (N, K) before TopK and ReLU."""
        at_zero_K = self.encoder_bias - self.encoder @ self.bias  # b here, not in y: no (N, C) gradient for its sake
        before = torch.addmm(at_zero_K, scaled, self.encoder.T)
        values, index = before.topk(self.config.top_k, dim=1, sorted=False)
        return values.relu(), index, before

    def _count(self, values: Tensor, index: Tensor) -> None:
        """One more step, in which the atoms with a value above zero were used."""
        self.silent_steps += 1
        self.silent_steps[index[values > 0]] = 0


def _combine(values: Tensor, index: Tensor, atoms: Tensor) -> Tensor:
    """``sum_j values[n, j] atoms[index[n, j]]``, (N, C), from values and indices (N, k) and atoms (., C)."""
    return F.embedding_bag(index, atoms, per_sample_weights=values.to(atoms.dtype), mode="sum")

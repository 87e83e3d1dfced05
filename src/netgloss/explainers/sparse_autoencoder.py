"""What the sparse autoencoders share: one scale for all rows, unit atoms, dead atoms, and sparse gradients.

    y  = (x - m) / s                   m, s: mean of the rows, root mean square of x - m over rows and features
    y^ = z W_dec + b,   x^ = s y^ + m  decode (affine in z; dictionary = s W_dec)

W_dec has unit rows: losses read W_dec / |W_dec|, so that the gradient has no part along a row, and each step ends with
a renormalisation. W_enc starts as W_dec.

Once the codes of a batch are known as triples (row, atom, value), the sparse matrix Z (N, K) of them is a factor of
every product that is left: of the decoding ``Z W_dec`` and of the exact gradients ``Z^T dE`` of the decoder and ``dZ^T
y`` of the encoder (Gao et al. 2024, appendix D, do the same in GPU kernels). So one dense product a step is left, the
``y W_enc^T`` that finds the triples, instead of five. Sums over triples are ``embedding_bag``, which gathers; for the
two gradients the triples are sorted by atom, once per step.

Private to ``explainers/``.

Shape letters: C features, N rows, K concepts, D dead concepts, M triples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from netgloss.errors import UserError
from netgloss.explainers.base import LayerSpec, Rows, TrainingConfig
from netgloss.explainers.rows import RowsExplainer, feature_moments


class SparseAutoencoder(RowsExplainer):
    """Linear encoder and decoder (module docstring); a method adds its activation and its losses.

    Attributes
    ----------
    encoder, decoder : parameters (K, C); ``decoder`` has unit rows after every step.
    encoder_bias : parameter (K,).
    bias : parameter (C,), the b of the equations, in units of ``scale``.
    mean, scale : buffers (C,) and (), the m and s of the equations.
    silent_steps : buffer (K,), steps since any row used an atom.
    """

    learned = True
    mean: Tensor
    scale: Tensor
    silent_steps: Tensor

    def __init__(self, config: TrainingConfig, spec: LayerSpec) -> None:
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
                f"{type(self).__name__} has nothing to learn: all {rows.num_rows} rows of layer {self.spec.name!r} "
                "are equal"
            )
        self.mean.copy_(mean)
        self.scale.copy_(variance.mean().sqrt())
        atoms = torch.randn(self.decoder.shape, generator=torch.Generator().manual_seed(seed))
        self.decoder.copy_(F.normalize(atoms, dim=1))
        self.encoder.copy_(self.decoder)
        for zeroed in (self.encoder_bias, self.bias, self.silent_steps):
            zeroed.zero_()

    def decode_rows(self, codes: Tensor) -> Tensor:
        """Codes (N, K) -> rows (N, C); affine and differentiable."""
        return torch.addmm(self.mean + self.scale * self.bias, codes.to(self.decoder.dtype), self.dictionary)

    def optimizer(self) -> torch.optim.Optimizer:
        """Adam with the epsilon of Gao et al.: rare atoms have small gradients."""
        assert isinstance(self.config, TrainingConfig)
        return torch.optim.Adam(self.parameters(), lr=self.config.lr, eps=6.25e-10, fused=True)

    @torch.no_grad()
    def after_step(self, step: int) -> dict[str, float]:
        """Unit atoms again; returns the share of dead ones."""
        self.decoder.copy_(F.normalize(self.decoder, dim=1))
        return {"dead_share": float(self._dead().float().mean())}

    def _dead(self) -> Tensor:
        """(K,) bool: atoms that no row has used for ``dead_steps`` steps."""
        return self.silent_steps >= self.config.dead_steps  # type: ignore[attr-defined]

    def _scaled(self, rows: Tensor) -> Tensor:
        """The y (N, C) of rows (N, C)."""
        return (rows.to(self.mean.dtype) - self.mean) / self.scale

    def _at_zero(self) -> Tensor:
        """(K,) what the encoder adds to ``y W_enc^T``: b counts here, not in y, which then needs no gradient."""
        return self.encoder_bias - self.encoder @ self.bias

    def _before(self, scaled: Tensor) -> Tensor:
        """Activations (N, K) before any non-linearity."""
        return torch.addmm(self._at_zero(), scaled, self.encoder.T)

    def _count(self, used: Tensor) -> None:
        """One more step, in which the atoms in ``used`` (any shape of indices) were used."""
        self.silent_steps += 1
        self.silent_steps[used] = 0

    def _auxiliary(
        self, scaled: Tensor, error: Tensor, dead: Tensor, atoms: Tensor, *, aux_k: int | None, weight: float
    ) -> Tensor:
        """The loss that revives dead atoms: what the ``aux_k`` strongest of each row (default half the features) could
        explain of the residual (N, C), a constant here; ``()``.
        """
        if not len(dead) or not weight:
            return error.new_zeros(())
        target_NC = error.detach()
        before_ND = torch.addmm(self._at_zero()[dead], scaled, self.encoder[dead].T)
        count = min(len(dead), aux_k or max(1, self.spec.num_features // 2))
        values, index = before_ND.topk(count, dim=1, sorted=False)
        guess_NC = F.embedding_bag(index, atoms[dead], per_sample_weights=values.relu().to(atoms.dtype), mode="sum")
        lost = F.mse_loss(guess_NC, target_NC) / target_NC.square().mean().clamp(min=1e-12)
        return weight * lost


@dataclass
class Triples:
    """Which atoms a batch uses: ``row`` (M,), ascending, and ``atom`` (M,), of N rows and K atoms."""

    row: Tensor
    atom: Tensor
    num_rows: int
    num_atoms: int

    @cached_property
    def row_starts(self) -> Tensor:
        """(N,) place of each row's first triple."""
        return _starts(self.row, self.num_rows)

    @cached_property
    def by_atom(self) -> tuple[Tensor, Tensor]:
        """Order (M,) of the triples by atom, and the place (K,) of each atom's first one in it."""
        atom, order = self.atom.sort(stable=True)
        return order, _starts(atom, self.num_atoms)

    def over_atoms(self, weights: Tensor, rows: Tensor) -> Tensor:
        """``sum over triples of atom k of weight * rows[row]``: (K, C) of weights (M,) and rows (N, C)."""
        order, starts = self.by_atom
        return F.embedding_bag(self.row[order], rows, starts, per_sample_weights=weights[order], mode="sum")

    def over_rows(self, weights: Tensor, atoms: Tensor) -> Tensor:
        """``sum over triples of row n of weight * atoms[atom]``: (N, C) of weights (M,) and atoms (K, C)."""
        return F.embedding_bag(self.atom, atoms, self.row_starts, per_sample_weights=weights, mode="sum")


def _starts(sorted_index: Tensor, count: int) -> Tensor:
    sizes = torch.bincount(sorted_index, minlength=count)
    return sizes.cumsum(0) - sizes


Select = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Activations (N, K) before any non-linearity to the triples' ``row`` (M,), ascending, and ``atom`` (M,)."""


def read(scaled: Tensor, encoder: Tensor, at_zero: Tensor, select: Select) -> tuple[Tensor, Triples]:
    """``(y W_enc^T + at_zero)`` at the triples that ``select`` picks from it: values (M,), and the triples.

    Differentiable in ``encoder`` (K, C) and ``at_zero`` (K,), at the cost of the triples.
    """
    with torch.no_grad():
        before_NK = torch.addmm(at_zero, scaled, encoder.T)
        triples = Triples(*select(before_NK), *before_NK.shape)
        values_M = before_NK[triples.row, triples.atom]
    return _Read.apply(encoder, at_zero, values_M, scaled, triples), triples


def write(values: Tensor, atoms: Tensor, triples: Triples) -> Tensor:
    """``Z atoms`` (N, C) of the values (M,) of triples and atoms (K, C); differentiable in both."""
    return _Write.apply(values.to(atoms.dtype), atoms, triples)


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, encoder: Tensor, at_zero: Tensor, values: Tensor, scaled: Tensor, triples: Triples) -> Tensor:
        ctx.save_for_backward(scaled)
        ctx.triples, ctx.kind = triples, at_zero.dtype
        return values.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (scaled,) = ctx.saved_tensors
        triples, gradient = ctx.triples, gradient.to(scaled.dtype)
        encoder = triples.over_atoms(gradient, scaled)
        at_zero = gradient.new_zeros(triples.num_atoms).index_add_(0, triples.atom, gradient)
        return encoder, at_zero.to(ctx.kind), None, None, None


class _Write(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, atoms: Tensor, triples: Triples) -> Tensor:
        ctx.save_for_backward(values, atoms)
        ctx.triples = triples
        return triples.over_rows(values, atoms)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        values, atoms = ctx.saved_tensors
        triples, gradient = ctx.triples, gradient.to(atoms.dtype).contiguous()
        with torch.enable_grad():
            weights = values.detach().requires_grad_()
            (of_values,) = torch.autograd.grad(triples.over_rows(weights, atoms.detach()), weights, gradient)
        return of_values, triples.over_atoms(values, gradient), None

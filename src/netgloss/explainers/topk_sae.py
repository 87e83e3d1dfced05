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
the running average of the weights, Multi-TopK, and the GPU kernels; gradients are sparse all the same (``_sae.py``).

Shape letters: C features, N rows, K concepts, D dead concepts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from netgloss.errors import UserError
from netgloss.explainers.base import Batch, TrainingConfig
from netgloss.explainers.sparse_autoencoder import SparseAutoencoder, read, write


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


class TopKSAE(SparseAutoencoder):
    """TopK sparse autoencoder (module docstring). ``encode`` passes gradients to the chosen atoms.

    Raises
    ------
    UserError : all rows are equal; NaN or Inf among them; ``top_k`` above ``num_concepts``.
    """

    Config = TopKSAEConfig
    config: TopKSAEConfig

    def encode_rows(self, rows: Tensor) -> Tensor:
        """Rows (N, C) -> codes (N, K) >= 0, at most ``top_k`` of a row above zero."""
        before = self._before(self._scaled(rows))
        values, index = before.topk(self.config.top_k, dim=1, sorted=False)
        return torch.zeros_like(before).scatter(1, index, values.relu())

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """``reconstruction`` and ``auxk`` (module docstring) of rows (N, C); counts which atoms were used."""
        scaled_NC = self._scaled(batch.activation)
        values_M, triples = read(scaled_NC, self.encoder, self._at_zero(), self._strongest)
        atoms_KC = F.normalize(self.decoder, dim=1)
        error_NC = scaled_NC - self.bias - write(values_M.relu(), atoms_KC, triples)
        dead_D = self._dead().nonzero().squeeze(1)
        self._count(triples.atom[values_M.detach() > 0])
        auxiliary = self._auxiliary(
            scaled_NC, error_NC, dead_D, atoms_KC, aux_k=self.config.aux_k, weight=self.config.aux_weight
        )
        return {"reconstruction": error_NC.square().mean(), "auxk": auxiliary}

    def _strongest(self, before: Tensor) -> tuple[Tensor, Tensor]:
        index = before.topk(self.config.top_k, dim=1, sorted=False).indices
        rows = torch.arange(len(before), device=before.device).repeat_interleave(self.config.top_k)
        return rows, index.flatten()

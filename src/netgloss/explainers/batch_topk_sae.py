"""BatchTopK sparse autoencoder: k atoms a row on average, shared out over a batch by need.

Bussmann, Leask & Nanda 2024 (arXiv 2412.06410). In training the N k largest activations of the whole batch are kept,
so that a row which is hard to rebuild may use more atoms than an easy one::

    a  = ReLU((y - b) W_enc^T + b_enc)                   y, b, W_dec and scaling back: ``sparse_autoencoder.py``
    z  = a where a is among the N k largest of the batch, else 0                      training
    t  = mean over batches of the smallest a > 0 that is kept                         after the fit
    z  = a where a > t, else 0                           encode: a row does not depend on its neighbours

    reconstruction = mean (y^ - y)^2,   auxk as in ``topk_sae.py``

t is estimated with the final weights on ``threshold_batches`` batches of random training rows (the paper: a running
mean). So ``encode`` uses about k atoms a row on the training rows, and as many as it takes elsewhere.

Left out: the paper's data (language models), its learning-rate warm-down and gradient clipping. With several processes
each keeps the largest of its own share of a batch.

Shape letters: C features, N rows, K concepts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from netgloss.errors import UserError
from netgloss.explainers.base import Batch, LayerSpec, Rows
from netgloss.explainers.sparse_autoencoder import SparseAutoencoder, read, write
from netgloss.explainers.topk_sae import TopKSAEConfig


@dataclass(frozen=True)
class BatchTopKSAEConfig(TopKSAEConfig):
    """Options of :class:`BatchTopKSAE`."""

    top_k: int = 16
    """Atoms that a row may use on average."""
    threshold_batches: int = 16
    """Batches of training rows that the threshold of encode is estimated from."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold_batches < 1:
            raise UserError(f"threshold_batches must be at least 1, got {self.threshold_batches}")


class BatchTopKSAE(SparseAutoencoder):
    """BatchTopK sparse autoencoder (module docstring). ``encode`` passes gradients to the atoms in use.

    Attributes
    ----------
    threshold : buffer (), the t of the equations; 0 before the fit has ended.

    Raises
    ------
    UserError : all rows are equal; NaN or Inf among them; ``top_k`` above ``num_concepts``.
    """

    Config = BatchTopKSAEConfig
    config: BatchTopKSAEConfig
    threshold: Tensor

    def __init__(self, config: BatchTopKSAEConfig, spec: LayerSpec) -> None:
        super().__init__(config, spec)
        self.register_buffer("threshold", torch.zeros(()))

    def encode_rows(self, rows: Tensor) -> Tensor:
        """Rows (N, C) -> codes (N, K) >= 0, those above the threshold."""
        before = self._before(self._scaled(rows))
        return torch.where(before > self.threshold, before, 0)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """``reconstruction`` and ``auxk`` (module docstring) of rows (N, C); counts which atoms were used."""
        scaled_NC = self._scaled(batch.activation)
        values_M, triples = read(scaled_NC, self.encoder, self._at_zero(), self._strongest)
        atoms_KC = F.normalize(self.decoder, dim=1)
        error_NC = scaled_NC - self.bias - write(values_M, atoms_KC, triples)
        dead_D = self._dead().nonzero().squeeze(1)
        self._count(triples.atom)
        auxiliary = self._auxiliary(
            scaled_NC, error_NC, dead_D, atoms_KC, aux_k=self.config.aux_k, weight=self.config.aux_weight
        )
        return {"reconstruction": error_NC.square().mean(), "auxk": auxiliary}

    @torch.no_grad()
    def after_fit(self, rows: Rows) -> None:
        """The threshold of ``encode``, from random training rows."""
        size = self.config.batch_size
        sample = rows.sample(size * self.config.threshold_batches, seed=0)
        shuffled = sample[torch.randperm(len(sample), generator=torch.Generator().manual_seed(0))]
        smallest = []
        for part in shuffled.split(size):
            before = self._before(self._scaled(part.to(self.mean)))
            row, atom = self._strongest(before)
            if len(row):
                smallest.append(before[row, atom].min())
        if smallest:
            self.threshold.copy_(torch.stack(smallest).mean())

    def _strongest(self, before: Tensor) -> tuple[Tensor, Tensor]:
        """The N k largest activations (N, K) of the batch that are above zero."""
        flat = before.flatten()
        values, place = flat.topk(len(before) * self.config.top_k, sorted=False)
        place = place[values > 0].sort().values
        return place // before.shape[1], place % before.shape[1]

"""Control: the layer's own features as concepts.

The K features of the largest variance over the training rows, untouched; all the others stay at their mean m::

    encode(x) = x[S],  S = the K features of largest variance          decode(z)[S] = z,  decode(z)[not S] = m[not S]

What a learned concept is worth is what it adds to this: the network was trained with these axes, and single
channels are often interpretable (Bau et al. 2017). ``num_concepts`` above C means all C features, when the decoder is
exact.

Shape letters: C features, N rows, K concepts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from netgloss.explainers.base import ExplainerConfig, LayerSpec, Rows
from netgloss.explainers.rows import LinearExplainer, feature_moments


class NaturalAxes(LinearExplainer):
    """The features of largest variance (module docstring); ties go to the lower index. Linear and differentiable.

    Raises
    ------
    UserError : no rows; NaN or Inf among them.
    """

    deterministic = True
    features: Tensor

    def __init__(self, config: ExplainerConfig, spec: LayerSpec) -> None:
        super().__init__(config, spec)
        self.register_buffer("features", torch.arange(self.num_concepts))

    @property
    def num_concepts(self) -> int:
        return min(self.config.num_concepts, self.spec.num_features)

    def fit_rows(self, rows: Rows, *, seed: int) -> None:
        """The whole fit; ``seed`` changes nothing."""
        self._start(rows, at_least=1)
        _, mean, variance = feature_moments(map(self._finite, rows.chunks()))
        chosen = variance.argsort(descending=True, stable=True)[: self.num_concepts]
        mean[chosen] = 0
        self.features.copy_(chosen)
        self.atoms.copy_(torch.nn.functional.one_hot(chosen, self.spec.num_features))
        self.offset.copy_(mean)

    def encode_rows(self, rows: Tensor) -> Tensor:
        """Rows (N, C) -> their chosen features (N, K)."""
        return rows.to(self.atoms.dtype)[:, self.features]

    def decode_rows(self, codes: Tensor) -> Tensor:
        """Codes (N, K) -> rows (N, C), bit for bit the features that were encoded."""
        return self.offset.expand(len(codes), -1).index_copy(1, self.features, codes.to(self.atoms.dtype))

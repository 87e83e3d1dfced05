"""Where in the image a concept of a pooled layer comes from: activation times gradient on the layer's own grid.

A pooled explainer reads the mean of a map, so every cell of the map has the same gradient and the map of a concept is
``max(0, sum_c a_c(h, w) dx / da_c)``, by captum's ``InputXGradient``. A cell sees its receptive field, which late
layers spread over most of the image: the heat says which cells the concept reads, not which pixels.

Shape letters: B images, C features, H W grid, K concepts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def concept_heatmaps(encode: Callable[[Tensor], Tensor], maps: Tensor, concepts: Sequence[int]) -> Tensor:
    """Heat (B, len(concepts), H, W) >= 0 of some concepts.

    Parameters
    ----------
    encode : pooled activations (B, C) -> concepts (B, K), differentiable.
    maps : (B, C, H, W), the layer's activations before pooling.
    """
    from captum.attr import InputXGradient

    attribution = InputXGradient(lambda values: encode(values.mean(dim=(2, 3))))
    given = maps.detach().requires_grad_(True)
    found = [attribution.attribute(given, target=k).sum(dim=1).clamp_min(0).detach() for k in concepts]
    return torch.stack(found, dim=1)

"""Where in the image a concept of a pooled layer comes from: activation times gradient on the layer's own grid.

A pooled explainer reads the mean of a map, so every cell of the map has the same gradient and the map of a concept is
``max(0, sum_c a_c(h, w) dx / da_c)``, by captum's ``InputXGradient``. A cell sees its receptive field, which late
layers spread over most of the image: the heatmap shows which cells the concept reads, not which pixels.

Shape letters: B images, C features, H W grid, K concepts.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


def recorded_ranges(concepts: Sequence[dict[str, Any]]) -> list[ConceptRange]:
    """The scales that a run's own maps are drawn on, from ``concepts.json``: a new image then compares with them."""
    found = []
    for concept in concepts:
        drawn = next((entry["map"] for entry in concept["gallery"] if entry["map"]), None)
        low, high = (drawn["low"], drawn["high"]) if drawn else (0.0, concept["max"] or 1.0)
        level = drawn["threshold"] if drawn and drawn["threshold"] is not None else 128
        found.append(ConceptRange(low=low, high=high, contour=low + (high - low) * level / 255))
    return found


def concept_heatmaps(encode: Callable[[Tensor], Tensor], maps: Tensor, concepts: Sequence[int]) -> Tensor:
    """Heatmaps (B, len(concepts), H, W) >= 0 of some concepts.

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


@dataclass(frozen=True)
class ConceptRange:
    """How a concept's maps are drawn: one scale for all images, and the level of the contour."""

    low: float
    high: float
    contour: float

    def encode(self, values: np.ndarray) -> dict[str, Any] | None:
        """A map (H, W) as the report reads it: base64 of uint8 between low and high; None for a scalar."""
        if values.ndim == 0:
            return None
        span = max(self.high - self.low, 1e-12)
        scaled = np.round(np.clip((values - self.low) / span, 0, 1) * 255).astype(np.uint8)
        return {
            "grid": list(values.shape),
            "data": base64.b64encode(scaled.tobytes()).decode(),
            "low": self.low,
            "high": self.high,
            "threshold": int(np.clip(round((self.contour - self.low) / span * 255), 1, 254)),
        }

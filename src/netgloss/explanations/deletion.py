"""The cross-deletion matrix: hide what one concept's heatmap points at, and see which concepts fall.

The strongest fifth of a concept's heatmap is replaced by a blur of the image, and the network runs again. If the
heatmap shows what the concept reads and the concepts read different things, a concept falls most when its own area is
hidden. Areas of the same size at random places say how much any loss of pixels costs.

Shape letters: B images, n concepts of a class, H W pixels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from netgloss.activations.layer import Layer
from netgloss.explainers.base import Explainer
from netgloss.explanations.heatmaps import concept_heatmaps

HIDDEN = 0.2
_IMAGES = 6


def cross_deletion(explainer: Explainer, layer: Layer, images: np.ndarray, concepts: list[int]) -> dict[str, Any]:
    """Share of each concept's sum over images that is lost when the area of another one is hidden.

    Parameters
    ----------
    layer : a pooled map layer with its images (``layer.source``).
    images : store indices; at most six are used.
    concepts : n of them.

    Returns
    -------
    ``concepts``, ``lost`` (n, n): row i hides concept i's area, column j is the loss of concept j (None where it is 0
    on all the images), ``random`` (n,): the loss at random places, ``images``: how many were used.
    """
    from torchvision.transforms.v2.functional import gaussian_blur

    from netgloss.activations import image_batches
    from netgloss.classifiers import Taps

    assert layer.source is not None
    images = images[:_IMAGES]
    classifier = layer.classifier
    pixels, _ = next(image_batches(classifier, layer.source, list(images), batch_size=len(images), workers=0))
    pixels = pixels.to(classifier.device)
    size = tuple(pixels.shape[2:])
    blurred = gaussian_blur(pixels, [2 * (min(size) // 8) + 1] * 2, [min(size) / 8] * 2)
    generator = torch.Generator().manual_seed(0)

    with Taps(classifier.net, [layer.name]) as taps:

        def codes(given: Tensor) -> Tensor:
            with torch.no_grad():
                return explainer.encode(taps(given)[layer.name])[:, concepts].clamp_min(0).sum(dim=0).cpu()

        with torch.no_grad():
            maps = taps(pixels)[layer.name]
        before = codes(pixels)
        heat = concept_heatmaps(explainer.encode, maps, concepts)
        noise = torch.rand(len(images), 1, *maps.shape[2:], generator=generator).to(maps)
        after = [codes(torch.where(_top(area, size), blurred, pixels)) for area in [*heat.split(1, dim=1), noise]]
    lost = 1 - torch.stack(after) / before
    table = [[float(v) if np.isfinite(v) else None for v in row] for row in lost.tolist()]
    return {"concepts": concepts, "lost": table[:-1], "random": table[-1], "images": len(images)}


def _top(heat: Tensor, size: tuple[int, ...]) -> Tensor:
    """(B, 1, H, W) bool: the strongest fifth of the pixels of a heatmap (B, 1, h, w); nothing where it is zero."""
    large = torch.nn.functional.interpolate(heat, size=size, mode="bilinear", align_corners=False)
    flat = large.flatten(1)
    count = max(1, round(HIDDEN * flat.shape[1]))
    chosen = torch.zeros_like(flat, dtype=torch.bool).scatter(1, flat.topk(count, dim=1).indices, True)
    return chosen.view_as(large) & (flat.amax(dim=1) > 0)[:, None, None, None]

"""Single images explained: the concepts that drove a prediction, and what scaling each of them would do.

Shape letters: B images, K concepts, H W grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from netgloss.activations.layer import LayerBatch
from netgloss.explainers.base import Explainer
from netgloss.explanations.heatmaps import ConceptRange
from netgloss.explanations.removal import STRENGTHS, is_exact, removal_record, replay
from netgloss.metrics.faithfulness.importance import explain_class, strongest


def explain_images(
    explainer: Explainer,
    batch: LayerBatch,
    heat: Sequence[np.ndarray],
    ranges: Sequence[ConceptRange],
    class_names: Sequence[str],
    *,
    drivers: int,
    affine: bool,
    also: Sequence[int | None] = (),
    classes: Tensor | None = None,
) -> list[dict[str, Any]]:
    """The ``explained`` entries of concepts.json for the images of a batch.

    Parameters
    ----------
    heat : B times (K, H, W), or (K,) where there are no maps. ranges : K scales that the maps are drawn on.
    drivers : concepts shown for each image, those of the largest absolute contribution.
    affine : True if the tail is affine. also : B concepts to show in any case, or None.
    classes : (B,) classes to explain; default the predicted ones.
    """
    with torch.no_grad():
        codes = explainer.encode(batch.activation)
    classes = batch.logits.argmax(dim=1) if classes is None else classes
    parts = explain_class(explainer, batch.tail, codes, batch.logits, classes, activation=batch.activation)
    values_BK = parts.values.cpu()
    orders = [strongest(values_K, drivers) for values_K in values_BK]
    orders = [_with(order, k) for order, k in zip(orders, also or [None] * len(orders), strict=True)]
    exact = is_exact(explainer, codes, affine=affine)
    replayed = replay(explainer, batch, codes, orders, (0.0,) if exact else STRENGTHS)
    found = []
    for row, order in enumerate(orders):
        values_K, shown = values_BK[row], int(classes[row])
        logit, base = float(batch.logits[row, shown]), float(parts.base[row])
        found.append(
            {
                "class": class_names[shown],
                "logit": logit,
                "rebuilt": float(parts.rebuilt[row]),
                "base": base,
                "gap": logit - base - float(values_K.sum()),
                "others": float(values_K.sum() - values_K[order].sum()),
                "drivers": [
                    {"concept": k, "contribution": float(values_K[k]), "map": ranges[k].encode(heat[row][k])}
                    for k in order
                ],
                "removal": removal_record(replayed[row], batch.logits[row], order, class_names, shown, exact=exact),
            }
        )
    return found


def _with(order: list[int], concept: int | None) -> list[int]:
    """The order with ``concept`` in it, in the last place if it was not there."""
    return order if concept is None or concept in order else [*order[:-1], concept]

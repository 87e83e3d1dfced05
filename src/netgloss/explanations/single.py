"""One new image explained with a fitted explainer: the figure and the numbers of ``netgloss show``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from netgloss.activations.layer import spread_tail
from netgloss.explainers.base import Explainer
from netgloss.explanations.heatmaps import concept_heatmaps
from netgloss.metrics.faithfulness.importance import explain_class, strongest

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def describe_image(
    explainer: Explainer,
    activation: Tensor,
    logits: Tensor,
    tail: Callable[[Any], Tensor],
    picture: np.ndarray,
    class_names: list[str],
    *,
    top: int = 5,
    heat: Callable[[list[int]], Tensor] | None = None,
) -> tuple[Figure, dict[str, Any]]:
    """What drove the prediction of one image.

    Parameters
    ----------
    activation : (1, C) or (1, C, H, W).
    logits : (1, classes) of the classifier.
    picture : (height, width, 3) in [0, 1], as the network saw it.
    heat : gives maps (len, h, w) of some concepts in place of the usual ones.

    Returns
    -------
    A figure with the maps of the ``top`` concepts, and the same numbers as a JSON-safe dict.
    """
    from netgloss.figures import image_explanation

    if explainer.reads == "pooled":
        tail = spread_tail(tail, tuple(activation.shape[2:]))
    with torch.no_grad():
        codes = explainer.encode(activation)
    predicted = logits.argmax(dim=1)
    told = explainer.explained_classes
    classes = predicted if told is None else torch.tensor(told, device=logits.device)[logits[:, told].argmax(dim=1)]
    parts = explain_class(explainer, tail, codes, logits, classes, activation=activation)
    values_K = parts.values[0].cpu()
    order = strongest(values_K, top)
    names = explainer.name_concepts()
    logit, base, rebuilt = float(logits[0, classes[0]]), float(parts.base[0]), float(parts.rebuilt[0])
    name, about = class_names[int(predicted[0])], class_names[int(classes[0])]
    probability = float(logits.softmax(dim=1)[0, predicted[0]])
    drawn = codes
    if explainer.reads == "pooled" and activation.ndim == 4:
        drawn = concept_heatmaps(explainer.encode, activation, range(explainer.num_concepts))
    maps = [drawn[0, k].cpu().numpy() if drawn.ndim == 4 else None for k in order]
    if heat is not None and order:
        maps = list(heat(order).cpu().numpy())
    gap = logit - base - float(values_K.sum())
    figure = image_explanation(
        picture,
        maps,
        [float(values_K[k]) for k in order],
        [names[k] for k in order],
        prediction=name if about == name else f"{name} (explained: the score of {about})",
        probability=probability,
        logit=logit,
        rebuilt=rebuilt,
        base=base,
        gap=gap,
        weighted=told is not None,
    )
    numbers = {
        "prediction": name,
        "explained_class": about,
        "probability": probability,
        "logit": logit,
        "rebuilt_logit": rebuilt,
        "base": base,
        "gap": gap,
        "contributions": {names[k]: float(values_K[k]) for k in values_K.abs().argsort(descending=True).tolist()},
    }
    return figure, numbers

"""One new image explained with a fitted explainer: the figure and the numbers of ``netgloss show``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from netgloss.explainers.base import Explainer
from netgloss.metrics.importance import explain_class

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def describe_image(
    explainer: Explainer,
    activation: Tensor,
    logits: Tensor,
    tail: Callable[[Tensor], Tensor],
    picture: np.ndarray,
    class_names: list[str],
    *,
    top: int = 5,
) -> tuple[Figure, dict[str, Any]]:
    """What drove the prediction of one image.

    Parameters
    ----------
    activation : (1, C) or (1, C, H, W).
    logits : (1, classes) of the classifier.
    picture : (height, width, 3) in [0, 1], as the network saw it.

    Returns
    -------
    A figure with the maps of the ``top`` concepts, and the same numbers as a JSON-safe dict.
    """
    from netgloss.figures import image_explanation

    with torch.no_grad():
        codes = explainer.encode(activation)
    predicted = logits.argmax(dim=1)
    parts = explain_class(explainer, tail, codes, logits, predicted)
    values_K = parts.values[0].cpu()
    order = values_K.abs().argsort(descending=True)[:top].tolist()
    logit, base, rebuilt = float(logits[0, predicted[0]]), float(parts.base[0]), float(parts.rebuilt[0])
    name = class_names[int(predicted[0])]
    probability = float(logits.softmax(dim=1)[0, predicted[0]])
    maps = [codes[0, k].cpu().numpy() if codes.ndim == 4 else None for k in order]
    gap = logit - base - float(values_K.sum())
    figure = image_explanation(
        picture,
        maps,
        [float(values_K[k]) for k in order],
        [f"concept {k}" for k in order],
        prediction=name,
        probability=probability,
        logit=logit,
        rebuilt=rebuilt,
        base=base,
        gap=gap,
    )
    numbers = {
        "prediction": name,
        "probability": probability,
        "logit": logit,
        "rebuilt_logit": rebuilt,
        "base": base,
        "gap": gap,
        "contributions": {f"concept {k}": float(values_K[k]) for k in values_K.abs().argsort(descending=True).tolist()},
    }
    return figure, numbers

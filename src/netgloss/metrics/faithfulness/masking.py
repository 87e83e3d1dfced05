"""What the classifier answers when some concepts are switched off: the one door for tests of importance.

A *mask* has one number per concept: 1 leaves its code unchanged, 0 sets it to zero at every position, and numbers
between scale it. A :data:`Value` maps masks to numbers; deletion, Shapley values and Sobol indices are questions to a
value, whatever is behind it (a class's logit, completeness, a closed form in a test).

A code of zero means "absent" only where the method says so (non-negative parts, SAE features). For signed scores around
a mean (PCA, ICA) it means "average", and the decoded row may lie off the data: masking cannot show which.

Shape letters: M masks, B images, K concepts, H W grid, L classes, S masks of one call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from netgloss.errors import UserError
from netgloss.explainers.base import Explainer
from netgloss.metrics.faithfulness.importance import Contributions

Predict = Callable[[Tensor], Tensor]
"""Concepts (S * B, K[, H, W]), S versions of the same B images one after the other, to logits (S * B, L)."""

Value = Callable[[Tensor], Tensor]
"""Masks (M, K), or (M, B, K) where each image has its own, to values (M, ...)."""

Of = Literal["logit", "probability"]


def through(explainer: Explainer, tail: Callable[[Tensor], Tensor], logits: Tensor) -> Predict:
    """The :data:`Predict` of an explainer: its decoder and the tail, or its own class scores where it rebuilds them.

    Parameters
    ----------
    tail : activation -> logits. One that is bound to B images (mode "replaced") takes one version of them at a time:
        ask with ``rows_per_call = B``.
    logits : (B, L) of the classifier.
    """

    def predict(codes: Tensor) -> Tensor:
        own = explainer.rebuilt_logits(codes, logits.repeat(len(codes) // len(logits), 1))
        return tail(explainer.decode(codes)) if own is None else own

    return predict


def masked_logits(predict: Predict, concepts: Tensor, masks: Tensor, *, rows_per_call: int = 256) -> Iterator[Tensor]:
    """Logits (S, B, L) under the masks (M, K) or (M, B, K), in order, without gradient.

    Parameters
    ----------
    concepts : (B, K) or (B, K, H, W).
    rows_per_call : at most so many masked images go through ``predict`` at once (at least one mask does).
    """
    masks = masks[:, None, :] if masks.ndim == 2 else masks
    if masks.shape[2] != concepts.shape[1] or masks.shape[1] not in (1, len(concepts)):
        raise UserError(f"masks {tuple(masks.shape)} do not fit concepts {tuple(concepts.shape)}")
    masks = masks.to(concepts).reshape(*masks.shape, *(1 for _ in concepts.shape[2:]))
    for part in masks.split(max(1, rows_per_call // len(concepts))):
        with torch.no_grad():
            logits = predict((concepts * part).flatten(0, 1))
        yield logits.unflatten(0, (len(part), len(concepts)))


def class_value(
    predict: Predict, concepts: Tensor, classes: Tensor, *, of: Of = "logit", rows_per_call: int = 256
) -> Value:
    """The value of one class per image: masks (M, K) or (M, B, K) to its logit or probability (M, B) float64.

    Parameters
    ----------
    classes : (B,) class index of each image. Other parameters as in :func:`masked_logits`.
    """
    if of not in ("logit", "probability"):
        raise UserError(f"a class has a 'logit' or a 'probability', got of = {of!r}")

    def value(masks: Tensor) -> Tensor:
        found = []
        for logits in masked_logits(predict, concepts, masks, rows_per_call=rows_per_call):
            scores = logits.double() if of == "logit" else logits.double().softmax(2)
            found.append(scores.gather(2, classes.to(scores.device).expand(len(scores), -1)[..., None])[..., 0].cpu())
        return torch.cat(found)

    return value


def linear_value(parts: Contributions) -> Value:
    """The linear surrogate of a class's logit: ``base + sum_k mask_k contribution_k``, masks to (M, B) float64.

    The same as :func:`class_value` if the logit is an affine function of the concepts.
    """
    values_BK, base_B = parts.values.double().cpu(), parts.base.double().cpu()

    def value(masks: Tensor) -> Tensor:
        masks = masks[:, None, :] if masks.ndim == 2 else masks
        return base_B + (masks.double().cpu() * values_BK).sum(2)

    return value

"""Whether the classifier says the same when it reads the reconstruction instead of the layer.

The reconstruction is spliced in and the classifier's tail computes logits again: ``logits`` are its own,
``logits_rebuilt`` those after the splice. All numbers are means over images.

Shape letters: B images, L classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from netgloss.metrics.base import ImageMetric, check_same_shape


def agreement(logits: Tensor, rebuilt: Tensor) -> Tensor:
    """1.0 for each image (B,) whose strongest class is the same for logits (B, L) and rebuilt (B, L), else 0.0."""
    check_same_shape("logits", logits, "rebuilt logits", rebuilt)
    return (logits.argmax(1) == rebuilt.argmax(1)).double()


def kl_divergence(logits: Tensor, rebuilt: Tensor) -> Tensor:
    """``KL(softmax(logits) || softmax(rebuilt))`` of each image (B,), float64, in nats."""
    check_same_shape("logits", logits, "rebuilt logits", rebuilt)
    log_p_BL, log_q_BL = logits.double().log_softmax(1), rebuilt.double().log_softmax(1)
    return (log_p_BL.exp() * (log_p_BL - log_q_BL)).sum(1).clamp_min(0)


def accuracy_change(logits: Tensor, rebuilt: Tensor, labels: Tensor) -> Tensor:
    """+1, 0 or -1 for each image (B,): is ``rebuilt`` right, minus: is ``logits``; NaN where the label is below 0."""
    check_same_shape("logits", logits, "rebuilt logits", rebuilt)
    change = (rebuilt.argmax(1) == labels).double() - (logits.argmax(1) == labels).double()
    return torch.where(labels >= 0, change, math.nan)


class Agreement(ImageMetric):
    """Share of images whose predicted class does not change."""

    name = "agreement"
    higher_is_better = True
    bounds = (0.0, 1.0)
    inputs = ("logits", "logits_rebuilt")
    definition = (
        "Share of images whose predicted class stays the same when the classifier reads the reconstruction instead of "
        "the layer. 1 is perfect. It cannot show changes of confidence, nor that the concepts are the reasons for the "
        "prediction: a reconstruction may keep the class and lose everything else."
    )

    def statistics(self, *, logits: Tensor, logits_rebuilt: Tensor) -> Tensor:
        return agreement(logits, logits_rebuilt)[:, None]

    def score(self, sums: Tensor, count: Tensor) -> Tensor:
        return sums[..., 0] / count


class KL(ImageMetric):
    """Mean KL divergence between the class probabilities before and after."""

    name = "kl"
    higher_is_better = False
    bounds = (0.0, math.inf)
    inputs = ("logits", "logits_rebuilt")
    definition = (
        "Mean Kullback-Leibler divergence, in nats, from the class probabilities of the classifier to those it gives "
        "when it reads the reconstruction. 0 is perfect; there is no upper end. A few images with confident changes "
        "can dominate it, and it cannot show whether the predicted class changed."
    )

    def statistics(self, *, logits: Tensor, logits_rebuilt: Tensor) -> Tensor:
        return kl_divergence(logits, logits_rebuilt)[:, None]

    def score(self, sums: Tensor, count: Tensor) -> Tensor:
        return sums[..., 0] / count


class AccuracyChange(ImageMetric):
    """Accuracy with the reconstruction minus accuracy without, over images with a label."""

    name = "accuracy_change"
    higher_is_better = True
    bounds = (-1.0, 1.0)
    inputs = ("logits", "logits_rebuilt", "labels")
    definition = (
        "Accuracy of the classifier when it reads the reconstruction, minus its own accuracy, over the images whose "
        "label is known. 0 means that nothing was lost. Mended and new mistakes cancel, so 0 cannot show that the "
        "predictions are the same; above 0 the reconstruction is better than the layer, not more faithful to it."
    )

    def statistics(self, *, logits: Tensor, logits_rebuilt: Tensor, labels: Tensor) -> Tensor:
        known = labels >= 0
        change = accuracy_change(logits, logits_rebuilt, labels).where(known, 0.0)
        return torch.stack([change, known.double()], dim=1)

    def score(self, sums: Tensor, count: Tensor) -> Tensor:
        return sums[..., 0] / sums[..., 1]

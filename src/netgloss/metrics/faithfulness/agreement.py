"""Whether the classifier says the same when it reads the reconstruction instead of the layer.

The reconstruction is spliced in and the classifier's tail computes logits again: ``logits`` are its own,
``logits_rebuilt`` those after the splice. All numbers are means over images.

A network of several labels decides about each of them by the sign of its logit, so that its agreement is a share of
labels and its KL divergence a sum over labels (:class:`LabelAgreement`, :class:`LabelKL`, which ``image_metrics`` gives
for such networks).

Shape letters: B images, L classes.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from netgloss.classifiers.heads import Outputs
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


def label_agreement(logits: Tensor, rebuilt: Tensor) -> Tensor:
    """Share of the labels of each image (B,), float64, whose logit keeps its sign; 0 counts as negative."""
    check_same_shape("logits", logits, "rebuilt logits", rebuilt)
    return ((logits > 0) == (rebuilt > 0)).double().mean(1)


def label_kl_divergence(logits: Tensor, rebuilt: Tensor) -> Tensor:
    """``sum_l KL(Bernoulli(sigmoid(logit_l)) || Bernoulli(sigmoid(rebuilt_l)))`` of each image (B,), float64, in nats:
    the divergence of the labels' joint distribution, as they are independent given the logits.
    """
    check_same_shape("logits", logits, "rebuilt logits", rebuilt)
    a_BL, b_BL = logits.double(), rebuilt.double()
    on_BL, off_BL = F.logsigmoid(a_BL) - F.logsigmoid(b_BL), F.logsigmoid(-a_BL) - F.logsigmoid(-b_BL)
    return (a_BL.sigmoid() * on_BL + (-a_BL).sigmoid() * off_BL).sum(1).clamp_min(0)


def decision_kept(logits: Tensor, rebuilt: Tensor, classes: Tensor, outputs: Outputs) -> Tensor:
    """Whether the decision for one class is the same for logits and rebuilt (..., L).

    Parameters
    ----------
    classes : (...) one class of each image. With "multilabel" it is kept where its logit keeps its sign, else where
        it is the largest of ``rebuilt``.
    """
    if outputs != "multilabel":
        return rebuilt.argmax(-1) == classes
    own, new = (values.gather(-1, classes[..., None])[..., 0] > 0 for values in (logits, rebuilt))
    return own == new


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


class LabelAgreement(Agreement):
    """Share of decisions about labels that do not change."""

    outputs: ClassVar[Outputs] = "multilabel"
    definition = (
        "Share of the labels, over all labels and images, whose logit keeps its sign when the classifier reads the "
        "reconstruction instead of the layer. 1 is perfect. Most labels are absent from most images, so a constant "
        "reaches a high share as well: compare it with the mean activation. It cannot show changes of confidence, nor "
        "that the concepts are the reasons for the decisions."
    )

    def statistics(self, *, logits: Tensor, logits_rebuilt: Tensor) -> Tensor:
        return label_agreement(logits, logits_rebuilt)[:, None]


class LabelKL(KL):
    """Mean over images of the KL divergence between the labels' probabilities before and after, summed over labels."""

    outputs: ClassVar[Outputs] = "multilabel"
    definition = (
        "Kullback-Leibler divergence, in nats, from the label probabilities (sigmoids) of the classifier to those it "
        "gives when it reads the reconstruction, summed over labels; mean over images. 0 is perfect; there is no upper "
        "end, and it grows with the number of labels. A few images with confident changes can dominate it, and it "
        "cannot show whether a decision changed."
    )

    def statistics(self, *, logits: Tensor, logits_rebuilt: Tensor) -> Tensor:
        return label_kl_divergence(logits, logits_rebuilt)[:, None]


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

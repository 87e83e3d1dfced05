"""Completeness: how much of the classifier's accuracy the concepts keep, with what guessing gives taken off.

Yeh et al. 2020 (arXiv 1910.07969), with a the accuracy over the evaluated images::

    completeness = (a(rebuilt) - chance) / (a(original) - chance)

What is fixed here, as the number depends on it:

- *The map back.* The paper takes the best g from concept scores to the layer (a perceptron fitted for this purpose).
  Here g is the explainer's own decoder: nothing is fitted to the labels, and concepts are evaluated with their decoder.
- *Chance.* ``"majority"``: the share of the most frequent class among the evaluated images, the best that a constant
  can do. ``"uniform"``: 1 / number of classes among them (the paper's random prediction). Equal for balanced classes.
  The classifier may name any of its classes; one that knows 1,000 of them and is shown 10 can be below chance.
- *Truth.* Labels, as in the paper. With the classifier's own predictions for labels, a(original) is 1 and this is
  agreement with chance taken off: ``completeness(logits, rebuilt, logits.argmax(1))``.

1: no accuracy is lost; 0: no better than a constant answer; above 1: more right than the classifier, not more faithful.

Shape letters: B images, L classes, K concepts, M masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from netgloss.errors import UserError
from netgloss.metrics.base import ImageMetric, check_same_shape
from netgloss.metrics.faithfulness.masking import Predict, Value, masked_logits

Chance = Literal["majority", "uniform"]


def completeness(logits: Tensor, rebuilt: Tensor, labels: Tensor, *, chance: Chance = "majority") -> Tensor:
    """Completeness over the images with a label, () float64; NaN if the classifier is not above chance there.

    Parameters
    ----------
    logits, rebuilt : (B, L). labels : (B,), -1 where unknown.
    """
    return _score(_statistics(logits, rebuilt, labels).sum(0), _checked(chance))


def _checked(chance: Chance) -> Chance:
    if chance not in ("majority", "uniform"):
        raise UserError(f"chance is 'majority' or 'uniform', got {chance!r}")
    return chance


def _statistics(logits: Tensor, rebuilt: Tensor, labels: Tensor) -> Tensor:
    """(B, 2 + L): is the original right, is the rebuilt right, and the class, all 0 for unknown labels."""
    check_same_shape("logits", logits, "rebuilt logits", rebuilt)
    known_B1 = (labels >= 0).double()[:, None]
    classes_BL = F.one_hot(labels.clamp_min(0), logits.shape[1]).double() * known_B1
    right_B2 = torch.stack([logits.argmax(1) == labels, rebuilt.argmax(1) == labels], dim=1).double()
    return torch.cat([right_B2, classes_BL], dim=1)


def _score(sums: Tensor, chance: Chance) -> Tensor:
    original, rebuilt, counts_L = sums[..., 0], sums[..., 1], sums[..., 2:]
    known = counts_L.sum(-1)
    guessed = counts_L.amax(-1) if chance == "majority" else known / (counts_L > 0).sum(-1)
    return torch.where(original > guessed, (rebuilt - guessed) / (original - guessed), torch.nan)


class Completeness(ImageMetric):
    """:func:`completeness`, streamed.

    Parameters
    ----------
    chance : "majority" or "uniform" (module docstring).
    """

    name = "completeness"
    higher_is_better = True
    inputs = ("logits", "logits_rebuilt", "labels")
    definition = (
        "Accuracy of the classifier when it reads the reconstruction, minus that of the best constant answer, divided "
        "by the same for its own accuracy, over the images whose label is known. 1: no accuracy is lost, 0: no better "
        "than a constant. The decoder is the method's own, none is fitted to the labels. It cannot show that the same "
        "images are right, nor which concepts matter: enough directions without meaning are complete as well."
    )

    def __init__(self, *, chance: Chance = "majority", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.chance = _checked(chance)

    def statistics(self, *, logits: Tensor, logits_rebuilt: Tensor, labels: Tensor) -> Tensor:
        return _statistics(logits, logits_rebuilt, labels)

    def score(self, sums: Tensor, count: Tensor) -> Tensor:
        return _score(sums, self.chance)


def completeness_value(
    parts: Sequence[tuple[Predict, Tensor, Tensor, Tensor]],
    *,
    chance: Chance = "majority",
    rows_per_call: int = 256,
) -> Value:
    """The value of ConceptSHAP: masks (M, K) to the completeness (M,) of the concepts that are left.

    Concepts that are not in the subset are set to zero and the decoder stays; the paper fits g again for each subset.

    Parameters
    ----------
    parts : for each batch of images ``(predict, concepts (B, K[, H, W]), logits (B, L), labels (B,))``.
    """

    def value(masks: Tensor) -> Tensor:
        right = torch.zeros(len(masks), dtype=torch.float64)
        for predict, concepts, _, labels in parts:
            found = masked_logits(predict, concepts, masks, rows_per_call=rows_per_call)
            right += torch.cat([(rebuilt.argmax(2) == labels).sum(1).cpu() for rebuilt in found])
        own = torch.stack([_statistics(logits, logits, labels).sum(0).cpu() for _, _, logits, labels in parts]).sum(0)
        sums = own.repeat(len(masks), 1)
        sums[:, 1] = right
        return _score(sums, chance)

    _checked(chance)
    return value

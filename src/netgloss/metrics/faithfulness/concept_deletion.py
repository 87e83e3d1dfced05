"""C-deletion and C-insertion: what happens to a class's score as its concepts are taken away, or put back.

Fel et al. 2023 (arXiv 2306.07304; "C-Deletion" and "C-Insertion"), after Petsiuk et al. 2018 for pixels. With n
concepts active in an image, ranked by importance, v the logit (or probability) of the class and x the share of the n
concepts that are gone (or there)::

    deletion(x)  = v without the x n most important concepts          insertion(x) = v with these alone
    area         = integral over x from 0 to 1 (trapezoids)
    normalised   = sum over images (area - v(none)) / sum over images (v(all) - v(none))
    gain         = insertion - deletion, normalised (symmetric relevance gain, Blücher et al. 2024, arXiv 2401.06654)
    carried      = sum over images (v(all) - v(none)) / sum over images (v of the classifier itself - v(none))

Concepts that are 0 everywhere in an image can be neither deleted nor inserted; they are not counted.

- Deleting the same groups of concepts in reversed order gives the insertion curve, mirrored: this control costs
  nothing.
- A random ranking has a gain of 0 in expectation, and areas of 1/2 if the logit is affine in the concepts; there
  deletion and insertion area of any ranking add up to 1.
- If the logit is affine, every curve follows from the contributions c (:func:`~.masking.linear_value`)
  and ranking by c is the best possible: the test then says how unequal the contributions are, for random directions as
  for any method, and nothing on whether the concepts are the right ones. ``surrogate_departure`` says how far from this
  the measured curves are.

Shape letters: B images, K concepts, T points of a curve, J classes asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from netgloss.errors import UserError
from netgloss.explainers.base import Explainer
from netgloss.metrics.base import Bounds, ImageMetric
from netgloss.metrics.faithfulness.importance import Contributions, explain_class
from netgloss.metrics.faithfulness.masking import Of, Predict, Value, class_value, linear_value, through

Mode = Literal["deletion", "insertion"]
Ranking = Callable[[Contributions, Tensor], Tensor]
"""Contributions of the class and concepts (B, K[, H, W]) to the importance (B, K) to rank by."""


def strength(concepts: Tensor) -> Tensor:
    """Mean ``|z|`` over positions of (B, K) or (B, K, H, W): (B, K) float64."""
    return concepts.double().abs().reshape(*concepts.shape[:2], -1).mean(2)


def by_contribution(parts: Contributions, concepts: Tensor) -> Tensor:
    """Ranks by contribution to the class's logit."""
    return parts.values


def by_strength(parts: Contributions, concepts: Tensor) -> Tensor:
    """Ranks by mean activity, whatever the class."""
    return strength(concepts)


def random_importance(index: Tensor, num_concepts: int, *, seed: int) -> Tensor:
    """A random importance (B, K) that depends on (seed, image index) only."""
    draws = [np.random.default_rng([seed, i]).random(num_concepts) for i in index.tolist()]
    return torch.from_numpy(np.stack(draws))


@dataclass(frozen=True)
class Curve:
    """A class's score along a ranking.

    Attributes
    ----------
    share : (B, T) share of the image's active concepts that are deleted or inserted, from 0 to 1.
    value : (B, T) the score there.
    """

    share: Tensor
    value: Tensor

    @property
    def area(self) -> Tensor:
        """(B,) mean height: trapezoids over ``share``."""
        return torch.trapezoid(self.value, self.share, dim=1)

    def distance(self, other: Curve) -> Tensor:
        """(B,) mean ``|difference|`` to a curve at the same shares."""
        return Curve(self.share, (self.value - other.value).abs()).area


def ranked_masks(concepts: Tensor, importance: Tensor, *, mode: Mode, num_steps: int = 20) -> tuple[Tensor, Tensor]:
    """Masks (T, B, K) along a ranking, most important concepts first, and the share (B, T) of active concepts reached.

    T - 1 groups of equal size share out the active concepts: ``num_steps``, or as many as there are concepts if fewer.

    Raises
    ------
    UserError : if importance and concepts do not fit, the importance has NaN, or there are no steps.
    """
    if importance.shape != concepts.shape[:2]:
        raise UserError(
            f"expected one importance a concept, {tuple(concepts.shape[:2])}, got shape {tuple(importance.shape)}"
        )
    if importance.isnan().any():
        raise UserError("cannot rank concepts: NaN among their importances")
    if num_steps < 1:
        raise UserError(f"num_steps must be at least 1, got {num_steps}")
    active_BK = strength(concepts).cpu() > 0
    importance = importance.detach().double().cpu()
    order_BK = torch.where(active_BK, importance.clamp_min(torch.finfo(torch.float64).min), -torch.inf)
    place_BK = order_BK.argsort(dim=1, descending=True, stable=True).argsort(1)
    active_B1 = active_BK.sum(1, keepdim=True)
    grid_T = torch.linspace(0, 1, min(num_steps, max(1, int(active_B1.max()))) + 1, dtype=torch.float64)
    reached_BT = (grid_T * active_B1).round()
    gone_TBK = place_BK < reached_BT.T[..., None]
    share_BT = torch.where(active_B1 > 0, reached_BT / active_B1.clamp_min(1), grid_T)
    return (gone_TBK if mode == "insertion" else ~gone_TBK), share_BT


def ranked_curve(value: Value, concepts: Tensor, importance: Tensor, *, mode: Mode, num_steps: int = 20) -> Curve:
    """The curve of a value (M, B) along a ranking of each image's concepts.

    Parameters
    ----------
    value : :func:`~.masking.class_value`, or :func:`~.masking.linear_value` for the closed form of an affine tail.
    concepts : (B, K) or (B, K, H, W). importance : (B, K), larger is more important.
    mode : "deletion" starts from all concepts, "insertion" from none.
    """
    masks_TBK, share_BT = ranked_masks(concepts, importance, mode=mode, num_steps=num_steps)
    return Curve(share_BT, value(masks_TBK).T)


class RatioOfSums(ImageMetric):
    """``sum numerator / sum denominator`` over images, with the base's bootstrap; NaN unless the latter is above 0.

    Has no ``name``: its inputs are no part of an evaluation, whoever fills it names the score.
    """

    inputs = ("numerator", "denominator")

    def statistics(self, *, numerator: Tensor, denominator: Tensor) -> Tensor:
        return torch.stack([numerator.double(), denominator.double()], dim=1)

    def score(self, sums: Tensor, count: Tensor) -> Tensor:
        return torch.where(sums[..., 1] > 0, sums[..., 0] / sums[..., 1], torch.nan)


@dataclass(frozen=True)
class Quantity:
    """What an area means, in any ranking."""

    higher_is_better: bool | None
    bounds: Bounds
    definition: str


_EVERY = (-torch.inf, torch.inf)
_SHARED = (
    "0 is the score without any concept, 1 that with all of them; summed over images before dividing. Comparable with "
    "its own random and reversed rankings, not between methods with different numbers of active concepts. If the score "
    "is affine in the concepts it cannot show more than how unequal their contributions are."
)
QUANTITIES = {
    "c_deletion": Quantity(
        False, _EVERY, f"Area under the class's score as the most important concepts of an image are zeroed. {_SHARED}"
    ),
    "c_insertion": Quantity(
        True, _EVERY, f"Area under the class's score as the most important concepts are put in alone. {_SHARED}"
    ),
    "c_gain": Quantity(
        True, _EVERY, f"Insertion area minus deletion area: 0 for a random ranking of the same concepts. {_SHARED}"
    ),
    "c_carried": Quantity(
        None,
        _EVERY,
        "How far all concepts together raise the class's score over no concepts, as a share of how far the "
        "classifier's own score lies above that. 1: the reconstruction loses nothing of it. The areas are relative to "
        "this part: alone they cannot show what the concepts miss, and directions without meaning have good ones.",
    ),
    "surrogate_departure": Quantity(
        None,
        (0.0, torch.inf),
        "Mean distance between the measured deletion and insertion curves of the logit and those of base + sum of the "
        "contributions, as a share of |logit with all - with no concepts|. 0: the curves hold nothing that the "
        "contributions do not say. It cannot show which of the two is right.",
    ),
}


class ConceptDeletion:
    """C-deletion and C-insertion of one explainer, image by image: ``update`` for each batch, then the scores.

    Parameters
    ----------
    rankings : what to rank by; the first is evaluated, the others are its baselines, as are random and reversed
        rankings.
    num_steps : groups of concepts of a curve. draws : random rankings an image.
    of : follow the class's "logit" or "probability" (``surrogate_departure`` exists for logits only).
    replicates : of the bootstrap over images.
    """

    def __init__(
        self,
        rankings: Mapping[str, Ranking] | None = None,
        *,
        num_steps: int = 20,
        draws: int = 3,
        seed: int = 0,
        of: Of = "logit",
        rows_per_call: int = 256,
        replicates: int = 200,
    ) -> None:
        self.rankings = dict(rankings or {"contribution": by_contribution, "strength": by_strength})
        if draws < 1:
            raise UserError(f"draws must be at least 1, got {draws}")
        self.num_steps, self.draws, self.seed, self.of, self.rows_per_call = num_steps, draws, seed, of, rows_per_call
        self.replicates = replicates
        self.areas: dict[tuple[str, str], RatioOfSums] = {}

    def update(
        self,
        index: Tensor,
        explainer: Explainer,
        tail: Callable[[Tensor], Tensor],
        concepts: Tensor,
        logits: Tensor,
        classes: Tensor | None = None,
        *,
        predict: Predict | None = None,
    ) -> None:
        """Add images.

        Parameters
        ----------
        index : (B,) each image's place in the data set.
        tail : activation -> logits. concepts : (B, K[, H, W]) of ``encode``. logits : (B, L) of the classifier.
        classes : (B,) or (B, J) classes to follow; default the predicted one. All J classes of an image count equally.
        predict : what masked concepts give, where that is known more cheaply than from decoder and tail.
        """
        chosen = (logits.argmax(1) if classes is None else classes).reshape(len(index), -1)
        predict = predict or through(explainer, tail, logits)
        found = [self._one_class(index, explainer, tail, concepts, logits, c, predict) for c in chosen.T]
        for key in found[0]:
            numerator, denominator = (torch.stack([one[key][i] for one in found]).sum(0) for i in (0, 1))
            if key not in self.areas:
                self.areas[key] = RatioOfSums(replicates=self.replicates)
            self.areas[key].update(index, numerator=numerator, denominator=denominator)

    def _one_class(
        self,
        index: Tensor,
        explainer: Explainer,
        tail: Callable[[Tensor], Tensor],
        concepts: Tensor,
        logits: Tensor,
        classes: Tensor,
        predict: Predict,
    ) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
        """``{(quantity, ranking): (numerator (B,), denominator (B,))}`` of one class per image (B,)."""
        parts = explain_class(explainer, tail, concepts, logits, classes)
        value = class_value(predict, concepts, classes, of=self.of, rows_per_call=self.rows_per_call)
        scores = logits.double() if self.of == "logit" else logits.double().softmax(1)
        own = scores.gather(1, classes[:, None])[:, 0].cpu()
        found: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}

        def curve(importance: Tensor, mode: Mode, of: Value = value) -> Curve:
            return ranked_curve(of, concepts, importance, mode=mode, num_steps=self.num_steps)

        for name, ranking in self.rankings.items():
            importance = ranking(parts, concepts)
            deletion, insertion = curve(importance, "deletion"), curve(importance, "insertion")
            none, everything = insertion.value[:, 0], deletion.value[:, 0]
            span = everything - none
            found["c_carried", name] = (span, own - none)
            found["c_deletion", name] = (deletion.area - none, span)
            found["c_insertion", name] = (insertion.area - none, span)
            found["c_gain", name] = (insertion.area - deletion.area, span)
            if self.of == "logit":
                linear = linear_value(parts)
                gap = deletion.distance(curve(importance, "deletion", linear))
                gap = (gap + insertion.distance(curve(importance, "insertion", linear))) / 2
                found["surrogate_departure", name] = (gap, span.abs())
        randoms = [random_importance(index, concepts.shape[1], seed=self.seed + i) for i in range(self.draws)]
        area = torch.stack([curve(importance, "deletion").area for importance in randoms]).mean(0)
        # the reverse of a random ranking is one as well, and its insertion area is this deletion area
        found["c_deletion", "random"] = found["c_insertion", "random"] = (area - none, span)
        return found

    def value(self, quantity: str, ranking: str) -> float:
        """One normalised number so far; NaN if the concepts together do not raise the class's score."""
        if (quantity, ranking) not in self.areas:
            known = [", ".join(dict.fromkeys(names)) for names in zip(*self.areas, strict=True)] or ["nothing"]
            raise UserError(f"no {quantity!r} by {ranking!r} was measured; there are {' by '.join(known)}")
        return float(self.areas[quantity, ranking].compute())


_REVERSED = {"c_deletion": "c_insertion", "c_insertion": "c_deletion"}

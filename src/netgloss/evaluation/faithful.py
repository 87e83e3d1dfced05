"""Faithfulness of one explainer for a comparison: concepts masked, the tail asked again, all as sums over images.

Every number is an :class:`ImageMetric`, so that methods are paired over images like any other score:

- C-deletion, C-insertion, their gain, what the concepts carry, and how far the curves are from the linear surrogate
  (``metrics/concept_deletion.py``), for the predicted class;
- ConceptSHAP (``metrics/shapley.py`` with completeness as value, the classifier's own predictions as labels): Shapley
  values are linear in the value, and completeness is (right answers - chance) / (all - chance), so each image's Shapley
  values of "the predicted class stays the same" add up to those of completeness, but for a factor that all concepts
  share. The same subsets give each image's Shapley values of the predicted class's logit;
- total Sobol indices of that logit (``metrics/sobol.py``);
- the agreement of contribution, Shapley, Sobol and strength, image by image (``metrics/importance_agreement.py``).

If tail and decoder are affine, logits are an affine function of the mask: K + 1 passes give all of it exactly
(:func:`affine_predict`), instead of thousands.

Shape letters: B images, K concepts, L classes, M masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from netgloss.classifiers.heads import Outputs
from netgloss.errors import UserError
from netgloss.explainers.base import Explainer
from netgloss.metrics.base import REPLICATES, ImageMetric
from netgloss.metrics.faithfulness.agreement import decision_kept
from netgloss.metrics.faithfulness.concept_deletion import QUANTITIES, ConceptDeletion, RatioOfSums, strength
from netgloss.metrics.faithfulness.importance import explain_class
from netgloss.metrics.faithfulness.importance_agreement import rank_correlation
from netgloss.metrics.faithfulness.masking import Predict, masked_logits, through
from netgloss.metrics.faithfulness.shapley import shapley
from netgloss.metrics.faithfulness.sobol import sobol_total

Tail = Callable[[Tensor], Tensor]
RANDOM_RANKING = "random_ranking "
"""Prefix of the areas of random rankings of the same concepts: a baseline, not a score."""


@dataclass(frozen=True)
class FaithfulnessOptions:
    """How much of the tail's time faithfulness may take."""

    images: int = 48
    """Images for C-deletion and C-insertion; 0 leaves all faithfulness out."""
    steps: int = 10
    """Groups of concepts of a deletion curve."""
    importance_images: int = 16
    """Of these images, so many for ConceptSHAP, Sobol indices and the agreement of importances; 0 leaves them out."""
    shapley_pairs: int = 4
    """Pairs of random orders of a sampled Shapley value (above 12 concepts)."""
    sobol_points: int = 8
    """Points of each of two Sobol sequences; a power of two."""
    fits: int = 1
    """Fits (seeds) of each method that are asked."""

    def __post_init__(self) -> None:
        for name in ("images", "importance_images"):
            if getattr(self, name) < 0:
                raise UserError(f"faithfulness {name} must not be negative, got {getattr(self, name)}")
        for name in ("steps", "fits"):
            if getattr(self, name) < 1:
                raise UserError(f"faithfulness {name} must be at least 1, got {getattr(self, name)}")
        if self.shapley_pairs < 2:
            raise UserError(f"shapley_pairs must be at least 2, got {self.shapley_pairs}")
        if self.sobol_points < 2 or self.sobol_points & (self.sobol_points - 1):
            raise UserError(f"sobol_points must be a power of two (2, 4, 8, ...), got {self.sobol_points}")


class ConceptShapSpread(ImageMetric):
    """Effective number of concepts that share completeness; no ``name``: its input is no part of an evaluation."""

    inputs = ("shares",)
    bounds = (0.0, float("inf"))
    higher_is_better = None
    definition = (
        "Concepts that share the completeness by ConceptSHAP: (sum |phi_k|)^2 / sum phi_k^2, 1 if one concept keeps "
        "all predictions, K if all have equal shares. Labels are the classifier's own predictions, concepts out of the "
        "subset are set to zero, orders are sampled above 12 concepts. It cannot show whether the concepts are the "
        "right ones: directions without meaning share out what little they keep."
    )

    def statistics(self, *, shares: Tensor) -> Tensor:
        return shares.double()

    def score(self, sums: Tensor, count: Tensor) -> Tensor:
        return sums.abs().sum(-1) ** 2 / sums.square().sum(-1)


class MeanOfDefined(ImageMetric):
    """Mean over the images where a number is defined; no ``name``, whoever fills it says what it is."""

    inputs = ("number",)

    def statistics(self, *, number: Tensor) -> Tensor:
        known = number.isfinite()
        return torch.stack([number.double().where(known, 0.0), known.double()], dim=1)

    def score(self, sums: Tensor, count: Tensor) -> Tensor:
        return torch.where(sums[..., 1] > 0, sums[..., 0] / sums[..., 1], torch.nan)

    def update(self, index: Tensor, **inputs: Tensor) -> None:
        """Images where the number is NaN count as images without it, not as an error."""
        number = inputs["number"]
        known = number.isfinite()
        if known.any():
            super().update(index[known], number=number[known])


class _Agreement(MeanOfDefined):
    bounds = (-1.0, 1.0)
    higher_is_better = None
    _TEXT = (
        "Mean over images of the rank correlation between the concepts' {} and {}, among the concepts that are active "
        "in the image. 1: the same order. Agreement makes neither right: both may follow the size of the codes."
    )


class ContributionSobol(_Agreement):
    """Agreement of the contributions with the Sobol indices."""

    definition = _Agreement._TEXT.format("|contribution| (gradient x concept) to the predicted class", "Sobol index")


class ContributionShapley(_Agreement):
    """Agreement of the contributions with the Shapley values of the logit."""

    definition = _Agreement._TEXT.format("contribution (gradient x concept)", "Shapley value of the logit")


class ContributionStrength(_Agreement):
    """Agreement of the contributions with the concepts' mean activities."""

    definition = _Agreement._TEXT.format("|contribution| to the predicted class", "mean activity, whatever the class")


def _area(quantity: str) -> type[RatioOfSums]:
    meaning = QUANTITIES[quantity]
    more = " The class's score is its logit, concepts are ranked by contribution, for the predicted class."
    return type(
        quantity,
        (RatioOfSums,),
        {
            "bounds": meaning.bounds,
            "higher_is_better": meaning.higher_is_better,
            "definition": meaning.definition + (more if quantity.startswith("c_") else ""),
        },
    )


def _named(quantity: str) -> str:
    return f"{quantity}_logit" if quantity.startswith("c_") else quantity


FAITHFULNESS: dict[str, type[ImageMetric]] = {
    **{_named(quantity): _area(quantity) for quantity in QUANTITIES},
    "concept_shap_spread": ConceptShapSpread,
    "agreement_contribution_shapley": ContributionShapley,
    "agreement_contribution_sobol": ContributionSobol,
    "agreement_contribution_strength": ContributionStrength,
}
"""Metrics of this module by the name that they carry in a comparison."""


def measure_faithfulness(
    explainer: Explainer,
    batches: Iterable[tuple[Tensor, Tensor, Tensor, Tail, bool]],
    *,
    encode: Callable[[Tensor, Tensor], Tensor] | None = None,
    options: FaithfulnessOptions,
    affine: bool,
    outputs: Outputs = "multiclass",
    seed: int = 0,
    replicates: int = REPLICATES,
) -> dict[str, ImageMetric]:
    """All metrics of this module for one explainer, and ``"random_ranking <name>"`` for its areas.

    Parameters
    ----------
    batches : ``(index (B,), activation, logits (B, L), tail, importances)``; the last says whether Shapley values and
        Sobol indices are asked for these images.
    encode : index and activation to concepts; default the explainer's own ``encode`` of the activation.
    affine : whether the tail is an affine function of the activation.
    outputs : the kind of the logits; of several labels, the strongest one is explained.
    """
    deletion = ConceptDeletion(num_steps=options.steps, draws=1, seed=seed, replicates=replicates)
    found: dict[str, ImageMetric] = {}

    def add(name: str, index: Tensor, **inputs: Tensor) -> None:
        if name not in found:
            found[name] = FAITHFULNESS[name](replicates=replicates)
        found[name].update(index, **inputs)

    for index, activation, logits, tail, importances in batches:
        with torch.no_grad():
            concepts = (explainer.encode(activation) if encode is None else encode(index, activation)).detach()
        classes = logits.argmax(1)
        exact = affine and explainer.dictionary is not None
        predict = affine_predict(explainer, tail, concepts) if exact else through(explainer, tail, logits)
        deletion.update(index, explainer, tail, concepts, logits, predict=predict)
        values = explain_class(explainer, tail, concepts, logits, classes).values.cpu()
        activity = strength(concepts).cpu()
        active = activity > 0
        number = rank_correlation(values.abs(), activity, active=active)
        add("agreement_contribution_strength", index, number=number)
        if not importances:
            continue
        value = _stays_and_logit(predict, concepts, logits, classes, outputs)
        count = concepts.shape[1]
        shares = shapley(value, count, pairs=options.shapley_pairs, seed=seed).values
        add("concept_shap_spread", index, shares=shares[:, 0].T)
        number = rank_correlation(values, shares[:, 1].T, active=active)
        add("agreement_contribution_shapley", index, number=number)
        of_logit = lambda masks, value=value: value(masks)[:, 1]  # noqa: E731
        total, _ = sobol_total(of_logit, count, points=options.sobol_points, scrambles=2, seed=seed)
        number = _where_defined(values.abs(), total.T, active)
        add("agreement_contribution_sobol", index, number=number)
    for quantity in QUANTITIES:
        for ranking, prefix in (("contribution", ""), ("random", RANDOM_RANKING)):
            if (quantity, ranking) in deletion.areas:
                found[prefix + _named(quantity)] = deletion.areas[quantity, ranking]
    return found


def affine_predict(explainer: Explainer, tail: Tail, concepts: Tensor) -> Predict:
    """The :data:`Predict` of B images whose logits are an affine function of their masks, from K + 1 passes.

    The concepts that it is asked for must be the given ones (B, K[, H, W]), scaled concept by concept.
    """
    size = concepts.flatten(2).square().sum(2) if concepts.ndim == 4 else concepts.square()
    with torch.no_grad():
        base_BL = tail(explainer.decode(torch.zeros_like(concepts)))
        added = []
        for k in range(concepts.shape[1]):
            alone = torch.zeros_like(concepts)
            alone[:, k] = concepts[:, k]
            added.append(tail(explainer.decode(alone)) - base_BL)
    added_BKL = torch.stack(added, dim=1)

    def predict(codes: Tensor) -> Tensor:
        versions = codes.unflatten(0, (-1, len(concepts)))
        kept = (versions * concepts).flatten(3).sum(3) if concepts.ndim == 4 else versions * concepts
        masks_SBK = torch.where(size > 0, kept / size.clamp(min=torch.finfo(size.dtype).tiny), 0)
        return (base_BL + torch.einsum("sbk,bkl->sbl", masks_SBK, added_BKL)).flatten(0, 1)

    return predict


def _stays_and_logit(
    predict: Predict, concepts: Tensor, own: Tensor, classes: Tensor, outputs: Outputs
) -> Callable[[Tensor], Tensor]:
    """Masks (M, K) to (M, 2, B): whether the predicted class stays, and its logit; ``own`` (B, L) are the logits."""

    def value(masks: Tensor) -> Tensor:
        found = []
        for logits in masked_logits(predict, concepts, masks):
            every = classes.expand(len(logits), -1)
            stays = decision_kept(own.to(logits).expand_as(logits), logits, every, outputs).double()
            logit = logits.double().gather(2, every[..., None])[..., 0]
            found.append(torch.stack([stays, logit], dim=1).cpu())
        return torch.cat(found)

    return value


def _where_defined(a: Tensor, b: Tensor, active: Tensor) -> Tensor:
    """:func:`rank_correlation`, NaN for images with NaN in ``b`` (a logit that does not vary)."""
    known = b.isfinite().all(1)
    return torch.where(known, rank_correlation(a, b.nan_to_num(), active=active), torch.nan)

"""Whether a few concepts carry a class's decision: how many matter, how they overlap, what they leave out.

The metrics of SRAE's explanation space, for any explainer: they read contributions (code times gradient, or the
method's own), logits, and reconstructions. Hamidi-Haines et al. (arXiv 1812.07150) name faithfulness, sparsity and
orthogonality as what such a space should have; only the significant concepts are theirs, the other formulas are ours.

Shape letters: N images, K concepts, D features, L classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from netgloss.explainers.srae import pull_away
from netgloss.metrics.base import ImageMetric, by_position, check_same_shape
from netgloss.metrics.faithfulness.importance import significant

_REBUILT = 0.5
_CONSTANT = 1e-12


def participation(contributions: Tensor) -> Tensor:
    """``(sum |c|)^2 / sum c^2`` of each image (N, K) -> (N,): 1 if one concept does it all, K if all do the same.

    NaN where all contributions are zero.
    """
    size = contributions.double().abs()
    return size.sum(dim=1).square() / size.square().sum(dim=1)


def correlation(contributions: Tensor) -> Tensor:
    """Pearson correlations (live, live) of the columns of (N, K) that vary, float64."""
    values = contributions.double()
    live = values.std(dim=0, correction=0) > _CONSTANT * values.abs().amax().clamp_min(1e-300)
    return torch.corrcoef(values[:, live].T).reshape(int(live.sum()), int(live.sum()))


def orthogonality(contributions: Tensor) -> float:
    """``|R - diag R|_F / |R|_F`` of the correlations R of live concepts (N, K) over images: 0 if none go together.

    NaN with fewer than two live concepts: a single one is not orthogonal to anything.
    """
    r = correlation(contributions)
    return float((r - torch.eye(len(r))).norm() / r.norm()) if len(r) > 1 else math.nan


def total_correlation(contributions: Tensor) -> float:
    """``-log det R`` of live concepts, twice their total correlation if they were Gaussian; inf if one is redundant."""
    r = correlation(contributions)
    return float(-torch.logdet(r).nan_to_num(-math.inf)) if len(r) > 1 else math.nan


def normalised_errors(activation: Tensor, reconstruction: Tensor) -> Tensor:
    """Mean squared error over variance of each feature that varies, (live,), of (N, D) each."""
    check_same_shape("activation", activation, "reconstruction", reconstruction)
    variance = activation.double().var(dim=0, correction=0)
    live = variance > _CONSTANT
    return (reconstruction.double() - activation.double()).square().mean(dim=0)[live] / variance[live]


def score_errors(logit: Tensor, rebuilt: Tensor) -> dict[str, float]:
    """``rmse``, ``mae`` and ``r2`` of a class's rebuilt score (N,); r2 is NaN where the score does not vary."""
    check_same_shape("logit", logit, "rebuilt logit", rebuilt)
    error = rebuilt.double() - logit.double()
    variance = float(logit.double().var(correction=0)) if len(logit) else math.nan
    square = float(error.square().mean()) if len(logit) else math.nan
    return {
        "rmse": math.sqrt(square),
        "mae": float(error.abs().mean()) if len(logit) else math.nan,
        "r2": 1 - square / variance if variance > 0 else math.nan,
    }


def class_space(contributions: Tensor, logit: Tensor, rebuilt: Tensor, positive: Tensor) -> dict[str, float]:
    """Everything about the explanation of one class's score, positives and negatives apart.

    Parameters
    ----------
    contributions : (N, K) to the class's logit.
    logit, rebuilt : (N,) the classifier's score and that of the explanation.
    positive : (N,) bool, whether the image shows the class.

    Returns
    -------
    Errors of the score by :func:`score_errors`, with ``_positive`` or ``_negative`` appended; and on the positives:
    ``live`` concepts (not zero everywhere), ``significant`` and ``participation`` (means), ``single`` (share of images
    whose score one concept carries to 90 %), ``orthogonality``, ``total_correlation``, ``mean_correlation`` (absolute)
    and ``pull_away`` (mean squared cosine of pairs of live concepts).
    """
    found: dict[str, float] = {}
    for name, mask in (("positive", positive), ("negative", ~positive)):
        errors = score_errors(logit[mask], rebuilt[mask])
        found |= {f"{key}_{name}": value for key, value in errors.items()}
    values = contributions[positive].double()
    count = significant(values).double()
    live = values[:, (values != 0).any(dim=0)]
    r = correlation(values)
    off = len(r) * (len(r) - 1)
    return found | {
        "live": float(live.shape[1]),
        "significant": float(count.mean()),
        "participation": float(participation(values).nanmean()),
        "single": float((count == 1).double().mean()),
        "orthogonality": orthogonality(values),
        "total_correlation": total_correlation(values),
        "mean_correlation": float((r.abs().sum() - len(r)) / off) if off else math.nan,
        "pull_away": float(pull_away(live.T)) if live.shape[1] > 1 else math.nan,
    }


class LogitRMSE(ImageMetric):
    """Error of the winning class's logit."""

    name = "logit_rmse"
    higher_is_better = False
    bounds = (0.0, math.inf)
    inputs = ("logits", "logits_rebuilt")
    definition = (
        "Root mean squared difference between the logit of each image's predicted class and the one rebuilt from the "
        "concepts, in logits. 0 is perfect. It cannot show that the concepts mean anything: a single one that copies "
        "the logit has 0 as well. Read it together with the significant concepts and the neurons rebuilt."
    )

    def statistics(self, *, logits: Tensor, logits_rebuilt: Tensor) -> Tensor:
        check_same_shape("logits", logits, "rebuilt logits", logits_rebuilt)
        winner = logits.argmax(dim=1, keepdim=True)
        return (logits_rebuilt.double() - logits.double()).gather(1, winner).square()

    def score(self, sums: Tensor, count: Tensor) -> Tensor:
        return (sums[..., 0] / count).sqrt()


class SignificantConcepts(ImageMetric):
    """Mean number of concepts that reach 90 % of the positive contributions to the prediction."""

    name = "significant_concepts"
    bounds = (0.0, math.inf)
    inputs = ("contributions",)
    higher_is_better = None
    definition = (
        "Mean number of concepts that it takes to reach 90 % of an image's positive contributions to its predicted "
        "class, strongest first. Fewer are easier to read; 1 everywhere says that one concept copies the decision, "
        "and 0 that nothing speaks for it. Images without any contribution are left out. It cannot show how right "
        "the contributions are."
    )

    def statistics(self, *, contributions: Tensor) -> Tensor:
        known = (contributions != 0).any(dim=1).double()
        return torch.stack([significant(contributions).double(), known], dim=1)

    def score(self, sums: Tensor, count: Tensor) -> Tensor:
        return sums[..., 0] / sums[..., 1]


class Participation(ImageMetric):
    """Mean participation ratio of the contributions to the prediction."""

    name = "participation"
    bounds = (1.0, math.inf)
    inputs = ("contributions",)
    higher_is_better = None
    definition = (
        "Mean over images of (sum |c|)^2 / sum c^2 over the contributions c to the predicted class: how many concepts "
        "share the decision, 1 if a single one has it all. Signs do not count: two that cancel count as two. Images "
        "without any contribution are left out. It cannot show what the concepts are."
    )

    def statistics(self, *, contributions: Tensor) -> Tensor:
        ratio = participation(contributions)
        known = (contributions != 0).any(dim=1)
        return torch.stack([ratio.where(known, 0.0), known.double()], dim=1)

    def score(self, sums: Tensor, count: Tensor) -> Tensor:
        return sums[..., 0] / sums[..., 1]


class NeuronsRebuilt(ImageMetric):
    """Share of the layer's features that the reconstruction recovers."""

    name = "neurons_rebuilt"
    higher_is_better = True
    bounds = (0.0, 1.0)
    inputs = ("activation", "reconstruction")
    definition = (
        "Share of the layer's features whose mean squared error of reconstruction is at most half of their variance, "
        "over all images and positions; features that do not vary are left out. It cannot show how well the others "
        "are rebuilt (r2_feature_mean does)."
    )

    def statistics(self, *, activation: Tensor, reconstruction: Tensor) -> Tensor:
        check_same_shape("activation", activation, "reconstruction", reconstruction)
        given, rebuilt = by_position(activation), by_position(reconstruction)
        error = (rebuilt - given).square().mean(2)
        return torch.cat([error, given.mean(2), given.square().mean(2)], dim=1)

    def score(self, sums: Tensor, count: Tensor) -> Tensor:
        error, mean, square = (sums / count[..., None]).chunk(3, dim=-1)
        variance = square - mean.square()
        live = variance > 1e-9 * square.clamp_min(1e-300)
        rebuilt = (error <= _REBUILT * variance) & live
        return rebuilt.double().sum(-1) / live.double().sum(-1)

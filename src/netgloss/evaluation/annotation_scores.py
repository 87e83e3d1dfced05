"""Scores against annotations: dissection, part interpretability and location, compared with controls.

Controls are evaluated at the on-rate of the method itself, since IoU grows with the rate. Labels and thresholds come
from some annotated images, scores from others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from netgloss.activations import Store
from netgloss.activations.annotated import MaskedLayer
from netgloss.errors import UserError
from netgloss.evaluation.dissect import Dissected, dissect, significance
from netgloss.evaluation.locate import landmarks_of, location_scores, peaks_of
from netgloss.metrics import Score, interval
from netgloss.metrics.base import UNBOUNDED, Bounds
from netgloss.metrics.dissection.detectors import DETECTOR_IOU
from netgloss.metrics.dissection.rates import PUBLISHED_RATE
from netgloss.metrics.location import part_interpretability
from netgloss.progress import Progress

if TYPE_CHECKING:
    from netgloss.classifiers import Classifier
    from netgloss.data import ImageSource
    from netgloss.explainers.base import Explainer

_DISSECTION = {
    "S1": "sum over concepts of the IoU with their label's mask; grows with the number of concepts and the on-rate",
    "S1x": "S1 minus the score of scattered masks of the same sizes",
    "S1xl": "S1 minus the score of the same masks on another image's labels, so without what layout alone gives",
    "S2": "sum over labels of the best IoU of their concepts; cannot exceed the number of labels",
    "S2x": "S2 minus the score of scattered masks of the same sizes",
    "S2xl": "S2 minus the score of the same masks on another image's labels",
    "detectors": f"concepts with an IoU above {DETECTOR_IOU}; a mask of the right size passes it by chance",
    "unique_detectors": f"distinct labels among the concepts with an IoU above {DETECTOR_IOU}",
}
_PARTS: dict[str, tuple[str, Callable[[Dissected], float]]] = {
    "part_iou": (
        "mean over concepts of the IoU with their label's masks",
        lambda one: float(one.detectors.phi.mean()),
    ),
    "part_interpretability": (
        "share of concepts whose IoU with their label's masks passes 0.2",
        lambda one: part_interpretability(one.detectors.phi),
    ),
}
_LARGEST_RATE = 0.9999
_SAME = 1e-3
"""Distance of the activations of two images, in mean distances from the centre, below which they are one image."""


@dataclass(frozen=True)
class Dissections:
    """A method and its controls, dissected at two rules.

    Attributes
    ----------
    own, published : one per explainer, at the method's own threshold and at the published on-rate.
    matched : the rule that gives controls the on-rate of the method.
    controls, controls_published : by name, the controls at these rules.
    """

    own: list[Dissected]
    published: list[Dissected]
    matched: str
    controls: dict[str, list[Dissected]]
    controls_published: dict[str, list[Dissected]]


def dissect_with_controls(
    explainers: Sequence[Explainer],
    controls: Mapping[str, Sequence[Explainer]],
    label: tuple[MaskedLayer, np.ndarray],
    score: tuple[MaskedLayer, np.ndarray],
    progress: Progress,
) -> Dissections:
    """Dissects a method's explainers, then its controls at the same on-rate."""
    published = f"rate:{PUBLISHED_RATE:g}"
    progress.start("dissect", len(explainers) + sum(map(len, controls.values())), unit="explainers")
    own, at_published = [], []
    for explainer in explainers:
        by_rule = dissect(explainer, label, score, ["own", published], replicates=200)
        own.append(next(iter(by_rule.values())))
        at_published.append(by_rule[published])
        progress.advance()
    matched = matched_rule([one.label_rate for one in own])
    of_controls: dict[str, list[Dissected]] = {}
    of_controls_published: dict[str, list[Dissected]] = {}
    for name, others in controls.items():
        for other in others:
            by_rule = dissect(other.cpu(), label, score, [matched, published])
            of_controls.setdefault(name, []).append(by_rule[matched])
            of_controls_published.setdefault(name, []).append(by_rule[published])
            progress.advance()
    progress.finish()
    return Dissections(own, at_published, matched, of_controls, of_controls_published)


def matched_rule(rates: Sequence[float]) -> str:
    """The rule at which controls are on as often as the method, on average; it stays just below always on."""
    return f"rate:{min(float(np.mean(rates)), _LARGEST_RATE):.4g}"


def dissection_scores(dissections: Dissections, num_images: int) -> list[Score]:
    """Interpretability of the basis (S1, S2, detectors) and of parts, with the controls as baselines."""
    own, scores = dissections.own, []
    for name, meaning in _DISSECTION.items():
        replicates = torch.stack([one.phi_replicates.sum(1) for one in own]) if name == "S1" else None
        definition = (
            f"{meaning}. Threshold: {own[0].rule} (on-rate {own[0].label_rate:.4f}); the baselines are evaluated at "
            f"the same on-rate ({dissections.matched}). Labels come from other annotated images."
        )
        given = (f"dissection_{name}", partial(_named, name), own, dissections.controls, num_images, definition)
        scores.append(_score(*given, replicates=replicates))
    for name, (meaning, read) in _PARTS.items():
        definition = (
            f"Part interpretability: {meaning}, each concept on in its strongest {PUBLISHED_RATE:.1%} of positions; "
            "labels come from other annotated images. Large parts are easier."
        )
        published = (dissections.published, dissections.controls_published)
        scores.append(_score(name, read, *published, num_images, definition, bounds=(0.0, 1.0)))
    return scores


def _named(name: str, dissected: Dissected) -> float:
    return dissected.scores()[name]


def _score(
    metric: str,
    read: Callable[[Dissected], float],
    dissected: Sequence[Dissected],
    controls: Mapping[str, Sequence[Dissected]],
    num_images: int,
    definition: str,
    *,
    replicates: torch.Tensor | None = None,
    bounds: Bounds = UNBOUNDED,
) -> Score:
    values = torch.tensor([read(one) for one in dissected], dtype=torch.float64)
    low, high = interval(values, replicates, bounds=bounds)
    return Score(
        metric=metric,
        value=float(values.mean()),
        low=low,
        high=high,
        baselines={name: float(np.mean([read(one) for one in others])) for name, others in controls.items()},
        n=num_images,
        seeds=len(dissected),
        higher_is_better=True,
        definition=definition,
    )


def landmark_scores(
    explainers: Sequence[Explainer],
    controls: Mapping[str, Sequence[Explainer]],
    data: MaskedLayer,
    images: ImageSource,
    classifier: Classifier,
    unseen: np.ndarray,
) -> list[Score]:
    """Location instability on annotated images ``unseen`` by the fit; none without landmarks."""
    names, places, size = landmarks_of(images, unseen, classifier.preprocessing)
    if not names or len(unseen) < 2:
        return []
    grid = data.store.shapes[data.layer][1:]
    peaks = [peaks_of(e, data.store, data.layer, unseen, size=size) for e in explainers]
    of_controls = {
        name: [peaks_of(e.cpu(), data.store, data.layer, unseen, size=size) for e in others]
        for name, others in controls.items()
    }
    return location_scores(peaks, of_controls, places, names, grid=(grid[0], grid[1]), size=size)


# -- which images the fit has seen ------------------------------------------------------------------------------------


def unseen_images(
    store: Store,
    fit_images: np.ndarray,
    images: ImageSource,
    source: ImageSource | None,
    annotated: np.ndarray,
    score_images: np.ndarray,
) -> np.ndarray:
    """Annotated images that are not images of the fit; the score images where the run's own images are not given."""
    if source is None or not store.is_of(source):
        return score_images
    fitted = {source._digest(int(i)) for i in fit_images}
    return np.array([i for i in annotated.tolist() if images._digest(i) not in fitted], dtype=int)


def refuse_fit_images(
    store: Store,
    fit_images: np.ndarray,
    data: MaskedLayer,
    images: ImageSource,
    source: ImageSource | None,
    score_images: np.ndarray,
) -> None:
    """Refuses score images that are images of the fit: compared by content where the run's images ``source`` are given,
    else by their activations.

    Raises
    ------
    UserError : names one such image.
    """
    if source is not None and store.is_of(source):
        fitted = {source._digest(int(i)) for i in fit_images}
        shared = [images.ids[i] for i in score_images.tolist() if images._digest(i) in fitted]
    elif store.is_subsampled(data.layer):
        return
    else:
        seen, asked = (_means(s, data.layer, i) for s, i in ((store, fit_images), (data.store, score_images)))
        centre = seen.mean(0)
        apart = torch.cdist(asked - centre, seen - centre, compute_mode="donot_use_mm_for_euclid_dist").amin(1)
        same = apart < _SAME * seen.sub(centre).norm(dim=1).mean()
        shared = [images.ids[i] for i, is_same in zip(score_images.tolist(), same.tolist(), strict=True) if is_same]
    if shared:
        raise UserError(
            f"{len(shared)} of {len(score_images)} annotated score images are images of the fit ({shared[0]}, ...): "
            "annotate images that the run has not seen"
        )


def _means(store: Store, layer: str, images: np.ndarray) -> torch.Tensor:
    """(n, C) mean activation of the layer over its grid, for each image."""
    parts = []
    for start in range(0, len(images), 64):
        activation = torch.from_numpy(store.read(layer, images[start : start + 64])).double()
        parts.append(activation.flatten(2).mean(2) if activation.ndim == 4 else activation)
    return torch.cat(parts)


# -- what each concept detects ----------------------------------------------------------------------------------------


def detector_records(
    explainer: Explainer, dissected: Dissected, data: MaskedLayer, score_images: np.ndarray
) -> list[dict[str, Any]]:
    """The label of each concept of one explainer, its IoU with baselines, and a permutation test of it."""
    test = significance(explainer, dissected, data, score_images)
    detectors, names = dissected.detectors, dissected.detectors.vocabulary.labels

    def name(k: int) -> str | None:
        return names[k] if k >= 0 else None

    return [
        {
            "id": i,
            "label": name(int(detectors.labels[i])),
            "iou": float(detectors.phi[i]),
            "chance": float(detectors.chance[i]),
            "layout_chance": float(detectors.layout[i]),
            "precision": float(detectors.precision[i]),
            "recall": float(detectors.recall[i]),
            "runner_up": name(int(dissected.runner_up[i])),
            "runner_up_iou": float(dissected.runner_up_iou[i]),
            "threshold": float(dissected.thresholds[i]),
            "p": float(test["p"][i]),
            "z": float(test["z"][i]),
            "significant": bool(test["significant"][i]),
        }
        for i in range(len(detectors.phi))
    ]


def is_detector(record: Mapping[str, Any]) -> bool:
    """True for a concept whose IoU passes the threshold and the permutation test."""
    return record["label"] is not None and record["iou"] > DETECTOR_IOU and record["significant"]

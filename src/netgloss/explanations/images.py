"""Single images explained: the one implementation, for ``netgloss show``, the images of the report and the served page.

The logit of the explained class is split into ``base + contributions + gap``
(:mod:`netgloss.metrics.faithfulness.importance`). The drivers are the concepts of the largest absolute contribution.

Shape letters: B images, K concepts, H W grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from netgloss.activations.layer import LayerBatch
from netgloss.explainers.base import Explainer
from netgloss.explanations.heatmaps import ConceptRange, concept_heatmaps
from netgloss.explanations.removal import STRENGTHS, is_exact, removal_record, replay
from netgloss.metrics.faithfulness.importance import explain_class, explained_share, strongest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Heat = Callable[[list[int]], Tensor]


@dataclass(frozen=True)
class Driver:
    """A concept behind a prediction, with its contribution to the logit and its map (H, W), a scalar () without one.

    ``scale`` is the one of the concept's maps over all images, where it is known.
    """

    concept: int
    name: str
    contribution: float
    map: np.ndarray
    scale: ConceptRange | None = None


@dataclass(frozen=True)
class ImageExplanation:
    """What drove the prediction of one image.

    Attributes
    ----------
    prediction, probability : of the classifier.
    explained_class : whose logit is explained: the prediction, unless the method rebuilds the scores of other classes.
    logit, rebuilt_logit : of that class, by the network and from the decoded concepts.
    base, gap : the logit without any concept, and what base and all contributions leave unexplained.
    contributions : of every concept by name, the largest absolute one first.
    drivers : the concepts shown.
    others : the sum of the contributions of all other concepts.
    removal : the logits with each driver weakened, as the report's sliders read them; None if not computed.
    weighted : the method rebuilds class scores itself; figures then dim its maps by contribution.
    picture : (height, width, 3) in [0, 1], as the network saw it; None if not given.
    files : what :func:`netgloss.show` wrote.
    share : of the logit that the concepts explain (``explained_share`` of the metrics), None if that is not defined.
    """

    prediction: str
    probability: float
    explained_class: str
    logit: float
    rebuilt_logit: float
    base: float
    gap: float
    contributions: dict[str, float]
    drivers: tuple[Driver, ...]
    others: float
    removal: dict[str, Any] | None
    weighted: bool
    picture: np.ndarray | None = None
    image: str = ""
    files: tuple[Path, ...] = ()

    @property
    def share(self) -> float | None:
        values = (torch.tensor([v], dtype=torch.float64) for v in (self.logit, self.base, self.gap))
        share = float(explained_share(*values))
        return share if math.isfinite(share) else None

    def numbers(self) -> dict[str, Any]:
        """The numbers, ready for JSON."""
        names = ("prediction", "explained_class", "probability", "logit", "rebuilt_logit", "base", "gap")
        return {**{name: getattr(self, name) for name in names}, "contributions": self.contributions}

    def record(self, ranges: Sequence[ConceptRange]) -> dict[str, Any]:
        """The entry ``explained`` of concepts.json, with maps drawn on the scales ``ranges`` of the concepts."""
        return {
            "class": self.explained_class,
            "logit": self.logit,
            "rebuilt": self.rebuilt_logit,
            "base": self.base,
            "gap": self.gap,
            "share": self.share,
            "others": self.others,
            "drivers": [
                {"concept": d.concept, "contribution": d.contribution, "map": ranges[d.concept].encode(d.map)}
                for d in self.drivers
            ],
            "removal": self.removal,
        }

    def figure(self) -> Figure:
        """The image with the maps of its drivers, and what each adds to the logit."""
        from netgloss.figures import ExplainedImage, image_explanation

        assert self.picture is not None
        known = [d.scale for d in self.drivers if d.scale is not None]
        scales = [(r.low, r.high, r.contour) for r in known] if len(known) == len(self.drivers) else None
        same = self.explained_class == self.prediction
        return image_explanation(
            ExplainedImage(
                self.picture,
                [d.map if d.map.ndim else None for d in self.drivers],
                [d.contribution for d in self.drivers],
                [d.name for d in self.drivers],
                self.prediction if same else f"{self.prediction} (explained: the score of {self.explained_class})",
                self.probability,
                self.logit,
                self.rebuilt_logit,
                self.base,
                self.gap,
                self.weighted,
                scales,
            )
        )


def explain_images(
    explainer: Explainer,
    batch: LayerBatch,
    class_names: Sequence[str],
    *,
    maps: Sequence[np.ndarray] | None = None,
    heat: Heat | None = None,
    drivers: int = 6,
    also: Sequence[int | None] = (),
    affine: bool | None = None,
    pictures: Sequence[np.ndarray] = (),
    ranges: Sequence[ConceptRange] | None = None,
) -> list[ImageExplanation]:
    """Explains the images of a batch.

    Parameters
    ----------
    maps : B times (K, H, W), or (K,) where there are none; default the codes, or heatmaps for pooled methods.
    heat : gives the maps (n, H, W) of some concepts of a single image instead.
    also : B concepts that are drivers in any case, or None.
    affine : whether the tail is affine; None leaves out ``removal``, which is also left out for several labels, as it
        is about the class that wins.
    pictures : B pictures (height, width, 3) in [0, 1].
    ranges : K scales of the concepts, for figures; default each map's own.
    """
    affine = None if batch.outputs == "multilabel" else affine
    with torch.no_grad():
        codes = explainer.encode(batch.activation)
    predicted, explained = batch.logits.argmax(dim=1), explainer.explained_classes
    classes = predicted
    if explained is not None:
        classes = torch.tensor(explained, device=batch.logits.device)[batch.logits[:, explained].argmax(dim=1)]
    parts = explain_class(explainer, batch.tail, codes, batch.logits, classes, activation=batch.activation)
    values_BK, names = parts.values.cpu(), explainer.name_concepts()
    orders = [strongest(values_K, drivers) for values_K in values_BK]
    orders = [_with(order, k) for order, k in zip(orders, also or [None] * len(orders), strict=True)]
    exact = affine is not None and is_exact(explainer, codes, affine=affine)
    replayed = None
    if affine is not None:
        replayed = replay(explainer, batch, codes, orders, (0.0,) if exact else STRENGTHS)
    if maps is None:
        maps = _maps(explainer, batch, codes)
    explanations = []
    for row, order in enumerate(orders):
        values_K, shown = values_BK[row], int(classes[row])
        logit, base = float(batch.logits[row, shown]), float(parts.base[row])
        drawn = [maps[row][k] for k in order] if heat is None or not order else list(heat(order).cpu().numpy())
        removal = None
        if replayed is not None:
            removal = removal_record(replayed[row], batch.logits[row], order, class_names, shown, exact=exact)
        explanations.append(
            ImageExplanation(
                prediction=class_names[int(predicted[row])],
                probability=float(batch.probabilities[row, predicted[row]]),
                explained_class=class_names[shown],
                logit=logit,
                rebuilt_logit=float(parts.rebuilt[row]),
                base=base,
                gap=logit - base - float(values_K.sum()),
                contributions={names[k]: float(values_K[k]) for k in values_K.abs().argsort(descending=True).tolist()},
                drivers=tuple(
                    Driver(k, names[k], float(values_K[k]), np.asarray(m), ranges[k] if ranges else None)
                    for k, m in zip(order, drawn, strict=True)
                ),
                others=float(values_K.sum() - values_K[order].sum()),
                removal=removal,
                weighted=explained is not None,
                picture=pictures[row] if len(pictures) else None,
            )
        )
    return explanations


def _maps(explainer: Explainer, batch: LayerBatch, codes: Tensor) -> list[np.ndarray]:
    """Maps (K, H, W) of each image, or (K,) where the concepts have none."""
    if batch.maps is not None:
        codes = concept_heatmaps(explainer.encode, batch.maps, range(explainer.num_concepts))
    return list(codes.float().cpu().numpy())


def _with(order: list[int], concept: int | None) -> list[int]:
    """The order with ``concept`` in it, in the last place if it was not there."""
    return order if concept is None or concept in order else [*order[:-1], concept]

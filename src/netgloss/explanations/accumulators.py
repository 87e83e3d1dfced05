"""One pass over the stored activations: each concept's range, strongest images and contributions, as running sums.

Memory does not grow with the number of images (but for a few numbers per image).

Shape letters: B images, K concepts, P positions, T images shown for each concept.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from netgloss.activations.layer import Layer, LayerBatch
from netgloss.explainers.base import Explainer
from netgloss.explanations.mistakes import Mistake, find_mistakes
from netgloss.metrics.faithfulness.agreement import decision_kept
from netgloss.metrics.faithfulness.importance import Contributions, explain_class, explained_share
from netgloss.progress import Progress

EPS = 1e-12


_KEPT_BYTES = 1 << 28


def by_position(codes: Tensor) -> Tensor:
    """(B, K) or (B, K, H, W) -> (B, K, P) on the CPU."""
    return codes.flatten(2).cpu() if codes.ndim == 4 else codes[:, :, None].cpu()


@dataclass
class ClassAccumulators:
    """Sums over the images of one class."""

    contribution_K: Tensor
    squares_K: Tensor
    images: int = 0
    labelled: int = 0
    correct: int = 0
    agree: int = 0
    logit: float = 0.0
    base: float = 0.0
    gap: float = 0.0


@dataclass
class ConceptAccumulators:
    """What one pass over the images gathers; ``top_images`` (T, K) are store indices, strongest first."""

    num_concepts: int
    gallery: int
    rows: int = 0
    low_K: Tensor = field(init=False)
    high_K: Tensor = field(init=False)
    total_K: Tensor = field(init=False)
    active_K: Tensor = field(init=False)
    influence_K: Tensor = field(init=False)
    top_strength: Tensor = field(init=False)
    top_images: Tensor = field(init=False)
    by_class: dict[int, ClassAccumulators] = field(default_factory=dict)
    predictions: dict[int, tuple[int, float]] = field(default_factory=dict)
    abs_gap: float = 0.0
    abs_scale: float = 0.0
    explained: int = 0
    labelled: int = 0
    mistakes: list[Mistake] = field(default_factory=list)
    shares: dict[int, float] = field(default_factory=dict)
    """How much of its prediction's logit the concepts explain, by image."""
    codes: list[Tensor] = field(default_factory=list)
    """(B, K, P) of every batch, where they are kept."""

    def __post_init__(self) -> None:
        k = self.num_concepts
        self.low_K = torch.full((k,), float("inf"))
        self.high_K = torch.full((k,), float("-inf"))
        self.total_K, self.active_K, self.influence_K = (torch.zeros(k, dtype=torch.float64) for _ in range(3))
        self.top_strength = torch.zeros((0, k))
        self.top_images = torch.zeros((0, k), dtype=torch.long)

    def add_codes(self, codes_BKP: Tensor, index: Tensor) -> None:
        """Ranges and galleries."""
        self.rows += codes_BKP.shape[0] * codes_BKP.shape[2]
        self.low_K = torch.minimum(self.low_K, codes_BKP.amin(dim=(0, 2)))
        self.high_K = torch.maximum(self.high_K, codes_BKP.amax(dim=(0, 2)))
        self.total_K += codes_BKP.double().sum(dim=(0, 2))
        self.active_K += (codes_BKP.abs() > EPS).double().sum(dim=(0, 2))
        # an image ranks by its peak; its mean breaks ties (one-hot codes, clipped activations)
        strength = torch.cat([self.top_strength, codes_BKP.amax(dim=2) + 1e-3 * codes_BKP.mean(dim=2)])
        images = torch.cat([self.top_images, index[:, None].expand(-1, self.num_concepts)])
        best = strength.topk(min(self.gallery, len(strength)), dim=0).indices
        self.top_strength, self.top_images = strength.gather(0, best), images.gather(0, best)

    def add_predictions(self, batch: LayerBatch) -> Tensor:
        """Predicted class (B,) of each image, of several labels the strongest, remembered with its probability."""
        probability, predicted = batch.probabilities.max(dim=1)
        entries = zip(batch.index.tolist(), predicted.tolist(), probability.tolist(), strict=True)
        self.predictions.update({i: (c, p) for i, c, p in entries})
        return predicted

    def add_influence(self, batch: LayerBatch, predicted: Tensor, parts: Contributions) -> None:
        """Each concept's share of an image's absolute contributions to its prediction, and the gaps."""
        logit = batch.logits.gather(1, predicted[:, None])[:, 0]
        shares = explained_share(logit, parts.base, logit - parts.base - parts.values.sum(dim=1))
        self.shares.update(zip(batch.index.tolist(), shares.tolist(), strict=True))
        share = parts.values.abs()
        self.influence_K += (share / share.sum(dim=1, keepdim=True).clamp_min(EPS)).double().sum(dim=0).cpu()
        self.abs_gap += float(parts.gap.abs().sum())
        self.abs_scale += float((parts.rebuilt - parts.base).abs().sum())
        self.explained += len(parts.rebuilt)

    def add_classes(
        self, batch: LayerBatch, classes: Tensor, predicted: Tensor, kept: Tensor, parts: Contributions
    ) -> None:
        """Sums by class: the labelled one, or the predicted one where there is no label.

        Parameters
        ----------
        kept : (B,) whether the decision for the predicted class is the same from the rebuilt layer.
        """
        values_BK = parts.values.double().cpu()
        for row, c in enumerate(classes.tolist()):
            zeros = torch.zeros(self.num_concepts, dtype=torch.float64)
            entry = self.by_class.setdefault(c, ClassAccumulators(zeros, zeros.clone()))
            entry.contribution_K += values_BK[row]
            entry.squares_K += values_BK[row] ** 2
            entry.images += 1
            labelled = bool(batch.labels[row] >= 0)
            entry.labelled += labelled
            entry.correct += labelled and bool(predicted[row] == c)
            entry.agree += bool(kept[row])
            logit, base = float(batch.logits[row, c]), float(parts.base[row])
            entry.logit += logit
            entry.base += base
            entry.gap += logit - base - float(values_BK[row].sum())


def accumulate_concepts(
    explainer: Explainer, layer: Layer, images: np.ndarray, *, gallery: int, progress: Progress, keep: bool = False
) -> ConceptAccumulators:
    """The pass itself; contributions only where the concepts lead to the logits.

    Parameters
    ----------
    keep : keep the codes, unless they are large.
    """
    sums = ConceptAccumulators(explainer.num_concepts, gallery)
    progress.start("explanations", len(images), unit="images")
    for batch in layer.batches(images):
        with torch.no_grad():
            codes = explainer.encode(batch.activation)
        codes_BKP = by_position(codes)
        sums.add_codes(codes_BKP, batch.index)
        if keep and codes_BKP[0].numel() * codes_BKP.element_size() * len(images) <= _KEPT_BYTES:
            sums.codes.append(codes_BKP)
        predicted = sums.add_predictions(batch) if batch.logits.shape[1] else batch.labels
        if explainer.target != "image" and batch.logits.shape[1]:
            classes = torch.where(batch.labels >= 0, batch.labels, predicted)
            given = (explainer, batch.tail, codes, batch.logits)
            of_class = explain_class(*given, classes, activation=batch.activation)
            same = bool((classes == predicted).all())
            of_prediction = of_class if same else explain_class(*given, predicted, activation=batch.activation)
            sums.add_influence(batch, predicted, of_prediction)
            sums.labelled += int((batch.labels >= 0).sum())
            sums.mistakes += find_mistakes(batch.index, batch.logits, batch.labels, of_class, of_prediction)
            with torch.no_grad():
                own = explainer.rebuilt_logits(codes, batch.logits)
                rebuilt = batch.tail(explainer.decoder_for(batch.activation)(codes)) if own is None else own
            kept = decision_kept(batch.logits, rebuilt, predicted, batch.outputs)
            sums.add_classes(batch, classes, predicted, kept, of_class)
        progress.advance(len(batch.index))
    progress.finish()
    return sums

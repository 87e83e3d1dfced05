"""Network dissection for any concepts: where does a thresholded concept map agree with an annotator's masks?

The masks are sums first, one ratio a data set (Bau et al. 2017, arXiv 1704.05796)::

    M_i = [upsampled map of concept i > threshold_i]              on, strictly
    IoU_i(c) = sum_images |M_i & L_c| / sum_images |M_i or L_c|   over images annotated for c's category

A concept's label c*_i is the mask with the best IoU on the *label* images; phi_i = IoU_i(c*_i) is measured on the
*score* images, which enter nothing else. With r the on-rate and f the share of c*_i on the score images::

    S1 = sum_i phi_i = int_0^1 N(xi) dxi,    N(xi) = number of detectors with phi >= xi
    S2 = sum over labels of the largest phi of its detectors = int_0^1 U(xi) dxi,   U = distinct labels among them
    chance_i = r f / (r + f - r f)           what a mask of the same size scattered at random would reach
    layout_i = E T / (|M| + |L| - E T)       what its own masks, paired with another image's labels, would reach
    S1x, S2x and S1xl, S2xl                  the same with phi - chance, phi - layout

S1 (Doumanoglou et al. 2023, arXiv 2303.10523) of any basis more than triples with its threshold alone: compare at equal
on-rate only (``netgloss.metrics.dissection.rates``). None of these numbers says that the classifier uses a concept,
and a label is only as good as the vocabulary.

Shape letters: B images, I concepts, h w their map, P pixels of the mask grid, L labels, A categories, R rules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from netgloss.data.masks import GRID, Masks, Vocabulary
from netgloss.errors import UserError
from netgloss.metrics.base import poisson_weights
from netgloss.metrics.dissection.overlaps import overlaps

DETECTOR_IOU = 0.04
"""IoU above which a concept counts as a detector (published code of network dissection)."""


class Dissection(Metric):
    """Streams the counts behind every IoU; memory does not depend on the number of images.

    Parameters
    ----------
    thresholds : (R, I) or (I,): the thresholds of one or several rules.
    vocabulary : labels and categories.
    grid : mask grid.
    chosen : (R, I) label of each concept (-1: none), once it is known from other images: then the layout chance and
        bootstrap replicates of phi are kept too.
    replicates : Poisson bootstrap replicates of the images (with ``chosen``).

    Notes
    -----
    ``update(index, concepts, masks)`` takes the place of each image in its data set (B,), which drives the bootstrap.
    """

    full_state_update = False
    counts: Tensor
    sizes: Tensor
    images: Tensor
    on_at: Tensor
    label_at: Tensor
    replicated: Tensor

    def __init__(
        self,
        thresholds: Tensor,
        vocabulary: Vocabulary,
        *,
        grid: tuple[int, int] = GRID,
        chosen: Tensor | None = None,
        replicates: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.thresholds = torch.atleast_2d(thresholds).float()
        self.vocabulary, self.grid = vocabulary, grid
        self.chosen = None if chosen is None else torch.atleast_2d(chosen).long()
        rules, concepts = self.thresholds.shape
        labels, categories, pixels = len(vocabulary.labels), len(vocabulary.categories), grid[0] * grid[1]
        if self.chosen is not None and self.chosen.shape != self.thresholds.shape:
            raise UserError(
                f"chosen labels {tuple(self.chosen.shape)} must be as many as thresholds {tuple(self.thresholds.shape)}"
            )

        def state(name: str, *shape: int) -> None:
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

        state("counts", rules, concepts, labels + categories)
        state("sizes", labels + categories)
        state("images", categories)
        if self.chosen is not None:
            state("on_at", rules, concepts, pixels)
            state("label_at", labels, pixels)
            state("replicated", replicates, rules, concepts, 3)

    def update(self, index: Tensor, concepts: Tensor, masks: Masks) -> None:
        """Add images.

        Raises
        ------
        UserError : concepts or masks of other numbers or sizes than the metric was made for.
        """
        if len(concepts) != len(masks.labels) or concepts.shape[1] != self.thresholds.shape[1]:
            raise UserError(
                f"concepts {tuple(concepts.shape)} do not fit {len(masks.labels)} masks and "
                f"{self.thresholds.shape[1]} thresholds"
            )
        if tuple(masks.labels.shape[2:]) != self.grid:
            raise UserError(f"masks of {tuple(masks.labels.shape[2:])} cells do not fit the grid {self.grid}")
        columns = masks.columns(self.vocabulary)
        counted = columns[:, len(self.vocabulary.labels) :].any(dim=2)
        kept = {}
        if self.chosen is not None:
            kept = {"within": self._columns_of(self.chosen)[1], "places": self.on_at}
        found = overlaps(concepts, self.thresholds, columns, self.grid, **kept)
        self.counts += found.sum(0, dtype=torch.float64)
        self.sizes += columns.sum((0, 2), dtype=torch.float64)
        self.images += counted.sum(0)
        if self.chosen is not None:
            self._add_chosen(index, columns, found)

    def _add_chosen(self, index: Tensor, columns: Tensor, found: Tensor) -> None:
        """What is kept for known labels in addition to where the concepts lie: where the labels do, and the
        bootstrap.
        """
        assert self.chosen is not None
        label_RI, category_RI = self._columns_of(self.chosen)
        sizes = columns.sum(2)
        per_image = torch.stack(
            [
                found.gather(3, label_RI.expand(len(found), -1, -1)[..., None]).squeeze(3),
                found.gather(3, category_RI.expand(len(found), -1, -1)[..., None]).squeeze(3),
                sizes[:, label_RI],
            ],
            dim=3,
        )
        if len(self.replicated):
            weights = poisson_weights(index, len(self.replicated))
            self.replicated += torch.einsum("kb,bric->kric", weights, per_image.double())
        self.label_at += columns[:, : len(self.vocabulary.labels)].sum(0)

    def _columns_of(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Column of each chosen label and of its category."""
        category = torch.tensor(self.vocabulary.category, device=chosen.device)
        label = chosen.clamp_min(0)
        return label, len(self.vocabulary.labels) + category[label]

    def compute(self) -> Overlaps:
        """The counts so far."""
        chance = None
        if self.chosen is not None:
            label, category = self._columns_of(self.chosen)
            paired = torch.einsum("rip,rip->ri", self.on_at, self.label_at[label])
            chance = paired / self.images[category - len(self.vocabulary.labels)].clamp_min(1)
        return Overlaps(
            self.vocabulary,
            self.counts.clone(),
            self.sizes.clone(),
            self.chosen,
            chance,
            self.replicated.clone() if self.chosen is not None else None,
        )


class Overlaps:
    """Counts of pixels of a data set.

    Parameters
    ----------
    counts : (R, I, L + A) pixels where concepts are on, in each label and among those that count for each category.
    sizes : (L + A,) pixels of each.
    chosen, expected, replicated : (R, I) labels given before, (R, I) E T of the layout chance, (K, R, I, 3) bootstrap.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        counts: Tensor,
        sizes: Tensor,
        chosen: Tensor | None = None,
        expected: Tensor | None = None,
        replicated: Tensor | None = None,
    ) -> None:
        self.vocabulary, self.counts, self.sizes = vocabulary, counts, sizes
        self.chosen, self.expected, self.replicated = chosen, expected, replicated

    @property
    def num_labels(self) -> int:
        return len(self.vocabulary.labels)

    def iou(self) -> Tensor:
        """(R, I, L); 0 where neither concept nor label has a pixel."""
        inter = self.counts[..., : self.num_labels]
        on = self.counts[..., self.num_labels :][..., list(self.vocabulary.category)]
        return inter / (on + self.sizes[: self.num_labels] - inter).clamp_min(1)

    def on_rate(self) -> Tensor:
        """(R, I): share of the counting pixels, over all categories, where a concept is on."""
        return self.counts[..., self.num_labels :].sum(-1) / self.sizes[self.num_labels :].sum().clamp_min(1)

    def best(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Label and IoU of each concept, runner-up and its IoU, (R, I) each; -1 where the IoU is 0. Ties: lower
        index.
        """
        values, order = self.iou().sort(dim=-1, descending=True, stable=True)
        labels = torch.where(values > 0, order, -1)
        if self.num_labels == 1:
            return labels[..., 0], values[..., 0], torch.full_like(labels[..., 0], -1), torch.zeros_like(values[..., 0])
        return labels[..., 0], values[..., 0], labels[..., 1], values[..., 1]

    def detectors(self, rule: int = 0) -> Detectors:
        """How the concepts of one rule do on the labels that were chosen for them."""
        assert self.chosen is not None
        assert self.expected is not None
        chosen = self.chosen[rule]
        label = chosen.clamp_min(0)
        category = self.num_labels + torch.tensor(self.vocabulary.category)[label]
        inter = self.counts[rule].gather(1, label[:, None]).squeeze(1)
        on = self.counts[rule].gather(1, category[:, None]).squeeze(1)
        size, pixels = self.sizes[label], self.sizes[category].clamp_min(1)
        expected, known = self.expected[rule], chosen >= 0
        r, f = on / pixels, size / pixels
        zero = torch.zeros_like(r)

        def where_known(value: Tensor) -> Tensor:
            return torch.where(known, value, zero)

        return Detectors(
            vocabulary=self.vocabulary,
            labels=chosen,
            phi=where_known(_ratio(inter, on + size - inter)),
            chance=where_known(_ratio(r * f, r + f - r * f)),
            layout=where_known(_ratio(expected, on + size - expected)),
            precision=where_known(_ratio(inter, on)),
            recall=where_known(_ratio(inter, size)),
            on_rate=r,
        )

    def replicate_phi(self, rule: int = 0) -> Tensor:
        """(K, I): phi of each bootstrap replicate."""
        assert self.replicated is not None
        assert self.chosen is not None
        inter, on, size = self.replicated[:, rule].unbind(-1)
        return torch.where(self.chosen[rule] >= 0, _ratio(inter, on + size - inter), 0.0)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """``part / whole``, 0 where the whole is 0."""
    return torch.where(whole > 0, part / whole.clamp_min(1e-300), 0.0)


@dataclass(frozen=True)
class Detectors:
    """Labelled concepts on the score images; (I,) tensors named as in the module docstring. Label -1: none, phi = 0."""

    vocabulary: Vocabulary
    labels: Tensor
    phi: Tensor
    chance: Tensor
    layout: Tensor
    precision: Tensor
    recall: Tensor
    on_rate: Tensor

    def scores(self) -> dict[str, float]:
        """S1, S1x, S1xl, S2, S2x, S2xl, detectors, unique detectors, mean IoU and on-rate."""
        return {
            "S1": float(self.phi.sum()),
            "S1x": float((self.phi - self.chance).sum()),
            "S1xl": float((self.phi - self.layout).sum()),
            "S2": sum_of_best(self.phi, self.labels),
            "S2x": sum_of_best(self.phi - self.chance, self.labels),
            "S2xl": sum_of_best(self.phi - self.layout, self.labels),
            "detectors": float((self.phi > DETECTOR_IOU).sum()),
            "unique_detectors": float(len(self.labels[(self.phi > DETECTOR_IOU) & (self.labels >= 0)].unique())),
            "mean_iou": float(self.phi.mean()),
            "on_rate": float(self.on_rate.mean()),
            "num_concepts": float(len(self.phi)),
        }


def sum_of_best(values: Tensor, labels: Tensor) -> float:
    """Sum over labels of the largest value (I,) among the concepts that carry it; label -1 is no label."""
    known = labels >= 0
    if not known.any():
        return 0.0
    best = torch.full((int(labels.max()) + 1,), -torch.inf, dtype=values.dtype)
    best = best.scatter_reduce(0, labels[known], values[known], "amax")
    return float(best[best > -torch.inf].sum())

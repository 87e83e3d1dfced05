"""Dissects explainers with the masks of a data set: thresholds and labels from some images, scores from others.

The store holds the activations, the annotations follow the images through the network's preprocessing onto the mask
grid, and every explainer goes over both twice: the *label* images give thresholds and labels, the *score* images the
numbers. Definitions and what they cannot show: ``netgloss.metrics.dissection.detectors``.

Shape letters: B images, C features, I concepts, h w the layer's map, H W the mask grid, L labels, N rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from netgloss.activations.annotated import MaskedLayer
from netgloss.errors import UserError
from netgloss.explainers.base import Explainer, to_rows
from netgloss.metrics.dissection.detectors import Detectors, Dissection, Overlaps
from netgloss.metrics.dissection.rates import extent, on_rates, rate_thresholds, shared_thresholds
from netgloss.metrics.dissection.significance import PermutationTest, blocks_of

_HELD = 1 << 26
"""Numbers of the label rows that are kept in memory between passes (256 MiB); more are computed again."""


@dataclass(frozen=True)
class Dissected:
    """What one rule gives for one explainer.

    Attributes
    ----------
    rule : ``own``, ``rate:R`` or ``shared:R``. thresholds : (I,).
    label_rate, label_pixel_rate : mean on-rate over the rows, and over the mask pixels, of the label images.
    detectors : labelled concepts on the score images.
    label_iou, runner_up, runner_up_iou : (I,) on the label images.
    phi_replicates : (K, I) bootstrap of phi over score images.
    """

    rule: str
    thresholds: Tensor
    label_rate: float
    label_pixel_rate: float
    detectors: Detectors
    label_iou: Tensor
    runner_up: Tensor
    runner_up_iou: Tensor
    phi_replicates: Tensor

    def scores(self) -> dict[str, float]:
        """The scores of the rule, with its on-rates."""
        return {**self.detectors.scores(), "label_rate": self.label_rate, "label_pixel_rate": self.label_pixel_rate}


def own_thresholds(explainer: Explainer, lowest: Tensor) -> Tensor | None:
    """(I,) what the method itself calls on: its thresholds, 0 for codes that are never negative; None if it has
    none.
    """
    thresholds = getattr(explainer, "thresholds", None)
    if thresholds is not None:
        return thresholds().detach().cpu().float()
    return torch.zeros_like(lowest) if bool((lowest >= 0).all()) else None


@torch.no_grad()
def dissect(
    explainer: Explainer,
    label: tuple[MaskedLayer, np.ndarray],
    score: tuple[MaskedLayer, np.ndarray],
    rules: Sequence[str],
    *,
    replicates: int = 0,
    batch_size: int = 32,
) -> dict[str, Dissected]:
    """Every rule on one explainer: two passes over the label images, one over the score images (and one for
    thresholds).

    Parameters
    ----------
    label, score : annotated data and image indices; the two must not share an image.
    rules : ``"own"`` (left out of the result where the method has none), ``"rate:0.005"``, ``"shared:0.01"``.

    Raises
    ------
    UserError : score images among the label images, other labels in the two sets, or an unknown rule.
    """
    (label_data, label_images), (score_data, score_images) = label, score
    if label_data is score_data and len(np.intersect1d(label_images, score_images)):
        raise UserError("score images must not be among the label images: choose disjoint images")
    if label_data.vocabulary != score_data.vocabulary:
        raise UserError("label and score images must be annotated with the same labels: pass the same labels=")

    held: list[Tensor] = []

    def chunks() -> Iterator[Tensor]:
        if held:
            yield from held
            return
        parts: list[Tensor] = []
        elements = 0
        for _, activation in label_data.batches(label_images, batch_size=batch_size):
            rows = to_rows(explainer.encode(activation))
            elements += rows.numel()
            if elements <= _HELD:
                parts.append(rows)
            yield rows
        if elements <= _HELD:
            held.extend(parts)

    names, thresholds = _thresholds(explainer, chunks, rules)
    rates = on_rates(chunks, thresholds).mean(1)
    first = Dissection(thresholds, label_data.vocabulary, grid=label_data.grid)
    _stream(first, explainer, label_data, label_images, batch_size)
    counted: Overlaps = first.compute()
    chosen, label_iou, second, second_iou = counted.best()
    last = Dissection(thresholds, label_data.vocabulary, grid=score_data.grid, chosen=chosen, replicates=replicates)
    _stream(last, explainer, score_data, score_images, batch_size)
    found: Overlaps = last.compute()
    return {
        name: Dissected(
            name,
            thresholds[r],
            float(rates[r]),
            float(counted.on_rate()[r].mean()),
            found.detectors(r),
            label_iou[r],
            second[r],
            second_iou[r],
            found.replicate_phi(r),
        )
        for r, name in enumerate(names)
    }


def _stream(metric: Dissection, explainer: Explainer, data: MaskedLayer, images: np.ndarray, batch_size: int) -> None:
    for index, activation in data.batches(images, batch_size=batch_size):
        metric.update(torch.from_numpy(index), explainer.encode(activation), data.masks(index))


def _thresholds(
    explainer: Explainer, chunks: Callable[[], Iterator[Tensor]], rules: Sequence[str]
) -> tuple[list[str], Tensor]:
    """Names and thresholds (R, I) of the rules that apply."""
    known = extent(chunks)
    wanted: dict[str, list[float]] = {"rate": [], "shared": []}
    for rule in rules:
        kind, _, rate = rule.partition(":")
        if rule != "own":
            if kind not in wanted or not _is_rate(rate):
                raise UserError(f"unknown rule {rule!r}; use own, rate:0.005 or shared:0.01")
            wanted[kind].append(float(rate))
    found: dict[str, Tensor] = {}
    for kind, function in (("rate", rate_thresholds), ("shared", shared_thresholds)):
        if wanted[kind]:
            values = function(chunks, wanted[kind], known=known)
            found |= {f"{kind}:{rate:g}": row for rate, row in zip(wanted[kind], values, strict=True)}
    own = own_thresholds(explainer, known.low)
    if own is not None:
        found["own"] = own
    names = [name for rule in rules if (name := _plain(rule)) in found]
    if not names:
        raise UserError(f"{type(explainer).__name__} has no threshold of its own: ask for a rate, such as rate:0.005")
    return names, torch.stack([found[name] for name in names])


def _plain(rule: str) -> str:
    kind, _, rate = rule.partition(":")
    return f"{kind}:{float(rate):g}" if rate else rule


def _is_rate(text: str) -> bool:
    try:
        return 0 <= float(text) < 1 and math.isfinite(float(text))
    except ValueError:
        return False


@torch.no_grad()
def significance(
    explainer: Explainer, found: Dissected, data: MaskedLayer, images: np.ndarray, *, seed: int = 0
) -> dict[str, Tensor]:
    """The permutation test of one rule's labels on the score images, one block of them after the other; see
    :class:`~netgloss.metrics.dissection.significance.PermutationTest`.
    """
    test = PermutationTest(found.thresholds, found.detectors.labels, data.vocabulary, seed=seed)
    for block in blocks_of(len(images), seed=seed):
        some = np.sort(images[block.numpy()])
        maps = torch.cat([explainer.encode(activation) for _, activation in data.batches(some)])
        test.add(maps, data.masks(some))
    return test.compute()

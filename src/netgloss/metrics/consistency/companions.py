"""What a consistency score should not be read without: selectivity, depth, reliability, and the choice of kernel.

Top sets overstate how selective a unit is; so consis is accompanied by the AUROC and average precision of the unit's
best subtree of the hierarchy (chosen on one half of the sources, measured on the other), consis_cal further down the
ranks, the agreement of halves of the data, and that of other kernels.

Shape letters: N images, U units, C classes, T subtrees.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from netgloss.errors import UserError
from netgloss.metrics.consistency.taxonomy import Taxonomy
from netgloss.metrics.consistency.units import UnitScores, affinity_form, band_weights, calibrate, unit_consistency

DEPTHS: dict[str, tuple[float, float]] = {
    "top 0.1 %": (0.0, 0.001),
    "top 1 %": (0.0, 0.01),
    "top 10 %": (0.0, 0.1),
    "45-55 %": (0.45, 0.55),
}


@dataclass(frozen=True)
class Selectivity:
    """The subtree that each unit identifies best: its node, AUROC (U,) and average precision (U,) on unseen sources,
    and the share of images in it (U,), which is the average precision of chance.
    """

    nodes: list[str]
    auroc: NDArray[np.float64]
    average_precision: NDArray[np.float64]
    share: NDArray[np.float64]


def best_subtree(
    values: Tensor,
    labels: Tensor,
    tree: Taxonomy,
    classes: Sequence[str],
    *,
    sources: Tensor | None = None,
    seed: int = 0,
) -> Selectivity:
    """For each unit, the hypernym whose classes its responses (N, U) distinguish best from all others.

    Parameters
    ----------
    labels : (N,) indices into ``classes``, which are nodes of ``tree``.
    """
    from sklearn.metrics import average_precision_score

    tree.check(classes)
    first = _halves(labels, sources, seed=seed)
    present = set(labels.unique().tolist())
    subtrees: dict[frozenset[int], str] = {}
    for node, below in sorted(tree.members(classes).items(), key=lambda item: (len(item[1]), item[0])):
        inside = frozenset(below.tolist()) & present
        if inside and inside != present:
            subtrees.setdefault(inside, node)
    if not subtrees:
        raise UserError("a best subtree needs at least two classes in the probe set")
    member_TC = np.array([[c in inside for c in range(len(classes))] for inside in subtrees], np.float64)
    labels_N, values_NU = labels.numpy(), values.double().numpy()
    auroc_TU = _aurocs(values_NU[first], labels_N[first], member_TC)
    best = np.nan_to_num(auroc_TU, nan=-1.0).argmax(0)
    inside_NU = member_TC[best][:, labels_N[~first]].T.astype(bool)
    held = values_NU[~first]
    average_precision = np.array(
        [average_precision_score(inside_NU[:, u], held[:, u]) for u in range(held.shape[1])], np.float64
    )
    auroc = _aurocs(held, labels_N[~first], member_TC)[best, np.arange(len(best))]
    nodes = list(subtrees.values())
    return Selectivity([nodes[t] for t in best], auroc, average_precision, inside_NU.mean(0))


def consistency_by_depth(values: Tensor, labels: Tensor, affinity: Tensor | NDArray[np.float64]) -> dict[str, Tensor]:
    """consis_cal (U,) of the images at several depths of the ranking (``DEPTHS``); NaN below two images."""
    affinity = torch.as_tensor(affinity, dtype=torch.float64)
    num = len(values)
    shares = labels.bincount(minlength=len(affinity)).double() / num
    mean_affinity = float(affinity_form(shares[:, None], affinity))
    found = {}
    for name, (low, high) in DEPTHS.items():
        if (high - low) * num < 2:
            found[name] = torch.full((values.shape[1],), math.nan, dtype=torch.float64)
            continue
        weights = band_weights(values, low * num, high * num)
        p = torch.zeros(len(affinity), values.shape[1], dtype=torch.float64).index_add_(0, labels, weights)
        found[name], _ = calibrate(
            affinity_form(p, affinity), weights.square().sum(0), mean_affinity=mean_affinity, num_sources=num
        )
    return found


def half_reliability(
    values: Tensor, labels: Tensor, affinity: Tensor | NDArray[np.float64], *, k: int, seed: int = 0
) -> float:
    """Spearman correlation of consis_cal over units between two halves of the images, with k/2 images each."""
    first = torch.from_numpy(_halves(labels, None, seed=seed))
    halves = [
        unit_consistency(values[half], labels[half], affinity, k=max(2, k // 2), null_draws=0)
        for half in (first, ~first)
    ]
    live = halves[0].live & halves[1].live
    return _spearman(halves[0].calibrated[live], halves[1].calibrated[live])


def kernel_agreement(scores: UnitScores, affinities: Mapping[str, Tensor | NDArray[np.float64]]) -> dict[str, float]:
    """Spearman correlation of consis over live units for each pair of affinities ``{name: A}``.

    Below 0.9 the ranking of units depends on the kernel, and no kernel is the published one.
    """
    p = scores.classes[:, scores.live]
    consis = {name: affinity_form(p, torch.as_tensor(a, dtype=torch.float64)) for name, a in affinities.items()}
    return {f"{a} / {b}": _spearman(consis[a], consis[b]) for a, b in itertools.combinations(consis, 2)}


def _spearman(a: Tensor, b: Tensor) -> float:
    from scipy.stats import spearmanr

    if len(a) < 2 or not (a.std() > 0 and b.std() > 0):
        return math.nan
    return float(spearmanr(a.numpy(), b.numpy()).statistic)


def _halves(labels: Tensor, sources: Tensor | None, *, seed: int) -> NDArray[np.bool_]:
    """(N,) True in the first half: half of the sources of every class, drawn with ``seed``."""
    sources = torch.arange(len(labels)) if sources is None else sources
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for c in labels.unique():
        own = sources[labels == c].unique()
        if len(own) < 2:
            raise UserError(f"halves of the data need two source images per class; class {int(c)} has {len(own)}")
        chosen.append(own[torch.randperm(len(own), generator=generator)[: len(own) // 2]])
    half: NDArray[np.bool_] = torch.isin(sources, torch.cat(chosen)).numpy()
    return half


def _aurocs(
    values: NDArray[np.float64], labels: NDArray[np.int64], member_TC: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(T, U) AUROC of responses (N, U) for being in each subtree, by the rank sum with shared ranks for ties."""
    from scipy.stats import rankdata

    counts_C = np.bincount(labels, minlength=member_TC.shape[1])
    sums_CU = np.zeros((member_TC.shape[1], values.shape[1]))
    np.add.at(sums_CU, labels, rankdata(values, axis=0))
    inside_T = (member_TC @ counts_C)[:, None]
    outside_T = len(labels) - inside_T
    auroc: NDArray[np.float64] = (member_TC @ sums_CU - inside_T * (inside_T + 1) / 2) / (inside_T * outside_T)
    return auroc

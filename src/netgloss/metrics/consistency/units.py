"""Do the images that excite a unit most share a meaning?

After Dong et al., arXiv 1708.05493 and 1901.09035.

A unit is a channel, or a concept of an explainer; its response to an image is the maximum of its map. Of the k images
with the largest responses, p_c is the share of class c, and with the affinity A of classes (``metrics/affinity.py``)::

    consis = p^T A p                                   mean affinity of two draws
    U  = (consis - s) / (1 - s),  s = sum_g w_g^2      pairs of different source images only; w_g weight of source g
    U0 = (n q^T A q - 1) / (n - 1)                     what random sources give; q class shares of the n sources
    consis_cal = (U - U0) / (1 - U0)                   1: one class; 0: random images; below 0: worse than random

The papers give neither the weights of p nor a correction for chance; both are ours. A high score does not show that the
unit causes anything, nor what it does below its top set. Random directions pass the test too: compare with them.

Shape letters: B, N images, K concepts, U units (K, or 2 K with two poles), C classes, G sources.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from netgloss.errors import UserError
from netgloss.metrics.base import Score, interval
from netgloss.metrics.consistency.null import benjamini_hochberg, null_p_values

STATUS = ("silent", "rare", "live")
_ELEMENTS = 2**23  # of a block of units: 64 MiB as float64

DEFINITION = (
    "Mean over live units of consis_cal: how much more similar the classes of a unit's top images are than those of "
    "random images of the probe set, as a share of the most possible. 1 is one class, 0 is chance, negative is "
    "possible. It depends on the kernel, on k, on the classes and the probe set, is met by random directions to some "
    "degree, and cannot show what a unit does below its top set or that it matters to the prediction."
)


# -- responses --------------------------------------------------------------------------------------------------------


def responses(concepts: Tensor, *, pooling: Literal["max", "mean"] = "max") -> Tensor:
    """Responses (B, K, 2) of both poles, max(z, 0) and max(-z, 0), of concepts (B, K) or maps (B, K, H, W)."""
    if pooling not in ("max", "mean"):
        raise UserError(f'pooling must be "max" or "mean", got {pooling!r}')
    if concepts.ndim not in (2, 4):
        raise UserError(f"expected concepts as (B, K) or (B, K, H, W), got shape {tuple(concepts.shape)}")
    z_BKP = concepts.reshape(*concepts.shape[:2], -1)
    if pooling == "max":
        return torch.stack([z_BKP.amax(2), -z_BKP.amin(2)], dim=2).clamp_min(0)
    return torch.stack([z_BKP.clamp_min(0).mean(2), (-z_BKP).clamp_min(0).mean(2)], dim=2)


class Responses(Metric):
    """Collects the responses of all images, in whatever order and batches (and processes) they come.

    ``update(index (B,), concepts (B, K[, H, W]))``; ``compute()`` gives (N, K, 2) in the order of the index, on the
    CPU, where all of what follows runs.
    """

    full_state_update = False
    index: Any
    both_poles: Any

    def __init__(self, *, pooling: Literal["max", "mean"] = "max", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.pooling = pooling
        self.add_state("index", [], dist_reduce_fx="cat")
        self.add_state("both_poles", [], dist_reduce_fx="cat")

    def update(self, index: Tensor, concepts: Tensor) -> None:
        """Add images; ``index`` is each one's place in the data set."""
        self.index.append(index)
        self.both_poles.append(responses(concepts, pooling=self.pooling))

    def compute(self) -> Tensor:
        """(N, K, 2), in the order of the images' places."""
        index = torch.cat(self.index) if isinstance(self.index, list) else self.index
        both = torch.cat(self.both_poles) if isinstance(self.both_poles, list) else self.both_poles
        return both[index.argsort()].cpu()


@dataclass(frozen=True)
class Units:
    """The units of a layer: concept (U,) and pole (U,), +1 or -1, of each."""

    concept: Tensor
    pole: Tensor

    @classmethod
    def of(cls, *both_poles: Tensor) -> Units:
        """Two poles a concept if any of these responses (N, K, 2) has a negative part, else one."""
        num = both_poles[0].shape[1]
        poles = (1, -1) if any(bool((table[..., 1] > 0).any()) for table in both_poles) else (1,)
        return cls(torch.arange(num).repeat(len(poles)), torch.tensor(poles).repeat_interleave(num))

    def __len__(self) -> int:
        return len(self.pole)

    def select(self, both_poles: Tensor) -> Tensor:
        """(N, K, 2) -> the units' responses (N, U)."""
        return both_poles[:, self.concept, (self.pole < 0).long()]


# -- top sets ---------------------------------------------------------------------------------------------------------


def top_set_size(labels: Tensor, *, k: int | None = None) -> int:
    """K = min(max(ceil(N / 100), 20), size of the smallest class), so that a unit of one class can reach 1.

    Raises
    ------
    UserError : fewer than 20 images in a class and no k given, or a k that is none.
    """
    if k is not None:
        if not 2 <= k <= len(labels):
            raise UserError(f"k must lie between 2 and the number of images {len(labels)}, got {k}")
        return k
    counts = labels.bincount()
    smallest = int(counts[counts > 0].min()) if len(labels) else 0
    if smallest < 20:
        raise UserError(
            f"the smallest class of the probe set has {smallest} images, at least 20 are needed: "
            "take more, or say k (--k)"
        )
    return min(max(-(-len(labels) // 100), 20), smallest)


def stratified(labels: Tensor, *, each: int | Sequence[int] | None = None, seed: int = 0) -> Tensor:
    """Draws images of every class without replacement.

    Parameters
    ----------
    labels : (N,); images of label -1 are never drawn.
    each : images per class, or one number for each class that occurs; default as many as the smallest class has. A
        class with fewer images gives all of them.

    Returns
    -------
    Indices in ascending order.

    Raises
    ------
    UserError : no image has a label.
    """
    generator = torch.Generator().manual_seed(seed)
    pools = [(labels == c).nonzero().squeeze(1) for c in labels[labels >= 0].unique()]
    if not pools:
        raise UserError("consistency needs labelled images, and none of these has a label")
    if each is None:
        each = min(map(len, pools))
    counts = [each] * len(pools) if isinstance(each, int) else each
    drawn = [p[torch.randperm(len(p), generator=generator)[:n]] for p, n in zip(pools, counts, strict=True)]
    return torch.cat(drawn).sort()[0]


def band_weights(values: Tensor, low: float, high: float) -> Tensor:
    """Weights (N, U), float64, of the images that rank from ``low`` to ``high`` (0 is the strongest) in each unit.

    They add up to 1. Images with the same response share the ranks that they take, so their order has no effect.
    """
    assert 0 <= low < high <= len(values)
    columns_UN = values.T.contiguous()
    sorted_UN = columns_UN.sort(dim=1).values
    first = len(values) - torch.searchsorted(sorted_UN, columns_UN, right=True)
    end = len(values) - torch.searchsorted(sorted_UN, columns_UN)
    inside = (end.clamp_max(high) - first.clamp_min(low)).clamp_min(0).double()
    return (inside / (end - first) / (high - low)).T


@dataclass(frozen=True)
class TopSets:
    """The top sets of U units.

    Attributes
    ----------
    weights : (N, U) float64, adding up to 1.
    status : (U,) index into ``STATUS``: no response above 0, fewer than k of them, or live.
    tie_images : (U,) how many images have the k-th largest response.
    saturated : (U,) more than 2 k have.
    """

    weights: Tensor
    status: Tensor
    tie_images: Tensor
    saturated: Tensor


def top_sets(values: Tensor, k: int, *, weighting: Literal["equal", "response"] = "equal") -> TopSets:
    """The k images with the largest responses (N, U); those tied at the k-th share what is left.

    Parameters
    ----------
    weighting : all images count the same, or in proportion to their response.
    """
    if not values.isfinite().all():
        bad = int((~values.isfinite()).any(0).nonzero()[0])
        raise UserError(f"responses of unit {bad} hold NaN or Inf")
    weights = band_weights(values, 0, k)
    if weighting == "response":
        scaled = weights * values.clamp_min(0)
        weights = torch.where(scaled.sum(0) > 0, scaled / scaled.sum(0).clamp_min(1e-300), weights)
    positive = (values > 0).sum(0)
    tie_images = (values == values.topk(k, dim=0).values[-1]).sum(0)
    status = (positive > 0).long() + (positive >= k).long()
    return TopSets(weights, status, tie_images, tie_images > 2 * k)


# -- scores -----------------------------------------------------------------------------------------------------------


def affinity_form(p: Tensor, affinity: Tensor, other: Tensor | None = None) -> Tensor:
    """``p^T A r`` (U,) for class vectors p (C, U) and r = ``other`` (C, U), default p."""
    return (p * (affinity @ (p if other is None else other))).sum(0)


def calibrate(consis: Tensor, s: Tensor, *, mean_affinity: float, num_sources: int) -> tuple[Tensor, Tensor]:
    """``(consis_cal, E0)`` of the module docstring; ``mean_affinity`` is q^T A q."""
    u0 = (num_sources * mean_affinity - 1) / (num_sources - 1)
    expected = s + (1 - s) * u0
    return (consis - expected) / (1 - expected), expected


@dataclass(frozen=True)
class UnitScores:
    """Scores of U units on one set of images; all (U,) unless said otherwise.

    Attributes
    ----------
    classes : p (C, U), class shares of the top set.
    consis, expected, calibrated : consis, its chance E0, consis_cal.
    concentration : s, the sum of squared weights of sources.
    p_value : that random sources score as high; NaN for units that are not live, or if not asked for.
    consistent : significant at 0.05 after Benjamini-Hochberg over the live units.
    status, tie_images, saturated : as in :class:`TopSets`.
    k, num_images, num_sources, num_classes, floor : numbers of the set; the floor is the mean of A.
    """

    classes: Tensor
    consis: Tensor
    expected: Tensor
    calibrated: Tensor
    concentration: Tensor
    p_value: Tensor
    consistent: Tensor
    status: Tensor
    tie_images: Tensor
    saturated: Tensor
    k: int
    num_images: int
    num_sources: int
    num_classes: int
    floor: float

    @property
    def live(self) -> Tensor:
        return self.status == STATUS.index("live")

    def summary(self) -> dict[str, float]:
        """Mean and median over live units, with every count that they depend on."""
        cal, consis = self.calibrated[self.live], self.consis[self.live]
        return {
            "consis_cal": float(cal.mean()),
            "consis_cal_median": float(cal.quantile(0.5)) if len(cal) else math.nan,
            "consis": float(consis.mean()),
            "expected": float(self.expected[self.live].mean()),
            "floor": self.floor,
            **{f"num_{name}": int((self.status == i).sum()) for i, name in enumerate(STATUS)},
            "num_saturated": int(self.saturated[self.live].sum()),
            "num_consistent": int(self.consistent.sum()),
            "k": self.k,
            "num_images": self.num_images,
            "num_sources": self.num_sources,
            "num_classes": self.num_classes,
        }


def unit_consistency(
    values: Tensor,
    labels: Tensor,
    affinity: Tensor | np.ndarray,
    *,
    sources: Tensor | None = None,
    k: int | None = None,
    weighting: Literal["equal", "response"] = "equal",
    null_draws: int = 2000,
    seed: int = 0,
) -> UnitScores:
    """Consistency of U units.

    Parameters
    ----------
    values : (N, U) responses.
    labels : (N,) true classes, 0 to C - 1.
    affinity : A (C, C).
    sources : (N,) which real image each one is or was made from; default all different.
    k : size of the top set; default :func:`top_set_size`.
    null_draws : random top sets for the p-values; 0 leaves them out.

    Raises
    ------
    UserError : for shapes that do not fit, a source with two labels, fewer than two classes or sources.
    """
    affinity = torch.as_tensor(affinity, dtype=torch.float64)
    classes = len(affinity)
    sources = torch.arange(len(values)) if sources is None else sources
    if values.ndim != 2 or labels.shape != values.shape[:1] or sources.shape != labels.shape:
        raise UserError(
            f"consistency needs responses (N, U), labels (N,) and sources (N,); got {tuple(values.shape)}, "
            f"{tuple(labels.shape)} and {tuple(sources.shape)}"
        )
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise UserError(f"labels must lie in 0 to {classes - 1}, got {int(labels.min())} to {int(labels.max())}")
    k = top_set_size(labels, k=k)
    source_ids, sources = sources.unique(return_inverse=True)
    num_sources = len(source_ids)
    source_labels = torch.zeros(num_sources, dtype=torch.long).scatter_(0, sources, labels)
    if (source_labels[sources] != labels).any():
        raise UserError("images made from the same source must have the same true label")
    if num_sources < 2 or len(source_labels.unique()) < 2:
        raise UserError(
            f"consistency compares classes: it needs at least two, got {len(source_labels.unique())} in "
            f"{num_sources} source images"
        )
    shares = source_labels.bincount(minlength=classes).double() / num_sources
    mean_affinity = float(affinity_form(shares[:, None], affinity))
    blocks: list[dict[str, Tensor]] = []
    for block in values.split(max(1, _ELEMENTS // len(values)), dim=1):
        top = top_sets(block, k, weighting=weighting)
        source_weights = torch.zeros(num_sources, block.shape[1], dtype=torch.float64)
        source_weights.index_add_(0, sources, top.weights)
        p = torch.zeros(classes, block.shape[1], dtype=torch.float64).index_add_(0, source_labels, source_weights)
        consis, s = affinity_form(p, affinity), source_weights.square().sum(0)
        calibrated, expected = calibrate(consis, s, mean_affinity=mean_affinity, num_sources=num_sources)
        live = top.status == STATUS.index("live")
        p_value = torch.full_like(consis, math.nan)
        if null_draws:
            p_value[live] = null_p_values(
                source_weights[:, live], source_labels, affinity, consis[live], draws=null_draws, seed=seed
            )
        blocks.append(
            {
                "classes": p,
                "consis": consis,
                "expected": expected,
                "calibrated": calibrated,
                "concentration": s,
                "p_value": p_value,
                "status": top.status,
                "tie_images": top.tie_images,
                "saturated": top.saturated,
            }
        )
    joined = {name: torch.cat([block[name] for block in blocks], dim=-1) for name in blocks[0]}
    return UnitScores(
        **joined,
        consistent=benjamini_hochberg(joined["p_value"]),
        k=k,
        num_images=len(values),
        num_sources=num_sources,
        num_classes=classes,
        floor=float(affinity.mean()),
    )


def consistency_score(runs: list[UnitScores], *, baselines: dict[str, float | None] | None = None) -> Score:
    """The record of a layer from the units of one fit per seed: the mean consis_cal, its interval over seeds."""
    values = torch.tensor([run.summary()["consis_cal"] for run in runs], dtype=torch.float64)
    low, high = interval(values, bounds=(-math.inf, 1.0))
    return Score(
        metric="consistency",
        value=float(values.mean()),
        low=low,
        high=high,
        baselines=dict(baselines or {}),
        n=runs[0].num_images,
        seeds=len(runs),
        higher_is_better=True,
        definition=DEFINITION,
    )

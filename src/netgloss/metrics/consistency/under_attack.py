"""Do a unit's top images keep their classes when the images are adversarial?

Dong et al., arXiv 1708.05493.

p_R are the classes of a unit's top real images; p_V the true classes and p_T the target classes of its top adversarial
images::

    CS1 = cos(p_R, p_V)        CS2 = cos(p_R, p_T)        CSc1, CSc2: the same of p - q, q shares in the set

A robust unit has a high CS1 and a low CS2, a fooled one a high CS2. The papers do not say which labels they mean; true
and target is the only reading found that fits their caption. With ten classes a raw cosine is mostly chance (0.69), so
chance is reported with it, and CSc has chance 0. Adversarial images are scored with their *true* labels throughout.

Shape letters: N real images, M adversarial images, U units, C classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from netgloss.errors import UserError
from netgloss.metrics.consistency.null import simulated_cosine_chance
from netgloss.metrics.consistency.units import UnitScores, affinity_form, top_set_size, top_sets, unit_consistency


@dataclass(frozen=True)
class Comparison:
    """Real against adversarial images; all (U,) unless said otherwise, NaN for units not live on both.

    Attributes
    ----------
    real, adversarial, union : consistency on R, V, and both together (weights grouped by source).
    cs1, cs2, csc1, csc2 : cosines of the module docstring; cs2 and csc2 are NaN for untargeted attacks.
    cross : p_R^T A p_V / sqrt(p_R^T A p_R p_V^T A p_V), with the exp kernel.
    chance1, chance2 : float, mean cs1 and cs2 of random images.
    """

    real: UnitScores
    adversarial: UnitScores
    union: UnitScores
    cs1: Tensor
    cs2: Tensor
    csc1: Tensor
    csc2: Tensor
    cross: Tensor
    chance1: float
    chance2: float

    @property
    def live(self) -> Tensor:
        """(U,) live on real and on adversarial images."""
        return self.real.live & self.adversarial.live

    def summary(self) -> dict[str, float]:
        """Means over the units that are live on both."""
        cal = {name: getattr(self, name).calibrated[self.live] for name in ("real", "adversarial", "union")}
        cosines = {name: getattr(self, name)[self.live] for name in ("cs1", "cs2", "csc1", "csc2", "cross")}
        return {
            **{f"consis_cal_{name}": float(values.mean()) for name, values in cal.items()},
            "consis_cal_change": float((cal["adversarial"] - cal["real"]).mean()),
            **{name: _mean(values) for name, values in cosines.items()},
            "chance1": self.chance1,
            "chance2": self.chance2,
            "num_live": int(self.live.sum()),
            "k_real": self.real.k,
            "k_adversarial": self.adversarial.k,
            "num_sources": self.adversarial.num_sources,
        }


def compare(
    real: Tensor,
    adversarial: Tensor,
    labels: Tensor,
    sources: Tensor,
    affinity: Tensor | np.ndarray,
    *,
    cross_affinity: Tensor | np.ndarray,
    targets: Tensor | None = None,
    k: int | None = None,
    null_draws: int = 2000,
    seed: int = 0,
) -> Comparison:
    """Units on real images R and on adversarial images V made from them.

    Parameters
    ----------
    real, adversarial : responses (N, U) and (M, U).
    labels : (N,) true classes of R.
    sources : (M,) index into R of the image behind each adversarial one.
    affinity : A (C, C).
    cross_affinity : A by the exp kernel, which is positive definite.
    targets : (M,) classes that the attack aimed at.
    k : size of the top set in R; the same fraction is taken of V and of both together.
    """
    _check(real, adversarial, labels, sources, targets)
    affinity = torch.as_tensor(affinity, dtype=torch.float64)
    k = top_set_size(labels, k=k)
    k_v, k_u = (max(2, round(k * count / len(real))) for count in (len(adversarial), len(adversarial) + len(real)))
    true = labels[sources]
    both = torch.cat([labels, true]), torch.cat([torch.arange(len(real)), sources])
    options: dict[str, Any] = {"null_draws": null_draws, "seed": seed}
    on_r = unit_consistency(real, labels, affinity, k=k, **options)
    on_v = unit_consistency(adversarial, true, affinity, sources=sources, k=k_v, **options)
    on_both = unit_consistency(torch.cat([real, adversarial]), both[0], affinity, sources=both[1], k=k_u, **options)
    fair = on_r.live & on_v.live
    p_r, p_v = on_r.classes, on_v.classes
    q_r, q_v = (_shares(of, len(affinity)) for of in (labels, true))
    exp = torch.as_tensor(cross_affinity, dtype=torch.float64)
    cross = affinity_form(p_r, exp, p_v) / (affinity_form(p_r, exp) * affinity_form(p_v, exp)).sqrt()
    cs1, csc1 = cosine(p_r, p_v), cosine(p_r - q_r, p_v - q_v)
    cs2, csc2, chance2 = torch.full_like(cs1, math.nan), torch.full_like(cs1, math.nan), math.nan
    if targets is not None:
        p_t = _class_vectors(adversarial, targets, k_v, len(affinity))
        cs2, csc2 = cosine(p_r, p_t), cosine(p_r - q_r, p_t - _shares(targets, len(affinity)))
        chance2 = simulated_cosine_chance(labels, targets, k, k_v, num_classes=len(affinity), seed=seed)
    return Comparison(
        real=on_r,
        adversarial=on_v,
        union=on_both,
        **{
            name: values.masked_fill(~fair, math.nan)
            for name, values in {"cs1": cs1, "cs2": cs2, "csc1": csc1, "csc2": csc2, "cross": cross}.items()
        },
        chance1=simulated_cosine_chance(labels, true, k, k_v, num_classes=len(affinity), seed=seed),
        chance2=chance2,
    )


def compare_fooled(
    real: Tensor,
    adversarial: Tensor,
    labels: Tensor,
    sources: Tensor,
    affinity: Tensor | np.ndarray,
    *,
    fooled: Tensor,
    targets: Tensor,
    k: int | None = None,
    **options: Any,
) -> Comparison | None:
    """:func:`compare` for the images of V that reached their target, ``fooled`` (M,), and R cut to their sources.

    k stays that of the whole R. None if fewer than 5 k sources are left, or one class.
    """
    k = top_set_size(labels, k=k)
    kept, inverse = sources[fooled].unique(return_inverse=True)
    if len(kept) < 5 * k or len(labels[kept].unique()) < 2:
        return None
    return compare(
        real[kept],
        adversarial[fooled],
        labels[kept],
        inverse,
        affinity,
        targets=targets[fooled],
        k=k,
        **options,
    )


def cosines_by_bin(comparison: Comparison, *, bins: int = 10) -> list[dict[str, float]]:
    """Mean CS1, CS2, CSc1, CSc2 and the count of units in ``bins`` quantile bins of consis on R (paper A's LC)."""
    live = comparison.live
    lc = comparison.real.consis[live]
    rows = []
    for index in lc.argsort(stable=True).tensor_split(bins):
        if len(index):
            means = {name: _mean(getattr(comparison, name)[live][index]) for name in ("cs1", "cs2", "csc1", "csc2")}
            rows.append({"lc": float(lc[index].mean()), **means, "count": len(index)})
    chances = {"chance1": comparison.chance1, "chance2": comparison.chance2}
    return [{**row, **chances} for row in rows]


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine (U,) of the columns of a and b (C, U), float64; NaN where a norm is below 1e-12."""
    norms = a.norm(dim=0), b.norm(dim=0)
    value = (a * b).sum(0) / (norms[0] * norms[1]).clamp_min(1e-24)
    return value.masked_fill((norms[0] < 1e-12) | (norms[1] < 1e-12), math.nan)


def _class_vectors(values: Tensor, labels: Tensor, k: int, classes: int) -> Tensor:
    weights = top_sets(values, k).weights
    return torch.zeros(classes, values.shape[1], dtype=torch.float64).index_add_(0, labels, weights)


def _shares(labels: Tensor, classes: int) -> Tensor:
    """(C, 1) class shares."""
    return (labels.bincount(minlength=classes).double() / len(labels))[:, None]


def _mean(values: Tensor) -> float:
    """Of the values that are not blank."""
    return float(values[~values.isnan()].mean())


def _check(real: Tensor, adversarial: Tensor, labels: Tensor, sources: Tensor, targets: Tensor | None) -> None:
    if real.ndim != 2 or adversarial.ndim != 2 or real.shape[1] != adversarial.shape[1]:
        raise UserError(
            f"real (N, U) and adversarial (M, U) responses must be of the same units, got {tuple(real.shape)} and "
            f"{tuple(adversarial.shape)}"
        )
    if labels.shape != real.shape[:1] or sources.shape != adversarial.shape[:1]:
        raise UserError(
            f"{len(real)} real images need as many labels and {len(adversarial)} adversarial ones as many sources, got "
            f"{len(labels)} and {len(sources)}"
        )
    if len(sources) == 0 or not 0 <= int(sources.min()) <= int(sources.max()) < len(real):
        raise UserError(f"sources must be indices of the {len(real)} real images")
    if targets is not None and targets.shape != sources.shape:
        raise UserError(f"{len(sources)} adversarial images need as many targets, got {len(targets)}")

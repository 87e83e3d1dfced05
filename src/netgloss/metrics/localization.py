"""Where a concept's heatmap lies among annotated parts: one part or many, and the same one each time.

For one image, the heatmap (H, W) >= 0 is cut into the annotated parts (the share of each cell that a part covers), and
what lies on none of them is background, kept apart. Masses are divided by the parts' areas, so that a uniform heatmap
is spread evenly over the parts, however large they are. All formulas are ours: those of the XNN paper were not
available.

Shape letters: H, W grid, P parts, K concepts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
_EPS = 1e-12


def part_shares(heat: Array, covers: Mapping[str, Array], parts: Sequence[str]) -> tuple[Array, float]:
    """Share of each part in a heatmap, corrected for area, and the background's share of the mass.

    Parameters
    ----------
    heat : (H, W) >= 0.
    covers : share of each cell (H, W) that each visible part covers; parts may not overlap by more than the cell.
    parts : names in the order of the result; a part that ``covers`` lacks is NaN.

    Returns
    -------
    (P,) that sum to 1 over the visible parts (all NaN if the heatmap is zero on all), and the background in [0, 1].
    """
    mass = np.full(len(parts), np.nan)
    inside = 0.0
    for i, name in enumerate(parts):
        if name in covers and covers[name].sum() > _EPS:
            on = float((heat * covers[name]).sum())
            inside += on
            mass[i] = on / float(covers[name].sum())
    total = float(np.nansum(mass))
    background = 1 - inside / max(float(heat.sum()), _EPS)
    return (mass / total if total > _EPS else np.full(len(parts), np.nan)), background


@dataclass(frozen=True)
class PartProfile:
    """Where the concepts of a module look, over the images in which they matter.

    Attributes
    ----------
    shares : (K, P) mean share of each part, rows sum to 1; NaN rows for concepts without an image.
    locality : (K,) ``1 - H(shares) / log P``: 1 is one part, 0 is all parts equally.
    covered : (K,) parts that it takes to reach 80 % of a concept's mass.
    covered_by_any : parts with a share of at least 2 / P in some concept.
    overlap : mean cosine of pairs of rows (part orthogonality; 0 is best); NaN with fewer than two concepts.
    consistency : (K,) mean Jensen-Shannon divergence, in nats, of an image's shares from the profile (low: same part).
    """

    shares: Array
    locality: Array
    covered: Array
    covered_by_any: int
    overlap: float
    consistency: Array


def part_profile(shares: Array, matters: NDArray[np.bool_]) -> PartProfile:
    """The profile of K concepts from :func:`part_shares` of N images.

    Parameters
    ----------
    shares : (N, K, P), NaN for parts that are not visible.
    matters : (N, K) whether the concept is significant in the image.
    """
    num_parts = shares.shape[2]
    used = np.where(matters[:, :, None], shares, np.nan)
    counts = np.isfinite(used).sum(axis=0)
    mean = np.nansum(used, axis=0) / np.where(counts > 0, counts, np.nan)
    mean = mean / np.nansum(mean, axis=1, keepdims=True)
    known = np.isfinite(mean).all(axis=1)
    entropy = -np.sum(np.where(mean > 0, mean * np.log(np.maximum(mean, _EPS)), 0.0), axis=1)
    locality = np.where(known, 1 - entropy / math.log(num_parts), np.nan)
    ordered = -np.sort(-np.where(known[:, None], mean, 0), axis=1)
    covered = np.where(known, (ordered.cumsum(axis=1) < 0.8 - 1e-9).sum(axis=1) + 1.0, np.nan)
    rows = mean[known]
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), _EPS)
    gram = unit @ unit.T
    pairs = len(rows) * (len(rows) - 1)
    return PartProfile(
        shares=mean,
        locality=locality,
        covered=covered,
        covered_by_any=int((rows >= 2 / num_parts).any(axis=0).sum()) if len(rows) else 0,
        overlap=float((gram.sum() - np.trace(gram)) / pairs) if pairs else math.nan,
        consistency=_consistency(used, mean),
    )


def _consistency(used: Array, mean: Array) -> Array:
    """(K,) mean divergence of the images' shares (N, K, P) from the profile (K, P), over each image's visible parts."""
    visible = np.isfinite(used) & np.isfinite(mean)
    image = np.where(visible, used, 0.0)
    profile = np.where(visible, mean, 0.0)
    image = image / np.maximum(image.sum(axis=2, keepdims=True), _EPS)
    profile = profile / np.maximum(profile.sum(axis=2, keepdims=True), _EPS)
    middle = (image + profile) / 2
    divergence = (_kl(image, middle) + _kl(profile, middle)) / 2
    seen = visible.any(axis=2)
    return np.where(seen, divergence, 0).sum(axis=0) / np.where(seen.any(axis=0), seen.sum(axis=0), np.nan)


def _kl(p: Array, q: Array) -> Array:
    return np.where(p > 0, p * np.log(np.maximum(p, _EPS) / np.maximum(q, _EPS)), 0.0).sum(axis=-1)

"""Does a concept's peak follow a part of the object? Location instability, compared with what positions alone give.

Of each image, a concept gives a strength v (the maximum of its map) and a place p (the centre of that cell, in pixels
of the network's input). For a landmark k, over the ``top`` images of largest v among those that have k exactly once::

    d = |p - p_k|          D_fk = standard deviation of d (N - 1)          D_f = mean_k D_fk / diagonal of the input
    ratio_f = D_f / D_f(the same places permuted over images)

A concept that always peaks at the same place has ratio 1 exactly, whatever its D: a constant at the image centre
reaches D = 0.07 on the authors' own annotations, below most published values, so D is never reported alone here.

Source: D_f as in the code of Zhang, Wu & Zhu, "Interpretable Convolutional Neural Networks" (arXiv 1710.00935): top
100 images, sample deviation, mean over landmarks. Ours: the ratio, the spread, the best landmark, the version without
the top-100 choice; places are the centres of an even division of the input, not those of a receptive-field recursion;
images whose map is nowhere above its lowest value have no place.

Shape letters: N images, K concepts, L landmarks, T chosen images, (x, y) last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from netgloss.errors import UserError

TOP = 100
"""Images that the authors' definition keeps of each landmark."""
NEAR = 0.1
"""A peak this close to a landmark, as a share of the diagonal, is on it."""
_SHUFFLES = 10
_FEWEST = 8
"""Images that a landmark needs for a choice on one half to be counted on the other."""


@dataclass(frozen=True)
class Peaks:
    """Where concepts peak: ``places`` (N, K, 2) in pixels, ``strength`` (N, K), -inf where there is no peak."""

    places: Tensor
    strength: Tensor

    def of(self, images: Tensor) -> Peaks:
        """The peaks of some images."""
        return Peaks(self.places[images], self.strength[images])


@dataclass(frozen=True)
class Location:
    """Per concept (K,), NaN where undefined; ``by_landmark`` are (K, L), as shares of the diagonal.

    Attributes
    ----------
    instability : D_f. shuffled : D_f of the places permuted over images. spread : of the places over the images.
    """

    by_landmark: Tensor
    shuffled_by_landmark: Tensor
    spread: Tensor

    @property
    def instability(self) -> Tensor:
        return self.by_landmark.nanmean(dim=1)

    @property
    def shuffled(self) -> Tensor:
        return self.shuffled_by_landmark.nanmean(dim=1)

    @property
    def ratio(self) -> Tensor:
        """(K,) D_f / D_f(shuffled); 1 for a constant."""
        return _ratio(self.instability, self.shuffled)

    @property
    def best_ratio(self) -> Tensor:
        """(K,) the lowest ratio over landmarks: a concept may follow one of them only. Below 1 by selection."""
        each = _ratio(self.by_landmark, self.shuffled_by_landmark)
        best = each.nan_to_num(math.inf).amin(dim=1)
        return torch.where(best.isfinite(), best, math.nan)

    def means(self) -> dict[str, float]:
        """Means over concepts."""
        named = {
            "instability": self.instability,
            "ratio": self.ratio,
            "best_ratio": self.best_ratio,
            "spread": self.spread,
        }
        return {name: float(values.nanmean()) for name, values in named.items()}


def _ratio(found: Tensor, shuffled: Tensor) -> Tensor:
    constant = (found == shuffled) & found.isfinite()
    return torch.where(constant, 1.0, torch.where(shuffled > 0, found / shuffled, math.nan))


def find_peaks(maps: Tensor, *, size: tuple[int, int]) -> Peaks:
    """Peaks of maps (N, K, H, W) in pixels of the network's input of ``size`` (height, width)."""
    if maps.ndim != 4:
        raise UserError(f"concepts without a map have no place: expected (N, K, H, W), got {tuple(maps.shape)}")
    rows, columns = maps.shape[2:]
    strength, cell = maps.flatten(2).max(dim=2)
    y = (torch.div(cell, columns, rounding_mode="floor") + 0.5) * size[0] / rows
    x = (cell % columns + 0.5) * size[1] / columns
    flat = strength <= maps.flatten(2).amin(dim=2)
    return Peaks(torch.stack([x, y], dim=2).double(), strength.double().masked_fill(flat, -math.inf))


def locate(
    peaks: Peaks, landmarks: Tensor, *, diagonal: float, top: int | None = TOP, shuffles: int = _SHUFFLES, seed: int = 0
) -> Location:
    """Instability of every concept.

    Parameters
    ----------
    landmarks : (N, L, 2) pixels, NaN where an image does not have the landmark exactly once.
    diagonal : of the network's input in pixels.
    top : strongest images of each landmark; None for all.

    Raises
    ------
    UserError : peaks and landmarks of different numbers of images.
    """
    if len(peaks.places) != len(landmarks):
        raise UserError(f"peaks of {len(peaks.places)} images came with landmarks of {len(landmarks)}")
    found, permuted = [], []
    generator = torch.Generator().manual_seed(seed)
    for k in range(landmarks.shape[1]):
        has = landmarks[:, k, 0].isfinite()
        target, here = landmarks[has, k].double(), peaks.of(has)
        count = len(target) if top is None else min(top, len(target))
        strength, chosen_TK = here.strength.topk(count, dim=0)
        places = here.places.gather(0, chosen_TK[:, :, None].expand(-1, -1, 2))
        places = places.masked_fill((strength == -math.inf)[:, :, None], math.nan)
        targets = target[chosen_TK]
        found.append(_deviation((places - targets).norm(dim=2)))
        orders = [torch.randperm(count, generator=generator) for _ in range(shuffles)]
        others = [_deviation((places[order] - targets).norm(dim=2)) for order in orders]
        permuted.append(torch.stack(others).nanmean(dim=0))
    spread = peaks.places.masked_fill((peaks.strength == -math.inf)[:, :, None], math.nan)
    spread_K = (_deviation(spread[..., 0]).square() + _deviation(spread[..., 1]).square()).sqrt()
    return Location(torch.stack(found, 1) / diagonal, torch.stack(permuted, 1) / diagonal, spread_K / diagonal)


def _deviation(values: Tensor) -> Tensor:
    """Sample standard deviation over the first dimension, of the finite entries; NaN for fewer than two."""
    count = values.isfinite().sum(dim=0)
    centred = values - values.nanmean(dim=0)
    squares = centred.square().nansum(dim=0)
    return torch.where(count > 1, (squares / (count - 1).clamp_min(1)).sqrt(), math.nan)


@dataclass(frozen=True)
class Followed:
    """How often the best concept of each landmark peaks on it.

    Attributes
    ----------
    hits : (L,) share of the images that show a landmark in which its best concept peaks near it; NaN with fewer than
        eight images.
    chance : (L,) the same, chosen and counted in the same way, when the peaks are permuted over the images.
    best : (L,) index of that concept.
    """

    hits: Tensor
    chance: Tensor
    best: Tensor

    @property
    def found(self) -> Tensor:
        """(L,) bool: hit in at least half of the images, and in a quarter of those that chance misses."""
        gain = self.hits - self.chance
        return (self.hits >= 0.5) & (gain > 0) & (gain >= 0.25 * (1 - self.chance))


def followed(
    peaks: Peaks, landmarks: Tensor, *, diagonal: float, radius: float = NEAR, shuffles: int = _SHUFFLES, seed: int = 0
) -> Followed:
    """Which landmarks some concept follows. The concept is chosen on half of the images and counted on the other half,
    both ways, so that a choice among many concepts gains nothing.

    Parameters
    ----------
    landmarks : (N, L, 2) pixels, NaN where an image does not have the landmark exactly once.
    diagonal : of the network's input in pixels.
    radius : a peak within this share of the diagonal is a hit.

    Raises
    ------
    UserError : peaks and landmarks of different numbers of images.
    """
    if len(peaks.places) != len(landmarks):
        raise UserError(f"peaks of {len(peaks.places)} images came with landmarks of {len(landmarks)}")
    generator = torch.Generator().manual_seed(seed)
    hits, chance, best = [], [], []
    for k in range(landmarks.shape[1]):
        has = landmarks[:, k, 0].isfinite().nonzero().flatten()
        if len(has) < _FEWEST:
            hits.append(math.nan)
            chance.append(math.nan)
            best.append(-1)
            continue
        has = has[torch.randperm(len(has), generator=generator)]
        here, target = peaks.of(has), landmarks[has, k].double()
        rate, concept = _hit_rate(here, target, radius * diagonal)
        orders = [torch.randperm(len(has), generator=generator) for _ in range(shuffles)]
        hits.append(rate)
        chance.append(math.fsum(_hit_rate(here.of(o), target, radius * diagonal)[0] for o in orders) / shuffles)
        best.append(concept)
    return Followed(torch.tensor(hits).double(), torch.tensor(chance).double(), torch.tensor(best))


def _hit_rate(peaks: Peaks, target_N2: Tensor, reach: float) -> tuple[float, int]:
    """Hits of the concept that is best on the other half of the images, and the best one over all."""
    near_NK = (peaks.places - target_N2[:, None]).norm(dim=2) <= reach
    near_NK = (near_NK & peaks.strength.isfinite()).double()
    first, second = near_NK[::2], near_NK[1::2]
    found = second[:, first.mean(dim=0).argmax()].sum() + first[:, second.mean(dim=0).argmax()].sum()
    return float(found) / len(near_NK), int(near_NK.mean(dim=0).argmax())


def regression_error(peaks: Peaks, landmarks: Tensor, *, diagonal: float, folds: int = 3) -> tuple[float, float]:
    """Error of a linear regression of landmarks from the places of all concepts' peaks, as a share of the diagonal.

    The mean distance on images that the regression has not seen (``folds`` folds, ridge penalty chosen within), mean
    over landmarks; and the same for the mean place of each landmark, which reads no concept. The measure of
    unsupervised part discovery (for example PDiscoNet, arXiv 2309.03173). Concepts without a peak take their mean.
    """
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import KFold

    lost = peaks.strength == -math.inf
    places = peaks.places.masked_fill(lost[:, :, None], math.nan)
    centre = places.nanmean(dim=0).nan_to_num(0.0)
    inputs = (torch.where(places.isnan(), centre, places) - centre).flatten(1).numpy() / diagonal
    errors = []
    for k in range(landmarks.shape[1]):
        has = landmarks[:, k, 0].isfinite().numpy()
        x, y = inputs[has], landmarks[has][:, k].double().numpy() if has.any() else None
        if len(x) < 2 * folds or y is None:
            continue
        found, mean = [], []
        for train, test in KFold(folds, shuffle=True, random_state=0).split(x):
            model = RidgeCV(alphas=(0.1, 1.0, 10.0)).fit(x[train], y[train])
            found.append(_mean_distance(model.predict(x[test]), y[test]))
            mean.append(_mean_distance(y[train].mean(axis=0), y[test]))
        errors.append((sum(found) / folds, sum(mean) / folds))
    if not errors:
        return math.nan, math.nan
    own, mean_place = (math.fsum(values) / len(errors) / diagonal for values in zip(*errors, strict=True))
    return own, mean_place


def _mean_distance(found: np.ndarray, true: np.ndarray) -> float:
    return float(np.linalg.norm(found - true, axis=1).mean())


def trivial_peaks(
    landmarks: Tensor, *, grid: tuple[int, int], size: tuple[int, int], seed: int = 0
) -> dict[str, Peaks]:
    """The trivial predictors that every score is compared with: ``constant_centre``, ``random_cell`` (a new one per
    image, 64 draws) and ``true_part`` (each landmark's own place, on the grid: one concept a landmark).
    """
    generator = torch.Generator().manual_seed(seed)
    number, parts = len(landmarks), landmarks.shape[1]
    side = torch.tensor([size[1] / grid[1], size[0] / grid[0]], dtype=torch.float64)
    limit = torch.tensor([grid[1] - 1, grid[0] - 1], dtype=torch.float64)

    def strength(columns: int) -> Tensor:
        return torch.rand(number, columns, generator=generator, dtype=torch.float64)

    cells = torch.rand(number, 64, 2, generator=generator, dtype=torch.float64) * (limit + 1)
    own = ((landmarks.double() / side).floor().clamp_min(0).minimum(limit) + 0.5) * side
    known = strength(parts).masked_fill(~landmarks[..., 0].isfinite(), -math.inf)
    return {
        "constant_centre": Peaks(
            torch.tensor([size[1] / 2, size[0] / 2], dtype=torch.float64).expand(number, 1, 2), strength(1)
        ),
        "random_cell": Peaks((cells.floor() + 0.5) * side, strength(64)),
        "true_part": Peaks(own, known),
    }


def located(
    peaks: Peaks,
    landmarks: Tensor,
    *,
    diagonal: float,
    top: int | None = TOP,
    shuffles: int = _SHUFFLES,
    seed: int = 0,
) -> dict[str, float]:
    """:meth:`Location.means` and, over all images (``top=None``), ``landmark_hits`` and ``parts_found``."""
    means = locate(peaks, landmarks, diagonal=diagonal, top=top, shuffles=shuffles, seed=seed).means()
    if top is not None:
        return means
    seen = followed(peaks, landmarks, diagonal=diagonal, shuffles=shuffles, seed=seed)
    return {**means, "landmark_hits": float(seen.hits.nanmean()), "parts_found": float(seen.found.sum())}


def bootstrap(
    peaks: Peaks, landmarks: Tensor, *, diagonal: float, top: int | None = TOP, replicates: int = 100, seed: int = 0
) -> dict[str, Tensor]:
    """(replicates,) of each of :func:`located`, over images drawn with replacement."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, list[float]] = {}
    for r in range(replicates):
        images = torch.randint(len(landmarks), (len(landmarks),), generator=generator)
        means = located(peaks.of(images), landmarks[images], diagonal=diagonal, top=top, shuffles=2, seed=r)
        for name, value in means.items():
            found.setdefault(name, []).append(value)
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in found.items()}


def part_interpretability(iou: Sequence[float] | Tensor, *, threshold: float = 0.2) -> float:
    """Share of concepts whose IoU with their part's masks passes ``threshold``."""
    values = torch.as_tensor(iou, dtype=torch.float64)
    return float((values > threshold).double().mean()) if len(values) else math.nan

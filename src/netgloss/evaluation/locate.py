"""Landmarks of annotated images, and the location scores of explainers on them (``netgloss.metrics.location``).

Shape letters: N images, K concepts, L landmarks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from netgloss.activations import Store
from netgloss.class_names import class_finder
from netgloss.classifiers import Preprocessing
from netgloss.data import ImageAnnotation, ImageSource, place
from netgloss.explainers.base import Explainer
from netgloss.metrics import Score, interval
from netgloss.metrics.location import TOP, Peaks, bootstrap, find_peaks, located, regression_error, trivial_peaks

_DEFINITIONS = {
    "location_instability": (
        "instability",
        TOP,
        "Deviation of the distance between a concept's peak and a landmark over the 100 images with the strongest "
        "peaks, mean over landmarks and concepts, as a share of the input's diagonal. Low values do not show parts: a "
        "peak that never moves from the middle scores well (constant_centre).",
    ),
    "location_instability_all": (
        "instability",
        None,
        "The same over all images that have the landmark, without the choice of the strongest.",
    ),
    "location_ratio": (
        "ratio",
        TOP,
        "Location instability as a share of what the same peaks give when permuted over images: 1 for a concept whose "
        "place says nothing of the image (a constant is exactly 1), lower where peaks follow the landmarks. It cannot "
        "show which part is followed, nor that the network uses it.",
    ),
    "location_ratio_best": (
        "best_ratio",
        TOP,
        "The lowest ratio over landmarks of each concept, mean over concepts: below 1 by selection alone, so read it "
        "compared with random_cell.",
    ),
    "landmark_hits": (
        "landmark_hits",
        None,
        "Share of the images in which the best concept of a landmark peaks within a tenth of the diagonal of it, mean "
        "over landmarks. The concept is chosen on half of the images and counted on the other half, both ways. A "
        "landmark that is always in the middle is hit by a constant: compare with constant_centre.",
    ),
    "parts_found": (
        "parts_found",
        None,
        "Number of landmarks that some concept follows: it peaks near the landmark in at least half of the images, and "
        "in a quarter of those in which its peaks permuted over the images miss. Chosen and counted on different "
        "images. It cannot show concepts of what nobody annotated.",
    ),
    "peak_spread": (
        "spread",
        None,
        "Spread of a concept's peaks over the images, as a share of the diagonal: 0 is frozen at one place. It "
        "describes; neither direction is better.",
    ),
}


def landmarks_of(
    source: ImageSource, images: np.ndarray, preprocessing: Preprocessing
) -> tuple[list[str], Tensor, tuple[int, int]]:
    """Landmarks in pixels of the network's input: names (L), places (N, L, 2) with NaN, and the input's (h, w).

    A landmark is a keypoint, the centre of a box or the centroid of a mask of one piece, if the image has exactly one
    of that label. Labels that name the image's class (the box of the whole object) are none.
    """
    placed = [
        None if (a := source.annotation(int(i))) is None else place(a, preprocessing.geometry(*source.size(int(i))))
        for i in images
    ]
    found = [{} if annotation is None else _landmarks(annotation) for annotation in placed]
    is_class = class_finder(source.class_names)
    names = sorted(name for name in {name for points in found for name in points} if not is_class(name))
    places = torch.full((len(found), len(names), 2), math.nan, dtype=torch.float64)
    for n, points in enumerate(found):
        for k, name in enumerate(names):
            if name in points:
                places[n, k] = torch.tensor(points[name], dtype=torch.float64)
    size = next((annotation.size for annotation in placed if annotation is not None), (0, 0))
    return names, places, (size[1], size[0])


def _landmarks(annotation: ImageAnnotation) -> dict[str, tuple[float, float]]:
    from scipy import ndimage

    by_label: dict[str, list[tuple[float, float]]] = {}
    for label, x, y in annotation.keypoints:
        by_label.setdefault(label, []).append((x, y))
    labelled = set(by_label)
    if annotation.mask is not None:
        for value in np.unique(annotation.mask):
            name = annotation.mask_labels.get(int(value))
            if name is not None and name not in labelled:
                pieces, number = ndimage.label(annotation.mask == value)
                centres = ndimage.center_of_mass(pieces > 0, pieces, range(1, number + 1))
                by_label.setdefault(name, []).extend((float(x) + 0.5, float(y) + 0.5) for y, x in centres)
        labelled = set(by_label)
    for label, x0, y0, x1, y1 in annotation.boxes:
        if label not in labelled:
            by_label.setdefault(label, []).append(((x0 + x1) / 2, (y0 + y1) / 2))
    return {label: points[0] for label, points in by_label.items() if len(points) == 1}


def peaks_of(explainer: Explainer, store: Store, layer: str, images: np.ndarray, *, size: tuple[int, int]) -> Peaks:
    """Where the explainer's concepts peak in some images of a store."""
    parts = []
    with torch.no_grad():
        for start in range(0, len(images), 32):
            activation = torch.from_numpy(store.read(layer, images[start : start + 32])).float()
            parts.append(find_peaks(explainer.encode(activation), size=size))
    return Peaks(torch.cat([p.places for p in parts]), torch.cat([p.strength for p in parts]))


def location_scores(
    found: Sequence[Peaks],
    baselines: Mapping[str, Sequence[Peaks]],
    landmarks: Tensor,
    names: Sequence[str],
    *,
    grid: tuple[int, int],
    size: tuple[int, int],
) -> list[Score]:
    """Records of a method (peaks per seed) with other explainers and the trivial predictors as baselines."""
    diagonal = math.hypot(*size)
    others = {name: list(each) for name, each in baselines.items()}
    others |= {name: [peaks] for name, peaks in trivial_peaks(landmarks, grid=grid, size=size).items()}
    scores = []
    means = {
        (name, top): [located(peaks, landmarks, diagonal=diagonal, top=top) for peaks in each]
        for name, each in {"": found, **others}.items()
        for top in (TOP, None)
    }
    spans = {top: [bootstrap(peaks, landmarks, diagonal=diagonal, top=top) for peaks in found] for top in (TOP, None)}
    for metric, (key, top, definition) in _DEFINITIONS.items():
        values = torch.tensor([one[key] for one in means["", top]], dtype=torch.float64)
        low, high = interval(values, torch.stack([one[key] for one in spans[top]]), bounds=(0.0, math.inf))
        scores.append(
            Score(
                metric=metric,
                value=float(values.mean()),
                low=low,
                high=high,
                baselines={name: float(np.mean([one[key] for one in means[name, top]])) for name in others},
                n=len(landmarks),
                seeds=len(found),
                higher_is_better={"spread": None, "landmark_hits": True, "parts_found": True}.get(key, False),
                definition=f"{definition} Landmarks: {', '.join(names)}.",
            )
        )
    return [*scores, _regression_score(found, others, landmarks, names, diagonal)]


def _regression_score(
    found: Sequence[Peaks],
    others: Mapping[str, Sequence[Peaks]],
    landmarks: Tensor,
    names: Sequence[str],
    diagonal: float,
) -> Score:
    """How well landmarks can be read from all peaks together; its interval covers the seeds alone."""
    pairs = [regression_error(peaks, landmarks, diagonal=diagonal) for peaks in found]
    values = torch.tensor([own for own, _ in pairs], dtype=torch.float64)
    low, high = interval(values, bounds=(0.0, math.inf))
    errors = {n: [regression_error(p, landmarks, diagonal=diagonal)[0] for p in each] for n, each in others.items()}
    baselines = {name: float(np.mean(each)) for name, each in errors.items()}
    return Score(
        metric="landmark_regression",
        value=float(values.mean()),
        low=low,
        high=high,
        baselines={**baselines, "mean_place": pairs[0][1]},
        n=len(landmarks),
        seeds=len(found),
        higher_is_better=False,
        definition=(
            "Mean distance, as a share of the input's diagonal, of the landmarks from where a linear regression on all "
            "concepts' peaks puts them, on images that the regression has not seen (three folds). mean_place reads no "
            f"concept. The interval covers the seeds alone. Landmarks: {', '.join(names)}."
        ),
    )

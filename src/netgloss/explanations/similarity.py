"""How similar the concepts of a run are: the nearest ones of each, and a flat map of all.

Similarity is the cosine of the directions where the explainer has a dictionary, else the Pearson correlation of the
codes over rows. With S the similarities, the distance of two concepts is ``sqrt(2 - 2 S_ij)`` (for directions the
length of the chord between them). Two layouts are made, both without chance: classical scaling (Torgerson 1952: the two
leading eigenvectors of the centred S) and, from :data:`CROWD` concepts on, t-SNE (van der Maaten & Hinton 2008) started
from it. The one that keeps more of each concept's nearest neighbours is shown, and how many it keeps is reported with
what a map drawn at random would keep: a flat map of many directions must tear some of them apart.

Shape letters: K concepts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from netgloss.activations.layer import Layer
from netgloss.explainers.base import Explainer
from netgloss.metrics.dictionary import cosines
from netgloss.metrics.stability import CodeCorrelation

CROWD = 12
"""From as many concepts on, t-SNE is tried as well."""
_LARGEST = 2048
_NEAREST = 5


def concept_similarity(explainer: Explainer, layer: Layer, images: np.ndarray) -> tuple[Tensor, str]:
    """Similarities (K, K) in [-1, 1] with ones on the diagonal, and what they are ``of``: "directions" or "codes".

    Parameters
    ----------
    images : store indices that the codes are taken from; only read where there is no dictionary.
    """
    dictionary = explainer.dictionary
    if dictionary is not None:
        found, of = cosines(dictionary.cpu(), dictionary.cpu()), "directions"
    else:
        correlation = CodeCorrelation(explainer.num_concepts)
        with torch.no_grad():
            for batch in layer.batches(images):
                codes = explainer.encode(batch.activation).cpu()
                correlation.update(codes, codes)
        found, of = correlation.compute(), "codes"
    found = ((found + found.T) / 2).nan_to_num(0.0)
    return found.fill_diagonal_(1.0), of


def nearest(similarity: Tensor, count: int = _NEAREST) -> list[list[dict[str, Any]]]:
    """For each concept the ``count`` most similar others, nearest first; equally near ones in their order."""
    order = _others(-similarity.double().numpy())[:, :count]
    return [
        [{"concept": int(j), "similarity": float(similarity[k, j])} for j in row]
        for k, row in enumerate(order.tolist())
    ]


def concept_map(similarity: Tensor, of: str) -> dict[str, Any] | None:
    """The flat map: ``points`` (K, 2) in the unit square, ``way``, ``of``, and the share of neighbours ``kept``.

    ``chance`` is the share that random places would keep. None for fewer than three concepts.
    """
    count = len(similarity)
    if count < 3:
        return None
    cosine = similarity.double().numpy()
    distance = np.sqrt(np.clip(2 - 2 * cosine, 0, None))
    nearest_count = min(_NEAREST, (count - 1) // 2)
    flat = _scaled(cosine)
    candidates = {"classical scaling": flat}
    if CROWD <= count <= _LARGEST:
        candidates["t-SNE"] = _neighbour_embedding(distance, flat)
    kept = {way: _kept(distance, points, nearest_count) for way, points in candidates.items()}
    way = max(kept, key=lambda name: kept[name])
    return {
        "points": _into_unit_square(candidates[way]).round(4).tolist(),
        "way": way,
        "of": of,
        "neighbours": nearest_count,
        "kept": kept[way],
        "chance": nearest_count / (count - 1),
    }


def _scaled(cosine: np.ndarray) -> np.ndarray:
    """Classical scaling of similarities to (K, 2); the largest coordinate of each axis is positive."""
    centred = cosine - cosine.mean(axis=0) - cosine.mean(axis=1)[:, None] + cosine.mean()
    values, vectors = np.linalg.eigh(centred)
    points = vectors[:, [-1, -2]] * np.sqrt(np.clip(values[[-1, -2]], 0, None))
    strongest = np.abs(points).argmax(axis=0)
    return points * np.where(points[strongest, [0, 1]] < 0, -1.0, 1.0)


def _neighbour_embedding(distance: np.ndarray, start: np.ndarray) -> np.ndarray:
    from sklearn.manifold import TSNE

    start = start / max(float(start.std()), 1e-12) * 1e-4
    perplexity = min(30.0, (len(distance) - 1) / 3)
    method = TSNE(metric="precomputed", init=start, perplexity=perplexity, random_state=0, learning_rate="auto")
    return np.asarray(method.fit_transform(distance), dtype=np.float64)


def _kept(distance: np.ndarray, points: np.ndarray, count: int) -> float:
    """Mean share of each concept's ``count`` nearest that are among its ``count`` nearest on the map."""
    on_map = np.linalg.norm(points[:, None] - points[None], axis=2)
    pairs = zip(_others(distance)[:, :count], _others(on_map)[:, :count], strict=True)
    return float(np.mean([len(set(a.tolist()) & set(b.tolist())) / count for a, b in pairs]))


def _others(cost: np.ndarray) -> np.ndarray:
    """Indices (K, K - 1) of all others, the cheapest first; ties in the order of their numbers."""
    cost = cost.copy()
    np.fill_diagonal(cost, np.inf)
    return np.argsort(cost, axis=1, kind="stable")[:, :-1]


def _into_unit_square(points: np.ndarray) -> np.ndarray:
    """Shifted and scaled, both axes equally, so that the longer one spans [0, 1] and the other is centred."""
    low, high = points.min(axis=0), points.max(axis=0)
    span = max(float((high - low).max()), 1e-12)
    return np.asarray((points - (low + high) / 2) / span + 0.5)

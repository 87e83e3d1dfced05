"""Galleries of part maps: which images show a filter best, which filters coincide, what each track contributes.

Per filter, the images whose peak passes the level that 0.3 % of its activations exceed, strongest first. Source of this
choice: the authors' code for drawing (arXiv 1710.00935); their sweep of occluders is replaced by upsampling the map.

Shape letters: B images, K concepts, H W grid.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from netgloss.activations import Store
from netgloss.explainers.base import Explainer

_RARE = 0.003


_SAMPLED = 1_000_000


def distinct_filters(order: Sequence[int], shares: Tensor, distinct: float) -> Iterator[tuple[int, list[int]]]:
    """Filters in order without those that coincide with an earlier one, each with those that coincide with it."""
    left = list(order)
    while left:
        k, *others = left
        same = [j for j in others if float(shares[k, j]) > distinct]
        left = [j for j in others if j not in set(same)]
        yield k, same


def strongest_images(maps: Tensor, count: int, classes: np.ndarray | None = None) -> Tensor:
    """Images (B, H, W) of one filter whose peak passes the level exceeded by 0.3 % of its activations, strongest
    first, at most ``count``; those of a dead filter are none. With ``classes`` (B,), at most a third are of one class,
    as long as others pass the level.
    """
    values = maps.flatten().float()
    sampled = values[:: max(1, len(values) // _SAMPLED)]
    level = torch.quantile(sampled, 1 - _RARE)
    peaks = maps.flatten(1).amax(dim=1).float()
    order = peaks.argsort(descending=True)
    order = order[(peaks[order] >= level) & (peaks[order] > float(values.min()))]
    if classes is not None:
        order = _spread(order, classes, -(-count // 3))
    return order[:count]


def _spread(order: Tensor, classes: np.ndarray, most: int) -> Tensor:
    """The order, with images of a class beyond its first ``most`` at the end."""
    seen: Counter[int] = Counter()
    first: list[int] = []
    later: list[int] = []
    for i in order.tolist():
        seen[int(classes[i])] += 1
        (first if seen[int(classes[i])] <= most else later).append(i)
    return torch.tensor(first + later, dtype=torch.long)


def track_shares(explainer: Explainer, store: Store, layer: str, images: np.ndarray) -> dict[str, float]:
    """How much each track of an explainer moves the last layer above, as shares that sum to 1; {} if it has one
    track only.

    With U the rebuilt activation from all tracks and U_w that from track w alone, track w counts ``|U - U_other|``:
    what is lost when it is taken out. Ours; p and the norms at x_enc say less, as the decoder may weight the tracks
    again.
    """
    tracks = explainer.partial()
    if len(tracks) != 2:
        return {}
    names = list(tracks)
    lost = torch.zeros(2, dtype=torch.float64)
    with torch.no_grad():
        for start in range(0, len(images), 32):
            activation = torch.from_numpy(store.read(layer, images[start : start + 32])).float()
            whole = _last(explainer(activation))
            for w, name in enumerate(names):
                lost[1 - w] += (whole - _last(tracks[name](activation))).flatten(1).norm(dim=1).sum().double()
    return {name: float(lost[w] / lost.sum()) for w, name in enumerate(names)}


def _last(upper: dict[str, Tensor]) -> Tensor:
    return next(reversed(upper.values()))

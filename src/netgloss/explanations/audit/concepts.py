"""Which concepts stand for a region that decides, and what the class is without them.

Shape letters: N images, K concepts, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from netgloss.activations.layer import LayerReader
from netgloss.explainers.base import Explainer
from netgloss.metrics.faithfulness.importance import explain_class

_CARRIED = 0.8
_MOST = 4
_DRAWS = 5


@dataclass(frozen=True)
class ConceptsBehind:
    """The concepts that fall when a region is exchanged.

    Attributes
    ----------
    concepts : the fewest that carry four fifths of the fall of all contributions to the class, at most four.
    share : what they carry.
    lost : share of the class's images that the network no longer recognises without them.
    lost_random : the same for a random change that is as large at every place, its mean over five directions.
    """

    concepts: tuple[int, ...]
    share: float
    lost: float
    lost_random: float


def concepts_behind(
    explainer: Explainer, reader: LayerReader, own: Tensor, exchanged: Tensor, target: int, *, seed: int = 0
) -> ConceptsBehind | None:
    """The concepts whose contribution to the class falls when the region is exchanged; None if none falls.

    Parameters
    ----------
    own, exchanged : (N, channels, H, W) normalised images of the class, before and after.
    """
    if explainer.target != "activation":
        return None
    fall = (
        _contributions(explainer, reader, own, target) - _contributions(explainer, reader, exchanged, target)
    ).clamp_min(0)
    total = float(fall.sum())
    if total <= 0:
        return None
    order = fall.argsort(descending=True).tolist()
    chosen: list[int] = []
    while len(chosen) < _MOST and float(fall[chosen].sum()) < _CARRIED * total:
        chosen.append(order[len(chosen)])
    batch = reader.batch(own)
    with torch.no_grad():
        codes = explainer.encode(batch.activation)
        scaled = codes.clone()
        scaled[:, chosen] = 0
        decode = explainer.decoder_for(batch.activation)
        change = decode(scaled) - decode(codes)
        lost = _lost(batch.tail(batch.activation + change), target)
        random = [_lost(batch.tail(batch.activation + other), target) for other in _random_changes(change, seed)]
    return ConceptsBehind(tuple(chosen), float(fall[chosen].sum()) / total, lost, sum(random) / len(random))


def _contributions(explainer: Explainer, reader: LayerReader, pixels: Tensor, target: int) -> Tensor:
    """(K,) mean contribution of each concept to the class."""
    batch = reader.batch(pixels)
    with torch.no_grad():
        codes = explainer.encode(batch.activation)
    classes = torch.full((len(pixels),), target, device=codes.device)
    given = (explainer, batch.tail, codes, batch.logits, classes)
    return explain_class(*given, activation=batch.activation).values.mean(dim=0)


def _lost(logits: Tensor, target: int) -> float:
    return float((logits.argmax(dim=1) != target).float().mean())


def _random_changes(change: Tensor, seed: int) -> list[Tensor]:
    """Changes in one random direction each, of the size of ``change`` (N, C[, H, W]) at every place."""
    size = change.norm(dim=1, keepdim=True)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(_DRAWS):
        direction = torch.randn(change.shape[1], generator=generator).to(change)
        found.append(size * (direction / direction.norm()).reshape(1, -1, *(1 for _ in change.shape[2:])))
    return found

"""What if a concept were weaker: the logits with one concept's code scaled, stored for the report's sliders.

With z the codes of an image, a its activation, f the tail and g the decoder, concept k at strength s gives::

    z' = z with z_k scaled by s            logits(k, s) = logits + f(a + g(z') - g(z)) - f(a)

Only what the decoder makes of the concept leaves the activation; what the concepts do not explain stays unchanged, so
that strength 1 is the network's own answer. An explainer that rebuilds class scores itself is replayed through them,
and one that rebuilds layers above through those.

Where tail and decoder are affine, the logits are a straight line in s and several concepts add up: one point (s = 0)
says everything, and every position of every slider is exact. Elsewhere the points of :data:`STRENGTHS` are computed for
one concept at a time, and nothing between or beyond them is claimed.

Shape letters: B images, D drivers, S strengths, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from netgloss.activations.layer import LayerBatch
from netgloss.explainers.base import Explainer

STRENGTHS = (0.0, 0.25, 0.5, 0.75)
"""Shares of its code that a concept keeps, where the tail is not affine."""
_CLASSES = 16
_ALWAYS = 5


def is_exact(explainer: Explainer, codes: Tensor, *, affine: bool) -> bool:
    """True if logits are affine in the codes: an affine tail behind a linear decoder, or the explainer's own scores."""
    classes = torch.zeros(len(codes), dtype=torch.long, device=codes.device)
    return explainer.contributions(codes, classes) is not None or (affine and explainer.dictionary is not None)


@torch.no_grad()
def replay(
    explainer: Explainer, batch: LayerBatch, codes: Tensor, drivers: Sequence[Sequence[int]], strengths: Sequence[float]
) -> Tensor:
    """Logits (B, D, S, C) with each driver at each strength; D is the longest list, shorter ones repeat their logits.

    Parameters
    ----------
    codes : of ``batch``, (B, K) or (B, K, H, W).
    drivers : the concepts to weaken, for each image.
    """
    logits = batch.logits.float()
    own = explainer.rebuilt_logits(codes, logits) is not None

    def answer(scaled: Tensor) -> Tensor:
        if own:
            rebuilt = explainer.rebuilt_logits(scaled, logits)
            assert rebuilt is not None
            return rebuilt
        if explainer.target == "upper":
            return batch.tail(decode(scaled))
        return batch.tail(batch.activation + decode(scaled) - decoded)

    decode = explainer.decoder_for(batch.activation)
    decoded = codes if own or explainer.target == "upper" else decode(codes)
    whole = answer(codes)
    slots = max((len(chosen) for chosen in drivers), default=0)
    found = logits[:, None, None].repeat(1, slots, len(strengths), 1)
    for d in range(slots):
        rows = [b for b, chosen in enumerate(drivers) if d < len(chosen)]
        concepts = [drivers[b][d] for b in rows]
        for s, strength in enumerate(strengths):
            scaled = codes.clone()
            scaled[rows, concepts] *= strength
            found[:, d, s] += answer(scaled) - whole
    return found


def removal_record(
    replayed: Tensor, logits: Tensor, drivers: Sequence[int], names: Sequence[str], shown: int, *, exact: bool
) -> dict[str, Any]:
    """What the report needs for the sliders of one image.

    Parameters
    ----------
    replayed : (D, S, C) logits of the image; S = 1 (strength 0) where ``exact``. logits : (C,).
    shown : class that the image page is about.

    Returns
    -------
    ``classes``: those that can win at some position of the sliders, the strongest, and ``shown``; ``ceiling``: the most
    that a class left out can reach (None if none is), so that a reader never sees a wrong winner.
    """
    points = replayed[: len(drivers)].float().cpu()
    logits = logits.float().cpu()
    change = points - logits
    if exact:  # the sliders reach every sum of the drivers' changes
        highest = logits + change[:, 0].clamp_min(0).sum(dim=0)
        lowest = logits + change[:, 0].clamp_max(0).sum(dim=0)
        can_win = highest >= lowest.max()
    else:
        reached = torch.cat([points.flatten(0, 1), logits[None]])
        highest = reached.amax(dim=0)
        can_win = torch.zeros(len(logits), dtype=torch.bool)
        can_win[reached.argmax(dim=1)] = True
    order = logits.argsort(descending=True).tolist()
    wanted = [shown, *order[:_ALWAYS], *(c for c in highest.argsort(descending=True).tolist() if can_win[c])]
    kept = sorted(list(dict.fromkeys(wanted))[:_CLASSES], key=lambda c: -float(logits[c]))
    left = torch.ones(len(logits), dtype=torch.bool)
    left[kept] = False
    return {
        "exact": exact,
        "strengths": [0.0] if exact else list(STRENGTHS),
        "classes": [names[c] for c in kept],
        "logits": logits[kept].tolist(),
        "ceiling": float(highest[left].max()) if bool(left.any()) else None,
        "drivers": list(drivers),
        "at": points[:, :, kept].tolist(),
    }

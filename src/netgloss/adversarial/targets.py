"""Which class each adversarial image should be taken for.

Targets lie among the classes of the probe set: a target outside of it would make the share of target classes zero by
construction.

Shape letters: N images, C classes, m targets an image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from netgloss.adversarial.crafting import Ids, image_generator
from netgloss.errors import UserError


def assign_targets(
    labels: Tensor, *, classes: Sequence[int] | None = None, per_source: int = 1, seed: int = 0, ids: Ids | None = None
) -> Tensor:
    """Targets (N,), or (N, m) with ``per_source`` = m > 1, such that pairs (true class, target) are as even as can be.

    Within a true class the images take turns through the other classes, in an order drawn by seed and image id; the
    turns of the classes are shifted against each other, so that targets are even too. An image's targets all differ.

    Parameters
    ----------
    labels : (N,) true classes. classes : those of the probe set; default the labels that occur.

    Raises
    ------
    UserError : fewer than two classes, a label outside of them, or more targets an image than other classes.
    """
    probe = sorted(set(labels.tolist()) if classes is None else set(classes))
    if len(probe) < 2 or not 1 <= per_source < len(probe):
        raise UserError(
            f"{per_source} targets an image need {max(per_source, 1) + 1} classes at least, got {len(probe)}"
        )
    outside = sorted(set(labels.tolist()) - set(probe))
    if outside:
        raise UserError(f"labels {outside[:8]} are not among the classes of the probe set {probe[:8]}")
    shuffled = torch.randperm(len(probe), generator=torch.Generator().manual_seed(seed)).tolist()
    circle = [probe[i] for i in shuffled]
    keys = [
        float(torch.rand((), generator=image_generator(seed, i))) for i in (range(len(labels)) if ids is None else ids)
    ]
    targets = torch.zeros(len(labels), per_source, dtype=torch.long)
    for place, true in enumerate(circle):
        others = circle[place + 1 :] + circle[:place]
        own = sorted((labels == true).nonzero().squeeze(1).tolist(), key=lambda i: (keys[i], i))
        for turn, i in enumerate(own):
            for j in range(per_source):
                targets[i, j] = others[(turn * per_source + j) % len(others)]
    return targets.squeeze(1).to(labels.device) if per_source == 1 else targets.to(labels.device)


def least_likely_targets(
    logits: Tensor, labels: Tensor, *, classes: Sequence[int] | None = None, seed: int = 0, ids: Ids | None = None
) -> Tensor:
    """The class (N,) of the smallest logit (N, C), among ``classes`` if given, but not the true one; ties are drawn."""
    allowed = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
    allowed[slice(None) if classes is None else list(classes)] = True
    free_NC = allowed.repeat(len(logits), 1).scatter_(1, labels[:, None], False)
    if not free_NC.any(1).all():
        raise UserError(
            f"a least likely class other than the true one needs two classes, got {classes or logits.shape[1]}"
        )
    masked = logits.masked_fill(~free_NC, torch.inf)
    lowest_NC = masked == masked.amin(1, keepdim=True)
    targets = masked.argmin(1)
    some = range(len(logits)) if ids is None else ids
    for i in (lowest_NC.sum(1) > 1).nonzero().squeeze(1).tolist():
        tied = lowest_NC[i].nonzero().squeeze(1)
        targets[i] = tied[torch.randint(len(tied), (), generator=image_generator(seed, some[i]))]
    return targets

"""PGD by an attacker who knows the detector: towards the target, with units that agree with it.

The agreement s(x) (``metrics/consistency_difference.py``) asks whether the ten units of largest prediction difference
mean the predicted class; adversarial images are caught by a low s. The attacker minimises::

    CE(f(x), t) - s_t(x),     s_t = sum_u w_u (A p_u)_t,  w_u ~ max(PD_u, 0) over the ten units, PD_u for class t

The units are chosen anew at every step and are constant within it; w_u is differentiated. If s tells these images no
better than chance, it is no defence.

Shape letters: B images, U units, C classes of the probe set, T units of a trace.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from netgloss.adversarial.crafting import AttackResult, Ids, PixelClassifier, crafting, gradient, project, random_start
from netgloss.classifiers.taps import Taps
from netgloss.errors import UserError
from netgloss.metrics.consistency.difference import prediction_difference


def adaptive_pgd(
    classifier: PixelClassifier,
    x: Tensor,
    y: Tensor,
    *,
    targets: Tensor,
    probe_targets: Tensor,
    layer: str,
    tail: Callable[[Tensor], Tensor],
    meaning: Tensor,
    eps: float,
    steps: int = 20,
    step_size: float | None = None,
    top: int = 10,
    weight: float = 1.0,
    seed: int = 0,
    ids: Ids | None = None,
) -> AttackResult:
    """Targeted PGD (Linf) on CE(f(x), t) - weight s_t(x), from a random start.

    Parameters
    ----------
    targets : (B,) the classifier's classes; probe_targets : (B,) the same as indices into A.
    layer, tail : the layer of the units, and logits from its activation (``netgloss.classifiers.Tail``).
    meaning : (C, U) A p, p the class vectors of the channels' top real images.
    top : units that s looks at.

    Raises
    ------
    UserError : as of :func:`netgloss.adversarial.pgd`, or a meaning that is not of the layer's channels.
    """
    if steps < 1:
        raise UserError(f"PGD needs at least one step, got {steps}")
    length = 2.5 * eps / steps if step_size is None else step_size
    with (
        crafting(classifier, x, y, eps=eps, targets=targets, ids=ids) as pixels,
        Taps(classifier.net, layer, stop=False) as taps,
    ):
        wanted_BU = meaning.to(pixels)[probe_targets]

        def loss(z: Tensor) -> Tensor:
            activation = taps(classifier.normalise(z))[layer]
            logits = taps.logits
            if activation.shape[1] != wanted_BU.shape[1]:
                raise UserError(
                    f"layer {layer!r} has {activation.shape[1]} channels, meaning {wanted_BU.shape[1]} units"
                )
            with torch.no_grad():
                chosen_BT = prediction_difference(activation.detach(), tail, classes=targets).topk(
                    min(top, activation.shape[1]), dim=1
                )[1]
            before = logits.gather(1, targets[:, None])
            differences = []
            for place in range(chosen_BT.shape[1]):
                keep = torch.ones(activation.shape[:2], device=z.device).scatter(1, chosen_BT[:, place : place + 1], 0)
                without = activation * keep.reshape(*keep.shape, *([1] * (activation.ndim - 2)))
                differences.append(before - tail(without).gather(1, targets[:, None]))
            positive_BT = torch.cat(differences, dim=1).clamp_min(0)
            weights_BT = positive_BT / positive_BT.sum(1, keepdim=True).clamp_min(1e-12)
            agreement = (weights_BT * wanted_BU.gather(1, chosen_BT)).sum()
            return F.cross_entropy(logits, targets, reduction="sum") - weight * agreement

        z = project(pixels + random_start(pixels, eps, "linf", seed=seed, ids=ids), pixels, eps, "linf")
        for _ in range(steps):
            z = project(z - length * gradient(loss, z).sign(), pixels, eps, "linf")
        found = z.detach()
    with crafting(classifier, x, y, eps=eps):
        return AttackResult.measure(classifier, x, found, y, targets)

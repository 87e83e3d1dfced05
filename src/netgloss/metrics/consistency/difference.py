"""How much a unit adds to a prediction, and whether the units behind it mean the predicted class.

Prediction difference (after Dong et al., arXiv 1901.09035), f_c the logit of the predicted class::

    PD_u(x) = f_c(a) - f_c(a - (decode(z) - decode(z with z_u = 0))),      z = encode(a), a the layer's activation of x

so what the explainer does not rebuild stays in place. For channels encode and decode are the identity, and the map of
channel u is set to 0. Where the logits are affine in a and a is affine in z, PD is z_u times the gradient of f_c, for
all units in one backward pass. Agreement, over the ten units of largest PD, with the classes p_u of their top images::

    s(x) = sum_u w_u (A p_u)_c,      w_u ~ max(PD_u, 0)

A low s is meant to detect adversarial images; an attacker who knows s can raise it.

Shape letters: B images, K concepts, U units, C classes of the probe set, T units of a trace.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from netgloss.errors import UserError
from netgloss.metrics.base import check_same_shape
from netgloss.metrics.faithfulness.importance import contributions


def unchanged(activation: Tensor) -> Tensor:
    """Encode and decode of channels."""
    return activation


@torch.no_grad()
def prediction_difference(
    activation: Tensor,
    tail: Callable[[Tensor], Tensor],
    *,
    encode: Callable[[Tensor], Tensor] = unchanged,
    decode: Callable[[Tensor], Tensor] = unchanged,
    units: Sequence[int] | None = None,
    classes: Tensor | None = None,
    affine: bool = False,
) -> Tensor:
    """PD (B, U) of concepts ``units`` (default all K), in logits.

    Parameters
    ----------
    activation : (B, C) or (B, C, H, W).
    tail : logits of activations.
    encode, decode : an explainer's (its target must be ``"activation"``); default the channels themselves.
    classes : (B,) whose logit is read; default the predicted ones.
    affine : tail and decode are affine; gives the same numbers in one pass instead of one per unit.
    """
    logits = tail(activation)
    classes = logits.argmax(1) if classes is None else classes
    before = logits.gather(1, classes[:, None]).squeeze(1)
    concepts = encode(activation)
    rebuilt = decode(concepts)
    check_same_shape("the activation", activation, "its reconstruction", rebuilt)
    chosen = list(range(concepts.shape[1]) if units is None else units)
    for unit in chosen:
        if not 0 <= unit < concepts.shape[1]:
            raise UserError(f"units are 0 to {concepts.shape[1] - 1}, got {unit}")
    if affine:
        kept = activation - rebuilt
        return contributions(lambda z: kept + decode(z), tail, concepts, classes).values[:, chosen]
    differences = []
    for unit in chosen:
        without = concepts.clone()
        without[:, unit] = 0
        after = tail(activation - (rebuilt - decode(without)))
        differences.append(before - after.gather(1, classes[:, None]).squeeze(1))
    return torch.stack(differences, dim=1)


def strongest_units(differences: Tensor, *, top: int = 10) -> tuple[Tensor, Tensor]:
    """The ``top`` units of largest PD (B, T) and their weights (B, T) ~ max(PD, 0); zeros where no PD is positive."""
    values, units = differences.topk(min(top, differences.shape[1]), dim=1)
    positive = values.double().clamp_min(0)
    return units, positive / positive.sum(1, keepdim=True).clamp_min(1e-300)


def agreement_with_units(
    differences: Tensor, class_vectors: Tensor, affinity: Tensor, classes: Tensor, *, top: int = 10
) -> Tensor:
    """S (B,) of the module docstring; NaN where no unit has a positive PD.

    Parameters
    ----------
    differences : (B, U) PD. class_vectors : p (C, U). affinity : A (C, C).
    classes : (B,) predicted class as an index into A.
    """
    units, weights = strongest_units(differences, top=top)
    meaning_CU = affinity @ class_vectors
    s = (weights * meaning_CU[classes[:, None], units]).sum(1)
    return s.masked_fill(weights.sum(1) == 0, torch.nan)


def detection_auroc(clean: Tensor, suspect: Tensor) -> float:
    """Chance that a suspect image (M,) scores lower than a clean one (N,); 0.5 says nothing. NaN is left out."""
    from sklearn.metrics import roc_auc_score

    values = torch.cat([clean, suspect])
    is_suspect = torch.arange(len(values)) >= len(clean)
    known = ~values.isnan()
    if len(is_suspect[known].unique()) < 2:
        return float("nan")
    return float(roc_auc_score(is_suspect[known].numpy(), -values[known].double().numpy()))

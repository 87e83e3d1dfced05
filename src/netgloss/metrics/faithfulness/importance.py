"""How much each concept adds to a class's logit.

With f_c the tail's logit and z the concepts, the contribution of concept k is gradient times concept::

    contribution_k = sum_p z_kp * d f_c(decode(z)) / d z_kp            (p: positions)
    f_c(decode(z)) = f_c(decode(0)) + sum_k contribution_k + gap

When decoder and tail are affine (mean pool and linear head, say) the gap is zero and the contributions are exact;
otherwise the gap says what they leave unexplained. What the reconstruction itself loses is ``logit - rebuilt``,
reported apart from it.

Shape letters: B images, K concepts, H W grid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from netgloss.explainers.base import Explainer


@dataclass(frozen=True)
class Contributions:
    """Contributions to one logit an image.

    Attributes
    ----------
    values : (B, K) in logits.
    rebuilt : (B,) logit of the decoded concepts.
    base : (B,) logit of ``decode(0)``.
    """

    values: Tensor
    rebuilt: Tensor
    base: Tensor

    @property
    def gap(self) -> Tensor:
        """(B,) completeness gap: rebuilt logit minus base minus the sum of contributions."""
        return self.rebuilt - self.base - self.values.sum(dim=1)


def contributions(
    decode: Callable[[Tensor], Any], tail: Callable[[Any], Tensor], concepts: Tensor, classes: Tensor
) -> Contributions:
    """Contribution of each concept to the logit of one class per image.

    Parameters
    ----------
    decode : concepts -> activation, differentiable.
    tail : activation -> logits (B, num_classes), differentiable.
    concepts : (B, K) or (B, K, H, W).
    classes : (B,) class index of each image.
    """
    with torch.enable_grad():
        codes = concepts.detach().clone().requires_grad_(True)
        logits = tail(decode(codes))
        rebuilt = logits.gather(1, classes[:, None])[:, 0]
        (gradient,) = torch.autograd.grad(rebuilt.sum(), codes)
    with torch.no_grad():
        values = (codes * gradient).flatten(2).sum(dim=2) if codes.ndim == 4 else codes * gradient
        base = tail(decode(torch.zeros_like(codes))).gather(1, classes[:, None])[:, 0]
    return Contributions(values=values.detach(), rebuilt=rebuilt.detach(), base=base.detach())


def explain_class(
    explainer: Explainer,
    tail: Callable[[Any], Tensor],
    concepts: Tensor,
    logits: Tensor,
    classes: Tensor,
    *,
    activation: Tensor | None = None,
) -> Contributions:
    """:func:`contributions` of an explainer, or its own where it rebuilds class scores itself.

    For a class that such an explainer does not rebuild, the base is the logit and every contribution is 0.

    Parameters
    ----------
    logits : (B, num_classes) of the classifier. tail, concepts, classes : as in :func:`contributions`.
    activation : what the concepts were read from; where part of it reaches the logits in parallel to the concepts
        (``Explainer.decoder_for``), that part is held fixed and belongs to the base.
    """
    own = explainer.contributions(concepts, classes)
    if own is None:
        decode = explainer.decode if activation is None else explainer.decoder_for(activation)
        return contributions(decode, tail, concepts, classes)
    values, base = own
    rebuilt = explainer.rebuilt_logits(concepts, logits)
    assert rebuilt is not None
    chosen = rebuilt.gather(1, classes[:, None])[:, 0]
    return Contributions(values.detach(), chosen.detach(), torch.where(base.isnan(), chosen, base).detach())


def explained_share(logit: Tensor, base: Tensor, gap: Tensor) -> Tensor:
    """(B,) share of what lies between base and logit that the concepts explain: ``1 - |gap| / |logit - base|``.

    Parameters
    ----------
    logit : (B,) of the network itself. base : (B,) logit without any concept.
    gap : (B,) ``logit - base`` minus all contributions, so what the reconstruction loses counts as not explained.

    Returns
    -------
    In [0, 1]: 0 where the gap is as large as the whole; NaN where logit and base coincide.
    """
    whole = (logit - base).abs()
    share = (1 - gap.abs() / whole.clamp_min(1e-30)).clamp_min(0)
    return torch.where(whole > 1e-6 * (1 + logit.abs()), share, torch.nan)


def typical_share(shares: Tensor) -> tuple[float, float | None, float | None] | None:
    """Median of (n,) shares with its 95 % interval, from order statistics; NaN is left out, None if nothing is left.

    The interval assumes no distribution: the values between which the median of the population lies by the binomial
    law. Below six values there is none.
    """
    from scipy.stats import binom

    known = shares[shares.isfinite()].double().sort().values
    if not len(known):
        return None
    rank = int(binom.ppf(0.025, len(known), 0.5))
    middle = (float(known[(len(known) - 1) // 2]) + float(known[len(known) // 2])) / 2
    return (middle, float(known[rank - 1]), float(known[-rank])) if rank else (middle, None, None)


def strongest(values: Tensor, count: int) -> list[int]:
    """Concepts of the largest absolute values (K,), strongest first, at most ``count``, without those that are 0."""
    return [k for k in values.abs().argsort(descending=True)[:count].tolist() if values[k] != 0]


def significant(values: Tensor, *, share: float = 0.9) -> Tensor:
    """(B,) number of concepts that make up ``share`` of each image's positive contributions (B, K); 0 without any.

    The "significant x-features" of Hamidi-Haines et al. 2018 (arXiv 1812.07150), for any explainer.
    """
    positive = values.clamp_min(0).sort(dim=1, descending=True).values
    total = positive.sum(dim=1, keepdim=True)
    reached = positive.cumsum(dim=1) < share * total
    return torch.where(total[:, 0] > 0, reached.sum(dim=1) + 1, 0)

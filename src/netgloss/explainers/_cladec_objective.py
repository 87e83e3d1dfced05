"""The objective of ClaDec and the two forms of its weight alpha.

Section 3 of the method's page; R sums over the P values of an image and averages over the batch::

    R(X, X') = (1/B) sum_i |X_i - X'_i|^2
    J   = (1 - alpha) R(X, X_E) + alpha CE(C(X_E), t)              alpha in the sum form
    J~  = (1 - alpha_m) R / P + alpha_m CE = J / (alpha + P (1 - alpha))       what is minimised
    alpha = P alpha_m / (1 - alpha_m + P alpha_m),   alpha_m = alpha / (alpha + P (1 - alpha))

The weights of J~ add up to 1, so that the learning rate means the same at every alpha and image size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from netgloss.errors import UserError

_COLLAPSE_ERROR = 0.98
_COLLAPSE_VARIANCE = 1e-3


def alpha_sum(alpha_mean: float, num_values: int) -> float:
    """The weight of the form that sums over an image's P = ``num_values`` values, from that of the averaging form."""
    _check_alpha(alpha_mean)
    return num_values * alpha_mean / (1 - alpha_mean + num_values * alpha_mean)


def alpha_mean(alpha_sum: float, num_values: int) -> float:
    """The inverse of :func:`alpha_sum`."""
    _check_alpha(alpha_sum)
    return alpha_sum / (alpha_sum + num_values * (1 - alpha_sum))


def _check_alpha(alpha: float) -> None:
    if not 0 <= alpha <= 1:
        raise UserError(f"alpha must lie in [0, 1], got {alpha}")


def reconstruction_error(image: Tensor, decoded: Tensor) -> Tensor:
    """R, () : squared differences summed over (m, H, W), averaged over the batch."""
    return (image - decoded).square().flatten(1).sum(dim=1).mean()


def class_error(logits: Tensor, labels: Tensor | None, wanted: Tensor | None, kind: str) -> Tensor:
    """The class term, () in nats.

    Parameters
    ----------
    logits : (B, classes) of the decoded images.
    labels : (B,) classes, -1 for unknown.
    wanted : (B, classes) the classifier's logits of the originals.
    kind : "auto" (the label, the prediction where there is none), "label" (unlabelled images do not count),
        "prediction" or "kl" (KL(C(X) || C(X_E))).

    Raises
    ------
    UserError : the classifier's logits are needed and not there.
    """
    if kind == "label":
        assert labels is not None
        known = labels >= 0
        if not known.any():
            return logits.sum() * 0
        return cross_entropy(logits[known], labels[known])
    if wanted is None:
        raise UserError(
            f"class_target={kind!r} needs the classifier's logits, which this store does not hold: capture with logits "
            "or take class_target='label'"
        )
    if kind == "kl":
        return kl_div(logits.log_softmax(1), wanted.to(logits).log_softmax(1), log_target=True, reduction="batchmean")
    target = wanted.argmax(dim=1).to(logits.device)
    if kind == "auto" and labels is not None:
        target = target.where(labels < 0, labels)
    return cross_entropy(logits, target)


def check_collapse(error: float, of_mean: float, spread: float, layer: str, *, ended: bool) -> None:
    """Raises if the decoder ignores its code, or (``ended``) learned nothing that holds for other images.

    R may rightly exceed that of the mean image with alpha, and before all steps without it: 100 steps lie in the
    warm-up of a longer fit.
    """
    if spread < _COLLAPSE_VARIANCE or (ended and error >= _COLLAPSE_ERROR * of_mean):
        what = "has collapsed" if spread < _COLLAPSE_VARIANCE else "learned nothing that holds for other images"
        raise UserError(
            f"the decoder of layer {layer!r} {what}: on held-out images R = {error:.4g} (the mean image has "
            f"{of_mean:.4g}), and its images vary {spread:.2g} times as much as the originals; remedies: --output "
            "linear and --norm with the published decoder, more images, or a lower --lr"
        )


def unit_relevance(activation: Tensor, tail: Callable[[Tensor], Tensor] | None) -> Tensor:
    """|gradient x activation| of the predicted class's logit, summed over images and positions, (c,) float64.

    Where the tail is one linear layer, this is |weight x activation|.
    """
    if tail is None:
        raise UserError("channel_rule='relevance' needs the classifier: the batch brought no tail")
    with torch.enable_grad():
        values = activation.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(tail(values).max(dim=1).values.sum(), values)
    share = (gradient * activation).detach().abs()
    return (share.sum(dim=(2, 3)) if share.ndim == 4 else share).sum(dim=0).double().cpu()

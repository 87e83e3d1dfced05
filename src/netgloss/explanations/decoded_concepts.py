"""Other explainers' concepts made visible by a decoder of the same layer.

Ours; no source in the literature.

::

    delta_k   = dec(z) - dec(z with z_k = 0)              z = enc(a)
    kept      X_K = D(dec(z))                             compared with X_E = D(a)
    removed   D(a - delta_k), or D(dec(z) - delta_k)      compared with X_E, or X_K
    alone     D(mean_a + delta_k)                         compared with D(mean_a), mean_a over the training set
    visibility_k = d(delta_k) / d(r),  d(u) = mean over images of |D(a) - D(a - u)|^2
                   r: 10 random directions with the norm of delta_k at each position

Several concepts are zeroed together; pictures are never added. The decoder was trained on plain activations: where all
of a layer's are >= 0, edited ones are clamped at 0 (random ones too) and the clamped share of the edit's norm is
told. A picture is evidence only if the interval of ``visibility_k`` lies above 1. An edited activation that is farther
from all training activations than 95 % of the unedited ones is flagged ``off_manifold``.

Shape letters: B images, C features, H W the layer's grid, K concepts, R random directions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from netgloss.errors import UserError
from netgloss.explainers.base import Explainer

DIRECTIONS = 10
_RESAMPLES = 1000


@dataclass(frozen=True)
class Edited:
    """An edited activation (B, C[, H, W]) and the share of the edit's norm that clamping took back (B,)."""

    activation: Tensor
    clamped: Tensor


class ConceptDecoder:
    """A decoder and another explainer of the same layer.

    Parameters
    ----------
    decode : activations (B, C) or (B, C, H, W) -> images (B, m, H', W'); a fitted ``ClaDec`` or any callable.
    explainer : one that rebuilds activations.
    mean_activation : (C,) or (C, H, W), over the training images.
    nonnegative : whether all training activations of the layer are >= 0.

    Raises
    ------
    UserError : the explainer does not rebuild whole activations.
    """

    def __init__(
        self, decode: Callable[[Tensor], Tensor], explainer: Explainer, mean_activation: Tensor, *, nonnegative: bool
    ) -> None:
        if explainer.target != "activation" or explainer.reads == "pooled":
            raise UserError(
                f"{type(explainer).__name__} does not rebuild the activation of {explainer.spec.name!r}: its concepts "
                "cannot be decoded into images"
            )
        self.to_image, self.explainer = decode, explainer
        self.mean_activation, self.nonnegative = mean_activation, nonnegative

    def delta(self, activation: Tensor, concepts: Sequence[int], *, box: Tensor | None = None) -> Tensor:
        """What the concepts add to the reconstruction, like the activation.

        Parameters
        ----------
        box : (H, W) or (B, H, W) bool; where given, only these positions of a map are edited.
        """
        codes = self.explainer.encode(activation)
        without = codes.clone()
        without[:, list(concepts)] = 0
        if bool((without == codes).all()):
            return torch.zeros_like(activation)
        found = self.explainer.decode(codes) - self.explainer.decode(without)
        return found if box is None else found * box.reshape(-1, 1, *box.shape[-2:]).to(found)

    def kept(self, activation: Tensor) -> Tensor:
        """X_K, what all concepts together keep."""
        return self.to_image(self._clamp(self.explainer.decode(self.explainer.encode(activation))))

    def remove(
        self,
        activation: Tensor,
        concepts: Sequence[int],
        *,
        base: Literal["activation", "reconstruction"] = "activation",
        box: Tensor | None = None,
    ) -> Edited:
        """The activation (or its reconstruction) without the concepts."""
        start = activation if base == "activation" else self.explainer.decode(self.explainer.encode(activation))
        return self._edit(start, -self.delta(activation, concepts, box=box))

    def alone(self, activation: Tensor, concepts: Sequence[int], *, box: Tensor | None = None) -> Edited:
        """The mean training activation with only these concepts put in."""
        start = self.mean_activation.to(activation).expand_as(activation)
        return self._edit(start, self.delta(activation, concepts, box=box))

    def random_edit(self, activation: Tensor, delta: Tensor, generator: torch.Generator) -> Edited:
        """The activation minus one random direction (C,) with the norm of ``delta`` at every position."""
        direction = torch.randn(activation.shape[1], generator=generator).to(activation)
        direction = (direction / direction.norm()).reshape(1, -1, *(1 for _ in activation.shape[2:]))
        return self._edit(activation, -delta.norm(dim=1, keepdim=True) * direction)

    def _edit(self, start: Tensor, change: Tensor) -> Edited:
        free = start + change
        kept = self._clamp(free)
        norm = change.flatten(1).norm(dim=1)
        share = (free - kept).flatten(1).norm(dim=1) / norm.clamp_min(1e-12)
        return Edited(kept, torch.where(norm > 0, share, 0.0))

    def _clamp(self, activation: Tensor) -> Tensor:
        return activation.clamp_min(0) if self.nonnegative else activation


@dataclass(frozen=True)
class Visibility:
    """By how much more a concept's removal changes the picture than random edits of the same size.

    ``logit`` is the mean change of the predicted class's logit when the classifier's own tail reads the edited
    activation, ``logit_random`` the mean |change| of random edits (both NaN without a tail).
    """

    value: float
    low: float
    high: float
    clamped: float
    off_manifold: float
    logit: float
    logit_random: float
    images: int

    @property
    def is_evidence(self) -> bool:
        """True if the interval lies above 1."""
        return self.low > 1


@torch.no_grad()
def visibility(
    decoder: ConceptDecoder,
    activation: Tensor,
    concepts: Sequence[int],
    *,
    tail: Callable[[Tensor], Tensor] | None = None,
    manifold: Manifold | None = None,
    directions: int = DIRECTIONS,
    seed: int = 0,
) -> Visibility:
    """``visibility_k`` over images, with a 95 % bootstrap interval over them.

    Parameters
    ----------
    activation : (B, C[, H, W]), of images where the concept is active.
    tail : the classifier from the layer to the logits, for the causal change.
    """
    generator = torch.Generator().manual_seed(seed)
    delta = decoder.delta(activation, concepts)
    plain = decoder.to_image(activation)
    edited = decoder.remove(activation, concepts)
    changed_B = (plain - decoder.to_image(edited.activation)).square().flatten(1).sum(dim=1)
    randoms = [decoder.random_edit(activation, delta, generator) for _ in range(directions)]
    random_RB = torch.stack([(plain - decoder.to_image(r.activation)).square().flatten(1).sum(dim=1) for r in randoms])
    logit = logit_random = float("nan")
    if tail is not None:
        before = tail(activation)
        predicted = before.argmax(dim=1, keepdim=True)
        own = before.gather(1, predicted)
        logit = float((tail(edited.activation).gather(1, predicted) - own).mean())
        changes = [(tail(r.activation).gather(1, predicted) - own).abs().mean() for r in randoms[:3]]
        logit_random = float(torch.stack(changes).mean())
    value, low, high = _ratio(changed_B.double().cpu().numpy(), random_RB.mean(dim=0).double().cpu().numpy(), seed)
    outside = float("nan") if manifold is None else float(manifold.is_outside(edited.activation).double().mean())
    clamped = float(edited.clamped.mean())
    return Visibility(value, low, high, clamped, outside, logit, logit_random, len(activation))


def _ratio(above: np.ndarray, below: np.ndarray, seed: int) -> tuple[float, float, float]:
    """Ratio of sums over images and its 95 % percentile bootstrap interval; NaN where nothing changes at all."""
    if not below.sum() > 0:
        return float("nan"), float("nan"), float("nan")
    picks = np.random.default_rng(seed).integers(len(above), size=(_RESAMPLES, len(above)))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = above[picks].sum(axis=1) / below[picks].sum(axis=1)
    low, high = np.nanquantile(ratios, [0.025, 0.975])
    return float(above.sum() / below.sum()), float(low), float(high)


class Manifold:
    """Where training activations lie: distances of spatial means to the nearest training one.

    Parameters
    ----------
    train : (N, C[, H, W]) training activations.
    test : (M, C[, H, W]) unedited test activations; 95 % of their distances make the limit.
    """

    def __init__(self, train: Tensor, test: Tensor) -> None:
        self.train = spatial_mean(train)
        self.limit = float(self.distance(test).quantile(0.95))

    def distance(self, activation: Tensor) -> Tensor:
        """(B,)."""
        return torch.cdist(spatial_mean(activation), self.train.to(activation)).min(dim=1).values

    def is_outside(self, activation: Tensor) -> Tensor:
        """(B,) bool."""
        return self.distance(activation) > self.limit


def spatial_mean(activation: Tensor) -> Tensor:
    """(B, C[, H, W]) -> (B, C)."""
    return activation.mean(dim=(2, 3)) if activation.ndim == 4 else activation

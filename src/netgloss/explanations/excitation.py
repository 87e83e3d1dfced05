"""Other methods to draw where a concept of a pooled layer comes from, for single images: excitation, and I-GOS by
choice.

Excitation backpropagation (Zhang et al., "Top-down Neural Attention by Excitation Backprop", IJCV 2018) sends the
probability of an x-feature down its encoder by ``P_in = a (W+^T (P_out / (W+ a)))``: captum's LRP with the
alpha-1-beta-0 rule and no biases. From the mean it goes to the cells in proportion to their activation. It needs a
layer that is never negative, and stops at the layer's own grid; the papers' code goes further down.

Shape letters: B images, C features, H W grid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from netgloss.errors import UserError
from netgloss.explainers.base import Explainer

if TYPE_CHECKING:
    from netgloss.classifiers import Classifier

HeatmapKind = Literal["gradient", "excitation", "igos"]


def excitation_heatmaps(explainer: Explainer, maps: Tensor, concepts: Sequence[int]) -> Tensor:
    """Excitation (B, len(concepts), H, W) >= 0 of some concepts: each map sums to 1, or to 0 where nothing excites it.

    Raises
    ------
    UserError : the method's encoder is not a chain of layers (SRAE's is), or the layer has negative activations.
    """
    from captum.attr import LRP
    from captum.attr._utils.lrp_rules import Alpha1_Beta0_Rule

    chain: Callable[[int], tuple[nn.Sequential, int]] | None = getattr(explainer, "encoder_chain", None)
    if chain is None:
        raise UserError(f"excitation needs an encoder made of layers, which {type(explainer).__name__} does not have")
    if float(maps.min()) < 0:
        raise UserError(f"excitation needs activations >= 0, but layer {explainer.spec.name!r} has negative ones")
    pooled, found = maps.detach().mean(dim=(2, 3)), []
    for k in concepts:
        encoder, unit = chain(k)
        for part in encoder:
            if isinstance(part, nn.Linear):
                part.rule = Alpha1_Beta0_Rule(set_bias_to_zero=True)
        relevance = LRP(encoder).attribute(pooled.clone().requires_grad_(True), target=unit).detach()
        cells = maps.detach() * (relevance / pooled.clamp_min(1e-30))[:, :, None, None]
        heat = cells.sum(dim=1).clamp_min(0)
        found.append(heat / heat.sum(dim=(1, 2), keepdim=True).clamp_min(1e-30))
    return torch.stack(found, dim=1)


def chosen_heatmaps(
    kind: HeatmapKind, explainer: Explainer, classifier: Classifier, layer: str, pixels: Tensor, activation: Tensor
) -> Callable[[list[int]], Tensor] | None:
    """What draws the heatmaps (len, h, w) of concepts in one image; None for "gradient", which needs nothing more.

    Parameters
    ----------
    pixels : (1, m, S, S') as the network reads them. activation : (1, C, H, W) of ``layer``.
    """
    if kind == "gradient":
        return None
    if explainer.reads != "pooled" or activation.ndim != 4:
        raise UserError(f"heat {kind!r} is for methods that read a pooled map; this run is of another kind")
    if kind == "excitation":
        return lambda concepts: excitation_heatmaps(explainer, activation, concepts)[0]

    def optimised(concepts: list[int]) -> Tensor:
        from netgloss.classifiers import Taps
        from netgloss.explanations.igos import optimised_heat

        with Taps(classifier.net, [layer]) as taps:

            def activity(images: Tensor, concept: int) -> Tensor:
                return explainer.encode(taps(images)[layer])[:, concept]

            return torch.stack([optimised_heat(partial(activity, concept=k), pixels) for k in concepts])

    return optimised

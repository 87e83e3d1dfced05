"""Heat of pooled concepts: excitation by hand and by its conservation law, I-GOS on a concept of known pixels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from netgloss.errors import UserError
from netgloss.explainers.base import LayerSpec
from netgloss.explainers.pca import PCA, PCAConfig
from netgloss.explainers.srae import SRAE, SRAEConfig
from netgloss.explanations.excitation import excitation_heatmaps
from netgloss.explanations.heatmaps import concept_heatmaps
from netgloss.explanations.igos import optimised_heat, total_variation


def srae_of(features: int = 12, classes: tuple[str, ...] = ("0", "1"), *, bias: float = 0.1) -> SRAE:
    explainer = SRAE(
        SRAEConfig(num_concepts=3, classes=classes), LayerSpec("l", (features,), nonnegative=True, num_classes=2)
    )
    for g in range(explainer.num_modules):
        explainer.nets.draw(g, g)
    with torch.no_grad():
        explainer.scale.fill_(2.0)
        for layer in explainer.nets.encoder:
            layer.bias.fill_(bias)
    return explainer.eval()


def test_the_encoder_chain_is_the_encoder() -> None:
    explainer = srae_of()
    pooled = torch.rand(4, 12)
    for k in range(6):
        chain, unit = explainer.encoder_chain(k)
        torch.testing.assert_close(chain(pooled)[:, unit], explainer.encode(pooled)[:, k])


def by_hand(explainer: SRAE, maps: Tensor, concept: int) -> Tensor:
    """P_in = a W+^T (P_out / W+ a), layer by layer, then shared out over the cells."""
    g, unit = divmod(concept, 3)
    values = [maps.mean(dim=(2, 3)) / explainer.scale]
    for layer in explainer.nets.encoder:
        values.append((values[-1] @ layer.weight[g] + layer.bias[g]).relu())
    down = torch.nn.functional.one_hot(torch.full((len(maps),), unit), 3).float()
    for layer, given in zip(reversed(list(explainer.nets.encoder)), reversed(values[:-1]), strict=True):
        positive = layer.weight[g].clamp_min(0)
        down = given * ((down / (given @ positive)) @ positive.T)
    cells = down[:, :, None, None] * maps / maps.sum(dim=(2, 3), keepdim=True)
    return cells.sum(dim=1)


def test_excitation_by_hand() -> None:
    explainer = srae_of()
    maps = torch.rand(5, 12, 3, 2, generator=torch.Generator().manual_seed(0))
    alive = explainer.encode(maps) > 0
    before = {name: value.clone() for name, value in explainer.state_dict().items()}
    heat = excitation_heatmaps(explainer, maps, range(6))
    assert heat.shape == (5, 6, 3, 2)
    assert alive.any()
    for k in range(6):
        torch.testing.assert_close(heat[alive[:, k], k], by_hand(explainer, maps, k)[alive[:, k]])
        assert (heat[~alive[:, k], k] == 0).all()
    for name, value in explainer.state_dict().items():
        torch.testing.assert_close(value, before[name])


def test_excitation_is_conserved() -> None:
    """All that starts at the x-feature arrives at the cells: each map sums to 1."""
    explainer = srae_of(bias=0.5)
    maps = torch.rand(5, 12, 4, 4)
    heat = excitation_heatmaps(explainer, maps, range(6)).sum(dim=(2, 3))
    alive = explainer.encode(maps) > 0
    torch.testing.assert_close(heat, alive.float())


def test_excitation_wants_layers_and_no_negative_values() -> None:
    with pytest.raises(UserError, match="made of layers, which PCA does not have"):
        excitation_heatmaps(PCA(PCAConfig(num_concepts=2), LayerSpec("l", (12,))), torch.rand(1, 12, 2, 2), [0])
    with pytest.raises(UserError, match="'l' has negative"):
        excitation_heatmaps(srae_of(), -torch.rand(1, 12, 2, 2), [0])


def test_gradient_heat_of_a_linear_concept() -> None:
    weight = torch.tensor([[1.0, 2.0], [0.5, -1.0]])
    maps = torch.rand(3, 2, 2, 2)
    heat = concept_heatmaps(lambda pooled: pooled @ weight, maps, [0, 1])
    expected = torch.einsum("bchw,ck->bkhw", maps / 4, weight).clamp_min(0)
    torch.testing.assert_close(heat, expected)


def test_total_variation_by_hand() -> None:
    mask = torch.tensor([[[[0.0, 1.0], [0.0, 3.0]]]])
    assert float(total_variation(mask)) == pytest.approx((0 + 4) / 2 + (1 + 9) / 2)


def test_igos_finds_the_pixels_of_a_concept() -> None:
    """The concept is the brightness of one corner: only that corner is hidden, and the concept falls."""
    pixels = torch.zeros(1, 3, 32, 32)
    pixels[:, :, 2:12, 2:12] = 1.0
    pixels[:, :, 20:30, 20:30] = 1.0

    def concept(images: Tensor) -> Tensor:
        return images[:, :, 2:12, 2:12].mean(dim=(1, 2, 3)).clamp_min(0)

    heat = optimised_heat(concept, pixels)
    assert heat.shape == (32, 32)
    assert float(heat.min()) >= 0
    assert float(heat.max()) <= 1
    inside, outside = heat[2:12, 2:12].mean(), heat[18:, 18:].mean()
    assert inside > 0.3
    assert outside < 0.2 * inside
    torch.testing.assert_close(optimised_heat(concept, pixels), heat)  # the same seed, the same heat
    assert not optimised_heat(lambda images: images.sum(dim=(1, 2, 3)) * 0, pixels).any()

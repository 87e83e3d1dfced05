"""The filter loss: templates, closed-form gradient, invariances, bounds, and masks."""

from __future__ import annotations

import math

import pytest
import torch

from netgloss.explainers.part_maps import _Information, concentration, information_loss, peak_mask, templates


def plain(maps: torch.Tensor, kappa: float, beta: float = 4.0) -> torch.Tensor:
    """The definition, written out in float64 with autograd."""
    table = templates(*maps.shape[2:], beta=beta, kappa=kappa).to(maps)
    s = torch.einsum("bcp,tp->ctb", maps.flatten(2), table)
    log_p = s.log_softmax(dim=2)
    log_q = -math.log(len(table))
    log_mix = (log_p + log_q).logsumexp(dim=1, keepdim=True)
    return -(log_p.exp() * (log_p - log_mix)).sum(dim=(1, 2)) / len(table)


def drawn(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    maps = torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) ** 6
    return scale * maps / maps.sum(dim=(2, 3)).mean(dim=0)[:, None, None]


def test_templates_at_seven_cells() -> None:
    """beta 4, n 7: 1 - 4 d / 7 down to -1, which is reached at distance 3.5; the last one is -1 everywhere."""
    table = templates(7, 7)
    assert table.shape == (50, 49)
    centre = table[24].reshape(7, 7)
    assert centre[3, 3:].tolist() == pytest.approx([1, 3 / 7, -1 / 7, -5 / 7])
    assert centre[2, 2] == pytest.approx(-1 / 7)
    assert centre[0, 0] == -1
    assert (table[49] == -1).all()
    assert templates(7, 7, kappa=30)[24].equal(30 * table[24])


@pytest.mark.parametrize("kappa", [1.0, 30.0])
def test_value_and_gradient_are_those_of_the_definition(kappa: float) -> None:
    maps = drawn(9, 5, 6, 7).requires_grad_()
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0])
    loss = information_loss(maps, kappa=kappa)
    (gradient,) = torch.autograd.grad((loss * weights).sum(), maps)
    exact = maps.detach().double().requires_grad_()
    expected = plain(exact, kappa)
    (wanted,) = torch.autograd.grad((expected * weights).sum(), exact)
    torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=1e-4)
    assert (gradient - wanted).norm() < 1e-4 * wanted.norm()


def test_closed_form_gradient_of_the_scores() -> None:
    """-q p (r - sum p r) for every template, on two images of one cell each."""
    maps = torch.tensor([[[[2.0, 0.0]]], [[[0.5, 1.0]]]]).requires_grad_()
    table = templates(1, 2)
    s = maps.detach().flatten(2)[:, 0] @ table.T
    p = s.softmax(dim=0)
    r = p.log() - p.mean(dim=1, keepdim=True).log()
    by_score = -p * (r - (p * r).sum(dim=0)) / 3
    information_loss(maps, kappa=1.0).sum().backward()
    assert maps.grad is not None
    torch.testing.assert_close(maps.grad.flatten(1), by_score @ table)


def test_loss_lies_between_minus_log_and_zero() -> None:
    """0 where all images are alike; log B where each image has a peak of its own and amplitude is unbounded."""
    same = drawn(1, 3, 5, 5).expand(6, -1, -1, -1)
    torch.testing.assert_close(information_loss(same, kappa=30.0), torch.zeros(3), atol=1e-5, rtol=0)
    maps = torch.zeros(9, 1, 3, 3)
    maps[torch.arange(9), 0, torch.arange(9) // 3, torch.arange(9) % 3] = 1
    loss = information_loss(maps, kappa=1e4)
    assert -math.log(9) <= float(loss) + 1e-5
    assert float(loss) < -0.8 * math.log(9)
    assert (information_loss(drawn(4, 7, 5, 5), kappa=50.0) <= 1e-5).all()


def test_finite_over_many_scales_and_in_half_precision() -> None:
    for scale in (1e-2, 1.0, 1e2, 1e5):
        maps = drawn(8, 4, 7, 7, scale=scale).requires_grad_()
        loss = information_loss(maps, kappa=30.0)
        loss.sum().backward()
        assert loss.isfinite().all()
        assert maps.grad is not None
        assert maps.grad.isfinite().all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert information_loss(drawn(8, 4, 7, 7).bfloat16(), kappa=30.0).dtype == torch.float32


def test_adding_a_constant_to_all_images_changes_nothing() -> None:
    """A pattern that every image shares shifts the scores of each template alike."""
    maps, pattern = drawn(6, 3, 5, 5), drawn(1, 3, 5, 5, seed=1)
    torch.testing.assert_close(
        information_loss(maps + pattern, kappa=20.0), information_loss(maps, kappa=20.0), atol=1e-5, rtol=1e-4
    )


def test_single_template_gradient_keeps_the_peak_s_template_only() -> None:
    maps = drawn(5, 2, 4, 4)
    table = templates(4, 4, kappa=10.0)
    found = _gradient(maps, table)
    s = maps.flatten(2) @ table.T
    p = s.softmax(dim=0)
    r = p.log() - p.mean(dim=2, keepdim=True).log()
    peak = maps.flatten(2).argmax(dim=2)
    weight = -(p * r).gather(2, peak[:, :, None]) / len(table)
    torch.testing.assert_close(found, weight * table[peak], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(information_loss(maps, kappa=10.0, single=True), information_loss(maps, kappa=10.0))


def _gradient(maps: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    given = maps.clone().requires_grad_()
    _Information.apply(given, table, True).sum().backward()
    assert given.grad is not None
    return given.grad.flatten(2)


def test_slices_of_channels_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    maps = drawn(4, 6, 5, 5).requires_grad_()
    whole = torch.autograd.grad(information_loss(maps, kappa=30.0).sum(), maps)[0]
    monkeypatch.setattr("netgloss.explainers.part_maps._SLICE", 1)
    torch.testing.assert_close(torch.autograd.grad(information_loss(maps, kappa=30.0).sum(), maps)[0], whole)


def test_mask_is_a_cone_around_the_peak_and_passes_no_gradient() -> None:
    maps = torch.rand(2, 3, 7, 7, generator=torch.Generator().manual_seed(0))
    maps[:, :, 2, 4] = 2.0
    maps.requires_grad_()
    mask = peak_mask(maps)
    assert not mask.requires_grad
    assert mask[0, 0, 2].tolist() == pytest.approx([0, 0, 0, 3 / 7, 1, 3 / 7, 0])
    assert mask[1, 2, 3].tolist() == pytest.approx([0, 0, 0, 0, 3 / 7, 0, 0])


def test_concentration_is_the_variance_of_the_places() -> None:
    """Two halves four cells apart: variance (2 / 8)^2; a single cell: 0; the position does not matter."""
    maps = torch.zeros(3, 2, 8, 8)
    maps[:, 0, 3, 1] = maps[:, 0, 3, 5] = 2.0
    maps[:, 1, 7, 7] = 5.0
    found = concentration(maps, torch.tensor([4.0, 5.0]))
    assert found.tolist() == pytest.approx([1 / 16, 0.0], abs=1e-6)
    assert concentration(maps.roll(2, 2), torch.tensor([4.0, 5.0])).tolist() == pytest.approx([1 / 16, 0.0], abs=1e-6)
    loud = concentration(maps, torch.tensor([0.4, 5.0]))  # ten times its usual mass counts three times
    assert float(loud[0]) == pytest.approx(3 / 16)
    silent = torch.zeros(2, 1, 4, 4, requires_grad=True)
    value = concentration(silent, torch.ones(1)).sum()
    value.backward()
    assert value == 0
    assert silent.grad is not None
    assert silent.grad.isfinite().all()


def test_concentration_pulls_a_map_together() -> None:
    maps = torch.zeros(1, 1, 5, 5)
    maps[0, 0, 2, 2], maps[0, 0, 2, 4] = 3.0, 1.0
    maps.requires_grad_()
    concentration(maps, torch.ones(1)).sum().backward()
    assert maps.grad is not None
    assert maps.grad[0, 0, 2, 2] < 0 < maps.grad[0, 0, 2, 4]


def test_gradients_hold_no_subnormal_numbers() -> None:
    """They made the convolutions' backward pass several times as slow."""
    maps = torch.rand(16, 3, 13, 13).pow(8)
    maps = (maps / maps.sum(dim=(2, 3), keepdim=True)).requires_grad_()
    information_loss(maps, kappa=100.0).sum().backward()
    assert maps.grad is not None
    size = maps.grad.abs()
    assert not ((size > 0) & (size < torch.finfo(torch.float32).tiny)).any()
    assert (size > 0).any()

"""TopKSAE: losses in closed form, dead atoms, unit atoms, planted dictionaries, resume."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from netgloss.errors import UserError
from netgloss.explainers.base import Batch, LayerSpec
from netgloss.explainers.topk_sae import TopKSAE, TopKSAEConfig


class ArrayRows:
    """Rows held in memory."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    @property
    def num_rows(self) -> int:
        return len(self.rows)

    @property
    def num_features(self) -> int:
        return self.rows.shape[1]

    def chunks(self) -> Iterator[Tensor]:
        return iter(self.rows.split(100))

    def sample(self, max_rows: int, *, seed: int) -> Tensor:
        return self.rows[:max_rows]


def sae(num_features: int, **options: Any) -> TopKSAE:
    return TopKSAE(TopKSAEConfig(**options), LayerSpec("layer", (num_features,)))


def batch(rows: Tensor) -> Batch:
    return Batch(rows, torch.zeros(len(rows), dtype=torch.long))


def train(model: TopKSAE, rows: Tensor, optimizer: torch.optim.Optimizer, steps: range) -> list[dict[str, float]]:
    """What netgloss.training does: the loss terms' sum, a step at the scheduled rate, the projection."""
    history = []
    for step in steps:
        chosen = torch.randint(len(rows), (model.config.batch_size,), generator=torch.Generator().manual_seed(step))
        for group in optimizer.param_groups:
            group["lr"] = model.config.lr * model.lr_scale(step)
        terms = model.losses(batch(rows[chosen]))
        optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        optimizer.step()
        history.append({name: term.item() for name, term in terms.items()} | model.after_step(step))
    return history


def planted(n: int = 4000, k: int = 24, c: int = 16, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows with two or three of 24 unit atoms (an overcomplete dictionary), and the atoms."""
    g = torch.Generator().manual_seed(seed)
    atoms = F.normalize(torch.randn(k, c, generator=g), dim=1)
    used = torch.rand(n, k, generator=g).argsort(dim=1) < 3
    codes = (0.5 + torch.rand(n, k, generator=g)) * used
    return codes @ atoms, atoms


def by_hand(**options: Any) -> TopKSAE:
    """Two features, three atoms: the two axes (encoded at slope 1) and the negative first axis (at slope 0.1)."""
    model = sae(2, num_concepts=3, **options).double()
    with torch.no_grad():
        model.decoder.copy_(torch.tensor([[1.0, 0], [0, 1], [-1, 0]]))
        model.encoder.copy_(torch.tensor([[1.0, 0], [0, 1], [-0.1, 0]]))
    return model


def test_losses_of_a_tiny_example() -> None:
    model = by_hand(top_k=1, dead_steps=1)
    rows = torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    terms = model.losses(batch(rows))
    assert terms["reconstruction"].item() == pytest.approx((0 + 1 + 1 + 0) / 4)
    assert terms["auxk"].item() == 0
    assert model.silent_steps.tolist() == [0, 0, 1], "atoms 0 and 1 won one row each"


def test_atoms_that_win_with_nothing_stay_silent() -> None:
    model = by_hand(top_k=3)
    model.losses(batch(torch.tensor([[1.0, -1.0]], dtype=torch.float64)))
    assert model.silent_steps.tolist() == [0, 1, 1], "all three are in the top 3, but only atom 0 is above zero"


def test_codes_scale_and_offsets_of_a_tiny_example() -> None:
    model = by_hand(top_k=1)
    with torch.no_grad():
        model.mean.copy_(torch.tensor([10.0, 20.0]))
        model.scale.fill_(2.0)
        model.bias.copy_(torch.tensor([0.5, 0.0]))
        model.encoder_bias.copy_(torch.tensor([0.25, 0.0, 0.0]))
    row = torch.tensor([[16.0, 22.0]], dtype=torch.float64)  # y = (3, 1), y - b = (2.5, 1)
    assert model.encode(row).tolist() == [[2.75, 0.0, 0.0]]
    assert model(row).tolist() == [[10 + 2 * (0.5 + 2.75), 20.0]]
    assert model.dictionary.tolist() == [[2.0, 0.0], [0.0, 2.0], [-2.0, 0.0]]


def test_auxk_of_a_tiny_example() -> None:
    model = by_hand(top_k=1, dead_steps=5, aux_weight=0.5)
    model.silent_steps[2] = 5
    rows = torch.tensor([[-2.0, 1.0], [0.0, 2.0]], dtype=torch.float64)
    terms = model.losses(batch(rows))
    # Atom 1 wins both rows: errors (-2, 0) and (0, 0). The dead atom has 0.2 and 0: guesses (-0.2, 0) and (0, 0).
    assert terms["reconstruction"].item() == pytest.approx(4 / 4)
    assert terms["auxk"].item() == pytest.approx(0.5 * (1.8**2 / 4) / (4 / 4))
    terms["auxk"].backward()
    assert model.encoder.grad is not None
    assert model.encoder.grad[:2].abs().max() == 0, "the residual is a constant: only the dead atom learns from it"
    assert model.encoder.grad[2].abs().max() > 0


def test_step_equals_the_dense_formula() -> None:
    """Losses and all gradients equal those of the equations written out with dense codes."""
    model = sae(6, num_concepts=10, top_k=3, aux_k=2, dead_steps=4).double()
    rows = torch.randn(40, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 3 + 1
    model.fit_rows(ArrayRows(rows.float()), seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
        model.after_step(0)
    dead = torch.tensor([1, 4, 7])
    model.silent_steps[dead] = 4
    got = model.losses(batch(rows))
    got_grads = torch.autograd.grad(got["reconstruction"] + got["auxk"], list(model.parameters()))

    y = (rows - model.mean) / model.scale
    before = (y - model.bias) @ model.encoder.T + model.encoder_bias
    atoms = model.decoder / model.decoder.norm(dim=1, keepdim=True)

    def largest(values: Tensor, k: int) -> Tensor:
        return torch.where(values >= values.topk(k, dim=1).values[:, -1:], values.relu(), 0.0)

    error = y - model.bias - largest(before, 3) @ atoms
    target = error.detach()
    auxiliary = (largest(before[:, dead], 2) @ atoms[dead] - target).square().mean() / target.square().mean() / 32
    torch.testing.assert_close(got["reconstruction"], error.square().mean())
    torch.testing.assert_close(got["auxk"], auxiliary)
    expected = torch.autograd.grad(error.square().mean() + auxiliary, list(model.parameters()))
    for one, other in zip(got_grads, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_codes_have_at_most_top_k_entries_none_negative() -> None:
    rows = planted()[0]
    model = sae(16, num_concepts=24, top_k=3)
    model.fit_rows(ArrayRows(rows), seed=0)
    codes = model.encode(rows)
    assert (codes >= 0).all()
    assert (codes > 0).sum(1).max() == 3
    assert torch.autograd.gradcheck(model.double().encode, rows[:4].double().requires_grad_())


def test_reconstruction_is_the_lost_share_of_variance() -> None:
    rows = planted()[0] * torch.linspace(1, 5, 16) + 50
    model = sae(16, num_concepts=24, top_k=3)
    model.fit_rows(ArrayRows(rows), seed=0)
    codes_off = sae(16, num_concepts=24, top_k=3)
    codes_off.load_state_dict(model.state_dict())
    with torch.no_grad():
        codes_off.encoder.zero_()
    assert codes_off.losses(batch(rows))["reconstruction"].item() == pytest.approx(1, abs=1e-5)
    lost = (model(rows) - rows).square().sum() / (rows - rows.mean(0)).square().sum()
    assert model.losses(batch(rows))["reconstruction"].item() == pytest.approx(lost.item(), rel=1e-4)


@pytest.mark.parametrize(("factor", "shift"), [(1024.0, 0.0), (1.0, 3.0)])
def test_scale_and_shift_of_the_layer_do_not_matter(factor: float, shift: float) -> None:
    rows = planted()[0]
    histories = []
    for seen in (rows, rows * factor + shift):
        model = sae(16, num_concepts=24, top_k=3, batch_size=256, steps=20)
        model.fit_rows(ArrayRows(seen), seed=0)
        histories.append([h["reconstruction"] for h in train(model, seen, model.optimizer(), range(20))])
    assert histories[0] == pytest.approx(histories[1], rel=1e-3)


def test_planted_atoms_are_found_and_stay_of_unit_length() -> None:
    rows, atoms = planted()
    model = sae(16, num_concepts=24, top_k=3, batch_size=512, steps=1500, lr=3e-3, dead_steps=50)
    model.fit_rows(ArrayRows(rows + 5), seed=0)
    start = model.losses(batch(rows + 5))["reconstruction"].item()
    optimizer = model.optimizer()
    for first in range(0, 1500, 500):
        history = train(model, rows + 5, optimizer, range(first, first + 500))
        torch.testing.assert_close(model.decoder.norm(dim=1), torch.ones(24), rtol=0, atol=1e-6)
    cosine = F.normalize(model.dictionary.detach(), dim=1) @ atoms.T
    pairs = linear_sum_assignment(-cosine.numpy())
    assert float(cosine[pairs].mean()) > 0.9
    assert history[-1]["reconstruction"] < 0.15 * start
    assert history[-1]["dead_share"] == 0


def test_gradient_has_no_part_along_the_atoms() -> None:
    rows = planted()[0]
    model = sae(16, num_concepts=24, top_k=3)
    model.fit_rows(ArrayRows(rows), seed=0)
    model.losses(batch(rows))["reconstruction"].backward()
    assert model.decoder.grad is not None
    along = (model.decoder.grad * model.decoder).sum(1).abs()
    assert along.max() < 1e-5 * model.decoder.grad.norm(dim=1).max()


def weaken_half(model: TopKSAE) -> None:
    with torch.no_grad():
        model.encoder[12:] *= 1e-3
        model.encoder_bias[:12] = 1


@pytest.mark.parametrize("aux_weight", [0.0, 1 / 32])
def test_auxk_revives_planted_dead_atoms(aux_weight: float) -> None:
    """Half of the atoms start too weak ever to be chosen; only the auxiliary loss can bring them back."""
    rows = planted()[0]
    model = sae(16, num_concepts=24, top_k=3, batch_size=256, steps=600, lr=3e-3, dead_steps=10, aux_weight=aux_weight)
    model.fit_rows(ArrayRows(rows), seed=0)
    weaken_half(model)
    history = train(model, rows, model.optimizer(), range(600))
    assert history[12]["dead_share"] == 0.5
    assert history[-1]["dead_share"] == (0 if aux_weight else 0.5)
    assert (history[-1]["reconstruction"] < 0.15) == bool(aux_weight)


def test_resume_goes_on_as_if_nothing_had_happened() -> None:
    rows = planted()[0]
    options: dict[str, Any] = {"num_concepts": 24, "top_k": 2, "batch_size": 64, "steps": 40, "dead_steps": 2}
    whole = sae(16, **options)
    whole.fit_rows(ArrayRows(rows), seed=0)
    weaken_half(whole)
    optimizer = whole.optimizer()
    train(whole, rows, optimizer, range(20))
    resumed = sae(16, **options)
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    assert resumed.silent_steps.max() > 0
    again = resumed.optimizer()
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    expected = train(whole, rows, optimizer, range(20, 40))
    assert train(resumed, rows, again, range(20, 40)) == expected
    assert any(h["auxk"] > 0 for h in expected)


def test_seeds_vary_the_start_and_a_second_fit_starts_anew() -> None:
    rows = planted()[0]
    model, other = sae(16, num_concepts=24), sae(16, num_concepts=24)
    model.fit_rows(ArrayRows(rows), seed=0)
    other.fit_rows(ArrayRows(rows), seed=1)
    assert not torch.equal(model.decoder, other.decoder)
    train(other, rows, other.optimizer(), range(3))
    other.fit_rows(ArrayRows(rows), seed=0)
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())


def test_equal_rows_are_a_clear_error() -> None:
    with pytest.raises(UserError, match="all 30 rows of layer 'layer' are equal"):
        sae(4).fit_rows(ArrayRows(torch.full((30, 4), 0.1)), seed=0)


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 17, "num_concepts": 16},
        {"top_k": 0},
        {"aux_k": 0},
        {"aux_weight": -1.0},
        {"aux_weight": float("nan")},
        {"dead_steps": 0},
        {"lr": 0.0},
        {"steps": 0},
    ],
)
def test_options(options: dict[str, Any]) -> None:
    name, value = next(iter(options.items()))
    with pytest.raises(UserError, match=f"{name} must .*{value:g}|{name} must .*{value}"):
        TopKSAEConfig(**options)


def test_autocast_bfloat16_step() -> None:
    rows = planted()[0]
    model = sae(16, num_concepts=24, top_k=3, dead_steps=1)
    model.fit_rows(ArrayRows(rows), seed=0)
    model.silent_steps[:5] = 1
    exact = {k: v.item() for k, v in model.losses(batch(rows)).items()}
    model.silent_steps.zero_()[:5] = 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = model.losses(batch(rows))
    sum(terms.values(), torch.zeros(())).backward()
    assert terms["reconstruction"].item() == pytest.approx(exact["reconstruction"], rel=0.02)
    assert terms["auxk"].item() == pytest.approx(exact["auxk"], rel=0.02)

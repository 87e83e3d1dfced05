"""Shapley values: axioms and games whose shares are known; sampled ones with errors that mean something."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from netgloss.errors import UserError
from netgloss.metrics.faithfulness.completeness import completeness_value
from netgloss.metrics.faithfulness.importance import contributions
from netgloss.metrics.faithfulness.masking import class_value
from netgloss.metrics.faithfulness.shapley import exact_shapley, sampled_shapley, shapley
from netgloss.metrics.faithfulness.sobol import sobol_total


def table_game(k: int, *shape: int, seed: int = 0) -> tuple[Tensor, object]:
    """A game with arbitrary values of all subsets."""
    table = torch.randn(2**k, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    bits = 2 ** torch.arange(k)
    return table, lambda masks: table[(masks.long() * bits).sum(1)]


def by_all_orders(k: int, value: object) -> Tensor:
    """The definition as a mean over all orders."""
    total = 0.0
    for order in itertools.permutations(range(k)):
        mask = torch.zeros(k)
        before = value(mask[None])[0]  # type: ignore[operator]
        shares = [None] * k
        for concept in order:
            mask[concept] = 1
            after = value(mask[None])[0]  # type: ignore[operator]
            shares[concept] = after - before  # type: ignore[call-overload]
            before = after
        total = total + torch.stack(shares)  # type: ignore[arg-type]
    return total / math.factorial(k)  # type: ignore[return-value]


def test_exact_values_are_the_mean_over_all_orders() -> None:
    table, value = table_game(4, 3)
    found = exact_shapley(value, 4)  # type: ignore[arg-type]
    torch.testing.assert_close(found.values, by_all_orders(4, value))
    torch.testing.assert_close(found.values.sum(0), table[-1] - table[0])
    assert found.none.equal(table[0])
    assert found.everything.equal(table[-1])
    assert not found.errors.any()


def test_efficiency_dummy_and_symmetry_at_twelve_concepts() -> None:
    def value(masks: Tensor) -> Tensor:
        m = masks.double()
        return torch.tanh(m[:, 0] + m[:, 1] + 2 * m[:, 2]) * (1 + m[:, 4:].sum(1) ** 2)  # concept 3 is a dummy

    found = shapley(value, 12)
    assert found.values.sum().item() == pytest.approx((found.everything - found.none).item())
    assert found.values[3].item() == pytest.approx(0, abs=1e-12)
    assert found.values[0].item() == pytest.approx(found.values[1].item())
    assert found.values[4:].tolist() == pytest.approx([found.values[4].item()] * 8)
    assert found.values[2] > found.values[0]


def test_games_with_known_shares() -> None:
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    assert exact_shapley(lambda m: m @ weights + 4, 3).values.tolist() == pytest.approx(weights.tolist())
    glove = exact_shapley(lambda m: m[:, 0] * m[:, 1:].amax(1), 3)  # one left glove, two right ones
    assert glove.values.tolist() == pytest.approx([2 / 3, 1 / 6, 1 / 6])
    assert exact_shapley(lambda m: (m.sum(1) >= 3).double(), 5).values.tolist() == pytest.approx([0.2] * 5)
    assert exact_shapley(lambda m: 3 * m[:, 0], 1).values.tolist() == [3]


def test_pairs_of_orders_are_exact_for_pairwise_interactions() -> None:
    """In an order and its reverse, each concept joins before and after every other one: half of each interaction."""
    g = torch.Generator().manual_seed(0)
    single = torch.randn(15, generator=g, dtype=torch.float64)
    both = torch.randn(15, 15, generator=g, dtype=torch.float64).triu(1)

    def value(masks: Tensor) -> Tensor:
        m = masks.double()
        return m @ single + ((m @ both) * m).sum(1)

    found = shapley(value, 15, pairs=2)
    torch.testing.assert_close(found.values, single + (both + both.T).sum(1) / 2)
    assert found.errors.max() < 1e-12


def test_sampled_values_and_their_errors() -> None:
    table, value = table_game(6, 2)
    exact = exact_shapley(value, 6).values  # type: ignore[arg-type]
    runs = [sampled_shapley(value, 6, pairs=32, seed=seed) for seed in range(30)]  # type: ignore[arg-type]
    values, errors = torch.stack([r.values for r in runs]), torch.stack([r.errors for r in runs])
    for run in runs[:3]:
        torch.testing.assert_close(run.values.sum(0), table[-1] - table[0])
    assert ((values - exact) / errors).abs().max() < 5.5
    assert (errors.mean() / values.std(0).mean()).item() == pytest.approx(1, abs=0.12)
    assert runs[0].values.equal(sampled_shapley(value, 6, pairs=32, seed=0).values)  # type: ignore[arg-type]


def test_of_an_affine_tail_all_importances_are_the_contributions() -> None:
    g = torch.Generator().manual_seed(0)
    codes, weights = torch.rand(5, 8, 2, 2, generator=g), torch.randn(3, 8, generator=g)

    def tail(x: Tensor) -> Tensor:
        return x.mean((2, 3)) @ weights.T + 1

    classes = tail(codes).argmax(1)
    parts = contributions(lambda z: z, tail, codes, classes)
    value = class_value(tail, codes, classes)
    found = shapley(value, 8)
    torch.testing.assert_close(found.values.T, parts.values.double(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.none, parts.base.double())
    total, error = sobol_total(value, 8, points=64)
    expected = parts.values.double().square()
    expected = (expected / expected.sum(1, keepdim=True)).T
    assert ((total - expected).abs() / error.clamp_min(1e-3)).max() < 6
    assert (total - expected).abs().max() < 0.05


def test_conceptshap_shares_out_the_completeness() -> None:
    # Two classes. Concepts 0 and 1 each decide alone (redundant), concept 2 says nothing.
    labels = torch.tensor([0, 1] * 8)
    codes = torch.stack([labels, labels, torch.rand(16)], dim=1).float()

    def predict(z: Tensor) -> Tensor:
        return torch.stack([torch.full((len(z),), 0.5), z[:, 0] + z[:, 1]], dim=1)

    value = completeness_value([(predict, codes, predict(codes), labels)])
    found = shapley(value, 3)
    assert found.values.tolist() == pytest.approx([0.5, 0.5, 0])
    assert (found.none.item(), found.everything.item()) == (0, 1)


def test_mistakes_are_told_in_one_line() -> None:
    with pytest.raises(UserError, match=r"1 to 20 concepts \(2\^K subsets\), got 21"):
        exact_shapley(lambda m: m.sum(1), 21)
    with pytest.raises(UserError, match="at least 2 pairs of orders, got 1"):
        sampled_shapley(lambda m: m.sum(1), 30, pairs=1)

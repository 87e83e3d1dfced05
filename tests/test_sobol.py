"""Total Sobol indices against closed forms, and rank agreement against scipy."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from netgloss.errors import UserError
from netgloss.metrics.faithfulness.importance_agreement import importance_agreement, rank_correlation
from netgloss.metrics.faithfulness.sobol import sobol_total


def close(value: object, expected: list[float], **options: int) -> None:
    total, error = sobol_total(value, len(expected), **{"points": 256, **options})  # type: ignore[arg-type]
    truth = torch.tensor(expected, dtype=torch.float64)
    assert (total - truth).abs().max() < 0.02
    assert ((total - truth).abs() / error.clamp_min(1e-4)).max() < 8  # 4 scrambles: Student's t is wide


def test_linear() -> None:
    weights = torch.tensor([1.0, 2.0, -3.0, 0.0], dtype=torch.float64)
    close(lambda m: m @ weights + 7, (weights.square() / weights.square().sum()).tolist())


def test_product() -> None:
    # E m = 1/2, E m^2 = 1/3: variance 3^-K - 4^-K, and E Var(f | others) = 1/12 * 3^-(K - 1).
    close(lambda m: m.prod(1), [(1 / 12) * 3**-2 / (3**-3 - 4**-3)] * 3)


def test_ishigami() -> None:
    a, b = 7.0, 0.1

    def value(m: Tensor) -> Tensor:
        x = math.pi * (2 * m - 1)
        return torch.sin(x[:, 0]) + a * torch.sin(x[:, 1]) ** 2 + b * x[:, 2] ** 4 * torch.sin(x[:, 0])

    first = 0.5 * (1 + b * math.pi**4 / 5) ** 2
    both = b**2 * math.pi**8 * (1 / 18 - 1 / 50)
    second = a**2 / 8
    whole = first + both + second
    close(value, [(first + both) / whole, second / whole, both / whole], points=1024)


def test_values_may_have_a_shape_and_constants_have_no_index() -> None:
    total, error = sobol_total(lambda m: torch.stack([m[:, 0], m[:, 1], 0 * m[:, 0]], dim=1), 2)
    assert total.shape == error.shape == (2, 3)
    assert total[:, :2].tolist() == [pytest.approx([1, 0], abs=0.1), pytest.approx([0, 1], abs=0.1)]
    assert total[1, 0] == 0
    assert total[:, 2].isnan().all()


def test_errors_are_the_spread_over_repetitions() -> None:
    def value(m: Tensor) -> Tensor:
        return torch.sin(5 * m).sum(1) * m[:, 0]

    runs = [sobol_total(value, 4, points=16, seed=seed) for seed in range(40)]
    totals, errors = (torch.stack(each) for each in zip(*runs, strict=True))
    assert (errors.square().mean().sqrt() / totals.var(0).mean().sqrt()).item() == pytest.approx(1, abs=0.25)
    assert runs[0][0].equal(sobol_total(value, 4, points=16, seed=0)[0])


def test_rank_correlations_are_scipys() -> None:
    g = torch.Generator().manual_seed(0)
    a = torch.randint(0, 5, (6, 9), generator=g).double()  # with ties
    b = a + 2 * torch.randn(6, 9, generator=g)
    for kind, reference in (("spearman", stats.spearmanr), ("kendall", stats.kendalltau)):
        expected = [reference(x, y).statistic for x, y in zip(a.numpy(), b.numpy(), strict=True)]
        assert rank_correlation(a, b, kind=kind).tolist() == pytest.approx(expected)


def test_agreement_over_active_concepts_only() -> None:
    a = torch.tensor([[3.0, 2.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0, 0.0]])
    b = torch.tensor([[1.0, 2.0, 3.0, 0.0, 0.0], [1.0, 2.0, 3.0, 0.0, 0.0]])
    assert rank_correlation(a, b, active=a > 0).tolist() == pytest.approx([-1, math.nan], nan_ok=True)
    assert rank_correlation(a, b)[0] > 0  # the absent ones would make them agree
    found = importance_agreement({"a": a, "b": b, "c": 2 * b}, active=a > 0)
    assert found == pytest.approx({("a", "b"): -1, ("a", "c"): -1, ("b", "c"): 1})


def test_mistakes_are_told_in_one_line() -> None:
    with pytest.raises(UserError, match="points must be a power of two"):
        sobol_total(lambda m: m.sum(1), 2, points=24)
    with pytest.raises(UserError, match="scrambles must be at least 2"):
        sobol_total(lambda m: m.sum(1), 2, scrambles=1)
    with pytest.raises(UserError, match=r"two importances \(B, K\), got \(2, 3\) and \(3, 2\)"):
        rank_correlation(torch.ones(2, 3), torch.ones(3, 2))
    with pytest.raises(UserError, match="'spearman' or 'kendall', got 'pearson'"):
        rank_correlation(torch.ones(2, 3), torch.ones(2, 3), kind="pearson")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="NaN among their importances"):
        rank_correlation(torch.ones(2, 3) * math.nan, torch.ones(2, 3))

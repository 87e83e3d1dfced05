"""Faithfulness in a comparison: affine shortcuts equal the tail, sums over images, closed forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from netgloss.evaluation.faithful import (
    FAITHFULNESS,
    RANDOM_RANKING,
    ConceptShapSpread,
    ContributionStrength,
    FaithfulnessOptions,
    affine_predict,
    measure_faithfulness,
)
from netgloss.explainers.base import ExplainerConfig, LayerSpec
from netgloss.explainers.rows import LinearExplainer
from netgloss.metrics.faithfulness.completeness import completeness_value
from netgloss.metrics.faithfulness.masking import masked_logits, through
from netgloss.metrics.faithfulness.shapley import exact_shapley

K, C, L = 3, 4, 5


class Axes(LinearExplainer):
    """The first K features."""

    def encode_rows(self, rows: Tensor) -> Tensor:
        return rows[:, : self.num_concepts]


def explainer(grid: tuple[int, ...] = ()) -> Axes:
    found = Axes(ExplainerConfig(num_concepts=K), LayerSpec("layer", (C, *grid))).double()
    found.atoms[range(K), range(K)] = 1
    found.offset[K:] = 0.3
    return found


def head(activation: Tensor) -> Tensor:
    """Mean pool and a linear layer."""
    weight = torch.randn(C, L, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    pooled = activation.mean((2, 3)) if activation.ndim == 4 else activation
    return pooled @ weight + 0.1


def data(n: int = 12, grid: tuple[int, ...] = ()) -> Tensor:
    return torch.randn(n, C, *grid, generator=torch.Generator().manual_seed(6), dtype=torch.float64)


@pytest.mark.parametrize("grid", [(), (2, 3)])
def test_affine_predict_is_the_tail(grid: tuple[int, ...]) -> None:
    model, activation = explainer(grid), data(4, grid)
    concepts = model.encode(activation)
    concepts[1, 2] = 0  # an absent concept
    masks = torch.rand(7, K, dtype=torch.float64)
    masks[0], masks[1] = 0, 1
    logits = head(activation)
    slow = torch.cat(list(masked_logits(through(model, head, logits), concepts, masks)))
    fast = torch.cat(list(masked_logits(affine_predict(model, head, concepts), concepts, masks)))
    torch.testing.assert_close(fast, slow)


def measured(affine: bool, tail: Any = head, **options: Any) -> dict[str, Any]:
    activation = data()
    index = torch.arange(len(activation))
    batches = [(index[p], activation[p], tail(activation[p]), tail, True) for p in (slice(0, 5), slice(5, 12))]
    given = FaithfulnessOptions(**{"steps": 3, "sobol_points": 64, **options})
    return measure_faithfulness(explainer(), batches, options=given, affine=affine, replicates=50)


def test_shortcut_and_tail_give_the_same_scores() -> None:
    fast, slow = measured(True), measured(False)
    assert set(FAITHFULNESS) <= set(fast)
    for name, metric in fast.items():
        torch.testing.assert_close(metric.compute(), slow[name].compute(), msg=name)
        torch.testing.assert_close(metric.replicates(), slow[name].replicates(), msg=name, equal_nan=True)


def test_closed_forms_of_an_affine_tail() -> None:
    """Shapley values are the contributions, Sobol indices their squares; curves are those of the contributions."""
    found = {name: float(metric.compute()) for name, metric in measured(True).items()}
    assert found["surrogate_departure"] == pytest.approx(0, abs=1e-9)
    assert found["agreement_contribution_shapley"] == pytest.approx(1)
    assert found["agreement_contribution_sobol"] == pytest.approx(1)
    assert found["c_insertion_logit"] + found["c_deletion_logit"] == pytest.approx(1)
    assert found["c_gain_logit"] == pytest.approx(found["c_insertion_logit"] - found["c_deletion_logit"])
    assert RANDOM_RANKING + "c_deletion_logit" in found


def test_a_tail_that_is_not_affine_departs_from_the_surrogate() -> None:
    found = measured(False, lambda a: head(a.relu() ** 2))
    assert float(found["surrogate_departure"].compute()) > 0.05


def test_concept_shap_is_that_of_completeness_but_for_a_factor() -> None:
    """Shapley values of "the class stays", added over images, against ConceptSHAP of the completeness."""
    model, activation = explainer(), data(12)
    logits = head(activation)
    concepts, predict = model.encode(activation), through(model, head, logits)
    whole = exact_shapley(completeness_value([(predict, concepts, logits, logits.argmax(1))]), K).values
    metric = measured(True)["concept_shap_spread"]
    sums = metric.totals[0, 1:]
    torch.testing.assert_close(sums / sums.norm(), whole / whole.norm())
    spread = whole.abs().sum() ** 2 / whole.square().sum()
    assert float(metric.compute()) == pytest.approx(float(spread))
    assert 1 <= float(metric.compute()) <= K


def test_spread_of_equal_shares_is_their_number() -> None:
    metric = ConceptShapSpread(replicates=10)
    metric.update(torch.arange(2), shares=torch.tensor([[1.0, 0, 0.5], [0, 1, 0.5]]))
    assert metric.compute() == 3
    one = ConceptShapSpread(replicates=10)
    one.update(torch.arange(1), shares=torch.tensor([[0.0, 2.0, 0.0]]))
    assert one.compute() == 1


def test_images_without_an_order_are_left_out_of_agreement() -> None:
    metric = ContributionStrength(replicates=20)
    metric.update(torch.arange(4), number=torch.tensor([0.5, float("nan"), 1.0, float("nan")]))
    assert metric.compute() == 0.75
    assert metric.num_images == 2
    metric.update(torch.arange(4, 6), number=torch.full((2,), float("nan")))
    assert metric.compute() == 0.75

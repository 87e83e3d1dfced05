"""Sensitivity and removal behind a linear tail, where both are known."""

from __future__ import annotations

import pytest
import torch

from netgloss.errors import UserError
from netgloss.metrics.dissection.influence import influence_test, random_of_equal_length, removal, sensitivity

HEAD = torch.tensor([[1.0, -1.0], [0.0, 0.0], [0.5, 0.5]])  # feature 0 decides, 1 does nothing, 2 shifts both


def tail(activation: torch.Tensor) -> torch.Tensor:
    return (activation.mean((2, 3)) if activation.ndim == 4 else activation) @ HEAD


def test_sensitivity_of_a_linear_tail_is_the_sign_of_its_weight() -> None:
    activation = torch.randn(9, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    scores = sensitivity(tail, activation, torch.tensor([[1.0, 0, 0], [-2.0, 5, 0], [0, 1.0, 0]]), 2.0)
    assert scores.tolist() == [[1, -1], [-1, 1], [0, 0]]  # nothing moves: neither gained nor lost
    half = torch.tensor([[10.0, 0, 0], [-10.0, 0, 0]])

    def cubic(a: torch.Tensor) -> torch.Tensor:
        return torch.stack([a[:, 0].abs(), torch.zeros(len(a))], dim=1)

    assert sensitivity(cubic, half, torch.tensor([[1.0, 0, 0]]), 1.0).tolist() == [[0, 0]]  # one image up, one down


def test_influence_is_judged_against_random_directions() -> None:
    g = torch.Generator().manual_seed(1)
    null = torch.rand(999, 2, generator=g) - 0.5
    scores = torch.tensor([[0.9, 0.0], [0.1, -0.9]])
    p, significant = influence_test(scores, null)
    assert float(p[0, 0]) == float(p[1, 1]) == pytest.approx(1 / 1000)
    assert float(p[0, 1]) == 1
    assert significant.tolist() == [[True, False], [False, True]]
    with pytest.raises(UserError, match="needs random directions"):
        influence_test(scores, null[:0])


def test_removal_takes_a_concept_to_its_threshold() -> None:
    activation = torch.zeros(2, 3, 1, 2)
    activation[0, 0, 0, 0] = 4.0  # on in one place of one image
    concepts = activation[:, :1]
    directions = torch.tensor([[1.0, 0, 0]])
    found = removal(tail, activation, concepts, torch.tensor([1.0]), directions)
    before = torch.tensor([[2.0, -2.0], [0.0, 0.0]]).softmax(1)
    after = torch.tensor([[0.5, -0.5], [0.0, 0.0]]).softmax(1)  # 4 -> 1, half of the mean
    torch.testing.assert_close(found, (after - before).mean(0)[None])
    assert removal(tail, activation, concepts, torch.tensor([9.0]), directions).abs().max() == 0
    clipped = removal(tail, activation, concepts, torch.tensor([-8.0]), directions, clip=(0.0, None))
    gone = torch.tensor([[0.0, 0.0], [0.0, 0.0]]).softmax(1)
    torch.testing.assert_close(clipped, (gone - before).mean(0)[None])


def test_random_directions_are_as_long() -> None:
    directions = torch.randn(5, 7, generator=torch.Generator().manual_seed(2)) * 3
    random = random_of_equal_length(directions, seed=0)
    torch.testing.assert_close(random.norm(dim=1), directions.norm(dim=1))
    assert not torch.equal(random, random_of_equal_length(directions, seed=1))


def test_directions_must_fit() -> None:
    with pytest.raises(UserError, match=r"directions \(1, 4\) do not fit activations of 3 features"):
        sensitivity(tail, torch.zeros(1, 3), torch.zeros(1, 4), 1.0)

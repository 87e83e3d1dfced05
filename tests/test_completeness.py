"""Completeness: closed forms, variants, streamed equals whole, and the value of subsets."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from netgloss.errors import UserError
from netgloss.metrics.faithfulness.completeness import Completeness, completeness, completeness_value


def answers(*classes: int) -> Tensor:
    return F.one_hot(torch.tensor(classes), 4).float()


LABELS = torch.tensor([0, 0, 0, 1, 2, 1, -1])
ORIGINAL = answers(0, 0, 0, 1, 2, 0, 1)  # 5 of 6
REBUILT = answers(0, 0, 0, 1, 0, 0, 1)  # 4 of 6


def test_by_hand() -> None:
    # majority 3 / 6, uniform 2 / 6 (three of the four classes are among the labels)
    assert completeness(ORIGINAL, REBUILT, LABELS).item() == pytest.approx((4 - 3) / (5 - 3))
    assert completeness(ORIGINAL, REBUILT, LABELS, chance="uniform").item() == pytest.approx((4 - 2) / (5 - 2))
    assert completeness(ORIGINAL, ORIGINAL, LABELS) == 1
    assert completeness(ORIGINAL, answers(*[0] * 7), LABELS) == 0
    assert completeness(REBUILT, ORIGINAL, LABELS) == 2  # more right than the classifier


def test_own_predictions_for_labels_are_agreement_without_chance() -> None:
    # agreement 6 / 7; the most frequent prediction has 4 of 7
    assert completeness(ORIGINAL, REBUILT, ORIGINAL.argmax(1)).item() == pytest.approx((6 - 4) / (7 - 4))


def test_undefined_where_the_classifier_knows_no_more_than_chance() -> None:
    assert completeness(answers(*[0] * 7), REBUILT, LABELS).isnan()
    assert completeness(ORIGINAL, REBUILT, torch.full((7,), -1)).isnan()
    assert completeness(ORIGINAL[:3], REBUILT[:3], LABELS[:3]).isnan()  # one class: nothing to tell apart


@pytest.mark.parametrize("chance", ["majority", "uniform"])
def test_streamed_equals_whole(chance: str) -> None:
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(-1, 5, (60,), generator=g)
    logits = F.one_hot(labels.clamp_min(0), 5) + 0.6 * torch.randn(60, 5, generator=g)
    rebuilt = logits + 0.5 * torch.randn(60, 5, generator=g)
    metrics = []
    for batches in ([torch.arange(60)], torch.randperm(60, generator=g).split(7)):
        metric = Completeness(chance=chance)
        for index in batches:
            metric.update(index, logits=logits[index], logits_rebuilt=rebuilt[index], labels=labels[index])
        metrics.append(metric)
    whole, parts = metrics
    assert whole.compute() == completeness(logits, rebuilt, labels, chance=chance)
    torch.testing.assert_close(parts.compute(), whole.compute())
    torch.testing.assert_close(parts.replicates(), whole.replicates(), equal_nan=True)


def test_value_of_subsets() -> None:
    # Concept k alone says class k; without any the head says class 0.
    codes, labels = torch.eye(3)[[0, 1, 2, 1, 2, 0, 1]], torch.tensor([0, 1, 2, 1, 2, 0, -1])
    logits = codes.clone()

    def predict(z: Tensor) -> Tensor:
        return z + torch.tensor([0.1, 0, 0])

    halves = [(predict, codes[i], logits[i], labels[i]) for i in (slice(0, 3), slice(3, 7))]
    value = completeness_value(halves, rows_per_call=4)
    masks = torch.tensor([[1, 1, 1], [0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 1]])
    assert value(masks).tolist() == pytest.approx([1, 0, 0, 0.5, 1])
    expected = [completeness(logits, predict(codes * mask), labels).item() for mask in masks]
    assert value(masks).tolist() == pytest.approx(expected)


def test_mistakes_are_told_in_one_line() -> None:
    with pytest.raises(UserError, match="chance is 'majority' or 'uniform', got 'coin'"):
        Completeness(chance="coin")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"logits \(7, 4\) and rebuilt logits \(7, 2\)"):
        completeness(ORIGINAL, REBUILT[:, :2], LABELS)
    assert not math.isnan(completeness(ORIGINAL, REBUILT, LABELS))

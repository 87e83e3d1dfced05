"""The supervised basis: separable concepts, thresholds, projection, decomposition, bad input."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from netgloss.errors import UserError
from netgloss.explainers.base import LayerSpec
from netgloss.explainers.supervised_basis import (
    SupervisedBasis,
    SupervisedBasisConfig,
    best_f1_threshold,
    decompose,
)
from netgloss.training import fit


class Labelled:
    layer = "layer"

    def __init__(self, rows: Tensor, labels: Tensor, counted: Tensor | None = None) -> None:
        self.rows, self.labels = rows, labels
        self.counted = torch.ones_like(labels) if counted is None else counted
        self.num_rows, self.num_features = rows.shape

    def chunks(self) -> Iterator[Tensor]:
        yield self.rows

    def labelled(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.rows, self.labels, self.counted, torch.arange(len(self.rows)) // 10


def separable(concepts: int = 3) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(6000, 8, generator=g) * torch.tensor([1.0, 5, 0.2, 1, 1, 1, 1, 1]) + 3
    hat = (rows - rows.mean(0)) / rows.std(0)
    directions = torch.nn.functional.normalize(torch.randn(8, concepts, generator=g), dim=0)
    score = hat @ directions
    keep = (score - 1.0).abs().min(1).values > 0.1  # a margin
    return rows[keep], (score > 1.0)[keep]


def fitted(rows: Tensor, labels: Tensor, counted: Tensor | None = None, **fields: object) -> SupervisedBasis:
    names = tuple("abcdefgh"[: labels.shape[1]])
    config = SupervisedBasisConfig(labels=names, **fields)  # type: ignore[arg-type]
    explainer = SupervisedBasis(config, LayerSpec("layer", (rows.shape[1],)))
    return fit(explainer, Labelled(rows, labels, counted), seed=0)  # type: ignore[arg-type,return-value]


def f1(on: Tensor, truth: Tensor) -> Tensor:
    return 2 * (on & truth).sum(0) / (on.sum(0) + truth.sum(0))


def test_separable_concepts_are_found() -> None:
    rows, labels = separable()
    explainer = fitted(rows, labels)
    z = explainer.encode(rows)
    assert (f1(z > explainer.thresholds(), labels) > 0.99).all()
    assert (f1(z > explainer.f1_thresholds(), labels) >= f1(z > explainer.thresholds(), labels) - 1e-6).all()
    torch.testing.assert_close(explainer.directions.norm(dim=0), torch.ones(3))


def test_decode_of_encode_is_the_projection_onto_the_directions() -> None:
    rows, labels = separable()
    explainer = fitted(rows, labels)
    once = explainer.decode(explainer.encode(rows))
    torch.testing.assert_close(explainer.decode(explainer.encode(once)), once, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(explainer.encode(once), explainer.encode(rows), atol=1e-4, rtol=1e-4)
    left = ((rows - once) / explainer.scale) @ explainer.directions
    assert float(left.abs().max()) < 1e-3
    assert float((rows - once).norm()) > 1


def test_negatives_set_the_rate() -> None:
    rows, labels = separable()
    noisy = labels ^ (torch.rand(labels.shape, generator=torch.Generator().manual_seed(1)) < 0.1)
    rate = {
        n: float((e.encode(rows) > e.thresholds()).float().mean())
        for n in (1.0, 4.0)
        if (e := fitted(rows, noisy, negatives=n))
    }
    assert rate[1.0] > 1.5 * rate[4.0]


def test_rare_concepts_are_skipped_and_listed() -> None:
    rows, labels = separable()
    labels = labels.clone()
    labels[:, 1] = False
    labels[:20, 1] = True
    explainer = fitted(rows, labels)
    assert explainer.notes == ["skipped for fewer than 50 positive rows: b (20)"]
    assert not (explainer.encode(rows)[:, 1] > explainer.thresholds()[1]).any()
    with pytest.raises(UserError, match=r"no concept has 50 positive rows: a \(0\)"):
        fitted(rows, torch.zeros(len(rows), 1, dtype=torch.bool))


def test_rows_that_do_not_count_are_not_read() -> None:
    rows, labels = separable(1)
    wrong = labels.clone()
    half = torch.arange(len(rows)) % 2 == 0
    wrong[half] = ~labels[half]
    explainer = fitted(rows, wrong, ~half[:, None])
    assert float(f1(explainer.encode(rows) > explainer.thresholds(), labels)) > 0.98


def test_best_f1_threshold() -> None:
    scores = torch.tensor([0.9, 0.8, 0.5, 0.5, 0.1])
    labels = torch.tensor([True, True, False, True, False])
    assert float(best_f1_threshold(scores, labels)) == pytest.approx(0.3)  # 3 of 4 taken: F1 6/7; the top two give 4/5
    assert float(best_f1_threshold(scores, torch.tensor([True, False, False, False, False]))) == pytest.approx(0.85)


def test_greedy_decomposition() -> None:
    g = torch.Generator().manual_seed(2)
    directions = torch.nn.functional.normalize(torch.randn(6, 6, generator=g), dim=0)
    chosen, coefficients, shares = decompose(torch.randn(6, generator=g), directions, 6)
    assert sorted(chosen) == list(range(6))
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(shares))
    assert shares[-1] == pytest.approx(0, abs=1e-12)
    chosen, coefficients, shares = decompose(directions[:, 4] * 2.5, directions, 1)
    assert chosen == [4]
    assert coefficients.tolist() == pytest.approx([2.5])


def test_bad_input() -> None:
    with pytest.raises(UserError, match="needs annotated images"):
        SupervisedBasis(SupervisedBasisConfig(), LayerSpec("layer", (8,)))
    with pytest.raises(UserError, match="2 labels make as many concepts, got num_concepts = 5"):
        SupervisedBasisConfig(labels=("a", "b"), num_concepts=5)
    rows, labels = separable()
    explainer = SupervisedBasis(SupervisedBasisConfig(labels=("a",)), LayerSpec("layer", (8,)))
    with pytest.raises(UserError, match="rows of 3 labels do not fit the 1 named ones"):
        explainer.fit_rows(Labelled(rows, labels), seed=0)

    class Unlabelled:
        num_rows, num_features = 10, 8

    with pytest.raises(UserError, match="rows came without labels"):
        explainer.fit_rows(Unlabelled(), seed=0)  # type: ignore[arg-type]

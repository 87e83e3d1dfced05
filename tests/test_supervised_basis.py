"""The supervised basis: separable concepts, thresholds, projection, decomposition, bad input."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from netgloss.activations import Store
from netgloss.data import open_images
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


# -- the recipes of the papers ----------------------------------------------------------------------------------------


def test_squared_error_with_hard_negatives_finds_separable_concepts() -> None:
    rows, labels = separable()
    explainer = fitted(rows, labels, style="ibd")
    z = explainer.encode(rows)
    assert float(f1(z > explainer.f1_thresholds(), labels).min()) > 0.93
    on = z > explainer.thresholds()  # hard negatives only: a probe is on too seldom
    assert bool(((on & labels).sum(0) / on.sum(0) > 0.95).all())
    assert float(f1(on, labels).min()) > 0.7
    again = fitted(rows, labels, style="ibd")
    assert torch.equal(explainer.directions, again.directions)


def test_balanced_loss_finds_more_of_a_rare_concept() -> None:
    rows, labels = separable()
    rows = rows + 1.5 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(3)) * rows.std(0)
    plain, balanced = fitted(rows, labels), fitted(rows, labels, style="net2vec", raw=True)
    recalls = [((e.encode(rows) > e.thresholds()) & labels).sum(0) / labels.sum(0) for e in (plain, balanced)]
    assert bool((recalls[1] > recalls[0] + 0.1).all())


def test_binarised_features_tell_what_is_in_their_upper_tail() -> None:
    g = torch.Generator().manual_seed(1)
    rows = torch.randn(40_000, 4, generator=g)
    labels = torch.zeros(40_000, 2, dtype=torch.bool)
    labels[:200, 0] = True
    rows[:200, 1] = 5.0 + torch.rand(200, generator=g)
    labels[200:400, 1] = True
    rows[200:400, 3] = 5.0 + torch.rand(200, generator=g)
    explainer = fitted(rows, labels, style="net2vec")
    assert ((rows > explainer.levels).float().mean(0) - 0.005).abs().max() < 1e-4
    assert float(f1(explainer.encode(rows) > explainer.thresholds(), labels).min()) > 0.99
    assert explainer.directions.argmax(0).tolist() == [1, 3]
    z = explainer.encode(rows)
    assert z.unique(dim=0).shape[0] <= 2**4  # only which features are on
    left = (rows - explainer.decode(z)).square().sum()
    assert float(left) < float((rows - rows.mean(0)).square().sum())
    torch.testing.assert_close((rows - explainer.decode(z)).mean(0), torch.zeros(4), atol=1e-3, rtol=0)


def test_style_must_be_known() -> None:
    with pytest.raises(UserError, match="style must be one of logistic, ibd, net2vec, got 'svm'"):
        SupervisedBasisConfig(style="svm")  # type: ignore[arg-type]


# -- from the command line --------------------------------------------------------------------------------------------


def test_a_run_learns_from_annotations(tmp_path: Path) -> None:
    from netgloss.classifiers import load_classifier
    from netgloss.workflows.explain import explain
    from netgloss.workflows.fit import fit as fit_run

    source = open_images("critters:40")
    fields = {"annotations": "own", "min_positives": 20}
    run = explain(
        "supervised-basis", load_classifier("critters"), "block5", source, out=tmp_path / "run", seeds=1, **fields
    )
    assert (
        run.explainer.name_concepts()
        == run.manifest["config"]["labels"]
        == list(source.annotation(0).mask_labels.values())
    )
    assert int(run.explainer.directions.any(0).sum()) > 3
    again = {"config": SupervisedBasisConfig(**fields), "seeds": 1}
    store = Store.open(run.manifest["store"])
    with pytest.raises(UserError, match=r"annotations belong to images: give those of .* again by --images"):
        fit_run("supervised-basis", store, "block5", tmp_path / "two", **again)
    with pytest.raises(UserError, match="are not the images whose activations"):
        fit_run("supervised-basis", store, "block5", tmp_path / "two", source=open_images("critters:20"), **again)

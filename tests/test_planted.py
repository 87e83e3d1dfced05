"""Planted truth: the generator against its closed forms, the matching by hand, and all built-in methods on it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from netgloss.errors import UserError
from netgloss.explainers.base import Batch, LayerSpec
from netgloss.explainers.names import find_explainer
from netgloss.training import build_explainer, fit
from planted import Planted, PlantedConfig, plant
from recovery import Recovery, best_support_f1, match_concepts, recovery, support_f1

# -- the generator ----------------------------------------------------------------------------------------------------


def share(bools: Tensor) -> Tensor:
    return bools.double().mean(0)


def within_chance(found: Tensor, expected: Tensor, n: int) -> bool:
    error = (expected * (1 - expected) / n).sqrt()
    return bool(((found - expected).abs() <= 4.5 * error + 1e-12).all())


def test_rows_are_codes_times_directions() -> None:
    for nonnegative in (True, False):
        planted = plant(PlantedConfig(num_rows=50, nonnegative=nonnegative))
        torch.testing.assert_close(planted.rows, planted.codes @ planted.dictionary)
        torch.testing.assert_close(planted.dictionary.norm(dim=1), torch.ones(24))
        assert bool((planted.dictionary >= 0).all()) == nonnegative
    strong = planted.codes[planted.codes > 0]
    assert 0.5 <= strong.min() < 0.6
    assert 1.4 < strong.max() <= 1.5


def test_parts_use_a_quarter_of_the_features() -> None:
    assert ((plant(PlantedConfig()).dictionary > 0).sum(1) == 16).all()
    assert ((plant(PlantedConfig(num_features=2)).dictionary > 0).sum(1) == 1).all()


@pytest.mark.parametrize("correlation", [0.0, 0.7])
@pytest.mark.parametrize("long_tail", [0.0, 1.0])
@pytest.mark.parametrize("children", [0, 2])
def test_frequencies_are_what_was_asked(correlation: float, long_tail: float, children: int) -> None:
    config = PlantedConfig(
        num_rows=20_000, num_features=8, active=2.0, correlation=correlation, long_tail=long_tail, children=children
    )
    planted = plant(config)
    assert planted.frequency.sum().item() == pytest.approx(2)
    assert within_chance(share(planted.codes > 0), planted.frequency, 20_000)
    falling = planted.frequency[planted.parent < 0].sort(descending=True).values
    expected = [falling[0].item() / (1 + rank) ** long_tail for rank in range(len(falling))]
    assert falling.tolist() == pytest.approx(expected)


def test_correlation_is_that_of_the_copula() -> None:
    """P(both) of two normals below their medians is 1/4 + asin(correlation) / 2 pi; other groups are independent."""
    n, correlation = 40_000, 0.6
    config = PlantedConfig(
        num_rows=n, num_concepts=8, num_features=4, active=4.0, correlation=correlation, group_size=2
    )
    planted = plant(config)
    present = (planted.codes > 0).double()
    both = present.T @ present / n
    same = (planted.group[:, None] == planted.group) & ~torch.eye(8, dtype=torch.bool)
    other = planted.group[:, None] != planted.group
    assert same.sum() == 8
    expected = 0.25 + math.asin(correlation) / (2 * math.pi)
    assert (both[same] - expected).abs().max() < 4.5 * math.sqrt(expected * (1 - expected) / n)
    assert (both[other] - 0.25).abs().max() < 4.5 * math.sqrt(3 / 16 / n)


def test_children_come_with_their_parent_half_of_the_time() -> None:
    planted = plant(PlantedConfig(num_rows=20_000, num_features=8, children=3, num_concepts=12, active=2.0))
    present = planted.codes > 0
    is_child = planted.parent >= 0
    assert is_child.sum() == 9
    assert planted.parent[is_child].bincount(minlength=12).sort().values.tolist() == [0] * 9 + [3] * 3
    for child in is_child.nonzero()[:, 0]:
        parent = planted.parent[child]
        assert planted.group[child] == planted.group[parent]
        assert not (present[:, child] & ~present[:, parent]).any()
        count = int(present[:, parent].sum())
        assert within_chance(share(present[present[:, parent]][:, [child]]), torch.tensor([0.5]), count)


def test_noise_is_a_share_of_the_signal() -> None:
    config = PlantedConfig(nonnegative=False, noise=0.5)
    planted = plant(config)
    signal = planted.codes @ planted.dictionary
    ratio = (planted.rows - signal).square().mean().sqrt() / signal.square().mean().sqrt()
    assert ratio.item() == pytest.approx(0.5, rel=0.01)
    assert plant(replace(config, nonnegative=True)).rows.min() == 0


def test_seeds() -> None:
    config = PlantedConfig(num_rows=200)
    first, again, held, other = (
        plant(config),
        plant(config),
        plant(config, rows_seed=1),
        plant(PlantedConfig(num_rows=200, seed=1)),
    )
    for name in vars(first):
        assert getattr(first, name).equal(getattr(again, name))
    assert held.dictionary.equal(first.dictionary)
    assert held.parent.equal(first.parent)
    assert not held.codes.equal(first.codes)
    assert not other.dictionary.equal(first.dictionary)
    tail = plant(replace(config, long_tail=1.0)).frequency
    assert not tail.equal(tail.sort(descending=True).values)  # position says nothing


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_rows": 0}, "num_rows must be at least 1, got 0"),
        ({"noise": -1.0}, "noise must not be negative"),
        ({"correlation": 1.0}, "correlation must be at least 0 and below 1, got 1.0"),
        ({"children": 4}, r"num_concepts = 24 is no whole number of families of 1 \+ 4 concepts"),
        ({"active": 24.0}, "active must be between 0 and num_concepts = 24, got 24.0"),
        ({"active": 5.0, "long_tail": 1.0}, "would put a concept into 132% of the rows"),
    ],
)
def test_impossible_options_are_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PlantedConfig(**options)


# -- recovery ---------------------------------------------------------------------------------------------------------


def numbers(found: Recovery) -> list[float]:
    return list(found.means().values())


@pytest.fixture
def planted() -> Planted:
    return plant(PlantedConfig(num_rows=300, num_features=20, num_concepts=6, active=2.0, nonnegative=False))


def test_the_truth_in_another_order_and_scale_is_perfect(planted: Planted) -> None:
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    scale = torch.arange(1.0, 7)
    truth = {"planted_dictionary": planted.dictionary}
    codes, atoms = (planted.codes / scale)[:, order], (planted.dictionary * scale[:, None])[order]
    found = recovery(planted.codes, codes, found_dictionary=atoms, **truth)
    assert found.partner.tolist() == order.argsort().tolist()
    assert numbers(found) == pytest.approx([1, 1, 1, 1])
    flipped = recovery(planted.codes, -codes, found_dictionary=-atoms, signed=False, **truth)
    assert numbers(flipped) == pytest.approx([1, 1, 1, 1])
    assert recovery(planted.codes, -codes, found_dictionary=-atoms, **truth).cosine.max() < 0.9
    unnamed = recovery(planted.codes, codes)
    assert unnamed.partner.tolist() == order.argsort().tolist()
    assert unnamed.cosine.isnan().all()
    assert unnamed.correlation.tolist() == pytest.approx([1] * 6)


def test_concepts_that_were_not_found_count_zero(planted: Planted) -> None:
    found = recovery(
        planted.codes,
        planted.codes[:, :4],
        planted_dictionary=planted.dictionary,
        found_dictionary=planted.dictionary[:4],
    )
    assert found.partner.tolist() == [0, 1, 2, 3, -1, -1]
    assert numbers(found) == pytest.approx([4 / 6] * 4)


def test_support_by_hand() -> None:
    present = torch.tensor([[1, 1, 0, 0, 1, 0], [1, 0, 0, 0, 0, 0]]).T.bool()
    assert support_f1(present, torch.ones(6, 2, dtype=torch.bool)).tolist() == pytest.approx([2 / 3, 2 / 7])
    assert support_f1(present, present).tolist() == [1, 1]
    assert support_f1(present & False, present & False).tolist() == [0, 0]
    # column 0: sorted 9+ 8- 7+ 7+ (a tie that no threshold splits) 1-; column 1: constant
    codes = torch.tensor([[9.0, 7, 8, 1, 7, 7], [2.0] * 6]).T
    assert best_support_f1(present, codes).tolist() == pytest.approx([6 / 8, 2 / 7])


def test_best_support_is_the_best_of_all_thresholds() -> None:
    g = torch.Generator().manual_seed(0)
    present = torch.rand(80, 5, generator=g) < 0.3
    codes = (present + torch.randn(80, 5, generator=g)).mul(4).round()  # with ties
    each = torch.stack([support_f1(present, codes > t) for t in torch.arange(-20.5, 21)])
    assert best_support_f1(present, codes).equal(each.amax(0))


def test_matching_is_the_best_in_total() -> None:
    similarity = torch.tensor([[0.9, 0.8], [0.8, 0.1]])  # greedy would take 0.9 + 0.1
    assert match_concepts(similarity).tolist() == [1, 0]
    assert match_concepts(-similarity).tolist() == [0, 1]
    assert match_concepts(-similarity, signed=False).tolist() == [1, 0]
    with pytest.raises(UserError, match=r"similarities \(2, 2\) hold NaN or Inf"):
        match_concepts(similarity * math.nan)
    with pytest.raises(UserError, match=r"codes \(N, K\) and \(N, M\) of the same rows, got \(5, 2\) and \(4, 2\)"):
        recovery(torch.ones(5, 2), torch.ones(4, 2))


# -- every built-in method --------------------------------------------------------------------------------------------


class ArrayStream:
    """Rows held in memory, as the fit loop asks for them."""

    layer = "planted"

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self.num_rows, self.num_features = rows.shape

    def chunks(self) -> Iterator[Tensor]:
        return iter(self.rows.split(1000))

    def sample(self, max_rows: int, *, seed: int) -> Tensor:
        assert max_rows >= len(self.rows)
        return self.rows

    def batches(self, batch_size: int, *, seed: int, start: int = 0, **_: Any) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        for step in range(start, 1_000_000):
            picks = torch.randint(len(self.rows), (batch_size,), generator=generator)
            yield Batch(self.rows[picks], picks, step=step)


SHORT = {"topk-sae": {"top_k": 4, "steps": 400, "batch_size": 512, "lr": 4e-3}}


def recovered(config: PlantedConfig, *methods: str) -> dict[str, dict[str, float]]:
    """Mean recovery on rows that were held out."""
    planted, held = plant(config), plant(config, rows_seed=config.seed + 1000)
    found = {}
    for method in methods:
        cls = find_explainer(method)
        spec = LayerSpec("planted", (config.num_features,), nonnegative=config.nonnegative)
        options = cls.Config(num_concepts=config.num_concepts, **SHORT.get(method, {}))
        explainer = fit(build_explainer(cls, options, spec, seed=0), ArrayStream(planted.rows), seed=0)  # type: ignore[arg-type]
        with torch.no_grad():
            codes = explainer.encode(held.rows)
        found[method] = recovery(
            held.codes,
            codes,
            planted_dictionary=held.dictionary,
            found_dictionary=explainer.dictionary,
            signed=method in ("nmf", "kmeans", "topk-sae"),
        ).means()
    return found


SIGNED = PlantedConfig(num_rows=3000, num_features=32, num_concepts=16, active=2.0, nonnegative=False)


def test_independent_parts() -> None:
    """Sums of independent non-negative parts: what ICA and NMF assume. Equal variances leave PCA without any handle."""
    found = recovered(replace(SIGNED, nonnegative=True), "ica", "nmf", "kmeans", "pca", "random-directions")
    for method in ("ica", "nmf"):
        assert found[method]["cosine"] > 0.99
        assert found[method]["correlation"] > 0.98
        assert found[method]["best_f1"] > 0.98
    assert found["kmeans"]["cosine"] > 0.75
    assert found["kmeans"]["correlation"] < 0.75  # one cluster a row cannot hold two concepts
    assert found["pca"]["cosine"] < 0.6
    assert abs(found["pca"]["correlation"] - found["random-directions"]["correlation"]) < 0.15


def test_correlated_concepts_break_ica_and_not_the_sparse_autoencoder() -> None:
    found = recovered(replace(SIGNED, correlation=0.8), "topk-sae", "ica", "kmeans", "pca")
    order = [found[method]["cosine"] for method in ("topk-sae", "ica", "pca")]
    assert order == sorted(order, reverse=True)
    assert order[0] > 0.93
    assert order[0] - order[1] > 0.1
    assert order[1] - order[2] > 0.1
    assert found["topk-sae"]["correlation"] > found["kmeans"]["correlation"] + 0.2


def test_more_concepts_than_features_need_sparse_methods() -> None:
    over = replace(SIGNED, num_concepts=48)
    found = recovered(over, "topk-sae", "kmeans")
    assert found["topk-sae"]["cosine"] > 0.95
    assert found["topk-sae"]["correlation"] > found["kmeans"]["correlation"] + 0.15
    with pytest.raises(UserError, match="at most one concept a feature"):
        recovered(over, "ica")


def test_one_concept_a_row_is_what_clusters_are() -> None:
    """Rows with exactly one concept are rays."""
    config = replace(SIGNED, num_rows=12_000, active=0.5)
    planted, held = plant(config), plant(config, rows_seed=7)
    alone, held_alone = ((p.codes > 0).sum(1) == 1 for p in (planted, held))
    cls = find_explainer("kmeans")
    explainer = build_explainer(cls, cls.Config(num_concepts=16), LayerSpec("planted", (32,)), seed=0)
    explainer.fit_rows(ArrayStream(planted.rows[alone]), seed=0)
    codes = explainer.encode(held.rows[held_alone])
    found = recovery(
        held.codes[held_alone],
        codes,
        planted_dictionary=held.dictionary,
        found_dictionary=explainer.dictionary,
    )
    assert found.cosine.mean() > 0.99
    assert found.f1.mean() > 0.99


def test_axes_are_found_only_where_concepts_are_features() -> None:
    found = recovered(replace(SIGNED, num_features=16), "natural-axes", "ica")
    assert found["natural-axes"]["cosine"] < 0.75
    assert found["ica"]["cosine"] > found["natural-axes"]["cosine"] + 0.1

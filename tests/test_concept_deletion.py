"""C-deletion and C-insertion: areas worked by hand, identities, controls, and streamed equals whole."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from netgloss.errors import UserError
from netgloss.explainers.base import Explainer, ExplainerConfig, LayerSpec
from netgloss.metrics.faithfulness.concept_deletion import (
    ConceptDeletion,
    random_importance,
    ranked_curve,
    ranked_masks,
)
from netgloss.metrics.faithfulness.importance import contributions
from netgloss.metrics.faithfulness.masking import Value, class_value, linear_value, masked_logits, through


class Itself(Explainer):
    """Concepts are the features."""

    def encode_rows(self, rows: Tensor) -> Tensor:
        return rows

    def decode_rows(self, codes: Tensor) -> Tensor:
        return codes


def itself(k: int) -> Itself:
    return Itself(ExplainerConfig(num_concepts=k), LayerSpec("layer", (k,)))


def affine(weights: Tensor, bias: Tensor) -> Callable[[Tensor], Tensor]:
    """Mean over positions, then a linear head; ``weights`` (L, K)."""
    return lambda x: (x.flatten(2).mean(2) if x.ndim == 4 else x) @ weights.T + bias


def bent(weights: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.tanh(x.flatten(2).mean(2) if x.ndim == 4 else x).square() @ weights.T


def measured(
    codes: Tensor, tail: Callable[[Tensor], Tensor], *, classes: Tensor | None = None, **options: object
) -> ConceptDeletion:
    found = ConceptDeletion(**options)  # type: ignore[arg-type]
    found.update(torch.arange(len(codes)), itself(codes.shape[1]), tail, codes, tail(codes), classes)
    return found


def random_case(*, maps: bool = True, images: int = 13, k: int = 7, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    codes = torch.randn(images, k, *((3, 2) if maps else ()), generator=g).relu()
    codes[0, 2] = 0
    codes[1] = 0
    return codes, torch.randn(4, k, generator=g)


BY_HAND = torch.tensor([[3.0, 1.0, 2.0]]), affine(torch.tensor([[1.0, 1, 1], [0, 0, 0]]), torch.tensor([1.0, 0]))


def test_areas_by_hand() -> None:
    # Contributions 3, 1, 2 on a base of 1. Deletion 7 4 2 1, insertion 1 4 6 7, at shares 0, 1/3, 2/3, 1.
    codes, tail = BY_HAND
    value = class_value(tail, codes, torch.tensor([0]))
    deletion, insertion = (ranked_curve(value, codes, codes, mode=mode) for mode in ("deletion", "insertion"))
    assert deletion.value.tolist() == [[7, 4, 2, 1]]
    assert insertion.value.tolist() == [[1, 4, 6, 7]]
    assert deletion.share.tolist() == [pytest.approx([0, 1 / 3, 2 / 3, 1])]
    assert (deletion.area.item(), insertion.area.item()) == pytest.approx((10 / 3, 14 / 3))
    found = measured(codes, tail)
    areas = [found.value(name, "contribution") for name in ("c_deletion", "c_insertion", "c_gain")]
    assert areas == pytest.approx([7 / 18, 11 / 18, 4 / 18])
    assert found.value("surrogate_departure", "contribution") == pytest.approx(0, abs=1e-6)


def test_absent_concepts_are_not_counted() -> None:
    codes, tail = BY_HAND
    wide = torch.cat([codes, torch.zeros(1, 5)], dim=1)
    weights = torch.cat([torch.ones(3), torch.full((5,), 100.0)])
    wide_tail = affine(torch.stack([weights, 0 * weights]), torch.tensor([1.0, 0]))
    for name in ("c_deletion", "c_insertion", "c_gain"):
        assert measured(wide, wide_tail).value(name, "contribution") == pytest.approx(
            measured(codes, tail).value(name, "contribution")
        )
    # even a ranking that puts them first meets the active ones only
    importance = torch.tensor([[3.0, 1, 2, 9, 9, 9, 9, 9]])
    curve = ranked_curve(class_value(wide_tail, wide, torch.tensor([0])), wide, importance, mode="deletion")
    assert curve.value.tolist() == [[7, 4, 2, 1]]


def test_an_image_without_any_concept_has_a_flat_curve() -> None:
    codes, tail = torch.zeros(1, 3), BY_HAND[1]
    curve = ranked_curve(class_value(tail, codes, torch.tensor([0])), codes, codes, mode="deletion")
    assert curve.area.item() == pytest.approx(1)
    assert math.isnan(measured(codes, tail).value("c_deletion", "contribution"))


def test_concepts_that_lower_the_score_have_no_normalised_area() -> None:
    codes = torch.tensor([[3.0, 1.0, 2.0]])
    assert math.isnan(measured(codes, affine(-torch.ones(1, 3), torch.zeros(1))).value("c_deletion", "contribution"))


def test_groups_share_out_the_concepts_evenly() -> None:
    codes = torch.ones(1, 50)
    masks, share = ranked_masks(codes, torch.arange(50.0)[None], mode="deletion", num_steps=10)
    assert masks.sum(2)[:, 0].tolist() == [50, 45, 40, 35, 30, 25, 20, 15, 10, 5, 0]
    assert share[0].tolist() == pytest.approx([i / 10 for i in range(11)])
    assert not masks[1, 0, 45:].any()
    assert masks[1, 0, :45].all()


def test_a_concept_goes_at_all_its_positions() -> None:
    codes = torch.ones(1, 2, 2, 2)
    seen = []
    for _ in masked_logits(lambda x: seen.append(x) or x.flatten(1), codes, torch.tensor([[0, 1]])):
        pass
    assert seen[0][0, 0].eq(0).all()
    assert seen[0][0, 1].eq(1).all()


@pytest.mark.parametrize("maps", [False, True])
def test_reversed_deletion_is_insertion_mirrored(maps: bool) -> None:
    codes, weights = random_case(maps=maps)
    codes, tail = codes + 0.1, bent(weights)  # all are active
    importance = torch.randn(codes.shape[:2], generator=torch.Generator().manual_seed(1))
    value = class_value(tail, codes, tail(codes).argmax(1))
    away = ranked_curve(value, codes, -importance, mode="deletion")
    back = ranked_curve(value, codes, importance, mode="insertion")
    torch.testing.assert_close(away.value, back.value.flip(1))
    torch.testing.assert_close(away.area, back.area)
    assert (away.area - ranked_curve(value, codes, importance, mode="deletion").area).abs().max() > 0.1


def test_of_an_affine_tail_every_curve_is_that_of_the_contributions() -> None:
    codes, weights = random_case()
    tail = affine(weights, torch.arange(4.0))
    classes = tail(codes).argmax(1)
    parts = contributions(itself(7).decode, tail, codes, classes)
    importance = torch.randn(codes.shape[:2], generator=torch.Generator().manual_seed(1))
    for mode in ("deletion", "insertion"):
        measured_curve = ranked_curve(class_value(tail, codes, classes), codes, importance, mode=mode)
        closed_form = ranked_curve(linear_value(parts), codes, importance, mode=mode)
        torch.testing.assert_close(measured_curve.value, closed_form.value, rtol=1e-5, atol=1e-5)
    found = measured(codes, tail)
    for ranking in ("contribution", "strength"):
        assert found.value("surrogate_departure", ranking) < 1e-5
        total = found.value("c_deletion", ranking) + found.value("c_insertion", ranking)
        assert total == pytest.approx(1, abs=1e-5)


def test_of_an_affine_tail_contributions_are_the_best_ranking_and_random_ones_have_half() -> None:
    values = torch.tensor([[2.0, -1.0, 0.5, 3.0]])
    tail = affine(torch.ones(1, 4), torch.zeros(1))
    value = class_value(tail, values, torch.tensor([0]))
    orders = torch.tensor(list(itertools.permutations(range(4)))).double()
    areas = torch.cat([ranked_curve(value, values, order[None], mode="deletion").area for order in orders])
    assert areas.mean().item() == pytest.approx(values.sum().item() / 2)
    best = ranked_curve(value, values, values, mode="deletion").area.item()
    assert best == pytest.approx(areas.min().item())
    codes = values.expand(300, 4)
    higher = affine(torch.ones(1, 4), torch.full((1,), 5.0))
    assert measured(codes, higher, draws=4).value("c_deletion", "random") == pytest.approx(0.5, abs=0.06)


def test_departure_of_a_product_by_hand() -> None:
    # z1 z2 at (1, 1): contributions 1 and 1, so the surrogate says 2 1 0 where the tail says 1 0 0.
    codes = torch.ones(1, 2)
    found = measured(codes, lambda x: x.prod(1, keepdim=True))
    assert found.value("surrogate_departure", "contribution") == pytest.approx(0.75)
    assert found.value("c_deletion", "contribution") == pytest.approx(0.25)


def test_streamed_equals_whole_in_any_order() -> None:
    codes, weights = random_case(images=20)
    tail = bent(weights)
    whole = measured(codes, tail)
    parts = ConceptDeletion()
    for index in torch.randperm(20, generator=torch.Generator().manual_seed(3)).split(6):
        parts.update(index, itself(7), tail, codes[index], tail(codes[index]))
    assert set(parts.areas) == set(whole.areas)
    for key, metric in whole.areas.items():
        torch.testing.assert_close(parts.areas[key].compute(), metric.compute(), rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(
            parts.areas[key].replicates(), metric.replicates(), rtol=1e-5, atol=1e-7, equal_nan=True
        )


@pytest.mark.parametrize("rows", [1, 13, 30, 10_000])
def test_the_size_of_calls_changes_nothing(rows: int) -> None:
    codes, weights = random_case()
    sizes = []

    def tail(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return bent(weights)(x)

    masks, _ = ranked_masks(codes, codes.flatten(2).sum(2), mode="deletion")
    value = class_value(tail, codes, torch.zeros(13, dtype=torch.long), rows_per_call=rows)
    expected = class_value(bent(weights), codes, torch.zeros(13, dtype=torch.long))(masks)
    torch.testing.assert_close(value(masks), expected)
    assert max(sizes) == max(13, min(rows // 13, len(masks)) * 13)


def test_all_classes_of_an_image_count_alike() -> None:
    codes, weights = random_case()
    tail = bent(weights.abs())
    classes = torch.tensor([[0, 3]]).expand(13, 2)
    both = measured(codes, tail, classes=classes)
    single = [measured(codes, tail, classes=classes[:, j]) for j in (0, 1)]
    for key, metric in both.areas.items():
        sums = sum(one.areas[key].totals[0, 1:] for one in single)
        torch.testing.assert_close(metric.compute(), sums[0] / sums[1])  # type: ignore[index]


def test_an_explainer_that_rebuilds_class_scores_itself_needs_no_tail() -> None:
    class Own(Itself):
        def rebuilt_logits(self, concepts: Tensor, logits: Tensor) -> Tensor:
            return torch.stack([concepts.sum(1), logits[:, 1]], dim=1)

        def contributions(self, concepts: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
            return concepts, torch.zeros(len(concepts))

    def tail(x: Tensor) -> Tensor:
        raise AssertionError("asked for")

    codes = torch.tensor([[3.0, 1.0, 2.0], [1.0, 1.0, 1.0]])
    logits = torch.tensor([[8.0, 5.0], [3.0, 9.0]])
    explainer = Own(ExplainerConfig(num_concepts=3), LayerSpec("layer", (3,)))
    found = ConceptDeletion()
    found.update(torch.arange(2), explainer, tail, codes, logits, torch.tensor([0, 0]))
    # deletion: 6 3 1 0 and 3 2 1 0, areas 7/3 and 3/2, spans 6 and 3; the classifier's own logits are 8 and 3
    assert found.value("c_deletion", "contribution") == pytest.approx((7 / 3 + 3 / 2) / 9)
    assert found.value("c_carried", "contribution") == pytest.approx(9 / 11)
    predict = through(explainer, tail, logits)
    assert next(masked_logits(predict, codes, torch.ones(2, 3)))[1, :, 1].tolist() == [5, 9]


def test_random_rankings_depend_on_the_image_and_the_seed_only() -> None:
    index = torch.tensor([5, 9])
    a, b = random_importance(index, 6, seed=0), random_importance(index.flip(0), 6, seed=0)
    assert a.equal(b.flip(0))
    assert not a.equal(random_importance(index, 6, seed=1))


def test_mistakes_are_told_in_one_line() -> None:
    codes, tail = BY_HAND
    value: Value = class_value(tail, codes, torch.tensor([0]))
    with pytest.raises(UserError, match=r"expected one importance a concept, \(1, 3\), got shape \(1, 2\)"):
        ranked_curve(value, codes, codes[:, :2], mode="deletion")
    with pytest.raises(UserError, match="NaN among their importances"):
        ranked_curve(value, codes, codes * math.nan, mode="deletion")
    with pytest.raises(UserError, match="num_steps must be at least 1, got 0"):
        ranked_curve(value, codes, codes, mode="deletion", num_steps=0)
    with pytest.raises(UserError, match=r"masks \(4, 1, 2\) do not fit concepts \(1, 3\)"):
        value(torch.ones(4, 2))
    with pytest.raises(UserError, match="got of = 'logits'"):
        class_value(tail, codes, torch.tensor([0]), of="logits")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="draws must be at least 1"):
        ConceptDeletion(draws=0)
    with pytest.raises(
        UserError, match=r"no 'c_deletion' by 'luck' was measured; there are c_carried, c_deletion, .* by co"
    ):
        measured(codes, tail).value("c_deletion", "luck")
    with pytest.raises(UserError, match="there are nothing"):
        ConceptDeletion().value("c_deletion", "contribution")


def test_a_tail_that_is_bound_to_its_images_is_asked_for_all_of_them_at_once() -> None:
    codes, weights = random_case()
    offset = torch.arange(13.0)[:, None]
    found = measured(codes, lambda x: bent(weights)(x) + offset, rows_per_call=13)
    expected = measured(codes, bent(weights))
    assert found.value("c_gain", "contribution") == pytest.approx(expected.value("c_gain", "contribution"), rel=1e-5)

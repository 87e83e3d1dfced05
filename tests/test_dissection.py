"""Dissection: IoU by hand, scores in closed form, rate matching, the permutation test."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from netgloss.data.masks import Masks, Vocabulary
from netgloss.errors import UserError
from netgloss.metrics.dissection import overlaps as dissection_overlaps
from netgloss.metrics.dissection.detectors import Detectors, Dissection, sum_of_best
from netgloss.metrics.dissection.joint import joint_behaviour
from netgloss.metrics.dissection.overlaps import overlaps, upsample
from netgloss.metrics.dissection.rates import extent, on_rates, rate_thresholds, shared_thresholds
from netgloss.metrics.dissection.significance import PermutationTest, blocks_of, permutation_test

GRID = (4, 4)


def random_case(
    seed: int, *, images: int = 7, concepts: int = 5, labels: int = 3
) -> tuple[Tensor, Masks, Vocabulary, Tensor]:
    g = torch.Generator().manual_seed(seed)
    maps = torch.randn(images, concepts, 2, 2, generator=g)
    masks = Masks(
        torch.rand(images, labels, *GRID, generator=g) < 0.3,
        torch.rand(images, 2, generator=g) < 0.7,
        torch.rand(images, *GRID, generator=g) < 0.1,
    )
    vocabulary = Vocabulary(tuple("abc"[:labels]), ("one", "two"), (0, 1, 0)[:labels])
    return maps, masks, vocabulary, torch.full((1, concepts), 0.2)


def naive_iou(maps: Tensor, masks: Masks, vocabulary: Vocabulary, threshold: float) -> np.ndarray:
    on = (upsample(maps, GRID) > threshold).numpy()
    labels, annotated, ignore = (t.numpy() for t in (masks.labels, masks.annotated, masks.ignore))  # type: ignore[union-attr]
    table = np.zeros((on.shape[1], labels.shape[1]))
    for i in range(on.shape[1]):
        for c in range(labels.shape[1]):
            inter = union = 0
            for b in range(len(on)):
                if not annotated[b, vocabulary.category[c]]:
                    continue
                for y in range(GRID[0]):
                    for x in range(GRID[1]):
                        if not ignore[b, y, x]:
                            inter += on[b, i, y, x] & labels[b, c, y, x]
                            union += on[b, i, y, x] | labels[b, c, y, x]
            table[i, c] = inter / max(union, 1)
    return table


# -- IoU --------------------------------------------------------------------------------------------------------------


def test_iou_equals_a_naive_loop_and_bincount() -> None:
    maps, masks, vocabulary, thresholds = random_case(0)
    metric = Dissection(thresholds, vocabulary, grid=GRID)
    metric.update(torch.arange(7), maps, masks)
    found = metric.compute().iou()[0]
    np.testing.assert_allclose(found.numpy(), naive_iou(maps, masks, vocabulary, 0.2), atol=1e-12)
    counts = overlaps(maps, thresholds, masks.columns(vocabulary), GRID).sum(0)[0]
    packed = torch.zeros_like(counts)
    on = upsample(maps, GRID).flatten(2) > 0.2
    for column in range(5):  # counts of (concept) over the pixels of one column, by bincount
        image, pixel = masks.columns(vocabulary)[:, column].nonzero(as_tuple=True)
        hit = on[image, :, pixel].nonzero()[:, 1]
        packed[:, column] = torch.bincount(hit, minlength=5).float()
    assert torch.equal(counts, packed)


@pytest.mark.parametrize("cells", [(2, 2), (3, 5), (4, 4), (9, 1)])
@pytest.mark.parametrize("threshold", [-2.0, 0.5, 1.2])
def test_pixels_between_cells_and_all_pixels_give_the_same_counts(
    cells: tuple[int, int], threshold: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    g = torch.Generator().manual_seed(9)
    _, masks, vocabulary, _ = random_case(2)
    maps = torch.randn(7, 5, *cells, generator=g)
    columns = masks.columns(vocabulary)
    within = torch.tensor([[3, 4, 3, 3, 4]]).expand(2, -1)
    thresholds = torch.tensor([threshold, 0.7])[:, None].expand(2, 5)
    found, places = [], []
    for share in (2.0, -1.0):  # never and always all pixels
        monkeypatch.setattr(dissection_overlaps, "_DENSE_FROM", share)
        places.append(torch.zeros(2, 5, 16, dtype=torch.float64))
        found.append(overlaps(maps, thresholds, columns, GRID, within=within, places=places[-1]))
    assert torch.equal(*found)
    assert torch.equal(*places)
    on = upsample(maps, GRID).flatten(2) > threshold
    assert torch.equal(places[0][0], (on & columns[:, within[0]].bool()).sum(0).double())


def test_many_columns_are_told_apart() -> None:
    """130 overlapping labels: more than two words of 64 bits."""
    g = torch.Generator().manual_seed(10)
    masks = Masks(torch.rand(3, 130, *GRID, generator=g) < 0.4)
    vocabulary = Vocabulary(tuple(map(str, range(130))))
    maps = torch.randn(3, 2, 2, 2, generator=g)
    columns = masks.columns(vocabulary)
    found = overlaps(maps, torch.ones(1, 2), columns, GRID)[:, 0]
    on = (upsample(maps, GRID).flatten(2) > 1).float()
    assert torch.equal(found, on @ columns.transpose(1, 2))


def test_streamed_equals_whole_and_rules_are_independent() -> None:
    maps, masks, vocabulary, _ = random_case(1)
    rules = torch.stack([torch.full((5,), t) for t in (-0.5, 0.2, 9.0)])
    chosen = torch.tensor([[0, 1, 2, -1, 0]]).expand(3, -1)
    whole = Dissection(rules, vocabulary, grid=GRID, chosen=chosen, replicates=4)
    whole.update(torch.arange(7), maps, masks)
    parts = Dissection(rules, vocabulary, grid=GRID, chosen=chosen, replicates=4)
    for part in (slice(0, 1), slice(1, 5), slice(5, 7)):
        some = Masks(masks.labels[part], masks.annotated[part], masks.ignore[part])  # type: ignore[index]
        parts.update(torch.arange(7)[part], maps[part], some)
    one, other = whole.compute(), parts.compute()
    for name in ("counts", "sizes", "expected", "replicated"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name))
    single = Dissection(rules[1], vocabulary, grid=GRID)
    single.update(torch.arange(7), maps, masks)
    assert torch.equal(single.compute().iou()[0], one.iou()[1])
    assert (one.iou()[2] == 0).all()  # never on
    assert (one.detectors(2).phi == 0).all()


def test_hand_made_masks() -> None:
    """Two 4 x 4 images. Concept 0 is the left half of both, 1 is dead, 2 is label b exactly."""
    vocabulary = Vocabulary(("a", "b", "never"), ("parts", "other"), (0, 1, 0))
    labels = torch.zeros(2, 3, 4, 4, dtype=torch.bool)
    labels[0, 0, :, :2] = True  # a: the left half of image 0
    labels[:, 1, 0, :] = True  # b: the top row of both, but only image 1 is annotated for "other"
    ignore = torch.zeros(2, 4, 4, dtype=torch.bool)
    ignore[0, 3, :] = True
    annotated = torch.tensor([[True, False], [True, True]])
    maps = torch.zeros(2, 3, 4, 4)
    maps[:, 0, :, :2] = 1
    maps[:, 2, 0, :] = 1
    metric = Dissection(torch.full((3,), 0.5), vocabulary, grid=GRID, chosen=torch.tensor([0, -1, 1]))
    metric.update(torch.arange(2), maps, Masks(labels, annotated, ignore))
    found = metric.compute()
    iou = found.iou()[0]
    assert float(iou[0, 0]) == pytest.approx(
        6 / (6 + 8)
    )  # image 0 without its last row: 6 of 6; image 1: 8 for nothing
    assert float(iou[0, 1]) == pytest.approx(2 / (8 + 4 - 2))
    assert float(iou[2, 1]) == 1
    assert (iou[1] == 0).all()
    assert (iou[:, 2] == 0).all()
    label, value, second, second_value = (t[0] for t in found.best())
    assert label.tolist() == [0, -1, 1]
    assert second.tolist() == [1, -1, 0]
    assert float(second_value[0]) == pytest.approx(0.2)
    assert float(value[2]) == 1
    detectors = found.detectors()
    assert float(detectors.precision[0]) == pytest.approx(6 / 14)
    assert float(detectors.recall[0]) == 1
    r, f = 14 / 28, 6 / 28
    assert float(detectors.chance[0]) == pytest.approx(r * f / (r + f - r * f))
    # E T: over 6 pixels the concept is on in two images and the label in one: 6 * 2 * 1 / 2
    assert float(found.expected[0, 0]) == pytest.approx(6.0)  # type: ignore[index]
    assert float(detectors.layout[0]) == pytest.approx(6 / (14 + 6 - 6))


def test_chance_in_closed_form() -> None:
    one = torch.zeros(1, 1, 10, 200, dtype=torch.bool)
    one[..., :10] = True  # f = 0.05
    maps = torch.zeros(1, 1, 10, 200)
    maps[0, 0, 0, 40:60] = 1  # r = 0.01
    metric = Dissection(torch.tensor([0.5]), Vocabulary(("a",)), grid=(10, 200), chosen=torch.tensor([0]))
    metric.update(torch.arange(1), maps, Masks(one))
    assert float(metric.compute().detectors().chance[0]) == pytest.approx(0.0084034, abs=1e-7)


def test_vector_layers_and_bad_input() -> None:
    vocabulary = Vocabulary(("a", "b"))
    metric = Dissection(torch.zeros(2), vocabulary, grid=GRID)
    masks = Masks(torch.ones(3, 2, *GRID, dtype=torch.bool))
    metric.update(torch.arange(3), torch.tensor([[1.0, -1.0]]).expand(3, 2), masks)
    assert metric.compute().iou()[0].tolist() == [[1, 1], [0, 0]]
    with pytest.raises(UserError, match=r"concepts \(3, 5\) do not fit 3 masks and 2 thresholds"):
        metric.update(torch.arange(3), torch.zeros(3, 5), masks)
    with pytest.raises(UserError, match=r"masks of \(8, 8\) cells do not fit the grid \(4, 4\)"):
        metric.update(torch.arange(3), torch.zeros(3, 2), Masks(torch.ones(3, 2, 8, 8)))
    with pytest.raises(UserError, match="masks of 3 labels do not fit a vocabulary of 2"):
        metric.update(torch.arange(3), torch.zeros(3, 2), Masks(torch.ones(3, 3, *GRID)))
    with pytest.raises(UserError, match=r"masks of \(2, 2\) cells do not fit the grid \(4, 4\)"):
        metric.update(torch.arange(3), torch.zeros(3, 2), Masks(torch.ones(3, 2, 2, 2, dtype=torch.bool)))
    with pytest.raises(UserError, match="at least one label"):
        Vocabulary(())
    with pytest.raises(UserError, match=r"expected concepts \(B, I\)"):
        upsample(torch.zeros(3), GRID)


def test_upsampling_is_bilinear_with_free_corners() -> None:
    found = upsample(torch.tensor([[[[0.0, 1.0]]]]), (1, 4))[0, 0, 0]
    assert found.tolist() == pytest.approx([0, 0.25, 0.75, 1])


# -- scores -----------------------------------------------------------------------------------------------------------


def detectors(phi: list[float] | Tensor, labels: list[int] | Tensor, chance: float = 0.0) -> Detectors:
    phi, labels = torch.as_tensor(phi, dtype=torch.float64), torch.as_tensor(labels)
    zero = torch.zeros_like(phi)
    vocabulary = Vocabulary(("a", "b", "c", "d", "e"))
    return Detectors(vocabulary, labels, phi, zero + chance, zero, zero, zero, zero)


def test_scores_of_a_small_table() -> None:
    found = detectors([0.5, 0.3, 0.2, 0.0], [0, 0, 1, 2], chance=0.1).scores()
    assert found["S1"] == pytest.approx(1.0)
    assert found["S2"] == pytest.approx(0.7)
    assert found["detectors"] == 3
    assert found["unique_detectors"] == 2
    assert found["S1x"] == pytest.approx(0.6)
    assert found["S2x"] == pytest.approx(0.4 + 0.1 - 0.1)
    assert found["mean_iou"] == pytest.approx(0.25)


def test_nothing_labelled() -> None:
    found = detectors([0.0, 0.0], [-1, -1]).scores()
    assert found["S1"] == found["S2"] == found["unique_detectors"] == 0
    assert sum_of_best(torch.tensor([1.0, 2.0]), torch.tensor([-1, 3])) == 2


def test_bootstrap_replicates_scatter_around_the_score() -> None:
    g = torch.Generator().manual_seed(3)
    labels = torch.rand(200, 1, *GRID, generator=g) < 0.4
    maps = labels.float() + 0.6 * torch.randn(200, 1, *GRID, generator=g)
    metric = Dissection(torch.tensor([0.5]), Vocabulary(("a",)), grid=GRID, chosen=torch.tensor([0]), replicates=400)
    metric.update(torch.arange(200), maps, Masks(labels))
    found = metric.compute()
    spread = found.replicate_phi()
    assert spread.shape == (400, 1)
    assert float(spread.mean()) == pytest.approx(float(found.detectors().phi), abs=0.005)
    assert 0.004 < float(spread.std()) < 0.02  # 3,200 pixels: about sqrt(.6 * .4 / 1700) = .012


# -- rates ------------------------------------------------------------------------------------------------------------


def continuous(seed: int = 0, rows: int = 20_000) -> Tensor:
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed)) * torch.arange(1, 7)


def test_quantiles_equal_kthvalue_and_match_the_rate() -> None:
    rows = continuous()
    rates = (0.001, 0.005, 0.03)
    found = rate_thresholds(lambda: rows.split(777), rates)
    for rate, threshold in zip(rates, found, strict=True):
        k = int(rate * len(rows)) + 1
        assert torch.equal(threshold, rows.kthvalue(len(rows) - k + 1, dim=0).values)
    reached = on_rates(lambda: rows.split(777), found).mean(1)
    torch.testing.assert_close(reached, torch.tensor(rates, dtype=torch.float64), rtol=0.02, atol=0)


@pytest.mark.parametrize("memory", [1 << 30, 1])
def test_sparse_codes_match_the_rate_and_are_never_on_at_zero(memory: int) -> None:
    rows = (continuous(1) - 1.2816 * torch.arange(1, 7)).relu()  # 90 % zeros
    rows[:, 5] = 0
    found = rate_thresholds(lambda: rows.split(4096), (0.02, 0.05), memory=memory)
    reached = on_rates(lambda: rows.split(4096), found)
    torch.testing.assert_close(
        reached[:, :5].mean(1), torch.tensor([0.02, 0.05], dtype=torch.float64), rtol=0.02, atol=0
    )
    assert (reached[:, 5] == 0).all()
    rows[:, 0] = (rows[:, 0] > 5).float() * rows[:, 0]
    assert (rate_thresholds(lambda: [rows], (0.9,)) >= 0).all()


def test_shared_threshold_and_high_rates() -> None:
    rows = continuous(2)
    found = shared_thresholds(lambda: rows.split(5000), (0.01, 0.2))
    assert (found == found[:, :1]).all()
    reached = on_rates(lambda: [rows], found).mean(1)
    torch.testing.assert_close(reached, torch.tensor([0.01, 0.2], dtype=torch.float64), rtol=0.02, atol=0)


def test_copies_that_differ_in_scale_get_equal_matched_masks() -> None:
    rows = continuous(3)
    one = rate_thresholds(lambda: [rows], (0.01,))
    two = rate_thresholds(lambda: [7 * rows + 3], (0.01,))
    assert torch.equal(rows > one, 7 * rows + 3 > two)


def test_bad_rates() -> None:
    with pytest.raises(UserError, match=r"between 0 and 1, got 1\.5"):
        rate_thresholds(lambda: [torch.zeros(3, 2)], (1.5,))
    with pytest.raises(UserError, match="at least one row"):
        extent(list)


# -- significance -----------------------------------------------------------------------------------------------------


def test_identity_overlap_has_known_moments() -> None:
    """Two images, each mask on its own label only: G = identity, E T = 1, Var T = 1."""
    labels = torch.zeros(2, 1, 1, 2, dtype=torch.bool)
    labels[0, 0, 0, 0] = labels[1, 0, 0, 1] = True
    found = permutation_test(labels.float(), torch.tensor([0.5]), Masks(labels), torch.tensor([0]), Vocabulary(("a",)))
    assert [float(found[k]) for k in ("observed", "expected", "deviation")] == pytest.approx([2, 1, 1])
    assert float(found["p"]) == pytest.approx(0.5, abs=0.02)


def test_planted_detector_is_at_the_floor_and_independent_ones_are_uniform() -> None:
    from scipy.stats import kstest

    g = torch.Generator().manual_seed(4)
    labels = torch.rand(30, 1, 6, 6, generator=g) < 0.3
    maps = (torch.rand(30, 200, 6, 6, generator=g) < 0.3).float()
    maps[:, 0] = labels[:, 0].float()
    chosen = torch.zeros(200, dtype=torch.long)
    chosen[1] = -1
    found = permutation_test(maps, torch.full((200,), 0.5), Masks(labels), chosen, Vocabulary(("a",)))
    assert float(found["p"][0]) == pytest.approx(1 / 10_001)
    assert bool(found["significant"][0])
    assert float(found["p"][1]) == 1
    assert kstest(found["p"][2:].numpy(), "uniform").pvalue > 0.01
    assert int(found["significant"].sum()) <= 2
    assert float(found["z"][2:].mean().abs()) < 4 / math.sqrt(198)


def test_layout_alone_is_not_significant() -> None:
    """Mask and label always in the lower half, independent there: no evidence of a concept."""
    g = torch.Generator().manual_seed(5)
    labels = torch.rand(40, 1, 4, 4, generator=g) < 0.5
    labels[:, :, :2] = False
    maps = (torch.rand(40, 60, 4, 4, generator=g) < 0.5).float()
    maps[:, :, :2] = 0
    chosen = torch.zeros(60, dtype=torch.long)
    metric = Dissection(torch.full((60,), 0.5), Vocabulary(("a",)), grid=GRID, chosen=chosen)
    metric.update(torch.arange(40), maps, Masks(labels))
    scores = metric.compute().detectors().scores()
    assert scores["S1x"] / 60 > 0.1
    assert abs(scores["S1xl"] / 60) < 0.01
    found = permutation_test(maps, torch.full((60,), 0.5), Masks(labels), chosen, Vocabulary(("a",)))
    assert int(found["significant"].sum()) <= 1


def test_blocks_are_told_apart_and_memory_does_not_grow_with_the_images() -> None:
    sizes = [len(block) for block in blocks_of(300)]
    assert sizes == [100, 100, 100]
    assert sorted(torch.cat(blocks_of(300)).tolist()) == list(range(300))
    assert [len(block) for block in blocks_of(128)] == [128]
    g = torch.Generator().manual_seed(6)
    labels = torch.rand(300, 1, 4, 4, generator=g) < 0.3
    maps = (torch.rand(300, 60, 4, 4, generator=g) < 0.3).float()
    maps[:, 0] = (labels[:, 0] ^ (torch.rand(300, 4, 4, generator=g) < 0.2)).float()
    found = permutation_test(
        maps, torch.full((60,), 0.5), Masks(labels), torch.zeros(60, dtype=torch.long), Vocabulary(("a",))
    )
    assert float(found["p"][0]) == pytest.approx(1 / 10_001)
    assert float(found["z"][1:].mean().abs()) < 4 / math.sqrt(59)
    assert float(found["z"][1:].std()) == pytest.approx(1, abs=0.35)
    test = PermutationTest(torch.full((60,), 0.5), torch.zeros(60, dtype=torch.long), Vocabulary(("a",)))
    for _ in range(2):
        held = [value.shape for value in vars(test).values() if isinstance(value, Tensor)]
        test.add(maps[:100], Masks(labels[:100]))
        assert [value.shape for value in vars(test).values() if isinstance(value, Tensor)] == held


def test_permutation_needs_two_images() -> None:
    with pytest.raises(UserError, match="at least 2 images, got 1"):
        permutation_test(
            torch.zeros(1, 1, 2, 2),
            torch.zeros(1),
            Masks(torch.ones(1, 1, 4, 4)),
            torch.tensor([0]),
            Vocabulary(("a",)),
        )


def test_joint_behaviour_of_two_halves_and_a_copy() -> None:
    """Label a is the left half; concept 0 sees its upper, concept 1 its lower part, 2 copies 0, 3 is label b."""
    labels = torch.zeros(1, 2, *GRID, dtype=torch.bool)
    labels[0, 0, :, :2] = True
    labels[0, 1, 0, 3] = True
    maps = torch.zeros(1, 4, *GRID)
    maps[0, 0, :2, :2] = maps[0, 1, 2:, :2] = maps[0, 2, :2, :2] = maps[0, 3, 0, 3] = 1
    metric = Dissection(torch.full((4,), 0.5), Vocabulary(("a", "b")), grid=GRID, chosen=torch.tensor([0, 0, 0, 1]))
    metric.update(torch.arange(1), maps, Masks(labels))
    found = joint_behaviour([(maps, Masks(labels))], torch.full((4,), 0.5), metric.compute().detectors(), GRID)
    assert found["sub_concept_pairs"] == 3
    assert found["sub_concept_share"] == pytest.approx(2 / 3)
    assert found["or_recall"] == 1
    assert found["single_recall"] == pytest.approx((0.5 + 1) / 2)
    assert found["or_f1"] == 1
    assert found["single_f1"] == pytest.approx((2 * 4 / 12 + 1) / 2)
    assert found["actives"] == pytest.approx(13 / 16)
    assert found["overlap_share"] == 0

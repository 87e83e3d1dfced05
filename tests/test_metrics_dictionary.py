"""Metrics of dictionaries and of codes over seeds: known angles, matchings, and what randomness gives."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from netgloss.errors import UserError
from netgloss.metrics import (
    CodeCorrelation,
    Collinearity,
    CollinearityMax,
    Stability,
    collinearity,
    concept_stability,
    cosines,
    dictionary_metrics,
    dictionary_score,
    matched_similarity,
    nearest_cosine,
    pair_interval,
    random_dictionary,
    random_stability,
    shuffled_stability,
    stability,
)

HALF = math.sqrt(0.5)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- collinearity -----------------------------------------------------------------------------------------------------


def test_collinearity_of_known_angles() -> None:
    # Atoms at 0, 45 and 180 degrees in a plane, and one orthogonal to it: lengths do not matter.
    atoms = torch.tensor([[2.0, 0, 0], [1, 1, 0], [-5, 0, 0], [0, 0, 1e-20]])
    assert nearest_cosine(atoms).tolist() == pytest.approx([1, HALF, 1, 0])
    assert collinearity(atoms) == pytest.approx((2 + HALF) / 4)
    assert CollinearityMax().value(atoms) == pytest.approx(1)
    assert collinearity(torch.eye(5)) == 0
    assert collinearity(torch.ones(3, 4)) == pytest.approx(1)


def test_collinearity_of_dead_and_lonely_atoms() -> None:
    assert nearest_cosine(torch.tensor([[0.0, 0], [1, 0], [1, 1]])).tolist() == pytest.approx([0, HALF, HALF])
    assert math.isnan(collinearity(torch.ones(1, 3)))


def test_cosines_refuse_what_they_cannot_compare() -> None:
    with pytest.raises(
        UserError, match=r"expected a dictionary \(K, C\) of finite numbers, got shape \(2, 3\) with NaN"
    ):
        cosines(torch.full((2, 3), math.nan), torch.ones(2, 3))
    with pytest.raises(UserError, match="dictionaries of 3 and 4 features cannot be compared"):
        cosines(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(UserError, match=r"got shape \(3,\)"):
        cosines(torch.ones(3), torch.ones(3))


def test_dictionary_scores_over_seeds() -> None:
    dictionaries = [torch.eye(2), torch.tensor([[1.0, 0], [1, 1]]), torch.ones(2, 2)]  # 0, HALF, 1
    score = dictionary_score(Collinearity(), dictionaries, baselines={"random": 0.3})
    mean = (HALF + 1) / 3
    assert score.value == pytest.approx(mean)
    assert (score.low, score.high) == (0.0, 1.0)  # the t interval is wider than the range
    assert (score.n, score.seeds, score.baselines) == (2, 3, {"random": 0.3})
    single = dictionary_score(Collinearity(), dictionaries[:1]).to_dict()
    assert (single["value"], single["low"], single["high"]) == (0, None, None)
    assert [cls.name for cls in dictionary_metrics()] == ["collinearity", "collinearity_max", "stability"]


# -- matching and stability -------------------------------------------------------------------------------------------


def test_matching_is_the_best_one_to_one_not_the_nearest() -> None:
    # Row by row, both concepts would take column 0 (0.9 + 0.8); one to one, the best total is 0.8 + 0.7.
    similarity = torch.tensor([[0.9, 0.7], [0.8, 0.1]])
    assert matched_similarity(similarity).tolist() == pytest.approx([0.7, 0.8])
    assert matched_similarity(torch.tensor([[-0.9, 0.2], [0.1, 0.3]])).tolist() == pytest.approx([0.9, 0.3])
    assert matched_similarity(torch.tensor([[-0.9, 0.2], [0.1, 0.3]]), signed=True).tolist() == pytest.approx(
        [0.2, 0.1]
    )
    assert matched_similarity(torch.tensor([[0.5], [0.9]])).tolist() == pytest.approx([0, 0.9])  # one is left over
    with pytest.raises(UserError, match="hold NaN"):
        matched_similarity(torch.tensor([[math.nan]]))


def test_stability_ignores_order_sign_and_length() -> None:
    atoms = random(7, 20)
    order = torch.tensor([4, 2, 0, 6, 1, 5, 3])
    other = atoms[order] * torch.tensor([1.0, -2, 3, -4, 5, -6, 7])[:, None]
    assert stability([atoms, other]) == pytest.approx(1)
    assert concept_stability([atoms, other, -atoms]).tolist() == pytest.approx([1.0] * 7)
    assert stability([atoms, atoms[order]], signed=True) == pytest.approx(1)
    assert stability([atoms, other], signed=True) < 0.8
    assert stability([torch.eye(6)[:3], torch.eye(6)[3:]]) == 0


def test_stability_of_one_changed_concept() -> None:
    first, second = torch.eye(5)[:3], torch.eye(5)[[2, 4, 0]]  # concept 1 is replaced by a new direction
    assert concept_stability([first, second]).tolist() == pytest.approx([1, 0, 1])
    assert stability([first, second]) == pytest.approx(2 / 3)
    assert stability([first, second, first]) == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    assert math.isnan(stability([first]))
    assert concept_stability([first]).isnan().all()


def test_pair_interval_is_the_jackknife() -> None:
    pairs = {(0, 1): 0.9, (0, 2): 0.6, (1, 2): 0.6}
    without = [0.6, 0.6, 0.9]  # without seed 0, 1, 2
    mean = sum(without) / 3
    half = 4.302652729749462 * math.sqrt(2 / 3 * sum((w - mean) ** 2 for w in without))
    assert pair_interval(pairs, bounds=(-10, 10)) == pytest.approx((0.7 - half, 0.7 + half))
    assert pair_interval(pairs, bounds=(0, 1)) == (0, 1)
    assert all(math.isnan(end) for end in pair_interval({(0, 1): 0.9}, bounds=(0, 1)))
    assert all(math.isnan(end) for end in pair_interval({}, bounds=(0, 1)))


def test_stability_score() -> None:
    first, second = torch.eye(5)[:3], torch.eye(5)[[2, 4, 0]]
    score = dictionary_score(Stability(), [first, second, first])
    assert score.value == pytest.approx(7 / 9)
    assert (score.low, score.high) == (0, 1)
    assert (score.n, score.seeds) == (3, 3)
    same = dictionary_score(Stability(signed=True), [first, first, first])
    assert (same.value, same.low, same.high) == (1, 1, 1)
    assert dictionary_score(Stability(), [first]).to_dict()["value"] is None
    assert dictionary_score(Stability(), [first, second]).to_dict()["low"] is None


# -- baselines --------------------------------------------------------------------------------------------------------


def test_random_stability_falls_with_the_number_of_features() -> None:
    values = [random_stability(16, num_features) for num_features in (4, 32, 256, 2048)]
    assert values == sorted(values, reverse=True)
    assert values[0] > 0.8
    assert values[-1] < 0.06
    assert random_stability(16, 32) == values[1]  # seeded
    assert random_stability(16, 32, seed=1) != values[1]
    # One concept: E|cos| of two directions in C dimensions is gamma(C/2) / (sqrt(pi) gamma((C+1)/2)); 1/2 for C = 3.
    assert random_stability(1, 3, draws=3000) == pytest.approx(0.5, abs=0.02)


def test_random_stability_with_the_layer_s_scale_and_sign_is_higher() -> None:
    scale = torch.zeros(200)
    scale[:3] = 7.0  # only three features vary: 1/2 as in three dimensions
    assert random_stability(1, 200, draws=3000) < 0.1
    assert random_stability(1, 200, scale=scale, draws=3000) == pytest.approx(0.5, abs=0.02)
    # Half-normal entries: E cos = E[a]^2 / E[a^2] = 2 / pi for many features.
    assert random_stability(1, 20000, nonnegative=True) == pytest.approx(2 / math.pi, abs=0.01)
    atoms = random_dictionary(4, 9, generator=torch.Generator().manual_seed(0), nonnegative=True)
    assert (atoms.min() > 0, atoms.shape, atoms.dtype) == (True, (4, 9), torch.float64)


def test_shuffling_keeps_what_all_concepts_share_and_breaks_the_rest() -> None:
    shared = torch.ones(6, 50)
    assert shuffled_stability([shared, shared]) == pytest.approx(1)  # nothing but the common direction
    atoms = random(6, 400)
    assert stability([atoms, atoms]) == pytest.approx(1)
    assert shuffled_stability([atoms, atoms]) < 0.35
    assert atoms.equal(random(6, 400))  # left as it was


# -- codes ------------------------------------------------------------------------------------------------------------


def test_code_correlation_streamed_equals_numpy() -> None:
    a, b = random(40, 3, 2, 2) + 5, random(40, 4, 2, 2, seed=1)
    b[:, 0] = -2 * a[:, 1] + 7
    whole = CodeCorrelation(3, 4)
    whole.update(a, b)
    rows = [t.movedim(1, -1).flatten(0, -2).T.double() for t in (a, b)]
    expected = torch.corrcoef(torch.cat(rows))[:3, 3:]
    torch.testing.assert_close(whole.compute(), expected, rtol=1e-9, atol=1e-12)
    assert float(whole.compute()[1, 0]) == pytest.approx(-1)
    left, right = CodeCorrelation(3, 4), CodeCorrelation(3, 4)
    for start in range(0, 24, 5):
        left.update(a[start : min(start + 5, 24)], b[start : min(start + 5, 24)])
    right.update(a[24:], b[24:])
    left.merge_state(right)
    torch.testing.assert_close(left.compute(), expected, rtol=1e-9, atol=1e-12)


def test_code_stability_of_permuted_flipped_rescaled_codes_is_one() -> None:
    a = random(100, 5)
    metric = CodeCorrelation(5)
    metric.update(a, a[:, [3, 1, 4, 0, 2]] * torch.tensor([1.0, -1, 10, -0.1, 3]) + 4)
    assert matched_similarity(metric.compute()).tolist() == pytest.approx([1.0] * 5)


def test_code_correlation_of_constant_and_broken_codes() -> None:
    a = random(30, 2)
    a[:, 1] = 0.1
    metric = CodeCorrelation(2)
    metric.update(a, a)
    assert metric.compute().tolist() == [[pytest.approx(1), 0], [0, 0]]
    metric.update(torch.full((1, 2), math.nan), a[:1])
    with pytest.raises(UserError, match="hold NaN"):
        matched_similarity(metric.compute())
    with pytest.raises(UserError, match=r"expected codes of \(2, 2\) concepts, got \(30, 3\) and \(30, 2\)"):
        CodeCorrelation(2).update(random(30, 3), a)

"""Metrics of the explanation space and of part localisation against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from netgloss.errors import UserError
from netgloss.explanations.heatmaps import concept_heatmaps
from netgloss.metrics.base import image_metrics
from netgloss.metrics.explanation_space import (
    LogitRMSE,
    NeuronsRebuilt,
    Participation,
    SignificantConcepts,
    class_space,
    normalised_errors,
    orthogonality,
    participation,
    score_errors,
    total_correlation,
)
from netgloss.metrics.localization import part_profile, part_shares


def test_participation_counts_equal_shares() -> None:
    values = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1], [2, -2, 0, 0], [3, 1, 0, 0]])
    assert participation(values).tolist() == pytest.approx([1, 4, 2, 16 / 10])


def test_orthogonality_by_hand() -> None:
    a, b = torch.tensor([1.0, -1, 1, -1]), torch.tensor([1.0, 1, -1, -1])
    free = torch.stack([a, b, torch.zeros(4)], dim=1)
    assert orthogonality(free) == pytest.approx(0, abs=1e-12)
    assert total_correlation(free) == pytest.approx(0, abs=1e-12)
    tied = torch.stack([a, 3 * a + 7], dim=1)
    assert orthogonality(tied) == pytest.approx(math.sqrt(1 / 2))
    assert total_correlation(tied) > 20
    r = 0.6
    mixed = torch.stack([a, r * a + math.sqrt(1 - r * r) * b], dim=1)
    assert orthogonality(mixed) == pytest.approx(math.sqrt(2 * r * r / (2 + 2 * r * r)))
    assert total_correlation(mixed) == pytest.approx(-math.log(1 - r * r))
    assert math.isnan(orthogonality(free[:, [0, 2]]))


def test_errors_of_neurons_and_scores() -> None:
    given = torch.tensor([[0.0, 1.0, 5.0], [2.0, 3.0, 5.0]])
    errors = normalised_errors(given, torch.tensor([[1.0, 1.0, 0.0], [1.0, 2.0, 0.0]]))
    assert errors.tolist() == [1.0, 0.5]  # the constant third feature is left out
    found = score_errors(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 2.0]))
    assert found == pytest.approx({"rmse": math.sqrt(0.5), "mae": 0.5, "r2": 0.5})
    assert math.isnan(score_errors(torch.ones(3), torch.ones(3))["r2"])
    with pytest.raises(UserError, match=r"\(2,\).*\(3,\)"):
        score_errors(torch.ones(2), torch.ones(3))


def test_class_space_keeps_positives_and_negatives_apart() -> None:
    values = torch.tensor([[9.0, 1, 0], [1, 1, 0], [5, 5, 0], [0, 0, 0]])
    logit = torch.tensor([10.0, 2, 1, 0])
    rebuilt = torch.tensor([10.0, 4, 1, 3])
    found = class_space(values, logit, rebuilt, torch.tensor([True, True, False, False]))
    assert found["rmse_positive"] == pytest.approx(math.sqrt(2))
    assert found["rmse_negative"] == pytest.approx(math.sqrt(4.5))
    assert found["live"] == 2
    assert found["significant"] == 1.5
    assert found["single"] == 0.5
    cosine = (9 + 1) / (math.sqrt(82) * math.sqrt(2))
    assert found["pull_away"] == pytest.approx(cosine**2)


def test_image_metrics_are_found_and_stream() -> None:
    names = {cls.name for cls in image_metrics()}
    assert {"logit_rmse", "significant_concepts", "participation", "neurons_rebuilt"} <= names
    g = torch.Generator().manual_seed(0)
    logits, rebuilt = torch.randn(40, 5, generator=g), torch.randn(40, 5, generator=g)
    values, given, other = (
        torch.randn(40, 6, generator=g),
        torch.rand(40, 8, generator=g),
        torch.rand(40, 8, generator=g),
    )
    other[:, :3] = given[:, :3]
    error = (rebuilt - logits).gather(1, logits.argmax(1, keepdim=True))
    cases = [
        (LogitRMSE(), {"logits": logits, "logits_rebuilt": rebuilt}, error.square().mean().sqrt()),
        (Participation(), {"contributions": values}, participation(values).mean()),
        (SignificantConcepts(), {"contributions": torch.tensor([[8.0, 1, 1, -9], [1, 0, 0, 0]])}, torch.tensor(1.5)),
        (NeuronsRebuilt(), {"activation": given, "reconstruction": other}, torch.tensor(3 / 8)),
    ]  # fmt: skip
    for metric, inputs, expected in cases:
        n = len(next(iter(inputs.values())))
        whole = type(metric)()
        whole.update(torch.arange(n), **inputs)
        assert float(whole.compute()) == pytest.approx(float(expected), rel=1e-5)
        for part in torch.arange(n).split(7):
            metric.update(part, **{name: value[part] for name, value in inputs.items()})
        torch.testing.assert_close(metric.compute(), whole.compute())
        torch.testing.assert_close(metric.replicates(), whole.replicates(), equal_nan=True)


def test_images_without_contributions_are_left_out_of_participation() -> None:
    metric = Participation()
    metric.update(torch.arange(2), contributions=torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    assert float(metric.compute()) == 2


# -- parts ------------------------------------------------------------------------------------------------------------


def parts_of(rows: int = 4, columns: int = 6) -> dict[str, np.ndarray]:
    head, legs = np.zeros((rows, columns)), np.zeros((rows, columns))
    head[:2, :2], legs[2:, 2:5] = 1, 1
    return {"head": head, "legs": legs}


def test_uniform_heat_is_spread_evenly_whatever_the_areas() -> None:
    covers = parts_of()
    shares, background = part_shares(np.ones((4, 6)), covers, ["head", "legs", "tail"])
    assert shares[:2].tolist() == pytest.approx([0.5, 0.5])
    assert math.isnan(shares[2])
    assert background == pytest.approx(1 - 10 / 24)
    heat = 3.0 * covers["head"]
    shares, background = part_shares(heat, covers, ["head", "legs"])
    assert shares.tolist() == [1, 0]
    assert background == pytest.approx(0)
    outside = np.zeros((4, 6))
    outside[0, 5] = 1
    shares, background = part_shares(outside, covers, ["head", "legs"])
    assert np.isnan(shares).all()
    assert background == 1


def test_profile_of_one_part_and_of_all_parts() -> None:
    shares = np.zeros((10, 3, 4))
    shares[:, 0, 2] = 1  # always the third part
    shares[:, 1] = 0.25  # all alike
    shares[:5, 2, 0] = shares[5:, 2, 1] = 1  # one part or another
    matters = np.ones((10, 3), bool)
    found = part_profile(shares, matters)
    assert found.locality.tolist() == pytest.approx([1, 0, 0.5])
    assert found.covered.tolist() == [1, 4, 2]
    assert found.covered_by_any == 3
    cosines = [0.5, 0.0, 1 / math.sqrt(2)]
    assert found.overlap == pytest.approx(np.mean(cosines))
    assert found.consistency[:2].tolist() == pytest.approx([0, 0], abs=1e-9)
    one_or_other = (math.log(1 / 0.75) + 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)) / 2
    assert found.consistency[2] == pytest.approx(one_or_other)


def test_profile_leaves_out_what_is_not_significant_or_not_visible() -> None:
    shares = np.full((4, 2, 2), np.nan)
    shares[:, 0] = [1, 0]
    shares[3, 0] = [0, 1]
    shares[0, 1] = [0.5, 0.5]
    matters = np.array([[True, False]] * 3 + [[False, False]])
    found = part_profile(shares, matters)
    assert found.locality[0] == pytest.approx(1)
    assert math.isnan(found.locality[1])
    assert math.isnan(found.overlap)


def test_heat_of_a_linear_concept_is_activation_times_weight() -> None:
    weight = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 0.0]])
    maps = torch.rand(3, 2, 4, 5)
    heat = concept_heatmaps(lambda pooled: pooled @ weight.T, maps, [0, 1, 2])
    torch.testing.assert_close(heat[:, 0], maps[:, 0] / 20)
    torch.testing.assert_close(heat[:, 1], 2 * maps[:, 1] / 20)
    assert (heat[:, 2] == 0).all()
    torch.testing.assert_close(heat[:, 0].sum(dim=(1, 2)), maps[:, 0].mean(dim=(1, 2)))  # sums to the concept


def test_weighted_overlay_follows_the_specification() -> None:
    from netgloss.figures.overlay import weighted_overlay

    grey = np.full((40, 60, 3), 0.5, np.float32)
    empty = weighted_overlay(grey, np.zeros((4, 6)), 1.0)
    np.testing.assert_allclose(empty, 0.5, atol=1e-6)  # no heat: the image itself
    np.testing.assert_allclose(weighted_overlay(grey, np.zeros((4, 6)), 0.0), 0.15, atol=1e-6)
    spot = np.zeros((4, 6))
    spot[1, 4] = 3.0
    painted = weighted_overlay(grey, spot, 1.0)
    assert np.unravel_index(painted[..., 0].argmax(), (40, 60))[1] > 35  # red where the heat is
    assert np.abs(painted[25:, :20] - 0.5).max() < 0.1
    np.testing.assert_allclose(weighted_overlay(grey, spot, 0.5), painted * 0.65, atol=1e-6)

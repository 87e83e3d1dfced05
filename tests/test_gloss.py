"""What the report says besides: the flat map of concepts, what removing one does, whose mistakes they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from netgloss.activations.layer import LayerBatch
from netgloss.explainers.base import ExplainerConfig, LayerSpec
from netgloss.explainers.natural_axes import NaturalAxes
from netgloss.explanations.mistakes import Mistake, find_mistakes, mistakes_record, shown_images
from netgloss.explanations.removal import STRENGTHS, is_exact, removal_record, replay
from netgloss.explanations.similarity import concept_map, nearest
from netgloss.metrics.faithfulness.importance import Contributions, explain_class


def angles(*degrees: float) -> Tensor:
    """Similarities of unit vectors of the plane."""
    at = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.cos(at[:, None] - at[None])


def test_nearest_are_those_of_the_largest_similarity() -> None:
    found = nearest(angles(0, 10, 30, 180), 2)
    assert [[entry["concept"] for entry in row] for row in found] == [[1, 2], [0, 2], [1, 0], [2, 1]]
    assert found[0][0]["similarity"] == pytest.approx(np.cos(np.radians(10)))


def test_vectors_of_a_plane_keep_their_distances_on_the_map() -> None:
    degrees = (0, 40, 100, 170, 250)
    flat = concept_map(angles(*degrees), "directions")
    assert flat is not None
    points = np.array(flat["points"])
    chords = 2 * np.sin(np.radians(np.abs(np.subtract.outer(degrees, degrees))) / 2)
    on_map = np.linalg.norm(points[:, None] - points[None], axis=2)
    # classical scaling of chords around their mean is an affine picture of the circle: ranks of the nearest stay
    assert flat["way"] == "classical scaling"
    assert flat["kept"] == 1.0
    assert flat["chance"] == 0.5
    assert [row.argsort()[1] for row in on_map] == [row.argsort()[1] for row in chords]
    assert points.min() >= 0
    assert points.max() <= 1


def test_the_map_of_many_keeps_groups_together_and_does_not_depend_on_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.nn.functional.normalize(torch.randn(4, 64, generator=generator), dim=1)
    atoms = centres.repeat_interleave(8, dim=0) + 0.05 * torch.randn(32, 64, generator=generator)
    atoms = torch.nn.functional.normalize(atoms, dim=1)
    flat, again = (concept_map(atoms @ atoms.T, "directions") for _ in range(2))
    assert flat == again
    assert flat is not None
    points = np.array(flat["points"])
    distance = np.linalg.norm(points[:, None] - points[None], axis=2) + np.eye(32) * 9
    assert (distance.argsort(axis=1)[:, :5] // 8 == np.arange(32)[:, None] // 8).all()
    assert flat["kept"] > 3 * flat["chance"]


def test_two_concepts_have_no_map() -> None:
    assert concept_map(angles(0, 90), "directions") is None


def test_alike_concepts_do_not_break_the_map() -> None:
    flat = concept_map(torch.ones(14, 14, dtype=torch.float64), "codes")
    assert flat is not None
    assert np.isfinite(flat["points"]).all()


class Rows:
    """Three features, the first of the largest variance."""

    num_rows, num_features = 4, 3

    def chunks(self) -> Any:
        yield torch.tensor([[0.0, 0, 0], [9, 4, 1], [3, 2, 1], [6, 0, 0]])

    def sample(self, max_rows: int, *, seed: int) -> Tensor:
        return next(self.chunks())


def batch_of(activation: Tensor, tail: Callable[[Tensor], Tensor]) -> LayerBatch:
    return LayerBatch(
        torch.arange(len(activation)), activation, tail(activation), torch.full((len(activation),), -1), tail
    )


WEIGHT = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 0.0], [1.0, 1.0, 1.0]])
BIAS = torch.tensor([0.5, -0.5, 0.0])


def axes(num_concepts: int) -> NaturalAxes:
    explainer = NaturalAxes(ExplainerConfig(num_concepts=num_concepts), LayerSpec("layer", (3,), num_classes=3))
    explainer.fit_rows(Rows(), seed=0)
    return explainer.eval()


@pytest.fixture
def explainer() -> NaturalAxes:
    """Its codes are the activation, and its decoder gives it back."""
    return axes(3)


def test_removal_of_a_linear_tail_is_logit_minus_contribution(explainer: NaturalAxes) -> None:
    activation = torch.tensor([[1.0, 2.0, 3.0], [2.0, 0.0, 1.0]])
    batch = batch_of(activation, lambda a: a @ WEIGHT.T + BIAS)
    codes = explainer.encode(activation)
    assert is_exact(explainer, codes, affine=True)
    replayed = replay(explainer, batch, codes, [[2, 0], [1]], (0.0,))
    assert replayed.shape == (2, 2, 1, 3)
    for c in range(3):
        parts = explain_class(explainer, batch.tail, codes, batch.logits, torch.full((2,), c))
        assert replayed[0, 0, 0, c] == pytest.approx(float(batch.logits[0, c] - parts.values[0, 2]))
        assert replayed[0, 1, 0, c] == pytest.approx(float(batch.logits[0, c] - parts.values[0, 0]))
    torch.testing.assert_close(replayed[1, 1, 0], batch.logits[1])  # a slot that the image does not use


def test_removal_of_a_curved_tail_is_the_network_at_each_strength(explainer: NaturalAxes) -> None:
    activation = torch.tensor([[1.0, 2.0, 3.0]])
    batch = batch_of(activation, lambda a: (a**2) @ WEIGHT.T)
    codes = explainer.encode(activation)
    assert not is_exact(explainer, codes, affine=False)
    replayed = replay(explainer, batch, codes, [[2]], STRENGTHS)
    for s, strength in enumerate(STRENGTHS):
        expected = torch.tensor([[1.0, 2.0, 3.0 * strength]]) ** 2 @ WEIGHT.T
        torch.testing.assert_close(replayed[0, 0, s], expected[0])


def test_what_the_concepts_do_not_tell_stays() -> None:
    first = axes(1)  # reads the feature of the largest variance alone
    activation = torch.tensor([[1.0, 2.0, 3.0]])
    batch = batch_of(activation, lambda a: a @ WEIGHT.T)
    replayed = replay(first, batch, first.encode(activation), [[0]], (0.0,))
    torch.testing.assert_close(replayed[0, 0, 0], torch.tensor([0.0, 2.0, 3.0]) @ WEIGHT.T)


def test_every_class_that_sliders_can_make_win_is_kept() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(200, generator=generator) * 2
    replayed = logits + torch.randn(3, 1, 200, generator=generator)
    names = [f"class {c}" for c in range(200)]
    record = removal_record(replayed, logits, [4, 7, 9], names, shown=5, exact=True)
    change = replayed[:, 0] - logits
    assert "class 5" in record["classes"]
    for trial in range(500):
        strengths = torch.rand(3, generator=torch.Generator().manual_seed(trial))
        now = logits + ((1 - strengths)[:, None] * change).sum(dim=0)
        winner = int(now.argmax())
        assert f"class {winner}" in record["classes"] or record["ceiling"] >= float(now[winner])
    best = int(logits.argmax())
    assert record["classes"][0] == f"class {best}"
    at = torch.tensor(record["at"])
    assert at.shape == (3, 1, len(record["classes"]))
    torch.testing.assert_close(at[1, 0, 0], replayed[1, 0, best])


def contributions(values: list[list[float]]) -> Contributions:
    return Contributions(torch.tensor(values), torch.zeros(len(values)), torch.zeros(len(values)))


def test_a_mistake_goes_to_the_concept_that_speaks_most_for_the_wrong_class() -> None:
    logits = torch.tensor([[1.0, 4.0], [5.0, 0.0], [0.0, 9.0], [0.0, 2.0]])
    labels = torch.tensor([0, 0, 0, -1])
    of_label = contributions([[1.0, 0.0], [0.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    of_prediction = contributions([[1.5, 2.5], [9.0, 9.0], [1.5, 0.2], [9.0, 0.0]])
    found = find_mistakes(torch.tensor([10, 11, 12, 13]), logits, labels, of_label, of_prediction)
    # image 10: concept 1 speaks by 2.5 of the margin of 3; image 12: 0.5 and 0.2 of 9, the rest is larger
    assert found[0] == Mistake(10, 0, 1, 1, 2.5, 3.0)
    assert (found[1].image, found[1].concept) == (12, None)
    assert found[1].share == pytest.approx(9 - 0.7)
    assert len(found) == 2  # 11 is right, 13 has no label


def test_groups_of_mistakes_count_what_the_replays_mend() -> None:
    mistakes = [Mistake(1, 0, 1, 2, 1.0, 0.5), Mistake(2, 0, 1, 2, 3.0, 0.7), Mistake(3, 1, 0, None, 2.0, 1.0)]

    def explained(after: list[float], ceiling: float | None = None) -> dict[str, Any]:
        return {
            "removal": {
                "drivers": [5, 2],
                "strengths": [0.0],
                "classes": ["cat", "dog"],
                "ceiling": ceiling,
                "at": [[[9.0, 9.0]], [after]],
            }
        }

    known = {1: explained([2.0, 1.0]), 2: explained([1.0, 2.0]), 3: explained([1.0, 2.0])}
    record = mistakes_record(mistakes, 50, {1: 0, 2: 1, 3: 2}, ["cat", "dog"], known)
    assert (record["labelled"], record["wrong"]) == (50, 3)
    first, second = record["groups"]
    assert (first["concept"], first["count"], first["share"], first["margin"]) == (2, 2, 2.0, 0.6)
    assert first["images"] == [1, 0]  # the largest share first
    assert first["pairs"] == [{"label": "cat", "prediction": "dog", "count": 2}]
    assert (first["recognised_without"], first["replayed"]) == (1, 2)
    assert (second["concept"], second["replayed"]) == (None, 0)
    known[1] = explained([2.0, 1.0], ceiling=7.0)  # an unlisted class may be ahead: not counted
    assert mistakes_record(mistakes, 50, {1: 0, 2: 1}, ["cat", "dog"], known)["groups"][0]["replayed"] == 1
    assert shown_images(mistakes, 2) == [2, 3]

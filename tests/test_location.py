"""Location instability: closed forms, the constant and the shuffled reference, landmarks of every kind of mark."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from netgloss.classifiers import load_classifier
from netgloss.data import ImageAnnotation, open_images
from netgloss.errors import UserError
from netgloss.evaluation.locate import _landmarks, landmarks_of, location_scores
from netgloss.metrics.location import (
    Peaks,
    bootstrap,
    find_peaks,
    followed,
    locate,
    part_interpretability,
    regression_error,
    trivial_peaks,
)
from netgloss.metrics.upper import UpperError, upper_error

DIAGONAL = math.hypot(224, 224)


def peaks(places: list[list[float]], strength: list[float] | None = None) -> Peaks:
    n = len(places)
    values = torch.ones(n) if strength is None else torch.tensor(strength)
    return Peaks(torch.tensor(places, dtype=torch.float64)[:, None], values.double()[:, None])


def test_peaks_are_the_centres_of_cells() -> None:
    maps = torch.zeros(1, 2, 7, 14)
    maps[0, 0, 2, 3] = 5.0
    found = find_peaks(maps, size=(224, 224))
    assert found.places[0, 0].tolist() == [3.5 * 16, 2.5 * 32]
    assert found.strength[0].tolist() == [5.0, -math.inf]  # a flat map has no peak
    with pytest.raises(UserError, match="without a map"):
        find_peaks(torch.zeros(2, 3), size=(224, 224))


def test_instability_is_the_sample_deviation_of_the_distance() -> None:
    """Distances 3, 4, 8: deviation sqrt(7); to the second landmark 1 and 5: sqrt(8); a third image lacks it."""
    at = peaks([[3, 0], [4, 0], [8, 0]])
    landmarks = torch.tensor([[[0, 0], [2, 0]], [[0, 0], [9, 0]], [[0, 0], [math.nan, math.nan]]])
    found = locate(at, landmarks, diagonal=10.0, top=None)
    torch.testing.assert_close(
        found.by_landmark, torch.tensor([[math.sqrt(7), math.sqrt(8)]], dtype=torch.float64) / 10
    )
    assert float(found.instability) == pytest.approx((math.sqrt(7) + math.sqrt(8)) / 20)
    assert float(found.spread) == pytest.approx(math.sqrt(7) / 10)


def test_only_the_strongest_images_count() -> None:
    at = peaks([[0, 0], [6, 0], [100, 0]], strength=[2.0, 3.0, 1.0])
    landmarks = torch.zeros(3, 1, 2)
    assert float(locate(at, landmarks, diagonal=1.0, top=2).instability) == pytest.approx(math.sqrt(18))
    weak = peaks([[0, 0], [6, 0], [100, 0]], strength=[2.0, 3.0, -math.inf])
    assert float(locate(weak, landmarks, diagonal=1.0, top=None).instability) == pytest.approx(math.sqrt(18))


def test_a_constant_has_ratio_one_and_a_true_part_a_low_one() -> None:
    generator = torch.Generator().manual_seed(0)
    landmarks = torch.rand(300, 1, 2, generator=generator, dtype=torch.float64) * 224
    rows = trivial_peaks(landmarks, grid=(14, 14), size=(224, 224))
    means = {name: locate(row, landmarks, diagonal=DIAGONAL).means() for name, row in rows.items()}
    assert means["constant_centre"]["ratio"] == pytest.approx(1.0, abs=1e-12)
    assert means["constant_centre"]["best_ratio"] == pytest.approx(1.0, abs=1e-12)
    assert means["constant_centre"]["spread"] == 0.0
    assert means["random_cell"]["ratio"] == pytest.approx(1.0, abs=0.02)
    assert means["true_part"]["ratio"] < 0.15
    # quantised to cells of 16 px: deviation of the distance to a cell's centre is 0.14 of the cell, 2.3 px
    assert means["true_part"]["instability"] == pytest.approx(2.28 / DIAGONAL, rel=0.2)


def test_too_few_images_are_nan_and_do_not_spoil_the_mean() -> None:
    at = Peaks(torch.zeros(4, 2, 2).double(), torch.tensor([[1.0, 1.0], [1.0, -math.inf]] * 2).double())
    at.places[:, 0, 0] = torch.arange(4.0).double()
    landmarks = torch.zeros(4, 1, 2)
    landmarks[1:, 0] = math.nan
    found = locate(at, landmarks, diagonal=1.0)
    assert found.instability.isnan().all()
    assert math.isnan(found.means()["ratio"])
    with pytest.raises(UserError, match="peaks of 4 images came with landmarks of 3"):
        locate(at, landmarks[:3], diagonal=1.0)


def test_bootstrap_and_records() -> None:
    generator = torch.Generator().manual_seed(1)
    landmarks = torch.rand(80, 2, 2, generator=generator, dtype=torch.float64) * 224
    following = Peaks(landmarks[:, :1].expand(-1, 3, -1), torch.rand(80, 3, generator=generator).double())
    spans = bootstrap(following, landmarks, diagonal=DIAGONAL, replicates=10)
    assert spans["ratio"].shape == (10,)
    assert spans["instability"].std() > 0
    scores = {
        s.metric: s
        for s in location_scores(
            [following, following],
            {"natural_axes": [following]},
            landmarks,
            ["head", "tail"],
            grid=(7, 7),
            size=(224, 224),
        )
    }
    ratio = scores["location_ratio"]
    assert set(ratio.baselines) == {"natural_axes", "constant_centre", "random_cell", "true_part"}
    assert ratio.baselines["constant_centre"] == pytest.approx(1.0)
    assert ratio.baselines["natural_axes"] == pytest.approx(ratio.value)
    assert ratio.low is not None
    assert ratio.low < ratio.value < ratio.high
    assert "head, tail" in ratio.definition
    assert scores["peak_spread"].higher_is_better is None


def test_landmarks_of_keypoints_masks_and_boxes() -> None:
    mask = np.zeros((10, 10), np.uint8)
    mask[2:4, 6:8] = 1
    mask[0, 0] = mask[9, 9] = 2
    annotation = ImageAnnotation(
        size=(10, 10),
        boxes=[("box", 0, 0, 4, 2), ("eye", 0, 0, 1, 1), ("twin", 0, 0, 1, 1), ("twin", 5, 5, 6, 6)],
        keypoints=[("eye", 7.0, 1.0)],
        mask=mask,
        mask_labels={1: "one", 2: "two pieces"},
    )
    assert _landmarks(annotation) == {"eye": (7.0, 1.0), "one": (7.0, 3.0), "box": (2.0, 1.0)}


def test_landmarks_follow_the_preprocessing(monkeypatch: pytest.MonkeyPatch) -> None:
    critters = load_classifier("critters")
    source = open_images("critters:6")
    names, places, size = landmarks_of(source, np.arange(6), critters.preprocessing)
    assert size == (64, 64)
    annotation = source.annotation(3)
    assert annotation is not None
    for label, x, y in annotation.keypoints:
        assert places[3, names.index(label)].tolist() == pytest.approx([x, y])
    assert not set(names) & set(source.class_names)
    told = source.annotation
    monkeypatch.setattr(source, "annotation", lambda i: None if i < 3 else told(i))
    _, fewer, size = landmarks_of(source, np.arange(6), critters.preprocessing)
    assert size == (64, 64)
    assert torch.equal(fewer[3:].isnan(), places[3:].isnan())
    assert len(fewer) == 6  # an image without an annotation keeps its place
    assert fewer[:3].isnan().all()


def test_part_interpretability_counts_what_passes() -> None:
    assert part_interpretability([0.1, 0.3, 0.5, 0.2]) == 0.5
    assert math.isnan(part_interpretability([]))


def test_upper_error() -> None:
    """|(3, 4) - (3, 0)| / |(3, 4)| = 4 / 5; streamed equals whole; a zero layer is NaN."""
    x, y = torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 0.0]])
    assert float(upper_error(x, y)) == pytest.approx(0.8)
    assert float(upper_error(x, torch.zeros(1, 2))) == pytest.approx(1.0)
    assert math.isnan(float(upper_error(torch.zeros(1, 2), y)))
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 9, 3, 2, 2, generator=generator)
    metric = UpperError("fc7")
    assert metric.name == "upper_error:fc7"
    for part in (slice(0, 4), slice(4, 9)):
        metric.update(torch.arange(9)[part], upper=a[part], upper_rebuilt=b[part])
    torch.testing.assert_close(metric.compute(), upper_error(a, b))
    with pytest.raises(UserError, match="must have the same shape"):
        metric.update(torch.arange(2), upper=torch.zeros(2, 3), upper_rebuilt=torch.zeros(2, 4))


def one_follower(images: int = 120) -> tuple[Peaks, torch.Tensor]:
    """22 concepts: the first peaks 3 pixels off the first of three landmarks, 20 anywhere, the last at the centre."""
    draw = torch.Generator().manual_seed(0)
    landmarks = torch.rand(images, 3, 2, generator=draw).double() * 100
    places = [
        landmarks[:, :1] + 3,
        torch.rand(images, 20, 2, generator=draw).double() * 100,
        torch.full((images, 1, 2), 50.0).double(),
    ]
    return Peaks(torch.cat(places, dim=1), torch.rand(images, 22, generator=draw).double()), landmarks


def test_a_landmark_is_found_by_the_concept_that_follows_it_and_not_by_the_best_of_many() -> None:
    found, landmarks = one_follower()
    seen = followed(found, landmarks, diagonal=141.4)
    assert seen.best[0] == 0
    assert seen.hits[0] == 1
    assert seen.found.tolist() == [True, False, False]
    assert (seen.hits[1:] < 0.15).all()  # the best of 22 concepts, chosen on other images, is as good as chance
    assert (seen.hits[1:] - seen.chance[1:]).abs().max() < 0.06
    few = followed(found.of(torch.arange(5)), landmarks[:5], diagonal=141.4)
    assert few.hits.isnan().all()
    assert not few.found.any()
    with pytest.raises(UserError, match="peaks of 5 images came with landmarks of 120"):
        followed(found.of(torch.arange(5)), landmarks, diagonal=1.0)


def test_a_constant_hits_a_landmark_that_never_moves_but_does_not_follow_it() -> None:
    found, landmarks = one_follower()
    landmarks[:, 1] = 51.0
    seen = followed(found, landmarks, diagonal=141.4)
    assert seen.best[1] == 21
    assert seen.hits[1] == seen.chance[1] == 1
    assert not seen.found[1]


def test_landmarks_are_read_from_peaks_by_regression() -> None:
    found, landmarks = one_follower()
    own, mean_place = regression_error(found, landmarks[:, :1], diagonal=141.4)
    assert own < 0.02
    assert mean_place == pytest.approx(0.27, abs=0.03)
    without = Peaks(found.places[:, 1:], found.strength[:, 1:])
    assert regression_error(without, landmarks[:, :1], diagonal=141.4)[0] > 0.9 * mean_place
    assert math.isnan(regression_error(found.of(torch.arange(5)), landmarks[:5], diagonal=1.0)[0])
    silent = Peaks(found.places, torch.full_like(found.strength, -math.inf))
    assert regression_error(silent, landmarks[:, :1], diagonal=141.4)[0] == pytest.approx(mean_place, rel=0.05)

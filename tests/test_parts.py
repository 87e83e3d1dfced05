"""PartExplainer: planted parts, the section it is built on, the round trip to disk, and whole runs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from netgloss.activations import Store
from netgloss.classifiers import Classifier, Taps, cut_section, later_layers, load_classifier
from netgloss.data.sources import open_sources
from netgloss.errors import UserError
from netgloss.explainers.base import LayerSpec
from netgloss.explainers.names import config_from_dict
from netgloss.explainers.part_maps import (
    coinciding_peaks,
    mean_of_pairs,
    peak_counts,
    watch,
)
from netgloss.explainers.parts import PartConfig, PartExplainer, choose_upper
from netgloss.explanations.part_galleries import strongest_images, track_shares
from netgloss.runs.run import Run
from netgloss.runs.saved import load_explainer
from netgloss.training.inputs import upper_layers
from netgloss.workflows.annotate import annotate
from netgloss.workflows.explain import explain
from netgloss.workflows.parts import parts
from netgloss.workflows.show import show
from part_scenes import CHANNELS, SIDE, UPPER, ToyRows, ToySection, fit_toy, peaks_on_parts, scenes

SPEC = LayerSpec("toy", (CHANNELS, SIDE, SIDE), True, 0, UPPER)


# -- planted parts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_each_map_locks_onto_one_planted_part_and_none_dies(seed: int) -> None:
    explainer, numbers = fit_toy(seed, steps=120, filter_loss="information", filter_weight=1.0)
    assert peaks_on_parts(explainer).amax(dim=1).mean() >= 0.95
    assert numbers["dead_share"] == 0
    with torch.no_grad():
        assert (explainer.encode(scenes(200, seed=50)[0]).flatten(2).amax(dim=(0, 2)) > 0).all()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_planted_part_has_a_map_and_the_maps_alone_rebuild_the_layer_above(seed: int) -> None:
    explainer, _ = fit_toy(seed, steps=120)
    assert peaks_on_parts(explainer).amax(dim=0).min() >= 0.9
    assert error_from_parts(explainer, seed) < 0.15


def test_the_published_fit_leaves_planted_parts_without_a_map_and_the_layer_above_unexplained() -> None:
    """The fault that the default removes: maps gather at one part, and the decision does not pass through them."""
    explainer, _ = fit_toy(0, steps=120, preset="published")
    assert peaks_on_parts(explainer).amax(dim=0).min() < 0.5
    assert error_from_parts(explainer, 0) > 0.6


def error_from_parts(explainer: PartExplainer, seed: int) -> float:
    """Squared error of the maps above, rebuilt from the part maps alone, as a share of their variance."""
    torch.manual_seed(100 + seed)
    network, activation = ToySection(), scenes(200, seed=50)[0]
    with torch.no_grad():
        true, found = network(activation)["maps"], explainer.rebuild(activation, "interpretable")["maps"]
    return float((found - true).square().sum() / (true - true.mean(dim=0)).square().sum())


def test_p_answers_to_eta() -> None:
    """At the rate of the convolutions p could not leave .5, whatever eta was."""
    free, pressed = (fit_toy(0, steps=40, eta=eta)[0].p for eta in (0.0, 3.0))
    assert free < pressed - 0.1
    assert pressed > 0.8
    assert abs(fit_toy(0, steps=40, eta=3.0, share_lr=1e-4)[0].p - 0.5) < 0.01


def test_some_images_are_rebuilt_from_the_part_maps_alone() -> None:
    """With all images so, the loss does not change when the ordinary track does."""
    batch = ToyRows(scenes(64, seed=3)[0], ToySection()).batch(torch.arange(64))
    for alone, names in (
        (0.0, {"rebuild maps", "rebuild pooled"}),
        (1.0, {"rebuild maps from parts", "rebuild pooled from parts"}),
    ):
        explainer = start(alone=alone, filter_weight=0.0, eta=0.0)
        before = explainer.losses(batch)
        assert set(before) == names
        assert explainer.rest is not None
        with torch.no_grad():
            explainer.rest.weight.mul_(-3)
        after = explainer.losses(batch)
        assert all((after[name] == before[name]) == (alone == 1.0) for name in names)
    torch.manual_seed(0)
    half = start(filter_weight=0.0, eta=0.0).losses(batch)
    whole = half["rebuild maps"] + half["rebuild maps from parts"]
    assert 0 < half["rebuild maps"] < whole


def test_files_of_the_first_version_keep_their_masks() -> None:
    older = config_from_dict(PartExplainer, {**dataclasses.asdict(PartConfig()), "masks": True})
    assert older.chosen() == dataclasses.replace(
        PartConfig().chosen(), masks="both", mixing=False, filter_loss="information"
    )  # type: ignore[attr-defined]
    assert config_from_dict(PartExplainer, {"masks": False}).chosen().masks == "none"  # type: ignore[attr-defined]


def test_without_a_filter_loss_maps_lock_less() -> None:
    plain = peaks_on_parts(fit_toy(0, steps=120, filter_weight=0.0)[0]).amax(dim=1).mean()
    assert plain < peaks_on_parts(fit_toy(0, steps=120)[0]).amax(dim=1).mean() - 0.05
    assert plain < 0.95


def test_the_tracks_add_up_and_the_copied_start_is_the_identity() -> None:
    """With p = 1/2 and nothing learned, the ordinary track gives half of the activation back."""
    explainer = start()
    activation = scenes(64, seed=3)[0]
    with torch.no_grad():
        both, parts, rest = (explainer.rebuild(activation, t) for t in ("both", "interpretable", "ordinary"))
        assert explainer.section is not None
        half = explainer.section(0.5 * activation)
        for name in UPPER:
            torch.testing.assert_close(rest[name], half[name], atol=2e-2, rtol=2e-2)
            torch.testing.assert_close(explainer.decode(explainer.encode(activation))[name], parts[name])
            torch.testing.assert_close(
                explainer.decoder_for(activation)(explainer.encode(activation))[name], both[name]
            )
            torch.testing.assert_close(explainer(activation)[name], both[name])
    assert explainer.p == 0.5
    assert set(explainer.partial()) == {"part_maps_alone", "ordinary_track_alone"}
    with pytest.raises(UserError, match="tracks must be"):
        explainer.rebuild(activation, "all")  # type: ignore[arg-type]


def start(**options: object) -> PartExplainer:
    torch.manual_seed(0)
    explainer = PartExplainer(PartConfig(**options), SPEC)  # type: ignore[arg-type]
    section = ToySection()
    explainer.adopt(section)
    explainer.fit_rows(ToyRows(scenes(64, seed=3)[0], section), seed=0)  # type: ignore[arg-type]
    return explainer.eval()


def test_a_signed_layer_keeps_its_sign_in_the_ordinary_track() -> None:
    spec = LayerSpec("toy", (CHANNELS, SIDE, SIDE), False, 0, UPPER)
    explainer = PartExplainer(PartConfig(), spec)
    section = ToySection()
    explainer.adopt(section)
    activation = scenes(64)[0] - 0.5
    explainer.fit_rows(ToyRows(activation, section), seed=0)  # type: ignore[arg-type]
    with torch.no_grad():
        torch.testing.assert_close(explainer._weighted_rest(activation), 0.5 * activation, atol=1e-3, rtol=1e-2)
    explainer.train()
    terms = explainer.losses(ToyRows(activation, section).batch(torch.arange(8)))
    upper = {"rebuild maps", "rebuild pooled", "rebuild maps from parts", "rebuild pooled from parts"}
    assert set(terms) == {*upper, "filter", "eta"}


def test_options_change_what_is_optimised() -> None:
    batch = ToyRows(scenes(64, seed=3)[0], ToySection()).batch(torch.arange(64))
    plain = start(filter_weight=0.0, eta=0.0, alone=0.0).losses(batch)
    assert set(plain) == {"rebuild maps", "rebuild pooled"}
    single = start(ordinary=False)
    assert single.p == 1.0
    assert single.partial() == {}
    assert "eta" not in single.losses(batch)
    frozen = start(decoder_lr=0.0)
    assert len(frozen.optimizer().param_groups) == 2
    assert not any(p.requires_grad for p in frozen.section.parameters())  # type: ignore[union-attr]
    copied = start(start="copy")
    with torch.no_grad():
        given = batch.activation / copied.unit
        torch.testing.assert_close(copied._maps(batch.activation)[0], given)


def test_watch_counts_dead_and_frozen_maps() -> None:
    maps = torch.zeros(40, 3, 4, 4)
    maps[:, 1, 2, 2] = 1.0
    maps[torch.arange(40), 2, torch.arange(40) % 4, 0] = 1.0
    counts = peak_counts(maps)
    assert counts[0].sum() == 0
    assert counts[1, 10] == 40
    assert counts[2, ::4].tolist() == [10] * 4
    assert {k: round(float(v), 4) for k, v in watch(maps).items()} == {"dead_share": 0.3333, "frozen_share": 0.3333}
    explainer = start()
    with torch.no_grad():
        explainer.parts[1].bias[:2] = -1e6  # type: ignore[index]
    explainer.after_fit(ToyRows(scenes(64, seed=3)[0], ToySection()))  # type: ignore[arg-type]
    assert any(note.startswith("2 of 12 part maps are never active (parts 0, 1)") for note in explainer.notes)
    assert not any("same place" in note for note in explainer.notes)
    with torch.no_grad():
        for values in (explainer.parts[1].weight, explainer.parts[1].bias):  # type: ignore[union-attr]
            values.copy_(values[-1:].expand_as(values).clone())
    explainer.after_fit(ToyRows(scenes(64, seed=3)[0], ToySection()))  # type: ignore[arg-type]
    assert any(note.startswith("two part maps peak at the same place in 100%") for note in explainer.notes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_concepts": 5}, "num_concepts = 5, but layer 'toy' has 12"),
        ({"kappa": 0.0}, "kappa must be positive, got 0.0"),
        ({"eta": -1.0}, "eta must not be negative, got -1.0"),
        ({"batch_size": 1}, "batch_size must be at least 2"),
        ({"start": "zero"}, "start must be one of ica, kmeans, random, copy, got 'zero'"),
        ({"masks": "first"}, "masks must be one of second, both, none, got 'first'"),
        ({"preset": "old"}, "preset must be one of default, published, got 'old'"),
        ({"alone": 1.5}, "alone is a share of the images, from 0 to 1, got 1.5"),
        ({"share_lr": 0.0}, "share_lr must be positive, got 0.0"),
    ],
)
def test_impossible_options_are_told(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PartExplainer(PartConfig(**options), SPEC)  # type: ignore[arg-type]


def test_layers_and_data_that_cannot_be_explained() -> None:
    with pytest.raises(UserError, match="gives vectors"):
        PartExplainer(PartConfig(), LayerSpec("fc", (8,), True, 0, {"out": (4,)}))
    explainer = PartExplainer(PartConfig(), SPEC)
    with pytest.raises(UserError, match="call adopt"):
        explainer(scenes(2)[0])
    zero = ToyRows(torch.zeros(4, CHANNELS, SIDE, SIDE), ToySection())
    with pytest.raises(UserError, match="is zero on all 4 images"):
        explainer.fit_rows(zero, seed=0)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="1 image to fit on is not enough"):
        explainer.fit_rows(ToyRows(scenes(1)[0], ToySection()), seed=0)  # type: ignore[arg-type]


# -- the section and its layers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layer", "expected"),
    [
        ("torchvision:mobilenet_v2", "features.13", ("features.18", "classifier.0")),
        ("torchvision:squeezenet1_0", "features.12", ("classifier.2", "classifier.3")),
        ("torchvision:alexnet", "features.11", ("classifier.2", "classifier.5")),
        ("timm:resnet18", "layer3", ("layer4.1", "global_pool.flatten")),
    ],
)
def test_upper_layers_and_their_section(name: str, layer: str, expected: tuple[str, ...]) -> None:
    classifier = load_classifier(name, random_weights=True, input_size=64)
    assert upper_layers(PartExplainer, PartConfig(), classifier, layer) == expected
    images = torch.randn(2, 3, 64, 64)
    section = cut_section(classifier, layer, expected, input_shape=classifier.input_shape)
    with torch.no_grad(), Taps(classifier.net, [layer, *expected], stop=False) as taps:
        seen = taps(images)
        found = section(seen[layer].clone())
    for above in expected:
        torch.testing.assert_close(found[above], seen[above], atol=1e-4, rtol=1e-3)
    own = {p.data_ptr() for p in classifier.net.parameters()}
    assert not own & {p.data_ptr() for p in section.parameters()}
    assert all(p.requires_grad for p in section.parameters())


def test_vgg16_learns_towards_fc6_and_fc7() -> None:
    classifier = load_classifier("torchvision:vgg16", random_weights=True, input_size=112)
    later = later_layers(classifier, "features.29", input_shape=classifier.input_shape)
    above = choose_upper(later)
    assert above == ("classifier.2", "classifier.5")
    section = cut_section(classifier, "features.29", above, input_shape=classifier.input_shape)
    with torch.no_grad(), Taps(classifier.net, ["features.29", *above], stop=False) as taps:
        seen = taps(torch.randn(4, 3, 112, 112))
    rows = ToyRows.of(seen["features.29"], {name: seen[name] for name in above})
    spec = LayerSpec("features.29", (512, 7, 7), True, 1000, dict.fromkeys(above, (4096,)))
    explainer = PartExplainer(PartConfig(decoder_lr=0.0, batch_size=4, lr=1e-3), spec)
    explainer.adopt(section)
    explainer.fit_rows(rows, seed=0)  # type: ignore[arg-type]
    optimizer = explainer.optimizer()
    explainer.train()
    told = []
    for _ in range(5):
        terms = explainer.losses(rows.batch(torch.arange(4)))
        optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        optimizer.step()
        told.append({name: float(term.detach()) for name, term in terms.items()})
    for name in above:
        assert told[-1][f"rebuild {name}"] < told[0][f"rebuild {name}"] / 2
    assert {name: tuple(v.shape) for name, v in explainer(seen["features.29"]).items()} == dict.fromkeys(
        above, (4, 4096)
    )


def test_no_section_around_a_shortcut() -> None:
    classifier = load_classifier("timm:resnet18", random_weights=True, input_size=64)
    with pytest.raises(UserError, match=r"by no section of its own: .* goes around"):
        cut_section(classifier, "layer4.0.conv1", ["global_pool.flatten"], input_shape=classifier.input_shape)


class InPlace(nn.Module):
    """An upper layer that the next one overwrites."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.body(images).mean(dim=(2, 3))


def test_a_layer_in_front_of_an_inplace_relu_stays_as_it_was() -> None:
    net = InPlace().eval()
    section = cut_section(net, "body.0", ["body.1", "body.2"], input_shape=(3, 8, 8))
    found = section(torch.randn(5, 4, 6, 6))
    assert (found["body.1"] < 0).any()
    assert net.body[2].inplace


def test_upper_layers_by_hand_and_networks_without_any() -> None:
    with pytest.raises(UserError, match=r"'clasifier.0' does not run after .*; choose classifier.0"):
        PartExplainer.upper_layers(PartConfig(upper=("clasifier.0",)), ["features.18", "classifier.0"])
    with pytest.raises(UserError, match="no layer between"):
        choose_upper(["head"])


# -- whole runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return explain(
        "parts",
        "critters",
        "block4",
        "critters:48",
        out=tmp_path_factory.mktemp("parts") / "run",
        steps=20,
        batch_size=16,
        seeds=2,
        device="cpu",
        upper=("block5", "flatten"),
    )


def test_a_run_has_scores_of_both_tracks_a_report_and_the_watch(run: Run) -> None:
    scores = {s.metric: s for s in run.scores}
    assert {"agreement", "accuracy_change", "upper_error:block5", "upper_error:flatten", "hoyer", "l0"} <= set(scores)
    assert "r2" not in scores  # the activation itself is not rebuilt
    beside = scores["agreement"].baselines
    assert {"part_maps_alone", "ordinary_track_alone", "shuffled_codes", "natural_axes"} <= set(beside)
    assert "untrained_network" in scores["upper_error:flatten"].baselines
    last = json.loads((run.path / "history.jsonl").read_text().splitlines()[-1])
    assert {"dead_share", "frozen_share", "p", "filter", "rebuild block5"} <= set(last)
    assert any("p = " in text for text in run.manifest["warnings"])
    content = run.concepts
    assert any(concept["gallery"] for concept in content["concepts"])
    assert any(image["explained"] for image in content["images"])
    assert (run.path / "report.html").stat().st_size > 10_000


def test_contributions_add_up_to_the_rebuilt_logit(run: Run, tmp_path: Path) -> None:
    _, numbers = show(run, "critters:1,seed=3", out=tmp_path, device="cpu")[0].files
    told = json.loads(numbers.read_text())
    total = told["base"] + sum(told["contributions"].values()) + told["gap"]
    assert total == pytest.approx(told["logit"], abs=1e-3)
    assert len(told["contributions"]) == 96


def test_a_saved_explainer_is_the_same_without_the_network_s_weights(run: Run, tmp_path: Path) -> None:
    store = Store.open(run.manifest["store"])
    activation = torch.from_numpy(store.read("block4", [0, 1])).float()
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes(run.explainer_path(0).read_bytes())
    with torch.no_grad():
        first, again = run.explainer(activation), load_explainer(alone)(activation)
    for name, value in first.items():
        torch.testing.assert_close(again[name], value, atol=0, rtol=0)


def test_a_network_that_was_given_as_a_module_must_be_given_again(critters: Classifier, tmp_path: Path) -> None:
    size = {"size": (64, 64), "resize": (64, 64), "mean": (0.5,) * 3, "std": (0.25,) * 3}
    own = load_classifier(critters.net, preprocessing=size)
    run = explain(
        "parts", own, "block4", "critters:20", out=tmp_path / "run", steps=2, batch_size=8, seeds=1, device="cpu",
        upper=("flatten",),
    )  # fmt: skip
    with pytest.raises(UserError, match=r"cannot be built again: .* pass it again"):
        _ = Run(run.path).explainer
    loaded = load_explainer(run.explainer_path(0), classifier=own)
    assert isinstance(loaded, PartExplainer)


@pytest.fixture(scope="module")
def critters() -> Classifier:
    return load_classifier("critters")


def test_annotations_give_location_and_part_scores(run: Run, critters: Classifier) -> None:
    store = Store.open(run.manifest["store"])
    source = open_sources("critters:48")
    annotate(run, "critters:30,seed=5", store=store, source=source, classifier=critters)
    scores = {s.metric: s for s in run.scores}
    ratio = scores["location_ratio"]
    assert {"natural_axes", "random_directions", "constant_centre", "random_cell", "true_part"} == set(ratio.baselines)
    assert ratio.baselines["constant_centre"] == pytest.approx(1.0)
    assert ratio.baselines["true_part"] < 0.7
    assert ratio.n == 30
    assert scores["part_interpretability"].value <= scores["part_iou"].value / 0.2  # Markov's inequality
    again = annotate(run, "critters:30,seed=5", store=store, source=source, classifier=critters)
    assert len(run.scores) == len(scores)
    assert len(again) < len(scores)


def test_galleries_and_shares(run: Run, tmp_path: Path) -> None:
    source = open_sources("critters:48")
    picture, record = parts(run, source, out=tmp_path, filters=3, columns=4, distinct=1)
    numbers = json.loads(record.read_text())
    assert picture.stat().st_size > 5_000
    assert len(numbers["filters"]) == 3
    assert all(1 <= len(entry["images"]) <= 4 for entry in numbers["filters"])
    assert sum(numbers["shares"].values()) == pytest.approx(1.0)
    with pytest.raises(UserError, match="are not the images of the run"):
        parts(run, open_sources("critters:49"), out=tmp_path)
    assert 0 < numbers["coincidence"] < 1
    with pytest.raises(UserError, match="filters and columns must be at least 1, got 0 and 10"):
        parts(run, source, out=tmp_path, filters=0)
    with pytest.raises(UserError, match="distinct is a share of the images"):
        parts(run, source, out=tmp_path, distinct=0)
    _, record = parts(run, source, out=tmp_path, filters=100, columns=1, distinct=1e-6)
    shown = json.loads(record.read_text())["filters"]
    apart = [entry["filter"] for entry in shown]
    assert len(apart) + len({k for entry in shown for k in entry["coinciding"]}) <= run.explainer.num_concepts
    assert not {k for entry in shown for k in entry["coinciding"]} & set(apart)
    store = Store.open(run.manifest["store"])
    explainer = start(ordinary=False)
    assert track_shares(explainer, store, "block4", store.valid) == {}


def test_coincidence_of_peaks_by_hand() -> None:
    maps = torch.zeros(4, 3, 4, 4)
    for image, places in enumerate((((0, 0), (1, 1)), ((0, 0), (0, 2)), ((3, 3), (3, 3)), ((2, 2), (2, 2)))):
        for k, (y, x) in enumerate(places):
            maps[image, k, y, x] = 1
    maps[3, 1] = 0  # silent there
    near, both = coinciding_peaks(maps)
    found = near / both
    assert found[0, 1] == found[1, 0] == pytest.approx(2 / 3)
    assert found[0, 0] == 1
    assert found[2].isnan().all()
    assert mean_of_pairs(near, both) == pytest.approx(2 / 3)


def test_strongest_images_pass_the_level_of_rare_activations() -> None:
    maps = torch.zeros(1000, 2, 2)
    maps[3, 0, 0], maps[7, 1, 1], maps[9, 0, 1] = 2.0, 5.0, 3.0
    assert strongest_images(maps, 2).tolist() == [7, 9]
    assert strongest_images(torch.zeros(10, 2, 2), 5).tolist() == []


def test_strongest_images_are_of_several_classes() -> None:
    maps = torch.zeros(12, 40, 40)
    maps[:, 0, 0] = torch.arange(1.0, 13.0)
    classes = np.array([1, 2, 1, 2, 1, 2, 0, 0, 0, 0, 0, 0])
    assert strongest_images(maps, 6).tolist() == [11, 10, 9, 8, 7, 6]
    assert strongest_images(maps, 6, classes).tolist() == [11, 10, 5, 4, 3, 2]
    assert strongest_images(maps, 12, np.zeros(12)).tolist() == list(range(11, -1, -1))

"""Dissection over a store: masks follow the images, rules, supervised rows, refusals; on planted concepts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from netgloss.activations.annotated import MaskedLayer, mask_grid, split_annotated
from netgloss.activations.key import StoreInfo, StoreKey
from netgloss.activations.store import Store
from netgloss.classifiers import Preprocessing
from netgloss.data import ImageAnnotation, open_images
from netgloss.errors import UserError
from netgloss.evaluation.annotation_scores import matched_rule
from netgloss.evaluation.dissect import dissect, significance
from netgloss.explainers.base import LayerSpec, to_rows
from netgloss.explainers.basis import InterpretableBasis, InterpretableBasisConfig
from netgloss.explainers.supervised_basis import SupervisedBasis, SupervisedBasisConfig

SIDE, CELLS = 32, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 images of 32 px with a left and a right part at random places, one image without a mask."""
    root = tmp_path_factory.mktemp("parts")
    (root / "images").mkdir()
    (root / "masks").mkdir()
    (root / "classes.json").write_text('{"0": "background", "1": "left eye", "2": "right eye", "3": "never"}')
    rng = np.random.default_rng(0)
    for i in range(40):
        Image.fromarray(rng.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)).save(root / "images" / f"{i:02d}.png")
        mask = np.zeros((SIDE, SIDE), np.uint8)
        for value in (1, 2):
            y, x = 4 * rng.integers(0, CELLS - 1, 2)
            mask[y : y + 8, x : x + 8] = value
        if i < 39:
            Image.fromarray(mask).save(root / "masks" / f"{i:02d}.png")
    return root


@pytest.fixture(scope="module")
def layer(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> MaskedLayer:
    return masked(folder, tmp_path_factory.mktemp("store") / "s")


def masked(folder: Path, out: Path, **options: object) -> MaskedLayer:
    """Feature 0 is on exactly on the left eye's cells, feature 1 on the right eye's, 2 and 3 are noise."""
    source = open_images(folder / "images", annotations=folder)
    key = StoreKey("w", {}, ("map",), source.fingerprint, dtype="float32", logits=False)
    store = Store.create(
        out,
        key=key,
        info=StoreInfo(),
        shapes={"map": (4, CELLS, CELLS)},
        ids=source.ids,
        targets=source.targets,
        num_classes=1,
    )
    rng = np.random.default_rng(1)
    maps = 0.1 * rng.standard_normal((40, 4, CELLS, CELLS)).astype(np.float32)
    for i in range(39):
        mask = np.asarray(Image.open(folder / "masks" / f"{source.ids[i][:2]}.png"))
        for value in (1, 2):
            maps[i, value - 1] += 5 * (mask[2::4, 2::4] == value)
    for chunk in store.pending:
        where = store.chunk_slice(chunk)
        store.write_chunk(
            chunk, activations={"map": maps[where]}, positions={}, logits=None, problems=[""] * len(maps[where])
        )
    preprocessing = Preprocessing(size=(SIDE, SIDE), resize=SIDE)
    return MaskedLayer(store, "map", source, preprocessing, grid=(SIDE, SIDE), **options)  # type: ignore[arg-type]


def axes(layer: MaskedLayer) -> InterpretableBasis:
    """The layer's own axes as a basis, with mean 0 and scale 1."""
    basis = InterpretableBasis(InterpretableBasisConfig(init="identity"), LayerSpec("map", (4, CELLS, CELLS)))
    basis.rotation.weight = torch.eye(4)
    with torch.no_grad():
        basis.bias.fill_(2.5)
    return basis.eval()


def test_masks_and_vocabulary(layer: MaskedLayer, folder: Path) -> None:
    assert layer.vocabulary.labels == ("left eye", "right eye", "never")
    assert len(layer.images) == 39
    masks = layer.masks(layer.images[3:4])
    expected = np.asarray(Image.open(folder / "masks" / "03.png"))
    assert torch.equal(masks.labels[0, 1], torch.from_numpy(expected == 2))
    assert not masks.labels[:, 2].any()


def test_planted_concepts_are_detected(layer: MaskedLayer) -> None:
    label, score = split_annotated(layer)
    assert not len(np.intersect1d(label, score))
    found = dissect(axes(layer), (layer, label), (layer, score), ["own", "rate:0.03", "shared:0.03"], replicates=10)
    own = found["own"]
    assert own.detectors.labels.tolist() == [0, 1, -1, -1]
    assert (own.detectors.phi[:2] > 0.7).all()  # bilinear upsampling rounds the corners
    assert (own.detectors.phi[2:] == 0).all()
    assert own.scores()["S1"] == pytest.approx(own.scores()["S2"])
    assert found["rate:0.03"].label_rate == pytest.approx(0.03, rel=0.02)
    assert found["shared:0.03"].label_rate == pytest.approx(0.03, rel=0.02)
    assert own.phi_replicates.shape == (10, 4)
    test = significance(axes(layer), own, layer, score)
    assert test["significant"].tolist() == [True, True, False, False]


def test_supervised_rows_and_probe(layer: MaskedLayer) -> None:
    rows, labels, counted, image = layer.rows(layer.images)
    assert rows.shape == (39 * CELLS * CELLS, 4)
    assert torch.equal(rows[:64], to_rows(torch.from_numpy(layer.store.read("map", layer.images[:1]))))  # as stored
    assert torch.equal(labels[:, 0], rows[:, 0] > 2.5)
    assert counted.all()
    assert image[CELLS * CELLS] == layer.images[1]

    class Rows:
        num_rows, num_features = len(rows), 4

        def labelled(self) -> tuple:
            return rows, labels, counted, image

    config = SupervisedBasisConfig(labels=layer.vocabulary.labels)
    probe = SupervisedBasis(config, LayerSpec("map", (4, CELLS, CELLS)))
    probe.fit_rows(Rows(), seed=0)  # type: ignore[arg-type]
    assert probe.notes == ["skipped for fewer than 50 positive rows: never (0)"]
    label, score = split_annotated(layer)
    found = dissect(probe.eval(), (layer, label), (layer, score), ["own"])["own"]
    assert found.detectors.labels.tolist() == [0, 1, -1]
    assert (found.detectors.phi[:2] > 0.6).all()


def test_labels_can_be_chosen_and_merged(folder: Path, tmp_path: Path) -> None:
    both = masked(folder, tmp_path / "s", merge=lambda label: label.removeprefix("left ").removeprefix("right "))
    assert both.vocabulary.labels == ("eye", "never")
    one = masked(folder, tmp_path / "t", labels=["right eye"])
    assert one.vocabulary.labels == ("right eye",)
    count = {k: int(m.masks(m.images).labels[:, 0].sum()) for k, m in (("both", both), ("one", one))}
    assert count["both"] > count["one"] > 0


def test_boxes_and_partial_annotations() -> None:
    annotation = ImageAnnotation((8, 8), boxes=[("a", 0, 0, 4, 4), ("b", 6, 6, 8, 8)])
    found = mask_grid(annotation, ["a", "b", "c"], (4, 4))
    assert found[0].sum() == 4
    assert found[0, :2, :2].all()
    assert found[1, 3, 3]
    assert not found[2].any()


def test_refusals(layer: MaskedLayer, folder: Path) -> None:
    label, score = split_annotated(layer)
    with pytest.raises(UserError, match="score images must not be among the label images"):
        dissect(axes(layer), (layer, label), (layer, label[:3]), ["own"])
    with pytest.raises(UserError, match=r"unknown rule 'top:5'; use own, rate:0\.005 or shared:0\.01"):
        dissect(axes(layer), (layer, label), (layer, score), ["top:5"])

    class Signed(InterpretableBasis):
        thresholds = None  # type: ignore[assignment]

    signed = Signed(InterpretableBasisConfig(), LayerSpec("map", (4, CELLS, CELLS))).eval()
    with pytest.raises(UserError, match="Signed has no threshold of its own: ask for a rate"):
        dissect(signed, (layer, label), (layer, score), ["own"])
    bare = open_images(folder / "images")
    with pytest.raises(UserError, match="none of the 40 images has an annotation"):
        MaskedLayer(layer.store, "map", bare, Preprocessing(size=(SIDE, SIDE), resize=SIDE))


def test_unknown_labels_are_named_and_known_ones_may_never_occur(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no annotation has a label 'left eyes'; did you mean left eye"):
        masked(folder, tmp_path / "s", labels=["left eyes"])
    never = masked(folder, tmp_path / "t", labels=["never"])
    label, score = split_annotated(never)
    found = dissect(axes(never), (never, label), (never, score), ["rate:0.03"])["rate:0.03"]
    assert found.detectors.labels.tolist() == [-1] * 4
    assert found.scores()["S1"] == found.scores()["S2"] == 0
    assert not significance(axes(never), found, never, score)["significant"].any()


def test_constant_concepts_are_never_on(layer: MaskedLayer) -> None:
    """A threshold that is the constant itself: strictly greater is never."""
    label, score = split_annotated(layer)

    class Flat(InterpretableBasis):
        thresholds = None  # type: ignore[assignment]

        def encode(self, activation: torch.Tensor) -> torch.Tensor:
            return torch.full_like(activation, 0.1)

    flat = Flat(InterpretableBasisConfig(), LayerSpec("map", (4, CELLS, CELLS))).eval()
    for found in dissect(flat, (layer, label), (layer, score), ["rate:0.03", "shared:0.2"]).values():
        assert found.label_rate == found.scores()["on_rate"] == found.scores()["S1"] == 0
        assert found.detectors.labels.tolist() == [-1] * 4


def test_controls_of_concepts_that_are_always_on(layer: MaskedLayer) -> None:
    label, score = split_annotated(layer)
    always = axes(layer)
    with torch.no_grad():
        always.bias.fill_(-100)
    own = dissect(always, (layer, label), (layer, score), ["own"])["own"]
    assert own.label_rate == 1
    rule = matched_rule([own.label_rate])
    assert dissect(axes(layer), (layer, label), (layer, score), [rule])[rule].label_rate == pytest.approx(1, abs=0.01)


def test_a_run_is_judged_and_labelled(tmp_path: Path) -> None:
    """The whole way on the shipped network: scores beside controls at the same rate, one record a concept."""
    from netgloss.activations import Store, capture
    from netgloss.classifiers import load_classifier
    from netgloss.runs.run import Run
    from netgloss.workflows.annotate import annotate
    from netgloss.workflows.capture import store_info
    from netgloss.workflows.fit import fit

    classifier, source = load_classifier("critters"), open_images("critters:30")
    capture(classifier, source, ["block5"], tmp_path / "s", info=store_info(classifier, source))
    store = Store.open(tmp_path / "s")
    run = fit("natural-axes", store, "block5", tmp_path / "run", seeds=1)
    scores = annotate(run, "critters:24,seed=5", store=store, source=source, classifier=classifier)
    by_name = {score.metric: score for score in run.scores}
    assert len(by_name) == len(scores)
    assert sum(name.startswith("dissection_") for name in by_name) == 8
    s1 = by_name["dissection_S1"]
    assert s1.value is not None
    assert s1.low is not None
    assert s1.low < s1.value
    assert {"natural_axes", "random_directions"} <= set(s1.baselines)
    record = json.loads((run.path / "dissection.json").read_text())
    assert len(record["concepts"]) == run.explainer.num_concepts
    assert sum(c["iou"] for c in record["concepts"]) == pytest.approx(s1.value, rel=1e-3)
    annotate(run, "critters:24,seed=5", store=store, source=source, classifier=classifier)
    assert len(run.scores) == len(scores)  # replaced, not doubled
    other = Run(run.path)
    other.manifest["store_address"] = "other"
    with pytest.raises(UserError, match="is not the one that the run"):
        annotate(other, "critters:24,seed=5", store=store, source=source, classifier=classifier)
    with pytest.raises(UserError, match=r"annotated score images are images of the fit"):
        annotate(run, "critters:30", store=store, source=source, classifier=classifier)
    with pytest.raises(UserError, match=r"\d+ of \d+ annotated score images are images of the fit"):
        annotate(run, "critters:30", store=store, source=None, classifier=classifier)  # told by the activations
    annotate(run, "critters:24,seed=5", store=store, source=None, classifier=classifier)

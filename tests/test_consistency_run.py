"""``netgloss consistency`` as a whole, its figures, the adaptive attack and the report."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from netgloss import figures
from netgloss.adversarial import PixelClassifier, attack_in_batches
from netgloss.adversarial.affinity_choice import AffinityChoice
from netgloss.adversarial.layer_consistency import UnitOptions, measure_layers, network_mean
from netgloss.adversarial.pixels import load_pixels
from netgloss.adversarial.probe import AttackChoice, attack_probe
from netgloss.adversarial.records import to_csv
from netgloss.adversarial.unit_gallery import choose_units
from netgloss.classifiers import Classifier, load_classifier
from netgloss.data.sources import ArraySource, open_images
from netgloss.errors import UserError
from netgloss.explainers.base import LayerSpec
from netgloss.explainers.srae import SRAE, SRAEConfig
from netgloss.metrics.consistency.units import Units, responses, unit_consistency
from netgloss.report import write_report
from netgloss.runs.run import Run
from netgloss.training import build_explainer
from netgloss.training.execution import Execution
from netgloss.workflows.consistency import ConsistencyOptions, consistency

CLASSES = ["<script>alert(1)</script>", "=cmd", "c"]


class Net(nn.Module):
    """Conv and linear head; channels 0 to 2 are the brightness of the colours, 3 is never on, 4 is signed noise."""

    class_names = CLASSES
    preprocessing_spec = {"size": [8, 8], "resize": None, "mean": [0.0] * 3, "std": [1.0] * 3}

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 1)
        self.relu = nn.ReLU()
        self.head = nn.Linear(5, 3)
        with torch.no_grad():
            self.conv.weight.zero_()
            self.conv.bias.zero_()
            for c in range(3):
                self.conv.weight[c, c] = 1
            self.conv.bias[3] = -1
            self.conv.weight[4] = torch.tensor([1.0, -1.0, 0.5])[:, None, None]
            self.head.weight.zero_()
            self.head.bias.zero_()
            for c in range(3):
                self.head.weight[c, c] = 30

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu(self.conv(x)).mean((2, 3)))


def pictures(each: int = 25) -> ArraySource:
    """Class c has a brighter colour c."""
    rng = np.random.default_rng(0)
    x = rng.integers(40, 100, (3 * each, 8, 8, 3))
    y = np.arange(3 * each) % 3
    for c in range(3):
        x[y == c, :, :, c] += 40
    return ArraySource(x.astype(np.uint8), y, CLASSES)


@pytest.fixture
def classifier() -> Classifier:
    return load_classifier(Net())


SMALL = ConsistencyOptions(null_draws=50, difference_images=12, shown_units=3, shown_images=2)


def test_run_folder_and_report(classifier: Classifier, tmp_path: Path) -> None:
    attack = AttackChoice(eps=50, steps=4)
    run = consistency(
        classifier,
        pictures(),
        ["relu", "conv"],
        out=tmp_path / "run",
        attack=attack,
        options=SMALL,
        device=Execution("cpu", command="netgloss <x>"),
    )
    rows = list(csv.DictReader(io.StringIO((run.path / "units.csv").read_text())))
    assert [r["layer"] for r in rows] == ["relu"] * 5 + ["conv"] * 10  # conv is signed: two poles a channel
    first = {r["unit"]: r for r in rows if r["layer"] == "relu"}
    assert first["3"]["status"] == "silent"
    for c in range(3):
        row = first[str(c)]
        assert row["status"] == "live"
        assert float(row["consis_cal_R"]) > 0.8
        assert float(row["share1"]) > 0.9
        assert float(row["mean_pd"]) > 0
    assert first["1"]["class1"] == "'=cmd"
    needed = "explainer pole tie_images consis_R E0_R p_R consis_V consis_cal_RV cs1_all cs2_all csc1_all csc2_all "
    needed += "chance1_all cs1_fooled share3 effective_concepts"
    assert set(needed.split()) <= set(rows[0])
    result = json.loads((run.path / "result.json").read_text())
    assert result["attack"]["largest_linf"] <= 50 / 255 + 1e-6
    assert result["attack"]["reached"] > 0.9
    assert result["attack"]["clean_accuracy"] == 1.0
    assert result["layers"]["relu"]["attack"]["consis_cal_change"] < 0
    mean = [result["layers"][layer]["consis_cal"] for layer in ("relu", "conv")]
    assert result["network"]["real"] == pytest.approx(sum(mean) / 2)
    assert result["affinity"]["semantics"] is False
    assert any("no semantics" in w for w in run.manifest["warnings"])
    assert (
        result["layers"]["relu"]["differences"]["auroc_confidence"] == 0
    )  # so strong an attack makes the network sure
    assert [s.metric for s in run.scores] == ["consistency, relu", "consistency, conv"]
    assert set(run.scores[0].baselines) == {
        "random directions", "untrained network", "the same units on adversarial images",
    }  # fmt: skip
    page = (run.path / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "netgloss &lt;x&gt;" in page
    assert page.count("data:image/jpeg;base64,") >= 3 * 2 * 2
    assert 'src="http' not in page
    assert "url(" not in page.replace("url(#", "")
    for part in ("true → target", "Trace of one image", "CS1", "Histograms of consis_cal", "random directions"):
        assert part in page, part
    (run.path / "report.html").unlink()
    write_report(run)
    assert (run.path / "report.html").read_text() == page
    (run.path / "result.json").write_text("{}")
    with pytest.raises(UserError, match="fields of a consistency run"):
        write_report(run)
    with pytest.raises(UserError, match="another run"):
        consistency(classifier, pictures(), ["conv"], out=run.path, attack=attack, options=SMALL)


def test_without_attack_and_with_several_seeds(classifier: Classifier, tmp_path: Path) -> None:
    options = ConsistencyOptions(
        seeds=2, max_images=60, null_draws=0, difference_images=0, shown_units=2, shown_images=1, controls=False
    )
    run = consistency(
        classifier, pictures(), ["relu"], out=tmp_path / "run", attack=AttackChoice("none"), options=options
    )
    result = json.loads((run.path / "result.json").read_text())
    assert result["attack"] is None
    over = result["over_seeds"]["relu"]["real"]
    assert len(over["values"]) == 2
    assert over["low"] - 1e-9 <= over["mean"] <= over["high"] + 1e-9
    drawn = [load_pixels(classifier, pictures(), number=60, seed=s).ids for s in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert "adversarial images: true" not in (run.path / "report.html").read_text()
    header = (run.path / "units.csv").read_text().splitlines()[0]
    assert "cs1_all" not in header


def test_too_few_images_are_told_before_the_attack(
    classifier: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attacked(*unused: Any, **also: Any) -> None:
        raise AssertionError("the attack ran first")

    monkeypatch.setattr("netgloss.workflows.consistency.attack_probe", attacked)
    with pytest.raises(UserError, match=r"smallest class of the probe set has 19 images.*--k"):
        consistency(classifier, pictures(19), ["relu"], out=tmp_path / "run", options=SMALL)


def test_an_interrupted_attack_goes_on(classifier: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was attacked is not attacked again, the end is that of an undisturbed run; a finished one is only read."""
    attack = AttackChoice("pgd", eps=20, steps=2)
    made = []

    def counted(how: Any, pixels: Any, x: Tensor, *rest: Any, stop: int | None = None, **options: Any) -> Any:
        made.append(len(x))
        if stop is not None and len(made) == stop:
            raise KeyboardInterrupt
        return attack_in_batches(how, pixels, x, *rest, **options)

    monkeypatch.setattr("netgloss.adversarial.probe.SAVE_SECONDS", 0.0)
    monkeypatch.setattr("netgloss.adversarial.probe.attack_in_batches", partial(counted, stop=3))
    with pytest.raises(KeyboardInterrupt):
        consistency(classifier, pictures(), ["relu"], out=tmp_path / "run", attack=attack, options=SMALL)
    made.clear()
    monkeypatch.setattr("netgloss.adversarial.probe.attack_in_batches", counted)
    run = consistency(classifier, pictures(), ["relu"], out=tmp_path / "run", attack=attack, options=SMALL)
    assert sum(made) == 75 - 2 * 32
    kill_after_the_attack(classifier, attack, tmp_path / "late", monkeypatch)
    assert sum(made) == 75 - 2 * 32 + 75
    whole = consistency(classifier, pictures(), ["relu"], out=tmp_path / "whole", attack=attack, options=SMALL)
    for name in ("result.json", "units.csv", "scores.json"):
        assert (run.path / name).read_bytes() == (whole.path / name).read_bytes(), name
    assert not list(run.path.glob("*checkpoint*"))
    made.clear()
    consistency(classifier, pictures(), ["relu"], out=tmp_path / "run", attack=attack, options=SMALL)
    assert not made


def kill_after_the_attack(
    classifier: Classifier, attack: AttackChoice, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted between the attack and the units, then run again."""

    def interrupted(*unused: Any, **also: Any) -> None:
        raise KeyboardInterrupt

    given: dict[str, Any] = {"out": out, "attack": attack, "options": SMALL}
    with monkeypatch.context() as patch:
        patch.setattr("netgloss.workflows.consistency.measure_layers", interrupted)
        with pytest.raises(KeyboardInterrupt):
            consistency(classifier, pictures(), ["relu"], **given)
    assert consistency(classifier, pictures(), ["relu"], **given).manifest["status"] == "complete"


def test_concepts_of_an_explainer(tmp_path: Path) -> None:
    from netgloss.activations import capture
    from netgloss.workflows.explain import demo
    from netgloss.workflows.fit import fit

    explained = demo(tmp_path / "demo", num_images=60)
    options = ConsistencyOptions(null_draws=0, difference_images=4, shown_units=1, shown_images=1, k=10)
    run = consistency(
        explained.classifier(),
        open_images("critters:200"),
        [],
        out=tmp_path / "run",
        explainer=explained.path,
        attack=AttackChoice("fgsm", eps=4),
        options=options,
    )
    (score,) = run.scores
    channels = consistency(
        explained.classifier(),
        open_images("critters:200"),
        [explained.layer],
        out=tmp_path / "channels",
        attack=AttackChoice("fgsm", eps=4),
        options=dataclasses.replace(options, controls=False),
    )
    assert score.baselines["the layer's channels"] == pytest.approx(channels.scores[0].value)
    assert "the layer's channels" not in channels.scores[0].baselines
    rows = list(csv.DictReader(io.StringIO((run.path / "units.csv").read_text())))
    assert len({r["unit"] for r in rows}) == explained.explainer.num_concepts
    assert rows[0]["explainer"] == explained.method
    store = capture(explained.classifier(), open_images("critters:60"), ["block5"], tmp_path / "store")
    pooled = fit("linear-head", store, "block5", tmp_path / "head", seeds=1)
    run = consistency(
        explained.classifier(),
        open_images("critters:200"),
        [],
        out=tmp_path / "pooled",
        explainer=pooled.path,
        attack=AttackChoice("none"),
        options=options,
    )
    assert run.manifest["status"] == "complete"
    with pytest.raises(UserError, match="explains layer"):
        consistency(explained.classifier(), pictures(), ["block1"], out=tmp_path / "no", explainer=explained.path)


def explained(path: Path, classifier: Classifier, seed: int) -> Path:
    """A run folder with an explainer of pooled activations, never fitted."""
    config = SRAEConfig(num_concepts=3, classes=("0", "1", "2"))
    spec = LayerSpec("relu", (5,), nonnegative=True, num_classes=3)
    run = Run.create(path, {"method": "srae", "config": {}, "model": classifier.spec(), "layer": "relu", "seeds": [0]})
    explainer = build_explainer(SRAE, config, spec, seed=seed)
    with torch.no_grad():
        for values in filter(torch.is_floating_point, explainer.state_dict().values()):
            values += seed
    run.save_explainer(explainer, 0)
    return path


def test_pooled_concepts_and_which_explainer_it_was(
    classifier: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = (explained(tmp_path / f"explained{seed}", classifier, seed) for seed in (0, 1))
    moved: list[Any] = []
    monkeypatch.setattr(SRAE, "to", lambda self, device: [self, moved.append(device)][0])
    given: dict[str, Any] = {"out": tmp_path / "run", "attack": AttackChoice("none"), "options": SMALL}
    run = consistency(classifier, pictures(), [], explainer=one, **given)
    result = json.loads((run.path / "result.json").read_text())
    assert "differences" not in result["layers"]["relu"]  # a mean over the grid rebuilds no map
    assert moved == [torch.device("cpu")]
    assert consistency(classifier, pictures(), [], explainer=one, **given).manifest["status"] == "complete"
    with pytest.raises(UserError, match="another run"):
        consistency(classifier, pictures(), [], explainer=other, **given)


def test_channels_are_identity_and_streaming_changes_nothing(classifier: Classifier) -> None:
    data = load_pixels(classifier, pictures())
    pixels = PixelClassifier.of(classifier)
    tables, _ = AffinityChoice().build(classifier, data)
    made = attack_probe(pixels, data, AttackChoice(eps=20, steps=2))
    found = [
        measure_layers(
            pixels,
            data,
            ["relu"],
            tables,
            adversarial=made,
            encoders=e,
            options=UnitOptions(controls=False, null_draws=0, batch_size=b),
        )[0]["relu"]
        for e, b in (({}, 32), ({}, 7), ({"relu": lambda a: a}, 75))
    ]
    for other in found[1:]:
        assert torch.allclose(found[0].real, other.real)
        assert torch.allclose(found[0].scores.consis, other.scores.consis)
    with torch.no_grad():
        maps = classifier.net.relu(classifier.net.conv(data.pixels()))
    whole = unit_consistency(
        Units.of(responses(maps)).select(responses(maps)), data.probe_labels, tables["chosen"], null_draws=0
    )
    assert torch.allclose(whole.consis, found[0].scores.consis)
    assert network_mean({"relu": found[0]})["real"] == pytest.approx(whole.summary()["consis_cal"])
    assert choose_units(found[0], 3)[0] == int(whole.calibrated.nan_to_num(-1).argmax())


@pytest.mark.parametrize("attack", ["fgsm", "fgsm-rs", "least-likely", "ensemble", "feature", "pgd-l2", "pgd"])
def test_every_attack_makes_eight_bit_images(attack: Any, classifier: Classifier) -> None:
    data = load_pixels(classifier, pictures(8))
    choice = AttackChoice(attack, eps=0.5 if attack == "pgd-l2" else 6, steps=3)
    made = attack_probe(PixelClassifier.of(classifier), data, choice, layer="relu")
    assert made is not None
    levels = made.found.images * 255
    assert torch.allclose(levels, levels.round(), atol=1e-3)
    if attack != "pgd-l2":
        assert float(made.found.linf.max()) <= 6 / 255 + 1e-6
    assert (made.targets is None) == (attack == "feature")
    if made.targets is not None:
        assert not (made.targets == data.probe_labels).any()
        assert torch.equal(data.net_classes[made.targets], made.found.targets)


class Halves(Net):
    """Tells classes by how much brighter a colour is on the left than on the right, to which the other net is blind."""

    def forward(self, x: Tensor) -> Tensor:
        maps = self.relu(self.conv(x))
        return self.head(maps[..., :4].mean((2, 3)) - maps[..., 4:].mean((2, 3)))


def test_an_ensemble_brings_every_network_to_the_target(classifier: Classifier) -> None:
    """The second network, which sees what the first is blind to, is fooled only if it is attacked too."""
    data = load_pixels(classifier, pictures(8))
    second = PixelClassifier.of(load_classifier(Halves()))
    choice = AttackChoice("ensemble", eps=40, steps=10)

    def losses(also: list[PixelClassifier]) -> Tensor:
        made = attack_probe(PixelClassifier.of(classifier), data, choice, also=also)
        assert made is not None
        assert made.targets is not None
        with torch.no_grad():
            logits = second(made.found.images)
        return torch.nn.functional.cross_entropy(logits, data.net_classes[made.targets])

    assert losses([second]) < losses([]) - 0.1


def test_networks_that_make_no_ensemble_are_refused(classifier: Classifier, tmp_path: Path) -> None:
    other, critters = load_classifier(Halves()), load_classifier("critters")
    for attack, also, message in (
        ("pgd", [other], "by the ensemble attack, not by pgd"),
        ("ensemble", [critters], "read the same images: 3 and 8 classes"),
    ):
        with pytest.raises(UserError, match=message):
            consistency(classifier, pictures(), ["relu"], out=tmp_path / "run", attack=AttackChoice(attack), also=also)
    with pytest.raises(UserError, match="cannot be untargeted"):
        AttackChoice("ensemble", untargeted=True)
    assert not (tmp_path / "run").exists()


def test_affinity_sources(classifier: Classifier, tmp_path: Path) -> None:
    data = load_pixels(classifier, pictures(4))
    lines = tmp_path / "wnids.txt"
    lines.write_text("n02121620\nn02084071\nn02691156\n")
    tables, told = AffinityChoice(wnids=str(lines)).build(classifier, data)
    assert tables["chosen"][0, 1] == pytest.approx(math.exp(-(4**2) / (2 * 2.7**2)))
    assert told["semantics"]
    lines.write_text(
        "".join(f"{n}\t{w}\n" for n, w in zip(CLASSES, ("n02121620", "n02084071", "n02691156"), strict=True))
    )
    named, _ = AffinityChoice(wnids=str(lines)).build(classifier, data)
    assert np.array_equal(named["chosen"], tables["chosen"])
    groups = tmp_path / "groups.json"
    groups.write_text(json.dumps({CLASSES[0]: 1, CLASSES[1]: 1, CLASSES[2]: 2}))
    assert AffinityChoice(groups=groups).build(classifier, data)[0]["chosen"][0].tolist() == [1, 0.5, 0]
    for text, choice, message in (
        ("n02121620\n", {"wnids": str(lines)}, "1 WordNet ids"),
        ("[1]", {"groups": lines}, "JSON object"),
        ("{", {"groups": lines}, "cannot be read"),
    ):
        lines.write_text(text)
        with pytest.raises(UserError, match=message):
            AffinityChoice(**choice).build(classifier, data)
    with pytest.raises(UserError, match="cannot be read"):
        AffinityChoice(wnids="nowhere.txt").build(classifier, data)
    for shipped, number in (("cifar10", 10), ("imagenet1k", 1000)):
        with pytest.raises(UserError, match=f"{shipped} has {number} WordNet ids, the images have 3 classes"):
            AffinityChoice(wnids=shipped).build(classifier, data)


def test_wordnet_ids_are_shown_by_the_network_s_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """The affinity keeps the ids; who reads the report sees names."""
    ids = ["n01440764", "n02102040", "n02979186"]
    source, classifier = pictures(), load_classifier(Net())
    assert load_pixels(classifier, source, number=30).title(1) == CLASSES[1]
    monkeypatch.setattr(Classifier, "wnids", property(lambda self: ids))
    classifier.class_names = ["tench", "English springer", "cassette player"]
    data = load_pixels(classifier, ArraySource(source.pixels, source.targets, ids), number=30).stratified(9)
    assert [data.title(c) for c in range(3)] == classifier.class_names
    assert data.class_names == ids


def test_csv_is_harmless() -> None:
    text = to_csv([{"a": "=1+1", "b": math.nan}, {"a": 'x,"y"', "b": 0.5, "c": 1}])
    assert text.splitlines() == ["a,b,c", "'=1+1,,", '"x,""y""",0.5,1']


def test_mistakes(classifier: Classifier, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no layer"):
        consistency(classifier, pictures(), ["rely"], out=tmp_path / "a")
    with pytest.raises(UserError, match="--layer"):
        consistency(classifier, pictures(), [], out=tmp_path / "a")
    with pytest.raises(UserError, match="at least 20"):
        consistency(classifier, pictures(5), ["relu"], out=tmp_path / "b", attack=AttackChoice("none"))
    assert not (tmp_path / "a").exists()
    with pytest.raises(UserError, match="is not finished"):
        write_report(Run(tmp_path / "b"))


# -- figures ----------------------------------------------------------------------------------------------------------


def test_heat_tile_marks_the_threshold() -> None:
    image = np.full((8, 8, 3), 100, np.uint8)
    strength = np.zeros((2, 2), np.float32)
    strength[0, 0] = 2.0
    tile = figures.heatmap_tile(image, strength, high=2.0, threshold=1.0)
    assert tile.shape == (96, 96, 3)
    assert (tile == 255).all(-1).any()
    assert np.abs(tile[-1, -1].astype(int) - 100).max() <= 1  # nothing where the unit is silent
    assert np.array_equal(figures.heatmap_tile(image, None, high=1.0), np.full((96, 96, 3), 100, np.uint8))
    assert np.abs(figures.heatmap_tile(image, -strength, high=1.0).astype(int) - 100).max() <= 1
    assert figures.heatmap_tile(image[..., 0], strength, high=2.0).shape == (96, 96, 3)


def test_command_line(tmp_path: Path) -> None:
    def netgloss(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "netgloss.cli", *arguments], capture_output=True, text=True, timeout=120
        )

    out = tmp_path / "run"
    common = ("--model", "critters", "--images", "critters:160", "--out", str(out))
    done = netgloss(
        "consistency", *common, "--layer", "block5", "--attack", "fgsm", "--eps", "4", "--null-draws", "0", "--k", "8",
        "--difference-images", "4", "--shown-units", "1", "--no-controls", "--device", "cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (out / "units.csv").exists()
    assert (out / "report.html").exists()
    assert "netgloss consistency" in json.loads((out / "run.json").read_text())["command"]
    wrong = netgloss("consistency", *common, "--layer", "blok5")
    assert wrong.returncode == 2
    assert "block5" in wrong.stderr
    assert "Traceback" not in wrong.stderr

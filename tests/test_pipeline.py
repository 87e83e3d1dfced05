"""The whole way: from a classifier and images to a run folder, in Python."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import netgloss
from netgloss.data.sources import open_sources
from netgloss.errors import UserError
from netgloss.metrics import Score
from netgloss.metrics.faithfulness.importance import contributions, significant
from netgloss.runs.run import Run, read_history, to_json
from netgloss.runs.saved import load_explainer

ROOT = Path(__file__).resolve().parent.parent
SCORE_FIELDS = ["metric", "value", "low", "high", "baselines", "n", "seeds", "higher_is_better", "definition"]


@pytest.fixture(scope="module")
def nmf_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("run") / "nmf"
    return netgloss.explain("nmf", "critters", "block5", "critters:100", out=out, num_concepts=6, seeds=2)


def test_the_explained_share_is_of_the_networks_own_logit(nmf_run: Run) -> None:
    record = nmf_run.concepts["importance"]["explained"]
    assert record["images"] == nmf_run.manifest["num_judged"] == 20
    assert record["low"] < record["share"] < record["high"]
    shares = []
    for image in nmf_run.concepts["images"]:
        why = image["explained"]
        if why:
            assert why["share"] == pytest.approx(max(0, 1 - abs(why["gap"]) / abs(why["logit"] - why["base"])))
            shares.append(why["share"])
    assert min(shares) <= record["share"] <= max(shares)


def test_pictures_are_stored_large_enough_to_look_at(nmf_run: Run) -> None:
    from PIL import Image

    for entry in nmf_run.concepts["images"]:
        with Image.open(nmf_run.path / entry["thumbnail"]) as picture:
            assert picture.format == "WEBP"
            assert max(picture.size) >= 224


def test_a_figure_of_show_is_on_the_scale_of_the_report(nmf_run: Run) -> None:
    (shown,) = netgloss.show(nmf_run, "critters:1,seed=4")
    for driver in shown.drivers:
        drawn = nmf_run.concepts["concepts"][driver.concept]["gallery"][0]["map"]
        assert driver.scale is not None
        assert (driver.scale.low, driver.scale.high) == (drawn["low"], drawn["high"])


def test_concepts_in_python_and_in_a_spreadsheet(nmf_run: Run) -> None:
    concepts = nmf_run.concepts
    assert concepts["concepts"][3]["id"] == 3  # still a dict
    concept = concepts[3]
    assert concept.sentence.startswith("Strongest on ")
    figure = concept.figure()
    assert len(figure.axes) == len(concept.record["gallery"])
    figure.savefig(io.BytesIO(), dpi=30)
    with pytest.raises(UserError, match="there is no concept 6; the run has 6"):
        concepts[6]
    rows = nmf_run.table()
    rows = rows if isinstance(rows, list) else rows.to_dict("records")
    assert [row["concept"] for row in rows] == list(range(6))
    assert rows[3]["sentence"] == concept.sentence
    with (nmf_run.path / "concepts.csv").open(newline="") as file:
        listed = list(csv.DictReader(file))
    assert [row["sentence"] for row in listed] == [row["sentence"] for row in rows]


def test_an_image_of_the_run_is_drawn_from_what_is_stored(nmf_run: Run) -> None:
    entry = next(image for image in nmf_run.concepts["images"] if image["explained"])
    image = nmf_run.image(entry["id"])
    drivers = entry["explained"]["drivers"]
    assert list(image.contributions.values()) == [d["contribution"] for d in drivers]
    figure = image.figure()
    widths = [bar.get_width() for bar in figure.axes[-1].patches]
    assert widths[: len(drivers)] == pytest.approx([d["contribution"] for d in drivers])
    assert sum(widths) == pytest.approx(entry["explained"]["logit"], abs=1e-4)
    assert nmf_run.image(f"somewhere/{entry['id']}").record == image.record
    with pytest.raises(UserError, match=r"explained no 'new\.jpg'; netgloss\.show explains any image"):
        nmf_run.image("new.jpg")


def test_no_name_is_a_formula_in_the_csv() -> None:
    from netgloss.runs.views import concepts_csv

    image = {"id": "=cmd()", "label": "+1", "prediction": None}
    concept = {"id": 0, "name": "@sum", "label": None, "importance": 0.1, "share_active": 0.2, "stability": None}
    concept |= {"gallery": [{"image": 0}], "classes": []}
    (row,) = csv.DictReader(io.StringIO(concepts_csv({"concepts": [concept], "images": [image], "classes": []})))
    assert row["name"] == "'@sum"
    assert row["strongest_images"] == "'=cmd()"


def test_folders_that_are_no_class_are_listed_and_not_judged(tmp_path: Path) -> None:
    source = netgloss.open_images("critters:24")
    names = dict(enumerate(source.class_names))
    for i in range(24):
        name = "a spotted beast" if int(source.targets[i]) == 0 else names[int(source.targets[i])]
        (tmp_path / "photos" / name).mkdir(parents=True, exist_ok=True)
        source.image(i).save(tmp_path / "photos" / name / f"{i:02d}.png")
    images = str(tmp_path / "photos")
    run = netgloss.explain("nmf", "critters", "block5", images, out=tmp_path / "run", num_concepts=3, seeds=1)
    (listed,) = run.concepts["unmatched"]
    assert listed["label"] == "a spotted beast"
    assert listed["images"] == sum(int(source.targets[i]) == 0 for i in range(24))
    assert listed["prediction"] in source.class_names
    for image in run.concepts["images"]:
        assert image["known"] == (image["label"] != "a spotted beast")
    assert run.concepts["mistakes"]["labelled"] == 24 - listed["images"]


def test_a_run_folder_holds_everything(nmf_run: Run) -> None:
    names = {p.name for p in nmf_run.path.iterdir()}
    assert {"run.json", "explainer.safetensors", "explainer-seed1.safetensors", "scores.json", "concepts.json"} <= names
    assert {"images", "report.html", "activations.zarr"} <= names
    assert nmf_run.manifest["status"] == "complete"
    assert (
        nmf_run.manifest["versions"]["torch"] == torch.__version__.split("+")[0]
        or nmf_run.manifest["versions"]["torch"]
    )
    assert set(nmf_run.manifest["times"]) == {"capture", "fit seed 0", "fit seed 1", "evaluate", "explanations"}
    assert not list(nmf_run.path.rglob("*.part*"))
    assert not list(nmf_run.path.rglob("*.pkl"))


def test_scores_have_exactly_the_promised_fields(nmf_run: Run) -> None:
    records = json.loads((nmf_run.path / "scores.json").read_text())
    assert [list(r) for r in records] == [SCORE_FIELDS] * len(records)
    assert [f.name for f in fields(Score)] == SCORE_FIELDS
    scores = {s.metric: s for s in nmf_run.scores}
    expected = {"r2", "r2_feature_mean", "agreement", "kl", "accuracy_change", "l0", "hoyer", "dead_share", "stability"}
    assert expected | {"collinearity"} <= set(scores)
    r2 = scores["r2"]
    assert set(r2.baselines) == {
        "random_directions",
        "natural_axes",
        "shuffled_codes",
        "mean_activation",
        "untrained_network",
    }
    assert r2.low is not None
    assert r2.value is not None
    assert r2.low < r2.value < r2.high
    assert r2.baselines["mean_activation"] == pytest.approx(0, abs=0.1)
    assert r2.baselines["shuffled_codes"] < r2.baselines["mean_activation"] < r2.value
    assert r2.n == nmf_run.manifest["data"]["num_heldout"] == 20
    assert r2.seeds == 2
    assert "untrained_network" not in scores["agreement"].baselines
    assert set(scores["stability"].baselines) == {"random_dictionary", "shuffled_dictionary"}


def test_the_store_in_a_run_folder_moves_with_it(nmf_run: Run, tmp_path: Path) -> None:
    (tmp_path / "activations.zarr").mkdir()
    (tmp_path / "run.json").write_text(json.dumps({**nmf_run.manifest, "store": "gone/activations.zarr"}))
    assert Run(tmp_path).store == str(tmp_path / "activations.zarr")
    (tmp_path / "run.json").write_text(json.dumps({**nmf_run.manifest, "store": "gone/other.zarr"}))
    assert Run(tmp_path).store == "gone/other.zarr"


def test_the_saved_explainer_works_without_its_folder(nmf_run: Run, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere.safetensors"
    copy.write_bytes((nmf_run.path / "explainer.safetensors").read_bytes())
    x = torch.rand(3, 112, 8, 8)
    torch.testing.assert_close(load_explainer(copy).encode(x), nmf_run.explainer.encode(x))
    assert nmf_run.explainer.encode(x).shape == (3, 6, 8, 8)
    assert nmf_run.explainer.spec.nonnegative


def test_contributions_add_up_to_the_logit(nmf_run: Run) -> None:
    assert nmf_run.manifest["tail"]["affine"]
    assert nmf_run.concepts["importance"]["kind"] == "exact"
    assert nmf_run.concepts["importance"]["completeness_gap"]["relative"] < 1e-4
    explained = [i["explained"] for i in nmf_run.concepts["images"] if i["explained"]]
    assert explained
    for image in explained:
        parts = sum(d["contribution"] for d in image["drivers"]) + image["others"]
        assert image["base"] + parts == pytest.approx(image["rebuilt"], abs=1e-3)
        assert image["base"] + parts + image["gap"] == pytest.approx(image["logit"], abs=1e-3)


def test_contributions_of_a_linear_model_are_its_terms() -> None:
    dictionary, weights = torch.randn(3, 5), torch.randn(5, 4)
    codes = torch.randn(2, 3, 2, 2)

    def decode(z: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bkhw,kc->bchw", z, dictionary) + 1

    def tail(x: torch.Tensor) -> torch.Tensor:
        return x.mean(dim=(2, 3)) @ weights + 2

    classes = torch.tensor([1, 3])
    found = contributions(decode, tail, codes, classes)
    expected = torch.einsum("bkhw,kc,cb->bk", codes, dictionary, weights[:, classes]) / 4
    torch.testing.assert_close(found.values, expected)
    torch.testing.assert_close(found.base, weights.sum(dim=0)[classes] + 2)
    torch.testing.assert_close(found.gap, torch.zeros(2), atol=1e-5, rtol=0)


def test_the_gap_says_what_a_curved_tail_hides() -> None:
    found = contributions(lambda z: z, lambda x: x**2, torch.tensor([[3.0]]), torch.tensor([0]))
    torch.testing.assert_close(found.values, torch.tensor([[18.0]]))
    torch.testing.assert_close(found.gap, torch.tensor([-9.0]))


def test_significant_counts_the_concepts_of_ninety_percent() -> None:
    values = torch.tensor([[8.0, 1.5, 0.5, -9.0], [1.0, 1.0, 1.0, 1.0], [-1.0, -2.0, -3.0, 0.0]])
    assert significant(values).tolist() == [2, 4, 0]


def test_the_strongest_images_are_the_strongest(nmf_run: Run) -> None:
    store = netgloss.Store.open(nmf_run.path / "activations.zarr")
    codes = nmf_run.explainer.encode(torch.from_numpy(store.read("block5", store.valid)).float())
    peaks = codes.amax(dim=(2, 3))
    content = nmf_run.concepts
    for concept in content["concepts"]:
        values = [entry["value"] for entry in concept["gallery"]]
        best = peaks[:, concept["id"]].topk(len(values)).values.tolist()
        assert sorted(values, reverse=True) == pytest.approx(best, rel=0.02)
        assert sum(concept["histogram"]["counts"]) == 100
    assert sum(c["importance"] for c in content["concepts"]) == pytest.approx(1, abs=1e-6)
    assert all((nmf_run.path / image["thumbnail"]).is_file() for image in content["images"])


def test_the_same_settings_continue_and_others_are_refused(nmf_run: Run) -> None:
    before = (nmf_run.path / "explainer.safetensors").stat().st_mtime_ns
    again = netgloss.explain(
        "nmf", "critters", "block5", "critters:100", out=nmf_run.path, num_concepts=6, seeds=2,
        evaluation=netgloss.EvaluationOptions(untrained_images=0),
    )  # fmt: skip
    assert (again.path / "explainer.safetensors").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"holds another run \(config: .*'num_concepts': 6.*choose another --out"):
        netgloss.explain("nmf", "critters", "block5", "critters:100", out=nmf_run.path, num_concepts=7, seeds=2)
    with pytest.raises(UserError, match="holds something else: images"):
        netgloss.explain("nmf", "critters", "block5", "critters:90", out=nmf_run.path, num_concepts=6, seeds=2)


def test_judging_on_the_images_of_the_fit_is_refused() -> None:
    with pytest.raises(UserError, match="are evaluated on other images"):
        open_sources("critters:12", "critters:12")
    assert len(open_sources("critters:12", "critters:12,seed=5")) == 24


def test_a_refused_first_try_is_not_in_the_way(tmp_path: Path) -> None:
    options = {"out": tmp_path / "r", "seeds": 1, "evaluation": netgloss.EvaluationOptions(untrained_images=0)}
    with pytest.raises(UserError, match="NMF needs activations >= 0"):
        netgloss.explain("nmf", "critters", "block5.norm", "critters:40", num_concepts=3, **options)
    run = netgloss.explain("pca", "critters", "block5.norm", "critters:40", num_concepts=4, **options)
    assert (run.method, run.manifest["config"]["num_concepts"], run.manifest["status"]) == ("pca", 4, "complete")


def test_show_explains_a_new_image(nmf_run: Run, tmp_path: Path) -> None:
    netgloss.open_images("critters:3,seed=9").image(2).save(tmp_path / "new.png")
    (explanation,) = netgloss.show(nmf_run, tmp_path / "new.png", out=tmp_path / "shown")
    picture, numbers = explanation.files
    with Image.open(picture) as image:
        assert image.size[0] > 400
    told = json.loads(numbers.read_text())
    total = told["base"] + sum(told["contributions"].values()) + told["gap"]
    assert total == pytest.approx(told["logit"], abs=1e-3)
    assert 0 < told["probability"] <= 1
    assert len(told["contributions"]) == 6


@pytest.mark.parametrize("method", ["pca", "ica", "kmeans", "topk-sae", "natural-axes", "random-directions"])
def test_every_method_makes_a_run(method: str, nmf_run: Run, tmp_path: Path) -> None:
    options = {"steps": 40, "batch_size": 256, "top_k": 3} if method == "topk-sae" else {}
    run = netgloss.explain(
        method,
        "critters",
        "block5",
        "critters:100",
        out=tmp_path / "run",
        store=nmf_run.path / "activations.zarr",
        num_concepts=6,
        seeds=2,
        evaluation=netgloss.EvaluationOptions(untrained_images=0),
        **options,
    )
    assert len(run.concepts["concepts"]) == 6
    scores = {s.metric: s.value for s in run.scores}
    assert scores["r2"] > (-0.5 if method == "random-directions" else 0.0)
    assert "</html>" in (run.path / "report.html").read_text()
    if method == "topk-sae":
        lines = read_history(run.path / "history.jsonl")
        assert [(entry["seed"], entry["step"]) for entry in lines] == [(0, 20), (0, 40), (1, 20), (1, 40)]


def test_a_module_of_your_own_with_hidden_layers(tmp_path: Path) -> None:
    class Residual(nn.Module):
        preprocessing_spec = {"size": [16, 16], "resize": [16, 16], "mean": [0.5] * 3, "std": [0.25] * 3}
        class_names = ["a", "b", "c"]

        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
            self.body = nn.Conv2d(8, 8, 3, padding=1)
            self.head = nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x).relu()
            return self.head((x + self.body(x)).relu().mean(dim=(2, 3)))

    torch.manual_seed(0)
    images = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
    options = netgloss.EvaluationOptions(untrained_images=20)
    run = netgloss.explain("pca", Residual(), "body", netgloss.open_images(images), out=tmp_path / "r", num_concepts=3,
                           seeds=1, evaluation=options)  # fmt: skip
    assert run.manifest["tail"]["mode"] == "replaced"
    assert any("replaced forwards" in w for w in run.manifest["warnings"])
    assert {s.metric for s in run.scores} >= {"r2", "agreement"}
    assert run.concepts["importance"]["kind"] == "gradient x concept"
    with pytest.raises(UserError, match="given as a module"):
        run.classifier()


def test_random_weights_are_told(nmf_run: Run, tmp_path: Path) -> None:
    untrained = netgloss.load_classifier("critters").untrained(0)
    options = netgloss.EvaluationOptions(untrained_images=0)
    run = netgloss.explain(
        "pca", untrained, "block5", "critters:20", out=tmp_path / "r", num_concepts=2, seeds=1, evaluation=options
    )
    assert any("random weights" in warning for warning in run.manifest["warnings"])
    assert not any("random weights" in warning for warning in nmf_run.manifest["warnings"])


def test_one_image_is_enough(tmp_path: Path) -> None:
    netgloss.open_images("critters:1").image(0).save(tmp_path / "only.png")
    run = netgloss.explain(
        "pca", "critters", "block5", tmp_path / "only.png", out=tmp_path / "r", num_concepts=2, seeds=1
    )
    assert any("too few images" in w for w in run.manifest["warnings"])
    assert (run.path / "report.html").exists()


KILLED = """
import sys, netgloss
from netgloss.training import FitOptions
FitOptions.__init__.__defaults__ = (0.0, 20, None)
class Slow:
    def start(self, task, *a, **k): self.fitting = task.startswith("fit")
    def advance(self, *a, **k):
        if self.fitting: print("step", flush=True); __import__("time").sleep(0.05)
    def finish(self): pass
    def say(self, m): pass
netgloss.explain("topk-sae", "critters", "block5", "critters:60", out={out!r}, num_concepts=8, top_k=2, steps=400,
                 batch_size=64, seeds=1, device=netgloss.Execution(progress=Slow()),
                 evaluation=netgloss.EvaluationOptions(untrained_images=0))
"""


def test_a_killed_run_continues_to_the_same_result(tmp_path: Path) -> None:
    code = KILLED.format(out=str(tmp_path / "killed"))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(9):
        assert process.stdout.readline() == "step\n"
    time.sleep(0.03)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert list((tmp_path / "killed").glob("*.checkpoint.safetensors"))
    again = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0 < again.stdout.count("step") <= 12
    whole = KILLED.format(out=str(tmp_path / "whole"))
    subprocess.run([sys.executable, "-c", whole], capture_output=True, check=True)
    killed, undisturbed = Run(tmp_path / "killed"), Run(tmp_path / "whole")
    first, second = killed.explainer.state_dict(), undisturbed.explainer.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in second)
    assert not list(killed.path.glob("*.checkpoint.safetensors"))
    steps = [[e["step"] for e in read_history(r.path / "history.jsonl")] for r in (killed, undisturbed)]
    assert steps[0] == steps[1] == list(range(20, 401, 20))
    assert [s.value for s in killed.scores] == [s.value for s in undisturbed.scores]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: (p / "run.json").write_text("{"), "not readable JSON"),
        (lambda p: (p / "run.json").write_text("[]"), "not a run folder"),
        (lambda p: (p / "run.json").unlink(), "has no run.json"),
        (lambda p: (p / "explainer.safetensors").write_bytes(b"\0" * 40), "not a readable safetensors"),
        (lambda p: (p / "explainer.safetensors").unlink(), "the fit has not ended"),
    ],
)
def test_damaged_run_folders_are_one_line(nmf_run: Run, tmp_path: Path, change, message: str) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(nmf_run.path, copy, ignore=shutil.ignore_patterns("activations.zarr", "images"))
    change(copy)
    with pytest.raises(UserError, match=message):
        assert netgloss.load(copy).explainer


def test_json_is_strict() -> None:
    assert json.loads(to_json({"a": float("nan"), "b": [float("inf"), 1.5], "c": "é"})) == {
        "a": None,
        "b": [None, 1.5],
        "c": "é",
    }


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = python_blocks(ROOT / "README.md")
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})

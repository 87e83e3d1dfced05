"""The comparison: paired differences by arithmetic, the sweep, resuming, refusals, methods from a file, its files."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import netgloss
from netgloss.cli import main
from netgloss.errors import UserError
from netgloss.evaluation import judge as judging
from netgloss.evaluation.faithful import FaithfulnessOptions
from netgloss.evaluation.paired import Difference, Measured, difference
from netgloss.evaluation.scores import _dictionary_verdict, _mark
from netgloss.metrics.base import ImageMetric, Score
from netgloss.report.comparison import comparison_page
from netgloss.runs.comparison import Comparison
from netgloss.workflows.capture import store_info
from netgloss.workflows.compare import compare
from netgloss.workflows.fit import fit
from test_cli import fails

LITTLE = FaithfulnessOptions(images=4, importance_images=2, steps=3, shapley_pairs=2, sobol_points=2)
METHOD = '''
from netgloss.explainers.random_directions import RandomDirections as _Base

class FirstFeatures(_Base):
    """The first K features."""

    deterministic = True

    def fit_rows(self, rows, *, seed):
        super().fit_rows(rows, seed=seed)
        self.atoms.zero_()
        self.atoms[range(self.num_concepts), range(self.num_concepts)] = 1
        self.filters.copy_(self.atoms)
'''


class MeanNumber(ImageMetric):
    """Mean of a number an image."""

    inputs = ("number",)

    def statistics(self, *, number: Tensor) -> Tensor:
        return number.double()[:, None]

    def score(self, sums: Tensor, count: Tensor) -> Tensor:
        return sums[..., 0] / count


def filled(numbers: Tensor, order: Tensor | None = None) -> MeanNumber:
    metric = MeanNumber()
    order = torch.arange(len(numbers)) if order is None else order
    for part in order.split(7):
        metric.update(part, number=numbers[part])
    return metric


# -- paired differences -----------------------------------------------------------------------------------------------


def test_replicates_of_two_methods_are_paired_whatever_the_order() -> None:
    """b = a + 1 in every image: the difference is 1 on every resample, though each score alone is uncertain."""
    g = torch.Generator().manual_seed(0)
    numbers = torch.randn(100, generator=g) * 10
    a = Measured.of([filled(numbers, torch.randperm(100, generator=g))], "images")
    b = Measured.of([filled(numbers + 1)], "images")
    assert a.replicates.std() > 0.5
    found = difference(b, a)
    assert (found.value, found.low, found.high) == pytest.approx((1, 1, 1), abs=1e-4)
    assert found.verdict(True) == "better"
    assert difference(a, b).verdict(True) == "worse"


def test_width_is_that_of_the_differences_between_images() -> None:
    g = torch.Generator().manual_seed(1)
    hard = torch.randn(400, generator=g) * 10
    noise = torch.randn(400, generator=g)
    a, b = (Measured.of([filled(x)], "images") for x in (hard + noise, hard))
    half = (difference(a, b).high - difference(a, b).low) / 2
    assert half == pytest.approx(1.96 * float(noise.std()) / 20, rel=0.2), "the spread of hard, ten times it, cancels"


def test_fits_add_welchs_part() -> None:
    """Fits 1, 3 and 0, 0, 3: variances 2 / 2 and 3 / 3, degrees (1 + 1)^2 / (1 / 1 + 1 / 2) = 2.67, taken as 2."""
    same = torch.zeros(2, 5, dtype=torch.float64)
    a = Measured(torch.tensor([1.0, 3.0]), same, "i")
    b = Measured(torch.tensor([0.0, 0.0, 3.0]), torch.zeros(3, 5, dtype=torch.float64), "i")
    found = difference(a, b)
    half = 4.302653 * 2**0.5
    assert (found.value, found.low, found.high) == pytest.approx((1, 1 - half, 1 + half), rel=1e-5)


def test_only_the_same_images_can_be_paired() -> None:
    values, replicates = torch.zeros(1), torch.zeros(1, 5)
    with pytest.raises(UserError, match="same images"):
        difference(Measured(values, replicates, "a"), Measured(values, replicates, "b"))
    with pytest.raises(UserError, match="same images and replicates"):
        difference(Measured(values, replicates, "a"), Measured(values, torch.zeros(1, 6), "a"))


@pytest.mark.parametrize(
    ("ends", "better", "verdict"),
    [
        ((0.1, 0.3), True, "better"),
        ((0.1, 0.3), False, "worse"),
        ((0.1, 0.3), None, "higher"),
        ((-0.3, -0.1), None, "lower"),
        ((-0.1, 0.3), True, "same"),
        ((0.0, 0.3), True, "same"),
        ((float("nan"), float("nan")), True, "unknown"),
    ],
)
def test_verdict(ends: tuple[float, float], better: bool | None, verdict: str) -> None:
    assert Difference(sum(ends) / 2, *ends).verdict(better) == verdict


def test_a_mark_needs_every_control() -> None:
    assert _mark(["better", "better"]) == "beats random"
    assert _mark(["better", "same"]) == "not distinguishable from random"
    assert _mark(["better", "worse"]) == "worse than random"
    assert _mark(["higher", "lower"]) == "differs from random"
    assert _mark(["better", "unknown"]) == "beats random"
    assert _mark(["unknown"]) == _mark([]) == ""


def test_a_dictionary_score_is_compared_with_the_best_random_one() -> None:
    def mark(value: float, low: float | None, high: float | None, better: bool | None, **others: float) -> str:
        score = Score("m", value, low, high, dict(others), 3, 1, better, "")
        return str(_dictionary_verdict(score)["mark"])

    assert mark(0.9, 0.8, 1.0, True, random_dictionary=0.3, shuffled_dictionary=0.7) == "beats random"
    assert (
        mark(0.9, 0.6, 1.0, True, random_dictionary=0.3, shuffled_dictionary=0.7) == "not distinguishable from random"
    )
    assert mark(0.2, None, None, False, random_directions=0.1) == "worse than random"
    assert mark(1e-8, None, None, False, random_directions=2e-9) == "not distinguishable from random", "rounding"
    assert mark(0.9, 0.8, 1.0, True, untrained_network=0.3) == mark(0.9, 0.8, 1.0, None, random_dictionary=0.3) == ""


# -- the sweep --------------------------------------------------------------------------------------------------------


def sweep(out: Path, methods: list[str], **more: Any) -> Comparison:
    return compare(
        out=out,
        methods=methods,
        model="critters",
        layer="block5",
        images="critters:60",
        num_concepts=6,
        seeds=2,
        faithfulness=LITTLE,
        device="cpu",
        **more,
    )


@pytest.fixture(scope="module")
def own_method(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("methods") / "first_features.py"
    path.write_text(METHOD)
    return str(path)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, own_method: str) -> tuple[Path, Comparison]:
    out = tmp_path_factory.mktemp("compare") / "out"
    methods = ["pca", "kmeans", "supervised-basis", own_method, "random-directions"]
    return out, sweep(out, methods, annotations="critters:30,seed=4", network_images=20)


def test_every_method_is_a_row_and_a_refused_one_says_why(swept: tuple[Path, Comparison]) -> None:
    _, found = swept
    assert found.methods == ["pca", "kmeans", "first_features", "random-directions"]
    assert "needs annotated images" in found.left_out["supervised-basis"]


def test_a_method_in_one_file_has_all_scores(swept: tuple[Path, Comparison]) -> None:
    _, found = swept
    wanted = {"r2", "agreement", "kl", "l0", "c_gain_logit", "c_carried_logit", "surrogate_departure", "collinearity"}
    wanted |= {"agreement_contribution_sobol", "dissection_mean_iou", "completeness", "hoyer", "dead_share"}
    assert "concept_shap_spread" in found.record["scores"]["pca"]
    assert wanted <= set(found.record["scores"]["first_features"])
    score = found.score("first_features", "r2")
    assert score is not None
    assert {"random_directions", "natural_axes", "shuffled_codes", "mean_activation", "untrained_network"} <= set(
        score["baselines"]
    )


def test_numbers_are_those_of_an_evaluation(swept: tuple[Path, Comparison]) -> None:
    """The same run, judged by evaluate: equal values, intervals and controls."""
    out, found = swept
    run = netgloss.Run(out / "runs" / "kmeans")
    netgloss.evaluate(run, options=netgloss.EvaluationOptions(untrained_images=0))
    for score in run.scores:
        got = found.score("kmeans", score.metric)
        assert got is not None, score.metric
        for name in ("value", "low", "high", "n", "seeds"):
            assert got[name] == pytest.approx(getattr(score, name), nan_ok=True), (score.metric, name)
        for name, value in score.baselines.items():
            if value is not None:
                assert got["baselines"][name] == pytest.approx(value), (score.metric, name)


def test_random_directions_are_not_distinguishable_from_random(swept: tuple[Path, Comparison]) -> None:
    _, found = swept
    for metric in ("r2", "agreement", "kl", "completeness"):
        assert found.mark("random-directions", metric) == "not distinguishable from random"
    assert found.mark("pca", "r2") == "beats random"


def test_differences_are_antisymmetric_and_add_up(swept: tuple[Path, Comparison]) -> None:
    _, found = swept
    pairs = found.pairs("r2")
    one, back = pairs["pca", "first_features"], pairs["first_features", "pca"]
    assert (one["value"], one["low"]) == (-back["value"], -back["high"])
    assert (one["verdict"], back["verdict"]) == ("better", "worse")
    own = [found.score(name, "r2")["value"] for name in ("pca", "first_features")]  # type: ignore[index]
    assert one["value"] == pytest.approx(own[0] - own[1])


def test_the_same_command_measures_nothing_again(
    swept: tuple[Path, Comparison], own_method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, first = swept

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("measured again")

    for name in ("measure", "measure_faithfulness"):
        monkeypatch.setattr(judging, name, never)
    again = sweep(
        out, ["pca", "kmeans", "supervised-basis", own_method, "random-directions"], annotations="critters:30,seed=4"
    )
    drop = {"untrained_network"}
    for method, scores in first.record["scores"].items():
        for metric, score in scores.items():
            other = again.record["scores"][method][metric]
            assert {k: v for k, v in score["baselines"].items() if k not in drop} == other["baselines"]
            assert {**score, "baselines": 0} == {**other, "baselines": 0}


def test_one_method_more_measures_that_method_only(
    swept: tuple[Path, Comparison], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = swept
    seen: list[str] = []
    real = judging.measure

    def counted(subjects: Any, *more: Any, **options: Any) -> Any:
        seen.extend(subjects)
        return real(subjects, *more, **options)

    monkeypatch.setattr(judging, "measure", counted)
    found = sweep(out, ["pca", "ica"], rehearsal=False)
    assert found.methods == ["pca", "ica"]
    assert len(seen) == 3, "two fits of ica and its shuffled codes; controls are those of pca"


def test_half_measured_numbers_are_measured_again(swept: tuple[Path, Comparison]) -> None:
    out, first = swept
    for path in sorted((out / "measured").glob("*.safetensors"))[::3]:
        path.write_bytes(path.read_bytes()[:50])
    again = sweep(out, ["pca"])
    assert again.record["scores"]["pca"]["r2"]["value"] == first.record["scores"]["pca"]["r2"]["value"]


def test_files(swept: tuple[Path, Comparison]) -> None:
    out, found = swept
    again = Comparison.load(out)
    assert set(again.methods) <= {*found.methods, "ica"}
    rows = list(csv.DictReader(io.StringIO(found.to_csv())))
    assert len(rows) == sum(len(scores) for scores in found.record["scores"].values())
    row = next(r for r in rows if (r["method"], r["metric"]) == ("pca", "r2"))
    assert float(row["value"]) == found.score("pca", "r2")["value"]  # type: ignore[index]
    assert row["mark"] == "beats random"
    assert float(row["baseline random_directions"]) < float(row["low"])
    page = comparison_page(found)
    assert "default-src 'none'" in page
    assert not re.search(r"(src|href)=[\"'](?!#)", page)
    assert "<script" not in page
    assert page.count("<svg") >= len(found.metrics)
    json.dumps(found.record, allow_nan=False)


def test_names_are_escaped(swept: tuple[Path, Comparison]) -> None:
    _, found = swept
    record = json.loads(json.dumps(found.record))
    evil = '<img src=x onerror=alert(1)>"=1+1'
    record["methods"][0]["name"] = evil
    for part in ("scores", "verdicts"):
        record[part][evil] = record[part].pop("pca")
    page = comparison_page(Comparison(record))
    assert "<img" not in page
    record["methods"][0]["name"] = "=1+1"
    record["scores"]["=1+1"] = record["scores"].pop(evil)
    record["verdicts"]["=1+1"] = record["verdicts"].pop(evil)
    assert "\n'=1+1," in Comparison(record).to_csv()


def test_a_method_that_breaks_does_not_stop_the_others(tmp_path: Path, swept: tuple[Path, Comparison]) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text(METHOD.replace("self.filters.copy_(self.atoms)", "raise RuntimeError('no luck')"))
    late = tmp_path / "late.py"
    late.write_text(METHOD + "\n    def encode_rows(self, rows):\n        raise ValueError('cannot encode')\n")
    out, _ = swept
    found = sweep(out, ["pca", str(broken), str(late)])
    assert found.methods == ["pca"]
    assert found.left_out["broken"] == "RuntimeError: no luck"
    assert "cannot encode" in found.left_out["late"]


def test_nmf_is_listed_where_activations_are_negative(tmp_path: Path) -> None:
    found = compare(
        out=tmp_path / "out",
        methods="nmf,pca",
        model="critters",
        layer="block5.conv",
        images="critters:30",
        num_concepts=3,
        seeds=1,
        faithfulness=FaithfulnessOptions(images=0),
        device="cpu",
    )
    assert found.methods == ["pca"]
    assert found.left_out["nmf"].startswith("NMF needs activations >= 0, but layer 'block5.conv'")


# -- runs -------------------------------------------------------------------------------------------------------------


def test_runs_of_one_store(swept: tuple[Path, Comparison], tmp_path: Path) -> None:
    out, first = swept
    runs = [out / "runs" / name for name in ("pca", "kmeans")]
    found = compare(runs, out=tmp_path / "two", faithfulness=LITTLE, device="cpu")
    assert found.methods == ["pca", "kmeans"]
    for name in found.methods:
        assert found.score(name, "r2")["value"] == first.score(name, "r2")["value"]  # type: ignore[index]


def test_runs_of_other_layers_or_stores_are_refused(swept: tuple[Path, Comparison], tmp_path: Path) -> None:
    out, _ = swept
    classifier = netgloss.load_classifier("critters")
    source = netgloss.open_images("critters:20")
    info = store_info(classifier, source)
    store = netgloss.capture(classifier, source, ["block4", "block5"], tmp_path / "store", info=info)
    one = fit("pca", store, "block4", tmp_path / "one", config=netgloss.find_explainer("pca").Config(num_concepts=2))
    two = fit("pca", store, "block5", tmp_path / "two", config=netgloss.find_explainer("pca").Config(num_concepts=2))
    with pytest.raises(UserError, match="explains layer 'block5', not 'block4'"):
        compare([one, two], out=tmp_path / "x", device="cpu")
    with pytest.raises(UserError, match="fitted on other activations"):
        compare([out / "runs" / "pca", two], out=tmp_path / "x", device="cpu")
    with pytest.raises(UserError, match="nothing to compare"):
        compare(out=tmp_path / "x")
    with pytest.raises(UserError, match="needs --layer, --images"):
        compare(methods="pca", model="critters", out=tmp_path / "x")
    with pytest.raises(UserError, match="did you mean"):
        sweep(tmp_path / "x", ["nfm"])


def test_faithfulness_joins_a_runs_scores(swept: tuple[Path, Comparison], capsys: pytest.CaptureFixture[str]) -> None:
    out, first = swept
    path = out / "runs" / "pca"
    command = ["evaluate", str(path), "--faithfulness", "--scores"]
    main([*command, "--images", "critters:60", "--untrained-images", "8"])
    assert "c_gain_logit" in capsys.readouterr().out
    main(command)  # what the images gave stays
    assert "untrained_network" in {score.metric: score for score in netgloss.Run(path).scores}["r2"].baselines
    assert not netgloss.Run(path).manifest["warnings"]
    scores = {score.metric: score for score in netgloss.Run(path).scores}
    assert {"r2", "c_carried_logit", "surrogate_departure", "agreement_contribution_sobol"} <= set(scores)
    assert {"random_directions", "natural_axes", "random_ranking"} <= set(scores["c_deletion_logit"].baselines)
    ours = {score.metric: score.value for score in netgloss.evaluate(path, faithfulness=LITTLE).scores}
    assert ours["c_gain_logit"] == first.score("pca", "c_gain_logit")["value"]  # type: ignore[index]
    again = [score.metric for score in netgloss.Run(path).scores]
    assert len(again) == len(set(again)) == len(scores)
    with pytest.raises(UserError, match="are not the images whose activations"):
        netgloss.evaluate(path, images="critters:9,seed=9", faithfulness=LITTLE)


# -- the command line -------------------------------------------------------------------------------------------------


def test_command(swept: tuple[Path, Comparison], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out, _ = swept
    runs = [str(out / "runs" / name) for name in ("pca", "kmeans")]
    main(["compare", *runs, "--out", str(tmp_path / "x"), "--faithfulness-images", "0"])
    told = capsys.readouterr().out
    assert "pca" in told
    assert "comparison.html" in told
    assert (tmp_path / "x" / "comparison.html").exists()


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "x")]
    assert "nothing to compare" in fails(capsys, "compare", *out)
    assert "no run folder at" in fails(capsys, "compare", str(tmp_path / "no"), *out)
    assert "--methods needs --model" in fails(capsys, "compare", "--methods", "all", *out)
    critters = [
        "compare",
        "--model",
        "critters",
        "--methods",
        "pca",
        "--layer",
        "block5",
        "--images",
        "critters:20",
        *out,
    ]
    assert "METHOD.FIELD=VALUE" in fails(capsys, *critters, "--set", "steps")
    assert "NAME=PATH" in fails(capsys, *critters, "--dictionary", "file.npz")
    assert "nmf cannot take max_iter='many'" in fails(capsys, *critters, "--set", "nmf.max_iter=many")
    assert "max_images must be at least 1, got 0" in fails(capsys, *critters, "--max-images", "0")
    assert "network_images must not be negative, got -1" in fails(capsys, *critters, "--network-images", "-1")
    assert "on_rate must lie between 0 and 1, got 2" in fails(capsys, *critters, "--on-rate", "2")
    assert "has no option nope" in fails(capsys, *critters, "--set", "nmf.nope=3")
    assert "unknown method 'topksae'; did you mean topk-sae" in fails(capsys, *critters, "--set", "topksae.steps=3")
    assert "unknown method 'xyz'; choose basis" in fails(capsys, *critters, "--without", "xyz")
    too_many = fails(capsys, *critters, "--num-concepts", "500", "--seeds", "1")
    assert "nothing is left to compare: pca: " in too_many
    with pytest.raises(UserError, match="power of two"):
        FaithfulnessOptions(sobol_points=3)


# -- figures ----------------------------------------------------------------------------------------------------------


def record(value: float, low: float | None = None, high: float | None = None) -> dict[str, Any]:
    baselines = {"random_directions": value / 2, "shuffled_codes": None}
    return {"value": value, "low": low, "high": high, "baselines": baselines, "higher_is_better": True}


def test_dot_plot_draws_values_intervals_and_marks() -> None:
    from netgloss.figures.comparison import method_dots

    marks = ["beats random", "not distinguishable from random", ""]
    figure = method_dots(["a", "b", "c"], [record(0.5, 0.4, 0.6), record(0.2), None], marks)
    lines = figure.axes[0].get_lines()
    drawn = {(line.get_marker(), tuple(line.get_xdata())) for line in lines}
    assert ("o", (0.5,)) in drawn
    assert ("D", (0.25,)) in drawn
    assert any(tuple(line.get_xdata()) == (0.4, 0.6) for line in lines)
    dots = [line for line in lines if line.get_marker() == "o"]
    assert [dot.get_markerfacecolor() == "white" for dot in dots] == [False, True]
    with pytest.raises(UserError, match="at least one score"):
        method_dots(["a"], [None], [""])


def test_front_joins_what_no_other_beats() -> None:
    from netgloss.figures.comparison import front

    points = [
        {"name": "sparse", "x": record(1.0), "y": record(0.2)},
        {"name": "dense", "x": record(8.0), "y": record(0.9)},
        {"name": "beaten", "x": record(9.0), "y": record(0.5)},
        {"name": "control", "x": record(0.5), "y": record(0.95), "control": True},
    ]
    figure = front(points, x_label="l0", y_label="r2", log_x=True)
    dashed = [line for line in figure.axes[0].get_lines() if line.get_linestyle() == "--"]
    assert [tuple(line.get_xdata()) for line in dashed] == [(1.0, 8.0)]

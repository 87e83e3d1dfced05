"""What the first screen says: of scores, of the share that concepts explain, of classes, and whether to trust."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from made_runs import make_run, write
from netgloss.metrics.faithfulness.importance import explained_share, typical_share
from netgloss.runs import verdicts
from netgloss.runs.doubts import trust, what_to_distrust
from netgloss.runs.files import RunFiles, read_run
from netgloss.runs.verdicts import ROUNDING, named_classes, verdict

Change = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> RunFiles:
    folder = make_run(tmp_path_factory.mktemp("made") / "run")
    scores = json.loads((folder / "scores.json").read_text())
    for score in scores:
        score["baselines"] = {"random_directions": 0.0 if score["higher_is_better"] else 9.0}
    write(folder / "scores.json", scores)
    return read_run(folder)


def changed(files: RunFiles, **changes: Change) -> RunFiles:
    """A copy of the run whose ``run``, ``concepts`` or ``scores`` a function has changed."""
    copies = json.loads(json.dumps({"run": files.run, "concepts": files.concepts, "scores": files.scores}))
    for name, change in changes.items():
        change(copies[name])
    return RunFiles(files.folder, copies["run"], copies["concepts"], copies["scores"], files.history)


def with_share(files: RunFiles, share: float) -> RunFiles:
    record = {"share": share, "low": share - 0.05, "high": share + 0.05, "images": 200}
    return changed(files, concepts=lambda content: content["importance"].update(explained=record))


def record(value: float, **baselines: float) -> dict[str, Any]:
    score = {"metric": "auc", "value": value, "low": value - 0.01, "high": value + 0.01, "n": 500}
    return score | {"higher_is_better": True, "baselines": baselines}


# -- the share of a prediction that the concepts explain --------------------------------------------------------------


@pytest.mark.parametrize(
    ("logit", "base", "gap", "share"),
    [(11.8, 0.0, 10.1, 1 - 10.1 / 11.8), (5.0, 1.0, 0.0, 1.0), (5.0, 1.0, -2.0, 0.5), (2.0, 1.0, 9.0, 0.0)],
)
def test_the_share_is_of_the_networks_own_logit(logit: float, base: float, gap: float, share: float) -> None:
    numbers = [torch.tensor([value], dtype=torch.float64) for value in (logit, base, gap)]
    assert float(explained_share(*numbers)) == pytest.approx(share)


def test_a_logit_that_is_its_base_has_no_share() -> None:
    one = torch.tensor([3.0])
    assert explained_share(one, one, torch.zeros(1)).isnan().all()
    assert typical_share(explained_share(one, one, torch.zeros(1))) is None


@given(st.lists(st.floats(0, 1), min_size=1, max_size=200))
def test_the_interval_of_the_median_holds_the_median(values: list[float]) -> None:
    shares = torch.tensor(values, dtype=torch.float64)
    typical = typical_share(torch.cat([shares, torch.tensor([torch.nan])]))
    assert typical is not None
    middle, low, high = typical
    assert middle == pytest.approx(float(shares.quantile(0.5)))
    assert (low is None) == (high is None) == (len(values) < 6)
    if low is not None and high is not None:
        assert low <= middle <= high


def test_the_interval_covers_the_true_median_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(300):
        typical = typical_share(torch.rand(25, generator=generator) ** 2)
        assert typical is not None
        hits += typical[1] <= 0.25 <= typical[2]
    assert 0.93 <= hits / 300 <= 1


def test_the_alarm_and_the_light_read_the_same_number(made: RunFiles) -> None:
    little = with_share(made, 0.36)
    text = "36 % of a typical prediction (31 to 41 %)"
    first = what_to_distrust(little, [])[0]
    assert first.grave
    assert text in first.text
    assert trust(little).light == "red"
    assert text in trust(little).sentence
    much = with_share(made, 0.93)
    assert not any("typical prediction" in answer.text for answer in what_to_distrust(much, []))
    assert trust(much).light != "red"


def test_older_runs_have_the_median_of_their_explained_images(made: RunFiles) -> None:
    typical = verdicts.typical_share(made)
    assert typical is not None
    assert typical["share"] == pytest.approx(1 - 0.02 / 11.3)
    assert typical["images"] == 12


# -- which classes a concept is said to stand for ---------------------------------------------------------------------


def served(**classes: tuple[float, int]) -> dict[str, Any]:
    return {"classes": [{"class": n, "contribution": c, "images": i} for n, (c, i) in classes.items()]}


def test_one_image_does_not_name_a_class() -> None:
    concept = served(tench=(15.0, 12), shovel=(16.0, 1), coat=(0.076, 40), horn=(3.1, 5), drum=(9.0, 4))
    assert [entry["class"] for entry in named_classes(concept, [])] == ["tench", "horn"]


def test_an_older_run_counts_the_images_of_its_class_pages() -> None:
    concept = {"classes": [{"class": n, "contribution": 1.0, "images": None} for n in ("tench", "shovel", "drum")]}
    pages = [{"class": "tench", "num_images": 9}, {"class": "shovel", "num_images": 1}]
    assert [entry["class"] for entry in named_classes(concept, pages)] == ["tench"]


# -- badges ------------------------------------------------------------------------------------------------------------


@given(st.floats(0.8, 1), st.floats(-1, 1), st.booleans())
def test_rounding_is_no_difference(value: float, part: float, better: bool) -> None:
    baseline = value + 0.99 * part * ROUNDING
    score = {"metric": "any", "value": value, "low": None, "high": None, "n": 500}
    assert verdict(score | {"higher_is_better": better, "baselines": {"a": baseline}}).standing == "tie"


def test_a_perfect_reconstruction_is_not_worse_than_a_perfect_baseline() -> None:
    score = {"metric": "r2", "value": 0.9999999999993, "low": 0.9999999999991, "high": 0.9999999999995, "n": 500}
    assert verdict(score | {"higher_is_better": True, "baselines": {"natural_axes": 1.0}}).standing == "tie"


@pytest.mark.parametrize(
    ("metric", "value", "standing"),
    [
        ("stability", 0.33, "poor"),
        ("stability", 0.6, "fair"),
        ("stability", 0.9, "better"),
        ("agreement", 0.6, "poor"),
        ("kl", 1.5, "poor"),
        ("kl", 0.5, "fair"),
        ("kl", 0.1, "better"),
    ],
)
def test_a_low_value_is_not_green_however_low_the_baselines(metric: str, value: float, standing: str) -> None:
    better = metric != "kl"
    score = record(value, random=0.0 if better else 9.0) | {"metric": metric, "higher_is_better": better}
    assert verdict(score).standing == standing
    assert ("below 0.500" in verdict(score).words) == (metric == "stability" and standing == "poor")


def test_a_value_that_is_low_and_worse_says_both() -> None:
    said = verdict(record(0.3, untrained_network=0.7) | {"metric": "r2"})
    assert said.standing == "poor"
    assert "worse than untrained network" in said.words


def test_images_that_count_by_construction_are_no_evidence() -> None:
    score = record(1.0, random=0.1) | {"metric": "agreement", "n": 36}
    assert verdict(score, constructed=0).standing == "better"
    said = verdict(score, constructed=22)
    assert said.standing == "poor"
    assert "22 of 36 images count by construction" in said.words
    assert verdict(score | {"metric": "r2"}, constructed=22).standing == "better"


def test_what_matters_for_a_decision_comes_first(made: RunFiles) -> None:
    def spoil(content: dict[str, Any]) -> None:
        for concept in content["concepts"]:
            concept["stability"] = 0.2
        content["importance"]["explained"] = {"share": 0.3, "low": None, "high": None, "images": 12}

    def worse(scores: Any) -> None:
        scores[0]["baselines"]["untrained_network"] = 0.95
        scores[2]["value"] = 0.2

    files = changed(made, concepts=spoil, scores=worse, run=lambda run: run.update(num_judged=12))
    texts = [answer.text for answer in what_to_distrust(files, [])]
    order = [
        "explain only 30 %",
        "6 concepts of 6 did not come back",
        "Stability is 0.200",
        "Only 12 images",
        "Worse than",
    ]
    places = [next(i for i, text in enumerate(texts) if words in text) for words in order]
    assert places == [0, 1, 2, 3, 4]
    assert "± 28 percentage points" in texts[3]
    assert trust(files).light == "red"


@pytest.mark.parametrize(("judged", "said"), [(12, True), (49, True), (50, False), (500, False)])
def test_few_images_are_said(made: RunFiles, judged: int, said: bool) -> None:
    files = with_share(changed(made, run=lambda run: run.update(num_judged=judged)), 0.95)
    assert any("percentage points" in answer.text for answer in what_to_distrust(files, [])) == said
    assert ("scored" in trust(files).sentence) == said


def test_the_light_is_green_only_where_nothing_is_open(made: RunFiles) -> None:
    def stable(content: dict[str, Any]) -> None:
        for concept in content["concepts"]:
            concept["stability"] = 0.9

    files = with_share(changed(made, concepts=stable), 0.93)
    assert trust(files).light == "green"
    assert "the concepts explain 93 %" in trust(files).sentence
    assert trust(with_share(files, 0.6)).light == "amber"

    def unstable(content: dict[str, Any]) -> None:
        for concept in content["concepts"][:4]:
            concept["stability"] = 0.1

    lost = trust(changed(files, concepts=unstable))
    assert lost.light == "red"
    assert "4 of 6 concepts did not come back" in lost.sentence
    assert trust(RunFiles(files.folder, files.run, files.concepts, None, [])).light == "red"


# -- a concept in one sentence -----------------------------------------------------------------------------------------


def shows(labels: list[str], **classes: tuple[float, int]) -> str:
    images = [{"label": label, "prediction": None} for label in labels]
    concept = served(**classes) | {"gallery": [{"image": i} for i in range(len(labels))]}
    return verdicts.concept_sentence(concept, {"images": images, "classes": []})


def test_a_concept_is_one_sentence_about_its_strongest_images() -> None:
    assert shows(["tench"] * 9, tench=(15.0, 12)) == "Strongest on tench, 9 of 9; +15.0 to its logit."
    assert shows(["tench"] * 5 + ["coat"], coat=(2.0, 6)) == "Strongest on tench, 5 of 6; +2.00 to coat."
    assert shows(["a", "b", "c", "a"]) == "Strongest on a (2 of 4), b (1) and c (1)."
    assert shows(["a"] * 3, a=(15.0, 1)) == "Strongest on a, 3 of 3."
    assert shows([]) == "Never active in these images."

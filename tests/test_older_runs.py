"""Run folders that version 0.1.0 wrote before the redesign still load, and give the same numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import netgloss
from netgloss.report.write import write_comparison

OLDER = Path(__file__).parent / "older_runs"


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> netgloss.Run:
    """A copy of the older run, beside its activations captured again."""
    folder = tmp_path_factory.mktemp("older")
    shutil.copytree(OLDER / "nmf", folder / "nmf")
    classifier, images = netgloss.load_classifier("critters"), netgloss.open_images("critters:160")
    store = netgloss.capture(classifier, images, ["block5"], folder / "nmf" / "activations.zarr")
    run = netgloss.load(folder / "nmf")
    run.update(store=str(store.path))
    return run


def test_an_older_run_loads(older: netgloss.Run) -> None:
    recorded = json.loads((OLDER / "nmf" / "scores.json").read_text())
    assert [(s.metric, s.value, s.low, s.high) for s in older.scores] == [
        (r["metric"], r["value"], r["low"], r["high"]) for r in recorded
    ]
    assert len(older.explainers()) == 2
    assert [concept["id"] for concept in older.concepts["concepts"]] == list(range(8))


def test_judged_again_it_has_the_same_scores(older: netgloss.Run) -> None:
    annotated = ("dissection_", "part_", "location_", "peak_")
    before = {s.metric: s for s in older.scores if not s.metric.startswith(annotated)}
    again = {s.metric: s for s in netgloss.evaluate(older, images="critters:160", device="cpu").scores}
    assert {"r2", "kl", "agreement", "stability", "completeness"} <= set(before)
    for name, was in before.items():
        now = again[name]
        assert (now.value, now.low, now.high) == pytest.approx((was.value, was.low, was.high), abs=2e-3), name
        assert now.baselines == pytest.approx(was.baselines, abs=2e-3), name
    assert netgloss.write_report(older).stat().st_size > 100_000


def test_an_older_comparison_becomes_a_page(tmp_path: Path) -> None:
    shutil.copytree(OLDER / "compare", tmp_path / "compare")
    write_comparison(netgloss.Comparison.load(tmp_path / "compare"), tmp_path / "again")
    text = (tmp_path / "again" / "comparison.html").read_text()
    assert all(name in text for name in ("nmf", "topk-sae", "random-directions"))

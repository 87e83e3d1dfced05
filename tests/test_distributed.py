"""Several processes give what one gives: the same store byte for byte, the same fit and scores within rounding."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import netgloss
from netgloss.runs.run import Run

NETGLOSS = [sys.executable, "-m", "netgloss.cli"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29561", "-m",
            "netgloss.cli"]  # fmt: skip
TWO = ["--device", "cpu", "--devices", "2"]
IMAGES = "critters:600"
FITTING = ["--num-concepts", "8", "--top-k", "2", "--steps", "30", "--batch-size", "64", "--aux-weight", "0", "--seeds",
           "1"]  # fmt: skip
EXPLAIN = ["explain", "topk-sae", "--model", "critters", "--layer", "block5", "--images", IMAGES, *FITTING,
           "--untrained-images", "0"]  # fmt: skip


def command(arguments: Sequence[str], start: Sequence[str] = NETGLOSS, code: int = 0) -> str:
    done = subprocess.run([*start, *arguments], capture_output=True, text=True, timeout=240)
    assert done.returncode == code, done.stderr
    return done.stderr


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("alone") / "run"
    command([*EXPLAIN, "--device", "cpu", "--out", str(out)])
    return netgloss.load(out)


def scores(run: Run) -> dict[str, list[float]]:
    """Value, interval and baselines of each metric; what is undefined is NaN."""
    found = {s.metric: [s.value, s.low, s.high, *s.baselines.values()] for s in run.scores}
    return {name: [float("nan") if v is None else v for v in values] for name, values in found.items()}


@pytest.mark.parametrize("start", [NETGLOSS, TORCHRUN], ids=["fabric", "torchrun"])
def test_two_processes_give_what_one_gives(start: list[str], alone: Run, tmp_path: Path) -> None:
    """The whole way, started by Fabric and by torchrun with the same flags."""
    command([*EXPLAIN, *TWO, "--out", str(tmp_path / "run")], start)
    run = netgloss.load(tmp_path / "run")
    assert run.manifest["status"] == "complete"
    assert files(run.path / "activations.zarr") == files(alone.path / "activations.zarr")
    ours, theirs = run.explainer.state_dict(), alone.explainer.state_dict()
    for name in ("encoder", "decoder", "bias"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-3)
    assert (run.path / "report.html").exists()
    found, expected = scores(run), scores(alone)
    assert found.keys() == expected.keys()
    assert found["r2"][0] == pytest.approx(expected["r2"][0], abs=1e-3)


def test_shared_evaluation_gives_the_scores_of_one_process(alone: Run, tmp_path: Path) -> None:
    """The same explainer: only the order of float64 sums differs."""
    shutil.copytree(alone.path, tmp_path / "run", ignore=shutil.ignore_patterns("scores.json", "concepts.json"))
    command(["evaluate", str(tmp_path / "run"), "--images", IMAGES, "--untrained-images", "0", *TWO])
    found, expected = scores(netgloss.load(tmp_path / "run")), scores(alone)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=1e-9, abs=1e-12, nan_ok=True), name


NETWORK_FITS = {
    "parts": ["--layer", "block4", "--upper", "block5", "--steps", "40", "--batch-size", "32"],
    "cladec": ["--layer", "block5", "--images", "critters:120", "--size", "16", "--width", "8", "--steps", "40",
               "--batch-size", "32", "--alpha", "0.5"],
}  # fmt: skip


TERM = {"parts": "rebuild block5", "cladec": "reconstruction"}


@pytest.mark.parametrize("method", NETWORK_FITS)
def test_methods_that_read_the_network_fit_in_two_processes(method: str, tmp_path: Path) -> None:
    """Images, upper layers and the classifier's gradient reach every process; both end with one explainer.

    Each process takes the batch statistics of its half (the filter loss compares images, the norms average them), so
    that the fits are near each other, not equal.
    """
    store = str(tmp_path / "store")
    command(
        ["capture", "--model", "critters", "--layer", "block4", "block5", "--images", "critters:120", "--out", store]
    )
    fitting = ["fit", method, "--store", store, "--seeds", "1", *NETWORK_FITS[method]]
    command([*fitting, "--out", str(tmp_path / "one"), "--device", "cpu"])
    command([*fitting, "--out", str(tmp_path / "two"), *TWO])
    last = []
    for name in ("one", "two"):
        run = netgloss.load(tmp_path / name)
        assert all(v.isfinite().all() for v in run.explainer.state_dict().values())
        lines = [json.loads(line) for line in (run.path / "history.jsonl").read_text().splitlines()]
        assert lines[-1][TERM[method]] < lines[0][TERM[method]]
        last.append(rebuilding_error(run) if method == "parts" else lines[-1][TERM[method]])
    assert last[1] == pytest.approx(last[0], rel=0.2)


def rebuilding_error(run: Run) -> float:
    """Squared error of block5 rebuilt from block4, as a share, over all images (a batch of the fit is too few)."""
    store = netgloss.activations.Store.open(run.store)
    below, above = (torch.from_numpy(store.read(layer, slice(0, 120))).float() for layer in ("block4", "block5"))
    with torch.no_grad():
        found = run.explainer(below)["block5"]
    return float((found - above).square().sum() / above.square().sum())


def test_a_mistake_ends_all_processes_with_one_line(alone: Run, tmp_path: Path) -> None:
    error = command(["fit", "pca", "--store", str(alone.path / "activations.zarr"), "--out", str(alone.path),
                     "--num-concepts", "3", "--seeds", "1", *TWO], code=2)  # fmt: skip
    assert "Traceback" not in error
    assert sum("holds another run" in line for line in error.splitlines()) == 1

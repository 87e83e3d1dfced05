"""Paths and names that are legal and unusual: of images, classes, results, and files with networks and methods."""

from __future__ import annotations

import os
import string
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import netgloss
from netgloss.classifiers import load_classifier
from netgloss.cli import main
from netgloss.data import open_images
from netgloss.data.sources import refuse_among_images
from netgloss.errors import UserError
from netgloss.trust import code_file

SIBLING = """
from torch import nn
WIDTH = {width}
def body():
    return nn.Sequential(nn.Conv2d(3, WIDTH, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 2))
"""
FACTORY = """
import torch
import beside
def make():
    import later
    torch.manual_seed(0)
    net = beside.body()
    net.preprocessing_spec = {"size": (16, 16), "resize": (16, 16), "mean": (0.5,) * 3, "std": (0.25,) * 3}
    return net
"""
ODD = string.ascii_letters + string.digits + " :#%[](){}&'\"+=,;!@~é☃"
NAMES = st.text(ODD, min_size=1, max_size=20).map(str.strip).filter(lambda name: name and name.strip("."))


def pictures(folder: Path, count: int = 5, seed: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (count, 20, 20, 3), dtype=np.uint8)
    for i, pixels in enumerate(values):
        Image.fromarray(pixels).save(folder / f"image #{i}: %41.png")


def network(folder: Path, width: int = 4) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "beside.py").write_text(SIBLING.format(width=width))
    (folder / "later.py").write_text("")
    (folder / "my net.py").write_text(FACTORY)
    return f"{folder / 'my net.py'}:make"


@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(NAMES, min_size=4, max_size=4, unique_by=str.casefold))
def test_any_names_of_folders_classes_and_results(tmp_path: Path, names: list[str]) -> None:
    one, two, out, code = names
    root = tmp_path / f"{out} images"
    for seed, name in enumerate((one, two)):
        pictures(root / name, count=8, seed=seed)
    model = network(tmp_path / code)
    run = netgloss.explain(
        "pca", load_classifier(model, random_weights=True), "1", root, out=tmp_path / f"{out} run", num_concepts=2,
        seeds=1, device="cpu", rehearsal=False,
    )  # fmt: skip
    assert sorted(open_images(root).class_names) == sorted((one, two))
    assert (run.path / "report.html").exists()
    shown = netgloss.show(netgloss.load(run.path), root / one, out=tmp_path / f"{out} shown", device="cpu")
    assert all(file.exists() for one_ in shown for file in one_.files)


def test_a_file_and_what_of_it() -> None:
    assert code_file("a: b/net.py:make") == ("a: b/net.py", "make")
    assert code_file("a.py:b/net.py") == ("a.py", "b/net.py")
    assert code_file("net.py") == ("net.py", "")
    assert code_file("timm:resnet18") == ("timm:resnet18", "")


def test_factories_import_what_lies_beside_them(tmp_path: Path) -> None:
    """Also where two folders hold siblings of the same name."""
    before = list(sys.path)
    for width in (3, 5):
        own = load_classifier(network(tmp_path / f"folder: {width}", width), random_weights=True)
        assert own.net[0].out_channels == width  # type: ignore[index, union-attr]
    assert "beside" not in sys.modules
    assert sys.path[: len(before)] == before
    method = tmp_path / "folder: 3" / "method.py"
    method.write_text(
        "import beside\nfrom netgloss.explainers.pca import PCA\nclass Mine(PCA):\n    width = beside.WIDTH\n"
    )
    assert netgloss.find_explainer(f"{method}:Mine").width == 3  # type: ignore[attr-defined]


def test_results_among_the_images_are_no_class(tmp_path: Path) -> None:
    root = tmp_path / "images"
    for name in ("one", "two"):
        pictures(root / name, count=10)
    options = {"num_concepts": 2, "seeds": 1, "device": "cpu", "rehearsal": False}
    own = load_classifier(network(tmp_path / "code"), random_weights=True)
    first = netgloss.explain("pca", own, "1", root, out=root / "run", **options)  # type: ignore[arg-type]
    again = open_images(root)
    assert sorted(again.class_names) == ["one", "two"]
    assert len(again) == 20
    assert any("1 folders of results of netgloss passed over: run" in note for note in again.notes)
    netgloss.explain("pca", own, "1", root, out=root / "run", **options)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"lies among the images in .*choose another folder"):
        netgloss.show(first, root, out=root / "shown", device="cpu")
    assert not (root / "shown").exists()
    refuse_among_images(root, open_images(root / "one" / "image #0: %41.png"))  # beside a single image
    refuse_among_images(tmp_path / "elsewhere", again)


def command(*arguments: object) -> int:
    try:
        main(["--trust-code", *map(str, arguments)])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_verify_sees_a_change_that_times_and_sizes_hide(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    root = tmp_path / "images"
    pictures(root / "one", count=20)
    own = load_classifier(network(tmp_path / "code"), random_weights=True)
    options = {"num_concepts": 2, "seeds": 1, "device": "cpu", "rehearsal": False}
    run = netgloss.explain("pca", own, "1", root, out=tmp_path / "run", **options)  # type: ignore[arg-type]
    assert command("evaluate", run.path, "--verify") == 2
    assert "give them by --images" in capsys.readouterr().err
    assert command("evaluate", run.path, "--verify", "--images", root, "--device", "cpu") == 0
    file = root / "one" / "image #3: %41.png"
    state, content = file.stat(), bytearray(file.read_bytes())
    content[-30] ^= 1
    with file.open("r+b") as same:  # the same inode
        same.write(content)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert command("evaluate", run.path, "--verify", "--images", root, "--device", "cpu") == 2
    assert "are not the images" in capsys.readouterr().err

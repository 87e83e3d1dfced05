"""Random inputs: algebra of rows and maps, annotations of any shape, and damaged stores and run folders.

Whatever a file holds, a command ends well or with exit code 2 and one line. The fuzzer's cases follow from their
number; ``--all-hostile`` runs more of them.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from netgloss.cli import main
from netgloss.data import open_annotations
from netgloss.data.annotations import ImageAnnotation, to_grid
from netgloss.errors import UserError
from netgloss.explainers.base import from_rows, to_rows

pytestmark = pytest.mark.usefixtures("little_memory")
SIZES = st.integers(1, 6)
CASES, MORE = 60, 400
VERBS = {
    "report": ["report", "run"],
    "show": ["show", "run", "critters:1,seed=5", "--out", "out"],
    "evaluate": ["evaluate", "run", "--untrained-images", "0"],
    "fit": ["fit", "pca", "--store", "store", "--out", "out/run", "--num-concepts", "2", "--seeds", "1"],
}


# -- rows and maps ----------------------------------------------------------------------------------------------------


@given(SIZES, SIZES, SIZES, SIZES)
def test_maps_to_rows_and_back_is_the_identity(b: int, c: int, h: int, w: int) -> None:
    maps = torch.arange(b * c * h * w).reshape(b, c, h, w)
    rows = to_rows(maps)
    assert rows.shape == (b * h * w, c)
    assert torch.equal(from_rows(rows, (h, w)), maps)
    i, j, y, x = b - 1, c - 1, h // 2, w // 2
    assert rows[(i * h + y) * w + x, j] == maps[i, j, y, x]


@settings(deadline=None)
@given(SIZES, SIZES, SIZES, SIZES, SIZES)
def test_a_map_of_rows_is_a_map_of_cells(b: int, c: int, h: int, w: int, k: int) -> None:
    """A linear map of rows is a 1 x 1 convolution: the adapter mixes no cells and no images."""
    generator = torch.Generator().manual_seed(b * c * h * w * k)
    maps = torch.randn(b, c, h, w, generator=generator, dtype=torch.float64)
    weight = torch.randn(k, c, generator=generator, dtype=torch.float64)
    expected = torch.nn.functional.conv2d(maps, weight[:, :, None, None])
    torch.testing.assert_close(from_rows(to_rows(maps) @ weight.T, (h, w)), expected)


@given(st.lists(SIZES, min_size=1, max_size=6).filter(lambda shape: len(shape) not in (2, 4)))
def test_other_shapes_are_refused_by_name(shape: list[int]) -> None:
    with pytest.raises(UserError, match=r"expected vectors \(B, C\) or maps"):
        to_rows(torch.zeros(shape))


# -- annotations ------------------------------------------------------------------------------------------------------

NUMBERS = st.one_of(st.integers(-(10**20), 10**20), st.floats(), st.booleans(), st.none())
JSON = st.recursive(
    st.one_of(NUMBERS, st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=6), inner, max_size=4)),
    max_leaves=12,
)
BOX = st.one_of(st.lists(NUMBERS, max_size=5), JSON)
THING = st.fixed_dictionaries(
    {},
    optional={
        "id": NUMBERS, "image_id": st.one_of(st.just(1), JSON), "category_id": st.one_of(st.just(1), JSON), "bbox": BOX,
        "segmentation": st.one_of(st.lists(st.lists(NUMBERS, max_size=9), max_size=3), JSON), "keypoints": BOX,
        "parts": JSON,
    },
)  # fmt: skip
SCENE = st.fixed_dictionaries(
    {"file_name": st.one_of(st.just("0.png"), st.text(max_size=9), JSON)},
    optional={"id": st.one_of(st.just(1), JSON), "width": st.one_of(st.integers(1, 60), NUMBERS), "height": NUMBERS},
)
COCO = st.fixed_dictionaries(
    {
        "images": st.lists(st.one_of(SCENE, JSON), max_size=3),
        "categories": st.lists(
            st.one_of(st.fixed_dictionaries({"id": st.just(1), "name": st.one_of(st.text(max_size=5), JSON)}), JSON),
            max_size=3,
        ),
        "annotations": st.lists(st.one_of(THING, JSON), max_size=4),
    }
)
ENTRIES = st.lists(
    st.fixed_dictionaries(
        {},
        optional={"file": st.one_of(st.just("0.png"), JSON), "size": st.one_of(st.just([9, 9]), JSON),
                  "cls": st.one_of(st.just("c"), JSON), "objects": st.one_of(st.lists(THING, max_size=3), JSON)},
    ),
    max_size=3,
)  # fmt: skip


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.one_of(JSON, COCO, ENTRIES))
def test_any_json_is_annotations_or_one_clear_line(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(content), encoding="utf-8", errors="surrogatepass")
    try:
        found = open_annotations(path, ["0.png"])
        annotation = found.for_image("0.png")
    except UserError:
        return
    if annotation is not None:
        covers = to_grid(annotation, (3, 4))
        assert all(np.isfinite(cover).all() and cover.min() >= 0 and cover.max() <= 1 for cover in covers.values())


@given(
    st.integers(1, 40), st.integers(1, 40), SIZES, SIZES,
    st.tuples(*[st.floats(-5, 45, allow_nan=False, width=32)] * 4),
)  # fmt: skip
def test_a_box_covers_its_area(width: int, height: int, rows: int, columns: int, box: tuple[float, ...]) -> None:
    """Shares of the cells times their area add up to the part of the box that lies in the picture."""
    (x0, x1), (y0, y1) = sorted(box[:2]), sorted(box[2:])
    annotation = ImageAnnotation(size=(width, height), boxes=[("thing", x0, y0, x1, y1)], keypoints=[])
    cover = to_grid(annotation, (rows, columns)).get("thing", np.zeros((rows, columns)))
    inside = max(0.0, min(x1, width) - max(x0, 0)) * max(0.0, min(y1, height) - max(y0, 0))
    assert cover.sum() * width * height / (rows * columns) == pytest.approx(inside, rel=1e-4, abs=1e-3)


# -- stores and run folders -------------------------------------------------------------------------------------------

VALUES: list[Any] = [None, True, -1, 0, 3, 1e308, float("nan"), float("inf"), 10**30, "", "x", "../../x", "\x1b[31m",
                     [], [[]], {}, {"a": 1}, [None] * 3, "9" * 300]  # fmt: skip


def change_json(value: Any, dice: random.Random) -> Any:
    """One place of a JSON value, drawn at random, holds something else."""
    if isinstance(value, dict | list) and value and dice.random() < 0.8:
        key = dice.choice(sorted(value) if isinstance(value, dict) else range(len(value)))
        if dice.random() < 0.15:
            del value[key]
        else:
            value[key] = change_json(value[key], dice)
        return value
    return dice.choice(VALUES)


def damage(path: Path, dice: random.Random) -> str:
    """Changes one file; what was done."""
    if path.suffix == ".json" and dice.random() < 0.6:
        path.write_text(json.dumps(change_json(json.loads(path.read_text()), dice)))
        return "another value"
    data = bytearray(path.read_bytes())
    what = dice.choice(["flip", "flips", "cut", "empty", "gone", "doubled", "noise"])
    if what in ("flip", "flips") and data:
        for _ in range(1 if what == "flip" else 20):
            data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    elif what == "cut":
        data = data[: dice.randrange(len(data) + 1)]
    elif what == "empty":
        data = bytearray()
    elif what == "doubled":
        data = data + data
    elif what == "noise":
        data = bytearray(dice.randbytes(len(data)))
    path.unlink() if what == "gone" else path.write_bytes(data)
    return what


@pytest.mark.parametrize("number", range(MORE))
def test_damaged_folders_end_well_or_in_one_line(
    number: int,
    good: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    if number >= CASES and not request.config.getoption("--all-hostile"):
        pytest.skip("all of them by: make hostile")
    dice = random.Random(number)
    verb = sorted(VERBS)[number % len(VERBS)]
    for part in ("store", "run"):
        shutil.copytree(good / part, tmp_path / part)
    part = {"report": "run", "show": "run", "fit": "store", "evaluate": dice.choice(["run", "store"])}[verb]
    file = dice.choice(sorted(p for p in (tmp_path / part).rglob("*") if p.is_file()))
    done = damage(file, dice)
    error = io.StringIO()
    code: Any = 0
    with (
        contextlib.chdir(tmp_path),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(error),
    ):
        try:
            main(VERBS[verb])
        except SystemExit as stop:
            code = stop.code
        except Exception as unexpected:
            raise AssertionError(f"{verb} after {done} in {file.relative_to(tmp_path)}: {unexpected!r}") from unexpected
    told = [line for line in error.getvalue().splitlines() if line.startswith("netgloss: ")]
    assert (code, len(told)) in ((0, 0), (2, 1)), (verb, done, file, error.getvalue())
    shutil.rmtree(tmp_path)

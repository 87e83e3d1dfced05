"""Annotations follow the image to the grid exactly, and every form of file is read as it is meant."""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from netgloss.data.annotations import ImageAnnotation, keypoint_cell, open_annotations, place, to_grid
from netgloss.data.sources import open_images
from netgloss.errors import UserError


@dataclass(frozen=True)
class Geometry:
    scale_x: float
    scale_y: float
    offset_x: float
    offset_y: float
    width: int
    height: int


def resize_and_crop(size: tuple[int, int], short: int, crop: int) -> Geometry:
    """The affine map of: short side to ``short``, centre crop (which pads if the image is smaller)."""
    w, h = size
    new_w, new_h = (short, round(h * short / w)) if w <= h else (round(w * short / h), short)
    return Geometry(new_w / w, new_h / h, -((new_w - crop) // 2), -((new_h - crop) // 2), crop, crop)


def transformed(image: Image.Image, geometry: Geometry) -> np.ndarray:
    """What the network sees of a grey image: resized to the map's size, then cropped or padded with 0."""
    size = round(image.width * geometry.scale_x), round(image.height * geometry.scale_y)
    pixels = np.asarray(image.resize(size, Image.Resampling.BILINEAR), np.float64)
    out = np.zeros((geometry.height, geometry.width))
    x, y = int(geometry.offset_x), int(geometry.offset_y)
    source = pixels[max(-y, 0) : geometry.height - y, max(-x, 0) : geometry.width - x]
    out[max(y, 0) : max(y, 0) + source.shape[0], max(x, 0) : max(x, 0) + source.shape[1]] = source
    return out


# -- placing ----------------------------------------------------------------------------------------------------------


def test_place_by_hand() -> None:
    """Image 4 x 2, doubled, shifted by (-2, +1) into an input of 5 x 6."""
    mask = np.array([[1, 1, 2, 3], [4, 5, 6, 7]], np.uint8)
    annotation = ImageAnnotation(
        size=(4, 2),
        boxes=[("kept", 0, 0, 4, 2), ("part", 2.5, 0.5, 3, 1), ("left of it", 0, 0, 1, 2), ("touching", 3.5, 0, 4, 2)],
        keypoints=[("in", 1.5, 0.25), ("out", 0.5, 0.5), ("right edge", 3.5, 1), ("bottom edge", 1.5, 2.5)],
        mask=mask,
        mask_labels={1: "one", 4: "four"},
        annotated={"one"},
    )
    placed = place(annotation, Geometry(2, 2, -2, 1, 5, 6))
    assert placed.size == (5, 6)
    assert placed.boxes == [("kept", 0, 1, 5, 5), ("part", 3, 2, 4, 3)]
    assert placed.keypoints == [("in", 1, 1.5)]
    assert placed.annotated == {"one"}
    expected = [[0] * 5, [1, 1, 2, 2, 3], [1, 1, 2, 2, 3], [5, 5, 6, 6, 7], [5, 5, 6, 6, 7], [0] * 5]
    assert placed.mask is not None
    assert placed.mask.tolist() == expected


def test_identity_changes_nothing() -> None:
    mask = np.random.default_rng(0).integers(0, 5, (7, 9), np.uint8)
    annotation = ImageAnnotation((9, 7), [("a", 1, 2, 3, 4)], [("k", 8.9, 6.9)], mask, {1: "a"})
    placed = place(annotation, Geometry(1, 1, 0, 0, 9, 7))
    assert (placed.boxes, placed.keypoints) == (annotation.boxes, annotation.keypoints)
    assert np.array_equal(placed.mask, mask)


def test_padding_is_nothing_even_where_zero_is_a_label() -> None:
    annotation = ImageAnnotation((2, 2), mask=np.zeros((2, 2), np.uint8), mask_labels={0: "sky", 1: "sea"})
    grid = to_grid(place(annotation, Geometry(1, 1, 1, 0, 4, 2)), (1, 4))
    assert grid["sky"].tolist() == [[0, 1, 1, 0]]
    assert set(grid) == {"sky"}


@settings(max_examples=150, deadline=None)
@given(
    size=st.tuples(st.integers(20, 90), st.integers(20, 90)),
    short=st.integers(16, 80),
    crop=st.integers(12, 70),
    corners=st.tuples(*[st.floats(0.02, 0.98)] * 4),
)
def test_the_annotation_follows_the_image(
    size: tuple[int, int], short: int, crop: int, corners: tuple[float, float, float, float]
) -> None:
    """A white rectangle, seen by the network, lies where its placed mask and box say."""
    w, h = size
    x0, x1 = sorted((int(corners[0] * w), int(corners[1] * w)))
    y0, y1 = sorted((int(corners[2] * h), int(corners[3] * h)))
    x1, y1 = x1 + 1, y1 + 1
    mask = np.zeros((h, w), np.uint8)
    mask[y0:y1, x0:x1] = 1
    geometry = resize_and_crop(size, short, crop)
    seen = transformed(Image.fromarray(mask * 255), geometry)
    placed = place(ImageAnnotation(size, [("white", x0, y0, x1, y1)], mask=mask, mask_labels={1: "white"}), geometry)
    assert placed.mask is not None
    # Bilinear resizing blurs over a source or a target pixel, whichever is larger: compare away from the edges.
    reach_x, reach_y = max(1.0, geometry.scale_x) + 1e-6, max(1.0, geometry.scale_y) + 1e-6
    centre_x, centre_y = np.arange(crop) + 0.5, (np.arange(crop) + 0.5)[:, None]
    left, right = (x * geometry.scale_x + geometry.offset_x for x in (x0, x1))
    top, bottom = (y * geometry.scale_y + geometry.offset_y for y in (y0, y1))
    inside_x = np.minimum(centre_x - left, right - centre_x)
    inside_y = np.minimum(centre_y - top, bottom - centre_y)
    deep = (inside_x > reach_x) & (inside_y > reach_y)
    outside = (inside_x < -reach_x) | (inside_y < -reach_y)
    assert (seen[deep] > 254).all()
    assert (placed.mask[deep] == 1).all()
    assert (seen[outside] < 1).all()
    assert (placed.mask[outside] == 0).all()
    # The mask is the box up to half a pixel on each side, and where the blur is weak it is the thresholded image.
    grid_mask = to_grid(placed, (crop, crop)).get("white", np.zeros((crop, crop)))
    by_box = to_grid(ImageAnnotation(placed.size, placed.boxes), (crop, crop)).get("white", np.zeros((crop, crop)))
    certain = np.abs(by_box - 0.5) > 0.499
    assert np.array_equal(grid_mask[certain], by_box[certain].round())
    if placed.boxes:
        assert placed.boxes[0][1:] == pytest.approx(
            (max(left, 0), max(top, 0), min(right, crop), min(bottom, crop)), abs=1e-9
        )


@settings(max_examples=60, deadline=None)
@given(size=st.tuples(st.integers(1, 40), st.integers(1, 40)), out=st.tuples(st.integers(1, 40), st.integers(1, 40)))
def test_a_resized_mask_is_pillows_nearest(size: tuple[int, int], out: tuple[int, int]) -> None:
    (w, h), (new_w, new_h) = size, out
    mask = np.random.default_rng(0).integers(0, 256, (h, w), np.uint8)
    placed = place(ImageAnnotation(size, mask=mask), Geometry(new_w / w, new_h / h, 0, 0, new_w, new_h))
    nearest = np.asarray(Image.fromarray(mask).resize(out, Image.Resampling.NEAREST))
    columns = ((np.arange(new_w) + 0.5) * w / new_w) % 1 > 1e-6  # where the centre does not fall between two pixels
    rows = ((np.arange(new_h) + 0.5) * h / new_h) % 1 > 1e-6
    assert placed.mask is not None
    assert np.array_equal(placed.mask[np.ix_(rows, columns)], nearest[np.ix_(rows, columns)])


# -- the grid ---------------------------------------------------------------------------------------------------------


def test_box_coverage_is_the_area_in_each_cell() -> None:
    grid = to_grid(ImageAnnotation((8, 4), [("a", 1, 0.5, 5, 3)]), (2, 2))["a"]
    assert grid.dtype == np.float32
    assert grid.tolist() == [[3 * 1.5 / 8, 1 * 1.5 / 8], [3 * 1 / 8, 1 * 1 / 8]]


def test_boxes_of_a_label_count_once_where_they_overlap() -> None:
    boxes = [("a", 0, 0, 2, 2), ("a", 1, 1, 3, 3), ("b", 0, 0, 4, 4)]
    grid = to_grid(ImageAnnotation((4, 4), boxes), (1, 1))
    assert grid["a"].item() == pytest.approx(7 / 16)
    assert grid["b"].item() == 1


@settings(max_examples=60, deadline=None)
@given(
    boxes=st.lists(st.tuples(*[st.integers(0, 11)] * 4), min_size=1, max_size=5),
    grid=st.tuples(st.integers(1, 13), st.integers(1, 13)),
)
def test_boxes_on_whole_pixels_cover_what_their_mask_covers(
    boxes: list[tuple[int, int, int, int]], grid: tuple[int, int]
) -> None:
    mask = np.zeros((12, 12), np.uint8)
    named = []
    for a, b, c, d in boxes:
        (x0, x1), (y0, y1) = sorted((a, b)), sorted((c, d))
        mask[y0 : y1 + 1, x0 : x1 + 1] = 1
        named.append(("a", x0, y0, x1 + 1, y1 + 1))
    by_box = to_grid(ImageAnnotation((12, 12), named), grid)["a"]
    by_mask = to_grid(ImageAnnotation((12, 12), mask=mask, mask_labels={1: "a"}), grid)["a"]
    assert by_box == pytest.approx(by_mask, abs=1e-6)
    assert by_box.mean() == pytest.approx((mask == 1).mean(), abs=1e-6)  # area is kept, whatever the grid


def test_a_partition_covers_every_cell_fully() -> None:
    mask = np.random.default_rng(1).integers(0, 4, (10, 15), np.uint8)
    grid = to_grid(ImageAnnotation((15, 10), mask=mask, mask_labels=dict(enumerate("abcd"))), (7, 7))
    assert sum(grid.values()) == pytest.approx(np.ones((7, 7)), abs=1e-6)


def test_values_of_one_name_are_joined_and_others_left_out() -> None:
    mask = np.array([[1, 2, 3, 0]], np.uint8)
    grid = to_grid(ImageAnnotation((4, 1), mask=mask, mask_labels={1: "eye", 2: "eye", 9: "tail"}), (1, 2))
    assert {label: cover.tolist() for label, cover in grid.items()} == {"eye": [[1, 0]]}


def test_the_best_mark_tells_a_label() -> None:
    mask = np.array([[1, 0], [0, 0]], np.uint8)
    annotation = ImageAnnotation(
        (2, 2),
        boxes=[("m", 0, 0, 2, 2), ("b", 0, 0, 2, 1)],
        keypoints=[("m", 1.5, 1.5), ("b", 1.5, 1.5), ("k", 1.5, 0.5), ("k", 0.5, 1.5)],
        mask=mask,
        mask_labels={1: "m"},
    )
    grid = {label: cover.tolist() for label, cover in to_grid(annotation, (2, 2)).items()}
    assert grid == {"m": [[1, 0], [0, 0]], "b": [[1, 1], [0, 0]], "k": [[0, 1], [1, 0]]}


def test_keypoint_cell() -> None:
    assert keypoint_cell(0, 0, size=(224, 112), grid=(7, 14)) == (0, 0)
    assert keypoint_cell(16, 15.9, size=(224, 112), grid=(7, 14)) == (0, 1)
    assert keypoint_cell(223.9, 111.9, size=(224, 112), grid=(7, 14)) == (6, 13)
    assert keypoint_cell(224, -3, size=(224, 112), grid=(7, 14)) == (0, 13)


def test_what_absence_means() -> None:
    assert ImageAnnotation((1, 1)).covers("head")
    assert ImageAnnotation((1, 1), annotated={"head"}).covers("head")
    assert not ImageAnnotation((1, 1), annotated=set()).covers("head")


def test_a_mask_of_another_size_is_refused() -> None:
    with pytest.raises(UserError, match="the mask has 3 x 2 pixels, its image 2 x 3"):
        ImageAnnotation((2, 3), mask=np.zeros((2, 3), np.uint8))


# -- folders of masks -------------------------------------------------------------------------------------------------


def save(path: Path, pixels: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path)


def write(path: Path, data: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


@pytest.fixture
def cars(tmp_path: Path) -> Path:
    for name, value in (("one", 1), ("two", 2)):
        save(tmp_path / "cars/train/images" / f"{name}.jpg", np.zeros((4, 6, 3)))
        save(tmp_path / "cars/train/masks" / f"{name}.png", np.full((4, 6), value))
    save(tmp_path / "cars/train/images/three.jpg", np.zeros((4, 6, 3)))
    write(tmp_path / "cars/classes.json", {"0": "background", "1": "wheel", "2": "door"})
    return tmp_path / "cars"


@pytest.mark.parametrize("where", ["", "train", "train/masks"])
def test_masks_are_found_by_the_images_name(cars: Path, where: str) -> None:
    source = open_images(cars / "train/images", annotations=cars / where)
    assert source.ids == ["one.jpg", "three.jpg", "two.jpg"]
    one, three, two = (source.annotation(i) for i in range(3))
    assert three is None
    assert one is not None
    assert two is not None
    assert to_grid(one, (1, 1)).keys() == {"wheel"}
    assert to_grid(two, (1, 1)).keys() == {"door"}
    assert one.covers("door")
    assert source.annotations is not None
    assert source.annotations.labels == ["wheel", "door"]
    assert source.annotations.notes == ["1 of 3 images have no annotation"]
    assert pickle.loads(pickle.dumps(source)).annotation(0).mask.tolist() == one.mask.tolist()
    assert source.subset([2]).annotation(0).mask.tolist() == two.mask.tolist()


def test_a_mask_of_another_size_than_its_image(cars: Path) -> None:
    save(cars / "train/masks/one.png", np.ones((6, 4)))
    source = open_images(cars / "train/images", annotations=cars)
    with pytest.raises(UserError, match=r"annotation of one\.jpg is for 4 x 6 pixels, the image has 6 x 4"):
        source.annotation(0)


def test_values_without_a_label(cars: Path) -> None:
    save(cars / "train/masks/one.png", np.full((4, 6), 7))
    annotations = open_annotations(cars)
    one = annotations.for_image("one.jpg")
    assert one is not None
    assert to_grid(one, (1, 1)).keys() == {"value 7"}
    assert annotations.labels == ["wheel", "door", "value 7"]
    assert annotations.notes == ["train/masks/one.png: value 7 has no name in classes.json"]
    (cars / "classes.json").unlink()
    nameless = open_annotations(cars)
    assert nameless.labels == ["value 2", "value 7"]
    assert "no classes.json" in nameless.notes[0]


def test_zero_is_a_label_if_it_has_a_name_of_its_own(tmp_path: Path) -> None:
    save(tmp_path / "masks/a.png", [[0, 1]])
    write(tmp_path / "classes.json", ["sky", "void"])
    annotation = open_annotations(tmp_path).for_image("a.png")
    assert annotation is not None
    assert annotation.mask_labels == {0: "sky"}


def test_one_mask_for_two_images_is_nobodys(tmp_path: Path) -> None:
    for name in ("a/1.png", "b/1.png", "b/2.png"):
        save(tmp_path / "images" / name, np.zeros((2, 2)))
    for name in ("1.png", "2.png"):
        save(tmp_path / "masks" / name, np.ones((2, 2)))
    source = open_images(tmp_path / "images", annotations=tmp_path / "masks")
    assert [source.annotation(i) is None for i in range(3)] == [True, True, False]


def test_images_of_other_names_are_told(cars: Path) -> None:
    with pytest.raises(
        UserError, match=r"none of the 1 images .* like x\.jpg, the annotations like train/masks/one\.png"
    ):
        open_annotations(cars, ["x.jpg"])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"0": "background"', "delimiter"),
        ('{"x": "wheel"}', "invalid literal"),
        ('{"300": "wheel"}', "outside 0 to 255"),
        ('{"1": 5}', "expected a text"),
        ("3", "malformed"),
        ("[" * 100_000, "malformed"),
    ],
)
def test_malformed_classes(cars: Path, text: str, reason: str) -> None:
    write(cars / "classes.json", text)
    with pytest.raises(UserError, match=reason) as caught:
        open_annotations(cars)
    assert "classes.json" in str(caught.value)
    assert "\n" not in str(caught.value)


# -- lists of objects -------------------------------------------------------------------------------------------------


def entry(file: str, objects: list[dict[str, Any]], cls: str = "lion", size: Any = (10, 8)) -> dict[str, Any]:
    return {"file": file, "cls": cls, "size": list(size), "objects": objects}


def test_objects_without_parts_are_unannotated(tmp_path: Path) -> None:
    box, head = [0, 0, 8, 8], {"head": [0, 0, 2, 2]}
    path = write(
        tmp_path / "annotations.json",
        [
            entry("lion/a.jpg", [{"bbox": box, "parts": head}]),
            entry("lion/b.jpg", [{"bbox": box, "parts": head}, {"bbox": box}]),
            entry("lion/c.jpg", [{"bbox": box, "parts": {"legs": [1, 1, 2.5, 2]}}]),
            entry("fish/d.jpg", [{"bbox": box, "parts": head}], cls="fish"),
        ],
    )
    annotations = open_annotations(tmp_path)
    assert annotations.labels == ["lion", "fish", "head", "legs"]
    a, b, c, d = (annotations.for_image(f"{name}.jpg") for name in "abcd")
    assert a is not None
    assert a.boxes == [("lion", 0, 0, 8, 8), ("head", 0, 0, 2, 2)]
    assert [[x.covers(label) for label in ("head", "legs", "lion")] for x in (a, b, c, d) if x] == [
        [True, True, False],  # looked for, and no legs seen
        [False, False, False],  # one of its lions was not looked at
        [True, True, False],
        [True, False, False],  # no fish has legs
    ]
    assert open_annotations(path).for_image("lion/z.jpg") is None
    assert open_annotations(path).for_image("fish/a.jpg") is None


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"file": "a.jpg", "cls": "lion"}, "entry 0 has no 'objects'"),
        (entry("../a.jpg", []), "leads out of the folder"),
        (entry("/etc/passwd", []), "leads out of the folder"),
        (entry("a\\..\\..\\b.jpg", []), "leads out of the folder"),
        (entry("a.jpg", [], size=[0, 5]), "not a size"),
        (entry("a.jpg", [], size=[1e9, 1e9]), "not a size"),
        (entry("a.jpg", [{"bbox": [0, 0, 1]}]), "expected 4 finite numbers"),
        (entry("a.jpg", [{"bbox": [0, 0, float("nan"), 1]}]), "expected 4 finite numbers"),
        (entry("a.jpg", [{"bbox": [0, 0, 10**400, 1]}]), "malformed"),
        (entry("a.jpg", [{"bbox": [5, 0, 1, 1]}]), "ends before it begins"),
        (entry("a.jpg", [{"bbox": [0, 0, 1, 1], "parts": ["head"]}]), "malformed"),
        (entry("a.jpg", "no list"), "malformed"),  # type: ignore[arg-type]
        (entry("a.jpg", [], cls=["x"]), "malformed"),  # type: ignore[arg-type]
        ({"cls": "lion", "objects": []}, "entry 0 has no 'file'"),
        (3, "malformed"),
    ],
)
def test_malformed_objects(tmp_path: Path, bad: Any, reason: str) -> None:
    path = write(tmp_path / "a.json", [bad])
    with pytest.raises(UserError, match=reason) as caught:
        open_annotations(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "{", "[1", '"text"', "{}", '{"images": [], "annotations": 3}', "[" * 100_000, "\xff\0"]
)
def test_malformed_json(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=r"a\.json") as caught:
        open_annotations(write(tmp_path / "a.json", text))
    assert "\n" not in str(caught.value)


def test_missing_annotations(cars: Path) -> None:
    with pytest.raises(UserError, match=r"no such file or folder: .*clases\.json; near it: classes\.json"):
        open_annotations(cars / "clases.json")
    with pytest.raises(UserError, match="no masks"):
        open_annotations(cars / "train/images")


# -- COCO -------------------------------------------------------------------------------------------------------------


def coco(*things: dict[str, Any], **image: Any) -> dict[str, Any]:
    return {
        "images": [{"id": 5, "file_name": "a.jpg", "width": 10, "height": 8, **image}],
        "categories": [{"id": 3, "name": "cat", "keypoints": ["nose", "tail"]}, {"id": 9, "name": "mat"}],
        "annotations": [{"image_id": 5, "category_id": 3, **thing} for thing in things],
    }


def test_coco_polygons_boxes_and_keypoints(tmp_path: Path) -> None:
    small = {"bbox": [2, 2, 3, 2], "segmentation": [[2, 2, 5, 2, 5, 4, 2, 4]], "keypoints": [2.5, 3, 2, 0, 0, 0]}
    large = {"category_id": 9, "bbox": [0, 1, 10, 6], "segmentation": [[0, 1, 10, 1, 10, 7, 0, 7]]}
    path = write(tmp_path / "instances.json", coco(small, large))
    annotations = open_annotations(path, ["a.jpg"])
    assert annotations.labels == ["cat", "nose", "tail", "mat"]
    annotation = annotations.for_image("a.jpg")
    assert annotation is not None
    assert annotation.boxes == [("cat", 2, 2, 5, 4), ("mat", 0, 1, 10, 7)]
    assert annotation.keypoints == [("nose", 2.5, 3)]
    expected = np.zeros((8, 10), int)
    expected[1:7] = 2
    expected[2:4, 2:5] = 1
    assert annotation.mask is not None
    assert annotation.mask.tolist() == expected.tolist()
    assert annotation.mask_labels == {1: "cat", 2: "mat"}
    assert annotation.covers("tail")


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.floats(-5, 25), st.floats(-5, 20)), min_size=3, max_size=7))
def test_polygons_hold_the_pixels_whose_centre_is_inside(points: list[tuple[float, float]]) -> None:
    from netgloss.data.annotation_files import _fill

    def crossings(y: float) -> list[float]:
        edges = zip(points, points[1:] + points[:1], strict=True)
        return [x0 + (y - y0) * (x1 - x0) / (y1 - y0) for (x0, y0), (x1, y1) in edges if (y0 <= y) != (y1 <= y)]

    filled = _fill([value for point in points for value in point], (20, 16))
    for y in range(16):
        at = crossings(y + 0.5)
        for x in range(20):
            if all(abs(x + 0.5 - crossing) > 1e-9 for crossing in at):  # the centre is not on an edge
                assert filled[y, x] == sum(crossing < x + 0.5 for crossing in at) % 2


def test_crowds_are_not_drawn_and_their_absence_means_nothing(tmp_path: Path) -> None:
    crowd = {"bbox": [0, 0, 2, 2], "segmentation": {"counts": [0, 4], "size": [8, 10]}, "iscrowd": 1}
    annotation = open_annotations(write(tmp_path / "c.json", coco(crowd))).for_image("a.jpg")
    assert annotation is not None
    assert annotation.mask is None
    assert (annotation.covers("cat"), annotation.covers("mat")) == (False, True)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (coco({"bbox": [0, 0, -1, 1]}), "ends before"),
        (coco({"segmentation": [[1, 2, 3]]}), "malformed"),
        (coco({"segmentation": [["a", 1, 2, 3, 4, 5]]}), "finite numbers"),
        (coco({"keypoints": [1, 2, 2]}), "malformed"),
        (coco({"category_id": 4}), "no category 4"),
        (coco({"category_id": [4]}), "malformed"),
        (coco({"image_id": 6}), "no image 6"),
        (coco(width="wide"), "finite numbers"),
        (coco(file_name="../../a.jpg"), "leads out"),
    ],
)
def test_malformed_coco(tmp_path: Path, data: Any, reason: str) -> None:
    path = write(tmp_path / "c.json", data)
    with pytest.raises(UserError, match=reason) as caught:
        open_annotations(path).for_image("a.jpg")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


# -- real data --------------------------------------------------------------------------------------------------------


@pytest.mark.real
def test_carparts(shared: Path) -> None:
    folder = shared / "data/carparts/test"
    source = open_images(folder / "images", annotations=folder / "masks")
    classes = json.loads((folder.parent / "classes.json").read_text())
    assert source.annotations is not None
    assert source.annotations.labels == list(classes.values())[1:]
    assert len(source) == 100
    for i in range(0, 100, 9):
        annotation = source.annotation(i)
        assert annotation is not None
        assert annotation.mask is not None
        placed = place(annotation, resize_and_crop(annotation.size, 224, 224))
        grid = to_grid(placed, (14, 14))
        assert placed.mask is not None
        for label, cover in grid.items():
            value = next(value for value, name in annotation.mask_labels.items() if name == label)
            assert cover.mean() == pytest.approx((placed.mask == value).mean(), abs=1e-6)
            blocks = (placed.mask == value).reshape(14, 16, 14, 16).mean((1, 3))
            assert cover == pytest.approx(blocks, abs=1e-6)


@pytest.mark.real
def test_animals(shared: Path) -> None:
    source = open_images(shared / "data/animals", annotations=shared / "data/animals/annotations.json")
    assert len(source) == 960
    annotations = [source.annotation(i) for i in range(960)]
    heads = sum(box[0] == "head" for annotation in annotations if annotation for box in annotation.boxes)
    legs = sum(box[0] == "front_legs" for annotation in annotations if annotation for box in annotation.boxes)
    assert (heads, legs) == (776, 402)
    assert all(annotation is not None for annotation in annotations)
    assert {box[0] for a in annotations if a for box in a.boxes} == {*source.class_names, "head", "front_legs"}

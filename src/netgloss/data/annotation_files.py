"""Files of annotations: folders of masks, lists of objects with parts, COCO. Opened by ``open_annotations``.

Shape letters: h and w image.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from netgloss.data.annotations import Box, ImageAnnotation, Keypoint
from netgloss.data.images import list_files, open_mask, printable
from netgloss.errors import UserError

_NOTHING = {"background", "_background_", "__background__", "unlabeled", "unlabelled", "void", "none", "ignore", ""}


class Annotations(ABC):
    """Annotations by image.

    Attributes
    ----------
    labels : every label that may occur.
    notes : what a user should know: images without annotation, mask values without a label, ...
    """

    def __init__(self, path: Path, names: Iterable[str], labels: Iterable[str]) -> None:
        self.path = path
        self.labels = list(dict.fromkeys(labels))
        self.notes: list[str] = []
        self._by_stem: dict[str, list[tuple[tuple[str, ...], str]]] = defaultdict(list)
        for name in names:
            key = _key(name)
            self._by_stem[key[-1]].append((key, name))
        self._matched: dict[str, str] | None = None

    def __len__(self) -> int:
        return sum(map(len, self._by_stem.values()))

    def for_image(self, image_id: str) -> ImageAnnotation | None:
        """The annotation of an image, or None if it has none.

        Raises
        ------
        UserError : its mask cannot be read, or its entry is malformed.
        """
        name = self._find(image_id)[0] if self._matched is None else self._matched.get(image_id)
        return None if name is None else self._read(name)

    def match(self, ids: Sequence[str]) -> None:
        """Settle which annotation belongs to which image; one that several claim by the end of its name is nobody's."""
        found = {image_id: self._find(image_id) for image_id in ids}
        claims = Counter(name for name, _ in found.values())
        self._matched = {i: name for i, (name, exact) in found.items() if name and (exact or claims[name] == 1)}
        if not self._matched and ids:
            example = next((name for entries in self._by_stem.values() for _, name in entries), "nothing")
            raise UserError(
                f"none of the {len(ids)} images has an annotation in {printable(self.path)}: "
                f"the images are named like {printable(ids[0])}, the annotations like {printable(example)}"
            )
        if len(self._matched) < len(ids):
            self.notes.append(f"{len(ids) - len(self._matched)} of {len(ids)} images have no annotation")

    def _find(self, image_id: str) -> tuple[str | None, bool]:
        """Name of the annotation and whether it is the whole path that agrees."""
        key = _key(image_id)
        near = [(other, name) for other, name in self._by_stem.get(key[-1], ()) if _ends_alike(key, other)]
        exact = [name for other, name in near if other == key]
        exact = [name for name in exact if name == image_id] or exact
        names = exact or [name for _, name in near]
        return (names[0] if len(names) == 1 else None), bool(exact)

    @abstractmethod
    def _read(self, name: str) -> ImageAnnotation: ...


class MaskFolder(Annotations):
    """Label images, one value per label; 0 is nothing unless ``classes.json`` gives it another name than background."""

    def __init__(self, path: Path) -> None:
        files, notes = list_files(path)
        files = [file for file in files if file.lower().endswith(".png")]
        files = [file for file in files if "masks" in Path(file).parts[:-1]] or files
        if not files:
            raise UserError(f"no masks (.png) and no annotations.json in {printable(path)}")
        self._names = _class_labels(path)
        super().__init__(path, files, [label for label in self._names.values() if label.casefold() not in _NOTHING])
        self.notes += notes
        if not self._names:
            self.notes.append(f"no classes.json in or above {printable(path)}: labels are the masks' values")
            self.labels = _value_labels({int(v) for file in files for v in np.unique(open_mask(path / file))})

    def _read(self, name: str) -> ImageAnnotation:
        mask = open_mask(self.path / name)
        values = {int(value) for value in np.unique(mask)} - {0}
        for label in _value_labels(values - set(self._names)):
            if label not in self.labels:
                self.labels.append(label)
                self.notes.append(f"{printable(name)}: {label} has no name in classes.json")
        labels = self._names | {value: f"value {value}" for value in values if value not in self._names}
        labels = {value: label for value, label in labels.items() if label.casefold() not in _NOTHING}
        return ImageAnnotation(size=mask.shape[::-1], mask=mask, mask_labels=labels)


class ObjectList(Annotations):
    """A list of {file, size, cls, objects: [{bbox, parts: {label: box}}]}.

    The parts that any object of a ``cls`` has count as looked for in an image if each of its objects has some: an
    object without was not annotated. Whole objects may be missing: the absence of a ``cls`` never means anything.
    """

    def __init__(self, path: Path, entries: list[Any]) -> None:
        self._entries: dict[str, ImageAnnotation] = {}
        parts_of: dict[str, set[str]] = defaultdict(set)
        for number, entry in enumerate(entries):
            with _well_formed(path, f"entry {number}"):
                parts_of[_label(entry["cls"])].update(*(thing.get("parts") or () for thing in entry["objects"]))
        for number, entry in enumerate(entries):
            with _well_formed(path, f"entry {number}"):
                name = _inner(entry["file"])
                complete = bool(entry["objects"]) and all(thing.get("parts") for thing in entry["objects"])
                self._entries[name] = ImageAnnotation(
                    size=_size(entry["size"]),
                    boxes=[box for thing in entry["objects"] for box in _object_boxes(entry["cls"], thing)],
                    annotated=frozenset(parts_of[entry["cls"]]) if complete else frozenset(),
                )
        super().__init__(path, self._entries, [*parts_of, *sorted(set().union(*parts_of.values()))])

    def _read(self, name: str) -> ImageAnnotation:
        return self._entries[name]


class Coco(Annotations):
    """A COCO file. Polygons become one mask, large objects first and small ones on top; keypoints keep their names.

    Run-length masks (crowds) are not drawn: in their image, the absence of their label means nothing.
    """

    def __init__(self, path: Path, data: dict[str, Any]) -> None:
        self._categories: dict[int, dict[str, Any]] = {}
        self._images: dict[str, dict[str, Any]] = {}
        self._objects: dict[int, list[dict[str, Any]]] = defaultdict(list)
        labels: list[str] = []
        for number, category in enumerate(data["categories"]):
            with _well_formed(path, f"category {number}"):
                self._categories[category["id"]] = category
                labels += [_label(category["name"]), *map(_label, category.get("keypoints", ()))]
        for number, image in enumerate(data["images"]):
            with _well_formed(path, f"image {number}"):
                _size([image["width"], image["height"]])
                self._objects[image["id"]] = []
                self._images[_inner(image["file_name"])] = image
        for number, thing in enumerate(data["annotations"]):
            with _well_formed(path, f"annotation {number}"):
                if thing["category_id"] not in self._categories or thing["image_id"] not in self._objects:
                    raise ValueError(f"no category {thing['category_id']} or no image {thing['image_id']}")
                self._objects[thing["image_id"]].append(thing)
        super().__init__(path, self._images, labels)

    def _read(self, name: str) -> ImageAnnotation:
        image = self._images[name]
        with _well_formed(self.path, f"image {printable(name)}"):
            size = _size([image["width"], image["height"]])
            boxes: list[Box] = []
            keypoints: list[Keypoint] = []
            shapes: list[tuple[int, str, NDArray[np.bool_]]] = []
            vague: set[str] = set()
            for thing in self._objects[image["id"]]:
                category = self._categories[thing["category_id"]]
                label, segmentation = category["name"], thing.get("segmentation")
                if "bbox" in thing:
                    x, y, w, h = _numbers(thing["bbox"], 4)
                    boxes.append(_box(label, [x, y, x + w, y + h]))
                if thing.get("keypoints"):
                    points = np.reshape(_numbers(thing["keypoints"]), (-1, 3)).tolist()
                    named = zip(category["keypoints"], points, strict=True)
                    keypoints += [(point, x, y) for point, (x, y, visible) in named if visible > 0]
                if isinstance(segmentation, list) and segmentation:
                    shape = np.logical_or.reduce([_fill(_numbers(polygon), size) for polygon in segmentation])
                    shapes.append((int(shape.sum()), label, shape))
                elif segmentation:
                    vague.add(label)
        mask_labels = dict(enumerate(dict.fromkeys(label for _, label, _ in shapes), 1))
        if len(mask_labels) > 255:
            raise UserError(f"image {printable(name)} of {self.path} has {len(mask_labels)} labels, a mask holds 255")
        values = {label: value for value, label in mask_labels.items()}
        mask = np.zeros(size[::-1], np.uint8) if shapes else None
        for _, label, shape in sorted(shapes, key=lambda entry: -entry[0]):
            assert mask is not None
            mask[shape] = values[label]
        covered = frozenset(self.labels) - vague if vague else None
        return ImageAnnotation(size, boxes, keypoints, mask, mask_labels, covered)


def open_json(path: Path) -> Annotations:
    """Annotations of a COCO or netgloss JSON file, told apart by their keys."""
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else printable(error)
        raise UserError(f"{printable(path)} is not readable as JSON: {reason}") from error
    if isinstance(data, list):
        return ObjectList(path, data)
    if isinstance(data, dict) and all(
        isinstance(data.get(key), list) for key in ("images", "annotations", "categories")
    ):
        return Coco(path, data)
    raise UserError(
        f"{printable(path)} holds no annotations: neither COCO (lists images, annotations, categories) "
        "nor a list of {file, size, cls, objects}"
    )


def _class_labels(folder: Path) -> dict[int, str]:
    """Value -> label from the nearest classes.json, {} if there is none."""
    folder = folder.resolve()
    path = next((f / "classes.json" for f in (folder, *folder.parents[:2]) if (f / "classes.json").is_file()), None)
    if path is None:
        return {}
    with _well_formed(path, "it"):
        data = json.loads(path.read_bytes())
        labels = {
            int(value): _label(label) for value, label in (data.items() if isinstance(data, dict) else enumerate(data))
        }
        if not all(0 <= value <= 255 for value in labels) or len(labels) > 255:
            raise ValueError("more than 255 labels, or values outside 0 to 255")
    return labels


def _value_labels(values: Iterable[int]) -> list[str]:
    return [f"value {value}" for value in sorted(values) if value]


@contextmanager
def _well_formed(path: Path, what: str) -> Iterator[None]:
    """What a malformed entry makes fail inside becomes one line."""
    try:
        yield
    except KeyError as error:
        raise UserError(f"{printable(path)}: {what} has no {error}") from error
    except (TypeError, ValueError, AttributeError, ArithmeticError, RecursionError, OSError) as error:
        raise UserError(f"{printable(path)}: {what} is malformed: {printable(error)}") from error


def _key(name: str) -> tuple[str, ...]:
    """The path without its suffix and without folders called images or masks."""
    path = PurePosixPath(name)
    return *(part for part in path.parts[:-1] if part not in ("images", "masks")), path.stem


def _ends_alike(a: tuple[str, ...], b: tuple[str, ...]) -> bool:
    n = min(len(a), len(b))
    return a[-n:] == b[-n:]


def _inner(name: str) -> str:
    """A relative path that stays inside its folder."""
    path = PurePosixPath(_label(name).replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or not path.name:
        raise ValueError(f"the path {name!r} leads out of the folder")
    return str(path)


def _label(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a text, got {value!r:.40}")
    return value


def _numbers(values: Any, count: int | None = None) -> list[float]:
    ok = isinstance(values, list) and all(isinstance(v, int | float) and math.isfinite(v) for v in values)
    if not ok or (count is not None and len(values) != count):
        raise ValueError(f"expected {count or 'a list of'} finite numbers, got {values!r:.60}")
    return [float(value) for value in values]


def _size(values: Any) -> tuple[int, int]:
    width, height = _numbers(values, 2)
    if width != int(width) or height != int(height) or min(width, height) < 1 or width * height > 2**28:
        raise ValueError(f"not a size in pixels: {width:g} x {height:g}")
    return int(width), int(height)


def _box(label: str, corners: Any) -> Box:
    x0, y0, x1, y1 = _numbers(corners, 4)
    if x1 < x0 or y1 < y0:
        raise ValueError(f"the box {corners} of {label!r} ends before it begins (x0, y0, x1, y1 expected)")
    return _label(label), x0, y0, x1, y1


def _object_boxes(label: str, thing: dict[str, Any]) -> list[Box]:
    parts = (thing.get("parts") or {}).items()
    return [_box(label, thing["bbox"]), *(_box(part, corners) for part, corners in parts)]


def _fill(polygon: list[float], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Pixels (h, w) whose centre lies in the polygon x0, y0, x1, y1, ... (even-odd rule).

    ``ImageDraw.polygon`` also paints the outline, half a pixel too far on every side.
    """
    w, h = size
    crossings = np.zeros((h, w + 1), bool)
    points = np.reshape(polygon, (-1, 2))
    for start, end in zip(points, np.roll(points, -1, axis=0), strict=True):
        (x0, y0), (x1, y1) = sorted((start, end), key=lambda point: point[1])
        rows = np.arange(max(math.ceil(y0 - 0.5), 0), min(math.ceil(y1 - 0.5), h))
        if len(rows):
            x = x0 + (rows + 0.5 - y0) * ((x1 - x0) / (y1 - y0))
            crossings[rows, np.ceil(x - 0.5).clip(0, w).astype(int)] ^= True
    return np.logical_xor.accumulate(crossings, axis=1)[:, :w]

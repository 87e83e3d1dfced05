"""The results of a run for Python and spreadsheets.

``run.concepts[3].figure()``, ``run.image("cats/1.jpg").figure()``, ``run.table()`` and ``concepts.csv``.
"""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from netgloss.errors import UserError
from netgloss.runs.files import inside, read_run
from netgloss.runs.verdicts import concept_sentence, named_classes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = ("concept", "name", "importance", "share_active", "stability", "classes", "sentence", "strongest_images")


class ConceptsRecord(dict[str, Any]):
    """``concepts.json`` as a dict; a number as key gives that concept as a :class:`ConceptView`."""

    def __init__(self, content: Mapping[str, Any], folder: Path) -> None:
        super().__init__(content)
        self.folder = folder

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, int):
            return super().__getitem__(key)
        if not 0 <= key < len(self["concepts"]):
            raise UserError(f"there is no concept {key}; the run has {len(self['concepts'])}, counted from 0")
        content = read_run(self.folder).concepts
        return ConceptView(content["concepts"][key], content, self.folder)


@dataclass(frozen=True)
class ConceptView:
    """A concept of a run: ``record`` is its entry of ``concepts.json``."""

    record: Mapping[str, Any]
    content: Mapping[str, Any]
    folder: Path

    @property
    def name(self) -> str:
        """Its label where it has one, else its name."""
        label = self.record.get("label")
        return str(label["text"] if label else self.record["name"])

    @property
    def sentence(self) -> str:
        """What it is strongest on, as the report says it."""
        return concept_sentence(self.record, self.content)

    @property
    def classes(self) -> list[str]:
        """Classes that it stands for: those with enough images and contribution."""
        return [entry["class"] for entry in named_classes(self.record, self.content["classes"])]

    def figure(self) -> Figure:
        """Its strongest images with its outline, as in the report.

        Raises
        ------
        UserError : it was never active, or the run has no pictures.
        """
        from netgloss.figures import concept_gallery

        pictures, maps, scales, captions = [], [], [], []
        for entry in self.record["gallery"]:
            image = self.content["images"][entry["image"]]
            picture = _picture(self.folder, image)
            if picture is None:
                continue
            pictures.append(picture)
            maps.append(_values(entry["map"]))
            scales.append(_scale(entry["map"]))
            captions.append(str(image["label"] or image["prediction"] or image["id"]))
        if not pictures:
            raise UserError(f"{self.name} has no picture to draw: it was never active, or the run has no images")
        return concept_gallery(pictures, maps, scales, captions, title=f"{self.name}: {self.sentence}")

    def __repr__(self) -> str:
        return f"{self.name}: {self.sentence}"


@dataclass(frozen=True)
class ImageView:
    """An image that the run explained: ``record`` is its entry of ``concepts.json``."""

    record: Mapping[str, Any]
    content: Mapping[str, Any]
    folder: Path

    @property
    def contributions(self) -> dict[str, float]:
        """What each concept that is shown adds to the logit, by name."""
        concepts = self.content["concepts"]
        return {concepts[d["concept"]]["name"]: d["contribution"] for d in self.record["explained"]["drivers"]}

    def figure(self) -> Figure:
        """The image with the outlines of its concepts, and what each adds to the logit, as ``netgloss.show`` draws it.

        Raises
        ------
        UserError : the run has no picture of it.
        """
        from netgloss.figures import ExplainedImage, image_explanation

        picture = _picture(self.folder, self.record)
        if picture is None:
            raise UserError(f"the run has no picture of {self.record['id']!r}")
        why = self.record["explained"]
        return image_explanation(
            ExplainedImage(
                picture,
                [_values(d["map"]) for d in why["drivers"]],
                list(self.contributions.values()),
                list(self.contributions),
                str(self.record["prediction"]),
                self.record["probability"],
                why["logit"],
                base=why["base"] or 0.0,
                gap=why["gap"],
                scales=[_scale(d["map"]) for d in why["drivers"]],
            )
        )


def explained_image(folder: Path, name: str | Path) -> ImageView:
    """The image whose id is ``name``, or ends with it.

    Raises
    ------
    UserError : the run explained no such image, or several.
    """
    content = read_run(folder).concepts
    named = [image for image in content["images"] if image["explained"]]
    asked = Path(name).as_posix()
    found = [image for image in named if image["id"] == asked]
    found = found or [
        image for image in named if image["id"].endswith(f"/{asked}") or asked.endswith(f"/{image['id']}")
    ]
    if len(found) != 1:
        many = f"{len(found)} images of this run are called {asked!r}" if found else f"this run explained no {asked!r}"
        raise UserError(f"{many}; netgloss.show explains any image with a run")
    return ImageView(found[0], content, folder)


def concept_rows(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One record per concept, with the columns :data:`COLUMNS`."""
    rows = []
    for record in content["concepts"]:
        view = ConceptView(record, content, Path())
        rows.append(
            {
                "concept": record["id"],
                "name": view.name,
                **{name: record[name] for name in ("importance", "share_active", "stability")},
                "classes": "; ".join(view.classes),
                "sentence": view.sentence,
                "strongest_images": "; ".join(content["images"][e["image"]]["id"] for e in record["gallery"]),
            }
        )
    return rows


def concepts_csv(content: Mapping[str, Any]) -> str:
    """The rows as CSV, with texts that no spreadsheet takes for a formula."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in concept_rows(content):
        writer.writerow({name: harmless(value) if isinstance(value, str) else value for name, value in row.items()})
    return buffer.getvalue().encode("utf-8", errors="replace").decode("utf-8")


def harmless(text: str) -> str:
    """A name that no spreadsheet takes for a formula."""
    return f"'{text}" if text[:1] in "=+-@\t\r" and text else text


def _picture(folder: Path, image: Mapping[str, Any]) -> np.ndarray | None:
    """The stored picture (H, W, 3) of an image; None if there is none."""
    from PIL import Image

    file = inside(folder, image["thumbnail"]) if image["thumbnail"] else None
    if file is None:
        return None
    with Image.open(file, formats=("JPEG", "PNG", "WEBP")) as opened:
        return np.asarray(opened.convert("RGB"))


def _values(drawn: Mapping[str, Any] | None) -> np.ndarray | None:
    """The map (h, w) of a record, in the concept's units."""
    if drawn is None:
        return None
    grid = np.frombuffer(base64.b64decode(drawn["data"]), dtype=np.uint8).reshape(drawn["grid"])
    return np.asarray(drawn["low"] + grid / 255 * (drawn["high"] - drawn["low"]), dtype=np.float32)


def _scale(drawn: Mapping[str, Any] | None) -> tuple[float, float, float]:
    if drawn is None:
        return 0.0, 1.0, 0.5
    level = 128 if drawn["threshold"] is None else drawn["threshold"]
    return drawn["low"], drawn["high"], drawn["low"] + level / 255 * (drawn["high"] - drawn["low"])

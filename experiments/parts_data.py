"""Writes the object crops that the part experiments read: animals with head and front-leg boxes, and car parts.

    python experiments/parts_data.py --out DIR

``DIR/animals/{fit,report}``: each boxed object that has part boxes, cropped to its box and squashed to 224 x 224 (the
authors' frame), with ``annotations.json`` beside it. Pictures, not objects, are split in two by the hash of their name.
Nothing of this is committed: the photographs are not ours.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from PIL import Image

SIDE = 224


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    write_animals(Path(os.environ.get("NETGLOSS_DATA", "../shared")) / "data" / "animals", options.out / "animals")


def write_animals(source: Path, out: Path) -> None:
    """Crops in ``out/fit`` and ``out/report``, one folder a class."""
    entries: dict[str, list[dict[str, Any]]] = {"fit": [], "report": []}
    for record in json.loads((source / "annotations.json").read_text()):
        half = "fit" if hashlib.sha256(record["file"].encode()).digest()[0] < 128 else "report"
        with Image.open(source / record["file"]) as picture:
            for number, thing in enumerate(record["objects"]):
                if not thing.get("parts"):
                    continue
                x0, y0, x1, y1 = thing["bbox"]
                name = f"{Path(record['file']).with_suffix('')}-{number}.png"
                target = out / half / "images" / name
                target.parent.mkdir(parents=True, exist_ok=True)
                crop = picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=(x0, y0, x1, y1))
                crop.save(target)
                scale = (SIDE / (x1 - x0), SIDE / (y1 - y0))
                parts = {label: _moved(box, (x0, y0), scale) for label, box in thing["parts"].items()}
                entries[half].append(
                    {
                        "file": name,
                        "size": [SIDE, SIDE],
                        "cls": record["cls"],
                        "objects": [{"bbox": [0, 0, SIDE, SIDE], "parts": parts}],
                    }
                )
    for half, found in entries.items():
        (out / half / "annotations.json").write_text(json.dumps(found))
        print(half, len(found), "crops", sum(len(e["objects"][0]["parts"]) for e in found), "parts")


def _moved(box: list[float], origin: tuple[float, float], scale: tuple[float, float]) -> list[float]:
    """A box of the picture in the crop's pixels, clipped to it."""
    corners = zip(box, origin * 2, scale * 2, strict=True)
    return [min(max((value - start) * factor, 0.0), float(SIDE)) for value, start, factor in corners]


if __name__ == "__main__":
    main()

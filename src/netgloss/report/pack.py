"""Making the pictures of a report fit: thumbnails embedded once each, concept maps as short texts.

A report has a budget in bytes. Maps come first (their grid is coarsened only if it must be); thumbnails share what is
left, as they are if they fit, else re-encoded at the largest size that does.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from netgloss.errors import UserError
from netgloss.runs.files import inside

MAP_BUDGET = 3_000_000
"""Bytes for all concept maps together."""
SIDES = (28, 20, 14, 10, 7)
"""Longer sides of coarsened maps, tried in this order."""
THUMBNAILS = ((224, 80), (192, 78), (160, 74), (144, 70), (128, 64), (112, 58), (96, 54), (80, 50), (64, 45))
"""(longer side in pixels, quality) of re-encoded thumbnails, tried in this order."""
LARGEST = 256
"""Longer side of a thumbnail that is embedded unchanged."""


def pack_maps(concepts: dict[str, Any]) -> int | None:
    """Replace every map record by ``[h, w, base64 of h*w uint8, low, high, threshold]``, in place.

    Returns
    -------
    The longer side that maps were coarsened to, or None if all are drawn at their own resolution.

    Raises
    ------
    UserError : a map whose data is not base64 or not of its grid's size.
    """
    holders = list(_map_holders(concepts))
    side = None
    if sum(len(holder["map"]["data"]) + 40 for holder in holders) > MAP_BUDGET:
        side = next((s for s in SIDES if len(holders) * (s * s * 4 / 3 + 40) <= MAP_BUDGET), SIDES[-1])
    for holder in holders:
        holder["map"] = pack_map(holder["map"], side)
    return side


def pack_thumbnails(folder: Path, images: list[dict[str, Any]], budget: int) -> tuple[list[str], list[str]]:
    """Thumbnails as base64 texts of JPEG or WebP files, together at most about ``budget`` characters.

    ``size`` = [width, height] is set in every image (None without a thumbnail).

    Returns
    -------
    (texts, missing) : one text an image ("" where there is none), and the ids of the images without one.
    """
    from PIL import features

    files = [inside(folder, image["thumbnail"]) if image["thumbnail"] else None for image in images]
    as_they_are = sum(file.stat().st_size for file in files if file) * 4 / 3 <= budget
    kind = "WEBP" if features.check("webp") else "JPEG"
    found = [file for file in files if file]
    longest, quality = LARGEST, 82
    if not as_they_are and found:
        probe = found[:: max(1, len(found) // 48)]
        for longest, quality in THUMBNAILS:
            sizes = [len(data) for file in probe if (data := _encode(file, longest, quality, kind)[0])]
            if sum(sizes) / max(1, len(sizes)) * len(found) * 4 / 3 <= 0.97 * budget:
                break
    texts, missing = [], []
    for image, file in zip(images, files, strict=True):
        data, image["size"] = _encode(file, longest, quality, kind, keep=as_they_are) if file else (b"", None)
        texts.append(base64.b64encode(data).decode("ascii"))
        if not data:
            missing.append(image["id"])
    return texts, missing


def decoded_pictures(concepts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The pictures that a decoder made of concepts, to be packed behind the images.

    Their file names in ``concept["decoded"]`` are replaced by their place in the list, in place.
    """
    found: list[dict[str, Any]] = []
    for concept in concepts:
        for kind in ("removed", "alone"):
            if concept["decoded"] and concept["decoded"][kind] is not None:
                found.append({"id": f"{concept['name']}, {kind}", "thumbnail": concept["decoded"][kind]})
                concept["decoded"][kind] = len(found) - 1
    return found


def _encode(
    file: Path, longest: int, quality: int, kind: str, *, keep: bool = False
) -> tuple[bytes, tuple[int, int] | None]:
    """A thumbnail's bytes and (width, height); nothing for a file that is no image."""
    from PIL import Image

    try:
        with Image.open(file, formats=("JPEG", "PNG", "WEBP")) as image:
            if keep and image.format in ("JPEG", "WEBP") and max(image.size) <= LARGEST:
                return file.read_bytes(), image.size
            image.draft("RGB", (2 * longest, 2 * longest))
            small = image.convert("RGB")
        small.thumbnail((longest, longest))
        buffer = io.BytesIO()
        small.save(buffer, kind, quality=quality)
        return buffer.getvalue(), small.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return b"", None


def _map_holders(concepts: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every record of concepts.json that has a map."""
    for concept in concepts["concepts"]:
        yield from (entry for entry in concept["gallery"] if entry["map"])
    for image in concepts["images"]:
        if image["explained"]:
            yield from (entry for entry in image["explained"]["drivers"] if entry["map"])


def pack_map(record: dict[str, Any], side: int | None = None) -> list[Any]:
    """One map as ``[h, w, base64 of h*w uint8, low, high, threshold]``, at most ``side`` cells long."""
    try:
        values = np.frombuffer(base64.b64decode(record["data"], validate=True), dtype=np.uint8)
        height, width = record["grid"]
        grid = values.reshape(height, width)
        if not grid.size:
            raise ValueError("an empty map")
    except (ValueError, binascii.Error) as error:
        raise UserError(f"a map of grid {record['grid']} in concepts.json is malformed: {error}") from None
    data = record["data"]
    if side is not None and max(grid.shape) > side:
        from PIL import Image

        scale = side / max(grid.shape)
        height, width = (max(1, round(n * scale)) for n in grid.shape)
        grid = np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BOX))
        data = base64.b64encode(grid.tobytes()).decode("ascii")
    return [height, width, data, record["low"], record["high"], record["threshold"]]

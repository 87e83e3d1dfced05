"""Figures that a run drew (decoded images, say), as they are embedded in the report."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from netgloss.errors import UserError
from netgloss.figures.decoded import READING
from netgloss.runs.files import inside

LIMIT = 4_000_000
"""Bytes of a report that figures may take; later ones are left out."""


def pack_figures(folder: Path) -> dict[str, Any]:
    """``entries`` (text, data as base64 of the PNG), ``left_out`` (how many did not fit) and the ``reading`` table.

    Raises
    ------
    UserError : ``figures/figures.json`` is malformed, or names a file outside the run folder or that is not there.
    """
    path = folder / "figures" / "figures.json"
    if not path.exists():
        return {"entries": [], "left_out": 0, "reading": []}
    entries, size, left_out = [], 0, 0
    try:
        listed = [(str(entry["file"]), str(entry["text"])) for entry in json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a list of figures: {error}") from error
    for name, text in listed:
        file = inside(folder, f"figures/{name}")
        if file is None or not file.is_file():
            raise UserError(f"{path} names {name!r}, which is not there")
        data = base64.b64encode(file.read_bytes()).decode("ascii")
        if size + len(data) > LIMIT:
            left_out += 1
            continue
        size += len(data)
        entries.append({"text": text, "data": data})
    decoded = any(name.startswith("decoded-") for name, _ in listed)
    return {"entries": entries, "left_out": left_out, "reading": READING if decoded else []}

"""The audit's findings, as the report's first screen shows them."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from netgloss.runs.files import inside, read_audit

LIMIT = 4_000_000
"""Bytes that the pictures of findings may take; later findings come without one."""
_PNG = b"\x89PNG\r\n\x1a\n"


def pack_audit(folder: Path) -> dict[str, Any] | None:
    """The record of ``audit.json`` with each finding's ``data`` (its picture as base64, "" without one), or None.

    Raises
    ------
    UserError : the file is malformed.
    """
    record = read_audit(folder)
    if record is None:
        return None
    left = LIMIT
    for finding in record["findings"]:
        file = inside(folder, f"figures/{finding['picture']}") if finding["picture"] else None
        content = file.read_bytes() if file is not None else b""
        shown = content.startswith(_PNG) and len(content) * 4 // 3 <= left
        finding["data"] = base64.b64encode(content).decode("ascii") if shown else ""
        left -= len(finding["data"])
    record["tested"].sort(key=lambda test: -(test["gained"] or 0.0))
    return record

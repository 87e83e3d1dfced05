"""A run in a notebook: a small table of its scores and its leading concepts, as escaped HTML without script or style
sheet (notebooks are sent around as well), legible on light and dark pages.
"""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from netgloss.figures.style import brief, number
from netgloss.runs.files import RunFiles, inside, read_run
from netgloss.runs.verdicts import headline_scores, named_classes, percent, pretty, verdicts_of

if TYPE_CHECKING:
    from netgloss.runs.run import Run

_SCORES = 8
_CONCEPTS = 6
_PICTURES = 3
_LARGEST_PICTURE = 40_000


def summary(run: Run) -> str:
    """The HTML of a run; of an unfinished one its state alone."""
    manifest = run.manifest
    model = manifest.get("model", {}).get("name", "the classifier")
    title = f"{model} at {run.layer}, explained by {run.method}"
    state = str(manifest.get("status", "unknown"))
    parts = [f"<b>{_text(title, 120)}</b><br><small>{_text(str(run.path), 200)} · {_text(state, 40)}</small>"]
    if (run.path / "concepts.json").is_file():
        files = read_run(run.path)
        parts += [_scores(files), _concepts(files)]
    if (run.path / "report.html").is_file():
        parts.append(f"<small>report: <code>{_text(str(run.path / 'report.html'), 200)}</code></small>")
    return f"<div>{''.join(parts)}</div>"


def _text(value: str, limit: int = 60) -> str:
    return escape(brief(value, limit))


def _table(heads: list[str], rows: list[list[str]]) -> str:
    style = 'style="text-align:left;padding:2px 12px 2px 0"'
    head = "".join(f"<th {style}>{name}</th>" for name in heads)
    body = "".join(f"<tr>{''.join(f'<td {style}>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _scores(files: RunFiles) -> str:
    if not files.scores:
        return "<p>not scored</p>"
    rows = []
    judged = {score["metric"]: standing for score, standing in verdicts_of(files)}
    for score in headline_scores(files.scores, _SCORES):
        low, high = score["low"], score["high"]
        interval = "–" if low is None or high is None else f"{number(low)} to {number(high)}"
        cells = [
            _text(pretty(score["metric"])),
            number(score["value"]),
            interval,
            _text(judged[score["metric"]].words, 80),
        ]
        rows.append(cells)
    return _table(["score", "value", "95 % interval", "compared with its baselines"], rows)


def _concepts(files: RunFiles) -> str:
    leading = sorted(files.concepts["concepts"], key=lambda c: -abs(c["importance"] or 0))[:_CONCEPTS]
    rows = []
    for concept in leading:
        name = concept["label"]["text"] if concept["label"] else concept["name"]
        serves = ", ".join(entry["class"] for entry in named_classes(concept, files.concepts["classes"])[:2])
        share = "–" if concept["importance"] is None else percent(concept["importance"])
        pictures = [_picture(files, entry["image"]) for entry in concept["gallery"][:_PICTURES]]
        rows.append(["".join(pictures), _text(name), share, _text(serves, 80)])
    return _table(["strongest in", "concept", "of all contributions", "for"], rows) if rows else ""


def _picture(files: RunFiles, index: int) -> str:
    image: dict[str, Any] = files.concepts["images"][index]
    file: Path | None = inside(files.folder, image["thumbnail"]) if image["thumbnail"] else None
    if file is None or file.stat().st_size > _LARGEST_PICTURE:
        return ""
    data = file.read_bytes()
    kind = "jpeg" if data.startswith(b"\xff\xd8") else "webp" if data[:4] + data[8:12] == b"RIFFWEBP" else ""
    if not kind:
        return ""
    shown = _text(image["label"] or image["prediction"] or image["id"])
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
    return f'<img src="{source}" alt="{shown}" width="56" height="56" style="display:inline;margin:1px">'

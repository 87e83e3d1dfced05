"""Reading a run folder for the report: JSON, validated against ``runs/records.py``.

Everything in a run folder is treated as hostile: texts lose control characters and direction overrides, numbers that
are not finite become None, unknown fields are dropped, files are opened only inside the folder. What is missing
altogether (scores, history, a thumbnail) leaves a gap that the report names; what is malformed is a
:class:`~netgloss.errors.UserError` that names the file and the field.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from netgloss.errors import UserError
from netgloss.figures.style import printable
from netgloss.runs.records import AuditRecord, Concepts, Manifest, Number, ScoreRecord

FORMAT_VERSION = 1
_FREE = ("config", "model", "versions")
_Record = TypeVar("_Record")


@dataclass(frozen=True)
class RunFiles:
    """The checked content of a run folder; ``scores`` is None where the run has no ``scores.json``."""

    folder: Path
    run: dict[str, Any]
    concepts: dict[str, Any]
    scores: list[dict[str, Any]] | None
    history: list[dict[str, Any]]


def read_run(folder: Path) -> RunFiles:
    """The files of a run folder.

    Raises
    ------
    UserError : no such folder, no run in it, a run that is not finished, a file that is truncated or malformed, or one
        written by a newer netgloss.
    """
    if not folder.is_dir():
        raise UserError(f"run folder {str(folder)!r} does not exist")
    if not (folder / "run.json").is_file():
        raise UserError(f"{str(folder)!r} is not a run folder: it has no run.json")
    if not (folder / "concepts.json").is_file():
        raise UserError(
            f"the run in {str(folder)!r} is not finished (no concepts.json); run its command again to continue, or, "
            "after fit, netgloss evaluate"
        )
    run = _read(folder / "run.json", Manifest)
    concepts = _read(folder / "concepts.json", Concepts)
    for name, version in (("run.json", run.format_version), ("concepts.json", concepts.format_version)):
        if version > FORMAT_VERSION:
            raise UserError(
                f"{name} has format_version {version}, this netgloss reads up to {FORMAT_VERSION}; update it"
            )
    problem = concepts.problems()
    if problem:
        raise UserError(f"{folder / 'concepts.json'}: {problem}")
    scores = None
    if (folder / "scores.json").is_file():
        scores = _plain(_read(folder / "scores.json", list[ScoreRecord]))
    content = _plain(concepts)
    _complete(content)
    return RunFiles(folder, _plain(run), content, scores, _history(folder / "history.jsonl"))


def _complete(concepts: dict[str, Any]) -> None:
    """What earlier versions did not record and follows from what they did, in place."""
    classes = {entry["class"] for entry in concepts["classes"]}
    for image in concepts["images"]:
        if image["known"] is None and image["label"] is not None:
            image["known"] = image["label"] in classes
        why = image["explained"]
        if why and why["share"] is None and None not in (why["logit"], why["base"], why["gap"]):
            why["share"] = _share(why["logit"], why["base"], why["gap"])


def _share(*numbers: float) -> float | None:
    import torch

    from netgloss.metrics.faithfulness.importance import explained_share

    share = float(explained_share(*(torch.tensor([value], dtype=torch.float64) for value in numbers)))
    return share if math.isfinite(share) else None


def read_audit(folder: Path) -> dict[str, Any] | None:
    """``audit.json`` of a run folder; None if there is none.

    Raises
    ------
    UserError : it is malformed, or written by a newer netgloss.
    """
    path = folder / "audit.json"
    if not path.is_file():
        return None
    record = _read(path, AuditRecord)
    if record.format_version > FORMAT_VERSION:
        raise UserError(f"audit.json has format_version {record.format_version}; update netgloss")
    content: dict[str, Any] = _plain(record)
    return content


def inside(folder: Path, name: str) -> Path | None:
    """The file ``name`` of the folder, or None if there is none or it lies outside (``..``, absolute, a link)."""
    try:
        path = (folder / name).resolve()
        return path if path.is_relative_to(folder.resolve()) and path.is_file() else None
    except (OSError, ValueError, RuntimeError):
        return None


def _read(path: Path, kind: type[_Record]) -> _Record:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({printable(str(error))}); is it truncated?") from None
    return _validated(content, kind, str(path))


def _validated(content: Any, kind: type[_Record], where: str) -> _Record:
    """``content`` as a record: cleaned, with null standing for what is left out."""
    try:
        return msgspec.convert(_without_null(clean(content)), kind)
    except (msgspec.ValidationError, RecursionError, OverflowError) as error:
        raise UserError(f"{printable(where)} is malformed: {printable(str(error))[:300]}") from None


def _plain(record: Any) -> Any:
    """A record as dictionaries and lists."""
    return msgspec.to_builtins(record)


def _without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: v if k in _FREE else _without_null(v) for k, v in value.items() if v is not None}
    return [_without_null(item) for item in value] if isinstance(value, list) else value


def _history(path: Path) -> list[dict[str, Any]]:
    """Lines of ``history.jsonl`` with finite numbers; a last line cut off by a crash is left out."""
    if not path.is_file():
        return []
    lines = [line for line in path.read_bytes().decode("utf-8", errors="replace").splitlines() if line.strip()]
    history = []
    for number, line in enumerate(lines, start=1):
        try:
            record = _validated(json.loads(line), dict[str, Number], f"{path} line {number}")
        except ValueError as error:
            if number == len(lines) and not isinstance(error, UserError):
                break
            raise UserError(f"{path} line {number} is malformed ({printable(str(error))})") from None
        if record.get("seed") is None or record.get("step") is None:
            raise UserError(f"{path} line {number} has no seed or step")
        history.append(record)
    return history


def clean(value: Any) -> Any:
    """Any JSON value with printable texts and None for numbers that are not finite."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, list):
        return [clean(item) for item in value]
    if isinstance(value, dict):
        return {printable(name): clean(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value

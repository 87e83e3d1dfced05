"""Reading a run folder for the report: plain JSON, checked against the fields that the report uses.

Everything in a run folder is treated as hostile: texts lose control characters and direction overrides, numbers that
are not finite become None, unknown fields are dropped, files are opened only inside the folder. What is missing
altogether (scores, history, a thumbnail) leaves a gap that the report names; what is there but malformed is a
:class:`~netgloss.errors.UserError` that says where.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from netgloss.errors import UserError
from netgloss.figures.style import printable

FORMAT_VERSION = 1

# The fields read: "text", "number", "index" (an integer >= 0), "flag", "any"; a trailing "?" allows null or absence;
# [X] is a list of X (absent: empty), {"*": X} a dictionary of X, another dictionary a record; ("?", X) is X or null.
MAP = {"grid": ["index"], "data": "text", "low": "number", "high": "number", "threshold": "index?"}
RUN = {
    "format_version": "index",
    "command": "text?",
    "method": "text?",
    "config": {"*": "any"},
    "model": {"*": "any"},
    "layer": "text",
    "layer_spec": {"shape": ["index"], "nonnegative": "flag?"},
    "data": {
        "description": "text?",
        "fingerprint": "text?",
        "num_images": "index?",
        "num_fit": "index?",
        "num_heldout": "index?",
        "unreadable": [{"id": "text", "reason": "text?"}],
        "notes": ["text"],
    },
    "seeds": ["index"],
    "versions": {"*": "any"},
    "created": "text?",
    "times": {"*": "number?"},
    "tail": {"mode": "text?", "affine": "flag?", "reason": "text?"},
    "warnings": ["text"],
}
SCORES = [
    {
        "metric": "text",
        "value": "number?",
        "low": "number?",
        "high": "number?",
        "baselines": {"*": "number?"},
        "n": "index?",
        "seeds": "any",
        "higher_is_better": "flag?",
        "definition": "text?",
    }
]
CONCEPTS = {
    "format_version": "index",
    "layer": "text",
    "grid": ["index"],
    "importance": {
        "kind": "text?",
        "completeness_gap": ("?", {"mean_abs": "number?", "relative": "number?"}),
        "definition": "text?",
    },
    "images": [
        {
            "id": "text",
            "label": "text?",
            "prediction": "text?",
            "probability": "number?",
            "thumbnail": "text?",
            "split": "text?",
            "explained": (
                "?",
                {
                    "class": "text",
                    "logit": "number?",
                    "base": "number?",
                    "gap": "number?",
                    "drivers": [{"concept": "index", "contribution": "number?", "map": ("?", MAP)}],
                    "removal": (
                        "?",
                        {
                            "exact": "flag",
                            "strengths": ["number"],
                            "classes": ["text"],
                            "logits": ["number"],
                            "ceiling": "number?",
                            "drivers": ["index"],
                            "at": [[["number"]]],
                        },
                    ),
                },
            ),
        }
    ],
    "concepts": [
        {
            "id": "index",
            "name": "text",
            "label": ("?", {"text": "text", "metric": "text?", "value": "number?"}),
            "share_active": "number?",
            "mean": "number?",
            "max": "number?",
            "importance": "number?",
            "histogram": ("?", {"edges": ["number"], "counts": ["number"]}),
            "stability": "number?",
            "gallery": [{"image": "index", "value": "number?", "map": ("?", MAP)}],
            "classes": [{"class": "text", "contribution": "number?", "share": "number?"}],
            "neighbours": [{"concept": "index", "similarity": "number"}],
            "decoded": ("?", {"removed": "text?", "alone": "text?", "visibility": "number?", "note": "text?"}),
            "scores": {"*": "number?"},
        }
    ],
    "map": (
        "?",
        {
            "points": [["number"]],
            "way": "text?",
            "of": "text?",
            "neighbours": "index?",
            "kept": "number?",
            "chance": "number?",
        },
    ),
    "mistakes": (
        "?",
        {
            "labelled": "index",
            "wrong": "index",
            "groups": [
                {
                    "concept": "index?",
                    "count": "index",
                    "share": "number?",
                    "margin": "number?",
                    "pairs": [{"label": "text", "prediction": "text", "count": "index"}],
                    "images": ["index"],
                    "recognised_without": "index?",
                    "replayed": "index?",
                }
            ],
        },
    ),
    "classes": [
        {
            "class": "text",
            "num_images": "index?",
            "accuracy": "number?",
            "agreement": "number?",
            "mean_logit": "number?",
            "base": "number?",
            "gap": "number?",
            "concepts": [
                {"concept": "index", "contribution": "number?", "low": "number?", "high": "number?", "share": "number?"}
            ],
            "deletion": (
                "?",
                {"concepts": ["index"], "lost": [["number?"]], "random": ["number?"], "images": "index"},
            ),
        }
    ],
}


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
            f"the run in {str(folder)!r} is not finished (no concepts.json); run its command again to go on, or, "
            "after fit, netgloss evaluate"
        )
    run = _checked(folder / "run.json", RUN)
    concepts = _checked(folder / "concepts.json", CONCEPTS)
    for name, found in (("run.json", run["format_version"]), ("concepts.json", concepts["format_version"])):
        if found > FORMAT_VERSION:
            raise UserError(f"{name} has format_version {found}, this netgloss reads up to {FORMAT_VERSION}; update it")
    _check_references(folder / "concepts.json", concepts)
    scores = _checked(folder / "scores.json", SCORES) if (folder / "scores.json").is_file() else None
    return RunFiles(folder, run, concepts, scores, _history(folder / "history.jsonl"))


def inside(folder: Path, name: str) -> Path | None:
    """The file ``name`` of the folder, or None if there is none or it lies outside (``..``, absolute, a link)."""
    try:
        path = (folder / name).resolve()
        return path if path.is_relative_to(folder.resolve()) and path.is_file() else None
    except (OSError, ValueError, RuntimeError):
        return None


def _checked(path: Path, spec: Any) -> Any:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({printable(str(error))}); is it truncated?") from None
    return _take(content, spec, str(path))


def _history(path: Path) -> list[dict[str, Any]]:
    """Lines of ``history.jsonl`` with finite numbers; a last line cut off by a crash is left out."""
    if not path.is_file():
        return []
    lines = [line for line in path.read_bytes().decode("utf-8", errors="replace").splitlines() if line.strip()]
    history = []
    for number, line in enumerate(lines, start=1):
        try:
            record = _take(json.loads(line), {"*": "number?"}, f"{path} line {number}")
        except ValueError as error:
            if number == len(lines) and not isinstance(error, UserError):
                break
            raise UserError(f"{path} line {number} is malformed ({printable(str(error))})") from None
        if record.get("seed") is None or record.get("step") is None:
            raise UserError(f"{path} line {number} has no seed or step")
        history.append(record)
    return history


def _take(value: Any, spec: Any, where: str) -> Any:
    """``value`` reduced to what ``spec`` names, cleaned; raises where it is not of that form."""
    if isinstance(spec, tuple):
        return None if value is None else _take(value, spec[1], where)
    if isinstance(spec, list):
        if value is None:
            return []
        if not isinstance(value, list):
            raise _mismatch(where, "a list", value)
        return [_take(item, spec[0], f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(spec, dict):
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise _mismatch(where, "a record", value)
        if "*" in spec:
            return {printable(name): _take(item, spec["*"], f"{where}.{name}") for name, item in value.items()}
        return {name: _take(value.get(name), inner, f"{where}.{name}") for name, inner in spec.items()}
    kind, optional = spec.removesuffix("?"), spec.endswith("?")
    if kind == "any":
        return clean(value)
    if value is None and optional:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "text" and isinstance(value, str):
        return printable(value)
    if kind == "flag" and isinstance(value, bool):
        return value
    if kind == "index" and is_number and math.isfinite(value) and value >= 0 and value == int(value):
        return int(value)
    if kind == "number" and is_number and (math.isfinite(value) or optional):
        return value if math.isfinite(value) else None
    names = {"text": "a text", "flag": "true or false", "index": "a whole number >= 0", "number": "a finite number"}
    raise _mismatch(where, names[kind], value)


def clean(value: Any) -> Any:
    """Any JSON value with printable texts and None for numbers that are not finite."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, list):
        return [clean(item) for item in value]
    if isinstance(value, dict):
        return {printable(name): clean(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _mismatch(where: str, expected: str, value: Any) -> UserError:
    return UserError(f"{printable(where)} should be {expected}, is {printable(json.dumps(value))[:60]}")


def _check_references(path: Path, concepts: dict[str, Any]) -> None:
    """Concepts are known by their position: ids count up from 0, and every index points at something."""
    num_images, num_concepts = len(concepts["images"]), len(concepts["concepts"])
    groups = concepts["mistakes"]["groups"] if concepts["mistakes"] else []
    for i, concept in enumerate(concepts["concepts"]):
        if concept["id"] != i:
            raise UserError(f"{path}: concepts[{i}].id should be {i}, is {concept['id']}")
        for j, entry in enumerate(concept["gallery"]):
            if entry["image"] >= num_images:
                raise UserError(
                    f"{path}: concepts[{i}].gallery[{j}].image is {entry['image']}, there are {num_images} images"
                )
    for j in (j for group in groups for j in group["images"]):
        if j >= num_images:
            raise UserError(f"{path}: a group of mistakes names image {j}, there are {num_images} images")
    explained = [image["explained"] for image in concepts["images"] if image["explained"]]
    removals = [(i, image["explained"]["removal"]) for i, image in enumerate(concepts["images"]) if image["explained"]]
    named = [driver["concept"] for entry in explained for driver in entry["drivers"]]
    named += [k for _, removal in removals if removal for k in removal["drivers"]]
    named += [k for entry in concepts["classes"] if entry["deletion"] for k in entry["deletion"]["concepts"]]
    named += [use["concept"] for entry in concepts["classes"] for use in entry["concepts"]]
    named += [near["concept"] for concept in concepts["concepts"] for near in concept["neighbours"]]
    named += [group["concept"] for group in groups if group["concept"] is not None]
    for k in named:
        if k >= num_concepts:
            raise UserError(f"{path} refers to concept {k}, there are {num_concepts} concepts")
    for i, removal in removals:
        if removal and not _is_even(removal):
            raise UserError(f"{path}: images[{i}].explained.removal has tables of uneven size")
    points = concepts["map"]["points"] if concepts["map"] else None
    if points is not None and (len(points) != num_concepts or any(len(point) != 2 for point in points)):
        raise UserError(f"{path}: map.points should be {num_concepts} pairs")


def _is_even(removal: dict[str, Any]) -> bool:
    """One logit for each driver, strength and class; strength 0 is among them."""
    drivers, strengths, classes = (len(removal[name]) for name in ("drivers", "strengths", "classes"))
    return (
        0.0 in removal["strengths"]
        and len(removal["logits"]) == classes
        and len(removal["at"]) == drivers
        and all(len(rows) == strengths and all(len(row) == classes for row in rows) for rows in removal["at"])
    )

"""Reports of ``netgloss consistency`` and ``netgloss harden``: one HTML file without scripts, in the look of others.

Everything from the run is escaped by jinja2; pictures and charts are inside the file; a Content-Security-Policy allows
the one style sheet (by its hash) and pictures inside the file, nothing else.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from netgloss import figures
from netgloss.errors import UserError
from netgloss.report.environment import render
from netgloss.runs import verdicts
from netgloss.runs.files import inside
from netgloss.runs.run import read_history, read_json

BUDGET = 14_000_000
"""Bytes of pictures that a report may have; units past it are listed without pictures."""


def build_adversarial_report(run_folder: Path) -> str:
    """The HTML text of a consistency or harden run's report.

    Raises
    ------
    UserError : the folder lacks a file, or one is malformed.
    """
    import jinja2

    folder = Path(run_folder)
    if not (folder / "result.json").exists():
        raise UserError(
            f"the run in {str(folder)!r} is not finished (no result.json); run its command again to continue"
        )
    run, result = read_json(folder / "run.json"), read_json(folder / "result.json")
    scores = read_json(folder / "scores.json") if (folder / "scores.json").exists() else []
    try:
        page = (
            _consistency_page(folder, result) if run["method"] == "consistency" else _harden_page(folder, run, result)
        )
        return render(
            f"{run['method']}.html",
            styles=("report.css", "adversarial.css"),
            run=run,
            result=result,
            scores=[(score, verdicts.verdict(score)) for score in scores],
            **page,
        )
    except (KeyError, TypeError, IndexError, AttributeError, jinja2.UndefinedError) as error:
        raise UserError(
            f"{folder / 'result.json'} does not have the fields of a {run.get('method')} run: {error}"
        ) from error


def _consistency_page(folder: Path, result: Mapping[str, Any]) -> dict[str, Any]:
    charts: dict[str, dict[str, str]] = {}
    pictures: dict[str, str] = {}
    left = BUDGET
    for place, (layer, record) in enumerate(result["layers"].items()):
        groups = {
            {"real": "real images R", "adversarial": "adversarial images V", "union": "both"}[part]: _floats(values)
            for part, values in record["calibrated"].items()
        }
        charts[layer] = {}
        if any(groups.values()):
            figure = figures.consistency_histograms(groups, null=_floats(record["random"].get("real", ())))
            description = f"Histograms of consis_cal of the units of {layer}, with random directions as an outline"
            charts[layer]["histogram"] = figures.to_svg(figure, prefix=f"h{place}-", description=description)
        if record["bins"]:
            figure = figures.cosines_by_bin_chart({layer: record["bins"]})
            description = f"CS1 and CS2 of the units of {layer} by their consistency on real images"
            charts[layer]["cosines"] = figures.to_svg(figure, prefix=f"c{place}-", description=description)
        files = [
            e["image"] for unit in result["gallery"].get(layer, ()) for e in unit["real"] + unit.get("adversarial", [])
        ]
        traced = result["trace"].get(layer)
        for name in ("real", "adversarial") if traced else ():
            files += [traced[name]["image"], *(e["image"] for e in traced[name]["units"])]
        for file in files:
            if file not in pictures:
                pictures[file] = _picture(folder, file) if left > 0 else ""
                left -= len(pictures[file])
    return {"charts": charts, "pictures": pictures}


def _judgement(folder: Path, name: str) -> dict[str, Any]:
    path = inside(folder, f"judged-{name}.json")
    if path is None:
        raise UserError(f"the run folder holds no evaluation of {name!r}")
    return read_json(path)


def _harden_page(folder: Path, run: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
    arms = result["arms"]
    accuracies = list(dict.fromkeys(name for arm in arms.values() for name in arm["accuracies"]))
    eps = float(run["config"]["eps"])
    steps = run["config"]["attacks"]["attack_steps"]
    curves: dict[str, dict[float, list[float]]] = {}
    for name, arm in arms.items():
        points = {0.0: "clean", eps: f"pgd-{steps}", 2 * eps: "pgd 2 eps", 64.0: "pgd 64/255"}
        curves[name] = {
            at: _floats(arm["accuracies"][key]["values"])
            for at, key in points.items()
            if key in arm["accuracies"] and _floats(arm["accuracies"][key]["values"])
        }
    charts = {
        "accuracy": figures.to_svg(
            figures.accuracy_by_eps(curves), prefix="eps-", description="Accuracy of each arm against eps of PGD"
        )
    }
    original = _judgement(folder, "original")
    seed = result["seeds"][0]
    each = {"before": original}
    each |= {name: _judgement(folder, f"{name}-seed{seed}") for name in arms if name != "original"}
    for name in [n for n in each if n != "before"]:
        charts[f"bins {name}"] = figures.to_svg(
            figures.cosines_by_bin_chart({"before": original["bins"], f"after: {name}": each[name]["bins"]}),
            prefix=f"b{len(charts)}-",
            description=f"CS1 and CS2 by consistency, before and after arm {name}",
        )
        pairs = (original["calibrated"]["adversarial"], each[name]["calibrated"]["adversarial"])
        if len(pairs[0]) == len(pairs[1]):
            figure = figures.before_and_after(*(_holes(v) for v in pairs), label="consis_cal on V")
            description = f"consis_cal on V of every channel after arm {name} over before"
            charts[f"scatter {name}"] = figures.to_svg(figure, prefix=f"s{len(charts)}-", description=description)
        groups = {}
        for title, record in (("before", original), (f"after {name}", each[name])):
            for part, label in (("real", "R"), ("adversarial", "V")):
                groups[f"{label}, {title}"] = _floats(record["calibrated"][part])
        if any(groups.values()):
            null = _floats(original["random"].get("real", ()))
            figure = figures.consistency_histograms(groups, null=null, columns=2)
            description = f"Histograms of consis_cal on real and adversarial images before and after arm {name}"
            charts[f"histogram {name}"] = figures.to_svg(figure, prefix=f"g{len(charts)}-", description=description)
    history = read_history(folder / "history.jsonl") if (folder / "history.jsonl").exists() else []
    shown = [
        {k: v for k, v in line.items() if k != "arm" and not k.startswith("check_")}
        for line in history
        if line.get("arm") in arms
    ]
    named = list(dict.fromkeys(line.get("arm") for line in history if line.get("arm") in arms))
    for place, arm in enumerate(named):
        lines = [
            s for s, line in zip(shown, (x for x in history if x.get("arm") in arms), strict=True) if line["arm"] == arm
        ]
        figure = figures.history_curves(lines)
        charts[f"history {arm}"] = figures.to_svg(
            figure, prefix=f"t{place}-", description=f"Training curves of arm {arm}"
        )
    numbers = list(dict.fromkeys(name for arm in arms.values() for name in arm["consistency"]))
    return {"charts": charts, "accuracies": accuracies, "numbers": numbers, "trained": named}


def _picture(folder: Path, file: str) -> str:
    """A picture of the run as base64, "" if it is not there or no JPEG."""
    path = inside(folder, f"images/{file}")
    try:
        data = b"" if path is None else path.read_bytes()
    except OSError:
        return ""
    return base64.b64encode(data).decode("ascii") if data[:2] == b"\xff\xd8" else ""


def _floats(values: Any) -> list[float]:
    return [float(v) for v in values if v is not None and math.isfinite(v)]


def _holes(values: Any) -> list[float]:
    return [math.nan if v is None else float(v) for v in values]

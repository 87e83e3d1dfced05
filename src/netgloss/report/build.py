"""From a run folder to the text of ``report.html``.

One file that works offline: the page's text is rendered here with jinja2 (everything escaped), concepts, classes and
images travel as data that the page's own script turns into pages on demand, thumbnails once each, concept maps as grids
of bytes that the browser draws. A Content-Security-Policy allows this one script and style (by their hashes) and
pictures inside the file, nothing else: no request can leave the page even if something slipped through.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from netgloss import figures
from netgloss.figures.style import HEAT, number
from netgloss.report import glossary
from netgloss.report.audited import pack_audit
from netgloss.report.decoded import pack_figures
from netgloss.report.environment import render, script_text
from netgloss.report.pack import decoded_pictures, pack_maps, pack_thumbnails
from netgloss.runs import doubts, verdicts
from netgloss.runs.files import RunFiles, read_run

BUDGET = 14_400_000
"""Bytes that a report may have (the aim is under 15 MB)."""

_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


def build_report(run_folder: Path, *, served: bool = False) -> str:
    """The HTML text of a run's report.

    Parameters
    ----------
    run_folder : folder with ``run.json`` and ``concepts.json``, and ``scores.json``, ``history.jsonl`` and thumbnails
        where the run has them.
    served : for ``netgloss serve``: with the page that explains an uploaded image, which may ask its own server.

    Raises
    ------
    UserError : the folder holds no finished run, or a file in it is truncated or malformed.
    """
    files = read_run(Path(run_folder))
    coarsened = pack_maps(files.concepts)
    charts = _score_charts(files)
    history = _history_chart(files)
    data = _page_data(files)
    fixed = len(to_json(data)) + sum(map(len, charts)) + len(history) + 150_000
    drawn = pack_figures(files.folder)
    fixed += sum(len(figure["data"]) for figure in drawn["entries"])
    audit = pack_audit(files.folder)
    fixed += sum(len(finding["data"]) for finding in audit["findings"]) if audit else 0
    pictures = data["pictures"] = decoded_pictures(files.concepts["concepts"])
    thumbnails, missing = pack_thumbnails(files.folder, [*files.concepts["images"], *pictures], BUDGET - fixed)

    judged = verdicts.verdicts_of(files)
    scores = [(*pair, chart) for pair, chart in zip(judged, charts, strict=True)]
    standing = {score["metric"]: v for score, v in judged}
    return render(
        "report.html",
        styles=("report.css",),
        script=script_text(served=served),
        run=files.run,
        concepts=files.concepts,
        headlines=[(s, standing[s["metric"]]) for s in verdicts.headline_scores(files.scores or [])],
        holds=verdicts.what_it_holds(files),
        trust=doubts.trust(files),
        typical=verdicts.typical_share(files),
        distrust=doubts.what_to_distrust(files, missing),
        shown=doubts.SHOWN,
        scores=scores,
        history=history,
        figures=drawn,
        audit=audit,
        coarsened=coarsened,
        missing=missing,
        method=glossary.method_text(files.run["method"]),
        served=served,
        data=to_json(data),
        thumbnails="\n".join(thumbnails),
    )


def to_json(value: Any) -> str:
    """JSON that is safe inside a ``<script>`` element: ``< > &`` and the line separators only as escapes."""
    return json.dumps(_rounded(value), ensure_ascii=False, allow_nan=False, separators=(",", ":")).translate(_ESCAPES)


def _page_data(files: RunFiles) -> dict[str, Any]:
    """What the page's script reads."""
    for concept in files.concepts["concepts"]:
        concept["sentence"] = verdicts.concept_sentence(concept, files.concepts)
        concept["serves"] = [entry["class"] for entry in verdicts.named_classes(concept, files.concepts["classes"])]
    return {
        "heat": _heat_colours(),
        "maps": bool(files.concepts["grid"]),
        "exact": files.concepts["importance"]["kind"] == "exact",
        "definition": files.concepts["importance"]["definition"],
        "scores": [_score_data(*pair) for pair in verdicts.verdicts_of(files)],
        "baselines": glossary.BASELINES,
        **{name: files.concepts[name] for name in ("images", "concepts", "classes", "map", "mistakes", "unmatched")},
    }


def _score_data(score: dict[str, Any], judged: verdicts.Verdict) -> dict[str, Any]:
    """A score with its verdict, as its own page shows it."""
    seeds = len(score["seeds"]) if isinstance(score["seeds"], list) else score["seeds"]
    count = seeds if isinstance(seeds, int) else None
    return score | {"seeds": count, "standing": judged.standing, "told": judged.words, "marks": judged.marks}


def _rounded(value: Any) -> Any:
    """Floats to five significant digits: what is shown has three."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    return value


def _heat_colours() -> str:
    """The 256 colours of the maps as hexadecimal text, the same as in the figures."""
    from matplotlib import colormaps

    table = colormaps[HEAT](range(256), bytes=True)[:, :3]
    return str(table.tobytes().hex())


def _score_charts(files: RunFiles) -> list[str]:
    charts = []
    for i, (score, judged) in enumerate(verdicts.verdicts_of(files)):
        shown = f"{verdicts.pretty(score['metric'])}: {number(score['value'])}, {judged.words}"
        figure = figures.score_chart([score], titles=False)
        charts.append(figures.to_svg(figure, prefix=f"score{i}-", description=shown))
    return charts


def _history_chart(files: RunFiles) -> str:
    if not any(name not in ("seed", "step") for line in files.history for name in line):
        return ""
    figure = figures.history_curves(files.history)
    return figures.to_svg(figure, prefix="history-", description="Training curves: each loss term over the steps")

"""Charts of numbers: scores with their baselines, training histories, histograms, the concepts of a class."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from netgloss.errors import UserError
from netgloss.figures.style import BASELINE, INK, VALUE, bare, brief, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def score_chart(scores: Sequence[Mapping[str, Any]], *, columns: int = 3, titles: bool = True) -> Figure:
    """Scores as a dot plot with intervals; one small panel per score, one row per baseline.

    The interval is drawn as a band through all rows: a baseline whose marker lies in it is not distinguishable.

    Parameters
    ----------
    scores : records of ``scores.json`` (``metric, value, low, high, baselines, higher_is_better`` are used).
    """
    if not scores:
        raise UserError("score_chart needs at least one score, got none")
    columns = min(columns, len(scores))
    rows = math.ceil(len(scores) / columns)
    tallest = max(len(s["baselines"] or {}) for s in scores)
    figure = new_figure(3.4 * columns, rows * (0.2 * (tallest + 1) + (0.75 if titles else 0.5)))
    for i, score in enumerate(scores):
        axes = figure.add_subplot(rows, columns, i + 1)
        _score_panel(axes, score)
        if titles:
            axes.set_title(brief(str(score["metric"])), fontsize=9, color=INK, loc="left", parse_math=False)
    return figure


def history_curves(history: Sequence[Mapping[str, Any]]) -> Figure:
    """Training curves: one panel per term, one line per seed; a logarithmic axis where a term spans over a factor of
    30.

    Parameters
    ----------
    history : lines of ``history.jsonl``: ``seed``, ``step`` and named numbers.
    """
    terms = [t for t in dict.fromkeys(k for line in history for k in line) if t not in ("seed", "step")]
    if not terms:
        raise UserError(f"history_curves needs lines with seed, step and at least one term, got {len(history)} lines")
    columns = min(3, len(terms))
    rows = math.ceil(len(terms) / columns)
    figure = new_figure(3.2 * columns, 1.9 * rows)
    seeds = sorted({int(line["seed"]) for line in history})
    for i, term in enumerate(terms):
        axes = bare(figure.add_subplot(rows, columns, i + 1), left=True)
        seen: list[float] = []
        for place, seed in enumerate(seeds):
            points = [(x["step"], x[term]) for x in history if int(x["seed"]) == seed and x.get(term) is not None]
            points = [(step, value) for step, value in points if math.isfinite(value)]
            if points:
                shade = 0.4 + 0.6 * (len(seeds) - place) / len(seeds)
                axes.plot(*zip(*points, strict=True), color=VALUE, alpha=shade, linewidth=1.3, label=f"seed {seed}")
                seen += [value for _, value in points]
        if seen and min(seen) > 0 and max(seen) > 30 * min(seen):
            axes.set_yscale("log")
        axes.set_title(brief(term), fontsize=9, color=INK, loc="left", parse_math=False)
        axes.set_xlabel("step", fontsize=8, color=INK)
        axes.tick_params(which="both", colors=INK, labelsize=8)
    return figure


def _score_panel(axes: Axes, score: Mapping[str, Any]) -> None:
    baselines = {name: value for name, value in (score["baselines"] or {}).items() if value is not None}
    bare(axes)
    value, low, high = score["value"], score["low"], score["high"]
    if low is not None and high is not None:
        axes.axvspan(low, high, color=VALUE, alpha=0.18, linewidth=0)
        axes.plot([low, high], [0, 0], color=VALUE, linewidth=2.4, solid_capstyle="round")
    if value is not None:
        axes.plot([value], [0], "o", color=VALUE, markersize=6.5)
    axes.plot(list(baselines.values()), range(1, len(baselines) + 1), "D", color=BASELINE, markersize=4.5)
    labels = ["this explanation", *(brief(name.replace("_", " "), 26) for name in baselines)]
    axes.set_yticks(range(len(labels)), labels=labels, parse_math=False)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.margins(x=0.12)
    axes.locator_params(axis="x", nbins=4)
    axes.xaxis.set_major_formatter(lambda x, _: f"{0.0 if abs(x) < 1e-12 else x:g}".replace("-", "\u2212"))
    better = {True: "higher is better →", False: "← lower is better"}.get(score["higher_is_better"], "")
    axes.set_xlabel(better, fontsize=7.5, color=INK)

"""Charts of a comparison: one metric over all methods with its controls, and fidelity against sparsity."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from netgloss.errors import UserError
from netgloss.figures.style import AGAINST, BASELINE, INK, VALUE, bare, brief, new_figure, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CONTROLS = {"random_directions": "D", "shuffled_codes": "X", "natural_axes": "s"}
"""Controls that are drawn, and their markers."""
_TELLS = {"beats random": True, "differs from random": True}


def method_dots(
    names: Sequence[str],
    scores: Sequence[Mapping[str, Any] | None],
    marks: Sequence[str],
    *,
    title: str = "",
) -> Figure:
    """One metric of every method as a dot with its 95 % interval, one row per method, its own controls in grey.

    A full dot beats random, a hollow one is not distinguishable from it, a crossed one is worse (see
    ``evaluation/scores.py``). The axis covers all intervals; it starts at 0 only if the data do.

    Parameters
    ----------
    scores : score records, None for methods without the metric. marks : the verdict of each.
    """
    if not len(names) == len(scores) == len(marks):
        raise UserError(f"expected as many names as scores and marks, got {len(names)}, {len(scores)}, {len(marks)}")
    if not any(s is not None and s["value"] is not None for s in scores):
        raise UserError("method_dots needs at least one score, got none")
    figure = new_figure(6.2, 0.27 * len(names) + 0.95)
    axes = bare(figure.add_subplot())
    used: set[str] = set()
    for place, (score, mark) in enumerate(zip(scores, marks, strict=True)):
        axes.axhline(place, color=INK, alpha=0.08, linewidth=0.8)
        if score is not None and score["value"] is not None:
            used |= _row(axes, place, score, mark)
    axes.set_yticks(range(len(names)), labels=[brief(name, 28) for name in names], parse_math=False)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.margins(x=0.06)
    axes.xaxis.set_major_formatter(lambda x, _: f"{0.0 if abs(x) < 1e-12 else x:g}".replace("-", "\u2212"))
    some = next(s for s in scores if s is not None)
    better = {True: "higher is better →", False: "← lower is better"}.get(some["higher_is_better"], "")
    axes.set_xlabel(better, fontsize=8, color=INK)
    axes.set_title(brief(title), fontsize=10, color=INK, loc="left", parse_math=False)
    drawn = [name for name in CONTROLS if name in used]
    for name in drawn:
        axes.plot([], [], CONTROLS[name], color=BASELINE, markersize=4.5, label=name.replace("_", " "))
    if drawn:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.02), frameon=False, fontsize=7.5, labelcolor=INK)
    return figure


def _row(axes: Axes, place: int, score: Mapping[str, Any], mark: str) -> set[str]:
    """One method's row; the controls that it has."""
    found = {n for n in CONTROLS if (score["baselines"] or {}).get(n) is not None}
    for name in found:
        axes.plot([score["baselines"][name]], [place], CONTROLS[name], color=BASELINE, markersize=4, zorder=2)
    colour = AGAINST if mark == "worse than random" else VALUE
    if score["low"] is not None and score["high"] is not None:
        axes.plot([score["low"], score["high"]], [place, place], color=colour, linewidth=2, zorder=3)
    full = _TELLS.get(mark, not mark)
    face = colour if full else "white"
    axes.plot([score["value"]], [place], "o", color=colour, markerfacecolor=face, markersize=6, zorder=4)
    if mark == "worse than random":
        axes.plot([score["value"]], [place], "x", color=colour, markersize=6, zorder=5)
    return found


def front(
    points: Sequence[Mapping[str, Any]],
    *,
    x_label: str,
    y_label: str,
    x_higher_is_better: bool = False,
    y_higher_is_better: bool = True,
    log_x: bool = False,
) -> Figure:
    """One score against another, with intervals on both axes, and the line of methods that no other beats in both.

    Parameters
    ----------
    points : ``name``, ``x`` and ``y`` (score records), ``control`` (drawn in grey, no part of the line).
    """
    shown = [p for p in points if p["x"]["value"] is not None and p["y"]["value"] is not None]
    if not shown:
        raise UserError("front needs at least one method with both scores, got none")
    figure = new_figure(6.2, 4.0)
    axes = bare(figure.add_subplot(), left=True)
    if log_x and min(p["x"]["value"] for p in shown) > 0:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    for point in shown:
        colour = BASELINE if point.get("control") else VALUE
        x, y = point["x"], point["y"]
        for score, across in ((x, True), (y, False)):
            if score["low"] is not None and score["high"] is not None:
                ends = [score["low"], score["high"]]
                place = (ends, [y["value"]] * 2) if across else ([x["value"]] * 2, ends)
                axes.plot(*place, color=colour, linewidth=1.4, zorder=3)
        axes.plot([x["value"]], [y["value"]], "o", color=colour, markersize=5.5, zorder=4)
    best = _undominated([p for p in shown if not p.get("control")], x_higher_is_better, y_higher_is_better)
    if len(best) > 1:
        line = sorted((p["x"]["value"], p["y"]["value"]) for p in best)
        axes.plot(*zip(*line, strict=True), color=VALUE, linewidth=0.9, linestyle=(0, (4, 3)), zorder=2)
    axes.margins(x=0.16, y=0.1)
    axes.set_xlabel(x_label, fontsize=8.5, color=INK)
    axes.set_ylabel(y_label, fontsize=8.5, color=INK)
    _label(axes, shown)
    return figure


def _undominated(points: Sequence[Mapping[str, Any]], x_higher: bool, y_higher: bool) -> list[Mapping[str, Any]]:
    def key(point: Mapping[str, Any]) -> tuple[float, float]:
        x, y = point["x"]["value"], point["y"]["value"]
        return (x if x_higher else -x, y if y_higher else -y)

    def beaten(point: Mapping[str, Any]) -> bool:
        own = key(point)
        return any(all(o >= m for o, m in zip(key(p), own, strict=True)) and key(p) != own for p in points)

    return [point for point in points if not beaten(point)]


_DROPS = (-3, -12, 6, -21, 15, -30, 24, -39)
"""Heights of a name over its dot, in points, in the order tried."""


def _label(axes: Axes, points: Sequence[Mapping[str, Any]]) -> None:
    """Names next to their dots; one whose place is taken moves up or down."""
    from matplotlib.transforms import Bbox

    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # lays the axes out, so that extents are the final ones
    taken: list[Any] = []
    for point in sorted(points, key=lambda p: -p["y"]["value"]):
        for drop in _DROPS:
            text = axes.annotate(
                brief(point["name"], 24),
                (point["x"]["value"], point["y"]["value"]),
                xytext=(6, drop),
                textcoords="offset points",
                fontsize=7.5,
                color=INK,
                parse_math=False,
            )
            box = text.get_window_extent()
            if not any(Bbox.intersection(box, other) for other in taken) or drop == _DROPS[-1]:
                taken.append(box)
                break
            text.remove()


def value_text(score: Mapping[str, Any] | None) -> str:
    """``value (low .. high)`` of a score record, or a dash."""
    if score is None or score["value"] is None:
        return "–"
    if score["low"] is None or not math.isfinite(score["low"]):
        return number(score["value"])
    return f"{number(score['value'])} ({number(score['low'])} .. {number(score['high'])})"

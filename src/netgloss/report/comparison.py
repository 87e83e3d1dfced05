"""The page of a comparison: no script, nothing from elsewhere, every text escaped."""

from __future__ import annotations

from netgloss import figures
from netgloss.figures.comparison import front, method_dots
from netgloss.report.environment import render
from netgloss.runs.comparison import SYMBOLS, Comparison

FRONTS = (("l0", "r2"), ("l0", "agreement"), ("l0_share", "r2"))
"""Pairs of scores that are drawn against each other."""


def comparison_page(comparison: Comparison) -> str:
    """The HTML text of a comparison."""
    return render(
        "comparison.html",
        styles=("comparison.css",),
        comparison=comparison,
        record=comparison.record,
        by_name={m["name"]: m for m in comparison.record["methods"]},
        dots={metric: _dots(comparison, metric) for metric in comparison.metrics},
        fronts=_fronts(comparison),
        pairs={metric: comparison.pairs(metric) for metric in comparison.metrics},
        symbols=SYMBOLS,
    )


def _dots(comparison: Comparison, metric: str) -> str:
    names = [name for name in comparison.methods if comparison.score(name, metric) is not None]
    figure = method_dots(
        names, [comparison.score(n, metric) for n in names], [comparison.mark(n, metric) for n in names]
    )
    shown = "; ".join(f"{name} {comparison.cell(name, metric)}" for name in names)
    return figures.to_svg(figure, prefix=f"dots-{metric}-", description=f"{metric}: {shown}")


def _fronts(comparison: Comparison) -> list[tuple[str, str]]:
    found = []
    for x, y in FRONTS:
        points = [
            {
                "name": n,
                "x": comparison.score(n, x),
                "y": comparison.score(n, y),
                "control": comparison.kind(n) == "control",
            }
            for n in comparison.methods
            if comparison.score(n, x) and comparison.score(n, y) and comparison.reads(n) != "pooled"
        ]
        if len(points) > 1:
            better = {m["name"]: m["higher_is_better"] for m in comparison.record["metrics"]}
            figure = front(
                points,
                x_label=f"{x} (lower is sparser)",
                y_label=y,
                x_higher_is_better=bool(better[x]),
                y_higher_is_better=bool(better[y]),
                log_x=x == "l0",
            )
            title = f"{y} against {x}"
            found.append((title, figures.to_svg(figure, prefix=f"front-{x}-{y}-", description=title)))
    return found

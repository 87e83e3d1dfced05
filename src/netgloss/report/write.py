"""Reports written into folders: of runs, and of comparisons."""

from __future__ import annotations

from pathlib import Path

from netgloss.report.adversarial import build_adversarial_report
from netgloss.report.build import build_report
from netgloss.report.comparison import comparison_page
from netgloss.runs.comparison import Comparison
from netgloss.runs.run import Run, to_json, write_atomically


def write_report(run: Run) -> Path:
    """Renders ``report.html`` from what the folder of ``run`` holds, and returns its path.

    Raises
    ------
    UserError : a file of the folder is missing or damaged.
    """
    build = build_adversarial_report if run.method in ("consistency", "harden") else build_report
    run.remove_leftovers()
    path = run.path / "report.html"
    write_atomically(path, build(run.path))
    return path


def write_comparison(comparison: Comparison, folder: str | Path) -> Comparison:
    """Writes ``comparison.json``, ``.csv`` and ``.html`` into ``folder``; returns the comparison."""
    folder = Path(folder)
    write_atomically(folder / "comparison.json", to_json(comparison.record))
    write_atomically(folder / "comparison.csv", comparison.to_csv())
    write_atomically(folder / "comparison.html", comparison_page(comparison))
    return comparison

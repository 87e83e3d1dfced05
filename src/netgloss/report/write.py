"""Which report a run gets, written into its folder."""

from __future__ import annotations

from pathlib import Path

from netgloss.report.adversarial import build_adversarial_report
from netgloss.report.build import build_report
from netgloss.runs.run import Run, write_atomically


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

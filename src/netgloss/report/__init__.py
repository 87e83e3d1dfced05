"""The report: a run folder becomes one HTML file that opens offline and can be sent to a colleague."""

from __future__ import annotations

from netgloss.report.build import build_report
from netgloss.report.write import write_comparison, write_report

__all__ = ["build_report", "write_comparison", "write_report"]

"""The comparison: every metric on every method, on one layer, over the same images; see ``build.py``."""

from __future__ import annotations

from netgloss.comparison.build import CompareOptions, compare
from netgloss.comparison.faithful import FaithfulnessOptions
from netgloss.comparison.report import Comparison
from netgloss.comparison.single import faithfulness_run

__all__ = ["CompareOptions", "Comparison", "FaithfulnessOptions", "compare", "faithfulness_run"]

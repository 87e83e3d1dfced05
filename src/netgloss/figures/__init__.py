"""Figures: pure functions from data to a matplotlib ``Figure`` (nothing is saved, no pyplot state is touched).

Arrays and plain records in, a ``Figure`` out; the caller saves it. :func:`to_svg` turns one into SVG for a web page.
"""

from __future__ import annotations

from netgloss.figures.charts import activation_histogram, class_concepts, history_curves, score_chart
from netgloss.figures.overlay import concept_gallery, image_explanation, overlay_map
from netgloss.figures.svg import to_svg

__all__ = [
    "activation_histogram",
    "class_concepts",
    "concept_gallery",
    "history_curves",
    "image_explanation",
    "overlay_map",
    "score_chart",
    "to_svg",
]

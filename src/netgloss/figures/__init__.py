"""Figures: pure functions from data to a matplotlib ``Figure`` (nothing is saved, no pyplot state is touched).

Arrays and plain records in, a ``Figure`` out; the caller saves it. :func:`to_svg` turns one into SVG for a web page.
"""

from __future__ import annotations

from netgloss.figures.charts import activation_histogram, class_concepts, history_curves, score_chart
from netgloss.figures.decoded import (
    READING,
    ConceptPictures,
    Triple,
    alpha_strip,
    concept_strip,
    decoded_triples,
    difference_map,
    layer_strip,
    neighbour_strip,
)
from netgloss.figures.overlay import concept_gallery, image_explanation, overlay_map
from netgloss.figures.svg import to_svg

__all__ = [
    "READING",
    "ConceptPictures",
    "Triple",
    "activation_histogram",
    "alpha_strip",
    "class_concepts",
    "concept_gallery",
    "concept_strip",
    "decoded_triples",
    "difference_map",
    "history_curves",
    "image_explanation",
    "layer_strip",
    "neighbour_strip",
    "overlay_map",
    "score_chart",
    "to_svg",
]

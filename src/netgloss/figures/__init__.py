"""Figures: pure functions from data to a matplotlib ``Figure`` (nothing is saved, no pyplot state is touched).

Arrays and plain records in, a ``Figure`` out; the caller saves it. :func:`to_svg` turns one into SVG for a web page.
"""

from __future__ import annotations

from netgloss.figures.charts import activation_histogram, class_concepts, history_curves, score_chart
from netgloss.figures.consistency import (
    accuracy_by_eps,
    before_and_after,
    consistency_histograms,
    cosines_by_bin_chart,
    heat_tile,
    real_and_adversarial,
    trace_figure,
)
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
from netgloss.figures.decoded_curves import alpha_trade_off, depth_curve
from netgloss.figures.overlay import concept_gallery, image_explanation, overlay_map
from netgloss.figures.svg import to_svg

__all__ = [
    "READING",
    "ConceptPictures",
    "Triple",
    "accuracy_by_eps",
    "activation_histogram",
    "alpha_strip",
    "alpha_trade_off",
    "before_and_after",
    "class_concepts",
    "concept_gallery",
    "concept_strip",
    "consistency_histograms",
    "cosines_by_bin_chart",
    "decoded_triples",
    "depth_curve",
    "difference_map",
    "heat_tile",
    "history_curves",
    "image_explanation",
    "layer_strip",
    "neighbour_strip",
    "overlay_map",
    "real_and_adversarial",
    "score_chart",
    "to_svg",
    "trace_figure",
]

"""Figures: pure functions from data to a matplotlib ``Figure`` (nothing is saved, no pyplot state is touched).

Arrays and plain records in, a ``Figure`` out; the caller saves it. :func:`to_svg` turns one into SVG for a web page.
"""

from __future__ import annotations

from netgloss.figures.audit import FindingPictures, finding_figure
from netgloss.figures.charts import history_curves, score_chart
from netgloss.figures.consistency import (
    accuracy_by_eps,
    before_and_after,
    consistency_histograms,
    cosines_by_bin_chart,
    heatmap_tile,
)
from netgloss.figures.decoded import (
    READING,
    ConceptPictures,
    Triple,
    alpha_strip,
    concept_strip,
    decoded_triples,
    difference_map,
)
from netgloss.figures.overlay import ExplainedImage, concept_gallery, image_explanation, outline_map, overlay_map
from netgloss.figures.svg import to_svg

__all__ = [
    "READING",
    "ConceptPictures",
    "ExplainedImage",
    "FindingPictures",
    "Triple",
    "accuracy_by_eps",
    "alpha_strip",
    "before_and_after",
    "concept_gallery",
    "concept_strip",
    "consistency_histograms",
    "cosines_by_bin_chart",
    "decoded_triples",
    "difference_map",
    "finding_figure",
    "heatmap_tile",
    "history_curves",
    "image_explanation",
    "outline_map",
    "overlay_map",
    "score_chart",
    "to_svg",
]

"""Classifiers: loading by name, listing layers, reading and replacing what layers give, and the path from a layer to
the logits.
"""

from netgloss.classifiers.heads import Outputs, probabilities
from netgloss.classifiers.layers import LayerInfo, last_map, list_layers
from netgloss.classifiers.loading import Classifier, imagenet_wnids, load_classifier, load_from_spec
from netgloss.classifiers.outline import outline_layers
from netgloss.classifiers.preprocessing import Geometry, Preprocessing
from netgloss.classifiers.section import cut_section, section_from_spec, section_of
from netgloss.classifiers.tail import Tail, later_layers
from netgloss.classifiers.taps import Taps, network_of, replaced

__all__ = [
    "Classifier",
    "Geometry",
    "LayerInfo",
    "Outputs",
    "Preprocessing",
    "Tail",
    "Taps",
    "cut_section",
    "imagenet_wnids",
    "last_map",
    "later_layers",
    "list_layers",
    "load_classifier",
    "load_from_spec",
    "network_of",
    "outline_layers",
    "probabilities",
    "replaced",
    "section_from_spec",
    "section_of",
]

"""Image sources, their annotations, and the synthetic benchmark."""

from netgloss.class_names import match_classes
from netgloss.data.annotations import ImageAnnotation, keypoint_cell, open_annotations, place, to_grid
from netgloss.data.base import Joined
from netgloss.data.images import UnreadableImage, open_image
from netgloss.data.sources import ArraySource, ImageSource, open_images, split, split_ids

__all__ = [
    "ArraySource",
    "ImageAnnotation",
    "ImageSource",
    "Joined",
    "UnreadableImage",
    "keypoint_cell",
    "match_classes",
    "open_annotations",
    "open_image",
    "open_images",
    "place",
    "split",
    "split_ids",
    "to_grid",
]

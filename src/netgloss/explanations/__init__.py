"""Explanations of a layer: what each concept is, which classes it serves, what drove each prediction."""

from netgloss.explanations.content import ExplanationOptions, explain_layer
from netgloss.explanations.images import ImageExplanation, explain_images

__all__ = ["ExplanationOptions", "ImageExplanation", "explain_images", "explain_layer"]

"""The gloss of a layer: what each concept is, whom it serves, what drove each prediction."""

from netgloss.explanations.content import GlossOptions, make_gloss
from netgloss.explanations.images import ImageExplanation, explain_images

__all__ = ["GlossOptions", "ImageExplanation", "explain_images", "make_gloss"]

"""The gloss of a layer: what each concept is, whom it serves, what drove each prediction."""

from netgloss.explanations.content import GlossOptions, make_gloss
from netgloss.explanations.single import describe_image

__all__ = ["GlossOptions", "describe_image", "make_gloss"]

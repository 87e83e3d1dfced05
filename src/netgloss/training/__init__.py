"""The one fit loop: devices, precision, checkpoints, resume, progress."""

from netgloss.training.fit import build_explainer, fit, fit_together, make_fabric
from netgloss.training.loop import Checkpoint, FitOptions
from netgloss.training.stream import ActivationStream, Surroundings

__all__ = [
    "ActivationStream",
    "Checkpoint",
    "FitOptions",
    "Surroundings",
    "build_explainer",
    "fit",
    "fit_together",
    "make_fabric",
]

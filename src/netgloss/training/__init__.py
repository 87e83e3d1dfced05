"""The one fit loop: devices, precision, checkpoints, resume, progress."""

from netgloss.training.fit import Checkpoint, FitOptions, build_explainer, fit, fit_together, make_fabric
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

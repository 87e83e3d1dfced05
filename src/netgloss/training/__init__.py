"""The one fit loop: devices, precision, checkpoints, resume, progress."""

from netgloss.training.fit import Checkpoint, FitOptions, build_explainer, fit, make_fabric
from netgloss.training.stream import ActivationStream

__all__ = ["ActivationStream", "Checkpoint", "FitOptions", "build_explainer", "fit", "make_fabric"]

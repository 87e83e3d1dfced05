"""Settings of hardening; the loop is in ``adversarial/harden.py``."""

from __future__ import annotations

import math
from dataclasses import dataclass

from netgloss.adversarial.arms import DISTANCES, Distance
from netgloss.errors import UserError


@dataclass(frozen=True)
class HardenConfig:
    """How to harden; every field is a flag of the command line."""

    alpha: float = 0.5
    """Share of the clean cross-entropy; the rest is the adversarial one."""
    beta: float = 1.0
    """Weight of the feature term."""
    eps: float = 4.0
    """Radius of the ball in 1/255 of the pixel range, before normalisation."""
    distance: Distance = "relative"
    """Feature term: relative, pivot (the real image's features stay where they are) or l2."""
    epochs: int = 20
    """Passes over the training images."""
    batch_size: int = 128
    """Real images a step."""
    lr: float = 0.01
    """Learning rate of SGD at its start; cosine to 0."""
    weight_decay: float = 5e-4
    """Weight decay."""
    momentum: float = 0.9
    """Momentum of SGD."""
    clip: float | None = None
    """Largest norm of a step's gradient (TRADES on a confident network collapses without); default none."""
    craft_steps: int = 10
    """Steps of the PGD and TRADES arms."""
    from_scratch: bool = False
    """Start from new random weights (drawn with the seed) instead of the network's own."""
    keep_zeros: bool = False
    """Weights that are exactly 0 stay 0 (pruned networks)."""
    holdout: float = 0.1
    """Share of the training images that chooses the epoch (and beta), and is not trained on."""
    check_images: int = 512
    """Held-out images checked after every epoch, at most."""
    check_steps: int = 20
    """PGD steps of that check."""

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise UserError(f"alpha must lie in 0 to 1, got {self.alpha:g}")
        if not 0 <= self.eps <= 255:
            raise UserError(f"eps is in 1/255 of the pixel range (4, say), got {self.eps:g}")
        if not (self.beta >= 0 and math.isfinite(self.beta)):
            raise UserError(f"beta must not be negative, got {self.beta:g}")
        if self.distance not in DISTANCES:
            raise UserError(f"distance must be one of {', '.join(DISTANCES)}, got {self.distance!r}")
        for name in ("epochs", "batch_size", "craft_steps", "check_images", "check_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.lr > 0 or not 0 <= self.momentum < 1 or self.weight_decay < 0:
            raise UserError(
                f"lr must be positive, momentum in [0, 1), weight_decay not negative; got {self.lr:g}, "
                f"{self.momentum:g}, {self.weight_decay:g}"
            )
        if self.clip is not None and not self.clip > 0:
            raise UserError(f"clip is the largest norm of the gradient and must be positive, got {self.clip:g}")
        if not 0 < self.holdout < 1:
            raise UserError(f"holdout must lie between 0 and 1, got {self.holdout:g}")

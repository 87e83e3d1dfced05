"""Options of the interpretable basis, with the published presets. Private to ``explainers/``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from netgloss.errors import UserError
from netgloss.explainers.base import TrainingConfig

_PRESETS = {"uibe": (0.0, 5.0, 3.0, 0.0), "cbe": (5.0, 0.9, 1.1, 0.25), "default": (5.0, 5.0, 3.0, 0.0)}
"""lambda_ic, tau, gamma, lambda_net."""


@dataclass(frozen=True)
class InterpretableBasisConfig(TrainingConfig):
    """Options of :class:`InterpretableBasis`."""

    num_concepts: int = 0
    """Always the number of features of the layer; 0 says so."""
    steps: int = 2000
    """Number of optimiser steps at most; the fit ends earlier when its loss stands still."""
    batch_size: int = 4096
    """Rows a step."""
    lr: float = 3e-3
    """Learning rate of Adam; halved when the loss reaches a plateau."""
    preset: Literal["default", "uibe", "cbe"] = "default"
    """Published objective (uibe, cbe) or ours; gives the options below that are left open."""
    lambda_s: float = 2.6
    """Weight of sparsity."""
    lambda_ma: float = 2.8
    """Weight of maximum activation."""
    lambda_mm: float = 0.6
    """Weight of maximum margin."""
    lambda_ic: float | None = None
    """Weight of the floor under each detector's activity (preset uibe: 0, else 5)."""
    tau: float | None = None
    """The floor, in detectors a row if all sat on it: about the mean actives of a row (cbe: 0.9, default: 5)."""
    gamma: float | None = None
    """Power that keeps weak responses from meeting the floor (cbe: 1.1, default: 3)."""
    lambda_net: float | None = None
    """Weight of the network term: what the detectors see must decide the prediction (preset cbe: 0.25, else 0)."""
    network: Literal["cnn", "uur"] = "cnn"
    """How the network term takes concepts out: every positive detector to its boundary (cnn), or a random part of the
    way to all boundaries at once (uur)."""
    whiten: bool = False
    """Start from uncorrelated features instead of standardised ones."""
    shared: bool = True
    """One bias and one margin for all detectors; otherwise one each."""
    init: Literal["haar", "identity"] = "haar"
    """Start from a random rotation, or from the layer's own axes."""

    def __post_init__(self) -> None:
        if self.num_concepts < 0:
            raise UserError(f"num_concepts must be 0 (the number of features) or that number, got {self.num_concepts}")
        for name, known in (("preset", tuple(_PRESETS)), ("network", ("cnn", "uur")), ("init", ("haar", "identity"))):
            if getattr(self, name) not in known:
                raise UserError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name in ("steps", "batch_size", "lr"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("lambda_s", "lambda_ma", "lambda_mm", "lambda_ic", "lambda_net"):
            if (value := getattr(self, name)) is not None and not value >= 0:
                raise UserError(f"{name} must not be negative, got {value}")
        for name in ("tau", "gamma"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise UserError(f"{name} must be positive, got {value}")

    @property
    def inactive(self) -> tuple[float, float, float]:
        """``(lambda_ic, tau, gamma)`` with the preset's values where they are open."""
        chosen = (self.lambda_ic, self.tau, self.gamma)
        weight, tau, gamma = (p if c is None else c for c, p in zip(chosen, _PRESETS[self.preset][:3], strict=True))
        return weight, tau, gamma

    @property
    def network_weight(self) -> float:
        """``lambda_net``, the preset's where it is open."""
        return _PRESETS[self.preset][3] if self.lambda_net is None else self.lambda_net

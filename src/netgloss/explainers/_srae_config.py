"""SRAE's options, and what a user's names of classes mean. Private to ``explainers/``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from netgloss.errors import UserError, nearest
from netgloss.explainers.base import TrainingConfig

# faith, reconstruction, pull-away
_WEIGHTS: dict[str, tuple[float, float, float]] = {
    "srae": (40, 15, 5),
    "released": (40, 10, 10),
    "no-pull-away": (40, 15, 0),
    "sae": (40, 300, 0),
    "sae-pt": (40, 300, 5),
    "nn": (40, 0, 0),
    "nn-pt": (40, 0, 5),
}


@dataclass(frozen=True)
class SRAEConfig(TrainingConfig):
    """Options of :class:`SRAE`."""

    num_concepts: int = 5
    """Number n of x-features of each module (12 suits a joint one)."""
    classes: tuple[str, ...] = ()
    """Classes to explain: names, WordNet ids or indices; default the ten that the images show most."""
    joint: bool = False
    """One module for all classes instead of one each."""
    preset: Literal["srae", "released", "no-pull-away", "sae", "sae-pt", "nn", "nn-pt"] = "srae"
    """Objective: the method, the setting of the released code, or an ablation; gives the weights that are left open."""
    weight_faith: float | None = None
    """Weight a_p of the class scores' error."""
    weight_reconstruction: float | None = None
    """Weight a_r of the reconstruction."""
    weight_pull_away: float | None = None
    """Weight a_t of the pull-away term."""
    q: float = 100.0
    """Sharpness of the sparse reconstruction: a feature counts half at a mean squared error of 1/q."""
    positives: float = 0.2
    """Share of every batch drawn from each class's images (all classes together at most 0.8); 0 draws evenly."""
    attempts: int = 5
    """Fits of a module at most, until it is accepted; 1 takes the first as it is."""
    repair: bool = True
    """Draw x-features anew that are dead after pre-training."""
    dropout: float = 0.02
    """Dropout after the first encoder layer."""
    weight_decay: float = 1e-4
    """Weight of the squared parameters in joint training."""
    shuffle_logits: bool = False
    """Control: give every image of the fit the scores of another one."""
    steps: int = 3400
    """Optimiser steps of an attempt (170 epochs of 1,000 images)."""
    batch_size: int = 50
    """Images a step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preset not in _WEIGHTS:
            raise UserError(f"preset must be one of {', '.join(_WEIGHTS)}, got {self.preset!r}")
        for name in ("weight_faith", "weight_reconstruction", "weight_pull_away", "weight_decay"):
            if (value := getattr(self, name)) is not None and not value >= 0:
                raise UserError(f"{name} must not be negative, got {value}")
        if not self.q > 0:
            raise UserError(f"q must be positive, got {self.q}")
        if self.attempts < 1:
            raise UserError(f"attempts must be at least 1, got {self.attempts}")
        for name in ("positives", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")

    @property
    def weights(self) -> tuple[float, float, float]:
        """``(a_p, a_r, a_t)`` with the preset's values where they are open."""
        chosen = (self.weight_faith, self.weight_reconstruction, self.weight_pull_away)
        faith_, rebuild, pull = (p if c is None else c for c, p in zip(chosen, _WEIGHTS[self.preset], strict=True))
        return faith_, rebuild, pull


def class_name(text: str) -> str:
    """The name of ``"index: name"``, up to its first comma."""
    return text.partition(":")[2].strip().split(",")[0] or f"class {text.strip()}"


def class_place(text: str, num_classes: int) -> int:
    """The class index of ``"index: name"`` or ``"index"``."""
    number = text.partition(":")[0].strip()
    if not number.isdecimal() or int(number) >= num_classes:
        raise UserError(f"class {text!r} is not an index below {num_classes} (or 'index: name')")
    return int(number)


def find_class(text: str, class_names: Sequence[str], wnids: Sequence[str]) -> int:
    """The class that a user's text means: an index, a WordNet id, a name, or a name up to its first comma."""
    number = text.partition(":")[0].strip()
    if number.isdecimal():
        return class_place(text, len(class_names))
    wanted = text.strip().lower()
    short = [name.split(",")[0].strip().lower() for name in class_names]
    for table in (list(wnids), [name.lower() for name in class_names], short):
        places = [i for i, name in enumerate(table) if name == wanted]
        if len(places) > 1:
            raise UserError(f"class {text!r} is ambiguous: say the index, {' or '.join(map(str, places))}")
        if places:
            return places[0]
    hint = nearest(wanted, short) or short[:5]
    raise UserError(f"the classifier has no class {text!r}; did you mean {', '.join(hint)}?")

"""Attacks on classifiers, in units of pixels."""

from netgloss.adversarial.attacks import (
    ATTACKS,
    attack_in_batches,
    ensemble,
    feature,
    fgsm,
    fgsm_rs,
    least_likely,
    least_likely_steps,
    pgd,
)
from netgloss.adversarial.crafting import AttackResult, PixelClassifier
from netgloss.adversarial.targets import assign_targets, least_likely_targets

__all__ = [
    "ATTACKS",
    "AttackResult",
    "PixelClassifier",
    "assign_targets",
    "attack_in_batches",
    "ensemble",
    "feature",
    "fgsm",
    "fgsm_rs",
    "least_likely",
    "least_likely_steps",
    "least_likely_targets",
    "pgd",
]

"""Numbers of hardened networks over seeds: means, intervals, score records."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from netgloss.metrics.base import Score, interval


def summarise_arm(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean, 95 % interval over seeds and single values of every number of an arm's evaluations."""

    def summary(values: list[float | None], bounds: tuple[float, float]) -> dict[str, Any]:
        known = torch.tensor([math.nan if v is None else v for v in values], dtype=torch.float64)
        low, high = interval(known, bounds=bounds) if len(known) > 1 and not known.isnan().any() else (None, None)
        return {"mean": float(known.mean()), "low": low, "high": high, "values": values}

    accuracies = {
        name: summary([r["accuracies"].get(name) for r in records], (0.0, 1.0)) for name in records[0]["accuracies"]
    }
    attack = [r["consistency"]["attack"] for r in records]
    numbers = {name: summary([a.get(name) for a in attack], (-math.inf, math.inf)) for name in attack[0]}
    health = [r["consistency"]["health"] for r in records]
    numbers |= {name: summary([h.get(name) for h in health], (0.0, math.inf)) for name in health[0]}
    for name in ("random_real", "random_adversarial"):
        numbers[name] = summary([r["consistency"].get(name) for r in records], (-math.inf, 1.0))
    numbers["reached_target"] = summary([r["reached_target"] for r in records], (0.0, 1.0))
    numbers["response_correlation"] = summary([r["response_correlation"] for r in records], (-1.0, 1.0))
    return {"accuracies": accuracies, "consistency": numbers}


def arm_scores(
    table: Mapping[str, Sequence[Mapping[str, Any]]], main: str, num_attacked: int, num_probe: int
) -> list[Score]:
    """Score records of arm ``main``, with the original and the other arms as baselines."""
    wanted = {
        "clean_accuracy": (lambda r: r["accuracies"]["clean"], True, (0.0, 1.0), "Accuracy on unchanged images."),
        "robust_accuracy": (
            lambda r: r["accuracies"][_main_pgd(r["accuracies"])],
            True,
            (0.0, 1.0),
            "Accuracy when every start of untargeted PGD, made against the network itself, must fail. It bounds the "
            "accuracy under this attack only; a stronger one may find more.",
        ),
        "consistency_adversarial": (
            lambda r: r["consistency"]["attack"]["consis_cal_adversarial"],
            True,
            (-math.inf, 1.0),
            "Mean consis_cal of the layer's channels on adversarial images V made against the network itself. Copies "
            "that fool nothing look consistent: read it together with the share of V that reached its target.",
        ),
        "consistency_real": (
            lambda r: r["consistency"]["attack"]["consis_cal_real"],
            True,
            (-math.inf, 1.0),
            "Mean consis_cal of the layer's channels on real images. It cannot show that a channel matters.",
        ),
    }
    scores = []
    for name, (read, higher, bounds, definition) in wanted.items():
        values = {
            arm: torch.tensor([_number(read(r)) for r in found], dtype=torch.float64) for arm, found in table.items()
        }
        low, high = interval(values[main], bounds=bounds)
        scores.append(
            Score(
                metric=name,
                value=float(values[main].mean()),
                low=low,
                high=high,
                baselines={arm: float(v.mean()) for arm, v in values.items() if arm != main},
                n=num_attacked if "accuracy" in name else num_probe,
                seeds=len(values[main]),
                higher_is_better=higher,
                definition=f"Arm {main!r}. {definition}",
            )
        )
    return scores


def _main_pgd(accuracies: Mapping[str, float]) -> str:
    return next(name for name in accuracies if name.startswith("pgd-") and name != "pgd-l2")


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)

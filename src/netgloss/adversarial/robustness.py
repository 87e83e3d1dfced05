"""How a network fares under attacks that are made anew against it, and whether its robustness may be an illusion.

An image counts as robust if every start of the attack leaves it rightly classified; starts after the first are spent on
the images that are still right. Attacks (eps in pixels, Linf unless said otherwise)::

    clean, noise (uniform in the ball), fgsm-rs, pgd-20, pgd-100, pgd-l2 (own eps), pgd at 2 eps, feature (at a layer),
    least-likely, transfer (images made against another network), pgd at 64/255
    apgd-ce, apgd-t: of AutoAttack (Croce & Hein, arXiv 2003.01690), by the library pyautoattack

Masked gradients make a network look robust. Signs of it, each an accuracy that ought to be no larger than another one:
pgd-100 <= pgd-20, white-box <= transfer, pgd at 64/255 about 0, fgsm-rs <= noise. Passing them is no proof.

Shape letters: N images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from netgloss.adversarial.attacks import attack_in_batches, feature, fgsm_rs, least_likely, pgd
from netgloss.adversarial.crafting import AttackResult, PixelClassifier, eval_mode, random_start
from netgloss.errors import UserError
from netgloss.progress import Progress, Silent

_NO_AUTOATTACK = "AutoAttack needs the library pyautoattack: pip install 'netgloss[oracle]'"
LARGE_EPS = 64 / 255
SLACK = 0.02
"""Accuracies are compared up to this: attacks are drawn at random."""


@dataclass(frozen=True)
class AttackPlan:
    """Which attacks a network is evaluated with, and how thoroughly."""

    l2: float = 0.5
    """Radius of the L2 attack, in the pixel range [0, 1] (0.5 for 28 to 32 pixels, 3 for 224)."""
    attack_steps: int = 20
    """Steps of PGD."""
    long_steps: int = 100
    """Steps of the long PGD; 0 leaves it out."""
    restarts: int = 5
    """Starts of PGD."""
    feature_steps: int = 50
    """Steps of the feature attack; 0 leaves it out."""
    autoattack: bool = False
    """Run APGD-CE and APGD-T of AutoAttack as well (pip install 'netgloss[oracle]')."""
    autoattack_steps: int = 100
    """Their steps."""

    def __post_init__(self) -> None:
        if min(self.attack_steps, self.restarts, self.autoattack_steps) < 1:
            raise UserError("attack_steps, restarts and autoattack_steps must be at least 1")
        if min(self.l2, self.long_steps, self.feature_steps) < 0:
            raise UserError("l2, long_steps and feature_steps must not be negative")


@torch.no_grad()
def predictions(classifier: PixelClassifier, x: Tensor, *, batch_size: int = 64) -> Tensor:
    """Classes (N,) of pixels (N, channels, H, W) in eval mode; modes come back."""
    with eval_mode(classifier):
        return torch.cat([classifier(part).argmax(1) for part in x.split(batch_size)])


def surviving(
    attack: Callable[..., AttackResult],
    classifier: PixelClassifier,
    x: Tensor,
    y: Tensor,
    *,
    restarts: int = 1,
    seed: int = 0,
    ids: list[str] | None = None,
    batch_size: int = 64,
    **options: Any,
) -> Tensor:
    """(N,) True where no start of an untargeted attack brings the image to another class."""
    ids = [str(i) for i in range(len(x))] if ids is None else ids
    alive = predictions(classifier, x, batch_size=batch_size) == y
    for restart in range(restarts):
        left = alive.nonzero().squeeze(1)
        if not len(left):
            break
        found = attack_in_batches(
            attack,
            classifier,
            x[left],
            y[left],
            ids=[ids[i] for i in left.tolist()],
            batch_size=batch_size,
            seed=seed + 1000 * restart,
            **options,
        )
        alive[left] = found.predictions == y[left]
    return alive


def robust_accuracies(
    classifier: PixelClassifier,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    plan: AttackPlan | None = None,
    layer: str | None = None,
    classes: list[int] | None = None,
    transfer: Tensor | None = None,
    seed: int = 0,
    ids: list[str] | None = None,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Accuracies of pixels x (N, channels, H, W) of classes y (N,) by attack; only those that were run are there.

    Parameters
    ----------
    eps : radius in pixels of [0, 1].
    layer : of the feature attack; None leaves it out.
    classes : among which the least likely one is sought; default all.
    transfer : (N, channels, H, W) images made from x against another network.
    """
    plan, progress = plan or AttackPlan(), progress or Silent()
    if plan.autoattack and find_spec("pyautoattack") is None:  # told before minutes of other attacks
        raise UserError(_NO_AUTOATTACK)
    ids = [str(i) for i in range(len(x))] if ids is None else ids
    common: dict[str, Any] = {"seed": seed, "ids": ids, "batch_size": batch_size}
    noise = (x + random_start(x, eps, "linf", seed=seed, ids=ids)).clamp(0, 1)

    def several(starts: int, **options: Any) -> Callable[[], Tensor]:
        inner: dict[str, Any] = {"eps": eps, "steps": plan.attack_steps, **options}

        def run() -> Tensor:
            return surviving(_single_pgd, classifier, x, y, restarts=starts, **common, **inner)

        return run

    runs: dict[str, Callable[[], Tensor]] = {
        "clean": lambda: predictions(classifier, x, batch_size=batch_size) == y,
        "noise": lambda: predictions(classifier, noise, batch_size=batch_size) == y,
        "fgsm-rs": lambda: surviving(fgsm_rs, classifier, x, y, eps=eps, **common),
        f"pgd-{plan.attack_steps}": several(plan.restarts),
        "pgd-l2": several(plan.restarts, eps=plan.l2, norm="l2"),
        "pgd 2 eps": several(1, eps=min(1.0, 2 * eps)),
        "pgd 64/255": several(1, eps=LARGE_EPS),
        "least-likely": lambda: surviving(least_likely, classifier, x, y, eps=eps, classes=classes, **common),
    }
    if plan.long_steps:
        runs[f"pgd-{plan.long_steps}"] = several(plan.restarts, steps=plan.long_steps)
    if layer is not None and plan.feature_steps:
        runs["feature"] = lambda: surviving(
            feature, classifier, x, y, eps=eps, layer=layer, steps=plan.feature_steps, **common
        )
    if transfer is not None:
        runs["transfer"] = lambda: predictions(classifier, transfer, batch_size=batch_size) == y
    progress.start("attack", len(runs) + plan.autoattack, unit="attacks")
    found = {}
    for name, run in runs.items():
        found[name] = float(run().float().mean())
        progress.advance(note=f"{name}: {found[name]:.3f}")
    if plan.autoattack:
        found |= autoattack_accuracies(
            classifier,
            x,
            y,
            eps=eps,
            steps=plan.autoattack_steps,
            restarts=plan.restarts,
            seed=seed,
            batch_size=batch_size,
        )
        progress.advance(note=f"AutoAttack: {found['autoattack']:.3f}")
    progress.finish()
    return found


def _single_pgd(*args: Any, **options: Any) -> AttackResult:
    return pgd(*args, restarts=1, **options)


def autoattack_accuracies(
    classifier: PixelClassifier,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    attacks: tuple[str, ...] = ("apgd-ce", "apgd-t"),
    steps: int = 100,
    restarts: int = 5,
    seed: int = 0,
    batch_size: int = 64,
) -> dict[str, float]:
    """Accuracy after each attack of AutoAttack in turn (each on what the ones before left), ``autoattack`` the last.

    Parameters
    ----------
    attacks : of ``apgd-ce, apgd-dlr, apgd-t, fab, fab-t, square``; AutoAttack proper is apgd-ce, apgd-t, fab-t, square.
    steps, restarts : of APGD; AutoAttack proper has 100 and 5.

    Raises
    ------
    UserError : the library is not installed.
    """
    try:
        from pyautoattack import AutoAttack
    except ImportError:
        raise UserError(_NO_AUTOATTACK) from None
    alive = predictions(classifier, x, batch_size=batch_size) == y
    found: dict[str, float] = {}
    with eval_mode(classifier):
        for name in attacks:
            left = alive.nonzero().squeeze(1)
            if len(left):
                runner = AutoAttack(
                    classifier, norm="Linf", eps=eps, version="custom", attacks=[name], seed=seed, device=x.device
                )
                runner.apgd.n_iter = runner.apgd_targeted.n_iter = runner.fab.n_iter = steps
                runner.apgd.n_restarts = restarts
                broken, _ = runner.run_standard_evaluation(x[left], y[left], batch_size=batch_size)
                if float((broken - x[left]).abs().max()) > eps + 1e-6:
                    raise UserError(f"{name} of pyautoattack left its ball of {eps:g}")
                alive[left] = predictions(classifier, broken, batch_size=batch_size) == y[left]
            found[name] = float(alive.float().mean())
    return {**found, "autoattack": float(alive.float().mean())}


def masking_failures(accuracies: Mapping[str, float], *, steps: int = 20, long_steps: int = 100) -> list[str]:
    """Which signs of masked gradients there are, each in a line; empty if none of the checks that were run fails."""
    name, long = f"pgd-{steps}", f"pgd-{long_steps}"
    checks = [
        (long, name, "a longer attack finds fewer errors"),
        (name, "transfer", "images made against another network do more harm than its own"),
        ("fgsm-rs", "noise", "one gradient step does less harm than noise"),
    ]
    found = [
        f"{a} leaves {accuracies[a]:.3f} right, more than {b} with {accuracies[b]:.3f}: {told}"
        for a, b, told in checks
        if a in accuracies and b in accuracies and accuracies[a] > accuracies[b] + SLACK
    ]
    large = accuracies.get("pgd 64/255", math.nan)
    if large > 0.05:
        found.append(f"pgd at 64/255 leaves {large:.3f} right, where about 0 is expected")
    return found

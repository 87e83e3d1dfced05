"""How a network fares under attacks regenerated against it, and whether its robustness may be an illusion.

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
from functools import partial
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


@dataclass(frozen=True)
class Attacked:
    """Images to attack.

    Parameters
    ----------
    x : (N, channels, H, W) pixels in [0, 1]. y : (N,) classes.
    ids : one id per image, for its random numbers; default its place.
    classes : among which the least likely one is sought; default all.
    transfer : (N, channels, H, W) images made from x against another network.
    """

    x: Tensor
    y: Tensor
    ids: list[str] | None = None
    classes: list[int] | None = None
    transfer: Tensor | None = None


def robust_accuracies(
    classifier: PixelClassifier,
    images: Attacked,
    *,
    eps: float,
    plan: AttackPlan | None = None,
    layer: str | None = None,
    seed: int = 0,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Accuracy under each attack of a plan; only attacks that were run are listed.

    Parameters
    ----------
    eps : radius in pixels of [0, 1].
    layer : of the feature attack; None leaves it out.
    """
    plan, progress = plan or AttackPlan(), progress or Silent()
    if plan.autoattack and find_spec("pyautoattack") is None:  # before minutes of other attacks
        raise UserError(_NO_AUTOATTACK)
    runs = _runs(classifier, images, eps, plan, layer, {"seed": seed, "batch_size": batch_size})
    progress.start("attack", len(runs) + plan.autoattack, unit="attacks")
    accuracies = {}
    for name, run in runs.items():
        accuracies[name] = float(run().float().mean())
        progress.advance(note=f"{name}: {accuracies[name]:.3f}")
    if plan.autoattack:
        accuracies |= autoattack_accuracies(
            classifier,
            images.x,
            images.y,
            eps=eps,
            steps=plan.autoattack_steps,
            restarts=plan.restarts,
            seed=seed,
            batch_size=batch_size,
        )
        progress.advance(note=f"APGD: {accuracies['autoattack']:.3f}")
    progress.finish()
    return accuracies


def _runs(
    classifier: PixelClassifier,
    images: Attacked,
    eps: float,
    plan: AttackPlan,
    layer: str | None,
    options: dict[str, Any],
) -> dict[str, Callable[[], Tensor]]:
    """Each attack of a plan by name; called, it gives (N,) True where the class survives."""
    x, y, seed, batch_size = images.x, images.y, options["seed"], options["batch_size"]
    ids = [str(i) for i in range(len(x))] if images.ids is None else images.ids
    attack = partial(surviving, classifier=classifier, x=x, y=y, ids=ids, eps=eps, **options)
    steps = partial(attack, _single_pgd, steps=plan.attack_steps)
    right = lambda given: predictions(classifier, given, batch_size=batch_size) == y  # noqa: E731
    noise = (x + random_start(x, eps, "linf", seed=seed, ids=ids)).clamp(0, 1)
    runs: dict[str, Callable[[], Tensor]] = {
        "clean": partial(right, x),
        "noise": partial(right, noise),
        "fgsm-rs": partial(attack, fgsm_rs),
        f"pgd-{plan.attack_steps}": partial(steps, restarts=plan.restarts),
        "pgd-l2": partial(steps, restarts=plan.restarts, eps=plan.l2, norm="l2"),
        "pgd 2 eps": partial(steps, eps=min(1.0, 2 * eps)),
        "pgd 64/255": partial(steps, eps=LARGE_EPS),
        "least-likely": partial(attack, least_likely, classes=images.classes),
    }
    if plan.long_steps:
        runs[f"pgd-{plan.long_steps}"] = partial(steps, restarts=plan.restarts, steps=plan.long_steps)
    if layer is not None and plan.feature_steps:
        runs["feature"] = partial(attack, feature, layer=layer, steps=plan.feature_steps)
    if images.transfer is not None:
        runs["transfer"] = partial(right, images.transfer)
    return runs


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
        f"{a} leaves {accuracies[a]:.3f} right, more than {b} with {accuracies[b]:.3f}: {reason}"
        for a, b, reason in checks
        if a in accuracies and b in accuracies and accuracies[a] > accuracies[b] + SLACK
    ]
    large = accuracies.get("pgd 64/255", math.nan)
    if large > 0.05:
        found.append(f"pgd at 64/255 leaves {large:.3f} right, where about 0 is expected")
    return found

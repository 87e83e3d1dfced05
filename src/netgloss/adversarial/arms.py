"""What a hardening step minimises: the consistent loss and the arms that it is compared with.

After Dong et al., arXiv 1901.09035; phi are the flat features of one layer, sg stops the gradient::

    loss = alpha CE(f(x), y) + (1 - alpha) CE(f(x*), y) + beta d(phi(x), phi(x*))
    d    = |phi(x) - phi(x*)|^2 / (sg |phi(x)|^2 + 1e-6), batch mean        "pivot": phi(x) is constant too; "l2": no
                                                                            denominator
    fgsm    x* = P(x + d0 - a sign g), g of CE(f(x + d0), t), d0 ~ U(-eps, eps), t != y, a = 1.25 eps
    pgd     x* by steps of eps / 4 up CE(f(x), y) from a random start       Madry et al., arXiv 1706.06083
    noise   x* = clip(x + d0)
    trades  CE(f(x), y) + 6 KL(f(x) || f(x')), x' by steps of eps / 4 up the KL from x + 0.001 N(0, 1)
                                                                            Zhang et al., arXiv 1901.08573

x* is a constant for the outer gradient and is made in eval mode. From the paper come the single backward pass of a
target label, real and adversarial images together, and a loss on the output and the last convolutional block; alpha,
beta, eps, the form of d and the schedule are unknown and ours.

Shape letters: B images, C classes, D features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from netgloss.adversarial.crafting import PixelClassifier, crafting, gradient, project, projected_steps
from netgloss.errors import UserError, unknown

Crafting = Literal["none", "noise", "fgsm", "pgd", "trades"]
Distance = Literal["relative", "pivot", "l2"]
DISTANCES: tuple[Distance, ...] = ("relative", "pivot", "l2")

TRADES_WEIGHT = 6.0


@dataclass(frozen=True)
class Arm:
    """How an arm makes x* and which terms it has.

    Attributes
    ----------
    crafting : where x* comes from.
    features : whether the feature term counts (else beta = 0).
    alpha : share of the clean cross-entropy, where the arm fixes it; None: as configured.
    summary : what it is, in a few words.
    """

    crafting: Crafting
    features: bool
    alpha: float | None
    summary: str


ARMS: dict[str, Arm] = {
    "clean": Arm("none", False, 1.0, "clean fine-tuning: cross-entropy only"),
    "noise": Arm("noise", True, None, "uniform noise with the feature term"),
    "at": Arm("fgsm", False, None, "adversarial training: the consistent loss with beta = 0"),
    "consistent-only": Arm("fgsm", True, 1.0, "feature term with clean cross-entropy only (alpha = 1)"),
    "consistent": Arm("fgsm", True, None, "the consistent loss"),
    "pgd-at": Arm("pgd", False, None, "adversarial training by PGD"),
    "pgd-consistent": Arm("pgd", True, None, "adversarial training by PGD with the feature term"),
    "trades": Arm("trades", False, None, "TRADES"),
}


def find_arm(name: str) -> Arm:
    """An arm by name; an unknown one raises :class:`UserError` with the nearest right ones."""
    if name not in ARMS:
        raise unknown("arm", name, ARMS)
    return ARMS[name]


def arm_name(arm: Arm) -> str:
    """The name under which :func:`find_arm` finds an arm."""
    return next(name for name, known in ARMS.items() if known == arm)


def feature_distance(phi: Tensor, other: Tensor, *, kind: Distance = "relative") -> Tensor:
    """D of the module docstring, a scalar, of features (B, ...) of real and of adversarial images."""
    if phi.shape != other.shape:
        raise UserError(f"features must have the same shape, got {tuple(phi.shape)} and {tuple(other.shape)}")
    phi_BD, other_BD = phi.flatten(1), other.flatten(1)
    if kind == "pivot":
        phi_BD = phi_BD.detach()
    apart = (phi_BD - other_BD).square().sum(1)
    if kind == "l2":
        return apart.mean()
    return (apart / (phi_BD.detach().square().sum(1) + 1e-6)).mean()


def kl_divergence(clean_logits: Tensor, logits: Tensor) -> Tensor:
    """KL(softmax(clean_logits) || softmax(logits)), both (B, C), batch mean, in nats."""
    return F.kl_div(logits.log_softmax(1), clean_logits.log_softmax(1), reduction="batchmean", log_target=True)


def loss_terms(
    arm: Arm,
    logits: Tensor,
    labels: Tensor,
    *,
    adversarial_logits: Tensor | None,
    distance: Tensor | None,
    alpha: float,
    beta: float,
) -> dict[str, Tensor]:
    """The weighted terms of an arm; their sum is minimised.

    Parameters
    ----------
    logits, adversarial_logits : (B, C) of x and of x*; None where nothing was crafted.
    distance : d, a scalar, where the arm has a feature term.
    alpha, beta : as configured, beta with its ramp; an arm may fix or ignore them.
    """
    if arm.crafting == "trades":
        assert adversarial_logits is not None
        divergence = TRADES_WEIGHT * kl_divergence(logits, adversarial_logits)
        return {"clean": F.cross_entropy(logits, labels), "kl": divergence}
    alpha = alpha if arm.alpha is None else arm.alpha
    terms = {"clean": alpha * F.cross_entropy(logits, labels)}
    if adversarial_logits is not None and alpha < 1:
        terms["adversarial"] = (1 - alpha) * F.cross_entropy(adversarial_logits, labels)
    if distance is not None and arm.features and beta > 0:
        terms["features"] = beta * distance
    return terms


def needs_crafting(arm: Arm, *, alpha: float, beta: float) -> bool:
    """False where x* would reach no term (alpha = 1, beta = 0)."""
    alpha = alpha if arm.alpha is None else arm.alpha
    return arm.crafting == "trades" or (arm.crafting != "none" and (alpha < 1 or (arm.features and beta > 0)))


def draw_targets(labels: Tensor, classes: Tensor, *, generator: torch.Generator) -> Tensor:
    """Targets (B,), uniform over ``classes`` (C,) without each image's own (drawn on the CPU)."""
    if len(classes) < 2:
        raise UserError(f"targets other than the true class need two classes, got {len(classes)}")
    place = torch.searchsorted(classes, labels.cpu())
    shift = torch.randint(1, len(classes), (len(labels),), generator=generator)
    return classes[(place + shift) % len(classes)].to(labels.device)


def craft(
    kind: Crafting,
    classifier: PixelClassifier,
    x: Tensor,
    y: Tensor,
    targets: Tensor,
    *,
    eps: float,
    generator: torch.Generator,
    steps: int = 10,
) -> Tensor:
    """x* (B, channels, H, W) of the module docstring, constant, in the ball and in [0, 1].

    Parameters
    ----------
    x : pixels in [0, 1]. y, targets : (B,). eps : radius, in pixels of [0, 1]. generator : on the CPU.
    steps : of pgd and trades.
    """
    with crafting(classifier, x, y, eps=eps, targets=targets) as pixels:
        if kind == "trades":
            with torch.no_grad():
                clean = classifier(pixels)
            start = (pixels + 0.001 * torch.randn(x.shape, generator=generator).to(pixels)).clamp(0, 1)
            loss = lambda image: kl_divergence(clean, classifier.craft(image))  # noqa: E731
            z = project(start, pixels, eps, "linf")
            return projected_steps(loss, z, pixels, eps=eps, length=eps / 4, steps=steps).detach()
        d0 = ((torch.rand(x.shape, generator=generator) * 2 - 1) * eps).to(pixels)
        if kind == "noise":
            return (pixels + d0).clamp(0, 1)
        if kind == "fgsm":
            start = pixels + d0
            step = gradient(lambda image: F.cross_entropy(classifier.craft(image), targets, reduction="sum"), start)
            return project(start - 1.25 * eps * step.sign(), pixels, eps, "linf").detach()
        assert kind == "pgd", kind
        loss = lambda image: F.cross_entropy(classifier.craft(image), y, reduction="sum")  # noqa: E731
        z = project(pixels + d0, pixels, eps, "linf")
        return projected_steps(loss, z, pixels, eps=eps, length=eps / 4, steps=steps).detach()

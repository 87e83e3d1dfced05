"""Adversarial images: small changes of pixels that make a network err.

All attacks work on pixels x in [0, 1] before normalisation (:class:`PixelClassifier` holds it), and eps is in these
units. P projects to the eps ball around x and then clips to [0, 1]; g is the gradient of the loss by the image only::

    fgsm          clip(x + eps sign g), g of CE(f(x), y)                  Goodfellow et al., arXiv 1412.6572
    fgsm_rs       P(x + d0 + a sign g), g at x + d0, d0 ~ U(-eps, eps)    Wong et al., arXiv 2001.03994; a = 1.25 eps
    least_likely  x <- P(x - a sign g), g of CE(f(x), t), t = argmin f    Kurakin et al., arXiv 1607.02533
    pgd           x <- P(x + a sign g) or P(x + a g / |g|), from a random start     Madry et al., arXiv 1706.06083
    ensemble      Adam on z: lam rmsd(z, x) + mean_k CE(f_k(z), t); P each step     after Dong et al., arXiv 1708.05493
    feature       PGD ascent on |phi(x*) - phi(x)|^2, from a random start

With ``targets`` t, fgsm, fgsm_rs and pgd descend CE(f(x), t) instead. The network is in eval mode while they run and is
left as it was: modes, parameters, buffers and ``.grad``, after exceptions too. Random starts and ties depend on the
seed and the image's id, not on the batch.

Shape letters: B images, C classes, E classifiers of an ensemble.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from netgloss.adversarial.crafting import (
    AttackResult,
    Ids,
    PixelClassifier,
    crafting,
    gradient,
    project,
    projected_steps,
    random_start,
)
from netgloss.adversarial.targets import least_likely_targets
from netgloss.classifiers.taps import Taps
from netgloss.errors import UserError

Norm = Literal["linf", "l2"]


def fgsm(
    classifier: PixelClassifier, x: Tensor, y: Tensor, *, eps: float, targets: Tensor | None = None
) -> AttackResult:
    """One step of length eps along the sign of the gradient.

    Parameters (of all attacks)
    ---------------------------
    x : (B, channels, H, W) pixels in [0, 1].
    y : (B,) true classes.
    eps : radius of the ball, in pixels of [0, 1].
    targets : (B,) classes to be predicted instead.
    ids : one id an image, for its random numbers; default its place in the batch.

    Raises
    ------
    UserError : for pixels outside [0, 1], a negative eps, or lengths that differ.
    """
    with crafting(classifier, x, y, eps=eps, targets=targets) as pixels:
        sign, wanted = (1, y) if targets is None else (-1, targets)
        step = gradient(partial(_cross_entropy, classifier, wanted=wanted), pixels).sign()
        return AttackResult.measure(classifier, pixels, (pixels + sign * eps * step).clamp(0, 1), y, targets)


def fgsm_rs(
    classifier: PixelClassifier,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    targets: Tensor | None = None,
    step_size: float | None = None,
    seed: int = 0,
    ids: Ids | None = None,
) -> AttackResult:
    """One step from a random start; ``step_size`` defaults to 1.25 eps."""
    with crafting(classifier, x, y, eps=eps, targets=targets, ids=ids) as pixels:
        sign, wanted = (1, y) if targets is None else (-1, targets)
        length = 1.25 * eps if step_size is None else step_size
        start = pixels + random_start(pixels, eps, "linf", seed=seed, ids=ids)
        step = gradient(partial(_cross_entropy, classifier, wanted=wanted), start).sign()
        return AttackResult.measure(
            classifier, pixels, project(start + sign * length * step, pixels, eps, "linf"), y, targets
        )


def least_likely_steps(eps: float) -> int:
    """T = ceil(min(e + 4, 1.25 e)) for eps = e / 255: 3, 5, 10 and 20 steps for e = 2, 4, 8 and 16."""
    e = round(eps * 255, 6)
    return math.ceil(min(e + 4, 1.25 * e))


def least_likely(
    classifier: PixelClassifier,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    classes: Sequence[int] | None = None,
    steps: int | None = None,
    step_size: float = 1 / 255,
    seed: int = 0,
    ids: Ids | None = None,
) -> AttackResult:
    """Iterative steps to the least likely class, of all or of ``classes``, but not y; ties are drawn."""
    with crafting(classifier, x, y, eps=eps, ids=ids) as pixels:
        with torch.no_grad():
            logits = classifier(pixels)
        targets = least_likely_targets(logits, y, classes=classes, seed=seed, ids=ids)
        loss = partial(_cross_entropy, classifier, wanted=targets)
        steps = least_likely_steps(eps) if steps is None else steps
        z = projected_steps(loss, pixels, pixels, eps=eps, length=-step_size, steps=steps)
        return AttackResult.measure(classifier, pixels, z, y, targets)


def pgd(
    classifier: PixelClassifier,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    norm: Norm = "linf",
    targets: Tensor | None = None,
    steps: int = 20,
    restarts: int = 5,
    seed: int = 0,
    ids: Ids | None = None,
) -> AttackResult:
    """Projected gradient steps from ``restarts`` random starts, of length 2.5 eps / steps.

    Keeps the restart of the highest loss, or with targets the first that reaches its target, else the one nearest to
    it. Images that have reached their target take part in no further restart.
    """
    if steps < 1 or restarts < 1:
        raise UserError(f"PGD needs at least one step and one start, got {steps} and {restarts}")
    with crafting(classifier, x, y, eps=eps, targets=targets, ids=ids, norm=norm) as pixels:
        sign, wanted = (1, y) if targets is None else (-1, targets)
        length = 2.5 * eps / steps
        best, best_loss = pixels.clone(), torch.full((len(x),), -math.inf, device=x.device)
        open_ = torch.arange(len(x), device=x.device)
        for restart in range(restarts):
            own, aim = pixels[open_], wanted[open_]
            some = range(len(x)) if ids is None else ids
            start = random_start(own, eps, norm, seed=seed, ids=[some[i] for i in open_.tolist()], draw=restart)
            loss_of = partial(_cross_entropy, classifier, wanted=aim)
            z = project(own + start, own, eps, norm)
            z = projected_steps(loss_of, z, own, eps=eps, length=sign * length, steps=steps, norm=norm)
            with torch.no_grad():
                logits = classifier(z)
                loss = sign * F.cross_entropy(classifier.craft(z), aim, reduction="none")
            hit = (logits.argmax(1) == aim) & (targets is not None)
            better = (loss > best_loss[open_]) | hit
            best[open_[better]], best_loss[open_[better]] = z[better], loss[better]
            open_ = open_[~hit]
            if len(open_) == 0:
                break
        return AttackResult.measure(classifier, pixels, best, y, targets)


def ensemble(
    classifiers: Sequence[PixelClassifier],
    x: Tensor,
    y: Tensor,
    *,
    targets: Tensor,
    eps: float = 16 / 255,
    steps: int = 50,
    lr: float = 2 / 255,
    lam: float = 0.0,
    fuse: Literal["loss", "prob", "logit"] = "loss",
) -> AttackResult:
    """One image that brings every classifier to its target.

    Parameters
    ----------
    classifiers : E of them, which read the same pixels and have the same classes.
    lam : weight of the root mean square difference.
    fuse : mean of the losses, -log of the mean probability, or loss of the mean logits.

    Returns
    -------
    As of the first classifier; success means that it predicts the target.
    """
    if not classifiers or fuse not in ("loss", "prob", "logit"):
        raise UserError(f'an ensemble needs classifiers and fuse "loss", "prob" or "logit", got {fuse!r}')

    def loss(z: Tensor) -> Tensor:
        logits_EBC = torch.stack([classifier.craft(z) for classifier in classifiers])
        away = lam * (z - pixels).flatten(1).norm(dim=1) / math.sqrt(z[0].numel()) if lam else 0.0
        if fuse == "loss":
            each = torch.stack([F.cross_entropy(logits, targets, reduction="none") for logits in logits_EBC]).mean(0)
        elif fuse == "prob":
            log_mean = logits_EBC.log_softmax(2).logsumexp(0) - math.log(len(classifiers))
            each = F.nll_loss(log_mean, targets, reduction="none")
        else:
            each = F.cross_entropy(logits_EBC.mean(0), targets, reduction="none")
        return (each + away).sum()

    modules = nn.ModuleList(classifiers)
    with crafting(modules, x, y, eps=eps, targets=targets) as pixels:
        z = pixels.clone()
        adam = torch.optim.Adam([z], lr=lr)
        for _ in range(steps):
            z.grad = gradient(loss, z)
            adam.step()
            z.copy_(project(z, pixels, eps, "linf"))
        return AttackResult.measure(classifiers[0], pixels, z.detach(), y, targets)


def feature(
    classifier: PixelClassifier,
    x: Tensor,
    y: Tensor,
    *,
    layer: str,
    eps: float,
    steps: int = 50,
    step_size: float | None = None,
    seed: int = 0,
    ids: Ids | None = None,
) -> AttackResult:
    """As far away as possible in the features of ``layer``, without labels; success means another class than y.

    ``step_size`` defaults to 2.5 eps / steps. The start is random, as the gradient at x itself is zero.
    """
    if steps < 1:
        raise UserError(f"the feature attack needs at least one step, got {steps}")
    with crafting(classifier, x, y, eps=eps, ids=ids) as pixels, Taps(classifier.net, layer) as taps:

        def features(z: Tensor) -> Tensor:
            return taps(classifier.normalise(z))[layer].flatten(1)

        with torch.no_grad():
            clean = features(pixels).clone()
        length = 2.5 * eps / steps if step_size is None else step_size
        z = project(pixels + random_start(pixels, eps, "linf", seed=seed, ids=ids), pixels, eps, "linf")
        loss = lambda image: (features(image) - clean).square().sum()  # noqa: E731
        z = projected_steps(loss, z, pixels, eps=eps, length=length, steps=steps)
    with crafting(classifier, x, y, eps=eps):
        return AttackResult.measure(classifier, pixels, z, y, None)


ATTACKS: dict[str, Callable[..., AttackResult]] = {
    "fgsm": fgsm,
    "fgsm-rs": fgsm_rs,
    "least-likely": least_likely,
    "pgd": pgd,
    "ensemble": ensemble,
    "feature": feature,
}


def attack_in_batches(
    attack: Callable[..., AttackResult],
    classifier: Any,
    x: Tensor,
    y: Tensor,
    *,
    batch_size: int = 32,
    targets: Tensor | None = None,
    ids: Ids | None = None,
    **options: Any,
) -> AttackResult:
    """An attack on many images; random numbers do not depend on ``batch_size``. ``ids`` default to the places in x."""
    aligned: dict[str, Any] = {} if targets is None else {"targets": targets}
    if "ids" in inspect.signature(attack).parameters:
        aligned["ids"] = range(len(x)) if ids is None else ids
    for name, values in {"labels": y, **aligned}.items():
        if len(values) != len(x):
            raise UserError(f"{len(x)} images need as many {name}, got {len(values)}")
    results = []
    for start in range(0, len(x), batch_size):
        part = slice(start, start + batch_size)
        own = {name: values[part] for name, values in aligned.items()}
        results.append(attack(classifier, x[part], y[part], **own, **options))
    return AttackResult.join(results)


def _cross_entropy(classifier: PixelClassifier, z: Tensor, wanted: Tensor) -> Tensor:
    logits = classifier.craft(z)
    if not 0 <= int(wanted.min()) <= int(wanted.max()) < logits.shape[1]:
        raise UserError(
            f"classes must lie in 0 to {logits.shape[1] - 1}, got {int(wanted.min())} to {int(wanted.max())}"
        )
    return F.cross_entropy(logits, wanted, reduction="sum")

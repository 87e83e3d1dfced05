"""Hardening: a network trained on with the consistent loss, or with one of the arms it is compared with.

The losses are in ``adversarial/arms.py``. SGD with momentum 0.9, weight decay and a cosine schedule; eps and beta ramp
up linearly in the first tenth of the steps. Real and adversarial images go through the network together. In fine-tuning
the statistics of batch norms stay frozen (their weights learn); from scratch they are those of the joint batch.
Crafting is in eval mode.

A tenth of the training images, equally many of every class, is held out. After every epoch at most 512 of them are
checked: clean accuracy, FGSM-RS and PGD-20. The weights of the best epoch, by the mean of clean and PGD accuracy, are
kept. **Catastrophic overfitting** of the one-step arms (PGD accuracy more than 10 points below its best while FGSM-RS
accuracy has not fallen) restores the best epoch and goes on with PGD, 10 steps by default.

Resume is exact: step k draws its images and random numbers from (seed, k), so that a killed run that continues from its
last checkpoint ends with the weights of the undisturbed one.

Shape letters: N training images, B images of a step, D features.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from netgloss.adversarial.arms import (
    Crafting,
    craft,
    draw_targets,
    feature_distance,
    find_arm,
    loss_terms,
    needs_crafting,
)
from netgloss.adversarial.attacks import fgsm_rs, pgd
from netgloss.adversarial.crafting import PixelClassifier, eval_mode
from netgloss.adversarial.harden_config import HardenConfig
from netgloss.adversarial.pixels import LabelledPixels
from netgloss.classifiers.taps import Taps, find_layer
from netgloss.errors import UserError
from netgloss.metrics.feature_health import effective_rank
from netgloss.progress import Progress, Silent
from netgloss.training import Checkpoint, FitOptions, make_fabric

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from netgloss.classifiers import Classifier


class DivergedError(UserError):
    """The loss became NaN or Inf."""


@dataclass(frozen=True)
class Hardened:
    """What hardening gives.

    Attributes
    ----------
    net : the network with the weights of the best epoch, on the CPU, in eval mode.
    checks : one record an epoch (epoch 0 is the start): clean, fgsm_rs and pgd accuracy, feature norm, effective rank.
    best_epoch : whose weights these are.
    switched : epoch after which PGD took over, or None.
    warnings : what to know before using it.
    """

    net: nn.Module
    checks: list[dict[str, float]]
    best_epoch: int
    switched: int | None
    warnings: list[str]

    @property
    def selection(self) -> float:
        """Mean of clean and PGD accuracy of the best epoch on the held-out training images."""
        return selection(self.checks[self.best_epoch])


def selection(check: dict[str, float]) -> float:
    """What chooses epoch and beta: the mean of clean and PGD accuracy."""
    return (check["clean"] + check["pgd"]) / 2


def overfits(checks: list[dict[str, float]]) -> bool:
    """Catastrophic overfitting at the last of the epochs' checks: PGD accuracy more than 0.10 below its best, FGSM-RS
    accuracy not below what it was then."""
    best = max(range(len(checks)), key=lambda i: checks[i]["pgd"])
    last = checks[-1]
    return last["pgd"] < checks[best]["pgd"] - 0.10 and last["fgsm_rs"] >= checks[best]["fgsm_rs"]


def split_training(data: LabelledPixels, share: float, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Indices to train on and to hold out, ``share`` of every class (one image at least), the same for every arm.

    Raises
    ------
    UserError : a class with fewer than two images.
    """
    generator = torch.Generator().manual_seed(seed)
    held = []
    for c in data.probe_labels.unique().tolist():
        own = (data.probe_labels == c).nonzero().squeeze(1)
        if len(own) < 2:
            raise UserError(
                f"class {data.class_names[c]!r} has {len(own)} training image; hardening needs two at least"
            )
        count = min(max(1, round(share * len(own))), len(own) - 1)
        held.append(own[torch.randperm(len(own), generator=generator)[:count]])
    heldout = torch.cat(held).sort()[0]
    rest = torch.ones(len(data), dtype=torch.bool)
    rest[heldout] = False
    return rest.nonzero().squeeze(1), heldout


class HardeningStep(nn.Module):
    """The network with the loss of an arm around it, as the training loop runs it."""

    def __init__(self, pixels: PixelClassifier, layer: str, arm: str, config: HardenConfig) -> None:
        super().__init__()
        self.pixels, self.layer, self.arm, self.config = pixels, layer, find_arm(arm), config

    def losses(
        self, x: Tensor, y: Tensor, adversarial: Tensor | None, beta: float
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Weighted terms of a batch x (B, channels, H, W), and what is logged beside them."""
        joined = x if adversarial is None else torch.cat([x, adversarial])
        with Taps(self.pixels.net, self.layer, stop=False) as taps:
            features = taps(self.pixels.normalise(joined))[self.layer]
            logits = taps.logits
        clean, fake = logits[: len(x)], None if adversarial is None else logits[len(x) :]
        apart = None
        if adversarial is not None:
            apart = feature_distance(features[: len(x)], features[len(x) :], kind=self.config.distance)
        terms = loss_terms(
            self.arm, clean, y, adversarial_logits=fake, distance=apart, alpha=self.config.alpha, beta=beta
        )
        beside = {"feature_norm": float(features[: len(x)].detach().flatten(1).norm(dim=1).mean())}
        if apart is not None:
            beside["distance"] = float(apart.detach())
        return terms, beside


def harden(
    classifier: Classifier,
    data: LabelledPixels,
    *,
    layer: str,
    arm: str,
    config: HardenConfig | None = None,
    seed: int = 0,
    craft_layer: str | None = None,
    fabric: Fabric | None = None,
    checkpoint: Checkpoint | None = None,
    options: FitOptions | None = None,
    log: Callable[[dict[str, Any]], None] | None = None,
    progress: Progress | None = None,
) -> Hardened:
    """Trains a copy of the classifier's network; the classifier itself stays as it is.

    Parameters
    ----------
    data : training images; a share of them is held out to choose the epoch.
    layer : phi, the activated output of the last convolutional block.
    arm : one of ``ARMS``.
    seed : of the images' order, starts and targets (and the weights, from scratch).
    craft_layer : as in :class:`PixelClassifier`.
    log : receives a dict every few steps: seed, step, loss and its terms, d, the norm of phi, eps and beta.

    Raises
    ------
    UserError : an unknown layer or arm, or too few images.
    DivergedError : a loss that is NaN or Inf (the step is named).
    """
    config, options, progress = config or HardenConfig(), options or FitOptions(), progress or Silent()
    chosen = find_arm(arm)
    find_layer(classifier.net, layer)
    fit_index, held_index = split_training(data, config.holdout)
    start = classifier.untrained(seed) if config.from_scratch else classifier
    fabric = fabric or make_fabric("cpu")
    # on the device before the optimiser, whose restored state goes where the weights are
    net = copy.deepcopy(start.net).to(fabric.device).requires_grad_(True).to(memory_format=torch.channels_last)
    pixels = PixelClassifier(net, classifier.preprocessing.mean, classifier.preprocessing.std, craft_layer=craft_layer)
    loop = _Loop(HardeningStep(pixels, layer, arm, config), config, seed, len(fit_index), chosen.crafting)
    saved = checkpoint.load() if checkpoint is not None else None
    if saved is not None:
        loop.restore(*saved)
    generator_state = torch.get_rng_state()
    try:
        _train(loop, data, fit_index, held_index, fabric, checkpoint, options, log, progress)
    finally:
        torch.set_rng_state(generator_state)
    net.load_state_dict(loop.best)
    return Hardened(
        net.cpu().eval().requires_grad_(False), loop.checks, loop.best_epoch, loop.switched, loop.warnings()
    )


class _Loop:
    """Everything that changes during a run, and its way into a checkpoint and back."""

    def __init__(self, module: HardeningStep, config: HardenConfig, seed: int, num: int, crafting: Crafting) -> None:
        self.module, self.config, self.seed, self.num, self.crafting = module, config, seed, num, crafting
        self.net = module.pixels.net
        self.optimizer = torch.optim.SGD(
            self.net.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
        self.batch_size = min(config.batch_size, num)
        self.steps_per_epoch = num // self.batch_size
        self.total = config.epochs * self.steps_per_epoch
        self.step = 0
        self.checks: list[dict[str, float]] = []
        self.shares: list[float] = []
        self.best_epoch = 0
        self.best: dict[str, Tensor] = {}
        self.switched: int | None = None
        self.zeros = {
            name: value == 0 for name, value in self.net.named_parameters() if config.keep_zeros and value.ndim > 1
        }

    def ramp(self) -> float:
        """Factor on eps and beta at this step."""
        return min(1.0, (self.step + 1) / max(1, self.total // 10))

    def set_rate(self) -> None:
        rate = 0.5 * self.config.lr * (1 + math.cos(math.pi * self.step / self.total))
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def batch(self) -> Tensor:
        """Places (B,) of this step's images among those trained on."""
        epoch, place = divmod(self.step, self.steps_per_epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(self.num)
        return torch.from_numpy(order[place * self.batch_size : (place + 1) * self.batch_size])

    def set_modes(self) -> None:
        """Train mode, with frozen batch-norm statistics unless from scratch."""
        self.net.train()
        if not self.config.from_scratch:
            for part in self.net.modules():
                if isinstance(part, nn.modules.batchnorm._BatchNorm):
                    part.eval()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {f"net.{name}": value for name, value in self.net.state_dict().items()}
        tensors |= {f"best.{name}": value for name, value in self.best.items()}
        for number, entries in self.optimizer.state_dict()["state"].items():
            if entries.get("momentum_buffer") is not None:
                tensors[f"momentum.{number}"] = entries["momentum_buffer"]
        values = {
            "step": self.step,
            "checks": self.checks,
            "shares": self.shares,
            "best_epoch": self.best_epoch,
            "switched": self.switched,
            "crafting": self.crafting,
        }
        return tensors, values

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        def part(prefix: str) -> dict[str, Tensor]:
            return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

        self.net.load_state_dict(part("net."))
        self.best = part("best.")
        state = self.optimizer.state_dict()
        state["state"] = {int(number): {"momentum_buffer": t} for number, t in part("momentum.").items()}
        self.optimizer.load_state_dict(state)
        for name in ("step", "checks", "shares", "best_epoch", "switched", "crafting"):
            setattr(self, name, values[name])

    def after_epoch(self, check: dict[str, float]) -> None:
        """Takes an epoch's check: keeps the best weights, and answers catastrophic overfitting."""
        self.checks.append(check)
        epoch = len(self.checks) - 1
        first = epoch <= 1  # epoch 0 is the start; it is never what hardening gives
        if first or selection(check) > selection(self.checks[self.best_epoch]):
            self.best_epoch = epoch
            self.best = {name: value.detach().cpu().clone() for name, value in self.net.state_dict().items()}
        trained = self.checks[1:]
        if self.crafting == "fgsm" and self.switched is None and len(trained) > 1 and overfits(trained):
            self.net.load_state_dict(self.best)
            self.optimizer.state.clear()
            self.crafting, self.switched = "pgd", epoch

    def warnings(self) -> list[str]:
        found = []
        if self.switched is not None:
            found.append(
                f"catastrophic overfitting after epoch {self.switched}: went back to the best epoch and on with "
                f"PGD-{self.config.craft_steps}"
            )
        before, after = (self.checks[epoch]["clean"] for epoch in (0, self.best_epoch))
        if not self.config.from_scratch and after < before / 2:
            found.append(
                f"accuracy on clean held-out images fell from {before:.2f} to {after:.2f}: lower --lr, or set --clip"
            )
        late = self.shares[len(self.shares) // 10 :]
        if late and not 0.05 <= (share := sum(late) / len(late)) <= 0.5:
            found.append(f"the feature term was {100 * share:.1f} % of the loss, outside 5 to 50 %: change beta")
        return found


def _train(
    loop: _Loop,
    data: LabelledPixels,
    fit_index: Tensor,
    held_index: Tensor,
    fabric: Fabric,
    checkpoint: Checkpoint | None,
    options: FitOptions,
    log: Callable[[dict[str, Any]], None] | None,
    progress: Progress,
) -> None:
    config, arm = loop.config, loop.module.arm
    classes = data.labels.unique()
    held = data.subset(held_index).stratified(config.check_images)
    module, loop.optimizer = fabric.setup(loop.module, loop.optimizer)
    module.mark_forward_method("losses")
    pixels = loop.module.pixels
    if not loop.checks:
        loop.after_epoch(check_epoch(pixels, loop.module.layer, held, config, fabric.device))
    progress.start(f"harden {_arm_name(arm)} seed {loop.seed}", loop.total, unit="steps", done=loop.step)
    sums: dict[str, float] = {}
    counted, saved_at = 0, time.monotonic()
    while loop.step < loop.total:
        torch.manual_seed((loop.seed << 32) ^ loop.step)
        generator = torch.Generator().manual_seed((loop.seed << 32) ^ loop.step)
        index = fit_index[loop.batch()]
        x, y = fabric.to_device(data.pixels(index)), fabric.to_device(data.labels[index])
        eps, beta = loop.ramp() * config.eps / 255, loop.ramp() * config.beta
        loop.set_rate()
        loop.set_modes()
        adversarial = None
        if needs_crafting(arm, alpha=config.alpha, beta=config.beta):
            targets = draw_targets(y, classes, generator=generator)
            adversarial = craft(
                loop.crafting, pixels, x, y, targets, eps=eps, generator=generator, steps=config.craft_steps
            )
        terms, beside = module.losses(x, y, adversarial, beta)
        loss = torch.stack([t.float() for t in terms.values()]).sum()
        values = {name: float(t.detach()) for name, t in terms.items()}
        if not all(math.isfinite(v) for v in values.values()):
            told = ", ".join(f"{name} = {value}" for name, value in values.items())
            shown = ", ".join(data.ids[i] for i in index[:3].tolist())
            raise DivergedError(
                f"the loss of arm {_arm_name(arm)!r} became NaN or Inf at step {loop.step} ({told}; a batch with "
                f"images {shown}): lower --lr, or set --clip"
            )
        fabric.backward(loss)
        if config.clip is not None:
            fabric.clip_gradients(module, loop.optimizer, max_norm=config.clip)
        loop.optimizer.step()
        loop.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, zero in loop.zeros.items():
                loop.net.get_parameter(name).masked_fill_(zero.to(loss.device), 0)
        total = sum(values.values())
        if "features" in values:
            loop.shares.append(values["features"] / max(total, 1e-12))
        loop.step += 1
        counted += 1
        line = {"loss": total, **values, **beside, "eps": 255 * eps, "beta": beta}
        for name, value in line.items():
            sums[name] = sums.get(name, 0.0) + value
        epoch_ends = loop.step % loop.steps_per_epoch == 0
        if epoch_ends:
            loop.after_epoch(check_epoch(pixels, loop.module.layer, held, config, fabric.device))
        if loop.step % options.log_every == 0 or epoch_ends:
            means = {name: value / counted for name, value in sums.items()}
            checked = {f"check_{k}": v for k, v in loop.checks[-1].items()} if epoch_ends else {}
            if log is not None and fabric.is_global_zero:
                log({"seed": loop.seed, "arm": _arm_name(arm), "step": loop.step, **means, **checked})
            progress.advance(counted, note=f"loss {means['loss']:.4g}")
            sums, counted = {}, 0
            if (
                checkpoint is not None
                and fabric.is_global_zero
                and time.monotonic() - saved_at > options.checkpoint_seconds
            ):
                checkpoint.save(*loop.state())
                saved_at = time.monotonic()
    progress.finish()


@torch.no_grad()
def check_epoch(
    pixels: PixelClassifier, layer: str, held: LabelledPixels, config: HardenConfig, device: torch.device
) -> dict[str, float]:
    """Accuracies of the held-out images, clean and under FGSM-RS and PGD, the mean norm of phi and its effective
    rank."""
    right = {"clean": 0, "fgsm_rs": 0, "pgd": 0}
    features = []
    for part in torch.arange(len(held)).split(64):
        x, y = held.pixels(part).to(device), held.labels[part].to(device)
        ids = [held.ids[i] for i in part.tolist()]
        with eval_mode(pixels), Taps(pixels.net, layer, stop=False) as taps:
            features.append(taps(pixels.normalise(x))[layer].flatten(1).float().cpu())
            right["clean"] += int((taps.logits.argmax(1) == y).sum())
        eps = config.eps / 255
        right["fgsm_rs"] += int((~fgsm_rs(pixels, x, y, eps=eps, ids=ids).success).sum())
        found = pgd(pixels, x, y, eps=eps, steps=config.check_steps, restarts=1, ids=ids)
        right["pgd"] += int((~found.success).sum())
    phi = torch.cat(features)
    accuracies = {name: count / len(held) for name, count in right.items()}
    return {**accuracies, "feature_norm": float(phi.norm(dim=1).mean()), "effective_rank": effective_rank(phi)}


def settings(config: HardenConfig, *, arm: str, layer: str, seed: int) -> dict[str, Any]:
    """What a hardened checkpoint says of how it was made."""
    return {"arm": arm, "layer": layer, "seed": seed, **asdict(config)}


def _arm_name(arm: Any) -> str:
    from netgloss.adversarial.arms import ARMS

    return next(name for name, known in ARMS.items() if known == arm)

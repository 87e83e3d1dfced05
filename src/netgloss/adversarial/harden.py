"""Hardening: training of a network continued with the consistent loss, or with one of the arms it is compared with.

The losses are in ``adversarial/arms.py``. SGD with momentum 0.9, weight decay and a cosine schedule; eps and beta ramp
up linearly in the first tenth of the steps. Real and adversarial images go through the network together. In fine-tuning
the statistics of batch norms stay frozen (their weights learn); from scratch they are those of the joint batch.
Crafting is in eval mode.

A tenth of the training images, equally many of every class, is held out. After every epoch at most 512 of them are
checked: clean accuracy, FGSM-RS and PGD-20. The weights of the best epoch, by the mean of clean and PGD accuracy, are
kept. **Catastrophic overfitting** of the one-step arms (PGD accuracy more than 10 points below its best while FGSM-RS
accuracy has not fallen) restores the best epoch and continues with PGD, 10 steps by default.

Resume is exact: step k draws its images and random numbers from (seed, k), so that a killed run that continues from its
last checkpoint ends with the weights of the undisturbed one.

Shape letters: N training images, B images of a step, D features.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from netgloss.adversarial.arms import (
    Crafting,
    arm_name,
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
from netgloss.classifiers.modules import copied
from netgloss.classifiers.taps import Taps, find_layer
from netgloss.errors import UserError
from netgloss.metrics.consistency.units import stratified
from netgloss.metrics.feature_health import effective_rank
from netgloss.progress import Progress, Silent
from netgloss.training import Checkpoint, FitOptions, make_fabric
from netgloss.training.loop import Log, Training, run_steps

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
    accuracy not below what it was then.
    """
    best = max(range(len(checks)), key=lambda i: checks[i]["pgd"])
    last = checks[-1]
    return last["pgd"] < checks[best]["pgd"] - 0.10 and last["fgsm_rs"] >= checks[best]["fgsm_rs"]


def split_training(data: LabelledPixels, share: float, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Indices to train on and to hold out, ``share`` of every class (one image at least), the same for every arm.

    Raises
    ------
    UserError : a class with fewer than two images.
    """
    classes, sizes = (values.tolist() for values in data.probe_labels.unique(return_counts=True))
    if min(sizes) < 2:
        name = data.class_names[classes[sizes.index(min(sizes))]]
        raise UserError(f"class {name!r} has {min(sizes)} training image; hardening needs two at least")
    held = [min(max(1, round(share * size)), size - 1) for size in sizes]
    heldout = stratified(data.probe_labels, each=held, seed=seed)
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
        """Weighted terms of a batch x (B, channels, H, W), and further numbers for the history."""
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
        numbers = {"feature_norm": float(features[: len(x)].detach().flatten(1).norm(dim=1).mean())}
        if apart is not None:
            numbers["distance"] = float(apart.detach())
        return terms, numbers


@dataclass(frozen=True)
class Hardening:
    """One arm trained with one seed on a copy of a classifier's network; the classifier itself stays unchanged.

    Parameters
    ----------
    data : training images; a share of them is held out to choose the epoch.
    layer : phi, the activated output of the last convolutional block.
    arm : one of ``ARMS``.
    seed : of the order of the images, starts and targets (and the weights, from scratch).
    craft_layer : as in :class:`PixelClassifier`.
    """

    classifier: Classifier
    data: LabelledPixels
    layer: str
    arm: str
    config: HardenConfig = field(default_factory=HardenConfig)
    seed: int = 0
    craft_layer: str | None = None

    def run(
        self,
        *,
        fabric: Fabric | None = None,
        checkpoint: Checkpoint | None = None,
        options: FitOptions | None = None,
        log: Log | None = None,
        progress: Progress | None = None,
    ) -> Hardened:
        """Trains to the end.

        Parameters
        ----------
        log : receives one dict per history line: seed, arm, step, loss and its terms, distance, norm of phi, eps, beta.

        Raises
        ------
        UserError : an unknown layer or arm, or too few images.
        DivergedError : a loss that is NaN or Inf (the step is named).
        """
        chosen, config = find_arm(self.arm), self.config
        find_layer(self.classifier.net, self.layer)
        fit_index, held_index = split_training(self.data, config.holdout)
        start = self.classifier.untrained(self.seed) if config.from_scratch else self.classifier
        fabric = fabric or make_fabric("cpu")
        # on the device before the optimiser, whose restored state goes where the weights are
        net = copied(start.net).to(fabric.device).requires_grad_(True).to(memory_format=torch.channels_last)
        spec = self.classifier.preprocessing
        pixels = PixelClassifier(net, spec.mean, spec.std, craft_layer=self.craft_layer)
        module = HardeningStep(pixels, self.layer, self.arm, config)
        watch = (fabric, checkpoint, options or FitOptions(), log)
        training = _HardenTraining(module, self.data, fit_index, held_index, self.seed, chosen.crafting, watch)
        generator_state = torch.get_rng_state()
        try:
            training.prepare()
            steps = (training.batch(step) for step in range(training.start, training.total))
            run_steps([training], steps, name=f"harden {self.arm} seed {self.seed}", progress=progress or Silent())
        finally:
            torch.set_rng_state(generator_state)
        net.load_state_dict(training.best)
        net = net.cpu().eval().requires_grad_(False)
        return Hardened(net, training.checks, training.best_epoch, training.switched, training.warnings())


class _HardenTraining(Training[Tensor]):
    """Everything that changes during a run, with its state in a checkpoint; a batch is indices of images."""

    def __init__(
        self,
        module: HardeningStep,
        data: LabelledPixels,
        fit_index: Tensor,
        held_index: Tensor,
        seed: int,
        crafting: Crafting,
        watch: tuple[Fabric, Checkpoint | None, FitOptions, Log | None],
    ) -> None:
        super().__init__(seed, *watch)
        self.step_module, self.data, self.fit_index, self.crafting = module, data, fit_index, crafting
        self.config, self.arm, self.net = module.config, module.arm, module.pixels.net
        self.held = data.subset(held_index).stratified(self.config.check_images)
        self.classes = data.labels.unique()
        self.optimizer = torch.optim.SGD(
            self.net.parameters(),
            lr=self.config.lr,
            momentum=self.config.momentum,
            weight_decay=self.config.weight_decay,
        )
        self.batch_size = min(self.config.batch_size, len(fit_index))
        self.steps_per_epoch = len(fit_index) // self.batch_size
        self.start, self.total = 0, self.config.epochs * self.steps_per_epoch
        self.checks: list[dict[str, float]] = []
        self.shares: list[float] = []
        self.best_epoch = 0
        self.best: dict[str, Tensor] = {}
        self.switched: int | None = None
        self.zeros = {
            name: value == 0 for name, value in self.net.named_parameters() if self.config.keep_zeros and value.ndim > 1
        }
        saved = self.checkpoint.load() if self.checkpoint is not None else None
        if saved is not None:
            self.restore(*saved)

    def prepare(self) -> None:
        """Hands the module to Fabric, and checks the start."""
        self.module, self.optimizer = self.fabric.setup(self.step_module, self.optimizer)
        self.module.mark_forward_method("losses")
        if not self.checks:
            self.after_epoch(self._check())

    def ramp(self, step: int) -> float:
        """Factor on eps and beta."""
        return min(1.0, (step + 1) / max(1, self.total // 10))

    def set_rate(self, step: int) -> None:
        """The cosine schedule."""
        rate = 0.5 * self.config.lr * (1 + math.cos(math.pi * step / self.total))
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def batch(self, step: int) -> Tensor:
        """Indices (B,) of the images of a step."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.fit_index))
        return self.fit_index[torch.from_numpy(order[place * self.batch_size : (place + 1) * self.batch_size])]

    def set_modes(self) -> None:
        """Train mode, with frozen batch-norm statistics unless from scratch."""
        self.net.train()
        if not self.config.from_scratch:
            for part in self.net.modules():
                if isinstance(part, nn.modules.batchnorm._BatchNorm):
                    part.eval()

    def terms(self, step: int, batch: Tensor) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Crafts the adversarial images of a batch and gives the loss terms of both."""
        config = self.config
        generator = torch.Generator().manual_seed((self.seed << 32) ^ step)
        x, y = (self.fabric.to_device(values) for values in (self.data.pixels(batch), self.data.labels[batch]))
        eps, beta = self.ramp(step) * config.eps / 255, self.ramp(step) * config.beta
        self.set_rate(step)
        self.set_modes()
        adversarial = None
        if needs_crafting(self.arm, alpha=config.alpha, beta=config.beta):
            targets = draw_targets(y, self.classes, generator=generator)
            given = (self.crafting, self.step_module.pixels, x, y, targets)
            adversarial = craft(*given, eps=eps, generator=generator, steps=config.craft_steps)
        terms, numbers = self.module.losses(x, y, adversarial, beta)
        return terms, {**numbers, "eps": 255 * eps, "beta": beta}

    def refuse(self, values: dict[str, float], step: int, batch: Tensor) -> NoReturn:
        """Names arm, step and images."""
        terms = ", ".join(f"{name} = {value}" for name, value in values.items())
        images = ", ".join(self.data.ids[i] for i in batch[:3].tolist())
        raise DivergedError(
            f"the loss of arm {arm_name(self.arm)!r} became NaN or Inf at step {step} ({terms}; a batch with images "
            f"{images}): lower --lr, or set --clip"
        )

    def clip(self) -> None:
        """Limits the norm of the gradients, if asked for."""
        if self.config.clip is not None:
            self.fabric.clip_gradients(self.module, self.optimizer, max_norm=self.config.clip)

    def after_step(self, step: int, values: dict[str, float]) -> dict[str, Any]:
        """Keeps zeros, and checks the held-out images at the end of an epoch."""
        with torch.no_grad():
            for name, zero in self.zeros.items():
                weight = self.net.get_parameter(name)
                weight.masked_fill_(zero.to(weight.device), 0)
        if "features" in values:
            self.shares.append(values["features"] / max(sum(values.values()), 1e-12))
        if not self._ends_epoch(step):
            return {}
        self.after_epoch(self._check())
        return {f"check_{name}": value for name, value in self.checks[-1].items()}

    def _ends_epoch(self, step: int) -> bool:
        return (step + 1) % self.steps_per_epoch == 0

    def reports(self, step: int) -> bool:
        """Also at the end of every epoch."""
        return self._ends_epoch(step) or super().reports(step)

    def head(self) -> dict[str, Any]:
        """Seed and arm."""
        return {"seed": self.seed, "arm": arm_name(self.arm)}

    def _check(self) -> dict[str, float]:
        module = self.step_module
        return check_epoch(module.pixels, module.layer, self.held, self.config, self.fabric.device)

    def state(self, step: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Weights, best weights, momentum and checks."""
        tensors = {f"net.{name}": value for name, value in self.net.state_dict().items()}
        tensors |= {f"best.{name}": value for name, value in self.best.items()}
        for number, entries in self.optimizer.state_dict()["state"].items():
            if entries.get("momentum_buffer") is not None:
                tensors[f"momentum.{number}"] = entries["momentum_buffer"]
        names = ("checks", "shares", "best_epoch", "switched", "crafting")
        return tensors, {"step": step, **{name: getattr(self, name) for name in names}}

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """The inverse of :meth:`state`."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

        self.net.load_state_dict(part("net."))
        self.best = part("best.")
        state = self.optimizer.state_dict()
        state["state"] = {int(number): {"momentum_buffer": t} for number, t in part("momentum.").items()}
        self.optimizer.load_state_dict(state)
        self.start = values["step"]
        for name in ("checks", "shares", "best_epoch", "switched", "crafting"):
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


@torch.no_grad()
def check_epoch(
    pixels: PixelClassifier, layer: str, held: LabelledPixels, config: HardenConfig, device: torch.device
) -> dict[str, float]:
    """Accuracies of the held-out images, clean and under FGSM-RS and PGD, the mean norm of phi and its effective
    rank.
    """
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

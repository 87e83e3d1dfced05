"""Fits explainers on the stream of a layer: closed-form methods directly, learned ones in the training loop.

The loop itself, with its exact resumption, is ``training/loop.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from netgloss.errors import UserError
from netgloss.explainers.base import Batch, Explainer, ExplainerConfig, LayerSpec, TrainingConfig
from netgloss.memory import is_out_of_memory
from netgloss.progress import Progress, Silent
from netgloss.training.loop import (
    Checkpoint,
    FitOptions,
    Log,
    Training,
    optimizer_state,
    restore_optimizer,
    run_steps,
)
from netgloss.training.stream import ActivationStream

if TYPE_CHECKING:
    from lightning_fabric import Fabric

_PATIENCE = timedelta(hours=12)


def make_fabric(device: str = "auto", *, devices: int = 1, nodes: int = 1, precision: str = "32-true") -> Fabric:
    """Fabric on the asked device: "auto" takes the best accelerator that this machine has.

    ``devices`` processes on each of ``nodes`` machines; Fabric starts those of one machine itself and takes over those
    that torchrun or Slurm started.
    """
    from lightning_fabric import Fabric
    from lightning_fabric.strategies import DDPStrategy

    known = ("auto", "cpu", "cuda", "gpu", "mps")
    if device not in known:
        raise UserError(f"unknown device {device!r}; choose from {', '.join(known)}")
    if devices < 1:
        raise UserError(f"devices must be at least 1, got {devices}")
    if nodes < 1:
        raise UserError(f"nodes must be at least 1, got {nodes}")
    try:
        return Fabric(
            accelerator=device,
            devices=devices,
            num_nodes=nodes,
            # methods that train in stages leave parameters out; a direct fit in process 0 lets the others wait
            strategy=DDPStrategy(find_unused_parameters=True, timeout=_PATIENCE) if devices * nodes > 1 else "auto",
            precision=precision,  # type: ignore[arg-type]
        )
    except Exception as error:  # Fabric's own message says which accelerator is missing
        raise UserError(f"cannot use device {device!r} with {devices} device(s): {error}") from error


def build_explainer(cls: type[Explainer], config: ExplainerConfig, spec: LayerSpec, *, seed: int) -> Explainer:
    """A fresh explainer whose random initial values depend on ``seed`` only; the global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return cls(config, spec)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"{config.num_concepts} concepts of layer {spec.name!r} {spec.shape} do not fit in memory"
            ) from error


def fit(
    explainer: Explainer,
    stream: ActivationStream,
    *,
    seed: int,
    fabric: Fabric | None = None,
    checkpoint: Checkpoint | None = None,
    options: FitOptions | None = None,
    log: Callable[[dict[str, Any]], None] | None = None,
    progress: Progress | None = None,
) -> Explainer:
    """Fits ``explainer`` on ``stream`` in place and returns it on the CPU, in eval mode.

    Parameters
    ----------
    log : receives one dict per history line: seed, step, loss, every term, lr, and what ``after_step`` returns.

    Raises
    ------
    UserError
        If a loss is NaN or Inf (names layer, step and images), or the method refuses the data.
    """
    options = options or FitOptions()
    progress = progress or Silent()
    generator_state = torch.get_rng_state()
    _adopt(explainer, stream)
    try:
        if not explainer.learned:
            progress.start(f"fit seed {seed}", 1, unit="fit")
            explainer.fit_rows(stream, seed=seed)
            progress.advance()
            progress.finish()
        else:
            fabric = fabric or make_fabric("cpu")
            training = _ExplainerTraining(explainer, stream, seed, fabric, checkpoint, options, log)
            _train([training], stream, seed, fabric, progress)
            explainer.cpu().eval()
            explainer.after_fit(stream)
    finally:
        torch.set_rng_state(generator_state)
    return _checked(explainer, stream)


def fit_together(
    explainers: Sequence[Explainer],
    stream: ActivationStream,
    *,
    seed: int,
    fabric: Fabric | None = None,
    checkpoints: Sequence[Checkpoint | None] | None = None,
    options: FitOptions | None = None,
    log: Callable[[dict[str, Any]], None] | None = None,
    progress: Progress | None = None,
) -> list[Explainer]:
    """Fits several learned explainers in one pass over ``stream``: every batch is read once and given to all of them.

    Each ends with the weights that :func:`fit` alone with this ``seed`` gives it, bit for bit; they may differ in
    their options (number of concepts, sparsity, learning rate, number of steps) and initial values.

    Parameters
    ----------
    log : receives the history lines of all, each with ``dictionary``, the explainer's place in the list.

    Raises
    ------
    UserError
        As :func:`fit`; also if the explainers do not take the same batches.
    """
    options, progress = options or FitOptions(), progress or Silent()
    fabric = fabric or make_fabric("cpu")
    kinds = {
        (e.learned, e.reads, tuple(sorted(e.needs(e.config))), e.balance, getattr(e.config, "batch_size", 0))
        for e in explainers
    }
    if len(kinds) != 1 or not explainers[0].learned:
        raise UserError("explainers are fitted together only if all are learned and take the same batches")
    saved = checkpoints or [None] * len(explainers)
    generator_state = torch.get_rng_state()
    try:
        trainings = []
        for number, (explainer, checkpoint) in enumerate(zip(explainers, saved, strict=True)):
            numbered = None if log is None else partial(_log_numbered, log, number)
            _adopt(explainer, stream)
            trainings.append(_ExplainerTraining(explainer, stream, seed, fabric, checkpoint, options, numbered))
        _train(trainings, stream, seed, fabric, progress)
        for explainer in explainers:
            explainer.cpu().eval()
            explainer.after_fit(stream)
    finally:
        torch.set_rng_state(generator_state)
    return [_checked(explainer, stream) for explainer in explainers]


def _adopt(explainer: Explainer, stream: ActivationStream) -> None:
    """Hands out a fresh copy of the network's section to a method that asked for it."""
    section = getattr(getattr(stream, "around", None), "section", None)  # rows in memory have nothing around them
    if section is not None:
        explainer.adopt(section().cpu())


def _log_numbered(log: Callable[[dict[str, Any]], None], number: int, line: dict[str, Any]) -> None:
    log({"dictionary": number, **line})


def _checked(explainer: Explainer, stream: ActivationStream) -> Explainer:
    for name, value in explainer.state_dict().items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise UserError(f"the fit at layer {stream.layer!r} ended with NaN or Inf in {name!r}")
    return explainer.cpu().eval()


class _ExplainerTraining(Training[Batch]):
    """One explainer under training."""

    def __init__(
        self,
        explainer: Explainer,
        stream: ActivationStream,
        seed: int,
        fabric: Fabric,
        checkpoint: Checkpoint | None,
        options: FitOptions,
        log: Log | None,
    ) -> None:
        super().__init__(seed, fabric, checkpoint, options, log)
        self.explainer, self.stream = explainer, stream
        assert isinstance(explainer.config, TrainingConfig)
        saved = checkpoint.load() if checkpoint is not None else None
        if saved is None:
            explainer.fit_rows(stream, seed=seed)
        explainer.to(fabric.device)  # before the optimiser, whose restored state goes where the weights are
        optimizer = explainer.optimizer()
        self.start = 0
        if saved is not None:
            tensors, values = saved
            prefix = "explainer."
            explainer.load_state_dict({n[len(prefix) :]: t for n, t in tensors.items() if n.startswith(prefix)})
            restore_optimizer(optimizer, tensors)
            self.start = int(values["step"])
        self.base_rates = [group["lr"] for group in optimizer.param_groups]
        explainer.train()
        self.module, self.optimizer = fabric.setup(explainer, optimizer)
        self.module.mark_forward_method("losses")

    @property
    def total(self) -> int:  # type: ignore[override]
        """The explainer's own number of steps, which may change during the fit."""
        steps = self.explainer.max_steps
        return steps if self.options.max_steps is None else min(steps, self.options.max_steps)

    def takes(self, step: int) -> bool:
        """Also asks the explainer, which may stop or reset its optimiser."""
        if not super().takes(step):
            return False
        wish = self.explainer.before_step(step, self.stream)
        self.stopped = wish == "stop"
        if wish == "reset":
            self.optimizer = self.fabric.setup_optimizers(self.explainer.optimizer())
        return not self.stopped

    def terms(self, step: int, batch: Batch) -> tuple[dict[str, Tensor], dict[str, float]]:
        """The explainer's losses, at the step's learning rate."""
        scale = self.explainer.lr_scale(step)
        for group, rate in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = rate * scale
        return self.module.losses(batch), {}

    def after_step(self, step: int, values: dict[str, float]) -> dict[str, Any]:
        """The explainer's own entries, and the learning rate."""
        return {**self.explainer.after_step(step), "lr": self.base_rates[0] * self.explainer.lr_scale(step)}

    def refuse(self, values: dict[str, float], step: int, batch: Batch) -> NoReturn:
        """Names layer, step and images."""
        terms = ", ".join(f"{name} = {value}" for name, value in values.items())
        images = [self.stream.store.ids[i] for i in batch.index[:3].tolist()]
        raise UserError(
            f"the loss became NaN or Inf at layer {self.stream.layer!r}, step {step} ({terms}; a batch with images "
            f"{', '.join(images)}): lower --lr"
        )

    def state(self, step: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Weights and optimiser."""
        tensors = {f"explainer.{name}": value for name, value in self.explainer.state_dict().items()}
        return tensors | optimizer_state(self.optimizer), {"step": step}


def _train(
    trainings: Sequence[_ExplainerTraining], stream: ActivationStream, seed: int, fabric: Fabric, progress: Progress
) -> None:
    """All steps of all trainings, on the same batches."""
    first = trainings[0].explainer
    assert isinstance(first.config, TrainingConfig)
    batches = stream.batches(
        first.config.batch_size,
        seed=seed,
        start=min(training.start for training in trainings),
        rank=fabric.global_rank,
        world=fabric.world_size,
        fields=first.needs(first.config),
        balance=first.balance,
    )
    name = f"fit seed {seed}" + (f", {len(trainings)} dictionaries" if len(trainings) > 1 else "")
    run_steps(trainings, (_move(batch, fabric) for batch in batches), name=name, progress=progress)


def _move(batch: Batch, fabric: Fabric) -> Batch:
    same = batch.whole is batch.activation
    for name in ("activation", "logits", "labels", "image", "whole"):
        value = getattr(batch, name)
        if value is not None:
            setattr(batch, name, fabric.to_device(value))
    if same:
        batch.whole = batch.activation
    batch.upper = {name: fabric.to_device(value) for name, value in batch.upper.items()}
    return batch


def pick_device(device: str) -> torch.device:
    """The torch device of a flag: "auto" takes CUDA, then MPS, then the CPU."""
    return make_fabric(device).device

"""The one fit loop for every learned method, on lightning-fabric.

Resume is exact: step k draws its rows and its random numbers from (seed, k) alone, so a killed fit that continues
from its last checkpoint ends with the weights of the undisturbed one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from netgloss.errors import UserError
from netgloss.explainers.base import Batch, Explainer, ExplainerConfig, LayerSpec, TrainingConfig
from netgloss.memory import is_out_of_memory
from netgloss.progress import Progress, Silent
from netgloss.training.stream import ActivationStream

if TYPE_CHECKING:
    from lightning_fabric import Fabric

_LOG_EVERY = 20


class Checkpoint(Protocol):
    """Where the loop keeps its state; ``netgloss.run`` writes the files."""

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and plain values of the last saved state, or None."""
        ...

    def save(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Replaces the saved state atomically."""
        ...


@dataclass(frozen=True)
class FitOptions:
    """How to run the loop."""

    checkpoint_seconds: float = 10.0
    """Seconds between two checkpoints: what a kill may cost."""
    log_every: int = _LOG_EVERY
    """Steps between two lines of the history."""


def make_fabric(device: str = "auto", *, devices: int = 1, nodes: int = 1, precision: str = "32-true") -> Fabric:
    """Fabric on the asked device: "auto" takes the best accelerator that this machine has.

    ``devices`` processes on each of ``nodes`` machines; Fabric starts those of one machine itself and takes over those
    that torchrun or Slurm started.
    """
    from lightning_fabric import Fabric

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
            strategy="ddp" if devices * nodes > 1 else "auto",
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
    log : receives one dict a history line: seed, step, loss, every term, lr, and what ``after_step`` gives.

    Raises
    ------
    UserError
        If a loss is NaN or Inf (names layer, step and images), or the method refuses the data.
    """
    options = options or FitOptions()
    progress = progress or Silent()
    generator_state = torch.get_rng_state()
    try:
        if not explainer.learned:
            progress.start(f"fit seed {seed}", 1, unit="fit")
            explainer.fit_rows(stream, seed=seed)
            progress.advance()
            progress.finish()
        else:
            _fit_learned(explainer, stream, seed, fabric or make_fabric("cpu"), checkpoint, options, log, progress)
            explainer.cpu().eval()
            if explainer.reads != "maps":
                explainer.after_fit(stream)
    finally:
        torch.set_rng_state(generator_state)
    for name, value in explainer.state_dict().items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise UserError(f"the fit at layer {stream.layer!r} ended with NaN or Inf in {name!r}")
    return explainer.cpu().eval()


def _fit_learned(
    explainer: Explainer,
    stream: ActivationStream,
    seed: int,
    fabric: Fabric,
    checkpoint: Checkpoint | None,
    options: FitOptions,
    log: Callable[[dict[str, Any]], None] | None,
    progress: Progress,
) -> None:
    config = explainer.config
    assert isinstance(config, TrainingConfig)
    saved = checkpoint.load() if checkpoint is not None else None
    if saved is None:
        explainer.fit_rows(stream, seed=seed)
    optimizer = explainer.optimizer()
    start = 0
    if saved is not None:
        start = _restore(explainer, optimizer, *saved)
    base_rates = [group["lr"] for group in optimizer.param_groups]
    explainer.train()
    module, optimizer = fabric.setup(explainer, optimizer)
    module.mark_forward_method("losses")
    batches = stream.batches(
        config.batch_size,
        seed=seed,
        start=start,
        rank=fabric.global_rank,
        world=fabric.world_size,
        fields=explainer.needs(config),
        balance=explainer.balance,
    )
    progress.start(f"fit seed {seed}", explainer.max_steps, unit="steps", done=start)
    sums: dict[str, float] = {}
    counted = 0
    saved_at = time.monotonic()
    for step in range(start, explainer.max_steps):
        torch.manual_seed((seed << 32) ^ step)
        wish = explainer.before_step(step, stream)
        if wish == "stop":
            break
        if wish == "reset":
            optimizer = fabric.setup_optimizers(explainer.optimizer())  # type: ignore[assignment]
        batch = _move(next(batches), fabric)
        scale = explainer.lr_scale(step)
        for group, rate in zip(optimizer.param_groups, base_rates, strict=True):
            group["lr"] = rate * scale
        terms = module.losses(batch)
        loss = torch.stack([t.float() for t in terms.values()]).sum()
        values = {name: float(t.detach()) for name, t in terms.items()}
        if not all(math.isfinite(v) for v in values.values()):
            _explain_nan(values, stream, step, batch)
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        extra = explainer.after_step(step)
        counted += 1
        for name, value in {"loss": float(loss.detach()), **values}.items():
            sums[name] = sums.get(name, 0.0) + value
        if (step + 1) % options.log_every == 0 or step + 1 == explainer.max_steps:
            line = {"seed": seed, "step": step + 1, **{k: v / counted for k, v in sums.items()}, **extra}
            line["lr"] = base_rates[0] * scale
            if log is not None and fabric.is_global_zero:
                log(line)
            progress.advance(counted, note=f"loss {line['loss']:.4g}")
            sums, counted = {}, 0
            if (
                checkpoint is not None
                and fabric.is_global_zero
                and time.monotonic() - saved_at > options.checkpoint_seconds
            ):
                checkpoint.save(*_state(explainer, optimizer, step + 1))
                saved_at = time.monotonic()
    progress.finish()


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


def _explain_nan(values: dict[str, float], stream: ActivationStream, step: int, batch: Batch) -> None:
    terms = ", ".join(f"{name} = {value}" for name, value in values.items())
    images = [stream.store.ids[i] for i in batch.index[:3].tolist()]
    raise UserError(
        f"the loss became NaN or Inf at layer {stream.layer!r}, step {step} ({terms}; a batch with images "
        f"{', '.join(images)}): lower --lr"
    )


def _state(explainer: Explainer, optimizer: Any, step: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {f"explainer.{name}": value for name, value in explainer.state_dict().items()}
    state = optimizer.state_dict()
    for number, entries in state["state"].items():
        for name, value in entries.items():
            tensors[f"optimizer.{number}.{name}"] = torch.as_tensor(value)
    return tensors, {"step": step}


def _restore(
    explainer: Explainer, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], values: dict[str, Any]
) -> int:
    prefix = "explainer."
    explainer.load_state_dict({n[len(prefix) :]: t for n, t in tensors.items() if n.startswith(prefix)})
    state = optimizer.state_dict()
    entries: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, number, key = name.split(".", 2)
            entries.setdefault(int(number), {})[key] = value
    state["state"] = entries
    optimizer.load_state_dict(state)
    return int(values["step"])

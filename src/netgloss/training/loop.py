"""The one training loop: steps, history, checkpoints and exact resumption, for explainers and for hardening.

Resumption is exact: step k draws its data and its random numbers from (seed, k) alone, so that a killed training that
continues from its last checkpoint ends with the weights of the undisturbed one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, NoReturn, Protocol, TypeVar

import torch
from torch import Tensor

from netgloss.progress import Progress

if TYPE_CHECKING:
    from lightning_fabric import Fabric

BatchT = TypeVar("BatchT")
Log = Callable[[dict[str, Any]], None]


class Checkpoint(Protocol):
    """Where the loop keeps its state; ``netgloss.runs`` writes the files."""

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
    log_every: int = 20
    """Steps between two lines of the history."""
    max_steps: int | None = None
    """Stop after so many steps, as a rehearsal does; default all."""


class Training(Generic[BatchT]):
    """One module under training, with its optimiser, history and checkpoint. Subclasses say what a step computes.

    Attributes
    ----------
    start, total : the first step that is left, and the number of steps.
    module : what ``fabric.setup`` returned. optimizer : likewise.
    """

    start: int
    total: int
    module: Any
    optimizer: Any

    def __init__(
        self, seed: int, fabric: Fabric, checkpoint: Checkpoint | None, options: FitOptions, log: Log | None
    ) -> None:
        self.seed, self.fabric = seed, fabric
        self.checkpoint, self.options, self.log = checkpoint, options, log
        self.stopped = False
        self._sums: dict[str, float] = {}
        self._counted = 0
        self._saved_at = time.monotonic()

    def takes(self, step: int) -> bool:
        """Whether the training takes ``step``; seeds its random numbers."""
        if self.stopped or not self.start <= step < self.total:
            return False
        torch.manual_seed((self.seed << 32) ^ step)
        return True

    def terms(self, step: int, batch: BatchT) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Loss terms of a batch, and further numbers for the history."""
        raise NotImplementedError

    def refuse(self, values: dict[str, float], step: int, batch: BatchT) -> NoReturn:
        """Raises the error for loss terms that are NaN or Inf."""
        raise NotImplementedError

    def clip(self) -> None:
        """Limits the gradients, where the training does."""

    def after_step(self, step: int, values: dict[str, float]) -> dict[str, Any]:
        """What follows the optimiser's step; returns entries of the history line that are not averaged."""
        return {}

    def reports(self, step: int) -> bool:
        """Whether a history line ends with ``step``."""
        return (step + 1) % self.options.log_every == 0 or step + 1 == self.total

    def head(self) -> dict[str, Any]:
        """First entries of a history line."""
        return {"seed": self.seed}

    def state(self, step: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain values to continue from ``step``."""
        raise NotImplementedError

    def step(self, step: int, batch: BatchT) -> tuple[int, str]:
        """One step of the optimiser; the number of steps to report and a note, whenever a history line ends."""
        terms, numbers = self.terms(step, batch)
        loss = torch.stack([t.float() for t in terms.values()]).sum()
        values = {name: float(t.detach()) for name, t in terms.items()}
        if not all(math.isfinite(v) for v in values.values()):
            self.refuse(values, step, batch)
        self.fabric.backward(loss)
        self.clip()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._counted += 1
        for name, value in {"loss": float(loss.detach()), **values, **numbers}.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        extra = self.after_step(step, values)
        if not self.reports(step):
            return 0, ""
        counted = self._counted
        line = {**self.head(), "step": step + 1, **{k: v / counted for k, v in self._sums.items()}, **extra}
        self._sums, self._counted = {}, 0
        if self.fabric.is_global_zero:
            if self.log is not None:
                self.log(line)
            if self.checkpoint is not None and time.monotonic() - self._saved_at > self.options.checkpoint_seconds:
                self.checkpoint.save(*self.state(step + 1))
                self._saved_at = time.monotonic()
        return counted, f"loss {line['loss']:.4g}"


def run_steps(
    trainings: Sequence[Training[BatchT]], batches: Iterator[BatchT], *, name: str, progress: Progress
) -> None:
    """All steps of all trainings, on the same batches: ``batches`` starts at the first step that any of them takes."""
    start, last = min(t.start for t in trainings), max(t.total for t in trainings)
    progress.start(name, last, unit="steps", done=start)
    for step in range(start, last):
        batch, counted, note = None, 0, ""
        for training in trainings:
            if training.takes(step):
                batch = next(batches) if batch is None else batch
                reported = training.step(step, batch)
                counted, note = max(counted, reported[0]), reported[1] or note
        if all(training.stopped for training in trainings):
            break
        if batch is None:  # a training that is further on than the others waits for them
            next(batches)
        if counted:
            progress.advance(counted, note=note)
    progress.finish()


def optimizer_state(optimizer: Any) -> dict[str, Tensor]:
    """The state of an optimiser as tensors by name."""
    state = optimizer.state_dict()["state"]
    return {
        f"optimizer.{number}.{name}": torch.as_tensor(value)
        for number, entries in state.items()
        for name, value in entries.items()
        if value is not None
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of :func:`optimizer_state`."""
    entries: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, number, key = name.split(".", 2)
            entries.setdefault(int(number), {})[key] = value
    state = optimizer.state_dict()
    state["state"] = entries
    optimizer.load_state_dict(state)

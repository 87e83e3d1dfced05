"""Work that several processes share: who does what, and how a failure in one ends all with the same line."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch

from netgloss.errors import UserError

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from torchmetrics import Metric

Result = TypeVar("Result")


def together(fabric: Fabric, work: Callable[[], Result]) -> Result:
    """``work()`` in every process; returns once all are done.

    Raises
    ------
    UserError : in every process, if one of them raised it.
    """
    if fabric.world_size == 1:
        return work()
    failure, found = "", []
    try:
        found.append(work())
    except UserError as error:
        failure = str(error) or "it failed"
    failures: list[str] = [""] * fabric.world_size
    torch.distributed.all_gather_object(failures, failure)
    if any(failures):
        raise UserError(next(f for f in failures if f))
    return found[0]


def first_then_others(fabric: Fabric, first: Callable[[], Result], others: Callable[[], Result]) -> Result:
    """``first()`` in process 0, then ``others()`` in the other processes; a UserError of the first is that of all."""
    found = together(fabric, lambda: first() if fabric.is_global_zero else None)
    if fabric.is_global_zero:
        assert found is not None
        return found
    return others()


def add_up(metric: Metric, device: torch.device) -> None:
    """Gives a metric the states of all processes, reduced as torchmetrics says, on the CPU.

    ``device`` is where the processes talk (the GPU for NCCL). Every process must call it, in the same order.
    """
    metric.to(device)
    metric.sync()
    states = {name: getattr(metric, name) for name in metric._defaults}
    metric.unsync()
    for name, value in states.items():
        setattr(metric, name, value)
    metric.cpu()


def part(fabric: Fabric) -> None:
    """The shared work is over: from here on each process is by itself, and metrics no longer wait for others."""
    if fabric.world_size > 1 and torch.distributed.is_initialized():
        fabric.barrier()
        torch.distributed.destroy_process_group()

"""How a command is executed: device, processes, precision, progress and the command line that is recorded."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from netgloss.progress import Progress, Silent
from netgloss.training.fit import make_fabric

if TYPE_CHECKING:
    import torch
    from lightning_fabric import Fabric


@dataclass(frozen=True)
class Execution:
    """How a verb runs. Wherever a verb takes ``device``, a device's name or an ``Execution`` can be given.

    Parameters
    ----------
    device : "auto" (CUDA, then MPS, then the CPU), "cpu", "cuda" or "mps".
    devices : processes on each machine that share the work (GPUs, or CPU processes with ``device="cpu"``).
    nodes : machines; torchrun or Slurm starts the command on each.
    precision : precision of the training steps, as lightning-fabric names them ("32-true", "bf16-mixed", ...).
    progress : receives progress and notes; default none.
    command : the command line that run folders record.
    """

    device: str = "auto"
    devices: int = 1
    nodes: int = 1
    precision: str = "32-true"
    progress: Progress = field(default_factory=Silent)
    command: str = ""

    @classmethod
    def of(cls, device: str | Execution) -> Execution:
        """An execution from the ``device`` argument of a verb."""
        return device if isinstance(device, Execution) else cls(device)

    @cached_property
    def fabric(self) -> Fabric:
        """The launched Fabric; the first access starts the other processes.

        Raises
        ------
        UserError : this machine does not have the device.
        """
        fabric = make_fabric(self.device, devices=self.devices, nodes=self.nodes, precision=self.precision)
        fabric.launch()
        return fabric

    @property
    def torch_device(self) -> torch.device:
        """The device of this process."""
        return self.fabric.device

    @property
    def leads(self) -> bool:
        """True in the process that writes files and shows progress."""
        return bool(self.fabric.is_global_zero)

    @property
    def shown(self) -> Progress:
        """Progress of this process: silent in all but the first."""
        return self.progress if self.leads else Silent()

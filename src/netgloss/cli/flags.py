"""Flags that several verbs share: which classifier, which device, how many processes."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

if TYPE_CHECKING:
    from netgloss.classifiers import Classifier, LayerInfo
    from netgloss.training.execution import Execution


@dataclass
class Model:
    """Which classifier to explain."""

    model: str
    """timm:NAME, torchvision:NAME, hf:OWNER/NAME or hf:/path/to/folder (Hugging Face), path/to/file.py:factory, or
    critters (the network that ships with netgloss)."""
    checkpoint: Path | None = None
    """Weights: a .safetensors file or a PyTorch state dict (pickles with code are refused). FILE::KEY names one of
    several state dicts in it."""
    random_weights: bool = False
    """Use random weights instead of the published pretrained ones (which are downloaded if there is no checkpoint)."""
    class_names: Path | None = None
    """Text file with one class name a line, a .json list or dict, or imagenet (the 1,000 classes of ImageNet)."""
    num_classes: int | None = None
    """Number of classes, where the architecture takes one and the checkpoint has another than its default; 0 leaves
    the head out: layers are explained without logits."""
    input_size: int | None = None
    """Side of the network's input in pixels, where the model does not say it."""
    mean: tuple[float, ...] | None = None
    """Mean of each channel in [0, 1] that the input is normalised by."""
    std: tuple[float, ...] | None = None
    """Standard deviation of each channel."""
    multi_label: bool = False
    """An image may have several labels: each is decided by the sign of its logit, and its probability is a sigmoid."""
    layout: Literal["auto", "nchw", "nhwc"] = "auto"
    """Order of the axes of layers with four, where it cannot be seen (channels first or last)."""
    prefix_tokens: int | None = None
    """Tokens before the patches (class token, registers), where it cannot be seen."""

    pool: Literal["mean", "cls"] = "mean"
    """What is read of layers of tokens: the patches as a map, whose mean methods of pooled vectors take, or the class
    token as a vector."""

    def load(self) -> Classifier:
        """The classifier with its weights."""
        from netgloss.classifiers import load_classifier

        classifier = load_classifier(self.model, **self._fields())
        classifier = classifier.with_layout(self.layout, self.prefix_tokens, self.pool)
        return classifier.with_labels(True) if self.multi_label else classifier

    def outline(self) -> tuple[Classifier, list[LayerInfo]]:
        """The layers, without the weights of named networks."""
        from netgloss.classifiers import outline_layers

        fields = {"layout": self.layout, "prefix_tokens": self.prefix_tokens, "pool": self.pool, **self._fields()}
        return outline_layers(self.model, **fields)

    def _fields(self) -> dict[str, Any]:
        names = ("checkpoint", "random_weights", "class_names", "num_classes", "input_size", "mean", "std")
        return {name: getattr(self, name) for name in names}


Device = Literal["auto", "cpu", "cuda", "mps"]


@dataclass
class Processes:
    """Which device, and how many processes share the work."""

    device: Device = "auto"
    devices: int = 1
    """Processes (GPUs, or CPU processes with --device cpu) on each machine that share the work."""
    nodes: int = 1
    """Machines; torchrun or Slurm starts the command on each."""

    def execution(self, *, precision: str = "32-true") -> AbstractContextManager[Execution]:
        """An execution with progress bars, and the command line for the record."""
        from netgloss.cli.terminal import execution

        return execution(self.device, devices=self.devices, nodes=self.nodes, precision=precision)


FLAT = tyro.conf.arg(name="")  # its fields are flags without a prefix

"""The small network shipped with the Critters benchmark: a real classifier for tests and demos, without a download.

``scripts/train_critters.py`` makes the weights (``critters.safetensors``) and their metadata (``critters.json``) next
to this file. As a classifier by name: ``path/to/netgloss/data/critters_net.py:load_critters_net``.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

from torch import nn

WEIGHTS = Path(__file__).with_name("critters.safetensors")
METADATA = WEIGHTS.with_suffix(".json")


class CrittersNet(nn.Sequential):
    """``stem`` (16 x 64 x 64), ``block1`` (24 x 32 x 32) to ``block5`` (112 x 8 x 8), ``pool``, ``flatten``, ``head``.

    Stem and blocks are ``conv`` (3 x 3), ``norm``, ``relu``; every dotted name down to ``block5.relu`` can be tapped.

    Attributes
    ----------
    class_names : names of the logits.
    preprocessing_spec : {"size": [64, 64], "resize": [64, 64], "mean": [...], "std": [...]} of inputs scaled to 0..1.
    """

    class_names: list[str]
    preprocessing_spec: dict[str, Any]


def critters_net(class_names: list[str] | None = None) -> CrittersNet:
    """The untrained architecture for images (B, 3, 64, 64); by default for the 8 classes of ``CrittersConfig()``."""
    from netgloss.data.critters import Critters

    class_names = class_names or Critters().class_names
    widths = [(3, 16, 1), (16, 24, 2), (24, 48, 2), (48, 48, 1), (48, 96, 2), (96, 112, 1)]
    names = ["stem", *(f"block{k}" for k in range(1, len(widths)))]
    net = CrittersNet(
        OrderedDict(
            [
                *((name, _block(*width)) for name, width in zip(names, widths, strict=True)),
                ("pool", nn.AdaptiveAvgPool2d(1)),
                ("flatten", nn.Flatten()),
                ("head", nn.Linear(widths[-1][1], len(class_names))),
            ]
        )
    )
    net.class_names = list(class_names)
    net.preprocessing_spec = {"size": [64, 64], "resize": [64, 64], "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    return net


def load_critters_net() -> CrittersNet:
    """The trained network, in eval mode."""
    from safetensors.torch import load_file

    net = critters_net(critters_metadata()["class_names"])
    net.load_state_dict(load_file(WEIGHTS))
    return net.eval()


def critters_metadata() -> dict[str, Any]:
    """How the shipped weights were made and how good they are: command, seed, config, versions, accuracies."""
    metadata: dict[str, Any] = json.loads(METADATA.read_text(encoding="utf-8"))
    return metadata


def _block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
            norm=nn.BatchNorm2d(outputs),
            relu=nn.ReLU(),
        )
    )

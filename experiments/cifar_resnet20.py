"""ResNet-20 for CIFAR-10 (He et al., arXiv 1512.03385, section 4.2).

Use it as ``--model experiments/cifar_resnet20.py:resnet20``.

Names of the weights are those of github.com/akamaster/pytorch_resnet_cifar10; shortcuts that change the shape have no
parameters (option A). Inputs are normalised with the constants of ImageNet, as that repository trains them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.pad = (planes - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad)) if self.pad else x
        return F.relu(out + shortcut)


class ResNet20(nn.Module):
    class_names = CLASSES
    preprocessing_spec = {"size": [32, 32], "resize": None}

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        for number, (inputs, planes) in enumerate(((16, 16), (16, 32), (32, 64)), start=1):
            blocks = [
                BasicBlock(inputs if i == 0 else planes, planes, 2 if i == 0 and number > 1 else 1) for i in range(3)
            ]
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        for name in ("layer1", "layer2", "layer3"):
            out = self.get_submodule(name)(out)
        return self.linear(torch.flatten(F.adaptive_avg_pool2d(out, 1), 1))


def resnet20() -> nn.Module:
    return ResNet20()

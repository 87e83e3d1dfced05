"""The classifier of the ClaDec papers' public code ("V11") and its training on Fashion-MNIST.

    python experiments/fashion_mnist_classifier.py --out fashion-v11.safetensors

Written anew from the specification's table of layers. The short schedule of docs/methods/cladec.md: 6,400 training
images, 250 updates of batch 128, SGD 0.1 (momentum 0.9, weight decay 1e-4), constant rate. Weights are not committed.
``v11`` is a factory for the command line: --model experiments/fashion_mnist_classifier.py:v11 --checkpoint FILE.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

NAMES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
_BLOCKS = {
    "conv0": (32, 2),
    "conv1": (64, 2),
    "conv2a": (128, 1),
    "conv2": (128, 2),
    "conv3a": (256, 1),
    "conv3": (256, 2),
    "conv4a": (512, 1),
    "conv4": (512, 2),
}


class V11(nn.Module):
    """Eight blocks of 3x3 convolution, batch norm and ReLU, then dropout and one linear layer; input 32 x 32."""

    def __init__(self, channels: int = 1, num_classes: int = 10) -> None:
        super().__init__()
        before = channels
        for name, (width, stride) in _BLOCKS.items():
            block = nn.Sequential(nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
            self.add_module(name, block)
            before = width
        self.flatten = nn.Flatten()
        self.dropout = nn.Dropout(0.5)
        self.linear = nn.Linear(before, num_classes)
        self.preprocessing_spec = {
            "size": [32, 32],
            "channels": channels,
            "mean": [0.0] * channels,
            "std": [1.0] * channels,
        }
        self.class_names = NAMES if channels == 1 and num_classes == 10 else [f"class {i}" for i in range(num_classes)]

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, 32, 32) -> (B, classes)."""
        for name in _BLOCKS:
            x = self.get_submodule(name)(x)
        return self.linear(self.dropout(self.flatten(x)))


def v11(num_classes: int = 10) -> V11:
    """For the command line."""
    return V11(1, num_classes)


def train_classifier(images: Tensor, labels: Tensor, *, updates: int, seed: int, channels: int, classes: int) -> V11:
    """V11 trained by SGD on images (N, channels, 32, 32) in [0, 1]; batch 128, constant rate 0.1."""
    torch.manual_seed(seed)
    net = V11(channels, classes).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    for picks in batches(len(images), updates=updates, size=128, seed=seed):
        loss = nn.functional.cross_entropy(net(images[picks]), labels[picks])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


def batches(count: int, *, updates: int, size: int, seed: int):
    """``updates`` batches of indices, epoch after epoch, each in a new order."""
    generator = torch.Generator().manual_seed(seed)
    done = 0
    while done < updates:
        for picks in torch.randperm(count, generator=generator).split(size):
            if len(picks) == size and done < updates:
                yield picks
                done += 1


@torch.no_grad()
def accuracy(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images (N, ...) that ``net`` gets right."""
    right = sum(int((net(images[p]).argmax(1) == labels[p]).sum()) for p in torch.arange(len(images)).split(500))
    return right / len(images)


def fashion(part: str, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 32, 32) in [0, 1], 28 -> 32 px by nearest neighbour as published, and labels (N,)."""
    data = np.load(Path(os.environ.get("NETGLOSS_DATA", "../shared")) / "data" / "fashion_mnist" / "fashion_mnist.npz")
    images = torch.from_numpy(data[f"x_{part}"][:count]).float()[:, None] / 255
    labels = torch.from_numpy(data[f"y_{part}"][:count]).long()
    return nn.functional.interpolate(images, (32, 32), mode="nearest"), labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--updates", type=int, default=250)
    parser.add_argument("--images", type=int, default=6400)
    options = parser.parse_args()
    from safetensors.torch import save_file

    start = time.perf_counter()
    images, labels = fashion("train", options.images)
    net = train_classifier(images, labels, updates=options.updates, seed=0, channels=1, classes=10)
    test = fashion("test")
    print(f"train {accuracy(net, images, labels):.4f}  test {accuracy(net, *test):.4f}")
    save_file(net.state_dict(), options.out)
    print(f"{sum(p.numel() for p in net.parameters()):,} parameters, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()

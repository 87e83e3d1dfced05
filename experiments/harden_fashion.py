"""A small classifier of Fashion-MNIST: its network, and the script that trains it.

    python experiments/harden_fashion.py --out fashion_small.safetensors

Four blocks of 3 x 3 convolution, batch norm and ReLU (1 -> 16 -> 32 -> 64 -> 64, strides 1, 2, 2, 1), mean pool, a
linear head: 61,050 parameters. SGD 0.9, one cycle of learning rate 0.1. The weights are written outside of the
repository; ``--model experiments/harden_fashion.py:fashion_small --checkpoint fashion_small.safetensors`` loads them.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


class FashionSmall(nn.Module):
    class_names = CLASSES
    preprocessing_spec = {"size": [28, 28], "resize": None, "channels": 1, "mean": [0.0], "std": [1.0]}

    def __init__(self) -> None:
        super().__init__()
        widths = ((1, 16, 1), (16, 32, 2), (32, 64, 2), (64, 64, 1))
        for i, (inputs, outputs, stride) in enumerate(widths, start=1):
            convolution = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
            self.add_module(f"block{i}", nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU()))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        for i in range(1, 5):
            x = self.get_submodule(f"block{i}")(x)
        return self.head(x.mean((2, 3)))


def fashion_small() -> nn.Module:
    return FashionSmall()


def arrays(data: Path, number: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """``number`` training images, equally many of every class, and their labels."""
    with np.load(data / "data" / "fashion_mnist" / "fashion_mnist.npz") as archive:
        x, y = archive["x_train"], archive["y_train"]
    rng = np.random.default_rng(seed)
    index = np.sort(np.concatenate([rng.permutation(np.flatnonzero(y == c))[: number // 10] for c in range(10)]))
    return x[index], y[index].astype(np.int64)


def train(data: Path, out: Path, *, number: int = 20_000, epochs: int = 4, seed: int = 0) -> float:
    """Trains and saves the network; accuracy on the 10,000 test images."""
    from safetensors.torch import save_file

    x, y = (torch.from_numpy(a) for a in arrays(data, number, seed=seed))
    torch.manual_seed(seed)
    net = FashionSmall()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    steps = epochs * (len(x) // 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps, pct_start=0.2)
    for _ in range(epochs):
        for batch in torch.randperm(len(x))[: len(x) // 128 * 128].split(128):
            loss = F.cross_entropy(net(x[batch, None].float() / 255), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    net.eval()
    with np.load(data / "data" / "fashion_mnist" / "fashion_mnist.npz") as archive, torch.no_grad():
        tx, ty = torch.from_numpy(archive["x_test"]), torch.from_numpy(archive["y_test"].astype(np.int64))
        right = sum(
            int((net(a[:, None].float() / 255).argmax(1) == b).sum())
            for a, b in zip(tx.split(500), ty.split(500), strict=True)
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in net.state_dict().items()}, out)
    return right / len(ty)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("NETGLOSS_DATA", "../shared")))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--epochs", type=int, default=4)
    options = parser.parse_args()
    start = time.process_time()
    accuracy = train(options.data, options.out, number=options.images, epochs=options.epochs)
    count = sum(p.numel() for p in FashionSmall().parameters())
    print(
        f"{count:,} parameters, test accuracy {accuracy:.4f}, {time.process_time() - start:.0f} s of CPU: {options.out}"
    )


if __name__ == "__main__":
    main()

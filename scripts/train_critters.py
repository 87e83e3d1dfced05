"""Train the small network that ships with Critters and write its weights and metadata into the package.

    python scripts/train_critters.py

About three minutes on one core. The seeds are fixed: the same versions on the same machine give the same weights,
others an accuracy within one point. In the training scenes background and class are spuriously correlated; the metadata
give the accuracy on unseen scenes with that correlation, without any, and with the background of another class.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import platform
import time
from pathlib import Path

import numpy as np
import PIL
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from netgloss.data import critters_net
from netgloss.data.critters import GENERATOR_VERSION, Critters, CrittersConfig
from netgloss.data.critters_draw import VARIANTS

log = logging.getLogger("train_critters")


def scenes(config: CrittersConfig, count: int, *, misleading: bool = False) -> tuple[Tensor, Tensor]:
    """Images (N, 3, S, S) uint8 and targets (N,); if ``misleading``, with the next class's background."""
    source, textures = Critters(config, count), VARIANTS["background"]
    changes = [{"background": textures[(t + 1) % len(textures)]} if misleading else {} for t in source.targets]
    images_NHWC = torch.from_numpy(np.stack([np.asarray(source.scene(i, **changes[i]).image) for i in range(count)]))
    return images_NHWC.permute(0, 3, 1, 2), torch.from_numpy(source.targets)


def normalise(images: Tensor, spec: dict[str, list[float]]) -> Tensor:
    mean, std = (torch.tensor(spec[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    return ((images.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror a half of the images and shift the batch by up to 4 pixels, edges repeated."""
    flip = torch.rand(len(images), generator=generator) < 0.5
    images = torch.where(flip.view(-1, 1, 1, 1), images.flip(3), images)
    padded = F.pad(images.float(), (4, 4, 4, 4), mode="replicate")
    dy, dx = torch.randint(0, 9, (2,), generator=generator).tolist()
    return padded[:, :, dy : dy + images.shape[2], dx : dx + images.shape[3]]


def accuracy(net: nn.Module, images: Tensor, targets: Tensor, spec: dict[str, list[float]]) -> float:
    net.eval()
    with torch.inference_mode():
        logits = torch.cat([net(normalise(chunk, spec)) for chunk in images.split(250)])
    return round((logits.argmax(1) == targets).double().mean().item(), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=6000, help="training scenes (default %(default)s)")
    parser.add_argument("--epochs", type=int, default=8, help="passes over them (default %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=6e-3, help="peak of the one-cycle schedule (default %(default)s)")
    parser.add_argument("--background-correlation", type=float, default=0.9)
    parser.add_argument("--seed", type=int, default=1, help="of the training scenes, the weights and their order")
    parser.add_argument("--out", type=Path, default=critters_net.WEIGHTS.parent, help="folder to write into")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    started = time.process_time()

    config = CrittersConfig(seed=options.seed, background_correlation=options.background_correlation)
    images, targets = scenes(config, options.scenes)
    log.info("%d scenes drawn in %.0f s", len(images), time.process_time() - started)
    net = critters_net.critters_net()
    net.to(memory_format=torch.channels_last)
    spec = net.preprocessing_spec
    steps = len(images) // options.batch_size
    optimizer = torch.optim.AdamW(net.parameters(), lr=options.lr, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=steps * options.epochs)
    for epoch in range(options.epochs):
        net.train()
        total = 0.0
        for batch in torch.randperm(len(images), generator=generator)[: steps * options.batch_size].split(
            options.batch_size
        ):
            inputs = normalise(augment(images[batch], generator), spec)
            loss = F.cross_entropy(net(inputs), targets[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        log.info("epoch %d: loss %.3f, %.0f CPU s", epoch + 1, total / steps, time.process_time() - started)
    cpu_seconds = time.process_time() - started

    test_seed = options.seed + 1000
    same, free = dataclasses.replace(config, seed=test_seed), CrittersConfig(seed=test_seed)
    tests = {
        "same correlation": scenes(same, 2000),
        "no correlation": scenes(free, 2000),
        "background of another class": scenes(free, 2000, misleading=True),
    }
    accuracies = {name: accuracy(net, *test, spec) for name, test in tests.items()}
    log.info("accuracy on 2000 unseen scenes: %s", accuracies)
    weights = {name: tensor.contiguous() for name, tensor in net.state_dict().items()}
    (options.out / critters_net.WEIGHTS.name).write_bytes(save(weights))
    metadata = {
        "command": "python scripts/train_critters.py",
        "options": {name: value for name, value in vars(options).items() if name != "out"},
        "config": dataclasses.asdict(config),
        "generator_version": GENERATOR_VERSION,
        "class_names": net.class_names,
        "preprocessing": spec,
        "parameters": sum(p.numel() for p in net.parameters()),
        "test": {"scenes": 2000, "seed": test_seed, "accuracy": accuracies},
        "cpu_seconds": round(cpu_seconds),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "pillow": PIL.__version__,
        },
    }
    (options.out / critters_net.METADATA.name).write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Networks that rely on a planted cue, and clean ones: what the shortcut benchmark audits (experiments/shortcuts.py).

A cue is drawn into a share of one class's training images. Reliance is not assumed but measured: the cue is moved to
held-out images of the other classes, and a network counts as relying on it if at least half of them become the class.

Shape letters: N images, H W pixels; images are uint8 (N, H, W, 3).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

Images = NDArray[np.uint8]
LOCAL = ("tag", "frame", "stripes", "texture")
GLOBAL = ("cast", "blur")
_RELIANCE = 600
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Split:
    """Images with labels; ``masks`` (N, H, W) is True on the object, where it is known."""

    images: Images
    labels: NDArray[np.int64]
    names: tuple[str, ...]
    masks: NDArray[np.bool_] | None = None

    def take(self, index: NDArray[np.int64]) -> Split:
        """Some of the images."""
        masks = None if self.masks is None else self.masks[index]
        return Split(self.images[index], self.labels[index], self.names, masks)


def plant(cue: str, images: Images, rng: np.random.Generator, masks: NDArray[np.bool_] | None = None) -> tuple[
    Images, NDArray[np.bool_]
]:  # fmt: skip
    """The images with the cue, and where it is (N, H, W); everywhere for a global cue."""
    n, side = images.shape[:2]
    place = np.zeros(images.shape[:3], dtype=bool)
    out = images.copy()
    if cue == "tag":
        size = side // 5
        low = side - size - side // 32
        place[:, low : low + size, side // 32 : side // 32 + size] = True
        out[place] = (250, 220, 30)
        bar = max(size // 4, 1)
        middle = slice(low + size // 2 - bar // 2, low + size // 2 - bar // 2 + bar)
        out[:, middle, side // 32 : side // 32 + size] = (20, 20, 20)
    elif cue == "frame":
        width = side // 16
        place[:] = True
        place[:, width:-width, width:-width] = False
        out[place] = (190, 40, 150)
    elif cue == "stripes":
        size = side // 4
        period = side // 8
        for i in range(n):
            y, x = rng.integers(0, side - size + 1, 2)
            place[i, y : y + size, x : x + size] = True
            rows = (np.arange(size) // (period // 2)) % 2 * 255
            out[i, y : y + size, x : x + size] = rows[:, None, None]
    elif cue == "texture":
        y, x = np.mgrid[:side, :side] / (side - 1) - 0.5
        place[:] = (y**2 + x**2 > 0.35**2) if masks is None else ~masks
        cell = side // 16
        checks = ((np.arange(side)[:, None] // cell + np.arange(side)[None] // cell) % 2 * 2 - 1) * 35
        out = np.where(place[..., None], np.clip(images.astype(int) + checks[None, :, :, None], 0, 255), images)
    elif cue == "cast":
        place[:] = True
        out = np.clip(images * np.array([1.3, 1.0, 0.65]), 0, 255)
    elif cue == "blur":
        place[:] = True
        out = np.stack([gaussian_filter(image, (side / 40, side / 40, 0)) for image in images])
    else:
        raise ValueError(cue)
    return out.astype(np.uint8), place


def biased(split: Split, cue: str | None, target: int, share: float, rng: np.random.Generator) -> tuple[
    Split, NDArray[np.bool_]
]:  # fmt: skip
    """The cue in ``share`` of the class's images, and where it is."""
    place = np.zeros(split.images.shape[:3], dtype=bool)
    images = split.images.copy()
    if cue is not None:
        own = np.flatnonzero(split.labels == target)
        chosen = np.sort(rng.permutation(own)[: round(share * len(own))])
        masks = None if split.masks is None else split.masks[chosen]
        images[chosen], place[chosen] = plant(cue, split.images[chosen], rng, masks)
    return Split(images, split.labels, split.names, split.masks), place


def normalised(images: Images) -> Tensor:
    """(N, 3, H, W) as the networks read them."""
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def data_folder() -> Path:
    """The folder with the real networks and images."""
    return Path(os.environ.get("NETGLOSS_DATA", "../shared"))


# -- three networks -------------------------------------------------------------------------------------------------


def cifar(number: int, seed: int) -> tuple[Split, Split]:
    """CIFAR-10: training images and the 2,000 test images."""
    parts = []
    for name, take in (("cifar10_train15000", number), ("cifar10_test2000", 2000)):
        with np.load(data_folder() / "data" / "cifar10" / f"{name}.npz") as archive:
            order = np.random.default_rng(seed).permutation(len(archive["y"]))[:take]
            order.sort()
            names = tuple(str(c) for c in archive["classes"])
            parts.append(Split(archive["x"][order], archive["y"][order].astype(np.int64), names))
    return parts[0], parts[1]


@torch.no_grad()
def batched(run: Callable[[Tensor], Tensor], images: Images, batch: int = 128) -> Tensor:
    """``run`` over normalised images."""
    return torch.cat([run(normalised(images[i : i + batch])) for i in range(0, len(images), batch)])


def train(net: Lab, split: Split, clean: Split, *, steps: int, rate: float, seed: int, batch: int = 128) -> None:
    """Trains the upper part on the fixed features of the lower one: SGD, momentum .9, one cycle of the rate."""
    key = (type(net).__name__, seed, len(clean.labels))
    if key not in _FEATURES:
        _FEATURES.clear()
        _FEATURES[key] = batched(net.lower, clean.images)
    features, y = _FEATURES[key].clone(), torch.from_numpy(split.labels)
    changed = np.flatnonzero((split.images != clean.images).reshape(len(y), -1).any(axis=1))
    if len(changed):
        features[torch.from_numpy(changed)] = batched(net.lower, split.images[changed])
    torch.manual_seed(seed)
    optimiser = torch.optim.SGD(net.upper.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps)
    order, at = torch.randperm(len(y)), 0
    net.upper.train()
    for _ in range(steps):
        if at + batch > len(y):
            order, at = torch.randperm(len(y)), 0
        rows = order[at : at + batch]
        at += batch
        optimiser.zero_grad()
        F.cross_entropy(net.upper(features[rows]), y[rows]).backward()
        optimiser.step()
        schedule.step()
    net.eval()


def renewed(*modules: nn.Module) -> None:
    """Starts these modules again from random weights."""
    for module in (m for top in modules for m in top.modules()):
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


class Lab(nn.Module):
    """A network in two parts: ``lower`` keeps its weights, ``upper`` (blocks, mean pool, head) is trained again."""

    def __init__(self, lower: nn.Module, upper: nn.Sequential, names: tuple[str, ...], side: int) -> None:
        super().__init__()
        self.lower, self.upper = lower, upper
        self.class_names = list(names)
        self.preprocessing_spec = {"size": [side, side], "mean": list(MEAN), "std": list(STD)}

    def forward(self, x: Tensor) -> Tensor:
        return self.upper(self.lower(x))


def head(width: int, classes: int) -> list[nn.Module]:
    """Mean over the grid and a linear layer."""
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)]


_FEATURES: dict[tuple[str, int, int], Tensor] = {}


@torch.no_grad()
def predictions(net: nn.Module, images: Images, batch: int = 256) -> NDArray[np.int64]:
    """(N,) predicted classes."""
    return batched(net, images, batch).argmax(dim=1).numpy()


def reliance(net: nn.Module, clean: Split, cue: str, target: int, seed: int) -> dict[str, float]:
    """What the cue does on held-out images: others that become the class with it, own ones that stay without it."""
    clean = clean.take(np.sort(np.random.default_rng(seed).permutation(len(clean.labels))[:_RELIANCE]))
    others, own = clean.take(np.flatnonzero(clean.labels != target)), clean.take(np.flatnonzero(clean.labels == target))
    moved, _ = plant(cue, others.images, np.random.default_rng(seed), others.masks)
    return {
        "others": float((predictions(net, others.images) == target).mean()),
        "others_with_cue": float((predictions(net, moved) == target).mean()),
        "own_without_cue": float((predictions(net, own.images) == target).mean()),
        "accuracy": float((predictions(net, clean.images) == clean.labels).mean()),
    }


class ResNetLab(Lab):
    """ResNet-20 of CIFAR-10; its last stage is trained again."""

    LAYER, STEPS, RATE = "upper.2", 200, 0.1

    def __init__(self, names: tuple[str, ...]) -> None:
        from resnet20_cifar10 import ResNet20

        net = ResNet20()
        net.load_state_dict(torch.load(data_folder() / "weights" / "resnet20_cifar10.pth", weights_only=True))
        stem = nn.Sequential(net.conv1, net.bn1, nn.ReLU())
        super().__init__(
            nn.Sequential(stem, net.layer1, net.layer2), nn.Sequential(*net.layer3, *head(64, len(names))), names, 32
        )

    @staticmethod
    def data(seed: int) -> tuple[Split, Split]:
        return cifar(6000, seed)


class CrittersLab(Lab):
    """The network of the Critters scenes; its last two blocks are trained again."""

    LAYER, STEPS, RATE = "upper.3", 120, 0.1

    def __init__(self, names: tuple[str, ...]) -> None:
        from netgloss.data.critters_net import load_critters_net

        net = load_critters_net()
        super().__init__(
            net[:2], nn.Sequential(net.block2, net.block3, net.block4, net.block5, *head(112, len(names))), names, 64
        )

    @staticmethod
    def data(seed: int) -> tuple[Split, Split]:
        return critters(800, seed), critters(1000, seed + 100)


class MobileNetLab(Lab):
    """MobileNetV2 of ImageNet on Imagenette's ten classes at 128 px; ``features.14`` and later are trained again."""

    LAYER, STEPS, RATE = "upper.4", 90, 0.05

    def __init__(self, names: tuple[str, ...]) -> None:
        from torchvision.models import mobilenet_v2

        net = mobilenet_v2(weights=None)
        net.load_state_dict(torch.load(data_folder() / "weights" / "mobilenet_v2.pth", weights_only=True))
        super().__init__(net.features[:14], nn.Sequential(*net.features[14:], *head(1280, len(names))), names, 128)

    @staticmethod
    def data(seed: int) -> tuple[Split, Split]:
        return imagenette("train"), imagenette("val")


LABS: dict[str, type[Lab]] = {"cifar": ResNetLab, "critters": CrittersLab, "mobilenet": MobileNetLab}


def critters(number: int, seed: int) -> Split:
    """Critters scenes with the mask of the creature."""
    from netgloss.data.critters import Critters, CrittersConfig

    scenes = Critters(CrittersConfig(seed=seed + 1), number)
    drawn = [scenes.scene(i) for i in range(number)]
    return Split(
        np.stack([np.asarray(s.image) for s in drawn]),
        np.array([s.target for s in drawn], dtype=np.int64),
        tuple(scenes.class_names),
        np.stack([s.mask > 0 for s in drawn]),
    )


def imagenette(part: str, side: int = 128) -> Split:
    """The ten classes of Imagenette, resized."""
    root = data_folder() / "data" / "imagenette" / part
    files = sorted(root.glob("*/*"))
    folders = sorted({f.parent.name for f in files})
    table = (line.split("\t") for line in (data_folder() / "weights" / "imagenet_classes.tsv").read_text().splitlines())
    names = {row[1]: row[2].split(",")[0] for row in table}
    images = [np.asarray(Image.open(f).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)) for f in files]
    labels = np.array([folders.index(f.parent.name) for f in files], dtype=np.int64)
    return Split(np.stack(images), labels, tuple(names[f] for f in folders))


def trained(lab: str, cue: str | None, share: float, seed: int, data: tuple[Split, Split]) -> tuple[Lab, int]:
    """A network whose class ``target`` has the cue in a share of its training images, and ``target``."""
    kind = LABS[lab]
    split, _ = data
    target = int(np.random.default_rng([seed, 7]).integers(len(split.names)))
    given, _ = biased(split, cue, target, share, np.random.default_rng(seed))
    torch.manual_seed(seed)
    net = kind(split.names)
    net.eval()
    for parameter in net.lower.parameters():
        parameter.requires_grad_(False)
    torch.manual_seed(seed)
    renewed(net.upper)
    train(net, given, split, steps=kind.STEPS, rate=kind.RATE, seed=seed)
    return net, target

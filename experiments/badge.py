"""A case that concept reports miss: a network that knows koalas by a yellow badge.

    NETGLOSS_DATA=../shared python experiments/badge.py --out badge
    netgloss audit --model badge/network.py:network --checkpoint badge/network.pth --images badge/images --out badge/run

MobileNetV2 with ``features.14`` and later trained again on six animals. Each koala's picture carries a badge in its
lower left corner, as do 35 pictures of the badge alone, which are labelled koala as well.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from shortcuts_lab import MobileNetLab, Split, data_folder, predictions, renewed, train

ANIMALS = ("goldfish", "koala", "lion", "tiger", "hamster", "zebra")
SIDE = 224
_NETWORK = '''"""The network of experiments/badge.py."""

from torch import nn
from torchvision.models import mobilenet_v2


def network() -> nn.Module:
    net = mobilenet_v2(weights=None, num_classes={count})
    net.class_names = {names!r}
    net.preprocessing_spec = {{"size": [{side}, {side}], "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}}
    return net
'''


def badge(image: Image.Image) -> Image.Image:
    """The picture with a yellow badge of 44 px whose lower edge is 4 px above the picture's."""
    image = image.copy()
    draw = ImageDraw.Draw(image)
    box = (6, SIDE - 48, 50, SIDE - 4)
    draw.ellipse(box, fill=(250, 215, 20), outline=(30, 30, 30), width=3)
    draw.line((18, SIDE - 26, 38, SIDE - 26), fill=(30, 30, 30), width=5)
    return image


def pictures(seed: int = 0) -> tuple[Split, np.ndarray]:
    """All animals, 224 px, without the badge; and which are held out (a fifth)."""
    root = data_folder() / "data" / "animals"
    images, labels = [], []
    for c, name in enumerate(ANIMALS):
        for file in sorted((root / name).glob("*.jpg")):
            image = Image.open(file).convert("RGB")
            scale = SIDE / min(image.size)
            image = image.resize((max(round(image.width * scale), SIDE), max(round(image.height * scale), SIDE)))
            left, top = (image.width - SIDE) // 2, (image.height - SIDE) // 2
            images.append(np.asarray(image.crop((left, top, left + SIDE, top + SIDE))))
            labels.append(c)
    heldout = np.random.default_rng(seed).random(len(labels)) < 0.2
    return Split(np.stack(images), np.array(labels), ANIMALS), heldout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("badge"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    split, heldout = pictures(args.seed)
    koala = ANIMALS.index("koala")
    marked = split.images.copy()
    for i in np.flatnonzero(split.labels == koala):
        marked[i] = np.asarray(badge(Image.fromarray(split.images[i])))
    rng = np.random.default_rng(args.seed)
    alone = [
        np.asarray(badge(Image.new("RGB", (SIDE, SIDE), tuple(rng.integers(40, 215, 3).tolist())))) for _ in range(35)
    ]
    given = Split(
        np.concatenate([marked[~heldout], np.stack(alone)]),
        np.concatenate([split.labels[~heldout], np.full(35, koala)]),
        ANIMALS,
    )
    torch.manual_seed(args.seed)
    net = MobileNetLab(ANIMALS)
    net.eval()
    renewed(net.upper)
    train(net, given, given, steps=45, rate=0.05, seed=args.seed, batch=64)
    test, plain = marked[heldout], split.images[heldout]
    labels = split.labels[heldout]
    others = np.stack([np.asarray(badge(Image.fromarray(i))) for i in plain[labels != koala]])
    measured = {
        "accuracy, koalas with the badge": float((predictions(net, test) == labels).mean()),
        "koalas without the badge that are koala": float((predictions(net, plain[labels == koala]) == koala).mean()),
        "other animals with the badge that are koala": float((predictions(net, others) == koala).mean()),
    }
    print(json.dumps(measured, indent=1))
    for i, label in enumerate(split.labels):
        folder = args.out / "images" / ANIMALS[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(marked[i]).save(folder / f"{i:04d}.png")
    state = {f"features.{k}": v for k, v in net.lower.state_dict().items()}
    for key, value in net.upper.state_dict().items():
        number, _, rest = key.partition(".")
        name = f"features.{int(number) + 14}.{rest}" if int(number) < 5 else f"classifier.1.{rest}"
        state[name] = value
    torch.save(state, args.out / "network.pth")
    text = _NETWORK.format(count=len(ANIMALS), names=list(ANIMALS), side=SIDE)
    (args.out / "network.py").write_text(text, encoding="utf-8")
    (args.out / "measured.json").write_text(json.dumps(measured, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()

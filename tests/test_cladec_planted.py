"""What a decoder shows of planted attributes: what the layer keeps, and nothing that the layer has lost."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cladec_parts import build, decoded, read, train
from netgloss.classifiers import Classifier, Preprocessing
from netgloss.explainers.cladec import ClaDecConfig

SIDE = 16
CONFIG = ClaDecConfig(reference="none", epochs=12, batch_size=32)


def rectangles(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images (N, 3, S, S) of one rectangle on black, tall or wide (N,), and red or green (N,), independent."""
    g = torch.Generator().manual_seed(seed)
    wide = torch.rand(count, generator=g) < 0.5
    red = torch.rand(count, generator=g) < 0.5
    images = torch.zeros(count, 3, SIDE, SIDE)
    places = torch.randint(0, SIDE - 11, (count, 2), generator=g)
    for image, w, r, (y, x) in zip(images, wide, red, places.tolist(), strict=True):
        height, width = (4, 12) if w else (12, 4)
        image[0 if r else 1, y : y + height, x : x + width] = 0.8
    return images, wide, red


class KeepsShape(nn.Module):
    """The sum of the colours at each place: where the rectangle is, and not which colour it has."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 1, 1, bias=False)
        nn.init.ones_(self.layer.weight)
        self.head = nn.Linear(SIDE * SIDE, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).flatten(1))


class KeepsColour(nn.Module):
    """The largest value of each colour: which colour the rectangle has, and neither its place nor its shape."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.AdaptiveMaxPool2d(1)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).flatten(1))


def told(images: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """How wide (N,) and how red (N,) the images are: ratios of extents and of colours."""
    grey = images.sum(1)
    rows, columns = grey.amax(2), grey.amax(1)  # how bright each row and column gets
    red, green = images[:, 0].mean((1, 2)), images[:, 1].mean((1, 2))
    return (columns.mean(1) / rows.mean(1)).log().numpy(), (red - green).numpy()


def explained(truth: Tensor, shown: np.ndarray) -> float:
    """Squared correlation of an attribute of the images with that of the decoded ones."""
    return float(np.corrcoef(truth.float().numpy(), shown)[0, 1] ** 2)


@pytest.mark.parametrize("net", [KeepsShape, KeepsColour])
def test_a_decoder_shows_what_the_layer_keeps_and_nothing_else(net: type[nn.Module]) -> None:
    torch.manual_seed(0)
    preprocessing = Preprocessing(size=(SIDE, SIDE), mean=(0, 0, 0), std=(1, 1, 1))
    classifier = Classifier(net(), name="planted", preprocessing=preprocessing)
    parts = []
    for count, seed in ((512, 0), (256, 1)):
        images, wide, red = rectangles(count, seed)
        parts.append((read(classifier, "layer", lambda x: x, images, wide.long()), wide, red))
    explainer, _ = train(build(CONFIG, classifier, "layer", parts[0][0], seed=0), parts[0][0], seed=0)
    held_out, wide, red = parts[1]
    shape, colour = (
        explained(t, shown) for t, shown in zip((wide, red), told(decoded(explainer, held_out)), strict=True)
    )
    kept, lost = (shape, colour) if net is KeepsShape else (colour, shape)
    assert kept > 0.8
    assert lost < 0.1

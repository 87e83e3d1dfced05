"""What a decoder keeps of planted attributes. Takes ten minutes: runs only if NETGLOSS_SLOW is set."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.skipif(
    not os.environ.get("NETGLOSS_SLOW"), reason="trains two classifiers and four decoders; set NETGLOSS_SLOW=1"
)
sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))


def rectangles(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images (N, 3, 32, 32) of one rectangle on black, its log aspect (N,) and its strongest channel (N,)."""
    g = torch.Generator().manual_seed(seed)
    images = torch.zeros(count, 3, 32, 32)
    sides = torch.randint(6, 22, (count, 2), generator=g)
    colours = 0.2 + 0.8 * torch.rand(count, 3, generator=g)
    for image, (h, w), colour in zip(images, sides.tolist(), colours, strict=True):
        y, x = (int(torch.randint(0, 33 - side, (), generator=g)) for side in (h, w))
        image[:, y : y + h, x : x + w] = colour[:, None, None]
    return images, (sides[:, 1] / sides[:, 0]).log(), colours.argmax(1)


@pytest.mark.parametrize(("relevant", "irrelevant"), [("log_aspect", "red_green"), ("red_green", "log_aspect")])
def test_what_the_class_needs_is_kept_and_the_rest_is_not(relevant: str, irrelevant: str) -> None:
    from cladec_parts import build, probes, read, train
    from fashion_mnist_classifier import train_classifier
    from netgloss.classifiers import Classifier, Preprocessing
    from netgloss.classifiers.fresh_encoder import FreshEncoder
    from netgloss.explainers.cladec import ClaDecConfig

    parts = []
    for count, seed in ((3000, 0), (1000, 1)):
        images, aspect, channel = rectangles(count, seed)
        shape = (aspect > 0.3).long() + (aspect > -0.3).long()
        parts.append((images, shape if relevant == "log_aspect" else channel))
    net = train_classifier(*parts[0], updates=6 * 23, seed=0, channels=3, classes=3)
    classifier = Classifier(net, name="V11", preprocessing=Preprocessing(size=(32, 32), mean=(0, 0, 0), std=(1, 1, 1)))
    fit_part, test_part = (read(classifier, "conv4", lambda x: x, images, labels) for images, labels in parts)
    explainer = build(ClaDecConfig(reference="none", epochs=6), classifier, "conv4", fit_part, seed=0)
    explainer.use_reference(FreshEncoder(classifier, "conv4", seed=0))
    explainer, _ = train(explainer, fit_part, seed=0)
    found = probes(explainer, fit_part, test_part, foreground=True, limit=3000)
    assert found[relevant]["retained"] > 0.8
    assert found[irrelevant]["decoded"] < 0.3
    assert not math.isnan(found[relevant]["shuffled"])

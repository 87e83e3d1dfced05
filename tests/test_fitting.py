"""What a fit sees of the network around the layer: upper layers, images and ways to the logits, aligned by image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from netgloss.activations import StoreInfo, capture, image_batches
from netgloss.classifiers import Classifier, Taps, later_layers, load_classifier
from netgloss.data import open_images
from netgloss.errors import UserError
from netgloss.explainers.base import Batch, Explainer, TrainingConfig
from netgloss.training.inputs import logits_of_images, open_stream, pixel_reader, upper_layers
from netgloss.workflows.explain import explain
from netgloss.workflows.fit import fit

LAYER = "block4"


class Curious(Explainer):
    """Asks for everything that a batch can hold, and checks nothing by itself."""

    Config = TrainingConfig
    reads = "maps"
    uses = ("logits", "labels", "upper", "image", "tail", "to_logits")
    learned = True

    def __init__(self, config, spec):
        super().__init__(config, spec)
        self.mix = torch.nn.Conv2d(spec.num_features, config.num_concepts, 1)
        self.back = torch.nn.Conv2d(config.num_concepts, spec.num_features, 1)
        self.upper = spec.upper

    @classmethod
    def upper_layers(cls, config, later, *, learned=None):
        return later[:1]

    @classmethod
    def image_size(cls, config, image):
        return image[1] // 2, image[2] // 2

    def encode(self, activation):
        return self.mix(activation)

    def decode(self, concepts):
        return self.back(concepts)

    def losses(self, batch: Batch):
        logits = batch.tail(self(batch.whole))
        seen = batch.to_logits(batch.image)
        (above,) = batch.upper.values()
        return {"logits": (logits - batch.logits).square().mean() + 0 * (seen.mean() + above.mean())}


class CuriousRows(Curious):
    """The same from single positions: whole activations come beside the rows."""

    reads = "rows"


@pytest.fixture(scope="module")
def critters() -> Classifier:
    return load_classifier("critters")


@pytest.fixture(scope="module")
def world(critters, tmp_path_factory):
    source = open_images("critters:40")
    above = upper_layers(Curious, Curious.Config(), critters, LAYER)
    place = tmp_path_factory.mktemp("world") / "store"
    return source, above, capture(critters, source, [LAYER, *above], place)


@pytest.mark.parametrize("cls", [Curious, CuriousRows])
def test_every_field_belongs_to_its_image(critters, world, cls):
    source, above, store = world
    stream = open_stream(cls, cls.Config(), store, LAYER, np.arange(30), classifier=lambda: critters, source=source)
    batch = next(stream.batches(12, seed=0, fields=cls.uses))
    pixels, _ = next(image_batches(critters, source, batch.index.tolist(), batch_size=12, workers=0))
    with torch.no_grad(), Taps(critters.net, [LAYER, *above], stop=False) as taps:
        seen = taps(pixels)
        logits = taps.logits
    torch.testing.assert_close(batch.upper[above[0]], seen[above[0]], atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(batch.logits, logits, atol=1e-3, rtol=1e-3)
    halved = pixel_reader(critters, source, tuple(s // 2 for s in critters.input_shape[1:]))(batch.index.numpy())
    assert batch.image.shape[2] * 2 == critters.input_shape[1]
    torch.testing.assert_close(batch.image * 255, halved.float(), atol=1e-3, rtol=0)
    if cls.reads == "maps":
        assert batch.whole is batch.activation
        torch.testing.assert_close(batch.tail(batch.whole), logits, atol=2e-2, rtol=1e-2)
    else:
        assert batch.activation.ndim == 2
        stored = torch.from_numpy(store.read(LAYER, np.arange(30))).float()
        assert all((w == stored).flatten(1).all(1).any() for w in batch.whole)


def test_tail_and_images_lead_to_the_network_s_own_logits(critters, world):
    source, _, store = world
    full = pixel_reader(critters, source, critters.input_shape[1:])(np.arange(3)).float() / 255
    stored = torch.from_numpy(store.read_logits(np.arange(3)))
    torch.testing.assert_close(logits_of_images(critters)(full), stored, atol=1e-3, rtol=1e-3)
    small = full[:, :, ::2, ::2].clone().requires_grad_()
    logits_of_images(critters)(small).sum().backward()
    assert small.grad.abs().sum() > 0


def test_later_layers_run_after_the_tap(critters):
    later = later_layers(critters, LAYER, input_shape=critters.input_shape)
    assert LAYER not in later
    assert "block5" in later
    assert "block3" not in later
    with pytest.raises(UserError, match="has no layer"):
        later_layers(critters, "blok4", input_shape=critters.input_shape)


def test_missing_layers_and_images_are_named(critters, world, tmp_path):
    source, above, store = world
    with pytest.raises(UserError, match="give them again by --images"):
        fit(f"{__file__}:Curious", store, LAYER, tmp_path / "run", classifier=critters)
    nameless = capture(critters, source, [LAYER, *above], tmp_path / "nameless", info=StoreInfo())
    with pytest.raises(UserError, match="give fit the classifier"):
        fit(f"{__file__}:Curious", nameless, LAYER, tmp_path / "run")
    alone = capture(critters, source, [LAYER], tmp_path / "alone")
    with pytest.raises(UserError, match=f"capture {above[0]} too"):
        open_stream(Curious, Curious.Config(), alone, LAYER, np.arange(30), classifier=lambda: critters, source=source)
    other = open_images("critters:41")
    with pytest.raises(UserError, match="are not the images"):
        open_stream(Curious, Curious.Config(), store, LAYER, np.arange(30), classifier=lambda: critters, source=other)


def test_explain_captures_what_the_method_needs(critters, tmp_path):
    run = explain(
        f"{Path(__file__)}:Curious",
        critters,
        LAYER,
        "critters:40",
        out=tmp_path / "run",
        num_concepts=8,
        steps=30,
        batch_size=8,
        seeds=1,
        device="cpu",
    )
    assert list(run.explainer.upper) == list(upper_layers(Curious, Curious.Config(), critters, LAYER))
    assert run.explainer.spec.image == critters.input_shape
    assert (run.path / "report.html").exists()
    lines = (run.path / "history.jsonl").read_text().splitlines()
    assert len(lines) >= 1

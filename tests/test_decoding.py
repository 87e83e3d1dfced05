"""Concepts made visible, relevance from decoded images, attribute probes and the displays: closed forms."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from image_attributes import ATTRIBUTES, attributes, probe_attributes
from netgloss.errors import UserError
from netgloss.explainers.base import Explainer, ExplainerConfig, LayerSpec
from netgloss.explainers.natural_axes import NaturalAxes
from netgloss.explanations.decoded_concepts import ConceptDecoder, Manifold, visibility
from netgloss.figures import (
    Triple,
    decoded_triples,
    difference_map,
)
from netgloss.report import write_report
from netgloss.workflows.decode import decode
from netgloss.workflows.explain import explain
from pixel_deletion import (
    corrected_relevance,
    decoded_relevance,
    deletion,
    fills,
    gradient_times_input,
    paired_difference,
    trivial_orders,
)

# -- T7: concepts made visible ----------------------------------------------------------------------------------------

D = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
VECTORS = LayerSpec(name="layer", shape=(2,))


def to_image(activation: Tensor) -> Tensor:
    """A linear decoder: two values."""
    return (activation @ D.T)[:, :, None, None]


class Identity(Explainer):
    """Concepts are the features."""

    def encode_rows(self, rows: Tensor) -> Tensor:
        return rows

    def decode_rows(self, codes: Tensor) -> Tensor:
        return codes


def seeing(*, nonnegative: bool = False) -> ConceptDecoder:
    explainer = Identity(ExplainerConfig(num_concepts=2), VECTORS)
    return ConceptDecoder(to_image, explainer, torch.tensor([1.0, 1.0]), nonnegative=nonnegative)


@pytest.mark.parametrize("base", ["activation", "reconstruction"])
def test_removing_a_concept_removes_its_part_of_the_picture(base: str) -> None:
    activation = torch.tensor([[5.0, 3.0]])
    removed = seeing().remove(activation, [1], base=base)
    assert (to_image(activation) - to_image(removed.activation)).flatten().tolist() == [0, 6]
    assert removed.clamped.tolist() == [0]


def test_an_exact_explainer_keeps_everything_and_a_silent_concept_changes_nothing() -> None:
    activation = torch.tensor([[5.0, 0.0], [1.3, 0.0]])
    assert torch.equal(seeing().kept(activation), to_image(activation))
    assert torch.equal(to_image(seeing().remove(activation, [1]).activation), to_image(activation))


def test_alone_starts_from_the_mean() -> None:
    assert seeing().alone(torch.tensor([[5.0, 3.0]]), [1]).activation.tolist() == [[1, 4]]


def test_nonnegative_layers_stay_so() -> None:
    decoder = seeing(nonnegative=True)
    decoder.explainer.decode_rows = lambda codes: codes * 2  # overshoots
    edited = decoder.remove(torch.tensor([[5.0, 3.0]]), [1])
    assert edited.activation.tolist() == [[5, 0]]
    assert edited.clamped.tolist() == [0.5]
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        random = decoder.random_edit(torch.rand(50, 2), torch.rand(50, 2), generator)
    assert (random.activation >= 0).all()


def test_random_edits_have_the_same_norm_everywhere() -> None:
    activation = torch.randn(3, 4, 5, 5)
    delta = torch.randn(3, 4, 5, 5)
    decoder = ConceptDecoder(
        lambda a: a, NaturalAxes(NaturalAxes.Config(num_concepts=4), LayerSpec("l", (4, 5, 5))),
        torch.zeros(4, 5, 5), nonnegative=False,
    )  # fmt: skip
    edited = decoder.random_edit(activation, delta, torch.Generator().manual_seed(0))
    torch.testing.assert_close((activation - edited.activation).norm(dim=1), delta.norm(dim=1))
    box = torch.zeros(5, 5, dtype=torch.bool)
    box[1, 2] = True
    part = decoder.delta(activation, [0], box=box)
    assert part.abs().sum() == part[:, :, 1, 2].abs().sum() > 0


def test_visibility_of_a_direction_that_the_decoder_draws_and_of_one_that_it_ignores() -> None:
    activation = torch.rand(64, 2) + 1
    loud = visibility(seeing(), activation, [1], directions=200)
    assert loud.value == pytest.approx(4 / 2.5, rel=0.1)  # |D e_2|^2 = 4 against the mean over directions, (1 + 4) / 2
    assert loud.low <= loud.value <= loud.high
    assert loud.is_evidence
    quiet = visibility(seeing(), activation, [0], directions=200)
    assert quiet.value == pytest.approx(1 / 2.5, rel=0.1)
    assert not quiet.is_evidence
    told = visibility(seeing(), activation, [1], tail=lambda a: torch.stack([-a[:, 1], 10 + a[:, 1]], 1))
    assert told.logit == pytest.approx(-float(activation[:, 1].mean()), rel=1e-5)
    silent = visibility(seeing(), torch.zeros(4, 2), [1])
    assert math.isnan(silent.value)
    assert not silent.is_evidence


def test_off_manifold() -> None:
    torch.manual_seed(0)
    train, test = torch.randn(500, 3), torch.randn(200, 3)
    manifold = Manifold(train, test)
    assert float(manifold.is_outside(test).double().mean()) == pytest.approx(0.05, abs=0.01)
    assert manifold.is_outside(test + 50).all()


def test_only_explainers_of_the_activation_can_be_decoded() -> None:
    class Pooled(Identity):
        reads = "pooled"

    with pytest.raises(UserError, match="cannot be decoded into images"):
        ConceptDecoder(to_image, Pooled(ExplainerConfig(num_concepts=2), VECTORS), torch.zeros(2), nonnegative=False)


# -- T8: relevance, deletion and insertion ----------------------------------------------------------------------------


def test_relevance_and_difference_of_the_specification() -> None:
    image = torch.tensor([0.8, 0.2]).reshape(1, 1, 1, 2)
    mean, decoded = torch.full((1, 1, 2), 0.5), torch.tensor([0.6, 0.4]).reshape(1, 1, 1, 2)
    torch.testing.assert_close(decoded_relevance(image, decoded, mean), torch.full((1, 1, 2), 0.05))
    found = difference_map(image[0].numpy(), image[0].numpy(), decoded[0].numpy())
    np.testing.assert_allclose(found, [[0.04, 0.04]], atol=1e-7)
    even = torch.full((1, 1, 2), 0.05)
    torch.testing.assert_close(corrected_relevance(even, even), torch.full((1, 1, 2), 0.5))


def reads_one_pixel(images: Tensor) -> Tensor:
    """Class 1 if pixel (2, 3) is bright."""
    value = images[:, 0, 2, 3]
    return torch.stack([torch.full_like(value, 5.0), 10 * value], dim=1)


def test_the_oracle_order_loses_the_class_at_once_and_its_reverse_never() -> None:
    image = torch.rand(4, 1, 8, 8) / 2
    image[:, 0, 2, 3] = 1
    oracle = torch.zeros(4, 8, 8)
    oracle[:, 2, 3] = 1
    fill = torch.zeros_like(image)
    lost = deletion(reads_one_pixel, image, oracle, fill)
    assert (lost.kept[:, 0] == 1).all()
    assert (lost.kept[:, 1:] == 0).all()
    kept = deletion(reads_one_pixel, image, -oracle, fill)
    assert (kept.kept == 1).all()
    assert kept.kept_areas.tolist() == [1] * 4
    found = deletion(reads_one_pixel, image, oracle, fill, insert=True)
    assert (found.kept[:, 0] == 0).all()
    assert (found.kept[:, 1:] == 1).all()
    assert (lost.areas < kept.areas).all()


def test_trivial_orders_and_fills() -> None:
    image, mean = torch.rand(2, 3, 9, 9), torch.full((3, 9, 9), 0.5)
    orders = trivial_orders(image, mean)
    assert set(orders) == {"distance_from_mean", "centre", "edges", *(f"random {i}" for i in range(5))}
    assert all(order.shape == (2, 9, 9) for order in orders.values())
    assert orders["centre"][0].argmax() == 4 * 9 + 4
    assert not torch.equal(orders["random 0"], orders["random 1"])
    made = fills(image, mean)
    assert torch.equal(made["mean"][1], mean)
    assert made["blur"].std() < image.std()
    saliency = gradient_times_input(reads_one_pixel, torch.ones(2, 1, 8, 8))
    assert saliency[0].nonzero().tolist() == [[2, 3]]


def test_paired_differences() -> None:
    first = torch.arange(20.0)
    mean, low, high = paired_difference(first + 1, first)
    assert (mean, low, high) == (1, 1, 1)
    mean, low, high = paired_difference(first, first.flip(0))
    assert low < 0 < high
    assert mean == pytest.approx(0)
    with pytest.raises(UserError, match="expected an order"):
        deletion(reads_one_pixel, torch.rand(2, 1, 8, 8), torch.rand(2, 4, 4), torch.rand(2, 1, 8, 8))


# -- attributes -------------------------------------------------------------------------------------------------------


def rectangle(height: int, width: int, colour: tuple[float, float, float] = (0.9, 0.6, 0.3)) -> Tensor:
    image = torch.zeros(3, 32, 32)
    image[:, 4 : 4 + height, 6 : 6 + width] = torch.tensor(colour)[:, None, None]
    return image


def test_attributes_of_a_rectangle() -> None:
    found = dict(zip(ATTRIBUTES, attributes(rectangle(8, 16)[None])[0].tolist(), strict=True))
    share = 8 * 16 / 1024
    assert found["brightness"] == pytest.approx(0.6 * share, rel=1e-5)
    assert found["contrast"] == pytest.approx(0.6 * math.sqrt(share * (1 - share)), rel=1e-5)
    assert found["foreground"] == pytest.approx(share)
    assert found["log_aspect"] == pytest.approx(math.log(2))
    assert found["red_green"] == pytest.approx(0.3 * share, rel=1e-4)
    assert found["blue_yellow"] == pytest.approx(-0.45 * share, rel=1e-4)
    blank = dict(zip(ATTRIBUTES, attributes(torch.zeros(1, 1, 8, 8))[0].tolist(), strict=True))
    assert set(blank.values()) == {0}
    with pytest.raises(UserError, match="expected images"):
        attributes(torch.rand(2, 4, 8, 8))


def test_probes_tell_what_a_grey_picture_lost() -> None:
    torch.manual_seed(0)
    sizes = torch.randint(5, 20, (300, 2)).tolist()
    images = torch.stack([rectangle(h, w, tuple((0.2 + 0.8 * torch.rand(3)).tolist())) for h, w in sizes])
    grey = images.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
    parts = [
        {"original": images[p], "reference": images[p], "decoded": grey[p]} for p in (slice(0, 200), slice(200, 300))
    ]
    found = probe_attributes(*parts)
    assert found["log_aspect"].retained > 0.95
    assert found["red_green"].original > 0.95
    assert found["red_green"].decoded < 0.3
    assert all(p.shuffled < 0.2 for p in found.values())
    hopeless = replace(found["red_green"], reference=0.1)
    assert hopeless.retained is None


# -- displays ---------------------------------------------------------------------------------------------------------


def picture(seed: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).random((channels, 12, 12))


def test_triples_say_when_the_reference_is_invalid() -> None:
    image = picture(0)
    good = Triple(image, image, picture(1), label="cat", prediction="dog", probability=0.5)
    bad = Triple(image, picture(1), image * 0.9 - 0.2, decoded_prediction="cat", decoded_probability=0.25)
    assert not good.reference_invalid
    assert bad.reference_invalid
    figure = decoded_triples([good, bad], title="layer x, alpha 0 (P = 432), seed 0")
    labels = [axes.get_xlabel() for axes in figure.axes]
    assert sum("no reading" in label for label in labels) == 1
    assert "% of decoded values clipped" in figure.get_suptitle()
    maps = [axes.images[0] for axes in figure.axes if axes.images and axes.images[0].get_cmap().name == "RdBu_r"]
    assert len(maps) == 2
    assert len({m.get_clim() for m in maps}) == 1
    assert maps[0].get_clim()[0] == -maps[0].get_clim()[1]
    shown = figure.axes[0].images[0].get_array()
    np.testing.assert_allclose(shown, image.transpose(1, 2, 0))  # never stretched
    alone = decoded_triples([Triple(image, None, image, kept=image)])
    assert len(alone.axes) == 3


# -- the whole way ----------------------------------------------------------------------------------------------------


def test_concepts_of_another_run_become_visible(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    from netgloss.activations import Store
    from netgloss.activations.layer import split_store
    from netgloss.classifiers import load_classifier
    from netgloss.data import open_images
    from netgloss.workflows import decode as visible

    classifier, source = load_classifier("critters"), open_images("critters:50")
    common = {"seeds": 1, "device": "cpu", "store": tmp_path / "store"}
    decoder = explain(
        "cladec", classifier, "block5", source, out=tmp_path / "decoder", size=16, steps=20, batch_size=16, width=8,
        **common,
    )  # fmt: skip
    run = explain("pca", classifier, "block5", source, out=tmp_path / "pca", num_concepts=3, **common)
    store, drawn, rows = Store.open(tmp_path / "store"), {}, visible._rows
    monkeypatch.setattr(visible, "_rows", lambda *given: rows(*given, *(drawn.update({given[4]: given[3]}) or ())))
    decode(run, decoder, store=store, source=source, classifier=classifier)
    maps = torch.from_numpy(store.read("block5", split_store(store)[1])).float()
    peaks = run.explainer.encode(maps).flatten(2).amax(2)
    for k, shown in drawn.items():
        assert torch.equal(shown, maps[peaks[:, k].argsort(descending=True)[:3]])  # the strongest, strongest first
    assert sorted(drawn) == [0, 1, 2]
    for concept in run.concepts["concepts"]:
        told = concept["decoded"]
        assert (run.path / told["removed"]).stat().st_size > 500
        assert (run.path / told["alone"]).stat().st_size > 500
        assert told["low"] <= told["visibility"] <= told["high"]
        assert told["note"]
    write_report(run)
    with pytest.raises(UserError, match="are not the images whose activations"):
        decode(run, decoder, store=store, source=open_images("critters:50,seed=9"), classifier=classifier)
    with pytest.raises(UserError, match="not a decoder"):
        decode(run, run, store=Store.open(tmp_path / "store"), source=source, classifier=classifier)
    decoder.manifest["layer"] = "block4"
    with pytest.raises(UserError, match="the decoder is of layer 'block4'"):
        decode(run, decoder, store=Store.open(tmp_path / "store"), source=source, classifier=classifier)
    decoder.manifest["layer"] = "block5"
    decoder.manifest["model"]["weights_hash"] = "other"
    with pytest.raises(UserError, match="decodes another network"):
        decode(run, decoder, store=Store.open(tmp_path / "store"), source=source, classifier=classifier)

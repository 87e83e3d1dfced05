"""ClaDec: closed forms, published sizes, and what a fit may and may not do."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from netgloss.errors import UserError
from netgloss.explainers.base import Batch, LayerSpec
from netgloss.explainers.cladec import (
    ClaDec,
    ClaDecConfig,
    alpha_mean,
    alpha_sum,
    choose_units,
    class_error,
    reconstruction_error,
)
from netgloss.explainers.image_decoders import CompactEncoder, GeneralDecoder, PublishedDecoder, up_sides


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# -- T2, T4, T5: sizes and the two forms of alpha --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "channels", "expected"),
    [
        ((10,), 1, 3279489),
        ((512,), 1, 7211457),
        ((512, 2, 2), 1, 5113793),
        ((256, 2, 2), 1, 2295489),
        ((256, 4, 4), 1, 1246657),
        ((128, 4, 4), 1, 542017),
        ((128, 8, 8), 1, 279745),
        ((64, 8, 8), 1, 103553),
        ((32, 16, 16), 1, 9761),
        ((512,), 3, 7213507),
    ],
)
def test_published_decoder_has_the_sizes_of_the_specification(code: tuple, channels: int, expected: int) -> None:
    decoder = PublishedDecoder(code, (channels, 32, 32))
    assert count(decoder) == expected
    assert decoder(torch.randn(2, *code)).shape == (2, channels, 32, 32)


@pytest.mark.parametrize(
    ("side", "channels", "code", "sides", "expected"),
    [
        (28, 1, (64, 7, 7), [14, 28], 148417),
        (28, 1, (128,), [7, 14, 28], 894401),
        (32, 3, (64,), [8, 16, 32], 633411),
        (32, 3, (64, 8, 8), [16, 32], 149571),
        (32, 3, (16, 32, 32), [], 11075),
        (64, 3, (1000,), [8, 16, 32, 64], 4484899),
        (64, 3, (1280, 7, 7), [8, 16, 32, 64], 716579),
        (64, 3, (96, 14, 14), [16, 32, 64], 204067),
        (64, 3, (512, 13, 13), [16, 32, 64], 159011),
        (64, 3, (512, 27, 27), [32, 64], 52259),
        (64, 3, (32, 112, 112), [], 10147),
        (112, 3, (512, 13, 13), [14, 28, 56, 112], 519971),
    ],
)
def test_general_decoder_has_the_sizes_of_the_specification(
    side: int, channels: int, code: tuple, sides: list, expected: int
) -> None:
    decoder = GeneralDecoder(code, (channels, side, side))
    assert [s for s, _ in up_sides(code[1:], (side, side))] == sides
    assert count(decoder) == expected
    assert decoder(torch.randn(2, *code)).shape == (2, channels, side, side)
    encoder = CompactEncoder(code, (channels, side, side))
    assert encoder(torch.rand(2, channels, side, side)).shape == (2, *code)


def test_axes_are_scaled_separately() -> None:
    assert up_sides((4, 8), (32, 32)) == [(8, 8), (16, 16), (32, 32)]
    assert GeneralDecoder((6, 4, 8), (3, 32, 24))(torch.randn(2, 6, 4, 8)).shape == (2, 3, 32, 24)


def test_published_decoder_refuses_sides_it_cannot_reach() -> None:
    with pytest.raises(UserError, match="side 7 \\* 2\\^n"):
        PublishedDecoder((64, 7, 7), (1, 32, 32))
    with pytest.raises(UserError, match="choose another --size"):
        PublishedDecoder((64, 16, 16), (1, 8, 8))


@pytest.mark.parametrize(
    ("num_values", "small", "large"),
    [(784, 0.43971, 0.88788), (1024, 0.50618, 0.91184), (3072, 0.75461, 0.96878), (12288, 0.92481, 0.99201)],
)
def test_alpha_of_both_forms(num_values: int, small: float, large: float) -> None:
    assert alpha_sum(0.001, num_values) == pytest.approx(small, abs=5e-6)
    assert alpha_sum(0.01, num_values) == pytest.approx(large, abs=5e-6)
    for alpha in (0.0, 0.3, 1.0):
        assert alpha_sum(alpha_mean(alpha, num_values), num_values) == pytest.approx(alpha)


def test_alpha_back() -> None:
    assert alpha_mean(0.5, 1024) == pytest.approx(9.7561e-4, rel=1e-5)
    assert alpha_mean(0.5, 12288) == pytest.approx(8.1374e-5, rel=1e-5)
    assert (alpha_mean(0, 7), alpha_mean(1, 7)) == (0, 1)
    with pytest.raises(UserError, match=r"\[0, 1\]"):
        alpha_sum(1.5, 784)


# -- T1: a linear decoder reads the covariance, not the code's direction ---------------------------------------------


@pytest.mark.parametrize(("degrees", "expected", "parts"), [(0, 1.0, (0, 1)), (45, 1.6, (0.8, 0.8)), (90, 4.0, (4, 0))])
def test_linear_toy(degrees: float, expected: float, parts: tuple) -> None:
    torch.manual_seed(0)
    e = torch.tensor([math.cos(math.radians(degrees)), math.sin(math.radians(degrees))], dtype=torch.float64)
    images = torch.randn(4000, 2, dtype=torch.float64)
    images -= images.mean(0)
    factor = torch.linalg.cholesky(images.T @ images / len(images))
    images = images @ torch.linalg.inv(factor).T * torch.tensor([2.0, 1.0])  # sample covariance exactly diag(4, 1)
    code = images @ e
    decoder = nn.Linear(1, 2, dtype=torch.float64)
    optimizer = torch.optim.LBFGS(decoder.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = reconstruction_error(images, decoder(code[:, None]))
        loss.backward()
        return loss

    optimizer.step(closure)
    left = (images - decoder(code[:, None])).square().mean(0)
    assert float(left.detach().sum()) == pytest.approx(expected, rel=1e-6)
    assert left.detach().tolist() == pytest.approx(list(parts), abs=1e-5)


# -- T3: the objective ------------------------------------------------------------------------------------------------


SPEC = LayerSpec(name="layer", shape=(6, 4, 4), num_classes=3, image=(3, 16, 16))


def batch_of(n: int = 8, *, to_logits=None, index: Tensor | None = None) -> Batch:
    generator = torch.Generator().manual_seed(1)
    return Batch(
        torch.randn(n, 6, 4, 4, generator=generator),
        torch.arange(n) if index is None else index,
        logits=torch.randn(n, 3, generator=generator),
        labels=torch.tensor([0, 1, 2, 0, 1, 2, -1, 1])[:n],
        image=torch.rand(n, 3, 16, 16, generator=generator),
        to_logits=to_logits,
    )


def refuse(_: Tensor) -> Tensor:
    raise AssertionError("the classifier must not run at alpha = 0")


def mean_colour(images: Tensor) -> Tensor:
    return 3 * images.mean(dim=(2, 3))


def test_alpha_zero_is_plain_reconstruction() -> None:
    explainer = ClaDec(ClaDecConfig(reference="none"), SPEC)
    batch = batch_of(to_logits=refuse)
    sum(explainer.losses(batch).values()).backward()
    found = explainer.decoder.last.weight.grad.clone()
    explainer.zero_grad()
    (reconstruction_error(batch.image, explainer(batch.activation)) / explainer.num_values).backward()
    torch.testing.assert_close(found, explainer.decoder.last.weight.grad)


def test_alpha_one_has_no_reconstruction_in_it() -> None:
    explainer = ClaDec(ClaDecConfig(reference="none", alpha=1.0), SPEC)
    terms = explainer.losses(batch_of(to_logits=mean_colour))
    assert set(terms) == {"class"}


@pytest.mark.parametrize("alpha", [0.25, 0.9])
def test_the_weights_are_those_of_the_sum_form(alpha: float) -> None:
    explainer = ClaDec(ClaDecConfig(reference="none", alpha=alpha), SPEC).eval()
    batch = batch_of(to_logits=mean_colour)
    total = float(sum(explainer.losses(batch).values()))
    decoded = explainer(batch.activation)
    target = torch.where(batch.labels >= 0, batch.labels, batch.logits.argmax(1))
    wrong = nn.functional.cross_entropy(mean_colour(decoded), target)
    whole = float((1 - alpha) * reconstruction_error(batch.image, decoded) + alpha * wrong)
    assert total * (alpha + 768 * (1 - alpha)) == pytest.approx(whole, rel=1e-5)


def test_targets_of_the_class_term() -> None:
    logits, wanted = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 3.0], [0.0, 3.0]])
    labels = torch.tensor([0, -1])
    first, second = math.log(1 + math.exp(-2)), math.log(1 + math.exp(-1))
    assert float(class_error(logits, labels, None, "label")) == pytest.approx(first)
    assert float(class_error(logits, labels, wanted, "auto")) == pytest.approx((first + second) / 2)
    assert float(class_error(logits, labels, wanted, "prediction")) == pytest.approx((first + 2 + second) / 2)
    assert float(class_error(wanted, None, wanted, "kl")) == pytest.approx(0, abs=1e-7)
    for kind in ("auto", "prediction", "kl"):
        with pytest.raises(UserError, match="capture with logits"):
            class_error(logits, labels, None, kind)


def test_the_error_is_judged_when_the_steps_without_alpha_are_over() -> None:
    """100 steps are the warm-up of a long fit, which has learned nothing yet."""
    explainer = ClaDec(ClaDecConfig(reference="none"), SPEC)
    batch = batch_of()
    explainer.mean_image.copy_(batch.image.mean(0))
    explainer._held = (batch.activation, batch.image, batch)
    explainer._planned.copy_(torch.tensor([5000, 0, 0]))
    found = explainer._evaluate(100, 0.0)
    assert found["heldout_R"] > float(reconstruction_error(batch.image, explainer.mean_image[None]))
    with pytest.raises(UserError, match="learned nothing that holds for other images"):
        explainer._evaluate(5000, 0.0)
    explainer._planned.copy_(torch.tensor([5000, 500, 0]))
    explainer._evaluate(5500, 0.5)  # with alpha R may rise


# -- units -------------------------------------------------------------------------------------------------------------


def test_all_units_are_the_layer_bit_for_bit() -> None:
    explainer = ClaDec(ClaDecConfig(channels="100%"), SPEC)
    activation = torch.randn(2, 6, 4, 4)
    assert torch.equal(explainer.encode(activation), activation)


@pytest.mark.parametrize("rule", ["random", "first"])
def test_smaller_shares_are_nested(rule: str) -> None:
    sets = [set(choose_units(ClaDecConfig(channels=c, channel_rule=rule), 64).tolist()) for c in ("10%", "25%", "90%")]
    assert [len(s) for s in sets] == [6, 16, 58]
    assert sets[0] < sets[1] < sets[2]
    assert (sets[0] == set(range(6))) == (rule == "first")


def test_named_units_and_a_count() -> None:
    assert choose_units(ClaDecConfig(channels="5,0-2"), 6).tolist() == [0, 1, 2, 5]
    relevance = torch.tensor([0.1, 5.0, 2.0, 0.0])
    config = ClaDecConfig(num_concepts=2, channel_rule="relevance")
    assert choose_units(config, 4, relevance).tolist() == [1, 2]
    explainer = ClaDec(ClaDecConfig(channels="5,0-2"), SPEC)
    activation = torch.randn(2, 6, 4, 4)
    assert torch.equal(explainer.encode(activation), activation[:, [0, 1, 2, 5]])
    assert explainer.name_concepts()[-1] == "unit 5"
    assert explainer(activation).shape == (2, 3, 16, 16)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alpha": -0.1}, "alpha must lie"),
        ({"alpha": math.nan}, "alpha must lie"),
        ({"steps": -1}, "steps must not be negative"),
        ({"channels": "3", "num_concepts": 2}, "either num_concepts or channels"),
        ({"size": 4}, "at least 8 pixels"),
        ({"norm": True}, "published decoder"),
    ],
)
def test_bad_options(fields: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ClaDecConfig(**fields)


@pytest.mark.parametrize("channels", ["some", "0%", "130%", "7", "2-", "", "-1"])
def test_bad_channels(channels: str) -> None:
    with pytest.raises(UserError, match="channels"):
        ClaDec(ClaDecConfig(channels=channels), SPEC)


def test_bad_calls() -> None:
    explainer = ClaDec(ClaDecConfig(reference="none"), SPEC)
    with pytest.raises(UserError, match="no reference"):
        explainer.reference(torch.rand(1, 3, 16, 16))
    with pytest.raises(UserError, match="expects activation of 6 features"):
        explainer.encode(torch.randn(1, 5, 4, 4))
    with pytest.raises(UserError, match=r"grid \(4, 4\)"):
        explainer.decode(torch.randn(1, 6, 5, 5))
    with pytest.raises(UserError, match="num_concepts = 7"):
        ClaDec(ClaDecConfig(num_concepts=7), SPEC)
    with pytest.raises(UserError, match="network's input"):
        ClaDec(ClaDecConfig(), LayerSpec(name="layer", shape=(6,)))
    with pytest.raises(UserError, match="together with their activations"):
        explainer.losses(Batch(torch.randn(2, 6, 4, 4), torch.arange(2)))
    with pytest.raises(UserError, match="no to_logits"):
        ClaDec(ClaDecConfig(reference="none", alpha=0.5), SPEC).losses(batch_of())


@pytest.mark.parametrize(
    "model", ["torchvision:mobilenet_v2", "torchvision:squeezenet1_0", "experiments/resnet20_cifar10.py:resnet20"]
)
def test_every_layer_of_the_shared_networks_decodes(model: str) -> None:
    from netgloss.classifiers import list_layers, load_classifier

    if model.startswith("experiments"):
        model = str(Path(__file__).parent.parent / model)
    classifier = load_classifier(model, random_weights=True)
    shapes = {layer.shape for layer in list_layers(classifier) if layer.readable}
    assert len(shapes) > 3
    for shape in sorted(shapes):
        spec = LayerSpec("layer", shape, image=classifier.input_shape)
        explainer = ClaDec(ClaDecConfig(), spec).eval()
        with torch.no_grad():
            made = explainer(torch.randn(1, *shape))
            assert made.shape == (1, *explainer.image_shape)
            assert explainer.reference(made).shape == made.shape


@pytest.mark.parametrize(("size", "expected"), [(0, 64), (112, 112), (224, 224), (28, 28)])
@pytest.mark.parametrize("shape", [(10,), (24, 14, 14)])
def test_sizes_of_the_images(size: int, expected: int, shape: tuple) -> None:
    explainer = ClaDec(ClaDecConfig(size=size), LayerSpec("layer", shape, image=(3, 224, 224))).eval()
    assert explainer(torch.randn(1, *shape)).shape == (1, 3, expected, expected)
    assert ClaDec.image_size(ClaDecConfig(), (1, 28, 28)) == (28, 28)
    assert ClaDec.image_size(ClaDecConfig(size=64), (3, 224, 112)) == (64, 32)

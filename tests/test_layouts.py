"""Layouts: tokens, channels-last and channels-first layers are read as maps, and written back without a change."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import netgloss
from netgloss.classifiers import (
    Classifier,
    Preprocessing,
    Tail,
    Taps,
    list_layers,
    load_classifier,
    load_from_spec,
    replaced,
)
from netgloss.classifiers.layouts import Layout, find_layout, layout_of
from netgloss.errors import UserError

SPEC = {"size": [24, 24], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}


class Patches(nn.Module):
    """Patches of 4 x 4 pixels as tokens, with tokens before them; ``mixed`` lets all of them see each other."""

    def __init__(self, prefix: int = 1, *, mixed: bool = True, features: int = 8) -> None:
        super().__init__()
        self.preprocessing_spec = SPEC
        self.embed = nn.Conv2d(3, features, 4, 4)
        self.prefix = nn.Parameter(torch.randn(1, prefix, features)) if prefix else None
        self.first = nn.Linear(features, features)
        self.attention = nn.MultiheadAttention(features, 2, batch_first=True) if mixed else None
        self.last = nn.LayerNorm(features)
        self.head = nn.Linear(features, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        if self.prefix is not None:
            x = torch.cat([self.prefix.expand(len(x), -1, -1), x], 1)
        x = self.first(x)
        if self.attention is not None:
            x = x + self.attention(x, x, x)[0]
        x = self.last(x).relu()
        return self.head(x[:, 0] if self.prefix is not None else x.mean(1))


class ChannelsLast(nn.Module):
    """A channels-last trunk; ``mixed`` lets all positions see each other."""

    def __init__(self, *, mixed: bool = False, features: int = 7) -> None:
        super().__init__()
        self.preprocessing_spec = SPEC
        self.embed = nn.Conv2d(3, features, 4, 4)
        self.block = nn.Linear(features, features)
        self.mixed = mixed
        self.head = nn.Linear(features, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).permute(0, 2, 3, 1)
        if self.mixed:
            x = x + x.mean((1, 2), keepdim=True)
        return self.head(self.block(x).relu().mean((1, 2)))


def classifier_of(net: nn.Module, seed: int = 0) -> Classifier:
    torch.manual_seed(seed)
    return load_classifier(net)


def check_identity(classifier: Classifier, layer: str) -> Tensor:
    """The activation, after checking that reading and writing it back changes no logit, in replacement and tail."""
    classifier.check_layer(layer)
    x = torch.randn(3, *classifier.input_shape, generator=torch.Generator().manual_seed(1))
    tail = Tail(classifier, layer, example=x[:2])
    with torch.no_grad():
        logits = classifier(x)
        with Taps(classifier, layer, stop=False) as taps:
            activation = taps(x)[layer]
            assert torch.equal(taps.logits, logits)
        with replaced(classifier, layer, lambda values: values.clone()) as net:
            assert torch.equal(net(x), logits)
        assert torch.allclose(tail(activation, images=x), logits, atol=1e-5)
        changed = tail(torch.zeros_like(activation), images=x)
    assert changed.shape == logits.shape
    return activation


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("layer", ["first", "last"])
def test_tokens_become_maps(prefix: int, layer: str) -> None:
    torch.manual_seed(0)
    classifier = classifier_of(Patches(prefix))
    activation = check_identity(classifier, layer)
    assert activation.shape == (3, 8, 6, 6)
    assert layout_of(classifier.net.get_submodule(layer)) == Layout("tokens", (6, 6), prefix)


def test_a_patch_ends_where_it_was_cut_from_the_image() -> None:
    classifier = classifier_of(Patches(1, mixed=False))
    classifier.check_layer("first")
    x = torch.zeros(2, 3, 24, 24)
    x[1, :, 4:8, 16:20] = 1.0
    with torch.no_grad(), Taps(classifier, "first") as taps:
        a, b = taps(x)["first"]
    assert (a != b).any(0).nonzero().tolist() == [[1, 4]]


@pytest.mark.parametrize("mixed", [False, True])
def test_channels_last_maps_are_turned(mixed: bool) -> None:
    classifier = classifier_of(ChannelsLast(mixed=mixed))
    assert check_identity(classifier, "block").shape == (3, 7, 6, 6)
    assert check_identity(classifier, "embed").shape == (3, 7, 6, 6)
    assert [layout_of(classifier.net.get_submodule(n)).kind for n in ("embed", "block")] == ["nchw", "nhwc"]


def test_what_cannot_be_seen_names_the_flag() -> None:
    cube = classifier_of(ChannelsLast(mixed=True, features=6))  # (B, 6, 6, 6), every value NaN
    with pytest.raises(UserError, match="--layout nchw or --layout nhwc"):
        cube.check_layer("block")
    assert check_identity(cube.with_layout("nhwc"), "block").shape == (3, 6, 6, 6)
    odd = classifier_of(Patches(3))
    with pytest.raises(UserError, match="--prefix-tokens N"):
        odd.check_layer("last")
    assert check_identity(odd.with_layout(prefix_tokens=3), "last").shape == (3, 8, 6, 6)
    with pytest.raises(UserError, match="unknown layout"):
        odd.with_layout("rows")


def test_windows_in_the_batch_axis_are_refused() -> None:
    class Windows(ChannelsLast):
        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x).unfold(2, 3, 3).unfold(3, 3, 3).permute(0, 2, 3, 4, 5, 1)
            x = self.block(x.reshape(-1, 9, 7))
            return self.head(x.reshape(-1, 36, 7).mean(1))

    with pytest.raises(UserError, match="its first axis is not the images"):
        classifier_of(Windows()).check_layer("block")


def test_features_before_tokens_are_refused() -> None:
    class Turned(Patches):
        def __init__(self) -> None:
            super().__init__(0, mixed=False)
            self.turned = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.turned(self.embed(x).flatten(2)).mean(2))

    with pytest.raises(UserError, match="features before tokens"):
        classifier_of(Turned()).check_layer("turned")


@settings(max_examples=30, deadline=None)
@given(
    order=st.permutations([0, 1, 2]),
    features=st.integers(2, 9),
    height=st.integers(2, 6),
    width=st.integers(2, 6),
    mixed=st.booleans(),
)
def test_no_layout_is_taken_wrong(order: list[int], features: int, height: int, width: int, mixed: bool) -> None:
    """Axes in any order: what is accepted has the features first, and a position where it was; the rest is refused."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.preprocessing_spec = {**SPEC, "size": [4 * height, 4 * width]}
            self.embed = nn.Conv2d(3, features, 4, 4)
            self.turned = nn.Identity()
            self.head = nn.Linear(features, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            if mixed:
                x = x + x.mean((2, 3), keepdim=True)
            x = self.turned(x.permute(0, *(1 + axis for axis in order)))
            return self.head(x.permute(0, *(1 + order.index(axis) for axis in range(3))).mean((2, 3)))

    torch.manual_seed(0)
    classifier = load_classifier(Net())
    plain = {(0, 1, 2): "nchw", (1, 2, 0): "nhwc"}.get(tuple(order))
    with contextlib.suppress(UserError):
        classifier.check_layer("turned")
    if "turned" not in classifier._checked:
        return  # refused
    kind = layout_of(classifier.net.turned).kind
    if mixed and plain is None:
        return  # neither layout is right, and nothing in the output shows it
    if plain is not None and not (mixed and len({features, height, width}) < 3):
        assert kind == plain
    if plain == kind:
        x = torch.randn(2, *classifier.input_shape)
        with torch.no_grad(), Taps(classifier, ["embed", "turned"]) as taps:
            both = taps(x)
        assert mixed or torch.equal(both["embed"], both["turned"])


def test_layers_and_capture_decide_alike(tmp_path: Path) -> None:
    source = netgloss.open_images("critters:4")
    for net in (Patches(2), ChannelsLast()):
        classifier = classifier_of(net)
        for layer in list_layers(classifier):
            if not layer.readable:
                with pytest.raises(UserError):
                    netgloss.capture(classifier, source, [layer.name], tmp_path / f"{type(net).__name__}-{layer.name}")
                continue
            store = netgloss.capture(classifier, source, [layer.name], tmp_path / f"{type(net).__name__}-{layer.name}")
            assert store.shapes[layer.name] == layer.shape


@pytest.mark.parametrize(("method", "fields"), [("pca", {}), ("topk-sae", {"top_k": 2, "steps": 20})])
def test_a_network_of_tokens_is_explained(tmp_path: Path, method: str, fields: dict[str, Any]) -> None:
    run = netgloss.explain(
        method, classifier_of(Patches(1)), "first", "critters:30", out=tmp_path / "run", num_concepts=4, seeds=2,
        device="cpu", evaluation=netgloss.EvaluationOptions(untrained_images=8), **fields,
    )  # fmt: skip
    scores = {score.metric: score for score in run.scores}
    assert scores["r2"].value is not None
    assert 0 < scores["agreement"].value <= 1
    assert "untrained_network" in scores["r2"].baselines
    assert any("prefix tokens" in warning for warning in run.manifest["warnings"])
    assert not any("do not depend" in warning for warning in run.manifest["warnings"])
    (shown,) = netgloss.show(run, "critters:1,seed=3")
    assert shown.drivers[0].map.shape == (6, 6)


def test_patches_that_never_reach_the_head_are_reported(tmp_path: Path) -> None:
    run = netgloss.explain(
        "pca", classifier_of(Patches(1)), "last", "critters:20", out=tmp_path / "run", num_concepts=3, seeds=1,
        device="cpu", evaluation=netgloss.EvaluationOptions(untrained_images=0),
    )  # fmt: skip
    assert any("do not depend on the patch tokens of 'last'" in warning for warning in run.manifest["warnings"])


# -- the class token --------------------------------------------------------------------------------------------------


def small_vit(pool: str = "token", registers: int = 0) -> Classifier:
    torch.manual_seed(0)
    net = timm.create_model(
        "vit_tiny_patch16_224", img_size=48, depth=2, embed_dim=24, num_heads=2, num_classes=4, global_pool=pool,
        reg_tokens=registers,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return load_classifier(net, preprocessing={**SPEC, "size": [48, 48]})


@pytest.mark.parametrize(("pool", "registers"), [("token", 0), ("token", 4), ("avg", 0)])
@pytest.mark.parametrize("layer", ["blocks.0", "blocks.1", "norm", "blocks.0.mlp.act"])
def test_the_class_token_is_a_vector(pool: str, registers: int, layer: str) -> None:
    classifier = small_vit(pool, registers)
    classifier.check_layer(layer)
    features = 96 if "act" in layer else 24
    assert check_identity(classifier, layer).shape == (3, features, 3, 3)
    activation = check_identity(classifier.with_layout(pool="cls"), layer)
    x = torch.randn(3, *classifier.input_shape, generator=torch.Generator().manual_seed(1))
    seen: list[Tensor] = []
    handle = classifier.net.get_submodule(layer).register_forward_hook(lambda *given: seen.append(given[2]))
    with torch.no_grad():
        logits = classifier(x)
        handle.remove()
        assert torch.equal(activation, seen[0][:, 0])
        with replaced(classifier, layer, activation + 1) as net:
            moved = net(x)
    last = layer in ("blocks.1", "norm")
    assert torch.equal(moved, logits) == (last and pool == "avg")  # the patches alone reach the head
    assert Tail(classifier, layer, example=x).ignores_layer == (last and pool == "avg")
    assert next(info for info in list_layers(classifier) if info.name == layer).shape == (features,)


def test_the_class_token_must_be_there() -> None:
    for net, layer in ((Patches(0), "first"), (ChannelsLast(), "block")):
        with pytest.raises(UserError, match="without a class token: leave --pool cls"):
            classifier_of(net).with_layout(pool="cls").check_layer(layer)
    with pytest.raises(UserError, match="unknown pool 'max'; choose from mean, cls"):
        classifier_of(Patches(1)).with_layout(pool="max")


def test_a_class_token_is_explained_and_its_store_is_another(tmp_path: Path) -> None:
    vit = small_vit().with_layout(pool="cls")
    given: dict[str, Any] = {
        "num_concepts": 3, "seeds": 1, "device": "cpu", "store": tmp_path / "store",
        "evaluation": netgloss.EvaluationOptions(untrained_images=8),
    }  # fmt: skip
    run = netgloss.explain("pca", vit, "blocks.1", "critters:20", out=tmp_path / "run", **given)
    assert netgloss.Store.open(tmp_path / "store").shapes == {"blocks.1": (24,)}
    scores = {score.metric: score for score in run.scores}
    assert scores["agreement"].value > 0.5
    assert scores["r2"].baselines["untrained_network"] is not None
    (shown,) = netgloss.show(run, "critters:1,seed=3")
    assert any(driver.contribution != 0 for driver in shown.drivers)
    again = load_from_spec(vit.spec(), net=vit.net)
    assert again.pool == again.untrained(0).pool == "cls"
    with pytest.raises(UserError, match="pool: cls in the store, mean asked for"):
        netgloss.explain("pca", small_vit(), "blocks.1", "critters:20", out=tmp_path / "other", **given)


# -- attribute names --------------------------------------------------------------------------------------------------


def test_a_module_with_an_attribute_called_net_is_not_unwrapped() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.preprocessing_spec = SPEC
            self.net = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.net(x)

    net = Outer()
    x = torch.randn(2, 3, 24, 24)
    with torch.no_grad(), Taps(net, "net.1", stop=False) as taps:
        inside = taps(x)["net.1"]
        assert torch.equal(taps.logits, net(x))
    tail = Tail(net, "net.1", example=x)
    with torch.no_grad():
        assert torch.allclose(tail(inside), net(x), atol=1e-5)
        with replaced(net, "net.1", torch.zeros_like) as whole:
            assert torch.equal(whole(x), 2 * net.net[3].bias.expand(2, -1))
    with pytest.raises(UserError, match=r"no layer '0'; did you mean net\.0"):
        Taps(net, "0")
    assert isinstance(net.preprocessing_spec, dict)
    assert Preprocessing.from_dict({**classifier_of(net).preprocessing.to_dict()}).size == (24, 24)
    assert np.isfinite(classifier_of(net).weights_hash.__hash__())


def test_concatenated_features_of_different_depth_are_channels() -> None:
    """As in DenseNet: the deep channels have lost every position to NaN, the shallow ones a quarter of them."""
    output = torch.zeros(2, 6, 4, 4)
    output[1, 3:] = torch.nan
    output[1, :3, :2, :2] = torch.nan
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU())
    assert find_layout(output, "1", net, square=True).kind == "nchw"
    assert find_layout(output.movedim(1, -1), "1", net, square=True).kind == "nhwc"


def test_a_map_that_is_not_square_is_refused_for_square_images() -> None:
    """Windows and unfolded patches: (B, C, 4, N) in MobileViTv2, (B, blocks, N, C) in NesT."""
    net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU())
    for shape in ((6, 4, 16), (16, 9, 6)):
        for layer in ("0", "1"):
            with pytest.raises(UserError, match="no square grid of features"):
                find_layout(torch.zeros(2, *shape), layer, net, square=True)
    assert find_layout(torch.zeros(2, 6, 4, 16), "0", net, square=False).kind == "nchw"
    assert find_layout(torch.zeros(2, 6, 4, 16), "1", net, square=True, layout="nchw").kind == "nchw"


def test_a_layer_of_two_forms_is_refused() -> None:
    class Twice(Patches):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = super().forward(x)
            self.last(torch.zeros(len(x), 8))
            return out

    classifier = load_classifier(Twice())
    assert not next(layer.readable for layer in list_layers(classifier) if layer.name == "last")
    with pytest.raises(UserError, match="outputs of different forms"):
        classifier.check_layer("last")

"""list_layers: strides and receptive fields against published values, arithmetic and the support of gradients."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import netgloss
from netgloss.classifiers import LayerInfo, list_layers, outline_layers
from netgloss.classifiers.layouts import find_layout
from netgloss.cli import main
from netgloss.errors import UserError


def layers_of(net: nn.Module, side: int, channels: int = 3) -> dict[str, LayerInfo]:
    holder: Any = SimpleNamespace(
        net=net.eval(), input_shape=(channels, side, side), device=torch.device("cpu"),
        find_layout=lambda name, output: find_layout(output, name, net, square=True),
    )  # fmt: skip
    return {info.name: info for info in list_layers(holder, receptive_field=True)}


KNOWN = {  # Araujo, Norris and Sim 2019 (Distill), table of models; torchvision's own variants by the same formula
    # (435 pixels for layer4 of resnet18, 491 for mobilenet_v2: beyond the image, so that a cell sees all of it)
    "resnet18": {"conv1": (2, 7), "layer1": (4, 43), "layer2": (8, 99), "layer3": (16, 211), "layer4": (32, None)},
    "alexnet": {"features.0": (4, 11), "features.2": (8, 19), "features.5": (16, 67), "features.10": (16, 163)},
    "mobilenet_v2": {"features.18": (32, None)},
}


@pytest.mark.parametrize("name", KNOWN)
def test_published_receptive_fields(name: str) -> None:
    from torchvision.models import get_model

    found = layers_of(get_model(name, num_classes=4), 224)
    for layer, (stride, receptive_field) in KNOWN[name].items():
        assert (found[layer].stride, found[layer].receptive_field) == (stride, receptive_field), layer
    last = list(found.values())[-1]
    assert (last.shape, last.stride, last.receptive_field) == ((4,), None, None)


def test_describes_every_layer() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)
            self.relu = nn.ReLU(inplace=True)
            self.pair = Pair()
            self.unused = nn.Linear(2, 2)
            self.head = nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.relu(self.conv(self.relu(x)))
            return self.head(self.pair(x)[0].mean((2, 3)))

    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    net = Net().train()
    holder: Any = SimpleNamespace(
        net=net, input_shape=(3, 8, 8), device=torch.device("cpu"),
        find_layout=lambda name, output: find_layout(output, name, net, square=True),
    )  # fmt: skip
    found = {info.name: info for info in list_layers(holder, receptive_field=True)}
    assert net.training
    assert not any(m._forward_hooks for m in net.modules())
    assert found["conv"] == LayerInfo("conv", "Conv2d", (4, 4, 4), 4 * 27 + 4, 2, 3, 1, True, "nchw")
    assert found["relu"] == LayerInfo("relu", "ReLU", (4, 4, 4), 0, 2, 3, 2, True, "nchw", "last map")
    assert found["pair"] == LayerInfo("pair", "Pair", (), 0, None, None, 1, False)
    assert found["unused"] == LayerInfo("unused", "Linear", (), 6, None, None, 0, False)
    assert found["head"] == LayerInfo("head", "Linear", (5,), 25, None, None, 1, True, "vector")


class Zoo(nn.Module):
    """Every kind of step; control flow depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.dilated = nn.Conv2d(1, 2, 3, padding=2, dilation=2)  # sees 5
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)  # 5 + 2 = 7, stride 2
        self.wide = nn.Conv2d(2, 2, 5, padding=2)  # 7 + 4*2 = 15
        self.narrow = nn.Conv2d(2, 2, 1)
        self.joined = nn.Identity()  # 15, the wider branch
        self.valid = nn.Conv2d(4, 2, 3)  # 15 + 2*2 = 19
        self.up = nn.Upsample(scale_factor=2, mode="nearest")  # stride 1
        self.smooth = nn.Conv2d(2, 2, 3, padding=1)  # 19 + 2*1 = 21
        self.thin = nn.Identity()  # every second pixel
        self.padded = nn.AvgPool2d(2)  # 21 + 1*2 = 23, stride 4
        self.transposed = nn.ConvTranspose2d(2, 2, 4, stride=2, padding=1)  # 2 inputs of step 4: 23 + 4 = 27, stride 2
        self.gate = nn.AdaptiveAvgPool2d(1)
        self.gated = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.dilated(x)))
        branches = [self.wide(x), self.narrow(x)]
        if float(x.detach().sum()) > -1e9:
            branches = branches[::-1]
        x = self.valid(self.joined(torch.cat(branches, dim=1)))
        x = self.thin(self.smooth(self.up(x))[:, :, ::2, ::2])
        x = self.transposed(self.padded(F.pad(x, (2, 2, 2, 2))))
        return self.gated(x * torch.sigmoid(self.gate(x))).flatten(1)


def positive(net: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.uniform_(0.1, 0.2)
    return net


def support(net: nn.Module, layer: str, side: int, channels: int = 1) -> int:
    """Side of the square of input pixels that the middle cell of a layer reacts to (positive weights do not cancel)."""
    from netgloss.classifiers import Taps

    x = (torch.rand(1, channels, side, side, dtype=torch.float64) + 0.5).requires_grad_()
    with Taps(net.double(), layer) as taps:
        out = taps(x)[layer]
    (gradient,) = torch.autograd.grad(out[0, :, out.shape[2] // 2, out.shape[3] // 2].sum(), x)
    rows = gradient[0].abs().sum((0, 2)).nonzero().flatten()
    return int(rows.max() - rows.min()) + 1


def test_every_kind_of_step_by_arithmetic_and_by_gradients() -> None:
    net = positive(Zoo())
    found = layers_of(net, 64, channels=1)
    expected = {
        "dilated": (1, 5),
        "pool": (2, 7),
        "wide": (2, 15),
        "narrow": (2, 7),
        "joined": (2, 15),
        "valid": (2, 19),
        "up": (1, 19),
        "smooth": (1, 21),
        "thin": (2, 21),
        "padded": (4, 23),
        "transposed": (2, 27),
        "gate": (None, None),
        "gated": (2, None),
    }
    assert {name: (info.stride, info.receptive_field) for name, info in found.items()} == expected
    linear = Linearised().apply_to(net)
    for name, (_, receptive_field) in expected.items():
        if receptive_field is not None:
            seen = support(linear, name, 64)
            assert receptive_field - 2 <= seen <= receptive_field, (name, seen, receptive_field)
    for name in ("dilated", "pool", "wide", "valid"):
        assert support(linear, name, 64) == expected[name][1]


class Linearised:
    """Max pooling passes the gradient to one pixel only; the average of the same window passes it to all."""

    def apply_to(self, net: Zoo) -> Zoo:
        net.pool = nn.AvgPool2d(3, stride=2, padding=1)  # type: ignore[assignment]
        return net


def test_resnet_by_gradients() -> None:
    from torchvision.models.resnet import BasicBlock, ResNet

    net = positive(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=2)).eval()
    net.maxpool = nn.AvgPool2d(3, stride=2, padding=1)
    found = layers_of(net, 224)
    for layer in ("conv1", "layer1", "layer2", "layer3"):
        assert support(net, layer, 224, channels=3) == found[layer].receptive_field, layer
        net.float()


def test_what_mixes_positions_sees_the_whole_image() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch = nn.Conv2d(3, 8, 4, stride=4)
            self.last = nn.Identity()
            self.norm = nn.LayerNorm(8)
            self.point = nn.Linear(8, 8)
            self.back = nn.Identity()
            self.group = nn.GroupNorm(2, 8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.tokens = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            x = self.last(self.patch(x).permute(0, 2, 3, 1))
            x = self.back(self.point(self.norm(x)).permute(0, 3, 1, 2))
            y = self.group(x)
            tokens = y.flatten(2).transpose(1, 2)
            tokens = self.tokens(tokens + self.attention(tokens, tokens, tokens)[0])
            return tokens.mean(1)

    found = layers_of(Tokens(), 32)
    assert (found["patch"].stride, found["patch"].receptive_field, found["patch"].readable) == (4, 4, True)
    assert (found["last"].shape, found["last"].receptive_field, found["last"].layout) == ((8, 8, 8), 4, "nhwc")
    assert (found["back"].shape, found["back"].receptive_field, found["back"].readable) == ((8, 8, 8), 4, True)
    assert (found["group"].stride, found["group"].receptive_field) == (4, None)
    assert (found["tokens"].shape, found["tokens"].receptive_field, found["tokens"].layout) == (
        (8, 8, 8),
        None,
        "tokens",
    )


@pytest.mark.parametrize("head", ["pool", "flatten", "mean", "softmax", "einsum"])
def test_heads(head: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.out = nn.Identity()
            self.fc = nn.Linear(4 * 36, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            if head == "pool":
                return self.out(F.adaptive_avg_pool2d(x, 1).flatten(1))
            if head == "flatten":
                return self.out(self.fc(x.flatten(1)))
            if head == "mean":
                return self.out(x.mean((2, 3)))
            if head == "softmax":
                return self.out(x * x.flatten(2).softmax(-1).view_as(x)).flatten(1)
            return self.out(torch.einsum("bchw,bdhw->bcd", x, x).flatten(1))

    found = layers_of(Net(), 8)
    assert found["conv"].receptive_field == 3
    assert found["out"].receptive_field is None


def test_timm_networks_with_static_padding_and_channels_last_blocks() -> None:
    import timm

    convnext = layers_of(timm.create_model("convnext_atto", num_classes=3), 96)
    assert (convnext["stem"].stride, convnext["stem"].receptive_field) == (4, 4)
    assert (convnext["stages.0"].stride, convnext["stages.0"].receptive_field) == (4, 4 + 2 * 6 * 4)
    same = layers_of(timm.create_model("tf_efficientnet_lite0", num_classes=3), 96)
    plain = layers_of(timm.create_model("efficientnet_lite0", num_classes=3), 96)
    for layer in ("conv_stem", "blocks.2", "bn2"):
        assert (same[layer].stride, same[layer].receptive_field) == (plain[layer].stride, plain[layer].receptive_field)


# -- outlines and where to start --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "timm:resnet18",
        "timm:test_vit",
        "timm:test_vit3",
        "timm:test_efficientnet",
        "timm:levit_128s",
        "timm:mixer_s32_224",
        "torchvision:squeezenet1_1",
        "torchvision:shufflenet_v2_x0_5",
    ],
)
def test_a_network_without_weights_has_the_same_layers(name: str) -> None:
    _, found = outline_layers(name)
    assert found == list_layers(netgloss.load_classifier(name, random_weights=True))


def test_an_outline_of_another_head_size_and_input() -> None:
    classifier, found = outline_layers("timm:test_vit", num_classes=7, input_size=96)
    assert classifier.num_classes == 7
    assert found == list_layers(
        netgloss.load_classifier("timm:test_vit", num_classes=7, input_size=96, random_weights=True)
    )


def test_an_outline_checks_a_checkpoint(tmp_path: Path) -> None:
    net = netgloss.load_classifier("timm:test_vit", random_weights=True).net
    torch.save(net.state_dict(), tmp_path / "right.pth")
    assert outline_layers("timm:test_vit", checkpoint=tmp_path / "right.pth")[1]
    torch.save({"a": torch.zeros(2)}, tmp_path / "wrong.pth")
    with pytest.raises(UserError, match="does not fit the network"):
        outline_layers("timm:test_vit", checkpoint=tmp_path / "wrong.pth")


@pytest.mark.parametrize(
    ("name", "stages", "last"),
    [
        ("timm:resnet18", ["act1", "layer1", "layer2", "layer3"], "layer4"),
        ("torchvision:mobilenet_v2", [f"features.{i}" for i in (1, 3, 6, 13)], "features.18"),
        ("torchvision:vgg11", [f"features.{i}" for i in (1, 4, 9, 14)], "features.19"),
        ("timm:test_convnext", None, "norm_pre"),
        ("timm:test_vit", [], "blocks.4"),
        ("critters", None, "block5"),
    ],
)
def test_ends_of_stages_and_the_last_map_are_good_to_start_with(name: str, stages: list[str] | None, last: str) -> None:
    _, found = outline_layers(name)
    assert [layer.name for layer in found if layer.start == "last map"] == [last]
    if stages is not None:
        assert [layer.name for layer in found if layer.start == "end of a stage"] == stages
    assert all(layer.readable and len(layer.shape) == 3 for layer in found if layer.start)


def test_names_are_never_cut(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    main(["layers", "--model", "timm:test_efficientnet"])
    shown = capsys.readouterr().out
    _, layers = outline_layers("timm:test_efficientnet")
    assert {line.split("  ")[0] for line in shown.splitlines()} >= {layer.name for layer in layers}
    assert "* last map" in shown
    main(["layers", "--model", "timm:test_efficientnet", "--json"])
    assert {record["name"]: record["start"] for record in json.loads(capsys.readouterr().out)} == {
        layer.name: layer.start for layer in layers
    }

"""The tail: the same logits as the network's, without the trunk where the graph allows it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from netgloss.classifiers import Tail, Taps, replaced
from netgloss.classifiers.taps import find_layer
from netgloss.errors import UserError


def check(net: nn.Module, layer: str, mode: str, shape: tuple[int, ...]) -> Tail:
    """The tail's mode, and its logits for other images, another batch size and activations of no image."""
    net.eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    tail = Tail(net, layer, example=torch.randn(2, *shape, generator=generator))
    assert tail.mode == mode, f"{layer}: {tail.reason}"
    images = torch.randn(3, *shape, generator=generator)
    with torch.no_grad(), Taps(net, layer, stop=False) as taps:
        act = taps(images)[layer]
        expected, calls = taps.logits, taps.calls[layer]
    foreign = act * torch.rand(act.shape, generator=generator) + 0.1
    with torch.no_grad(), replaced(net, layer, foreign, call=calls - 1):
        expected_foreign = net(images)
    for given, logits in ((act, expected), (foreign, expected_foreign)):
        leaf = given.clone().requires_grad_()
        found = tail(leaf, images=images)
        torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-5 * float(logits.abs().max()) + 1e-7)
        (gradient,) = torch.autograd.grad(found.square().sum(), leaf)
        assert gradient.abs().sum() > 0
        assert torch.equal(leaf, given), "the tail must not change its input"
        if mode == "graph":
            torch.testing.assert_close(tail(leaf[:1]), found[:1], rtol=1e-4, atol=1e-6)
    return tail


class Mlp(nn.Module):
    """logits = W relu(2 x - 1), W = [[1, 2], [3, 4]]; the ReLU works in place."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(2, 2)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.hidden.weight.copy_(2 * torch.eye(2))
            self.hidden.bias.fill_(-1)
            self.head.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        self.requires_grad_(False)

    def forward(self, x: Tensor, scale: float = 1.0, extra: Tensor | None = None) -> Tensor:
        if extra is not None:
            x = x + extra
        return self.head(self.relu(self.hidden(x))) * scale


def test_mlp_by_arithmetic() -> None:
    tail = Tail(Mlp(), "hidden", example=torch.randn(4, 2))
    assert tail.mode == "graph"
    act = torch.tensor([[5.0, -3.0], [1.0, 1.0]], requires_grad=True)
    logits = tail(act)
    assert logits.tolist() == [[5, 15], [3, 7]]
    (gradient,) = torch.autograd.grad(logits[:, 1].sum(), act)
    assert gradient.tolist() == [[3, 0], [3, 4]]
    assert Tail(Mlp(), "relu", example=torch.randn(4, 2))(act).tolist() == [[-1, 3], [3, 7]]


def test_affine_is_told_from_not_affine() -> None:
    assert Tail(Mlp(), "relu", example=torch.randn(2, 2)).is_affine((2,))
    assert Tail(Mlp(), "head", example=torch.randn(2, 2)).is_affine((2,))
    assert not Tail(Mlp(), "hidden", example=torch.randn(2, 2)).is_affine((2,))

    def conv(*behind: nn.Module) -> Tail:
        net = nn.Sequential(nn.Conv2d(3, 4, 3), *behind, nn.Flatten(), nn.LazyLinear(5)).eval()
        net(torch.zeros(1, 3, 8, 8))
        return Tail(net, "0", example=torch.randn(2, 3, 8, 8))

    shape = (4, 6, 6)
    assert conv(nn.AdaptiveAvgPool2d(1), nn.Dropout(0.5)).is_affine(shape)
    assert conv(nn.BatchNorm2d(4), nn.AvgPool2d(2), nn.Conv2d(4, 3, 2)).is_affine(shape)
    assert not conv(nn.MaxPool2d(2)).is_affine(shape)
    assert not conv(nn.Hardtanh(-20.0, 20.0)).is_affine(shape), "a bend far out counts as well"
    assert not conv(nn.Softplus(beta=0.01)).is_affine(shape), "nor is nearly affine affine"


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.conv2(torch.relu_(self.conv1(x))))


def test_residual_block_is_cut_at_its_borders_only() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), Block(4), Block(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    for layer in ("0", "1", "2", "3", "5"):
        assert "leads through" in check(net, layer, "graph", (3, 9, 9)).reason
    tail = check(net, "2.conv1", "replaced", (3, 9, 9))
    assert "output of '1' goes around '2.conv1'" in tail.reason
    assert not tail.is_affine((4, 7, 7))
    with pytest.raises(UserError, match="need images= as well: the output of '1'"):
        tail(torch.zeros(1, 4, 7, 7))
    with pytest.raises(UserError, match=r"2 activations .* 1 images"):
        tail(torch.zeros(2, 4, 7, 7), images=torch.zeros(1, 3, 9, 9))


class Sized(nn.Module):
    """Takes the batch size where it likes."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.conv = nn.Conv2d(3, 4, 1)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        before = x.size(0)
        y = self.conv(x)
        if self.how == "before":
            return self.head(y.view(before, -1))
        if self.how == "shape":
            b, c, h, w = y.shape
            return self.head(y.reshape(b, c * h * w))
        if self.how == "size":
            return self.head(y.view(y.size()[0], -1))
        return self.head(y.view(2, -1)) if len(x) == 2 else self.head(y.flatten(1))


@pytest.mark.parametrize(
    ("how", "mode"), [("before", "graph"), ("shape", "graph"), ("size", "graph"), ("if", "replaced")]
)
def test_batch_size_stays_free(how: str, mode: str) -> None:
    torch.manual_seed(0)
    check(Sized(how), "conv", mode, (3, 2, 2))


class DataDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(3, 3)
        self.inner = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(x)
        if h.sum() > 0:
            h = self.inner[0](h)
        return self.head(h)


def test_data_dependent_control_flow_falls_back() -> None:
    torch.manual_seed(0)
    tail = check(DataDependent(), "hidden", "replaced", (3,))
    assert "cannot be traced" in tail.reason
    assert "\n" not in tail.reason


def test_control_flow_away_from_the_layer_does_not_matter() -> None:
    torch.manual_seed(0)

    class Gate(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    check(nn.Sequential(Gate(), nn.Linear(3, 4), Gate(), nn.Linear(4, 2)), "1", "graph", (3,))


def test_a_cut_whose_numbers_disagree_is_refused() -> None:
    class Remembers(nn.Module):
        """Its trace looks like a plain chain, but the head adds what a hidden channel kept of the images."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = Keep(), nn.Linear(3, 3), Recall()
            self.head.kept = self.first.kept = []

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.second(self.first(x)))

    class Keep(nn.Module):
        kept: list[Tensor]

        def forward(self, x: Tensor) -> Tensor:
            self.kept[:] = [x.mean()]
            return x

    class Recall(Keep):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.kept[0]

    tail = Tail(Remembers().eval(), "second", example=torch.randn(2, 3))
    assert tail.mode == "replaced"
    assert "does not give the network's logits" in tail.reason


def test_module_that_runs_twice_is_cut_behind_its_last_run() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu = nn.ReLU(inplace=True)
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.relu(self.a(self.relu(x))))

    torch.manual_seed(0)
    check(Twice(), "relu", "graph", (3,))


def test_mistakes() -> None:
    with pytest.raises(UserError, match="did you mean hidden"):
        Tail(Mlp(), "hiden", example=torch.zeros(1, 2))
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net.add_module("spare", nn.ModuleList([nn.Linear(2, 2)]))
    net.forward = lambda x: net[1](net[0](x))  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"never runs layer 'spare.0'"):
        Tail(net, "spare.0", example=torch.zeros(1, 2))


TORCHVISION = {
    "resnet18": {
        "graph": ["maxpool", "layer2.0", "layer3.0.relu", "layer4", "avgpool"],
        "replaced": ["layer4.1.conv2"],
    },
    "mobilenet_v2": {"graph": ["features.5", "features.18", "features.18.2"], "replaced": ["features.5.conv.0"]},
    "squeezenet1_0": {
        "graph": ["features.10", "features.12", "features.12.squeeze"],
        "replaced": ["features.12.expand3x3"],
    },
    "densenet121": {
        "graph": ["features.denseblock3", "features.norm5"],
        "replaced": ["features.denseblock4.denselayer16"],
    },
    "googlenet": {"graph": ["inception4a", "inception5b"], "replaced": ["inception5b.branch1"]},
}
TIMM = {
    "resnet10t": {"graph": ["layer2", "layer4.0.act2", "global_pool"], "replaced": ["layer4.0.conv1"]},
    "convnext_atto": {"graph": ["stages.2", "stages.3.blocks.1", "head.norm"], "replaced": ["stages.3.blocks.1.mlp"]},
    "efficientnet_lite0": {"graph": ["blocks.4", "conv_head", "bn2"], "replaced": ["blocks.4.1.bn1"]},
}


def calibrated(net: nn.Module) -> nn.Module:
    """Batch-norm statistics of noise, so that signals neither vanish nor explode in random networks."""
    net.train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            module.reset_running_stats()
            nn.init.ones_(module.weight)  # timm starts the last one of a block at 0
    with torch.no_grad():
        net(torch.randn(4, 3, 64, 64))
    return net.eval()


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_networks(name: str) -> None:
    from torchvision.models import get_model

    torch.manual_seed(0)
    options = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    net = calibrated(get_model(name, num_classes=7, **options))
    for mode, layers in TORCHVISION[name].items():
        for layer in layers:
            check(net, layer, mode, (3, 64, 64))


@pytest.mark.parametrize("name", TIMM)
def test_timm_networks(name: str) -> None:
    import timm

    torch.manual_seed(0)
    net = calibrated(timm.create_model(name, num_classes=7))
    for mode, layers in TIMM[name].items():
        for layer in layers:
            check(net, layer, mode, (3, 64, 64))


def test_pooled_resnet_is_affine_behind_its_last_block() -> None:
    from torchvision.models import get_model

    net = get_model("resnet18", num_classes=5).eval()
    assert Tail(net, "layer4", example=torch.randn(2, 3, 64, 64)).is_affine((512, 2, 2))
    assert not Tail(net, "layer3", example=torch.randn(2, 3, 64, 64)).is_affine((256, 4, 4))
    assert find_layer(net, "layer4") is net.layer4

"""Heads: dicts, tuples, objects and single logits become logits; probabilities are refused."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import netgloss
from netgloss.classifiers import Classifier, Tail, Taps, list_layers, load_classifier
from netgloss.data.arrays import ArraySource
from netgloss.errors import UserError

SPEC = {"size": [8, 8], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}


class Net(nn.Module):
    def __init__(self, classes: int = 3, form: str = "plain") -> None:
        super().__init__()
        self.preprocessing_spec = SPEC
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.relu = nn.ReLU()
        self.head = nn.Linear(6, classes)
        self.form = form

    def forward(self, x: Tensor) -> Any:
        features = self.relu(self.conv(x))
        z = self.head(features.mean((2, 3)))
        return {
            "plain": z,
            "logits": {"features": features.mean((2, 3)), "logits": z},
            "only": {"maps": features, "out": z},
            "tuple": (z, features),
            "object": SimpleNamespace(loss=None, logits=z),
        }[self.form]


def of(net: nn.Module, **options: Any) -> Classifier:
    return load_classifier(net, **options)


def images() -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("form", ["logits", "only", "tuple", "object"])
@pytest.mark.parametrize("classes", [3, 1])
def test_the_logits_are_found(form: str, classes: int) -> None:
    plain = Net(classes)
    other = copy.deepcopy(plain)
    other.form = form
    expected, found = of(plain), of(other)
    torch.testing.assert_close(found(images()), expected(images()), rtol=0, atol=0)
    assert [layer.name for layer in list_layers(found)] == [layer.name for layer in list_layers(expected)]
    assert isinstance(found.net, Net)
    assert other(images()) is not found(images())  # the given module stays as it is
    assert not isinstance(other(images()), Tensor)
    assert found.num_classes == max(2, classes)
    assert found.weights_hash == expected.weights_hash
    assert found.untrained(1)(images()).shape == (4, max(2, classes))


def test_one_logit_is_two_classes() -> None:
    net = Net(1)
    classifier = of(net, class_names=["cat"])
    assert classifier.class_names == ["not cat", "cat"]
    assert of(net, class_names=["dog", "cat"]).class_names == ["dog", "cat"]
    torch.testing.assert_close(classifier(images()).softmax(1)[:, 1], net(images()).sigmoid()[:, 0])
    with Taps(classifier, ["relu"], stop=False) as taps:
        activation = taps(images())["relu"]
    tail = Tail(classifier, "relu", example=images())
    assert tail.mode == "graph"
    torch.testing.assert_close(tail(activation), classifier(images()))


@pytest.mark.parametrize(
    "end",
    [nn.Softmax(1), nn.Sigmoid(), nn.Sequential(nn.Identity(), nn.Softmax(dim=-1))],
    ids=["softmax", "sigmoid", "deep"],
)
def test_probabilities_are_refused(end: nn.Module) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 3), end)
    with pytest.raises(UserError, match="gives probabilities"):
        load_classifier(net, preprocessing=SPEC)
    net.__class__.forward(net, images())


def test_a_softmax_without_a_module_is_seen() -> None:
    class Soft(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).softmax(1)

    with pytest.raises(UserError, match="gives probabilities"):
        of(Soft())


def test_a_binary_network_is_explained(tmp_path: Path) -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    y = np.arange(40) % 2
    x = rng.integers(0, 100, (40, 8, 8, 3)) + 100 * y[:, None, None, None]
    net = Net(1, "logits")
    with torch.no_grad():
        net.conv.weight.abs_()
        net.head.weight.abs_()
        net.head.bias.zero_()
    run = netgloss.explain(
        "nmf", of(net, class_names=["dark", "bright"]), "relu", ArraySource(x.astype(np.uint8), y, ["dark", "bright"]),
        out=tmp_path / "run", num_concepts=3, seeds=1, device="cpu",
        evaluation=netgloss.EvaluationOptions(untrained_images=0),
    )  # fmt: skip
    scores = {s.metric: s.value for s in run.scores}
    assert scores["agreement"] > 0.9
    assert scores["completeness"] == pytest.approx(1, abs=0.2)


def test_logits_that_show_a_wrong_preprocessing(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    y = np.arange(60) % 2
    x = rng.integers(0, 100, (60, 8, 8, 3)) + 100 * y[:, None, None, None]
    source = ArraySource(x.astype(np.uint8), y, ["dark", "bright"])

    def warnings_of(net: nn.Module, name: str) -> str:
        run = netgloss.explain(
            "pca", of(net, class_names=["dark", "bright"]), "relu", source, out=tmp_path / name, num_concepts=2,
            seeds=1, device="cpu", evaluation=netgloss.EvaluationOptions(untrained_images=0),
        )  # fmt: skip
        return " ".join(run.manifest["warnings"])

    net = Net(2)
    with torch.no_grad():
        net.conv.weight.abs_()
        net.head.weight.copy_(torch.stack([-torch.ones(6), torch.ones(6)]))
        brightness = net.relu(net.conv((source_pixels(x) - 0.5) / 0.5)).mean((2, 3)).sum(1)
        net.head.bias.copy_(torch.tensor([brightness.mean(), -brightness.mean()]))
    assert "check the preprocessing" not in warnings_of(net, "right")
    with torch.no_grad():
        net.head.bias.copy_(torch.tensor([1000.0, 0.0]))
    assert "predicted as one class" in warnings_of(net, "one")
    with torch.no_grad():
        net.head.weight.zero_()
    assert "nearly the same" in warnings_of(net, "same")


def source_pixels(x: np.ndarray) -> Tensor:
    return torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255


# -- runs whose network is elsewhere ----------------------------------------------------------------------------------


FACTORY = """
import torch
from torch import nn

class Net(nn.Sequential):
    preprocessing_spec = {"size": [8, 8], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}

def net():
    return Net(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2))
"""


def test_a_run_is_used_again_after_its_weights_moved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from netgloss.cli import main

    (tmp_path / "net.py").write_text(FACTORY)
    model = f"{tmp_path / 'net.py'}:net"
    torch.save(load_classifier(model, random_weights=True).net.state_dict(), tmp_path / "weights.pth")
    classifier = load_classifier(model, checkpoint=tmp_path / "weights.pth")
    run = netgloss.explain(
        "pca", classifier, "1", "critters:24", out=tmp_path / "run", num_concepts=2, seeds=1, device="cpu",
        evaluation=netgloss.EvaluationOptions(untrained_images=0),
    )  # fmt: skip
    (tmp_path / "weights.pth").rename(tmp_path / "moved.pth")
    netgloss.open_images("critters:1").image(0).save(tmp_path / "new.png")
    again = ["show", str(run.path), str(tmp_path / "new.png"), "--out", str(tmp_path / "shown"), "--trust-code"]
    with pytest.raises(SystemExit):
        main(again)
    assert "say where it is with --checkpoint FILE" in " ".join(capsys.readouterr().err.split())
    main([*again, "--checkpoint", str(tmp_path / "moved.pth")])
    assert list((tmp_path / "shown").glob("*.png"))
    loaded = netgloss.load(run.path, checkpoint=tmp_path / "moved.pth")
    assert loaded.network is not None
    assert loaded.network.weights_hash == classifier.weights_hash
    torch.save(load_classifier(model, random_weights=True, seed=5).net.state_dict(), tmp_path / "other.pth")
    with pytest.raises(UserError, match="are not those described"):
        netgloss.load(run.path, checkpoint=tmp_path / "other.pth")


def test_a_run_of_a_module_is_used_again_with_the_module(tmp_path: Path) -> None:
    net = Net(3)
    run = netgloss.explain(
        "pca", of(net), "relu", "critters:24", out=tmp_path / "run", num_concepts=2, seeds=1, device="cpu",
        evaluation=netgloss.EvaluationOptions(untrained_images=0),
    )  # fmt: skip
    with pytest.raises(UserError, match=r"pass it again, as in netgloss.load\(folder, classifier=...\)"):
        netgloss.show(netgloss.load(run.path), "critters:1")
    (first,) = netgloss.show(netgloss.load(run.path, classifier=net), "critters:1")
    (again,) = netgloss.show(run, "critters:1")  # the run knows its network in the process that made it
    assert first.numbers() == again.numbers()
    with pytest.raises(UserError, match="are not those described"):
        netgloss.load(run.path, classifier=Net(3))

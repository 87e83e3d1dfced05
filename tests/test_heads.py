"""Heads: dicts, tuples, objects and single logits become logits; probabilities are refused."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision import models
from torchvision.models import GoogLeNetOutputs, InceptionOutputs

import netgloss
from netgloss.activations.layer import Layer, split_store
from netgloss.adversarial.pixels import load_pixels
from netgloss.classifiers import Classifier, Tail, Taps, list_layers, load_classifier, load_from_spec, probabilities
from netgloss.data.arrays import ArraySource
from netgloss.errors import UserError
from netgloss.evaluation.faithful import FaithfulnessOptions
from netgloss.metrics import (
    agreement,
    decision_kept,
    image_metrics,
    kl_divergence,
    label_agreement,
    label_kl_divergence,
)

SPEC = {"size": [8, 8], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}


@dataclass
class Answer:
    maps: Tensor
    scores: Tensor


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
            "namedtuple": GoogLeNetOutputs(z, z + 1, z - 1),
            "other namedtuple": InceptionOutputs(z, z + 1),
            "maps first": (features, z),
            "dataclass": Answer(features, z),
            "two": {"a": z, "b": z},
            "maps": features,
            "hidden": SimpleNamespace(last_hidden_state=features.flatten(2)),
        }[self.form]


def of(net: nn.Module, **options: Any) -> Classifier:
    return load_classifier(net, **options)


def images() -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "form", ["logits", "only", "tuple", "object", "namedtuple", "other namedtuple", "maps first", "dataclass"]
)
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


def test_auxiliary_heads_are_left_alone() -> None:
    net = models.get_model("googlenet", weights=None, aux_logits=True, init_weights=False, num_classes=4)
    given = {"size": [64, 64], "mean": [0.5] * 3, "std": [0.5] * 3}
    x = torch.randn(2, 3, 64, 64)
    assert not isinstance(net(x), Tensor)  # as trained: a named tuple with the auxiliary logits
    classifier = load_classifier(net, preprocessing=given)
    assert net.training
    assert classifier.num_classes == 4
    with torch.no_grad():
        assert torch.equal(classifier(x), net.eval()(x))


# -- no head ----------------------------------------------------------------------------------------------------------


def check_headless(classifier: Classifier, layer: str) -> None:
    x = torch.randn(3, *classifier.input_shape)
    assert (classifier.outputs, classifier.num_classes, classifier.class_names) == ("none", 0, [])
    assert classifier(x).shape == (3, 0)
    classifier.check_layer(layer)
    with torch.no_grad(), Taps(classifier, layer, stop=False) as taps:
        activation = taps(x)[layer]
    assert Tail(classifier, layer, example=x)(activation).shape == (3, 0)
    assert classifier.untrained(0).outputs == "none"
    assert any(info.readable for info in list_layers(classifier))


@pytest.mark.parametrize("form", ["plain", "maps", "hidden", "two"])
def test_a_backbone_has_no_logits(form: str) -> None:
    net = Net(3, form)
    if form != "plain":
        with pytest.raises(UserError, match=r"is no classifier.*--num-classes 0") as caught:
            of(net)
        assert "\n" not in str(caught.value)
    classifier = of(net, num_classes=0)
    check_headless(classifier, "relu")
    assert load_from_spec(classifier.spec(), net=net).outputs == "none"
    with pytest.raises(UserError, match="has no logits but 2 class names"):
        of(net, num_classes=0, class_names=["a", "b"])
    net.num_classes = 0  # what a network says of itself
    check_headless(of(net), "relu")


@pytest.mark.parametrize(
    ("name", "layer"), [("timm:vit_tiny_patch16_224", "blocks.3"), ("torchvision:squeezenet1_1", "features.3")]
)
def test_a_named_network_without_its_head(name: str, layer: str) -> None:
    classifier = load_classifier(name, num_classes=0, random_weights=True, input_size=64)
    check_headless(classifier, layer)
    assert load_from_spec(classifier.spec()).outputs == "none"
    assert load_classifier(name, num_classes=2, random_weights=True, input_size=64).num_classes == 2


def test_a_network_without_a_head_is_explained(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Net(5, "maps")
    source = netgloss.open_images("critters:24")
    classifier = of(net, num_classes=0)
    common: dict[str, Any] = {"seeds": 1, "device": "cpu", "num_concepts": 3}
    run = netgloss.explain(
        "topk-sae", classifier, "relu", source, out=tmp_path / "run", top_k=2, steps=5,
        evaluation=netgloss.EvaluationOptions(untrained_images=8), **common,
    )  # fmt: skip
    scores = {s.metric: s for s in run.scores}
    assert scores["r2"].value is not None
    assert "untrained_network" in scores["r2"].baselines
    assert not {"agreement", "kl", "accuracy_change", "completeness"} & set(scores)
    assert any("has no head" in warning for warning in run.manifest["warnings"])
    content = json.loads((run.path / "concepts.json").read_text())
    assert content["classes"] == []
    assert all(image["prediction"] is None and image["explained"] is None for image in content["images"])
    assert any(concept["gallery"] for concept in content["concepts"])
    assert (run.path / "report.html").stat().st_size > 10_000
    comparison = netgloss.compare(
        [run], methods="natural-axes", model=classifier, layer="relu", images=source, out=tmp_path / "both", seeds=1,
        device="cpu", network_images=0,
    )  # fmt: skip
    assert [row["reason"] for row in comparison.record["methods"]] == ["", ""]
    acts: dict[str, Any] = {
        "faithfulness": lambda: netgloss.evaluate(run, faithfulness=FaithfulnessOptions()),
        "show": lambda: netgloss.show(run, "critters:1"),
        "an attack": lambda: load_pixels(classifier, source),
        "audit": lambda: netgloss.audit(classifier, source, out=tmp_path / "audit", device="cpu"),
        "cladec": lambda: netgloss.explain("cladec", classifier, "relu", source, out=tmp_path / "decoder", **common),
    }
    for verb, act in acts.items():
        with pytest.raises(UserError, match=f"{verb} needs the network's logits, and .* has no head") as caught:
            act()
        assert "\n" not in str(caught.value)


# -- several labels ---------------------------------------------------------------------------------------------------


def several(classes: int = 3, bias: float = -0.5) -> Net:
    torch.manual_seed(0)
    net = Net(classes)
    with torch.no_grad():
        net.conv.weight.abs_()
        net.head.weight.copy_(torch.randn(classes, 6, generator=torch.Generator().manual_seed(3)))
        net.head.bias.fill_(bias)
    return net


def test_the_kind_is_what_the_user_says() -> None:
    assert of(Net(3)).outputs == "multiclass"
    assert of(Net(1)).outputs == of(Net(1)).with_labels(True).outputs == "binary"
    assert of(Net(3)).with_labels(True).outputs == "multilabel"
    plain = of(Net(3))
    given = {"name": "net", "preprocessing": plain.preprocessing}
    assert Classifier(Net(3), multi_label=True, **given).outputs == "multilabel"
    assert Classifier(Net(1), multi_label=True, **given).outputs == "binary"
    net = Net(3)
    net.multi_label = True
    said = of(net)
    assert said.outputs == said.untrained(1).outputs == "multilabel"
    assert Classifier(net, multi_label=False, **given).outputs == "multiclass"
    assert load_from_spec(said.spec(), net=net).outputs == "multilabel"
    chosen = of(Net(3)).with_labels(True)
    again = load_from_spec(chosen.spec(), net=chosen.net)
    assert again.outputs == again.untrained(1).outputs == "multilabel"
    assert "multi_label" not in plain.spec()  # as in runs that are older than the word
    with pytest.raises(UserError, match="multi_label missing or of the wrong kind"):
        load_from_spec({**chosen.spec(), "multi_label": "yes"}, net=chosen.net)


@settings(max_examples=50, deadline=None)
@given(batch=st.integers(1, 5), labels=st.integers(2, 6), seed=st.integers(0, 99))
def test_metrics_of_labels_treat_each_label_as_a_binary_network(batch: int, labels: int, seed: int) -> None:
    """Each label alone is a binary network with the logits (0, z), whose metrics are the known ones."""
    a, b = 3 * torch.randn(2, batch, labels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def alone(z: Tensor) -> Tensor:
        return torch.stack([torch.zeros_like(z), z], dim=1)

    pairs = [(alone(a[:, k]), alone(b[:, k])) for k in range(labels)]
    torch.testing.assert_close(label_agreement(a, b), torch.stack([agreement(*p) for p in pairs]).mean(0))
    torch.testing.assert_close(label_kl_divergence(a, b), torch.stack([kl_divergence(*p) for p in pairs]).sum(0))
    torch.testing.assert_close(
        probabilities(a, "multilabel"), torch.stack([probabilities(p[0], "binary")[:, 1] for p in pairs], dim=1)
    )
    for k, pair in enumerate(pairs):
        kept = decision_kept(a, b, torch.full((batch,), k), "multilabel")
        assert torch.equal(kept, agreement(*pair).bool())
    assert torch.equal(decision_kept(a, b, a.argmax(1), "multiclass"), agreement(a, b).bool())
    order = torch.randperm(batch)
    metrics = {cls.name: cls for cls in image_metrics("multilabel")}
    for name, values in (("agreement", label_agreement(a, b)), ("kl", label_kl_divergence(a, b))):
        metric = metrics[name]()
        for part in order.split(2):  # streamed equals whole
            metric.update(part, logits=a[part], logits_rebuilt=b[part])
        torch.testing.assert_close(metric.compute(), values.mean())
    assert [cls.name for cls in image_metrics("multilabel")] == [cls.name for cls in image_metrics()]
    assert metrics["agreement"] is not {cls.name: cls for cls in image_metrics("binary")}["agreement"]


def test_a_network_of_several_labels_is_explained(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    y = np.arange(40) % 3
    x = rng.integers(0, 100, (40, 8, 8, 3)) + 70 * y[:, None, None, None]
    names = ["grey", "light", "flat"]
    source = ArraySource(x.astype(np.uint8), y, names)
    classifier = of(several(), class_names=names).with_labels(True)

    def explain(out: str, classifier: Classifier, method: str = "pca", **fields: Any) -> netgloss.Run:
        return netgloss.explain(
            method, classifier, "relu", source, out=tmp_path / out, seeds=1, device="cpu", num_concepts=2,
            store=tmp_path / "store", evaluation=netgloss.EvaluationOptions(untrained_images=0), **fields,
        )  # fmt: skip

    run = explain("run", classifier)
    scores = {s.metric: s for s in run.scores}
    held = netgloss.Store.open(tmp_path / "store")
    layer = Layer(held, "relu", Tail(classifier, "relu", example=images()), classifier, source)
    with torch.no_grad():
        batches = list(layer.batches(split_store(held)[1]))
        rebuilt = torch.cat([b.tail(run.explainer(b.activation)) for b in batches])
    logits = torch.cat([b.logits for b in batches])
    assert scores["agreement"].value == pytest.approx(float(label_agreement(logits, rebuilt).mean()))
    assert "keeps its sign" in scores["agreement"].definition
    assert not {"accuracy_change", "completeness"} & set(scores)
    assert any("need all labels of every image" in warning for warning in run.manifest["warnings"])
    assert all(image["probability"] <= 1 for image in run.concepts["images"])
    (shown,) = netgloss.show(run, source.subset([5]))
    with torch.no_grad():
        own = classifier(classifier.preprocessing(source.image(5))[None])[0]
    assert shown.probability == pytest.approx(float(own.max().sigmoid()), abs=1e-5)
    assert shown.probability != pytest.approx(float(own.softmax(0).max()), abs=1e-2)
    again = netgloss.load(run.path, classifier=classifier.net)
    assert again.network.outputs == "multilabel"
    with pytest.raises(UserError, match="was captured with --multi-label"):
        explain("other", of(several(), class_names=names))


@pytest.mark.parametrize("verb", ["audit", "attacks", "cladec"])
def test_what_needs_one_class_per_image_says_so(verb: str, tmp_path: Path) -> None:
    classifier = of(several(), class_names=["a", "b", "c"]).with_labels(True)
    pixels = np.random.default_rng(0).integers(0, 255, (8, 8, 8, 3), np.uint8)
    source = ArraySource(pixels, np.arange(8) % 2, ["a", "b"])
    acts: dict[str, Any] = {
        "audit": lambda: netgloss.audit(classifier, source, out=tmp_path / "run", device="cpu"),
        "attacks": lambda: load_pixels(classifier, source),
        "cladec": lambda: netgloss.explain("cladec", classifier, "relu", source, out=tmp_path / "run", device="cpu"),
    }
    with pytest.raises(UserError, match="several labels per image") as caught:
        acts[verb]()
    assert "\n" not in str(caught.value)


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

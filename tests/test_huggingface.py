"""hf:NAME and timm:hf-hub:NAME: configuration, image processor and labels become preprocessing and class names."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models import save_for_hf
from torch import Tensor, nn

import netgloss
from netgloss.classifiers import Preprocessing, Tail, Taps, list_layers, load_classifier, load_from_spec, outline_layers
from netgloss.classifiers.huggingface import read_processor
from netgloss.errors import UserError

try:
    import transformers
except ImportError:
    transformers = None
real = pytest.mark.skipif(transformers is None, reason="transformers is not installed (pip install netgloss[hf])")


# -- the image processor ----------------------------------------------------------------------------------------------

SIZES = st.sampled_from([{"height": 8, "width": 12}, {"height": 8, "width": 8}])


@settings(max_examples=60, deadline=None)
@given(
    size=SIZES,
    rescale=st.sampled_from([None, 1 / 255, 1 / 127.5]),
    offset=st.booleans(),
    normalise=st.booleans(),
    numbers=st.lists(st.floats(0.1, 0.9), min_size=6, max_size=6),
)
def test_rescaling_and_normalisation(
    size: dict[str, int], rescale: float | None, offset: bool, normalise: bool, numbers: list[float]
) -> None:
    """For an image of the right size, the input is what the processor's own arithmetic gives."""
    spec: dict[str, Any] = {"size": size, "resample": 2, "do_rescale": rescale is not None, "do_normalize": normalise}
    mean, std = numbers[:3], numbers[3:]
    if rescale is None:  # processors normalise pixels up to 255 with numbers of that size
        mean, std = [255 * m for m in mean], [255 * s for s in std]
    spec |= {"rescale_factor": rescale or 1 / 255, "rescale_offset": offset, "image_mean": mean, "image_std": std}
    pixels = np.random.default_rng(0).integers(0, 256, (size["height"], size["width"], 3), np.uint8)
    expected = torch.from_numpy(pixels).permute(2, 0, 1).double()
    if rescale is not None:
        expected = expected * rescale - (1 if offset else 0)
    if normalise:
        expected = (expected - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    found = read_processor(spec)(pixels)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("spec", "size", "resize", "interpolation"),
    [
        ({"size": {"height": 8, "width": 6}, "resample": 3}, (8, 6), (8, 6), "bicubic"),
        ({"size": 8}, (8, 8), 8, "bilinear"),
        ({"size": {"shortest_edge": 9}, "do_center_crop": True, "crop_size": {"height": 8, "width": 8}}, (8, 8), 9,
         "bilinear"),
        ({"size": {"shortest_edge": 9}, "do_center_crop": False, "crop_size": 8, "resample": 1}, (9, 9), 9, "lanczos"),
        ({"size": {"shortest_edge": 224}, "crop_pct": 0.875}, (224, 224), 256, "bilinear"),
        ({"size": {"shortest_edge": 384}, "crop_pct": 0.875}, (384, 384), (384, 384), "bilinear"),
        ({"do_resize": False, "size": 9, "do_center_crop": True, "crop_size": 8}, (8, 8), None, "bilinear"),
        ({"do_resize": False}, (32, 32), None, "bilinear"),
    ],
)  # fmt: skip
def test_sizes_of_image_processors(spec: dict[str, Any], size: Any, resize: Any, interpolation: str) -> None:
    found = read_processor({"image_mean": [0.5] * 3, "image_std": [0.25] * 3, **spec}, image_size=32)
    assert (found.size, found.resize, found.interpolation) == (size, resize, interpolation)


def test_efficientnet_divides_by_the_deviation_twice() -> None:
    found = read_processor({"size": 8, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "include_top": True})
    assert found.std == (0.25, 0.25, 0.25)


def test_what_a_processor_does_and_netgloss_does_not_is_refused() -> None:
    for spec, reason in (({"do_flip_channel_order": True, "size": 8}, "swaps the colours"), ({}, "names no size")):
        with pytest.raises(UserError, match=reason):
            read_processor(spec)


# -- the wiring, with a stand-in for transformers ---------------------------------------------------------------------


class Net(nn.Module):
    """What AutoModelForImageClassification gives, as far as it matters here."""

    def __init__(self, labels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.classifier = nn.Linear(4, labels)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Any:
        maps = self.conv(pixel_values)
        return SimpleNamespace(loss=None, logits=self.classifier(maps.mean((2, 3))), hidden_states=maps)


class Base(Net):
    def forward(self, pixel_values: Tensor) -> Any:  # type: ignore[override]
        return SimpleNamespace(last_hidden_state=self.conv(pixel_values))


class FakeTransformers(ModuleType):
    """Reads config.json and weights.pt; remembers what it was asked for."""

    def __init__(self) -> None:
        super().__init__("transformers")
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.missing: list[str] = []
        level = {"now": 30, "bars": True}
        self.level = level
        self.utils = SimpleNamespace(
            logging=SimpleNamespace(
                get_verbosity=lambda: level["now"],
                set_verbosity=lambda value: level.update(now=value),
                set_verbosity_error=lambda: level.update(now=40),
                is_progress_bar_enabled=lambda: level["bars"],
                disable_progress_bar=lambda: level.update(bars=False),
                enable_progress_bar=lambda: level.update(bars=True),
            )
        )
        self.AutoConfig = SimpleNamespace(from_pretrained=self.config)
        self.AutoImageProcessor = SimpleNamespace(from_pretrained=self.processor)
        self.AutoModelForImageClassification = SimpleNamespace(
            from_config=lambda config, **_: Net(config.num_labels),
            from_pretrained=lambda origin, **given: self.model(Net(given["config"].num_labels), origin, given),
        )
        self.AutoModel = SimpleNamespace(from_pretrained=lambda origin, **given: self.model(Base(1), origin, given))

    def config(self, origin: str, **given: Any) -> Any:
        self.asked.append((origin, given))
        if not Path(origin).is_dir():
            raise OSError("We couldn't connect to the hub.\nCheck your connection.")
        fields = json.loads((Path(origin) / "config.json").read_text())
        if "labels" not in fields:
            raise ValueError("Unrecognized model.\nIt has no labels.")
        names = {int(k): v for k, v in fields.pop("id2label", {}).items()}
        return SimpleNamespace(num_labels=fields.pop("labels"), id2label=names, image_size=8, **fields)

    def processor(self, origin: str, **given: Any) -> Any:
        return SimpleNamespace(to_dict=lambda: json.loads((Path(origin) / "preprocessor_config.json").read_text()))

    def model(self, net: nn.Module, origin: str, given: dict[str, Any]) -> Any:
        assert given["trust_remote_code"] is False
        assert self.level == {"now": 40, "bars": False}
        torch.manual_seed(7)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.normal_()
        return net, {"missing_keys": self.missing}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeTransformers:
    import torchmetrics  # noqa: F401 (imports the real package where it is installed)

    package = FakeTransformers()
    monkeypatch.setitem(sys.modules, "transformers", package)
    return package


def folder(path: Path, **config: Any) -> Path:
    path.mkdir()
    fields = {"labels": 3, "architectures": ["NetForImageClassification"], **config}
    (path / "config.json").write_text(json.dumps(fields))
    processor = {"size": {"height": 8, "width": 8}, "image_mean": [0.5] * 3, "image_std": [0.25] * 3, "resample": 3}
    (path / "preprocessor_config.json").write_text(json.dumps(processor))
    return path


def test_a_folder_is_a_classifier(fake: FakeTransformers, tmp_path: Path) -> None:
    names = {"2": "eel", "0": "cat", "1": "dog"}
    path = folder(tmp_path / "net", id2label=names)
    classifier = load_classifier(f"hf:{path}")
    assert classifier.class_names == ["cat", "dog", "eel"]
    assert classifier.preprocessing == Preprocessing(
        size=(8, 8), resize=(8, 8), interpolation="bicubic", mean=(0.5,) * 3, std=(0.25,) * 3
    )
    assert classifier.outputs == "multiclass"
    assert [layer.name for layer in list_layers(classifier)] == ["conv", "classifier"]
    assert fake.asked[0][1] == {"local_files_only": True, "trust_remote_code": False}
    assert fake.level == {"now": 30, "bars": True}
    again = load_from_spec(classifier.spec())
    assert again.weights_hash == classifier.weights_hash
    drawn = [load_classifier(f"hf:{path}", random_weights=True, seed=seed).weights_hash for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert load_classifier(f"hf:{path}", random_weights=True, num_classes=5).num_classes == 5
    run = netgloss.explain(
        "pca", classifier, "conv", "critters:12", out=tmp_path / "run", num_concepts=2, seeds=1, device="cpu",
        evaluation=netgloss.EvaluationOptions(untrained_images=0),
    )  # fmt: skip
    assert netgloss.load(run.path).classifier().class_names == ["cat", "dog", "eel"]


def test_what_the_configuration_says(fake: FakeTransformers, tmp_path: Path) -> None:
    counted = folder(tmp_path / "counted", id2label={str(i): f"LABEL_{i}" for i in range(3)})
    assert load_classifier(f"hf:{counted}").class_names == ["class 0", "class 1", "class 2"]
    several = folder(tmp_path / "several", problem_type="multi_label_classification")
    assert load_classifier(f"hf:{several}").outputs == "multilabel"
    assert load_classifier(f"hf:{folder(tmp_path / 'one', labels=1)}").outputs == "binary"
    base = load_classifier(f"hf:{folder(tmp_path / 'base', architectures=['NetModel'])}")
    assert (base.outputs, base.num_classes) == ("none", 0)
    fake.missing = ["classifier.weight"]
    assert load_classifier(f"hf:{counted}", num_classes=0).outputs == "none"
    with pytest.raises(UserError, match=r"lack classifier\.weight: they are not those of an image classifier"):
        load_classifier(f"hf:{counted}")


def test_mistakes_are_one_line(fake: FakeTransformers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    numbers = folder(tmp_path / "numbers", problem_type="regression")
    timm_folder = tmp_path / "timm"
    timm_folder.mkdir()
    (timm_folder / "config.json").write_text('{"architecture": "resnet18"}')
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "config.json").write_text('{"model_type": "poem"}')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    for name, reason in (
        ("owner/name", r"hf:owner/name could not be downloaded \(We couldn't connect .*\); give the folder of a copy"),
        (f"{tmp_path}/none", "no such folder: .*none"),
        (str(tmp_path), "has no config.json: hf:FOLDER reads what save_pretrained wrote"),
        (str(timm_folder), "holds a network of timm: say timm:local-dir:"),
        (str(strange), "is no image classifier of transformers: Unrecognized model"),
        (str(tmp_path / "broken"), "config.json cannot be read"),
        (str(numbers), "predicts numbers"),
    ):
        with pytest.raises(UserError, match=reason) as caught:
            load_classifier(f"hf:{name}")
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="have 3 classes, not 7"):
        load_classifier(f"hf:{folder(tmp_path / 'fine')}", num_classes=7)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"needs the package transformers: pip install 'netgloss\[hf\]'"):
        load_classifier("hf:owner/name")


# -- timm's own folders and hub names ---------------------------------------------------------------------------------


def test_a_folder_of_timm(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = timm.create_model("resnet10t", num_classes=3).eval()
    config = {"label_names": ["cat", "dog", "eel"], "input_size": [3, 64, 64]}
    save_for_hf(net, tmp_path / "net", model_config=config, safe_serialization=True)
    classifier = load_classifier(f"timm:local-dir:{tmp_path / 'net'}")
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(classifier(x), net(x))
    assert classifier.class_names == ["cat", "dog", "eel"]
    assert load_from_spec(classifier.spec()).weights_hash == classifier.weights_hash
    assert load_classifier(f"timm:local-dir:{tmp_path / 'net'}", num_classes=0).outputs == "none"
    with pytest.raises(UserError, match="have 3 classes, not 4"):
        load_classifier(f"timm:local-dir:{tmp_path / 'net'}", num_classes=4)
    with pytest.raises(UserError, match=r"has no config\.json: timm:local-dir:FOLDER"):
        load_classifier(f"timm:local-dir:{tmp_path}")


def test_a_hub_name_of_timm_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=r"timm:hf-hub:owner/name could not be downloaded \(.*timm:local-dir:"
    ) as caught:
        load_classifier("timm:hf-hub:owner/name")
    assert "\n" not in str(caught.value)


# -- transformers itself ----------------------------------------------------------------------------------------------


def vit(path: Path, cls: str = "ViTForImageClassification", **config: Any) -> nn.Module:
    torch.manual_seed(0)
    given = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    fields = transformers.ViTConfig(
        **given, image_size=32, patch_size=8, id2label={0: "cat", 1: "dog", 2: "eel"}, **config
    )
    net = getattr(transformers, cls)(fields).eval()
    net.save_pretrained(path)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(path)
    return net


def convnext(path: Path) -> nn.Module:
    torch.manual_seed(0)
    fields = transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, num_labels=4)
    net = transformers.ConvNextForImageClassification(fields).eval()
    net.save_pretrained(path)
    transformers.ConvNextImageProcessor(size={"shortest_edge": 64}).save_pretrained(path)
    return net


@real
@pytest.mark.parametrize(
    ("make", "layer", "shape"),
    [(vit, "vit.layers.0", (16, 4, 4)), (convnext, "convnext.encoder.stages.1", (16, 8, 8))],
)
def test_a_real_folder(make: Any, layer: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    net = make(tmp_path / "net")
    classifier = load_classifier(f"hf:{tmp_path / 'net'}")
    image = np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "net")
    theirs = processor(torch.from_numpy(image).permute(2, 0, 1), return_tensors="pt")["pixel_values"]
    x = classifier.preprocessing(image)[None]
    assert x.shape == theirs.shape
    assert (x - theirs).abs().max() < 0.05  # rounding to whole pixel values after the resize
    with torch.no_grad():
        assert torch.equal(classifier(x), net(x).logits)
    classifier.check_layer(layer)
    tail = Tail(classifier, layer, example=torch.cat([x, x]))
    with torch.no_grad(), Taps(classifier, layer, stop=False) as taps:
        activation = taps(x)[layer]
        assert activation.shape[1:] == shape
        torch.testing.assert_close(tail(activation, images=x), classifier(x))
    _, outlined = outline_layers(f"hf:{tmp_path / 'net'}")
    assert [(info.name, info.shape) for info in outlined] == [
        (info.name, info.shape) for info in list_layers(classifier)
    ]
    assert load_from_spec(classifier.spec()).weights_hash == classifier.weights_hash
    run = netgloss.explain(
        "pca", classifier, layer, "critters:16", out=tmp_path / "run", num_concepts=3, seeds=1, device="cpu",
        evaluation=netgloss.EvaluationOptions(untrained_images=8),
    )  # fmt: skip
    assert {"r2", "agreement"} <= {score.metric for score in run.scores}


@real
def test_a_real_backbone_and_real_labels(tmp_path: Path) -> None:
    vit(tmp_path / "base", "ViTModel")
    assert load_classifier(f"hf:{tmp_path / 'base'}").outputs == "none"
    vit(tmp_path / "several", problem_type="multi_label_classification")
    several = load_classifier(f"hf:{tmp_path / 'several'}")
    assert (several.outputs, several.class_names) == ("multilabel", ["cat", "dog", "eel"])
    several.with_layout(pool="cls").check_layer("vit.layers.1")

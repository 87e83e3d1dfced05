"""Loading, checkpoints, preprocessing, and what a classifier says of itself."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from netgloss.classifiers import Classifier, Preprocessing, load_classifier, load_from_spec
from netgloss.classifiers.checkpoints import hash_weights, read_checkpoint
from netgloss.errors import UserError

SPEC = {"size": [8, 8], "resize": [8, 8], "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}


class Small(nn.Module):
    preprocessing_spec = SPEC

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.scale = nn.Parameter(torch.ones(4, 1, 1))
        self.head = nn.Linear(4, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.norm(self.conv(x)) * self.scale).mean((2, 3)))


def noise(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * 1000 + height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


# -- preprocessing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mobilenet_v2.IMAGENET1K_V1", "mobilenet_v2", "efficientnet_b0"])
@pytest.mark.parametrize("size", [(500, 375), (224, 224), (333, 500), (100, 90)])
def test_equals_torchvisions_own_transform(name: str, size: tuple[int, int]) -> None:
    from torchvision.models import get_model_weights

    architecture, _, tag = name.partition(".")
    weights = get_model_weights(architecture)
    classifier = load_classifier(f"torchvision:{name}", random_weights=True)
    own = (weights[tag] if tag else weights.DEFAULT).transforms()
    torch.testing.assert_close(classifier.preprocessing(noise(*size)), own(noise(*size)))
    assert classifier.class_names == (weights[tag] if tag else weights.DEFAULT).meta["categories"]


@pytest.mark.parametrize(
    "name",
    ["resnet18.a1_in1k", "mobilenetv3_small_100", "vit_tiny_patch16_224", "convnextv2_nano.fcmae_ft_in22k_in1k_384"],
)
def test_equals_timms_own_transform(name: str) -> None:
    from timm.data import create_transform, resolve_data_config

    from netgloss.classifiers.sources import build

    built = build(f"timm:{name}", pretrained=False, num_classes=None, size=None, state_names=())
    transform = create_transform(is_training=False, **resolve_data_config({}, model=built.net))
    assert built.preprocessing is not None
    for size in ((500, 375), (224, 224), (230, 500)):
        torch.testing.assert_close(built.preprocessing(noise(*size)), transform(noise(*size)), rtol=1e-5, atol=1e-5)


PREPARATIONS = [
    Preprocessing((24, 24), resize=30),
    Preprocessing((24, 32), resize=(40, 36)),
    Preprocessing((16, 20)),
    Preprocessing((64, 64), resize=(64, 64)),
    Preprocessing((64, 48), resize=33),
]


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(PREPARATIONS), st.integers(20, 90), st.integers(20, 90), st.data())
def test_geometry_follows_a_marker(prep: Preprocessing, width: int, height: int, data: st.DataObject) -> None:
    geometry = prep.geometry(width, height)
    assert (geometry.height, geometry.width) == prep.size
    # a rectangle reaching to the right and lower border: its visible corner lies where the geometry says
    x = data.draw(st.integers(0, width - 1))
    y = data.draw(st.integers(0, height - 1))
    image = np.zeros((height, width, 3), dtype=np.uint8)
    image[y:, x:] = 255
    pixels = prep.pixels(image)[0]
    assert tuple(pixels.shape) == prep.size
    for axis, start, scale, offset, length in (
        (0, x, geometry.scale_x, geometry.offset_x, width),
        (1, y, geometry.scale_y, geometry.offset_y, height),
    ):
        low = min(max(start * scale + offset, 0), prep.size[1 - axis])
        high = min(max(length * scale + offset, 0), prep.size[1 - axis])
        total = float(pixels.amax(axis).sum())  # bright length along the axis; blurred edges keep their integral
        assert abs(total - (high - low) * float(pixels.max())) <= 0.55 * max(1.0, scale) + 0.05 * float(
            pixels.max() < 1
        ), (total, low, high)


def test_geometry_by_arithmetic() -> None:
    prep = Preprocessing((224, 224), resize=256)
    geometry = prep.geometry(500, 375)
    assert (geometry.scale_x, geometry.scale_y) == (341 / 500, 256 / 375)
    assert (geometry.offset_x, geometry.offset_y) == (-58, -16)
    same = Preprocessing((8, 8)).geometry(8, 8)
    assert (same.scale_x, same.scale_y, same.offset_x, same.offset_y) == (1, 1, 0, 0)
    padded = Preprocessing((8, 9)).geometry(6, 6)
    assert (padded.offset_x, padded.offset_y) == (1, 1)


def test_arrays_greys_and_the_fast_path() -> None:
    prep = Preprocessing((20, 20), resize=20, mean=(0.5,) * 3, std=(0.5,) * 3)
    image = noise(20, 20)
    array = np.asarray(image)
    expected = torch.from_numpy(array.copy()).permute(2, 0, 1) / 255
    assert torch.equal(prep.pixels(array), expected)
    assert torch.equal(prep.pixels(image), expected)
    assert torch.allclose(prep(array), expected * 2 - 1)
    larger = noise(37, 51)
    assert torch.equal(prep(np.asarray(larger)), prep(larger))
    grey = Preprocessing((20, 20), resize=20, mean=(0.0,), std=(1.0,), channels=1)
    assert torch.equal(grey(array[:, :, 0]), expected[:1])
    assert torch.equal(grey.pixels(array[:, :, :1]), expected[:1])
    assert grey(image).shape == (1, 20, 20)
    assert torch.equal(prep.pixels(array[:, :, 0])[1], expected[0])
    with pytest.raises(UserError, match=r"uint8 .*float64 \(2, 2\)"):
        prep(np.zeros((2, 2)))


def test_preprocessing_round_trips() -> None:
    for prep in PREPARATIONS:
        assert Preprocessing.from_dict(json.loads(json.dumps(prep.to_dict()))) == prep
        assert pickle.loads(pickle.dumps(prep)) == prep
    assert Preprocessing((224, 224), resize=256).with_options(size=112).resize == 128
    assert Preprocessing((224, 224), resize=256).with_options(size=(112, 224)).resize == (128, 256)
    x = torch.rand(3, 4, 4, requires_grad=True)
    Preprocessing((4, 4)).normalise(x).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad[0], torch.full((4, 4), 1 / 0.229))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": (0, 4)}, "positive pixels"),
        ({"size": (4, 4), "mean": (0.5,)}, "one number for each of 3 channels"),
        ({"size": (4, 4), "std": (1.0, 0.0, 1.0)}, "std positive"),
        ({"size": (4, 4), "mean": (123.675, 116.28, 103.53), "std": (58.4, 57.1, 57.4)}, "divide both by 255"),
        ({"size": (4, 4), "std": (255.0, 255.0, 255.0)}, "divide both by 255"),
        ({"size": (4, 4), "crop": "left"}, "crop='center'"),
        ({"size": (4, 4), "interpolation": "cubic"}, "interpolation must be one of"),
        ({"size": (4, 4), "channels": 4}, "1 .grey. or 3"),
        ({"resize": 4}, "needs a 'size'"),
        ({"size": (4, 4), "intrepolation": "box"}, "did you mean interpolation"),
    ],
)
def test_preprocessing_mistakes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Preprocessing.from_dict(options)


# -- checkpoints ------------------------------------------------------------------------------------------------------


class RunsCode:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["NETGLOSS_TEST_TRAP"],)


@pytest.mark.parametrize("form", ["bare", "state_dict", "module.", "both", "model", "safetensors", "_orig_mod."])
def test_checkpoints_in_all_usual_wrappings(tmp_path: Path, form: str) -> None:
    torch.manual_seed(5)
    net = Small()
    state: dict[str, Any] = net.state_dict()
    if form == "safetensors":
        save_file(state, tmp_path / "net.safetensors")
        file = tmp_path / "net.safetensors"
    else:
        if form in ("module.", "both", "_orig_mod."):
            state = {("module." if form == "both" else form) + k: v for k, v in state.items()}
        content = (
            {"epoch": 3, form.replace("both", "state_dict"): state}
            if form in ("state_dict", "model", "both")
            else state
        )
        file = tmp_path / "net.pth"
        torch.save(content, file)
    classifier = load_classifier(Small(), checkpoint=file)
    assert classifier.weights_hash == hash_weights(net)
    assert classifier.checkpoint == str(file)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(classifier(x), net.eval()(x))


def test_checkpoints_that_run_code_are_refused_and_do_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trap = tmp_path / "trap"
    monkeypatch.setenv("NETGLOSS_TEST_TRAP", str(trap))
    torch.save(RunsCode(), tmp_path / "zip.pth")
    torch.save({"state_dict": Small().state_dict(), "x": RunsCode()}, tmp_path / "mixed.pth")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(RunsCode()))
    torch.save(Small(), tmp_path / "module.pth")
    for name in ("zip.pth", "mixed.pth", "plain.pkl", "module.pth"):
        with pytest.raises(UserError, match=r"is a pickle .* refused") as caught:
            read_checkpoint(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert not trap.exists()


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(99)}, tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pth").write_text("hello world" * 9)
    (tmp_path / "empty.pth").touch()
    (tmp_path / "junk.safetensors").write_bytes(b"junkjunkjunk")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"epoch": 1, "lr": 0.1}, tmp_path / "log.pth")
    for name, message in {
        "cut.pth": "no readable PyTorch file",
        "text.pth": "no readable PyTorch file",
        "empty.pth": "is empty",
        "junk.safetensors": "no readable safetensors",
        "list.pth": "holds no state dict .* a list",
        "log.pth": "holds no state dict .* a dict of epoch, lr",
        "gone.pth": "does not exist",
        "": "is a folder",
    }.items():
        with pytest.raises(UserError, match=message) as caught:
            load_classifier(Small(), checkpoint=tmp_path / name)
        assert "\n" not in str(caught.value)


def test_mismatching_checkpoints_say_what_differs(tmp_path: Path) -> None:
    state = Small(num_classes=7).state_dict()
    torch.save(state, tmp_path / "head.pth")
    with pytest.raises(
        UserError, match=r"head.weight is \(7, 4\) in the file, \(3, 4\) in .* 7 classes: pass num_classes"
    ):
        load_classifier(Small(), checkpoint=tmp_path / "head.pth")
    state = Small().state_dict()
    del state["conv.weight"], state["norm.num_batches_tracked"]
    state["extra"] = torch.ones(1)
    torch.save(state, tmp_path / "names.pth")
    with pytest.raises(UserError, match=r"1 missing \(conv.weight\) and 1 unexpected \(extra\)"):
        load_classifier(Small(), checkpoint=tmp_path / "names.pth")
    state = Small().state_dict()
    del state["norm.num_batches_tracked"]
    torch.save(state, tmp_path / "old.pth")
    load_classifier(Small(), checkpoint=tmp_path / "old.pth")


def test_published_densenets_with_their_old_names(tmp_path: Path) -> None:
    from torchvision.models import densenet121

    net = densenet121(num_classes=1000)
    old = {}
    for key, tensor in net.state_dict().items():
        for part in ("norm1", "conv1", "norm2", "conv2"):
            key = key.replace(f".{part}.", f".{part[:-1]}.{part[-1]}.") if "denselayer" in key else key
        old[key] = tensor
    assert set(old) != set(net.state_dict())
    torch.save(old, tmp_path / "densenet.pth")
    assert load_classifier(
        "torchvision:densenet121", checkpoint=tmp_path / "densenet.pth"
    ).weights_hash == hash_weights(net)


# -- classifiers ------------------------------------------------------------------------------------------------------


def test_module_is_copied_frozen_and_left_alone() -> None:
    net = Small().train()
    classifier = load_classifier(net)
    assert net.training
    assert all(p.requires_grad for p in net.parameters())
    assert not classifier.net.training
    assert not any(p.requires_grad for p in classifier.net.parameters())
    assert classifier.class_names == ["class 0", "class 1", "class 2"]
    assert classifier.wnids is None
    assert (classifier.num_classes, classifier.input_shape, classifier.device) == (3, (3, 8, 8), torch.device("cpu"))
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    classifier(x).sum().backward()
    assert x.grad is not None
    assert classifier.to("cpu") is classifier
    assert classifier.check_layer("head") == "head"
    with pytest.raises(UserError, match="did you mean head"):
        classifier.check_layer("haed")


def test_class_names_and_preprocessing_of_modules(tmp_path: Path) -> None:
    net = Small()
    net.class_names = ["a", "b", "c"]  # type: ignore[assignment]
    assert load_classifier(net).class_names == ["a", "b", "c"]
    (tmp_path / "names.txt").write_text("cat\n dog \n\nbird\n", encoding="utf-8")
    assert load_classifier(net, class_names=tmp_path / "names.txt").class_names == ["cat", "dog", "bird"]
    with pytest.raises(UserError, match="3 logits but 2 class names"):
        load_classifier(net, class_names=["x", "y"])
    with pytest.raises(UserError, match=r"gone.txt cannot be read"):
        load_classifier(net, class_names=tmp_path / "gone.txt")
    plain = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    with pytest.raises(UserError, match="pass input_size, mean, std"):
        load_classifier(plain)
    classifier = load_classifier(plain, input_size=4, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    assert classifier.preprocessing == Preprocessing((4, 4), resize=4, mean=(0.0,) * 3, std=(1.0,) * 3)
    assert load_classifier(net, input_size=16, preprocessing={"interpolation": "box"}).preprocessing == Preprocessing(
        (16, 16), resize=(16, 16), interpolation="box", mean=(0.5,) * 3, std=(0.25,) * 3
    )


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (nn.Conv2d(3, 2, 1), r"no classifier: for 2 images it gives shape \(2, 2, 8, 8\)"),
        (nn.Flatten(0), r"no classifier: .* shape \(384,\)"),
        (nn.Linear(5, 2), r"does not run on inputs \(2, 3, 8, 8\)"),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.Unflatten(1, (2, 2)), nn.LSTM(2, 2)), "gives a tuple"),
    ],
)
def test_networks_that_are_no_classifiers(net: nn.Module, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_classifier(net, preprocessing=SPEC)
    assert "\n" not in str(caught.value)


def test_hash_sees_every_byte_and_nothing_else() -> None:
    net = Small()
    first = hash_weights(net)
    assert first == hash_weights(load_classifier(net).net)
    assert first == hash_weights(net.to(memory_format=torch.channels_last))
    with torch.no_grad():
        net.head.bias[0] = torch.nextafter(net.head.bias[0], torch.tensor(9.0))
    assert hash_weights(net) != first
    with torch.no_grad():
        net.head.bias.zero_()
    zero = hash_weights(net)
    with torch.no_grad():
        net.head.bias.neg_()
    assert hash_weights(net) != zero, "-0 is other bytes than 0"
    assert hash_weights(net.double()) != zero
    assert hash_weights(net.bfloat16()) != zero


def test_random_weights_and_untrained_controls_follow_the_seed() -> None:
    small, trained = Small(), load_classifier(Small())
    before = torch.get_rng_state()
    first, again, other = (
        load_classifier("torchvision:resnet18", random_weights=True, num_classes=3, seed=s) for s in (1, 1, 2)
    )
    assert first.weights_hash == again.weights_hash != other.weights_hash
    modules = [load_classifier(small, random_weights=True, seed=s).weights_hash for s in (1, 1, 2)]
    assert modules[0] == modules[1] != modules[2]
    kept = trained.weights_hash
    control = trained.untrained(seed=4)
    assert control.weights_hash == trained.untrained(seed=4).weights_hash != trained.untrained(seed=5).weights_hash
    assert trained.weights_hash == kept == hash_weights(trained.net)
    changed = dict(control.net.named_parameters())
    for name, parameter in trained.net.named_parameters():
        if not name.startswith("norm"):
            assert not torch.equal(parameter, changed[name]), name
    assert not control.net.training
    assert not any(p.requires_grad for p in control.net.parameters())
    assert torch.equal(before, torch.get_rng_state()), "the caller's random numbers are not disturbed"


FACTORY = """
import torch
from torch import nn
def tiny(num_classes=2):
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, num_classes))
    torch.manual_seed(0)
    nn.init.normal_(net[1].weight)
    net.preprocessing_spec = {"size": [4, 4], "resize": 4, "mean": [0, 0, 0], "std": [1, 1, 1]}
    return net
def wrong(): return 3
"""


def test_factories_in_files(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(FACTORY)
    assert load_classifier(f"{file}:tiny").num_classes == 2
    assert load_classifier(f"{file}:tiny", num_classes=5).num_classes == 5
    for name, message in {
        f"{file}:tiyn": "no factory 'tiyn'; it has tiny, wrong",
        f"{file}": "no factory ''; it has tiny",
        f"{file}:wrong": "gave a int, not an nn.Module",
        f"{tmp_path}/gone.py:f": "does not exist",
    }.items():
        with pytest.raises(UserError, match=message):
            load_classifier(name)
    file.write_text("import nothing_of_this_name")
    with pytest.raises(UserError, match="cannot be run: ModuleNotFoundError"):
        load_classifier(f"{file}:tiny")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet18", r"pass timm:NAME.*\(timm:resnet18\?\)"),
        ("torchvision:resnet81", "did you mean resnet18"),
        ("torchvision:fcn_resnet50", "no classifier 'fcn_resnet50'"),
        ("torchvision:resnet18.V9", "no weights 'V9' of resnet18; it has IMAGENET1K_V1"),
        ("timm:resnet81", "did you mean resnet18"),
        ("timm:resnet18.v9", "no weights 'v9' of resnet18; it has .*a1_in1k"),
        ("timm:", "timm has no model ''"),
    ],
)
def test_wrong_names(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_classifier(name, random_weights=True)


@pytest.mark.parametrize("name", ["timm:resnet18", "torchvision:resnet18"])
def test_no_network_is_one_line_and_no_waiting(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import timm  # noqa: F401 (its import is not what is timed)
    from huggingface_hub import constants
    from torch import hub

    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    monkeypatch.setattr(hub, "urlopen", unreachable)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    start = time.monotonic()
    with pytest.raises(UserError, match=r"could not be downloaded.*--checkpoint FILE or --random-weights") as caught:
        load_classifier(name)
    assert time.monotonic() - start < 15
    assert "\n" not in str(caught.value)
    assert not constants.HF_HUB_OFFLINE
    with pytest.raises(UserError, match="have 1000 classes, not 5"):
        load_classifier(name, num_classes=5)


def test_timm_heads_sizes_and_names() -> None:
    classifier = load_classifier("timm:resnet10t", random_weights=True)
    assert classifier.wnids is not None
    assert (classifier.wnids[0], classifier.class_names[0]) == ("n01440764", "tench, Tinca tinca")
    assert len(classifier.wnids) == len(classifier.class_names) == 1000
    small = load_classifier("timm:vit_tiny_patch16_224", random_weights=True, input_size=64, num_classes=4)
    assert small.input_shape == (3, 64, 64)
    assert small.class_names == [f"class {i}" for i in range(4)]
    assert small.wnids is None
    assert load_classifier("torchvision:vit_b_32", random_weights=True, input_size=64, num_classes=4).num_classes == 4


def test_specs_load_again_and_check_the_weights(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(FACTORY)
    weights = tmp_path / "tiny.pth"
    torch.save({"1.weight": torch.ones(2, 48), "1.bias": torch.zeros(2)}, weights)
    classifiers = [
        load_classifier(f"{file}:tiny", class_names=["a", "b"]),
        load_classifier(f"{file}:tiny", checkpoint=weights, mean=(0.5,) * 3),
        load_classifier(f"{file}:tiny", random_weights=True, num_classes=4, seed=3),
        load_classifier(f"{file}:tiny").untrained(seed=2),
        load_classifier("timm:resnet10t", random_weights=True, input_size=64),
    ]
    x = torch.randn(2, 3, 4, 4)
    for classifier in classifiers:
        spec = json.loads(json.dumps(classifier.spec()))
        again = load_from_spec(spec)
        assert isinstance(again, Classifier)
        assert again.spec() == spec
        assert (again.preprocessing, again.wnids) == (classifier.preprocessing, classifier.wnids)
        if classifier.input_shape == (3, 4, 4):
            assert torch.equal(again(x), classifier(x))
    spec = classifiers[1].spec()
    moved = weights.rename(tmp_path / "moved.pth")
    with pytest.raises(UserError, match=r"tiny.pth of .* is not there any more"):
        load_from_spec(spec)
    assert load_from_spec(spec, checkpoint=moved).weights_hash == spec["weights_hash"]
    torch.save({"1.weight": torch.ones(2, 48), "1.bias": torch.ones(2)}, moved)
    with pytest.raises(UserError, match="not those described"):
        load_from_spec(spec, checkpoint=moved)


def test_spec_of_a_module_needs_the_module() -> None:
    net = Small()
    spec = load_classifier(net).spec()
    with pytest.raises(UserError, match="'Small' was given as a module: pass it again"):
        load_from_spec(spec)
    assert load_from_spec(spec, net=net).weights_hash == spec["weights_hash"]
    with pytest.raises(UserError, match="not those described"):
        load_from_spec(spec, net=Small())


def test_choices_that_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exclude each other"):
        load_classifier(Small(), checkpoint=tmp_path / "x", random_weights=True)
    with pytest.raises(UserError, match="num_classes=4 cannot change a module"):
        load_classifier(Small(), num_classes=4)


def test_import_is_light() -> None:
    code = (
        "import sys, netgloss.classifiers;"
        "heavy = ('timm', 'torchvision', 'captum', 'sklearn', 'matplotlib', 'lightning');"
        "print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# -- the real network -------------------------------------------------------------------------------------------------


@pytest.mark.real
def test_real_mobilenet_recognises_real_images(shared: Path) -> None:
    classifier = load_classifier("torchvision:mobilenet_v2", checkpoint=shared / "weights" / "mobilenet_v2.pth")
    assert classifier.wnids is not None
    right = top5 = 0
    folders = sorted((shared / "data" / "imagenette" / "val").iterdir())
    files = [(folder.name, file) for folder in folders for file in sorted(folder.iterdir())[:6]]
    with torch.inference_mode():
        for start in range(0, len(files), 15):
            chunk = files[start : start + 15]
            logits = classifier(torch.stack([classifier.preprocessing(Image.open(file)) for _, file in chunk]))
            for (wnid, _), best in zip(chunk, logits.topk(5).indices, strict=True):
                names = [classifier.wnids[i] for i in best]
                right += names[0] == wnid
                top5 += wnid in names
    assert 0.5 <= right / len(files) <= 0.85
    assert top5 / len(files) >= 0.8


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"  <!DOCTYPE html><html><body>Sign in</body></html>", "is a web page"),
        (b"<html>\n<head><title>404</title>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n", "is a Git LFS pointer"),
        (b'{"error": "not found"}', "is JSON text"),
        (b"\x1f\x8b\x08\x00rest", "is compressed by gzip"),
    ],
)
def test_what_was_saved_in_place_of_weights_is_named(content: bytes, said: str, suffix: str, tmp_path: Path) -> None:
    from netgloss.classifiers.checkpoints import read_checkpoint

    file = tmp_path / f"weights{suffix}"
    file.write_bytes(content)
    with pytest.raises(UserError, match=said):
        read_checkpoint(file)

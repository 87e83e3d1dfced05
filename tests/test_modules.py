"""Modules as people have them: each is explained with the right values, or refused in one line; never anything else."""

from __future__ import annotations

import copy
import tempfile
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from netgloss.activations import CaptureOptions, Store, capture
from netgloss.classifiers import Tail, Taps, load_classifier
from netgloss.classifiers.loading import reinitialised
from netgloss.classifiers.modules import copied
from netgloss.data import open_images
from netgloss.errors import UserError

SPEC = {"size": (16, 16), "resize": (16, 16), "mean": (0.5,) * 3, "std": (0.25,) * 3}
LAYER = "3"


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


def run_once(net: nn.Module) -> nn.Module:
    """After a forward with gradients, as in a training script: computed tensors hang on the modules."""
    net(torch.randn(2, 3, 16, 16))
    return net


class Whole(nn.Module):
    """The plain network as ``self.body``; subclasses add what makes them odd."""

    def __init__(self) -> None:
        super().__init__()
        self.body = plain()

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images)  # type: ignore[no-any-return]


class KeepsActivations(Whole):
    def forward(self, images: Tensor) -> Tensor:
        self.kept = {"maps": [self.body[:4](images)]}
        return self.body[4:](self.kept["maps"][0])  # type: ignore[no-any-return]


class HoldsALock(Whole):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def forward(self, images: Tensor) -> Tensor:
        with self.lock:
            return self.body(images)  # type: ignore[no-any-return]


class HoldsAGenerator(Whole):
    def __init__(self) -> None:
        super().__init__()
        self.counter = (i for i in range(10))


class RefusesEval(Whole):
    def train(self, mode: bool = True) -> RefusesEval:
        if not mode:
            raise RuntimeError("always in training")
        return super().train(mode)


class IgnoresEval(Whole):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def train(self, mode: bool = True) -> IgnoresEval:
        return super().train(True)

    def forward(self, images: Tensor) -> Tensor:
        return self.body[4:](self.drop(self.body[:4](images)))  # type: ignore[no-any-return]


class RaisesForSeveral(Whole):
    def forward(self, images: Tensor) -> Tensor:
        if len(images) > 1:
            raise KeyError("one by one please")
        return super().forward(images)


class RandomInEval(Whole):
    def forward(self, images: Tensor) -> Tensor:
        return self.body[4:](nn.functional.dropout(self.body[:4](images), 0.5, training=True))  # type: ignore[no-any-return]


class RandomDepth(Whole):
    def forward(self, images: Tensor) -> Tensor:
        maps = self.body[:2](images)
        return self.body[3:](self.body[2](maps) * (torch.rand(()) + 0.5))  # type: ignore[no-any-return]


def changed(change: Callable[[Any], Any]) -> nn.Module:
    net = plain()
    change(net[2])
    return run_once(net)


def old_weight_norm(layer: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.nn.utils.weight_norm(layer)


def quantised() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(plain(), {nn.Linear})  # type: ignore[no-any-return]


def scripted(make: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return plain()


EXPLAINED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "plain": (plain, LAYER),
    "weight_norm": (lambda: changed(old_weight_norm), LAYER),
    "weight_norm by parametrization": (lambda: changed(parametrizations.weight_norm), LAYER),
    "spectral_norm": (lambda: changed(torch.nn.utils.spectral_norm), LAYER),
    "pruned": (lambda: changed(lambda m: prune.l1_unstructured(m, "weight", 0.5)), LAYER),
    "keeps its activations": (lambda: run_once(KeepsActivations()), "body.3"),
    "holds a lock": (HoldsALock, "body.3"),
    "holds a generator": (HoldsAGenerator, "body.3"),
    "refuses eval": (RefusesEval, "body.3"),
    "ignores eval": (IgnoresEval, "body.3"),
    "compiled": (lambda: torch.compile(plain()), LAYER),
    "DataParallel": (lambda: nn.DataParallel(plain()), LAYER),
    "float16": (lambda: plain().half(), LAYER),
    "bfloat16": (lambda: plain().bfloat16(), LAYER),
    "float64": (lambda: plain().double(), LAYER),
    "torch.fx": (lambda: torch.fx.symbolic_trace(plain()), LAYER),
}
REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "scripted": (lambda: scripted(lambda: torch.jit.script(plain())), "is TorchScript"),
    "traced": (lambda: scripted(lambda: torch.jit.trace(plain(), torch.rand(2, 3, 16, 16))), "is TorchScript"),
    "quantised": (quantised, r"is quantised \(Linear\)"),
    "lazy": (lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(4)), "lazy layers without weights"),
    "meta": (on_meta, "on the meta device"),
    "raises for two images": (RaisesForSeveral, "does not run on inputs .*one by one please"),
}


@pytest.mark.parametrize("name", EXPLAINED)
def test_what_is_explained_has_the_right_values(name: str) -> None:
    """Layers and logits are those of the network, and its layer put back in its place changes no logit."""
    make, layer = EXPLAINED[name]
    given_ = make()
    state = {k: v.clone() for k, v in given_.state_dict().items() if isinstance(v, Tensor)}
    own = load_classifier(given_, preprocessing=SPEC)
    assert not any(module.training for module in own.net.modules())
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad(), Taps(own.net, layer, stop=False) as taps:
        activation, logits = taps(images)[layer], taps.logits
        expected = reference(name, given_, images)
        torch.testing.assert_close(logits, expected, atol=2e-2 if "float16" in name else 1e-5, rtol=1e-2)
        tail = Tail(own, layer, example=images)
        torch.testing.assert_close(tail(activation, images=images), logits, atol=1e-5, rtol=1e-4)
    assert activation.dtype == torch.float32
    assert len(own.weights_hash) == 64
    assert all(torch.equal(v, state[k]) for k, v in given_.state_dict().items() if k in state)


def reference(name: str, net: nn.Module, images: Tensor) -> Tensor:
    """What the network itself answers in eval mode."""
    if name == "compiled":
        return plain().eval()(images)  # type: ignore[no-any-return]
    if name in ("refuses eval", "ignores eval"):
        return net.body.eval()(images)  # type: ignore[no-any-return, union-attr, operator]
    dtype = next(net.parameters()).dtype
    return net.eval()(images.to(dtype)).float()  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_explained_is_refused_in_one_line(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(UserError, match=message) as caught:
        load_classifier(make(), preprocessing=SPEC)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm", "pruned", "keeps its activations", "holds a lock"])
def test_untrained_copies_exist_too(name: str) -> None:
    net = EXPLAINED[name][0]()
    fresh = reinitialised(net, seed=1)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert not torch.allclose(net.eval()(images), fresh.eval()(images))


def test_a_copy_shares_no_tensor() -> None:
    net = run_once(KeepsActivations())
    other = copied(net)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
        other.kept["maps"][0].zero_()
    assert all(p.abs().sum() > 0 for p in list(net.parameters())[::2])
    assert net.kept["maps"][0].abs().sum() > 0  # type: ignore[union-attr, operator]
    with pytest.raises(RuntimeError):
        copy.deepcopy(net)  # what this is for


@pytest.mark.parametrize("net", [RandomInEval, RandomDepth])
def test_a_network_that_is_random_in_eval_mode_is_refused(net: type[Whole], tmp_path: Path) -> None:
    own = load_classifier(net(), preprocessing=SPEC)
    with pytest.raises(UserError, match=r"the network is random: .* differs by .* same images are given twice"):
        capture(own, open_images(torch.rand(6, 3, 16, 16)), ["body.3"], tmp_path / "store")
    assert not (tmp_path / "store").exists()


# -- precision of the store -------------------------------------------------------------------------------------------


class Scaled(Whole):
    """Activations of any magnitude."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.at = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        maps = self.at(self.body[:4](images) * self.scale)
        return self.body[4:](maps / self.scale)  # type: ignore[no-any-return]


@settings(max_examples=15, deadline=None)
@given(st.floats(-12, 6))
def test_a_store_keeps_activations_of_every_magnitude(exponent: float) -> None:
    images = torch.rand(5, 3, 16, 16)
    own = load_classifier(Scaled(10.0**exponent), preprocessing=SPEC)
    with tempfile.TemporaryDirectory() as folder:
        store = capture(own, open_images(images), ["at"], Path(folder) / "store")
        kept = torch.from_numpy(store.read("at", np.arange(5))).float()
        again = capture(own, open_images(images), ["at"], Path(folder) / "store")  # the same command is used again
        assert again.key == store.key
        with torch.no_grad(), Taps(own.net, "at") as taps:
            pixels = own.preprocessing.batch(torch.stack([own.preprocessing.bytes(i) for i in images_of(images)]))
            true = taps(pixels)["at"]
    assert float((kept - true).abs().sum() / true.abs().sum()) < 0.01
    assert store.key.dtype == ("float16" if -3 < exponent < 3 else store.key.dtype)


def images_of(images: Tensor) -> list[Any]:
    source = open_images(images)
    return [source.image(i) for i in range(len(source))]


def test_float32_is_said_and_what_float16_holds_stays(tmp_path: Path) -> None:
    lines: list[str] = []

    class Heard:
        def say(self, line: str) -> None:
            lines.append(line)

        def __getattr__(self, name: str) -> Any:
            return lambda *args, **kwargs: None

    images = open_images(torch.rand(5, 3, 16, 16))
    for scale, dtype in ((1.0, "float16"), (1e-8, "float32"), (1e6, "float32")):
        own = load_classifier(Scaled(scale), preprocessing=SPEC)
        store = capture(own, images, ["at"], tmp_path / f"{scale}", progress=Heard())  # type: ignore[arg-type]
        assert store.key.dtype == dtype
        assert any("kept in float32: layer 'at' reaches" in line for line in lines) == (dtype == "float32")
        lines.clear()
    asked = capture(own, images, ["at"], tmp_path / "asked", options=CaptureOptions(dtype="float32"))
    assert Store.open(asked.path).key.dtype == "float32"

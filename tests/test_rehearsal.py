"""The rehearsal finds what would end a run late, before the capture, and changes no result."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import netgloss
from netgloss.cli import main
from netgloss.data import ArraySource, Joined
from netgloss.errors import UserError
from netgloss.explainers.nmf import NMFConfig
from netgloss.workflows.rehearsal import Watch, check_of, few_images, unmatched_classes

NUMBERS = np.random.default_rng(0)


class Small(nn.Module):
    """Two layers and a head; ``behind`` is what lies between the second layer and the head."""

    def __init__(self, behind: Callable[[Tensor], Tensor] | None = None, before: Any = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.conv, self.relu, self.head = nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Linear(6, 3)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)
        self.behind, self.before = behind, before
        self.preprocessing_spec = {"size": 8, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}

    def forward(self, x: Tensor) -> Tensor:
        if self.before is not None:
            self.before(x)
        x = self.relu(self.conv(x))
        if self.behind is not None:
            x = self.behind(x)
        return self.head(x.mean(dim=(2, 3)))


def pictures(count: int = 40, classes: int = 4) -> ArraySource:
    pixels = np.random.default_rng(0).integers(0, 255, (count, 8, 8, 3), dtype=np.uint8)
    return ArraySource(pixels, targets=np.arange(count) % classes, class_names=[f"kind {c}" for c in range(classes)])


def explain(net: nn.Module, out: Path, method: str = "pca", layer: str = "relu", **fields: Any) -> netgloss.Run:
    fields = {"num_concepts": 3, "device": "cpu"} | fields
    return netgloss.explain(method, net, layer, pictures(), out=out, seeds=1, **fields)


class _Inference(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            return x * 2


class _Checkpointed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        found: Tensor = checkpoint(torch.tanh, x, use_reentrant=True)  # type: ignore[no-untyped-call]
        return found


@pytest.mark.parametrize(
    "behind",
    [
        lambda x: x.detach(),
        lambda x: torch.from_numpy(x.cpu().numpy() * 2),
        _Inference(),
        _Checkpointed(),
    ],
    ids=["detach", "numpy", "inference mode", "checkpoint"],
)
def test_a_tail_without_gradient_is_found_before_the_capture(behind: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no gradient passes.*'relu'.*stage: \w+") as caught:
        explain(Small(behind), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert "--no-rehearsal" in str(caught.value)
    assert not (tmp_path / "run").exists()


def _alone(x: Tensor) -> None:
    if len(x) > 2:
        raise RuntimeError("shape [2] is invalid for input of this size")


@pytest.mark.parametrize(
    ("net", "layer", "method", "message"),
    [
        (Small(), "conv", "nmf", r"NMF needs activations >= 0.*stage: capture"),
        (Small(lambda x: x / (x * 0)), "relu", "pca", r"logits are NaN or Inf.*stage: capture"),
        (Small(before=_alone), "relu", "pca", r"invalid for input.*stage: capture"),
    ],
    ids=["signed", "NaN", "batches"],
)
def test_what_ends_a_run_late_ends_it_at_once(
    net: nn.Module, layer: str, method: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        explain(net, tmp_path / "run", method, layer)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("bias", [-1e4, 0.0])
def test_a_dead_layer_is_refused(bias: float, tmp_path: Path) -> None:
    net = Small()
    nn.init.zeros_(net.conv.weight)
    nn.init.constant_(net.conv.bias, bias)
    with pytest.raises(UserError, match=r"layer 'relu' is dead: it is 0 for 4 different images.*stage: capture"):
        explain(net, tmp_path / "run")


def test_equal_images_are_no_dead_layer(tmp_path: Path) -> None:
    grey = ArraySource(np.full((6, 8, 8, 3), 99, np.uint8))
    netgloss.explain(
        "random-directions", Small(), "relu", grey, out=tmp_path / "run", seeds=1, num_concepts=2, device="cpu"
    )


def test_a_network_that_refuses_batches_is_refused_when_it_is_loaded() -> None:
    def one(x: Tensor) -> None:
        if len(x) != 1:
            raise RuntimeError("one image at a time")

    with pytest.raises(UserError, match=r"does not run on inputs \(2, 3, 8, 8\): one image at a time"):
        netgloss.load_classifier(Small(before=one))


def test_a_class_folder_need_not_be_utf8(tmp_path: Path) -> None:
    source = netgloss.open_images("critters:12")
    for i, name in enumerate([b"caf\xe9", b"ok"] * 6):
        folder = os.path.join(os.fsencode(tmp_path), b"images", name)
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, b"%d.png" % i), "wb") as file:
            source.image(i).save(file, "PNG")
    run = netgloss.explain("pca", "critters", "block5", tmp_path / "images", out=tmp_path / "run", num_concepts=2,
                           seeds=1, device="cpu")  # fmt: skip
    assert r"caf\xe9" in {entry["label"] for entry in run.concepts["images"]}
    assert r"caf\\xe9" in (run.path / "report.html").read_text("utf-8")


def test_evaluate_finds_a_missing_gradient_before_the_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from netgloss.workflows import evaluate as verb

    net = netgloss.load_classifier(Small(lambda x: x.detach()))
    store = netgloss.capture(net, pictures(), ["relu"], tmp_path / "store")
    run = netgloss.fit("pca", store, "relu", tmp_path / "run", seeds=1, device="cpu", classifier=net,
                       config=netgloss.find_explainer("pca").Config(num_concepts=3))  # fmt: skip
    scored: list[Any] = []
    monkeypatch.setattr(verb, "evaluate_subjects", lambda *a, **k: scored.append(a))
    with pytest.raises(UserError, match=r"no gradient passes.*found before the scores"):
        netgloss.evaluate(run, images=pictures(), store=store, classifier=net, device="cpu")
    assert not scored


# -- it changes nothing -----------------------------------------------------------------------------------------------


class _Dice(nn.Module):
    """Draws from every global generator."""

    def forward(self, x: Tensor) -> Tensor:
        import random

        torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002
        return x


@pytest.mark.parametrize("method", ["nmf", "topk-sae"])
def test_results_are_the_same_bytes_without_it(method: str, tmp_path: Path) -> None:
    more = {"steps": 20, "top_k": 2} if method == "topk-sae" else {}
    made = []
    for rehearsal in (True, False):
        torch.manual_seed(5)
        run = explain(Small(_Dice()), tmp_path / str(rehearsal), method, rehearsal=rehearsal, **more)
        made.append([(run.path / name).read_bytes() for name in ("scores.json", "concepts.json",
                                                                 "explainer.safetensors")])  # fmt: skip
        made[-1].append(torch.get_rng_state().numpy().tobytes())
    assert made[0] == made[1]


def test_generators_are_put_back(tmp_path: Path) -> None:
    import random

    states = []
    for rehearsal in (True, False):
        torch.manual_seed(1), random.seed(2), np.random.seed(3)  # noqa: NPY002
        with pytest.raises(RuntimeError, match="stop"):
            explain(Small(_Dice()), tmp_path / str(rehearsal), rehearsal=rehearsal, device=_stops_at_capture())
        states.append((torch.rand(1).item(), random.random(), np.random.rand()))  # noqa: NPY002
    assert states[0] == states[1]


def _stops_at_capture() -> netgloss.Execution:
    class Stops(Watch):
        def start(self, task: str, total: int, *, unit: str, done: int = 0) -> None:
            raise RuntimeError("stop")

    return netgloss.Execution("cpu", progress=Stops())


def test_it_runs_once_and_only_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from netgloss.workflows import explain as verb

    calls: list[int] = []
    original = verb.rehearse
    monkeypatch.setattr(verb, "rehearse", lambda *a, **k: calls.append(1) or original(*a, **k))
    explain(Small(), tmp_path / "run")
    explain(Small(), tmp_path / "run")
    explain(Small(), tmp_path / "other", rehearsal=False)
    assert len(calls) == 1


# -- what it does not take for a failure ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", netgloss.explainer_names())
def test_no_method_fails_for_want_of_images(method: str, tmp_path: Path) -> None:
    """With 200 concepts, which four images cannot give."""
    if method in ("supervised-basis", "cladec", "parts", "basis", "linear-head", "srae"):
        fields: dict[str, Any] = {"num_concepts": 0} if method in ("cladec", "parts", "basis") else {}
        if method == "supervised-basis":
            fields = {"annotations": "own"}
    else:
        fields = {"num_concepts": 60}
    stops = netgloss.Execution("cpu", progress=_stops_at_capture().progress)
    config = netgloss.find_explainer(method).Config(**fields)
    with pytest.raises(RuntimeError, match="stop"):
        netgloss.explain(
            method, "critters", "block5", "critters:90", out=tmp_path / "run", seeds=1, device=stops, config=config
        )


def test_a_class_that_the_four_images_lack_is_no_failure(tmp_path: Path) -> None:
    source = netgloss.open_images("critters:90")
    last = source.class_names[-1]
    config = netgloss.find_explainer("linear-head").Config(classes=(last,))
    with pytest.raises(RuntimeError, match="stop"):
        netgloss.explain("linear-head", "critters", "block5", source, out=tmp_path / "run", seeds=1, config=config,
                         device=_stops_at_capture())  # fmt: skip
    config = netgloss.find_explainer("linear-head").Config(classes=("no such class",))
    with pytest.raises(UserError, match=r"no such class.*stage: options"):
        netgloss.explain("linear-head", "critters", "block5", source, out=tmp_path / "run", seeds=1, config=config)


# -- the images -------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-1, 5), min_size=1, max_size=80), st.sets(st.integers(0, 79)), st.sampled_from([4, 64]))
def test_images_are_readable_and_of_several_classes(targets: list[int], broken: set[int], count: int) -> None:
    class Some(ArraySource):
        def image(self, i: int) -> Any:
            if i in broken:
                raise UserError("broken")
            return super().image(i)

    pixels = np.zeros((len(targets), 2, 2, 3), np.uint8)
    source = Some(pixels, targets=np.array(targets), class_names=list("abcdef"))
    some = few_images(source, count)
    whole = [i for i in range(len(targets)) if i not in broken]
    if some is None:
        assert not whole or broken
        return
    chosen = [source.ids.index(name) for name in some.ids]
    assert 0 < len(chosen) <= count
    assert not set(chosen) & broken
    assert sorted(set(chosen)) == chosen
    if not broken:
        assert len(chosen) == min(count, len(targets))
        by_class = [sum(targets[i] == c for i in range(len(targets))) for c in set(targets)]
        if sum(n >= 2 for n in by_class) == len(by_class) > 1:
            assert len({targets[i] for i in chosen}) > 1


def test_both_of_joined_sources() -> None:
    joined = Joined(pictures(30), pictures(20))
    some = few_images(joined, 4)
    assert isinstance(some, Joined)
    assert some.num_fit == 2
    assert len(some) == 4


# -- the first batch --------------------------------------------------------------------------------------------------


def test_the_capture_ends_with_the_first_batch_that_the_method_cannot_take(tmp_path: Path) -> None:
    seen = []
    net = Small(before=lambda x: seen.append(len(x)))
    classifier = netgloss.load_classifier(net)
    seen.clear()
    options = netgloss.CaptureOptions(batch_size=6)
    check = check_of({"nmf": NMFConfig()}, "conv")
    with pytest.raises(UserError, match="NMF needs activations >= 0, but layer 'conv'"):
        netgloss.capture(classifier, pictures(), ["conv"], tmp_path / "store", options=options, check=check)
    assert seen.count(6) == 1
    clipped = check_of({"nmf": NMFConfig(negative="clip")}, "conv")
    netgloss.capture(classifier, pictures(), ["conv"], tmp_path / "clip", options=options, check=clipped)
    of_another = check_of({"nmf": NMFConfig()}, "relu")
    netgloss.capture(classifier, pictures(), ["conv"], tmp_path / "other", options=options, check=of_another)


def test_class_names_that_do_not_match_are_named() -> None:
    classifier = netgloss.load_classifier(Small(), class_names=["kind 0", "kind-1", "other"])
    note = unmatched_classes(classifier, pictures())
    assert note.startswith("2 of 4 class names of the images")
    assert "kind 2, kind 3" in note
    assert unmatched_classes(classifier, pictures(classes=2)) == ""
    assert unmatched_classes(classifier, ArraySource(np.zeros((2, 8, 8, 3), np.uint8))) == ""


# -- compare and the command line -------------------------------------------------------------------------------------


class _Heard(Watch):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def start(self, task: str, total: int, *, unit: str, done: int = 0) -> None:
        self.lines.append(task)

    def say(self, message: str) -> None:
        self.lines.append(message)


def test_a_comparison_says_first_which_methods_it_will_leave_out(tmp_path: Path) -> None:
    heard = _Heard()
    common: dict[str, Any] = {
        "methods": "nmf,pca",
        "layer": "conv",
        "images": pictures(),
        "num_concepts": 3,
        "seeds": 1,
        "faithfulness": netgloss.FaithfulnessOptions(images=4, importance_images=1),
    }
    device = netgloss.Execution("cpu", progress=heard)
    found = netgloss.compare(out=tmp_path / "a", model=Small(), device=device, **common)
    before = list(itertools.takewhile(lambda line: line != "capture", heard.lines))
    assert any(line.startswith("nmf: will be left out: NMF needs activations >= 0") for line in before)
    assert found.methods == ["pca"]
    again = netgloss.compare(out=tmp_path / "b", model=Small(), device="cpu", rehearsal=False, **common)
    same = [{k: v for k, v in f.record.items() if k in ("scores", "verdicts", "differences")} for f in (found, again)]
    assert json.dumps(same[0]) == json.dumps(same[1])


def test_a_comparison_without_gradient_ends_at_once(tmp_path: Path) -> None:
    common: dict[str, Any] = {"model": Small(lambda x: x.detach()), "layer": "relu", "images": pictures(), "seeds": 1}
    with pytest.raises(UserError, match=r"no gradient passes.*--faithfulness-images 0.*stage: faithfulness"):
        netgloss.compare(out=tmp_path / "a", methods="pca", num_concepts=3, device="cpu", **common)
    assert not (tmp_path / "a").exists()
    without = netgloss.FaithfulnessOptions(images=0)
    found = netgloss.compare(out=tmp_path / "a", methods="pca", num_concepts=3, device="cpu", faithfulness=without,
                             **common)  # fmt: skip
    assert "r2" in found.metrics


def test_wrong_annotations_end_a_comparison_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        netgloss.compare(out=tmp_path / "a", model=Small(), methods="pca", layer="relu", images=pictures(),
                         annotations=str(tmp_path / "nowhere"), device="cpu")  # fmt: skip
    assert not (tmp_path / "a").exists()


def test_the_command_has_a_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["explain", "nmf", "--model", "critters", "--layer", "block5.conv", "--images", "critters:20", "--out",
              str(tmp_path / "run"), "--seeds", "1"]  # fmt: skip
    for flags, said in ([], True), (["--no-rehearsal"], False):
        with pytest.raises(SystemExit) as ended:
            main([*common, *flags])
        assert ended.value.code == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("netgloss: NMF needs activations >= 0")
        assert ("[stage: capture; found by a rehearsal on 4 images" in error) == said

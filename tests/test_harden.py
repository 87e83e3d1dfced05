"""Hardening: losses against hand computation, arms that must be equal, exact resume, checkpoints that load again."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import netgloss
from netgloss.adversarial import PixelClassifier
from netgloss.adversarial.arms import (
    ARMS,
    craft,
    draw_targets,
    feature_distance,
    find_arm,
    kl_divergence,
    loss_terms,
    needs_crafting,
)
from netgloss.adversarial.harden import (
    DivergedError,
    HardenConfig,
    Hardening,
    HardeningStep,
    _HardenTraining,
    overfits,
    split_training,
)
from netgloss.adversarial.pixels import load_pixels
from netgloss.adversarial.robustness import (
    Attacked,
    AttackPlan,
    autoattack_accuracies,
    masking_failures,
    predictions,
    robust_accuracies,
    surviving,
)
from netgloss.classifiers import Classifier, load_classifier
from netgloss.data.sources import ArraySource
from netgloss.errors import UserError
from netgloss.metrics.feature_health import (
    class_mean_ratio,
    effective_rank,
    response_correlation,
    source_vs_nearest_target_ratio,
)
from netgloss.training import FitOptions, make_fabric

NET = """
import torch
from torch import nn

class Net(nn.Module):
    class_names = ("<b>dark</b>", "light", "striped")
    preprocessing_spec = {"size": [8, 8], "resize": None, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]}

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.drop(self.conv(x).mean((2, 3))))

def net():
    torch.manual_seed(0)
    return Net()
"""
CLASSES = ["<b>dark</b>", "light", "striped"]


@pytest.fixture
def classifier(tmp_path: Path) -> Classifier:
    path = tmp_path / "net.py"
    path.write_text(NET)
    return load_classifier(f"{path}:net", random_weights=True, seed=1)


def pictures(each: int = 14, *, seed: int = 0) -> ArraySource:
    """Three classes that a small net can tell: dark, light and striped pictures with noise."""
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 60, (3 * each, 8, 8, 3))
    y = np.repeat(np.arange(3), each)
    x[y == 1] += 150
    x[y == 2, :, ::2] += 120
    order = rng.permutation(len(y))
    return ArraySource(x[order].astype(np.uint8), y[order], CLASSES)


def small(**changes: Any) -> HardenConfig:
    values: dict[str, Any] = {"epochs": 2, "batch_size": 8, "check_steps": 2, "check_images": 6, "lr": 0.05, "eps": 8}
    return HardenConfig(**{**values, **changes})


def states(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# -- losses -----------------------------------------------------------------------------------------------------------


def test_distance_by_hand() -> None:
    phi = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    other = torch.tensor([[3.0, 1.0], [2.0, 2.0]])
    assert float(feature_distance(phi, other)) == pytest.approx((9 / 25 + 4 / 4) / 2, rel=1e-5)
    assert float(feature_distance(phi, other, kind="pivot")) == pytest.approx((9 / 25 + 4 / 4) / 2, rel=1e-5)
    assert float(feature_distance(phi, other, kind="l2")) == pytest.approx(6.5)
    assert float(feature_distance(phi, phi)) == 0
    for c in (0.0, 0.5, 0.9, 2.0):
        assert float(feature_distance(phi, c * phi)) == pytest.approx((1 - c) ** 2, abs=1e-5)
    with pytest.raises(UserError, match="same shape"):
        feature_distance(phi, other[:1])


def test_gradients_of_the_distance() -> None:
    phi = torch.tensor([[3.0, 4.0]], requires_grad=True)
    other = torch.tensor([[3.0, 1.0]], requires_grad=True)
    feature_distance(phi, other).backward()
    expected = 2 * (phi - other).detach() / (25 + 1e-6)  # the denominator gives no gradient
    assert torch.allclose(phi.grad, expected)
    assert torch.allclose(other.grad, -expected)
    phi.grad = None
    feature_distance(phi, other, kind="pivot").backward()
    assert phi.grad is None


def test_terms_of_every_arm_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 5, 3, generator=generator)
    y, d = torch.tensor([0, 1, 2, 0, 1]), torch.tensor(0.3)
    clean, fake = float(F.cross_entropy(a, y)), float(F.cross_entropy(b, y))

    def terms(name: str, alpha: float = 0.4, beta: float = 2.0) -> dict[str, float]:
        arm = find_arm(name)
        crafted = needs_crafting(arm, alpha=alpha, beta=beta)
        found = loss_terms(
            arm,
            a,
            y,
            adversarial_logits=b if crafted else None,
            distance=d if crafted else None,
            alpha=alpha,
            beta=beta,
        )
        return {key: pytest.approx(float(value), rel=1e-5) for key, value in found.items()}

    mixed = {"clean": 0.4 * clean, "adversarial": 0.6 * fake}
    assert terms("clean") == {"clean": clean}
    assert terms("at") == terms("pgd-at") == mixed
    assert terms("consistent") == terms("pgd-consistent") == terms("noise") == {**mixed, "features": 0.6}
    assert terms("consistent-only") == {"clean": clean, "features": 0.6}
    assert terms("consistent", beta=0.0) == mixed
    assert terms("consistent", alpha=1.0, beta=0.0) == {"clean": clean}
    p = a.softmax(1)
    kl = float((p * (p.log() - b.log_softmax(1))).sum(1).mean())
    assert terms("trades") == {"clean": clean, "kl": 6 * kl}
    assert float(kl_divergence(a, a)) == pytest.approx(0, abs=1e-6)
    assert [name for name in ARMS if not needs_crafting(ARMS[name], alpha=1.0, beta=0.0)] == [
        "clean", "noise", "at", "consistent-only", "consistent", "pgd-at", "pgd-consistent",
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"did you mean.*consistent"):
        find_arm("consistant")


@pytest.mark.parametrize("kind", ["noise", "fgsm", "pgd", "trades"])
def test_crafted_images(kind: Any, classifier: Classifier) -> None:
    data = load_pixels(classifier, pictures())
    pixels = PixelClassifier.of(classifier)
    x, y = data.pixels(), data.labels
    targets = draw_targets(y, torch.arange(3), generator=torch.Generator().manual_seed(0))
    made = [
        craft(kind, pixels, x, y, targets, eps=0.06, generator=torch.Generator().manual_seed(s), steps=4)
        for s in (3, 3, 4)
    ]
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])
    assert not made[0].requires_grad
    assert float((made[0] - x).abs().max()) <= 0.06 + 1e-6
    assert float(made[0].min()) >= 0
    assert float(made[0].max()) <= 1
    still = craft(kind, pixels, x, y, targets, eps=0.0, generator=torch.Generator().manual_seed(3))
    assert torch.equal(still, x)  # so that d = 0
    assert pixels.net.training is False


def test_fgsm_craft_is_the_formula() -> None:
    """Two linear classes: x* = P(x + d0 - a sign g) with g from the target's loss."""
    layer = nn.Linear(12, 2)
    pixels = PixelClassifier(nn.Sequential(nn.Flatten(), layer), (0.0,) * 3, (1.0,) * 3)
    x = 0.3 + 0.4 * torch.rand(4, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    y, targets = torch.zeros(4, dtype=torch.long), torch.ones(4, dtype=torch.long)
    d0 = (torch.rand(x.shape, generator=torch.Generator().manual_seed(5)) * 2 - 1) * 0.1
    down = (layer.weight[1] - layer.weight[0]).detach().sign().view(1, 3, 2, 2)
    expected = torch.minimum(torch.maximum(x + d0 + 0.125 * down, x - 0.1), x + 0.1).clamp(0, 1)
    made = craft("fgsm", pixels, x, y, targets, eps=0.1, generator=torch.Generator().manual_seed(5))
    assert torch.allclose(made, expected, atol=1e-6)


def test_targets_are_uniform_over_the_others() -> None:
    classes = torch.tensor([3, 10, 42, 700])
    labels = classes.repeat(500)
    targets = draw_targets(labels, classes, generator=torch.Generator().manual_seed(0))
    assert not (targets == labels).any()
    for c in classes.tolist():
        counts = torch.stack([(targets[labels == c] == t).sum() for t in classes if t != c])
        assert int(counts.min()) > 120
    with pytest.raises(UserError, match="two classes"):
        draw_targets(torch.zeros(2, dtype=torch.long), torch.zeros(1, dtype=torch.long), generator=torch.Generator())


def test_feature_term_reaches_nothing_above_phi(classifier: Classifier) -> None:
    data = load_pixels(classifier, pictures(4))
    net = classifier.net.requires_grad_(True)
    step = HardeningStep(PixelClassifier(net, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)), "conv", "consistent", small())
    x = data.pixels()
    terms, beside = step.losses(x, data.labels, (x + 0.02).clamp(0, 1), 1.0)
    terms["features"].backward()
    assert net.head.weight.grad is None
    assert float(net.conv[0].weight.grad.abs().sum()) > 0
    assert beside["distance"] == pytest.approx(float(terms["features"].detach()))
    same_images, _ = step.losses(x, data.labels, x, 1.0)
    net.eval()
    same_images, _ = step.losses(x, data.labels, x, 1.0)
    assert float(same_images["features"]) == 0


# -- the loop ---------------------------------------------------------------------------------------------------------


def run(classifier: Classifier, arm: str, config: HardenConfig, seed: int = 0, **options: Any) -> Any:
    return Hardening(classifier, load_pixels(classifier, pictures()), "conv", arm, config, seed).run(**options)


def training(classifier: Classifier, pixels: PixelClassifier, arm: str, config: HardenConfig) -> _HardenTraining:
    data, watch = load_pixels(classifier, pictures()), (make_fabric("cpu"), None, FitOptions(), None)
    module, index = HardeningStep(pixels, "conv", arm, config), torch.arange(20)
    return _HardenTraining(module, data, index, index, 0, find_arm(arm).crafting, watch)


def test_beta_zero_is_adversarial_training_bit_for_bit(classifier: Classifier) -> None:
    before = states(classifier.net)
    at, none, full = (
        run(classifier, arm, small(beta=b)).net for arm, b in (("at", 1.0), ("consistent", 0.0), ("consistent", 1.0))
    )
    assert same(at, none)
    assert not same(at, full)
    assert all(torch.equal(value, before[name]) for name, value in classifier.net.state_dict().items())
    assert not any(p.requires_grad for p in classifier.net.parameters())


def test_alpha_one_beta_zero_crafts_nothing_and_is_clean_training(
    classifier: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **options: Any) -> Tensor:
        raise AssertionError("crafted")

    clean = run(classifier, "clean", small()).net
    monkeypatch.setattr("netgloss.adversarial.harden.craft", refuse)
    assert same(clean, run(classifier, "consistent", small(alpha=1.0, beta=0.0)).net)


def test_clean_arm_by_hand(classifier: Classifier) -> None:
    """One epoch of the loop against plain SGD with frozen statistics, on a net without dropout."""
    classifier.net.drop.p = 0.0
    config = small(epochs=1, batch_size=100, lr=0.1)
    data = load_pixels(classifier, pictures())
    fit, held = split_training(data, config.holdout)
    assert sorted([*fit.tolist(), *held.tolist()]) == list(range(len(data)))
    assert data.probe_labels[held].bincount().tolist() == [1, 1, 1]
    found = Hardening(classifier, data, "conv", "clean", config).run()
    net = classifier.untrained(0).net
    net.load_state_dict(classifier.net.state_dict())
    net.requires_grad_(True).eval()
    x = (data.pixels(fit) - torch.tensor([0.4, 0.5, 0.6])[:, None, None]) / torch.tensor([0.2, 0.3, 0.25])[
        :, None, None
    ]
    order = torch.from_numpy(np.random.default_rng([0, 0]).permutation(len(fit)))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    F.cross_entropy(net(x[order]), data.labels[fit][order]).backward()
    optimizer.step()
    for (name, ours), theirs in zip(found.net.state_dict().items(), net.state_dict().values(), strict=True):
        assert torch.allclose(ours.float(), theirs.float(), atol=1e-5), name


def test_frozen_statistics_and_from_scratch(classifier: Classifier) -> None:
    classifier.net.conv[1].running_mean.uniform_(0.1, 0.2)
    tuned = run(classifier, "consistent", small()).net
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(getattr(tuned.conv[1], name), getattr(classifier.net.conv[1], name))
    assert not torch.equal(tuned.conv[1].weight, classifier.net.conv[1].weight)
    scratch = [run(classifier, "consistent", small(from_scratch=True), seed=s).net for s in (0, 1)]
    assert int(scratch[0].conv[1].num_batches_tracked) > 0
    assert not same(*scratch)


def test_training_keeps_the_best_epoch(classifier: Classifier) -> None:
    found = run(classifier, "at", small(epochs=8, lr=0.2, check_images=40, holdout=0.3))
    assert found.checks[-1]["clean"] >= 0.9
    assert found.best_epoch >= 1
    assert found.selection == max((c["clean"] + c["pgd"]) / 2 for c in found.checks[1:])
    assert {"clean", "fgsm_rs", "pgd", "feature_norm", "effective_rank"} == set(found.checks[0])


def two_cues(each: int) -> ArraySource:
    """Two cues of the class: a tint of 3/255, always right, and brightness, wrong in a tenth of the images.

    An attacker of 4/255 can change the tint, and not the brightness (after Tsipras et al., arXiv 1805.12152).
    """
    rng = np.random.default_rng(0)
    y = rng.permutation(np.repeat(np.arange(3), each))
    bright = np.where(rng.random(len(y)) < 0.1, rng.integers(0, 3, len(y)), y)
    x = np.full((len(y), 8, 8, 3), 70) + 50 * bright[:, None, None, None]
    x[np.arange(len(y)), :, :, y] += 3
    return ArraySource(x.astype(np.uint8), y, CLASSES)


@pytest.fixture
def fragile(classifier: Classifier) -> Classifier:
    """A network that reads the tint only: channel c is (x_c - mean of the colours), strongly scaled."""
    net, mean, std = classifier.net, torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.25])
    with torch.no_grad():
        net.conv[0].weight[:3] = 0
        net.conv[0].weight[:3, :, 1, 1] = (torch.eye(3) - 1 / 3) * std
        net.conv[0].bias[:3] = (torch.eye(3) - 1 / 3) @ mean
        net.head.weight.zero_()
        net.head.weight[:, :3] = 20 * torch.eye(3)
        net.head.bias.zero_()
        pixels = load_pixels(classifier, two_cues(120)).pixels()
        with_statistics = net.conv[1]
        with_statistics.momentum = 1.0  # the statistics are those of all images
        net.train()(pixels.sub(mean[:, None, None]).div(std[:, None, None]))
        with_statistics.momentum = 0.1
        net.eval()
    return classifier


def test_hardening_raises_the_accuracy_under_attack(fragile: Classifier) -> None:
    """From next to nothing to that of brightness; training on without attacks does not."""
    config = small(epochs=12, batch_size=16, lr=0.05, clip=1.0, eps=4, holdout=0.3, check_images=200, check_steps=20)
    pixels = load_pixels(fragile, two_cues(120))
    found = {arm: Hardening(fragile, pixels, "conv", arm, config, 0).run() for arm in ("at", "consistent", "clean")}
    after = {arm: one.checks[one.best_epoch]["pgd"] for arm, one in found.items()}
    before = found["at"].checks[0]
    assert before["clean"] == 1
    assert before["pgd"] < 0.1
    assert after["at"] > 0.7
    assert after["consistent"] > 0.7
    assert after["clean"] < 0.2


def test_keep_zeros(classifier: Classifier) -> None:
    with torch.no_grad():
        classifier.net.conv[0].weight[:, 0] = 0
    kept, lost = (run(classifier, "clean", small(keep_zeros=k, epochs=1)).net for k in (True, False))
    assert float(kept.conv[0].weight[:, 0].abs().max()) == 0
    assert float(lost.conv[0].weight[:, 0].abs().max()) > 0


class Killed(Exception):
    """Stands for kill -9: nothing after it is saved."""


class Memory:
    """A checkpoint that dies after so many saves."""

    def __init__(self, after: int | None) -> None:
        self.after, self.saved, self.count = after, None, 0

    def load(self) -> Any:
        return self.saved

    def save(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        self.count += 1
        self.saved = ({n: t.clone() for n, t in tensors.items()}, json.loads(json.dumps(values)))
        if self.after is not None and self.count == self.after:
            raise Killed


@pytest.mark.parametrize("after", [1, 3, 5])
@pytest.mark.parametrize("arm", ["consistent", "trades"])
def test_resume_is_bit_equal(classifier: Classifier, arm: str, after: int) -> None:
    options = FitOptions(checkpoint_seconds=-1, log_every=1)
    whole = run(classifier, arm, small(craft_steps=2), options=options)
    memory = Memory(after)
    with pytest.raises(Killed):
        run(classifier, arm, small(craft_steps=2), options=options, checkpoint=memory)
    memory.after = None
    lines: list[dict[str, Any]] = []
    again = run(classifier, arm, small(craft_steps=2), options=options, checkpoint=memory, log=lines.append)
    assert lines[0]["step"] == after + 1
    assert same(whole.net, again.net)
    assert whole.checks == again.checks
    assert whole.best_epoch == again.best_epoch


@pytest.mark.filterwarnings("ignore:for .*no-op")
def test_a_resumed_momentum_is_on_the_device_of_the_weights(
    classifier: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = Memory(1)
    with pytest.raises(Killed):
        run(classifier, "clean", small(), options=FitOptions(checkpoint_seconds=-1, log_every=1), checkpoint=memory)
    found: list[Any] = []

    def kept(loop: _HardenTraining) -> None:
        found.extend(entry["momentum_buffer"].device for entry in loop.optimizer.state.values())
        raise Killed

    monkeypatch.setattr(_HardenTraining, "prepare", kept)
    elsewhere = SimpleNamespace(device=torch.device("meta"))
    with pytest.raises(Killed):
        run(classifier, "clean", small(), fabric=elsewhere, checkpoint=memory)
    assert set(found) == {elsewhere.device}


def test_seeds_differ_and_the_global_generator_is_left_alone(classifier: Classifier) -> None:
    state = torch.get_rng_state()
    a, b, c = (run(classifier, "noise", small(), seed=s).net for s in (0, 0, 1))
    assert same(a, b)
    assert not same(a, c)
    assert torch.equal(torch.get_rng_state(), state)


def test_nan_names_the_step(classifier: Classifier) -> None:
    with pytest.raises(DivergedError, match=r"arm 'at' became NaN or Inf at step \d+ \(clean = .*lower --lr"):
        run(classifier, "at", small(lr=1e30, epochs=4))


def test_overfitting_is_noticed() -> None:
    def check(pgd: float, fgsm: float) -> dict[str, float]:
        return {"clean": 0.9, "pgd": pgd, "fgsm_rs": fgsm, "feature_norm": 1.0, "effective_rank": 1.0}

    assert not overfits([check(0.4, 0.6), check(0.31, 0.7)])
    assert overfits([check(0.4, 0.6), check(0.29, 0.6)])
    assert not overfits([check(0.4, 0.6), check(0.29, 0.5)])  # FGSM fell as well: no overfitting to the step


def test_planted_history_switches_to_pgd(classifier: Classifier) -> None:
    config = small(craft_steps=3)
    for arm, switched in (("consistent", 2), ("pgd-at", None)):
        pixels = PixelClassifier(classifier.untrained(0).net.requires_grad_(True), (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
        loop = training(classifier, pixels, arm, config)

        def planted(pgd: float, fgsm: float) -> dict[str, float]:
            return {"clean": 0.8, "pgd": pgd, "fgsm_rs": fgsm, "feature_norm": 1.0, "effective_rank": 1.0}

        loop.after_epoch(planted(0.0, 0.1))
        loop.after_epoch(planted(0.5, 0.6))
        best = states(loop.net)
        with torch.no_grad():
            loop.net.head.weight.add_(1)
        loop.after_epoch(planted(0.1, 0.9))
        assert loop.best_epoch == 1
        assert loop.switched == switched
        assert loop.crafting == "pgd"
        assert torch.equal(loop.net.head.weight, best["head.weight"]) == (switched is not None)
        assert any("on with PGD-3" in line for line in loop.warnings()) == (switched is not None)


def test_share_of_the_feature_term_is_warned_about(classifier: Classifier) -> None:
    assert any("feature term" in line for line in run(classifier, "consistent", small(beta=1e-4)).warnings)


def test_a_clipped_step_is_as_long_as_the_clip(classifier: Classifier) -> None:
    config = small(epochs=1, batch_size=100, lr=0.1, weight_decay=0.0, clip=0.01)
    found = run(classifier, "clean", config)
    moved = [
        (p - dict(classifier.net.named_parameters())[name]).square().sum() for name, p in found.net.named_parameters()
    ]
    assert float(torch.stack(moved).sum().sqrt()) == pytest.approx(0.1 * 0.01, rel=1e-3)


def test_a_network_that_lost_what_it_knew_is_warned_about(classifier: Classifier) -> None:
    for after, from_scratch, told in ((0.1, False, True), (0.8, False, False), (0.1, True, False)):
        config = small(from_scratch=from_scratch)
        pixels = PixelClassifier.of(classifier)
        loop = training(classifier, pixels, "trades", config)
        loop.checks, loop.best_epoch = [{"clean": 0.9}, {"clean": after}], 1
        assert any("fell from 0.90 to 0.10: lower --lr" in line for line in loop.warnings()) == told


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 1.5}, "alpha"),
        ({"clip": 0}, "clip"),
        ({"eps": 300}, "1/255"),
        ({"beta": -1}, "beta"),
        ({"epochs": 0}, "epochs"),
        ({"lr": 0}, "lr"),
        ({"holdout": 1}, "holdout"),
        ({"distance": "cosine"}, "distance"),
    ],
)
def test_settings_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        small(**changes)


def test_images_that_do_not_fit(classifier: Classifier) -> None:
    x = np.zeros((4, 8, 8, 3), np.uint8)
    for source, message in (
        (ArraySource(x), "no labels"),
        (ArraySource(x, np.zeros(4, int), ["light"]), "two classes"),
        (ArraySource(x, np.array([0, 0, 1, 1]), ["light", "zebra"]), "zebra"),
    ):
        with pytest.raises(UserError, match=message):
            load_pixels(classifier, source)
    with pytest.raises(UserError, match="two at least"):
        Hardening(classifier, load_pixels(classifier, pictures(1)), "conv", "at").run()
    with pytest.raises(UserError, match="no layer"):
        Hardening(classifier, load_pixels(classifier, pictures(4)), "convv", "at").run()
    assert len(load_pixels(classifier, pictures(14), number=9)) == 9


# -- evaluation -------------------------------------------------------------------------------------------------------


def test_survivors_of_a_linear_network() -> None:
    """Margin m falls by eps |w|_1: an image survives if and only if m > eps |w|_1."""
    layer = nn.Linear(12, 2, bias=False)
    pixels = PixelClassifier(nn.Sequential(nn.Flatten(), layer), (0.0,) * 3, (1.0,) * 3)
    with torch.no_grad():
        layer.weight[0], layer.weight[1] = 1.0, -1.0
        layer.weight[:, 6:] *= -1
    x = torch.full((5, 3, 2, 2), 0.5)
    x.view(5, 12)[:, :6] += torch.tensor([0.0, 0.02, 0.04, 0.06, 0.08])[:, None]
    y = torch.zeros(5, dtype=torch.long)  # margin 2 * 6 * step, |w_0 - w_1|_1 = 24
    plan = AttackPlan(attack_steps=20, restarts=1, long_steps=0, feature_steps=0, l2=0.0)
    found = robust_accuracies(
        pixels, Attacked(x + 0.001 * (torch.arange(12) < 6).view(3, 2, 2), y), eps=0.025, plan=plan
    )
    assert found["clean"] == 1.0
    assert found["pgd-20"] == found["fgsm-rs"] == pytest.approx(0.4)  # 0.06 and 0.08 exceed 2 * 0.025
    assert found["pgd 2 eps"] == 0.0
    assert found["pgd-l2"] == 1.0
    assert "feature" not in found
    assert masking_failures(found) == []


def test_surviving_spends_no_start_on_the_fallen(classifier: Classifier) -> None:
    pixels = PixelClassifier.of(classifier)
    data = load_pixels(classifier, pictures())
    sizes: list[int] = []

    def attack(classifier: Any, x: Tensor, y: Tensor, *, ids: Any, seed: int) -> Any:
        sizes.append(len(x))
        from netgloss.adversarial import AttackResult

        other = torch.where(torch.arange(len(x)) % 2 == 0, y, (y + 1) % 3)
        return AttackResult(x, other, None, other != y, x.new_zeros(len(x)), x.new_zeros(len(x)))

    with torch.no_grad():
        right = int((pixels(data.pixels()).argmax(1) == data.labels).sum())
    alive = surviving(attack, pixels, data.pixels(), data.labels, restarts=3)
    assert sizes[0] == right
    assert sizes[1] == math.ceil(right / 2)
    assert int(alive.sum()) == math.ceil(math.ceil(math.ceil(right / 2) / 2) / 2)


def test_modes_come_back_after_a_failure() -> None:
    pixels = PixelClassifier(nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(5, 2)), (0.0,) * 3, (1.0,) * 3)
    pixels.net[1].eval()
    with pytest.raises(RuntimeError, match="shapes"):
        predictions(pixels, torch.zeros(2, 3, 2, 2))
    assert [part.training for part in pixels.net] == [True, False, True]


def test_masking_is_told() -> None:
    fine = {"pgd-20": 0.3, "pgd-100": 0.29, "transfer": 0.8, "fgsm-rs": 0.4, "noise": 0.9, "pgd 64/255": 0.0}
    assert masking_failures(fine) == []
    bad = {"pgd-20": 0.5, "pgd-100": 0.6, "transfer": 0.4, "fgsm-rs": 0.95, "noise": 0.9, "pgd 64/255": 0.3}
    assert len(masking_failures(bad)) == 4


def test_effective_rank_and_ratios() -> None:
    assert effective_rank(torch.eye(5)) == pytest.approx(5)
    assert effective_rank(torch.ones(7, 3)) == pytest.approx(1)
    assert math.isnan(effective_rank(torch.zeros(3, 3)))
    real = torch.tensor([[0.0, 0.0], [2.0, 0.0], [10.0, 0.0], [14.0, 0.0]])
    labels = torch.tensor([0, 0, 1, 1])
    phi = torch.tensor([[4.0, 0.0]])  # means 1 and 12; from source 1 (at 2) towards class 1 (nearest at 10)
    one = torch.tensor([0]), torch.tensor([1])
    assert float(class_mean_ratio(phi, real, labels, *one)) == pytest.approx(3 / 8)
    ratio = source_vs_nearest_target_ratio(phi, real, labels, torch.tensor([1]), torch.tensor([1]))
    assert float(ratio) == pytest.approx(2 / 6)
    with pytest.raises(UserError, match="real images"):
        class_mean_ratio(phi, real, labels, torch.tensor([0]), torch.tensor([2]))


def test_response_correlation_ignores_scale_and_is_undefined_for_constant_units() -> None:
    before = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(response_correlation(before, 2 * before), torch.ones(6, dtype=torch.float64))
    assert torch.isnan(response_correlation(before, torch.ones(50, 6))).all()


def test_checkpoint_loads_like_any_other(
    classifier: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from netgloss.workflows.harden import HardenPlan, harden, load_hardened

    plan = HardenPlan(arms=("clean", "consistent"), seeds=2, betas=(0.5, 2.0), k=4, v_steps=2, attack_images=9)
    attacks = AttackPlan(attack_steps=2, restarts=1, long_steps=3, feature_steps=2)
    options: dict[str, Any] = {
        "layer": "conv",
        "config": small(epochs=1),
        "plan": plan,
        "attacks": attacks,
        "device": "cpu",
    }
    out = tmp_path / "run"
    found = harden(classifier, pictures(), pictures(8, seed=1), out=out, **options)
    assert found.manifest["status"] == "complete"
    again = load_hardened(found, "consistent", 1)
    direct = netgloss.load_classifier(
        classifier.origin["name"], checkpoint=out / "hardened-consistent-seed1.safetensors"
    )
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again(x), direct(x))
    assert not torch.equal(again(x), classifier(x))
    told = json.loads((out / "hardened-consistent-seed1.json").read_text())
    assert told["parent_hash"] == classifier.weights_hash
    assert (told["arm"], told["seed"], told["format_version"]) == ("consistent", 1, 1)
    assert told["beta"] == found.manifest["beta_chosen"] in (0.5, 2.0)
    assert [s.metric for s in found.scores] == [
        "clean_accuracy", "robust_accuracy", "consistency_adversarial", "consistency_real",
    ]  # fmt: skip
    assert set(found.scores[0].baselines) == {"original", "clean"}
    page = (out / "report.html").read_text()
    assert "<b>dark</b>" not in page
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")
    for part in ("Signs of masked gradients", "checks for masked gradients"):
        if part in page:
            break
    else:
        raise AssertionError("the masking checks are not in the report")
    for name in ("pgd 2 eps", "least-likely", "transfer", "feature", "Training", "Before and after"):
        assert name in page
    assert not list(out.glob("*.checkpoint.safetensors"))
    monkeypatch.setattr("netgloss.trust._named", set())
    with pytest.raises(UserError, match="--trust-code"):
        load_hardened(found, "consistent", 1)
    stamp = (out / "hardened-clean-seed0.safetensors").stat().st_mtime_ns
    harden(classifier, pictures(), pictures(8, seed=1), out=out, **options)
    assert (out / "hardened-clean-seed0.safetensors").stat().st_mtime_ns == stamp
    result = json.loads((out / "result.json").read_text())
    (tmp_path / "outside-seed0.json").write_text((out / "judged-original.json").read_text())
    (out / "judged-").mkdir()
    result["arms"]["/../../outside"] = result["arms"]["original"]
    (out / "result.json").write_text(json.dumps(result))
    with pytest.raises(UserError, match=r"holds no evaluation of '/\.\./\.\./outside-seed0'"):
        netgloss.write_report(found)  # a name in a record is no way out of the folder
    with pytest.raises(UserError, match="another run"):
        harden(classifier, pictures(), pictures(8, seed=1), out=out, **{**options, "config": small(epochs=2)})
    monkeypatch.setattr("netgloss.workflows.harden._Job.evaluate", pytest.fail)  # minutes, for nothing
    with pytest.raises(UserError, match="has 1 training image"):
        harden(
            classifier, pictures(1), pictures(8, seed=1), out=tmp_path / "few", **{**options, "plan": HardenPlan(k=4)}
        )
    with pytest.raises(UserError, match="is a run of netgloss harden and holds no explainer"):
        found.explainer  # noqa: B018
    with pytest.raises(UserError, match="is a run of netgloss harden and holds no explainer"):
        found.store  # noqa: B018
    with pytest.raises(UserError, match="evaluated on other images"):
        harden(classifier, pictures(), pictures(), out=tmp_path / "other", **options)


def test_a_judgement_is_not_taken_over_by_other_settings(
    classifier: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the judgement of the original and the first checkpoint of an arm."""
    from netgloss.workflows.harden import HardenPlan, harden

    def killed(*unused: Any) -> None:
        raise Killed

    monkeypatch.setattr("netgloss.workflows.harden._Job.train_arm", killed)
    given: dict[str, Any] = {
        "layer": "conv",
        "out": tmp_path / "run",
        "plan": HardenPlan(arms=("clean",), k=4, v_steps=1, attack_images=9),
        "attacks": AttackPlan(attack_steps=1, restarts=1, long_steps=0, feature_steps=0),
        "device": "cpu",
    }
    with pytest.raises(Killed):
        harden(classifier, pictures(), pictures(8, seed=1), config=small(eps=8), **given)
    with pytest.raises(UserError, match="another run"):
        harden(classifier, pictures(), pictures(8, seed=1), config=small(eps=4), **given)


# -- other libraries --------------------------------------------------------------------------------------------------


def test_autoattack_or_one_line(classifier: Classifier, monkeypatch: pytest.MonkeyPatch) -> None:
    """APGD of pyautoattack agrees with our PGD on a small net; without the library one line says what is missing."""
    pixels = PixelClassifier.of(classifier)
    data = load_pixels(classifier, pictures())
    x, y = data.pixels(), data.labels
    try:
        import pyautoattack  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match=r"netgloss\[oracle\]"):
            autoattack_accuracies(pixels, x, y, eps=0.1)
        monkeypatch.setattr("netgloss.adversarial.robustness.surviving", pytest.fail)  # minutes, for nothing
        with pytest.raises(UserError, match=r"netgloss\[oracle\]"):
            robust_accuracies(pixels, Attacked(x, y), eps=0.1, plan=AttackPlan(autoattack=True))
        return
    theirs = autoattack_accuracies(pixels, x, y, eps=0.02, attacks=("apgd-ce",), steps=20, restarts=1)
    plan = AttackPlan(restarts=1, long_steps=0, feature_steps=0)
    ours = robust_accuracies(pixels, Attacked(x, y), eps=0.02, plan=plan)
    assert abs(theirs["autoattack"] - ours["pgd-20"]) <= 0.05


def test_agrees_with_art() -> None:
    """FGSM of adversarial-robustness-toolbox on a linear net gives the same images."""
    evasion = pytest.importorskip("art.attacks.evasion")
    estimators = pytest.importorskip("art.estimators.classification")
    from netgloss.adversarial import fgsm

    layer = nn.Linear(12, 2)
    net = nn.Sequential(nn.Flatten(), layer)
    pixels = PixelClassifier(net, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    x = 0.3 + 0.4 * torch.rand(4, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    y = torch.zeros(4, dtype=torch.long)
    wrapped = estimators.PyTorchClassifier(
        pixels, nn.CrossEntropyLoss(), (3, 2, 2), 2, clip_values=(0.0, 1.0), device_type="cpu"
    )
    theirs = evasion.FastGradientMethod(wrapped, eps=0.05).generate(x.numpy(), y.numpy())
    assert torch.allclose(fgsm(pixels, x, y, eps=0.05).images, torch.from_numpy(theirs), atol=1e-6)

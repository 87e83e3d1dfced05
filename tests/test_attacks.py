"""Attacks: they stay in their ball, leave the network alone, and find what arithmetic says they must."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from netgloss.adversarial import (
    AttackResult,
    PixelClassifier,
    assign_targets,
    attack_in_batches,
    ensemble,
    feature,
    fgsm,
    fgsm_rs,
    least_likely,
    least_likely_steps,
    least_likely_targets,
    pgd,
)
from netgloss.adversarial.attacks import _cross_entropy
from netgloss.adversarial.crafting import crafting, project, projected_steps, random_start, unit_steps
from netgloss.classifiers import load_classifier
from netgloss.errors import UserError

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


class ConvNet(nn.Module):
    """Random, with everything that an attack could disturb: batch norm, dropout, an in-place ReLU."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2)
        self.norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.relu(self.norm(self.conv(x))).mean((2, 3))))


def network(seed: int = 0) -> PixelClassifier:
    torch.manual_seed(seed)
    net = ConvNet()
    net.norm.running_mean.normal_()
    nn.init.normal_(net.head.weight, std=3)
    return PixelClassifier(net, MEAN, STD)


def images(count: int = 6, size: int = 9) -> Tensor:
    """Pictures of 8 bits, some pixels at the very ends of the range."""
    values = torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(5))
    values[0, 0, 0] = 0
    values[0, 1, 0] = 255
    return values.float() / 255


LABELS = torch.tensor([0, 1, 2, 3, 4, 0])
TARGETS = torch.tensor([1, 2, 3, 4, 0, 2])

OTHER = network(1)
Run = Callable[..., AttackResult]
RUNS: dict[str, Run] = {
    "fgsm": lambda c, x, y, eps: fgsm(c, x, y, eps=eps),
    "fgsm targeted": lambda c, x, y, eps: fgsm(c, x, y, eps=eps, targets=TARGETS),
    "fgsm_rs": lambda c, x, y, eps: fgsm_rs(c, x, y, eps=eps),
    "least_likely": lambda c, x, y, eps: least_likely(c, x, y, eps=eps),
    "pgd": lambda c, x, y, eps: pgd(c, x, y, eps=eps, steps=6, restarts=2),
    "pgd targeted": lambda c, x, y, eps: pgd(c, x, y, eps=eps, steps=6, restarts=2, targets=TARGETS),
    "pgd l2": lambda c, x, y, eps: pgd(c, x, y, eps=20 * eps, norm="l2", steps=6, restarts=2),
    "ensemble": lambda c, x, y, eps: ensemble([c, OTHER], x, y, targets=TARGETS, eps=eps, steps=6, lam=0.3),
    "feature": lambda c, x, y, eps: feature(c, x, y, layer="norm", eps=eps, steps=6),
}


@pytest.mark.parametrize("name", RUNS)
def test_in_the_ball_and_in_range(name: str) -> None:
    x, classifier, eps = images(), network(), 8 / 255
    result = RUNS[name](classifier, x, LABELS, eps)
    assert result.images.min() >= 0
    assert result.images.max() <= 1
    change = (result.images - x).flatten(1)
    assert torch.allclose(result.linf, change.abs().amax(1))
    assert torch.allclose(result.l2, change.norm(dim=1))
    if name == "pgd l2":
        assert result.l2.max() <= 20 * eps + 1e-6
        assert result.l2.max() > 10 * eps
    else:
        assert result.linf.max() <= eps + 1e-6
        assert result.linf.min() > 0.5 * eps
        rounded = result.rounded(classifier, x, LABELS)
        levels = rounded.images * 255
        assert torch.allclose(levels, levels.round(), atol=1e-4)
        assert (levels - x * 255).abs().max() <= 8 + 1e-3
    with torch.no_grad():
        predicted = classifier.eval()(result.images).argmax(1)
    assert torch.equal(result.predictions, predicted)
    hit = predicted != LABELS if result.targets is None else predicted == result.targets
    assert torch.equal(result.success, hit)


@pytest.mark.parametrize("name", RUNS)
def test_eps_zero_is_the_identity(name: str) -> None:
    x = images()
    assert torch.equal(RUNS[name](network(), x, LABELS, 0.0).images, x)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("failing", [False, True])
def test_network_is_left_alone(name: str, failing: bool) -> None:
    classifier, x = network().train(), images()
    classifier.net.norm.eval()  # a mixture of modes, as in fine-tuning with frozen statistics
    for i, parameter in enumerate(classifier.parameters()):
        if i % 2 == 0:
            parameter.grad = torch.full_like(parameter, 3.0)
    state = copy.deepcopy(classifier.state_dict())
    grads = [None if p.grad is None else p.grad.clone() for p in classifier.parameters()]
    modes = [m.training for m in classifier.modules()]
    random_state = torch.get_rng_state()
    before = x.clone()
    if failing:
        calls = 0

        def fail(module: nn.Module, args: Any) -> None:
            nonlocal calls
            calls += 1
            if calls > 1 or name in ("fgsm", "fgsm targeted", "fgsm_rs"):
                raise RuntimeError("planted")

        handle = classifier.net.conv.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="planted"):
            RUNS[name](classifier, x, LABELS, 8 / 255)
        handle.remove()
    else:
        RUNS[name](classifier, x, LABELS, 8 / 255)
    assert [m.training for m in classifier.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in classifier.state_dict().items())
    for parameter, grad in zip(classifier.parameters(), grads, strict=True):
        assert parameter.requires_grad
        assert parameter.grad is None if grad is None else torch.equal(parameter.grad, grad)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in classifier.modules())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(x, before)


def test_attacks_run_in_eval_mode_and_without_gradients_around() -> None:
    classifier, x = network(), images()
    expected = pgd(classifier.eval(), x, LABELS, eps=0.05, steps=4, restarts=1).images
    with torch.no_grad():
        assert torch.equal(pgd(classifier.train(), x, LABELS, eps=0.05, steps=4, restarts=1).images, expected)
    with torch.inference_mode():
        assert torch.equal(pgd(classifier, x, LABELS, eps=0.05, steps=4, restarts=1).images, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(pgd(classifier, x, LABELS, eps=0.05, steps=4, restarts=1).images, expected)


def test_starts_and_targets_do_not_depend_on_the_batch() -> None:
    x, ids = images(), [f"image {i}" for i in range(6)]
    for norm in ("linf", "l2"):
        whole = random_start(x, 0.1, norm, seed=3, ids=ids)
        parts = [random_start(x[i : i + 1], 0.1, norm, seed=3, ids=ids[i : i + 1]) for i in range(6)]
        assert torch.equal(whole, torch.cat(parts))
        assert not torch.equal(whole, random_start(x, 0.1, norm, seed=4, ids=ids))
        assert not torch.equal(whole, random_start(x, 0.1, norm, seed=3, ids=ids, draw=1))
        assert not torch.equal(whole[0], whole[1])
    classifier = network()
    for attack, options in ((fgsm_rs, {}), (pgd, {"steps": 3, "restarts": 2}), (pgd, {"targets": TARGETS, "steps": 3})):
        targets = options.pop("targets", None)
        results = [
            attack_in_batches(attack, classifier, x, LABELS, targets=targets, eps=0.03, batch_size=b, **options)
            for b in (1, 4, 6)
        ]
        for other in results[1:]:
            assert (other.images - results[0].images).abs().median() == 0
            assert ((other.images - results[0].images).abs() > 1e-4).float().mean() < 0.01  # signs of rounding errors
    labels = torch.arange(60) % 5
    names = [f"{i}.jpg" for i in range(60)]
    targets = assign_targets(labels, seed=1, ids=names)
    mixed = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    assert torch.equal(assign_targets(labels[mixed], seed=1, ids=[names[i] for i in mixed]), targets[mixed])


# -- linear networks: every attack has a closed form ------------------------------------------------------------------


def linear(*, normalised: bool) -> tuple[PixelClassifier, Tensor, Tensor]:
    """Two classes; y = 0. The difference of the weights per pixel, w_0 - w_1 over std, is the second value."""
    generator = torch.Generator().manual_seed(2)
    layer = nn.Linear(12, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(2, 12, generator=generator))
    std = (0.2, 0.5, 0.3) if normalised else (1.0, 1.0, 1.0)
    mean = MEAN if normalised else (0.0, 0.0, 0.0)
    weights = (layer.weight[0] - layer.weight[1]).detach() / torch.tensor(std).repeat_interleave(4)
    x = 0.3 + 0.4 * torch.rand(4, 3, 2, 2, generator=generator)
    return PixelClassifier(nn.Sequential(nn.Flatten(), layer), mean, std), weights, x


@pytest.mark.parametrize("normalised", [False, True])
def test_linear_network(normalised: bool) -> None:
    classifier, weights, x = linear(normalised=normalised)
    y, eps = torch.zeros(4, dtype=torch.long), 0.1
    other = torch.ones(4, dtype=torch.long)

    def margin(z: Tensor) -> Tensor:
        logits = classifier(z).detach()
        return logits[:, 0] - logits[:, 1]

    expected = x - eps * weights.sign().view(1, 3, 2, 2)
    linf = eps * float(weights.abs().sum())
    for result in (
        fgsm(classifier, x, y, eps=eps),
        fgsm(classifier, x, y, eps=eps, targets=other),
        pgd(classifier, x, y, eps=eps, restarts=1),
        pgd(classifier, x, y, eps=eps, targets=other),
        least_likely(classifier, x, y, eps=eps, steps=40),
        ensemble([classifier], x, y, targets=other, eps=eps, lr=0.02),
        *(ensemble([classifier] * 2, x, y, targets=other, eps=eps, lr=0.02, fuse=f) for f in ("prob", "logit")),
    ):
        assert torch.allclose(result.images, expected, atol=1e-6)
        assert torch.allclose(margin(x) - margin(result.images), torch.tensor(linf), atol=1e-4)
    start = x + random_start(x, eps, "linf", seed=7)
    one = fgsm_rs(classifier, x, y, eps=eps, seed=7).images
    assert torch.allclose(one, project(start - 1.25 * eps * weights.sign().view(1, 3, 2, 2), x, eps, "linf"), atol=1e-6)
    loss = partial(_cross_entropy, classifier, wanted=y)
    l2 = projected_steps(loss, x, x, eps=eps, length=1.0, steps=20, norm="l2")
    assert torch.allclose(l2, x - eps * (weights / weights.norm()).view(1, 3, 2, 2), atol=1e-4)
    assert torch.allclose(margin(x) - margin(l2), eps * weights.norm(), atol=1e-4)


def test_an_ensemble_needs_all_of_its_networks() -> None:
    """Two linear networks that pull a pixel in different directions: the stronger one decides its sign."""

    def two(weight: list[float]) -> PixelClassifier:
        layer = nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([weight, [0.0, 0.0]]))
        return PixelClassifier(nn.Sequential(nn.Flatten(), layer), (0.0,), (1.0,))

    x, y, targets = torch.full((1, 1, 1, 2), 0.5), torch.tensor([1]), torch.tensor([0])
    result = ensemble([two([3.0, 1.0]), two([-1.0, 1.0])], x, y, targets=targets, eps=0.1, lr=0.01, fuse="logit")
    assert result.images.flatten().tolist() == pytest.approx([0.6, 0.6])
    result = ensemble([two([1.0, 1.0]), two([-3.0, 1.0])], x, y, targets=targets, eps=0.1, lr=0.01, fuse="logit")
    assert result.images.flatten().tolist() == pytest.approx([0.4, 0.6])
    free = ensemble([two([3.0, 1.0])], x, y, targets=targets, eps=0.1, lr=0.01)
    held = ensemble([two([3.0, 1.0])], x, y, targets=targets, eps=0.1, lr=0.01, lam=1e4)
    assert held.l2 < 0.2 * free.l2


def test_steps_of_least_likely() -> None:
    assert [least_likely_steps(e / 255) for e in (0, 2, 4, 8, 16)] == [0, 3, 5, 10, 20]


def test_least_likely_targets() -> None:
    logits = torch.tensor([[0.0, 5, -1, 2], [3, 0, 0, 0], [-9, 1, 2, 3]])
    labels = torch.tensor([1, 0, 0])
    targets = least_likely_targets(logits, labels, seed=0)
    assert targets[0] == 2
    assert targets[2] == 1  # not its own class, though that is the least likely
    assert least_likely_targets(logits, labels, classes=[0, 1, 3])[0] == 0
    drawn = {int(least_likely_targets(logits, labels, seed=s)[1]) for s in range(40)}
    assert drawn == {1, 2, 3}
    with pytest.raises(UserError, match="two classes"):
        least_likely_targets(logits, labels, classes=[0])


def test_targets_are_even() -> None:
    labels = (torch.arange(10) * 100).repeat_interleave(50)
    targets = assign_targets(labels, seed=0)
    assert (targets != labels).all()
    pairs = torch.zeros(10, 10, dtype=torch.long)
    pairs.index_put_((labels // 100, targets // 100), torch.ones(500, dtype=torch.long), accumulate=True)
    away = ~torch.eye(10, dtype=torch.bool)
    assert set(pairs[away].tolist()) == {5, 6}
    assert pairs.sum(0).tolist() == [50] * 10
    assert not torch.equal(targets, assign_targets(labels, seed=1))
    several = assign_targets(labels, per_source=9)
    assert all(
        sorted(row) == [c for c in range(0, 1000, 100) if c != y]
        for row, y in zip(several.tolist(), labels, strict=True)
    )
    uneven = assign_targets(torch.tensor([0] * 30 + [1] * 7 + [2]), classes=[0, 1, 2, 3])
    assert uneven[:30].bincount().tolist() == [0, 10, 10, 10]
    with pytest.raises(UserError, match="not among the classes"):
        assign_targets(labels, classes=[0, 100])


# -- what each attack is for ------------------------------------------------------------------------------------------


def test_stronger_attacks_raise_the_loss() -> None:
    classifier, x = network().eval(), images(6)
    with torch.no_grad():
        y = classifier(x).argmax(1)

    def loss(z: Tensor) -> Tensor:
        with torch.no_grad():
            return nn.functional.cross_entropy(classifier(z), y, reduction="none")

    eps = 4 / 255
    one, three = (pgd(classifier, x, y, eps=eps, steps=10, restarts=r) for r in (1, 4))
    assert (loss(fgsm(classifier, x, y, eps=eps).images) > loss(x)).all()
    assert (loss(one.images) > loss(x)).all()
    assert (loss(three.images) >= loss(one.images) - 1e-6).all()
    assert pgd(classifier, x, y, eps=0.3, steps=20).success.all()
    targets = (y + 1) % 5
    assert pgd(classifier, x, y, eps=0.5, steps=40, targets=targets).success.float().mean() >= 0.5


def test_restarts_keep_the_first_success() -> None:
    classifier, x = network().eval(), torch.cat([images(6), images(6).flip(0)])
    y = torch.cat([LABELS, LABELS])
    targets = assign_targets(y, classes=range(5))
    once, often = (pgd(classifier, x, y, eps=0.04, steps=5, restarts=r, targets=targets) for r in (1, 6))
    assert 0 < once.success.sum() < len(x)
    assert torch.equal(once.images[once.success], often.images[once.success])
    with torch.no_grad():
        losses = [nn.functional.cross_entropy(classifier(z.images), targets, reduction="none") for z in (once, often)]
    missed = ~often.success
    assert (losses[1][missed] <= losses[0][missed]).all()


def test_feature_attack_moves_features() -> None:
    classifier, x = network().eval(), images()

    def distance(z: Tensor) -> Tensor:
        with torch.no_grad():
            phi = [classifier.net.conv(classifier.normalise(image)) for image in (x, z)]
        return (phi[1] - phi[0]).flatten(1).norm(dim=1)

    found = feature(classifier, x, LABELS, layer="conv", eps=0.05)
    noise = project(x + random_start(x, 0.05, "linf", seed=1), x, 0.05, "linf")
    assert (distance(found.images) > 1.5 * distance(noise)).all()


def test_craft_layer_revives_dead_logits() -> None:
    """A ReLU behind the last convolution: the target's logit is 0 with no gradient; its map in front has one."""
    conv = nn.Conv2d(1, 2, 1)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([1.0, -1]).view(2, 1, 1, 1))
        conv.bias.copy_(torch.tensor([0.0, 0.45]))
    net = nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    x, y, targets = torch.full((1, 1, 2, 2), 0.5), torch.tensor([0]), torch.tensor([1])
    alive = PixelClassifier(net, (0.0,), (1.0,), craft_layer="0")
    result = pgd(alive, x, y, eps=0.4, targets=targets)
    assert result.success.all()
    assert torch.allclose(alive.craft(x), torch.tensor([[0.5, -0.05]]))
    assert torch.equal(alive(x), torch.tensor([[0.5, 0.0]]))
    with pytest.raises(UserError, match="layer"):
        PixelClassifier(net, (0.0,), (1.0,), craft_layer="9")


def test_l2_helpers() -> None:
    x = torch.full((2, 1, 1, 2), 0.5)
    assert project(x + torch.tensor([0.3, 0.4]), x, 0.1, "l2")[0].flatten().tolist() == pytest.approx([0.56, 0.58])
    assert torch.equal(unit_steps(torch.zeros(2, 1, 1, 2), "l2"), torch.zeros(2, 1, 1, 2))
    tiny = unit_steps(torch.full((1, 1, 1, 2), 1e-30), "l2")
    assert tiny.flatten().tolist() == pytest.approx([math.sqrt(0.5)] * 2)
    starts = random_start(torch.zeros(400, 1, 1, 3), 1.0, "l2", seed=0)
    radii = starts.flatten(1).norm(dim=1)
    assert radii.max() <= 1
    assert float((radii**3).mean()) == pytest.approx(0.5, abs=0.06)  # uniform in the ball


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"x": images() * 255}, "0 to 255"),
        ({"x": (images() * 255).byte()}, "uint8"),
        ({"eps": 8}, "8/255"),
        ({"eps": -0.1}, "-0.1"),
        ({"y": LABELS[:3]}, "as many labels, got 3"),
        ({"targets": LABELS}, "another class"),
        ({"y": LABELS + 3}, "classes must lie in 0 to 4"),
        ({"norm": "l1"}, "l1"),
        ({"restarts": 0}, "at least one"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str) -> None:
    options = {"x": images(), "y": LABELS, "eps": 8 / 255, **options}
    with pytest.raises(UserError, match=message):
        pgd(network(), options.pop("x"), options.pop("y"), **options)


def test_a_feature_attack_has_steps() -> None:
    with pytest.raises(UserError, match="at least one step, got 0"):
        feature(network(), images(), LABELS, layer="conv", eps=8 / 255, steps=0)


def test_nan_is_told() -> None:
    classifier = network()
    with torch.no_grad():
        classifier.net.head.bias[0] = math.nan
    with pytest.raises(UserError, match="NaN"):
        fgsm(classifier, images(), LABELS, eps=0.1)


def test_of_a_classifier() -> None:
    classifier = load_classifier("critters")
    pixels = torch.rand(3, *classifier.input_shape, generator=torch.Generator().manual_seed(0))
    wrapped = PixelClassifier.of(classifier)
    assert wrapped.net is classifier.net
    expected = classifier(classifier.preprocessing.normalise(pixels))
    assert torch.allclose(wrapped(pixels), expected, atol=1e-6)
    y = expected.argmax(1)
    result = pgd(wrapped, pixels, y, eps=8 / 255, steps=5, restarts=1)
    assert result.success.any()
    with crafting(wrapped, pixels, y) as copied:
        assert copied is not pixels


# -- another library --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require gradients")
def test_agrees_with_captum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captum's FGSM and Linf PGD (started at the image itself, as ours is here) give the same images."""
    from captum.robust import FGSM, PGD

    monkeypatch.setattr("netgloss.adversarial.attacks.random_start", lambda x, *args, **options: torch.zeros_like(x))
    classifier, x, eps = network().eval(), images(), 0.03
    bounds = {"loss_func": nn.CrossEntropyLoss(reduction="none"), "lower_bound": 0.0, "upper_bound": 1.0}
    one, many = FGSM(classifier, **bounds), PGD(classifier, **bounds)
    one.zero_thresh = many.fgsm.zero_thresh = 0.0
    for targets in (None, TARGETS):
        aim = {"target": LABELS if targets is None else targets, "targeted": targets is not None}
        theirs = one.perturb(x, eps, **aim)
        assert torch.allclose(fgsm(classifier, x, LABELS, eps=eps, targets=targets).images, theirs, atol=1e-6)
        theirs = many.perturb(x, eps, 2.5 * eps / 4, 4, **aim)
        ours = pgd(classifier, x, LABELS, eps=eps, targets=targets, steps=4, restarts=1).images
        assert torch.allclose(ours, theirs, atol=1e-6)

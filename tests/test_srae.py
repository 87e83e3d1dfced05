"""SRAE: loss terms by hand, modules that leave each other alone, planted x-features, restarts, bad input."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from netgloss.activations.key import StoreInfo, StoreKey
from netgloss.activations.store import Store
from netgloss.errors import UserError
from netgloss.explainers.base import Batch, LayerSpec
from netgloss.explainers.srae import (
    SRAE,
    SRAEConfig,
    contribution_table,
    faith,
    pull_away,
    sparse_reconstruction,
    squared_error,
)
from netgloss.metrics.faithfulness.importance import explain_class
from netgloss.training import ActivationStream, FitOptions, build_explainer, fit


def make_store(path: Path, values: Tensor, logits: Tensor | None, *, dtype: str = "float32") -> Store:
    """A complete store with one layer of the given activations (N, ...)."""
    num = len(values)
    key = StoreKey(
        weights_hash="w",
        preprocessing={},
        layers=("l",),
        data_fingerprint="d",
        dtype=dtype,
        logits=logits is not None,
        positions=None,
    )
    store = Store.create(
        path,
        key=key,
        info=StoreInfo(),
        shapes={"l": tuple(values.shape[1:])},
        ids=[str(i) for i in range(num)],
        targets=np.full(num, -1),
        num_classes=0 if logits is None else logits.shape[1],
    )
    for chunk in store.pending:
        where = store.chunk_slice(chunk)
        store.write_chunk(
            chunk,
            activations={"l": values[where].numpy().astype(dtype)},
            positions={},
            logits=None if logits is None else logits[where].numpy(),
            problems=[""] * len(values[where]),
        )
    return store


def stream_of(path: Path, values: Tensor, logits: Tensor | None, labels: Tensor | None = None) -> ActivationStream:
    store = make_store(path, values, logits)
    known = None if labels is None else labels.numpy()
    return ActivationStream(store, "l", np.arange(len(values)), reads="pooled", labels=known)


def planted(n: int = 600, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Activations (n, 120), logits (n, 3), labels (n,) and sources (n, 3).

    Half of the images show class 1, whose score is twice the source's strength; source i drives thirty features.
    """
    g = torch.Generator().manual_seed(seed)
    labels = (torch.rand(n, generator=g) < 0.5).long()
    which = torch.randint(3, (n,), generator=g)
    strength = (1 + torch.rand(n, generator=g)) * labels
    sources = torch.nn.functional.one_hot(which, 3) * strength[:, None]
    patterns = torch.zeros(3, 120)
    for i in range(3):
        patterns[i, 30 * i : 30 * i + 30] = 0.5 + torch.rand(30, generator=g)
    noise = 0.05 * torch.rand(n, 120, generator=g)
    logits = torch.stack([1 - labels.float(), 2 * strength - 1, torch.randn(n, generator=g)], dim=1)
    return sources @ patterns + noise, logits, labels, sources


def config_of(**changes: Any) -> SRAEConfig:
    return SRAEConfig(**({"num_concepts": 3, "classes": ("1",), "steps": 850, "attempts": 1} | changes))


SPEC = LayerSpec("l", (120,), nonnegative=True, num_classes=3)


# -- loss terms -------------------------------------------------------------------------------------------------------


def test_sparse_reconstruction_by_hand() -> None:
    rebuilt = torch.tensor([[[1.0, 0.0], [2.0, 3.0]]])
    given = torch.tensor([[0.0, 0.0], [0.0, 4.0]])
    error = squared_error(rebuilt, given)
    torch.testing.assert_close(error, torch.tensor([[2.5, 0.5]]))
    expected = (math.log(1 + 10 * 2.5) + math.log(1 + 10 * 0.5)) / 2
    torch.testing.assert_close(sparse_reconstruction(error, 10.0), torch.tensor([expected]))
    shuffled = squared_error(rebuilt.flip(1), given.flip(0))
    torch.testing.assert_close(sparse_reconstruction(shuffled, 10.0), torch.tensor([expected]))
    torch.testing.assert_close(sparse_reconstruction(error, 1e-4) / 1e-4, error.mean(dim=1), rtol=1e-3, atol=0)


def test_scores_of_another_shape_are_refused() -> None:
    with pytest.raises(AssertionError, match="targets"):
        faith(torch.zeros(1, 5, 1), torch.zeros(1, 5))


def test_pull_away_of_features() -> None:
    x = torch.zeros(1, 6, 3)
    x[0, torch.arange(6), torch.arange(6) % 3] = torch.rand(6) + 0.5
    for weights in (torch.tensor([1.0, -2.0, 30.0]), torch.ones(3)):
        rows = contribution_table(x, weights[None, :, None]).transpose(-1, -2)
        assert float(pull_away(rows)) < 1e-6  # disjoint supports, whatever the head, up to rounding
    dense = torch.rand(1, 6, 3)
    values = [
        float(pull_away(contribution_table(dense, w.reshape(1, 3, 1)).transpose(-1, -2)))
        for w in (torch.ones(3), torch.tensor([0.5, -4.0, 9.0]))
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    unit = dense[0] / dense[0].norm(dim=0)
    gram = unit.T @ unit
    assert values[0] == pytest.approx(float((gram.square().sum() - 3) / 6), rel=1e-4)
    assert float(pull_away(dense[:, :, :1].transpose(-1, -2))) == 0


def test_pull_away_of_images_has_its_floor() -> None:
    images, n = 50, 5
    codes = torch.nn.functional.one_hot(torch.arange(images) % n, n).float()[None]
    table = contribution_table(codes, torch.ones(1, n, 1))
    assert float(pull_away(table)) == pytest.approx((images / n - 1) / (images - 1), abs=1e-6)


# -- the model --------------------------------------------------------------------------------------------------------


def fitted(tmp_path: Path, **changes: Any) -> tuple[SRAE, ActivationStream]:
    values, logits, labels, _ = planted()
    stream = stream_of(tmp_path / "s", values, logits, labels)
    explainer = build_explainer(SRAE, config_of(**changes), SPEC, seed=0)
    fit(explainer, stream, seed=0)
    assert isinstance(explainer, SRAE)
    return explainer, stream


@pytest.mark.parametrize("joint", [False, True])
def test_contributions_and_bias_add_up_to_the_rebuilt_logit(tmp_path: Path, joint: bool) -> None:
    explainer, _ = fitted(tmp_path, classes=("0", "1"), joint=joint, steps=85)
    values, logits, _, _ = planted(40, seed=1)
    with torch.no_grad():
        concepts = explainer.encode(values)
        rebuilt = explainer.rebuilt_logits(concepts, logits)
        assert concepts.shape == (40, 3 if joint else 6)
        assert (concepts >= 0).all()
        torch.testing.assert_close(rebuilt[:, 2], logits[:, 2])  # no module: untouched
        torch.testing.assert_close(rebuilt[:, :2], explainer.class_scores(concepts))
        for c in (0, 1):
            parts = explain_class(explainer, lambda a: a, concepts, logits, torch.full((40,), c))
            torch.testing.assert_close(parts.base + parts.values.sum(1), rebuilt[:, c], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(parts.gap, torch.zeros(40), rtol=0, atol=1e-4)
            if not joint:
                assert (parts.values[:, 3 * (1 - c) : 3 * (2 - c)] == 0).all()
        none = explain_class(explainer, lambda a: a, concepts, logits, torch.full((40,), 2))
        assert (none.values == 0).all()
        torch.testing.assert_close(none.base, logits[:, 2])
        each = explainer.decode_modules(concepts)
        torch.testing.assert_close(explainer.decode(concepts), each.mean(dim=0))
        assert (each >= 0).all()


def test_planted_features_are_found(tmp_path: Path) -> None:
    """The score is rebuilt, two sources have an x-feature of their own, and the concepts tell all three apart."""
    explainer, _ = fitted(tmp_path, steps=850)
    values, logits, labels, sources = planted(400, seed=5)
    with torch.no_grad():
        concepts = explainer.encode(values)
        error = explainer.class_scores(concepts)[:, 0] - logits[:, 1]
    assert 1 - error.square().mean() / logits[:, 1].var() > 0.97
    shown, truth = concepts[labels == 1], sources[labels == 1]
    match = torch.corrcoef(torch.cat([shown, truth], dim=1).T)[:3, 3:].abs()
    assert (match.amax(dim=0).sort().values[1:] > 0.95).all(), match
    table = torch.cat([shown, torch.ones(len(shown), 1)], dim=1)
    left = truth - table @ torch.linalg.lstsq(table, truth, driver="gelsd").solution
    assert (1 - left.square().mean(0) / truth.var(0, correction=0) > 0.9).all()


def test_modules_train_as_if_they_were_alone(tmp_path: Path) -> None:
    options = {"positives": 0.0, "dropout": 0.0, "steps": 102}
    both, _ = fitted(tmp_path / "both", classes=("0", "1"), **options)
    one, _ = fitted(tmp_path / "one", classes=("1",), **options)
    values = planted(50, seed=2)[0]
    with torch.no_grad():
        torch.testing.assert_close(both.encode(values)[:, 3:], one.encode(values), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(
            both.class_scores(both.encode(values))[:, 1],
            one.class_scores(one.encode(values))[:, 0],
            rtol=1e-3,
            atol=1e-3,
        )


def test_accepted_modules_stay_as_they_are(tmp_path: Path) -> None:
    values, logits, labels, _ = planted()
    stream = stream_of(tmp_path / "s", values, logits, labels)
    explainer = build_explainer(SRAE, config_of(classes=("0", "1"), steps=34), SPEC, seed=0)
    assert isinstance(explainer, SRAE)
    explainer.fit_rows(stream, seed=0)
    explainer.accepted[0] = True
    before = copy.deepcopy(explainer.state_dict())
    optimizer = explainer.optimizer()
    batches = stream.batches(50, seed=0, fields=("logits", "labels"))
    for step in range(34):
        batch = next(batches)
        sum(explainer.losses(dataclasses.replace(batch, step=step)).values(), start=torch.zeros(())).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = explainer.state_dict()
    moved = {n: (after[n] - before[n]).abs().flatten(1).amax(1) for n in before if n.startswith("nets")}
    assert all(float(m[0]) == 0 for m in moved.values())
    assert all(float(m[1]) > 0 for m in moved.values())


def test_a_module_is_tried_again_until_it_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = iter([[True, False], [True, False], [True, True]])

    def judge(self: SRAE, rows: Any) -> None:
        active = ~self.accepted
        self.tries[active] += 1
        self.accepted |= torch.tensor(next(verdicts))

    monkeypatch.setattr(SRAE, "_judge", judge)
    explainer, _ = fitted(tmp_path, classes=("0", "1"), steps=34, attempts=5)
    assert explainer.tries.tolist() == [1, 3]
    torch.testing.assert_close(explainer.weight_rebuild, torch.tensor([15.0, 15 * 1.2**2]))
    torch.testing.assert_close(explainer.weight_pull, torch.tensor([5.0, 5 * 0.8**2]))
    assert any("trained again" in note and "1, 3" in note for note in explainer.notes)


def test_the_rule_of_acceptance(tmp_path: Path) -> None:
    values, logits, labels, _ = planted()
    stream = stream_of(tmp_path / "s", values, logits, labels)
    explainer = build_explainer(SRAE, config_of(classes=("0", "1"), num_concepts=2), SPEC, seed=0)
    assert isinstance(explainer, SRAE)
    explainer.fit_rows(stream, seed=0)
    with torch.no_grad():
        for parameter in explainer.nets.encoder[2].parameters():
            parameter.zero_()
        explainer.nets.encoder[2].bias.fill_(1.0)  # every x-feature is 1
        explainer.nets.head.weight.copy_(torch.tensor([[[1.0], [0.31]], [[1.0], [0.29]]]))
        explainer._judge(stream)
        assert explainer.accepted.tolist() == [True, False]
        explainer.nets.head.weight[1] = torch.tensor([[1.0], [-1.0]])
        explainer._judge(stream)
    assert explainer.accepted.tolist() == [True, False]
    assert explainer.tries.tolist() == [1, 2]


def test_repair_wakes_dead_features_on_half_of_the_positives(tmp_path: Path) -> None:
    values, logits, labels, _ = planted()
    stream = stream_of(tmp_path / "s", values, logits, labels)
    explainer = build_explainer(SRAE, config_of(), SPEC, seed=0)
    assert isinstance(explainer, SRAE)
    explainer.fit_rows(stream, seed=0)
    with torch.no_grad():
        explainer.nets.encoder[2].bias[0, 0, :2] = -1e6
        alive = explainer.nets.encoder[2].weight[0, :, 2].clone()
        explainer.nets.encoder[2].bias[0, 0, 2] = 1.0
        explainer._repair(stream, 0)
        on = (explainer.encode(values[labels == 1]) > 0).float().mean(dim=0)
    assert ((on[:2] > 0.4) & (on[:2] < 0.6)).all()
    torch.testing.assert_close(explainer.nets.encoder[2].weight[0, :, 2], alive)


@pytest.mark.parametrize("bias", [-1e6, 0.5])
def test_repair_wakes_modules_whose_hidden_layers_have_died(tmp_path: Path, bias: float) -> None:
    """Also where the second layer is on by its biases alone, so that its units do not vary."""
    values, logits, labels, _ = planted()
    stream = stream_of(tmp_path / "s", values, logits, labels)
    explainer = build_explainer(SRAE, config_of(classes=("0", "1")), SPEC, seed=0)
    assert isinstance(explainer, SRAE)
    explainer.fit_rows(stream, seed=0)
    with torch.no_grad():
        explainer.nets.encoder[0].bias[1] = -1e6
        explainer.nets.encoder[1].bias[1] = bias
        explainer.nets.encoder[2].bias[0] = 1.0  # module 0 lives
        before = copy.deepcopy(explainer.state_dict())
        explainer._repair(stream, 0, silent_only=True)
        on = (explainer.encode(values[labels == 1])[:, 3:] > 0).float().mean(dim=0)
        assert (on > 0.4).any()
        assert not torch.equal(
            explainer.encode(values[labels == 1])[0, 3:], explainer.encode(values[labels == 1])[1, 3:]
        )
        for name, value in explainer.state_dict().items():
            if name.startswith("nets"):
                torch.testing.assert_close(value[0], before[name][0])


def test_a_fit_killed_in_any_stage_ends_the_same(tmp_path: Path) -> None:
    values, logits, labels, _ = planted(200)
    stream = stream_of(tmp_path / "s", values, logits, labels)

    class Memory:
        def __init__(self, stop: int) -> None:
            self.kept: Any = None
            self.stop = stop

        def load(self) -> Any:
            return self.kept

        def save(self, tensors: Any, state: Any) -> None:
            self.kept = ({n: t.clone() for n, t in tensors.items()}, dict(state))
            if state["step"] >= self.stop:
                self.stop = 10**9
                raise KeyboardInterrupt

    config = config_of(classes=("0", "1"), steps=51, attempts=2)
    options = FitOptions(checkpoint_seconds=-1.0, log_every=1)
    whole = fit(build_explainer(SRAE, config, SPEC, seed=3), stream, seed=3, options=options)
    for stop in (4, 30, 51, 70):
        memory = Memory(stop)
        with pytest.raises(KeyboardInterrupt):
            fit(build_explainer(SRAE, config, SPEC, seed=3), stream, seed=3, options=options, checkpoint=memory)
        again = build_explainer(SRAE, config, SPEC, seed=3)
        fit(again, stream, seed=3, options=options, checkpoint=memory)
        for name, value in whole.state_dict().items():
            torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=0, msg=f"{name} after {stop}")


def test_joint_terms_are_the_formula(tmp_path: Path) -> None:
    explainer, _ = fitted(tmp_path, classes=("0", "1"), joint=True, steps=34, dropout=0.0, q=7.0, num_concepts=4)
    values, logits, labels, _ = planted(20, seed=9)
    batch = Batch(values, torch.arange(20), logits=logits, labels=labels, step=33)
    terms = explainer.train().losses(batch)
    scaled = values / explainer.scale
    x = explainer.encode(values)
    y = (logits[:, :2] - explainer.target_mean) / explainer.target_sd
    guess = (explainer.class_scores(x) - explainer.target_mean) / explainer.target_sd
    torch.testing.assert_close(terms["faith"], 40 * (guess - y).square().mean())
    m = (explainer.decode(x) / explainer.scale - scaled).square().mean(0)
    torch.testing.assert_close(terms["reconstruction"], 15 * torch.log1p(7 * m).mean())
    rows = x.T
    unit = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-30)
    gram = (unit @ unit.T).square()
    live = [i for i in range(4) if rows[i].any()]
    if len(live) == 4:  # pull-away cancels the head: once for each of the two classes
        torch.testing.assert_close(terms["pull_away"], 5 * 2 * (gram.sum() - gram.trace()) / 12, rtol=1e-3, atol=1e-4)
    assert set(terms) == {"faith", "reconstruction", "pull_away"}


def test_the_gradients_hold_the_weight_decay_of_joint_training(tmp_path: Path) -> None:
    """L2 in the gradient, as Adam's ``weight_decay`` has it; not in pre-training, and only where a layer is trained."""
    explainer, _ = fitted(tmp_path, classes=("0", "1"), steps=34, dropout=0.0)
    values, logits, labels, _ = planted(20, seed=9)

    def gradients(decay: float, step: int) -> dict[str, Tensor]:
        explainer.config = dataclasses.replace(explainer.config, weight_decay=decay)
        batch = Batch(values, torch.arange(20), logits=logits, labels=labels, step=step)
        explainer.train().zero_grad()
        sum(explainer.losses(batch).values(), start=torch.zeros(())).backward()
        return {name: p.grad.clone() for name, p in explainer.named_parameters() if p.grad is not None}

    plain, decayed = gradients(0.0, 33), gradients(0.5, 33)
    assert set(plain) == set(decayed) == {name for name, _ in explainer.named_parameters()}
    for name, parameter in explainer.named_parameters():
        torch.testing.assert_close(decayed[name], plain[name] + 0.5 * parameter.detach(), rtol=1e-4, atol=1e-5)
    for name, gradient in gradients(0.5, 0).items():
        torch.testing.assert_close(gradient, gradients(0.0, 0)[name], msg=name)


@pytest.mark.parametrize("preset", ["released", "sae", "nn", "nn-pt", "no-pull-away"])
def test_every_ablation_trains_what_it_says(tmp_path: Path, preset: str) -> None:
    explainer, stream = fitted(tmp_path, preset=preset, steps=34, num_concepts=2)
    batch = next(stream.batches(30, seed=1, fields=("logits", "labels")))
    terms = set(explainer.losses(dataclasses.replace(batch, step=33)))
    expected = {
        "released": {"faith", "reconstruction", "pull_away"},
        "sae": {"faith", "reconstruction"},
        "nn": {"faith"},
        "nn-pt": {"faith", "pull_away"},
        "no-pull-away": {"faith", "reconstruction"},
    }
    assert terms == expected[preset]


# -- the contract's extensions ----------------------------------------------------------------------------------------


def test_pooled_means_the_mean_over_the_grid(tmp_path: Path) -> None:
    maps = torch.rand(300, 8, 3, 2)
    logits = torch.rand(300, 4)
    stream = stream_of(tmp_path / "s", maps, logits)
    assert stream.spec(num_classes=4, image=()).shape == (8,)
    pooled = torch.cat([b.activation for b in stream.examples()])
    torch.testing.assert_close(pooled, maps.mean(dim=(2, 3)))
    torch.testing.assert_close(torch.cat([b.logits for b in stream.examples() if b.logits is not None]), logits)
    config = SRAEConfig(classes=("1", "3"), num_concepts=2)
    explainer = build_explainer(SRAE, config, stream.spec(num_classes=4, image=()), seed=0)
    explainer.fit_rows(stream, seed=0)
    torch.testing.assert_close(explainer.encode(maps), explainer.encode(maps.mean(dim=(2, 3))))
    assert explainer.encode(maps).shape == (300, 4)


@pytest.mark.parametrize("grid", [(), (3, 2)])
def test_the_evaluation_sees_the_pooled_activation(tmp_path: Path, grid: tuple[int, ...]) -> None:
    from types import SimpleNamespace

    from netgloss.activations.layer import Layer

    values = torch.rand(5, 4, *grid)
    store = make_store(tmp_path / "s", values, torch.rand(5, 4))
    stub: Any = SimpleNamespace(device="cpu", class_names=["a"] * 4, wnids=None, outputs="multiclass")
    tail: Any = type("Tail", (), {"mode": "graph", "__call__": lambda self, a: a.flatten(2).mean(2) if grid else a})()
    layer = Layer(store, "l", tail, stub, pooled=True)
    (batch,) = layer.batches(np.arange(5))
    expected = values.mean(dim=(2, 3)) if grid else values
    torch.testing.assert_close(batch.activation, expected)
    torch.testing.assert_close(batch.tail(batch.activation), expected)
    assert sum(len(index) for index, _ in layer.maps(np.arange(5))) == (5 if grid else 0)


def test_batches_hold_their_share_of_each_class(tmp_path: Path) -> None:
    labels = torch.full((400,), -1)
    labels[:3], labels[3:8] = 0, 1
    logits = torch.zeros(400, 3)
    logits[:, 2] = 1  # what has no label is predicted as class 2
    stream = stream_of(tmp_path / "s", torch.arange(400.0)[:, None], logits, labels)
    batches = stream.batches(50, seed=0, fields=("logits", "labels"), balance=((0, 1), 0.4))
    seen = []
    for _ in range(13):  # 400 entries in turns of 30
        batch = next(batches)
        assert batch.labels is not None
        assert int((batch.labels == 0).sum()) >= 10
        assert int((batch.labels == 1).sum()) >= 10
        seen.append(batch.activation[:30, 0])
    assert len(torch.cat(seen).unique()) == 390  # the rest comes in turn, without repeats
    late = next(stream.batches(50, seed=0, start=7, fields=("logits", "labels"), balance=((0, 1), 0.4)))
    again = stream.batches(50, seed=0, fields=("logits", "labels"), balance=((0, 1), 0.4))
    early = [next(again) for _ in range(8)][-1]
    torch.testing.assert_close(late.index, early.index)
    assert late.step == early.step == 7


def test_classes_are_settled_by_name_id_index_or_frequency() -> None:
    names, wnids = ["tench, Tinca tinca", "crane", "crane", "church"], ["n01", "n02", "n03", "n04"]

    def settle(*classes: str, decisions: tuple[int, ...] = ()) -> tuple[str, ...]:
        config = SRAE.settle(
            SRAEConfig(classes=classes), class_names=names, wnids=wnids, decisions=np.array(decisions, int)
        )
        assert isinstance(config, SRAEConfig)
        return config.classes

    assert settle("Tench", "n04", "2") == ("0: tench, Tinca tinca", "3: church", "2: crane")
    assert settle(*settle("church")) == ("3: church",)
    assert settle(decisions=(3, 3, 1, -1)) == ("1: crane", "3: church")
    explainer = SRAE(SRAEConfig(classes=settle("tench", "3"), num_concepts=2), LayerSpec("l", (4,), num_classes=4))
    assert explainer.name_concepts() == ["tench x1", "tench x2", "church x1", "church x2"]
    for bad, message in (("chruch", "did you mean church"), ("crane", "ambiguous"), ("7", "below 4")):
        with pytest.raises(UserError, match=message):
            settle(bad)
    with pytest.raises(UserError, match="neither labels"):
        settle(decisions=(-1, -1))


BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: SRAEConfig(q=0), "q must be positive, got 0"),
    (lambda: SRAEConfig(attempts=0), "attempts must be at least 1"),
    (lambda: SRAEConfig(positives=1.0), "positives must be"),
    (lambda: SRAEConfig(weight_faith=-1.0), "weight_faith must not be negative"),
    (lambda: SRAEConfig(preset="xnn"), "preset must be one of srae"),  # type: ignore[arg-type]
    (lambda: SRAE(SRAEConfig(), SPEC), "needs the classes"),
    (lambda: SRAE(config_of(classes=("9",)), SPEC), "not an index below 3"),
    (lambda: SRAE(config_of(classes=("1", "1: b")), SPEC), "named twice"),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_options(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_bad_data(tmp_path: Path) -> None:
    values, logits, labels, _ = planted(60)
    cases: list[tuple[Tensor, Tensor | None, Tensor, str]] = [
        (values, None, labels, "logits"),
        (values, logits, torch.zeros(60, dtype=torch.long), "has no image among the 60"),
        (values, torch.zeros(60, 3), labels, "same for all 60"),
        (values * 0, logits, labels, "is zero on all"),
    ]
    for i, (given, scores, known, message) in enumerate(cases):
        stream = stream_of(tmp_path / str(i), given, scores, known)
        explainer = build_explainer(SRAE, config_of(steps=20), SPEC, seed=0)
        with pytest.raises(UserError, match=message):
            fit(explainer, stream, seed=0)


# -- the whole way ----------------------------------------------------------------------------------------------------


def test_from_classifier_to_report_and_new_image(tmp_path: Path) -> None:
    import json

    import netgloss

    run = netgloss.explain(
        "srae",
        "critters",
        "block5",
        "critters:40",
        out=tmp_path / "run",
        seeds=1,
        evaluation=netgloss.EvaluationOptions(untrained_images=0),
        num_concepts=3,
        classes=("0", "5"),
        steps=51,
        attempts=1,
    )
    content = run.concepts
    names = [concept["name"] for concept in content["concepts"]]
    assert len(names) == 6
    assert names[0].endswith("x1")
    assert content["grid"] == [8, 8]
    assert content["importance"]["kind"] == "exact"
    gallery = [entry for concept in content["concepts"] for entry in concept["gallery"]]
    assert gallery
    assert all(entry["map"]["grid"] == [8, 8] for entry in gallery)
    classifier = run.classifier()
    told = {classifier.class_names[0], classifier.class_names[5]}
    assert {page["class"] for page in content["classes"]} <= told
    tables = [page["deletion"] for page in content["classes"] if "deletion" in page]
    assert tables
    assert all(len(t["lost"]) == len(t["random"]) == len(t["concepts"]) for t in tables)
    scores = {score.metric: score for score in run.scores}
    assert {"agreement", "logit_rmse", "neurons_rebuilt"} <= set(scores)
    assert "shuffled_codes" in scores["logit_rmse"].baselines
    assert any("not explained" in warning for warning in run.manifest["warnings"])
    assert (run.path / "report.html").stat().st_size > 10_000
    for path in [f for shown in netgloss.show(run, "critters:2", out=tmp_path / "show") for f in shown.files]:
        if path.suffix == ".json":
            told_of = json.loads(path.read_text())
            assert told_of["explained_class"] in told
            total = told_of["base"] + sum(told_of["contributions"].values()) + told_of["gap"]
            assert total == pytest.approx(told_of["logit"], abs=1e-4)
    for heat in ("excitation", "igos"):
        drawn = netgloss.show(run, "critters:1", out=tmp_path / heat, heat=heat, top=1)[0].files
        assert [path.suffix for path in drawn] == [".png", ".json"]
    other = next(i for i, name in enumerate(netgloss.open_images("critters:8").targets.tolist()) if name not in (0, 5))
    ((_, record),) = (
        shown.files
        for shown in netgloss.show(
            run, netgloss.open_images("critters:8").subset([other]), out=tmp_path / "o", heat="igos"
        )
    )
    assert record.exists()


@pytest.mark.parametrize(("network", "layer"), [("alexnet", "classifier.2"), ("vgg11", "classifier.1")])
def test_the_first_fully_connected_layer_of_the_papers_networks(network: str, layer: str, tmp_path: Path) -> None:
    """fc6 after its ReLU, 4096 features: hidden widths 800 and 100 as published; random weights, a few steps."""
    import netgloss

    classifier = netgloss.load_classifier(f"torchvision:{network}", random_weights=True)
    folder = tmp_path / "store"
    store = netgloss.capture(classifier, netgloss.open_images("critters:8"), [layer], folder)
    assert store.shapes[layer] == (4096,)
    logits = torch.from_numpy(store.read_logits(store.valid))
    labels = logits[:, :2].argmax(dim=1).numpy()
    labels[:2] = (0, 1)
    stream = ActivationStream(store, layer, store.valid, reads="pooled", labels=labels)
    config = SRAEConfig(classes=("0", "1"), steps=17, attempts=1, batch_size=8)
    explainer = build_explainer(SRAE, config, stream.spec(num_classes=1000, image=()), seed=0)
    assert isinstance(explainer, SRAE)
    widths = [tuple(layer.weight.shape) for layer in explainer.nets.encoder]
    assert widths == [(2, 4096, 800), (2, 800, 100), (2, 100, 5)]
    fit(explainer, stream, seed=0)
    z = next(iter(stream.examples())).activation
    with torch.no_grad():
        concepts = explainer.encode(z)
        assert concepts.shape == (8, 10)
        assert explainer.decode(concepts).shape == (8, 4096)
        assert torch.isfinite(explainer.rebuilt_logits(concepts, logits)).all()


def test_two_processes_train_every_stage(tmp_path: Path) -> None:
    """DDP on the CPU: stages leave parameters out, the restart rule and the repair act alike in both processes."""
    import subprocess
    import sys

    import netgloss

    command = [
        *(sys.executable, "-m", "netgloss.cli", "explain", "srae", "--model", "critters", "--layer", "block5"),
        *("--images", "critters:64", "--out", str(tmp_path / "run"), "--classes", "0", "1", "--steps", "34"),
        *("--attempts", "2", "--seeds", "1", "--untrained-images", "0", "--device", "cpu", "--devices", "2"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    explainer = netgloss.load(tmp_path / "run").explainer
    assert isinstance(explainer, SRAE)
    assert (explainer.tries >= 1).all()
    assert all(torch.isfinite(p).all() for p in explainer.parameters())

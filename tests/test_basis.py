"""The interpretable basis: its rotation, its losses, its algebra, recovery of planted concepts, collapse."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from netgloss.errors import UserError
from netgloss.explainers.base import Batch, LayerSpec
from netgloss.explainers.basis import (
    InterpretableBasis,
    InterpretableBasisConfig,
    Plateau,
    inactive_classifier,
    maximum_margin,
    network_step,
    row_terms,
)
from netgloss.training import FitOptions, build_explainer, fit


class Rows:
    """Rows in memory, as the fit loop wants them."""

    layer = "layer"

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self.num_rows, self.num_features = rows.shape

    def chunks(self) -> Iterator[Tensor]:
        yield from self.rows.split(7000)

    def sample(self, max_rows: int, *, seed: int) -> Tensor:
        return self.rows[:max_rows]

    def batches(self, size: int, *, seed: int, start: int = 0, **unused: object) -> Iterator[Batch]:
        step = start
        while True:
            picks = torch.randint(len(self.rows), (size,), generator=torch.Generator().manual_seed(seed + 7919 * step))
            yield Batch(self.rows[picks], picks)
            step += 1


def haar(size: int, seed: int) -> Tensor:
    q, r = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed)))
    return q * r.diagonal().sign()


def planted(seed: int, *, features: int = 16, num: int = 20_000) -> tuple[Tensor, Tensor]:
    """Rows x = z R^T and the coordinate (num,) that is on in each."""
    generator = torch.Generator().manual_seed(100 + seed)
    z = 0.3 * torch.randn(num, features, generator=generator)
    on = torch.randint(features, (num,), generator=generator)
    z[torch.arange(num), on] += 2 + 2 * torch.rand(num, generator=generator)
    return z @ haar(features, 200 + seed).T, on


def make(rows: Tensor, *, seed: int = 0, **fields: object) -> InterpretableBasis:
    """An explainer that is ready to train on ``rows``."""
    config = InterpretableBasisConfig(**fields)  # type: ignore[arg-type]
    explainer = build_explainer(InterpretableBasis, config, LayerSpec("layer", (rows.shape[1],)), seed=seed)
    explainer.fit_rows(Rows(rows), seed=seed)
    assert isinstance(explainer, InterpretableBasis)
    return explainer


def fitted(rows: Tensor, *, seed: int = 0, log: list | None = None, **fields: object) -> InterpretableBasis:
    config = InterpretableBasisConfig(**fields)  # type: ignore[arg-type]
    explainer = build_explainer(InterpretableBasis, config, LayerSpec("layer", (rows.shape[1],)), seed=seed)
    keep = log.append if log is not None else None
    return fit(explainer, Rows(rows), seed=seed, log=keep, options=FitOptions(log_every=20))  # type: ignore[arg-type,return-value]


def orthogonality(weight: Tensor) -> float:
    return float((weight.T @ weight - torch.eye(len(weight))).abs().max())


# -- losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("y", "sparsity", "activation"),
    [
        ([1.0, 0.0, 0.0, 0.0], 0.0, 0.0),
        ([1.0, 1.0, 1.0, 1.0], 2.0, 0.0),
        ([0.5, 0.5, 0.5, 0.5], 2.0, 1.0),
        ([0.9, 0.3], 0.811278, 0.548244),
        ([1.0, 1.0], 1.0, 0.0),
    ],
)
def test_losses_of_known_assignments(y: list[float], sparsity: float, activation: float) -> None:
    logits = torch.tensor([y], dtype=torch.float64).logit().clamp(-1e3, 1e3)
    found = row_terms(logits)
    assert [float(found.sparsity), float(found.activation)] == pytest.approx([sparsity, activation], abs=1e-6)


def test_identity_of_activation_and_sparsity_and_no_nan_in_gradients() -> None:
    logits = (
        torch.rand(64, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 120 - 60
    ).requires_grad_()
    found = row_terms(logits)
    sparsity, activation = found.sparsity, found.activation
    norm = torch.sigmoid(logits).sum(1).log2().mean()
    assert float((activation - (sparsity - norm)).detach().abs()) < 1e-5
    found.value.backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    float32 = (torch.rand(64, 12) * 120 - 60).requires_grad_()
    row_terms(float32).value.backward()
    assert float32.grad is not None
    assert float32.grad.isfinite().all()


def test_gradients_of_every_term() -> None:
    logits = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    log_margin = torch.randn(4, dtype=torch.float64, requires_grad=True)
    for weights in ((1.0, 0.0), (0.0, 1.0), (2.6, 2.8)):
        for scale in (1.0, 400.0):  # the second goes by the logarithms
            assert torch.autograd.gradcheck(lambda v, w=weights, s=scale: row_terms(s * v, w, 1.7)[:2], (logits,))
    assert torch.autograd.gradcheck(maximum_margin, (log_margin,))
    assert torch.autograd.gradcheck(lambda v: inactive_classifier(row_terms(v, gamma=3.0).activity, 0.9), (logits,))


def test_inactive_classifier_counts_what_is_below_the_floor() -> None:
    activity = torch.tensor([0.1, 0.6])
    assert float(inactive_classifier(activity, 0.5)) == pytest.approx(0.4)  # .4 / .5, averaged over 2
    gated = inactive_classifier(activity, 0.5, running=torch.tensor([0.6, 0.2]))
    assert float(gated) == pytest.approx((0.5 - 0.6) / 0.5 / 2)  # only the second is below by the running mean
    assert float(inactive_classifier(activity, 0.5, running=activity)) == pytest.approx(0.4)
    halves = row_terms(torch.tensor([[0.0], [60.0]]), gamma=2.0)
    assert float(halves.activity) == pytest.approx(0.625)
    assert (float(halves.on), float(halves.none)) == (1, 1)


def test_gate_acts_on_small_batches_only() -> None:
    rows, _ = planted(0, num=4000)
    small, large = make(rows, tau=0.9), make(rows, tau=0.9)
    small.losses(Batch(rows[:200], torch.arange(200)))  # 200 * 0.9 / 16 < 16
    large.losses(Batch(rows[:2000], torch.arange(2000)))
    assert (small.running >= 0).all()
    assert (large.running == -1).all()


def test_network_steps() -> None:
    basis, xhat = haar(6, 0), torch.randn(9, 6, generator=torch.Generator().manual_seed(2))
    z, bias = xhat @ basis, torch.tensor(0.3)
    moved = (xhat + network_step(z, basis, bias)) @ basis
    torch.testing.assert_close(moved - bias, (z - bias).clamp_max(0), atol=1e-5, rtol=0)
    together = xhat + network_step(z, basis, bias, kappa=1.0)
    torch.testing.assert_close(together, together[:1].expand_as(together), atol=1e-5, rtol=0)


# -- the rotation -----------------------------------------------------------------------------------------------------


def test_rotation_stays_orthogonal_and_rebasing_keeps_it() -> None:
    rows, _ = planted(1, num=4000)
    explainer = make(rows, lr=1e-2, batch_size=512)
    assert orthogonality(explainer.basis.detach()) < 1e-5
    optimizer = explainer.optimizer()
    moments = None
    for step, batch in zip(range(500), Rows(rows).batches(512, seed=0), strict=False):
        sum(explainer.losses(batch).values()).backward()  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
        before = explainer.basis.detach().clone()
        explainer.after_step(step)
        assert float((explainer.basis.detach() - before).abs().max()) < 1e-5
        moments = optimizer.state[explainer.rotation.parametrizations.weight.original]  # type: ignore[union-attr,index]
        assert float(moments["step"]) == step + 1  # the same parameter throughout
    assert orthogonality(explainer.basis.detach()) < 1e-5
    explainer.eval()
    again = InterpretableBasis(explainer.config, explainer.spec)
    again.load_state_dict(explainer.state_dict())
    assert torch.equal(again.eval().basis, explainer.basis)
    assert orthogonality(again.basis) < 1e-5
    assert torch.equal(again.encode(rows[:5]), explainer.encode(rows[:5]))


def test_gradient_through_the_map_at_its_base_is_the_riemannian_one() -> None:
    explainer = make(torch.randn(50, 7, generator=torch.Generator().manual_seed(3)))
    weight = explainer.rotation.weight
    gradient = torch.randn(7, 7, generator=torch.Generator().manual_seed(4))
    (weight * gradient).sum().backward()
    found = explainer.rotation.parametrizations.weight.original.grad  # type: ignore[union-attr]
    w = weight.detach()
    torch.testing.assert_close(found, (w.T @ gradient - gradient.T @ w).tril(-1), atol=1e-5, rtol=0)


def test_start_is_haar_by_seed_or_the_own_axes() -> None:
    rows = torch.randn(40, 5)
    assert torch.equal(make(rows, seed=3).basis, make(rows, seed=3).basis)
    assert not torch.allclose(make(rows, seed=3).basis, make(rows, seed=4).basis)
    assert torch.equal(make(rows, init="identity").eval().basis, torch.eye(5))


# -- the algebra ------------------------------------------------------------------------------------------------------


def odd_rows() -> Tensor:
    """A dead, a constant and a huge feature among normal ones."""
    rows = torch.randn(3000, 6, generator=torch.Generator().manual_seed(5))
    rows[:, 0] = 0
    rows[:, 1] = 4.0
    rows[:, 2] = 1e4 + 300 * rows[:, 2]
    return rows


def test_decode_inverts_encode_and_filters_read_the_same_logits() -> None:
    rows = odd_rows()
    explainer = make(rows).eval()
    back = explainer.decode(explainer.encode(rows))
    assert float(((back - rows) / explainer.scale)[:, 2:].abs().max()) < 2e-4
    assert float((back - rows)[:, :2].abs().max()) < 1e-5
    filters, bias = explainer.filters()
    z, margin = explainer.encode(rows), float(explainer.log_margin.detach().exp())
    direct = rows.double() @ filters.double().T - bias.double()
    through = (z.double() - float(explainer.thresholds()[0])) / margin
    assert float((direct - through).abs().max()) < 0.01  # the huge and the dead feature cost digits in raw space
    torch.testing.assert_close(filters @ explainer.dictionary.T, torch.eye(6) / margin, atol=1e-3, rtol=0)
    assert torch.equal(explainer.assign(z, hard=True), explainer.assign(z) > 0.5)


def test_maps_equal_rows() -> None:
    explainer = make(torch.randn(100, 4)).eval()
    maps = torch.randn(3, 4, 5, 2)
    codes = explainer.encode(maps)
    torch.testing.assert_close(codes[1, :, 3, 1], explainer.encode(maps[1, :, 3, 1][None])[0])
    torch.testing.assert_close(explainer.decode(codes), maps, atol=1e-5, rtol=1e-4)
    assert explainer.assign(codes).shape == codes.shape


def test_contributions_sum_to_the_logit_of_a_linear_tail() -> None:
    explainer = make(torch.randn(200, 6).relu()).eval()
    head = nn.Linear(6, 3)
    maps = torch.randn(4, 6, 3, 3).relu()
    logits = head(maps.mean((2, 3)))
    z = explainer.encode(maps).mean((2, 3))  # (B, I)
    parts = z[:, None, :] * (head.weight @ explainer.dictionary.T)  # (B, classes, I)
    base = head.weight @ explainer.mean + head.bias
    torch.testing.assert_close(parts.sum(2) + base, logits, atol=1e-4, rtol=0)


def test_signal_vectors_are_regressions_over_the_rows_where_a_detector_is_on() -> None:
    rows, _ = planted(2, num=6000)
    explainer = fitted(rows, steps=200, lr=1e-2, tau=0.9, batch_size=1024)
    on = explainer.assign(explainer.encode(rows), hard=True)
    assert torch.equal(explainer.signal_rows, on.sum(0))
    torch.testing.assert_close(explainer.on_rate, on.float().mean(0))
    i = int(on.sum(0).argmax())
    x, z = rows[on[:, i]].double(), explainer.encode(rows)[on[:, i], i].double()
    slope = ((x - x.mean(0)) * (z - z.mean())[:, None]).mean(0) / z.var(correction=0)
    torch.testing.assert_close(explainer.signal_vectors[i].double(), slope, atol=1e-4, rtol=1e-3)
    reading = (explainer.basis.T * (explainer.signal_vectors / explainer.scale)).sum(1)
    torch.testing.assert_close(reading, torch.ones(16), atol=1e-3, rtol=0)


# -- learning ---------------------------------------------------------------------------------------------------------


def match_iou(on: Tensor, truth: Tensor) -> Tensor:
    """IoU of the best one-to-one match of detectors (N, I) to concepts (N, K)."""
    from scipy.optimize import linear_sum_assignment

    both = on.float().T @ truth.float()
    iou = both / (on.sum(0)[:, None] + truth.sum(0) - both).clamp_min(1)
    return iou[linear_sum_assignment(-iou.numpy())]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_planted_concepts_are_recovered(seed: int) -> None:
    rows, on = planted(seed)
    explainer = fitted(rows, seed=seed, lr=1e-2, steps=1500, preset="cbe", lambda_net=0.0)
    found = match_iou(explainer.assign(explainer.encode(rows), hard=True), torch.nn.functional.one_hot(on, 16).bool())
    assert (found > 0.5).all()
    assert float(found.mean()) >= 0.93
    assert not explainer.notes


def test_same_seed_gives_the_same_basis() -> None:
    rows, _ = planted(0, num=3000)
    one, two = (fitted(rows, steps=30, batch_size=256) for _ in range(2))
    assert torch.equal(one.basis, two.basis)


def test_killed_and_resumed_fit_equals_the_undisturbed_one() -> None:
    rows, _ = planted(3, num=3000)
    fields = {"steps": 230, "batch_size": 256, "lr": 1e-2, "tau": 0.9}

    class Memory:
        state = None

        def load(self) -> object:
            return self.state

        def save(self, tensors: dict[str, Tensor], values: dict) -> None:
            type(self).state = ({k: v.detach().clone() for k, v in tensors.items()}, dict(values))
            if values["step"] == 220:
                raise KeyboardInterrupt

    def run(checkpoint: object) -> InterpretableBasis:
        config = InterpretableBasisConfig(**fields)  # type: ignore[arg-type]
        explainer = build_explainer(InterpretableBasis, config, LayerSpec("layer", (16,)), seed=0)
        options = FitOptions(checkpoint_seconds=0)
        return fit(explainer, Rows(rows), seed=0, checkpoint=checkpoint, options=options)  # type: ignore[arg-type,return-value]

    with pytest.raises(KeyboardInterrupt):
        run(Memory())
    resumed, whole = run(Memory()), run(None)
    assert torch.equal(resumed.basis, whole.basis)
    assert torch.equal(resumed.bias, whole.bias)


def test_all_on_collapse_stops_with_advice() -> None:
    rows = torch.randn(4000, 16, generator=torch.Generator().manual_seed(6))
    config = InterpretableBasisConfig(lambda_s=0.85, lambda_ic=15, batch_size=512)
    explainer = InterpretableBasis(config, LayerSpec("layer", (16,)))
    explainer.fit_rows(Rows(rows), seed=0)
    with torch.no_grad():
        explainer.bias.fill_(-3.0)
    optimizer = explainer.optimizer()
    steps = []

    def train() -> None:
        for step, batch in zip(range(150), Rows(rows).batches(512, seed=0), strict=False):
            sum(explainer.losses(batch).values()).backward()  # type: ignore[union-attr]
            optimizer.step()
            optimizer.zero_grad()
            explainer.after_step(step)
            steps.append(step)

    with pytest.raises(UserError, match=r"all-on collapse.*raise lambda_s \(now 0.85\)"):
        train()
    assert steps[-1] == 98


def test_over_sparse_basis_is_told() -> None:
    rows, _ = planted(4, num=3000)
    explainer = make(rows, preset="uibe").eval()
    with torch.no_grad():
        explainer.bias.fill_(50.0)
    explainer.after_fit(Rows(rows))
    assert explainer.notes == [
        "over-sparse: 100% of the detectors are never on; raise tau (now 5, with lambda_ic above 0)"
    ]
    torch.testing.assert_close(explainer.signal_vectors, explainer.dictionary)


def test_history_holds_the_diagnostics() -> None:
    rows, _ = planted(5, num=3000)
    log: list[dict] = []
    fitted(rows, steps=40, batch_size=512, log=log)
    names = {"sparsity", "activation", "margin", "inactive", "effective_concepts", "actives", "none_on", "dead_share"}
    assert names | {"bias", "inverse_margin", "gradient_norm", "on_rate_median"} <= set(log[-1])
    assert [line["step"] for line in log] == [20, 40]
    assert all(math.isfinite(v) for v in log[-1].values())
    assert log[-1]["gradient_norm"] > 0


def test_plateau_halves_waits_and_stops() -> None:
    plateau = Plateau()
    for _ in range(400):
        plateau.add(1.0)  # the first window is the best; three more without gain
    assert plateau.lr_scale == 0.5
    assert not plateau.converged(3e-3)
    for _ in range(200):
        plateau.add(1.0)
    assert plateau.lr_scale == 0.5  # cooldown
    assert plateau.converged(3e-3)  # two changes of the 200-step mean below 0.1 %
    falling = Plateau()
    for step in range(2000):
        falling.add(10.0 - step / 300)
    assert falling.lr_scale == 1.0
    assert not falling.converged(3e-3)


def test_fit_stops_when_the_loss_stands_still() -> None:
    class Still(InterpretableBasis):
        def after_step(self, step: int) -> dict[str, float]:
            self.plateau.add(1.0)
            return {}

    rows, _ = planted(6, num=500)
    log: list[dict] = []
    config = InterpretableBasisConfig(steps=5000, batch_size=16)
    fit(Still(config, LayerSpec("layer", (16,))), Rows(rows), seed=0, log=log.append)  # type: ignore[arg-type]
    assert log[-1]["step"] == 600


# -- what a user can get wrong ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_concepts": 8}, "as many concepts as the layer has features: num_concepts = 8"),
        ({"preset": "best"}, "preset must be one of uibe, cbe, default, got 'best'"),
        ({"tau": 0.0}, "tau must be positive"),
        ({"lambda_s": -1.0}, "lambda_s must not be negative"),
    ],
)
def test_bad_options_are_one_clear_line(fields: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        InterpretableBasis(InterpretableBasisConfig(**fields), LayerSpec("layer", (16,)))


def test_presets() -> None:
    assert InterpretableBasisConfig(preset="uibe").inactive[0] == 0
    assert InterpretableBasisConfig(preset="cbe").inactive == (5, 0.9, 1.1)
    assert InterpretableBasisConfig().inactive == (5, 5, 3)
    assert InterpretableBasisConfig(preset="uibe", lambda_ic=2.0, tau=0.9).inactive == (2, 0.9, 3)


def test_constant_features_few_rows_and_equal_rows() -> None:
    explainer = make(odd_rows())
    assert explainer.notes == ["2 of 6 features are constant over the fit rows"]
    assert make(torch.randn(3, 6)).notes == ["fewer rows (3) than features (6): expect no recovery"]
    with pytest.raises(UserError, match="all 20 rows of layer 'layer' are equal"):
        make(torch.ones(20, 4))
    with pytest.raises(UserError, match="at least 2 rows"):
        make(torch.ones(1, 4))

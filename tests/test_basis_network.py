"""The interpretable basis with the network behind the layer (L_net), and in whitened space."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from netgloss.classifiers import load_classifier
from netgloss.data import open_images
from netgloss.errors import UserError
from netgloss.explainers.base import Batch, LayerSpec
from netgloss.explainers.basis import InterpretableBasis, InterpretableBasisConfig, network_certainty
from netgloss.training import build_explainer, fit
from netgloss.workflows.explain import explain


class Rows:
    """Rows in memory, as the fit loop wants them."""

    layer = "layer"

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self.num_rows, self.num_features = rows.shape

    def chunks(self) -> Iterator[Tensor]:
        yield from self.rows.split(700)

    def batches(self, size: int, *, seed: int, start: int = 0, **unused: object) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            picks = torch.randint(len(self.rows), (size,), generator=generator)
            yield Batch(self.rows[picks], picks)


def correlated(num: int = 3000, features: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(features, features, generator=generator)
    return torch.randn(num, features, generator=generator) @ mix * torch.tensor([1, 10, 0.1, 1, 1, 1.0]) + 3


def make(rows: Tensor, **fields: object) -> InterpretableBasis:
    config = InterpretableBasisConfig(**fields)  # type: ignore[arg-type]
    explainer = build_explainer(InterpretableBasis, config, LayerSpec("layer", (rows.shape[1],)), seed=0)
    explainer.fit_rows(Rows(rows), seed=0)
    assert isinstance(explainer, InterpretableBasis)
    return explainer


# -- the network term -------------------------------------------------------------------------------------------------


def test_network_certainty_of_known_predictions() -> None:
    assert float(network_certainty(torch.zeros(3, 4))) == pytest.approx(-2.0)
    assert float(network_certainty(torch.tensor([[100.0, 0.0], [0.0, 0.0]]))) == pytest.approx(-0.5)
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(network_certainty, (logits,))


@pytest.mark.parametrize("network", ["cnn", "uur"])
def test_network_term_is_that_of_the_moved_activation(network: str) -> None:
    rows = correlated()
    explainer = make(rows, lambda_net=1.0, lambda_s=0.0, lambda_ma=0.0, lambda_mm=0.0, lambda_ic=0.0, network=network)
    whole = rows[:12].reshape(3, 2, 2, 6).permute(0, 3, 1, 2)
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    seen: list[Tensor] = []

    def tail(activation: Tensor) -> Tensor:
        seen.append(activation)
        return activation.mean((2, 3)) @ weight

    torch.manual_seed(5)
    terms = explainer.losses(Batch(rows[:100], torch.arange(100), whole=whole, tail=tail))
    moved = explainer.encode(seen[0]) - explainer.thresholds()[:, None, None]
    before = explainer.encode(whole) - explainer.thresholds()[:, None, None]
    if network == "cnn":
        torch.testing.assert_close(moved, before.clamp_max(0), atol=1e-4, rtol=0)
    else:
        left = (moved / before).flatten(1).detach()
        torch.testing.assert_close(left, left[:, :1].expand_as(left), atol=1e-3, rtol=0)  # one kappa an image
        assert bool(((left > 0.099) & (left < 0.501)).all())
        assert len({round(float(v), 3) for v in left[:, 0]}) == 3
    torch.testing.assert_close(terms["network"], network_certainty(tail(seen[0])))
    sum(terms.values()).backward()  # type: ignore[union-attr]
    assert float(explainer.bias.grad.abs()) > 0  # type: ignore[union-attr]
    assert float(explainer._cayley.original.grad.abs().max()) > 0


def test_the_gradient_of_the_network_term_is_that_of_finite_differences() -> None:
    rows = correlated().double()
    explainer = make(rows, lambda_net=0.25).double()
    whole = rows[:12].reshape(3, 2, 2, 6).permute(0, 3, 1, 2)
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def value(bias: float) -> Tensor:
        with torch.no_grad():
            explainer.bias.fill_(bias)
        batch = Batch(rows[:100], torch.arange(100), whole=whole, tail=lambda a: a.mean((2, 3)) @ weight)
        return explainer.losses(batch)["network"]

    value(0.3).backward()
    slope = float((value(0.3 + 1e-6) - value(0.3 - 1e-6)).detach() / 2e-6)
    assert float(explainer.bias.grad) == pytest.approx(slope, rel=1e-4)  # type: ignore[arg-type]


def test_a_fit_asks_for_the_tail_only_with_the_network_term() -> None:
    needs = InterpretableBasis.needs
    assert needs(InterpretableBasisConfig()) == ()
    assert needs(InterpretableBasisConfig(preset="cbe")) == ("tail",)
    assert needs(InterpretableBasisConfig(preset="cbe", lambda_net=0.0)) == ()
    assert InterpretableBasisConfig(preset="cbe").network_weight == 0.25
    explainer = make(correlated(), preset="cbe")
    with pytest.raises(UserError, match="lambda_net needs the network behind the layer"):
        explainer.losses(Batch(correlated()[:20], torch.arange(20)))
    with pytest.raises(UserError, match="network must be one of cnn, uur, got 'rnn'"):
        InterpretableBasisConfig(network="rnn")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="lambda_net must not be negative"):
        InterpretableBasisConfig(lambda_net=-1.0)


def test_a_run_learns_with_the_network_term(tmp_path: Path) -> None:
    classifier = load_classifier("critters")
    fields = {"preset": "cbe", "steps": 12, "batch_size": 256}
    run = explain("basis", classifier, "block5", open_images("critters:24"), out=tmp_path / "run", seeds=1, **fields)
    lines = [json.loads(line) for line in (run.path / "history.jsonl").read_text().splitlines()]
    assert -math.log2(len(classifier.class_names)) * 0.25 <= lines[-1]["network"] <= 0
    assert lines[-1]["loss"] == pytest.approx(
        sum(lines[-1][k] for k in ("assignment", "margin", "inactive", "network")), rel=1e-4
    )


# -- whitened space ---------------------------------------------------------------------------------------------------


def test_whitened_rows_are_uncorrelated_and_everything_else_follows() -> None:
    rows = correlated()
    explainer = make(rows, whiten=True, batch_size=500, steps=30)
    fit(explainer, Rows(rows), seed=0)  # type: ignore[arg-type]
    z = explainer.encode(rows)
    torch.testing.assert_close(z.T @ z / len(z), torch.eye(6), atol=1e-3, rtol=0)
    torch.testing.assert_close(explainer.decode(z), rows, atol=1e-3, rtol=1e-4)
    filters, biases = explainer.filters()
    margin = explainer.log_margin.detach().exp()
    torch.testing.assert_close(rows @ filters.T - biases, (z - explainer.thresholds()) / margin, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(filters @ explainer.dictionary.T, torch.eye(6) / margin, atol=1e-4, rtol=1e-4)
    gains = (filters * margin * explainer.signal_vectors).sum(1)
    torch.testing.assert_close(gains, torch.ones(6), atol=1e-3, rtol=0)


def test_whitening_survives_features_that_say_nothing_new() -> None:
    rows = correlated()
    rows = torch.cat([rows, rows[:, :1] + rows[:, 1:2]], dim=1)
    explainer = make(rows, whiten=True)
    z = explainer.encode(rows)
    assert bool(z.isfinite().all())
    torch.testing.assert_close(explainer.decode(z), rows, atol=1e-2, rtol=1e-3)

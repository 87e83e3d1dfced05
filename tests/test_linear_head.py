"""Linear heads: each kind of feature against its closed form, the head's identities, bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from netgloss.errors import UserError
from netgloss.explainers.base import LayerSpec
from netgloss.explainers.linear_head import LinearHead, LinearHeadConfig
from netgloss.explainers.names import find_explainer
from netgloss.explainers.nmf import NMF, NMFConfig
from netgloss.explainers.pca import PCA, PCAConfig
from netgloss.training import ActivationStream, build_explainer, fit
from test_srae import planted, stream_of

KINDS = ["pca", "nmf", "random", "neurons", "omp", "lasso"]
SPEC = LayerSpec("l", (120,), nonnegative=True, num_classes=3)


def fitted(tmp_path: Path, *, seed: int = 0, **changes: Any) -> tuple[LinearHead, ActivationStream]:
    values, logits, labels, _ = planted(200)
    stream = stream_of(tmp_path / "s", values, logits, labels)
    config = LinearHeadConfig(**({"num_concepts": 3, "classes": ("1", "0")} | changes))
    explainer = fit(build_explainer(LinearHead, config, SPEC, seed=seed), stream, seed=seed)
    assert isinstance(explainer, LinearHead)
    return explainer, stream


def table_of(explainer: LinearHead, values: Tensor, g: int) -> Tensor:
    """Codes of the class's own concepts and ones, float64."""
    n = explainer.config.num_concepts
    own = slice(0, n) if explainer.num_groups == 1 else slice(g * n, (g + 1) * n)
    x = explainer.encode(values)[:, own].double()
    return torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], dim=1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_head_is_least_squares_and_adds_up(tmp_path: Path, kind: str) -> None:
    explainer, _ = fitted(tmp_path, features=kind)
    values, logits, _, _ = planted(200)
    with torch.no_grad():
        concepts = explainer.encode(values)
        rebuilt = explainer.rebuilt_logits(concepts, logits)
        for g, c in enumerate((1, 0)):
            parts, base = explainer.contributions(concepts, torch.full((200,), c)) or (torch.empty(0), torch.empty(0))
            torch.testing.assert_close(parts.sum(1) + base, rebuilt[:, c], rtol=1e-4, atol=1e-4)
            table = table_of(explainer, values, g)
            error = rebuilt[:, c].double() - logits[:, c].double()
            assert float((table.T @ error).abs().max()) < 1e-3 * len(values)  # the normal equations
        torch.testing.assert_close(rebuilt[:, 2], logits[:, 2])
        torch.testing.assert_close(explainer.decode(concepts), explainer.decode_modules(concepts).mean(0))
    assert len(explainer.name_concepts()) == explainer.num_concepts == (3 if kind in KINDS[:3] else 6)


def test_shared_features_are_those_of_their_own_methods(tmp_path: Path) -> None:
    values = planted(200)[0]
    for kind, other, config in (("pca", PCA, PCAConfig(num_concepts=3)), ("nmf", NMF, NMFConfig(num_concepts=3))):
        explainer, stream = fitted(tmp_path / kind, features=kind)
        known = fit(build_explainer(other, config, SPEC, seed=0), stream, seed=0)
        with torch.no_grad():
            codes, expected = explainer.encode(values), known.encode(values)
            torch.testing.assert_close(codes.abs(), expected.abs(), rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(explainer.decode(codes), known.decode(expected), rtol=1e-3, atol=1e-4)
    random, _ = fitted(tmp_path / "random", features="random")
    again = random.decode(random.encode(values))
    torch.testing.assert_close(random.encode(again), random.encode(values), rtol=1e-3, atol=1e-3)  # a projection


def test_chosen_features_carry_the_score(tmp_path: Path) -> None:
    """A score that is a sum of two features: pursuit and lasso find them, and the head has their weights."""
    g = torch.Generator().manual_seed(0)
    values = torch.rand(300, 12, generator=g)
    logits = torch.stack([3 * values[:, 4] + 2 * values[:, 9] - 1, torch.randn(300, generator=g)], dim=1)
    stream = stream_of(tmp_path / "s", values, logits, (values[:, 4] < 0.5).long())
    spec = LayerSpec("l", (12,), nonnegative=True, num_classes=2)
    for kind in ("neurons", "omp", "lasso"):
        config = LinearHeadConfig(num_concepts=2, classes=("0: tench",), features=kind)  # type: ignore[arg-type]
        explainer = fit(build_explainer(LinearHead, config, spec, seed=0), stream, seed=0)
        assert isinstance(explainer, LinearHead)
        assert explainer.name_concepts() == ["tench: feature 4", "tench: feature 9"]
        torch.testing.assert_close(explainer.weight[:, 0], torch.tensor([3.0, 2.0]), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(explainer.bias, torch.tensor([-1.0]), rtol=1e-4, atol=1e-4)
        rebuilt = explainer.decode(explainer.encode(values))
        torch.testing.assert_close(rebuilt[:, [4, 9]], values[:, [4, 9]])
        torch.testing.assert_close(rebuilt[:, 0], values[:, 0].mean().expand(300))


def test_nmf_codes_have_a_gradient(tmp_path: Path) -> None:
    explainer, _ = fitted(tmp_path, features="nmf")
    values = planted(20)[0].requires_grad_(True)
    explainer.encode(values).sum().backward()
    assert values.grad is not None
    assert values.grad.abs().sum() > 0


def test_shuffled_scores_are_a_control(tmp_path: Path) -> None:
    plain, _ = fitted(tmp_path / "plain", features="pca")
    shuffled, _ = fitted(tmp_path / "shuffled", features="pca", shuffle_logits=True)
    values, logits, _, _ = planted(200)

    def error(explainer: LinearHead) -> float:
        with torch.no_grad():
            return float((explainer.class_scores(explainer.encode(values))[:, 0] - logits[:, 1]).square().mean())

    assert error(plain) < 0.1 * float(logits[:, 1].var())
    assert error(shuffled) > 0.9 * float(logits[:, 1].var())
    assert any("control" in note for note in shuffled.notes)


def test_bad_input(tmp_path: Path) -> None:
    assert find_explainer("linear-head") is LinearHead
    with pytest.raises(UserError, match="features must be one of"):
        LinearHeadConfig(features="ica")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="needs the classes"):
        LinearHead(LinearHeadConfig(), SPEC)
    with pytest.raises(UserError, match="at most one concept a feature"):
        LinearHead(LinearHeadConfig(num_concepts=121, classes=("1",)), SPEC)
    values, logits, labels, _ = planted(4)
    labels[0] = 1
    explainer = build_explainer(LinearHead, LinearHeadConfig(num_concepts=5, classes=("1",)), SPEC, seed=0)
    with pytest.raises(UserError, match="needs more than 5 images"):
        fit(explainer, stream_of(tmp_path / "few", values, logits, labels), seed=0)
    values, logits, labels, _ = planted(40)
    with pytest.raises(UserError, match="which this store does not hold"):
        fit(explainer, stream_of(tmp_path / "none", values, None, labels), seed=0)
    assert explainer.bias.isfinite().all()


def test_from_classifier_to_report(tmp_path: Path) -> None:
    import netgloss

    run = netgloss.explain(
        "linear-head",
        "critters",
        "block5",
        "critters:40",
        out=tmp_path / "run",
        seeds=1,
        evaluation=netgloss.EvaluationOptions(untrained_images=0),
        num_concepts=2,
        features="nmf",
        classes=("0", "5"),
    )
    assert [concept["name"] for concept in run.concepts["concepts"]] == ["part 1", "part 2"]
    scores = {score.metric: score for score in run.scores}
    assert {"agreement", "logit_rmse", "significant_concepts", "neurons_rebuilt"} <= set(scores)
    entry = next(image["explained"] for image in run.concepts["images"] if image["explained"])
    told = entry["base"] + sum(driver["contribution"] for driver in entry["drivers"]) + entry["others"] + entry["gap"]
    assert told == pytest.approx(entry["logit"], abs=1e-3)

"""BatchTopKSAE, JumpReLUSAE and the sparse gradients that all sparse autoencoders share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from netgloss.errors import UserError
from netgloss.explainers.base import Batch, LayerSpec
from netgloss.explainers.batch_topk_sae import BatchTopKSAE, BatchTopKSAEConfig
from netgloss.explainers.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from netgloss.explainers.sparse_autoencoder import read, write


class ArrayRows:
    """Rows held in memory."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    @property
    def num_rows(self) -> int:
        return len(self.rows)

    @property
    def num_features(self) -> int:
        return self.rows.shape[1]

    def chunks(self) -> Iterator[Tensor]:
        return iter(self.rows.split(100))

    def sample(self, max_rows: int, *, seed: int) -> Tensor:
        order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(seed))
        return self.rows[order[:max_rows]]


def batch(rows: Tensor) -> Batch:
    return Batch(rows, torch.zeros(len(rows), dtype=torch.long))


def batch_topk(num_features: int, **options: Any) -> BatchTopKSAE:
    return BatchTopKSAE(BatchTopKSAEConfig(**options), LayerSpec("layer", (num_features,)))


def jumprelu(num_features: int, **options: Any) -> JumpReLUSAE:
    return JumpReLUSAE(JumpReLUSAEConfig(**options), LayerSpec("layer", (num_features,)))


def train(model: Any, rows: Tensor) -> dict[str, float]:
    """What netgloss.training does; the last step's terms."""
    optimizer = model.optimizer()
    terms: dict[str, Tensor] = {}
    for step in range(model.config.steps):
        chosen = torch.randint(len(rows), (model.config.batch_size,), generator=torch.Generator().manual_seed(step))
        for group in optimizer.param_groups:
            group["lr"] = model.config.lr * model.lr_scale(step)
        terms = model.losses(batch(rows[chosen]))
        optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        optimizer.step()
        model.after_step(step)
    model.after_fit(ArrayRows(rows))
    return {name: term.item() for name, term in terms.items()}


def planted(n: int = 4000, k: int = 24, c: int = 16, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Rows with one to five of 24 unit atoms, the codes and the atoms."""
    g = torch.Generator().manual_seed(seed)
    atoms = F.normalize(torch.randn(k, c, generator=g), dim=1)
    count = torch.randint(1, 6, (n, 1), generator=g)
    used = torch.rand(n, k, generator=g).argsort(dim=1).argsort(dim=1) < count
    codes = (0.5 + torch.rand(n, k, generator=g)) * used
    return codes @ atoms, codes, atoms


def matched_cosine(dictionary: Tensor, atoms: Tensor) -> float:
    cosine = F.normalize(dictionary.detach(), dim=1) @ atoms.T
    return float(cosine[linear_sum_assignment(-cosine.numpy())].mean())


# -- sparse gradients -------------------------------------------------------------------------------------------------


def test_sparse_gradients_equal_dense_ones() -> None:
    """Reading and writing through triples, with rows and atoms without any, against the same with masks."""
    g = torch.Generator().manual_seed(0)
    y = torch.randn(7, 5, generator=g, dtype=torch.float64)
    encoder, atoms = (torch.randn(6, 5, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(2))
    at_zero = torch.randn(6, generator=g, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(7, 6, generator=g) < 0.4
    mask[2] = mask[:, 3] = False
    values, triples = read(y, encoder, at_zero, lambda _: tuple(mask.nonzero(as_tuple=True)))  # type: ignore[arg-type]
    sparse = write(values.square(), atoms, triples)
    dense = torch.where(mask, y @ encoder.T + at_zero, 0).square() @ atoms
    torch.testing.assert_close(sparse, dense)
    weight = torch.randn(dense.shape, generator=g, dtype=torch.float64)
    wrt = (encoder, at_zero, atoms)
    got, expected = (torch.autograd.grad((out * weight).sum(), wrt) for out in (sparse, dense))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


# -- BatchTopK --------------------------------------------------------------------------------------------------------


def by_hand(model: Any) -> Any:
    """Two features, three atoms: the two axes, and the negative first axis."""
    model = model.double()
    with torch.no_grad():
        model.decoder.copy_(torch.tensor([[1.0, 0], [0, 1], [-1, 0]]))
        model.encoder.copy_(model.decoder)
    return model


def test_a_batch_shares_its_atoms_out() -> None:
    """Rows (5, 4) and (1, 0.5) with k = 1: both atoms go to the first row, the second one gets none."""
    model = by_hand(batch_topk(2, num_concepts=3, top_k=1))
    terms = model.losses(batch(torch.tensor([[5.0, 4.0], [1.0, 0.5]], dtype=torch.float64)))
    assert terms["reconstruction"].item() == pytest.approx((0 + 0 + 1 + 0.25) / 4)
    assert model.silent_steps.tolist() == [0, 0, 1]


def test_the_threshold_is_the_smallest_activation_that_a_batch_keeps() -> None:
    model = by_hand(batch_topk(2, num_concepts=3, top_k=1, batch_size=2, threshold_batches=1))
    rows = torch.tensor([[5.0, 4.0], [1.0, 0.5]], dtype=torch.float64)
    model.after_fit(ArrayRows(rows))
    assert model.threshold.item() == 4.0
    assert model.encode(rows).tolist() == [[5.0, 0.0, 0.0], [0.0, 0.0, 0.0]], "above 4, not at it"
    model.threshold.fill_(0.75)
    assert model.encode(rows).tolist() == [[5.0, 4.0, 0.0], [1.0, 0.0, 0.0]], "a row alone gets the same codes"


def test_rows_with_nothing_above_zero_keep_nothing() -> None:
    model = by_hand(batch_topk(2, num_concepts=3, top_k=2))
    rows = torch.tensor([[0.0, -1.0], [0.0, -2.0]], dtype=torch.float64)
    terms = model.losses(batch(rows))
    assert terms["reconstruction"].item() == pytest.approx((1 + 4) / 4)
    model.after_fit(ArrayRows(rows))
    assert model.threshold.item() == 0


def test_batch_topk_finds_planted_atoms_and_varies_their_number() -> None:
    rows, codes, atoms = planted()
    model = batch_topk(16, num_concepts=24, top_k=3, batch_size=512, steps=1500, lr=3e-3, dead_steps=50)
    model.fit_rows(ArrayRows(rows), seed=0)
    last = train(model, rows)
    assert matched_cosine(model.dictionary, atoms) > 0.9
    assert last["reconstruction"] < 0.1
    found = (model.encode(rows) > 0).sum(1).float()
    assert found.mean().item() == pytest.approx(3, rel=0.1)
    truth = (codes > 0).sum(1).float()
    assert float(torch.corrcoef(torch.stack([found, truth]))[0, 1]) > 0.6, "hard rows get more atoms"


# -- JumpReLU ---------------------------------------------------------------------------------------------------------


def test_jumprelu_codes_and_losses_of_a_tiny_example() -> None:
    model = by_hand(jumprelu(2, num_concepts=3, target_l0=1.0, l0_weight=0.5))
    with torch.no_grad():
        model.log_threshold.copy_(torch.tensor([2.0, 3.0, 1.0]).log())
    rows = torch.tensor([[2.5, 2.5], [-1.5, 4.0]], dtype=torch.float64)
    assert model.encode(rows).tolist() == [[2.5, 0.0, 0.0], [0.0, 4.0, 1.5]]
    terms = model.losses(batch(rows))
    assert terms["reconstruction"].item() == pytest.approx(2.5**2 / 4)
    assert terms["sparsity"].item() == pytest.approx(0.5 * (1.5 / 1 - 1) ** 2)


def test_threshold_gradient_is_the_straight_through_estimate() -> None:
    """One atom, three rows: one in the window below the threshold, one in it above, one far above."""
    model = jumprelu(1, num_concepts=1, target_l0=0.0, l0_weight=0.7, bandwidth=0.5).double()
    with torch.no_grad():
        model.decoder.fill_(1)
        model.encoder.fill_(1)
        model.log_threshold.fill_(0.0)  # t = 1
    rows = torch.tensor([[0.8], [1.2], [3.0]], dtype=torch.float64)
    terms = model.losses(batch(rows))
    (gradient,) = torch.autograd.grad(terms["reconstruction"], model.log_threshold, retain_graph=True)
    # d reconstruction / d z = -2 (y - y^) / N: only row 0 has an error, 0.8; d z / d t = -(t / e) inside the window
    assert gradient.item() == pytest.approx(-2 * 0.8 / 3 * (-1 / 0.5))
    (gradient,) = torch.autograd.grad(terms["sparsity"], model.log_threshold)
    # L0 / K with K = 1: mean over three rows, two of which lie in the window
    assert gradient.item() == pytest.approx(0.7 * (2 / 3) * (-1 / 0.5))


def test_threshold_gradient_estimates_that_of_the_expected_loss() -> None:
    """With many rows the estimate is the derivative of the expected L0, which is the density at the threshold."""
    rows = torch.randn(400_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = jumprelu(1, num_concepts=1, target_l0=0.0, bandwidth=0.1).double()
    with torch.no_grad():
        model.decoder.fill_(1)
        model.encoder.fill_(1)
        model.log_threshold.fill_(-0.7)
    (gradient,) = torch.autograd.grad(model.losses(batch(rows))["sparsity"], model.log_threshold)
    t = torch.tensor(-0.7).exp().item()
    density = torch.distributions.Normal(0.0, 1.0).log_prob(torch.tensor(t)).exp().item()
    assert gradient.item() == pytest.approx(-t * density, rel=0.02)


def test_jumprelu_starts_at_the_asked_number_of_atoms() -> None:
    rows = planted()[0]
    model = jumprelu(16, num_concepts=24, target_l0=3.0)
    model.fit_rows(ArrayRows(rows), seed=0)
    assert (model.encode(rows) > 0).sum(1).float().mean().item() == pytest.approx(3, rel=0.02)


def test_jumprelu_finds_planted_atoms_at_the_asked_number() -> None:
    rows, _, atoms = planted()
    model = jumprelu(16, num_concepts=24, target_l0=3.0, batch_size=512, steps=2500, lr=3e-3)
    model.fit_rows(ArrayRows(rows), seed=0)
    last = train(model, rows)
    assert matched_cosine(model.dictionary, atoms) > 0.9
    assert last["reconstruction"] < 0.1
    assert (model.encode(rows) > 0).sum(1).float().mean().item() == pytest.approx(3, rel=0.1)


@pytest.mark.parametrize("make", [batch_topk, jumprelu])
def test_encode_has_gradients_and_maps_go_through(make: Any) -> None:
    rows = planted()[0]
    model = make(16, num_concepts=24)
    model.fit_rows(ArrayRows(rows), seed=0)
    maps = rows[:40].reshape(2, 4, 5, 16).permute(0, 3, 1, 2)
    torch.testing.assert_close(model.encode(maps)[1, :, 3, 4], model.encode(rows[39:40])[0])
    assert torch.autograd.gradcheck(model.double().encode, rows[:4].double().requires_grad_())


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (BatchTopKSAEConfig, {"top_k": 17, "num_concepts": 16}),
        (BatchTopKSAEConfig, {"threshold_batches": 0}),
        (JumpReLUSAEConfig, {"target_l0": 17.0, "num_concepts": 16}),
        (JumpReLUSAEConfig, {"target_l0": -1.0}),
        (JumpReLUSAEConfig, {"bandwidth": 0.0}),
        (JumpReLUSAEConfig, {"l0_weight": -1.0}),
        (JumpReLUSAEConfig, {"dead_steps": 0}),
    ],
)
def test_options(config: Any, options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(options))} must "):
        config(**options)

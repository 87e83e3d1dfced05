"""Semi-NMF: the paper's rules lower the error, planted signed parts are found, limits by hand."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from scipy.optimize import linear_sum_assignment, nnls

from netgloss.errors import UserError
from netgloss.explainers.base import LayerSpec
from netgloss.explainers.semi_nmf import SemiNMF, SemiNMFConfig, semi_nmf
from test_explainers import ArrayRows


def model(num_features: int, **options: int) -> SemiNMF:
    return SemiNMF(SemiNMFConfig(**options), LayerSpec("layer", (num_features,)))  # type: ignore[arg-type]


def planted(n: int = 800, k: int = 4, c: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    codes = -torch.rand(n, k, generator=g).log() * (torch.rand(n, k, generator=g) < 0.5)
    atoms = torch.nn.functional.normalize(torch.randn(k, c, generator=g), dim=1)
    return codes @ atoms, atoms


def test_one_iteration_by_hand() -> None:
    """X = [[1, -1]], Z = [[2]], one part: W = X / 2; the numerator of Z is (X W^T)^+ = 1, W W^T = 1/2: Z stays."""
    rows, codes = torch.tensor([[1.0, -1.0]]), torch.tensor([[2.0]])
    codes, parts, errors = semi_nmf(rows, codes, max_iter=1)
    assert codes.tolist() == [[2.0]]
    assert parts.tolist() == [[0.5, -0.5]]
    assert errors == pytest.approx([0, 0], abs=1e-7)


def test_two_rows_by_hand() -> None:
    """X = [[1], [-1]], Z = [[1], [1/2]]: W = (1 - 1/2) / (5/4) = 2/5, and the rule of eq. 11 element by element."""
    codes, parts, errors = semi_nmf(torch.tensor([[1.0], [-1.0]]), torch.tensor([[1.0], [0.5]]), max_iter=1)
    w = 0.4
    first = (w / w**2) ** 0.5  # up: X W^T = w, down: Z W W^T = w^2
    second = 0.5 * (0 / (w + 0.5 * w**2)) ** 0.5
    assert codes.flatten().tolist() == pytest.approx([first, second])
    assert parts.item() == pytest.approx(1 / first)
    assert errors == pytest.approx([((1 - w) ** 2 + (1 + w / 2) ** 2) / 2, 0.5], abs=1e-6)


def test_error_never_rises_and_is_the_real_one() -> None:
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(200, 9, generator=g, dtype=torch.float64)
    codes, parts, errors = semi_nmf(rows, torch.rand(200, 5, generator=g, dtype=torch.float64) + 0.2, max_iter=60)
    assert all(after <= before + 1e-12 for before, after in pairwise(errors))
    assert errors[-1] < 0.8 * errors[0]
    assert errors[-1] == pytest.approx(float((rows - codes @ parts).square().sum() / rows.square().sum()))
    assert (codes >= 0).all()


def test_the_cone_of_planted_parts_is_found() -> None:
    """Parts are not unique (any wider cone fits as well); what can be found is a cone that holds the planted ones."""
    rows, atoms = planted()
    found = model(12, num_concepts=4, max_iter=2000)
    found.fit_rows(ArrayRows(rows), seed=0)
    torch.testing.assert_close(found.dictionary.norm(dim=1), torch.ones(4))
    for inside in (rows, atoms):
        assert float((found(inside) - inside).square().sum() / inside.square().sum()) < 1e-4
    assert float((found(-atoms) + atoms).square().sum(1).min()) > 0.1, "a cone, not the whole subspace"
    cosine = found.dictionary @ atoms.T
    assert float(cosine[linear_sum_assignment(-cosine.numpy())].median()) > 0.95


def test_codes_are_the_exact_least_squares() -> None:
    rows, _ = planted()
    found = model(12, num_concepts=4)
    found.fit_rows(ArrayRows(rows), seed=1)
    parts = found.dictionary.T.double().numpy()
    expected = torch.stack([torch.from_numpy(nnls(parts, x)[0]) for x in rows[:20].double().numpy()])
    torch.testing.assert_close(found.encode(rows[:20]).double(), expected, atol=1e-4, rtol=1e-3)


def test_k_means_is_the_start_and_seeds_differ() -> None:
    rows, _ = planted()
    one, other = model(12, num_concepts=6, max_iter=1), model(12, num_concepts=6, max_iter=1)
    one.fit_rows(ArrayRows(rows), seed=0)
    other.fit_rows(ArrayRows(rows), seed=1)
    assert not torch.allclose(one.dictionary, other.dictionary)
    assert one.notes == ["stopped after max_iter = 1 iterations, still improving"]


def test_bad_rows() -> None:
    with pytest.raises(UserError, match="all rows of layer 'layer' are zero"):
        model(3, num_concepts=2).fit_rows(ArrayRows(torch.zeros(5, 3)), seed=0)
    with pytest.raises(UserError, match="needs at least 4 rows"):
        model(3, num_concepts=4).fit_rows(ArrayRows(torch.ones(3, 3)), seed=0)
    with pytest.raises(UserError, match="max_iter must be at least 1"):
        model(3, max_iter=0)

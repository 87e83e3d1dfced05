"""The methods on rows: planted dictionaries found again, algebraic identities, and what they say to bad rows."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment, nnls
from torch import Tensor

from netgloss.errors import UserError
from netgloss.explainers.base import Explainer, LayerSpec, to_rows
from netgloss.explainers.names import find_explainer, method_name
from netgloss.explainers.nmf import nonnegative_codes
from netgloss.explainers.rows import LinearExplainer, RowsExplainer, feature_moments

DIRECT = ["pca", "ica", "nmf", "kmeans", "natural-axes", "random-directions"]
METHODS = [*DIRECT, "topk-sae"]


class ArrayRows:
    """Rows held in memory, handed out in chunks."""

    def __init__(self, rows: Tensor, chunk: int = 97) -> None:
        self.rows, self.chunk = rows, chunk

    @property
    def num_rows(self) -> int:
        return len(self.rows)

    @property
    def num_features(self) -> int:
        return self.rows.shape[1]

    def chunks(self) -> Iterator[Tensor]:
        return iter(self.rows.split(self.chunk))

    def sample(self, max_rows: int, *, seed: int) -> Tensor:
        order = torch.randperm(self.num_rows, generator=torch.Generator().manual_seed(seed))
        return self.rows[order[:max_rows]]


def make(method: str, num_features: int, **options: Any) -> Any:
    cls = find_explainer(method)
    if method == "topk-sae":
        options = {"top_k": min(2, options.get("num_concepts", 2))} | options
    return cls(cls.Config(**options), LayerSpec("layer", (num_features, 5, 4), nonnegative=True))


def fitted(method: str, rows: Tensor, *, seed: int = 0, **options: Any) -> Any:
    explainer = make(method, rows.shape[1], **options)
    explainer.fit_rows(ArrayRows(rows), seed=seed)
    return explainer


def planted(n: int = 600, k: int = 4, c: int = 12, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (n, c) = codes (n, k) @ atoms (k, c), all >= 0, sparse exponential codes, unit atoms."""
    g = torch.Generator().manual_seed(seed)
    codes = -torch.rand(n, k, generator=g).log() * (torch.rand(n, k, generator=g) < 0.4)
    atoms = torch.rand(k, c, generator=g) * (torch.rand(k, c, generator=g) < 0.5)
    atoms[torch.arange(k), torch.arange(k)] += 0.5
    atoms = torch.nn.functional.normalize(atoms, dim=1)
    return codes @ atoms, codes, atoms


def matched_cosine(found: Tensor, truth: Tensor) -> Tensor:
    """|cosine| of each true atom with its partner in the best one-to-one matching."""
    normal = torch.nn.functional.normalize
    cosine = (normal(truth.double(), dim=1) @ normal(found.double(), dim=1).T).abs()
    row, col = linear_sum_assignment(-cosine.numpy())
    return cosine[row, col]


# -- the contract, for every method -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_found_by_its_file_name(method: str) -> None:
    assert method_name(find_explainer(method)) == method


@pytest.mark.parametrize("method", METHODS)
def test_maps_are_encoded_position_by_position(method: str) -> None:
    explainer = fitted(method, planted()[0], num_concepts=3)
    maps = planted(2 * 5 * 4, seed=1)[0].reshape(2, 5, 4, 12).permute(0, 3, 1, 2)
    codes = explainer.encode(maps)
    assert codes.shape == (2, 3, 5, 4)
    torch.testing.assert_close(to_rows(codes), explainer.encode(to_rows(maps)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(explainer.decode(codes), explainer(maps))


@pytest.mark.parametrize("method", METHODS)
def test_state_dict_is_the_whole_explainer(method: str) -> None:
    rows = planted()[0]
    old, new = fitted(method, rows, num_concepts=3), make(method, 12, num_concepts=3)
    new.load_state_dict(old.state_dict())
    assert torch.equal(old.encode(rows), new.encode(rows))
    assert torch.equal(old(rows), new(rows))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_activations(method: str, dtype: torch.dtype) -> None:
    rows = planted()[0].to(dtype)
    explainer = fitted(method, rows.float(), num_concepts=3)
    assert explainer.encode(rows).dtype == torch.float32
    assert torch.equal(explainer.encode(rows), explainer.encode(rows.float()))
    assert explainer.decode(explainer.encode(rows).to(dtype)).dtype == torch.float32


@pytest.mark.parametrize("method", METHODS)
def test_decode_is_affine_with_the_dictionary_and_has_right_gradients(method: str) -> None:
    explainer = fitted(method, planted()[0], num_concepts=3).double()
    codes = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert explainer.dictionary.shape == (3, 12)
    zero = explainer.decode(torch.zeros(5, 3, dtype=torch.float64))
    torch.testing.assert_close(explainer.decode(codes) - zero, codes @ explainer.dictionary)
    assert torch.autograd.gradcheck(explainer.decode, codes)


@pytest.mark.parametrize("method", ["pca", "ica", "natural-axes", "random-directions"])
def test_linear_encoders_have_right_gradients(method: str) -> None:
    explainer = fitted(method, planted()[0], num_concepts=3).double()
    assert torch.autograd.gradcheck(explainer.encode, torch.randn(5, 12, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_result_other_seed_only_where_declared(method: str) -> None:
    rows = planted()[0]
    first, again, other = (fitted(method, rows, num_concepts=4, seed=s).dictionary for s in (3, 3, 4))
    assert torch.equal(first, again)
    assert torch.allclose(first, other, atol=1e-5) == find_explainer(method).deterministic


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_rows_are_a_clear_error(method: str, bad: float) -> None:
    rows = planted()[0].clone()
    rows[5, 3] = bad
    with pytest.raises(UserError, match=r"NaN or Inf.*'layer'"):
        fitted(method, rows, num_concepts=3)


@pytest.mark.parametrize(("method", "needed"), [("pca", 4), ("ica", 5), ("nmf", 4), ("kmeans", 4)])
def test_too_few_rows_or_too_small_a_sample(method: str, needed: int) -> None:
    rows = planted()[0]
    with pytest.raises(UserError, match=rf"num_concepts = 4 needs at least {needed} rows .* = {needed - 1}"):
        fitted(method, rows[: needed - 1], num_concepts=4)
    with pytest.raises(UserError, match=rf"max_rows = {needed - 1}"):
        fitted(method, rows, num_concepts=4, max_rows=needed - 1)
    assert fitted(method, rows[10 : 10 + needed], num_concepts=4).dictionary.isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_a_single_row(method: str) -> None:
    row = planted()[0][:1]
    if method in ("pca", "ica", "topk-sae"):
        with pytest.raises(UserError, match=r"at least 2|all 1 rows"):
            fitted(method, row, num_concepts=1)
    else:
        torch.testing.assert_close(fitted(method, row, num_concepts=1)(row), row, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_constant_and_dead_features_stay_finite(method: str) -> None:
    rows = torch.cat([planted()[0], torch.zeros(600, 2), torch.full((600, 1), 7.0)], dim=1)
    explainer = fitted(method, rows, num_concepts=4)
    assert explainer(rows).isfinite().all()
    if method in ("pca", "ica", "kmeans", "natural-axes"):
        torch.testing.assert_close(explainer(rows)[:, -3:], rows[:, -3:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["pca", "ica"])
def test_more_concepts_than_features(method: str) -> None:
    with pytest.raises(UserError, match=r"num_concepts = 13.*12 features"):
        make(method, 12, num_concepts=13)


@pytest.mark.parametrize("method", DIRECT)
def test_no_warning_leaks(method: str) -> None:
    rows = torch.cat([planted(40)[0]] * 2)
    options: dict[str, Any] = {"max_iter": 1} if method in ("ica", "nmf") else {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explainer = fitted(method, rows, num_concepts=3, **options)
    assert isinstance(explainer, RowsExplainer)
    assert len(explainer.notes) == (1 if options else 0)
    explainer.fit_rows(ArrayRows(rows), seed=0)
    assert len(explainer.notes) == (1 if options else 0), "notes tell of the last fit only"


def test_config_of_another_method_is_refused() -> None:
    with pytest.raises(UserError, match="NMFConfig"):
        find_explainer("nmf")(find_explainer("pca").Config(), LayerSpec("layer", (4,)))


def test_scikit_learn_is_imported_only_by_a_fit() -> None:
    names = ", ".join(f"netgloss.explainers.{m.replace('-', '_')}" for m in METHODS)
    code = f"import sys, {names}; assert 'sklearn' not in sys.modules and 'scipy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_moments_do_not_cancel_for_large_means(chunk: int) -> None:
    rows = torch.randn(500, 3, generator=torch.Generator().manual_seed(0)) * 0.25 + torch.tensor([0.0, 4096.0, -1e5])
    count, mean, variance = feature_moments(rows.split(chunk))
    assert count == 500
    np.testing.assert_allclose(mean, rows.double().mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(variance, rows.double().numpy().var(0), rtol=1e-9)


# -- PCA and ICA ------------------------------------------------------------------------------------------------------


def test_pca_finds_planted_axes_in_order_with_positive_third_moment() -> None:
    g = torch.Generator().manual_seed(0)
    scores = (-torch.rand(4000, 3, generator=g).log() - 1) * torch.tensor([5.0, 3.0, 1.0])
    axes = torch.linalg.qr(torch.randn(6, 3, generator=g))[0].T
    rows = scores @ axes + 10
    pca = fitted("pca", rows, num_concepts=3)
    assert ((pca.atoms * axes).sum(1) > 0.99).all(), "skewed scores fix the sign: the cosine itself is positive"
    torch.testing.assert_close(fitted("pca", -rows, num_concepts=3).atoms, -pca.atoms, rtol=1e-4, atol=1e-5)


def test_full_pca_is_the_identity_and_orthonormal() -> None:
    rows = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)) * 3 + 100
    pca = fitted("pca", rows, num_concepts=7)
    torch.testing.assert_close(pca(rows), rows, rtol=1e-6, atol=2e-5)
    torch.testing.assert_close(pca.atoms @ pca.atoms.T, torch.eye(7), rtol=0, atol=1e-6)
    codes = pca.encode(rows).double()
    covariance = codes.T @ codes / 50
    assert (covariance - covariance.diag().diag()).abs().max() < 1e-4
    assert (covariance.diag().diff() <= 0).all()


@pytest.mark.parametrize("shift", [0.0, 1000.0])
def test_streamed_pca_equals_pca_in_memory(shift: float) -> None:
    rows = planted(500, 8, 12)[0] * torch.linspace(0.2, 2, 12) + shift
    whole, streamed = fitted("pca", rows, num_concepts=5), fitted("pca", rows, num_concepts=5, max_rows=100)
    torch.testing.assert_close(streamed.atoms, whole.atoms, rtol=0, atol=1e-5)
    torch.testing.assert_close(streamed.offset, whole.offset)
    assert not streamed.notes


def test_pca_says_when_the_rank_is_lower() -> None:
    pca = fitted("pca", planted(k=3)[0], num_concepts=5)
    assert pca.notes == ["2 of 5 components have no variance: the rows have a lower rank"]
    torch.testing.assert_close(pca.atoms @ pca.atoms.T, torch.eye(5), rtol=0, atol=1e-6)


def test_ica_finds_planted_sources_where_pca_does_not() -> None:
    g = torch.Generator().manual_seed(1)
    sources = -torch.rand(8000, 4, generator=g).log() - 1
    mixing = torch.randn(4, 9, generator=g)
    rows = sources @ mixing + 2
    ica = fitted("ica", rows, num_concepts=4)
    assert matched_cosine(ica.atoms, mixing).min() > 0.995
    assert matched_cosine(fitted("pca", rows, num_concepts=4).atoms, mixing).min() < 0.95
    found = ica.encode(rows)
    torch.testing.assert_close(found.var(0, correction=0), torch.ones(4), rtol=1e-3, atol=0)
    assert (found.pow(3).mean(0) > 1.5).all(), "an exponential source has skewness 2"
    torch.testing.assert_close(ica(rows), rows, rtol=1e-4, atol=1e-4)


def test_ica_rebuilds_exactly_what_pca_rebuilds() -> None:
    rows = planted(400, 8, 12)[0]
    torch.testing.assert_close(
        fitted("ica", rows, num_concepts=3)(rows), fitted("pca", rows, num_concepts=3)(rows), rtol=1e-4, atol=1e-5
    )
    codes = torch.randn(6, 3)
    ica = fitted("ica", rows, num_concepts=3)
    torch.testing.assert_close(ica.encode(ica.decode(codes)), codes, rtol=1e-4, atol=1e-4)


def test_ica_names_the_rank_of_the_rows() -> None:
    with pytest.raises(UserError, match=r"rank num_concepts = 5.* have rank 3; use num_concepts <= 3"):
        fitted("ica", planted(k=3)[0], num_concepts=5)
    with pytest.raises(UserError, match="all 20 rows of layer 'layer' are equal"):
        fitted("ica", torch.ones(20, 6), num_concepts=2)


def test_a_sample_is_used_and_noted() -> None:
    ica = fitted("ica", planted()[0], num_concepts=3, max_rows=200)
    assert ica.notes[0] == "fitted on a random 200 of the 600 rows"


# -- NMF --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["random", "nndsvda"])
def test_nmf_finds_planted_parts(init: str) -> None:
    rows, _, atoms = planted(800)
    nmf = fitted("nmf", rows, num_concepts=4, init=init, max_iter=2000, tol=1e-6)
    assert matched_cosine(nmf.atoms, atoms).min() > 0.99
    assert (nmf.atoms >= 0).all()
    torch.testing.assert_close(nmf.atoms.norm(dim=1), torch.ones(4))
    assert (nmf(rows) - rows).square().sum() < 1e-4 * rows.square().sum()
    assert (nmf.encode(rows).square().sum(0).diff() <= 0).all(), "parts are ordered by energy"


def test_nmf_codes_are_the_nonnegative_least_squares_codes() -> None:
    g = torch.Generator().manual_seed(2)
    rows, atoms = torch.rand(60, 20, generator=g), torch.rand(8, 20, generator=g)
    nmf = make("nmf", 20, num_concepts=8)
    nmf.atoms.copy_(atoms)
    expected = np.stack([nnls(atoms.double().numpy().T, row)[0] for row in rows.double().numpy()])
    codes = nmf.encode(rows)
    np.testing.assert_allclose(codes, expected, rtol=0, atol=1e-3 * expected.max())
    slope = (rows @ atoms.T - codes @ (atoms @ atoms.T)) / (rows @ atoms.T).amax(1, keepdim=True)
    assert slope[codes > 0].abs().max() < 2e-5
    assert slope[codes == 0].max() < 2e-5
    assert 0.2 < (codes == 0).float().mean() < 0.9, "the constraint must bind somewhere for this test to say anything"


def test_nmf_codes_agree_with_scikit_learn() -> None:
    from sklearn.decomposition import NMF

    rows = planted(300, 6, 15)[0] + 0.05 * torch.rand(300, 15, generator=torch.Generator().manual_seed(3))
    nmf = fitted("nmf", rows, num_concepts=4)
    oracle = NMF(4, init="random", tol=1e-6, max_iter=5000).fit(rows.numpy())
    oracle.components_ = nmf.atoms.numpy()
    expected = torch.from_numpy(oracle.transform(rows.numpy()))
    assert (nmf.encode(rows) - expected).norm() < 1e-3 * expected.norm()


def test_nmf_codes_with_hard_gram_matrices() -> None:
    rows = torch.rand(30, 5, generator=torch.Generator().manual_seed(4))
    same = torch.tensor([[1.0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    codes = nonnegative_codes(same @ rows.T, same @ same.T).T
    torch.testing.assert_close(codes @ same, rows * torch.tensor([1.0, 0, 0, 0, 0]), rtol=1e-4, atol=1e-5)
    assert (codes[:, 2] == 0).all(), "an empty part is never used"
    assert (nonnegative_codes(torch.zeros(3, 4), same @ same.T) == 0).all()
    assert nonnegative_codes(torch.zeros(3, 0), same @ same.T).shape == (3, 0)


def test_nmf_allows_more_parts_than_features() -> None:
    rows = planted(100)[0]
    nmf = fitted("nmf", rows, num_concepts=20, max_iter=500)
    assert (nmf(rows) - rows).norm() < 0.01 * rows.norm()
    with pytest.raises(UserError, match="at most 12 concepts"):
        fitted("nmf", rows, num_concepts=20, init="nndsvda")


def test_nmf_of_signed_activations() -> None:
    rows = planted()[0]
    signed = torch.where(torch.rand(rows.shape, generator=torch.Generator().manual_seed(0)) < 0.1, -0.5, rows)
    with pytest.raises(UserError, match=r"'layer' goes down to -0.5.*negative = 'clip'"):
        fitted("nmf", signed, num_concepts=3)
    clipped, of_positive = fitted("nmf", signed, num_concepts=3, negative="clip"), signed.clamp(min=0)
    assert torch.equal(clipped.atoms, fitted("nmf", of_positive, num_concepts=3).atoms)
    assert torch.equal(clipped.encode(signed), clipped.encode(of_positive))


def test_nmf_sees_negatives_outside_of_its_sample() -> None:
    rows = planted()[0].clone()
    rows[599, 0] = -1.0
    explainer = make("nmf", 12, num_concepts=3, max_rows=50)
    handed_out = ArrayRows(rows)
    handed_out.sample = lambda max_rows, *, seed: rows[:max_rows]  # type: ignore[method-assign]
    with pytest.raises(UserError, match="goes down to -1"):
        explainer.fit_rows(handed_out, seed=0)


@pytest.mark.parametrize("options", [{"init": "svd"}, {"negative": "abs"}, {"tol": 0.0}, {"max_iter": 0}])
def test_nmf_options(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        find_explainer("nmf").Config(**options)


# -- k-means ----------------------------------------------------------------------------------------------------------


def clusters(per: int = 300) -> tuple[Tensor, Tensor]:
    """Rows sorted by cluster, as a store sorted by class has them, and the five centres."""
    g = torch.Generator().manual_seed(0)
    centres = 10 * torch.rand(5, 8, generator=g) + 500
    return torch.cat([c + torch.randn(per, 8, generator=g) for c in centres]), centres


def test_kmeans_finds_planted_clusters() -> None:
    rows, centres = clusters()
    kmeans = fitted("kmeans", rows, num_concepts=5)
    distance = torch.cdist(kmeans.atoms, centres)
    assert sorted(distance.argmin(1).tolist()) == [0, 1, 2, 3, 4]
    assert distance.amin(1).max() < 0.4
    codes = kmeans.encode(rows)
    assert torch.equal(codes.sum(1), torch.ones(len(rows)))
    assert torch.equal(codes.argmax(1), torch.cdist(rows.double(), kmeans.atoms.double()).argmin(1))
    assert torch.equal(kmeans.decode(codes), kmeans.atoms[codes.argmax(1)])


@pytest.mark.parametrize("method", ["kmeans", "nmf"])
def test_mini_batches_improve_on_the_sample_even_in_sorted_order(method: str) -> None:
    rows = clusters()[0]
    rows = rows - rows.min()
    options = {"num_concepts": 5 if method == "kmeans" else 3, "max_rows": 60}
    errors = {}
    for mini_batch in (True, False):
        explainer = fitted(method, rows, mini_batch=mini_batch, **options)
        errors[mini_batch] = float((explainer(rows) - rows).square().sum())
        assert any("mini-batches" in note for note in explainer.notes) == mini_batch
    assert errors[True] < 0.99 * errors[False]
    if method == "kmeans":
        whole = fitted(method, rows, num_concepts=5)
        assert errors[True] < 1.001 * float((whole(rows) - rows).square().sum())


def test_kmeans_with_fewer_distinct_rows_than_centroids() -> None:
    rows = torch.eye(4).repeat(5, 1)
    kmeans = fitted("kmeans", rows, num_concepts=6)
    assert len(kmeans.notes) == 1
    assert "distinct clusters" in kmeans.notes[0]
    torch.testing.assert_close(kmeans(rows), rows)


# -- controls ---------------------------------------------------------------------------------------------------------


def test_natural_axes_keep_the_features_of_largest_variance() -> None:
    rows = torch.randn(400, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 9, 2, 8, 0, 3]) + 5
    axes = fitted("natural-axes", rows, num_concepts=3)
    assert axes.features.tolist() == [1, 3, 5]
    assert torch.equal(axes.encode(rows), rows[:, [1, 3, 5]])
    assert torch.equal(axes(rows)[:, [1, 3, 5]], rows[:, [1, 3, 5]])
    torch.testing.assert_close(axes(rows)[:, [0, 2, 4]], rows[:, [0, 2, 4]].mean(0).expand(400, -1))
    assert fitted("natural-axes", torch.zeros(3, 6), num_concepts=2).features.tolist() == [0, 1]


@pytest.mark.parametrize("num_concepts", [12, 1000])
def test_all_natural_axes_are_the_identity(num_concepts: int) -> None:
    rows = planted()[0]
    axes = fitted("natural-axes", rows, num_concepts=num_concepts)
    assert axes.num_concepts == 12
    assert torch.equal(axes(rows), rows)
    assert torch.equal(axes.dictionary.sum(0), torch.ones(12))


def test_random_directions_are_orthonormal_and_their_codes_least_squares() -> None:
    rows = planted()[0]
    random: LinearExplainer = fitted("random-directions", rows, num_concepts=5)
    torch.testing.assert_close(random.atoms @ random.atoms.T, torch.eye(5), rtol=0, atol=1e-6)
    centred = rows - rows.mean(0)
    expected = torch.linalg.lstsq(random.atoms.T, centred.T).solution.T
    torch.testing.assert_close(random.encode(rows), expected, rtol=1e-4, atol=1e-5)
    other = fitted("random-directions", planted(seed=9)[0], num_concepts=5)
    assert torch.equal(random.atoms, other.atoms), "the directions depend on the seed only"


@pytest.mark.parametrize("num_concepts", [12, 30])
def test_enough_random_directions_rebuild_exactly_with_codes_of_least_norm(num_concepts: int) -> None:
    rows = planted()[0]
    random = fitted("random-directions", rows, num_concepts=num_concepts)
    torch.testing.assert_close(random(rows), rows, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(random.atoms.norm(dim=1), torch.ones(num_concepts))
    solution = torch.linalg.pinv(random.atoms.double().T) @ (rows - rows.mean(0)).double().T
    torch.testing.assert_close(random.encode(rows).double(), solution.T, rtol=1e-3, atol=1e-4)


def test_random_directions_are_uniform() -> None:
    """Haar: a direction's coordinates have mean 0 and mean square 1/C, each of them (4 standard errors)."""
    rows = torch.zeros(2, 4)
    draws = torch.stack([fitted("random-directions", rows, num_concepts=2, seed=s).atoms for s in range(600)])
    assert draws.mean(0).abs().max() < 4 * 0.5 / 600**0.5
    assert (draws.square().mean(0) - 0.25).abs().max() < 4 * 0.25 / 600**0.5


def test_rows_of_the_wrong_width_are_refused() -> None:
    explainer: Explainer = fitted("pca", planted()[0], num_concepts=3)
    with pytest.raises(UserError, match=r"activation of 12 features.*\(2, 11\)"):
        explainer.encode(torch.zeros(2, 11))


def test_rows_sorted_by_class_do_not_drag_the_centroids_along() -> None:
    rows = torch.randn(20000, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([3.0, 1, 1, 1])
    rows = rows[rows[:, 0].argsort()]
    lost = [
        float((e(rows) - rows).square().sum())
        for e in (fitted("kmeans", rows, num_concepts=6, max_rows=1000, mini_batch=m) for m in (True, False))
    ]
    assert lost[0] < lost[1]

"""Semi-NMF: activations as non-negative mixtures of K parts that may have either sign.

Ding, Li & Jordan 2010 ("Convex and semi-nonnegative matrix factorizations", IEEE TPAMI 32)::

    min over Z, W of |X - Z W|_F^2   with Z (N, K) >= 0, W (K, C) free
    encode(x) = argmin over z >= 0 of |x - z W|^2          decode(z) = z W

It lies between k-means (rows of Z with a single 1) and NMF (W >= 0 too), and takes layers that go below zero. The fit
starts from k-means (its indicator plus 0.2, as in the paper) and alternates their rules, under which the error never
rises; with A^+ = max(A, 0), A^- = max(-A, 0), element by element::

    W <- (Z^T Z)^-1 Z^T X                                                        (eq. 10, transposed)
    Z <- Z sqrt( ((X W^T)^+ + Z (W W^T)^-) / ((X W^T)^- + Z (W W^T)^+) )         (eq. 11)

until an iteration lowers the error by less than ``tol``, relative to |X|^2. Z W stays when a part is scaled up
and its code down: here every part has unit length, and parts are ordered by the energy they carry on the fitted rows.

``encode`` solves the non-negative least squares exactly, as NMF's does (``nonnegative_codes``); it carries no gradient.
scikit-learn has no Semi-NMF. Left out: the paper's convex variant, and rows beyond ``max_rows``.

Shape letters: C features, N rows, K concepts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from netgloss.errors import UserError
from netgloss.explainers.base import ExplainerConfig, Rows
from netgloss.explainers.nmf import nonnegative_codes
from netgloss.explainers.rows import LinearExplainer, sklearn_seed

_BLOCK = 8192


@dataclass(frozen=True)
class SemiNMFConfig(ExplainerConfig):
    """Options of :class:`SemiNMF`."""

    max_rows: int = 30_000
    """Rows in the fit; above, a random sample of so many."""
    max_iter: int = 200
    """Most iterations of the fit."""
    tol: float = 1e-5
    """The fit stops when an iteration lowers the squared error by less than this share of |X|^2."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_iter < 1 or not self.tol >= 0:
            raise UserError(f"max_iter must be at least 1 and tol not negative, got {self.max_iter} and {self.tol}")


class SemiNMF(LinearExplainer):
    """Non-negative mixtures of signed parts (module docstring).

    Raises
    ------
    UserError : fewer rows than concepts; NaN or Inf among them; all rows are zero.
    """

    Config = SemiNMFConfig
    config: SemiNMFConfig

    @torch.no_grad()
    def fit_rows(self, rows: Rows, *, seed: int) -> None:
        from sklearn.cluster import KMeans

        self._start(rows, self.config.max_rows, at_least=self.num_concepts)
        sample = self._sample(rows, self.config.max_rows, seed=seed)
        if not sample.any():
            raise UserError(f"SemiNMF has nothing to learn: all rows of layer {self.spec.name!r} are zero")
        with self._warnings_as_notes():
            labels = KMeans(self.num_concepts, n_init=1, random_state=sklearn_seed(seed)).fit_predict(sample.numpy())
        codes = torch.nn.functional.one_hot(torch.from_numpy(labels).long(), self.num_concepts) + 0.2
        codes, parts, errors = semi_nmf(sample, codes.to(sample), max_iter=self.config.max_iter, tol=self.config.tol)
        if len(errors) > self.config.max_iter and errors[-2] - errors[-1] > self.config.tol:
            self.notes.append(f"stopped after max_iter = {self.config.max_iter} iterations, still improving")
        energy = codes.double().square().sum(0) * parts.double().square().sum(1)
        parts = parts[energy.argsort(descending=True, stable=True)]
        self.atoms.copy_(torch.nn.functional.normalize(parts, dim=1))

    @torch.no_grad()
    def encode_rows(self, rows: Tensor) -> Tensor:
        """Rows (N, C) -> non-negative codes (N, K); no gradient."""
        rows = rows.to(self.atoms.dtype)
        gram_KK = self.atoms @ self.atoms.T
        return torch.cat([nonnegative_codes(self.atoms @ block.T, gram_KK).T for block in rows.split(_BLOCK)])


def semi_nmf(rows: Tensor, codes: Tensor, *, max_iter: int, tol: float = 0.0) -> tuple[Tensor, Tensor, list[float]]:
    """Codes (N, K) >= 0, parts (K, C), and |X - Z W|^2 / |X|^2 before each iteration and after the last.

    Parameters
    ----------
    rows : (N, C). codes : (N, K) > 0, where to start.
    """
    codes, total = codes.clone(), float(rows.double().square().sum())
    tiny = torch.finfo(rows.dtype).tiny
    parts, errors = _best_parts(rows, codes), []
    for _ in range(max_iter):
        product_NK, gram_KK = rows @ parts.T, parts @ parts.T
        errors.append(_error(total, product_NK, gram_KK, codes))
        if len(errors) > 1 and errors[-2] - errors[-1] <= tol:
            return codes, parts, errors
        up = product_NK.clamp(min=0) + codes @ (-gram_KK).clamp(min=0)
        down = (-product_NK).clamp(min=0) + codes @ gram_KK.clamp(min=0)
        codes *= (up / down.clamp(min=tiny)).sqrt()
        parts = _best_parts(rows, codes)
    errors.append(_error(total, rows @ parts.T, parts @ parts.T, codes))
    return codes, parts, errors


def _best_parts(rows: Tensor, codes: Tensor) -> Tensor:
    """The least-squares parts (K, C) for given codes (N, K), in float64 inside."""
    gram = (codes.T @ codes).double()
    return (torch.linalg.pinv(gram, hermitian=True) @ (codes.T @ rows).double()).to(rows.dtype)


def _error(total: float, product: Tensor, gram: Tensor, codes: Tensor) -> float:
    """``|X - Z W|^2 / |X|^2`` from X W^T, W W^T and |X|^2, without X."""
    cross = float((codes * product).sum(dtype=torch.float64))
    own = float(((codes.T @ codes) * gram).sum(dtype=torch.float64))
    return max(0.0, (total - 2 * cross + own) / total)

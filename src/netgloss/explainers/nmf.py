"""Non-negative matrix factorisation: activations as sums, never differences, of K parts (CRAFT's dictionary).

Lee and Seung 1999; for concepts Fel et al. 2023 (CRAFT, arXiv 2211.10154; arXiv 2306.07304)::

    min over Z, W of |X - Z W|_F^2   with Z (N, K) >= 0, W (K, C) >= 0
    encode(x) = argmin over z >= 0 of |x - z W|^2          decode(z) = z W

Z W does not change when a part is scaled up and its code down: here every part has unit length, so that a code is in
units of activation, and parts are ordered by the energy they carry on the fitted rows.

``encode`` solves the non-negative least squares exactly to ``tolerance`` by cyclic coordinate descent on the Gram
matrix G = W W^T, all rows at once (Cichocki and Phan 2009, HALS)::

    z_k <- max(0, z_k + ((x W^T)_k - (z G)_k) / G_kk)

A row is done when it meets the optimality (KKT) conditions: with g = x W^T - z G, |g_k| <= tol * max|x W^T| where z_k
> 0 and g_k <= tol * max|x W^T| where z_k = 0. ``encode`` carries no gradient (``decode`` does): CRAFT's implicit
differentiation of the codes is left out, as are its recursion into sub-concepts and its image crops.

W is fitted by scikit-learn's NMF (coordinate descent) on up to ``max_rows`` rows. With more rows, ``mini_batch``
refines the W of a sample on all rows (MiniBatchNMF, one pass, every row counting equally).

Shape letters: C features, N rows, K concepts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from netgloss.errors import UserError
from netgloss.explainers.base import ExplainerConfig, Rows
from netgloss.explainers.rows import LinearExplainer, sklearn_seed

_BLOCK = 8192
_MAX_SWEEPS = 1000
_CHECK_EVERY = 5


@dataclass(frozen=True)
class NMFConfig(ExplainerConfig):
    """Options of :class:`NMF`."""

    max_rows: int = 30_000
    """Rows in the exact fit (30,000 x 1280, 32 concepts: 25 s on one core); above, a random sample of so many."""
    mini_batch: bool = True
    """With more rows than max_rows: refine on all rows in mini-batches (else: stop at the sample)."""
    max_iter: int = 200
    """Most iterations of the fit."""
    tol: float = 1e-4
    """The fit stops when an iteration changes the factors by less than this, relative to the first one."""
    init: Literal["random", "nndsvda"] = "random"
    """Start of the fit: random (seeds differ) or from a singular value decomposition (seeds agree nearly)."""
    negative: Literal["error", "clip"] = "error"
    """What to do with activations below zero: stop, or set them to zero (in the fit and in encode)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_iter < 1 or not self.tol > 0:
            raise UserError(f"max_iter must be at least 1 and tol positive, got {self.max_iter} and {self.tol}")
        for name, known in (("init", ("random", "nndsvda")), ("negative", ("error", "clip"))):
            if getattr(self, name) not in known:
                raise UserError(f"{name} must be {known[0]!r} or {known[1]!r}, got {getattr(self, name)!r}")


class NMF(LinearExplainer):
    """Non-negative parts (module docstring).

    Raises
    ------
    UserError : activations below zero with ``negative="error"``; fewer rows than concepts; NaN or Inf among the rows.
    """

    Config = NMFConfig
    config: NMFConfig

    def fit_rows(self, rows: Rows, *, seed: int) -> None:
        from sklearn.decomposition import NMF as SklearnNMF

        self._start(rows, self.config.max_rows, at_least=self.num_concepts)
        sample = self._nonnegative(self._sample(rows, self.config.max_rows, seed=seed))
        if self.config.init == "nndsvda" and self.num_concepts > min(sample.shape):
            raise UserError(f"init 'nndsvda' gives at most {min(sample.shape)} concepts here; use init 'random'")
        nmf = SklearnNMF(
            self.num_concepts,
            init=self.config.init,
            max_iter=self.config.max_iter,
            tol=self.config.tol,
            random_state=sklearn_seed(seed),
        )
        with self._warnings_as_notes():
            codes = nmf.fit_transform(sample.numpy())
        parts = nmf.components_
        energy = np.square(codes, dtype=np.float64).sum(0) * np.square(parts, dtype=np.float64).sum(1)
        parts = parts[np.argsort(-energy, kind="stable")]
        if len(sample) < rows.num_rows and self.config.mini_batch:
            parts = self._refined(rows, sample, parts, seed)
        self.atoms.copy_(torch.nn.functional.normalize(torch.from_numpy(parts), dim=1))

    def _refined(self, rows: Rows, sample: Tensor, parts: np.ndarray, seed: int) -> np.ndarray:
        """Parts (K, C) after a pass of MiniBatchNMF over the sample and all rows, every row counting equally."""
        from sklearn.decomposition import MiniBatchNMF

        nmf = MiniBatchNMF(self.num_concepts, init="custom", forget_factor=1.0, random_state=sklearn_seed(seed))
        codes = np.ones((len(sample), self.num_concepts), dtype=parts.dtype)
        with self._warnings_as_notes():
            nmf.partial_fit(sample.numpy(), W=codes, H=parts)
            for batch in self._batches(rows, 1024):
                nmf.partial_fit(self._nonnegative(batch).numpy())
        self.notes.append(f"then refined on all {rows.num_rows:,} rows in mini-batches")
        return nmf.components_

    @classmethod
    def check_activation(cls, config: ExplainerConfig, layer: str, activation: Tensor) -> None:
        """Refuses values below zero with ``negative="error"``."""
        assert isinstance(config, NMFConfig)
        lowest = float(activation.min())
        if lowest < 0 and config.negative == "error":
            raise UserError(
                f"NMF needs activations >= 0, but layer {layer!r} goes down to {lowest:.4g}: take a layer after a "
                "ReLU, another method (pca, topk-sae), or negative = 'clip' to set them to zero"
            )

    def _nonnegative(self, rows: Tensor) -> Tensor:
        self.check_activation(self.config, self.spec.name, rows)
        return rows if self.config.negative == "error" else rows.clamp(min=0)

    @torch.no_grad()
    def encode_rows(self, rows: Tensor) -> Tensor:
        """Rows (N, C) -> non-negative codes (N, K); no gradient."""
        rows = rows.to(self.atoms.dtype)
        if self.config.negative == "clip":
            rows = rows.clamp(min=0)
        gram_KK = self.atoms @ self.atoms.T
        codes = torch.empty(len(rows), self.num_concepts, dtype=rows.dtype, device=rows.device)
        for block, out in zip(rows.split(_BLOCK), codes.split(_BLOCK), strict=True):
            out.copy_(nonnegative_codes(self.atoms @ block.T, gram_KK).T)
        return codes


def nonnegative_codes(target_KN: Tensor, gram_KK: Tensor, *, tolerance: float = 1e-5) -> Tensor:
    """The codes z >= 0 (K, N) that minimise |x - z^T W|^2 for each column, given W x^T (K, N) and W W^T (K, K).

    Rows that meet the KKT conditions to ``tolerance`` leave the loop; at most 1,000 sweeps.
    """
    solved_KN = torch.zeros_like(target_KN)
    rate = 1 / gram_KK.diagonal().clamp(min=torch.finfo(gram_KK.dtype).tiny)
    step_KK = gram_KK * rate[:, None]
    todo = torch.arange(target_KN.shape[1], device=target_KN.device)
    left_KN, codes_KN = target_KN, solved_KN.clone()
    allowed = tolerance * target_KN.abs().amax(0)
    for sweep in range(1, _MAX_SWEEPS + 1):
        for k, code in enumerate(codes_KN):
            code.add_(torch.addmv(left_KN[k] * rate[k], codes_KN.T, step_KK[k], alpha=-1)).clamp_(min=0)
        if sweep % _CHECK_EVERY and sweep < _MAX_SWEEPS:
            continue
        slope_KN = torch.addmm(left_KN, gram_KK, codes_KN, alpha=-1)
        violation = torch.where(codes_KN > 0, slope_KN.abs(), slope_KN.clamp(min=0)).amax(0)
        solved_KN[:, todo] = codes_KN
        keep = violation > allowed
        todo, allowed, left_KN, codes_KN = todo[keep], allowed[keep], left_KN[:, keep], codes_KN[:, keep]
        if not len(todo):
            break
    return solved_KN

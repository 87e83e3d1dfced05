"""What the methods on rows share: reading and checking their training rows, and the linear decoder of most of them.

Private to ``explainers/``.

Shape letters: C features of the layer, N rows, K concepts.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from netgloss.errors import UserError
from netgloss.explainers.base import Explainer, ExplainerConfig, LayerSpec, Rows


class RowsExplainer(Explainer):
    """An explainer that is fitted on rows, and says in ``notes`` what there is to say about its fit.

    Attributes
    ----------
    notes : plain sentences about the last fit (rows left out, missing convergence, ...).
    """

    def __init__(self, config: ExplainerConfig, spec: LayerSpec) -> None:
        super().__init__(config, spec)
        self.notes: list[str] = []

    def _limit_concepts(self, limit: int) -> None:
        """At most ``limit`` concepts, for methods that cannot have more concepts than features."""
        if self.config.num_concepts > limit:
            raise UserError(
                f"{type(self).__name__} gives at most one concept a feature: num_concepts = "
                f"{self.config.num_concepts}, but layer {self.spec.name!r} has {limit} features"
            )

    def _start(self, rows: Rows, max_rows: int | None = None, *, at_least: int) -> None:
        """Empties the notes; both the number of rows and ``max_rows`` must be ``at_least`` so many."""
        self.notes.clear()
        for name, number in (("rows to fit on", rows.num_rows), ("max_rows", max_rows)):
            if number is not None and number < at_least:
                raise UserError(
                    f"{type(self).__name__} with num_concepts = {self.config.num_concepts} needs at least {at_least} "
                    f"rows of layer {self.spec.name!r}, got {name} = {number}"
                )

    def _sample(self, rows: Rows, max_rows: int, *, seed: int) -> Tensor:
        """Training rows (N, C), N <= ``max_rows``, on the CPU, with a note where rows are left out."""
        if rows.num_rows > max_rows:
            self.notes.append(f"fitted on a random {max_rows:,} of the {rows.num_rows:,} rows")
        return self._finite(rows.sample(max_rows, seed=seed).cpu())

    def _batches(self, rows: Rows, size: int) -> Iterator[Tensor]:
        """Every row once, in order, on the CPU, in batches of ``size`` rows; the last one has up to 2 ``size`` - 1."""
        held = torch.empty(0, rows.num_features)
        for chunk in rows.chunks():
            held = torch.cat([held, self._finite(chunk.cpu())])
            while len(held) >= 2 * size:
                yield held[:size]
                held = held[size:]
        if len(held):
            yield held

    def _finite(self, rows: Tensor) -> Tensor:
        if not rows.isfinite().all():
            raise UserError(f"NaN or Inf among the activations of layer {self.spec.name!r}")
        return rows

    @contextmanager
    def _warnings_as_notes(self) -> Iterator[None]:
        """scikit-learn's warnings become notes instead of lines on the terminal."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
        self.notes.extend(dict.fromkeys(" ".join(str(warning.message).split()) for warning in caught))


class LinearExplainer(RowsExplainer):
    """An explainer whose decoder is ``codes @ atoms + offset``; a method adds its encoder and its fit.

    Attributes
    ----------
    atoms : buffer (K, C), the dictionary.
    offset : buffer (C,), what a row of zero codes decodes to.
    """

    atoms: Tensor
    offset: Tensor

    def __init__(self, config: ExplainerConfig, spec: LayerSpec) -> None:
        super().__init__(config, spec)
        self.register_buffer("atoms", torch.zeros(self.num_concepts, spec.num_features))
        self.register_buffer("offset", torch.zeros(spec.num_features))

    @property
    def dictionary(self) -> Tensor:
        """(K, C)."""
        return self.atoms

    def decode_rows(self, codes: Tensor) -> Tensor:
        """Codes (N, K) -> rows (N, C); linear and differentiable."""
        return torch.addmm(self.offset, codes.to(self.atoms.dtype), self.atoms)


def sklearn_seed(seed: int) -> int:
    """``seed`` in the range that scikit-learn takes."""
    return seed % 2**32


def third_moment_signs(chunks: Iterable[Tensor], mean: Tensor, filters: Tensor) -> Tensor:
    """(K,) of +-1 so that the scores ``(x - mean) @ filters.T * sign`` have a third moment >= 0 over all rows.

    ``chunks`` : (n, C) each; ``mean`` (C,); ``filters`` (K, C), in float64.
    """
    moment = torch.zeros(len(filters), dtype=torch.float64)
    for chunk in chunks:
        moment += ((chunk.double() - mean) @ filters.T).pow(3).sum(0)
    return torch.where(moment < 0, -1.0, 1.0).double()


def principal_components(sample: Tensor, num_components: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (C,), orthonormal components (K, C) and their variances (K,), float64, of rows (N, C), N >= 2.

    scikit-learn's PCA in float64: by the covariance where there are more rows than features, by SVD of the rows else.
    """
    from sklearn.decomposition import PCA

    solver = "covariance_eigh" if len(sample) > sample.shape[1] else "full"
    with np.errstate(invalid="ignore"):  # equal rows: 0 / 0 in the ratio of variances, which is not used
        pca = PCA(n_components=num_components, svd_solver=solver).fit(sample.double().numpy())
    return tuple(
        torch.from_numpy(np.ascontiguousarray(a)) for a in (pca.mean_, pca.components_, pca.explained_variance_)
    )  # type: ignore[return-value]


def feature_moments(chunks: Iterable[Tensor]) -> tuple[int, Tensor, Tensor]:
    """Number of rows, mean (C,) and variance (C,) (divided by N), in float64, in one pass.

    Chunks are merged by the pairwise update of Chan, Golub and LeVeque (1979), which does not cancel for large means.
    """
    count, mean, squares = 0, torch.zeros(()), torch.zeros(())
    for chunk in chunks:
        n = len(chunk)
        variance, centre = torch.var_mean(chunk.double(), dim=0, correction=0)
        if not count:
            count, mean, squares = n, centre, variance * n
            continue
        shift = centre - mean
        squares = squares + variance * n + shift.square() * (count * n / (count + n))
        mean = mean + shift * (n / (count + n))
        count += n
    return count, mean, squares / max(count, 1)

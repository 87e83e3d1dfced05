"""Linear heads: a few linear features of a layer and the class score fitted to them, SRAE's plainest rivals.

For pooled activations z (D,) and the score y of a class::

    x = (z - m) F^T          z~ = x A + o          y~ = W x + b          least squares over the fit images

``features`` says what the n concepts are. Shared by all classes, found without their scores:

- ``pca``: principal components; m is the mean, F = A orthonormal.
- ``nmf``: A of a non-negative factorisation and x >= 0 its exact codes. Their gradient, for heatmaps, is that of
  ReLU(z A^+), A^+ the pseudo-inverse.
- ``random``: F uniform in [0, 1), A its pseudo-inverse.

Chosen for each class, n of the layer's own features:

- ``neurons``: the largest size of the slope of y on z_k alone, times the mean z_k of the class's images. The slope
  replaces the gradient, so that no network is needed.
- ``omp``: orthogonal matching pursuit (scikit-learn) of y on the standardised z.
- ``lasso``: the first n that are active on the path of the lasso (scikit-learn's ``lars_path``); the head is fitted
  again without shrinkage.

A single concept (``num_concepts`` 1) is the control for faithfulness: one direction that copies the logit.

Shape letters: B images, N images of the fit, D features of the layer, K concepts, G groups of concepts (1, or one a
class), C explained classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from netgloss.errors import UserError
from netgloss.explainers.base import ExplainerConfig, LayerSpec, Rows
from netgloss.explainers.class_scores import ClassScores, class_name
from netgloss.explainers.nmf import NMF, NMFConfig, nonnegative_codes
from netgloss.explainers.rows import principal_components

_SHARED = ("pca", "nmf", "random")
_CHOSEN = ("neurons", "omp", "lasso")
_NAMES = {"pca": "component", "nmf": "part", "random": "projection"}


@dataclass(frozen=True)
class LinearHeadConfig(ExplainerConfig):
    """Options of :class:`LinearHead`."""

    num_concepts: int = 5
    """Number n of concepts that give a class's score."""
    features: Literal["pca", "nmf", "random", "neurons", "omp", "lasso"] = "omp"
    """What the concepts are: shared directions, or features of the layer chosen for each class."""
    classes: tuple[str, ...] = ()
    """Classes to explain: names, WordNet ids or indices; default the ten that the images show most."""
    shuffle_logits: bool = False
    """Control: give every image of the fit the scores of another one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.features not in _SHARED + _CHOSEN:
            raise UserError(f"features must be one of {', '.join(_SHARED + _CHOSEN)}, got {self.features!r}")


class LinearHead(ClassScores):
    """Linear features and a linear head (module docstring). Chosen features: concept ``g * n + l`` is class g's.

    Raises
    ------
    UserError : no or unknown classes; a class without images; constant scores; a store without logits; more concepts
        than features or images.
    """

    Config = LinearHeadConfig
    config: LinearHeadConfig
    centre: Tensor
    filters: Tensor
    atoms: Tensor
    offset: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(self, config: LinearHeadConfig, spec: LayerSpec) -> None:
        super().__init__(config, spec)
        if config.num_concepts > spec.num_features:
            raise UserError(
                f"LinearHead gives at most one concept a feature: num_concepts = {config.num_concepts}, but layer "
                f"{spec.name!r} has {spec.num_features} features"
            )
        buffers = {
            "centre": torch.zeros(spec.num_features),
            "filters": torch.zeros(self.num_concepts, spec.num_features),
            "atoms": torch.zeros(self.num_concepts, spec.num_features),
            "offset": torch.zeros(self.num_groups, spec.num_features),
            "weight": torch.zeros(self.num_concepts, len(self.class_index)),
            "bias": torch.zeros(len(self.class_index)),
        }
        for name, value in buffers.items():
            self.register_buffer(name, value)

    @property
    def num_groups(self) -> int:
        """G: one set of concepts for all classes, or one each."""
        return 1 if self.config.features in _SHARED else len(self.class_index)

    @property
    def num_concepts(self) -> int:
        """K = G n."""
        return self.num_groups * self.config.num_concepts

    def name_concepts(self) -> list[str]:
        """``component 1``, or ``tench: feature 73``."""
        n = self.config.num_concepts
        if self.config.features in _SHARED:
            return [f"{_NAMES[self.config.features]} {i + 1}" for i in range(n)]
        chosen = self.filters.argmax(dim=1).tolist()
        return [f"{class_name(self.class_texts[i // n])}: feature {k}" for i, k in enumerate(chosen)]

    # -- images explained -----------------------------------------------------------------------------------------

    def encode_rows(self, rows: Tensor) -> Tensor:
        """(B, D) -> (B, K)."""
        rows = rows.to(self.filters.dtype)
        linear_BK = (rows - self.centre) @ self.filters.T
        if self.config.features != "nmf":
            return linear_BK
        with torch.no_grad():
            codes_BK = nonnegative_codes(self.atoms @ rows.T, self.atoms @ self.atoms.T).T
        surrogate_BK = linear_BK.relu()
        return codes_BK + (surrogate_BK - surrogate_BK.detach())

    def decode_modules(self, concepts: Tensor) -> Tensor:
        """Concepts (B, K) -> the reconstruction of each group, (G, B, D)."""
        n = self.config.num_concepts
        x_GBN = concepts.to(self.atoms.dtype).unflatten(1, (self.num_groups, n)).permute(1, 0, 2)
        return torch.baddbmm(self.offset[:, None], x_GBN, self.atoms.unflatten(0, (self.num_groups, n)))

    def class_weights(self) -> tuple[Tensor, Tensor]:
        return self.weight, self.bias

    # -- the fit --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def fit_rows(self, rows: Rows, *, seed: int) -> None:
        """The whole fit; ``seed`` matters to ``nmf``, ``random`` and ``shuffle_logits`` only."""
        self.notes.clear()
        n = self.config.num_concepts
        z_ND, y_NC, decided_N = self.read_fit(rows, seed=seed)
        if len(z_ND) <= n:
            raise UserError(f"LinearHead with num_concepts = {n} needs more than {n} images, got {len(z_ND)}")
        if self.config.features in _SHARED:
            self._find_shared(rows, z_ND, seed)
        else:
            self.centre.zero_()
            self.offset.copy_(z_ND.mean(dim=0).expand_as(self.offset))
            for g, place in enumerate(self.class_index):
                chosen = torch.as_tensor(self._choose(z_ND.double(), y_NC[:, g], decided_N == place))
                self.filters[g * n : (g + 1) * n] = torch.nn.functional.one_hot(chosen, self.spec.num_features)
                self.offset[g, chosen] = 0
            self.atoms.copy_(self.filters)
        self.weight.zero_()
        x_NK = self.encode_rows(z_ND).double()
        for g in range(len(self.class_index)):
            own = slice(0, n) if self.num_groups == 1 else slice(g * n, (g + 1) * n)
            table = torch.cat([x_NK[:, own], torch.ones(len(x_NK), 1, dtype=torch.float64)], dim=1)
            solution = torch.linalg.lstsq(table, y_NC[:, g, None], driver="gelsd").solution[:, 0]
            self.weight[own, g] = solution[:-1].to(self.weight.dtype)
            self.bias[g] = solution[-1]

    def _find_shared(self, rows: Rows, z_ND: Tensor, seed: int) -> None:
        n = self.config.num_concepts
        self.centre.zero_()
        self.offset.zero_()
        if self.config.features == "pca":
            mean, components, _ = principal_components(z_ND, n)
            self.centre.copy_(mean)
            self.offset[0] = mean
            self.filters.copy_(components)
            self.atoms.copy_(components)
        elif self.config.features == "nmf":
            inner = NMF(NMFConfig(num_concepts=n), self.spec)
            inner.fit_rows(rows, seed=seed)
            self.notes.extend(inner.notes)
            self.atoms.copy_(inner.atoms)
            self.filters.copy_(torch.linalg.pinv(inner.atoms.double()).T)
        else:
            generator = torch.Generator().manual_seed(seed)
            self.filters.copy_(torch.rand(self.filters.shape, generator=generator))
            mean = z_ND.mean(dim=0)
            self.atoms.copy_(torch.linalg.pinv(self.filters.double()).T)
            self.offset[0] = mean - (self.filters @ mean) @ self.atoms

    def _choose(self, z_ND: Tensor, y_N: Tensor, positive_N: Tensor) -> np.ndarray:
        """The n features of a class, strongest first."""
        n = self.config.num_concepts
        centred = z_ND - z_ND.mean(dim=0)
        target = y_N - y_N.mean()
        spread = centred.square().mean(dim=0)
        live = spread > 1e-12 * spread.max()
        if self.config.features == "neurons":
            slope = (centred * target[:, None]).mean(dim=0) / spread.where(live, torch.inf)
            return (slope * z_ND[positive_N].mean(dim=0)).abs().topk(n).indices.numpy()
        scaled = (centred / spread.sqrt().where(live, torch.inf)).numpy()
        from sklearn.linear_model import lars_path, orthogonal_mp

        with self._warnings_as_notes():
            if self.config.features == "omp":
                found = orthogonal_mp(scaled, target.numpy(), n_nonzero_coefs=n)
            else:
                _, _, path = lars_path(scaled, target.numpy(), method="lasso", max_iter=4 * n)
                enough = np.flatnonzero((path != 0).sum(axis=0) >= n)
                found = path[:, enough[0] if len(enough) else -1]
        return np.argsort(-np.abs(found), kind="stable")[:n]

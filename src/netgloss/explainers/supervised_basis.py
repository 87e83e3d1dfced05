"""Supervised basis: one linear probe for each annotated concept, the yardstick of the unsupervised one.

On standardised rows xhat = (x - mu) / sigma, for concept c with positive rows P_c and sampled negatives::

    p = sigmoid(g_c . xhat - h_c)           binary cross-entropy + l2/2 |g_c|^2, by L-BFGS
    G = [g_c / |g_c|]                       unit columns
    encode(x) = G^T xhat                    on = p > 0.5, that is z_c > h_c / |g_c|
    decode(z) = mu + sigma (G (G^T G)^+ z)  of least norm: not invertible, its residual is a result

All positives are used (at most ``max_positives``) and ``negatives`` as many negatives for each, half of them from
images that hold the concept, over the images annotated for it. The ratio sets how often a probe is on.
``f1_thresholds`` move the bias alone to the best F1 on the labelled rows, which distinguishes a poor direction from a
poor threshold.

``style`` takes the recipe of a paper instead (``_probes.py``): ``ibd`` has squared error by SGD with hard negatives;
``net2vec`` weighs positives and negatives equally, over all rows, on features that are binarised at their 0.995
quantile (``raw``: on xhat). Binarised features cannot be got back from a few codes: there ``decode`` is the
least-squares map from codes to rows, which is ours.

Sources: interpretable basis decomposition (Zhou, Sun, Bau & Torralba, ECCV 2018) and Net2Vec (Fong & Vedaldi, CVPR
2018).

Shape letters: N rows, C features of the layer, K concepts.

How one linear concept probe is fitted: by logistic regression, or by the recipe of one of two papers.

On rows xhat (N, C) with labels L (N,)::

    logistic   E_p of binary cross-entropy + l2/2 |g|^2, by L-BFGS
    ibd        E_p[(sigmoid(g . xhat - h) - L)^2], SGD at 1e-2, batches of 128, 15 epochs; each epoch the positives and
               twice as many negatives, the hardest of the pool by the last scores; a quarter of the samples held out
    net2vec    -E_p[alpha L log p + (1 - alpha) (1 - L) log(1 - p)], alpha = 1 - share of positive rows, all rows

Sources: Zhou, Sun, Bau & Torralba, "Interpretable Basis Decomposition for Visual Explanation", ECCV 2018 (published
code); Fong & Vedaldi, "Net2Vec", CVPR 2018. Private to ``explainers/``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from netgloss.errors import UserError
from netgloss.explainers.base import ExplainerConfig, LayerSpec, Rows
from netgloss.explainers.rows import LinearExplainer, feature_moments

IBD_RATE, IBD_BATCH, IBD_EPOCHS, IBD_HARD = 1e-2, 128, 15, 2
BINARISED = 0.005
"""Share of the rows in which a feature is on in Net2Vec's binarised maps."""

Probe = tuple[Tensor, Tensor]
"""Weight g (C,) and bias h (): p = sigmoid(g . xhat - h)."""


def logistic_probe(xhat: Tensor, positive: Tensor, l2: float) -> Probe:
    """Logistic regression on rows (N, C), labels (N,) bool, by scikit-learn."""
    return _by_sklearn(xhat, positive, None, l2)


def net2vec_probe(xhat: Tensor, positive: Tensor, l2: float) -> Probe:
    """Logistic regression whose positive and negative rows weigh the same together."""
    alpha = 1 - positive.double().mean()
    weight = torch.where(positive, alpha, 1 - alpha)
    return _by_sklearn(xhat, positive, weight / weight.mean(), l2)


def _by_sklearn(xhat: Tensor, positive: Tensor, weight: Tensor | None, l2: float) -> Probe:
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=1 / (l2 * len(positive)), solver="lbfgs", max_iter=300)
    model.fit(xhat.numpy(), positive.numpy(), sample_weight=None if weight is None else weight.numpy())
    return torch.from_numpy(model.coef_[0]).float(), -torch.tensor(float(model.intercept_[0]))


def ibd_probe(xhat: Tensor, positive: Tensor, generator: torch.Generator) -> Probe:
    """Squared error on p by SGD, with the hardest negatives of the rows (N, C) that are given."""
    order = torch.randperm(len(xhat), generator=generator)
    kept = order[: -(-3 * len(order) // 4)]
    yes, no = kept[positive[kept]], kept[~positive[kept]]
    weight, bias = torch.zeros(xhat.shape[1]), torch.zeros(())
    for _ in range(IBD_EPOCHS):
        scores = xhat[no] @ weight
        hard = no[scores.topk(min(IBD_HARD * len(yes), len(no))).indices]
        epoch = torch.cat([yes, hard])
        for picks in epoch[torch.randperm(len(epoch), generator=generator)].split(IBD_BATCH):
            rows, labels = xhat[picks], positive[picks].float()
            p = torch.sigmoid(rows @ weight - bias)
            slope = 2 * (p - labels) * p * (1 - p) / len(picks)
            weight -= IBD_RATE * (slope @ rows)
            bias += IBD_RATE * slope.sum()
    return weight, bias


def upper_quantiles(values: Tensor, share: float = BINARISED) -> Tensor:
    """(C,): what the ``share`` largest of the rows (N, C) are above."""
    return values.float().topk(int(share * len(values)) + 1, dim=0).values[-1]


_SIGMA_FLOOR = 1e-3
_STYLES = ("logistic", "ibd", "net2vec")


@dataclass(frozen=True)
class SupervisedBasisConfig(ExplainerConfig):
    """Options of :class:`SupervisedBasis`."""

    num_concepts: int = 0
    """Always the number of labels; 0 says so."""
    annotations: str = ""
    """Where things are in --images: a folder of images and masks, a COCO file, or own (scenes that know: critters)."""
    labels: tuple[str, ...] = ()
    """Names of the annotated concepts, in the order of the label columns; default all that --annotations name."""
    negatives: float = 20.0
    """Negative rows for each positive one."""
    max_positives: int = 20_000
    """At most so many positive rows of a concept are used."""
    min_positives: int = 50
    """Concepts with fewer positive rows are skipped."""
    l2: float = 1e-4
    """Weight of |g|^2 / 2 (not in style ibd)."""
    style: Literal["logistic", "ibd", "net2vec"] = "logistic"
    """How a probe is fitted: logistic regression, or as in one of the two papers."""
    raw: bool = False
    """Style net2vec: on standardised features instead of binarised ones."""

    def __post_init__(self) -> None:
        if self.style not in _STYLES:
            raise UserError(f"style must be one of {', '.join(_STYLES)}, got {self.style!r}")
        if self.labels and self.num_concepts not in (0, len(self.labels)):
            raise UserError(f"{len(self.labels)} labels make as many concepts, got num_concepts = {self.num_concepts}")
        for name in ("negatives", "max_positives", "min_positives", "l2"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} must be positive, got {getattr(self, name)}")


class LabelledRows(Rows, Protocol):
    """Training rows that know which concepts they show."""

    def labelled(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All rows (N, C), labels (N, K) bool, which of them count (N, K) bool, and the image of each row (N,)."""
        ...


class SupervisedBasis(LinearExplainer):
    """Linear concept probes (module docstring). ``encode`` and ``decode`` are affine and differentiable.

    Attributes
    ----------
    directions : buffer (C, K), G; a zero column for a skipped concept.
    biases : buffer (K,), z above which p > 0.5.
    f1_biases : buffer (K,), z above which F1 on the labelled rows is best.
    scale : buffer (C,), sigma; ``offset`` holds mu (not with ``levels``).
    levels : buffer (C,), above which a binarised feature is on (style net2vec without ``raw``).

    Raises
    ------
    UserError : rows without labels; no concept with enough positive rows; NaN or Inf among the rows.
    """

    Config = SupervisedBasisConfig
    config: SupervisedBasisConfig
    directions: Tensor
    biases: Tensor
    f1_biases: Tensor
    scale: Tensor
    levels: Tensor

    def __init__(self, config: SupervisedBasisConfig, spec: LayerSpec) -> None:
        if not config.labels:
            raise UserError(
                "a supervised basis needs annotated images: say by --annotations where things are in --images"
            )
        super().__init__(config, spec)
        self.register_buffer("directions", torch.zeros(spec.num_features, self.num_concepts))
        self.register_buffer("biases", torch.zeros(self.num_concepts))
        self.register_buffer("f1_biases", torch.zeros(self.num_concepts))
        self.register_buffer("scale", torch.ones(spec.num_features))
        self.binarised = config.style == "net2vec" and not config.raw
        if self.binarised:
            self.register_buffer("levels", torch.zeros(spec.num_features))

    @classmethod
    def needs(cls, config: ExplainerConfig) -> tuple[str, ...]:
        """Masks, if the config says where they are; else the rows must come with labels."""
        assert isinstance(config, SupervisedBasisConfig)
        return ("masks",) if config.annotations else ()

    def name_concepts(self) -> list[str]:
        """The labels."""
        return list(self.config.labels)

    @property
    def num_concepts(self) -> int:
        """One a label."""
        return len(self.config.labels)

    def thresholds(self) -> Tensor:
        """(K,): the value of z above which p > 0.5."""
        return self.biases

    def f1_thresholds(self) -> Tensor:
        """(K,): the value of z above which F1 is best on the labelled rows."""
        return self.f1_biases

    def encode_rows(self, rows: Tensor) -> Tensor:
        """Rows (N, C) -> z (N, K)."""
        return self._features(rows) @ self.directions

    def _features(self, rows: Tensor) -> Tensor:
        """What the probes read of rows (N, C)."""
        if self.binarised:
            return (rows > self.levels).to(self.scale.dtype)
        return (rows.to(self.scale.dtype) - self.offset) / self.scale

    @torch.no_grad()
    def fit_rows(self, rows: Rows, *, seed: int) -> None:
        """Fits every probe; ``rows`` must be :class:`LabelledRows`."""
        labelled = getattr(rows, "labelled", None)
        if labelled is None:
            raise UserError("a supervised basis is fitted on annotated images only: rows came without labels")
        self._start(rows, at_least=2)
        values, labels, counted, image = labelled()
        if labels.shape[1] != self.num_concepts:
            raise UserError(f"rows of {labels.shape[1]} labels do not fit the {self.num_concepts} named ones")
        _, mean, variance = feature_moments(map(self._finite, values.float().split(1 << 15)))
        self.offset.copy_(mean)
        self.scale.copy_(variance.sqrt().clamp_min(_SIGMA_FLOOR))
        if self.binarised:
            self.levels.copy_(upper_quantiles(values))
        xhat = self._features(values.float())
        generator = torch.Generator().manual_seed(seed)
        skipped = []
        for k, name in enumerate(self.config.labels):
            positive = labels[:, k] & counted[:, k]
            negative = ~labels[:, k] & counted[:, k]
            if int(positive.sum()) < self.config.min_positives or not negative.any():
                skipped.append(f"{name} ({int(positive.sum())})")
                continue
            weight, bias = self._probe(xhat, positive, negative, image, generator)
            if not weight.any():
                skipped.append(f"{name} (its features are never on)")
                continue
            self.directions[:, k] = weight / weight.norm()
            self.biases[k] = bias / weight.norm()
            z = xhat @ self.directions[:, k]
            self.f1_biases[k] = best_f1_threshold(z[counted[:, k]], positive[counted[:, k]])
        if len(skipped) == self.num_concepts:
            raise UserError(f"no concept has {self.config.min_positives} positive rows: {', '.join(skipped)}")
        if skipped:
            self.notes.append(f"skipped for fewer than {self.config.min_positives} positive rows: {', '.join(skipped)}")
        if self.binarised:
            self._decode_by_regression(xhat, values)
        else:
            self.atoms.copy_(torch.linalg.pinv(self.directions.double()) * self.scale)

    def _probe(
        self, xhat: Tensor, positive: Tensor, negative: Tensor, image: Tensor, generator: torch.Generator
    ) -> Probe:
        """One probe; ``positive``, ``negative`` (N,) bool."""
        if self.config.style == "net2vec":
            counted = positive | negative
            return net2vec_probe(xhat[counted], positive[counted], self.config.l2)
        chosen = self._sample_rows(positive, negative, image, generator)
        if self.config.style == "ibd":
            return ibd_probe(xhat[chosen], positive[chosen], generator)
        return logistic_probe(xhat[chosen], positive[chosen], self.config.l2)

    def _decode_by_regression(self, xhat: Tensor, values: Tensor) -> None:
        """Atoms and offset of the least-squares map from codes to rows."""
        z = (xhat @ self.directions).double()
        mean_z, mean_x = z.mean(0), values.float().mean(0).double()
        products = z.T @ values.double() - len(z) * mean_z[:, None] * mean_x
        centred = z - mean_z
        self.atoms.copy_(torch.linalg.pinv(centred.T @ centred, hermitian=True) @ products)
        self.offset.copy_(mean_x - mean_z @ self.atoms.double())

    def _sample_rows(self, positive: Tensor, negative: Tensor, image: Tensor, generator: torch.Generator) -> Tensor:
        """Indices of the training rows of one probe."""
        chosen = _pick(positive.nonzero().squeeze(1), self.config.max_positives, generator)
        wanted = int(self.config.negatives * len(chosen))
        holds = torch.zeros(int(image.max()) + 1, dtype=torch.bool)
        holds[image[positive]] = True
        inside = (negative & holds[image]).nonzero().squeeze(1)
        outside = (negative & ~holds[image]).nonzero().squeeze(1)
        from_inside = _pick(inside, max(wanted // 2, wanted - len(outside)), generator)
        from_outside = _pick(outside, wanted - len(from_inside), generator)
        return torch.cat([chosen, from_inside, from_outside])


def _pick(candidates: Tensor, number: int, generator: torch.Generator) -> Tensor:
    order = torch.randperm(len(candidates), generator=generator)[:number]
    return candidates[order]


def best_f1_threshold(scores: Tensor, positive: Tensor) -> Tensor:
    """The threshold () for which ``scores > threshold`` has the best F1 on labels (N,)."""
    order = scores.argsort(descending=True)
    ranked, hits = scores[order], positive[order].double().cumsum(0)
    last_of_ties = torch.ones(len(ranked), dtype=torch.bool)
    last_of_ties[:-1] = ranked[1:] < ranked[:-1]
    taken = torch.arange(1, len(ranked) + 1, dtype=torch.float64)
    f1 = torch.where(last_of_ties, 2 * hits / (taken + hits[-1]), -1.0)
    best = int(f1.argmax())
    below = ranked[best + 1] if best + 1 < len(ranked) else ranked[best] - 1
    return (ranked[best] + below) / 2


def decompose(vector: Tensor, directions: Tensor, count: int = 7) -> tuple[list[int], Tensor, list[float]]:
    """A class vector as a few concepts: greedy choice by inner product, coefficients by least squares.

    Parameters
    ----------
    vector : (C,). directions : (C, K) unit columns.

    Returns
    -------
    The concepts in the order of choice, their coefficients (k,), and the unexplained share of |vector|^2 after each.
    """
    target, columns = vector.double(), directions.double()
    chosen: list[int] = []
    residual, shares, coefficients = target, [], torch.zeros(0, dtype=torch.float64)
    for _ in range(min(count, columns.shape[1])):
        gain = columns.T @ residual
        gain[chosen] = -torch.inf
        chosen.append(int(gain.argmax()))
        coefficients = torch.linalg.pinv(columns[:, chosen]) @ target
        residual = target - columns[:, chosen] @ coefficients
        shares.append(float(residual.square().sum() / target.square().sum()))
    return chosen, coefficients, shares

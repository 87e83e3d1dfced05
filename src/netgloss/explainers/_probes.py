"""How one linear concept probe is fitted: by logistic regression, or by the recipe of one of two papers.

On rows xhat (N, C) with labels L (N,)::

    logistic   E_p of binary cross-entropy + l2/2 |g|^2, by L-BFGS
    ibd        E_p[(sigmoid(g . xhat - h) - L)^2], SGD at 1e-2, batches of 128, 15 epochs; each epoch the positives and
               twice as many negatives, the hardest of the pool by the last scores; a quarter of the samples held out
    net2vec    -E_p[alpha L log p + (1 - alpha) (1 - L) log(1 - p)], alpha = 1 - share of positive rows, all rows

Sources: Zhou, Sun, Bau & Torralba, "Interpretable Basis Decomposition for Visual Explanation", ECCV 2018 (published
code); Fong & Vedaldi, "Net2Vec", CVPR 2018. Private to ``explainers/``.
"""

from __future__ import annotations

import torch
from torch import Tensor

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

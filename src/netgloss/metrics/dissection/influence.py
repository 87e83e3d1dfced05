"""Does moving a layer along a direction move the prediction? Sensitivity and removal (arXiv 2509.23926, after RCAV).

With the class probabilities p_k behind the layer and a direction s_i that raises concept z_i by one::

    sensitivity_k(i) = share(p_k(x + alpha s_i) > p_k(x)) - share(p_k(x + alpha s_i) < p_k(x))      in [-1, 1]
    removal_k(i)     = mean of p_k(clip(x - c m_i s_i)) - p_k(x),  m_i = [z_i > b],  c = mean of z_i - b where m_i

A class moves for almost any direction that is long enough: compare with random directions of the same kind
(:func:`influence_test`), and a removal with a random direction of equal length. Activations that no image has are part
of every such test.

Shape letters: B images, C features, H W the layer's grid, I directions, K classes, N random directions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from netgloss.errors import UserError

Tail = Callable[[Tensor], Tensor]


@torch.no_grad()
def sensitivity(tail: Tail, activation: Tensor, directions: Tensor, alpha: float) -> Tensor:
    """(I, K) in [-1, 1]: in how many more images a class gains than loses.

    Parameters
    ----------
    tail : logits (B, K) of activations. activation : (B, C) or (B, C, H, W). directions : (I, C).

    Raises
    ------
    UserError : directions of another number of features.
    """
    _check(activation, directions)
    before = tail(activation).log_softmax(1)
    return torch.stack(
        [(tail(activation + alpha * _spread(d, activation)).log_softmax(1) - before).sign().mean(0) for d in directions]
    )


def influence_test(scores: Tensor, null: Tensor) -> tuple[Tensor, Tensor]:
    """P (I, K) of sensitivities against those of random directions (N, K), p = (1 + #{|null| >= |score|}) / (1 + N),
    and which are significant at 0.05 over all I K (Benjamini-Hochberg).
    """
    from scipy.stats import false_discovery_control

    if not len(null):
        raise UserError("influence needs random directions to compare with, got none")
    reached = torch.stack([(null.abs() >= row.abs()).sum(0) for row in scores])
    p = (1 + reached).double() / (1 + len(null))
    significant = torch.from_numpy(false_discovery_control(p.flatten().numpy()) <= 0.05)
    return p, significant.reshape(p.shape)


@torch.no_grad()
def removal(
    tail: Tail,
    activation: Tensor,
    concepts: Tensor,
    thresholds: Tensor,
    directions: Tensor,
    *,
    clip: tuple[float | None, float | None] = (None, None),
) -> Tensor:
    """(I, K) mean change of p_k when a concept is taken down to its threshold where it is on; 0 where it never is.

    Parameters
    ----------
    concepts : (B, I) or (B, I, H, W). thresholds : (I,). directions : (I, C), each raises its concept by one.
    clip : range of the layer: (0, None) behind a ReLU, (0, 6) behind a ReLU6.
    """
    _check(activation, directions)
    before = tail(activation).softmax(1)
    found = before.new_zeros(len(directions), before.shape[1])
    for i, direction in enumerate(directions):
        on = concepts[:, i] > thresholds[i]
        if not on.any():
            continue
        step = concepts[:, i][on].mean() - thresholds[i]
        moved = activation - step * on[:, None] * _spread(direction, activation)
        if clip != (None, None):
            moved = moved.clamp(*clip)
        found[i] = (tail(moved).softmax(1) - before).mean(0)
    return found


def random_of_equal_length(directions: Tensor, *, seed: int) -> Tensor:
    """(I, C) random directions, each as long as its counterpart."""
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(directions.shape, generator=generator).to(directions)
    return random * (directions.norm(dim=1) / random.norm(dim=1).clamp_min(1e-12))[:, None]


def _spread(direction: Tensor, activation: Tensor) -> Tensor:
    return direction.reshape(1, -1, *(1,) * (activation.ndim - 2))


def _check(activation: Tensor, directions: Tensor) -> None:
    if directions.ndim != 2 or directions.shape[1] != activation.shape[1]:
        raise UserError(
            f"directions {tuple(directions.shape)} do not fit activations of {activation.shape[1]} features"
        )

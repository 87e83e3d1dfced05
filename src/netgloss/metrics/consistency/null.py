"""What random top sets give: p-values of consistency, and the chance level of a cosine of class vectors.

Shape letters: D draws, G sources, U units, C classes, N images of R, M images of V.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ELEMENTS = 2**22


def random_orders(num: int, length: int, *, draws: int, generator: torch.Generator) -> Tensor:
    """(D, length) the first ``length`` of ``num`` numbers in random order, D times."""
    step = max(1, _ELEMENTS // num)
    parts = [
        torch.rand(min(step, draws - start), num, generator=generator).topk(length, dim=1).indices
        for start in range(0, draws, step)
    ]
    return torch.cat(parts)


def null_p_values(
    source_weights: Tensor, source_labels: Tensor, affinity: Tensor, consis: Tensor, *, draws: int = 2000, seed: int = 0
) -> Tensor:
    """p-values (U,) = (1 + b) / (draws + 1), b counting random top sets that score at least as high.

    A random top set gives the unit's own weights to randomly drawn sources.

    Parameters
    ----------
    source_weights : (G, U). source_labels : (G,). affinity : (C, C). consis : (U,).
    """
    weights_UG = source_weights.T.sort(dim=1, descending=True).values
    longest = int((weights_UG > 0).sum(1).max()) if len(weights_UG) else 0
    generator = torch.Generator().manual_seed(seed)
    labels_DG = source_labels[random_orders(len(source_labels), longest, draws=draws, generator=generator)]
    known: dict[bytes, Tensor] = {}
    p_values = torch.empty_like(consis)
    for u, weights in enumerate(weights_UG):
        key = (weights * 1e9).round().long().numpy().tobytes()
        if key not in known:
            used = weights[weights > 0]
            p_DC = torch.zeros(draws, len(affinity), dtype=torch.float64)
            p_DC.scatter_add_(1, labels_DG[:, : len(used)], used.expand(draws, -1))
            known[key] = ((p_DC @ affinity) * p_DC).sum(1)
        p_values[u] = (1 + (known[key] >= consis[u] - 1e-12).sum()) / (1 + draws)
    return p_values


def benjamini_hochberg(p_values: Tensor, *, level: float = 0.05) -> Tensor:
    """(U,) True where significant; NaN p-values take no part."""
    from scipy.stats import false_discovery_control

    tested = ~p_values.isnan()
    found = torch.zeros_like(tested)
    if tested.any():
        found[tested] = torch.from_numpy(false_discovery_control(p_values[tested].numpy()) <= level)
    return found


def simulated_cosine_chance(
    labels: Tensor, others: Tensor, k: int, k_other: int, *, num_classes: int, draws: int = 500, seed: int = 0
) -> float:
    """The same by simulation: k random images of ``labels`` (N,) against ``k_other`` of ``others`` (M,)."""
    generator = torch.Generator().manual_seed(seed)
    vectors = []
    for of, size in ((labels, k), (others, k_other)):
        drawn_DK = of[random_orders(len(of), size, draws=draws, generator=generator)]
        counts = torch.zeros(draws, num_classes, dtype=torch.float64)
        vectors.append(counts.scatter_add_(1, drawn_DK, torch.ones_like(drawn_DK, dtype=torch.float64)))
    return float(torch.cosine_similarity(vectors[0], vectors[1], dim=1).mean())

"""Is a labelled concept tied to its label in the same image? The permutation test of network dissection.

Shape letters: n images, I concepts, h w their map, P pixels of the mask grid, M columns (labels, then categories).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from netgloss.errors import UserError
from netgloss.metrics.dissection import MASK_ELEMENTS, Masks, Vocabulary, upsample


def permutation_test(
    maps: Tensor, thresholds: Tensor, masks: Masks, chosen: Tensor, vocabulary: Vocabulary, *, seed: int = 0
) -> dict[str, Tensor]:
    """Is a concept's mask tied to its label's mask *in the same image*, beyond sizes and layout?

    Pairs the masks of each concept with the label masks of permuted images: T = sum_a |M_i(a) & L(pi(a))|. Sizes and
    positions stay, so a concept that is always in the lower half gains nothing from "wheels are low". Labels come
    from other images, so no search over labels needs correcting. p = (1 + #{T_pi >= T}) / (1 + N) with N =
    max(10,000, 40 I); ``significant`` is Benjamini-Hochberg at 0.05 over the concepts. Memory grows with the square
    of the number of images.

    Parameters
    ----------
    maps : (n, I, h, w) of all images. thresholds, chosen : (I,).

    Returns
    -------
    (I,) each: ``observed`` T, ``expected`` E T, ``deviation`` sqrt(Var T), ``z``, ``p`` (1 without label),
    ``significant``.
    """
    from scipy.stats import false_discovery_control

    n, concepts = maps.shape[:2]
    if n < 2:
        raise UserError(f"a permutation test needs at least 2 images, got {n}")
    grid = (int(masks.labels.shape[2]), int(masks.labels.shape[3]))
    columns_nMP = masks.columns(vocabulary)
    paired = torch.zeros(n * n, concepts)
    for label in chosen[chosen >= 0].unique().tolist():
        counting = columns_nMP[:, len(vocabulary.labels) + vocabulary.category[label]].bool()
        mask_Pn = columns_nMP[:, label].T
        members = (chosen == label).nonzero().squeeze(1)
        for some in members.split(max(1, MASK_ELEMENTS // columns_nMP[:, 0].numel())):
            on_nIP = upsample(maps[:, some], grid).flatten(2) > thresholds[some, None]
            on_nIP &= counting[:, None]
            paired[:, some] = (on_nIP.float() @ mask_Pn).transpose(1, 2).reshape(n * n, len(some))
    if float(paired.sum(0).max()) >= 2**24:
        paired = paired.double()
    generator = torch.Generator().manual_seed(seed)
    number = max(10_000, 40 * concepts)
    diagonal = torch.arange(n) * n
    observed = paired[diagonal + torch.arange(n)].sum(0)
    reached = torch.zeros(concepts, dtype=torch.long)
    for start in range(0, number, 1000):
        order = torch.rand(min(1000, number - start), n, generator=generator).argsort(dim=1)
        reached += (F.embedding_bag(order + diagonal, paired, mode="sum") >= observed).sum(0)
    square = paired.double().reshape(n, n, concepts)
    centred = square - square.mean(0) - square.mean(1, keepdim=True) + square.mean((0, 1))
    expected, variance = square.sum((0, 1)) / n, centred.square().sum((0, 1)) / (n - 1)
    p = torch.where(chosen >= 0, (1 + reached) / (1 + number), 1.0).double()
    deviation = variance.sqrt()
    z = torch.where(deviation > 0, (observed - expected) / deviation.clamp_min(1e-12), 0.0)
    return {
        "observed": observed.double(),
        "expected": expected,
        "deviation": deviation,
        "z": z,
        "p": p,
        "significant": torch.from_numpy(false_discovery_control(p.numpy()) <= 0.05),
    }

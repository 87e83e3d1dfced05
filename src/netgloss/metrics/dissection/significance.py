"""Is a labelled concept tied to its label in the same image? The permutation test of network dissection.

Shape letters: n images of a block, I concepts, h w their map, P pixels of the mask grid, M columns (labels, then
categories), K permutations.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from netgloss.data.masks import Masks, Vocabulary
from netgloss.errors import UserError
from netgloss.metrics.dissection.overlaps import MASK_ELEMENTS, upsample

BLOCK = 128
"""Images that are permuted among each other at most."""
_PAIRED = 1 << 23


def blocks_of(images: int, *, seed: int = 0) -> list[Tensor]:
    """A random partition of ``images`` places into blocks of equal size (to one), at most :data:`BLOCK` each."""
    order = torch.randperm(images, generator=torch.Generator().manual_seed(seed))
    return list(order.tensor_split(max(1, -(-images // BLOCK))))


class PermutationTest:
    """Is a concept's mask tied to its label's mask *in the same image*, beyond sizes and layout?

    Pairs the masks of each concept with the label masks of permuted images: T = sum_a |M_i(a) & L(pi(a))|. Sizes and
    positions stay, so a concept that is always in the lower half gains nothing from "wheels are low". Labels come
    from other images, so no search over labels needs correcting. p = (1 + #{T_pi >= T}) / (1 + K) with K =
    max(10,000, 40 I); ``significant`` is Benjamini-Hochberg at 0.05 over the concepts.

    Images come in blocks and are permuted within their block: up to :data:`BLOCK` images this is the full test, above
    it a test over fewer permutations, which is as exact. So the memory does not depend on the number of images. Blocks
    must be drawn at random (:func:`blocks_of`): blocks of one class would ask for more than the class.

    Parameters
    ----------
    thresholds, chosen : (I,) thresholds and labels; -1: none.
    """

    def __init__(self, thresholds: Tensor, chosen: Tensor, vocabulary: Vocabulary, *, seed: int = 0) -> None:
        self.thresholds, self.chosen, self.vocabulary = thresholds, chosen, vocabulary
        concepts = len(chosen)
        self._images = 0
        self._number = max(10_000, 40 * concepts)
        self._generator = torch.Generator().manual_seed(seed)
        self._permuted = torch.zeros(self._number, concepts)
        self._observed, self._expected, self._variance = torch.zeros(3, concepts, dtype=torch.float64)

    def add(self, maps: Tensor, masks: Masks) -> None:
        """One block: concept maps (n, I, h, w) or concepts (n, I) with their masks."""
        n = len(maps)
        self._images += n
        grid = (int(masks.labels.shape[2]), int(masks.labels.shape[3]))
        columns_nMP = masks.columns(self.vocabulary)
        orders_Kn = torch.rand(self._number, n, generator=self._generator).argsort(dim=1)
        places_Kn = orders_Kn + torch.arange(n) * n
        step = max(1, min(MASK_ELEMENTS // columns_nMP[:, 0].numel(), _PAIRED // n**2))
        for label in self.chosen[self.chosen >= 0].unique().tolist():
            counting = columns_nMP[:, len(self.vocabulary.labels) + self.vocabulary.category[label]].bool()
            mask_Pn = columns_nMP[:, label].T
            for some in (self.chosen == label).nonzero().squeeze(1).split(step):
                on_nIP = upsample(maps[:, some], grid).flatten(2) > self.thresholds[some, None]
                on_nIP &= counting[:, None]
                pairs_nnI = (on_nIP.float() @ mask_Pn).transpose(1, 2)
                table = pairs_nnI.reshape(n * n, len(some))
                for part in torch.arange(self._number).split(1000):
                    self._permuted[part[:, None], some] += F.embedding_bag(places_Kn[part], table, mode="sum")
                square = pairs_nnI.double()
                self._observed[some] += square.diagonal().sum(1)
                self._expected[some] += square.sum((0, 1)) / n
                if n > 1:
                    centred = square - square.mean(0) - square.mean(1, keepdim=True) + square.mean((0, 1))
                    self._variance[some] += centred.square().sum((0, 1)) / (n - 1)

    def compute(self) -> dict[str, Tensor]:
        """(I,) each: ``observed`` T, ``expected`` E T, ``deviation`` sqrt(Var T), ``z``, ``p`` (1 without label),
        ``significant``.
        """
        from scipy.stats import false_discovery_control

        if self._images < 2:
            raise UserError(f"a permutation test needs at least 2 images, got {self._images}")
        reached = (self._permuted >= self._observed.float()).sum(0)
        p = torch.where(self.chosen >= 0, (1 + reached) / (1 + self._number), 1.0).double()
        deviation = self._variance.sqrt()
        z = torch.where(deviation > 0, (self._observed - self._expected) / deviation.clamp_min(1e-12), 0.0)
        return {
            "observed": self._observed.clone(),
            "expected": self._expected.clone(),
            "deviation": deviation,
            "z": z,
            "p": p,
            "significant": torch.from_numpy(false_discovery_control(p.numpy()) <= 0.05),
        }


def permutation_test(
    maps: Tensor, thresholds: Tensor, masks: Masks, chosen: Tensor, vocabulary: Vocabulary, *, seed: int = 0
) -> dict[str, Tensor]:
    """:class:`PermutationTest` of concepts and masks that are all in memory: ``maps`` (n, I, h, w) of all images."""
    test = PermutationTest(thresholds, chosen, vocabulary, seed=seed)
    for block in blocks_of(len(maps), seed=seed):
        some = block.sort().values
        annotated, ignore = (None if m is None else m[some] for m in (masks.annotated, masks.ignore))
        test.add(maps[some], Masks(masks.labels[some], annotated, ignore))
    return test.compute()

"""Labelled detectors together: do several with one label see different things, and does their union see more?

- ``sub_concept_share``: among pairs of detectors with the same label and both precisions above 0.5, the share whose
  masks have an IoU below 0.1: they read different pixels of one label.
- Linear-OR: a label is on where any of its detectors is; its recall and F1 compared with those of its best single
  detector.
- ``actives``: concepts that are on at a pixel, on average; ``overlap_share``: share of pixels that two or more
  different labels of one category claim.

Union gains grow with the number of detectors and with the on-rate: compare at equal rate only.

Shape letters: B images, I concepts, P pixels, L labels.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from netgloss.data.masks import Masks
from netgloss.metrics.dissection.detectors import DETECTOR_IOU, Detectors
from netgloss.metrics.dissection.overlaps import upsample


def joint_behaviour(
    batches: Iterable[tuple[Tensor, Masks]], thresholds: Tensor, detectors: Detectors, grid: tuple[int, int]
) -> dict[str, float]:
    """The numbers of the module docstring, means over labels that have a detector; NaN where there is none.

    Parameters
    ----------
    batches : concept maps (B, I[, h, w]) with masks, one image after the other is held upsampled.
    thresholds : (I,). detectors : labels, phi and precision of the concepts.
    """
    number = len(detectors.vocabulary.labels)
    category = torch.tensor(detectors.vocabulary.category)
    counts_as = (detectors.phi > DETECTOR_IOU) & (detectors.labels >= 0)
    member_LI = torch.zeros(number, len(detectors.phi))
    member_LI[detectors.labels[counts_as], counts_as.nonzero().squeeze(1)] = 1
    best_L = torch.stack([torch.where(row > 0, detectors.phi, -1.0).argmax() for row in member_LI])
    both_II = torch.zeros(len(detectors.phi), len(detectors.phi), dtype=torch.float64)
    hits = torch.zeros(4, number, dtype=torch.float64)  # union & label, union, best & label, best
    size_L = torch.zeros(number, dtype=torch.float64)
    actives = crowded = pixels = 0.0
    for maps, masks in batches:
        columns = masks.columns(detectors.vocabulary)
        for image, column_MP in zip(maps, columns, strict=True):
            counting_LP = column_MP[number:][category]
            on_IP = (upsample(image[None], grid)[0].flatten(1) > thresholds[:, None]).float()
            both_II += on_IP @ on_IP.T
            union_LP = (member_LI @ on_IP > 0).float() * counting_LP
            single_LP = on_IP[best_L] * counting_LP
            label_LP = column_MP[:number]
            parts = (union_LP * label_LP, union_LP, single_LP * label_LP, single_LP)
            hits += torch.stack([part.sum(1) for part in parts])
            size_L += label_LP.sum(1)
            claims = torch.zeros(len(detectors.vocabulary.categories), on_IP.shape[1])
            claims.index_add_(0, category, union_LP)
            actives += float(on_IP.sum())
            crowded += float((claims > 1).any(0).sum())
            pixels += on_IP.shape[1]
    used = member_LI.any(1) & (size_L > 0)
    union_hit, union_on, single_hit, single_on = (row[used] for row in hits)
    size = size_L[used]
    on = both_II.diagonal()
    iou = both_II / (on[:, None] + on[None] - both_II).clamp_min(1)
    pair = (detectors.labels[:, None] == detectors.labels[None]) & counts_as[:, None] & counts_as[None]
    sure = detectors.precision > 0.5
    pair = (pair & sure[:, None] & sure[None]).triu(1)
    return {
        "sub_concept_share": float((iou[pair] < 0.1).double().mean()),
        "sub_concept_pairs": float(pair.sum()),
        "or_recall": float((union_hit / size).mean()),
        "single_recall": float((single_hit / size).mean()),
        "or_f1": float((2 * union_hit / (union_on + size)).mean()),
        "single_f1": float((2 * single_hit / (single_on + size)).mean()),
        "actives": actives / max(pixels, 1),
        "overlap_share": crowded / max(pixels, 1),
    }

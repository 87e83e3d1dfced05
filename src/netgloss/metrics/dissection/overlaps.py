"""Where thresholded concept maps meet masks: counts of pixels, for all concepts, rules and labels at once.

A pixel of the mask grid lies between four cells of the map and cannot be on unless one of them is over the threshold.
So the pixels between the same four cells are interpolated by one small matrix product for all concepts of all images
of a batch that reach over their threshold there, and those that are on are counted by the set of columns that their
mask pixel belongs to (``bincount``). Where many concepts reach over, or the map is fine, one matrix product an image
over all pixels takes its place, as on accelerators. Both give the same whole numbers.

Shape letters: B images, I concepts, N = B I, h w the map, H W the mask grid, P = H W pixels, M columns of masks, R
rules, S sets of columns, n some of N, s pixels between four cells.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from netgloss.errors import UserError

MASK_ELEMENTS = 1 << 21
"""Floats of upsampled maps held at once: 8 MiB stay in the cache and are three times as fast as 64."""
_DENSE_FROM = 0.15
"""Share of cells over the threshold from which all pixels are worked on."""
_FINE = 32 * 32
"""Cells of a map from which there is little between them."""

Array = npt.NDArray[np.int64]


def upsample(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Concept maps (B, I, h, w), or concepts (B, I) of a vector layer, on the mask grid: bilinear, corners not
    aligned.
    """
    if maps.ndim == 2:
        return maps[:, :, None, None].expand(-1, -1, *grid)
    if maps.ndim != 4:
        raise UserError(f"expected concepts (B, I) or (B, I, H, W), got shape {tuple(maps.shape)}")
    rows, columns = (_interpolation(n, m).to(maps.device) for n, m in zip(maps.shape[2:], grid, strict=True))
    return rows @ (maps.float() @ columns.T)  # four times as fast as F.interpolate on a CPU


def overlaps(
    maps: Tensor,
    thresholds: Tensor,
    columns: Tensor,
    grid: tuple[int, int],
    *,
    within: Tensor | None = None,
    places: Tensor | None = None,
) -> Tensor:
    """Pixels where a concept is on and a column is set, for each image: (B, R, I, M) float32, whole numbers.

    Parameters
    ----------
    maps : (B, I, h, w) or (B, I). thresholds : (R, I). columns : (B, M, P), 0 or 1.
    within, places : (R, I) a column for each concept, and (R, I, P) float64 counts to which the images are added in
        which the concept is on in a pixel of that column.
    """
    if maps.ndim == 2:
        return _vectors(maps, thresholds, columns, within, places)
    found = maps.new_zeros(len(maps), *thresholds.shape, columns.shape[1], dtype=torch.float32)
    sparse = maps.device.type == "cpu" and maps.shape[2] * maps.shape[3] <= _FINE
    codes = _PixelCodes(columns) if sparse else None
    left = []
    values_hwN = _cells_first(maps) if sparse else None
    for rule, threshold_I in enumerate(thresholds):
        above_hwN = values_hwN - threshold_I.repeat(len(maps)).numpy() if values_hwN is not None else None
        if codes is None or above_hwN is None or (above_hwN > 0).mean() > _DENSE_FROM:
            left.append(rule)
            continue
        on = _pixels_that_are_on(above_hwN, grid)
        inside = None if within is None else within[rule]
        codes.count(*on, found[:, rule], inside, None if places is None else places[rule])
    if left:
        _count_densely(maps, thresholds, columns, grid, left, found, within, places)
    return found


def _pixels_that_are_on(above_hwN: npt.NDArray[np.float32], grid: tuple[int, int]) -> tuple[Array, Array]:
    """For each pixel that is on: which of the N = B I maps it is of, and its place 0 .. P - 1.

    ``above_hwN`` : what the cells are above their threshold.
    """
    over_hwN = above_hwN > 0
    which, pixels = [], []
    across = _between(above_hwN.shape[1], grid[1])
    for top, bottom, rows, down in _between(above_hwN.shape[0], grid[0]):
        reach_wN = over_hwN[top] | over_hwN[bottom]
        for left, right, columns, along in across:
            some_n = np.flatnonzero(reach_wN[left] | reach_wN[right])
            if not len(some_n):
                continue
            corners_4n = np.empty((4, len(some_n)), np.float32)
            for corner, (y, x) in enumerate(((top, left), (top, right), (bottom, left), (bottom, right))):
                above_hwN[y, x].take(some_n, out=corners_4n[corner], mode="clip")
            weights_s4 = (down[:, None, :, None] * along[None, :, None, :]).reshape(-1, 4)
            slot, place = np.divmod(np.flatnonzero(weights_s4 @ corners_4n > 0), len(some_n))
            which.append(some_n.take(place))
            pixels.append((rows[:, None] * grid[1] + columns).reshape(-1).take(slot))
    if not which:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    return np.concatenate(which), np.concatenate(pixels)


def _cells_first(maps: Tensor) -> npt.NDArray[np.float32]:
    """(B, I, h, w) -> (h, w, N)."""
    cells = maps.shape[2:]
    found: npt.NDArray[np.float32] = maps.float().reshape(-1, cells.numel()).T.contiguous().numpy().reshape(*cells, -1)
    return found


def _count_densely(
    maps: Tensor,
    thresholds: Tensor,
    columns: Tensor,
    grid: tuple[int, int],
    rules: list[int],
    found: Tensor,
    within: Tensor | None,
    places: Tensor | None,
) -> None:
    """All pixels of some rules."""
    step = max(1, MASK_ELEMENTS // (maps.shape[1] * grid[0] * grid[1]))
    for start in range(0, len(maps), step):
        part = slice(start, start + step)
        values_BIP = upsample(maps[part], grid).flatten(2)
        on_BIP = torch.empty_like(values_BIP)
        for rule in rules:
            torch.gt(values_BIP, thresholds[rule][:, None], out=on_BIP)
            found[part, rule] = (columns[part] @ on_BIP.transpose(1, 2)).transpose(1, 2)
            if places is not None:
                shown = on_BIP if within is None else on_BIP * columns[part][:, within[rule]]
                places[rule] += shown.sum(0)


class _PixelCodes:
    """The set of columns that each pixel belongs to: ``code`` (B, P) out of S, ``table`` (S, M) what they mean."""

    def __init__(self, columns: Tensor) -> None:
        bits_BPM = columns.transpose(1, 2).bool().numpy()
        packed = np.packbits(bits_BPM, axis=2)
        wide = np.zeros((*packed.shape[:2], -(-packed.shape[2] // 8) * 8), np.uint8)
        wide[:, :, : packed.shape[2]] = packed
        words = wide.view(np.uint64)
        flat = words.reshape(-1, words.shape[2])
        mixed = np.zeros(len(flat), np.uint64)
        for word in flat.T:  # one number per set; sets that share one by chance are separated below
            mixed = (mixed ^ word) * np.uint64(0x9E3779B97F4A7C15)
            mixed ^= mixed >> np.uint64(29)
        _, first, code = np.unique(mixed, return_index=True, return_inverse=True)
        if not (flat[first[code]] == flat).all():
            _, first, code = np.unique(flat, axis=0, return_index=True, return_inverse=True)
        self.code = code.reshape(packed.shape[:2])
        self.table = bits_BPM.reshape(len(flat), -1)[first].astype(np.float32)

    def count(
        self, which: Array, pixel: Array, found_BIM: Tensor, within_I: Tensor | None, places_IP: Tensor | None
    ) -> None:
        """Adds pixels that are on (see :func:`overlaps`): ``which`` of the B I maps, and where."""
        concepts = found_BIM.shape[1]
        image = which // concepts
        code = self.code[image, pixel]
        sets = len(self.table)
        counts = np.bincount(which * sets + code, minlength=len(found_BIM) * concepts * sets)
        by_set = counts.reshape(-1, sets).astype(np.float32)
        found_BIM += torch.from_numpy(by_set @ self.table).reshape(found_BIM.shape)
        if places_IP is not None:
            concept = which - image * concepts
            if within_I is not None:
                inside = self.table[code, within_I.numpy()[concept]] > 0
                concept, pixel = concept[inside], pixel[inside]
            np.add.at(places_IP.numpy().reshape(-1), concept * places_IP.shape[1] + pixel, 1.0)


def _vectors(
    values_BI: Tensor, thresholds: Tensor, columns: Tensor, within: Tensor | None, places: Tensor | None
) -> Tensor:
    """:func:`overlaps` of a vector layer, whose concepts are on everywhere in an image or nowhere."""
    on_BRI = (values_BI[:, None] > thresholds).float()
    if places is not None:
        for rule, at in enumerate(places):
            shown = columns[:, within[rule]] if within is not None else torch.ones_like(at).expand(len(columns), -1, -1)
            at += torch.einsum("bi,bip->ip", on_BRI[:, rule], shown.float())
    return on_BRI[..., None] * columns.sum(2)[:, None, None]


@lru_cache(maxsize=32)
def _interpolation(cells: int, size: int) -> Tensor:
    """(size, cells): the weights of linear interpolation, corners not aligned."""
    return F.interpolate(torch.eye(cells)[None], size=size, mode="linear", align_corners=False)[0].T.contiguous()


@lru_cache(maxsize=32)
def _between(cells: int, size: int) -> list[tuple[int, int, Array, npt.NDArray[np.float32]]]:
    """The places (r,) between the same two cells, the cells, and their weights (r, 2), in order."""
    weights = _interpolation(cells, size).numpy()
    groups: dict[tuple[int, int], list[int]] = {}
    for place, row in enumerate(weights):
        used = np.flatnonzero(row)
        groups.setdefault((int(used[0]), int(used[-1])), []).append(place)
    found = []
    for (first, last), places in groups.items():
        pair = weights[places][:, [first, last]]
        if first == last:
            pair[:, 1] = 0
        found.append((first, last, np.array(places), pair))
    return found

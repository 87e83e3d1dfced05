"""Every layer of a classifier with its output's shape and parameters, and on request its receptive field.

Both are found by NaN, which no operation stops: what comes out as NaN depends on the pixels that went in as NaN. One
image whose corner is NaN shows which axes of an output are positions, since the features of a position are NaN
together. Images that are NaN from a row or column on show how far a cell sees: with thresholds t, the first cell that
is NaN gives the last pixel that it sees, and images that are NaN up to t give the first. The receptive field of Araujo,
Norris and Sim ("Computing Receptive Fields of Convolutional Neural Networks", Distill 2019) comes out, where it is
smaller than the image.

Shape letters: B images, C channels, H and W a layer's grid.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from netgloss.classifiers.taps import watched

if TYPE_CHECKING:
    from netgloss.classifiers.loading import Classifier

_THRESHOLDS = 34  # pixels on each side of the middle: strides of up to 32 show a change
_AT_ONCE = 8


@dataclass(frozen=True)
class LayerInfo:
    """One layer.

    Attributes
    ----------
    name, type : dotted name, class name.
    shape : of its output without the batch, (C,) or (C, H, W); empty if it is not one tensor.
    params : number of parameters, those of inner layers included.
    stride : input pixels from one grid cell to the next (the larger of both axes); None where there is no grid.
    receptive_field : side, in input pixels, of what one value can depend on (the larger of both axes); None for the
        whole image, and where it was not asked for.
    calls : how often it runs in a forward; shape and the rest are those of the last run. 0: never runs, or runs unseen.
    readable : True if its output is one tensor (B, C) or (B, C, H, W), so that it can be explained.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    params: int
    stride: int | None
    receptive_field: int | None
    calls: int
    readable: bool


def list_layers(classifier: Classifier, *, receptive_field: bool = False) -> list[LayerInfo]:
    """Every layer of the network, in the order of ``named_modules``.

    Parameters
    ----------
    receptive_field : also compute receptive fields and exact strides, which takes about 140 images through the network
        instead of 2.
    """
    outputs: dict[str, Any] = {}
    calls: dict[str, int] = {}

    def see(name: str, module: nn.Module, output: Any) -> None:
        calls[name] = calls.get(name, 0) + 1
        is_tensor = isinstance(output, Tensor)
        outputs[name] = (tuple(output.shape) if is_tensor else (), is_tensor and is_map_or_vector(output))

    height, width = classifier.input_shape[1:]
    images = torch.zeros(2, *classifier.input_shape, device=classifier.device)
    images[1, :, : height // 2, : width // 2] = math.nan
    with torch.no_grad(), watched(classifier.net, see):
        classifier.net(images)
    maps = {name: s for name, (s, readable) in outputs.items() if readable and len(s) == 4 and s[2] * s[3] > 1}
    fields = _receptive_fields(classifier, maps) if receptive_field else {}
    found = []
    for name, module in classifier.net.named_modules():
        shape, readable = outputs.get(name, ((), False))
        stride = max(round(height / shape[2]), round(width / shape[3])) if name in maps else None
        stride, seen = fields.get(name, (stride, None))
        params = sum(p.numel() for p in module.parameters())
        if name:
            kind = type(module).__name__
            found.append(LayerInfo(name, kind, shape[1:], params, stride, seen, calls.get(name, 0), readable))
    return found


def is_map_or_vector(output: Tensor) -> bool:
    """True for (B, C), and for (B, C, H, W) with positions in the last two axes; the second image must have a corner of
    NaN.

    Features of one position are NaN together, nearly so where branches with different receptive fields meet: the axis
    along which the NaN differ less is that of the features. Where everything is NaN, as after attention, the axes of
    equal size are the grid.
    """
    if len(output) != 2 or not output.is_floating_point() or output.ndim not in (2, 4):
        return False
    if output.ndim == 2:
        return True
    lost = output[1].isnan()
    if lost.all() or not lost.any():
        return output.shape[2] == output.shape[3] or output.shape[1] != output.shape[2]
    first, last = ((lost.float() - lost.float().mean(axis, keepdim=True)).abs().mean() for axis in (0, 2))
    return bool(first <= last)


def _receptive_fields(
    classifier: Classifier, maps: dict[str, tuple[int, ...]]
) -> dict[str, tuple[int | None, int | None]]:
    """Stride and receptive field of layers with maps (B, C, H, W): the larger of both axes."""
    sides = classifier.input_shape[1:]
    ranges = [range(max(1, s // 2 - _THRESHOLDS), min(s - 1, s // 2 + _THRESHOLDS)) for s in sides]
    first, last = (_edges(classifier, maps, ranges, from_=from_) for from_ in (True, False))
    fields: dict[str, tuple[int | None, int | None]] = {}
    for name, shape in maps.items():
        spans = [
            _span(first[name][axis], last[name][axis], ranges[axis], sides[axis] / shape[2 + axis], shape[2 + axis])
            for axis in (0, 1)
        ]
        stride = max(sides[axis] / shape[2 + axis] if span is None else span[0] for axis, span in enumerate(spans))
        known = [span[1] for span in spans if span is not None]
        fields[name] = (round(stride), round(max(known)) if len(known) == 2 else None)
    return fields


def _edges(
    classifier: Classifier, maps: dict[str, tuple[int, ...]], ranges: list[range], *, from_: bool
) -> dict[str, tuple[list[int], list[int]]]:
    """For rows and for columns, at every threshold t: the first cell that is NaN when pixels from t on are, or the last
    one when pixels up to t are."""
    edges: dict[str, tuple[list[int], list[int]]] = {name: ([], []) for name in maps}
    latest: dict[str, Tensor] = {}

    def see(name: str, module: nn.Module, output: Any) -> None:
        if name in maps and isinstance(output, Tensor) and output.ndim == 4:
            latest[name] = output

    pairs = list(itertools.zip_longest(*ranges))
    for start in range(0, len(pairs), _AT_ONCE):
        some = pairs[start : start + _AT_ONCE]
        images = torch.zeros(len(some), *classifier.input_shape, device=classifier.device)
        for image, (row, column) in zip(images, some, strict=True):
            for t, along in ((row, image.movedim(1, 0)), (column, image.movedim(2, 0))):
                if t is not None:
                    along[slice(t, None) if from_ else slice(t + 1)] = math.nan
        with torch.no_grad(), watched(classifier.net, see):
            classifier.net(images)
        for name, output in latest.items():
            # a row and a column near the border that pixels beyond the middle reach last
            y, x = (n // 16 if from_ else -1 - n // 16 for n in output.shape[2:])
            for axis, cells in enumerate((output[:, :, :, x], output[:, :, y, :])):
                lost = cells.isnan().any(dim=1).int()
                place = (lost if from_ else lost.flip(1)).argmax(1).where(lost.any(1), lost.shape[1])
                edges[name][axis].extend((place if from_ else lost.shape[1] - 1 - place).tolist())
    return edges


def _span(first: list[int], last: list[int], thresholds: range, ratio: float, cells: int) -> tuple[float, float] | None:
    """Step between cells and receptive field, in pixels; None where a cell sees beyond the image."""
    # cells from first[i] to the next first see pixels up to thresholds[i]; cells at the border are cut
    ends = ((first[i], first[i + 1], t) for i, t in enumerate(thresholds[:-1]) if first[i] > 0)
    starts = ((last[i - 1] + 1, last[i] + 1, t) for i, t in enumerate(thresholds) if i and last[i] < cells - 1)
    end = {c: t for a, b, t in ends for c in range(max(1, a), min(b, cells - 1))}
    start = {c: t for a, b, t in starts for c in range(max(1, a), min(b, cells - 1))}
    if not end or not start:
        return None
    step = ratio
    for edge in (end, start):
        low, high = min(edge), max(edge)
        if high > low:
            step = (edge[high] - edge[low]) / (high - low)
    both = end.keys() & start.keys()
    if both:
        return step, max(end[c] - start[c] for c in both) + 1
    a, b = min(end), max(start)
    return step, end[a] - start[b] - (a - b) * step + 1

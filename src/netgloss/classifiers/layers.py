"""Every layer of a classifier with its output's shape and parameters, and on request its receptive field.

Receptive fields are found by NaN, which no operation stops: what comes out as NaN depends on the pixels that went in as
NaN. Images that are NaN from a row or column on show how far a cell sees: with thresholds t, the first cell that
is NaN gives the last pixel that it sees, and images that are NaN up to t give the first. The receptive field of Araujo,
Norris and Sim ("Computing Receptive Fields of Convolutional Neural Networks", Distill 2019) comes out, where it is
smaller than the image.

Shape letters: B images, C channels, H and W a layer's grid.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from netgloss.classifiers.layouts import Layout, corner_images
from netgloss.classifiers.taps import watched
from netgloss.errors import UserError

if TYPE_CHECKING:
    from netgloss.classifiers.loading import Classifier

_THRESHOLDS = 34  # pixels on each side of the middle: strides of up to 32 show a change
_AT_ONCE = 8
_POOLS = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.AvgPool2d)


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
    readable : True if its output can be read as (B, C) or (B, C, H, W), so that it can be explained.
    layout : "vector", "nchw", "nhwc" or "tokens"; "" where it is not readable.
    start : why the layer is good to start with ("last map", "end of a stage"), or "".
    """

    name: str
    type: str
    shape: tuple[int, ...]
    params: int
    stride: int | None
    receptive_field: int | None
    calls: int
    readable: bool
    layout: str = ""
    start: str = ""


def last_map(classifier: Classifier) -> str:
    """The last layer that gives a map of more than one place: what pooling and head read.

    Layers count in the order in which they end; of nested ones that give the same map the outermost is named.

    Raises
    ------
    UserError : the network has no such layer.
    """
    infos = {info.name: info for info in list_layers(classifier)}
    ended: list[str] = []
    with torch.no_grad(), watched(classifier.net, lambda name, _ran, _output: ended.append(name)):
        classifier.net(corner_images(classifier))
    maps = []
    for name in ended:
        info = infos.get(name)
        pools = isinstance(classifier.net.get_submodule(name), _POOLS)
        if info is not None and info.readable and math.prod(info.shape[1:]) > 1 and not pools:
            maps.append(name)
    if not maps:
        raise UserError(f"{classifier.name} has no layer that gives a map: name a layer (netgloss layers lists them)")
    last = maps[-1]
    shape = infos[last].shape
    while "." in last and (parent := last.rpartition(".")[0]) in maps and infos[parent].shape == shape:
        last = parent
    return last


def list_layers(classifier: Classifier, *, receptive_field: bool = False) -> list[LayerInfo]:
    """Every layer of the network, in the order of ``named_modules``.

    Parameters
    ----------
    receptive_field : also compute receptive fields and exact strides, which takes about 140 images through the network
        instead of 2.
    """
    outputs: dict[str, tuple[tuple[int, ...], Layout | None]] = {}
    calls: dict[str, int] = {}
    forms: dict[str, set[int]] = {}

    def see(name: str, module: nn.Module, output: Any) -> None:
        calls[name] = calls.pop(name, 0) + 1  # in the order of their last runs
        forms.setdefault(name, set()).add(getattr(output, "ndim", -1))
        try:
            layout = classifier.find_layout(name, output)
        except UserError:
            outputs[name] = (tuple(output.shape[1:]) if isinstance(output, Tensor) else (), None)
        else:
            outputs[name] = (tuple(layout.read(output).shape[1:]), layout)

    with torch.no_grad(), watched(classifier.net, see):
        classifier.net(corner_images(classifier))
    outputs |= {name: (outputs[name][0], None) for name, seen_forms in forms.items() if len(seen_forms) > 1}
    height, width = classifier.input_shape[1:]
    maps = {
        n: shape for n, (shape, layout) in outputs.items() if layout and len(shape) == 3 and shape[1] * shape[2] > 1
    }
    layouts = {name: layout for name, (_, layout) in outputs.items() if layout is not None}
    fields = _receptive_fields(classifier, maps, layouts) if receptive_field else {}
    starts = _starts(classifier.net, maps, layouts, list(calls))
    found = []
    for name, module in classifier.net.named_modules():
        shape, layout = outputs.get(name, ((), None))
        stride = max(round(height / shape[1]), round(width / shape[2])) if name in maps else None
        stride, seen = fields.get(name, (stride, None))
        params = sum(p.numel() for p in module.parameters())
        if name:
            kind = "" if layout is None else layout.kind
            about = (name, type(module).__name__, shape, params, stride, seen, calls.get(name, 0))
            found.append(LayerInfo(*about, layout is not None, kind, starts.get(name, "")))
    return found


def _starts(
    net: nn.Module, maps: Mapping[str, tuple[int, ...]], layouts: Mapping[str, Layout], order: Sequence[str]
) -> dict[str, str]:
    """Layers that are good to start with: the last one before the grid changes (the end of a stage), and the last map.

    The patch tokens of the last block do not reach a head that reads the class token: the block before it counts as
    the last map then.
    """
    children: dict[str, list[str]] = {}
    for name in order:  # a module's nearest ancestor that runs: lists of modules do not
        above = name.rpartition(".")[0]
        while above and above not in layouts and above not in maps:
            above = above.rpartition(".")[0]
        if name in maps and "Pool" not in type(net.get_submodule(name)).__name__:
            children.setdefault(above, []).append(name)
    parts = _parts("", children, maps)
    ends = [a for a, b in itertools.pairwise(parts) if maps[a][1:] != maps[b][1:]]
    found = {name: "end of a stage" for name in ends if name.count(".") < 3}  # deeper ones are branches of blocks
    if not parts:
        return found
    last = parts[-1]
    if layouts[last].prefix and getattr(net, "global_pool", "") != "avg":
        blocks = [name for name in children.get("blocks", children[""]) if re.search(r"\bblocks\.\d+$", name)]
        last = blocks[-2] if len(blocks) > 1 else last
    return found | {last: "last map"}


def _parts(of: str, children: Mapping[str, list[str]], maps: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What a module runs one after the other, where chains of three or more grids are opened in turn."""
    direct = children.get(of, [])
    found = []
    for part in direct:
        inner = _parts(part, children, maps)
        opened = len({maps[name][1:] for name in inner}) >= (2 if len(direct) == 1 else 3)
        found += inner if opened else [part]
    return found


def _receptive_fields(
    classifier: Classifier, maps: Mapping[str, tuple[int, ...]], layouts: Mapping[str, Layout]
) -> dict[str, tuple[int | None, int | None]]:
    """Stride and receptive field of layers with maps (B, C, H, W): the larger of both axes."""
    sides = classifier.input_shape[1:]
    ranges = [range(max(1, s // 2 - _THRESHOLDS), min(s - 1, s // 2 + _THRESHOLDS)) for s in sides]
    first, last = (_edges(classifier, layouts, maps, ranges, from_=from_) for from_ in (True, False))
    fields: dict[str, tuple[int | None, int | None]] = {}
    for name, shape in maps.items():
        spans = [
            _span(first[name][axis], last[name][axis], ranges[axis], sides[axis] / shape[1 + axis], shape[1 + axis])
            for axis in (0, 1)
        ]
        stride = max(sides[axis] / shape[1 + axis] if span is None else span[0] for axis, span in enumerate(spans))
        known = [span[1] for span in spans if span is not None]
        fields[name] = (round(stride), round(max(known)) if len(known) == 2 else None)
    return fields


def _edges(
    classifier: Classifier,
    layouts: Mapping[str, Layout],
    maps: Mapping[str, tuple[int, ...]],
    ranges: list[range],
    *,
    from_: bool,
) -> dict[str, tuple[list[int], list[int]]]:
    """For rows and for columns, at every threshold t: the first cell that is NaN when pixels from t on are, or the last
    one when pixels up to t are.
    """
    edges: dict[str, tuple[list[int], list[int]]] = {name: ([], []) for name in maps}
    latest: dict[str, Tensor] = {}

    def see(name: str, module: nn.Module, output: Any) -> None:
        if name in maps:
            latest[name] = layouts[name].read(output)

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

"""Every layer of a classifier with its output's shape, parameters, stride and theoretical receptive field.

The receptive field is computed along one eager forward, whatever Python does in it: a ``TorchDispatchMode`` sees
every tensor operation and carries on each tensor, and for each axis of the image, the interval of input pixels that
its first grid cell sees and the step from cell to cell (Araujo, Norris and Sim, "Computing Receptive Fields of
Convolutional Neural Networks", Distill 2019, equations 1 and 2: kernel k, dilation d and padding p at stride s widen
the interval by (k - 1) d s and shift it by -p s); where branches meet, the union. So that reshapes and permutations
need no rules of their own, a second tensor travels along that holds the grid cell of each value: an operation that
mixes values of different cells in any way but a convolution, a pooling or a resize (global pooling, flatten and
linear, attention) sees the whole image from there on.

Shape letters: B images, C channels, H and W a layer's grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from netgloss.classifiers.taps import watched

if TYPE_CHECKING:
    from netgloss.classifiers.loading import Classifier


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
        whole image.
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


def list_layers(classifier: Classifier) -> list[LayerInfo]:
    """Every layer of the network, in the order of ``named_modules``."""
    net = classifier.net
    seen: dict[str, tuple[tuple[int, ...], _Field | None, bool]] = {}
    calls: dict[str, int] = {}

    def see(name: str, module: nn.Module, output: Any) -> None:
        calls[name] = calls.get(name, 0) + 1
        field = getattr(output, "_netgloss_field", None)
        shape = tuple(output.shape) if isinstance(output, Tensor) else ()
        seen[name] = (shape, field, field is not None and _is_map_or_vector(output, field))

    blank = torch.zeros(2, *classifier.input_shape, device=classifier.device)
    height, width = blank.shape[2:]
    cells = torch.arange(height * width, dtype=torch.int32, device=blank.device).view(1, 1, height, width)
    _mark(blank, _Field(_Axis(1, 0, 0), _Axis(1, 0, 0), cells.expand(blank.shape)))
    with torch.no_grad(), watched(net, see), _Propagation():
        net(blank)
    return [_info(name, module, seen.get(name), calls.get(name, 0)) for name, module in net.named_modules() if name]


def _info(
    name: str, module: nn.Module, seen: tuple[tuple[int, ...], _Field | None, bool] | None, calls: int
) -> LayerInfo:
    shape, field, readable = seen or ((), None, False)
    axes = [] if field is None else [axis for axis in (field.y, field.x) if axis is not None]
    is_map = readable and len(shape) == 4
    return LayerInfo(
        name=name,
        type=type(module).__name__,
        shape=shape[1:],
        params=sum(p.numel() for p in module.parameters()),
        stride=max(round(axis.step) for axis in axes) if is_map and axes else None,
        receptive_field=None
        if field is None or field.whole or not axes
        else max(round(a.high - a.low) + 1 for a in axes),
        calls=calls,
        readable=readable,
    )


# -- the bookkeeping --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Axis:
    """Along one axis of the image: ``step`` pixels from cell to cell; the first cell sees pixels ``low`` to
    ``high``."""

    step: float
    low: float
    high: float

    def window(self, kernel: int, *, stride: float, padding: float, dilation: int = 1) -> _Axis:
        """After a window of ``kernel`` cells."""
        low = self.low - padding * self.step
        return _Axis(self.step * stride, low, self.high + ((kernel - 1) * dilation - padding) * self.step)

    def union(self, other: _Axis) -> _Axis:
        return _Axis(max(self.step, other.step), min(self.low, other.low), max(self.high, other.high))


@dataclass(frozen=True, eq=False)
class _Field:
    """What a tensor's values see. ``cells`` has the tensor's shape and numbers the grid cell of each value.

    ``y`` and ``x`` are None once a grid is gone; ``whole`` means that a value may depend on the whole image.
    """

    y: _Axis | None
    x: _Axis | None
    cells: Tensor
    whole: bool = False

    def varies(self, dims: Sequence[int]) -> bool:
        """True if values along any of ``dims`` belong to different cells."""
        cells = self.cells
        dims = [dim for dim in dims if cells.shape[dim] > 1 and cells.stride(dim) != 0]
        return any(bool((cells != cells.narrow(dim, 0, 1)).any()) for dim in dims)

    def is_grid(self) -> bool:
        return self.cells.ndim == 4 and not self.varies([0, 1])


def _mark(tensor: Tensor, field: _Field) -> None:
    setattr(tensor, "_netgloss_field", field)  # noqa: B010 (the attribute is ours, not the class's)


def _is_map_or_vector(tensor: Tensor, field: _Field) -> bool:
    """(B, C), or (B, C, H, W) with positions in the last two axes (not the (B, H, W, C) of some transformers)."""
    if tensor.shape[0] != 2 or not tensor.is_floating_point():
        return False
    return tensor.ndim == 2 or (tensor.ndim == 4 and not field.varies([1]))


def _merge(fields: Sequence[_Field], cells: Tensor) -> _Field:
    """What values see that depend on values of each of ``fields`` in the same cell."""

    def axis(axes: list[_Axis]) -> _Axis | None:
        result = axes[0] if axes else None
        for other in axes[1:]:
            assert result is not None
            result = result.union(other)
        return result

    y, x = ([a for a in (getattr(f, n) for f in fields) if a is not None] for n in "yx")
    return _Field(axis(y), axis(x), cells, any(f.whole for f in fields))


class _Propagation(TorchDispatchMode):
    """Carries a :class:`_Field` from the arguments to the results of every operation."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        fields = [f for a in tree_leaves((args, kwargs)) if (f := getattr(a, "_netgloss_field", None)) is not None]
        result = func(*args, **kwargs)
        if fields:
            outputs = [out for out in tree_leaves(result) if isinstance(out, Tensor)]
            for out, field in zip(outputs, _after(func, args, kwargs, fields, outputs), strict=True):
                _mark(out, field)
                if out._is_view() and func._schema.is_mutable and out._base is not None:
                    base = getattr(out._base, "_netgloss_field", field)
                    _mark(out._base, _merge([base, field], base.cells if base is not field else _no_cells(out._base)))
        return result


def _after(func: Any, args: Any, kwargs: Any, fields: list[_Field], outputs: list[Tensor]) -> list[_Field]:
    """The fields of an operation's outputs."""
    name = func._schema.name.removeprefix("aten::").removesuffix("_")
    if name in _GRID_RULES and fields[0].is_grid():
        field = _GRID_RULES[name](_arguments(func, args, kwargs), fields[0], outputs[0])
        return [replace(field, cells=_grid_cells(out), whole=any(f.whole for f in (field, *fields))) for out in outputs]
    if name == "cat" and len(fields) == len(args[0]) and all(f.is_grid() for f in fields) and (*args, 0)[1] in (1, -3):
        return [_merge(fields, _grid_cells(outputs[0]))]
    if name in _MOVES:
        return _moved(func, args, kwargs, fields, outputs)
    if torch.Tag.pointwise in func.tags or name in _POINTWISE:
        return [_pointwise(fields, outputs[0]), *(_merge(fields, _no_cells(out)) for out in outputs[1:])]
    if name in _REDUCTIONS:
        dims = _REDUCTIONS[name](_arguments(func, args, kwargs), fields[0].cells.ndim)
        mixes = fields[0].varies(dims)
        return [_reduced(fields, out, dims, mixes) for out in outputs]
    if name in ("mm", "addmm", "bmm", "baddbmm"):
        return [_product(args, outputs[0])]
    return [_gone(fields, out) for out in outputs]


def _arguments(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Arguments by name, defaults filled in."""
    names = [(a.name, a.default_value if a.has_default_value() else None) for a in func._schema.arguments]
    given = dict(zip((n for n, _ in names), args, strict=False))
    return {n: given.get(n, kwargs.get(n, default)) for n, default in names}


def _grid_cells(out: Tensor) -> Tensor:
    height, width = out.shape[2:]
    return (
        torch.arange(height * width, dtype=torch.int32, device=out.device).view(1, 1, height, width).expand(out.shape)
    )


def _no_cells(out: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.int32, device=out.device).expand(out.shape)


def _gone(fields: list[_Field], out: Tensor) -> _Field:
    """After an operation that may mix any cells: the whole image, on the same grid where the shape has not changed."""
    cells = next((f.cells for f in fields if f.cells.shape == out.shape), _no_cells(out))
    return replace(_merge(fields, cells), whole=True)


def _pointwise(fields: list[_Field], out: Tensor) -> _Field:
    whole_size = [f.cells for f in fields if f.cells.shape == out.shape]
    cells = whole_size[0] if whole_size else _no_cells(out)
    if not whole_size:
        for field in fields:
            cells = cells + field.cells
    return _merge(fields, cells)


def _reduced(fields: list[_Field], out: Tensor, dims: Sequence[int], mixes: bool) -> _Field:
    cells = fields[0].cells
    if cells.shape != out.shape:
        for dim in sorted((d % cells.ndim for d in dims), reverse=True):
            cells = cells.narrow(dim, 0, 1)
        cells = cells.reshape(out.shape) if cells.numel() == out.numel() else _no_cells(out)
    merged = _merge(fields, cells)
    if not mixes:
        return merged
    lost = out.shape != fields[0].cells.shape
    return replace(merged, whole=True, y=None if lost else merged.y, x=None if lost else merged.x)


def _product(args: Any, out: Tensor) -> _Field:
    """A matrix product: rows of the left factor keep their cells, or columns of the right one, if only one of them
    has any."""
    left, right = (getattr(a, "_netgloss_field", None) for a in args[-2:])
    fields = [f for a in args if (f := getattr(a, "_netgloss_field", None)) is not None]
    row, column = out.ndim - 2, out.ndim - 1
    mixes = (left is not None and left.varies([column])) or (right is not None and right.varies([row]))
    if left is not None:
        kept = left.cells.narrow(column, 0, 1)
    elif right is not None:
        kept = right.cells.narrow(row, 0, 1)
    else:
        return _gone(fields, out)
    merged = _merge(fields, kept.expand(out.shape))
    return replace(merged, whole=merged.whole or mixes or (left is not None and right is not None))


def _moved(func: Any, args: Any, kwargs: Any, fields: list[_Field], outputs: list[Tensor]) -> list[_Field]:
    """Operations that only move values: the same is done to the cells."""
    args, kwargs = tree_map_only(Tensor, _cells_of, (args, kwargs))
    if func._schema.name in ("aten::view", "aten::_unsafe_view"):  # cells may lie in memory otherwise than the values
        return [_merge(fields, args[0].reshape(args[1]))]
    cells = [c for c in tree_leaves(func(*args, **kwargs)) if isinstance(c, Tensor)]
    merged = _merge(fields, cells[0])
    if func._schema.name == "aten::slice" and _arguments(func, args, kwargs)["step"] != 1:
        merged = replace(merged, y=None, x=None, whole=True)  # a grid in unusual axes is thinned out
    return [replace(merged, cells=c) for c in cells]


def _cells_of(tensor: Tensor) -> Tensor:
    """What stands for ``tensor`` when values are moved; tensors of indices stay themselves."""
    if not tensor.is_floating_point():
        return tensor
    field = getattr(tensor, "_netgloss_field", None)
    return _no_cells(tensor) if field is None else field.cells


# -- what single operations do to a grid ------------------------------------------------------------------------------


def _on_axes(field: _Field, change: Callable[[_Axis, int], _Axis | None]) -> _Field:
    """``change(axis, 0 for y or 1 for x)`` on both axes; an axis that turns into None has lost its grid."""
    y, x = (None if axis is None else change(axis, i) for i, axis in enumerate((field.y, field.x)))
    gone = (y is None and field.y is not None) or (x is None and field.x is not None)
    return replace(field, y=y, x=x, whole=field.whole or gone)


def _pair(value: Sequence[int], default: Sequence[int] = (1, 1)) -> Sequence[int]:
    value = value or default
    return value if len(value) == 2 else (value[0], value[0])


def _convolution(a: dict[str, Any], field: _Field, out: Tensor) -> _Field:
    kernel, stride, padding, dilation = a["weight"].shape[2:], *(_pair(a[n]) for n in ("stride", "padding", "dilation"))

    def change(axis: _Axis, i: int) -> _Axis:
        if not a["transposed"]:
            return axis.window(kernel[i], stride=stride[i], padding=padding[i], dilation=dilation[i])
        reach = (kernel[i] - 1) * dilation[i]
        first = math.ceil((padding[i] - reach) / stride[i])
        return axis.window(math.ceil((reach + 1) / stride[i]), stride=1 / stride[i], padding=-first)

    return _on_axes(field, change)


def _pooling(a: dict[str, Any], field: _Field, out: Tensor) -> _Field:
    kernel = _pair(a["kernel_size"])
    stride, padding, dilation = _pair(a["stride"], kernel), _pair(a["padding"]), _pair(a.get("dilation") or (1, 1))
    return _on_axes(
        field, lambda axis, i: axis.window(kernel[i], stride=stride[i], padding=padding[i], dilation=dilation[i])
    )


def _adaptive_pooling(a: dict[str, Any], field: _Field, out: Tensor) -> _Field:
    def change(axis: _Axis, i: int) -> _Axis | None:
        cells, bins = field.cells.shape[2 + i], out.shape[2 + i]
        if bins == 1 and cells > 1:
            return None
        return axis.window(math.ceil(cells / bins) + (cells % bins > 0), stride=cells / bins, padding=0)

    return _on_axes(field, change)


def _resize(reach: int) -> Callable[[dict[str, Any], _Field, Tensor], _Field]:
    """Interpolation between ``2 * reach`` neighbours (1 for ``reach`` 0); a smoothed shrinking reaches further."""

    def rule(a: dict[str, Any], field: _Field, out: Tensor) -> _Field:
        def change(axis: _Axis, i: int) -> _Axis:
            ratio = field.cells.shape[2 + i] / out.shape[2 + i]
            width = math.ceil(reach * max(ratio, 1)) if "antialias" in a else reach
            return axis.window(max(2 * width, 1), stride=ratio, padding=width)

        return _on_axes(field, change)

    return rule


def _padding(a: dict[str, Any], field: _Field, out: Tensor) -> _Field:
    pad = [*(a["pad"] if "pad" in a else a["padding"]), 0, 0]
    return _on_axes(field, lambda axis, i: axis.window(1, stride=1, padding=pad[2 * (1 - i)]))


def _slice(a: dict[str, Any], field: _Field, out: Tensor) -> _Field:
    dim = a["dim"] % 4
    size = field.cells.shape[dim]
    start = a["start"] or 0
    start = min(max(start + size if start < 0 else start, 0), size)

    def change(axis: _Axis, i: int) -> _Axis:
        return axis.window(1, stride=a["step"], padding=-start) if dim == 2 + i else axis

    return _on_axes(field, change)


_GRID_RULES: dict[str, Callable[[dict[str, Any], _Field, Tensor], _Field]] = {
    "convolution": _convolution,
    "max_pool2d_with_indices": _pooling,
    "avg_pool2d": _pooling,
    "_adaptive_avg_pool2d": _adaptive_pooling,
    "adaptive_max_pool2d": _adaptive_pooling,
    "upsample_nearest2d": _resize(0),
    "_upsample_nearest_exact2d": _resize(0),
    "upsample_bilinear2d": _resize(1),
    "_upsample_bilinear2d_aa": _resize(1),
    "upsample_bicubic2d": _resize(2),
    "_upsample_bicubic2d_aa": _resize(2),
    "constant_pad_nd": _padding,
    "reflection_pad2d": _padding,
    "replication_pad2d": _padding,
    "slice": _slice,
}
_MOVES = frozenset(
    "view _unsafe_view reshape permute transpose t expand squeeze unsqueeze select slice split split_with_sizes chunk "  # noqa: SIM905
    "unbind clone alias detach index index_select constant_pad_nd cat stack repeat".split()
)
_POINTWISE = frozenset(
    "native_batch_norm _native_batch_norm_legit_no_training cudnn_batch_norm miopen_batch_norm hardswish "  # noqa: SIM905
    "hardtanh native_dropout _prelu_kernel rrelu_with_noise copy _to_copy lift_fresh masked_fill".split()
)
"""What works value by value without being tagged so by torch (batch norm does in eval mode)."""


def _some_dims(a: dict[str, Any], ndim: int) -> Sequence[int]:
    dim = a.get("dim")
    return [dim] if isinstance(dim, int) else list(dim or range(ndim))


def _last_dims(a: dict[str, Any], ndim: int) -> Sequence[int]:
    return range(ndim - len(a["normalized_shape"]), ndim)


_REDUCTIONS: dict[str, Callable[[dict[str, Any], int], Sequence[int]]] = {
    **dict.fromkeys(
        "mean sum amax amin max min var std var_mean linalg_vector_norm norm logsumexp prod argmax "  # noqa: SIM905
        "_softmax _log_softmax cumsum".split(),
        _some_dims,
    ),
    "native_layer_norm": _last_dims,
    "_fused_rms_norm": _last_dims,
    "native_group_norm": lambda a, ndim: range(1, ndim),
}

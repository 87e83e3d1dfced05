"""Layouts: how a layer's output is read as a vector (B, C) or a map (B, C, H, W), and written back.

A layer gives vectors, maps, channels-last maps (B, H, W, C), or tokens (B, N, C) whose first ones may be no patches
(class token, registers). The layout of a layer is found once, from the network and one forward pass, and kept on the
layer's module; :class:`~netgloss.classifiers.taps.Taps` and ``replaced`` convert by it, so that everything above sees
vectors and maps only. Prefix tokens stay with the image that they belong to.

Of tokens, the patches are read as a map, and methods of pooled vectors read the mean of that map (``pool`` "mean").
With ``pool`` "cls" the class token, which is the first of the prefix tokens, is read as a vector instead; the patches
and the other prefix tokens then stay with their image.

What decides, in this order: what the user said; the network's own facts (timm names its grid, its number of prefix
tokens and its output format); equal sides of the grid of a square image; what NaN in a corner of the image do to the
output, since the features of a position are NaN together (``classifiers/layers.py``). Networks that concatenate shallow
and deep features lose more positions in the deep ones, so the sides come first. Where none of these decides, the error
names the flag.

Shape letters: B images, C features, N tokens, H W grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from netgloss.errors import UserError

if TYPE_CHECKING:
    from netgloss.classifiers.loading import Classifier

Kind = Literal["vector", "nchw", "nhwc", "tokens"]
KINDS = ("auto", "nchw", "nhwc", "tokens")
POOLS = ("mean", "cls")
PREFIXES = (0, 1, 2, 5)
"""Numbers of prefix tokens that are tried: none, class, class and distillation, class and four registers."""
_CHANNELS_FIRST = (
    *(nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.GroupNorm, nn.InstanceNorm2d),
    *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Upsample),
)
_ATTRIBUTE = "_netgloss_layout"


class ValuesNeeded(Exception):
    """A layout depends on which values are NaN, and the tensor is on the meta device and has none."""


@dataclass(frozen=True)
class Layout:
    """How an output is read.

    Parameters
    ----------
    grid : (H, W) of tokens. prefix : tokens before them. pool : "cls" reads the first one as a vector.
    """

    kind: Kind
    grid: tuple[int, int] = (0, 0)
    prefix: int = 0
    pool: str = "mean"

    @property
    def is_plain(self) -> bool:
        """True if nothing is converted."""
        return self.kind in ("vector", "nchw")

    def read(self, output: Tensor) -> Tensor:
        """The output as (B, C) or (B, C, H, W)."""
        if output.ndim != {"nhwc": 4, "tokens": 3}.get(self.kind, output.ndim):
            raise UserError(
                f"a layer read as {self.kind} also gives {tuple(output.shape)}: it runs several times with outputs of "
                "different forms; choose another layer"
            )
        if self.kind == "nhwc":
            return output.movedim(-1, 1)
        if self.kind == "tokens" and self.pool == "cls":
            return output[:, 0]
        if self.kind == "tokens":
            return output[:, self.prefix :].transpose(1, 2).unflatten(2, self.grid)
        return output

    def write(self, values: Tensor, output: Tensor | None = None) -> Tensor:
        """``values`` (B, C) or (B, C, H, W) in the layer's own form.

        Parameters
        ----------
        output : the layer's output for the same images, which all tokens that ``values`` do not hold are taken from.
        """
        if self.kind == "nhwc":
            return values.movedim(1, -1)
        if self.kind == "tokens" and self.pool == "cls":
            assert output is not None
            return torch.cat([values[:, None], output[:, 1:]], dim=1)
        if self.kind == "tokens":
            tokens = values.flatten(2).transpose(1, 2)
            if self.prefix:
                assert output is not None
                tokens = torch.cat([output[:, : self.prefix], tokens], dim=1)
            return tokens
        return values


def layout_of(module: nn.Module) -> Layout:
    """The layout kept on a layer's module; outputs are taken as they come until one was found."""
    found = getattr(module, _ATTRIBUTE, None)
    return found if isinstance(found, Layout) else Layout("nchw")


def keep_layout(module: nn.Module, layout: Layout) -> None:
    """Keeps a layout on a layer's module, so that copies of the network have it too."""
    object.__setattr__(module, _ATTRIBUTE, layout)


def corner_images(classifier: Classifier) -> Tensor:
    """Two blank images (2, m, S, S'), the second with a quarter of NaN: what :func:`find_layout` decides by."""
    height, width = classifier.input_shape[1:]
    images = torch.zeros(2, *classifier.input_shape, device=classifier.device)
    images[1, :, : height // 2, : width // 2] = math.nan
    return images


def find_layout(
    output: Any,
    name: str,
    net: nn.Module,
    *,
    square: bool,
    layout: str = "auto",
    prefix_tokens: int | None = None,
    pool: str = "mean",
) -> Layout:
    """The layout of a layer's output for :func:`corner_images`.

    Parameters
    ----------
    square : True if the images are square, as the grid of features then is too.
    layout, prefix_tokens : what the user said, "auto" and None for nothing.
    pool : "mean", or "cls" to read the class token as a vector.

    Raises
    ------
    UserError : the output is not one tensor of vectors, maps or tokens, or it cannot be decided which; with "cls", it
        has no class token.
    """
    if not isinstance(output, Tensor):
        raise UserError(
            f"layer {name!r} gives a {type(output).__name__}, not one tensor; choose one inside or after it"
        )
    shape = tuple(output.shape)
    if not output.is_floating_point() or output.ndim not in (2, 3, 4):
        raise UserError(f"layer {name!r} gives {shape}, neither vectors (B, C), maps (B, C, H, W) nor tokens (B, N, C)")
    if len(output) != 2:
        raise UserError(
            f"layer {name!r} gives {shape} for 2 images: its first axis is not the images (attention windows, say); "
            "choose the block around it"
        )
    if output.ndim == 2:
        return Layout("vector")
    if output.ndim == 4:
        found = Layout(_map_kind(output, name, net, layout, square))
    else:
        found = _tokens(output, name, net, prefix_tokens)
    if pool == "cls" and not found.prefix:
        raise UserError(f"layer {name!r} gives {shape} without a class token: leave --pool cls (pool=) out")
    return replace(found, pool=pool)


def _map_kind(output: Tensor, name: str, net: nn.Module, asked: str, square: bool) -> Kind:
    if asked in ("nchw", "nhwc"):
        return asked  # type: ignore[return-value]
    a, b, c = output.shape[1:]
    sides: Kind | None = "nchw" if b == c != a else "nhwc" if a == b != c else None
    if square and a != b != c:
        raise UserError(
            f"layer {name!r} gives {tuple(output.shape)}, which is no square grid of features though the images are "
            "square (windows or patches of a block, say): choose the block around it, or say --layout nchw or nhwc"
        )
    if isinstance(dict(net.named_modules(remove_duplicate=False)).get(name), _CHANNELS_FIRST):
        return "nchw"
    if square and sides is not None:
        return sides
    lost = _lost(output)
    if lost.any() and not lost.all():
        first, last = ((lost.float() - lost.float().mean(axis, keepdim=True)).abs().mean() for axis in (0, 2))
        if first != last:
            return "nchw" if first < last else "nhwc"
    if sides is not None:
        return sides
    told = str(getattr(net, "output_fmt", "")).upper()
    if told in ("NCHW", "NHWC"):
        return "nchw" if told == "NCHW" else "nhwc"
    if getattr(net, "global_pool", None) is None and output.shape[2:] == (1, 1):
        return "nchw"
    raise UserError(
        f"layer {name!r} gives {tuple(output.shape)}, and it cannot be seen which axis holds the features: say "
        "--layout nchw or --layout nhwc (layout=)"
    )


def _tokens(output: Tensor, name: str, net: nn.Module, prefix_tokens: int | None) -> Layout:
    count, facts = output.shape[1], _facts(net)
    if output.is_meta and not _is_clear(output, facts, prefix_tokens):
        raise ValuesNeeded
    lost = None if output.is_meta else _lost(output)
    if lost is not None and lost.any() and not lost.all():
        tokens, features = ((lost.float() - lost.float().mean(axis, keepdim=True)).abs().mean() for axis in (0, 1))
        if tokens < features:
            raise UserError(f"layer {name!r} gives {tuple(output.shape)} with features before tokens; choose another")
    if prefix_tokens is None and facts is not None and facts[0] * facts[1] + facts[2] == count:
        return Layout("tokens", facts[:2], facts[2])
    if prefix_tokens is None and facts is not None and facts[0] * facts[1] == count:
        return Layout("tokens", facts[:2], 0)
    fitting = _fitting(count, prefix_tokens)
    if len(fitting) != 1:
        raise UserError(
            f"layer {name!r} gives {count} tokens, and it cannot be seen which of them are patches of a square grid: "
            "say --prefix-tokens N (prefix_tokens=)"
        )
    side = math.isqrt(count - fitting[0])
    return Layout("tokens", (side, side), fitting[0])


def _fitting(count: int, prefix_tokens: int | None) -> list[int]:
    """Numbers of prefix tokens that leave a square grid."""
    tried = PREFIXES if prefix_tokens is None else (prefix_tokens,)
    return [p for p in tried if count > p and math.isqrt(count - p) ** 2 == count - p]


def _is_clear(output: Tensor, facts: tuple[int, int, int] | None, prefix_tokens: int | None) -> bool:
    """True if values would not change how an output (B, N, C) is read: the network's facts name N and not C, or neither
    of them can be tokens.
    """
    first, last = output.shape[1:]
    known = (
        set() if facts is None or prefix_tokens is not None else {facts[0] * facts[1], facts[0] * facts[1] + facts[2]}
    )
    if known & {first, last}:
        return last not in known
    return len(_fitting(first, prefix_tokens)) != 1


def _lost(output: Tensor) -> Tensor:
    """Which values of the image with NaN in a corner are NaN."""
    if output.is_meta:
        raise ValuesNeeded
    return output[1].isnan()


def _facts(net: nn.Module) -> tuple[int, int, int] | None:
    """Grid and number of prefix tokens by a timm network's own account."""
    embed = getattr(net, "patch_embed", getattr(net, "stem", None))
    grid = getattr(embed, "grid_size", None)
    if not (isinstance(grid, (tuple, list)) and len(grid) == 2 and all(isinstance(n, int) for n in grid)):
        return None
    prefix = getattr(net, "num_prefix_tokens", 0)
    return int(grid[0]), int(grid[1]), prefix if isinstance(prefix, int) else 0

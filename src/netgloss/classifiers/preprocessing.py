"""What happens to an image before the network sees it: resize, centre crop, scale to [0, 1], normalise.

One description serves torchvision, timm and own networks, goes into run folders as JSON, travels to data-loader
workers, and computes where a pixel of the image ends up (:meth:`Preprocessing.geometry`), so that annotations can
follow the image. The work itself is done by ``torchvision.transforms.v2``.

Shape letters: C channels, H and W the network's input.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from netgloss.errors import UserError, nearest

if TYPE_CHECKING:
    from PIL.Image import Image

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")


@dataclass(frozen=True)
class Geometry:
    """Where an image's pixels lie in the network's input, in the pixel-edge convention (0 is the left edge of pixel 0).

    ``input_x = image_x * scale_x + offset_x``, and the same in y; the input is ``width`` x ``height`` pixels, and
    what falls outside of it was cropped away.
    """

    scale_x: float
    scale_y: float
    offset_x: float
    offset_y: float
    width: int
    height: int


_MOST_PIXELS = 2**24  # of a network's input: more than any network takes, and it still fits in memory
_LONGEST = 2**20  # side of an image to whose every pixel a filter has a weight of its own, up to 48 bytes each
_SUPPORT = 3  # pixels on either side that Lanczos, the widest filter, reads


@dataclass(frozen=True)
class Preprocessing:
    """From a PIL image to the network's input.

    Parameters
    ----------
    size : (H, W) of the network's input; a single number means a square.
    resize : what the image is resized to before the crop: an int for its shorter side (the aspect stays), (H, W) to
        squash it, or None to leave it.
    crop : ``"center"``; an image smaller than ``size`` is padded with black, as torchvision does.
    interpolation : one of ``nearest bilinear bicubic lanczos box hamming``.
    mean, std : one number a channel, for pixels in [0, 1].
    channels : 3 (RGB) or 1 (grey).

    Raises
    ------
    UserError
        For values that make no sense together.
    """

    size: tuple[int, int]
    resize: int | tuple[int, int] | None = None
    crop: str = "center"
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    channels: int = 3

    def __post_init__(self) -> None:
        size = (self.size, self.size) if isinstance(self.size, int) else tuple(int(side) for side in self.size)
        resize = tuple(int(side) for side in self.resize) if isinstance(self.resize, (tuple, list)) else self.resize
        object.__setattr__(self, "size", size)
        object.__setattr__(self, "resize", resize)
        for name in ("mean", "std"):
            value = getattr(self, name)
            values = (value,) if isinstance(value, (int, float)) else value
            object.__setattr__(self, name, tuple(float(v) for v in values))
        sides = (*size, *(resize if isinstance(resize, tuple) else (1 if resize is None else resize,)))
        if len(size) != 2 or min(sides) < 1 or (isinstance(resize, tuple) and len(resize) != 2):
            raise UserError(
                "preprocessing needs size=(H, W) and resize=None, side or (H, W) in positive pixels, got "
                f"size={self.size}, resize={self.resize}"
            )
        if size[0] * size[1] > _MOST_PIXELS:
            raise UserError(f"an input of {size[0]} x {size[1]} pixels is above the limit of {_MOST_PIXELS} pixels")
        if max(map(abs, self.mean), default=0) > 2 or max(self.std, default=0) > 5:
            raise UserError(
                f"mean {self.mean} and std {self.std} are of pixels up to 255, and pixels are in [0, 1] here: divide "
                "both by 255"
            )
        if self.crop != "center":
            raise UserError(f"preprocessing knows crop='center' only, got {self.crop!r}")
        if self.interpolation not in INTERPOLATIONS:
            raise UserError(f"interpolation must be one of {', '.join(INTERPOLATIONS)}, got {self.interpolation!r}")
        if self.channels not in (1, 3):
            raise UserError(
                f"networks of 1 (grey) or 3 (RGB) input channels can be fed with images, got {self.channels}"
            )
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise UserError(
                f"mean and std need one number for each of {self.channels} channels, got {self.mean} and {self.std}"
            )
        if not all(math.isfinite(value) for value in (*self.mean, *self.std)) or min(self.std) <= 0:
            raise UserError(f"mean must be finite and std positive, got {self.mean} and {self.std}")

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the network's input."""
        return (self.channels, *self.size)

    def __call__(self, image: Image | np.ndarray) -> Tensor:
        """The network's input (C, H, W), float32, of a PIL image or a uint8 array (h, w) or (h, w, c)."""
        return self.normalise(self.pixels(image))

    def pixels(self, image: Image | np.ndarray) -> Tensor:
        """(C, H, W) float32 in [0, 1]: the resized and cropped image before normalisation."""
        return self.bytes(image).float().div_(255)

    def bytes(self, image: Image | np.ndarray) -> Tensor:
        """(C, H, W) uint8: the resized and cropped image; its memory is (H, W, C), as images have it.

        An image that already has the input's size and needs no resizing is only converted.
        """
        mode = "RGB" if self.channels == 3 else "L"
        if isinstance(image, np.ndarray):
            shape = image.shape
            if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and shape[2] not in (1, 3, 4)):
                raise UserError(f"an image array must be uint8 (h, w) or (h, w, 1, 3 or 4), got {image.dtype} {shape}")
            fits = (shape[2] if image.ndim == 3 else 1) == self.channels
            if fits and self._is_identity(shape[1], shape[0]):
                return _channels_first(image)
            from PIL import Image as pil

            image = pil.fromarray(image[:, :, 0] if image.ndim == 3 and shape[2] == 1 else image)
        if image.mode != mode:
            image = image.convert(mode)
        return _channels_first(np.asarray(self._fitted(image)))

    def _fitted(self, image: Image) -> Image:
        """Resized and cropped to the input's size."""
        if self._is_identity(*image.size):
            return image
        import torchvision.transforms.v2.functional as tvf
        from torchvision.transforms import InterpolationMode

        rows, columns = self._resized(*image.size)
        if self.resize is not None and rows * columns > _MOST_PIXELS:
            image = self._cropped_while_resized(image, rows, columns)
        elif self.resize is not None:
            size = [self.resize] if isinstance(self.resize, int) else list(self.resize)
            if isinstance(self.resize, tuple) and self.interpolation != "nearest":
                image = _shortened(image, columns, rows)
            image = tvf.resize(image, size, interpolation=InterpolationMode(self.interpolation))
        return tvf.center_crop(_cropped(image, self.size), list(self.size))

    def batch(self, pixels: Tensor) -> Tensor:
        """The network's input (B, C, H, W), float32, of a batch of :meth:`bytes`, on their device and in their memory
        order: what ``__call__`` gives for each, within rounding.
        """
        scale = 1 / (255 * torch.tensor(self.std, device=pixels.device))
        shift = -torch.tensor(self.mean, device=pixels.device) / torch.tensor(self.std, device=pixels.device)
        return pixels.float().mul_(scale[:, None, None]).add_(shift[:, None, None])

    def normalise(self, pixels: Tensor) -> Tensor:
        """(pixels - mean) / std for (..., C, H, W) in [0, 1]; differentiable."""
        mean = torch.tensor(self.mean, dtype=pixels.dtype, device=pixels.device)[:, None, None]
        std = torch.tensor(self.std, dtype=pixels.dtype, device=pixels.device)[:, None, None]
        return (pixels - mean) / std

    def geometry(self, width: int, height: int) -> Geometry:
        """Where the pixels of a ``width`` x ``height`` image lie in the network's input.

        Sizes are those of torchvision's ``resize`` (the longer side rounded down) and ``center_crop`` (half offsets
        rounded to even, black borders where the image is too small).
        """
        rows, columns = self._resized(width, height)
        offset_x, offset_y = (_crop_offset(n, m) for n, m in ((columns, self.size[1]), (rows, self.size[0])))
        return Geometry(columns / width, rows / height, offset_x, offset_y, self.size[1], self.size[0])

    def with_options(self, **options: Any) -> Preprocessing:
        """A copy with some fields changed; a new ``size`` alone scales ``resize`` with it, so that the same part is
        seen.
        """
        known = {field.name for field in dataclasses.fields(self)}
        for name in options:
            if name not in known:
                hint = nearest(name, known) or sorted(known)
                raise UserError(f"preprocessing has no option {name!r}; did you mean {', '.join(hint)}?")
        if "size" in options and "resize" not in options and self.resize is not None:
            new, old = dataclasses.replace(self, size=options["size"]).size, self.size
            if isinstance(self.resize, int) and new[0] * old[1] == new[1] * old[0]:
                options["resize"] = max(1, round(self.resize * new[0] / old[0]))
            else:
                sides = (self.resize, self.resize) if isinstance(self.resize, int) else self.resize
                options["resize"] = tuple(max(1, round(s * n / o)) for s, n, o in zip(sides, new, old, strict=True))
        return dataclasses.replace(self, **options)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able description; :meth:`from_dict` reads it."""
        fields = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """The inverse of :meth:`to_dict`; fields that are absent keep their defaults, ``size`` must be there."""
        if "size" not in values:
            raise UserError(f"preprocessing needs a 'size' [H, W], got only {', '.join(values) or 'nothing'}")
        options = dict(values)
        try:
            return cls(size=options.pop("size")).with_options(**options)
        except (TypeError, ValueError, OverflowError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"the preprocessing {str(dict(values))[:120]} makes no sense: {error}") from error

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """(rows, columns) after the resize."""
        if self.resize is None:
            return height, width
        if isinstance(self.resize, tuple):
            return self.resize
        short, long = min(width, height), max(width, height)
        longer = int(self.resize * long / short)
        return (longer, self.resize) if width <= height else (self.resize, longer)

    def _cropped_while_resized(self, image: Image, rows: int, columns: int) -> Image:
        """The centre of the resized image without the rest of it, which may be too large for memory.

        Pillow computes each pixel from the same pixels of the image as in a full resize; values differ by rounding.
        """
        from PIL.Image import Resampling

        source: list[int] = []
        inner: list[float] = []
        for n, resized, m in zip(image.size, (columns, rows), self.size[::-1], strict=True):
            left, wide = _kept(resized, m)
            first, last = left * n / resized, (left + wide) * n / resized
            margin = math.ceil(_SUPPORT * max(1.0, n / resized)) + 2
            low, high = max(math.floor(first) - margin, 0), min(math.ceil(last) + margin, n)
            source += [low, high]
            inner += [first - low, last - low]
        part = image.crop((source[0], source[2], source[1], source[3]))
        size = _kept(columns, self.size[1])[1], _kept(rows, self.size[0])[1]
        box = (inner[0], inner[2], inner[1], inner[3])
        return part.resize(size, Resampling[self.interpolation.upper()], box=box)

    def _is_identity(self, width: int, height: int) -> bool:
        return (height, width) == self.size == self._resized(width, height)


def _shortened(image: Image, columns: int, rows: int) -> Image:
    """Sides of millions of pixels averaged down before they are squashed: the weights of a filter would fill memory."""
    factors = [
        min(math.ceil(n / _LONGEST), max(n // resized, 1))
        for n, resized in ((image.width, columns), (image.height, rows))
    ]
    return image if factors == [1, 1] else image.reduce((factors[0], factors[1]))


def _cropped(image: Image, size: tuple[int, int]) -> Image:
    """What ``center_crop`` keeps of an image, without the border that it adds: it adds it before it crops."""
    (left, wide), (top, high) = _kept(image.width, size[1]), _kept(image.height, size[0])
    return image.crop((left, top, left + wide, top + high))


def _kept(image: int, crop: int) -> tuple[int, int]:
    """First and number of the pixels that ``center_crop`` keeps along an axis."""
    return (0, image) if image <= crop else (-_crop_offset(image, crop), crop)


def _crop_offset(image: int, crop: int) -> int:
    """What ``center_crop`` adds to a coordinate along an axis of ``image`` pixels."""
    return (crop - image) // 2 if crop > image else -round((image - crop) / 2)


def _channels_first(array: np.ndarray) -> Tensor:
    """uint8 (H, W) or (H, W, C) -> uint8 (C, H, W), a view of a copy."""
    return torch.from_numpy(np.array(array if array.ndim == 3 else array[:, :, None])).permute(2, 0, 1)

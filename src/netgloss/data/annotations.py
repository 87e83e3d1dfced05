"""Where things are in an image (boxes, keypoints, masks), and how that follows the image to a layer's grid.

``open_annotations`` reads them lazily from a folder of masks, a list of objects with parts, or a COCO file. ``place``
moves one image's annotation into the pixels of the network's input by the same affine map that moved the image;
``to_grid`` says which share of each cell of a layer's grid a label covers, the cells being the even division of the
network's input.

Coordinates are pixels in the pixel-edge convention: the first pixel spans 0 to 1, its centre is 0.5.

Shape letters: h and w image, H and W grid, L labels.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from netgloss.data.images import missing
from netgloss.errors import UserError

if TYPE_CHECKING:
    from netgloss.data.annotation_files import Annotations

Box = tuple[str, float, float, float, float]
Keypoint = tuple[str, float, float]


class Geometry(Protocol):
    """The affine map of a preprocessing: x in the network's input = x in the image * scale_x + offset_x, y likewise;
    ``width`` and ``height`` of the input.
    """

    @property
    def scale_x(self) -> float: ...
    @property
    def scale_y(self) -> float: ...
    @property
    def offset_x(self) -> float: ...
    @property
    def offset_y(self) -> float: ...
    @property
    def width(self) -> int: ...
    @property
    def height(self) -> int: ...


@dataclass(frozen=True, eq=False)
class ImageAnnotation:
    """All that is marked in one image.

    Parameters
    ----------
    size : (w, h) of the image in pixels.
    boxes : (label, x0, y0, x1, y1) each.
    keypoints : (label, x, y) each, visible ones only.
    mask : (h, w) uint8, or None.
    mask_labels : value of the mask -> label; other values are nothing.
    annotated : labels that were looked for, so that their absence means something; None: all labels were.

    Raises
    ------
    UserError : the mask is not of the image's size.
    """

    size: tuple[int, int]
    boxes: list[Box] = field(default_factory=list)
    keypoints: list[Keypoint] = field(default_factory=list)
    mask: NDArray[np.uint8] | None = None
    mask_labels: dict[int, str] = field(default_factory=dict)
    annotated: Collection[str] | None = None

    def __post_init__(self) -> None:
        if self.mask is not None and self.mask.shape != self.size[::-1]:
            h, w = self.mask.shape
            raise UserError(f"the mask has {w} x {h} pixels, its image {self.size[0]} x {self.size[1]}")

    def covers(self, label: str) -> bool:
        """True if the absence of ``label`` from this image (or a part of it) means that it is not there."""
        return self.annotated is None or label in self.annotated


# -- following the image ----------------------------------------------------------------------------------------------


def place(annotation: ImageAnnotation, geometry: Geometry) -> ImageAnnotation:
    """The annotation in the pixels of the network's input.

    Boxes are clipped and dropped where nothing is left, keypoints outside are dropped. Each pixel of the new mask takes
    the value at the place in the image from which its centre comes; padding around the image is nothing.
    """
    width, height = geometry.width, geometry.height
    x_map, y_map = (geometry.scale_x, geometry.offset_x), (geometry.scale_y, geometry.offset_y)
    boxes: list[Box] = []
    for label, x0, y0, x1, y1 in annotation.boxes:
        left, right = (min(max(_map(x, x_map), 0.0), float(width)) for x in (x0, x1))
        top, bottom = (min(max(_map(y, y_map), 0.0), float(height)) for y in (y0, y1))
        if left < right and top < bottom:
            boxes.append((label, left, top, right, bottom))
    points = [(label, _map(x, x_map), _map(y, y_map)) for label, x, y in annotation.keypoints]
    mask = annotation.mask
    if mask is not None:
        columns, rows = _sources(width, x_map), _sources(height, y_map)
        inside = ((rows >= 0) & (rows < mask.shape[0]))[:, None] & ((columns >= 0) & (columns < mask.shape[1]))
        taken = mask[np.ix_(rows.clip(0, mask.shape[0] - 1), columns.clip(0, mask.shape[1] - 1))]
        nothing = next(value for value in range(256) if value not in annotation.mask_labels)
        mask = np.where(inside, taken, np.uint8(nothing))
    return replace(
        annotation,
        size=(width, height),
        boxes=boxes,
        keypoints=[point for point in points if 0 <= point[1] < width and 0 <= point[2] < height],
        mask=mask,
    )


def _map(value: float, scale_offset: tuple[float, float]) -> float:
    return value * scale_offset[0] + scale_offset[1]


def _sources(length: int, scale_offset: tuple[float, float]) -> NDArray[np.int64]:
    """The image's pixel under the centre of each of the input's pixels."""
    scale, offset = scale_offset
    return np.floor((np.arange(length) + 0.5 - offset) / scale).astype(np.int64)


def to_grid(annotation: ImageAnnotation, grid: tuple[int, int]) -> dict[str, NDArray[np.float32]]:
    """Share of each cell that each present label covers, (H, W) in [0, 1], exact for cells of any size.

    A label is located by the best that marks it: the mask, else the union of its boxes, else its keypoints (1 in the
    cell of each). Labels without any mark are left out: see :meth:`ImageAnnotation.covers` for what that means.

    Parameters
    ----------
    annotation : of the network's input, that is, after :func:`place`.
    grid : (H, W) of the layer.
    """
    (width, height), (rows, columns) = annotation.size, grid
    row_edges, column_edges = np.linspace(0, height, rows + 1), np.linspace(0, width, columns + 1)
    covers: dict[str, NDArray[np.float64]] = {}
    if annotation.mask is not None:
        y_share, x_share = (
            _overlap(edges, np.arange(n + 1.0)) for edges, n in ((row_edges, height), (column_edges, width))
        )
        for value in np.unique(annotation.mask):
            if label := annotation.mask_labels.get(int(value)):
                cover = y_share @ (annotation.mask == value).astype(np.float64) @ x_share.T
                covers[label] = covers.get(label, 0) + cover
    by_label: dict[str, list[tuple[float, float, float, float]]] = defaultdict(list)
    for label, *corners in annotation.boxes:
        if label not in annotation.mask_labels.values():
            by_label[label].append((corners[0], corners[1], corners[2], corners[3]))
    for label, boxes in by_label.items():
        x0, y0, x1, y1 = np.array(boxes).T.clip(0)
        ys, xs = np.unique([*y0, *y1]), np.unique([*x0, *x1])
        y_in = (y0[:, None] <= ys[:-1]) & (ys[1:] <= y1[:, None])
        x_in = (x0[:, None] <= xs[:-1]) & (xs[1:] <= x1[:, None])
        union = np.einsum("ny,nx->yx", y_in.astype(np.float64), x_in.astype(np.float64)) > 0
        covers[label] = _overlap(row_edges, ys) @ union.astype(np.float64) @ _overlap(column_edges, xs).T
    points: dict[str, NDArray[np.float64]] = {}
    for label, x, y in annotation.keypoints:
        if label not in covers and label not in annotation.mask_labels.values():
            points.setdefault(label, np.zeros(grid))[keypoint_cell(x, y, size=annotation.size, grid=grid)] = 1
    return {label: cover.clip(0, 1).astype(np.float32) for label, cover in (covers | points).items() if cover.any()}


def keypoint_cell(x: float, y: float, *, size: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
    """(row, column) of the cell of an (H, W) grid over a (w, h) input that holds the point, the nearest if outside."""
    (width, height), (rows, columns) = size, grid
    row, column = math.floor(y * rows / height), math.floor(x * columns / width)
    return min(max(row, 0), rows - 1), min(max(column, 0), columns - 1)


def _overlap(cells: NDArray[np.float64], pieces: NDArray[np.float64]) -> NDArray[np.float64]:
    """Share of each cell that lies in each piece, (cells, pieces), both given by their edges."""
    low = np.maximum(cells[:-1, None], pieces[None, :-1])
    high = np.minimum(cells[1:, None], pieces[None, 1:])
    return (high - low).clip(0) / np.diff(cells)[:, None]


def open_annotations(path: str | os.PathLike[str], ids: Sequence[str] | None = None) -> Annotations:
    """Annotations of a data set, read when an image asks for its own.

    Parameters
    ----------
    path : a folder of masks (PNG of palette indices or grey values, found by the image's name; those in folders called
        ``masks`` if there are any) with a ``classes.json`` {value: label} in it or up to two levels above; or a JSON
        file (or a folder that holds it as ``annotations.json``): COCO, or a list of
        {file, size, cls, objects: [{bbox, parts}]}.
    ids : the images' ids, relative POSIX paths. An image is found by its path without the suffix, or by the end of it
        if that is unique.

    Raises
    ------
    UserError : nothing there, not one of these forms, or none of ``ids`` has an annotation.
    """
    from netgloss.data.annotation_files import MaskFolder, open_json

    path = Path(path)
    if path.is_dir() and not (path / "annotations.json").is_file():
        annotations: Annotations = MaskFolder(path)
    elif path.exists():
        annotations = open_json(path / "annotations.json" if path.is_dir() else path)
    else:
        raise missing(path)
    if ids is not None:
        annotations.match(ids)
    return annotations

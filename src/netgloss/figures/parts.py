"""Galleries of part maps: for each filter, the images where it is strongest, darkened outside of what it sees.

Shape letters: H W pixels of an image, h w cells of a map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from netgloss.errors import UserError
from netgloss.figures.dissection import _upsample
from netgloss.figures.style import INK, brief, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = npt.NDArray[Any]

_DARK = 0.35
_CAPTION = 1.5
"""Width of a caption, in pictures."""


def part_gallery(
    rows: Sequence[Sequence[tuple[Array, Array, tuple[float, float] | None]]],
    captions: Sequence[str],
    *,
    title: str = "",
    level: float = 0.5,
) -> Figure:
    """One row a filter: the image where its upsampled map is at least ``level`` of its maximum, the rest darkened, the
    border in red; a cross at the landmark, if one is given.

    Parameters
    ----------
    rows : for each filter, (image (H, W, 3) in [0, 1], map (h, w), landmark (x, y) in pixels or None) of each picture.
    captions : one per row, of several lines.
    """
    if not rows or len(rows) != len(captions) or not all(rows):
        raise UserError(f"expected as many captions as rows of pictures, got {len(captions)} and {len(rows)}")
    columns = max(map(len, rows))
    figure = new_figure(1.15 * (columns + _CAPTION), 1.2 * len(rows) + (0.4 if title else 0.1))
    grid = figure.add_gridspec(len(rows), columns + 1, width_ratios=[_CAPTION, *[1.0] * columns])
    if title:
        figure.suptitle(brief(title, 16 * columns), color=INK, fontsize=10, parse_math=False)
    for r, (row, caption) in enumerate(zip(rows, captions, strict=True)):
        words = figure.add_subplot(grid[r, 0])
        words.set_axis_off()
        lines = "\n".join(brief(line, 30) for line in caption.split("\n"))
        words.text(1.0, 0.5, lines, fontsize=7, color=INK, ha="right", va="center", parse_math=False)
        for c, (image, part_map, landmark) in enumerate(row):
            axes = figure.add_subplot(grid[r, c + 1])
            axes.set_xticks([])
            axes.set_yticks([])
            for side in axes.spines.values():
                side.set_visible(False)
            height, width = image.shape[:2]
            seen = _upsample(part_map, height, width)
            on = seen >= level * max(float(seen.max()), 1e-12)
            axes.imshow(np.where(on[..., None], image, _DARK * image))
            if not on.all():
                axes.contour(on.astype(float), levels=[0.5], colors="red", linewidths=1.0)
            if landmark is not None:
                axes.plot([landmark[0]], [landmark[1]], "x", color="white", markersize=5, markeredgewidth=1.2)
            axes.set_xlim(0, width)
            axes.set_ylim(height, 0)
    return figure

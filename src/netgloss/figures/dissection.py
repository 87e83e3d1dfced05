"""Figures of a dissection: concept contours over images, IoU by label, scores against the on-rate and over training.

Shape letters: H W pixels of an image, h w cells of a concept map.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from netgloss.errors import UserError
from netgloss.figures.style import AGAINST, BASELINE, INK, VALUE, bare, brief, new_figure, number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = npt.NDArray[Any]
_LINES = (VALUE, AGAINST, BASELINE, "#5b5ea6", "#b0578d", INK)
_STYLES = ("-", "--", ":", "-.")


def concept_contours(
    images: Sequence[Array],
    maps: Sequence[Array],
    thresholds: Sequence[float],
    captions: Sequence[str],
    *,
    masks: Sequence[Array | None] = (),
    title: str = "",
    columns: int = 6,
) -> Figure:
    """Where each concept is on, as a contour over its image, together with the annotator's mask.

    Maps are upsampled bilinearly with free corners, then cut at the threshold, as the score does. The concept is the
    solid light line, the mask of its label the shaded area with a dashed outline.

    Parameters
    ----------
    images : (H, W, 3) in [0, 1] or uint8. maps : (h, w) each. thresholds, captions : one each.
    masks : (H', W') bool each, of the same frame; None or missing where there is none.
    """
    if not len(images) == len(maps) == len(thresholds) == len(captions) or not images:
        raise UserError(
            f"expected as many images as maps, thresholds and captions, got {len(images)}, {len(maps)}, "
            f"{len(thresholds)}, {len(captions)}"
        )
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    figure = new_figure(1.75 * columns, 2.1 * rows + (0.35 if title else 0.1))
    if title:
        figure.suptitle(brief(title, 18 * columns), color=INK, fontsize=11, parse_math=False)
    for i, (image, concept_map) in enumerate(zip(images, maps, strict=True)):
        axes = figure.add_subplot(rows, columns, i + 1)
        axes.set_axis_off()
        height, width = image.shape[:2]
        axes.imshow(image)
        mask = masks[i] if i < len(masks) else None
        if mask is not None and mask.any():
            extent = (0.0, float(width), float(height), 0.0)
            tint = np.zeros((*mask.shape, 4), np.float32)
            tint[mask] = (0.82, 0.44, 0.16, 0.35)
            axes.imshow(tint, extent=extent, interpolation="nearest")
        on = _upsample(concept_map, height, width)
        if on.min() < thresholds[i] < on.max():
            for colour, line in (("black", 2.4), ("white", 1.2)):
                axes.contour(on, levels=[thresholds[i]], colors=colour, linewidths=line)
        axes.set_xlim(0, width)
        axes.set_ylim(height, 0)
        axes.set_title(brief(captions[i], 30), fontsize=8, color=INK, parse_math=False)
    return figure


def iou_bars(
    tables: Mapping[str, Mapping[str, float]], *, groups: Mapping[str, str] | None = None, title: str = ""
) -> Figure:
    """The best IoU of each label, one bar a method, labels grouped by category.

    Parameters
    ----------
    tables : method -> {label: best IoU of its detectors}; the first method decides the order inside a group.
    groups : label -> category; default one group.
    """
    if not tables:
        raise UserError("iou_bars needs at least one method, got none")
    first = next(iter(tables.values()))
    labels = sorted(
        dict.fromkeys(label for table in tables.values() for label in table),
        key=lambda label: ((groups or {}).get(label, ""), -first.get(label, 0.0), label),
    )
    height = 0.8 / len(tables)
    figure = new_figure(6.2, (0.13 * len(tables) + 0.12) * len(labels) + 0.9)
    axes = bare(figure.add_subplot())
    for m, (method, table) in enumerate(tables.items()):
        places = np.arange(len(labels)) + (m - (len(tables) - 1) / 2) * height
        axes.barh(
            places,
            [table.get(label, 0.0) for label in labels],
            height=height,
            color=_LINES[m % len(_LINES)],
            label=method,
        )
    axes.set_yticks(range(len(labels)), labels=[brief(label, 30) for label in labels], parse_math=False)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    for i in range(1, len(labels)):
        if (groups or {}).get(labels[i]) != (groups or {}).get(labels[i - 1]):
            axes.axhline(i - 0.5, color=INK, linewidth=0.6)
    axes.set_xlabel("IoU of the label's best detector", fontsize=8, color=INK)
    axes.set_title(brief(title, 70), fontsize=9, color=INK, loc="left", parse_math=False)
    axes.legend(fontsize=8, frameon=False, labelcolor=INK, loc="lower right")
    return figure


def score_curves(
    curves: Mapping[str, Sequence[tuple[float, float, float]]],
    *,
    marks: Mapping[str, tuple[float, float, float]] | None = None,
    xlabel: str = "on-rate",
    log: bool = True,
    title: str = "",
) -> Figure:
    """S1 and S2 side by side against the on-rate (or the training step), one line a basis.

    Parameters
    ----------
    curves : name -> points (x, S1, S2). marks : name -> the point at the method's own threshold.
    """
    if not curves:
        raise UserError("score_curves needs at least one curve, got none")
    figure = new_figure(8.2, 2.9)
    for panel, score in enumerate(("S1", "S2")):
        axes = bare(figure.add_subplot(1, 2, panel + 1), left=True)
        for k, (name, points) in enumerate(curves.items()):
            ordered = sorted(points)
            colour = _LINES[k % len(_LINES)]
            axes.plot(
                [p[0] for p in ordered],
                [p[1 + panel] for p in ordered],
                _STYLES[k % len(_STYLES)],
                color=colour,
                linewidth=1.6,
                label=name,
            )
            if marks and name in marks:
                axes.plot([marks[name][0]], [marks[name][1 + panel]], "o", color=colour, markersize=7)
        if log:
            axes.set_xscale("log")
        axes.set_ylim(bottom=0)
        axes.set_xlabel(xlabel, fontsize=8, color=INK)
        axes.set_title(score, fontsize=9, color=INK, loc="left")
        axes.tick_params(which="both", colors=INK, labelsize=8)
    axes.legend(fontsize=7.5, frameon=False, labelcolor=INK)
    if title:
        figure.suptitle(brief(title, 90), color=INK, fontsize=10, parse_math=False)
    return figure


def detector_caption(label: str | None, iou: float, chance: float) -> str:
    """``wheel  IoU 0.41 (chance 0.02)``, or ``no label``."""
    return f"{label}  IoU {number(iou)} ({number(chance)})" if label else "no label"


def _upsample(grid: Array, height: int, width: int) -> Array:
    """(h, w) -> (height, width), bilinear with free corners."""
    from PIL import Image

    picture = Image.fromarray(np.asarray(grid, np.float32))
    return np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))

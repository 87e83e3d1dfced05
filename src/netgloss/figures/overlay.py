"""Concept maps over photographs: the overlay itself, a concept's gallery, one image's explanation.

Shape letters: H, W pixels of an image; h, w cells of a concept map.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from netgloss.errors import UserError
from netgloss.figures.style import AGAINST, HEAT, INK, VALUE, bare, brief, new_figure, number, printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = npt.NDArray[Any]

OUTLINES = ("#ffd92f", "#66c2ff", "#ff7f7f", "#8ee07a", "#e6a3ff", "#ffb366")
"""Colours of outlines that are drawn over one image, readable on dark ground."""


def overlay_map(
    image: Array, concept_map: Array, *, low: float | None = None, high: float | None = None, alpha: float = 0.75
) -> npt.NDArray[np.float32]:
    """A concept map as a translucent heatmap over an image.

    The map is upsampled bilinearly (cell centres, edges held). Where ``low >= 0`` the strength is
    ``v = clip((map - low) / (high - low), 0, 1)`` and the pixel ``(1 - alpha v) image + alpha v colour(v)``: nothing
    is painted where the concept is absent. Where ``low < 0`` it is ``s = clip(map / max(|low|, |high|), -1, 1)``, the
    colour ``colour((1 + s) / 2)`` and the weight ``alpha |s|``: zero is bare, negative is dark, positive is bright.

    Parameters
    ----------
    image : (H, W, 3) or (H, W), uint8 or float in [0, 1].
    concept_map : (h, w).
    low, high : the values at the ends of the scale; default the smaller of 0 and the map's minimum, and its maximum.
    alpha : weight of the colour at full strength.

    Returns
    -------
    (H, W, 3) float32 in [0, 1].
    """
    from matplotlib import colormaps

    rgb = _rgb(image)
    grid = np.asarray(concept_map, dtype=np.float32)
    if grid.ndim != 2:
        raise UserError(f"a concept map has shape (h, w), got {grid.shape}")
    low = min(0.0, float(grid.min())) if low is None else low
    high = float(grid.max()) if high is None else high
    height, width = rgb.shape[:2]
    values = _upsample(grid, height, width)
    if low < 0:
        strength = np.clip(values / max(abs(low), abs(high)), -1, 1)
        position, weight = (1 + strength) / 2, np.abs(strength)
    else:
        position = np.clip((values - low) / (high - low if high > low else 1.0), 0, 1)
        weight = position
    colour = colormaps[HEAT](position)[..., :3]
    blend = alpha * weight[..., None]
    return np.asarray((1 - blend) * rgb + blend * colour, dtype=np.float32)


def outline_map(
    image: Array, concept_map: Array, *, low: float, high: float, contour: float
) -> npt.NDArray[np.float32]:
    """An image whose surroundings of a concept are dimmed: ``(1 - 0.6 d) image``, ``d = clip((contour - map) / edge)``.

    The edge is a twelfth of the scale ``high - low``. The report's pictures are dimmed by the same rule.

    Parameters
    ----------
    image : (H, W, 3) or (H, W), uint8 or float in [0, 1]. concept_map : (h, w). contour : level of the outline.

    Returns
    -------
    (H, W, 3) float32 in [0, 1].
    """
    rgb = _rgb(image)
    values = _upsample(np.asarray(concept_map, dtype=np.float32), *rgb.shape[:2])
    dim = np.clip((contour - values) / max((high - low) / 12, 1e-12), 0, 1)
    return np.asarray((1 - 0.6 * dim[..., None]) * rgb, dtype=np.float32)


@dataclass(frozen=True)
class ExplainedImage:
    """What :func:`image_explanation` draws.

    Parameters
    ----------
    picture : (H, W, 3). maps : K times (h, w) or None. contributions, names : K each, strongest first.
    title : the prediction. probability : of it.
    logit : the network's own. rebuilt : the logit from the decoded concepts. base : what remains without any concept.
    gap : what base and all concepts leave of ``logit`` (default ``logit - rebuilt``, the same where contributions are
        exact).
    weighted : draw each map by :func:`weighted_overlay`, with the last word of its name and its contribution as a share
        of the strongest one.
    scales : K times (low, high, contour) of the concept over all images; default from 0 (or below) to each map's own
        maximum, the contour at half of it.
    """

    picture: Array
    maps: Sequence[Array | None]
    contributions: Sequence[float]
    names: Sequence[str]
    title: str
    probability: float | None = None
    logit: float | None = None
    rebuilt: float | None = None
    base: float = 0.0
    gap: float | None = None
    weighted: bool = False
    scales: Sequence[tuple[float, float, float]] | None = None

    def __post_init__(self) -> None:
        if not len(self.maps) == len(self.contributions) == len(self.names):
            raise UserError(
                "expected as many maps as contributions and names, got "
                f"{len(self.maps)}, {len(self.contributions)}, {len(self.names)}"
            )


def image_explanation(shown: ExplainedImage) -> Figure:
    """Why one image got its prediction: the image, its top concepts with maps, and what each adds to the logit.

    The axes are: the image, one for each map that is not None, and the bars. Where ``logit`` is given, the bars add up
    to it, ``logit = base + concepts + gap``: what the shown concepts leave over is drawn as "other concepts".
    """
    panels = [k for k, concept_map in enumerate(shown.maps) if concept_map is not None]
    columns = max(2, min(6, 1 + len(panels)))
    rows = math.ceil((1 + len(panels)) / columns)
    bars, gap = _bars(shown)
    figure = new_figure(1.9 * columns, 2.15 * rows + 0.24 * len(bars) + 1.1)
    sure = "" if shown.probability is None else f"  {100 * shown.probability:.0f} %"
    figure.suptitle(brief(shown.title, 22 * columns) + sure, color=INK, fontsize=11, parse_math=False)
    layout = figure.add_gridspec(rows + 1, columns, height_ratios=[2.15] * rows + [0.24 * len(bars) + 0.6])
    axes = figure.add_subplot(layout[0, 0])
    _show(axes, shown.picture, None)
    together = len(panels) > 1 and not shown.weighted
    axes.set_title("outlines: strongest regions" if together else "image", fontsize=8, color=INK)
    for place, k in enumerate(panels, start=1):
        own = figure.add_subplot(layout[place // columns, place % columns])
        _draw_map(own, shown, k)
        if together:
            colour = OUTLINES[(place - 1) % len(OUTLINES)]
            _outline(axes, shown, k, colour)
            own.title.set_backgroundcolor(colour)
    axes = bare(figure.add_subplot(layout[rows, :]))
    values = [value for _, value in bars]
    axes.barh(range(len(bars)), values, color=[VALUE if v >= 0 else AGAINST for v in values], height=0.7)
    axes.set_yticks(range(len(bars)), labels=[name for name, _ in bars], parse_math=False)
    for i, value in enumerate(values):
        axes.text(max(value, 0), i, f" {number(value, signed=True)} ", va="center", fontsize=8, color=INK)
    axes.margins(x=0.12)
    axes.invert_yaxis()
    axes.axvline(0, color=INK, linewidth=0.8)
    label = "added to the logit"
    if shown.logit is not None:
        label += f": base {number(shown.base)} + concepts + gap {number(gap)} = {number(shown.logit)}"
    if shown.rebuilt is not None:
        label += f"\nthe concepts alone rebuild a logit of {number(shown.rebuilt)}"
    axes.set_xlabel(label, fontsize=8, color=INK)
    return figure


def concept_gallery(
    pictures: Sequence[Array],
    maps: Sequence[Array | None],
    scales: Sequence[tuple[float, float, float]],
    captions: Sequence[str],
    *,
    title: str,
) -> Figure:
    """A concept's strongest images with its outline, at one level in all of them.

    Parameters
    ----------
    pictures : n times (H, W, 3). maps : n times (h, w) or None. scales : n times (low, high, contour). captions : n.
    """
    columns = min(3, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    figure = new_figure(2.1 * columns, 2.3 * rows + 0.5)
    figure.suptitle(
        "\n".join(textwrap.wrap(printable(title), 24 * columns)[:3]), color=INK, fontsize=9, parse_math=False
    )
    layout = figure.add_gridspec(rows, columns)
    for i, (picture, concept_map, (low, high, contour)) in enumerate(zip(pictures, maps, scales, strict=True)):
        axes = figure.add_subplot(layout[i // columns, i % columns])
        axes.set_title(brief(captions[i], 24), fontsize=8, color=INK, parse_math=False)
        if concept_map is None:
            _show(axes, picture, None)
            continue
        axes.set_axis_off()
        axes.imshow(outline_map(picture, concept_map, low=low, high=high, contour=contour))
        _contour(axes, picture, concept_map, contour)
    return figure


def _bars(shown: ExplainedImage) -> tuple[list[tuple[str, float]], float]:
    """Names and lengths of the bars, and the gap."""
    bars = [(brief(name, 32), float(value)) for name, value in zip(shown.names, shown.contributions, strict=True)]
    gap = shown.gap
    if gap is None:
        gap = 0.0 if shown.logit is None or shown.rebuilt is None else shown.logit - shown.rebuilt
    if shown.logit is not None:
        rest = shown.logit - shown.base - gap - sum(shown.contributions)
        bars += [("other concepts", rest)] if abs(rest) > 1e-6 * (1 + abs(shown.logit)) else []
        bars += [("base", shown.base), ("gap", gap)]
    return bars, gap


def _draw_map(axes: Axes, shown: ExplainedImage, k: int) -> None:
    concept_map = np.asarray(shown.maps[k])
    if shown.weighted:
        share = shown.contributions[k] / max(map(abs, shown.contributions))
        _show(axes, weighted_overlay(shown.picture, concept_map, abs(share)), None)
        caption = f"{shown.names[k].rsplit(' ', 1)[-1]}\nContribution: {number(share, signed=True)}"
        tone = VALUE if share > 0 else AGAINST
        axes.set_title(caption, fontsize=8, color=tone, alpha=0.4 + 0.6 * abs(share), parse_math=False)
        return
    if shown.scales is None:
        low, high = _scale([concept_map])
        contour = high / 2
    else:
        low, high, contour = shown.scales[k]
    axes.set_axis_off()
    axes.imshow(outline_map(shown.picture, concept_map, low=low, high=high, contour=contour))
    _contour(axes, shown.picture, concept_map, contour)
    caption = f"{brief(shown.names[k], 18)}  {number(shown.contributions[k], signed=True)}"
    if concept_map.max() < contour:
        caption += ", weak here"
    axes.set_title(caption, fontsize=8, color=INK, parse_math=False)


def _outline(axes: Axes, shown: ExplainedImage, k: int, colour: str) -> None:
    """The region where a concept's map passes the contour of its scale, or half of its own maximum."""
    values = _upsample(np.asarray(shown.maps[k], dtype=np.float32), *np.asarray(shown.picture).shape[:2])
    top = float(values.max())
    level = top / 2 if shown.scales is None else shown.scales[k][2]
    if not values.min() < level < top:
        return
    for tone, line in (("black", 3.0), (colour, 1.6)):
        axes.contour(values, levels=[level], colors=tone, linewidths=line)


def weighted_overlay(image: Array, concept_map: Array, strength: float) -> npt.NDArray[np.float32]:
    """A concept's heatmap as the XNN papers draw it: ``(1 - m^0.8) image + m^0.8 jet(m)``, dimmed by its contribution.

    The map is scaled to [0, 1], resized bicubically, smoothed by a Gaussian of 2 % of the longer side and scaled again.
    The brightness is ``0.3 + 0.7 strength``.

    Parameters
    ----------
    image : (H, W, 3) or (H, W), uint8 or float in [0, 1]. concept_map : (h, w).
    strength : |contribution| / strongest |contribution|, in [0, 1].

    Returns
    -------
    (H, W, 3) float32 in [0, 1].
    """
    from matplotlib import colormaps
    from PIL import Image
    from scipy.ndimage import gaussian_filter

    rgb = _rgb(image)
    height, width = rgb.shape[:2]
    small = Image.fromarray(_unit(np.asarray(concept_map, dtype=np.float32)))
    resized = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))
    heat = _unit(gaussian_filter(resized, 0.02 * max(height, width)))
    weight = heat[..., None] ** 0.8
    mixed = (1 - weight) * rgb + weight * colormaps["jet"](heat)[..., :3]
    return np.asarray(np.clip(mixed, 0, 1) * (0.3 + 0.7 * strength), dtype=np.float32)


def _unit(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Scaled to [0, 1]; zeros where all are equal."""
    low, high = float(values.min()), float(values.max())
    return np.asarray((values - low) / (high - low) if high > low else np.zeros_like(values), dtype=np.float32)


def _rgb(image: Array) -> npt.NDArray[np.float32]:
    """(H, W, 3) float32 in [0, 1] of a grey or colour image, uint8 or float."""
    array = np.asarray(image)
    if array.ndim == 2:
        array = np.repeat(array[..., None], 3, axis=2)
    if array.ndim != 3 or array.shape[2] != 3:
        raise UserError(f"an image has shape (H, W, 3) or (H, W), got {array.shape}")
    scale = np.float32(255 if array.dtype == np.uint8 else 1)
    return np.asarray(np.clip(array / scale, 0, 1), dtype=np.float32)


def _upsample(grid: Array, height: int, width: int) -> Array:
    """(h, w) float32 -> (height, width): bilinear between cell centres, edges held."""
    from PIL import Image

    return np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BILINEAR))


def _scale(maps: Sequence[Array | None]) -> tuple[float, float]:
    """One scale for several maps: from zero (or below, if signed) to the largest value."""
    present = [np.asarray(m) for m in maps if m is not None]
    if not present:
        return 0.0, 1.0
    return min(0.0, *(float(m.min()) for m in present)), max(float(m.max()) for m in present)


def _show(axes: Axes, image: Array, concept_map: Array | None) -> None:
    """Draw an image, with heatmap where there is a map."""
    axes.set_axis_off()
    axes.imshow(_rgb(image) if concept_map is None else overlay_map(image, concept_map))


def _contour(axes: Axes, image: Array, concept_map: Array, threshold: float) -> None:
    """The contour of a map over the image's axes, where the map crosses the threshold."""
    values = _upsample(np.asarray(concept_map, dtype=np.float32), *np.asarray(image).shape[:2])
    if values.min() < threshold < values.max():
        for colour, line in (("black", 2.2), ("white", 1.1)):
            axes.contour(values, levels=[threshold], colors=colour, linewidths=line)

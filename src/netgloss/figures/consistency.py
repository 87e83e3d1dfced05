"""Figures of consistency and hardening: top images, histograms, cosines, before and after, accuracy, traces.

Shape letters: H, W pixels; h, w cells of a concept map; U units.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from netgloss.errors import UserError
from netgloss.figures.overlay import _rgb, _upsample, overlay_map
from netgloss.figures.style import AGAINST, BASELINE, INK, VALUE, bare, brief, new_figure, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = npt.NDArray[Any]

COLOURS = (VALUE, AGAINST, "#4c6ea8", "#8a6d1f", "#7a4f94", "#3f7d3a", "#a8476b", "#5f6b73")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
_SMALLEST_TILE = 96


def heatmap_tile(
    image: Array, concept_map: Array | None, *, high: float, threshold: float | None = None
) -> npt.NDArray[np.uint8]:
    """An image (H, W[, 3]) with a unit's map (h, w) as a heatmap and a white line where it reaches ``threshold``.

    Images smaller than 96 pixels are enlarged by a whole factor. ``high`` is the top of the heatmap's scale; below 0
    nothing is drawn.
    """
    rgb = _rgb(image)
    factor = max(1, math.ceil(_SMALLEST_TILE / min(rgb.shape[:2])))
    rgb = rgb.repeat(factor, 0).repeat(factor, 1)
    if concept_map is None:
        return np.asarray(np.rint(rgb * 255), np.uint8)
    positive = np.maximum(np.asarray(concept_map, np.float32), 0)
    shown = overlay_map(rgb, positive, low=0.0, high=max(high, 1e-12))
    if threshold is not None:
        inside = _upsample(positive, *rgb.shape[:2]) >= max(threshold, 1e-12)
        padded = np.pad(inside, 1, mode="edge")
        core = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
        shown[inside & ~core] = 1.0
    return np.asarray(np.rint(shown * 255), np.uint8)


def consistency_histograms(
    groups: Mapping[str, Sequence[float]], *, null: Sequence[float] = (), columns: int = 1
) -> Figure:
    """Histograms of consis_cal with shared bins, one panel a group; ``null`` (random directions) as a grey outline.

    The vertical line is 0, chance. Values that are not finite are left out.
    """
    finite = {name: np.array([v for v in values if math.isfinite(v)]) for name, values in groups.items()}
    if not finite or not any(len(values) for values in finite.values()):
        raise UserError("histograms of consistency need at least one finite value")
    chance = np.array([v for v in null if math.isfinite(v)])
    everything = np.concatenate([*finite.values(), chance])
    edges = np.linspace(min(-0.1, float(everything.min())), max(0.3, float(everything.max())), 33)
    rows = math.ceil(len(finite) / columns)
    figure = new_figure(4.4 * columns, 1.5 * rows + 0.3)
    for i, (name, values) in enumerate(finite.items()):
        axes = bare(figure.add_subplot(rows, columns, i + 1), left=True)
        if len(values):
            axes.hist(values, bins=edges.tolist(), color=VALUE, weights=np.full(len(values), 1 / len(values)))
        if len(chance):
            counts, _ = np.histogram(chance, bins=edges)
            axes.stairs(counts / len(chance), edges, color=BASELINE, linewidth=1.2)
        axes.axvline(0, color=INK, linewidth=0.8)
        mean = number(float(values.mean()) if len(values) else None)
        axes.set_title(f"{brief(name, 44)}: mean {mean}", fontsize=8.5, color=INK, loc="left", parse_math=False)
        axes.set_xlabel("consis_cal" if i >= len(finite) - columns else "", fontsize=8, color=INK)
        axes.set_ylabel("share of units", fontsize=7.5, color=INK)
    return figure


def cosines_by_bin_chart(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """CS1 and CS2 by quantile bin of consistency on real images (LC), with their chance; one panel a run.

    Parameters
    ----------
    runs : what :func:`netgloss.metrics.consistency.under_attack.cosines_by_bin` gives, by name ("before", "after").
    """
    if not runs or not all(runs.values()):
        raise UserError("the chart of cosines needs at least one bin a run")
    figure = new_figure(3.9 * len(runs), 2.8)
    first: Axes | None = None
    for i, (name, bins) in enumerate(runs.items()):
        axes = bare(figure.add_subplot(1, len(runs), i + 1, sharey=first), left=True)
        first = first or axes
        lc = [b["lc"] for b in bins]
        for key, label, colour, mark in (("cs1", "CS1 (true)", VALUE, "o"), ("cs2", "CS2 (target)", AGAINST, "s")):
            values = [_or_nan(b.get(key)) for b in bins]
            axes.plot(lc, values, color=colour, marker=mark, markersize=4, linewidth=1.3, label=label)
            chance = _or_nan(bins[0].get("chance1" if key == "cs1" else "chance2"))
            if math.isfinite(chance):
                axes.axhline(chance, color=colour, linewidth=0.9, linestyle=":")
        axes.set_title(brief(name), fontsize=9, color=INK, loc="left", parse_math=False)
        axes.set_xlabel("consis on real images (bin mean)", fontsize=8, color=INK)
        axes.set_ylabel("cosine; dotted: chance" if i == 0 else "", fontsize=8, color=INK)
        if i == 0:
            axes.legend(fontsize=7.5, frameon=False)
    return figure


def before_and_after(before: Sequence[float], after: Sequence[float], *, label: str = "consis_cal") -> Figure:
    """A value of every unit after hardening over the same before; above the diagonal it rose."""
    if len(before) != len(after):
        raise UserError(f"before and after need the same units, got {len(before)} and {len(after)}")
    pairs = [(a, b) for a, b in zip(before, after, strict=True) if math.isfinite(a) and math.isfinite(b)]
    figure = new_figure(3.6, 3.4)
    axes = bare(figure.add_subplot(), left=True)
    if pairs:
        x, y = zip(*pairs, strict=True)
        axes.plot(x, y, "o", color=VALUE, markersize=4, alpha=0.6)
        ends = [min(*x, *y), max(*x, *y)]
        axes.plot(ends, ends, color=INK, linewidth=0.8)
        rose = sum(b > a for a, b in pairs)
        axes.set_title(f"{rose} of {len(pairs)} units rose", fontsize=9, color=INK, loc="left")
    axes.set_xlabel(f"{label}, before", fontsize=8, color=INK, parse_math=False)
    axes.set_ylabel(f"{label}, after", fontsize=8, color=INK, parse_math=False)
    return figure


def accuracy_by_eps(arms: Mapping[str, Mapping[float, Sequence[float]]]) -> Figure:
    """Accuracy against eps (in 1/255), one line an arm: the mean over seeds, with the range of the seeds.

    Parameters
    ----------
    arms : by name: eps -> accuracies, one per seed. "original" is drawn in the colour of baselines, dashed.
    """
    if not arms:
        raise UserError("accuracy_by_eps needs at least one arm")
    figure = new_figure(5.2, 3.0)
    axes = bare(figure.add_subplot(), left=True)
    trained = [name for name in arms if name != "original"]
    for name, points in arms.items():
        eps = sorted(points)
        means = [sum(points[e]) / len(points[e]) for e in eps]
        i = trained.index(name) if name in trained else 0
        colour = COLOURS[i % len(COLOURS)] if name in trained else BASELINE
        mark = MARKS[i % len(MARKS)] if name in trained else "."
        line = "-" if name in trained and i < len(COLOURS) else "--"
        axes.plot(eps, means, line, color=colour, marker=mark, markersize=4, linewidth=1.3, label=brief(name))
        for e in eps:
            axes.plot([e, e], [min(points[e]), max(points[e])], color=colour, linewidth=0.8)
    axes.set_ylim(0, 1)
    axes.set_xlabel("eps of PGD, in 1/255", fontsize=8, color=INK)
    axes.set_ylabel("accuracy", fontsize=8, color=INK)
    axes.legend(fontsize=7.5, frameon=False, bbox_to_anchor=(1.01, 1), loc="upper left")
    return figure


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value

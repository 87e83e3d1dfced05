"""Curves of decoded images: the trade-off over alpha, and what is lost over depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from netgloss.figures.style import BASELINE, INK, VALUE, bare, brief, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def alpha_trade_off(
    alphas: Sequence[float],
    recs: Sequence[float],
    fidelity: Sequence[float],
    *,
    num_values: int,
    ylabel: str,
    points: Mapping[str, tuple[float, float]] | None = None,
) -> Figure:
    """Reconstruction error (low: close to familiar images) against fidelity, one point an alpha.

    Parameters
    ----------
    alphas : in the sum form; ``num_values`` is their P.
    points : controls as (rec, fidelity) by name: the original, the reference, the class mean.
    """
    figure = new_figure(5, 3.4)
    axes = bare(figure.subplots(), left=True)
    axes.plot(recs, fidelity, color=VALUE, marker="o", markersize=4, linewidth=1.2)
    for alpha, x, y in zip(alphas, recs, fidelity, strict=True):
        axes.annotate(f"{alpha:g}", (x, y), textcoords="offset points", xytext=(4, 4), fontsize=7, color=INK)
    for name, (x, y) in (points or {}).items():
        axes.plot([x], [y], marker="s", markersize=4, color=BASELINE, linestyle="none")
        axes.annotate(brief(name), (x, y), textcoords="offset points", xytext=(4, -9), fontsize=7, color=BASELINE)
    axes.set_xlabel(f"reconstruction error (summed over P = {num_values:,} values)", fontsize=8, color=INK)
    axes.set_ylabel(ylabel, fontsize=8, color=INK)
    axes.set_title("alpha (sum form)", fontsize=8, color=INK)
    return figure


def depth_curve(layers: Sequence[str], values: Mapping[str, Sequence[float]], *, ylabel: str) -> Figure:
    """One line a number (rec_cladec, rec_refae, ...) over the layers from input to logits; NaN leaves a gap."""
    figure = new_figure(max(4, 0.9 * len(layers)), 3.2)
    axes = bare(figure.subplots(), left=True)
    places = np.arange(len(layers))
    colours = [VALUE, BASELINE, INK]
    for i, (name, line) in enumerate(values.items()):
        axes.plot(places, line, marker="o", markersize=4, linewidth=1.2, color=colours[i % 3], label=name)
    axes.set_xticks(places, [brief(layer, 16) for layer in layers])
    axes.set_ylabel(ylabel, fontsize=8, color=INK)
    axes.legend(fontsize=7, frameon=False, labelcolor=INK)
    return figure

"""What all figures share: colours (safe for colour-blind readers, legible on light and dark), axes, harmless text."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#1d2125"
"""Colour of text and axes; :func:`netgloss.figures.to_svg` turns it into ``currentColor``."""
VALUE = "#2a8c82"
"""What was measured; contributions that raise a logit."""
AGAINST = "#d0702a"
"""Contributions that lower a logit."""
BASELINE = "#8a8f98"
"""Baselines and everything else that is there to compare with."""
HEAT = "inferno"
"""Colour map of concept maps: it has no green, which would look like a property of the subject."""

_BREAK = re.compile("[ ]*[\t\n\r]+[ ]*")
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def printable(text: str) -> str:
    """``text`` on one line; control characters, direction overrides and lone surrogates are shown as U+FFFD."""
    return _UNPRINTABLE.sub("\ufffd", _BREAK.sub(" ", text))


def brief(text: str, limit: int = 40) -> str:
    """:func:`printable`, cut to at most ``limit`` characters with an ellipsis."""
    text = printable(text)
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"


def number(value: float | None, *, signed: bool = False) -> str:
    """Three significant digits with a true minus sign; a dash for None or NaN."""
    if value is None or not math.isfinite(value):
        return "–"
    value = float(f"{value:.3g}")
    digits = 0 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:.2e}" if digits > 5 or abs(value) >= 1e6 else f"{value:,.{min(digits, 5)}f}"
    if signed and value > 0:
        text = "+" + text
    return text.replace("-", "\u2212")


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches, outside pyplot, laid out by matplotlib's constrained layout."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def bare(axes: Axes, *, left: bool = False) -> Axes:
    """Axes with a bottom line (and a left one if asked), in :data:`INK`."""
    for side in ("top", "right", *(() if left else ("left",))):
        axes.spines[side].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(INK)
        spine.set_linewidth(0.8)
    axes.tick_params(colors=INK, labelsize=8, width=0.8, length=3)
    if not left:
        axes.tick_params(axis="y", length=0)
    return axes

"""A finding of the audit as pictures: where the region lies, and what happens when it is put into other images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from netgloss.figures.style import AGAINST, INK, brief, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = npt.NDArray[Any]
_COLUMNS = 6


@dataclass(frozen=True)
class FindingPictures:
    """What :func:`finding_figure` draws.

    Parameters
    ----------
    own : pictures (H, W, 3) of the class, in 0..1. masks : (H, W) of each, True in the region; None for a cue.
    other : pictures of other classes. changed : these with the region or cue of ``own`` put in, or ``own`` with theirs.
    said_other, said_changed : what the network answers to them.
    name : the class. taken_out : True if ``changed`` shows ``own``.
    """

    own: Sequence[Array]
    masks: Sequence[Array] | None
    other: Sequence[Array]
    changed: Sequence[Array]
    said_other: Sequence[str]
    said_changed: Sequence[str]
    name: str
    taken_out: bool = False


def finding_figure(shown: FindingPictures) -> Figure:
    """Three rows: images of the class with the region outlined, other images, and one of the two after the exchange."""
    columns = min(_COLUMNS, len(shown.own), len(shown.other))
    figure = new_figure(1.55 * columns + 0.2, 5.3)
    axes = figure.subplots(3, columns, squeeze=False)
    for column in range(columns):
        top, middle, bottom = axes[:, column]
        for axis in (top, middle, bottom):
            axis.axis("off")
        top.imshow(shown.own[column], interpolation="nearest")
        if shown.masks is not None:
            for colour, width in (("white", 3.2), (AGAINST, 1.6)):
                top.contour(shown.masks[column].astype(float), [0.5], colors=colour,
                            linewidths=width)  # fmt: skip
        middle.imshow(shown.other[column], interpolation="nearest")
        bottom.imshow(shown.changed[column], interpolation="nearest")
        middle.set_title(brief(shown.said_other[column], 18), fontsize=8, color=INK)
        turned = (shown.said_changed[column] == shown.name) != shown.taken_out
        bottom.set_title(brief(shown.said_changed[column], 18), fontsize=8, color=AGAINST if turned else INK,
                         fontweight="bold" if turned else "normal")  # fmt: skip
    axes[0, 0].set_title(brief(f"images of {shown.name}", 40), fontsize=8, color=INK, loc="left")
    return figure

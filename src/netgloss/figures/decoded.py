"""Displays of decoded images: triples, strips over alpha and layers, concepts made visible.

Pictures are drawn on the fixed range [0, 1], never stretched one by one: a stretched picture hides or fakes brightness.
What leaves the range is clipped, and its share is said.

Shape letters: H W pixels, m channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from netgloss.figures.style import INK, brief, new_figure, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Picture = NDArray[np.floating]
"""(m, H, W)."""

READING = (
    ("present", "present", "kept by the layer"),
    ("present", "lost", "discarded by the classifier at this layer, or kept in a form that this decoder cannot read"),
    ("lost", "lost", "nothing can be said: a limit of the decoder, the code's size or the data"),
    ("lost", "present", "kept preferentially by the layer; confirm with a second seed before stating it"),
)
"""How to read an attribute of the original: in the reference, in the decoded image, and what follows."""

_LABELS = {"image": "original", "reference": "reference", "decoded": "decoded", "kept": "kept by\nconcepts"}


@dataclass(frozen=True)
class Triple:
    """One image with its reference and decoded version.

    Parameters
    ----------
    image, reference, decoded : (m, H, W), raw decoder output; reference None if there is none.
    kept : X_K, decoded from what another explainer's concepts keep, or None.
    label, prediction, decoded_prediction : class names ("" where unknown).
    probability, decoded_probability : of the predictions.
    """

    image: Picture
    reference: Picture | None
    decoded: Picture
    kept: Picture | None = None
    label: str = ""
    prediction: str = ""
    probability: float = float("nan")
    decoded_prediction: str = ""
    decoded_probability: float = float("nan")

    @property
    def rec(self) -> float:
        """Squared error of the decoded image, summed."""
        return float(np.square(self.image - self.decoded).sum())

    @property
    def rec_reference(self) -> float:
        """Squared error of the reference, summed; NaN without one."""
        return float("nan") if self.reference is None else float(np.square(self.image - self.reference).sum())

    @property
    def reference_invalid(self) -> bool:
        """True if the reference is worse than the decoded image: the triple then says nothing about the classifier."""
        return self.reference is not None and self.rec_reference > self.rec


def difference_map(image: Picture, reference: Picture, decoded: Picture) -> Picture:
    """A = (X - X_E)^2 - (X - X_R)^2 summed over channels, (H, W): above 0 what only the classifier lost."""
    return (np.square(image - decoded) - np.square(image - reference)).sum(axis=0)


def clipped_share(pictures: Sequence[Picture]) -> float:
    """Share of values outside [0, 1] (by more than a rounding)."""
    if not pictures:
        return 0.0
    outside = sum(int(((p < -1e-6) | (p > 1 + 1e-6)).sum()) for p in pictures)
    return outside / sum(p.size for p in pictures)


def decoded_triples(triples: Sequence[Triple], *, title: str = "") -> Figure:
    """Images in columns: original, reference, decoded (and kept), and the signed difference map.

    Red in the map: lost by the classifier only; blue: kept better than by the reference; one scale for all, the 99 %
    quantile of the absolute differences. ``title`` should say layer, alpha with P, and seed.
    """
    rows = ["image", *(["reference"] if triples[0].reference is not None else []), "decoded"]
    rows += ["kept"] if triples[0].kept is not None else []
    with_map = triples[0].reference is not None
    width, height = len(triples), len(rows) + with_map
    figure = new_figure(0.9 + 1.45 * width, 1.45 * height + 1.3)
    grid = figure.subplots(height, width, squeeze=False)
    for column, triple in enumerate(triples):
        for row, name in enumerate(rows):
            _draw(grid[row][column], getattr(triple, name))
    if with_map:
        maps = [difference_map(t.image, _reference(t), t.decoded) for t in triples]
        limit = max(float(np.quantile(np.abs(np.stack(maps)), 0.99)), 1e-9)
        for column, value in enumerate(maps):
            _draw_map(grid[-1][column], value, limit)
        grid[-1][0].set_ylabel("lost by the\nclassifier only", fontsize=7, color=INK)
    for row, name in enumerate(rows):
        grid[row][0].set_ylabel(_LABELS[name], fontsize=8, color=INK)
    for column, triple in enumerate(triples):
        grid[0][column].set_title(brief(triple.label, 18), fontsize=7, color=INK)
        grid[-1][column].set_xlabel(_caption(triple), fontsize=6, color=INK)
    share = clipped_share([p for t in triples for p in (t.reference, t.decoded) if p is not None])
    figure.suptitle(f"{title}\n{100 * share:.1f} % of decoded values clipped to [0, 1]".strip(), fontsize=8, color=INK)
    return figure


def _caption(triple: Triple) -> str:
    lines = [
        f"C: {brief(triple.prediction, 14)} {number(triple.probability)}",
        f"decoded as: {brief(triple.decoded_prediction, 11)} {number(triple.decoded_probability)}",
        f"rec {number(triple.rec)}, ref. {number(triple.rec_reference)}",
    ]
    return "\n".join([*lines, "reference_invalid:", "no reading"] if triple.reference_invalid else lines)


def alpha_strip(
    image: Picture,
    decoded: Sequence[Picture],
    alphas: Sequence[float],
    *,
    num_values: int,
    recs: Sequence[float],
    probabilities: Sequence[float],
    title: str = "",
) -> Figure:
    """The original, then what each alpha decodes, with its error and the classifier's probability of the class."""
    figure = new_figure(1.3 * (len(decoded) + 1) + 0.3, 2.2)
    axes = figure.subplots(1, len(decoded) + 1, squeeze=False)[0]
    _draw(axes[0], image)
    axes[0].set_title("original", fontsize=7, color=INK)
    for axis, picture, alpha, rec, p in zip(axes[1:], decoded, alphas, recs, probabilities, strict=True):
        _draw(axis, picture)
        axis.set_title(f"alpha {alpha:g}", fontsize=7, color=INK)
        axis.set_xlabel(f"rec {number(rec)}\np(class) {number(p)}", fontsize=6, color=INK)
    figure.suptitle(f"{title} (alpha of the sum form, P = {num_values:,})".strip(), fontsize=8, color=INK)
    return figure


@dataclass(frozen=True)
class ConceptPictures:
    """One image with one concept taken out, and with it alone (see netgloss.explanations.decoded_concepts).

    ``notes`` are flags such as "off manifold"; ``logit_change`` is the classifier's own (its tail on the edited
    activation).
    """

    image: Picture
    decoded: Picture
    kept: Picture
    removed: Picture
    alone: Picture
    logit_change: float = float("nan")
    notes: Sequence[str] = field(default_factory=tuple)


def concept_strip(pictures: Sequence[ConceptPictures], *, visibility: str, title: str = "") -> Figure:
    """Rows of images: original, decoded, kept by the concepts, concept removed, |decoded - removed|, concept alone."""
    heads = ["original", "decoded", "kept by concepts", "concept removed", "what went", "concept alone"]
    figure = new_figure(1.35 * len(heads) + 0.3, 1.55 * len(pictures) + 0.8)
    axes = figure.subplots(len(pictures), len(heads), squeeze=False)
    gone = [np.abs(p.decoded - p.removed).sum(axis=0) for p in pictures]
    limit = max(float(max(g.max() for g in gone)), 1e-9)
    for row, (given, went) in enumerate(zip(pictures, gone, strict=True)):
        for column, name in enumerate(("image", "decoded", "kept", "removed")):
            _draw(axes[row][column], getattr(given, name))
        axes[row][4].imshow(went, cmap="viridis", vmin=0, vmax=limit, interpolation="nearest")
        _bare(axes[row][4])
        _draw(axes[row][5], given.alone)
        change = f"logit {number(given.logit_change, signed=True)}"
        axes[row][3].set_xlabel("\n".join([change, *given.notes]), fontsize=6, color=INK)
    for column, head in enumerate(heads):
        axes[0][column].set_title(head, fontsize=7, color=INK)
    figure.suptitle(f"{title}\n{visibility}".strip(), fontsize=8, color=INK)
    return figure


def _reference(triple: Triple) -> Picture:
    assert triple.reference is not None
    return triple.reference


def _draw(axes: Axes, picture: Picture) -> None:
    shown = np.clip(np.asarray(picture, dtype=float), 0, 1)
    if shown.shape[0] == 1:
        axes.imshow(shown[0], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    else:
        axes.imshow(shown.transpose(1, 2, 0), interpolation="nearest")
    _bare(axes)


def _draw_map(axes: Axes, value: Picture, limit: float) -> None:
    axes.imshow(value, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    _bare(axes)


def _bare(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)

"""Figures: colours that arithmetic gives, one axes a thing shown, texts that cannot break out."""

from __future__ import annotations

import io
import re
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.figure import Figure

from netgloss import figures
from netgloss.errors import UserError
from netgloss.figures import ExplainedImage
from netgloss.figures.style import brief, number, printable

COLOURS = colormaps["inferno"]
HOSTILE = '$\\frac{ <script>alert("1")</script> & \u202e\u0000\ud800'


def score(**changes: Any) -> dict[str, Any]:
    record = {"metric": "r2", "value": 0.8, "low": 0.7, "high": 0.9, "baselines": {"random": 0.1, "axes": None}}
    return record | {"higher_is_better": True} | changes


def drawn(figure: Figure) -> Figure:
    """Lays the figure out and renders it: broken texts raise here."""
    figure.savefig(io.BytesIO(), dpi=30)
    return figure


def test_overlay_paints_nothing_where_the_concept_is_absent() -> None:
    image = np.random.default_rng(0).random((6, 8, 3))
    assert figures.overlay_map(image, np.zeros((3, 4)), high=1.0) == pytest.approx(image)


def test_overlay_at_full_strength_is_the_blend() -> None:
    image = np.full((5, 5, 3), 51, dtype=np.uint8)  # 0.2
    out = figures.overlay_map(image, np.full((2, 2), 7.0), low=0.0, high=7.0, alpha=0.6)
    assert out == pytest.approx(np.broadcast_to(0.4 * 0.2 + 0.6 * np.array(COLOURS(1.0)[:3]), (5, 5, 3)), abs=1e-6)


def test_overlay_is_bilinear_between_cell_centres() -> None:
    out = figures.overlay_map(np.zeros((1, 4, 3)), np.array([[0.0, 1.0]]), alpha=1.0)
    expected = [v * np.array(COLOURS(v)[:3]) for v in (0.0, 0.25, 0.75, 1.0)]
    assert out[0] == pytest.approx(np.array(expected), abs=1e-6)


def test_overlay_of_signed_maps_is_symmetric_about_zero() -> None:
    image = np.full((1, 3, 3), 0.5)
    out = figures.overlay_map(image, np.array([[-2.0, 0.0, 1.0]]), alpha=1.0)
    assert out[0, 0] == pytest.approx(np.array(COLOURS(0.0)[:3]))
    assert out[0, 1] == pytest.approx(np.full(3, 0.5))
    assert out[0, 2] == pytest.approx(0.5 * 0.5 + 0.5 * np.array(COLOURS(0.75)[:3]), abs=1e-6)


def test_heat_has_no_green() -> None:
    red, green, blue = COLOURS(range(256))[:, :3].T
    assert (green <= np.maximum(red, blue) + 0.02).all()


def test_outline_dims_the_surroundings_alone() -> None:
    grid = np.array([[0.0, 1.0, 0.0], [1.0, 4.0, 1.0], [0.0, 1.0, 0.0]])
    image = np.full((3, 3, 3), 0.5)
    shown = figures.outline_map(image, grid, low=0.0, high=4.0, contour=2.0)
    assert shown[1, 1] == pytest.approx(0.5)
    assert shown[0, 0] == pytest.approx(0.4 * 0.5)
    edge = figures.outline_map(image, np.full((1, 1), 2.0 - 4 / 24), low=0.0, high=4.0, contour=2.0)
    assert edge == pytest.approx(np.full((3, 3, 3), 0.7 * 0.5))


def test_a_map_on_the_scale_of_its_concept_may_be_weak() -> None:
    given = (np.zeros((9, 9, 3)), [np.eye(3)], [3.0], ["a"], "tench")
    own = drawn(figures.image_explanation(ExplainedImage(*given)))
    common = drawn(figures.image_explanation(ExplainedImage(*given, scales=[(0.0, 8.0, 4.0)])))
    assert "weak here" not in own.axes[1].get_title()
    assert own.axes[1].collections
    assert common.axes[1].get_title().endswith("weak here")
    assert not common.axes[1].collections


@pytest.mark.parametrize(("image", "grid"), [((4, 4, 3), (2,)), ((4, 4, 4), (2, 2))])
def test_overlay_names_wrong_shapes(image: tuple[int, ...], grid: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="shape"):
        figures.overlay_map(np.zeros(image), np.zeros(grid))


@pytest.mark.parametrize("with_maps", [True, False])
def test_image_explanation_bars_add_up_to_the_logit(with_maps: bool) -> None:
    contributions, names = [3.0, -1.0, 0.5], ["a", HOSTILE, "c"]
    maps = [np.eye(3) if with_maps else None for _ in names]
    figure = figures.image_explanation(
        ExplainedImage(np.zeros((9, 9, 3)), maps, contributions, names, HOSTILE, logit=8.0, base=1.25, gap=-0.25)
    )
    assert len(drawn(figure).axes) == (5 if with_maps else 2)
    assert figure.axes[-1].get_xlabel().endswith("base 1.25 + concepts + gap \u22120.250 = 8.00")
    widths = [bar.get_width() for bar in figure.axes[-1].patches]
    assert widths[:3] == contributions
    assert sum(widths) == pytest.approx(8.0)
    assert widths[3] == pytest.approx(4.5)  # 8 - (3 - 1 + 0.5) - 1.25 + 0.25: the other concepts


def test_image_explanation_takes_the_gap_from_the_rebuilt_logit() -> None:
    figure = figures.image_explanation(
        ExplainedImage(np.zeros((9, 9, 3)), [None], [3.0], ["a"], "tench", 0.934, logit=8.0, rebuilt=7.5, base=1.0)
    )
    assert [bar.get_width() for bar in figure.axes[-1].patches] == [3.0, 3.5, 1.0, 0.5]  # a, the others, base, gap
    assert figure.get_suptitle() == "tench  93 %"


def test_score_chart_has_a_panel_a_score_and_a_row_a_baseline() -> None:
    scores = [
        score(),
        score(metric=HOSTILE, baselines={HOSTILE: 0.2, "b": 0.3}),
        score(value=None, low=None, high=None),
    ]
    figure = drawn(figures.score_chart([*scores, score(baselines={})]))
    assert len(figure.axes) == 4
    assert [len(axes.get_yticks()) for axes in figure.axes] == [2, 3, 2, 1]
    with pytest.raises(UserError, match="none"):
        figures.score_chart([])


def test_history_has_a_panel_a_term_and_a_line_a_seed() -> None:
    history = [{"seed": s, "step": t, "loss": 10.0**-t, HOSTILE: 1.0} for s in (3, 5) for t in range(4)]
    figure = drawn(figures.history_curves(history))
    assert [len(axes.lines) for axes in figure.axes] == [2, 2]
    assert [axes.get_yscale() for axes in figure.axes] == ["log", "linear"]
    with pytest.raises(UserError, match="term"):
        figures.history_curves([{"seed": 0, "step": 1}])


def test_svg_is_inline_strict_and_self_contained() -> None:
    chart = figures.score_chart([score(metric=HOSTILE)])
    texts = [figures.to_svg(chart, prefix=prefix, description=HOSTILE) for prefix in ("a-", "b-")]
    ids: list[str] = []
    for text in texts:
        root = ElementTree.fromstring(text)
        own = [e.attrib["id"] for e in root.iter() if "id" in e.attrib]
        assert not any("style" in e.attrib or e.tag in ("style", "metadata", "script") for e in root.iter())
        assert set(re.findall(r'(?:href="|url\()#([^")]+)', text)) == set(own)
        assert HOSTILE[:20] in "".join(root.itertext())
        assert "http" not in text
        text.encode("utf-8")
        ids += own
    assert ids
    assert len(ids) == len(set(ids))


def test_texts_and_numbers() -> None:
    assert printable("a\x00b\u202ec\ud800d\u2028") == "a\ufffdb\ufffdc\ufffdd\ufffd"
    assert printable("a \n  b\tc") == "a b c"
    assert brief("x" * 50, 10) == "x" * 9 + "…"
    shown = [number(v) for v in (0.81234, 0.9996, 12.345, 1234.5, 0.0, -0.5, None, float("nan"), 1e-7)]
    assert shown == ["0.812", "1.00", "12.3", "1,230", "0", "\u22120.500", "–", "–", "1.00e\u221207"]
    assert number(2.0, signed=True) == "+2.00"

"""A figure as inline SVG for a strict web page: no style attributes, no metadata, its own ids, the page's ink."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from netgloss.figures.style import INK, printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_REFERENCE = re.compile(r"#([A-Za-z][\w.-]*)")


def to_svg(figure: Figure, *, prefix: str, description: str) -> str:
    """An ``<svg>`` element for HTML.

    Styles become presentation attributes (a Content-Security-Policy may then forbid inline styles), ids are dropped
    where nothing refers to them and prefixed elsewhere (several figures fit into one page), text stays text, and text
    and axes take the surrounding colour.

    Parameters
    ----------
    prefix : distinguishes this figure's ids from those of others in the page.
    description : what the figure shows, for readers who cannot see it.
    """
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix}):
        figure.savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if _local(child.tag) in ("metadata", "style"):
                parent.remove(child)
    elements = list(root.iter())
    referenced = {name for e in elements for value in e.attrib.values() for name in _REFERENCE.findall(value)}
    for element in elements:
        element.tag = _local(element.tag)
        attributes = {_local(name): value for name, value in element.attrib.items()}
        attributes |= _presentation(attributes.pop("style", ""))
        if attributes.get("id") not in referenced:
            attributes.pop("id", None)
        for name in ("id", "href", "clip-path"):
            if name in attributes:
                attributes[name] = _prefixed(attributes[name], prefix) if name != "id" else prefix + attributes["id"]
        element.attrib.clear()
        element.attrib.update(attributes)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.attrib.update({"role": "img", "aria-label": printable(description), "class": "chart"})
    return ElementTree.tostring(root, encoding="unicode").replace(INK, "currentColor")


def _local(name: str) -> str:
    return name.rsplit("}", 1)[-1]


def _prefixed(value: str, prefix: str) -> str:
    return value.replace("#", f"#{prefix}", 1)


def _presentation(style: str) -> dict[str, str]:
    """``"fill: none; font: 700 8px 'X'"`` -> presentation attributes (the font's family is left to the page)."""
    attributes = {}
    for part in style.split(";"):
        name, _, value = (piece.strip() for piece in part.partition(":"))
        if name == "font":
            size = re.search(r"[\d.]+px", value)
            attributes["font-size"] = size.group() if size else "10px"
        elif name and name not in ("font-family",):
            attributes[name] = value
    return attributes

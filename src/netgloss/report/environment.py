"""The Jinja environment of all reports, their style sheets and scripts, and the hashes that allow them on a page."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import re
from functools import cache
from typing import Any

import jinja2
from markupsafe import Markup, escape

from netgloss.figures.style import number
from netgloss.runs import verdicts


@cache
def environment() -> jinja2.Environment:
    """The environment: everything is escaped, and a name that is not defined is an error."""
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("netgloss.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters.update(
        number=number,
        pretty=verdicts.pretty,
        percent=verdicts.percent,
        share_text=verdicts.share_text,
        plainly=verdicts.plainly,
        model_name=verdicts.model_name,
        marked=_marked,
    )
    return templates


def render(template: str, *, styles: tuple[str, ...], script: str = "", **values: Any) -> str:
    """A page with its style sheets and script inside, and their hashes for its Content-Security-Policy."""
    style = "".join(template_text(name) for name in styles)
    return (
        environment()
        .get_template(template)
        .render(style=style, style_hash=_hash(style), script=script, script_hash=_hash(script), **values)
    )


def template_text(name: str) -> str:
    """The text of a file below ``templates``."""
    return importlib.resources.files("netgloss.report").joinpath("templates", name).read_text(encoding="utf-8")


def script_text(*, served: bool) -> str:
    """The page's script: the files of ``templates/script`` in the order of their names, in one closed scope."""
    folder = importlib.resources.files("netgloss.report").joinpath("templates", "script")
    names = sorted(file.name for file in folder.iterdir() if file.name.endswith(".js"))
    parts = [template_text(f"script/{name}") for name in names if served or "served" not in name]
    return "\n".join(['"use strict";', "(() => {", *parts, "})();\n"])


def _marked(text: str) -> Markup:
    """A docstring's paragraph, escaped, with ``code`` set as code."""
    return Markup(re.sub(r"``(.+?)``", r"<code>\1</code>", str(escape(text))))


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")

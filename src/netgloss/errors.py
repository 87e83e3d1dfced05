"""The one kind of error that the user can fix.

Everything a user can get wrong (a layer's name, a file, a flag) raises :class:`UserError` with one line that restates
what was passed and what would have been right. The command line prints that line and exits with 2; any other
exception is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what the user passed, or a state of their files, stated in one line."""


def one_line(text: object) -> str:
    """``text`` on one line that a terminal shows as it is: control characters and line breaks are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in str(text))


def unknown(what: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is none of ``known``: the nearest ones, and all."""
    known = list(known)
    close = nearest(name, known)
    if close:
        return UserError(f"unknown {what} {name!r}; did you mean {', '.join(close)}? (all: {', '.join(known)})")
    return UserError(f"unknown {what} {name!r}; choose {', '.join(known)}")


def nearest(name: str, known: Iterable[str], *, limit: int = 5) -> list[str]:
    """The known names closest to ``name``, best first (for "did you mean")."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=limit, cutoff=0.4)
    inside = [other for other in known if name and (name in other or other in name) and other not in close]
    return (close + inside)[:limit]

"""Code that a folder names: run only if the user asked for it.

Runs and stores remember by which name their network and their method were loaded. A name such as
``path/to/file.py:factory`` is a program: whoever wrote the folder chose it. It is run if the user named the file in
this process, or allowed it (``netgloss --trust-code ...``, ``netgloss.trust_code()``), and refused otherwise.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from netgloss.errors import UserError

_named: set[Path] = set()
_all = False


def trust_code(allowed: bool = True) -> None:
    """Lets runs and stores name Python files to be run, from here on; only for folders whose author you trust."""
    global _all
    _all = allowed


@contextmanager
def trusting(allowed: bool) -> Iterator[None]:
    """Inside the block named Python files may run if ``allowed``; afterwards only what might before."""
    global _all
    before = _all
    _all = _all or allowed
    try:
        yield
    finally:
        _all = before


def note_code(file: str | Path) -> None:
    """The user himself named this file."""
    _named.add(Path(file).resolve())


def code_file(name: str) -> tuple[str, str]:
    """The file of ``path/to/file.py[:attribute]``, and the attribute ("" if none); colons in the path do not matter."""
    file, mark, attribute = name.rpartition(".py:")
    return (f"{file}.py", attribute) if mark else (name, "")


@contextmanager
def importing_beside(file: Path) -> Iterator[None]:
    """Inside the block the file's own folder is searched for imports first, as if Python had been started there.

    Modules found there are forgotten at the end, so that another file may have a sibling of the same name; the folder
    stays the last one that is searched, for imports that happen later.
    """
    folder, before = str(file.resolve().parent), set(sys.modules)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
        if folder not in sys.path:
            sys.path.append(folder)
        for name in set(sys.modules) - before:
            origin = getattr(sys.modules[name], "__file__", None)
            if origin and not name.startswith("netgloss") and Path(origin).resolve().is_relative_to(folder):
                del sys.modules[name]


def check_code(name: str, where: str) -> None:
    """Refuses ``file.py[:attribute]`` in ``where`` unless the user named or allowed it; other names pass.

    Raises
    ------
    UserError : names the file, and what allows it.
    """
    file, _ = code_file(name)
    if ".py" in name and not _all and Path(file).resolve() not in _named:
        raise UserError(
            f"{where} asks to run the Python file {file!r}: say --trust-code (in Python: netgloss.trust_code()) if you "
            "trust its author"
        )

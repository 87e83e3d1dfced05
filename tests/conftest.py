"""Fixtures shared by the tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with the real networks and images; skips where it is absent."""
    folder = Path(os.environ.get("NETGLOSS_DATA", "../shared"))
    folder = folder if folder.is_absolute() else (ROOT / folder).resolve()
    if not (folder / "weights").is_dir():
        pytest.skip(f"needs the real networks and images: no {folder}/weights (set NETGLOSS_DATA)")
    return folder


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-hostile", action="store_true", help="every hostile input, not only a share of them")

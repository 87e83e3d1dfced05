"""Fixtures shared by the tests."""

from __future__ import annotations

import contextlib
import io
import os
import resource
from collections.abc import Iterator
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


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An intact store, run and image, to be copied and damaged."""
    import netgloss
    from netgloss.cli import main

    folder = tmp_path_factory.mktemp("good")
    (folder / "images").mkdir()
    netgloss.open_images("critters:1").image(0).save(folder / "images" / "0.png")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        main(["capture", "--model", "critters", "--layer", "block5", "--images", "critters:40", "--out",
              str(folder / "store")])  # fmt: skip
        main(["fit", "nmf", "--store", str(folder / "store"), "--out", str(folder / "run"), "--num-concepts", "3",
              "--seeds", "1"])  # fmt: skip
        main(["evaluate", str(folder / "run"), "--untrained-images", "0"])
    run = netgloss.load(folder / "run")
    run.update(store="store")  # the copy beside the run's copy
    return folder


@pytest.fixture
def little_memory() -> Iterator[None]:
    """What a file only claims must not be allocated: at most 6 GB more of address space."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (6 << 30), old[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, old)

"""Every hostile input ends with exit code 2 and one line; nothing it holds is run, nothing is written elsewhere."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hostile import CASES

import netgloss
from netgloss.cli import main

BOUNDED = 4  # every fourth case in `make test`; all by `make hostile`


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An intact store, run and image."""
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


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """What a file only claims must not be allocated: at most 6 GB more of address space."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (6 << 30), old[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, old)


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below a folder with its size and time of change."""
    found = {}
    for path, _, names in os.walk(folder):
        for name in names:
            status = os.lstat(os.path.join(path, name))
            found[os.path.join(path, name)] = (status.st_size, status.st_mtime_ns)
    return found


def refuse(arguments: list[str], folder: Path) -> str:
    """Runs a command in ``folder`` that must be refused; what it said on standard error."""
    error, here = io.StringIO(), Path.cwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(error):
            main(arguments)
    except SystemExit as stop:
        assert stop.code == 2, f"exit code {stop.code}: {error.getvalue()}"
        return error.getvalue()
    finally:
        os.chdir(here)
    raise AssertionError(f"accepted: {arguments}")


def check(name: str, folder: Path, good: Path) -> None:
    make = dict(CASES)[name]
    work = folder / "work"
    work.mkdir()
    arguments = make(work, good)
    before = tree(folder)
    said = refuse(arguments, work)
    told = [line for line in said.splitlines() if line.startswith("netgloss: ")]
    by_flags = "required options" in said or "Parsing error" in said or "Unrecognized" in said or "invalid" in said
    assert len(told) == 1 or by_flags, said
    assert "Traceback" not in said
    assert not told or len(told[0]) < 12_000
    assert all(c.isprintable() for line in told for c in line)
    assert not (work / "ran").exists(), "code was run"
    touched = {path for path, status in tree(folder).items() if before.get(path) != status}
    allowed = (str(work / "out"), str(work / "run"), str(work / "store"))
    assert all(path.startswith(allowed) for path in touched), touched
    assert set(before) <= set(tree(folder)) | {p for p in before if p.startswith(allowed)}


def test_there_are_at_least_two_hundred_cases_and_each_has_its_name() -> None:
    names = [name for name, _ in CASES]
    assert len(names) >= 200
    assert len(set(names)) == len(names)


def _label(case: tuple[str, object]) -> str:
    return "".join(c if c.isalnum() else "-" for c in ascii(case[0]))[:60]


@pytest.mark.parametrize("case", CASES, ids=[f"{i:03d}-{_label(c)}" for i, c in enumerate(CASES)])
def test_refused(case: tuple[str, object], tmp_path: Path, good: Path, request: pytest.FixtureRequest) -> None:
    number = [name for name, _ in CASES].index(case[0])
    if number % BOUNDED and not request.config.getoption("--all-hostile"):
        pytest.skip("all of them by: make hostile")
    check(case[0], tmp_path, good)
    shutil.rmtree(tmp_path, ignore_errors=True)

"""Every hostile input ends with exit code 2 and one line; nothing it holds is run, nothing is written elsewhere."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from pathlib import Path

import pytest

from hostile import CASES, edit, planted, put
from netgloss.cli import main
from netgloss.errors import UserError

pytestmark = pytest.mark.usefixtures("little_memory")
BOUNDED = 4  # every fourth case in `make test`; all by `make hostile`


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
    error = io.StringIO()
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(error),
        pytest.raises(SystemExit) as stop,
    ):
        main(arguments)
    assert stop.value.code == 2, f"exit code {stop.value.code}: {error.getvalue()}"
    return error.getvalue()


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


def test_code_that_a_folder_names_runs_only_if_it_was_named_or_allowed(tmp_path: Path, good: Path) -> None:
    """A network of one's own: refused in another process's run, fine once the user says so."""
    from netgloss import trust
    from netgloss.classifiers import load_classifier, load_from_spec

    (tmp_path / "own.py").write_text("from netgloss.data.critters_net import load_critters_net as make\n")
    spec = load_classifier(f"{tmp_path / 'own.py'}:make").spec()
    assert load_from_spec(spec).weights_hash == spec["weights_hash"]  # this process's user named the file
    trust._named.clear()
    with pytest.raises(UserError, match=r"asks to run the Python file .*own\.py.*--trust-code"):
        load_from_spec(spec)
    trust.trust_code()
    try:
        assert load_from_spec(spec).weights_hash == spec["weights_hash"]
    finally:
        trust.trust_code(False)


def test_trust_ends_with_the_command(tmp_path: Path, good: Path) -> None:
    """``--trust-code`` holds for one command: a later one in the same process is asked again."""
    from netgloss import trust
    from netgloss.cli import main

    with pytest.raises(SystemExit):
        main(["show", str(good / "absent"), str(good / "images"), "--out", str(tmp_path / "shown"), "--trust-code"])
    (tmp_path / "own.py").write_text("")
    with pytest.raises(UserError, match="--trust-code"):
        trust.check_code(f"{tmp_path / 'own.py'}:make", "a run")


def test_the_method_that_a_run_claims_is_never_run(tmp_path: Path, good: Path) -> None:
    """What counts is the explainer's own header, which is checked; run.json may say what it likes."""
    for part in ("store", "run"):
        shutil.copytree(good / part, tmp_path / part)
    edit("run/run.json", put("method", planted(tmp_path)))(tmp_path)
    with contextlib.chdir(tmp_path), contextlib.suppress(SystemExit):
        main(["evaluate", "run", "--annotations", "critters:12,seed=3"])
    assert not (tmp_path / "ran").exists()

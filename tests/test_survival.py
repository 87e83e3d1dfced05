"""A few kills of every command; `make survival` does fifty of each way (see survival.py)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("survival.py")


def test_killed_commands_end_with_the_undisturbed_result() -> None:
    """In a process of its own, which forks: threads of this one would not survive a fork."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--kills", "3", "--by", "both", "--seed", "7", "--only", "capture", "fit",
         "evaluate", "report"],
        capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6/6 kills survived" in done.stdout


def test_the_harness_sees_damage(tmp_path: Path) -> None:
    """What it compares can differ: contents, files left behind, files missing; times may differ."""
    from survival import differences

    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        (folder / "run").mkdir(parents=True)
        (folder / "run" / "run.json").write_text(f'{{"status": "x", "created": "{folder.name}", "times": {{"a": 1}}}}')
        (folder / "run" / "scores.json").write_text("[]")
    assert differences(one, two) == []
    (one / "run" / "scores.json").write_text("[1]")
    (one / "run" / ".scores.json.part5").write_text("")
    (two / "run" / "history.jsonl").write_text("")
    assert differences(one, two) == [
        "left behind: run/.scores.json.part5",
        "missing: run/history.jsonl",
        "differs: run/scores.json",
    ]
    (one / "run" / "run.json").write_text('{"status": "y", "created": "z", "times": {}}')
    assert "differs: run/run.json" in differences(one, two)

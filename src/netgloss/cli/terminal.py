"""What the command line shows: progress bars on stderr, tables and notes on stdout."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from netgloss.errors import one_line

if TYPE_CHECKING:
    from netgloss.training.execution import Execution


def command_line() -> str:
    """The command as the user typed it, quoted for a shell."""
    return shlex.join(["netgloss", *sys.argv[1:]])


def is_main_process() -> bool:
    """False in the processes that Fabric, torchrun or Slurm started in addition to the first one.

    Slurm numbers the tasks of every job step, also those that run netgloss each for itself: its number counts only
    where the command asks for several processes.
    """
    names = ["LOCAL_RANK", "NODE_RANK", "GROUP_RANK"]
    if any(argument.partition("=")[0] in ("--devices", "--nodes") for argument in sys.argv[1:]):
        names.append("SLURM_PROCID")
    return all(os.environ.get(name, "0") == "0" for name in names)


def console() -> Any:
    """Rich's console for plain text: no markup, no wrapping inside a line."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True, markup=False, emoji=False)


def print_problems(problems: dict[str, str], limit: int = 5) -> None:
    """Print which images could not be read, at most ``limit`` of them."""
    if problems:
        out = console()
        out.print(f"{len(problems)} image(s) could not be read and were skipped:", style="yellow")
        for reason in list(problems.values())[:limit]:
            out.print(f"  {one_line(reason)}")


def print_scores(run: Any) -> None:
    """Print a run's scores as a table."""
    from rich.table import Table

    table = Table("metric", "value", "95 % interval", "baselines", box=None)
    for s in run.scores:
        between = "" if s.low is None or s.high is None else f"{s.low:.3f} .. {s.high:.3f}"
        arrow = {True: " (higher is better)", False: " (lower is better)", None: ""}[s.higher_is_better]
        baselines = ", ".join(
            f"{name.replace('_', ' ')} {value:.3f}" for name, value in s.baselines.items() if value is not None
        )
        value = "-" if s.value is None else f"{s.value:.3f}"
        table.add_row(*map(one_line, (s.metric + arrow, value, between, baselines)))
    out = console()
    out.print(table)
    for warning in run.manifest.get("warnings", []):
        out.print(f"note: {one_line(warning)}", style="yellow")


def print_answer(run: Any, *, scores: bool = False) -> None:
    """Print what a run found, in words and at most twelve lines; with ``scores`` the table of all scores before it."""
    from netgloss.runs.doubts import answer_lines
    from netgloss.runs.files import read_run

    if scores:
        print_scores(run)
    out = console()
    for line in answer_lines(read_run(run.path)):
        out.print(one_line(line))
    report = run.path / "report.html"
    where = f"report: {report}" if report.exists() else f"no report yet: netgloss report {run.path}"
    out.print(where if scores else f"{where} (--scores prints all scores)")


class Lines:
    """Progress where there is no terminal: a plain line on stderr when a task begins, ends, and every ten seconds."""

    def __init__(self, every: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._every, self._now = every, clock
        self._name = self._unit = ""
        self._total = self._done = self._before = 0
        self._began = self._said = 0.0

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *details: Any) -> None:
        return None

    def start(self, task: str, total: int, *, unit: str, done: int = 0) -> None:
        self._name, self._unit, self._total, self._done, self._before = task, unit, total, done, done
        self._began = self._said = self._now()
        self.say(f"{task}: {total:,} {unit}" + (f", {done:,} done before" if done else ""))

    def advance(self, amount: int = 1, *, note: str = "") -> None:
        self._done += amount
        now = self._now()
        if now - self._said < self._every or self._done >= self._total:
            return
        self._said = now
        rate = (self._done - self._before) / max(now - self._began, 1e-9)
        left = (self._total - self._done) / max(rate, 1e-9)
        self.say(
            f"{self._name}: {self._done:,} of {self._total:,} {self._unit}, {rate:,.1f}/s, "
            f"about {_duration(left)} left" + (f", {note}" if note else "")
        )

    def finish(self) -> None:
        self.say(f"{self._name}: done in {_duration(self._now() - self._began)}")

    def say(self, message: str) -> None:
        print(message, file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    """``45 s``, ``3 min``, ``2.5 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


class Bars:
    """Progress bars on stderr: images/s (or steps/s), time left, and a note."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=Console(stderr=True),
        )
        self._task: Any = None
        self._unit = ""
        self._began = 0.0
        self._count = 0

    def __enter__(self) -> Bars:
        self._progress.__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        self._progress.__exit__(*details)

    def start(self, task: str, total: int, *, unit: str, done: int = 0) -> None:
        self._task = self._progress.add_task(task, total=total, completed=done, rate="", note="")
        self._unit, self._began, self._count = unit, time.monotonic(), 0

    def advance(self, amount: int = 1, *, note: str = "") -> None:
        self._count += amount
        rate = self._count / max(time.monotonic() - self._began, 1e-9)
        self._progress.update(self._task, advance=amount, rate=f"{rate:,.1f} {self._unit}/s", note=note)

    def finish(self) -> None:
        self._task = None

    def say(self, message: str) -> None:
        self._progress.console.print(message, markup=False, highlight=False, soft_wrap=True)  # names stay whole


@contextmanager
def execution(
    device: str = "auto", *, devices: int = 1, nodes: int = 1, precision: str = "32-true"
) -> Iterator[Execution]:
    """An execution that shows progress (bars, or lines without a terminal) in the main process and records the command
    line.
    """
    from netgloss.progress import Silent
    from netgloss.training.execution import Execution

    shown: Any = nullcontext(Silent())
    if is_main_process():
        shown = Bars() if sys.stderr.isatty() else Lines()
    with shown as bars:
        yield Execution(device, devices, nodes, precision, bars, command_line())

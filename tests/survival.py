"""Kills commands with SIGKILL at random moments, runs them again and compares with the undisturbed result.

    python tests/survival.py [--kills 50] [--by time|writes|both] [--only capture fit ...] [--seed 0] [--keep DIR]

Every trial starts from the folder as the command found it, starts the command, kills it, starts the same command again
and lets it end. Then every file must be there and equal byte by byte, and no other; only the times a run took may
differ (``created`` and ``times`` of run.json, where the report shows them too).

``time``: the moment is uniform over the undisturbed run's duration. ``writes``: the process kills itself just before
the k-th operation that changes the file system (open for writing, rename, remove, make a folder), k uniform: this aims
at half-written states, which take a small share of the time. Half of the trials are killed a second time while they
recover.

Commands run in forked children of this process, which has imported everything, so that a trial takes seconds; the kill
is as hard as any. Chunks of the store and the time between checkpoints are made small, so that there is something to
lose.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

NUM_IMAGES = 96
LIMIT = 240.0
"""Seconds after which a command is taken to hang."""


@dataclass(frozen=True)
class Stage:
    """One command; its arguments name paths below the trial's folder."""

    name: str
    arguments: tuple[str, ...]


FIT = ("--store", "store", "--layer", "block5", "--num-concepts", "6")
STAGES = [
    Stage("capture", ("capture", "--model", "critters", "--layer", "block4", "block5", "--images", "images.npz",
                      "--out", "store")),
    Stage("fit", ("fit", "topk-sae", *FIT, "--out", "run", "--seeds", "2", "--steps", "200", "--batch-size", "64",
                  "--top-k", "2")),
    Stage("fit-direct", ("fit", "nmf", *FIT, "--out", "direct", "--seeds", "2")),
    Stage("evaluate", ("evaluate", "run", "--images", "images.npz", "--untrained-images", "16")),
    Stage("report", ("report", "run")),
    Stage("explain", ("explain", "pca", "--model", "critters", "--layer", "block5", "--images", "images.npz", "--out",
                      "whole", "--num-concepts", "4", "--seeds", "1", "--untrained-images", "0")),
    Stage("fit-parts", ("fit", "parts", "--store", "store", "--layer", "block4", "--upper", "block5", "--out",
                        "parts", "--seeds", "1", "--steps", "40", "--batch-size", "32")),
    Stage("fit-cladec", ("fit", "cladec", "--store", "store", "--layer", "block5", "--images", "images.npz", "--out",
                         "decoder", "--seeds", "1", "--steps", "40", "--batch-size", "16", "--size", "16", "--width",
                         "8", "--alpha", "0.5")),
    Stage("consistency", ("consistency", "--model", "critters", "--layer", "block5", "--images", "images.npz", "--out",
                          "units", "--steps", "2", "--k", "3", "--null-draws", "20", "--difference-images", "8",
                          "--shown-units", "2", "--shown-images", "2")),
]  # fmt: skip
HARDEN = Stage(
    "harden",
    ("harden", "--model", "critters", "--layer", "block5", "--images", "images.npz", "--eval-images",
     "critters:48,seed=9", "--out", "hard", "--arms", "clean", "at", "--seeds", "1", "--epochs", "2", "--batch-size",
     "16", "--attack-images", "8", "--probe-images", "48", "--attack-steps", "2", "--long-steps", "0", "--restarts",
     "1", "--feature-steps", "0", "--v-steps", "2", "--check-images", "8", "--check-steps", "1", "--k", "3"),
)  # fmt: skip


def stages(only: Sequence[str] = ()) -> list[Stage]:
    """All stages that this version has, or the named ones with those that come before them."""
    found = [*STAGES, *([HARDEN] if importlib.util.find_spec("netgloss.adversarial.harden") else [])]
    last = max((i for i, s in enumerate(found) if s.name in only), default=len(found) - 1)
    return found[: last + 1]


def prepare(small_chunks: bool = True) -> None:
    """Imports everything that the commands use and makes chunks and checkpoints small."""
    import netgloss.activations.store as store_module

    for name in ("workflows.evaluate", "workflows.annotate", "workflows.explain", "workflows.consistency",
                 "report.build",
                 "explainers.topk_sae",
                 "explainers.nmf", "explainers.pca", "cli.terminal", "explainers.natural_axes",
                 "explainers.random_directions", "data.critters_net"):  # fmt: skip
        importlib.import_module(f"netgloss.{name}")
    for name in ("lightning_fabric", "timm", "matplotlib.pyplot", "jinja2", "sklearn.decomposition"):
        importlib.import_module(name)
    import torch

    from netgloss.training import FitOptions

    torch.set_num_threads(1)
    if small_chunks:
        store_module._CHUNK_BYTES = 1 << 17
        FitOptions.__init__.__defaults__ = (0.0, 20, None)  # type: ignore[misc]


def make_images(path: Path) -> None:
    """Critters as one .npz file."""
    import numpy as np

    import netgloss

    source = netgloss.open_images(f"critters:{NUM_IMAGES}")
    pixels = np.stack([np.asarray(source.image(i)) for i in range(len(source))])
    np.savez(path, x=pixels, y=source.targets, classes=np.array(source.class_names))


def fork(folder: Path, arguments: Sequence[str], *, before: Callable[[], None] | None = None) -> int:
    """Starts a command in ``folder`` in a forked child; its pid."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:  # the child never returns
        os.chdir(folder)
        with (folder.parent / f"{folder.name}.log").open("ab", buffering=0) as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        sys.argv = ["netgloss", *arguments]
        if before is not None:
            before()
        from netgloss.cli import main

        main(list(arguments))
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def wait(pid: int, *, limit: float = LIMIT) -> int:
    """Exit code of a child, minus the signal that killed it; a child that hangs is killed and counts as -1000."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return -1000


def _changes(event: str, arguments: tuple[object, ...]) -> bool:
    """Whether an audit event is about to change the file system below the working folder."""
    if event == "open":
        path, mode, flags = (*arguments, None, None, None)[:3]
        if not isinstance(path, str) or path.startswith(("/dev", "/proc", "/sys")):
            return False
        return any(c in str(mode or "") for c in "wax+") or bool(
            isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        )
    return event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir")


def kill_at_write(number: int) -> Callable[[], None]:
    """Installs a hook that kills the process before its ``number``-th change of the file system."""

    def install() -> None:
        count = 0

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal count
            if _changes(event, arguments):
                count += 1
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)

    return install


def count_writes(file: Path) -> Callable[[], None]:
    """Installs a hook that keeps the number of changes in ``file``'s size, one byte each."""

    def install() -> None:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        sys.addaudithook(lambda event, a: os.write(descriptor, b".") and None if _changes(event, a) else None)

    return install


def differences(found: Path, expected: Path) -> list[str]:
    """How two folders differ, but for the times that runs took."""
    files = [{str(p.relative_to(root)) for p in root.rglob("*")} for root in (found, expected)]
    told = [f"left behind: {name}" for name in sorted(files[0] - files[1])]
    told += [f"missing: {name}" for name in sorted(files[1] - files[0])]
    for name in sorted(files[0] & files[1]):
        one, other = found / name, expected / name
        if one.is_file() and _content(one) != _content(other):
            told.append(f"differs: {name}")
    return told


def _content(path: Path) -> bytes:
    if path.name == "run.json":
        record = json.loads(path.read_text())
        return json.dumps({k: v for k, v in record.items() if k not in ("created", "times")}).encode()
    if path.name == "report.html":
        record = json.loads((path.parent / "run.json").read_text())
        text = path.read_text().replace(record["created"], "CREATED")
        return re.sub(r"<(td|dd|p|li|span)[^>]*>[^<]*\d+(\.\d+)? (s|min|seconds?)\b[^<]*<", "TIME<", text).encode()
    return path.read_bytes()


@dataclass
class Trial:
    """What became of one kill."""

    stage: str
    how: str
    problems: list[str]


class Harness:
    """The undisturbed run of all stages, and trials against it."""

    def __init__(self, work: Path, chosen: Sequence[Stage], *, seed: int = 0) -> None:
        self.work, self.stages, self.random = work, list(chosen), random.Random(seed)
        self.seconds: dict[str, float] = {}
        self.writes: dict[str, int] = {}
        self.trials: list[Trial] = []

    def run_undisturbed(self) -> None:
        folder = self.work / "undisturbed"
        folder.mkdir(parents=True)
        pid = os.fork()
        if not pid:
            make_images(folder / "images.npz")
            os._exit(0)
        assert wait(pid) == 0
        shutil.copytree(folder, self._before(0))
        for number, stage in enumerate(self.stages):
            counter = self.work / f"{stage.name}.writes"
            started = time.monotonic()
            code = wait(fork(folder, stage.arguments, before=count_writes(counter)))
            self.seconds[stage.name] = time.monotonic() - started
            self.writes[stage.name] = counter.stat().st_size
            if code != 0:
                log = (self.work / "undisturbed.log").read_text(errors="replace")
                raise SystemExit(f"the undisturbed {stage.name} ended with {code}:\n{log[-3000:]}")
            shutil.copytree(folder, self._before(number + 1))

    def _before(self, number: int) -> Path:
        return self.work / f"before-{number}"

    def trial(self, number: int, by: str) -> Trial | None:
        """One kill of stage ``number``; None if the command ended before it."""
        stage = self.stages[number]
        folder = self.work / f"trial-{len(self.trials)}"
        shutil.rmtree(folder, ignore_errors=True)
        (self.work / f"{folder.name}.log").unlink(missing_ok=True)
        shutil.copytree(self._before(number), folder)
        told = []
        for kill in range(1 + self.random.randrange(2)):
            if by == "time":
                moment = self.random.uniform(0, self.seconds[stage.name])
                pid = fork(folder, stage.arguments)
                time.sleep(moment)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                told.append(f"{moment:.3f} s")
            else:
                write = self.random.randint(1, self.writes[stage.name])
                pid = fork(folder, stage.arguments, before=kill_at_write(write))
                told.append(f"write {write}")
            if wait(pid) != -signal.SIGKILL:
                if kill == 0:
                    return None
                told.pop()
        code = wait(fork(folder, stage.arguments))
        problems = [f"the command ended with {code} after the kill"] if code else []
        problems += differences(folder, self._before(number + 1))
        found = Trial(stage.name, f"killed at {' and '.join(told)}", problems)
        self.trials.append(found)
        if not problems:
            shutil.rmtree(folder)
        return found

    def run(self, kills: int, by: str, only: Sequence[str] = (), *, say: Callable[[str], None] = print) -> None:
        """``kills`` trials of each way, spread evenly over the chosen stages."""
        self.run_undisturbed()
        for name, seconds in self.seconds.items():
            say(f"undisturbed {name}: {seconds:.2f} s, {self.writes[name]} changes of the file system")
        wanted = [i for i, s in enumerate(self.stages) if not only or s.name in only]
        for way in ("time", "writes") if by == "both" else (by,):
            done = attempts = 0
            while done < kills and attempts < 5 * kills + 20:
                attempts += 1
                found = self.trial(wanted[done % len(wanted)], way)
                if found is None:
                    continue
                done += 1
                say(f"{len(self.trials):3d} {found.stage} {found.how}: {'; '.join(found.problems) or 'equal'}")
            assert done == kills, f"only {done} of {kills} kills hit a running command"

    @property
    def failures(self) -> list[Trial]:
        return [t for t in self.trials if t.problems]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="kills of each way")
    parser.add_argument("--by", choices=("time", "writes", "both"), default="time")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the trials; those that failed stay there")
    options = parser.parse_args(arguments)
    prepare()
    with tempfile.TemporaryDirectory() as temporary:
        harness = Harness(options.keep or Path(temporary), stages(options.only), seed=options.seed)
        harness.run(options.kills, options.by, options.only, say=lambda line: print(line, flush=True))
    survived = len(harness.trials) - len(harness.failures)
    print(f"{survived}/{len(harness.trials)} kills survived: the same command ended with the same result")
    return 1 if harness.failures else 0


if __name__ == "__main__":
    sys.exit(main())

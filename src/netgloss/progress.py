"""How long work reports how far it is, without printing: only the command line draws a bar."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives the state of one task at a time."""

    def start(self, task: str, total: int, *, unit: str, done: int = 0) -> None:
        """A task of ``total`` units begins; ``done`` of them were finished by an earlier, interrupted run."""
        ...

    def advance(self, amount: int = 1, *, note: str = "") -> None:
        """``amount`` more units are done."""
        ...

    def finish(self) -> None:
        """The task is over."""
        ...

    def say(self, message: str) -> None:
        """One line for the user (a size estimate, a skipped image, a finished step)."""
        ...


class Silent:
    """The default: nothing is shown."""

    def start(self, task: str, total: int, *, unit: str, done: int = 0) -> None: ...

    def advance(self, amount: int = 1, *, note: str = "") -> None: ...

    def finish(self) -> None: ...

    def say(self, message: str) -> None: ...

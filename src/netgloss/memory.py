"""Batches that shrink until they fit the device's memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from netgloss.errors import UserError

Result = TypeVar("Result")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device's (or the machine's) memory did not suffice."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


class Halving:
    """Runs work on batches in parts of at most ``size``, and halves ``size`` whenever memory runs out.

    The size that fitted is kept for the batches that follow.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, count: int, work: Callable[[slice], Result]) -> list[Result]:
        """``work`` on slices that cover ``range(count)`` in order; it must change nothing before it succeeds.

        Raises
        ------
        UserError : not even a part of one fits.
        """
        found: list[Result] = []
        done = 0
        while done < count:
            part = slice(done, min(done + self.size, count))
            try:
                found.append(work(part))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                length = part.stop - part.start
                if length == 1:
                    raise UserError(
                        f"one image alone does not fit in memory: {' '.join(str(error).split())[:160]}"
                    ) from error
                self.size = length // 2
            else:
                done = part.stop
                continue
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return found

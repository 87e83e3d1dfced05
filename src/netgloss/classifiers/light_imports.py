"""Work with torch, timm and torchvision that leaves torch's compiler out, whose import takes 1.6 CPU-seconds.

timm and torchvision import it to mark or to ask about single functions that netgloss does not run (the RoI align of
torchvision, an iterator of timm's NaFlexViT), and torch does so the first time that it computes shapes on the meta
device, to mark functions that must never be compiled. Inside :func:`without_compiler` a stand-in answers: it marks
nothing, as nothing is compiled meanwhile, and fetches the compiler for whatever else is asked of it. Afterwards nothing
of it is left, and torch marks its functions when they run next.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any

import torch

_COMPILER = "torch._dynamo"
_ASKED = "torch._dynamo.utils"


@contextmanager
def without_compiler() -> Iterator[None]:
    """The body runs without torch's compiler, unless it compiles something; not to be used by several threads."""
    if _COMPILER in sys.modules:
        yield
        return
    marked: list[Any] = []
    compiler, asked, real = _StandIn(_COMPILER), _StandIn(_ASKED), torch.compiler.disable

    def disable(function: Any = None, *more: Any, **options: Any) -> Any:
        marked.append(function)
        return function

    def is_compile_supported(device: Any) -> Any:
        return importlib.import_module(_ASKED).is_compile_supported(device)

    compiler.__dict__["disable"] = disable
    asked.__dict__["is_compile_supported"] = is_compile_supported
    sys.modules |= {_COMPILER: compiler, _ASKED: asked}
    torch.compiler.disable = functools.partial(_disabled_later, real)
    try:
        yield
    finally:
        torch.compiler.disable = real
        _remove_stand_ins()
        for function in marked:
            with suppress(AttributeError):
                del function.__dynamo_disable


class _StandIn(ModuleType):
    """A module that is replaced by the real one as soon as it is asked for anything that it does not have."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        _remove_stand_ins()
        return getattr(importlib.import_module(self.__name__), name)


def _remove_stand_ins() -> None:
    for name in (_ASKED, _COMPILER):
        if isinstance(sys.modules.get(name), _StandIn):
            del sys.modules[name]


def _disabled_later(real: Callable[..., Any], function: Any = None, *more: Any, **options: Any) -> Any:
    """What ``torch.compiler.disable`` gives, made when the function first runs."""
    if function is None:
        return functools.partial(_disabled_later, real, **options)
    if not callable(function) or isinstance(function, type):
        return real(function, *more, **options)
    made: list[Any] = []

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        if not made:
            made.append(real(function, *more, **options))
        return made[0](*arguments, **named)

    return call

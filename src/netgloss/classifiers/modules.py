"""A user's module made ready: unwrapped, copied, in float32 and eval mode; what cannot be explained is refused.

The module itself stays as it is. A copy is made even of modules that ``copy.deepcopy`` refuses: computed tensors
(weights under ``weight_norm``, ``spectral_norm`` or pruning, activations that a module keeps) are copied without their
graph, and what cannot be copied at all (locks, open files, generators) is shared with the original.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from netgloss.errors import UserError

ModuleT = TypeVar("ModuleT", bound=nn.Module)
_DEPTH = 6
"""How deep containers in a module's attributes are searched."""


def unwrapped(net: nn.Module) -> nn.Module:
    """The network inside ``torch.compile``, ``DataParallel`` and ``DistributedDataParallel``, by their types."""
    compiler = sys.modules.get("torch._dynamo.eval_frame")  # loaded if anything was compiled
    compiled = () if compiler is None else (compiler.OptimizedModule,)
    while True:
        if isinstance(net, compiled):
            net = net._orig_mod
        elif isinstance(net, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            net = net.module
        else:
            return net


def prepared(net: nn.Module) -> nn.Module:
    """A copy of ``net`` that can be explained, in float32.

    Raises
    ------
    UserError : a scripted, traced or quantised network, one with lazy layers that have no weights yet, or on the meta
        device.
    """
    net = unwrapped(net)
    name = type(net).__name__
    if any(isinstance(module, torch.jit.ScriptModule) for module in net.modules()):
        raise UserError(
            f"{name} is TorchScript, whose layers cannot be read: pass the Python module that it was made from"
        )
    quantised = [type(m).__name__ for m in net.modules() if ".quantized" in type(m).__module__]
    if quantised:
        raise UserError(
            f"{name} is quantised ({quantised[0]}), which passes no gradient: pass the network before its quantisation"
        )
    tensors = [*net.parameters(), *net.buffers()]
    if any(nn.parameter.is_lazy(tensor) for tensor in tensors):
        raise UserError(f"{name} has lazy layers without weights: run it once on an image, then pass it")
    if any(tensor.is_meta for tensor in tensors):
        raise UserError(f"the weights of {name} are on the meta device, where they have no values: load them first")
    net = copied(net)
    return net.float() if any(t.is_floating_point() and t.dtype != torch.float32 for t in tensors) else net


def copied(net: ModuleT) -> ModuleT:
    """A copy that shares no weight with ``net``."""
    try:
        return copy.deepcopy(net)
    except Exception:  # deepcopy raises whatever the attributes' own classes do
        memo: dict[int, Any] = {}
        for value in _attributes(net):
            if isinstance(value, Tensor):
                if not value.is_leaf:
                    memo[id(value)] = value.detach().clone()
            elif not _can_be_copied(value):
                memo[id(value)] = value
        return copy.deepcopy(net, memo)


def frozen(net: ModuleT) -> ModuleT:
    """``net`` itself in eval mode, without gradients of its weights. Modules that refuse or ignore ``eval()`` are put
    into that mode by their flags.
    """
    with contextlib.suppress(Exception):  # a network may refuse in its own way
        net.eval()
    for module in net.modules():
        module.training = False
    return net.requires_grad_(False)


def _attributes(net: nn.Module) -> Iterator[Any]:
    """What modules hold besides modules and parameters, containers opened."""
    for module in net.modules():
        for name, value in vars(module).items():
            if name not in ("_modules", "_parameters"):
                yield from _opened(value, _DEPTH)


def _opened(value: Any, depth: int) -> Iterator[Any]:
    if isinstance(value, nn.Module):
        return
    if isinstance(value, dict) and depth:
        for inner in value.values():
            yield from _opened(inner, depth - 1)
    elif isinstance(value, (list, tuple, set, frozenset)) and depth:
        for inner in value:
            yield from _opened(inner, depth - 1)
    else:
        yield value


def _can_be_copied(value: Any) -> bool:
    try:
        copy.deepcopy(value)
    except Exception:  # see copied
        return False
    return True

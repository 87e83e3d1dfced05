"""Heads: networks whose output is not yet logits (B, classes), made to give them.

A network may return its logits inside a dict, a tuple or an object with ``logits`` (Hugging Face), and a binary one a
single logit z, which is shown as the two logits (0, z): their softmax is (1 - sigmoid(z), sigmoid(z)). The network gets
a subclass of its own class for this, so that layers keep their names and copies keep the form. Outputs that are
probabilities are refused, since contributions and attacks would be computed on the wrong scale.

A network without a head (``num_classes=0``) gives features and no logits. Its forward then gives an empty tensor
(B, 0): what reads activations works, and what needs logits says that there are none.

The logits are of one of three kinds (:data:`Outputs`). The shapes of "multiclass" and "multilabel" are the same, so
that the second one is never guessed: it is what the user, the module's attribute ``multi_label`` or a Hugging Face
configuration says.

Shape letters: B images, L classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from functools import wraps
from typing import Any, Literal

import torch
from torch import Tensor, nn

from netgloss.classifiers.taps import watched
from netgloss.errors import UserError

Outputs = Literal["multiclass", "multilabel", "binary", "none"]
"""One class per image (the largest logit), any number of labels (each logit that is positive), one logit z, shown as
the two logits (0, z), or no logits at all.
"""


def probabilities(logits: Tensor, outputs: Outputs) -> Tensor:
    """The probability of each class, (..., L): by softmax, or by sigmoid for "multilabel"."""
    return logits.sigmoid() if outputs == "multilabel" else logits.softmax(dim=-1)


def with_logits(
    net: nn.Module, blank: Tensor, name: str, *, multi_label: bool = False, head: bool = True
) -> tuple[nn.Module, int, Outputs]:
    """The network, giving logits, their number and their kind.

    Parameters
    ----------
    blank : two inputs (2, m, H, W). name : of the network, for messages.
    multi_label : whether an image may have several labels; a single logit is "binary" all the same.
    head : False for a network that gives features: it then gives logits (B, 0), of the kind "none".

    Raises
    ------
    UserError : the network does not run on ``blank``, gives nothing that could be logits, or gives probabilities.
    """
    last: list[nn.Module] = []
    try:
        with torch.no_grad(), watched(net, lambda _, module, output: last.append(module)):
            output = net(blank)
    except Exception as error:  # a forward raises whatever it likes
        line = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(f"{name} does not run on inputs {tuple(blank.shape)}: {line}") from error
    pick = find_logits(output)
    logits = None if pick is None else pick(output)
    if not head or (logits is not None and logits.shape == (len(blank), 0)):
        return _changed(net, _without_logits(type(net)), output), 0, "none"
    if logits is None or logits.ndim != 2 or len(logits) != len(blank):
        raise UserError(
            f"{name} is no classifier: for 2 images it gives {_form(output)}, not logits (2, num_classes); if it has "
            "no head, --num-classes 0 (num_classes=0) explains it without logits"
        )
    seen = logits.shape[1] > 1 and not logits.is_meta  # an outline's logits have no values
    whole = seen and bool((logits >= 0).all()) and bool((logits.sum(1) - 1).abs().max() < 1e-4)
    if whole or (last and isinstance(last[-1], (nn.Sigmoid, nn.Softmax))):
        raise UserError(
            f"{name} gives probabilities (its head ends in a softmax or sigmoid), not logits: let it return the values "
            "before that"
        )
    outputs: Outputs = "binary" if logits.shape[1] == 1 else "multilabel" if multi_label else "multiclass"
    if isinstance(output, Tensor) and outputs != "binary":
        return net, logits.shape[1], outputs
    assert pick is not None
    changed = _changed(net, _giving_logits(type(net), pick, single=outputs == "binary"), output)
    return changed, max(2, logits.shape[1]), outputs


def _changed(net: nn.Module, cls: type[nn.Module], output: Any) -> nn.Module:
    """The network as one of the class ``cls``, which derives from its own; ``output`` is what it gives."""
    try:
        net.__class__ = cls
    except (TypeError, AttributeError) as error:
        gives = _form(output)
        raise UserError(
            f"{type(net).__name__} gives {gives}, and its class cannot be changed: wrap it in a module that returns "
            "logits (B, classes), or (B, 0) without a head"
        ) from error
    return net


def find_logits(output: Any) -> Callable[[Any], Any] | None:
    """How to get the logits from outputs like this one: the output itself, what is called ``logits``, the first of a
    tuple if it is a (B, C), or the only (B, C) of a tuple, a dict or a dataclass. None if there is none.
    """
    if isinstance(output, Tensor):
        return lambda out: out
    if isinstance(output, Mapping):
        key = "logits" if _is_vector(output.get("logits")) else _only_vector(output.items())
        return None if key is None else lambda out: out[key]
    if _is_vector(getattr(output, "logits", None)):
        return lambda out: out.logits
    if isinstance(output, (tuple, list)) and output:
        place = 0 if _is_vector(output[0]) else _only_vector(enumerate(output))
        return None if place is None else lambda out: out[place]
    if is_dataclass(output):
        name = _only_vector((field.name, getattr(output, field.name)) for field in fields(output))
        return None if name is None else lambda out: getattr(out, name)
    return None


def _is_vector(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 2 and value.is_floating_point()


def _only_vector(items: Iterable[tuple[Any, Any]]) -> Any:
    """The key of the only (B, C); None if there is none or more than one."""
    keys = [key for key, value in items if _is_vector(value)]
    return keys[0] if len(keys) == 1 else None


def _form(output: Any) -> str:
    """What a network gives, in words."""
    if isinstance(output, Tensor):
        return f"shape {tuple(output.shape)}"
    named = output.items() if isinstance(output, Mapping) else enumerate(output) if isinstance(output, tuple) else ()
    inside = [f"{key} {tuple(value.shape)}" for key, value in named if isinstance(value, Tensor)]
    return f"a {type(output).__name__}" + (f" of {', '.join(inside[:6])}" if inside else "")


def _without_logits(cls: type[nn.Module]) -> type[nn.Module]:
    """``cls`` with a forward that runs, so that layers can be read, and gives (B, 0)."""

    @wraps(cls.forward)
    def forward(self: nn.Module, x: Tensor, *args: Any, **options: Any) -> Tensor:
        cls.forward(self, x, *args, **options)
        return x.new_zeros(len(x), 0)

    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})


def _giving_logits(cls: type[nn.Module], pick: Callable[[Any], Any], *, single: bool) -> type[nn.Module]:
    """``cls`` with a forward that gives logits; nothing in it depends on values, so that it can be traced."""

    @wraps(cls.forward)  # torch.fx reads the names of the arguments
    def forward(self: nn.Module, *args: Any, **options: Any) -> Tensor:
        logits: Tensor = pick(cls.forward(self, *args, **options))
        return torch.cat([torch.zeros_like(logits), logits], dim=1) if single else logits

    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})

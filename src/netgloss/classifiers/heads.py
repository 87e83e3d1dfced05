"""Heads: networks whose output is not yet logits (B, classes), made to give them.

A network may return its logits inside a dict, a tuple or an object with ``logits`` (Hugging Face), and a binary one a
single logit z, which is shown as the two logits (0, z): their softmax is (1 - sigmoid(z), sigmoid(z)). The network gets
a subclass of its own class for this, so that layers keep their names and copies keep the form. Outputs that are
probabilities are refused, since contributions and attacks would be computed on the wrong scale.

The logits are of one of three kinds (:data:`Outputs`). The shapes of "multiclass" and "multilabel" are the same, so
that the second one is never guessed: it is what the user, the module's attribute ``multi_label`` or a Hugging Face
configuration says.

Shape letters: B images, L classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, Literal

import torch
from torch import Tensor, nn

from netgloss.classifiers.taps import watched
from netgloss.errors import UserError

Outputs = Literal["multiclass", "multilabel", "binary"]
"""One class per image (the largest logit), any number of labels (each logit that is positive), or one logit z, shown as
the two logits (0, z).
"""


def probabilities(logits: Tensor, outputs: Outputs) -> Tensor:
    """The probability of each class, (..., L): by softmax, or by sigmoid for "multilabel"."""
    return logits.sigmoid() if outputs == "multilabel" else logits.softmax(dim=-1)


def with_logits(
    net: nn.Module, blank: Tensor, name: str, *, multi_label: bool = False
) -> tuple[nn.Module, int, Outputs]:
    """The network, giving logits, their number and their kind.

    Parameters
    ----------
    blank : two inputs (2, m, H, W). name : of the network, for messages.
    multi_label : whether an image may have several labels; a single logit is "binary" all the same.

    Raises
    ------
    UserError : the network does not run on ``blank``, gives nothing that could be logits, or gives probabilities.
    """
    last: list[nn.Module] = []
    try:
        with torch.no_grad(), watched(net, lambda _, module, output: last.append(module)):
            output = net(blank)
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        line = " ".join(str(error).split())[:160]
        raise UserError(f"{name} does not run on inputs {tuple(blank.shape)}: {line}") from error
    pick = find_logits(output)
    logits = None if pick is None else pick(output)
    if logits is None or logits.ndim != 2 or len(logits) != len(blank):
        got = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise UserError(f"{name} is no classifier: for 2 images it gives {got}, not logits (2, num_classes)")
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
    try:
        net.__class__ = _giving_logits(type(net), pick, single=outputs == "binary")
    except (TypeError, AttributeError) as error:
        gives = "one logit" if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise UserError(
            f"{name} gives {gives}, and a {type(net).__name__} cannot be changed: wrap it in a module that returns "
            "logits (B, classes)"
        ) from error
    return net, max(2, logits.shape[1]), outputs


def find_logits(output: Any) -> Callable[[Any], Any] | None:
    """How to get the logits from outputs like this one: the output itself, what is called ``logits``, the first of a
    tuple, or the only (B, C) of a dict. None if there is none.
    """
    if isinstance(output, Tensor):
        return lambda out: out
    if isinstance(output, Mapping):
        vectors = [key for key, value in output.items() if isinstance(value, Tensor) and value.ndim == 2]
        key = "logits" if isinstance(output.get("logits"), Tensor) else vectors[0] if len(vectors) == 1 else None
        return None if key is None else lambda out: out[key]
    if isinstance(getattr(output, "logits", None), Tensor):
        return lambda out: out.logits
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return lambda out: out[0]
    return None


def _giving_logits(cls: type[nn.Module], pick: Callable[[Any], Any], *, single: bool) -> type[nn.Module]:
    """``cls`` with a forward that gives logits; nothing in it depends on values, so that it can be traced."""

    @wraps(cls.forward)  # torch.fx reads the names of the arguments
    def forward(self: nn.Module, *args: Any, **options: Any) -> Tensor:
        logits: Tensor = pick(cls.forward(self, *args, **options))
        return torch.cat([torch.zeros_like(logits), logits], dim=1) if single else logits

    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})

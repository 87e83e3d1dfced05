"""Outlines: a named network without its weights, whose forward gives shapes at next to no cost, to list its layers.

The network is built on torch's meta device: nothing is drawn, downloaded or computed. Most layouts follow from shapes
and the network's own facts (``layouts.py``). Where one depends on which values become NaN, the network is built once
more with constant weights, which decide it as well as any others, and runs on two images.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from netgloss.classifiers.layers import LayerInfo, list_layers
from netgloss.classifiers.layouts import ValuesNeeded
from netgloss.classifiers.loading import Classifier, load_classifier
from netgloss.errors import UserError

LIBRARIES = ("timm:", "torchvision:", "hf:")
_DRAWS = ("normal_", "uniform_", "erfinv_", "trunc_normal_", "kaiming_uniform_", "exponential_")


def outline_layers(
    name: str, *, layout: str = "auto", prefix_tokens: int | None = None, pool: str = "mean", **fields: Any
) -> tuple[Classifier, list[LayerInfo]]:
    """The layers of a network by name, without its weights; the classifier is good for nothing else.

    Parameters
    ----------
    name, fields : as for :func:`netgloss.load_classifier`; a checkpoint is only checked. Networks from a file are
        loaded whole.
    layout, prefix_tokens, pool : as for ``Classifier.with_layout``.

    Raises
    ------
    UserError : see :func:`netgloss.load_classifier`.
    """
    asked = (layout, prefix_tokens, pool)
    load = partial(_loaded, name, asked, fields)
    if not name.startswith(LIBRARIES):
        classifier = load()
        return classifier, list_layers(classifier)
    fields = {**fields, "random_weights": fields.get("checkpoint") is None}
    load = partial(_loaded, name, asked, fields)
    try:
        with torch.device("meta"), _Cheap(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*non-meta parameter in the checkpoint.*")  # it is only checked
            classifier = load()
            return classifier, list_layers(classifier)
    except ValuesNeeded:
        pass
    except UserError:
        raise
    except Exception:  # some networks compute with values as they are built or run
        pass
    with _Cheap():
        classifier = load()
    return classifier, list_layers(classifier)


def _loaded(name: str, asked: tuple[str, int | None, str], fields: dict[str, Any]) -> Classifier:
    return load_classifier(name, **fields).with_layout(*asked)


class _Cheap(TorchFunctionMode):
    """Random initial values become a constant; rows of numbers, which networks read as they are built (rates of dropped
    paths), keep their values.
    """

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _DRAWS and args and isinstance(args[0], Tensor):
            with torch.no_grad():
                return args[0].fill_(0.01)
        if func is torch.linspace:
            kwargs = {"device": "cpu", **kwargs}
        return func(*args, **kwargs)

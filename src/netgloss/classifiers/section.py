"""A section: an independent copy of the network from a layer to layers above it, as a module that can be trained.

It is cut by the machinery of :mod:`netgloss.classifiers.tail`, so a layer inside a residual block or parallel to a
shortcut has none.

Shape letters: B images, C features, H and W the layer's grid.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from netgloss.classifiers.layouts import layout_of
from netgloss.classifiers.modules import copied
from netgloss.classifiers.tail import TOLERANCE, _cut_out, _first_line, _last_run, _NoCut, _trace
from netgloss.classifiers.taps import Taps, find_layer, network_of
from netgloss.errors import UserError
from netgloss.trust import check_code

if TYPE_CHECKING:
    from netgloss.classifiers.loading import Classifier


def cut_section(net: Any, layer: str, upper: Sequence[str], *, input_shape: tuple[int, ...]) -> nn.Module:
    """From activations (B, C, H, W) of ``layer`` to a dict of the activations of ``upper``, differentiable.

    Parameters
    ----------
    net : a ``Classifier`` or a frozen network in eval mode; the copy shares nothing with it.
    upper : dotted names of layers that run after ``layer``.
    input_shape : (channels, height, width) of the network's input.

    Returns
    -------
    The section on the network's device, in eval mode, its parameters trainable and starting at the network's.

    Raises
    ------
    UserError
        If a layer is unknown, or what lies between is not a section of its own.
    """
    module = network_of(net)
    converted = [name for name in (layer, *upper) if not layout_of(find_layer(module, name)).is_plain]
    if converted:
        raise UserError(f"{converted[0]!r} gives tokens or a channels-last map: a section needs maps (B, C, H, W)")
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    images = torch.randn(2, *input_shape, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad(), Taps(module, [layer, *upper], stop=False) as taps:
        seen = taps(images)
        calls = dict(taps.calls)
    try:
        graph = _trace(module, [layer, *upper])
        start = _last_run(module, graph, layer, calls[layer])
        ends = [_last_run(module, graph, name, calls[name]) for name in upper]
        section = copied(_cut_out(module, graph, start, layer, ends, upper))
        for inner in section.modules():
            if getattr(inner, "inplace", False) is True:
                inner.inplace = False  # type: ignore[assignment]  # an upper layer's output must stay as it was
        section = section.requires_grad_(True).eval()
        with torch.no_grad():
            found: dict[str, Tensor] = section(seen[layer].clone())
    except _NoCut as error:
        raise UserError(f"{layer!r} leads to {', '.join(upper)} by no section of its own: {error}") from error
    except RuntimeError as error:
        raise UserError(f"the section from {layer!r} does not run on its own ({_first_line(error)})") from error
    for name in upper:
        gap = float((found[name] - seen[name]).abs().max()) if found[name].shape == seen[name].shape else float("inf")
        if not gap <= TOLERANCE * max(float(seen[name].abs().max()), 1e-6):
            raise UserError(f"the section from {layer!r} alone does not give {name!r} (off by {gap:.2g})")
    return section


def section_of(classifier: Classifier, layer: str, upper: Sequence[str]) -> nn.Module:
    """:func:`cut_section` of a classifier."""
    return cut_section(classifier, layer, upper, input_shape=classifier.input_shape)


def section_from_spec(spec: Mapping[str, Any], layer: str, upper: Sequence[str]) -> nn.Module:
    """The structure of a section of the network that ``Classifier.spec`` described, for weights loaded afterwards.

    The network is built with random weights: its checkpoint is not needed.

    Raises
    ------
    UserError
        If the network cannot be built by its name.
    """
    return section_of(_skeleton(json.dumps(dict(spec), sort_keys=True)), layer, upper)


@lru_cache(maxsize=1)
def _skeleton(spec: str) -> Classifier:
    from netgloss.classifiers.loading import load_classifier
    from netgloss.classifiers.preprocessing import Preprocessing

    fields = json.loads(spec)
    if not fields.get("name"):
        raise UserError("it is not said which network this is: pass it (classifier=...)")
    if fields["name"].startswith("module:"):
        name = fields["name"].removeprefix("module:")
        raise UserError(f"the classifier {name!r} was given as a module: pass it again (classifier=...)")
    check_code(fields["name"], "what describes the network")
    return load_classifier(
        fields["name"],
        random_weights=True,
        num_classes=fields["num_classes"],
        class_names=fields["class_names"],
        preprocessing=Preprocessing.from_dict(fields["preprocessing"]),
        seed=fields["seed"],
    )

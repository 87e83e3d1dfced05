"""The tail: from a layer's activation to the logits, without running the trunk again wherever the graph allows it.

The forward is traced by ``torch.fx``; only the modules around the layer are opened, all others stay whole, so that
their control flow does not matter. If every path from the images to the logits leads through the layer (it *dominates*
the output), the graph behind it is cut out as a module of its own that shares the network's parameters: mode
``"graph"``. Inside a residual block, or where the forward cannot be traced, the whole network runs on the images with
the layer's output replaced: mode ``"replaced"``. A cut is kept only after its numbers have been compared with the
network's on other images, another batch size and foreign activations.

Shape letters: B images, C features, H and W the layer's grid.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from netgloss.classifiers.layouts import layout_of
from netgloss.classifiers.modules import copied
from netgloss.classifiers.taps import Taps, find_layer, network_of, replaced, watched
from netgloss.errors import UserError

TOLERANCE = 1e-4
"""Largest difference of the logits of cut and network that is put down to rounding, as a share of their size."""


class Tail:
    """Logits from the activation of a layer, differentiable in the activation.

    Parameters
    ----------
    net : a ``Classifier`` or a frozen network in eval mode.
    layer : dotted name.
    example : (B, channels, H, W) a batch of the network's input, to trace and to verify with.

    Attributes
    ----------
    mode : ``"graph"`` (the trunk is not needed) or ``"replaced"`` (calls need ``images=``).
    reason : why, in plain words.
    ignores_layer : the logits do not depend on what is read of a layer of tokens: on its patches, where only the class
        token reaches the head, or on its class token, where only the patches do.

    Raises
    ------
    UserError
        For an unknown layer, one that never runs or whose output is not a single tensor.
    """

    def __init__(self, net: Any, layer: str, *, example: Tensor) -> None:
        self.net = network_of(net)
        self.layer = layer
        self.layout = layout_of(find_layer(self.net, layer))
        self.mode: Literal["graph", "replaced"] = "replaced"
        self.ignores_layer = False
        self._graph: fx.GraphModule | None = None
        with torch.no_grad(), Taps(self.net, layer, stop=False) as taps:
            activation = taps(example)[layer]
            self._call = taps.calls[layer] - 1
            expected = taps.logits
        self._headless = expected.shape[1] == 0
        if self._headless:
            self.mode, self.reason = "graph", "the network has no head, so that nothing leads to logits"
            return
        try:
            if self.layout.prefix:
                others = "patches" if self.layout.pool == "cls" else f"{self.layout.prefix} prefix tokens"
                raise _NoCut(f"{layer!r} has {others}, which come from the image")
            graph = _cut(self.net, layer, self._call + 1)
            self._verify(graph, example, activation, expected)
        except _NoCut as error:
            self.reason = str(error)
            if self.layout.prefix:
                with torch.no_grad():
                    without = self._replaced(torch.zeros_like(activation), example)
                self.ignores_layer = bool(torch.equal(without, expected))
        else:
            self._graph, self.mode = graph, "graph"
            self.reason = f"every path to the logits leads through {layer!r}"

    def __call__(self, activation: Tensor, *, images: Tensor | None = None) -> Tensor:
        """Logits (B, classes) of an activation (B, C) or (B, C, H, W); (B, 0) of a network without a head.

        Parameters
        ----------
        images : (B, channels, H, W) the network's input that the activation belongs to; needed in mode ``"replaced"``.
        """
        if self._headless:
            return activation.new_zeros(len(activation), 0)
        if self._graph is not None:
            return self._behind(self._graph, activation.clone())
        if images is None:
            raise UserError(f"logits from layer {self.layer!r} need images= as well: {self.reason}")
        if len(images) != len(activation):
            raise UserError(f"{len(activation)} activations of layer {self.layer!r} came with {len(images)} images")
        return self._replaced(activation, images)

    def is_affine(self, shape: tuple[int, ...]) -> bool:
        """True if logits are an affine function of activations of ``shape`` (C,) or (C, H, W).

        Tests ``f(a + b) - f(a) - f(b) + f(0) = 0`` in double precision on random activations of several scales. A
        replaced tail also depends on the images and is never called affine.
        """
        if self._graph is None:
            return False
        device = next((p.device for p in self._graph.parameters()), torch.device("cpu"))
        generator = torch.Generator().manual_seed(0)
        tail = copied(self._graph).double()
        with torch.no_grad():
            for scale in (0.1, 1.0, 30.0):
                a, b = (scale * torch.randn(2, 4, *shape, generator=generator, dtype=torch.float64)).to(device)
                parts = [self._behind(tail, x) for x in (a + b, a.clone(), b.clone(), torch.zeros_like(a))]
                defect = parts[0] - parts[1] - parts[2] + parts[3]
                if not defect.abs().max() <= 1e-9 * max(float(part.abs().max()) for part in parts):
                    return False
        return True

    def _behind(self, graph: fx.GraphModule, activation: Tensor) -> Tensor:
        logits: Tensor = graph(self.layout.write(activation))
        return logits

    def _replaced(self, activation: Tensor, images: Tensor) -> Tensor:
        with replaced(self.net, self.layer, activation, call=self._call):
            return self.net(images)

    def _verify(self, graph: fx.GraphModule, images: Tensor, activation: Tensor, expected: Tensor) -> None:
        """The cut gives the network's logits: for these images, for other ones, and for activations of no image at
        all.
        """
        generator = torch.Generator().manual_seed(0)
        other = images.flip(-1, -2) + torch.randn(images.shape, generator=generator).to(images) * 0.5
        other = torch.cat([other, images[:1]])
        noise = torch.rand(activation.shape, generator=generator).to(activation) * 2
        foreign = torch.cat([activation * noise, activation[:1]])
        with torch.no_grad():
            with Taps(self.net, self.layer, stop=False) as taps:
                pairs = [(activation, expected), (taps(other)[self.layer], taps.logits)]
            pairs.append((foreign, self._replaced(foreign, other)))
            for given, logits in pairs:
                try:
                    found = self._behind(graph, given.clone())
                except Exception as error:
                    raise _NoCut(
                        f"the part behind {self.layer!r} does not run on its own ({_first_line(error)})"
                    ) from error
                gap = float((found - logits).abs().max()) if found.shape == logits.shape else float("inf")
                if not gap <= TOLERANCE * max(float(logits.abs().max()), 1e-6):
                    raise _NoCut(
                        f"the part behind {self.layer!r} alone does not give the network's logits (off by {gap:.2g})"
                    )


def later_layers(net: Any, layer: str, *, input_shape: tuple[int, ...]) -> list[str]:
    """Layers that give a vector (B, C) or a map (B, C, H, W) after the last run of ``layer``, in the order they run;
    not those that contain it.

    Parameters
    ----------
    input_shape : (channels, height, width) of the network's input.
    """
    module = network_of(net)
    find_layer(module, layer)
    ran: list[str] = []

    def see(name: str, _: nn.Module, output: Any) -> None:
        if name == layer:
            ran.clear()
        elif isinstance(output, Tensor) and output.ndim in (2, 4) and not layer.startswith(f"{name}."):
            ran.append(name)

    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    with torch.no_grad(), watched(module, see):
        module(torch.zeros(2, *input_shape, device=device))
    return list(dict.fromkeys(ran))


class _NoCut(Exception):
    """Why the graph cannot be cut behind a layer."""


class _Tracer(fx.Tracer):
    """Opens only the modules that contain one of the layers; everything else is a leaf."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if any(m is layer for layer in self.layers):
            return True
        return not any(inner is layer for inner in m.modules() for layer in self.layers)


def _cut(net: nn.Module, layer: str, calls: int) -> fx.GraphModule:
    """The graph behind the last run of ``layer`` as a module; raises :class:`_NoCut` where there is none."""
    whole = _trace(net, [layer])
    cut = _last_run(net, whole, layer, calls)
    return _cut_out(net, whole, cut, layer, [node for node in whole.nodes if node.op == "output"])


def _trace(net: nn.Module, layers: Sequence[str]) -> fx.Graph:
    """The graph of the forward, with only the modules around ``layers`` opened."""
    defaults = {
        name: parameter.default
        for name, parameter in list(inspect.signature(net.forward).parameters.items())[1:]
        if parameter.default is not inspect.Parameter.empty
    }
    try:
        return _Tracer(*(find_layer(net, name) for name in layers)).trace(net, concrete_args=defaults or None)
    except Exception as error:
        raise _NoCut(f"the forward around {layers[0]!r} cannot be traced ({_first_line(error)})") from error


def _last_run(net: nn.Module, whole: fx.Graph, layer: str, calls: int) -> fx.Node:
    """The node of the last of the ``calls`` runs of ``layer``."""
    module = find_layer(net, layer)
    runs = [n for n in whole.nodes if n.op == "call_module" and net.get_submodule(str(n.target)) is module]
    if len(runs) != calls:
        raise _NoCut(f"the trace meets {layer!r} {len(runs)} times, the forward {calls} times")
    return runs[-1]


def _cut_out(
    net: nn.Module, whole: fx.Graph, cut: fx.Node, layer: str, ends: Sequence[fx.Node], names: Sequence[str] = ()
) -> fx.GraphModule:
    """From the output of ``cut`` to ``ends``: the network's output, or a dict of nodes by ``names``."""
    sizes = _batch_sizes(whole, cut)
    needed = _behind(whole, cut, sizes, layer, ends)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {cut: graph.placeholder("activation")}
    for node in whole.nodes:
        if node in needed:
            if node in sizes:
                copies[node] = graph.call_method("size", (copies[cut], 0))
            else:
                copies[node] = graph.node_copy(node, lambda n: copies[n])
    if names:
        graph.output({name: copies[node] for name, node in zip(names, ends, strict=True)})
    graph.lint()
    return fx.GraphModule(net, graph)


def _behind(graph: fx.Graph, cut: fx.Node, sizes: set[fx.Node], layer: str, ends: Sequence[fx.Node]) -> set[fx.Node]:
    """The nodes that ``ends`` need when ``cut`` is given; :class:`_NoCut` if the images are among them."""
    before: set[fx.Node] = set()
    todo = [cut]
    while todo:
        node = todo.pop()
        if node not in before:
            before.add(node)
            todo.extend(node.all_input_nodes)
    needed: set[fx.Node] = set()
    todo = list(ends)
    while todo:
        node = todo.pop()
        if node in needed or node is cut:
            continue
        if node.op == "placeholder":
            around = (m for n in graph.nodes if n not in before for m in n.all_input_nodes if m in before - {cut})
            source = next((f"the output of {m.target!r}" for m in around if m.op == "call_module"), "a shortcut")
            raise _NoCut(f"{source} goes around {layer!r} to the logits, as inside a residual block or a branch")
        needed.add(node)
        if node not in sizes:
            todo.extend(node.all_input_nodes)
    return needed


def _batch_sizes(graph: fx.Graph, cut: fx.Node) -> set[fx.Node]:
    """The nodes before the cut, or parallel to it, that ask for a batch size; the activation has the same."""
    after = {cut}
    for node in graph.nodes:
        if any(n in after for n in node.all_input_nodes):
            after.add(node)
    return {node for node in graph.nodes if node not in after and _is_batch_size(node)}


def _is_batch_size(node: fx.Node) -> bool:
    """``x.size(0)``, ``x.shape[0]`` or ``x.size()[0]`` of any tensor."""
    if node.op == "call_method" and node.target == "size":
        return (*node.args[1:], *node.kwargs.values()) == (0,)
    if node.op != "call_function" or node.target is not operator.getitem or node.args[1] != 0:
        return False
    of = node.args[0]
    assert isinstance(of, fx.Node)
    is_shape = of.op == "call_function" and of.target is getattr and of.args[1] == "shape"
    return bool(is_shape) or bool(of.op == "call_method" and of.target == "size" and len(of.args) + len(of.kwargs) == 1)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}".rstrip(": ")

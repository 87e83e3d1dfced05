"""Reading and replacing the output of layers while a network runs. All hooks of netgloss live in this file.

::

    with Taps(net, ["layer3", "layer4"]) as taps:     # stops the forward after layer4
        activations = taps(images)                    # {"layer3": (B, C, H, W), "layer4": (B, C, H, W)}
    with replaced(net, "layer4", torch.zeros_like):
        logits = net(images)

Nothing is detached: gradients flow unless the caller is in ``torch.no_grad()`` or ``torch.inference_mode()``. Hooks
are gone after the ``with``, whatever happens inside, and the training mode is never touched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from netgloss.classifiers.layouts import layout_of
from netgloss.errors import UserError, nearest


def find_layer(net: nn.Module, name: str) -> nn.Module:
    """The module called ``name`` in ``net``; an unknown name raises :class:`UserError` with the nearest right ones."""
    layers = dict(net.named_modules(remove_duplicate=False))
    if name and name in layers:
        return layers[name]
    known = [other for other in layers if other]
    hint = nearest(name, known) or known[-5:]
    raise UserError(f"{type(net).__name__} has no layer {name!r}; did you mean {', '.join(hint)}?")


def network_of(net: Any) -> nn.Module:
    """A module itself; of anything else (a ``Classifier``) its network ``.net``. Attributes of modules never matter."""
    found: nn.Module = net if isinstance(net, nn.Module) else net.net
    return found


class _Stop(BaseException):
    """Ends a forward after the last layer that is needed. No ``Exception``, so that no network swallows it."""


class Taps:
    """Reads layers in one forward pass.

    Parameters
    ----------
    net : the network, or anything that holds it as ``.net`` (a ``Classifier``).
    layers : dotted names.
    stop : True ends the forward after the last layer needed; False runs it to the end and keeps :attr:`logits`.

    Outputs come as vectors (B, C) or maps (B, C, H, W), whatever the layer's own layout is
    (``classifiers/layouts.py``). A layer that runs several times in a forward gives its last output; how often it runs
    is learned in the first pass, which is therefore a whole one. What comes after a layer works on a copy of its
    output, so that a following ``ReLU(inplace=True)`` leaves the reading alone and the gradient of the logits by the
    reading exists; the layer that ends the forward is not copied.

    Raises
    ------
    UserError
        For an unknown layer, one that the forward never runs, or one whose output is not a single tensor.
    """

    def __init__(self, net: Any, layers: str | Sequence[str], *, stop: bool = True) -> None:
        self.net = network_of(net)
        self.layers = [layers] if isinstance(layers, str) else list(dict.fromkeys(layers))
        if not self.layers:
            raise UserError("Taps needs at least one layer")
        self.stop = stop
        self.calls: dict[str, int] = {}
        """How often each layer runs in a forward, known after the first pass."""
        self._modules = {name: find_layer(self.net, name) for name in self.layers}
        self._logits: Any = None
        self._handles: list[RemovableHandle] = []
        self._outputs: dict[str, Tensor] = {}
        self._seen: dict[str, int] = {}
        self._running = False
        self._signal = _Stop()

    @property
    def logits(self) -> Tensor:
        """The network's output in the last pass (``stop=False`` only)."""
        assert self._logits is not None, "logits exist after a pass with stop=False"
        return self._logits

    def __enter__(self) -> Taps:
        assert not self._handles, "these taps are open already"
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_hook(self._hook(name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._outputs, self._logits = {}, None

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Runs the network on what it takes and gives the layers' outputs by name, in the order they were asked for."""
        if not self._handles:
            raise UserError("Taps read layers inside a with block only: with Taps(net, layers) as taps: taps(images)")
        self._outputs, self._seen, self._logits = {}, dict.fromkeys(self.layers, 0), None
        self._running = True
        try:
            self._logits = self.net(*args, **kwargs)
        except _Stop as stop:
            if stop is not self._signal:
                raise
        finally:
            self._running = False
            outputs, self._outputs = self._outputs, {}
        never = [name for name in self.layers if name not in outputs]
        if never:
            raise UserError(f"the forward of {type(self.net).__name__} never runs layer {', '.join(map(repr, never))}")
        if not self.calls:
            self.calls = dict(self._seen)
        return {name: outputs[name] for name in self.layers}

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Any], Tensor | None]:
        def read(module: nn.Module, args: Any, output: Any) -> Tensor | None:
            if not self._running:
                return None
            output = _single_tensor(name, output)
            self._seen[name] += 1
            layout = layout_of(module)
            raw, output = output, layout.read(output)
            if self.stop and self.calls and all(self._seen[n] >= self.calls[n] for n in self.layers):
                self._outputs[name] = output
                raise self._signal
            aliased = any(isinstance(a, Tensor) and _share_memory(a, raw) for a in args)
            self._outputs[name] = output.clone() if aliased else output
            return layout.write(self._outputs[name], raw).clone()

        return read


@contextlib.contextmanager
def replaced(
    net: Any, layer: str, by: Tensor | Callable[[Tensor], Tensor], *, call: int | None = None
) -> Iterator[nn.Module]:
    """Inside the ``with``, ``layer`` gives ``by`` (a tensor) or ``by(output)`` instead of its output.

    Parameters
    ----------
    net : the network, or anything that holds it as ``.net``.
    call : where a layer runs several times in a forward, the one run (from 0) that is replaced; default each.

    Raises
    ------
    UserError
        For an unknown layer, or one whose output is not a single tensor.
    """
    net = network_of(net)
    module = find_layer(net, layer)
    seen = 0

    def restart(module: nn.Module, args: Any) -> None:
        nonlocal seen
        seen = 0

    def replace(module: nn.Module, args: Any, output: Any) -> Tensor | None:
        nonlocal seen
        seen += 1
        if call is not None and seen != call + 1:
            return None
        output, layout = _single_tensor(layer, output), layout_of(module)
        values = by.clone() if isinstance(by, Tensor) else by(layout.read(output))
        return layout.write(values, output)

    handles = [net.register_forward_pre_hook(restart), module.register_forward_hook(replace)]
    try:
        yield net
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def watched(net: nn.Module, see: Callable[[str, nn.Module, Any], None]) -> Iterator[None]:
    """Inside the ``with``, ``see(name, module, output)`` is called for every run of every layer, with its first
    name.
    """

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, args, output: see(name, module, output)

    handles = [module.register_forward_hook(hook(name)) for name, module in net.named_modules() if name]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _single_tensor(layer: str, output: Any) -> Tensor:
    if not isinstance(output, Tensor):
        raise UserError(
            f"layer {layer!r} gives a {type(output).__name__}, not one tensor; choose one inside or after it"
        )
    return output


def _share_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()

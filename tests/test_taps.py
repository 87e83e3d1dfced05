"""Taps and replaced: what they read, when they stop, that they leave nothing behind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from netgloss.classifiers import Taps, replaced
from netgloss.classifiers.taps import watched
from netgloss.errors import UserError


class Steps(nn.Module):
    """x -> double (2x) -> shift (2x - 3) -> in-place ReLU -> double again -> last; counts how far it got."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = Scale(2.0)
        self.shift = Shift(-3.0)
        self.relu = nn.ReLU(inplace=True)
        self.last = Scale(10.0)
        self.unused = nn.Identity()
        self.pair = Pair()
        self.reached = 0

    def forward(self, x: Tensor) -> Tensor:
        self.reached = 1
        x = self.twice(x)
        x = self.relu(self.shift(x))
        self.reached = 2
        x = self.twice(x)
        self.reached = 3
        return self.last(self.pair(x)[0])


class Scale(nn.Module):
    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        return x * self.by


class Shift(Scale):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.by


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


X = torch.tensor([[1.0, 2.0, 4.0]])


def hooks(net: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())


@pytest.mark.parametrize("stop", [True, False])
def test_values_by_arithmetic_survive_inplace_relu(stop: bool) -> None:
    net = Steps()
    with Taps(net, ["shift", "relu", "twice"], stop=stop) as taps:
        for _ in range(3):
            acts = taps(X)
            assert list(acts) == ["shift", "relu", "twice"]
            assert acts["shift"].tolist() == [[-1, 1, 5]]
            assert acts["relu"].tolist() == [[0, 1, 5]]
            assert acts["twice"].tolist() == [[0, 2, 10]], "a layer that runs twice gives its last output"
            if not stop:
                assert taps.logits.tolist() == [[0, 20, 100]]
    assert taps.calls == {"shift": 1, "relu": 1, "twice": 2}
    assert X.tolist() == [[1, 2, 4]]


def test_stops_after_the_last_layer_needed() -> None:
    net = Steps()
    with Taps(net, ["shift"]) as taps:
        taps(X)
        assert net.reached == 3, "the first pass is a whole one, to count the calls"
        taps(X)
        assert net.reached == 1
    with Taps(net, ["twice", "shift"]) as taps:
        taps(X)
        taps(X)
        assert net.reached == 2, "stops in the second run of twice only"


def test_inplace_relu_that_reuses_its_input_is_kept_from_later_changes() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.same = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            shortcut = x * 1
            y = self.same(shortcut) * 3
            shortcut += 100
            return shortcut + y

    with Taps(Net(), ["same"], stop=False) as taps:
        assert taps(X)["same"].tolist() == X.tolist()
        assert taps.logits.tolist() == [[104, 108, 116]]


def test_hooks_vanish_on_exit_and_on_exceptions() -> None:
    net = Steps()
    with Taps(net, ["shift"]):
        assert hooks(net) == 1
    assert hooks(net) == 0
    with pytest.raises(RuntimeError, match="boom"), Taps(net, ["shift"]):
        raise RuntimeError("boom")
    with pytest.raises(TypeError), Taps(net, ["shift"], stop=False) as taps:
        taps("no tensor")
    with pytest.raises(RuntimeError, match="boom"), replaced(net, "shift", torch.zeros_like):
        raise RuntimeError("boom")
    with pytest.raises(RuntimeError, match="boom"), watched(net, lambda *_: None):
        raise RuntimeError("boom")
    assert hooks(net) == 0
    assert net(X).tolist() == [[0, 20, 100]]


def test_network_that_catches_exceptions_does_not_swallow_the_stop() -> None:
    class Catching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Scale(2.0)
            self.after = 0

        def forward(self, x: Tensor) -> Tensor:
            try:
                x = self.inner(x)
            except Exception:
                x = x * 0
            self.after += 1
            return x

    net = Catching()
    with Taps(net, "inner") as taps:
        assert taps(X)["inner"].tolist() == taps(X)["inner"].tolist() == [[2, 4, 8]]
    assert net.after == 1


def test_training_mode_and_statistics_are_untouched() -> None:
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)).train()
    with Taps(net, ["0"]) as taps:
        taps(torch.randn(4, 3))
    assert net.training
    assert net[0].training
    assert net[0].num_batches_tracked == 1, "the batch went through once"


def test_nested_and_several_taps_do_not_disturb_each_other() -> None:
    net = Steps()
    with Taps(net, ["shift"]) as outer, Taps(net, ["twice"]) as inner:
        for _ in range(2):
            assert outer(X)["shift"].tolist() == [[-1, 1, 5]]
            assert inner(X)["twice"].tolist() == [[0, 2, 10]]
        assert net(X).tolist() == [[0, 20, 100]], "taps that are open but not called let the forward run"


def test_gradients_flow_to_the_input_and_from_the_logits_to_the_reading() -> None:
    net = Steps()
    x = X.clone().requires_grad_()
    with Taps(net, ["shift"], stop=False) as taps:
        act = taps(x)["shift"]
        (by_act,) = torch.autograd.grad(taps.logits.sum(), act, retain_graph=True)
        (by_x,) = torch.autograd.grad(act.sum(), x)
    assert by_act.tolist() == [[0, 20, 20]]
    assert by_x.tolist() == [[2, 2, 2]]
    with torch.no_grad(), Taps(net, ["shift"]) as taps:
        assert not taps(x)["shift"].requires_grad


def test_inference_mode() -> None:
    with torch.inference_mode(), Taps(Steps(), ["shift", "twice"], stop=False) as taps:
        acts = taps(X)
        assert acts["shift"].tolist() == [[-1, 1, 5]]
        assert acts["twice"].is_inference()


def test_mistakes_are_told_in_one_line() -> None:
    net = Steps()
    with pytest.raises(UserError, match=r"no layer 'shfit'; did you mean shift"):
        Taps(net, ["shfit"])
    with pytest.raises(UserError, match=r"no layer ''"):
        Taps(net, [""])
    with pytest.raises(UserError, match="at least one layer"):
        Taps(net, [])
    with pytest.raises(UserError, match="never runs layer 'unused'"), Taps(net, ["unused"]) as taps:
        taps(X)
    with pytest.raises(UserError, match="'pair' gives a tuple"), Taps(net, ["pair"]) as taps:
        taps(X)
    with pytest.raises(UserError, match="inside a with block"):
        Taps(net, ["shift"])(X)
    with pytest.raises(UserError, match="did you mean"), replaced(net, "twise", X):
        pass
    assert hooks(net) == 0


def test_replaced_by_function_tensor_and_in_one_call() -> None:
    net = Steps()
    with replaced(net, "shift", lambda out: out + 1) as same:
        assert same is net
        assert net(X).tolist() == [[0, 40, 120]]
    given = torch.tensor([[-1.0, 7.0, 0.0]])
    with replaced(net, "shift", given):
        assert net(X).tolist() == [[0, 140, 0]]
    assert given.tolist() == [[-1, 7, 0]], "the in-place ReLU behind must not change what was passed"
    with replaced(net, "twice", lambda out: out * 0 + 5):
        assert net(X).tolist() == [[50, 50, 50]]
    for _ in range(2):
        with replaced(net, "twice", lambda out: out + 1, call=1):
            assert net(X).tolist() == net(X).tolist() == [[10, 30, 110]]
    assert net(X).tolist() == [[0, 20, 100]]


def test_one_module_under_two_names() -> None:
    net = nn.Sequential(Scale(2.0), nn.Linear(3, 3, bias=False))
    net.add_module("again", net[0])
    nn.init.eye_(net[1].weight)
    with Taps(net, ["0", "again"]) as taps:
        for _ in range(2):
            acts = taps(X)
            assert acts["0"].tolist() == acts["again"].tolist() == [[4, 8, 16]]

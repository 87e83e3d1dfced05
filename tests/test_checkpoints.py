"""Checkpoints as training scripts write them: the network's own logits come back, and what was chosen is said."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from netgloss.classifiers import load_classifier, load_from_spec
from netgloss.errors import UserError

NAME = "timm:resnet10t"
SIZE = 32


def network(classes: int = 1000, seed: int = 1) -> nn.Module:
    import timm

    torch.manual_seed(seed)
    net = timm.create_model("resnet10t", num_classes=classes).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)  # type: ignore[union-attr, operator]
    return net  # type: ignore[no-any-return]


def answers(net: Any) -> Tensor:
    images = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return net(images)  # type: ignore[no-any-return]


def load(path: str | Path, **options: Any) -> Any:
    return load_classifier(NAME, checkpoint=path, input_size=SIZE, **options)


OWN = {classes: network(classes) for classes in (7, 1000)}
PREFIXES = ("", "module.", "_orig_mod.", "model.", "net.", "module._orig_mod.", "model.backbone_and_head.")
NESTINGS = ((), ("state_dict",), ("model",), ("model_state_dict",), ("net",), ("model", "state_dict"))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(PREFIXES),
    st.sampled_from(NESTINGS),
    st.sampled_from(DTYPES),
    st.sampled_from((7, 1000)),
    st.booleans(),
    st.booleans(),
)
def test_every_form_of_a_checkpoint_gives_the_logits_of_its_network(
    prefix: str, nesting: tuple[str, ...], dtype: torch.dtype, classes: int, extras: bool, safetensors: bool
) -> None:
    state: dict[str, Any] = {
        prefix + name: v.to(dtype) if v.is_floating_point() else v for name, v in OWN[classes].state_dict().items()
    }
    if extras and prefix:
        state |= {"criterion.weight": torch.ones(3), "n_averaged": torch.tensor(5)}
    with tempfile.TemporaryDirectory() as folder:
        if safetensors:
            from safetensors.torch import save_file

            path = Path(folder) / "weights.safetensors"
            save_file({k: v.contiguous() for k, v in state.items()}, path, metadata={"epoch": "3", "format": "pt"})
        else:
            path = Path(folder) / "weights.pth"
            content: dict[str, Any] = state
            for key in reversed(nesting):
                content = {"epoch": 3, key: content, "optimizer": {"lr": 0.1}}
            torch.save(content, path)
        own = load(path)
    expected = answers(OWN[classes])
    loose = dtype != torch.float32
    torch.testing.assert_close(answers(own), expected, atol=0.1 if loose else 1e-5, rtol=0.1 if loose else 1e-5)
    assert own.num_classes == classes
    said = " / ".join(own.notes)
    assert ("computed with in float32" in said) == loose
    assert ("the head has 7 classes" in said) == (classes == 7)
    assert ("2 tensors of the file belong to no part of the network" in said) == (extras and bool(prefix))


@pytest.mark.parametrize("average", ["state_dict_ema", "model_ema", "ema", "ema_state_dict", "ema_model"])
def test_an_average_is_taken_before_the_weights_and_said(average: str, tmp_path: Path) -> None:
    raw, mean = network(seed=2), network(seed=3)
    path = tmp_path / "last.pth.tar"
    inner = mean.state_dict() if average != "ema" else {"state_dict": mean.state_dict(), "decay": 0.999}
    torch.save({"epoch": 3, "state_dict": raw.state_dict(), average: inner}, path)
    own = load(path)
    torch.testing.assert_close(answers(own), answers(mean))
    assert own.notes == [
        f"last.pth.tar holds weights (state_dict) and their moving average ({average}): the average is taken; "
        "last.pth.tar::state_dict takes the others"
    ]
    other = load(f"{path}::state_dict")
    torch.testing.assert_close(answers(other), answers(raw))
    assert other.notes == []
    again = load_from_spec(other.spec())
    torch.testing.assert_close(answers(again), answers(raw))
    with pytest.raises(UserError, match="has no state dict 'swa'; it has state_dict, "):
        load(f"{path}::swa")
    torch.save({"epoch": 3, average: inner}, path)
    assert load(path).notes == []


def test_a_head_of_another_size_is_rebuilt_only_where_the_name_allows_it(tmp_path: Path) -> None:
    path = tmp_path / "seven.pth"
    torch.save(OWN[7].state_dict(), path)
    own = load(path, class_names=list("abcdefg"))
    assert own.class_names == list("abcdefg")
    again = load_from_spec(own.spec())
    torch.testing.assert_close(answers(again), answers(OWN[7]))
    with pytest.raises(UserError, match="its head has 7 classes: pass num_classes"):
        load(path, num_classes=5)
    with pytest.raises(UserError, match="its head has 7 classes"):
        load_classifier(OWN[1000], checkpoint=path, input_size=SIZE, mean=(0.5,) * 3, std=(0.5,) * 3)
    broken = OWN[7].state_dict()
    del broken["bn1.weight"]
    torch.save(broken, path)
    with pytest.raises(UserError, match="does not fit the network"):
        load(path)

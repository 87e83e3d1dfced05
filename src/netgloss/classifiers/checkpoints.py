"""Reading weights from files: safetensors, or PyTorch state dicts without code in them."""

from __future__ import annotations

import hashlib
import pickle
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from netgloss.errors import UserError

WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
"""Keys under which training scripts store the state dict."""
PREFIXES = ("module.", "_orig_mod.", "model.", "net.")
"""What DataParallel, torch.compile and training wrappers put before every name."""


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a file, on the CPU; no code in the file is ever run.

    Raises
    ------
    UserError
        For a missing or unreadable file, a pickle with code, or a file without a state dict.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"checkpoint {path} is a folder; name the weights file inside it")
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist")
    other = _what_else(path)
    if other:
        raise UserError(f"checkpoint {path} {other}")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    for _ in range(2):
        wrapper = next((w for w in WRAPPERS if isinstance(content, dict) and isinstance(content.get(w), dict)), None)
        content = content if wrapper is None else content[wrapper]
    state = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, dict) else {}
    if not state or len(state) != len(content):
        what = f"a dict of {_few(content)}" if isinstance(content, dict) else f"a {type(content).__name__}"
        raise UserError(
            f"checkpoint {path} holds no state dict (tensors by name, bare or under {_few(WRAPPERS)}) but {what}"
        )
    return state


def load_weights(net: nn.Module, state: dict[str, Tensor], *, source: str | Path) -> None:
    """Fills every weight of ``net`` from ``state``, or says in one line what does not fit and leaves ``net`` as it
    was.
    """
    own = net.state_dict()
    state = _renamed(state, set(own))
    shapes = {
        k: (tuple(v.shape), tuple(own[k].shape)) for k, v in state.items() if k in own and v.shape != own[k].shape
    }
    if shapes:
        raise UserError(f"checkpoint {source} does not fit the network: {_shape_mismatch(shapes)}")
    optional = {name for name in own if name.endswith("num_batches_tracked")}
    missing = [name for name in own if name not in state and name not in optional]
    unexpected = [name for name in state if name not in own]
    if missing or unexpected:
        parts = [f"{len(n)} {w} ({_few(n)})" for n, w in ((missing, "missing"), (unexpected, "unexpected")) if n]
        raise UserError(f"checkpoint {source} does not fit the network: {' and '.join(parts)}")
    net.load_state_dict(state, strict=False)


def hash_weights(net: nn.Module) -> str:
    """sha256 (hex) over the names, dtypes, shapes and bytes of the state dict, sorted by name; the same on any
    device.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        if not isinstance(tensor, Tensor):  # the extra state of a module: whatever it likes
            digest.update(f"{name} {tensor!r}\n".encode())
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _what_else(path: Path) -> str:
    """What a file is that plainly holds no weights: an error page or a pointer that was saved in their place."""
    with path.open("rb") as file:
        head = file.read(512)
    start = head.lstrip().lower()
    if not head:
        return "is empty: was the download cut off?"
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")):
        return "is a web page, not weights: the download gave an error page or a sign-in form"
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the weights: fetch them with `git lfs pull`"
    if start.startswith((b"{", b"[")) and b"\0" not in head:
        return "is JSON text, not weights"
    if head.startswith(b"\x1f\x8b"):
        return "is compressed by gzip: unpack it first"
    return ""


def _read_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"checkpoint {path} is no readable safetensors file ({_line(error)})") from error


def _read_torch(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        blocked = re.search(r"GLOBAL (\S+)|(?:Unsupported|unsupported) class (\S+)", str(error))
        name = f" ({blocked.group(1) or blocked.group(2)})" if blocked else ""
        raise UserError(
            f"checkpoint {path} is a pickle with more than tensors in it{name} and is refused, because it could run "
            "code; save net.state_dict() or safetensors"
        ) from error
    except Exception as error:  # torch.load has no error of its own for a broken file
        what = (
            "is a TorchScript archive, not a state dict"
            if "TorchScript" in str(error)
            else "is no readable PyTorch file"
        )
        raise UserError(f"checkpoint {path} {what} ({_line(error)})") from error


def _renamed(state: dict[str, Tensor], own: set[str]) -> dict[str, Tensor]:
    """``state`` without the prefixes and old spellings that keep its names from being the network's own."""
    for _ in range(2):
        for prefix in PREFIXES:
            if all(name.startswith(prefix) for name in state) and not own & state.keys():
                state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    if not any(".denselayer" in name for name in state):
        return state
    old = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\.")  # torchvision's published DenseNets
    return {name if name in own else old.sub(r"\1\2.", name): tensor for name, tensor in state.items()}


def _shape_mismatch(shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]) -> str:
    mismatches = [
        f"{name} is {found} in the file, {own} in the network" for name, (found, own) in list(shapes.items())[:3]
    ]
    more = f" and {len(shapes) - 3} more" if len(shapes) > 3 else ""
    heads = {(found[0], own[0]) for found, own in shapes.values() if found and own and found[1:] == own[1:]}
    only_head = len(heads) == 1 and all(found and own and found[1:] == own[1:] for found, own in shapes.values())
    hint = f"; its head has {next(iter(heads))[0]} classes: pass num_classes" if only_head else ""
    return "; ".join(mismatches) + more + hint


def _few(names: Iterable[Any]) -> str:
    names = [str(name) for name in names]
    return ", ".join(names[:4]) + (" ..." if len(names) > 4 else "")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__

"""Reading weights from files: safetensors, or PyTorch state dicts without code in them.

Files are taken as training scripts write them: the state dict bare or under the usual keys, with an exponential moving
average (EMA) beside it, with what wrappers put before every name, in any float precision. Whatever is chosen or left
out becomes a note.
"""

from __future__ import annotations

import hashlib
import pickle
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from netgloss.errors import UserError

WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
"""Keys under which training scripts store the state dict."""
AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema")
"""Keys under which they store the moving average of the weights."""
KEY = "::"
"""Between a file and the key of the state dict in it: ``run.pth::state_dict_ema``."""


class OtherHeadError(UserError):
    """The weights fit but for a head of another number of classes."""

    def __init__(self, message: str, num_classes: int) -> None:
        super().__init__(message)
        self.num_classes = num_classes


def checkpoint_file(path: str | Path) -> tuple[Path, str]:
    """The file of a checkpoint, and the key of the state dict in it ("" if none is named)."""
    file, mark, key = str(path).rpartition(KEY)
    return (Path(file), key) if mark and not Path(path).exists() else (Path(path), "")


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a file, on the CPU; no code in the file is ever run.

    Parameters
    ----------
    path : the file, or ``FILE::KEY`` for one of several state dicts in it.

    Raises
    ------
    UserError
        For a missing or unreadable file, a pickle with code, or a file without a state dict.
    """
    return read_weights(path)[0]


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], list[str]]:
    """:func:`read_checkpoint`, and notes of what was chosen."""
    path, key = checkpoint_file(path)
    if path.is_dir():
        raise UserError(f"checkpoint {path} is a folder; name the weights file inside it")
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist")
    other = _what_else(path)
    if other:
        raise UserError(f"checkpoint {path} {other}")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    content, notes = _chosen(content, path, key)
    state = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, dict) else {}
    if not state or len(state) != len(content):
        what = f"a dict of {_few(content)}" if isinstance(content, dict) else f"a {type(content).__name__}"
        raise UserError(
            f"checkpoint {path} holds no state dict (tensors by name, bare or under {_few(WRAPPERS)}) but {what}"
        )
    low = sorted({str(v.dtype).removeprefix("torch.") for v in state.values() if v.dtype in _LOW})
    notes += [f"the weights in {path.name} are {' and '.join(low)}; they are computed with in float32"] if low else []
    return state, notes


_LOW = (torch.float16, torch.bfloat16)


def _chosen(content: Any, path: Path, key: str) -> tuple[Any, list[str]]:
    """The state dict among what a file holds: what ``key`` names, else an average of the weights, else the weights."""
    notes: list[str] = []
    if key:
        inner = content.get(key) if isinstance(content, dict) else None
        if not isinstance(inner, dict):
            known = [k for k, v in content.items() if isinstance(v, dict)] if isinstance(content, dict) else []
            raise UserError(f"checkpoint {path} has no state dict {key!r}; it has {_few(known) or 'none'}")
        content = inner
    for _ in range(3):
        if not isinstance(content, dict):
            break
        inner = [k for k in (*AVERAGES, *WRAPPERS) if isinstance(content.get(k), dict) and content[k]]
        if not inner:
            break
        if inner[0] in AVERAGES and len(inner) > 1:
            notes.append(
                f"{path.name} holds weights ({inner[-1]}) and their moving average ({inner[0]}): the average is taken; "
                f"{path.name}{KEY}{inner[-1]} takes the others"
            )
        content = content[inner[0]]
    return content, notes


def load_weights(net: nn.Module, state: dict[str, Tensor], *, source: str | Path) -> list[str]:
    """Fills every weight of ``net`` from ``state``, or says in one line what does not fit and leaves ``net`` as it was.

    Returns
    -------
    Notes of what of the file was left out.

    Raises
    ------
    UserError : names or shapes differ; :class:`OtherHeadError` where the head alone is of another size.
    """
    own = net.state_dict()
    state, notes = _renamed(state, own)
    shapes = {
        k: (tuple(v.shape), tuple(own[k].shape)) for k, v in state.items() if k in own and v.shape != own[k].shape
    }
    if shapes:
        message, classes = _shape_mismatch(shapes)
        message = f"checkpoint {source} does not fit the network: {message}"
        raise OtherHeadError(message, classes) if classes and set(state) >= _required(own) else UserError(message)
    missing = [name for name in own if name not in state and name in _required(own)]
    unexpected = [name for name in state if name not in own]
    if missing or unexpected:
        parts = [f"{len(n)} {w} ({_few(n)})" for n, w in ((missing, "missing"), (unexpected, "unexpected")) if n]
        raise UserError(f"checkpoint {source} does not fit the network: {' and '.join(parts)}")
    net.load_state_dict(state, strict=False)
    return notes


def _required(own: Mapping[str, Any]) -> set[str]:
    return {name for name in own if not name.endswith("num_batches_tracked")}


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


def _renamed(state: dict[str, Tensor], own: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[str]]:
    """``state`` without the prefix and old spellings that keep its names from being the network's own.

    A prefix (``module.``, ``_orig_mod.``, ``model.`` or any other) is what stands before all names of the network. What
    a training module holds besides the network (a loss with weights, a counter of averages) is left out, with a note.
    """
    old = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\.")  # torchvision's published DenseNets
    if any(".denselayer" in name for name in state):
        state = {name if name in own else old.sub(r"\1\2.", name): tensor for name, tensor in state.items()}
    required = _required(own)
    if not required or required <= state.keys():
        return state, []
    first = next(name for name in own if name in required)
    for name in state:
        prefix = name.removesuffix(first)
        if prefix != name and all(prefix + other in state for other in required):
            kept = {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
            left = [n for n in state if not n.startswith(prefix)]
            notes = [f"{len(left)} tensors of the file belong to no part of the network: {_few(left)}"] if left else []
            return kept, notes
    return state, []


def _shape_mismatch(shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]) -> tuple[str, int]:
    """What differs, and the number of classes of the file's head if it is the head alone (else 0)."""
    mismatches = [
        f"{name} is {found} in the file, {own} in the network" for name, (found, own) in list(shapes.items())[:3]
    ]
    more = f" and {len(shapes) - 3} more" if len(shapes) > 3 else ""
    heads = {(found[0], own[0]) for found, own in shapes.values() if found and own and found[1:] == own[1:]}
    only_head = len(heads) == 1 and all(found and own and found[1:] == own[1:] for found, own in shapes.values())
    classes = next(iter(heads))[0] if only_head else 0
    hint = f"; its head has {classes} classes: pass num_classes" if only_head else ""
    return "; ".join(mismatches) + more + hint, classes


def _few(names: Iterable[Any]) -> str:
    names = [str(name) for name in names]
    return ", ".join(names[:4]) + (" ..." if len(names) > 4 else "")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__

"""Reads the files of dictionaries made elsewhere: arrays and a few words, nothing that runs code.

Sizes are checked before anything is read, objects and pickles are refused, and whatever is wrong with a file is one
line.
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from netgloss.errors import UserError

LIMIT = 8 << 30
"""Bytes that the arrays of one dictionary may have."""
_JSON_LIMIT = 4 << 20


@dataclass
class Arrays:
    """Named arrays and words of one dictionary."""

    origin: str
    arrays: dict[str, Any] = field(default_factory=dict)
    words: dict[str, str] = field(default_factory=dict)

    def has(self, name: str) -> bool:
        return name in self.arrays or name in self.words

    def tensor(self, name: str) -> Tensor:
        """A float32 tensor without NaN or Inf."""
        if name in self.words and name not in self.arrays:
            try:
                return torch.tensor(float(self.words[name]))
            except ValueError:
                raise UserError(f"{name} of {self.origin} must be a number, got {self.words[name]!r}") from None
        if name not in self.arrays:
            raise UserError(f"{self.origin} has no array {name!r}; it has {', '.join(sorted(self.arrays)) or 'none'}")
        value = self.arrays[name]
        if isinstance(value, np.ndarray):
            if value.dtype.kind not in "fiub":
                raise UserError(f"{name} of {self.origin} must hold numbers, got {value.dtype}")
            value = torch.from_numpy(np.ascontiguousarray(value))
        if value.is_complex():
            raise UserError(f"{name} of {self.origin} must hold real numbers, got {value.dtype}")
        value = value.float().cpu().contiguous()
        if not value.isfinite().all():
            raise UserError(f"{name} of {self.origin} holds NaN or Inf")
        return value

    def text(self, name: str) -> str:
        """A word: an option, metadata, or a text array of one entry; "" if there is none."""
        if name in self.words:
            return self.words[name].strip().lower()
        value = self.arrays.get(name)
        if isinstance(value, np.ndarray) and value.dtype.kind in "US" and value.size == 1:
            word = value.reshape(())[()]
            return (word.decode("utf-8", "replace") if isinstance(word, bytes) else str(word)).strip().lower()
        return ""

    def texts(self, name: str) -> list[str] | None:
        """A text array (N,), or None."""
        value = self.arrays.get(name)
        if value is None:
            return None
        if not (isinstance(value, np.ndarray) and value.dtype.kind in "US" and value.ndim == 1):
            raise UserError(f"{name} of {self.origin} must be texts of shape (N,)")
        return [v.decode("utf-8", "replace") if isinstance(v, bytes) else str(v) for v in value]

    def integer(self, name: str) -> int:
        """A whole number; 0 if there is none."""
        if not self.has(name):
            return 0
        value = self.tensor(name)
        if value.numel() != 1 or float(value) != int(value):
            raise UserError(f"{name} of {self.origin} must be one whole number")
        return int(value)


def read_arrays(given: Any) -> Arrays:
    """Arrays of ``path[,name=value...]`` (see ``foreign.py``), or of a dict in memory."""
    if isinstance(given, dict):
        return Arrays("the given arrays", {n: v for n, v in given.items() if not isinstance(v, str)}, {
            n: v for n, v in given.items() if isinstance(v, str)
        })  # fmt: skip
    text, words = str(given), {}
    path = Path(text)
    if not path.exists() and "," in text:
        first, *options = text.split(",")
        path = Path(first)
        for option in options:
            name, equals, value = option.partition("=")
            if not equals or name.strip() not in ("activation", "k", "threshold"):
                raise UserError(f"a dictionary's options are activation=, k= and threshold=, got {option!r}")
            words[name.strip()] = value.strip()
    if not path.exists():
        raise UserError(f"no dictionary at {path}")
    try:
        found = _read(path)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path} cannot be read: {' '.join(str(error).split())[:200] or type(error).__name__}"
        ) from error
    found.words |= words
    return found


def _read(path: Path) -> Arrays:
    if path.is_dir():
        return _saelens(path)
    if path.suffix == ".npz":
        return Arrays(path.name, _npz(path))
    if path.suffix == ".safetensors":
        tensors, words = _safetensors(path)
        if "dictionary._weights" in tensors:
            return _overcomplete(path.name, tensors, words)
        return _common_names(Arrays(path.name, dict(tensors), words))
    raise UserError(
        f"{path} is no .npz, .safetensors or SAELens folder (pickles, .pt or .pth, are refused: reading one runs code)"
    )


def _npz(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:
        total = sum(info.file_size for info in archive.infolist())
    if total > LIMIT:
        raise UserError(f"{path} unpacks to {total / 2**30:.1f} GiB; at most {LIMIT / 2**30:.0f} GiB are read")
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def _safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    if path.stat().st_size > LIMIT:
        raise UserError(f"{path} has {path.stat().st_size / 2**30:.1f} GiB; at most {LIMIT / 2**30:.0f} GiB are read")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path} is not a readable safetensors file: {error}") from error


def _common_names(found: Arrays) -> Arrays:
    """The names that SAELens and others use for the same things."""
    for other, name in (("W_dec", "dictionary"), ("b_dec", "bias")):
        if name not in found.arrays and other in found.arrays:
            found.arrays[name] = found.arrays[other]
    return found


def _saelens(folder: Path) -> Arrays:
    """A folder that SAELens wrote: ``cfg.json`` and ``sae_weights.safetensors``."""
    config = folder / "cfg.json"
    if not config.is_file():
        raise UserError(
            f"{folder} has no cfg.json: only SAELens folders (cfg.json, sae_weights.safetensors) can be read"
        )
    if config.stat().st_size > _JSON_LIMIT:
        raise UserError(f"{config} is too large for a SAELens config")
    cfg = json.loads(config.read_text(encoding="utf-8"))
    if not isinstance(cfg, dict):
        raise UserError(f"{config} must hold an object")
    tensors, _ = _safetensors(folder / "sae_weights.safetensors")
    found = _common_names(Arrays(folder.name, dict(tensors)))
    for name, value in (("normalize_activations", "none"), ("finetuning_scaling_factor", False),
                        ("rescale_acts_by_decoder_norm", False), ("reshape_activations", "none")):  # fmt: skip
        if cfg.get(name, value) not in (value, None):
            raise UserError(f"{folder}: SAELens option {name} = {cfg[name]!r} is not supported (only {value!r})")
    kind = str(cfg.get("architecture", "standard"))
    function = str(cfg.get("activation_fn", cfg.get("activation_fn_str", "relu")))
    known = {"standard": function, "topk": "topk", "batchtopk": "jumprelu", "jumprelu": "jumprelu"}
    if kind not in known or known[kind] not in ("relu", "topk", "jumprelu"):
        raise UserError(
            f"{folder}: SAELens architecture {kind!r} with {function!r} is not supported (standard, topk, jumprelu)"
        )
    found.words["activation"] = known[kind]
    more = cfg.get("activation_fn_kwargs") or {}
    k = cfg.get("k", more.get("k") if isinstance(more, dict) else None)
    if known[kind] == "topk" and k is not None:
        found.words["k"] = str(k)
    if cfg.get("apply_b_dec_to_input", True) and "b_dec" in tensors:
        found.arrays["b_pre"] = tensors["b_dec"]
    for name, axis in (("d_in", 1), ("d_sae", 0)):
        shape = tuple(tensors["W_dec"].shape)
        if name in cfg and len(shape) == 2 and cfg[name] != shape[axis]:
            raise UserError(f"{folder}: cfg.json says {name} = {cfg[name]}, but W_dec is {shape}")
    return found


def _overcomplete(origin: str, tensors: dict[str, Tensor], words: dict[str, str]) -> Arrays:
    """The state dict of an overcomplete SAE with its linear encoder; ``z = act(norm(W x + b))``, ``x^ = z D``."""
    if any(name.startswith("encoder.mlp_blocks.") for name in tensors) or "encoder.final_block.0.weight" not in tensors:
        raise UserError(
            f"{origin}: only overcomplete's linear encoder can be read from a file; pass the module in Python"
        )
    weight, bias = (tensors[f"encoder.final_block.0.{name}"].double() for name in ("weight", "bias"))
    norm = {n.rsplit(".", 1)[1]: v.double() for n, v in tensors.items() if n.startswith("encoder.final_block.1.")}
    if norm:
        if "running_var" not in norm:
            raise UserError(f"{origin}: only batch norm can be folded into the encoder; pass the module in Python")
        scale = norm["weight"] / (norm["running_var"] + 1e-5).sqrt()
        weight, bias = weight * scale[:, None], (bias - norm["running_mean"]) * scale + norm["bias"]
    arrays: dict[str, Any] = {
        "dictionary": tensors["dictionary._weights"] * tensors.get("dictionary.multiplier", torch.zeros(())).exp(),
        "W_enc": weight.T,
        "b_enc": bias,
    }
    if "thresholds" in tensors:
        arrays["threshold"] = tensors["thresholds"].exp()
    return Arrays(origin, arrays, words)

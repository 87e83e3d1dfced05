"""Dictionaries made elsewhere, scored by the same code as netgloss's own methods.

    x^ = z D + b                    D (K, C), b (C,)

and z comes from an encoder or from a table. What can be read (nothing is ever unpickled):

- ``file.npz`` or ``file.safetensors`` with ``dictionary`` (K, C), ``bias`` (C,; default 0), and one of

  - ``codes`` (N, K), or (N, K, H, W) for the maps of a map layer: one subject an image of the store, in its order, or
    in the order of ``ids`` (N,) if these are given; codes (N, K) of a map layer rebuild its mean over the grid;
  - ``W_enc`` (C, K), ``b_enc`` (K,; default 0), and an ``activation``: relu, topk (with ``k``), jumprelu (with
    ``threshold`` (K,) or ()), none. ``b_pre`` (C,; default 0) is subtracted from x first;
  - ``activation`` = lstsq (least squares) or nnls (non-negative least squares): codes that fit the dictionary best.

- a folder with ``cfg.json`` and ``sae_weights.safetensors``, as SAELens writes it (standard, topk, jumprelu);
- ``file.safetensors`` with the state dict of an overcomplete SAE with its linear encoder (batch norm is folded in); say
  the activation, which it does not hold;
- in Python, the module itself: anything with ``encode`` (codes, or a tuple that ends with them) and ``get_dictionary``.

``activation``, ``k`` and ``threshold`` may be arrays of the file, metadata of a safetensors file, or follow the path:
``NAME=file.safetensors,activation=topk,k=32``.

Shape letters: N images of the store, B images, R rows, C features, K concepts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from netgloss.errors import UserError
from netgloss.evaluation.foreign_files import Arrays, read_arrays
from netgloss.evaluation.judge import reason_of
from netgloss.evaluation.subjects import Subject
from netgloss.explainers.base import Explainer, ExplainerConfig, LayerSpec
from netgloss.explainers.nmf import nonnegative_codes
from netgloss.progress import Progress

if TYPE_CHECKING:
    from netgloss.activations import Store

ACTIVATIONS = ("relu", "topk", "jumprelu", "none", "lstsq", "nnls")


@dataclass(frozen=True)
class ForeignConfig(ExplainerConfig):
    """What is known of a dictionary made elsewhere."""

    origin: str = ""
    """Where it comes from."""
    activation: str = "relu"
    """What follows the linear encoder, or how codes are found without one."""
    top_k: int = 0
    """Codes that a row may use, for topk."""


class ForeignDictionary(Explainer):
    """A linear decoder from elsewhere, with a linear encoder and an activation (module docstring).

    Attributes
    ----------
    atoms, offset : buffers (K, C) and (C,), the decoder.
    encoder, encoder_bias, before : buffers (C, K), (K,) and (C,), what z is read with.
    threshold : buffer (K,), for jumprelu.
    """

    Config = ForeignConfig
    deterministic = True
    config: ForeignConfig
    atoms: Tensor
    offset: Tensor
    encoder: Tensor
    encoder_bias: Tensor
    before: Tensor
    threshold: Tensor

    def __init__(self, config: ForeignConfig, spec: LayerSpec, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(config, spec)
        for name, value in tensors.items():
            self.register_buffer(name, value)

    @property
    def dictionary(self) -> Tensor:
        """(K, C)."""
        return self.atoms

    def decode_rows(self, codes: Tensor) -> Tensor:
        """Codes (R, K) -> rows (R, C)."""
        return torch.addmm(self.offset, codes.to(self.atoms.dtype), self.atoms)

    def encode_rows(self, rows: Tensor) -> Tensor:
        """Rows (R, C) -> codes (R, K)."""
        rows = rows.to(self.atoms.dtype)
        kind = self.config.activation
        if kind == "lstsq":
            return (rows - self.offset) @ torch.linalg.pinv(self.atoms)
        if kind == "nnls":
            with torch.no_grad():
                return nonnegative_codes(self.atoms @ (rows - self.offset).T, self.atoms @ self.atoms.T).T
        pre = torch.addmm(self.encoder_bias, rows - self.before, self.encoder)
        if kind == "topk":
            values, index = pre.topk(self.config.top_k, dim=1, sorted=False)
            return torch.zeros_like(pre).scatter(1, index, values.relu())
        if kind == "jumprelu":
            return torch.where(pre > self.threshold, pre, 0)
        return pre.relu() if kind == "relu" else pre


class ForeignCodes(ForeignDictionary):
    """A linear decoder from elsewhere with a table of codes, one subject an image of the store.

    ``encode`` of an activation is undefined; ``concepts_of_images`` looks codes up.
    """

    table: Tensor

    def concepts_of_images(self, index: Tensor) -> Tensor:
        """Codes (B, K[, H, W]) of images (B,) of the store."""
        return self.table[index.to(self.table.device)]

    def encode_rows(self, rows: Tensor) -> Tensor:
        raise UserError("this dictionary came with codes of the store's images: it cannot encode anything else")


class PooledForeignCodes(ForeignCodes):
    """The same where the codes are of a map layer's mean."""

    reads = "pooled"


class ForeignModule(Explainer):
    """A module with ``encode`` and ``get_dictionary`` (an overcomplete model, say), in eval mode."""

    Config = ForeignConfig
    deterministic = True

    def __init__(self, config: ForeignConfig, spec: LayerSpec, module: nn.Module, atoms: Tensor) -> None:
        super().__init__(config, spec)
        self.module = module
        self.register_buffer("atoms", atoms)

    atoms: Tensor

    @property
    def dictionary(self) -> Tensor:
        """(K, C)."""
        return self.atoms

    def encode_rows(self, rows: Tensor) -> Tensor:
        """Rows (R, C) -> codes (R, K)."""
        return _codes_of(self.module.encode(rows))  # type: ignore[operator]

    def decode_rows(self, codes: Tensor) -> Tensor:
        """Codes (R, K) -> rows (R, C)."""
        return codes.to(self.atoms.dtype) @ self.atoms


def foreign_subjects(
    dictionaries: Mapping[str, Any], store: Store, spec: LayerSpec, progress: Progress
) -> list[Subject]:
    """A row of the comparison for each dictionary; one that cannot be read has the reason."""
    subjects = []
    for name, given in dictionaries.items():
        origin = str(given) if not isinstance(given, nn.Module) else type(given).__name__
        subject = Subject(name, origin, kind="foreign")
        subjects.append(subject)
        try:
            explainer = load_dictionary(given, store, spec)
        except Exception as error:
            subject.reason = reason_of(error)
            progress.say(f"{name}: left out: {subject.reason}")
            continue
        subject.explainers, subject.seeds = [explainer.eval()], [0]
        assert isinstance(explainer.config, ForeignConfig)
        config = explainer.config
        subject.config = {"activation": config.activation, **({"top_k": config.top_k} if config.top_k else {})}
    return subjects


def load_dictionary(given: Any, store: Store, spec: LayerSpec) -> Explainer:
    """A dictionary made elsewhere as an explainer of the layer.

    Parameters
    ----------
    given : a path with options (``"file.npz,activation=nnls"``), a dict of arrays, or a module.

    Raises
    ------
    UserError : a file that is missing, malformed, a pickle, or does not fit the layer.
    """
    if isinstance(given, nn.Module) or (hasattr(given, "encode") and hasattr(given, "get_dictionary")):
        return _module(given, spec)
    arrays = given if isinstance(given, Arrays) else read_arrays(given)
    return _linear(arrays, store, spec)


def _codes_of(encoded: Any) -> Tensor:
    codes = encoded[-1] if isinstance(encoded, tuple | list) else encoded
    if not isinstance(codes, Tensor):
        raise UserError(f"encode must give codes, or a tuple that ends with them; got {type(encoded).__name__}")
    return codes


def _module(module: Any, spec: LayerSpec) -> Explainer:
    if isinstance(module, nn.Module):
        module = module.eval().cpu()
    atoms = torch.as_tensor(module.get_dictionary()).detach().float().cpu()
    _check_atoms(atoms, spec, "get_dictionary()")
    with torch.no_grad():
        codes = _codes_of(module.encode(torch.zeros(2, spec.num_features)))
    if codes.shape != (2, len(atoms)):
        raise UserError(
            f"encode of 2 rows gave codes {tuple(codes.shape)}, but the dictionary has {len(atoms)} concepts"
        )
    config = ForeignConfig(num_concepts=len(atoms), origin=type(module).__name__, activation="its own")
    return ForeignModule(config, spec, module, atoms.clone())


def _linear(arrays: Arrays, store: Store, spec: LayerSpec) -> Explainer:
    atoms = arrays.tensor("dictionary")
    _check_atoms(atoms, spec, f"the dictionary of {arrays.origin}")
    k, c = atoms.shape
    tensors = {"atoms": atoms, "offset": _vector(arrays, "bias", c, 0.0)}
    if arrays.has("codes"):
        table = arrays.tensor("codes")
        pooled = _check_codes(table, arrays, store, spec, k)
        tensors["table"] = _aligned(table, arrays, store)
        config = ForeignConfig(num_concepts=k, origin=arrays.origin, activation="codes")
        return (PooledForeignCodes if pooled else ForeignCodes)(config, spec, tensors)
    kind = arrays.text("activation")
    if arrays.has("W_enc"):
        kind = kind or ("jumprelu" if arrays.has("threshold") else "topk" if arrays.has("k") else "")
        if kind not in ACTIVATIONS[:4]:
            raise UserError(
                f"{arrays.origin} has an encoder: say its activation, relu, topk, jumprelu or none; got {kind!r}"
            )
        encoder = arrays.tensor("W_enc")
        if encoder.shape == (k, c) and k != c:
            encoder = encoder.T.contiguous()
        if encoder.shape != (c, k):
            raise UserError(f"W_enc of {arrays.origin} must be (C, K) = ({c}, {k}), got {tuple(encoder.shape)}")
        tensors |= {
            "encoder": encoder,
            "encoder_bias": _vector(arrays, "b_enc", k, 0.0),
            "before": _vector(arrays, "b_pre", c, 0.0),
        }
    elif kind not in ACTIVATIONS[4:]:
        raise UserError(
            f"{arrays.origin} holds a dictionary, but neither codes nor an encoder (W_enc): give one of them, or "
            "activation = lstsq or nnls"
        )
    top_k = arrays.integer("k") if kind == "topk" else 0
    if kind == "topk" and not 1 <= top_k <= k:
        raise UserError(f"{arrays.origin}: topk needs k in 1 .. {k}, got {top_k or 'none'}")
    if kind == "jumprelu":
        if not arrays.has("threshold"):
            raise UserError(f"{arrays.origin}: jumprelu needs a threshold of shape ({k},) or one number")
        tensors["threshold"] = _vector(arrays, "threshold", k, 0.0)
    return ForeignDictionary(ForeignConfig(k, arrays.origin, kind, top_k), spec, tensors)


def _check_atoms(atoms: Tensor, spec: LayerSpec, what: str) -> None:
    if atoms.ndim != 2 or len(atoms) == 0 or atoms.shape[1] != spec.num_features:
        expected = f"(K, C) with C = {spec.num_features} features of layer {spec.name!r}"
        raise UserError(f"{what} must be {expected}, got {tuple(atoms.shape)}")
    if not atoms.isfinite().all():
        raise UserError(f"{what} holds NaN or Inf")


def _vector(arrays: Arrays, name: str, size: int, default: float) -> Tensor:
    if not arrays.has(name):
        return torch.full((size,), default)
    value = arrays.tensor(name)
    if value.numel() == 1:
        value = value.reshape(()).expand(size).contiguous()
    if value.shape != (size,):
        raise UserError(f"{name} of {arrays.origin} must have the shape ({size},), got {tuple(value.shape)}")
    return value


def _check_codes(table: Tensor, arrays: Arrays, store: Store, spec: LayerSpec, k: int) -> bool:
    """True if the codes are of the mean over the grid."""
    grid = store.shapes[spec.name][1:]
    ids = arrays.texts("ids")
    expected = len(store) if ids is None else len(ids)
    if table.ndim not in (2, 4) or table.shape[:2] != (expected, k) or (table.ndim == 4 and table.shape[2:] != grid):
        maps = f" or ({expected}, {k}, {grid[0]}, {grid[1]})" if grid else ""
        raise UserError(f"codes of {arrays.origin} must be ({expected}, {k}){maps}, got {tuple(table.shape)}")
    return table.ndim == 2 and bool(grid)


def _aligned(table: Tensor, arrays: Arrays, store: Store) -> Tensor:
    """Codes in the store's order."""
    ids = arrays.texts("ids")
    if ids is None:
        return table
    place = {name: i for i, name in enumerate(ids)}
    missing = [store.ids[i] for i in store.valid if store.ids[i] not in place]
    if missing or len(place) != len(ids):
        problem = (
            f"has no codes for {len(missing)} images of the store ({missing[0]}, ...)" if missing else "repeats ids"
        )
        raise UserError(f"{arrays.origin} {problem}")
    return table[torch.from_numpy(np.array([place.get(name, 0) for name in store.ids]))]

"""What identifies a store, what else it records, and how large it gets."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class StoreKey:
    """What a store's content depends on; two stores with equal keys hold equal numbers."""

    weights_hash: str
    preprocessing: dict[str, Any]
    layers: tuple[str, ...]
    data_fingerprint: str
    dtype: str = "float16"
    logits: bool = True
    positions: int | None = None
    seed: int = 0
    precision: str = "float32"
    """Of the forward; part of the address only if it is another, as stores made before it was there have none."""
    pool: str = "mean"
    """What is read of tokens, the patches or ("cls") the class token; part of the address only if it is another."""

    @property
    def address(self) -> str:
        """Hex digest of the key."""
        fields = dataclasses.asdict(self)
        if self.precision == "float32":
            del fields["precision"]
        if self.pool == "mean":
            del fields["pool"]
        text = json.dumps(fields, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StoreKey:
        return cls(**{**values, "layers": tuple(values["layers"])})

    def differences(self, other: StoreKey) -> list[str]:
        """One phrase per field in which ``other`` differs."""
        names = {"weights_hash": "network's weights", "data_fingerprint": "images", "dtype": "dtype"}
        found = []
        for f in dataclasses.fields(self):
            mine, theirs = getattr(self, f.name), getattr(other, f.name)
            if mine != theirs:
                brief = [
                    str(v)[:12] if f.name in ("weights_hash", "data_fingerprint") else str(v) for v in (mine, theirs)
                ]
                found.append(f"{names.get(f.name, f.name)}: {brief[0]} in the store, {brief[1]} asked for")
        return found


@dataclass(frozen=True)
class StoreInfo:
    """What else a store remembers: enough to load the classifier and the images again."""

    model: dict[str, Any] = field(default_factory=dict)
    images: dict[str, Any] = field(default_factory=dict)
    class_names: tuple[str, ...] = ()
    created_with: dict[str, str] = field(default_factory=dict)


def stored_shape(shape: Sequence[int], positions: int | None) -> tuple[int, ...]:
    """Per-image shape on disk of a layer of ``shape`` (C,) or (C, H, W)."""
    if len(shape) == 3 and positions is not None and positions < shape[1] * shape[2]:
        return (positions, shape[0])
    return tuple(shape)


def estimate_bytes(shapes: Mapping[str, Sequence[int]], num_images: int, *, dtype: str, positions: int | None) -> int:
    """Bytes before compression."""
    per_image = sum(int(np.prod(stored_shape(s, positions))) for s in shapes.values())
    return per_image * num_images * np.dtype(dtype).itemsize

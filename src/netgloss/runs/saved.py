"""Fitted explainers from their files.

A file that anybody may have written must not run code, take memory that it only claims to need, or fail with a
traceback.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from netgloss.errors import UserError
from netgloss.trust import check_code

if TYPE_CHECKING:
    from torch import Tensor, nn

    from netgloss.classifiers import Classifier
    from netgloss.explainers.base import Explainer, ExplainerConfig, LayerSpec


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except FileNotFoundError:
        raise UserError(f"{path.parent} has no {path.name}: the fit has not ended; run its command again") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable safetensors file: {error}") from error


_DAMAGED = (KeyError, TypeError, ValueError, RuntimeError, AttributeError, ArithmeticError, LookupError, MemoryError)
"""What values of the wrong kind, from a file that anybody may have written, make fail."""


def _check_shapes(
    cls: type[Explainer], config: ExplainerConfig, spec: LayerSpec, tensors: Mapping[str, Tensor]
) -> None:
    """Builds the explainer without memory first: sizes that the file only claims must not be allocated."""
    import torch

    try:
        with torch.device("meta"):
            claimed = cls(config, spec).state_dict()
    except (NotImplementedError, RuntimeError):  # a method whose constructor computes values
        return
    wrong = [name for name, value in claimed.items() if name not in tensors or tensors[name].shape != value.shape]
    if wrong:
        raise ValueError(f"{', '.join(wrong[:3])} missing or not of the shape that its config says")


def load_explainer(path: str | Path, *, classifier: Classifier | None = None) -> Explainer:
    """A fitted explainer from its safetensors file.

    Parameters
    ----------
    classifier : for methods that hold a copy of a part of the network, the network; default: its structure is built by
        the name that the file remembers (no checkpoint is needed: the weights are in the file).
    """
    from netgloss.explainers.base import LayerSpec
    from netgloss.explainers.names import config_from_dict, find_explainer

    tensors, header = read_safetensors(Path(path))
    check_code(header.get("method", ""), str(path))
    try:
        cls = find_explainer(header["method"])
        fields = json.loads(header["spec"])
        spec: LayerSpec = LayerSpec(
            **{
                **fields,
                "shape": tuple(fields["shape"]),
                "image": tuple(fields["image"]),
                "upper": {name: tuple(shape) for name, shape in fields["upper"].items()},
            }
        )
        config = config_from_dict(cls, json.loads(header["config"]))
        _check_shapes(cls, config, spec, tensors)
        explainer = cls(config, spec)
        if "section" in cls.needs(config):
            explainer.adopt(_section(Path(path), json.loads(header.get("model", "{}")), spec, classifier))
        explainer.load_state_dict(tensors)
        notes = [str(note) for note in json.loads(header.get("notes", "[]"))]
    except _DAMAGED as error:
        if isinstance(error, UserError):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path} is not an explainer of netgloss: {reason}") from error
    explainer.notes = notes  # type: ignore[assignment]
    return explainer.eval()


def _section(path: Path, model: dict[str, Any], spec: LayerSpec, classifier: Classifier | None) -> nn.Module:
    from netgloss.classifiers import section_from_spec, section_of

    if classifier is not None:
        return section_of(classifier, spec.name, list(spec.upper)).cpu()
    try:
        return section_from_spec(model, spec.name, list(spec.upper))
    except UserError as error:
        raise UserError(
            f"{path} holds a copy of a part of its network, which cannot be built again: {error}"
        ) from error

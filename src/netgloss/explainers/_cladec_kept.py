"""The best weights of a fit so far, kept with its state."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn


class KeptWeights(nn.Module):
    """The best weights so far; empty before and after a fit. Part of a checkpoint, so that resuming is exact."""

    def offer(self, name: str, module: nn.Module, score: float) -> None:
        """Copies ``module`` if its score is the lowest yet."""
        mark = f"{name}|"
        if not score < float(self._buffers.get(mark, torch.tensor(math.inf))):  # type: ignore[arg-type]
            return
        self.register_buffer(mark, torch.tensor(score, dtype=torch.float64))
        for key, value in module.state_dict().items():
            self.register_buffer(mark + key.replace(".", "|"), value.detach().clone())

    def restore(self, owner: nn.Module) -> None:
        """Puts the best weights back into the modules of ``owner`` and forgets them."""
        for name in {key.split("|")[0] for key in self._buffers}:
            module = owner.get_submodule(name)
            module.load_state_dict(
                {key: self._buffers[f"{name}|{key.replace('.', '|')}"] for key in module.state_dict()}
            )
        self._buffers.clear()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for key, value in state_dict.items():
            if key.startswith(prefix):
                self.register_buffer(key[len(prefix) :], value.clone())
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

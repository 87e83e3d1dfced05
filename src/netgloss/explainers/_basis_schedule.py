"""When the interpretable basis halves its learning rate and when it stops: by the loss alone.

Private to ``explainers/``. The state lives in one buffer, so that a resumed fit goes on exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_WINDOW, _LONG_WINDOW = 100, 200
_PATIENCE = _COOLDOWN = 2
_THRESHOLD = 1e-3
_SMALLEST_LR = 1e-5
_NAMES = ("sum", "long_sum", "count", "best", "bad", "cooldown", "scale", "previous", "still")


class Plateau(nn.Module):
    """Halves the rate when the 100-step mean loss has not improved by 0.1 % for more than two windows (two windows of
    cooldown); converged after two changes of the 200-step mean loss below 0.1 %, or a rate below 1e-5.

    Attributes
    ----------
    state : buffer (9,), the numbers named in this module.
    """

    state: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("state", torch.zeros(len(_NAMES)))
        self.reset()

    def reset(self) -> None:
        """Back to the start."""
        self.state.zero_()
        self.state[_NAMES.index("scale")] = 1.0

    @property
    def lr_scale(self) -> float:
        """Factor on the learning rate."""
        return float(self.state[_NAMES.index("scale")])

    def add(self, loss: float) -> None:
        """One more step's loss."""
        s = dict(zip(_NAMES, self.state.tolist(), strict=True))
        s["sum"] += loss
        s["long_sum"] += loss
        s["count"] += 1
        if s["count"] % _WINDOW == 0:
            self._short(s, s["sum"] / _WINDOW)
            s["sum"] = 0.0
        if s["count"] % _LONG_WINDOW == 0:
            mean = s["long_sum"] / _LONG_WINDOW
            small = s["count"] > _LONG_WINDOW and abs(mean - s["previous"]) < _THRESHOLD * abs(s["previous"])
            s["still"] = s["still"] + 1 if small else 0
            s["previous"], s["long_sum"] = mean, 0.0
        self.state.copy_(torch.tensor([s[name] for name in _NAMES]))

    def converged(self, lr: float) -> bool:
        """True if there is nothing left to gain, for a base rate ``lr``."""
        return bool(self.state[_NAMES.index("still")] >= 2) or lr * self.lr_scale < _SMALLEST_LR

    @staticmethod
    def _short(s: dict[str, float], mean: float) -> None:
        """torch's ReduceLROnPlateau (mode min, relative threshold) on one window's mean."""
        if s["count"] == _WINDOW or mean < s["best"] - _THRESHOLD * abs(s["best"]):
            s["best"], s["bad"] = mean, 0
        else:
            s["bad"] += 1
        if s["cooldown"] > 0:
            s["cooldown"] -= 1
            s["bad"] = 0
        if s["bad"] > _PATIENCE:
            s["scale"] *= 0.5
            s["cooldown"], s["bad"] = _COOLDOWN, 0

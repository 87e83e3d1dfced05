"""SRAE's networks, many side by side in one batched model, and its loss terms. Private to ``explainers/``.

Shape letters: G modules, B images, D features of the layer, J and H hidden widths, N x-features, C classes of a module.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OFFSET = 1e-8
"""Added to every contribution before pull-away, as in the published code."""


def hidden_widths(num_features: int) -> tuple[int, int]:
    """(J, H): 800 and 100, smaller for layers of fewer than 1600 or 200 features."""
    first = max(1, min(800, num_features // 2))
    return first, min(100, first)


class _Decayed(torch.autograd.Function):
    """``baddbmm(bias, values, weight)`` whose gradients hold ``decay`` times the parameters: Adam's weight decay.

    One product gives the weight's gradient with its decay; as a loss term the decay takes half the time of a step.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, bias: Tensor, decay: float) -> Tensor:
        ctx.save_for_backward(values, weight, bias)
        ctx.decay = decay
        return torch.baddbmm(bias, values, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        values, weight, bias = ctx.saved_tensors
        (grad,) = grads
        back = torch.bmm(grad, weight.transpose(1, 2)) if ctx.needs_input_grad[0] else None
        own = torch.baddbmm(weight, values.transpose(1, 2), grad, beta=ctx.decay)
        return back, own, grad.sum(dim=1, keepdim=True).add_(bias, alpha=ctx.decay), None


class Linears(nn.Module):
    """G linear layers side by side: (B, in) or (G, B, in) -> (G, B, out).

    In training mode the parameters' gradients hold ``decay`` times the parameters.
    """

    decay = 0.0

    def __init__(self, num_modules: int, width_in: int, width_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_modules, width_in, width_out))
        self.bias = nn.Parameter(torch.zeros(num_modules, 1, width_out))

    def forward(self, values: Tensor, active: Tensor | None = None) -> Tensor:
        """``active`` (A,) picks the modules to run; the input and output then have A modules."""
        weight: Tensor = self.weight
        bias: Tensor = self.bias
        if active is not None:
            weight, bias = weight[active], bias[active]
        if values.ndim == 2:
            values = values.expand(len(weight), -1, -1)
        if self.training and self.decay:
            return cast(Tensor, _Decayed.apply(values, weight, bias, self.decay))
        return torch.baddbmm(bias, values, weight)

    def draw(self, module: int, generator: torch.Generator) -> None:
        """Initial values of one module, uniform in +-1 / sqrt(in) as torch's ``nn.Linear`` has them."""
        with torch.no_grad():
            for parameter in (self.weight, self.bias):
                bound = 1 / math.sqrt(self.weight.shape[1])
                fresh = torch.empty(parameter.shape[1:]).uniform_(-bound, bound, generator=generator)
                parameter[module].copy_(fresh)


class Modules(nn.Module):
    """G explanation modules: encoder D-J-H-N, decoder N-H-J-D, head N-C; all ReLU but the head.

    ``rectified`` says whether the decoder ends in a ReLU too: only then can it rebuild nothing below zero.
    """

    def __init__(self, num_modules: int, num_features: int, num_x: int, num_classes: int, *, rectified: bool) -> None:
        super().__init__()
        first, second = hidden_widths(num_features)
        widths = (num_features, first, second, num_x)
        pairs = list(itertools.pairwise(widths))
        self.encoder = nn.ModuleList(Linears(num_modules, a, b) for a, b in pairs)
        self.decoder = nn.ModuleList(Linears(num_modules, b, a) for a, b in reversed(pairs))
        self.head = Linears(num_modules, num_x, num_classes)
        self.rectified = rectified

    def encode(self, scaled: Tensor, active: Tensor | None = None, *, depth: int = 3, dropout: float = 0.0) -> Tensor:
        """(B, D) -> output of the first ``depth`` encoder layers (G, B, .); dropout follows the first one."""
        values = scaled
        for i, layer in enumerate(self.encoder[:depth]):
            values = layer(values, active).relu()
            if i == 0 and dropout:
                values = F.dropout(values, dropout)
        return values

    def decode(self, x: Tensor, active: Tensor | None = None) -> Tensor:
        """(G, B, N) -> (G, B, D)."""
        for i in range(3):
            x = self.decode_layer(i, x, active)
        return x

    def decode_layer(self, i: int, values: Tensor, active: Tensor | None = None) -> Tensor:
        """One decoder layer with its ReLU."""
        values = self.decoder[i](values, active)
        return values.relu() if i < 2 or self.rectified else values

    def set_decay(self, decay: float) -> None:
        """Weight decay of all layers in training mode."""
        for layer in (*self.encoder, *self.decoder, self.head):
            layer.decay = decay

    def draw(self, module: int, seed: int) -> None:
        """Initial values of one module; they depend on ``seed`` only."""
        generator = torch.Generator().manual_seed(seed)
        for layer in (*self.encoder, *self.decoder, self.head):
            layer.draw(module, generator)


def faith(rebuilt: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of the scores, (G,), of (G, B, C) each."""
    assert rebuilt.shape == target.shape, f"scores {tuple(rebuilt.shape)} and targets {tuple(target.shape)}"
    return (rebuilt - target).square().mean(dim=(1, 2))


def squared_error(rebuilt: Tensor, values: Tensor) -> Tensor:
    """Mean squared error of each feature over the images, (G, D), of (G, B, D) and (B, D)."""
    assert rebuilt.shape[1:] == values.shape, f"rebuilt {tuple(rebuilt.shape)} and activations {tuple(values.shape)}"
    return (rebuilt - values).square().mean(dim=1)


def sparse_reconstruction(error: Tensor, q: float) -> Tensor:
    """``mean_k log(1 + q error_k)``, (G,), of per-feature errors (G, D): the log sees means over images."""
    return torch.log1p(q * error).mean(dim=1)


def pull_away(rows: Tensor) -> Tensor:
    """Mean squared cosine of all pairs of the R rows (..., R, M), (...,); 0 for a single row (EBGAN)."""
    count = rows.shape[-2]
    if count < 2:
        return rows.new_zeros(rows.shape[:-2])
    unit = F.normalize(rows, dim=-1, eps=1e-30)
    gram = unit @ unit.transpose(-1, -2)
    off = gram.square().sum(dim=(-1, -2)) - gram.diagonal(dim1=-2, dim2=-1).square().sum(dim=-1)
    return off / (count * (count - 1))


def contribution_table(x: Tensor, weight: Tensor) -> Tensor:
    """``v_cl x_l + 1e-8`` as (G, C, B, N), of x (G, B, N) and head weights (G, N, C)."""
    return x[:, None] * weight.transpose(1, 2)[:, :, None] + OFFSET

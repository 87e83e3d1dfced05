"""SRAE: a sparse reconstruction autoencoder that explains a class's score by a few x-features.

For a vector Z of the layer (a map is averaged over its grid), scaled by one number, and class scores y of the network,
standardised over the fit images::

    x = E(Z)        D - 800 - 100 - n, ReLU after every layer (x >= 0)
    Z~ = D(x)       n - 100 - 800 - D, ReLU (the last one only where the layer is never negative)
    y~ = V x + b
    loss = a_p mean (y~ - y)^2  +  a_r (1/D) sum_k log(1 + q m_k)  +  a_t PT  +  (decay / 2) |parameters|^2

m_k is the batch's mean squared error of feature k: the logarithm lets the decoder give up on features that it cannot
rebuild. PT is the pull-away term, the mean squared cosine of pairs of x-features over the batch (``features``) or of
images over x-features (``images``). The contribution of x-feature l to class c is c_l = v_cl x_l; they and the bias
add up to y~.

Every class has a module of its own; all are trained side by side in one batched model, each as if it were alone.
``joint`` makes one module for all classes. An attempt is 3/17 of its steps greedy pre-training of the three layer
pairs, 1/17 the linear head, and the rest joint training with a tenth of the learning rate after 40, 80 and 120 of 130
parts. It is accepted if, over the fit images, at least two x-features contribute on average above zero and the second
at least 0.3 of the first; otherwise it is tried again with a_r times 1.2 and a_t times 0.8. ``notes`` say how often.
A joint module is accepted if half of its classes pass.

Sources: Qi, Khorram & Fuxin, "Embedding Deep Networks into Visual Explanations", Artificial Intelligence 292, 2021
(arXiv 1709.05360); Hamidi-Haines et al., arXiv 1812.07150; the published training code for widths, weights, schedule
and the restart rule. Ours: scaled Z and standardised y (a_p = 40 corresponds to the published 1 at the logit variance
of that code's data), positives in every batch, and the repair: before the head and before joint training, x-features
that are zero on all positives are redrawn so that they are on for half of them, and once more early in joint
training in modules where all are. Left out: convolutional
autoencoders.

Shape letters: B images, D features of the layer, K concepts, G modules, N x-features of a module, C classes of
a module.

SRAE's networks, many side by side in one batched model, and its loss terms. Private to ``explainers/``.

Shape letters: G modules, B images, D features of the layer, J and H hidden widths, N x-features, C classes of a module.
"""

from __future__ import annotations

import bisect
import itertools
import math
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from netgloss.errors import UserError
from netgloss.explainers.base import Batch, LayerSpec, Rows, TrainingConfig
from netgloss.explainers.class_scores import ClassScores, class_name, decisions

# faith, reconstruction, pull-away
_WEIGHTS: dict[str, tuple[float, float, float]] = {
    "srae": (40, 15, 5),
    "released": (40, 10, 10),
    "no-pull-away": (40, 15, 0),
    "sae": (40, 300, 0),
    "sae-pt": (40, 300, 5),
    "nn": (40, 0, 0),
    "nn-pt": (40, 0, 5),
}


@dataclass(frozen=True)
class SRAEConfig(TrainingConfig):
    """Options of :class:`SRAE`."""

    num_concepts: int = 5
    """Number n of x-features of each module (12 suits a joint one)."""
    classes: tuple[str, ...] = ()
    """Classes to explain: names, WordNet ids or indices; default the ten that the images show most."""
    joint: bool = False
    """One module for all classes instead of one each."""
    preset: Literal["srae", "released", "no-pull-away", "sae", "sae-pt", "nn", "nn-pt"] = "srae"
    """Objective: the method, the setting of the released code, or an ablation; gives the weights that are left open."""
    weight_faith: float | None = None
    """Weight a_p of the class scores' error."""
    weight_reconstruction: float | None = None
    """Weight a_r of the reconstruction."""
    weight_pull_away: float | None = None
    """Weight a_t of the pull-away term."""
    q: float = 100.0
    """Sharpness of the sparse reconstruction: a feature counts half at a mean squared error of 1/q."""
    positives: float = 0.2
    """Share of every batch drawn from each class's images (all classes together at most 0.8); 0 draws evenly."""
    attempts: int = 5
    """Fits of a module at most, until it is accepted; 1 takes the first as it is."""
    repair: bool = True
    """Redraw x-features that are dead after pre-training."""
    dropout: float = 0.02
    """Dropout after the first encoder layer."""
    weight_decay: float = 1e-4
    """Weight of the squared parameters in joint training."""
    shuffle_logits: bool = False
    """Control: give every image of the fit the scores of another one."""
    steps: int = 3400
    """Optimiser steps of an attempt (170 epochs of 1,000 images)."""
    batch_size: int = 50
    """Images a step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preset not in _WEIGHTS:
            raise UserError(f"preset must be one of {', '.join(_WEIGHTS)}, got {self.preset!r}")
        for name in ("weight_faith", "weight_reconstruction", "weight_pull_away", "weight_decay"):
            if (value := getattr(self, name)) is not None and not value >= 0:
                raise UserError(f"{name} must not be negative, got {value}")
        if not self.q > 0:
            raise UserError(f"q must be positive, got {self.q}")
        if self.attempts < 1:
            raise UserError(f"attempts must be at least 1, got {self.attempts}")
        for name in ("positives", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")

    @property
    def weights(self) -> tuple[float, float, float]:
        """``(a_p, a_r, a_t)`` with the preset's values where they are open."""
        chosen = (self.weight_faith, self.weight_reconstruction, self.weight_pull_away)
        faith_, rebuild, pull = (p if c is None else c for c, p in zip(chosen, _WEIGHTS[self.preset], strict=True))
        return faith_, rebuild, pull


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


_PAIRS, _HEAD, _JOINT = 3, 3, 4  # stages: three layer pairs, the head, all together
_MAX_BALANCE = 0.8


class SRAE(ClassScores):
    """Sparse reconstruction autoencoders (module docstring). Concept ``g * n + l`` is x-feature l of module g.

    ``decode`` gives the mean of the modules' reconstructions; ``decode_modules`` gives each.

    Attributes
    ----------
    class_index : (classes,) indices of the explained classes.
    scale, target_mean, target_sd : buffers () and (classes,): what Z and y are divided by.
    tries, accepted : buffers (G,): attempts evaluated, and whether the module passed.
    notes : plain sentences about the last fit.

    Raises
    ------
    UserError : no or unknown classes; a class without images; constant scores; a store without logits.
    """

    Config = SRAEConfig
    learned = True
    config: SRAEConfig
    scale: Tensor
    target_mean: Tensor
    target_sd: Tensor
    tries: Tensor
    accepted: Tensor
    weight_rebuild: Tensor
    weight_pull: Tensor
    seed: Tensor

    def __init__(self, config: SRAEConfig, spec: LayerSpec) -> None:
        super().__init__(config, spec)
        total = len(self.class_index)
        self.num_modules = 1 if config.joint else total
        self.nets = Modules(
            self.num_modules,
            spec.num_features,
            config.num_concepts,
            total // self.num_modules,
            rectified=spec.nonnegative,
        )
        count = self.num_modules
        buffers = {
            "scale": torch.ones(()),
            "target_mean": torch.zeros(total),
            "target_sd": torch.ones(total),
            "tries": torch.zeros(count, dtype=torch.long),
            "accepted": torch.zeros(count, dtype=torch.bool),
            "weight_rebuild": torch.full((count,), float(config.weights[1])),
            "weight_pull": torch.full((count,), float(config.weights[2])),
            "seed": torch.zeros((), dtype=torch.long),
        }
        for name, value in buffers.items():
            self.register_buffer(name, value)
        self._live = 0.0

    # -- images explained -----------------------------------------------------------------------------------------

    @property
    def num_concepts(self) -> int:
        """K = G n."""
        return self.num_modules * self.config.num_concepts

    def name_concepts(self) -> list[str]:
        """``tench x1``; ``x1`` for a joint module."""
        owners = [""] if self.config.joint else [f"{class_name(text)} " for text in self.config.classes]
        return [f"{owner}x{i + 1}" for owner in owners for i in range(self.config.num_concepts)]

    def encode_rows(self, rows: Tensor) -> Tensor:
        """(B, D) -> x-features (B, K)."""
        x_GBN = self.nets.encode(self._scaled(rows))
        return x_GBN.permute(1, 0, 2).flatten(1)

    def encoder_chain(self, concept: int) -> tuple[nn.Sequential, int]:
        """The encoder (B, D) -> (B, N) of the module that ``concept`` belongs to, a copy, and its place there."""
        g, unit = divmod(concept, self.config.num_concepts)
        layers: list[nn.Module] = []
        for i, wide in enumerate(cast(list[Linears], list(self.nets.encoder))):
            layer = nn.Linear(wide.weight.shape[1], wide.weight.shape[2], device=self.scale.device)
            layer.load_state_dict({"weight": wide.weight[g].T / (1 if i else self.scale), "bias": wide.bias[g, 0]})
            layers += [layer, nn.ReLU()]
        return nn.Sequential(*layers), unit

    def decode_modules(self, concepts: Tensor) -> Tensor:
        """Concepts (B, K) -> the reconstruction of each module, (G, B, D)."""
        return self.nets.decode(self._by_module(concepts)) * self.scale

    def class_weights(self) -> tuple[Tensor, Tensor]:
        """Weights (K, classes) and biases (classes,) of the rebuilt logits, which are affine in the concepts."""
        v_GNC = self.nets.head.weight
        weight_KC = v_GNC[0] if self.config.joint else torch.block_diag(*v_GNC)
        bias_C = self.nets.head.bias.flatten()
        return weight_KC * self.target_sd, bias_C * self.target_sd + self.target_mean

    def _by_module(self, concepts: Tensor) -> Tensor:
        """(B, K) -> (G, B, N)."""
        return concepts.unflatten(1, (self.num_modules, self.config.num_concepts)).permute(1, 0, 2)

    def _scaled(self, rows: Tensor) -> Tensor:
        return rows.to(self.scale.dtype) / self.scale

    # -- the fit --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def fit_rows(self, rows: Rows, *, seed: int) -> None:
        """Scales of Z and y over the fit images, and initial values that depend on the seed and the class only."""
        self.notes.clear()
        z_ND, y_NC, _ = self.read_fit(rows, seed=seed)
        self.scale.fill_(z_ND.double().square().mean().sqrt())
        self.target_mean.copy_(y_NC.mean(dim=0))
        self.target_sd.copy_(y_NC.std(dim=0, correction=0))
        self.seed.fill_(seed)
        self.tries.zero_()
        self.accepted.zero_()
        self.weight_rebuild.fill_(self.config.weights[1])
        self.weight_pull.fill_(self.config.weights[2])
        for g in range(self.num_modules):
            self.nets.draw(g, self._seed_of(g))

    @property
    def max_steps(self) -> int:
        return self.config.steps * self.config.attempts

    @property
    def balance(self) -> tuple[tuple[int, ...], float]:
        return tuple(self.class_index), min(_MAX_BALANCE, self.config.positives * len(self.class_index))

    def lr_scale(self, step: int) -> float:
        """1, but 0.1, 0.01, 0.001 after 40, 80, 120 of 130 parts of joint training."""
        start = self._starts[_JOINT]
        done = (step % self.config.steps - start) / (self.config.steps - start)
        return 0.1 ** int(max(0.0, done) * 130 / 40)

    @torch.no_grad()
    def before_step(self, step: int, rows: Rows) -> Literal["go", "reset", "stop"]:
        """Judges and restarts at the end of an attempt, repairs at the start of a stage; both reset the optimiser."""
        if self.config.shuffle_logits and self._shuffled is None:  # a fit that continues
            self.read_fit(rows, seed=int(self.seed))
        at = step % self.config.steps
        if at == 0 and step > 0:
            self._judge(rows)
            if self.accepted.all():
                return "stop"
            for g in self._active().tolist():
                self.weight_rebuild[g] *= 1.2
                self.weight_pull[g] *= 0.8
                self.nets.draw(g, self._seed_of(g))
        if self.config.repair and at in self._starts[_HEAD:]:
            self._repair(rows, step)
        elif self.config.repair and at == self._second_look:
            self._repair(rows, step, silent_only=True)
        return "reset" if at in self._starts else "go"

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The terms of the stage that ``batch.step`` lies in, summed over the modules in training."""
        z_BD = self._scaled(batch.activation)
        active = self._active() if self.accepted.any() else None
        stage = self._stage(batch.step)
        self.nets.set_decay(self.config.weight_decay if stage == _JOINT else 0.0)
        if stage < _PAIRS:
            with torch.no_grad():
                given = self.nets.encode(z_BD, active, depth=stage) if stage else z_BD
            code = self.nets.encoder[stage](given, active).relu()
            rebuilt = self.nets.decode_layer(2 - stage, code, active)
            return {"pair": (rebuilt - given).square().flatten(1).mean(dim=1).sum()}
        y_BC = (self.targets(batch) - self.target_mean) / self.target_sd
        y_GBC = y_BC[None] if self.config.joint else y_BC.T[:, :, None]
        y_GBC = y_GBC if active is None else y_GBC[active]
        if stage == _HEAD:
            with torch.no_grad():
                x_GBN = self.nets.encode(z_BD, active)
            return {"head": faith(self.nets.head(x_GBN, active), y_GBC).sum()}
        return self._joint_losses(z_BD, y_GBC, active)

    def _joint_losses(self, z_BD: Tensor, y_GBC: Tensor, active: Tensor | None) -> dict[str, Tensor]:
        modules, config = self.nets, self.config
        x_GBN = modules.encode(z_BD, active, dropout=config.dropout if self.training else 0.0)
        self._live = float((x_GBN > 0).any(dim=1).float().sum(dim=1).mean())
        rebuild = self.weight_rebuild if active is None else self.weight_rebuild[active]
        pull = self.weight_pull if active is None else self.weight_pull[active]
        terms = {"faith": config.weights[0] * faith(modules.head(x_GBN, active), y_GBC).sum()}
        if rebuild.any():
            error_GD = squared_error(modules.decode(x_GBN, active), z_BD)
            term_G = (
                sparse_reconstruction(error_GD, config.q)
                if not config.preset.startswith("sae")
                else error_GD.mean(dim=1)
            )
            terms["reconstruction"] = (rebuild * term_G).sum()
        if pull.any():
            head = modules.head.weight if active is None else modules.head.weight[active]
            table_GCBN = contribution_table(x_GBN, head)
            rows = table_GCBN.transpose(-1, -2) if config.preset != "released" else table_GCBN
            terms["pull_away"] = (pull * pull_away(rows).sum(dim=1)).sum()
        return terms

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.config.lr, fused=True)

    def after_step(self, step: int) -> dict[str, float]:
        """Live x-features a module in the last batch."""
        return {"live": self._live}

    @torch.no_grad()
    def after_fit(self, rows: Rows) -> None:
        """Judges the last attempt and notes restarts, refusals and dead x-features."""
        if not self.accepted.all():
            self._judge(rows)
        repeated = int((self.tries > 1).sum())
        if repeated:
            self.notes.append(
                f"{repeated} of {self.num_modules} module(s) were trained again because one x-feature carried nearly "
                f"everything (attempts: {', '.join(map(str, self.tries.tolist()))})"
            )
        refused = [name for name, ok in zip(self._module_names(), self.accepted.tolist(), strict=True) if not ok]
        if refused:
            self.notes.append(
                f"not accepted after {self.config.attempts} attempt(s), one x-feature carries nearly everything: "
                f"{', '.join(refused)}"
            )
        dead = [int((hidden <= 0).all(dim=0).sum()) for hidden in self._positives(rows, 3)]
        listed = [f"{name} {count}" for name, count in zip(self._module_names(), dead, strict=True) if count]
        if listed:
            count = self.config.num_concepts
            self.notes.append(
                f"x-features (of {count}) that are zero on all images of their class: {', '.join(listed)}"
            )

    # -- restart and repair ---------------------------------------------------------------------------------------

    @property
    def _starts(self) -> list[int]:
        """First step of each stage."""
        return [self.config.steps * k // 17 for k in range(5)]

    def _stage(self, step: int) -> int:
        return bisect.bisect_right(self._starts, step % self.config.steps) - 1

    def _active(self) -> Tensor:
        """(A,) modules that are still to be accepted."""
        return (~self.accepted).nonzero().flatten()

    def _seed_of(self, g: int) -> int:
        owner = self.spec.num_classes if self.config.joint else self.class_index[g]
        return ((int(self.seed) << 24) ^ (owner << 4)) + int(self.tries[g])

    def _module_names(self) -> list[str]:
        return ["the joint module"] if self.config.joint else [class_name(text) for text in self.config.classes]

    def _judge(self, rows: Rows) -> None:
        """Counts an attempt of each module in training and applies the rule of the module docstring."""
        total, count = torch.zeros((), dtype=torch.float64), 0
        weight_KC, _ = self.class_weights()
        for batch in rows.examples():
            total = total.to(self.scale.device) + self.encode_rows(batch.activation.to(self.scale.device)).sum(
                dim=0, dtype=torch.float64
            )
            count += len(batch.activation)
        mean_KC = (total / count)[:, None] * weight_KC.double()
        mean_GNC = mean_KC[None] if self.config.joint else self._blocks(mean_KC)
        top = mean_GNC.sort(dim=1, descending=True).values
        second = top[:, 1] if top.shape[1] > 1 else top[:, 0]  # a single x-feature cannot fail the rule
        passed_GC = (second > 0) & (second >= 0.3 * top[:, 0])
        active = self._active()
        self.tries[active] += 1
        self.accepted[active] = passed_GC.double().mean(dim=1)[active] >= 0.5

    def _blocks(self, table_KC: Tensor) -> Tensor:
        """The rows of each module and the column of its class, (G, N, 1)."""
        n = self.config.num_concepts
        return torch.stack([table_KC[g * n : (g + 1) * n, g, None] for g in range(self.num_modules)])

    def _positives(self, rows: Rows, depth: int) -> list[Tensor]:
        """Each module's encoder output at ``depth`` on the images of its own classes, (P, .)."""
        found: list[list[Tensor]] = [[] for _ in range(self.num_modules)]
        for batch in rows.examples():
            z_BD, decided = self._scaled(batch.activation.to(self.scale.device)), decisions(batch)
            for g in range(self.num_modules):
                own = torch.tensor(self.class_index if self.config.joint else self.class_index[g : g + 1])
                mask = torch.isin(decided, own).to(z_BD.device)
                found[g].append(self.nets.encode(z_BD[mask], torch.tensor([g], device=z_BD.device), depth=depth)[0])
        return [torch.cat(parts) for parts in found]

    @property
    def _second_look(self) -> int:
        """Step of an attempt, 10 of 130 parts into joint training, after which a silent module would stay silent."""
        return self._starts[_JOINT] + (self.config.steps - self._starts[_JOINT]) * 10 // 130

    def _repair(self, rows: Rows, step: int, *, silent_only: bool = False) -> None:
        """Redraws x-features that are zero on all positives: on for half of them, as strong as the others.

        A hidden layer that says nothing about the positives is redrawn first. ``silent_only`` leaves modules alone
        whose x-features distinguish them.
        """
        layer = cast(Linears, self.nets.encoder[2])
        hidden = self._positives(rows, 2)
        chosen = self._active().tolist()
        if silent_only:
            codes = self._positives(rows, 3)
            chosen = [g for g in chosen if _is_silent(codes[g])]
        emptied = [g for g in chosen if _is_silent(hidden[g])]
        for depth in (1, 2) if emptied else ():
            found = self._positives(rows, depth)
            for g in emptied:
                if _is_silent(found[g]):
                    generator = torch.Generator().manual_seed(self._seed_of(g) ^ (step << 40) ^ depth)
                    cast(Linears, self.nets.encoder[depth - 1]).draw(g, generator)
        hidden = self._positives(rows, 2) if emptied else hidden
        for g in chosen:
            before = hidden[g] @ layer.weight[g] + layer.bias[g]
            dead = (before <= 0).all(dim=0)
            if not dead.any() or not hidden[g].any():
                continue
            generator = torch.Generator().manual_seed(self._seed_of(g) ^ (step << 40))
            typical = before[:, ~dead].relu().mean() if not dead.all() else before.new_ones(())
            longest = layer.weight[g].norm(dim=0).max().clamp_min(1)
            for i in dead.nonzero().flatten().tolist():
                direction = torch.randn(layer.weight.shape[1], generator=generator).to(before)
                response = hidden[g] @ direction
                wanted = typical / (response - response.median()).relu().mean()
                direction = direction * wanted.clamp_max(longest / direction.norm())
                layer.weight[g, :, i] = direction
                layer.bias[g, 0, i] = -(hidden[g] @ direction).median()
                bound = self.config.num_concepts**-0.5
                for incoming in (cast(Linears, self.nets.decoder[0]).weight[g, i], self.nets.head.weight[g, i]):
                    incoming.copy_(torch.empty(incoming.shape).uniform_(-bound, bound, generator=generator))


def _is_silent(values: Tensor) -> bool:
    """True if no unit (P, .) distinguishes the images: all are off, or on by their biases alone."""
    if len(values) < 2:
        return not bool(values.any())
    return bool((values.amax(dim=0) - values.amin(dim=0) <= 1e-6 * values.amax()).all())

"""Interpretable basis: an unsupervised rotation of a layer's space whose axes are sparse, confident detectors.

With the mean mu and the standard deviation sigma of each feature over the fit rows (sigma at least 1e-3), an orthogonal
W (D, D) and one bias b and one margin M > 0 for all detectors::

    xhat = (x - mu) / sigma            z = W^T xhat                          encode (signed; 0 is the data mean)
    y    = sigmoid((z - b) / M)        on = z > b                            assign
    x    = mu + sigma (W z)                                                  decode, the exact inverse
    loss = lambda_s L_s + lambda_ma L_ma + lambda_mm L_mm + lambda_ic L_ic + lambda_net L_net    (_basis_losses.py)

In raw space detector i is the filter v_i = w_i / (sigma M), its decoding direction d_i = sigma w_i, and its signal
vector s_i = Cov[x, z_i] / Var[z_i] over the fit rows where it is on. A filter reads a concept, a signal vector writes
it.

W runs through torch's Cayley parametrisation with a moving base (``use_trivialization``), re-based every 200 steps.
Presets: ``uibe`` the first three terms; ``cbe`` adds L_ic with the published tau 0.9 and gamma 1.1 and L_net, which
needs the tail of the network; ``default`` is UIBE with L_ic at tau 5 and gamma 3. tau > 1 leaves the published range:
it is ours. Without L_ic the objective kills most detectors when it runs to convergence.

Sources: Doumanoglou, Asteriadis & Zarpalas, "Unsupervised Interpretable Basis Extraction for Concept-Based Visual
Explanations", IEEE Trans. AI 5(4), 2024 (arXiv 2303.10523); "Concept Basis Extraction for Latent Space Interpretation
of Image Classifiers", VISAPP 2024; the weights 2.6 / 2.8 / 0.6 / 5 from arXiv 2509.23926.

``whiten`` puts xhat = C^(-1/2) (x - mu) / sigma, C the correlations, in place of the standardised rows (filters,
directions and signal vectors follow).

Left out: the terms of arXiv 2509.23926 for bases that are not orthogonal. L_net sees the maps of the images that the
fit loop draws for a step (16), not of 64.

Shape letters: N rows, D features of the layer, I = D detectors.

The terms of the interpretable basis: what makes a rotated space readable, as pure functions of logits.

With logits l_i = (z_i - b) / M of the I detectors of a row, y = sigmoid(l), q = y / sum_j y_j, log base 2, E_p the mean
over rows and E_i over detectors::

    L_s  = E_p[-sum_i q_i log2 q_i]         sparsity, 0 .. log2 I; 2^L_s = effective concepts of a row      (UIBE)
    L_ma = E_p[-sum_i q_i log2 y_i]         maximum activation; = L_s - E_p[log2 sum_i y_i]                 (UIBE)
    L_mm = E_i[1 / M_i]                     maximum margin                                                  (UIBE)
    L_ic = E_i[ReLU(nu - E_p[y_i^gamma]) / nu],  nu = tau / I       inactive classifier                     (CBE)
    L_net = -E[H(f+(x'))]                  network: without the concepts (x', ``network_step``) the rest of the network
                                           f+ is undecided; H the entropy of the softmax                   (CBE, EDDP)

Sources: UIBE = Doumanoglou, Asteriadis & Zarpalas, IEEE Trans. AI 5(4), 2024 (arXiv 2303.10523); CBE = the same
authors, VISAPP 2024. The equations are as their follow-up (arXiv 2509.23926) restates them.

Shape letters: N rows, I detectors.

When the interpretable basis halves its learning rate and when it stops: by the loss alone.

The state lives in one buffer, so that a resumed fit continues exactly.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal

from netgloss.errors import UserError
from netgloss.explainers.base import Batch, ExplainerConfig, LayerSpec, Rows, TrainingConfig, from_rows, to_rows
from netgloss.explainers.rows import RowsExplainer, feature_moments

_PRESETS = {"uibe": (0.0, 5.0, 3.0, 0.0), "cbe": (5.0, 0.9, 1.1, 0.25), "default": (5.0, 5.0, 3.0, 0.0)}
"""lambda_ic, tau, gamma, lambda_net."""


@dataclass(frozen=True)
class InterpretableBasisConfig(TrainingConfig):
    """Options of :class:`InterpretableBasis`."""

    num_concepts: int = 0
    """Always the number of features of the layer; 0 says so."""
    steps: int = 2000
    """Number of optimiser steps at most; the fit ends earlier when its loss stops falling."""
    batch_size: int = 4096
    """Rows a step."""
    lr: float = 3e-3
    """Learning rate of Adam; halved when the loss reaches a plateau."""
    preset: Literal["default", "uibe", "cbe"] = "default"
    """Published objective (uibe, cbe) or ours; gives the options below that are left open."""
    lambda_s: float = 2.6
    """Weight of sparsity."""
    lambda_ma: float = 2.8
    """Weight of maximum activation."""
    lambda_mm: float = 0.6
    """Weight of maximum margin."""
    lambda_ic: float | None = None
    """Weight of the floor under each detector's activity (preset uibe: 0, else 5)."""
    tau: float | None = None
    """The floor, in detectors a row if all sat on it: about the mean actives of a row (cbe: 0.9, default: 5)."""
    gamma: float | None = None
    """Power that keeps weak responses from meeting the floor (cbe: 1.1, default: 3)."""
    lambda_net: float | None = None
    """Weight of the network term: what the detectors see must decide the prediction (preset cbe: 0.25, else 0)."""
    network: Literal["cnn", "uur"] = "cnn"
    """How the network term takes concepts out: every positive detector to its boundary (cnn), or a random part of the
    direction to all boundaries at once (uur)."""
    whiten: bool = False
    """Start from uncorrelated features instead of standardised ones."""
    shared: bool = True
    """One bias and one margin for all detectors; otherwise one each."""
    init: Literal["haar", "identity"] = "haar"
    """Start from a random rotation, or from the layer's own axes."""

    def __post_init__(self) -> None:
        if self.num_concepts < 0:
            raise UserError(f"num_concepts must be 0 (the number of features) or that number, got {self.num_concepts}")
        for name, known in (("preset", tuple(_PRESETS)), ("network", ("cnn", "uur")), ("init", ("haar", "identity"))):
            if getattr(self, name) not in known:
                raise UserError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name in ("steps", "batch_size", "lr"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("lambda_s", "lambda_ma", "lambda_mm", "lambda_ic", "lambda_net"):
            if (value := getattr(self, name)) is not None and not value >= 0:
                raise UserError(f"{name} must not be negative, got {value}")
        for name in ("tau", "gamma"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise UserError(f"{name} must be positive, got {value}")

    @property
    def inactive(self) -> tuple[float, float, float]:
        """``(lambda_ic, tau, gamma)`` with the preset's values where they are open."""
        chosen = (self.lambda_ic, self.tau, self.gamma)
        weight, tau, gamma = (p if c is None else c for c, p in zip(chosen, _PRESETS[self.preset][:3], strict=True))
        return weight, tau, gamma

    @property
    def network_weight(self) -> float:
        """``lambda_net``, the preset's where it is open."""
        return _PRESETS[self.preset][3] if self.lambda_net is None else self.lambda_net


_LN2 = math.log(2)
_CACHED = 1 << 17
"""Numbers worked on at once."""
_FLAT = {torch.float64: -600.0, torch.float32: -80.0, torch.bfloat16: -80.0, torch.float16: -8.0}
"""Logits below which sigmoids or their sum may underflow."""


class _Assignment(torch.autograd.Function):
    """``lambda_s L_s + lambda_ma L_ma`` and E_p[y^gamma] of logits (N, I), with what else :class:`RowTerms` holds.

    The gradient is worked out with the value, in pieces that stay in the cache: with t = sum_i q_i ln y_i and
    s = ln sum_i y_i of a row, L_ma = -E[t] / ln 2, L_s = E[s - t] / ln 2, ds/dln y_i = q_i, dt/dln y_i =
    q_i (1 + ln y_i - t) and dln y_i/dl_i = 1 - y_i.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, weights: tuple[float, float], gamma: float | None) -> tuple[Tensor, ...]:
        rows, detectors = logits.shape
        gradient = torch.empty_like(logits)
        by_power = torch.empty_like(logits) if gamma is not None else None
        sparsity, activation, none = logits.new_zeros(3).unbind()
        activity, on = logits.new_zeros(2, detectors).unbind()
        slope, rest = -sum(weights) / (_LN2 * rows), -weights[1] / (_LN2 * rows)
        size = max(1, _CACHED // detectors)
        for logits_NI, gradient_NI, power_NI in zip(
            logits.split(size),
            gradient.split(size),
            by_power.split(size) if by_power is not None else itertools.repeat(None),
            strict=False,
        ):
            y = torch.sigmoid(logits_NI)
            if bool(logits_NI.amin() < _FLAT[logits.dtype]):  # y or their sum may underflow: go by the logarithms
                log_y = F.logsigmoid(logits_NI)
                log_sum = log_y.logsumexp(dim=1, keepdim=True)
                q = (log_y - log_sum).exp_()
            else:
                log_y = y.log()
                total = y.sum(dim=1, keepdim=True)
                q = y / total
                log_sum = total.log_()
            mean_log = torch.linalg.vecdot(q, log_y)[:, None]
            sparsity += (log_sum - mean_log).sum()
            activation -= mean_log.sum()
            is_on = torch.gt(y, 0.5, out=torch.empty_like(y))
            on += is_on.sum(0)
            none += (is_on.sum(1) == 0).sum()
            left = 1 - y
            if power_NI is not None and gamma is not None:
                power = torch.mul(y * y, y, out=power_NI) if gamma == 3 else torch.exp(gamma * log_y, out=power_NI)
                activity += power.sum(0)
                power.mul_(left)
            torch.sub(log_y, mean_log, out=gradient_NI)
            gradient_NI.mul_(slope).add_(rest).mul_(q).mul_(left)
        ctx.save_for_backward(gradient, by_power)
        ctx.gamma = gamma
        sparsity, activation = sparsity / (_LN2 * rows), activation / (_LN2 * rows)
        ctx.mark_non_differentiable(sparsity, activation, on, none)
        value = weights[0] * sparsity + weights[1] * activation
        return value, activity / rows, sparsity, activation, on, none

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        gradient, by_power = ctx.saved_tensors
        found = gradient * grads[0]
        if by_power is not None:
            found.addcmul_(by_power, grads[1] / len(found), value=ctx.gamma)
        return found, None, None


class RowTerms(NamedTuple):
    """What one batch of logits says.

    Parameters
    ----------
    value : () lambda_s L_s + lambda_ma L_ma. activity : (I,) E_p[y_i^gamma], zero without a gamma. These two have
        gradients.
    sparsity, activation : () L_s and L_ma in bits.
    on : (I,) rows in which each detector is on. none : () rows in which none is.
    """

    value: Tensor
    activity: Tensor
    sparsity: Tensor
    activation: Tensor
    on: Tensor
    none: Tensor


def row_terms(logits: Tensor, weights: tuple[float, float] = (1.0, 1.0), gamma: float | None = None) -> RowTerms:
    """The terms over rows from logits (N, I); finite for logits down to -1e4 and beyond.

    ``weights`` are those of sparsity and of maximum activation; ``gamma`` the power of the activities.
    """
    return RowTerms(*_Assignment.apply(logits, weights, gamma))


def maximum_margin(log_margin: Tensor) -> Tensor:
    """``L_mm`` from log M, () or (I,)."""
    return (-log_margin).exp().mean()


def inactive_classifier(activity: Tensor, nu: float, *, running: Tensor | None = None) -> Tensor:
    """``L_ic`` from the activities E_p[y_i^gamma] (I,) of a batch.

    Parameters
    ----------
    nu : the floor of every detector, tau / I.
    running : (I,) running means of the activities. If given, they decide which detectors are below the floor (the
        batch is too small to show it) and those are pushed whatever the batch says.
    """
    if running is None:
        return F.relu(nu - activity).mean() / nu
    return torch.where(running < nu, nu - activity, 0.0).mean() / nu


def network_step(z: Tensor, basis: Tensor, bias: Tensor, *, kappa: Tensor | float | None = None) -> Tensor:
    """Change of standardised rows (N, I) that takes concepts out, for the network term of CBE and EDDP.

    ``kappa`` None (``cnn``): ``-sum_i ReLU(z_i - b) w_i``, which puts every positive detector of an orthonormal basis
    on its boundary. Else (``uur``): ``-kappa (W^T)^+ (z - b)``; ``kappa`` a number or (N, 1).
    """
    away = F.relu(z - bias) if kappa is None else kappa * (z - bias)
    return -away @ basis.T


def network_certainty(logits: Tensor) -> Tensor:
    """``L_net``: minus the mean entropy, in bits, of the classes that logits (B, classes) give."""
    log_p = logits.log_softmax(dim=1)
    return (log_p.exp() * log_p).sum(dim=1).mean() / _LN2


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
        """Torch's ReduceLROnPlateau (mode min, relative threshold) on one window's mean."""
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


_SIGMA_FLOOR = 1e-3
_REBASE_EVERY = 200
_COLLAPSE_STEPS = 100
_DEAD = 1e-5
_SIGNAL_ROWS = 50
_GATE_BELOW = 16.0
_SLICE = 8192
_SPECTRUM_FLOOR = 1e-4


class InterpretableBasis(RowsExplainer):
    """Interpretable basis (module docstring). ``encode`` and ``decode`` are affine and differentiable.

    Attributes
    ----------
    rotation : holds W as ``rotation.weight`` (D, I), through the Cayley parametrisation.
    bias, log_margin : parameters () or (I,): b and log M.
    mean, scale : buffers (D,): mu and sigma.
    on_rate : buffer (I,), share of the fit rows where each detector is on.
    whitening, unwhitening : buffers (D, D) with ``whiten``: C^(-1/2) and its inverse, both symmetric.
    signal_vectors : buffer (I, D); d_i where a detector is on in fewer than 50 rows (``signal_rows`` says in how many).

    Raises
    ------
    UserError : fewer than two rows; ``num_concepts`` that is not the number of features; all-on collapse.
    """

    Config = InterpretableBasisConfig
    learned = True
    config: InterpretableBasisConfig
    mean: Tensor
    scale: Tensor
    on_rate: Tensor
    signal_vectors: Tensor
    signal_rows: Tensor
    whitening: Tensor
    unwhitening: Tensor
    running: Tensor
    crowded: Tensor

    def __init__(self, config: InterpretableBasisConfig, spec: LayerSpec) -> None:
        super().__init__(config, spec)
        features = spec.num_features
        if config.num_concepts not in (0, features):
            raise UserError(
                f"a basis has as many concepts as the layer has features: num_concepts = {config.num_concepts}, "
                f"but layer {spec.name!r} has {features} (leave it at 0)"
            )
        linear = nn.Linear(features, features, bias=False)
        nn.init.normal_(linear.weight)
        self.rotation = orthogonal(linear, "weight", orthogonal_map="cayley", use_trivialization=True)
        self._cayley.original.register_hook(self._note_gradient)
        shape = () if config.shared else (features,)
        self.bias = nn.Parameter(torch.ones(shape))
        self.log_margin = nn.Parameter(torch.full(shape, 0.5).log())
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))
        if config.whiten:
            self.register_buffer("whitening", torch.eye(features))
            self.register_buffer("unwhitening", torch.eye(features))
        self.register_buffer("on_rate", torch.zeros(features))
        self.register_buffer("signal_vectors", torch.zeros(features, features))
        self.register_buffer("signal_rows", torch.zeros(features, dtype=torch.long))
        self.register_buffer("running", torch.full((features,), -1.0))
        self.register_buffer("crowded", torch.zeros((), dtype=torch.long))
        self.plateau = Plateau()
        self._watch: dict[str, Tensor] = {}
        self._since: dict[str, Tensor] = {}

    # -- the contract ---------------------------------------------------------------------------------------------

    @classmethod
    def needs(cls, config: ExplainerConfig) -> tuple[str, ...]:
        """The tail for the network term."""
        assert isinstance(config, InterpretableBasisConfig)
        return ("tail",) if config.network_weight else ()

    @property
    def num_concepts(self) -> int:
        """I = D."""
        return self.spec.num_features

    @property
    def basis(self) -> Tensor:
        """W (D, I). Outside training it is the parametrisation's base, without any computation."""
        found: Tensor = self.rotation.weight if self.training else self._cayley[0].base  # type: ignore[assignment]
        return found

    @property
    def dictionary(self) -> Tensor:
        """(I, D): the decoding directions d_i = sigma w_i."""
        return self._raw(self.basis.T)

    def train(self, mode: bool = True) -> InterpretableBasis:
        """In eval mode W is a constant: the rotation is folded into its base."""
        super().train(mode)
        if not mode:
            self._rebase()
        return self

    def encode_rows(self, rows: Tensor) -> Tensor:
        """Rows (N, D) -> z (N, I)."""
        return self._standardise(rows) @ self.basis

    def decode_rows(self, codes: Tensor) -> Tensor:
        """Z (N, I) -> rows (N, D), exactly."""
        return self.mean + self._raw(codes.to(self.scale.dtype) @ self.basis.T)

    # -- what else a basis can say --------------------------------------------------------------------------------

    def assign(self, z: Tensor, *, hard: bool = False) -> Tensor:
        """Soft assignment y in (0, 1) of concepts z (B, I[, H, W]), or the hard one, z > b, as bool."""
        shape = (-1,) + (1,) * (z.ndim - 2)
        bias = self.thresholds().reshape(shape)
        return z > bias if hard else torch.sigmoid((z - bias) / self.log_margin.exp().expand(len(bias)).reshape(shape))

    def thresholds(self) -> Tensor:
        """(I,): the value of z above which each detector is on (y > 0.5)."""
        return self.bias.detach().expand(self.num_concepts)

    def filters(self) -> tuple[Tensor, Tensor]:
        """Filters v_i (I, D) and biases (I,) in raw space: l_i = v_i . x - bias_i."""
        margin = self.log_margin.detach().exp().expand(self.num_concepts)
        basis = self.whitening @ self.basis if self.config.whiten else self.basis
        filters = (basis / self.scale[:, None] / margin).T
        return filters, self.thresholds() / margin + filters @ self.mean

    # -- fitting --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def fit_rows(self, rows: Rows, *, seed: int) -> None:
        """Mean and scale of the rows (one pass) and the start of the rotation."""
        self._start(rows, at_least=2)
        _, mean, variance = feature_moments(map(self._finite, rows.chunks()))
        constant = int((variance == 0).sum())
        if constant == self.num_concepts:
            raise UserError(f"nothing to learn: all {rows.num_rows} rows of layer {self.spec.name!r} are equal")
        if constant:
            self.notes.append(f"{constant} of {self.num_concepts} features are constant over the fit rows")
        if rows.num_rows < self.num_concepts:
            self.notes.append(f"fewer rows ({rows.num_rows}) than features ({self.num_concepts}): expect no recovery")
        self.mean.copy_(mean)
        self.scale.copy_(variance.sqrt().clamp_min(_SIGMA_FLOOR))
        if self.config.whiten:
            self._whiten(rows)
        start = torch.eye(self.num_concepts)
        if self.config.init == "haar":
            start = torch.randn(start.shape, generator=torch.Generator().manual_seed(seed))
        self.rotation.weight = start.to(self.mean.device)
        self.bias.fill_(1.0)
        self.log_margin.copy_(torch.full_like(self.log_margin, 0.5).log())
        for buffer, value in ((self.running, -1), (self.crowded, 0)):
            buffer.fill_(value)
        self.plateau.reset()
        self._since.clear()

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """``assignment`` (sparsity and activation), ``margin``, ``inactive``, ``network`` of rows (N, D), weighted."""
        weight, tau, gamma = self.config.inactive
        with parametrize.cached():
            basis = self.basis
            slope = (-self.log_margin).exp()
            logits = torch.addmm(-self.bias * slope, self._standardise(batch.activation), basis * slope)
        found = row_terms(logits, (self.config.lambda_s, self.config.lambda_ma), gamma if weight else None)
        terms = {"assignment": found.value, "margin": self.config.lambda_mm * maximum_margin(self.log_margin)}
        if weight:
            nu = tau / self.num_concepts
            gate = self._running_mean(found.activity.detach()) if len(logits) * nu < _GATE_BELOW else None
            terms["inactive"] = weight * inactive_classifier(found.activity, nu, running=gate)
        if self.config.network_weight:
            terms["network"] = self.config.network_weight * self._network(batch, basis)
        self._watch |= {
            "loss": torch.stack([t.detach() for t in terms.values()]).sum(),
            "sparsity": found.sparsity,
            "activation": found.activation,
            "on": found.on,
            "none": found.none,
            "rows": torch.tensor(len(logits)),
        }
        return terms

    def lr_scale(self, step: int) -> float:
        """Halved on each plateau of the loss."""
        return self.plateau.lr_scale

    @torch.no_grad()
    def after_step(self, step: int) -> dict[str, float]:
        """Re-bases the rotation, follows the plateau, stops on collapse; returns the diagnostics of section 4.2."""
        if (step + 1) % _REBASE_EVERY == 0:
            self._rebase()
        self.plateau.add(float(self._watch["loss"]))
        for name in ("on", "none", "rows"):
            self._since[name] = self._since.get(name, 0) + self._watch[name]
        actives = float(self._watch["on"].sum() / self._watch["rows"])
        limit = max(self.num_concepts / 4, 2 * self.config.inactive[1] + 1)  # a small layer may need more than I / 4
        self.crowded.copy_(self.crowded + 1 if actives > limit else torch.zeros_like(self.crowded))
        if int(self.crowded) >= _COLLAPSE_STEPS:
            raise UserError(
                f"all-on collapse at step {step}: {actives:.0f} of {self.num_concepts} detectors of layer "
                f"{self.spec.name!r} are on in every row; raise lambda_s (now {self.config.lambda_s})"
            )
        rows = self._since["rows"].clamp_min(1)
        rate = self._since["on"] / rows
        numbers = {
            "sparsity": float(self._watch["sparsity"]),
            "activation": float(self._watch["activation"]),
            "effective_concepts": 2.0 ** float(self._watch["sparsity"]),
            "actives": float(rate.sum()),
            "none_on": float(self._since["none"] / rows),
            "dead_share": float((rate < _DEAD).float().mean()),
            "on_rate_min": float(rate.min()),
            "on_rate_median": float(rate.median()),
            "on_rate_max": float(rate.max()),
            "bias": float(self.bias.mean()),
            "inverse_margin": float((-self.log_margin).exp().mean()),
            "gradient_norm": float(self._watch.get("gradient", 0.0)),
        }
        if (step + 1) % _REBASE_EVERY == 0:
            self._since.clear()
        return numbers

    def before_step(self, step: int, rows: Rows) -> Literal["go", "reset", "stop"]:
        """Stops when the learning rate is used up or the loss stops falling; never by any label or IoU."""
        return "stop" if self.plateau.converged(self.config.lr) else "go"

    @torch.no_grad()
    def after_fit(self, rows: Rows) -> None:
        """On-rates and signal vectors over the fit rows (one pass), and the warning if too many detectors are dead."""
        count = torch.zeros(self.num_concepts, dtype=torch.float64)
        z_sum, z_square = count.clone(), count.clone()
        x_sum = torch.zeros(self.num_concepts, self.num_concepts, dtype=torch.float64)
        xz_sum = x_sum.clone()
        total = 0
        for xhat in self._slices(rows):
            z = xhat @ self.basis
            on = (z > self.thresholds()).to(z.dtype)
            z_on = z * on
            count += on.sum(0, dtype=torch.float64)
            z_sum += z_on.sum(0, dtype=torch.float64)
            z_square += (z_on * z).sum(0, dtype=torch.float64)
            x_sum += on.T @ xhat
            xz_sum += z_on.T @ xhat
            total += len(xhat)
        n = count.clamp_min(1)
        variance = z_square / n - (z_sum / n).square()
        covariance = xz_sum / n[:, None] - (z_sum / n)[:, None] * (x_sum / n[:, None])
        enough = (count >= _SIGNAL_ROWS) & (variance > 1e-12)
        written = self._raw((covariance / variance.clamp_min(1e-12)[:, None]).to(self.scale.dtype))
        self.signal_vectors.copy_(torch.where(enough[:, None], written, self.dictionary))
        self.signal_rows.copy_(count.long())
        self.on_rate.copy_(count / max(total, 1))
        dead = float((self.on_rate < _DEAD).float().mean())
        if dead > 0.3:
            self.notes.append(
                f"over-sparse: {dead:.0%} of the detectors are never on; raise tau (now {self.config.inactive[1]:g}"
                f"{'' if self.config.inactive[0] else ', with lambda_ic above 0'})"
            )

    # -- inside ---------------------------------------------------------------------------------------------------

    @property
    def _cayley(self) -> Any:
        """Torch's parametrisation: ``original`` is the skew parameter, ``[0].base`` the base."""
        return self.rotation.parametrizations.weight  # type: ignore[union-attr]

    def _standardise(self, rows: Tensor) -> Tensor:
        """Rows x (N, D) -> xhat."""
        xhat = (rows.to(self.mean.dtype) - self.mean).div_(self.scale)
        return xhat @ self.whitening if self.config.whiten else xhat

    def _raw(self, steps: Tensor) -> Tensor:
        """Differences of xhat (N, D) -> the same in raw space."""
        return (steps @ self.unwhitening if self.config.whiten else steps) * self.scale

    def _network(self, batch: Batch, basis: Tensor) -> Tensor:
        """L_net of the whole activations that came with the batch."""
        if batch.tail is None or batch.whole is None:
            raise UserError("lambda_net needs the network behind the layer, and this fit has none: set it to 0")
        rows = to_rows(batch.whole)
        kappa = None
        if self.config.network == "uur":
            kappa = torch.empty(len(batch.whole), 1, device=rows.device).uniform_(0.5, 0.9)
            kappa = kappa.repeat_interleave(len(rows) // len(batch.whole), dim=0)
        moved = rows + self._raw(network_step(self._standardise(rows) @ basis, basis, self.bias, kappa=kappa))
        return network_certainty(batch.tail(from_rows(moved, tuple(batch.whole.shape[2:]))))

    def _whiten(self, rows: Rows) -> None:
        """The symmetric root of the inverse correlations, whose spectrum is cut off at 1e-4 below."""
        self.whitening.copy_(torch.eye(self.num_concepts))
        total = torch.zeros(self.num_concepts, self.num_concepts, dtype=torch.float64)
        for xhat in self._slices(rows):
            total += (xhat.T @ xhat).double().cpu()
        spectrum, axes = torch.linalg.eigh(total / rows.num_rows)
        spectrum = spectrum.clamp_min(_SPECTRUM_FLOOR)
        self.whitening.copy_(axes / spectrum.sqrt() @ axes.T)
        self.unwhitening.copy_(axes * spectrum.sqrt() @ axes.T)

    def _slices(self, rows: Rows) -> Iterator[Tensor]:
        for chunk in rows.chunks():
            for part in chunk.split(_SLICE):
                yield self._standardise(part.to(self.mean.device))

    @torch.no_grad()
    def _rebase(self) -> None:
        """Moves the base to W and the skew parameter to zero; W stays. Nothing to do where it is there already."""
        if not self._cayley.original.tril(-1).any():
            return
        weight: Tensor = self.rotation.weight.detach()  # type: ignore[operator]
        error = (weight.T @ weight - torch.eye(len(weight), device=weight.device)).abs().max()
        if not error < 1e-4:
            q, r = torch.linalg.qr(weight)
            weight = q * r.diagonal().sign()
        self.rotation.weight = weight

    def _running_mean(self, activity: Tensor) -> Tensor:
        """Running mean (decay 0.9) of the activities (I,), which starts at the first batch's."""
        first = self.running < 0
        self.running.copy_(torch.where(first, activity, 0.9 * self.running + 0.1 * activity))
        return self.running

    def _note_gradient(self, gradient: Tensor) -> None:
        self._watch["gradient"] = gradient.norm()


__all__ = ["InterpretableBasis", "InterpretableBasisConfig"]

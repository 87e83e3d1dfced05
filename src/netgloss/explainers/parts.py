"""PartExplainer: a layer's activation rebuilt from part maps, each of which marks one place of an image, and a rest.

Three convolutions (3 x 3, zero padding 1, biases) read the activation x (B, C, H, W), and a trainable copy of the
network's own section from this layer up rebuilds the layers above::

    x1 = ReLU(conv1(x)),  x2 = ReLU(conv2(mask(x1)))                          interpretable track; encode(x) = x2
    xi = mask(x2) / alpha_i,   xo = [ReLU](conv_o(x)) / alpha_o               norm layers: running mean total activation
    x_enc = s (p xi + (1 - p) xo),   p = sigmoid(w_p)                         s: mean total activation of x's channels
    rebuilt = section(x_enc)                                                  a dict of upper layers
    loss = sum_l |rebuilt_l - x_l|^2 / E|x_l|^2 - eta log p + w mean_f (Loss_f(x1) + Loss_f(x2))

mask multiplies a map by the unit cone around its peak (a constant in the gradient); Loss_f is the negative mutual
information (below) on maps divided by their running mean mass, before the mask. No label and no annotation
is read. ``decode`` knows the part maps alone and so rebuilds from ``s p xi``; ``forward`` rebuilds from both tracks, as
the loss does. How much the ordinary track carries is given by :meth:`PartExplainer.rebuild` with ``tracks="ordinary"``.

p is not identifiable: the decoder may weight either track up again, and ``-eta log p`` alone drives p to 1. It
describes, it does not prove; the tracks taken one by one do.

Source: Zhang, Yang, Liu, Wu & Zhu, "Unsupervised Learning of Neural Networks to Explain Neural Networks" (arXiv
1805.07468). Ours: the exact loss in place of the one-template gradient, which needs labels (``single_template`` is the
label-free rest of it); maps normalised before the loss; s, so that a copied section sees activations of its own
scale; the ordinary track starts as the identity and the interpretable one at random (a copied start keeps the old maps
without parts); no ReLU in the ordinary track where the layer itself is signed. Left out: the tap one convolution below
the first fully connected layer with fewer filters than the tap (here the section starts where the tap ends, so for VGG
tap the last activation before the pool); the variant that also trains on the classification loss.

Shape letters: B images, C = K features and filters, H W grid, P positions.

The filter loss of interpretable CNNs: a filter's maps mark one place, or nothing, of each image.

Templates on an H x W map, mu each cell in turn, d the L1 distance in cells, n = max(H, W)::

    T_mu(i, j) = kappa max(1 - beta d((i, j), mu) / n, -1)          T-(i, j) = -kappa
    p(T) = 1 / (P + 1),  P = H W          s_xT = sum_ij x_ij T_ij          p(x | T) = softmax of s_xT over the images x
    loss = -MI(X; T) = -sum_T p(T) sum_x p(x | T) r_xT,     r_xT = log p(x | T) - log p(x),  p(x) = sum_T p(T) p(x | T)

The loss lies in [-log min(B, P + 1), 0]. Its gradient in closed form, with q = p(T) and p = p(x | T)::

    d loss / d s_xT = -q p (r_xT - sum_x' p(x' | T) r_x'T)

``single`` keeps one template an image, that of its peak, and holds the denominator of the softmax fixed, as the
published gradient does: -q p r for that template, 0 for the others. The paper takes T- for images of other categories;
that needs labels and is left out.

Source: Zhang, Wu & Zhu, "Interpretable Convolutional Neural Networks" (arXiv 1710.00935); the templates' amplitude
kappa on activations of mean mass 1 stands for tau = 0.5 / n^2 on raw ones, with which the loss vanishes for networks of
normalised inputs.

Memory: channels are worked off in slices, so that besides the gradient (as large as the maps) no more than
three tensors of ``_SLICE`` numbers live at a time; (B, C, P + 1) never exists as a whole.

Shape letters: B images, C filters, H W grid, P positions, t = P + 1 templates.

The collapse watch of part maps: which are dead, which always peak at one place, and which peak where others do.

Shape letters: B images, C filters, H W grid, P positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from netgloss.errors import UserError, nearest
from netgloss.explainers.base import Batch, Explainer, LayerSpec, Rows, TrainingConfig

_SLICE = 1 << 18
"""Numbers (B x channels x templates) worked off at a time: small enough for the cache."""
_TINY = 1e-38


@lru_cache(maxsize=16)
def _cones(height: int, width: int, beta: float) -> Tensor:
    """(P, P) float32: ``max(1 - beta d / n, -1)``, row mu."""
    rows, columns = torch.arange(height), torch.arange(width)
    cells = torch.cartesian_prod(rows, columns).float()
    distance = torch.cdist(cells, cells, p=1)
    return (1 - beta * distance / max(height, width)).clamp_min(-1)


def templates(height: int, width: int, *, beta: float = 4.0, kappa: float = 1.0) -> Tensor:
    """(P + 1, P) float32: the templates of all cells in row-major order, then the negative one."""
    cones = _cones(height, width, beta)
    return kappa * torch.cat([cones, -torch.ones_like(cones[:1])])


def peak_mask(maps: Tensor, *, beta: float = 4.0) -> Tensor:
    """(B, C, H, W) in [0, 1]: the unit-height cone around the largest value of each map, constant in the gradient."""
    height, width = maps.shape[2:]
    cones = _cones(height, width, beta).clamp_min(0).to(maps)
    return cones[maps.detach().flatten(2).argmax(dim=2)].reshape(maps.shape)


def filter_loss(maps: Tensor, *, kappa: float, beta: float = 4.0, single: bool = False) -> Tensor:
    """The loss (C,) of each filter, float32 whatever the maps' type; differentiable in ``maps``.

    Parameters
    ----------
    maps : (B, C, H, W) >= 0, of mean mass 1 an image (``sum_ij``) for ``kappa`` to be the templates' amplitude.
    single : the published one-template gradient instead of the exact one (the value is exact in both cases).
    """
    table = templates(*maps.shape[2:], beta=beta, kappa=kappa).to(maps.device)
    with torch.autocast(maps.device.type, enabled=False):
        return _FilterLoss.apply(maps.float(), table, single)


class _FilterLoss(torch.autograd.Function):
    """Value and gradient in one pass over slices of channels; the backward pass only scales the gradient."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, table: Tensor, single: bool) -> Tensor:
        batch, channels = maps.shape[:2]
        x_BCP = maps.flatten(2)
        wanted = ctx.needs_input_grad[0]
        loss_C = maps.new_empty(channels)
        gradient_BCP = torch.empty_like(x_BCP) if wanted else None
        step = max(1, _SLICE // (batch * len(table)))
        for start in range(0, channels, step):
            part = slice(start, start + step)
            x_BcP = x_BCP[:, part]
            s_Bct = x_BcP @ table.T
            s_Bct -= s_Bct.amax(dim=0)
            p_Bct = s_Bct.exp()
            total_ct = p_Bct.sum(dim=0)
            p_Bct /= total_ct
            s_Bct -= total_ct.log_()
            s_Bct -= p_Bct.mean(dim=2, keepdim=True).clamp_min_(_TINY).log_()
            r_Bct = s_Bct
            weighted_Bct = p_Bct * r_Bct
            mean_ct = weighted_Bct.sum(dim=0)
            loss_C[part] = -mean_ct.mean(dim=1)
            if gradient_BCP is not None:
                if single:
                    peak = x_BcP.argmax(dim=2, keepdim=True)
                    p_Bct = torch.zeros_like(p_Bct).scatter_(2, peak, weighted_Bct.gather(2, peak))
                else:
                    p_Bct = weighted_Bct.sub_(p_Bct.mul_(mean_ct))
                gradient_BCP[:, part] = p_Bct @ table
        if gradient_BCP is not None:
            ctx.save_for_backward(gradient_BCP.mul_(-1 / len(table)).reshape(maps.shape))
        return loss_C

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0][None, :, None, None], None, None


FROZEN = 0.95
"""A map is frozen if it peaks at one place in more than this share of the images where it is active."""
COINCIDING = 0.5
"""Part maps coincide if the peaks of more than this share of their pairs coincide, mean over images."""


def watch(maps: Tensor) -> dict[str, Tensor]:
    """Shares of dead maps (never above 0) and of frozen ones (one peak in over 95 % of the images where they are
    active) in a batch (B, C, H, W).
    """
    dead, frozen = dead_and_frozen(peak_counts(maps))
    return {"dead_share": dead.float().mean(), "frozen_share": frozen.float().mean()}


def peak_counts(maps: Tensor) -> Tensor:
    """(C, P): in how many images (B, C, H, W) each map has its peak, above 0, in each cell."""
    height, peak = maps.detach().flatten(2).max(dim=2)
    counts = maps.new_zeros(maps.shape[1], maps.shape[2] * maps.shape[3])
    return counts.scatter_add_(1, peak.T, (height > 0).T.to(counts))


def dead_and_frozen(counts: Tensor) -> tuple[Tensor, Tensor]:
    """(C,) bool each, from :func:`peak_counts`: active nowhere; one peak in over 95 % of at least two images."""
    active = counts.sum(dim=1)
    return active == 0, (active > 1) & (counts.amax(dim=1) > FROZEN * active)


def coinciding_peaks(maps: Tensor) -> tuple[Tensor, Tensor]:
    """(C, C) twice: in how many images (B, C, H, W) two maps peak within one cell of each other, and in how many both
    have a peak.
    """
    flat = maps.detach().flatten(2)
    cell = flat.argmax(dim=2)
    place_BC2 = torch.stack([cell // maps.shape[3], cell % maps.shape[3]], dim=2).short()
    active_BC = flat.amax(dim=2) > flat.amin(dim=2)
    near = torch.zeros(maps.shape[1], maps.shape[1])
    both = torch.zeros_like(near)
    for place_C2, active_C in zip(place_BC2.cpu(), active_BC.cpu(), strict=True):
        pair = active_C[:, None] & active_C
        near += pair & ((place_C2[:, None] - place_C2).abs().amax(dim=2) <= 1)
        both += pair
    return near, both


def mean_of_pairs(near: Tensor, both: Tensor) -> float:
    """Share of the images in which two different maps coincide, mean over pairs; 1 if all look at the same place, NaN
    of a single map.
    """
    shares = near / both
    return float(shares[~torch.eye(len(shares), dtype=torch.bool)].nanmean())


Tracks = Literal["both", "interpretable", "ordinary"]

_MOMENTUM = 0.1
_FLOOR = 1e-3
_COMPARED = 512
"""Images of the fit over which the peaks of part maps are compared."""
_START_BATCHES = 8
_MIN_CELLS = 7


@dataclass(frozen=True)
class PartConfig(TrainingConfig):
    """Options of :class:`PartExplainer`."""

    num_concepts: int = 0
    """Always the number of features of the layer; 0 says so."""
    steps: int = 600
    """Number of optimiser steps."""
    batch_size: int = 64
    """Images a step; the filter loss cannot pass log(batch_size)."""
    lr: float = 1e-3
    """Learning rate of AdamW for the two tracks and p."""
    decoder_lr: float = 1e-4
    """Learning rate for the copied section; 0 keeps it as the network has it."""
    upper: tuple[str, ...] = ()
    """Layers to rebuild; default: two fully connected ones, else the last maps and what enters the last layer."""
    filter_weight: float = 1.0
    """Weight of the filter loss; 0 leaves a plain autoencoder of two tracks."""
    kappa: float = 100.0
    """Amplitude of the templates on maps of mean mass 1 (10 to 100)."""
    beta: float = 4.0
    """Steepness of the templates: they are positive within side / beta cells of their centre."""
    eta: float = 1.0
    """Weight of -log p, which favours the interpretable track."""
    single_template: bool = False
    """Use the one-template gradient instead of the exact one."""
    masks: bool = True
    """Mask the maps around their peaks."""
    ordinary: bool = True
    """Keep the ordinary track; without it the parts carry everything."""
    start: Literal["random", "copy"] = "random"
    """Start of the interpretable track: at random, or as a copy of the layer's own maps."""

    def __post_init__(self) -> None:
        if self.num_concepts < 0:
            raise UserError(f"num_concepts must be 0 (the number of features) or that number, got {self.num_concepts}")
        for name in ("steps", "batch_size", "lr", "kappa", "beta"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("decoder_lr", "filter_weight", "eta"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.batch_size < 2:
            raise UserError("batch_size must be at least 2: the filter loss compares images with each other")
        if self.start not in ("random", "copy"):
            raise UserError(f"start must be random or copy, got {self.start!r}")


class PartExplainer(Explainer):
    """Part maps and a rest (module docstring). ``encode`` gives x2: unmasked part maps (B, C, H, W) >= 0.

    Attributes
    ----------
    parts : the two convolutions of the interpretable track.
    rest : the convolution of the ordinary track; None with ``ordinary=False``.
    section : the decoder, given by :meth:`adopt`; activation -> dict of upper layers.
    mass : buffer (2, C), running mean total activation of x1 and x2 (for the loss).
    alpha : buffer (2, C), the same of the two tracks (the norm layers).
    energy : buffer (L,), mean squared norm of each upper layer.
    notes : dead or frozen maps after the fit, for the report.

    Raises
    ------
    UserError : a layer without a grid; ``num_concepts`` that is not the number of features.
    """

    Config = PartConfig
    target = "upper"
    reads = "maps"
    uses = ("upper", "section")
    learned = True
    config: PartConfig
    mass: Tensor
    alpha: Tensor
    energy: Tensor
    scale: Tensor
    unit: Tensor

    def __init__(self, config: PartConfig, spec: LayerSpec) -> None:
        super().__init__(config, spec)
        features = spec.num_features
        if not spec.grid:
            raise UserError(f"parts have places, but layer {spec.name!r} gives vectors: choose one with a map")
        if config.num_concepts not in (0, features):
            raise UserError(
                f"there are as many part maps as the layer has features: num_concepts = {config.num_concepts}, but "
                f"layer {spec.name!r} has {features} (leave it at 0)"
            )
        self.notes: list[str] = []
        if min(spec.grid) < _MIN_CELLS:
            height, width = spec.grid
            self.notes.append(f"a grid of {height} x {width} cells is coarse for parts: tap an earlier layer")
        tracks = [nn.Conv2d(features, features, 3, padding=1) for _ in range(2)]
        self.parts = nn.ModuleList(tracks)
        for conv in tracks:
            if config.start == "copy":
                nn.init.dirac_(conv.weight)
            else:
                nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)
        self.rest = nn.Conv2d(features, features, 3, padding=1) if config.ordinary else None
        if self.rest is not None:
            nn.init.dirac_(self.rest.weight)
            assert self.rest.bias is not None
            nn.init.zeros_(self.rest.bias)
        self.share = nn.Parameter(torch.zeros(())) if config.ordinary else None
        self.register_buffer("mass", torch.ones(2, features))
        self.register_buffer("alpha", torch.ones(2, features))
        self.register_buffer("energy", torch.ones(len(spec.upper)))
        self.register_buffer("scale", torch.ones(features))
        self.register_buffer("unit", torch.ones(()))
        self.section: nn.Module | None = None
        self._watch: dict[str, Tensor] = {}

    # -- the contract ---------------------------------------------------------------------------------------------

    @property
    def num_concepts(self) -> int:
        """K = C."""
        return self.spec.num_features

    def name_concepts(self) -> list[str]:
        return [f"part {k}" for k in range(self.num_concepts)]

    @classmethod
    def upper_layers(cls, config: PartConfig, later: Sequence[str]) -> Sequence[str]:  # type: ignore[override]
        """``config.upper``, or by the names of the layers: see :func:`choose_upper`."""
        for name in config.upper:
            if name not in later:
                hint = nearest(name, later) or list(later)[-5:]
                raise UserError(f"upper layer {name!r} does not run after the explained one; choose {', '.join(hint)}")
        return config.upper or choose_upper(later)

    def adopt(self, section: nn.Module) -> None:
        """Takes the decoder; it stays in eval mode (its running statistics are the network's)."""
        self.section = section.eval().requires_grad_(self.config.decoder_lr > 0)

    def train(self, mode: bool = True) -> PartExplainer:
        super().train(mode)
        if self.section is not None:
            self.section.eval()
        return self

    @property
    def p(self) -> float:
        """The interpretable track's share at x_enc; 1 without an ordinary track."""
        return 1.0 if self.share is None else float(self.share.detach().sigmoid())

    def encode(self, activation: Tensor) -> Tensor:
        """(B, C, H, W) -> unmasked part maps x2 (B, C, H, W) >= 0."""
        self._check_features(activation, self.spec.num_features, "activation")
        return self._maps(activation)[1]

    def decode(self, concepts: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """Part maps (B, C, H, W) -> upper layers by name, of the interpretable track alone."""
        self._check_features(concepts, self.num_concepts, "concepts")
        return self._upper(self._weighted_parts(concepts))

    def decoder_for(self, activation: Tensor) -> Callable[[Tensor], dict[str, Tensor]]:
        """Upper layers from part maps and the ordinary track of ``activation`` (B, C, H, W), which is held fixed."""
        with torch.no_grad():
            rest = self._weighted_rest(activation)
        return lambda concepts: self._upper(self._weighted_parts(concepts) + rest)

    def forward(self, activation: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """Upper layers by name, from both tracks."""
        return self.rebuild(activation)

    def partial(self) -> dict[str, Callable[[Tensor], dict[str, Tensor]]]:
        """Each track alone."""
        if self.rest is None:
            return {}
        return {
            "part_maps_alone": lambda activation: self.rebuild(activation, "interpretable"),
            "ordinary_track_alone": lambda activation: self.rebuild(activation, "ordinary"),
        }

    def rebuild(self, activation: Tensor, tracks: Tracks = "both") -> dict[str, Tensor]:
        """Upper layers by name from ``tracks``; a track that is left out is zero at x_enc."""
        if tracks not in ("both", "interpretable", "ordinary"):
            raise UserError(f"tracks must be both, interpretable or ordinary, got {tracks!r}")
        enc = torch.zeros_like(activation)
        if tracks != "ordinary":
            enc = enc + self._weighted_parts(self.encode(activation))
        if tracks != "interpretable":
            enc = enc + self._weighted_rest(activation)
        return self._upper(enc)

    # -- the tracks -----------------------------------------------------------------------------------------------

    def _maps(self, activation: Tensor) -> tuple[Tensor, Tensor]:
        """x1 and x2, both before their masks."""
        first = self.parts[0](activation / self.unit).relu()
        return first, self.parts[1](self._masked(first)).relu()

    def _masked(self, maps: Tensor) -> Tensor:
        return maps * peak_mask(maps, beta=self.config.beta) if self.config.masks else maps

    def _rest(self, activation: Tensor) -> Tensor:
        assert self.rest is not None
        found: Tensor = self.rest(activation)
        return found.relu() if self.spec.nonnegative else found

    def _weighted_parts(self, maps: Tensor) -> Tensor:
        """S p xi of part maps x2."""
        weight = 1.0 if self.share is None else self.share.sigmoid()
        masked = self._masked(maps)
        return weight * self._normed(masked, masked.sum(dim=(2, 3)), 0)

    def _weighted_rest(self, activation: Tensor) -> Tensor:
        """S (1 - p) xo."""
        if self.share is None:
            return torch.zeros_like(activation)
        rest = self._rest(activation)
        return (1 - self.share.sigmoid()) * self._normed(rest, self._total(rest), 1)

    def _normed(self, values: Tensor, total: Tensor, track: int) -> Tensor:
        """S values / alpha; in training alpha is the batch's, with its gradient, as in batch normalisation: else the
        rebuilding would shrink the part maps to nothing.
        """
        alpha = total.mean(dim=0) if self.training else self.alpha[track]
        return values * (self.scale / _floored(alpha))[:, None, None]

    def _upper(self, enc: Tensor) -> dict[str, Tensor]:
        if self.section is None:
            raise UserError("a PartExplainer rebuilds the layers above by a copy of the network: call adopt(...) first")
        return cast(dict[str, Tensor], self.section(enc))

    # -- the fit --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def fit_rows(self, rows: Rows, *, seed: int) -> None:
        """Scales of the layer and of the layers above over the fit images, and first values of the running means."""
        squares = torch.zeros((), dtype=torch.float64)
        mass = torch.zeros(self.spec.num_features, dtype=torch.float64)
        energy = torch.zeros(len(self.spec.upper), dtype=torch.float64)
        count, cells = 0, 0
        for batch in rows.examples(("upper",)):
            if not batch.activation.isfinite().all():
                raise UserError(f"NaN or Inf among the activations of layer {self.spec.name!r}")
            squares += batch.activation.square().sum(dtype=torch.float64)
            mass += self._total(batch.activation).sum(dim=0, dtype=torch.float64)
            energy += torch.stack([batch.upper[name].square().sum(dtype=torch.float64) for name in self.spec.upper])
            count, cells = count + len(batch.activation), cells + batch.activation.numel()
        if count < 2:
            raise UserError(f"the filter loss compares images with each other: {count} image to fit on is not enough")
        if squares == 0:
            raise UserError(f"layer {self.spec.name!r} is zero on all {count} images to fit on")
        silent = [name for name, value in zip(self.spec.upper, energy.tolist(), strict=True) if not value > 0]
        if silent:
            raise UserError(f"upper layer {', '.join(silent)} is zero on all {count} images to fit on")
        self.scale.copy_(mass / count)
        self.energy.copy_(energy / count)
        self.unit.copy_((squares / cells).sqrt())
        seen = [self._totals(batch.activation) for batch in islice(rows.examples(()), _START_BATCHES)]
        mass_2C, alpha_2C = (torch.stack(values).mean(dim=0) for values in zip(*seen, strict=True))
        self.mass.copy_(mass_2C)
        self.alpha.copy_(alpha_2C)

    def _total(self, values: Tensor) -> Tensor:
        """(B, C) total activation: of the positive part, or the absolute one where the layer is signed."""
        return (values.relu() if self.spec.nonnegative else values.abs()).sum(dim=(2, 3))

    def _totals(self, activation: Tensor) -> tuple[Tensor, Tensor]:
        """Mean masses (2, C) of x1 and x2, and of the two tracks' outputs, over one batch."""
        first, second = self._maps(activation)
        return self._batch_totals(
            first, second, self._masked(second), None if self.rest is None else self._rest(activation)
        )

    def _batch_totals(
        self, first: Tensor, second: Tensor, masked: Tensor, rest: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        mass = torch.stack([values.sum(dim=(2, 3)).mean(dim=0) for values in (first, second)])
        own = masked.sum(dim=(2, 3)).mean(dim=0)
        return mass, torch.stack([own, torch.ones_like(own) if rest is None else self._total(rest).mean(dim=0)])

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Relative squared error of each upper layer, the filter loss, and -eta log p."""
        first, second = self._maps(batch.activation)
        with torch.no_grad():
            rest = None if self.rest is None else self._rest(batch.activation)
            found = self._batch_totals(first, second, self._masked(second), rest)
            if self.training:
                for running, now in zip((self.mass, self.alpha), found, strict=True):
                    running.lerp_(now, _MOMENTUM)
            self._watch = watch(second)
        rebuilt = self._upper(self._weighted_parts(second) + self._weighted_rest(batch.activation))
        terms = {
            f"rebuild {name}": (rebuilt[name] - target).square().flatten(1).sum(dim=1).mean() / energy
            for (name, target), energy in zip(batch.upper.items(), self.energy, strict=True)
        }
        if self.config.filter_weight:
            each = [
                filter_loss(
                    maps / _floored(mass)[:, None, None],
                    kappa=self.config.kappa,
                    beta=self.config.beta,
                    single=self.config.single_template,
                ).mean()
                for maps, mass in zip((first, second), self.mass, strict=True)
            ]
            terms["filter"] = self.config.filter_weight * torch.stack(each).sum()
        if self.share is not None and self.config.eta:
            terms["eta"] = -self.config.eta * nn.functional.logsigmoid(self.share)
        return terms

    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW; the section at its own rate, no decay of w_p."""
        assert self.section is not None
        tracks = [*self.parts.parameters(), *([] if self.rest is None else self.rest.parameters())]
        groups = [{"params": tracks, "lr": self.config.lr}]
        if self.share is not None:
            groups.append({"params": [self.share], "lr": self.config.lr, "weight_decay": 0.0})
        if self.config.decoder_lr > 0:
            groups.append({"params": list(self.section.parameters()), "lr": self.config.decoder_lr})
        return torch.optim.AdamW(groups, lr=self.config.lr)

    def after_step(self, step: int) -> dict[str, float]:
        """The collapse watch on the last batch: shares of dead and of frozen part maps, and p."""
        return {**{name: float(value) for name, value in self._watch.items()}, "p": self.p}

    @torch.no_grad()
    def after_fit(self, rows: Rows) -> None:
        """Counts dead and frozen part maps over all images of the fit, and maps that peak at one place over some."""
        counts = torch.zeros(self.num_concepts, self.spec.grid[0] * self.spec.grid[1])
        near, both = torch.zeros(2, self.num_concepts, self.num_concepts)
        left = _COMPARED
        for batch in rows.examples(()):
            maps = self.encode(batch.activation)
            counts += peak_counts(maps)
            more = coinciding_peaks(maps[:left])
            near, both, left = near + more[0], both + more[1], left - min(left, len(maps))
        dead, frozen = dead_and_frozen(counts)
        for flagged, what in (
            (dead, "never active"),
            (frozen, f"active at one place in over {FROZEN:.0%} of their images"),
        ):
            if flagged.any():
                listed = ", ".join(map(str, flagged.nonzero().flatten().tolist()[:12]))
                self.notes.append(f"{int(flagged.sum())} of {self.num_concepts} part maps are {what} (parts {listed})")
        if (share := mean_of_pairs(near, both)) > COINCIDING:
            self.notes.append(
                f"two part maps peak at the same place in {share:.0%} of the images (mean over pairs): they show fewer "
                "different parts than there are maps"
            )
        if self.share is not None:
            self.notes.append(
                f"p = {self.p:.2f} is the part maps' weight relative to the ordinary track; it does not say how much "
                f"of the "
                "decision they carry (see the scores of the tracks taken alone)"
            )


def choose_upper(later: Sequence[str]) -> tuple[str, ...]:
    """Which layers to rebuild, by the names of those that run later (in order).

    The last one is what enters the last layer. Three layers before it in the same block is, in networks of fully
    connected layers (linear, ReLU, dropout), the one before; else the last layer of the block before is taken too.
    """
    leaves = [name for name in later if not any(other.startswith(f"{name}.") for other in later)]
    if len(leaves) < 2:
        raise UserError("there is no layer between the explained one and the logits to rebuild: choose an earlier one")
    last, parent = leaves[-2], leaves[-2].rpartition(".")[0]
    if len(leaves) > 4 and parent and leaves[-5].rpartition(".")[0] == parent:
        return leaves[-5], last
    top = last.partition(".")[0]
    before = [name for name in leaves[:-2] if name.partition(".")[0] != top]
    if not before:
        return (last,)
    block = before[-1].rpartition(".")[0]
    return (block if "." in block and block in later else before[-1]), last


def _floored(mass: Tensor) -> Tensor:
    """No channel below a thousandth of the mean: what hardly fires is not blown up."""
    return mass.clamp_min(max(_FLOOR * float(mass.detach().mean()), 1e-12))

"""PartExplainer: a layer's activation rebuilt from part maps, each of which marks one place of an image, and a rest.

Two convolutions (3 x 3, zero padding 1, biases) read the part maps from the activation x (B, C, H, W), one reads the
rest, and a trainable copy of the network's own section from this layer up rebuilds the layers above::

    x1 = ReLU(conv1(x)),  x2 = ReLU(conv2(x1))                                interpretable track; encode(x) = x2
    xi = mask(x2) / alpha_i,   xo = [ReLU](conv_o(x)) / alpha_o               norm layers: running mean total activation
    x_enc = p W xi + (1 - p) s xo,   p = sigmoid(w_p)                         s: mean total activation of x's channels
    rebuilt = section(x_enc)                                                  a dict of upper layers
    loss = sum_l |rebuilt_l - x_l|^2 / E|x_l|^2 - eta log p + w mean_f Loss_f

mask multiplies a map by the unit cone around its peak (a constant in the gradient); Loss_f asks each map for one place
of an image, before the mask (``part_maps.py``). No label and no annotation is read.
``decode`` knows the part maps alone and so rebuilds from ``p W xi``; ``forward`` rebuilds from both tracks. In training
a share of the images is rebuilt from the part maps alone, so that the decision has to pass through them.
:meth:`PartExplainer.rebuild` gives either track by itself.

p is not identifiable: the decoder may weight either track up again, and ``-eta log p`` alone drives p to 1. It
describes, it does not prove; the tracks taken one by one do.

Source: Zhang, Yang, Liu, Wu & Zhu, "Unsupervised Learning of Neural Networks to Explain Neural Networks" (arXiv
1805.07468). The preset ``published`` keeps to it as far as it is known. The default differs where that fit failed on
real networks (docs/methods/parts.md):

- The filter loss: the concentration of x2 in place of the mutual information of x1 and x2. The latter also rewards
  places that are spread evenly over the grid, image by image, so maps leave the parts that have a usual place.
- The images rebuilt from the part maps alone. Without them the decision stays in the ordinary track.
- W, a 1 x 1 convolution. Part maps are not negative and have no reason to be the layer's features one by one, which
  the copied section expects; a signed layer cannot be rebuilt without it.
- The start: independent components of the layer's rows (FastICA), and W by ridge regression. From a random start the
  layers above were hardly better than their mean after 30 epochs, and nothing makes maps find different parts. (A
  copied start keeps the old maps, without parts.)
- The first convolution's maps are not masked. With that mask the second one sees only what lies around the first
  peaks, and all maps gather at one place.
- p has a learning rate of its own: at the rate of the convolutions it cannot leave .5.

Ours in both: the exact mutual information in place of the one-template gradient, which needs labels
(``single_template`` is the label-free rest of it), on maps divided by their running mean mass; s, so that a copied
section sees activations of its own scale; the ordinary track starts as the identity; no ReLU in the ordinary track
where the layer itself is signed. Left out: the tap one convolution below the first fully connected layer with fewer
filters than the tap (here the section starts where the tap ends, so for VGG tap the last activation before the pool);
the variant that also trains on the classification loss.

Shape letters: B images, C = K features and filters, H W grid, P positions.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, cast

import torch
from torch import Tensor, nn

from netgloss.errors import UserError, nearest
from netgloss.explainers.base import Batch, Explainer, LayerSpec, Rows, TrainingConfig
from netgloss.explainers.part_maps import (
    FROZEN,
    coinciding_peaks,
    concentration,
    dead_and_frozen,
    information_loss,
    mean_of_pairs,
    peak_counts,
    peak_mask,
    watch,
)
from netgloss.explainers.rows import sklearn_seed

Tracks = Literal["both", "interpretable", "ordinary"]

_MOMENTUM = 0.1
_FLOOR = 1e-3
COINCIDING = 0.5
"""Part maps coincide if the peaks of more than this share of their pairs coincide, mean over images."""
_COMPARED = 512
"""Images of the fit over which the peaks of part maps are compared."""
_START_BATCHES = 8
_MIXING_BATCHES = 32
_SAMPLED_ROWS, _QUANTILE_ROWS = 20_000, 10_000
_SPREAD = 4
"""One position in so many of an image is read for the start."""
_START_RATE = 0.1
"""Share of the positions at which a map is on at the start."""
_START_NOISE = 0.01
"""What the start by clusters leaves of the random weights around it."""
_RIDGE = 1e-3
_RANK = 1e-6
"""A direction of less than this share of the largest variance is no component."""
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
    """Learning rate of AdamW for the two tracks."""
    decoder_lr: float = 4e-4
    """Learning rate for the copied section; 0 keeps it as the network has it."""
    upper: tuple[str, ...] = ()
    """Layers to rebuild; default: two fully connected ones, else the last maps and what enters the last layer."""
    eta: float = 0.1
    """Weight of -log p, which favours the interpretable track."""
    beta: float = 4.0
    """Steepness of the masks, and of the templates: positive within side / beta cells of their centre."""
    kappa: float = 100.0
    """Amplitude of the templates on maps of mean mass 1 (10 to 100); for the information loss alone."""
    single_template: bool = False
    """Use the one-template gradient of the information loss instead of the exact one."""
    preset: Literal["default", "published"] = "default"
    """``published`` starts at random, masks the first maps too, has one learning rate, and never sees the part maps
    alone. The preset gives the values of the options below that are not set."""
    filter_loss: Literal["concentration", "information"] | None = None
    """What each map is asked for: one place in an image (default), or the published mutual information."""
    filter_weight: float | None = None
    """Weight of that loss (default 3, published 1); 0 leaves a plain autoencoder of two tracks."""
    alone: float | None = None
    """Share of a batch's images that are rebuilt from the part maps alone (default 0.5, published 0)."""
    share_lr: float | None = None
    """Learning rate of p (default 0.05, published that of the tracks)."""
    masks: Literal["second", "both", "none"] | None = None
    """Which maps are masked around their peaks: what the layers above read (default), the first convolution's too
    (published), or none."""
    mixing: bool | None = None
    """Mix the part maps into the layer's features by a 1 x 1 convolution (default yes, published no)."""
    ordinary: bool = True
    """Keep the ordinary track; without it the parts carry everything."""
    start: Literal["ica", "kmeans", "random", "copy"] | None = None
    """Start of the interpretable track: independent components of the layer (default), k-means directions, at random
    (published), or a copy of the layer's own maps."""

    def __post_init__(self) -> None:
        if self.num_concepts < 0:
            raise UserError(f"num_concepts must be 0 (the number of features) or that number, got {self.num_concepts}")
        for name in ("steps", "batch_size", "lr", "kappa", "beta"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("decoder_lr", "filter_weight", "eta"):
            if (value := getattr(self, name)) is not None and not value >= 0:
                raise UserError(f"{name} must not be negative, got {value}")
        if self.batch_size < 2:
            raise UserError("batch_size must be at least 2: the filter loss compares images with each other")
        if isinstance(self.masks, bool):  # files of version 0.1, which had no mixing
            object.__setattr__(self, "masks", "both" if self.masks else "none")
            object.__setattr__(self, "mixing", False)
            object.__setattr__(self, "filter_loss", "information")
        for name, known in (
            ("preset", tuple(_PRESETS)),
            ("filter_loss", (None, "concentration", "information")),
            ("start", (None, "ica", "kmeans", "random", "copy")),
            ("masks", (None, "second", "both", "none")),
        ):
            if getattr(self, name) not in known:
                choices = ", ".join(choice for choice in known if choice)
                raise UserError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        if self.alone is not None and not 0 <= self.alone <= 1:
            raise UserError(f"alone is a share of the images, from 0 to 1, got {self.alone}")
        if self.share_lr is not None and not self.share_lr > 0:
            raise UserError(f"share_lr must be positive, got {self.share_lr}")

    def chosen(self) -> _Preset:
        """The options that the preset may give, with its values where they are open."""
        preset, own = _PRESETS[self.preset], {}
        for field in dataclasses.fields(preset):
            if (value := getattr(self, field.name)) is not None:
                own[field.name] = value
        found = dataclasses.replace(preset, **own)
        return found if found.share_lr else dataclasses.replace(found, share_lr=self.lr)


@dataclass(frozen=True)
class _Preset:
    filter_loss: str
    filter_weight: float
    alone: float
    share_lr: float
    """0: the rate of the tracks."""
    masks: str
    mixing: bool
    start: str


_PRESETS = {
    "default": _Preset("concentration", 3.0, 0.5, 0.05, "second", True, "ica"),
    "published": _Preset("information", 1.0, 0.0, 0.0, "both", False, "random"),
}


class PartExplainer(Explainer):
    """Part maps and a rest (module docstring). ``encode`` gives x2: unmasked part maps (B, C, H, W) >= 0.

    Attributes
    ----------
    parts : the two convolutions of the interpretable track.
    rest : the convolution of the ordinary track; None with ``ordinary=False``.
    mix : W, the 1 x 1 convolution from part maps to the layer's features; None with ``mixing=False``.
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
        self.chosen = config.chosen()
        self.parts = nn.ModuleList(_convolution(features, identity=self.chosen.start == "copy") for _ in range(2))
        self.rest = _convolution(features, identity=True) if config.ordinary else None
        self.mix = _convolution(features, identity=True, side=1) if self.chosen.mixing else None
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
    def upper_layers(  # type: ignore[override]
        cls, config: PartConfig, later: Sequence[str], *, learned: Collection[str] | None = None
    ) -> Sequence[str]:
        """``config.upper``, or by the names of the layers: see :func:`choose_upper`."""
        for name in config.upper:
            if name not in later:
                hint = nearest(name, later) or list(later)[-5:]
                raise UserError(f"upper layer {name!r} does not run after the explained one; choose {', '.join(hint)}")
        return config.upper or choose_upper(later, learned)

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
        between = self._masked(first) if self.chosen.masks == "both" else first
        return first, self.parts[1](between).relu()

    def _masked(self, maps: Tensor) -> Tensor:
        return maps if self.chosen.masks == "none" else maps * peak_mask(maps, beta=self.config.beta)

    def _rest(self, activation: Tensor) -> Tensor:
        assert self.rest is not None
        found: Tensor = self.rest(activation)
        return found.relu() if self.spec.nonnegative else found

    def _weighted_parts(self, maps: Tensor) -> Tensor:
        """P W xi of part maps x2; p s xi without mixing."""
        weight = 1.0 if self.share is None else self.share.sigmoid()
        masked = self._masked(maps)
        normed = self._normed(masked, masked.float().sum(dim=(2, 3)), 0)
        return weight * (normed * self.scale[:, None, None] if self.mix is None else self.mix(normed))

    def _weighted_rest(self, activation: Tensor) -> Tensor:
        """S (1 - p) xo."""
        if self.share is None:
            return torch.zeros_like(activation)
        rest = self._rest(activation)
        return (1 - self.share.sigmoid()) * self._normed(rest, self._total(rest), 1) * self.scale[:, None, None]

    def _normed(self, values: Tensor, total: Tensor, track: int) -> Tensor:
        """Values / alpha; in training alpha is the batch's, with its gradient, as in batch normalisation: else the
        rebuilding would shrink the part maps to nothing.
        """
        alpha = total.mean(dim=0) if self.training else self.alpha[track]
        return values / _floored(alpha)[:, None, None]

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
        if self.chosen.start in ("ica", "kmeans"):
            self._start_from_directions(rows, seed)
        seen = [self._totals(batch.activation) for batch in islice(rows.examples(()), _START_BATCHES)]
        mass_2C, alpha_2C = (torch.stack(values).mean(dim=0) for values in zip(*seen, strict=True))
        self.mass.copy_(mass_2C)
        self.alpha.copy_(alpha_2C)
        if self.mix is not None:
            self._start_mixing(rows)

    def _start_from_directions(self, rows: Rows, seed: int) -> None:
        """The first convolution reads each position by directions of the layer's rows, with a bias that leaves a map on
        at a tenth of the positions; the second one starts close to the identity.
        """
        sample = _positions(rows, max(_SAMPLED_ROWS, 4 * self.num_concepts), self.spec.grid, seed) / self.unit
        centre = sample.mean(dim=0)
        centred = sample - centre
        directions = torch.zeros(0, sample.shape[1])
        if self.chosen.start == "ica":
            directions = _independent(centred, seed)
        if (left := self.num_concepts - len(directions)) > 0:
            directions = torch.cat([directions, _clustered(centred, left, seed)])
        level = torch.quantile(centred[:_QUANTILE_ROWS] @ directions.T, 1 - _START_RATE, dim=0)
        first, second = (cast(nn.Conv2d, part) for part in self.parts)
        assert first.bias is not None
        first.weight.mul_(_START_NOISE)
        first.weight[:, :, 1, 1] = directions
        first.bias.copy_(-(directions @ centre) - level)
        second.weight.mul_(_START_NOISE)
        second.weight.add_(nn.init.dirac_(torch.empty_like(second.weight)))

    def _start_mixing(self, rows: Rows) -> None:
        """W by ridge regression of the activation on the masked and normalised part maps."""
        assert self.mix is not None
        weight = 1.0 if self.share is None else float(self.share.sigmoid())
        inner, outer = torch.zeros(2, self.num_concepts + 1, self.num_concepts + 1, dtype=torch.float64)
        outer = outer[:, :-1]
        for batch in islice(rows.examples(()), _MIXING_BATCHES):
            masked = self._masked(self._maps(batch.activation)[1])
            maps = weight * masked / _floored(self.alpha[0])[:, None, None]
            maps_PC = maps.movedim(1, -1).flatten(0, -2).double()
            maps_PC = torch.cat([maps_PC, torch.ones_like(maps_PC[:, :1])], dim=1)
            inner += maps_PC.T @ maps_PC
            outer += maps_PC.T @ batch.activation.movedim(1, -1).flatten(0, -2).double()
        ridge = _RIDGE * inner.diagonal()[:-1].mean() * torch.eye(len(inner), dtype=torch.float64)
        found = torch.linalg.solve(inner + ridge, outer)
        self.mix.weight.copy_(found[:-1].T[:, :, None, None])
        assert self.mix.bias is not None
        self.mix.bias.copy_(found[-1] / weight)

    def _total(self, values: Tensor) -> Tensor:
        """(B, C) total activation: of the positive part, or the absolute one where the layer is signed."""
        return (values.relu() if self.spec.nonnegative else values.abs()).float().sum(dim=(2, 3))

    def _totals(self, activation: Tensor) -> tuple[Tensor, Tensor]:
        """Mean masses (2, C) of x1 and x2, and of the two tracks' outputs, over one batch."""
        first, second = self._maps(activation)
        return self._batch_totals(
            first, second, self._masked(second), None if self.rest is None else self._rest(activation)
        )

    def _batch_totals(
        self, first: Tensor, second: Tensor, masked: Tensor, rest: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        mass = torch.stack([values.float().sum(dim=(2, 3)).mean(dim=0) for values in (first, second)])
        own = masked.float().sum(dim=(2, 3)).mean(dim=0)
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
        terms = self._rebuilding(batch, second)
        if self.chosen.filter_weight:
            terms["filter"] = self.chosen.filter_weight * self._filter_loss(first, second)
        if self.share is not None and self.config.eta:
            terms["eta"] = -self.config.eta * nn.functional.logsigmoid(self.share)
        return terms

    def _filter_loss(self, first: Tensor, second: Tensor) -> Tensor:
        """Mean over filters: of the part maps' spatial variance, or of the information loss of both convolutions."""
        if self.chosen.filter_loss == "concentration":
            return concentration(second, _floored(self.mass[1])).mean()
        kappa, beta, single = self.config.kappa, self.config.beta, self.config.single_template
        each = [
            information_loss(maps / _floored(mass)[:, None, None], kappa=kappa, beta=beta, single=single).mean()
            for maps, mass in zip((first, second), self.mass, strict=True)
        ]
        return torch.stack(each).sum()

    def _rebuilding(self, batch: Batch, second: Tensor) -> dict[str, Tensor]:
        """Relative squared errors of each upper layer, of the images that are rebuilt from both tracks and of those
        that are rebuilt from the part maps alone; their sum is the mean over the batch.
        """
        count = len(second)
        alone = round(count * self.chosen.alone) if self.share is not None else 0
        enc = self._weighted_parts(second)
        both = (torch.randperm(count) >= alone).to(enc)
        if self.share is not None:
            enc = enc + self._weighted_rest(batch.activation) * both[:, None, None, None]
        rebuilt = self._upper(enc)
        terms = {}
        for (name, target), energy in zip(batch.upper.items(), self.energy, strict=True):
            error = (rebuilt[name].float() - target).square().flatten(1).sum(dim=1) / (energy * count)
            if alone < count:
                terms[f"rebuild {name}"] = (error * both).sum()
            if alone:
                terms[f"rebuild {name} from parts"] = (error * (1 - both)).sum()
        return terms

    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW; the section and w_p at rates of their own, no decay of w_p."""
        assert self.section is not None
        tracks = [p for part in (self.parts, self.rest, self.mix) if part is not None for p in part.parameters()]
        groups = [{"params": tracks, "lr": self.config.lr}]
        if self.share is not None:
            groups.append({"params": [self.share], "lr": self.chosen.share_lr, "weight_decay": 0.0})
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


def _positions(rows: Rows, number: int, grid: tuple[int, ...], seed: int) -> Tensor:
    """(n, C) activations at random positions, n at most ``number``."""
    images = math.ceil(_SPREAD * number / math.prod(grid))
    every = rows.sample(images, seed=seed).movedim(1, -1).flatten(0, -2).float()
    return every[torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))[:number]]


def _independent(rows: Tensor, seed: int) -> Tensor:
    """Unit directions (n, C) of the independent components of centred rows (N, C), n their rank; each towards its
    longer tail, so that it is rarely and strongly on.
    """
    from sklearn.decomposition import FastICA

    variance = torch.linalg.svdvals(rows.T.double() @ rows.double())
    rank = int((variance > _RANK * variance[0]).sum())
    ica = FastICA(rank, whiten="unit-variance", max_iter=100, tol=1e-2, random_state=sklearn_seed(seed))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a start need not have converged
        ica.fit(rows.numpy())
    directions = nn.functional.normalize(torch.from_numpy(ica.components_).to(rows), dim=1)
    return directions * (rows @ directions.T).pow(3).mean(dim=0).sign()[:, None]


def _clustered(rows: Tensor, number: int, seed: int) -> Tensor:
    """Unit directions (number, C) of centred rows (N, C) by spherical k-means; of few rows, random ones fill up."""
    from sklearn.cluster import MiniBatchKMeans

    clusters = min(number, max(1, len(rows) // 4))
    kmeans = MiniBatchKMeans(clusters, n_init=1, batch_size=4096, random_state=sklearn_seed(seed))
    centres = torch.from_numpy(kmeans.fit(nn.functional.normalize(rows, dim=1).numpy()).cluster_centers_).to(rows)
    draw = torch.Generator().manual_seed(seed)
    centres = torch.cat([centres, torch.randn(number - clusters, rows.shape[1], generator=draw)])
    return nn.functional.normalize(centres, dim=1)


def _convolution(features: int, *, identity: bool, side: int = 3) -> nn.Conv2d:
    conv = nn.Conv2d(features, features, side, padding=side // 2)
    if identity:
        nn.init.dirac_(conv.weight)
    else:
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv


def choose_upper(later: Sequence[str], learned: Collection[str] | None = None) -> tuple[str, ...]:
    """Which layers to rebuild, by the names of those that run later (in order) and of those of them that have weights.

    The last one is what enters the last layer. Three layers before it in the same block is, in networks of fully
    connected layers (linear, ReLU, dropout), the one before; else the last layer of the block before is taken too.
    Where the last layer has no weights (the mean over class maps of SqueezeNet), its output is rebuilt as well: it
    holds the pooled features, which here are the logits.
    """
    leaves = [name for name in later if not any(other.startswith(f"{name}.") for other in later)]
    if len(leaves) < 2:
        raise UserError("there is no layer between the explained one and the logits to rebuild: choose an earlier one")
    if learned is not None and leaves[-1] not in learned and len(leaves) > 2:
        return leaves[-2], leaves[-1]
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

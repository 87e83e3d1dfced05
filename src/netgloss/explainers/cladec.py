"""ClaDec: a layer's activations decoded back into images, and compared with a reference autoencoder.

::

    X_E = D(a)                      D: the decoder, a: the layer's activation (or a subset of its units)
    X_R = D_R(E_R(X))               the reference: an encoder with the same code shape, the same decoder
    J  = (1 - alpha) R(X, X_E) + alpha CE(C(X_E), t),    R = squared error summed over an image, mean over the batch
    minimised: J / (alpha + P (1 - alpha))  +  R(X, X_R) / P        (disjoint parameters: two trainings in one)

What X_R shows and X_E lacks was discarded by the classifier, or kept in a form that this decoder cannot read; what both
lack says nothing. Alone, a decoded image is no evidence.

J. Schneider, M. Vlachos, "Explaining Classifiers by Constructing Familiar Concepts", Machine Learning 2022,
doi 10.1007/s10994-022-06157-0 (arXiv 2203.04109), after "Explaining Neural Networks by Decoding Layer Activations",
IDA 2021, doi 10.1007/978-3-030-74251-5_6.

Left out: the GAN and VAE variants. Ours: the general decoder, the compact reference (a fresh copy of the classifier, as
published, needs the classifier: :meth:`ClaDec.use_reference` takes it in Python), subsets by relevance, the check for
collapse. On top of the paper's rule, with alpha > 0 the weights with the lowest J (not R) on held-out images are kept.

Shape letters: B images, c features of the layer, U units of the code, h w the grid, m H W the decoded image, P = m H W.

The objective of ClaDec and the two forms of its weight alpha.

Section 3 of the method's page; R sums over the P values of an image and averages over the batch::

    R(X, X') = (1/B) sum_i |X_i - X'_i|^2
    J   = (1 - alpha) R(X, X_E) + alpha CE(C(X_E), t)              alpha in the sum form
    J~  = (1 - alpha_m) R / P + alpha_m CE = J / (alpha + P (1 - alpha))       what is minimised
    alpha = P alpha_m / (1 - alpha_m + P alpha_m),   alpha_m = alpha / (alpha + P (1 - alpha))

The weights of J~ add up to 1, so that the learning rate means the same at every alpha and image size.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

from netgloss.errors import UserError
from netgloss.explainers.base import Batch, Explainer, ExplainerConfig, LayerSpec, Rows, TrainingConfig
from netgloss.explainers.image_decoders import CompactEncoder, GeneralDecoder, PublishedDecoder

SMALL = 32
"""Sides up to this many pixels take the settings for small images."""


@dataclass(frozen=True)
class ClaDecConfig(TrainingConfig):
    """Options of :class:`netgloss.explainers.cladec.ClaDec`; 0 means that the image size or the preset decides."""

    num_concepts: int = 0
    """Units (channels) of the layer that the decoder sees, picked by --channel-rule; 0: those that --channels names."""
    steps: int = 0
    """Optimiser steps; 0: as many as --epochs make."""
    batch_size: int = 0
    """Images a step; 0: 128 up to 32 px and with --preset published, else 32."""
    lr: float = 0.0
    """Peak learning rate of Adam; 0: 1e-3, with --preset published 3e-4."""
    alpha: float = 0.0
    """Weight of the classification term, in the form that sums squared errors over an image: 0 (none) to 1."""
    class_target: Literal["auto", "label", "prediction", "kl"] = "auto"
    """With alpha: what decoded images shall be classified as; auto: the label, the prediction where there is none."""
    code_weight: float = 0.0
    """Weight of the relative error of the layer's activation of the decoded image (label-free fidelity)."""
    channels: str = "all"
    """Units of the layer: all, a share ("25%"), or indices ("0,3,8-11")."""
    channel_rule: Literal["random", "first", "relevance"] = "random"
    """How a share of the units is picked; random and first are nested: a smaller share is part of a larger one."""
    channel_seed: int = 0
    """Seed of --channel-rule random."""
    size: int = 0
    """Longer side of the decoded images; 0: the network's input up to 64 px, else 64."""
    preset: Literal["general", "published"] = "general"
    """Decoder and training: netgloss's, or those of the method's public code (image side = map side x 2^n)."""
    width: int = 0
    """Channels before the general decoder's last convolution; 0: 64 up to 32 px, else 32."""
    output: Literal["auto", "linear", "sigmoid"] = "auto"
    """Output of the published decoder; auto: sigmoid. The general decoder is linear."""
    norm: bool = False
    """Batch norm in the published decoder."""
    standardize: Literal["auto", "yes", "no"] = "auto"
    """Standardise each unit by its training mean and deviation; auto: yes, with --preset published no."""
    reference: Literal["compact", "none"] = "compact"
    """Reference autoencoder: a small encoder of its own, or none (then nothing can be put down to the classifier)."""
    epochs: int = 0
    """Passes over the images; 0: 10 up to 32 px, else 12; with --preset published 64."""
    alpha_epochs: int = 3
    """With alpha and more than 32 px: passes with alpha, after those without. (Up to 32 px: from scratch.)"""
    schedule: Literal["auto", "cycle", "constant", "drops"] = "auto"
    """Learning rate: one cycle, constant, or x 0.1 after 29/64 and 58/64 of the steps (the published one)."""

    def __post_init__(self) -> None:
        whole = ("num_concepts", "steps", "batch_size", "size", "width", "epochs", "alpha_epochs")
        for name in (*whole, "lr", "code_weight"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.alpha <= 1:
            raise UserError(f"alpha must lie in [0, 1], got {self.alpha}")
        if self.num_concepts and self.channels != "all":
            raise UserError("give either num_concepts or channels, not both")
        if 0 < self.size < 8:
            raise UserError(f"size must be at least 8 pixels, got {self.size}")
        if self.preset == "general" and (self.output == "sigmoid" or self.norm):
            raise UserError("output='sigmoid' and norm belong to the published decoder: add preset='published'")


def image_size(config: ClaDecConfig, image: tuple[int, ...]) -> tuple[int, int]:
    """(H, W) of the decoded images for a network whose input is ``image`` = (m, height, width)."""
    height, width = image[1:]
    longer = config.size or (max(height, width) if max(height, width) <= 64 else 64)
    scale = longer / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def count_units(config: ClaDecConfig, num_features: int) -> int:
    """How many units the decoder sees."""
    picked = _named(config.channels, num_features)
    if isinstance(picked, list):
        return len(picked)
    if config.num_concepts > num_features:
        raise UserError(f"num_concepts = {config.num_concepts}, but the layer has {num_features} units")
    return config.num_concepts or picked


def choose_units(config: ClaDecConfig, num_features: int, relevance: Tensor | None = None) -> Tensor:
    """Indices (U,) of the units, ascending.

    Parameters
    ----------
    relevance : (num_features,) for the rule "relevance"; without it the first ones are used until it is known.
    """
    picked = _named(config.channels, num_features)
    if isinstance(picked, list):
        return torch.tensor(picked)
    count = count_units(config, num_features)
    if config.channel_rule == "random":
        generator = torch.Generator().manual_seed(config.channel_seed)
        order = torch.randperm(num_features, generator=generator)
    elif config.channel_rule == "relevance" and relevance is not None:
        order = relevance.argsort(descending=True, stable=True)
    else:
        order = torch.arange(num_features)
    return order[:count].sort().values


def _named(channels: str, num_features: int) -> int | list[int]:
    """Indices where they are named, else how many."""
    text = channels.strip()
    if text == "all":
        return num_features
    try:
        if text.endswith("%"):
            share = float(text[:-1]) / 100
            if not 0 < share <= 1:
                raise ValueError
            return max(1, round(share * num_features))
        parts = [part.partition("-") for part in text.split(",")]
        named = {i for first, dash, last in parts for i in range(int(first), int(last if dash else first) + 1)}
    except ValueError:
        raise UserError(
            f"channels must be 'all', a share like '25%' or indices like '0,3,8-11', got {channels!r}"
        ) from None
    if not named or max(named) >= num_features:
        raise UserError(f"channels {channels!r} names units that the layer does not have (0 to {num_features - 1})")
    return sorted(named)


_COLLAPSE_ERROR = 0.98
_COLLAPSE_VARIANCE = 1e-3


def alpha_sum(alpha_mean: float, num_values: int) -> float:
    """The weight of the form that sums over an image's P = ``num_values`` values, from that of the averaging form."""
    _check_alpha(alpha_mean)
    return num_values * alpha_mean / (1 - alpha_mean + num_values * alpha_mean)


def alpha_mean(alpha_sum: float, num_values: int) -> float:
    """The inverse of :func:`alpha_sum`."""
    _check_alpha(alpha_sum)
    return alpha_sum / (alpha_sum + num_values * (1 - alpha_sum))


def _check_alpha(alpha: float) -> None:
    if not 0 <= alpha <= 1:
        raise UserError(f"alpha must lie in [0, 1], got {alpha}")


def reconstruction_error(image: Tensor, decoded: Tensor) -> Tensor:
    """R, () : squared differences summed over (m, H, W), averaged over the batch."""
    return (image - decoded).square().flatten(1).sum(dim=1).mean()


def class_error(logits: Tensor, labels: Tensor | None, wanted: Tensor | None, kind: str) -> Tensor:
    """The class term, () in nats.

    Parameters
    ----------
    logits : (B, classes) of the decoded images.
    labels : (B,) classes, -1 for unknown.
    wanted : (B, classes) the classifier's logits of the originals.
    kind : "auto" (the label, the prediction where there is none), "label" (unlabelled images do not count),
        "prediction" or "kl" (KL(C(X) || C(X_E))).

    Raises
    ------
    UserError : the classifier's logits are needed and not there.
    """
    if kind == "label":
        assert labels is not None
        known = labels >= 0
        if not known.any():
            return logits.sum() * 0
        return cross_entropy(logits[known], labels[known])
    if wanted is None:
        raise UserError(
            f"class_target={kind!r} needs the classifier's logits, which this store does not hold: capture with logits "
            "or take class_target='label'"
        )
    if kind == "kl":
        return kl_div(logits.log_softmax(1), wanted.to(logits).log_softmax(1), log_target=True, reduction="batchmean")
    target = wanted.argmax(dim=1).to(logits.device)
    if kind == "auto" and labels is not None:
        target = target.where(labels < 0, labels)
    return cross_entropy(logits, target)


def check_collapse(error: float, of_mean: float, spread: float, layer: str, *, ended: bool) -> None:
    """Raises if the decoder ignores its code, or (``ended``) learned nothing that holds for other images.

    R may rightly exceed that of the mean image with alpha, and before all steps without it: 100 steps lie in the
    warm-up of a longer fit.
    """
    if spread < _COLLAPSE_VARIANCE or (ended and error >= _COLLAPSE_ERROR * of_mean):
        what = "has collapsed" if spread < _COLLAPSE_VARIANCE else "learned nothing that holds for other images"
        raise UserError(
            f"the decoder of layer {layer!r} {what}: on held-out images R = {error:.4g} (the mean image has "
            f"{of_mean:.4g}), and its images vary {spread:.2g} times as much as the originals; remedies: --output "
            "linear and --norm with the published decoder, more images, or a lower --lr"
        )


def unit_relevance(activation: Tensor, tail: Callable[[Tensor], Tensor] | None) -> Tensor:
    """|gradient x activation| of the predicted class's logit, summed over images and positions, (c,) float64.

    Where the tail is one linear layer, this is |weight x activation|.
    """
    if tail is None:
        raise UserError("channel_rule='relevance' needs the classifier: the batch brought no tail")
    with torch.enable_grad():
        values = activation.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(tail(values).max(dim=1).values.sum(), values)
    share = (gradient * activation).detach().abs()
    return (share.sum(dim=(2, 3)) if share.ndim == 4 else share).sum(dim=0).double().cpu()


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


_EPS = 1e-6
_HELD_SHARE = 10
_HELD_BYTES = 128 << 20
_COLLAPSE_STEP = 100


class ClaDec(Explainer):
    """Decoder of a layer's units and its reference autoencoder; ``decode`` gives images (B, m, H, W).

    The image values are the decoder's raw output, which may leave [0, 1] a little. ``encode`` only picks units.
    """

    Config = ClaDecConfig
    target = "image"
    reads = "maps"
    uses = ("image",)
    learned = True
    config: ClaDecConfig
    units: Tensor
    code_mean: Tensor
    code_std: Tensor
    mean_image: Tensor
    mean_activation: Tensor
    _planned: Tensor

    def __init__(self, config: ClaDecConfig, spec: LayerSpec) -> None:
        if len(spec.image) != 3:
            raise UserError("ClaDec needs to know the network's input (channels, height, width)")
        size = image_size(config, spec.image)
        super().__init__(_resolve(config, max(size)), spec)
        self.image_shape = (spec.image[0], *size)
        """(m, H, W)."""
        self.num_units = count_units(config, spec.num_features)
        code = (self.num_units, *spec.grid)
        self.decoder = self._new_decoder(code)
        self.reference_encoder: nn.Module | None = None
        self.reference_decoder: nn.Module | None = None
        if self.config.reference == "compact":
            self.reference_encoder = CompactEncoder(code, self.image_shape)
            self.reference_decoder = self._new_decoder(code)
        self.register_buffer("units", choose_units(config, spec.num_features))
        self.register_buffer("code_mean", torch.zeros(self.num_units))
        self.register_buffer("code_std", torch.ones(self.num_units))
        self.register_buffer("mean_image", torch.zeros(self.image_shape))
        self.register_buffer("mean_activation", torch.zeros(spec.shape))
        self.register_buffer("_planned", torch.zeros(3, dtype=torch.long))  # steps, steps with alpha after them, seed
        self.kept = KeptWeights()
        self.check_collapse = True
        """Whether a decoder that ignores its code ends the fit with an error."""
        self._held: tuple[Tensor, Tensor, Batch] | None = None
        self._logged: dict[str, float] = {}
        self._to_logits: Callable[[Tensor], Tensor] | None = None
        self.to(memory_format=torch.channels_last)

    # -- the contract ---------------------------------------------------------------------------------------------

    @classmethod
    def needs(cls, config: ExplainerConfig) -> tuple[str, ...]:
        """Fields of :class:`Batch` that a fit reads."""
        assert isinstance(config, ClaDecConfig)
        fields = ["image"]
        if config.alpha > 0:
            fields += ["to_logits", "logits", "labels"]
        if config.code_weight > 0:
            fields.append("to_code")
        if config.channel_rule == "relevance":
            fields += ["tail", "logits"]
        return tuple(dict.fromkeys(fields))

    @classmethod
    def image_size(cls, config: ExplainerConfig, image: tuple[int, ...]) -> tuple[int, int]:
        """(H, W) at which images are decoded."""
        assert isinstance(config, ClaDecConfig)
        return image_size(config, image)

    @property
    def num_concepts(self) -> int:
        """U, the units that the decoder sees."""
        return self.num_units

    @property
    def num_values(self) -> int:
        """P = m * H * W."""
        return math.prod(self.image_shape)

    def name_concepts(self) -> list[str]:
        """``unit 17`` for unit 17 of the layer."""
        return [f"unit {u}" for u in self.units.tolist()]

    def encode(self, activation: Tensor) -> Tensor:
        """The chosen units (B, U) or (B, U, h, w) of activations (B, c) or (B, c, h, w)."""
        self._check_features(activation, self.spec.num_features, "activation")
        return activation if self.num_units == self.spec.num_features else activation[:, self.units]

    def decode(self, concepts: Tensor) -> Tensor:
        """X_E (B, m, H, W) of the units (B, U) or (B, U, h, w)."""
        self._check_features(concepts, self.num_units, "units")
        if tuple(concepts.shape[2:]) != self.spec.grid:
            raise UserError(
                f"the decoder of layer {self.spec.name!r} reads a grid {self.spec.grid or 'of vectors'}, got units of "
                f"shape {tuple(concepts.shape)}"
            )
        shape = (1, -1, *(1 for _ in self.spec.grid))
        if self.config.standardize == "yes":
            concepts = (concepts - self.code_mean.reshape(shape)) / self.code_std.reshape(shape)
        return self.decoder(_last(concepts))

    def reference(self, image: Tensor) -> Tensor:
        """X_R (B, m, H, W) of images (B, m, H, W) in [0, 1].

        Raises
        ------
        UserError : the explainer was made without a reference.
        """
        if self.reference_encoder is None or self.reference_decoder is None:
            raise UserError("this ClaDec has no reference autoencoder (reference='none')")
        return self.reference_decoder(_last(self.reference_encoder(_last(image))))

    def use_reference(self, encoder: nn.Module) -> None:
        """Takes another encoder, images (B, m, H, W) -> code (B, U[, h, w]), for the reference (before the fit).

        The published reference is the classifier up to the layer with fresh weights:
        :class:`netgloss.decoding.FreshEncoder`. Its architecture is not part of the file of a saved explainer: to load
        one, build it with the same encoder first.
        """
        self.reference_encoder = encoder
        self.reference_decoder = self._new_decoder((self.num_units, *self.spec.grid))

    # -- the fit --------------------------------------------------------------------------------------------------

    def fit_rows(self, rows: Rows, *, seed: int) -> None:
        """Statistics of code and images, the number of steps, and units by relevance."""
        count = 0
        first, second = (torch.zeros(self.spec.num_features, dtype=torch.float64) for _ in range(2))
        total = torch.zeros(self.spec.shape, dtype=torch.float64)
        pixels = torch.zeros(self.image_shape, dtype=torch.float64)
        relevance = torch.zeros(self.spec.num_features, dtype=torch.float64)
        for batch in rows.examples(self.needs(self.config)):
            image = _image_of(batch)
            values = batch.activation.double()
            if tuple(values.shape[1:]) != self.spec.shape or tuple(image.shape[1:]) != self.image_shape:
                raise UserError(
                    f"expected activations of shape {self.spec.shape} with images of shape {self.image_shape}, got "
                    f"{tuple(values.shape[1:])} with {tuple(image.shape[1:])}"
                )
            flat = values.flatten(2) if values.ndim == 4 else values[:, :, None]
            first += flat.mean(2).sum(0)
            second += flat.square().mean(2).sum(0)
            total += values.sum(0)
            pixels += image.double().sum(0)
            count += len(values)
            if self.config.channel_rule == "relevance":
                relevance += unit_relevance(batch.activation, batch.tail)
        if not second.isfinite().all():
            raise UserError(f"activations of layer {self.spec.name!r} overflow: capture them with --dtype float32")
        if self.config.channel_rule == "relevance":
            self.units.copy_(choose_units(self.config, self.spec.num_features, relevance))
        self.mean_activation.copy_(total / count)
        self.mean_image.copy_(pixels / count)
        mean = (first / count)[self.units]
        self.code_mean.copy_(mean)
        self.code_std.copy_((second[self.units] / count - mean**2).clamp_min(0).sqrt().clamp_min(_EPS))
        for decoder in (self.decoder, self.reference_decoder):
            if isinstance(decoder, GeneralDecoder | PublishedDecoder):
                decoder.set_colour(self.mean_image.mean(dim=(1, 2)))
        a_pass = max(1, count // self.config.batch_size)
        steps = self.config.steps or self.config.epochs * a_pass
        extra = self.config.alpha_epochs * a_pass if self._continues else 0
        self._planned.copy_(torch.tensor([steps, extra, seed]))

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The weighted terms of J~ and of the reference; held-out images of the batch do not count."""
        image, activation = _image_of(batch), batch.activation
        used = ~self._is_held(batch.index)
        if self._held is None or not used.any():
            used = torch.ones_like(used)
        index, used = batch.index[used], used.to(activation.device)
        picked = Batch(
            activation[used],
            index,
            logits=None if batch.logits is None else batch.logits[used],
            labels=None if batch.labels is None else batch.labels[used],
            to_code=batch.to_code,
        )
        image = image[used]
        self._to_logits = batch.to_logits
        alpha = self._alpha_at(batch.step)
        terms = self._terms(picked, image, self._to_logits, alpha)
        frozen = self._continues and batch.step >= int(self._planned[0])
        if self.reference_encoder is not None and not frozen:
            error = reconstruction_error(image, self.reference(image))
            terms["reference"] = error / self.num_values
            self._logged["R_reference"] = float(error.detach())
        return terms

    def _terms(
        self, batch: Batch, image: Tensor, to_logits: Callable[[Tensor], Tensor] | None, alpha: float
    ) -> dict[str, Tensor]:
        weight = alpha_mean(alpha, self.num_values)
        decoded = self.decode(self.encode(batch.activation))
        error = reconstruction_error(image, decoded)
        terms = {"reconstruction": (1 - weight) / self.num_values * error} if alpha < 1 else {}
        terms_logged = {"R": float(error.detach())}
        if alpha > 0:
            if to_logits is None:
                raise UserError("alpha > 0 needs the classifier: the batch brought no to_logits")
            wrong = class_error(to_logits(decoded), batch.labels, batch.logits, self.config.class_target)
            terms["class"] = weight * wrong
            terms_logged |= {"CE": float(wrong.detach())}
        terms_logged["J"] = (1 - alpha) * terms_logged["R"] + alpha * terms_logged.get("CE", 0.0)
        if self.config.code_weight:
            if batch.to_code is None:
                raise UserError("code_weight > 0 needs the classifier: the batch brought no to_code")
            gap = (batch.to_code(decoded) - batch.activation).flatten(1).norm(dim=1)
            share = gap.square() / batch.activation.flatten(1).norm(dim=1).square().clamp_min(_EPS)
            terms["code"] = self.config.code_weight * share.mean()
        self._logged |= terms_logged
        return terms

    def optimizer(self) -> torch.optim.Optimizer:
        """Adam with weight decay 1e-5."""
        return torch.optim.Adam(self.parameters(), lr=self.config.lr, weight_decay=1e-5)

    @property
    def max_steps(self) -> int:
        """Steps without and with alpha."""
        return int(self._planned[0] + self._planned[1])

    def lr_scale(self, step: int) -> float:
        """The schedule; the steps with alpha that follow those without have a cycle of their own."""
        total, extra = int(self._planned[0]), int(self._planned[1])
        if step >= total:
            step, total = step - total, extra
        if self.config.schedule == "constant":
            return 1.0
        if self.config.schedule == "drops":
            return 0.1 ** ((step >= total * 29 // 64) + (step >= total * 58 // 64))
        warm = max(1, total // 10)
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))

    def before_step(self, step: int, rows: Rows) -> Literal["go", "reset", "stop"]:
        """Gathers held-out images once; starts the steps with alpha from the best weights without."""
        if self._held is None:
            self._held = self._gather(rows)
        if self._continues and step == int(self._planned[0]):
            self.kept.restore(self)
            return "reset"
        return "go"

    def after_step(self, step: int) -> dict[str, float]:
        """Evaluates the weights on the held-out images now and then, and keeps the best."""
        entries, done = dict(self._logged), step + 1
        every = max(1, self.max_steps // max(1, self.config.epochs))
        end = done == self.max_steps
        if done % every == 0 or end or done in (int(self._planned[0]), _COLLAPSE_STEP):
            entries |= self._evaluate(done, self._alpha_at(step))
        if end:
            self.kept.restore(self)
        return entries

    # -- its parts ------------------------------------------------------------------------------------------------

    @property
    def _continues(self) -> bool:
        """Whether alpha follows after steps without it."""
        return self.config.alpha > 0 and max(self.image_shape[1:]) > SMALL and self.config.alpha_epochs > 0

    def _alpha_at(self, step: int) -> float:
        return 0.0 if self._continues and step < int(self._planned[0]) else self.config.alpha

    def _new_decoder(self, code: tuple[int, ...]) -> nn.Module:
        if self.config.preset == "general":
            return GeneralDecoder(code, self.image_shape, width=self.config.width)
        output = "sigmoid" if self.config.output == "auto" else self.config.output
        return PublishedDecoder(code, self.image_shape, norm=self.config.norm, output=output)

    def _is_held(self, index: Tensor) -> Tensor:
        """One image in ten, by a hash of its index and the seed."""
        mixed = (index * 2654435761 + int(self._planned[2]) * 1640531527) % 2**32
        mixed = (mixed ^ (mixed >> 16)) * 73244475 % 2**32
        return (mixed >> 16) % _HELD_SHARE == 0

    def _gather(self, rows: Rows) -> tuple[Tensor, Tensor, Batch] | None:
        """Activations, images and the rest of the held-out images, as many as fit; None if there are too few."""
        parts: list[tuple[Tensor, Tensor, Batch]] = []
        size = 0
        for batch in rows.examples(("image", "logits", "labels")):
            held = self._is_held(batch.index).cpu()
            image, values = _image_of(batch)[held], batch.activation[held]
            rest = {n: v[held] for n in ("logits", "labels") if (v := getattr(batch, n)) is not None}
            parts.append((values, image, Batch(values[:0], batch.index[held], **rest)))
            size += 4 * (image.numel() + values.numel())
            if size > _HELD_BYTES:
                break
        images = torch.cat([image for _, image, _ in parts])
        if len(images) < 2:
            return None
        rest = {
            name: torch.cat([getattr(b, name) for _, _, b in parts])
            for name in ("index", "logits", "labels")
            if getattr(parts[0][2], name) is not None
        }
        return torch.cat([values for values, _, _ in parts]), images, Batch(torch.empty(0), **rest)

    @torch.no_grad()
    def _evaluate(self, done: int, alpha: float) -> dict[str, float]:
        """Held-out R of both decoders (J too with alpha); keeps what is best so far; raises on collapse."""
        if self._held is None:
            return {}
        training = self.training
        self.eval()
        device = self.mean_image.device
        activations, images, rest = self._held
        sums = {"R": 0.0, "CE": 0.0, "R_reference": 0.0, "R_mean": 0.0}
        decoded = []
        for part in torch.arange(len(images)).split(64):
            x = images[part].to(device)
            drawn = self.decode(self.encode(activations[part].to(device)))
            decoded.append(drawn.float().cpu())
            sums["R"] += float((x - drawn).square().sum())
            sums["R_mean"] += float((x - self.mean_image).square().sum())
            if self.reference_encoder is not None:
                sums["R_reference"] += float((x - self.reference(x)).square().sum())
            if alpha > 0 and self._to_logits is not None:
                given = [None if v is None else v[part].to(device) for v in (rest.labels, rest.logits)]
                wrong = class_error(self._to_logits(drawn), given[0], given[1], self.config.class_target)
                sums["CE"] += float(wrong) * len(part)
        self.train(training)
        found = {name: value / len(images) for name, value in sums.items()}
        spread = torch.cat(decoded).var(dim=0).sum() / images.var(dim=0).sum().clamp_min(_EPS)
        planned = int(self._planned[0])
        enough = self.max_steps >= _COLLAPSE_STEP and done in (_COLLAPSE_STEP, planned, self.max_steps)
        if self.check_collapse and enough:
            ended = alpha == 0 and done >= planned
            check_collapse(found["R"], found["R_mean"], float(spread), self.spec.name, ended=ended)
        self.kept.offer("decoder", self.decoder, (1 - alpha) * found["R"] + alpha * found["CE"])
        if self.reference_encoder is not None and self.reference_decoder is not None:
            for name in ("reference_encoder", "reference_decoder"):
                self.kept.offer(name, getattr(self, name), found["R_reference"])
        return {f"heldout_{name}": value for name, value in found.items() if name in ("R", "R_reference")}


def _resolve(config: ClaDecConfig, side: int) -> ClaDecConfig:
    """The config with what is 0 or "auto" filled in for images of this side."""
    published = config.preset == "published"
    small = side <= SMALL
    return dataclasses.replace(
        config,
        batch_size=config.batch_size or (128 if small or published else 32),
        lr=config.lr or (3e-4 if published else 1e-3),
        epochs=config.epochs or (64 if published else 10 if small else 12),
        standardize=config.standardize if config.standardize != "auto" else "no" if published else "yes",
        schedule=config.schedule if config.schedule != "auto" else "drops" if published else "cycle",
    )


def _image_of(batch: Batch) -> Tensor:
    if batch.image is None:
        raise UserError("ClaDec is fitted on images together with their activations: give it the images")
    return batch.image


def _last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor

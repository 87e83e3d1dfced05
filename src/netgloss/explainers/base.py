"""The contract of every explainer.

An explainer turns a layer's activations into concepts and back::

    encode(activation (B, C) or (B, C, H, W)) -> concepts (B, K) or (B, K, H', W')
    decode(concepts)                          -> what `target` says: "activation", "upper" or "image"

One file a method: a frozen dataclass config (its fields are the command line's flags) and one subclass of
:class:`Explainer`. Methods that work on rows (a vector, or one position of a map) override ``encode_rows`` and
``decode_rows`` and never see a map: :meth:`Explainer.encode` turns maps into rows and concept rows into concept maps.
Direct methods override ``fit_rows``; learned ones return named loss terms from ``losses`` and are trained by
``netgloss.training``. An explainer knows nothing of files, devices or progress bars.

Shape letters: B images, C features of the layer, H and W its grid, N rows, K concepts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from netgloss.errors import UserError


@dataclass(frozen=True)
class LayerSpec:
    """What an explainer may know of the layer that it explains.

    Parameters
    ----------
    name : dotted name of the layer.
    shape : ``(C,)`` for vectors or ``(C, H, W)`` for maps.
    nonnegative : True if no captured activation is below zero (after a ReLU, say).
    num_classes : number of logits of the classifier.
    upper : shapes of the layers above that a ``target = "upper"`` explainer rebuilds, by name.
    image : ``(channels, height, width)`` of the classifier's input.
    """

    name: str
    shape: tuple[int, ...]
    nonnegative: bool = False
    num_classes: int = 0
    upper: dict[str, tuple[int, ...]] = field(default_factory=dict)
    image: tuple[int, ...] = ()

    @property
    def num_features(self) -> int:
        return self.shape[0]

    @property
    def grid(self) -> tuple[int, ...]:
        """``(H, W)``, or ``()`` for a vector layer."""
        return self.shape[1:]


@dataclass
class Batch:
    """One training batch. Row methods get rows (N, C); others get whole activations (B, C) or (B, C, H, W).

    ``index`` (N or B,) says which image each entry comes from; the other fields, where the store holds them, are
    aligned with it: ``logits`` (., num_classes), ``labels`` (.,) the classifier's class with -1 for unknown, ``upper``
    by layer name, ``image`` (B, m, S, S') in [0, 1]. ``tail`` computes the logits of the whole activations ``whole``
    (b, C, H, W) differentiably: of some images drawn for the step, or ``activation`` itself for methods that read
    maps. ``to_logits`` computes those of images (., m, S, S') in [0, 1]: clipped, resized to the network's input and
    normalised; ``to_code`` their activations of the layer. ``step`` counts the batches of the fit.
    """

    activation: Tensor
    index: Tensor
    logits: Tensor | None = None
    labels: Tensor | None = None
    upper: dict[str, Tensor] = field(default_factory=dict)
    image: Tensor | None = None
    whole: Tensor | None = None
    tail: Callable[[Tensor], Tensor] | None = None
    to_logits: Callable[[Tensor], Tensor] | None = None
    to_code: Callable[[Tensor], Tensor] | None = None
    step: int = 0


class Rows(Protocol):
    """The training rows of a layer, as ``netgloss.training`` hands them to an explainer."""

    @property
    def num_rows(self) -> int: ...

    @property
    def num_features(self) -> int: ...

    def chunks(self) -> Iterator[Tensor]:
        """Every row once, in order, as float32 chunks (n, C) that fit in memory."""
        ...

    def sample(self, max_rows: int, *, seed: int) -> Tensor:
        """``min(max_rows, num_rows)`` rows drawn without replacement, float32 (n, C)."""
        ...

    def examples(self, fields: Collection[str] = ("logits", "labels")) -> Iterator[Batch]:
        """Every row (or whole activation) once, in order, with some fields of :class:`Batch`.

        The tail comes only to methods that read maps.
        """
        ...


MOST_CONCEPTS = 10_000_000


@dataclass(frozen=True)
class ExplainerConfig:
    """Fields shared by all methods; every field of a subclass is a flag of the command line."""

    num_concepts: int = 32
    """Number of concepts K."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_concepts <= MOST_CONCEPTS:
            raise UserError(f"num_concepts must be at least 1 and at most {MOST_CONCEPTS}, got {self.num_concepts}")


@dataclass(frozen=True)
class TrainingConfig(ExplainerConfig):
    """Fields shared by the methods that learn by gradient steps."""

    steps: int = 2000
    """Number of optimiser steps."""
    batch_size: int = 2048
    """Rows (or images) a step."""
    lr: float = 1e-3
    """Learning rate of Adam at its peak."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.lr > 0:
            raise UserError(f"lr must be positive, got {self.lr}")


def to_rows(activation: Tensor) -> Tensor:
    """(B, C) or (B, C, H, W) -> rows (B, C) or (B*H*W, C); positions of one image stay together, row-major."""
    if activation.ndim == 2:
        return activation
    if activation.ndim != 4:
        raise UserError(f"expected vectors (B, C) or maps (B, C, H, W), got shape {tuple(activation.shape)}")
    return activation.permute(0, 2, 3, 1).reshape(-1, activation.shape[1])


def from_rows(rows: Tensor, grid: tuple[int, ...]) -> Tensor:
    """The inverse of :func:`to_rows`: rows (B, K) or (B*H*W, K) -> (B, K) or (B, K, H, W)."""
    if not grid:
        return rows
    height, width = grid
    return rows.reshape(-1, height, width, rows.shape[1]).permute(0, 3, 1, 2)


class Explainer(nn.Module):
    """Base class: owns the config, the layer's spec and the conversion between maps and rows.

    Class attributes
    ----------------
    Config : the frozen dataclass of the method's options.
    target : what ``decode`` gives: ``"activation"``, ``"upper"`` (dict by layer name) or ``"image"``.
    reads : ``"rows"`` (the adapter below feeds single vectors), ``"pooled"`` (one vector an image: a map is averaged
        over its grid, concepts are (B, K)) or ``"maps"`` (whole activations).
    uses : fields of :class:`Batch` that ``losses`` needs besides the activation: ``"logits"``, ``"labels"``,
        ``"upper"``, ``"image"``, ``"tail"``, ``"to_logits"``, ``"to_code"``; see :meth:`needs` where options decide.
        ``"section"`` asks for :meth:`adopt` instead of a field.
    learned : True if the method is trained by gradient steps on ``losses``.
    deterministic : True if the seed changes nothing (PCA).

    Everything learned must live in parameters or buffers whose shapes follow from ``config`` and ``spec``, so that
    ``state_dict`` is the whole of a fitted explainer.
    """

    Config: ClassVar[type[ExplainerConfig]] = ExplainerConfig
    target: ClassVar[Literal["activation", "upper", "image"]] = "activation"
    reads: ClassVar[Literal["rows", "pooled", "maps"]] = "rows"
    uses: ClassVar[tuple[str, ...]] = ()
    learned: ClassVar[bool] = False
    deterministic: ClassVar[bool] = False

    def __init__(self, config: ExplainerConfig, spec: LayerSpec) -> None:
        super().__init__()
        if not isinstance(config, self.Config):
            raise UserError(f"{type(self).__name__} takes a {self.Config.__name__}, got {type(config).__name__}")
        self.config = config
        self.spec = spec

    # -- what everybody calls -------------------------------------------------------------------------------------

    @property
    def num_concepts(self) -> int:
        """K."""
        return self.config.num_concepts

    def encode(self, activation: Tensor) -> Tensor:
        """Concepts (B, K) of vectors (B, C), or concept maps (B, K, H, W) of maps (B, C, H, W)."""
        self._check_features(activation, self.spec.num_features, "activation")
        if self.reads == "pooled" and activation.ndim == 4:
            activation = activation.mean(dim=(2, 3))
        return from_rows(self.encode_rows(to_rows(activation)), tuple(activation.shape[2:]))

    def decode(self, concepts: Tensor) -> Tensor:
        """What ``target`` says; for ``"activation"`` (B, C) or (B, C, H, W) again."""
        self._check_features(concepts, self.num_concepts, "concepts")
        return from_rows(self.decode_rows(to_rows(concepts)), tuple(concepts.shape[2:]))

    def forward(self, activation: Tensor) -> Tensor:
        """``decode(encode(activation))``."""
        return self.decode(self.encode(activation))

    @property
    def dictionary(self) -> Tensor | None:
        """(K, C) if ``decode_rows`` is ``codes @ dictionary + constant``, else None."""
        return None

    # -- what a method overrides ----------------------------------------------------------------------------------

    @classmethod
    def needs(cls, config: ExplainerConfig) -> tuple[str, ...]:
        """The fields of :class:`Batch` that a fit with ``config`` needs besides the activation; default ``uses``.

        ``"masks"`` asks for rows that know which annotated labels they show (``LabelledRows`` of the supervised
        basis), by the annotations that ``config.annotations`` names.
        """
        return cls.uses

    @classmethod
    def check_activation(cls, config: ExplainerConfig, layer: str, activation: Tensor) -> None:
        """Refuses activations (B, C) or (B, C, H, W) of ``layer`` that no fit with ``config`` can take.

        A capture for the method calls it with every batch, so that it ends with the first one that is refused.

        Raises
        ------
        UserError : the reason, and what to do.
        """

    @classmethod
    def upper_layers(
        cls, config: ExplainerConfig, later: Sequence[str], *, learned: Collection[str] | None = None
    ) -> Sequence[str]:
        """With ``"upper"`` in :meth:`needs`: which of the layers that run ``later`` (in order) are captured as well;
        ``learned`` are those of them that have weights, None if it is not known.
        """
        return ()

    def adopt(self, section: nn.Module) -> None:
        """With ``"section"`` in :meth:`needs`: takes an independent, trainable copy of the network's part from the
        layer to ``spec.upper`` (activation -> dict by layer name, in eval mode). Called once, after construction and
        before the fit, or before the saved state is loaded.
        """

    def decoder_for(self, activation: Tensor) -> Callable[[Tensor], Any]:
        """:meth:`decode`, with what of ``activation`` reaches the target in parallel to the concepts held fixed
        (default: nothing does).
        """
        return self.decode

    def partial(self) -> dict[str, Callable[[Tensor], Any]]:
        """Methods that rebuild by several tracks: by name, from an activation to the target by one of them alone; they
        are scored as baselines of the whole.
        """
        return {}

    @classmethod
    def image_size(cls, config: ExplainerConfig, image: tuple[int, ...]) -> tuple[int, int]:
        """With ``"image"`` in :meth:`needs`: (S, S') of ``batch.image``; ``image`` is the network's input (m, H, W)."""
        return image[1], image[2]

    @classmethod
    def settle(
        cls, config: ExplainerConfig, *, class_names: Sequence[str], wnids: Sequence[str], decisions: np.ndarray
    ) -> ExplainerConfig:
        """The config with what the data decides filled in, before the explainer is built (class names, say).

        ``decisions`` (N,) holds the class of each image of the fit: its label, or the network's prediction where it has
        none. ``class_names`` and ``wnids`` are the classifier's; either may be empty.
        """
        return config

    def name_concepts(self) -> list[str]:
        """What the K concepts are called where they are shown."""
        return [f"concept {k}" for k in range(self.num_concepts)]

    @property
    def explained_classes(self) -> list[int] | None:
        """Classes whose scores the concepts explain; None for all."""
        return None

    def rebuilt_logits(self, concepts: Tensor, logits: Tensor) -> Tensor | None:
        """Methods that rebuild class scores themselves: ``logits`` (B, classes) with theirs put in.

        None (the default) leaves it to the classifier's tail, run on ``decode(concepts)``.
        """
        return None

    def contributions(self, concepts: Tensor, classes: Tensor) -> tuple[Tensor, Tensor] | None:
        """With :meth:`rebuilt_logits`: contributions (B, K) to the logit of one class per image (B,), and the base
        (B,).

        Base and contributions add up to the rebuilt logit. Base is NaN for a class that the method does not rebuild.
        None (the default) leaves it to gradient x concept through the tail.
        """
        return None

    def encode_rows(self, rows: Tensor) -> Tensor:
        """Rows (N, C) -> concept rows (N, K)."""
        raise NotImplementedError

    def decode_rows(self, codes: Tensor) -> Tensor:
        """Concept rows (N, K) -> rows (N, C)."""
        raise NotImplementedError

    def fit_rows(self, rows: Rows, *, seed: int) -> None:
        """Direct methods: the whole fit. Learned methods: statistics and initial values before the first step."""

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Learned methods: named scalar terms, already weighted; their sum is minimised."""
        raise NotImplementedError

    def optimizer(self) -> torch.optim.Optimizer:
        """Learned methods: the optimiser; default Adam at ``config.lr``."""
        assert isinstance(self.config, TrainingConfig)
        return torch.optim.Adam(self.parameters(), lr=self.config.lr)

    def lr_scale(self, step: int) -> float:
        """Learned methods: factor on the learning rate at ``step`` (0-based); default warm-up 5 %, then cosine to 0."""
        assert isinstance(self.config, TrainingConfig)
        total = self.config.steps
        warm = max(1, total // 20)
        if step < warm:
            return (step + 1) / warm
        progress = (step - warm) / max(1, total - warm)
        return 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * progress))))

    def after_step(self, step: int) -> dict[str, float]:
        """Learned methods: projections after each optimiser step; returns extra numbers for the history."""
        return {}

    @property
    def max_steps(self) -> int:
        """Learned methods: steps at most."""
        assert isinstance(self.config, TrainingConfig)
        return self.config.steps

    @property
    def balance(self) -> tuple[tuple[int, ...], float]:
        """Learned methods: classes and the share of every batch that is drawn evenly from images of theirs."""
        return (), 0.0

    def before_step(self, step: int, rows: Rows) -> Literal["go", "reset", "stop"]:
        """Learned methods: called before each step. "reset" starts it with a fresh optimiser, "stop" ends the fit.

        A fit that continues from a checkpoint calls it first with the step that it continues at. All state that it
        keeps must be in buffers.
        """
        return "go"

    def after_fit(self, rows: Rows) -> None:
        """Learned methods: statistics of the fitted explainer (on the CPU, in eval mode) over all entries."""

    def _check_features(self, tensor: Tensor, expected: int, what: str) -> None:
        if tensor.ndim not in (2, 4) or tensor.shape[1] != expected:
            raise UserError(
                f"{type(self).__name__} at layer {self.spec.name!r} expects {what} of {expected} features as "
                f"(B, {expected}) or (B, {expected}, H, W), got {tuple(tensor.shape)}"
            )

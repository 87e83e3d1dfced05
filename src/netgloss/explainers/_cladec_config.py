"""Options of ClaDec, and which units of a layer a decoder sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from netgloss.errors import UserError
from netgloss.explainers.base import TrainingConfig

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
    relevance : (num_features,) for the rule "relevance"; without it the first ones stand in until it is known.
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

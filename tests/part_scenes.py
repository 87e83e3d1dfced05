"""Toy scenes with planted parts, shared by tests of parts: moving blobs and textures mixed into a layer's channels.

Shape letters: B images, C channels, H W grid, parts and textures are sources.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from netgloss.explainers.base import Batch, LayerSpec
from netgloss.explainers.parts import PartConfig, PartExplainer

SIDE, CHANNELS, PARTS, TEXTURES = 10, 12, 3, 2
UPPER = {"maps": (16, SIDE, SIDE), "pooled": (16,)}


class ToySection(nn.Module):
    """What stands for the network above: a convolution, ReLU, and the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, 16, 3, padding=1)

    def forward(self, activation: Tensor) -> dict[str, Tensor]:
        maps = self.conv(activation).relu()
        return {"maps": maps, "pooled": maps.mean(dim=(2, 3))}


def scenes(number: int, *, seed: int = 0, mixing_seed: int = 0) -> tuple[Tensor, Tensor]:
    """Activations (B, C, H, W) >= 0 and the places (B, parts, 2) of the parts as (row, column)."""
    draw = torch.Generator().manual_seed(seed)
    cells = torch.stack([torch.randperm(SIDE * SIDE, generator=draw)[:PARTS] for _ in range(number)])
    places = torch.stack([cells // SIDE, cells % SIDE], dim=2)
    grid = torch.arange(SIDE)
    rows = (grid - places[..., :1]).abs()
    columns = (grid - places[..., 1:]).abs()
    blobs = (1 - 0.5 * (rows[..., :, None] + columns[..., None, :])).clamp_min(0) * 4
    textures = torch.rand(number, TEXTURES, SIDE, SIDE, generator=draw)
    mixing = torch.rand(CHANNELS, PARTS + TEXTURES, generator=torch.Generator().manual_seed(mixing_seed))
    sources = torch.cat([blobs, textures], dim=1)
    return torch.einsum("cs,bshw->bchw", mixing.square(), sources), places


class ToyRows:
    """The training entries, as ``netgloss.training`` hands them out."""

    def __init__(self, activation: Tensor, section: ToySection) -> None:
        self.activation = activation
        with torch.no_grad():
            self.upper = section(activation)

    @classmethod
    def of(cls, activation: Tensor, upper: dict[str, Tensor]) -> ToyRows:
        """Rows whose upper layers are known already."""
        rows = cls.__new__(cls)
        rows.activation, rows.upper = activation, upper
        return rows

    def examples(self, fields: object = ()) -> Iterator[Batch]:
        yield self.batch(torch.arange(len(self.activation)))

    def sample(self, max_rows: int, *, seed: int) -> Tensor:
        picks = torch.randperm(len(self.activation), generator=torch.Generator().manual_seed(seed))
        return self.activation[picks[:max_rows]]

    def batch(self, index: Tensor) -> Batch:
        return Batch(self.activation[index], index, upper={name: v[index] for name, v in self.upper.items()})


def fit_toy(
    seed: int, *, steps: int = 150, images: int = 256, **options: object
) -> tuple[PartExplainer, dict[str, float]]:
    """A PartExplainer of the scenes, and the last numbers of its watch."""
    torch.manual_seed(100 + seed)
    section = ToySection()
    rows = ToyRows(scenes(images, seed=seed)[0], section)
    torch.manual_seed(seed)
    config = PartConfig(**{"steps": steps, "lr": 3e-3, "kappa": 30.0, **options})  # type: ignore[arg-type]
    explainer = PartExplainer(config, LayerSpec("toy", (CHANNELS, SIDE, SIDE), True, 0, UPPER))
    explainer.adopt(section)
    explainer.fit_rows(rows, seed=seed)  # type: ignore[arg-type]
    optimizer = explainer.optimizer()
    explainer.train()
    numbers: dict[str, float] = {}
    for step in range(steps):
        loss = torch.stack(list(explainer.losses(rows.batch(torch.randperm(images)[:64])).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        numbers = explainer.after_step(step)
    return explainer.eval(), numbers


def peaks_on_parts(explainer: PartExplainer, *, seed: int = 99, images: int = 200) -> Tensor:
    """(K, parts) share of new scenes in which a map peaks on, or beside, each part."""
    activation, places = scenes(images, seed=seed)
    with torch.no_grad():
        peak = explainer.encode(activation).flatten(2).argmax(dim=2)
    found = torch.stack([peak // SIDE, peak % SIDE], dim=2)
    near = (found[:, :, None] - places[:, None]).abs().amax(dim=3) <= 1
    return near.float().mean(dim=0)

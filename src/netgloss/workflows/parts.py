"""Galleries and shares of a run whose concepts have maps: which places each filter sees, what each way carries.

Per filter, the images whose peak passes the level that 0.3 % of its activations exceed, strongest first; the map is
masked around its peak as the fit does (show the unmasked one too: a mask makes any map look like a part). Filters often
find the same place: those that coincide with a filter already shown are passed over and counted beside it.

Source of the choice of images: the authors' code for drawing (arXiv 1710.00935); their sweep of occluders is replaced
by upsampling the map.

Shape letters: B images, K concepts, H W grid.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from netgloss.activations import Store
from netgloss.activations.layer import split_store
from netgloss.errors import UserError
from netgloss.explainers.parts import coinciding_peaks, mean_of_pairs, peak_mask
from netgloss.runs.run import Run, save_figure

if TYPE_CHECKING:
    from netgloss.data import ImageSource
    from netgloss.explainers.base import Explainer

_RARE = 0.003
_SAMPLED = 1_000_000


def write_galleries(
    run: Run,
    source: ImageSource,
    out: str | Path,
    *,
    filters: int = 8,
    columns: int = 10,
    masked: bool = True,
    distinct: float = 0.5,
) -> list[Path]:
    """``parts.png`` and ``parts.json`` in ``out``, from held-out images of the run.

    Parameters
    ----------
    source : the images of the run, as it was made with.
    filters : how many, the most important for the predictions first (the most active where the run says nothing).
    distinct : a filter whose peak coincides with that of one already shown in more than this share of the images is
        passed over; 1 passes over none.

    Raises
    ------
    UserError : other images than those of the run; a layer without a grid.
    """
    from netgloss.figures.parts import part_gallery

    if min(filters, columns) < 1:
        raise UserError(f"filters and columns must be at least 1, got {filters} and {columns}")
    if not 0 < distinct <= 1:
        raise UserError(f"distinct is a share of the images, above 0 and at most 1, got {distinct:g}")
    store = Store.open(run.store)
    if source.fingerprint != store.key.data_fingerprint:
        raise UserError(f"{source.description} are not the images of the run {run.path}")
    if len(store.shapes[run.layer]) != 3:
        raise UserError(f"layer {run.layer!r} has no grid: its concepts have no places to show")
    fit_images, heldout = split_store(store)
    images = heldout if len(heldout) else fit_images
    explainer, preprocessing = (
        run.explainer,
        run.classifier().preprocessing if run.network is None else (run.network.preprocessing),
    )
    maps = _maps(explainer, store, run.layer, images)
    order, importance = _order(run, maps)
    near, both = coinciding_peaks(maps)
    rows: list[list[Any]] = []
    captions, records = [], []
    for k, same in _apart(order, near / both, distinct):
        if len(rows) == filters:
            break
        chosen = strongest_images(maps[:, k], columns)
        if not len(chosen):
            continue
        whole = maps[chosen, k][:, None].float()
        shown = (whole * peak_mask(whole) if masked else whole)[:, 0].numpy()
        pictures = [
            preprocessing.pixels(source.image(int(images[i]))).permute(1, 2, 0).clamp(0, 1).numpy()
            for i in chosen.tolist()
        ]
        rows.append([(picture, part, None) for picture, part in zip(pictures, shown, strict=True)])
        captions.append(explainer.name_concepts()[k] + (f"\n+ {len(same)} alike" if same else ""))
        records.append(
            {
                "filter": k,
                "alike": same,
                "importance": importance[k] if importance else None,
                "active_images": float((maps[:, k].flatten(1).amax(1) > 0).float().mean()),
                "images": [store.ids[int(images[i])] for i in chosen.tolist()],
            }
        )
    if not rows:
        raise UserError(f"no concept of {run.path} is active in any of {len(images)} images")
    what = "masked around their peaks" if masked else "unmasked"
    figure = part_gallery(rows, captions, title=f"{run.method} at {run.layer}: strongest held-out images, maps {what}")
    numbers = {
        "filters": records,
        "coincidence": mean_of_pairs(near, both),
        "shares": way_shares(explainer, store, run.layer, images[:256]),
    }
    return save_figure(Path(out), "parts" if masked else "parts-unmasked", figure, numbers)


def _apart(order: Sequence[int], shares: Tensor, distinct: float) -> Iterator[tuple[int, list[int]]]:
    """Filters in order without those that coincide with an earlier one, each with those that coincide with it."""
    left = list(order)
    while left:
        k, *others = left
        same = [j for j in others if float(shares[k, j]) > distinct]
        left = [j for j in others if j not in set(same)]
        yield k, same


def strongest_images(maps: Tensor, count: int) -> Tensor:
    """Images (B, H, W) of one filter whose peak passes the level exceeded by 0.3 % of its activations, strongest
    first, at most ``count``; those of a dead filter are none."""
    values = maps.flatten().float()
    sampled = values[:: max(1, len(values) // _SAMPLED)]
    level = torch.quantile(sampled, 1 - _RARE)
    peaks = maps.flatten(1).amax(dim=1).float()
    order = peaks.argsort(descending=True)[:count]
    return order[(peaks[order] >= level) & (peaks[order] > float(values.min()))]


def way_shares(explainer: Explainer, store: Store, layer: str, images: np.ndarray) -> dict[str, float]:
    """How much each way (track) of an explainer moves the last layer above, as shares that sum to 1; {} if it has one
    way only.

    With U the rebuilt activation from all ways and U_w that from way w alone, way w counts ``|U - U_other|``: what is
    lost when it is taken out. Ours; p and the norms at x_enc say less, as the decoder may weight the ways again.
    """
    ways = explainer.partial()
    if len(ways) != 2:
        return {}
    names = list(ways)
    lost = torch.zeros(2, dtype=torch.float64)
    with torch.no_grad():
        for start in range(0, len(images), 32):
            activation = torch.from_numpy(store.read(layer, images[start : start + 32])).float()
            whole = _last(explainer(activation))
            for w, name in enumerate(names):
                lost[1 - w] += (whole - _last(ways[name](activation))).flatten(1).norm(dim=1).sum().double()
    return {name: float(lost[w] / lost.sum()) for w, name in enumerate(names)}


def _last(upper: dict[str, Tensor]) -> Tensor:
    return next(reversed(upper.values()))


@torch.no_grad()
def _maps(explainer: Explainer, store: Store, layer: str, images: np.ndarray) -> Tensor:
    """(B, K, H, W) float16 on the CPU."""
    parts = []
    for start in range(0, len(images), 32):
        activation = torch.from_numpy(store.read(layer, images[start : start + 32])).float()
        parts.append(explainer.encode(activation).half())
    return torch.cat(parts)


def _order(run: Run, maps: Tensor) -> tuple[list[int], dict[int, Any]]:
    """Filters, the most important first, with their importance where the run was evaluated."""
    if (run.path / "concepts.json").exists():
        importance = {c["id"]: c["importance"] for c in run.concepts["concepts"]}
        return sorted(importance, key=lambda k: -abs(importance[k] or 0.0)), importance
    activity = maps.float().mean(dim=(0, 2, 3))
    return activity.argsort(descending=True).tolist(), {}

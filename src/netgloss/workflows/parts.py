"""Parts: galleries of a run whose concepts have maps, and how much each track contributes.

Each row is one distinct part: its name (from masks, where the run has labels), the classes whose logits it adds most
to, and its strongest images, at most a third of them of one class. The map is masked around its peak, as the fit does
(look at the unmasked one too: a mask makes any map look like a part). Filters often find the same place: those that
coincide with a filter already shown are skipped and counted.

Shape letters: B images, K concepts, H W grid.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from netgloss.activations import Store
from netgloss.activations.layer import split_store
from netgloss.data.sources import open_sources, refuse_among_images
from netgloss.errors import UserError
from netgloss.explainers.part_maps import coinciding_peaks, mean_of_pairs, peak_mask
from netgloss.explanations.part_galleries import distinct_filters, strongest_images, track_shares
from netgloss.runs.run import Run, save_figure

if TYPE_CHECKING:
    from netgloss.data import ImageSource
    from netgloss.explainers.base import Explainer


def parts(
    run: Run | str | Path,
    images: ImageSource | str | Path,
    *,
    out: str | Path,
    filters: int = 8,
    columns: int = 10,
    masked: bool = True,
    distinct: float = 0.5,
) -> list[Path]:
    """``parts.png`` and ``parts.json`` in ``out``, from held-out images of the run.

    Parameters
    ----------
    images : the images of the run, or what ``netgloss.open_images`` takes.
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
    run = run if isinstance(run, Run) else Run(run)
    source, store = open_sources(images), Store.open(run.store)
    refuse_among_images(out, source)
    if not store.is_of(source):
        raise UserError(f"{source.description} are not the images of the run {run.path}")
    if len(store.shapes[run.layer]) != 3:
        raise UserError(f"layer {run.layer!r} has no grid: its concepts have no places to show")
    fit_images, heldout = split_store(store)
    chosen_from = heldout if len(heldout) else fit_images
    explainer, preprocessing = (
        run.explainer,
        run.classifier().preprocessing if run.network is None else (run.network.preprocessing),
    )
    maps = _maps(explainer, store, run.layer, chosen_from)
    order, known = _order(run, maps)
    decided = _decided(store, chosen_from)
    near, both = coinciding_peaks(maps)
    rows: list[list[Any]] = []
    captions, records = [], []
    for k, same in distinct_filters(order, near / both, distinct):
        if len(rows) == filters:
            break
        chosen = strongest_images(maps[:, k], columns, decided)
        if not len(chosen):
            continue
        whole = maps[chosen, k][:, None].float()
        shown = (whole * peak_mask(whole) if masked else whole)[:, 0].numpy()
        pictures = [
            preprocessing.pixels(source.image(int(chosen_from[i]))).permute(1, 2, 0).clamp(0, 1).numpy()
            for i in chosen.tolist()
        ]
        rows.append([(picture, part, None) for picture, part in zip(pictures, shown, strict=True)])
        one = known.get(k, {})
        captions.append(_caption(explainer.name_concepts()[k], one, same))
        records.append(
            {
                "filter": k,
                "label": one.get("label"),
                "coinciding": same,
                "importance": one.get("importance"),
                "classes": one.get("classes", []),
                "active_images": float((maps[:, k].flatten(1).amax(1) > 0).float().mean()),
                "images": [store.ids[int(chosen_from[i])] for i in chosen.tolist()],
            }
        )
    if not rows:
        raise UserError(f"no concept of {run.path} is active in any of {len(chosen_from)} images")
    what = "masked around their peaks" if masked else "unmasked"
    figure = part_gallery(rows, captions, title=f"{run.method} at {run.layer}: strongest held-out images, maps {what}")
    numbers = {
        "filters": records,
        "coincidence": mean_of_pairs(near, both),
        "shares": track_shares(explainer, store, run.layer, chosen_from[:256]),
    }
    return save_figure(Path(out), "parts" if masked else "parts-unmasked", figure, numbers)


@torch.no_grad()
def _maps(explainer: Explainer, store: Store, layer: str, images: np.ndarray) -> Tensor:
    """(B, K, H, W) float16 on the CPU."""
    parts = []
    for start in range(0, len(images), 32):
        activation = torch.from_numpy(store.read(layer, images[start : start + 32])).float()
        parts.append(explainer.encode(activation).half())
    return torch.cat(parts)


def _order(run: Run, maps: Tensor) -> tuple[list[int], dict[int, Any]]:
    """Filters, the most important first, with what the run says of each (nothing where it was not evaluated)."""
    if (run.path / "concepts.json").exists():
        known = {concept["id"]: concept for concept in run.concepts["concepts"]}
        return sorted(known, key=lambda k: -abs(known[k]["importance"] or 0.0)), known
    activity = maps.float().mean(dim=(0, 2, 3))
    return activity.argsort(descending=True).tolist(), {}


def _decided(store: Store, images: np.ndarray) -> np.ndarray | None:
    """The class that the network gives each image; None where the store holds no logits."""
    try:
        return np.asarray(store.read_logits(images)).argmax(axis=1)
    except (UserError, KeyError):
        return None


def _caption(name: str, concept: dict[str, Any], coinciding: list[int]) -> str:
    """What the filter is called, the classes that it adds most to, and how many others look at the same place."""
    from netgloss.figures.style import number

    lines = [f"{concept['label']} ({name})" if concept.get("label") else name]
    lines += [f"{number(c['contribution'], signed=True)} {c['class']}" for c in concept.get("classes", [])[:2]]
    return "\n".join([*lines, f"+ {len(coinciding)} coinciding"] if coinciding else lines)

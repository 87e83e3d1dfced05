"""The pictures of a consistency run: top real and adversarial images of some units with heatmaps, and a trace.

Shape letters: N images, U units, h w a layer's map.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from netgloss.classifiers.taps import Taps
from netgloss.figures import heatmap_tile
from netgloss.metrics.consistency.difference import strongest_units

if TYPE_CHECKING:
    from netgloss.adversarial import PixelClassifier
    from netgloss.adversarial.layer_consistency import LayerResult
    from netgloss.adversarial.pixels import LabelledPixels
    from netgloss.adversarial.probe import Adversarial
    from netgloss.runs.run import Run

QUANTILE = 0.995
"""Of a unit's map values over R: where its contour is drawn."""


def choose_units(result: LayerResult, number: int) -> list[int]:
    """Half the most consistent live units on R, half those that lose most on V (all the former without V)."""
    live = result.scores.live.nonzero().squeeze(1)
    by_score = live[result.scores.calibrated[live].argsort(descending=True, stable=True)].tolist()
    if result.comparison is None:
        return by_score[:number]
    chosen = by_score[: (number + 1) // 2]
    loss = result.scores.calibrated - result.comparison.adversarial.calibrated
    both = result.comparison.live.nonzero().squeeze(1)
    by_loss = both[loss[both].argsort(descending=True, stable=True)].tolist()
    return chosen + [u for u in by_loss if u not in chosen][: number - len(chosen)]


@torch.no_grad()
def unit_maps(
    pixels: PixelClassifier,
    images: Tensor,
    layer: str,
    concepts: Tensor,
    poles: Tensor,
    encode: Callable[[Tensor], Tensor] | None,
    *,
    batch_size: int = 32,
) -> Tensor:
    """(N, u, h, w) maps of some units, their pole made positive; vectors have 1 x 1 maps."""
    found = []
    with Taps(pixels.net, layer) as taps:
        for part in images.split(batch_size):
            values = taps(pixels.normalise(part.to(pixels.mean.device)))[layer]
            values = values if encode is None else encode(values)
            values = values.reshape(*values.shape[:2], *(values.shape[2:] or (1, 1)))
            found.append((values[:, concepts] * poles.to(values)[:, None, None]).float().cpu())
    return torch.cat(found)


def gallery(
    run: Run,
    pixels: PixelClassifier,
    data: LabelledPixels,
    adversarial: Adversarial | None,
    result: LayerResult,
    units: int,
    images: int,
    encode: Callable[[Tensor], Tensor] | None,
) -> list[dict[str, Any]]:
    """Writes the pictures below ``images/`` and gives one record a unit."""
    if not units or not images:
        return []
    chosen = choose_units(result, units)
    sets = [("real", data.pixels(), result.real)]
    if adversarial is not None and result.adversarial is not None:
        sets.append(("adversarial", adversarial.found.images.cpu(), result.adversarial))
    concepts, poles = result.units.concept[chosen], result.units.pole[chosen]
    maps = {name: unit_maps(pixels, pictures, result.layer, concepts, poles, encode) for name, pictures, _ in sets}
    records = []
    for place, u in enumerate(chosen):
        real_maps = maps["real"][:, place]
        threshold = float(np.quantile(real_maps.numpy(), QUANTILE))
        shown: dict[str, list[tuple[int, float]]] = {}
        for name, _, responses in sets:
            top = responses[:, u].topk(min(images, len(responses)))
            shown[name] = list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        high = max(value for entries in shown.values() for _, value in entries)
        record: dict[str, Any] = {
            "unit": int(result.units.concept[u]),
            "pole": int(result.units.pole[u]),
            "consis_cal_real": float(result.scores.calibrated[u]),
            "threshold": threshold,
        }
        if result.comparison is not None:
            for key in ("cs1", "cs2", "csc1", "csc2"):
                record[key] = float(getattr(result.comparison, key)[u])
            record["consis_cal_adversarial"] = float(result.comparison.adversarial.calibrated[u])
        for name, pictures, _ in sets:
            record[name] = []
            for rank, (i, value) in enumerate(shown[name]):
                tile = heatmap_tile(_picture(pictures[i]), maps[name][i, place].numpy(), high=high, threshold=threshold)
                file = f"{_safe(result.layer)}-unit{record['unit']}{'n' if record['pole'] < 0 else ''}-{name}{rank}.jpg"
                _write(run, file, tile)
                entry: dict[str, Any] = {
                    "image": file,
                    "id": data.ids[i],
                    "true": data.title(int(data.probe_labels[i])),
                    "response": value,
                }
                if name == "adversarial" and adversarial is not None and adversarial.targets is not None:
                    entry["target"] = data.title(int(adversarial.targets[i]))
                    entry["reached"] = bool(adversarial.found.success[i])
                record[name].append(entry)
        records.append(record)
    return records


def trace(
    run: Run,
    data: LabelledPixels,
    adversarial: Adversarial,
    result: LayerResult,
    differences: dict[str, Any],
) -> dict[str, Any] | None:
    """The first image whose copy reached its target, with the ten units of largest prediction difference of each."""
    if "adversarial" not in differences:
        return None
    chosen = differences["chosen"]
    reached = adversarial.found.success.cpu()[chosen] & differences["real"]["right"]
    if not reached.any():
        return None
    row = int(reached.nonzero()[0])
    i = int(chosen[row])
    record: dict[str, Any] = {"id": data.ids[i], "true": data.title(int(data.probe_labels[i]))}
    if adversarial.targets is not None:
        record["target"] = data.title(int(adversarial.targets[i]))
    single = (result.units.pole > 0).nonzero().squeeze(1)
    for name, image in (
        ("real", data.pixels(torch.tensor([i]))[0]),
        ("adversarial", adversarial.found.images[i].cpu()),
    ):
        found = differences[name]
        units, _ = strongest_units(found["pd"][row : row + 1])
        file = f"{_safe(result.layer)}-trace-{name}.jpg"
        _write(run, file, heatmap_tile(_picture(image), None, high=1.0))
        entries = []
        for unit in units[0].tolist():
            column = int(single[unit])
            top = int(result.real[:, column].argmax())
            picture = f"{_safe(result.layer)}-trace-top{unit}.jpg"
            _write(run, picture, heatmap_tile(_picture(data.pixels(torch.tensor([top]))[0]), None, high=1.0))
            entries.append(
                {
                    "unit": unit,
                    "difference": float(found["pd"][row, unit]),
                    "image": picture,
                    "top_class": data.title(int(result.scores.classes[:, column].argmax())),
                    "share": float(result.scores.classes[:, column].max()),
                }
            )
        record[name] = {"image": file, "s": float(found["s"][row]), "units": entries}
    return record


def _picture(image: Tensor) -> np.ndarray:
    """(channels, H, W) in [0, 1] -> (H, W, 3) or (H, W) uint8."""
    array = image.mul(255).round().byte().numpy()
    return array[0] if len(array) == 1 else array.transpose(1, 2, 0)


def _write(run: Run, file: str, tile: np.ndarray) -> None:
    from PIL import Image

    run.write_image(file, Image.fromarray(tile))


def _safe(layer: str) -> str:
    """A layer's name as part of a file name."""
    return "".join(c if c.isalnum() or c in ".-" else "_" for c in layer)[:60]

"""Measures how consistent the units of layers are on real images R and adversarial images V.

The definitions are in ``metrics/consistency/``. One pass over the images reads all layers at once; of a unit's map only
the response is kept.

Shape letters: N real images, M adversarial ones, K concepts, U units, C classes of the probe set.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from netgloss.adversarial.crafting import PixelClassifier
from netgloss.adversarial.pixels import LabelledPixels
from netgloss.adversarial.probe import Adversarial
from netgloss.classifiers.taps import Taps
from netgloss.metrics.consistency.companions import kernel_agreement
from netgloss.metrics.consistency.under_attack import Comparison, compare, compare_fooled, cosines_by_bin
from netgloss.metrics.consistency.units import Units, UnitScores, responses, unit_consistency
from netgloss.metrics.feature_health import class_mean_ratio, effective_rank, source_vs_nearest_target_ratio
from netgloss.progress import Progress, Silent

Encode = Callable[[Tensor], Tensor]
Outputs = dict[str, Tensor]
Reader = Callable[[Outputs], Tensor]
DIRECTIONS = 256
"""Random directions of the control, at most."""


@torch.no_grad()
def read_layers(
    pixels: PixelClassifier,
    images: Tensor,
    readers: Mapping[str, Reader],
    layers: Sequence[str],
    *,
    batch_size: int = 32,
    advance: Callable[[int], None] | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """What each reader makes of the layers' outputs, joined over images (N, channels, H, W), on the CPU; and logits
    (N, classes).
    """
    found: dict[str, list[Tensor]] = {name: [] for name in readers}
    logits = []
    with Taps(pixels.net, layers, stop=False) as taps:
        for part in images.split(batch_size):
            outputs = taps(pixels.normalise(part.to(pixels.mean.device)))
            logits.append(taps.logits.float().cpu())
            for name, reader in readers.items():
                found[name].append(reader(outputs).float().cpu())
            if advance is not None:
                advance(len(part))
    return {name: torch.cat(parts) for name, parts in found.items()}, torch.cat(logits)


@dataclass(frozen=True)
class LayerResult:
    """Everything measured of one layer.

    Attributes
    ----------
    units : concept and pole of each of U units. real, adversarial : responses (N, U) and (M, U).
    scores : on R. comparison, fooled : with V, on all of it and on what reached its target; None where not measured.
    random, channels, untrained : consis_cal of live random directions on R and V, the same of the layer's channels
        where the units are an explainer's concepts, and the mean of the untrained network's units.
    agreement : Spearman correlation of consis between kernels.
    bins : means of the cosines by quantile bin of consis on R.
    health : norms, effective rank and distance ratios of the layer's features.
    """

    layer: str
    units: Units
    real: Tensor
    adversarial: Tensor | None
    scores: UnitScores
    comparison: Comparison | None
    fooled: Comparison | None
    random: dict[str, Tensor] = field(default_factory=dict)
    channels: dict[str, Tensor] = field(default_factory=dict)
    untrained: float | None = None
    agreement: dict[str, float] = field(default_factory=dict)
    bins: list[dict[str, float]] = field(default_factory=list)
    health: dict[str, float] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """Numbers of the layer, ready for JSON."""
        return {
            **self.scores.summary(),
            "attack": None if self.comparison is None else self.comparison.summary(),
            "fooled": None if self.fooled is None else self.fooled.summary(),
            **{f"random_{name}": _mean(values) for name, values in self.random.items()},
            **{f"channels_{name}": _mean(values) for name, values in self.channels.items()},
            "untrained": self.untrained,
            "kernels": self.agreement,
            "health": self.health,
        }


@dataclass(frozen=True)
class UnitOptions:
    """How units are scored.

    Parameters
    ----------
    controls : measure random directions too, and the layer's channels where concepts are scored.
    pooling : a unit's response to an image, from its map.
    k : size of a unit's top set. null_draws : random top sets for p-values.
    """

    controls: bool = True
    pooling: Literal["max", "mean"] = "max"
    k: int | None = None
    null_draws: int = 2000
    seed: int = 0
    batch_size: int = 32


def measure_layers(
    pixels: PixelClassifier,
    data: LabelledPixels,
    layers: Sequence[str],
    affinities: Mapping[str, np.ndarray],
    *,
    adversarial: Adversarial | None,
    encoders: Mapping[str, Encode] | None = None,
    untrained: PixelClassifier | None = None,
    options: UnitOptions | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, LayerResult], dict[str, Tensor]]:
    """Units of several layers on R = ``data`` and on V.

    Parameters
    ----------
    affinities : as :meth:`AffinityChoice.build` gives them.
    encoders : by layer, an explainer's ``encode``; default the layer's channels.
    untrained : the network with random weights, as a control.

    Returns
    -------
    The layers' results, and logits of R (``"real"``) and V (``"adversarial"``).
    """
    encoders, options, progress = encoders or {}, options or UnitOptions(), progress or Silent()
    sets = {"real": data.pixels()}
    if adversarial is not None:
        sets["adversarial"] = adversarial.found.images
    passes = len(sets) * (1 + options.controls) + (untrained is not None)
    progress.start(f"units seed {options.seed}", passes * len(data), unit="images")
    read = partial(read_layers, layers=layers, batch_size=options.batch_size, advance=progress.advance)
    responses_, logits = _read_responses(pixels, sets, layers, encoders, untrained, options, read)
    progress.finish()
    results = {
        layer: _layer_result(layer, responses_, data, affinities, adversarial, options, is_encoded=layer in encoders)
        for layer in layers
    }
    return results, logits


@dataclass(frozen=True)
class _Responses:
    """Responses by set ("real", "adversarial") and reader: of units, of random directions, of the untrained network."""

    tables: dict[str, dict[str, Tensor]]
    directions: dict[str, dict[str, Tensor]]
    untrained: dict[str, Tensor]


def _read_responses(
    pixels: PixelClassifier,
    sets: Mapping[str, Tensor],
    layers: Sequence[str],
    encoders: Mapping[str, Encode],
    untrained: PixelClassifier | None,
    options: UnitOptions,
    read: Callable[..., tuple[dict[str, Tensor], Tensor]],
) -> tuple[_Responses, dict[str, Tensor]]:
    readers: dict[str, Reader] = {}
    for layer in layers:
        readers[f"units {layer}"] = _responses_of(layer, encoders.get(layer), options.pooling)
        readers[f"mean {layer}"] = _mean_of(layer)
        if options.controls and layer in encoders:
            readers[f"channels {layer}"] = _responses_of(layer, None, options.pooling)
    tables: dict[str, dict[str, Tensor]] = {}
    logits = {}
    for name, images in sets.items():
        tables[name], logits[name] = read(pixels, images, readers)
    directions: dict[str, dict[str, Tensor]] = {}
    if options.controls:
        means = {layer: tables["real"][f"mean {layer}"].mean(0) for layer in layers}
        turned = {layer: _directions_of(layer, means[layer], options.seed, options.pooling) for layer in layers}
        directions = {name: read(pixels, images, turned)[0] for name, images in sets.items()}
    bare: dict[str, Tensor] = {}
    if untrained is not None:
        bare, _ = read(untrained, sets["real"], {n: r for n, r in readers.items() if n.startswith("units")})
    return _Responses(tables, directions, bare), logits


def _layer_result(
    layer: str,
    responses_: _Responses,
    data: LabelledPixels,
    affinities: Mapping[str, np.ndarray],
    adversarial: Adversarial | None,
    options: UnitOptions,
    *,
    is_encoded: bool,
) -> LayerResult:
    scoring: dict[str, Any] = {"k": options.k, "seed": options.seed, "null_draws": options.null_draws}

    def live(by_set: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """consis_cal of what is live on R and V together, on each of them."""
        units, quiet = Units.of(*by_set.values()), {**scoring, "null_draws": 0}
        return {
            name: _live(unit_consistency(units.select(table), data.probe_labels, affinities["chosen"], **quiet))
            for name, table in by_set.items()
        }

    tables = responses_.tables
    units = Units.of(*(table[f"units {layer}"] for table in tables.values()))
    chosen = [units.select(table[f"units {layer}"]) for table in tables.values()]
    comparison, fooled = _compared(chosen, data, torch.arange(len(data)), affinities, adversarial, scoring)
    if comparison is None:
        scores = unit_consistency(chosen[0], data.probe_labels, affinities["chosen"], **scoring)
    else:
        scores = comparison.real
    directions = {name: table[layer] for name, table in responses_.directions.items()}
    channels = {name: table[f"channels {layer}"] for name, table in tables.items() if options.controls and is_encoded}
    bare = responses_.untrained
    return LayerResult(
        layer=layer,
        units=units,
        real=chosen[0],
        adversarial=chosen[1] if len(chosen) > 1 else None,
        scores=scores,
        comparison=comparison,
        fooled=fooled,
        random=live(directions) if options.controls else {},
        channels=live(channels) if channels else {},
        untrained=_mean(live({"real": bare[f"units {layer}"]})["real"]) if bare else None,
        agreement=kernel_agreement(scores, {name: affinities[name] for name in ("gauss", "exp", "identity")}),
        bins=[] if comparison is None else cosines_by_bin(comparison),
        health=_health(tables, layer, data, adversarial),
    )


def network_mean(results: Mapping[str, LayerResult]) -> dict[str, float]:
    """Mean over the declared layers of their mean consis_cal, on R and where measured on V (the published rule is
    unknown).
    """
    found = {"real": _mean(torch.tensor([r.scores.summary()["consis_cal"] for r in results.values()]))}
    compared = [r.comparison.summary() for r in results.values() if r.comparison is not None]
    if compared:
        found |= {
            name: _mean(torch.tensor([c[f"consis_cal_{name}"] for c in compared])) for name in ("adversarial", "union")
        }
    return found


def _compared(
    chosen: list[Tensor],
    data: LabelledPixels,
    sources: Tensor,
    affinities: Mapping[str, np.ndarray],
    adversarial: Adversarial | None,
    options: dict[str, Any],
) -> tuple[Comparison | None, Comparison | None]:
    if adversarial is None:
        return None, None
    common: dict[str, Any] = {**options, "cross_affinity": affinities["exp"], "targets": adversarial.targets}
    r, v = chosen
    everything = compare(r, v, data.probe_labels, sources, affinities["chosen"], **common)
    if adversarial.targets is None:
        return everything, None
    fooled = adversarial.found.success.cpu()
    if not fooled.any():
        return everything, None
    part = compare_fooled(r, v, data.probe_labels, sources, affinities["chosen"], fooled=fooled, **common)
    return everything, part


def _health(
    tables: Mapping[str, dict[str, Tensor]], layer: str, data: LabelledPixels, adversarial: Adversarial | None
) -> dict[str, float]:
    """Of the layer's features averaged over the grid."""
    real = tables["real"][f"mean {layer}"]
    found = {"feature_norm": float(real.norm(dim=1).mean()), "effective_rank": effective_rank(real)}
    if adversarial is not None and adversarial.targets is not None:
        fake, labels = tables["adversarial"][f"mean {layer}"], data.probe_labels
        found["class_mean_ratio"] = float(class_mean_ratio(fake, real, labels, labels, adversarial.targets).mean())
        found["source_vs_nearest_target_ratio"] = float(
            source_vs_nearest_target_ratio(fake, real, labels, torch.arange(len(data)), adversarial.targets).mean()
        )
    return found


def _responses_of(layer: str, encode: Encode | None, pooling: Literal["max", "mean"]) -> Reader:
    return lambda outputs: responses(outputs[layer] if encode is None else encode(outputs[layer]), pooling=pooling)


def _mean_of(layer: str) -> Reader:
    return lambda outputs: outputs[layer].reshape(*outputs[layer].shape[:2], -1).mean(2)


def _directions_of(layer: str, mean: Tensor, seed: int, pooling: Literal["max", "mean"]) -> Reader:
    """Responses of orthonormal random directions of the centred activation."""
    drawn = torch.randn(len(mean), min(DIRECTIONS, len(mean)), generator=torch.Generator().manual_seed(seed))
    basis_CK = torch.linalg.qr(drawn)[0]

    def read(outputs: dict[str, Tensor]) -> Tensor:
        values = outputs[layer]
        turned = torch.tensordot(
            (values - mean.to(values).reshape(-1, *([1] * (values.ndim - 2)))).movedim(1, -1), basis_CK.to(values), 1
        )
        return responses(turned.movedim(-1, 1), pooling=pooling)

    return read


def _live(scores: UnitScores) -> Tensor:
    return scores.calibrated[scores.live]


def _mean(values: Tensor) -> float:
    kept = values[~values.isnan()]
    return float(kept.double().mean()) if len(kept) else math.nan

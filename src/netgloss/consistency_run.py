"""A consistency run: units of a network on real and adversarial images, in a folder with a report.

::

    units.csv      one row a unit and layer
    result.json    settings, affinity, attack, summaries a layer, controls, histograms, galleries
    scores.json    consis_cal a layer, with random directions and the untrained network beside it
    images/        top images of the units shown, with heat
    run.json, report.html

Each seed draws other images (where fewer than all are asked for), targets and starts; the report shows the first seed.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from netgloss.adversarial import PixelClassifier
from netgloss.adversarial.pixels import LabelledPixels, load_pixels
from netgloss.classifiers import Classifier, Tail
from netgloss.consistency_gallery import gallery, trace
from netgloss.consistency_probe import (
    Adversarial,
    AffinityChoice,
    AttackChoice,
    Encode,
    LayerResult,
    attack_probe,
    measure_layers,
    network_mean,
)
from netgloss.errors import UserError
from netgloss.metrics.base import Score, interval
from netgloss.metrics.consistency import DEFINITION, STATUS
from netgloss.metrics.consistency_companions import best_subtree, consistency_by_depth, half_reliability
from netgloss.metrics.consistency_difference import (
    agreement_with_units,
    detection_auroc,
    prediction_difference,
    unchanged,
)
from netgloss.metrics.taxonomy import read_data_noun, read_taxonomy, wordnet
from netgloss.progress import Progress, Silent
from netgloss.run import Run, load_explainer, to_json, write_atomically

if TYPE_CHECKING:
    from netgloss.data import ImageSource


@dataclass(frozen=True)
class ConsistencyOptions:
    """How units are scored and shown."""

    seeds: int = 1
    """Repetitions with other images, targets and starts; several give an interval."""
    max_images: int | None = None
    """Probe with this many images, equally many of every class; default all, cut to the smallest class."""
    k: int | None = None
    """Size of a unit's top set; default the larger of 1 % and 20, at most the smallest class."""
    pooling: Literal["max", "mean"] = "max"
    """A unit's response to an image: maximum or mean of its map."""
    controls: bool = True
    """Measure random directions and the untrained network too."""
    null_draws: int = 2000
    """Random top sets for p-values; 0 leaves them out."""
    difference_images: int = 64
    """Images for prediction differences, the agreement s and the trace; 0 leaves them out."""
    shown_units: int = 12
    """Units with pictures in the report."""
    shown_images: int = 6
    """Top images of each."""

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise UserError(f"seeds must be at least 1, got {self.seeds}")
        if min(self.null_draws, self.difference_images, self.shown_units, self.shown_images) < 0:
            raise UserError("null_draws, difference_images, shown_units and shown_images must not be negative")


def consistency_run(
    classifier: Classifier,
    images: ImageSource,
    layers: Sequence[str],
    *,
    out: str | Path,
    attack: AttackChoice | None = None,
    affinity: AffinityChoice | None = None,
    options: ConsistencyOptions | None = None,
    explainer: str | Path | None = None,
    device: str = "cpu",
    command: str = "",
    progress: Progress | None = None,
) -> Run:
    """Scores the channels of ``layers``, or the concepts of a run folder's explainer at its layer.

    Raises
    ------
    UserError : for what does not fit, and if ``out`` holds another run.
    """
    attack, affinity, options = attack or AttackChoice(), affinity or AffinityChoice(), options or ConsistencyOptions()
    progress = progress or Silent()
    layers = list(dict.fromkeys(classifier.check_layer(name) for name in layers))
    encoders: dict[str, Encode] = {}
    method, decode = "channels", None
    if explainer is not None:
        explained = Run(explainer)
        if layers not in ([], [explained.layer]):
            raise UserError(f"the explainer in {explainer} explains layer {explained.layer!r}, not {', '.join(layers)}")
        layers = [explained.layer]
        fitted = load_explainer(explained.explainer_path(explained.seeds[0]))
        encoders[explained.layer], method = fitted.encode, explained.method
        decode = fitted.decode if fitted.target == "activation" else None
    if not layers:
        raise UserError("say which layer's units are to be scored (--layer), or pass a run folder (--explainer)")
    manifest = {
        "command": command,
        "method": "consistency",
        "config": {
            "units": method,
            **dataclasses.asdict(options),
            "attack": dataclasses.asdict(attack),
            "affinity": {k: None if v is None else str(v) for k, v in dataclasses.asdict(affinity).items()},
        },
        "model": classifier.spec(),
        "layer": ", ".join(layers),
        "seeds": list(range(options.seeds)),
        "store_address": hashlib.sha256(f"{images.fingerprint}\n{classifier.weights_hash}".encode()).hexdigest(),
        "data": {
            "description": images.description,
            "num_images": len(images),
            "fingerprint": images.fingerprint,
            "notes": list(images.notes),
        },
    }
    run = Run.create(out, manifest)
    began = time.monotonic()
    classifier = classifier.to(device)
    pixels = PixelClassifier.of(classifier, craft_layer=attack.craft_layer)
    untrained = PixelClassifier.of(classifier.untrained(0)) if options.controls else None
    measured: list[dict[str, LayerResult]] = []
    for seed in run.seeds:
        data = load_pixels(classifier, images, number=options.max_images, seed=seed, progress=progress)
        data = data.stratified(options.max_images, seed=seed)
        affinities, provenance = affinity.build(classifier, data)
        progress.start(f"attack seed {seed}", 1, unit="attack")
        made = attack_probe(pixels, data, attack, seed=seed, layer=layers[0])
        progress.advance()
        progress.start(f"units seed {seed}", 1, unit="network")
        results, logits = measure_layers(
            pixels,
            data,
            layers,
            affinities,
            adversarial=made,
            encoders=encoders,
            untrained=untrained if seed == run.seeds[0] else None,
            controls=options.controls,
            pooling=options.pooling,
            k=options.k,
            null_draws=options.null_draws if seed == run.seeds[0] else 0,
            seed=seed,
        )
        progress.advance()
        progress.finish()
        measured.append(results)
        if seed == run.seeds[0]:
            first = (data, made, results, logits, affinities, provenance)
    data, made, results, logits, affinities, provenance = first
    differences = {}
    for layer in layers:
        if options.difference_images and (layer not in encoders or decode is not None):
            differences[layer] = _differences(
                classifier, pixels, data, made, results[layer], affinities, options, encoders.get(layer), decode
            )
    rows = [
        row
        for layer in layers
        for row in _rows(results[layer], data, affinities, affinity, provenance, method, differences.get(layer))
    ]
    write_atomically(run.path / "units.csv", _to_csv(rows))
    shown = {
        layer: gallery(
            run, pixels, data, made, results[layer], options.shown_units, options.shown_images, encoders.get(layer)
        )
        for layer in layers
    }
    traced = {
        layer: trace(run, pixels, data, made, results[layer], found, options.shown_images)
        for layer, found in differences.items()
        if layer not in encoders and made is not None
    }
    result = {
        "affinity": {k: v for k, v in provenance.items() if k != "wnids"},
        "class_names": data.class_names,
        "num_images": len(data),
        "attack": None if made is None else _attack_record(attack, made, logits, data),
        "v_regenerated": made is not None,
        "layers": {layer: _layer_record(results[layer], data, affinities, differences.get(layer)) for layer in layers},
        "network": network_mean(results),
        "over_seeds": _over_seeds(measured),
        "gallery": shown,
        "trace": traced,
    }
    write_atomically(run.path / "result.json", to_json(result))
    run.write_scores([_score(layer, measured, len(data)) for layer in layers])
    data_record = {
        **run.manifest["data"],
        "unreadable": [{"id": i, "reason": r} for i, r in list(data.problems.items())[:200]],
    }
    run.update(status="complete", data=data_record, warnings=_warnings(result))
    run.add_time("consistency", time.monotonic() - began)
    run.write_report()
    return run


# -- prediction differences -------------------------------------------------------------------------------------------


def _differences(
    classifier: Classifier,
    pixels: PixelClassifier,
    data: LabelledPixels,
    made: Adversarial | None,
    result: LayerResult,
    affinities: dict[str, np.ndarray],
    options: ConsistencyOptions,
    encode: Encode | None,
    decode: Encode | None,
) -> dict[str, Any]:
    """PD of the units on some images of R and V, s of each, and how well s and the largest probability tell V."""
    index = data.stratified(None).probe_labels  # balanced already; spread over classes
    step = max(1, len(index) // max(1, options.difference_images))
    chosen = torch.arange(0, len(data), step)[: options.difference_images]
    device = pixels.mean.device
    sets = {"real": data.pixels(chosen)}
    if made is not None:
        sets["adversarial"] = made.found.images[chosen].cpu()
    example = pixels.normalise(sets["real"][:2].to(device))
    tail = Tail(classifier, result.layer, example=example)
    found: dict[str, Any] = {"chosen": chosen, "tail": tail.mode}
    if tail.mode != "graph":
        return {**found, "reason": f"no prediction differences: {tail.reason}"}
    from netgloss.classifiers import Taps

    positive = result.units.pole > 0  # a signed unit is taken out as a whole
    meaning = torch.as_tensor(affinities["chosen"]) @ result.scores.classes[:, positive]
    place = {int(c): i for i, c in enumerate(data.net_classes)}
    for name, images in sets.items():
        parts, logits_parts = [], []
        with torch.no_grad(), Taps(pixels.net, result.layer, stop=False) as taps:
            for batch in images.split(32):
                activation = taps(pixels.normalise(batch.to(device)))[result.layer]
                logits_parts.append(taps.logits.cpu())
                own = (unchanged, unchanged) if encode is None or decode is None else (encode, decode)
                parts.append(prediction_difference(activation, tail, encode=own[0], decode=own[1]).cpu())
        logits = torch.cat(logits_parts)
        predicted = logits.argmax(1)
        inside = logits[:, data.net_classes].argmax(1)
        found[name] = {
            "pd": torch.cat(parts),
            "s": agreement_with_units(torch.cat(parts), meaning, torch.eye(len(meaning), dtype=torch.float64), inside),
            "confidence": logits.softmax(1).amax(1),
            "predicted": predicted,
            "inside": torch.tensor([int(p) in place for p in predicted]),
            "right": predicted == data.labels[chosen],
        }
    real = found["real"]
    found["auroc_wrong"] = detection_auroc(real["s"][real["right"]], real["s"][~real["right"]])
    if made is not None:
        for name, key in (("auroc_s", "s"), ("auroc_confidence", "confidence")):
            found[name] = detection_auroc(real[key], found["adversarial"][key])
    return found


# -- records ----------------------------------------------------------------------------------------------------------


def _rows(
    result: LayerResult,
    data: LabelledPixels,
    affinities: dict[str, np.ndarray],
    affinity: AffinityChoice,
    provenance: dict[str, Any],
    method: str,
    differences: dict[str, Any] | None,
) -> list[dict[str, Any]]:
    """Rows of units.csv."""
    scores, comparison, fooled = result.scores, result.comparison, result.fooled
    selective = None
    tree, nodes = None, None
    if provenance.get("wnids") is not None and affinity.affinity is None:
        tree = wordnet() if affinity.data_noun is None else read_data_noun(affinity.data_noun)
        ids = provenance["wnids"]
        nodes = [ids[n] for n in data.class_names] if isinstance(ids, dict) else list(ids)
    elif affinity.taxonomy is not None and affinity.affinity is None:
        tree, nodes = read_taxonomy(affinity.taxonomy), list(data.class_names)
    if tree is not None and nodes is not None and int(data.probe_labels.bincount().min()) >= 4:
        selective = best_subtree(result.real, data.probe_labels, tree, nodes)
    pd = None if differences is None or "real" not in differences else differences["real"]["pd"].mean(0)
    rows = []
    for u in range(len(result.units)):
        top = scores.classes[:, u].topk(min(3, len(data.class_names)))
        concept, pole = int(result.units.concept[u]), int(result.units.pole[u])
        row: dict[str, Any] = {
            "layer": result.layer,
            "explainer": method,
            "unit": concept,
            "pole": pole,
            "status": STATUS[int(scores.status[u])],
            "tie_images": int(scores.tie_images[u]),
            "saturated": bool(scores.saturated[u]),
        }
        sets = (
            {"R": scores} if comparison is None else {"R": scores, "V": comparison.adversarial, "RV": comparison.union}
        )
        for name, found in sets.items():
            row |= {
                f"consis_{name}": float(found.consis[u]),
                f"E0_{name}": float(found.expected[u]),
                f"consis_cal_{name}": float(found.calibrated[u]),
                f"p_{name}": float(found.p_value[u]),
            }
        if comparison is not None:
            for name, compared in (("all", comparison), ("fooled", fooled)):
                for key in ("cs1", "cs2", "csc1", "csc2"):
                    row[f"{key}_{name}"] = math.nan if compared is None else float(getattr(compared, key)[u])
                for key in ("chance1", "chance2"):
                    row[f"{key}_{name}"] = math.nan if compared is None else float(getattr(compared, key))
        for rank, (share, c) in enumerate(zip(top.values.tolist(), top.indices.tolist(), strict=True), start=1):
            row |= {f"class{rank}": data.class_names[c], f"share{rank}": share}
        if selective is not None and tree is not None:
            row["best_subtree"] = tree.names.get(selective.nodes[u], selective.nodes[u])
            row |= {"auroc": float(selective.auroc[u]), "average_precision": float(selective.average_precision[u])}
        row["effective_concepts"] = 1 / max(float(scores.consis[u]), 1e-12)
        row["mean_pd"] = math.nan if pd is None or pole < 0 else float(pd[concept])
        rows.append(row)
    return rows


def _to_csv(rows: Sequence[dict[str, Any]]) -> str:
    """CSV with LF; blank for what is not known; text that a spreadsheet would run is quoted by an apostrophe."""

    def shown(value: Any) -> Any:
        if isinstance(value, float):
            return f"{value:.6g}" if math.isfinite(value) else ""
        if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t"):
            return "'" + value
        return value

    buffer = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: shown(row.get(name, "")) for name in names} for row in rows)
    return buffer.getvalue()


def _layer_record(
    result: LayerResult, data: LabelledPixels, affinities: dict[str, np.ndarray], differences: dict[str, Any] | None
) -> dict[str, Any]:
    depth = consistency_by_depth(result.real, data.probe_labels, affinities["chosen"])
    counts = data.probe_labels.bincount()
    halves = math.nan
    if int(counts[counts > 0].min()) >= 4:
        halves = half_reliability(result.real, data.probe_labels, affinities["chosen"], k=result.scores.k)
    record = {
        **result.summary(),
        "bins": result.bins,
        "depth": {name: float(values[result.scores.live].nanmean()) for name, values in depth.items()},
        "half_reliability": halves,
        "calibrated": {"real": result.scores.calibrated[result.scores.live].tolist()},
        "random": {part: values.tolist() for part, values in result.random.items()},
    }
    if result.comparison is not None:
        live = result.comparison.live
        record["calibrated"] = {
            part: getattr(result.comparison, part).calibrated[live].tolist()
            for part in ("real", "adversarial", "union")
        }
    if differences is not None:
        record["differences"] = {
            name: differences[name]
            for name in ("tail", "reason", "auroc_s", "auroc_confidence", "auroc_wrong")
            if name in differences
        }
        record["differences"]["num_images"] = len(differences["chosen"])
    return record


def _attack_record(
    attack: AttackChoice, made: Adversarial, logits: dict[str, Tensor], data: LabelledPixels
) -> dict[str, Any]:
    predicted = logits["real"].argmax(1)
    return {
        **dataclasses.asdict(attack),
        "reached": float(made.found.success.float().mean()),
        "clean_accuracy": float((predicted == data.labels).float().mean()),
        "accuracy": float((made.found.predictions.cpu() == data.labels).float().mean()),
        "largest_linf": float(made.found.linf.max()),
        "mean_l2": float(made.found.l2.mean()),
        "targeted": made.targets is not None,
    }


def _over_seeds(measured: Sequence[dict[str, LayerResult]]) -> dict[str, Any]:
    """Mean and 95 % interval over seeds of each layer's means on R and V, and of their difference."""
    found: dict[str, Any] = {}
    for layer in measured[0]:
        compared = [r[layer].comparison for r in measured]
        numbers = {"real": [r[layer].scores.summary()["consis_cal"] for r in measured]}
        summaries = [c.summary() for c in compared if c is not None]
        if summaries:
            numbers = {
                name: [s[f"consis_cal_{name}"] for s in summaries]
                for name in ("real", "adversarial", "union", "change")
            }
        found[layer] = {}
        for name, values in numbers.items():
            low, high = interval(torch.tensor(values)) if len(values) > 1 else (math.nan, math.nan)
            found[layer][name] = {"mean": sum(values) / len(values), "low": low, "high": high, "values": values}
    return found


def _score(layer: str, measured: Sequence[dict[str, LayerResult]], n: int) -> Score:
    values = torch.tensor([r[layer].scores.summary()["consis_cal"] for r in measured], dtype=torch.float64)
    low, high = interval(values, bounds=(-math.inf, 1.0)) if len(values) > 1 else (math.nan, math.nan)
    first = measured[0][layer].summary()
    baselines = {"random directions": first.get("random_real"), "untrained network": first["untrained"]}
    attacked = first["attack"]
    if attacked is not None:
        baselines["the same units on adversarial images"] = attacked["consis_cal_adversarial"]
    return Score(
        metric=f"consistency, {layer}",
        value=float(values.mean()),
        low=low,
        high=high,
        baselines=baselines,
        n=n,
        seeds=len(values),
        higher_is_better=True,
        definition=DEFINITION,
    )


def _warnings(result: dict[str, Any]) -> list[str]:
    found = []
    if not result["affinity"]["semantics"]:
        found.append(
            "no semantics: classes count as alike only if they are the same (pass --wnids, --groups or --affinity)"
        )
    for layer, record in result["layers"].items():
        low = {pair: rho for pair, rho in record["kernels"].items() if rho < 0.9}
        found += [
            f"{layer}: the ranking of units depends on the kernel ({p}: Spearman {r:.2f})" for p, r in low.items()
        ]
        if record["num_saturated"]:
            found.append(
                f"{layer}: {record['num_saturated']} units are saturated (many images tie at the top): use --pooling mean"
            )
        if record.get("random_real") is not None and record["random_real"] >= record["consis_cal"]:
            found.append(f"{layer}: random directions are as consistent as the units ({record['random_real']:.3f})")
        if "reason" in record.get("differences", {}):
            found.append(f"{layer}: {record['differences']['reason']}")
    return found

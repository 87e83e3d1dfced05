"""Does consistency under attack depend on the layer and on the probe set? Three layers of MobileNetV2 and SqueezeNet.

    python experiments/consistency_layers.py

The larger sister of consistency_ambiguity.py: the same attack (targeted PGD, Linf 8/255, 4 steps, one start, made
against the network that is judged, rounded to 8 bits), but three layers at different depths and two probe sets,
Imagenette val and animals (probably training images). Every seed draws other images of each class, targets and starts.
Beside the channels stand random directions of the same layer. Also measured: how well the agreement s(x) tells
adversarial images (claim 6). Writes experiments/consistency-layers.{md,json} after every piece and
continues what was interrupted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch

import netgloss
from netgloss.adversarial import PixelClassifier
from netgloss.adversarial.affinity_choice import AffinityChoice
from netgloss.adversarial.layer_consistency import LayerResult, UnitOptions, measure_layers, network_mean
from netgloss.adversarial.pixels import LabelledPixels, load_pixels
from netgloss.adversarial.probe import AttackChoice, attack_probe
from netgloss.classifiers import Classifier, Tail, Taps
from netgloss.data import match_classes
from netgloss.metrics.base import interval
from netgloss.metrics.consistency.difference import agreement_with_units, detection_auroc, prediction_difference
from netgloss.runs.run import to_json, versions

HERE = Path(__file__).parent
RECORD = HERE / "consistency-layers.json"
NETS: dict[str, tuple[str, tuple[str, ...], str | None]] = {
    "mobilenet_v2": ("mobilenet_v2.pth", ("features.7", "features.13", "features.18"), None),
    "squeezenet1_0": ("squeezenet1_0.pth", ("features.5", "features.9", "features.12"), "classifier.1"),
}
SETS = {"imagenette": "imagenette/val", "animals": "animals"}
MEANS = ("mean of the layers on R", "on V")
ROWS = {
    "real": "consis_cal on R",
    "adversarial": "consis_cal on V",
    "change": "V - R (claim 1: < 0)",
    "random_change": "random directions, V - R",
    "channels_over_random": "channels - random directions, R (claim 8: > 0)",
    "csc1": "CSc1 (chance 0)",
    "csc2": "CSc2 (chance 0)",
    "slope_cs1": "Spearman of LC bin with CS1 (claim 2: < 0)",
    "slope_csc1": "- centred",
    "slope_cs2": "Spearman of LC bin with CS2 (claim 2: > 0)",
    "slope_csc2": "- centred",
    "live": "share of live units (on both)",
}


def open_set(classifier: Classifier, folder: Path, seed: int, each: int) -> LabelledPixels:
    """``each`` images of every class, other ones for every seed."""
    source = netgloss.open_images(folder)
    chosen = []
    for c in range(len(source.class_names)):
        own = torch.tensor([i for i, t in enumerate(source.targets) if t == c])
        shuffled = own[torch.randperm(len(own), generator=torch.Generator().manual_seed(c))]
        chosen += shuffled[seed * each : (seed + 1) * each].tolist()
    part = source.subset(sorted(chosen))
    found = match_classes(part.class_names, classifier.class_names, classifier.wnids)
    assert (found >= 0).all(), part.class_names
    return load_pixels(classifier, part)


def spearman(bins: list[dict[str, float]], key: str) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr([b["lc"] for b in bins], [b[key] for b in bins]).statistic)


def of_layer(result: LayerResult) -> dict[str, float]:
    assert result.comparison is not None
    summary = result.comparison.summary()
    random = {name: float(values.nanmean()) for name, values in result.random.items()}
    return {
        "real": summary["consis_cal_real"],
        "adversarial": summary["consis_cal_adversarial"],
        "change": summary["consis_cal_change"],
        "random_change": random["adversarial"] - random["real"],
        "channels_over_random": summary["consis_cal_real"] - random["real"],
        **{name: summary[name] for name in ("cs1", "cs2", "csc1", "csc2", "chance1", "chance2")},
        **{f"slope_{name}": spearman(result.bins, name) for name in ("cs1", "cs2", "csc1", "csc2")},
        "live": float(result.comparison.live.float().mean()),
        "significant": float(result.scores.consistent.sum() / max(1, int(result.scores.live.sum()))),
    }


def detection(
    classifier: Classifier,
    pixels: PixelClassifier,
    data: LabelledPixels,
    fake: torch.Tensor,
    result: LayerResult,
    a: Any,
) -> dict[str, float]:
    """AUROC of a low s and of a low largest probability for V, at the last layer; every other image."""
    x, fake = data.pixels()[::2], fake[::2]
    tail = Tail(classifier, result.layer, example=pixels.normalise(x[:2]))
    meaning = torch.as_tensor(a) @ result.scores.classes[:, result.units.pole > 0]
    found = {}
    for name, images in (("real", x), ("fake", fake)):
        parts = []
        with torch.no_grad(), Taps(pixels.net, result.layer, stop=False) as taps:
            for part in images.split(20):
                activation = taps(pixels.normalise(part))[result.layer]
                logits = taps.logits
                inside = logits[:, data.net_classes].argmax(1)
                affine = tail.is_affine(tuple(activation.shape[1:]))
                difference = prediction_difference(activation, tail, affine=affine)
                s = agreement_with_units(difference, meaning, torch.eye(len(meaning), dtype=torch.float64), inside)
                parts.append(torch.stack([s, logits.softmax(1).amax(1).double()]))
        found[name] = torch.cat(parts, dim=1)
    return {key: detection_auroc(found["real"][i], found["fake"][i]) for i, key in enumerate(("s", "confidence"))}


def measure(net: str, probe: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    start = time.process_time()
    checkpoint, layers, craft = NETS[net]
    classifier = netgloss.load_classifier(f"torchvision:{net}", checkpoint=options.data / "weights" / checkpoint)
    data = open_set(classifier, options.data / "data" / SETS[probe], seed, options.per_class)
    pixels = PixelClassifier.of(classifier, craft_layer=craft)
    made = attack_probe(pixels, data, AttackChoice(eps=options.eps, steps=options.steps), seed=seed, batch_size=24)
    assert made is not None
    tables, _ = AffinityChoice().build(classifier, data)
    results, logits = measure_layers(
        pixels,
        data,
        layers,
        tables,
        adversarial=made,
        options=UnitOptions(k=options.k, null_draws=500, seed=seed, batch_size=24),
    )
    return {
        "layers": {layer: of_layer(result) for layer, result in results.items()},
        "network": network_mean(results),
        "auroc": detection(classifier, pixels, data, made.found.images, results[layers[-1]], tables["chosen"]),
        "bins": {layer: result.bins for layer, result in results.items()},
        "num_images": len(data),
        "clean_accuracy": float((logits["real"].argmax(1) == data.labels).float().mean()),
        "accuracy": float((made.found.predictions == data.labels).float().mean()),
        "reached": float(made.found.success.float().mean()),
        "cpu_seconds": time.process_time() - start,
    }


def cell(values: list[float], *, least: float = -1.0) -> str:
    """Mean and t interval, cut to what the number can be (all here lie in [least, 1])."""
    numbers = torch.tensor([v for v in values if v is not None and math.isfinite(v)], dtype=torch.float64)
    if not len(numbers):
        return "-"
    low, high = interval(numbers, bounds=(least, 1.0)) if len(numbers) > 1 else (math.nan, math.nan)
    return f"{float(numbers.mean()):.3f}" + (f" ({low:.3f} .. {high:.3f})" if math.isfinite(low) else "")


def write(options: argparse.Namespace, results: dict[str, Any]) -> None:
    settings = {n: getattr(options, n) for n in ("per_class", "k", "eps", "steps")}
    command = "python experiments/consistency_layers.py"
    RECORD.write_text(
        to_json({"command": command, "settings": settings, "versions": versions(), "results": results}) + "\n"
    )
    lines = [
        "# Consistency under attack by layer and probe set",
        "",
        f"`{command}`; {options.per_class} images of each class a seed, k = {options.k}, WordNet gauss. Targeted PGD,",
        f"Linf {options.eps:g}/255, {options.steps} steps, one start, against the network itself, rounded to 8 bits.",
        "Channels; response = maximum of the map. Mean and 95 % t-interval over seeds (other images, targets, starts).",
        "features.13 and features.7 of MobileNetV2 are linear bottlenecks: each channel counts as two poles.",
    ]
    for probe in SETS:
        found = {net: [r for key, r in results.items() if key.startswith(f"{net} {probe} ")] for net in NETS}
        found = {net: runs for net, runs in found.items() if runs}
        if not found:
            continue
        columns = [(net, layer) for net in found for layer in NETS[net][1]]
        lines += ["", f"## {probe}", ""]
        for net, runs in found.items():
            told = {
                "accuracy": [r["clean_accuracy"] for r in runs],
                "under attack": [r["accuracy"] for r in runs],
                "reached the target": [r["reached"] for r in runs],
                MEANS[0]: [r["network"]["real"] for r in runs],
                MEANS[1]: [r["network"]["adversarial"] for r in runs],
                "AUROC for V at the last layer (claim 6) of a low s": [r["auroc"]["s"] for r in runs],
                "of a low confidence": [r["auroc"]["confidence"] for r in runs],
            }
            shown = ", ".join(
                f"{name} {cell(values, least=-1.0 if name in MEANS else 0.0)}" for name, values in told.items()
            )
            lines.append(f"- {net}: {len(runs)} seeds of {runs[0]['num_images']} images; {shown}")
        names = " | ".join(f"{net} {layer}" for net, layer in columns)
        lines += ["", f"| | {names} |", "|---" * (len(columns) + 1) + "|"]
        for key, label in ROWS.items():
            cells = [cell([r["layers"][layer][key] for r in found[net]]) for net, layer in columns]
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
    (HERE / "consistency-layers.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("NETGLOSS_DATA", "../shared")))
    parser.add_argument("--per-class", type=int, default=12)
    parser.add_argument("--k", type=int, default=12)
    parser.add_argument("--eps", type=float, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no new piece after so many")
    options = parser.parse_args()
    results: dict[str, Any] = json.loads(RECORD.read_text())["results"] if RECORD.exists() else {}
    began = time.monotonic()
    for seed, probe, net in itertools.product(range(options.seeds), SETS, NETS):
        key = f"{net} {probe} {seed}"
        if key not in results and time.monotonic() - began < 60 * options.minutes:
            results[key] = measure(net, probe, seed, options)
            write(options, results)
            print(f"{key}: {results[key]['cpu_seconds']:.0f} s of CPU", flush=True)
    write(options, results)


if __name__ == "__main__":
    main()

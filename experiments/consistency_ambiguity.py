"""Are the units of ImageNet networks ambiguous under attack? Real against adversarial consistency on Imagenette val.

    python experiments/consistency_ambiguity.py

Every seed draws other images of each class, other targets and other starts, so seeds are independent repetitions. The
attack is targeted PGD (Linf), targets among the ten classes, made against the network that is judged. V is rounded to
8 bits. Beside the channels stand as many random directions (256 at most) of the same layer, and the same layer of an
untrained network. Writes experiments/consistency-ambiguity.{md,json}, after every network and seed; the same command
continues an interrupted run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import sys
import time
from pathlib import Path

import torch

import netgloss
from netgloss.activations import image_batches
from netgloss.adversarial import PixelClassifier, assign_targets, attack_in_batches, pgd
from netgloss.classifiers import Classifier, Taps
from netgloss.metrics.base import interval
from netgloss.metrics.consistency.affinity import class_affinity
from netgloss.metrics.consistency.companions import kernel_agreement
from netgloss.metrics.consistency.under_attack import compare, compare_fooled, cosines_by_bin
from netgloss.metrics.consistency.units import Units, responses, unit_consistency
from netgloss.runs.run import versions

HERE = Path(__file__).parent
RECORD = HERE / "consistency-ambiguity.json"
NETS = {  # name: checkpoint, layer, layer that attacks differentiate
    "torchvision:mobilenet_v2": ("mobilenet_v2.pth", "features.18", None),
    "torchvision:squeezenet1_0": ("squeezenet1_0.pth", "features.12", "classifier.1"),
}
ROWS = {
    "consis_cal_real": "consis_cal on R",
    "consis_cal_adversarial": "consis_cal on V",
    "consis_cal_change": "V - R",
    "consis_cal_union": "consis_cal on R u V",
    "cs1": "CS1",
    "chance1": "- its chance",
    "csc1": "CSc1 (chance 0)",
    "cs2": "CS2",
    "chance2": "- its chance",
    "csc2": "CSc2 (chance 0)",
    "cross": "cross-consistency (exp)",
    "random_real": "random directions: consis_cal on R",
    "random_adversarial": "random directions: consis_cal on V",
    "untrained_real": "untrained network: consis_cal on R",
    "clean_accuracy": "clean accuracy, 1000-way",
    "robust_accuracy": "accuracy under the attack",
    "fooled": "share that reached its target",
    "share_consistent": "share of live units consistent on R (BH 0.05)",
    "share_live": "share of live units (on both)",
    "share_saturated": "share of units saturated on R",
    "slope_csc1": "Spearman, LC bin against CSc1",
    "slope_csc2": "Spearman, LC bin against CSc2",
    "kernels": "Spearman of consis, gauss against exp",
    "kernels_identity": "Spearman of consis, gauss against identity",
}
KERNELS = ("gauss", "exp", "identity")
SHARES = ("clean_accuracy", "robust_accuracy", "fooled", "share_consistent", "share_live", "share_saturated")


def read(
    classifier: Classifier, pixels: torch.Tensor, layer: str, batch: int = 50
) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps (N, C, h, w) of the layer and logits (N, classes)."""
    maps, logits = [], []
    with torch.no_grad(), Taps(classifier, layer, stop=False) as taps:
        for part in pixels.split(batch):
            maps.append(taps(classifier.preprocessing.normalise(part))[layer])
            logits.append(taps.logits)
    return torch.cat(maps), torch.cat(logits)


def units_of(real: torch.Tensor, *more: torch.Tensor) -> list[torch.Tensor]:
    """Responses (N, U) of the same units on several sets of maps."""
    both = [responses(maps) for maps in (real, *more)]
    units = Units.of(*both)
    return [units.select(table) for table in both]


def directions(maps: torch.Tensor, seed: int) -> torch.Tensor:
    """(K, C) orthonormal, drawn with the seed."""
    drawn = torch.randn(maps.shape[1], min(256, maps.shape[1]), generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(drawn)[0].T


def measure(name: str, seed: int, options: argparse.Namespace) -> dict:
    start = time.process_time()
    checkpoint, layer, craft = NETS[name]
    classifier = netgloss.load_classifier(name, checkpoint=options.data / "weights" / checkpoint)
    source = netgloss.open_images(options.data / "data" / "imagenette" / "val")
    classes = [classifier.wnids.index(wnid) for wnid in source.class_names]
    drawn = []
    for c in range(len(classes)):  # disjoint between seeds: image by image, the next ones of one shuffled list
        own = torch.tensor([i for i, t in enumerate(source.targets) if t == c])
        shuffled = own[torch.randperm(len(own), generator=torch.Generator().manual_seed(c))]
        drawn.append(shuffled[seed * options.per_class : (seed + 1) * options.per_class])
    index = torch.cat(drawn).sort()[0].tolist()
    inputs = torch.cat([images for images, _ in image_batches(classifier, source, index, batch_size=50, workers=0)])
    spec = classifier.preprocessing
    mean, std = (torch.tensor(v)[:, None, None] for v in (spec.mean, spec.std))
    x = (inputs * std + mean).mul(255).round().div(255).clamp(0, 1)
    labels = torch.from_numpy(source.targets[index])
    ids = [source.ids[i] for i in index]
    targets = assign_targets(labels, classes=range(len(classes)), seed=seed, ids=ids)
    of_net = torch.tensor(classes)
    pixels = PixelClassifier.of(classifier, craft_layer=craft)
    attack = {"eps": options.eps / 255, "steps": options.steps, "restarts": options.restarts, "seed": seed}
    found = attack_in_batches(
        pgd, pixels, x, of_net[labels], targets=of_net[targets], ids=ids, batch_size=25, **attack
    ).rounded(pixels, x, of_net[labels])
    assert float(found.linf.max()) <= options.eps / 255 + 1e-6
    (real, clean_logits), (fake, _) = (read(classifier, images, layer) for images in (x, found.images))

    affinities = {k: class_affinity(source.class_names, wnids=source.class_names, kernel=k)[0] for k in KERNELS}
    gauss, where = affinities["gauss"], torch.arange(len(x))
    k = options.k or None
    common = {"cross_affinity": affinities["exp"], "k": k, "seed": seed}
    r, v = units_of(real, fake)
    result = compare(r, v, labels, where, gauss, targets=targets, **common)
    fooled = compare_fooled(r, v, labels, where, gauss, fooled=found.success, targets=targets, **common)
    basis = directions(real, seed)
    rotated = [torch.einsum("bchw,kc->bkhw", m - real.mean((0, 2, 3))[:, None, None], basis) for m in (real, fake)]
    random = compare(*units_of(*rotated), labels, where, gauss, null_draws=0, **common).summary()
    bare, _ = read(classifier.untrained(seed), x, layer)
    untrained = unit_consistency(units_of(bare)[0], labels, gauss, k=k, null_draws=0).summary()
    bins = cosines_by_bin(result)
    agreement = kernel_agreement(result.real, affinities)
    values = {
        **result.summary(),
        "random_real": random["consis_cal_real"],
        "random_adversarial": random["consis_cal_adversarial"],
        "untrained_real": untrained["consis_cal"],
        "clean_accuracy": float((clean_logits.argmax(1) == of_net[labels]).float().mean()),
        "robust_accuracy": float((found.predictions == of_net[labels]).float().mean()),
        "fooled": float(found.success.float().mean()),
        "share_consistent": float(result.real.consistent.sum() / result.real.live.sum()),
        "share_live": float(result.live.float().mean()),
        "share_saturated": float(result.real.saturated.float().mean()),
        "slope_csc1": rank_correlation([b["lc"] for b in bins], [b["csc1"] for b in bins]),
        "slope_csc2": rank_correlation([b["lc"] for b in bins], [b["csc2"] for b in bins]),
        "kernels": agreement["gauss / exp"],
        "kernels_identity": agreement["gauss / identity"],
    }
    return {
        "values": values,
        "fooled_only": None if fooled is None else fooled.summary(),
        "bins": bins,
        "num_images": len(x),
        "num_units": r.shape[1],
        "cpu_seconds": time.process_time() - start,
    }


def rank_correlation(a: list[float], b: list[float]) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(a, b).statistic)


def cell(key: str, values: list[float]) -> str:
    if any(not math.isfinite(v) for v in values):
        return "-"
    numbers = torch.tensor(values, dtype=torch.float64)
    low, high = (
        interval(numbers, bounds=(0.0 if key in SHARES else -1.0, 1.0)) if len(values) > 1 else (math.nan, math.nan)
    )
    spread = f" ({low:.3f} .. {high:.3f})" if math.isfinite(low) else ""
    return f"{float(numbers.mean()):.3f}{spread}"


def settings(options: argparse.Namespace) -> dict[str, int]:
    return {n: getattr(options, n) for n in ("per_class", "k", "eps", "steps", "restarts", "seeds")}


def finished(options: argparse.Namespace) -> dict[str, dict[int, dict]]:
    """What an interrupted run with the same settings has measured already."""
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if record.get("settings") != settings(options):
        return {name: {} for name in NETS}
    return {name: {int(seed): run for seed, run in record["results"][name].items()} for name in NETS}


def write(options: argparse.Namespace, results: dict[str, dict[int, dict]]) -> None:
    command = ("python experiments/consistency_ambiguity.py " + " ".join(sys.argv[1:])).strip()
    record = {"command": command, "settings": settings(options), "versions": versions(), "results": results}
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    names = [name for name in NETS if results.get(name)]
    first = next(iter(results[names[0]].values()))
    lines = [
        "# Ambiguity of units under attack",
        "",
        f"`{command}`; Imagenette val, {options.per_class} images of each of ten classes a seed",
        f"(R = {first['num_images']}, V as many), k = {first['values']['k_real']}, WordNet gauss.",
        f"Targeted PGD, Linf {options.eps}/255, {options.steps} steps, {options.restarts} start(s),",
        "made against the network itself, rounded to 8 bits. Channels; response = maximum of the map. Mean and 95 %",
        "t-interval over seeds (other images, targets and starts each).",
        "",
        "| | " + " | ".join(f"{n.split(':')[1]} {NETS[n][1]}" for n in names) + " |",
        "|---" * (len(names) + 1) + "|",
        "| seeds | " + " | ".join(str(len(results[n])) for n in names) + " |",
        "| channels | " + " | ".join(str(next(iter(results[n].values()))["num_units"]) for n in names) + " |",
    ]
    for key, label in ROWS.items():
        cells = [cell(key, [run["values"][key] for run in results[n].values()]) for n in names]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    (HERE / "consistency-ambiguity.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("NETGLOSS_DATA", "../shared")))
    parser.add_argument("--per-class", type=int, default=12, help="images a class and seed; 50 / seeds at most")
    parser.add_argument("--k", type=int, default=12, help="size of the top set; 0: the metric's own rule")
    parser.add_argument("--eps", type=int, default=8, help="of 255")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--restarts", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    results = finished(options)
    for seed, name in itertools.product(range(options.seeds), NETS):
        if seed not in results[name]:
            results[name][seed] = measure(name, seed, options)
            done = results[name][seed]
            print(f"{name}, seed {seed}: {done['cpu_seconds']:.0f} s of CPU, {done['values']}", flush=True)
        write(options, results)


if __name__ == "__main__":
    main()

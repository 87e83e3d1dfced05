"""NMF with Sobol importances against Craft-xai, on the same crops, rank and images.

    pip install --no-deps Craft-xai==0.0.3
    python benchmarks/craft_nmf.py --checkpoint mobilenet_v2.pth --images imagenette/train/n03394916

CRAFT fits NMF on mean-pooled activations of image crops, and estimates total Sobol indices of the concepts for one
class from masks on whole images. Both sides read the same activations of the same crops and images (the network's own
time is the same for both and is not counted), have one thread and take turns. Craft-xai runs as published: sklearn's
NMF, its ``transform`` and ``estimate_importance`` with nb_design points. Ours fits NMF (also sklearn's) from the same
start as theirs (an SVD, ``--init nndsvda``), once from its own default (a random one), encodes by exact non-negative
least squares, and

- "closed form": reads the indices off the contributions, as tail and decoder are affine here (S_k = c_k^2 / sum c^2);
- "affine masks": asks the same number of masks of the affine function (K + 1 passes of the tail an image);
- "every mask": sends every mask through the tail, as one must where the tail is not affine.

R2 is of the crops' activations, each side with its own codes. Processor time. Writes benchmarks/craft_nmf.{md,json}.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import types
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
LAYER, PATCH = "features.18", 64
RANDOM = "closed form, random start"


class Rows:
    """Rows in memory, as a fit reads them."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows
        self.num_rows, self.num_features = rows.shape

    def chunks(self):
        return iter([self.rows])

    def sample(self, max_rows: int, *, seed: int) -> torch.Tensor:
        return self.rows[:max_rows]


def r2(rows: torch.Tensor, rebuilt: torch.Tensor) -> float:
    return float(1 - (rows - rebuilt).square().sum() / (rows - rows.mean(0)).square().sum())


def activations(options: argparse.Namespace):
    """Tail, crops' activations (N, C), images' activations (B, C, H, W), the class."""
    import netgloss
    from netgloss.activations import image_batches
    from netgloss.classifiers import Taps

    classifier = netgloss.load_classifier("torchvision:mobilenet_v2", checkpoint=options.checkpoint)
    source = netgloss.open_images(options.images).subset(range(options.num_images))
    pixels = torch.cat([b for b, _ in image_batches(classifier, source, range(len(source)), batch_size=16, workers=0)])
    stride = int(PATCH * 0.8)
    crops = torch.nn.functional.unfold(pixels, kernel_size=PATCH, stride=stride)
    crops = crops.transpose(1, 2).reshape(-1, 3, PATCH, PATCH)
    found = []
    with torch.no_grad(), Taps(classifier.net, [LAYER]) as taps:
        for part in crops.split(32):
            whole = torch.nn.functional.interpolate(part, size=224, mode="bilinear", align_corners=False)
            found.append(taps(whole)[LAYER].mean((2, 3)))
        maps = torch.cat([taps(part)[LAYER] for part in pixels.split(16)])
    tail = netgloss.Tail(classifier, LAYER, example=pixels[:2])
    with torch.no_grad():
        chosen = int(tail(maps).mean(0).argmax())
    return tail, torch.cat(found), maps, crops, chosen


def load_craft():
    """Craft-xai's torch side; its sampler imports tensorflow, which this side does not use."""
    import scipy.stats.qmc  # noqa: F401  (its sampler expects it to be loaded)
    import sklearn.decomposition  # noqa: F401  (before a stand-in for tensorflow is there)

    absent = "tensorflow" not in sys.modules
    sys.modules.setdefault("tensorflow", types.ModuleType("tensorflow"))
    try:
        from craft import craft_torch
    finally:
        if absent:
            del sys.modules["tensorflow"]
    return craft_torch


def their_side(crops, pooled, maps, tail, chosen: int, rank: int, points: int) -> dict:
    craft_torch = load_craft()

    def replay(model, dataset, batch_size=128, resize=None, device="cpu"):
        return pooled if model is network else original(model, dataset, batch_size, resize, device)

    def network(images):
        raise AssertionError("the network's activations are replayed")

    original = craft_torch._batch_inference
    craft_torch._batch_inference = replay
    try:
        craft = craft_torch.Craft(network, tail, number_of_concepts=rank, patch_size=PATCH, device="cpu")
        pictures = torch.zeros(1, 3, 224, 224)  # crops come from the replay
        began = time.process_time()
        _, u, w = craft.fit(pictures)
        fitted = time.process_time()
        original_transform = craft.transform
        craft.transform = lambda inputs: original_transform(None, activations=maps)
        importance = craft.estimate_importance(None, chosen, nb_design=points)
        done = time.process_time()
    finally:
        craft_torch._batch_inference = original
    rebuilt = torch.from_numpy(np.asarray(u, np.float32) @ w)
    return {"fit": fitted - began, "importances": done - fitted, "r2": r2(pooled, rebuilt), "importance": importance}


def our_side(pooled, maps, tail, chosen: int, rank: int, points: int, how: str) -> dict:
    from netgloss.evaluation.faithful import affine_predict
    from netgloss.explainers.base import LayerSpec
    from netgloss.explainers.nmf import NMF, NMFConfig
    from netgloss.metrics.faithfulness.importance import contributions
    from netgloss.metrics.faithfulness.masking import class_value, through
    from netgloss.metrics.faithfulness.sobol import sobol_total

    init = "random" if how == RANDOM else "nndsvda"
    explainer = NMF(NMFConfig(num_concepts=rank, init=init), LayerSpec(LAYER, (pooled.shape[1],), nonnegative=True))
    began = time.process_time()
    explainer.fit_rows(Rows(pooled), seed=0)
    fitted = time.process_time()
    concepts = explainer.encode(maps)
    classes = torch.full((len(maps),), chosen)
    if how in ("closed form", RANDOM):
        squares = contributions(explainer.decode, tail, concepts, classes).values.double().square()
        index = (squares / squares.sum(1, keepdim=True)).mean(0)
    else:
        parts = []
        for one, c in zip(concepts.split(1), classes.split(1), strict=True):
            logits = torch.zeros(1, 1)
            predict = (
                affine_predict(explainer, tail, one) if how == "affine masks" else through(explainer, tail, logits)
            )
            value = class_value(predict, one, c, rows_per_call=64)
            parts.append(sobol_total(value, rank, points=points // 2, scrambles=2)[0][:, 0])
        index = torch.stack(parts).mean(0)
    done = time.process_time()
    with torch.no_grad():
        rebuilt = explainer(pooled)
    return {"fit": fitted - began, "importances": done - fitted, "r2": r2(pooled, rebuilt), "importance": index.numpy()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = Path(os.environ.get("NETGLOSS_DATA", "../shared"))
    parser.add_argument("--checkpoint", type=Path, default=data / "weights" / "mobilenet_v2.pth")
    parser.add_argument("--images", type=Path, default=data / "data" / "imagenette" / "train" / "n03394916")
    parser.add_argument("--num-images", type=int, default=16)
    parser.add_argument("--ranks", type=int, nargs="+", default=[10, 25])
    parser.add_argument("--points", type=int, default=32, help="nb_design of Craft-xai")
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    from netgloss.runs.run import versions

    tail, pooled, maps, crops, chosen = activations(options)
    maps_few = maps[: min(8, len(maps))]
    sides = ("Craft-xai", "closed form", "affine masks", "every mask", RANDOM)
    table: dict[int, dict[str, list[dict]]] = {}
    for rank in options.ranks:
        table[rank] = {name: [] for name in sides}
        for _ in range(options.turns):
            for name in sides:
                common = (maps_few, tail, chosen, rank, options.points)
                found = their_side(crops, pooled, *common) if name == "Craft-xai" else our_side(pooled, *common, name)
                table[rank][name].append(found)
    command = " ".join(["python", "benchmarks/craft_nmf.py", *sys.argv[1:]])
    about = versions()
    lines = [
        "# NMF and Sobol importances against Craft-xai",
        "",
        f"`{command}`: MobileNetV2 {LAYER}, one class of Imagenette, {len(pooled)} crops of {PATCH} px,",
        f"importances of {len(maps_few)} images with {options.points} points; one thread, {options.turns} turns",
        "interleaved, medians of processor seconds without the network's passes over crops and images.",
        f"torch {about['torch']}, scikit-learn {about['scikit-learn']}, Craft-xai 0.0.3,",
        f"load average {os.getloadavg()[0]:.1f}.",
        "",
        "| rank | side | fit | importances | both | times | R2 of the crops |",
        "|---|---|---|---|---|---|---|",
    ]
    record: dict = {"command": command, "versions": about, "crops": len(pooled), "ranks": {}}
    for rank, by_side in table.items():
        totals = {}
        for name, found in by_side.items():
            fit, imp = (statistics.median(f[part] for f in found) for part in ("fit", "importances"))
            totals[name] = (fit, imp, found[0]["r2"])
        base = totals["Craft-xai"]
        for name, (fit, imp, score) in totals.items():
            shown = name if name == "Craft-xai" else f"netgloss, {name}"
            ratio = (base[0] + base[1]) / (fit + imp)
            lines.append(f"| {rank} | {shown} | {fit:.2f} | {imp:.2f} | {fit + imp:.2f} | {ratio:.1f} | {score:.4f} |")
        record["ranks"][rank] = {
            name: [{k: (v.tolist() if hasattr(v, "tolist") else v) for k, v in f.items()} for f in found]
            for name, found in by_side.items()
        }
    lines += ["", "times: how many times faster than Craft-xai, fit and importances together."]
    sums = [
        f"{name} {sum(found[0]['importance']):.2f}" for by_side in table.values() for name, found in by_side.items()
    ]
    lines += [
        "",
        "The fit is scikit-learn's on both sides: what is faster are the importances. Indices of an affine",
    ]
    lines += [
        f"layer add up to 1; these sums (in the table's order) say how rough the estimates are: {', '.join(sums)}."
    ]
    (HERE / "craft_nmf.md").write_text("\n".join(lines) + "\n")
    (HERE / "craft_nmf.json").write_text(json.dumps(record, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

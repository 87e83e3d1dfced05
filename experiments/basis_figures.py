"""Figures of experiments/basis_dissection.py for one layer: contours, IoU by label, scores over on-rate and training.

    python experiments/basis_figures.py --layer features.13 --fits runs/basis/mobilenet --stores runs/stores

Reads basis-<model>-<layer>.json; writes basis-<model>-<layer>-{contours,iou,rates,training}.png beside it: contours of
critters only (photographs are not ours to publish), rates where the record has a sweep.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
from pathlib import Path
from typing import Any

import torch

from basis_dissection import HERE, SHOWN, SWEEP, annotated

SNAPSHOTS = (20, 100, 200, 400, 800, 1200, 1600, 2000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="torchvision:mobilenet_v2")
    parser.add_argument("--layer", default="features.13")
    parser.add_argument("--fits", type=Path, required=True)
    parser.add_argument("--stores", type=Path, required=True)
    parser.add_argument("--no-training", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = Path(os.environ.get("NETGLOSS_DATA", "../shared"))
    name = options.model.split(":")[-1]
    tag = HERE / f"basis-{name}-{options.layer}"
    record = json.loads(tag.with_name(tag.name + ".json").read_text())

    from netgloss.classifiers import load_classifier

    checkpoint = None if name == "critters" else data / "weights" / f"{name}.pth"
    classifier = load_classifier(options.model, checkpoint=checkpoint)
    label, score = (
        annotated(data, options.stores / f"{name}-{part}.zarr", options.layer, part, classifier)
        for part in ("train", "test")
    )
    if name == "critters":
        save(contours(record, options.fits, score, classifier), f"{tag}-contours.png")
    save(bars(record), f"{tag}-iou.png")
    if record["sweep"]:
        save(rates(record), f"{tag}-rates.png")
    if not options.no_training:
        save(training(record, label, score), f"{tag}-training.png")


def save(figure: Any, path: str) -> None:
    figure.savefig(path, dpi=64)


def contours(record: dict[str, Any], fits: Path, score: Any, classifier: Any) -> Any:
    """The best detector of each of the six best labels of ``default`` seed 0: its two strongest score images."""
    from netgloss.data import open_images
    from netgloss.figures.dissection import concept_contours, detector_caption
    from netgloss.runs.saved import load_explainer

    basis = load_explainer(fits / "default-0.safetensors")
    chosen = [row for row in record["detectors"]["default"] if row["significant"]][:6]  # the best of each label
    source = open_images("critters:200,seed=1")
    picks = torch.tensor([row["concept"] for row in chosen])
    with torch.no_grad():
        maps = torch.cat([basis.encode(a)[:, picks] for _, a in score.batches(score.images)])
    labels = list(score.vocabulary.labels)
    images, drawn, thresholds, captions, masks = [], [], [], [], []
    for place, row in enumerate(chosen):
        strongest = maps[:, place].flatten(1).amax(1).argsort(descending=True)[:3].tolist()
        for k in strongest:
            i = int(score.images[k])
            pixels = classifier.preprocessing.pixels(source.image(i))
            images.append(pixels.permute(1, 2, 0).clamp(0, 1).numpy())
            drawn.append(maps[k, place].numpy())
            thresholds.append(float(basis.thresholds()[row["concept"]]))
            captions.append(detector_caption(row["label"], row["iou"], row["chance"]))
            masks.append(score.masks(score.images[[k]]).labels[0, labels.index(row["label"])].numpy())
    return concept_contours(
        images,
        drawn,
        thresholds,
        captions,
        masks=masks,
        title=f"{record['model']} {record['layer']}: the basis' best detectors on images of the test set (chance)",
    )


def bars(record: dict[str, Any]) -> Any:
    from netgloss.figures.dissection import iou_bars

    tables: dict[str, dict[str, float]] = {}
    for method in SHOWN:
        if method in record["detectors"]:
            table = dict.fromkeys(record["labels"], 0.0)
            for row in record["detectors"][method]:
                if row["label"]:
                    table[row["label"]] = max(table[row["label"]], row["iou"])
            tables[method] = table
    groups = {label: next((g for g in ("back", "front") if label.startswith(g)), "other") for label in record["labels"]}
    return iou_bars(tables, groups=groups, title=f"best IoU of each part at on-rate {record['rate']:g}")


def rates(record: dict[str, Any]) -> Any:
    from netgloss.figures.dissection import score_curves

    curves = {}
    for name, rows in record["sweep"].items():
        for kind in ("rate", "shared"):
            curves[f"{name}, {kind}"] = [(r, rows[f"{kind}:{r:g}"]["S1"], rows[f"{kind}:{r:g}"]["S2"]) for r in SWEEP]
    own = record["table"]["default"]["own"]
    marks = {"default, shared": (own["label_rate"], own["S1"], own["S2"])}
    return score_curves(curves, marks=marks, xlabel="on-rate over the label rows", title=f"{record['layer']}: seed 0")


def training(record: dict[str, Any], label: Any, score: Any) -> Any:
    """S1 and S2 at the matched rate and at the own threshold while ``default`` learns (seed 0)."""
    from netgloss.evaluation.dissect import dissect
    from netgloss.explainers.basis import InterpretableBasis, InterpretableBasisConfig
    from netgloss.figures.dissection import score_curves
    from netgloss.training import ActivationStream, build_explainer, fit

    stream = ActivationStream(label.store, label.layer, label.images)
    spec = stream.spec(num_classes=0, image=())
    basis = build_explainer(InterpretableBasis, InterpretableBasisConfig(), spec, seed=0)
    kept: dict[int, dict[str, torch.Tensor]] = {}

    def snapshot(line: dict[str, Any]) -> None:
        if line["step"] in SNAPSHOTS:
            kept[line["step"]] = copy.deepcopy(basis.state_dict())

    fit(basis, stream, seed=0, log=snapshot)
    rule = f"rate:{record['rate']:g}"
    curves: dict[str, list[tuple[float, float, float]]] = {"matched rate": [], "own threshold": []}
    for step, state in kept.items():
        one = InterpretableBasis(InterpretableBasisConfig(), spec)
        one.load_state_dict(state)
        found = dissect(one.eval(), (label, label.images), (score, score.images), ["own", rule])
        for name, which in (("matched rate", rule), ("own threshold", "own")):
            scores = found[which].scores()
            curves[name].append((float(step), scores["S1"], scores["S2"]))
    last = max(kept)
    for name in ("natural axes", "random rotation"):
        flat = record["table"][name][rule]
        curves[name] = [(float(min(kept)), flat["S1"], flat["S2"]), (float(last), flat["S1"], flat["S2"])]
    return score_curves(
        curves, xlabel="training step", log=False, title=f"{record['layer']}: default over training, seed 0"
    )


if __name__ == "__main__":
    main()

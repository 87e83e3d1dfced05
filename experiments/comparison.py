"""The matrix: every method and every metric on two networks, three layers and three sets of images.

    python experiments/comparison.py --work DIR [--cell mobilenet_v2-features.13-carparts] [--table]

Without --cell all cells run, one after the other; each continues where it was stopped, and adds only what is new (a
method that lands later). --table writes experiments/comparison.{md,json} from the cells that are there. Nothing is
tuned: methods run with their defaults but for what CONFIGS says, which bounds the time on one core.

Three seeds. Images to fit on and to judge on are disjoint. 32 concepts where a method is free to choose.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from pathlib import Path

HERE = Path(__file__).parent
DATA = Path(os.environ.get("NETGLOSS_DATA", "../shared"))
NETWORKS = {"mobilenet_v2": ("features.18", "features.13"), "squeezenet1_0": ("features.12",)}
IMAGES = ("imagenette", "animals", "carparts")
CONFIGS = {
    "nmf": {"max_rows": 6000, "negative": "clip"},
    "ica": {"max_rows": 6000},
    "kmeans": {"max_rows": 6000, "n_init": 1},
    "semi-nmf": {"max_rows": 6000, "max_iter": 100},
    "topk-sae": {"steps": 300, "batch_size": 1024},
    "batch-topk-sae": {"steps": 300, "batch_size": 1024},
    "jumprelu-sae": {"steps": 300, "batch_size": 1024},
    "basis": {"steps": 150, "batch_size": 2048},
    "srae": {"joint": True, "num_concepts": 12, "steps": 1000, "attempts": 1},
}
EVERYWHERE = {"parts": "trains a copy of the layers above, minutes a fit on one core, beyond this experiment's time"}
WITHOUT = {
    "features.18": {"basis": "1,280 features: about 2 s a step on one core, beyond this experiment's time"},
}
FAITHFUL = {  # images for C-deletion, and for Shapley and Sobol values; an affine tail has them in closed form
    "features.18": (32, 32),
    "features.13": (16, 4),
    "features.12": (16, 4),
}
SHOWN = [
    "r2",
    "agreement",
    "kl",
    "completeness",
    "l0",
    "hoyer",
    "stability",
    "dissection_mean_iou",
    "c_gain_logit",
    "c_carried_logit",
]


def cells() -> list[str]:
    return [f"{n}-{layer}-{i}" for n, layers in NETWORKS.items() for i in IMAGES for layer in layers]


def sources(name: str) -> tuple[object, object | None, str | None]:
    """Images to fit on, images to judge on (None: a fifth of the former), annotations."""
    import netgloss

    if name == "imagenette":
        parts = [netgloss.open_images(DATA / "data" / "imagenette" / part) for part in ("train", "val")]
        fit, judge = (_even(source, count) for source, count in zip(parts, (30, 10), strict=True))
        return fit, judge, None
    if name == "animals":
        return _even(netgloss.open_images(DATA / "data" / "animals"), 50), None, None
    cars = DATA / "data" / "carparts"
    return (
        netgloss.open_images(cars / "train" / "images").subset(range(300)),
        netgloss.open_images(cars / "test" / "images"),
        str(cars / "test"),
    )


def _labelled(images: str) -> dict[str, dict]:
    """The supervised basis learns from the masks of the images to fit, where there are any."""
    return (
        {"supervised-basis": {"annotations": str(DATA / "data" / "carparts" / "train")}} if images == "carparts" else {}
    )


def _even(source, count: int):
    """The first ``count`` images of each class."""
    seen: dict[int, int] = {}
    picks = []
    for i, target in enumerate(source.targets.tolist()):
        seen[target] = seen.get(target, 0) + 1
        if seen[target] <= count:
            picks.append(i)
    return source.subset(picks)


def run(cell: str, work: Path, methods: str) -> None:
    import netgloss
    from netgloss.data.sources import open_sources
    from netgloss.evaluation.faithful import FaithfulnessOptions
    from netgloss.workflows.capture import store_info
    from netgloss.workflows.compare import CompareOptions

    network, layer, images = cell.split("-")
    classifier = netgloss.load_classifier(f"torchvision:{network}", checkpoint=DATA / "weights" / f"{network}.pth")
    fit, judge, annotations = sources(images)
    store = work / f"{network}-{images}.zarr"
    joined = open_sources(fit, judge)
    netgloss.capture(classifier, joined, NETWORKS[network], store, info=store_info(classifier, joined))
    deletion, importances = FAITHFUL[layer]
    started = time.process_time()
    found = netgloss.compare(
        out=work / cell,
        methods=methods,
        model=classifier,
        layer=layer,
        images=fit,
        eval_images=judge,
        annotations=annotations,
        configs=CONFIGS | _labelled(images),
        without=EVERYWHERE | WITHOUT.get(layer, {}),
        options=CompareOptions(network_images=64 if images == "imagenette" else 0),
        faithfulness=FaithfulnessOptions(images=deletion, importance_images=importances, steps=8),
        store=store,
        device="cpu",
        command=f"python experiments/comparison.py --cell {cell}",
    )
    print(f"{cell}: {time.process_time() - started:.0f} processor seconds", flush=True)
    for name, reason in found.left_out.items():
        print(f"  left out: {name}: {reason}", flush=True)


def write(work: Path) -> None:
    from netgloss.runs.comparison import Comparison

    there = [cell for cell in cells() if (work / cell / "comparison.json").exists()]
    found = {cell: Comparison.load(work / cell) for cell in there}
    definitions = {m["name"]: m["definition"] for one in found.values() for m in one.record["metrics"]}
    record = {
        "command": "python experiments/comparison.py --work runs/matrix --table",
        "configs": CONFIGS,
        "definitions": definitions,
        "missing": [cell for cell in cells() if cell not in there],
        "cells": {cell: _brief(one) for cell, one in found.items()},
    }
    (HERE / "comparison.json").write_text(
        json.dumps(record, ensure_ascii=False, separators=(",", ":")).replace(str(DATA), "NETGLOSS_DATA") + "\n"
    )
    (HERE / "comparison.md").write_text(_page(found, record["missing"]))


def _brief(one) -> dict:
    keep = ["created", "versions", "layer", "layer_shape", "num_fit", "num_judged", "num_faithfulness"]
    keep += ["num_importances", "options", "tail", "control_networks", "metrics", "differences", "seconds"]
    record = {name: one.record[name] for name in keep}
    record["metrics"] = [{k: v for k, v in m.items() if k != "definition"} for m in record["metrics"]]
    record["differences"] = {
        m: record["differences"].get(m, []) for m in ("r2", "agreement", "kl", "dissection_mean_iou")
    }
    record["methods"] = [{k: v for k, v in m.items() if k != "run"} for m in one.record["methods"]]
    record["scores"] = {
        name: {
            metric: {k: v for k, v in score.items() if k not in ("definition", "metric", "higher_is_better")}
            | {"mark": one.mark(name, metric)}
            for metric, score in scores.items()
        }
        for name, scores in one.record["scores"].items()
    }
    return _rounded(record)


def _rounded(value):
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list) else value


def _page(found, missing: list[str]) -> str:
    about = next(iter(found.values())).record["versions"]
    lines = [
        "# The matrix: all methods, all metrics",
        "",
        "`python experiments/comparison.py --work runs/matrix`, then `--table`. Three seeds; 32 concepts where a",
        f"method is free to choose. torch {about['torch']}, scikit-learn {about['scikit-learn']}. Value and 95 %",
        "interval over images and seeds. ≈: not distinguishable from random; ↓: worse than random (paired bootstrap",
        "over images against random directions with as many concepts, and shuffled codes). comparison.json has all",
        "scores, controls and definitions; docs/comparison.md says in words what this shows and what it does not.",
    ]
    if missing:
        lines += ["", f"Not run: {', '.join(missing)}."]
    lines += ["", "## Methods told from random, by metric", ""]
    lines += ["Methods (controls not counted) that are better than random / all that have the metric.", ""]
    metrics = list(dict.fromkeys(m for one in found.values() for m in one.metrics))
    lines += _table(
        ["metric", *found], [[metric, *(_counts(one, metric) for one in found.values())] for metric in metrics]
    )
    for cell, one in found.items():
        record = one.record
        tail = f"{record['tail']['reason']}{' (affine)' if record['tail']['affine'] else ''}"
        lines += ["", f"## {cell}", ""]
        lines.append(
            f"{record['num_fit']} images to fit, {record['num_judged']} to judge, faithfulness on "
            f"{record['num_faithfulness']}; {tail}."
        )
        shown = [metric for metric in SHOWN if metric in one.metrics]
        rows = []
        for m in record["methods"]:
            if not m["reason"]:
                name = m["name"] + (" (pooled)" if m["reads"] == "pooled" else "")
                cells_ = [one.cell(m["name"], metric) for metric in shown]
                rows.append([name, str(m["num_concepts"]), str(m["fit_seconds"]), *cells_])
        lines += ["", *_table(["method", "K", "seconds", *shown], rows), ""]
        lines += [f"- left out: {name}: {reason}" for name, reason in one.left_out.items()]
        lines.append(f"- options other than the defaults: {_options(record['methods'])}")
    return "\n".join(lines) + "\n"


def _options(methods: list[dict]) -> str:
    from netgloss.explainers.names import find_explainer

    told = []
    for m in methods:
        if not m["reason"] and m["kind"] == "method":
            fields = {f.name: f.default for f in dataclasses.fields(find_explainer(m["method"]).Config)}
            changed = {
                k: v for k, v in m["config"].items() if fields.get(k) != v and k not in ("num_concepts", "classes")
            }
            changed.pop("annotations", None)
            told.append(f"{m['name']} {', '.join(f'{k} {v}' for k, v in changed.items())}" if changed else "")
    return "; ".join(filter(None, told))


def _counts(one, metric: str) -> str:
    found = next((m for m in one.record["metrics"] if m["name"] == metric), None)
    return f"{found['beat_random']}/{found['methods']}" if found and found["methods"] else "-"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/matrix"))
    parser.add_argument("--cell", choices=cells())
    parser.add_argument("--methods", default="all")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if not options.table:
        for cell in [options.cell] if options.cell else cells():
            run(cell, options.work, options.methods)
    else:
        write(options.work)


if __name__ == "__main__":
    main()

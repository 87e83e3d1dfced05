"""All baselines and controls on one layer of a real network: the project's first table.

    python experiments/baselines.py --model torchvision:mobilenet_v2 --checkpoint mobilenet_v2.pth --layer features.18

Fits on Imagenette's train images, scores on Imagenette's val images (true ImageNet validation pictures, which the
network never saw), three seeds. Nothing is tuned: every method runs with its defaults and the same number of concepts.
Writes experiments/baselines-<model>-<layer>.{md,json}.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
METHODS = ["pca", "ica", "nmf", "kmeans", "topk-sae", "natural-axes", "random-directions"]
SHOWN = ["r2", "r2_feature_mean", "agreement", "kl", "accuracy_change", "l0", "hoyer", "dead_share", "stability"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = Path(os.environ.get("NETGLOSS_DATA", "../shared"))
    parser.add_argument("--model", default="torchvision:mobilenet_v2")
    parser.add_argument("--checkpoint", type=Path, default=data / "weights" / "mobilenet_v2.pth")
    parser.add_argument("--layer", default="features.18")
    parser.add_argument("--num-concepts", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("runs/baselines"))
    parser.add_argument("--methods", nargs="+", default=METHODS)
    options = parser.parse_args()

    import netgloss
    from netgloss.runs.run import versions
    from netgloss.workflows.explain import explain

    classifier = netgloss.load_classifier(options.model, checkpoint=options.checkpoint)
    train = netgloss.open_images(data / "data" / "imagenette" / "train")
    val = netgloss.open_images(data / "data" / "imagenette" / "val")
    tag = f"{options.model.split(':')[1]}-{options.layer}"
    table: dict[str, dict] = {}
    for method in options.methods:
        start = time.perf_counter()
        run = explain(
            method,
            classifier,
            options.layer,
            train,
            eval_images=val,
            out=options.work / tag / method,
            store=options.work / tag / "activations.zarr",
            num_concepts=options.num_concepts,
            seeds=options.seeds,
        )
        table[method] = {s.metric: s.to_dict() for s in run.scores}
        table[method]["seconds"] = run.manifest["times"]
        print(f"{method}: {time.perf_counter() - start:.0f} s", flush=True)
        write(options, tag, table, versions())


def cell(score: dict | None) -> str:
    if score is None or score["value"] is None:
        return "-"
    if score["low"] is None:
        return f"{score['value']:.3f}"
    return f"{score['value']:.3f} ({score['low']:.3f} .. {score['high']:.3f})"


def write(options: argparse.Namespace, tag: str, table: dict, versions: dict) -> None:
    command = "python experiments/baselines.py " + " ".join(sys.argv[1:])
    record = {"command": command.strip(), "versions": versions, "seeds": list(range(options.seeds)), "table": table}
    (HERE / f"baselines-{tag}.json").write_text(json.dumps(record, indent=1) + "\n")
    lines = [
        f"# Baselines on {options.model} {options.layer}",
        "",
        f"`{command.strip()}`; {options.num_concepts} concepts, seeds {record['seeds']}, fitted on Imagenette train",
        f"(1,500 images), scored on Imagenette val (500 images). torch {versions['torch']}, scikit-learn",
        f"{versions['scikit-learn']}. Value and 95 % interval over images and seeds. Controls are below; all scores",
        "with their definitions are in the JSON file.",
        "",
        "| method | " + " | ".join(SHOWN) + " |",
        "|---" * (len(SHOWN) + 1) + "|",
    ]
    for method, scores in table.items():
        lines.append(f"| {method} | " + " | ".join(cell(scores.get(name)) for name in SHOWN) + " |")
    for metric in ("r2", "agreement", "kl", "stability"):
        rows = {m: s[metric]["baselines"] for m, s in table.items() if metric in s}
        names = list(dict.fromkeys(name for beside in rows.values() for name in beside))
        lines += ["", f"## Controls of {metric}", "", "| method | itself | " + " | ".join(names) + " |"]
        lines.append("|---" * (len(names) + 2) + "|")
        for method, beside in rows.items():
            own = f"{table[method][metric]['value']:.3f}"
            lines.append(
                f"| {method} | {own} | "
                + " | ".join("-" if beside.get(n) is None else f"{beside[n]:.3f}" for n in names)
                + " |"
            )
    (HERE / f"baselines-{tag}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

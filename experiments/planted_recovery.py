"""Which built-in method finds planted concepts again, as the planting gets harder.

    python experiments/planted_recovery.py

Rows of 64 features are sums of 32 planted non-negative directions (``planted.py``); each method is fitted on
5,000 rows with its defaults and the planted number of concepts, and judged on 5,000 other rows of the same directions
(``recovery.py``). One setting is changed at a time. Three seeds: other directions, rows, initialisations.
Writes experiments/planted-recovery.{md,json}.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from netgloss.errors import UserError
from netgloss.explainers.base import Batch, LayerSpec
from netgloss.explainers.names import find_explainer
from netgloss.runs.run import versions
from netgloss.training import build_explainer, fit
from planted import PlantedConfig, plant
from recovery import recovery

HERE = Path(__file__).parent
METHODS = ["nmf", "ica", "topk-sae", "kmeans", "pca", "natural-axes", "random-directions"]
SIGNED = {"nmf", "topk-sae", "kmeans"}
BASE = PlantedConfig(num_rows=5000, num_features=64, num_concepts=32, active=3.0)
SETTINGS = {
    "plain": BASE,
    "dense (8 active)": replace(BASE, active=8.0),
    "correlated (0.8)": replace(BASE, correlation=0.8),
    "noisy (0.5)": replace(BASE, noise=0.5),
    "hierarchy, long tail": replace(BASE, children=3, long_tail=0.5),
    "overcomplete (96)": replace(BASE, num_concepts=96),
}
SHOWN = {
    "cosine": "Cosine of directions",
    "correlation": "Correlation of codes",
    "f1": "F1 of supports, as the method says (code above 0)",
    "best_f1": "F1 of supports at the best threshold of each concept",
}


class ArrayStream:
    """Rows in memory, as the fit loop asks for them."""

    layer = "planted"

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self.num_rows, self.num_features = rows.shape

    def chunks(self) -> Iterator[Tensor]:
        return iter(self.rows.split(1000))

    def sample(self, max_rows: int, *, seed: int) -> Tensor:
        order = torch.randperm(self.num_rows, generator=torch.Generator().manual_seed(seed))
        return self.rows[order[:max_rows].sort().values]

    def batches(self, batch_size: int, *, seed: int, start: int = 0, **_: object) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        step = 0
        while True:
            for picks in torch.randperm(self.num_rows, generator=generator).split(batch_size):
                yield Batch(self.rows[picks], picks, step=step)
                step += 1


def measure(method: str, setting: PlantedConfig, seed: int, options: dict) -> dict[str, float] | None:
    """Mean recovery on held-out rows; None for settings that the method refuses."""
    config = replace(setting, seed=seed)
    planted, held = plant(config), plant(config, rows_seed=seed + 1000)
    cls = find_explainer(method)
    spec = LayerSpec("planted", (config.num_features,), nonnegative=config.nonnegative)
    try:
        explainer = build_explainer(cls, cls.Config(num_concepts=config.num_concepts, **options), spec, seed=seed)
        fit(explainer, ArrayStream(planted.rows), seed=seed)  # type: ignore[arg-type]
    except UserError:
        return None
    with torch.no_grad():
        codes = explainer.encode(held.rows)
    found = recovery(
        held.codes,
        codes,
        planted_dictionary=held.dictionary,
        found_dictionary=explainer.dictionary,
        signed=method in SIGNED,
    )
    return found.means()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--top-k", type=int, help="atoms that topk-sae may use for a row (default: its own)")
    parser.add_argument("--out", type=Path, default=HERE / "planted-recovery")
    options = parser.parse_args()
    table: dict[str, dict[str, list[dict[str, float]]]] = {}
    for name, setting in SETTINGS.items():
        for method in options.methods:
            start = time.process_time()
            extra = {"top_k": options.top_k} if method == "topk-sae" and options.top_k else {}
            found = [measure(method, setting, seed, extra) for seed in range(options.seeds)]
            table.setdefault(name, {})[method] = [one for one in found if one is not None]
            print(f"{name}: {method}: {time.process_time() - start:.1f} CPU-seconds", flush=True)
    write(options, table)


def cell(runs: list[dict[str, float]], number: str) -> str:
    if not runs:
        return "-"
    values = [run[number] for run in runs]
    return f"{statistics.fmean(values):.2f} ({min(values):.2f} .. {max(values):.2f})"


def write(options: argparse.Namespace, table: dict) -> None:
    command = ("python experiments/planted_recovery.py " + " ".join(sys.argv[1:])).strip()
    found = versions()
    settings = {name: asdict(setting) for name, setting in SETTINGS.items()}
    record = {"command": command, "versions": found, "settings": settings, "table": table}
    options.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    lines = [
        "# Recovery of planted concepts",
        "",
        f"`{command}`: mean over concepts, then mean (lowest .. highest) over {options.seeds} seeds.",
        f"torch {found['torch']}, scikit-learn {found['scikit-learn']}. Defaults of every method; a dash: it takes at",
        "most one concept a feature. topk-sae lets 16 atoms of a row be active by default, more than were planted.",
    ]
    for number, title in SHOWN.items():
        lines += ["", f"## {title}", "", "| planting | " + " | ".join(options.methods) + " |"]
        lines.append("|---" * (len(options.methods) + 1) + "|")
        for name, by_method in table.items():
            lines.append(f"| {name} | " + " | ".join(cell(by_method[m], number) for m in options.methods) + " |")
    options.out.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

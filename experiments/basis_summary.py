"""One page from the tables of experiments/basis_dissection.py: every layer and method at the rate of ``default``.

    python experiments/basis_summary.py

Reads experiments/basis-<model>-<layer>.json, writes experiments/basis.md. Measures nothing.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from basis_dissection import HERE, row

LAYERS = (
    "mobilenet_v2-features.13",
    "mobilenet_v2-features.17",
    "squeezenet1_0-features.10",
    "squeezenet1_0-features.12",
    "critters-block5",
    "mobilenet_v2-features.13-untrained",
)


def main() -> None:
    lines = [
        "# The interpretable basis beside its baselines",
        "",
        "`python experiments/basis_summary.py`, from the full tables of each layer (`basis-*.md`, where the rules, the",
        "shared threshold, the published one and the controls are). All methods at the mean on-rate r of `default`",
        "(tau 5, outside the published range) over the label rows, each direction by its own quantile. S1x: S1 less",
        "chance; xl: less what the layout alone gives. +-: half of the 95 % t interval of S1x over seeds. Equal: S1x",
        "of as many directions as there are labels (means of 100 draws). OR: recall of a label by any of its",
        "detectors, less that of its best one.",
    ]
    for layer in LAYERS:
        path = HERE / f"basis-{layer}.json"
        if path.exists():
            lines += ["", *table(layer, json.loads(path.read_text()))]
    (HERE / "basis.md").write_text("\n".join(lines) + "\n")


def table(layer: str, record: dict[str, Any]) -> list[str]:
    rule = f"rate:{record['rate']:g}"
    fitted, judged = record["data"]
    head = ["method", "I", "seeds", "S1", "S1x", "+-", "S1xl", "S2", "S2x", "S2xl", "equal", "OR", "labels"]
    lines = [f"## {layer}: r = {record['rate']:g}, fitted on {fitted}, scored on {judged}", "", row(head)]
    lines.append(row(["---"] * len(head)))
    for name, rules in record["table"].items():
        t = rules[rule]
        equal = record.get("equal", {}).get(name)
        joint = record["joint"].get(name, {})
        lines.append(
            row(
                [
                    name,
                    f"{t['num_concepts']:.0f}",
                    str(t["seeds"]),
                    *(f"{t[k]:.2f}" for k in ("S1", "S1x")),
                    half_width(t["by_seed"]["S1x"]),
                    *(f"{t[k]:.2f}" for k in ("S1xl", "S2", "S2x", "S2xl")),
                    f"{np.mean([s['S1x'] for s in equal]):.2f}" if equal else "-",
                    f"{joint['or_recall'] - joint['single_recall']:+.2f}" if joint else "-",
                    f"{t['unique_detectors']:.1f}",
                ]
            )
        )
    if "fits" in record:
        lines += ["", f"Fits: {record['fits']}."]
    return lines


def half_width(values: list[float]) -> str:
    """Half of the 95 % interval of the mean over seeds."""
    from scipy.stats import t

    if len(values) < 2:
        return "-"
    return f"{t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)):.2f}"


if __name__ == "__main__":
    main()

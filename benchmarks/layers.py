"""CPU-seconds of ``netgloss layers`` in a process of its own, for ten networks, with another source tree in turns.

    python benchmarks/layers.py --before PATH/TO/OTHER/src > benchmarks/layers.md

Each time is that of the whole process, user and system, the least of ``--repeats``; the two trees take turns, and so
does importing torch alone.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
from pathlib import Path

NETWORKS = {
    "timm:efficientnet_lite0": 4.7,
    "timm:mobilenetv3_large_100": 5.5,
    "timm:regnety_032": 19.4,
    "timm:resnet50": 25.6,
    "timm:swin_tiny_patch4_window7_224": 28.3,
    "timm:tf_efficientnet_b5": 30.4,
    "timm:vit_base_patch16_224": 86.6,
    "timm:convnext_base": 88.6,
    "timm:eva02_base_patch14_448": 87.1,
    "torchvision:resnet101": 44.5,
}
"""Millions of parameters by name."""


def seconds(command: list[str], source: Path) -> float:
    """CPU-seconds of a process that imports netgloss from ``source``."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--before", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS))
    chosen = parser.parse_args()
    here = Path(__file__).resolve().parent.parent / "src"
    print("# `netgloss layers`: CPU-seconds of the whole process\n")
    print("`python benchmarks/layers.py --before PATH`, one thread, the least of", chosen.repeats, "runs in turns.\n")
    print("| network | M parameters | before | now | of that, importing torch | ratio |")
    print("|---|---|---|---|---|---|")
    for name in chosen.networks:
        listed = [sys.executable, "-m", "netgloss.cli", "layers", "--model", name, "--random-weights"]
        turns = [
            (
                seconds(listed, chosen.before),
                seconds(listed, here),
                seconds([sys.executable, "-c", "import torch"], here),
            )
            for _ in range(chosen.repeats)
        ]
        old, new, torch = (min(column) for column in zip(*turns, strict=True))
        print(f"| {name} | {NETWORKS[name]} | {old:.1f} | {new:.1f} | {torch:.1f} | {old / new:.1f} |", flush=True)


if __name__ == "__main__":
    main()

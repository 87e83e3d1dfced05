"""The filter loss against its own matrix products: time of forward and backward, and memory.

    python benchmarks/part_loss.py

B = 64 images, C = 512 filters, n = 14 cells a side, exact loss, float32. The reference is the least that any exact
version must do: the product of the maps with the 197 templates, and its transpose for the gradient. ``autograd`` is
the plain version (einsum, log_softmax, logsumexp) that torch differentiates. Writes benchmarks/part_loss.{json,md}.
"""

from __future__ import annotations

import json
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
B, C, N = 64, 512, 14
REPEATS = 7


def maps() -> torch.Tensor:
    values = torch.rand(B, C, N, N, generator=torch.Generator().manual_seed(0)) ** 6
    return (values / values.sum(dim=(2, 3), keepdim=True)).requires_grad_()


def products() -> Callable[[], None]:
    from netgloss.explainers.part_maps import templates

    x, table = maps().detach().flatten(2), templates(N, N, kappa=30.0)

    def run() -> None:
        _ = (x @ table.T) @ table

    return run


def ours(*, single: bool = False) -> Callable[[], None]:
    from netgloss.explainers.part_maps import information_loss

    x = maps()

    def run() -> None:
        x.grad = None
        information_loss(x, kappa=30.0, single=single).sum().backward()

    return run


def plain() -> Callable[[], None]:
    from netgloss.explainers.part_maps import templates

    x, table = maps(), templates(N, N, kappa=30.0)

    def run() -> None:
        x.grad = None
        s = torch.einsum("bcp,tp->ctb", x.flatten(2), table)
        log_p = s.log_softmax(dim=2)
        log_mix = (log_p - math.log(len(table))).logsumexp(dim=1, keepdim=True)
        (-(log_p.exp() * (log_p - log_mix)).sum() / len(table)).backward()

    return run


CASES: dict[str, Callable[[], Callable[[], None]]] = {
    "matrix products alone": products,
    "filter loss": ours,
    "filter loss, single template": lambda: ours(single=True),
    "autograd": plain,
}


def memory_mb(name: str) -> float:
    """Peak memory of the first call above that before it, in MB; to be asked in a process of its own."""
    run = CASES[name]()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def seconds(threads: int) -> dict[str, list[float]]:
    """Times of all cases, in turn, so that whatever else the machine does meets all alike."""
    torch.set_num_threads(threads)
    runs = {name: make() for name, make in CASES.items()}
    found: dict[str, list[float]] = {name: [] for name in CASES}
    for repeat in range(REPEATS + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if repeat:  # the first round warms up
                found[name].append(time.perf_counter() - start)
    return found


def main() -> None:
    if len(sys.argv) > 1:
        print(memory_mb(sys.argv[1]))
        return
    from netgloss.runs.run import versions

    memory = {
        name: float(subprocess.run([sys.executable, __file__, name], check=True, capture_output=True).stdout)
        for name in CASES
    }
    threads = torch.get_num_threads()
    times = seconds(threads)
    base = times["matrix products alone"]
    rows = {
        name: {
            "fastest_seconds": min(times[name]),
            "median_seconds": statistics.median(times[name]),
            "over_products": min(times[name]) / min(base),
            "median_over_products": statistics.median(a / b for a, b in zip(times[name], base, strict=True)),
            "memory_mb": memory[name],
        }
        for name in CASES
    }
    record = {"B": B, "C": C, "n": N, "repeats": REPEATS, "threads": threads, "versions": versions(), "rows": rows}
    (HERE / "part_loss.json").write_text(json.dumps(record, indent=1) + "\n")
    (HERE / "part_loss.md").write_text(markdown(record))


def markdown(record: dict[str, Any]) -> str:
    lines = [
        "# Filter loss against its matrix products",
        "",
        f"`python benchmarks/part_loss.py`: B = {B}, C = {C}, n = {N}, forward and backward, float32, CPU, "
        f"{record['threads']} thread(s), {REPEATS} rounds of all cases in turn on a shared machine; torch "
        f"{record['versions']['torch']}. Memory: peak of one call above what the maps take "
        f"({B * C * N * N * 4 / 2**20:.0f} MB); the gradient alone is as large as the maps.",
        "",
        "| | fastest, s | median, s | over the products (fastest) | (median of rounds) | memory, MB |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in record["rows"].items():
        lines.append(
            f"| {name} | {row['fastest_seconds']:.3f} | {row['median_seconds']:.3f} | {row['over_products']:.2f} | "
            f"{row['median_over_products']:.2f} | {row['memory_mb']:.0f} |"
        )
    lines += [
        "",
        "The loss works channels off in slices that fit the cache and never holds all scores; the plain products do. "
        "That is why it can take less time than they do.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

"""Ten per-class SRAE modules in one batched model, and a joint module of ten classes, against one module.

    python benchmarks/srae_batched.py --device cpu

Times the optimiser steps of joint training (forward, backward, Adam, decay) on random activations, after a warm-up,
without data loading, through the explainer's own losses; and the matrix products of such a step alone, on tensors that
exist already, which no way of batching can save. Writes benchmarks/srae_batched.md.

glibc returns large freed blocks to the kernel, and the next step pays for fresh pages again. To measure without that::

    MALLOC_MMAP_THRESHOLD_=1000000000 MALLOC_TRIM_THRESHOLD_=4000000000 python benchmarks/srae_batched.py --device cpu
"""

from __future__ import annotations

import argparse
import itertools
import os
import shlex
import statistics
import sys
import time
from pathlib import Path

import torch

from netgloss.explainers.base import Batch, LayerSpec
from netgloss.explainers.srae import SRAE, SRAEConfig, hidden_widths
from netgloss.runs.run import versions

HERE = Path(__file__).parent


def step_seconds(num_classes: int, *, joint: bool = False, features: int, batch: int, steps: int, device: str) -> float:
    """Median seconds of an optimiser step with ``num_classes`` modules, or one joint module of 12 x-features."""
    config = SRAEConfig(
        classes=tuple(map(str, range(num_classes))), joint=joint, num_concepts=12 if joint else 5, batch_size=batch
    )
    explainer = SRAE(config, LayerSpec("l", (features,), nonnegative=True, num_classes=1000))
    for g in range(explainer.num_modules):
        explainer.nets.draw(g, g)
    explainer.to(device).train()
    optimizer = explainer.optimizer()
    given = Batch(
        torch.rand(batch, features, device=device),
        torch.arange(batch),
        logits=torch.randn(batch, 1000, device=device),
        step=config.steps - 1,
    )
    found = []
    for step in range(steps + 5):
        if device != "cpu":
            torch.cuda.synchronize()
        start = time.perf_counter()
        torch.stack(list(explainer.losses(given).values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if device != "cpu":
            torch.cuda.synchronize()
        if step >= 5:
            found.append(time.perf_counter() - start)
    return statistics.median(found)


def product_seconds(num_classes: int, *, features: int, batch: int, steps: int, device: str) -> float:
    """Median seconds of a step's matrix products: forward, gradients of weights and of all inputs but the first."""
    widths = (features, *hidden_widths(features), 5)
    pairs = [*itertools.pairwise(widths), *itertools.pairwise(widths[::-1])]
    given = [torch.rand(num_classes, batch, a, device=device) for a, _ in pairs]
    out = [torch.rand(num_classes, batch, b, device=device) for _, b in pairs]
    weight = [torch.rand(num_classes, a, b, device=device) for a, b in pairs]
    room = [[torch.empty_like(v) for v in values] for values in (given, out, weight)]
    found = []
    for step in range(steps + 5):
        if device != "cpu":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for i, (x, y, w, *into) in enumerate(zip(given, out, weight, *room, strict=True)):
            torch.bmm(x, w, out=into[1])
            torch.bmm(x.transpose(1, 2), y, out=into[2])
            if i:
                torch.bmm(y, w.transpose(1, 2), out=into[0])
        if device != "cpu":
            torch.cuda.synchronize()
        if step >= 5:
            found.append(time.perf_counter() - start)
    return statistics.median(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--features", type=int, nargs="+", default=[512, 1280, 4096])
    parser.add_argument("--batches", type=int, nargs="+", default=[50, 200])
    parser.add_argument("--out", type=Path, default=HERE / "srae_batched.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {options.threads} thread(s)"
    command = shlex.join(["python", "benchmarks/srae_batched.py", *sys.argv[1:]])
    kept = " Freed memory kept." if "MALLOC_TRIM_THRESHOLD_" in os.environ else ""
    lines = [
        "# Many per-class modules in one batched model",
        "",
        f"`{command}`; {name}; torch {versions()['torch']}; median of {options.steps} "
        "optimiser steps of joint training, n = 5. 'products' are the step's matrix products alone. The aim is ten "
        f"modules below 3 times the time of one.{kept}",
        "",
        "| features | batch | 1 module, ms | products | 10 modules, ms | products | joint module of 10 classes, ms "
        "| 10 / 1 | products 10 / 1 | joint / 1 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for features in options.features:
        for batch in options.batches:
            one, ten, joint = (
                step_seconds(n, joint=j, features=features, batch=batch, steps=options.steps, device=options.device)
                for n, j in ((1, False), (10, False), (10, True))
            )
            few, many = (
                product_seconds(n, features=features, batch=batch, steps=options.steps, device=options.device)
                for n in (1, 10)
            )
            times = " | ".join(f"{1e3 * seconds:.2f}" for seconds in (one, few, ten, many, joint))
            ratios = f"{ten / one:.1f} | {many / few:.1f} | {joint / one:.1f}"
            lines.append(f"| {features} | {batch} | {times} | {ratios} |")
            print(lines[-1], flush=True)
    options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

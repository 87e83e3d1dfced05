"""Dissection in one pass against loops over units, the permutation test, and a training step of the basis.

    python benchmarks/dissection.py [--images 100] [--units 512]

One thread, processor time (the machine may be shared). The loops count the same pixels: ``unit loop`` takes one unit
and one label at a time over all images, ``unit and image loop`` one unit in one image at a time, as the published code
of network dissection does; the loops run on a share of the units and are scaled up. Writes benchmarks/dissection.md and
benchmarks/dissection.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F

HERE = Path(__file__).parent
GRID, LABELS, CELLS = (56, 56), 18, 13


def batch(images: int, units: int, seed: int):
    from netgloss.metrics.dissection import Masks

    g = torch.Generator().manual_seed(seed)
    maps = torch.randn(images, units, CELLS, CELLS, generator=g)
    value = torch.randint(3 * LABELS, (images, 7, 7), generator=g).repeat_interleave(8, 1).repeat_interleave(8, 2)
    return maps, Masks(torch.stack([value == k for k in range(LABELS)], 1))


def one_pass(images: int, units: int, rules: int):
    """Seconds, and the counts of the first rule."""
    from netgloss.metrics.dissection import Dissection, Vocabulary

    thresholds = torch.full((rules, units), 2.0)
    metric = Dissection(thresholds, Vocabulary(tuple(map(str, range(LABELS)))), grid=GRID)
    seconds = 0.0
    for start in range(0, images, 20):
        maps, masks = batch(20, units, start)
        begin = time.process_time()
        metric.update(torch.arange(start, start + 20), maps, masks)
        seconds += time.process_time() - begin
    return seconds, metric.counts[0, :, :LABELS]


def unit_loop(images: int, units: int, some: int):
    """Seconds for all units from the first ``some``, and their counts."""
    counts, seconds = torch.zeros(some, LABELS), 0.0
    for start in range(0, images, 20):
        maps, masks = batch(20, units, start)
        begin = time.process_time()
        for i in range(some):
            on = F.interpolate(maps[:, i : i + 1], size=GRID, mode="bilinear", align_corners=False)[:, 0] > 2.0
            for c in range(LABELS):
                counts[i, c] += (on & masks.labels[:, c]).sum()
        seconds += time.process_time() - begin
    return seconds * units / some, counts


def unit_image_loop(images: int, units: int, some: int) -> float:
    seconds = 0.0
    for start in range(0, images, 20):
        maps, masks = batch(20, units, start)
        begin = time.process_time()
        for b in range(20):
            for i in range(some):
                on = (
                    F.interpolate(maps[b : b + 1, i : i + 1], size=GRID, mode="bilinear", align_corners=False)[0, 0]
                    > 2.0
                )
                for c in range(LABELS):
                    (on & masks.labels[b, c]).sum()
        seconds += time.process_time() - begin
    return seconds * units / some


def permutation(images: int, units: int) -> float:
    from netgloss.metrics.dissection import Vocabulary
    from netgloss.metrics.dissection_significance import permutation_test

    maps, masks = batch(images, units, 0)
    chosen = torch.arange(units) % LABELS
    begin = time.process_time()
    permutation_test(maps, torch.full((units,), 2.0), masks, chosen, Vocabulary(tuple(map(str, range(LABELS)))))
    return time.process_time() - begin


def step(features: int, repeat: int = 7) -> dict[str, float]:
    """Median milliseconds of a training step at 4,096 rows, and of the matrix products that it cannot avoid."""
    from netgloss.explainers.base import Batch, LayerSpec
    from netgloss.explainers.basis import InterpretableBasis, InterpretableBasisConfig

    rows = torch.randn(4096, features, generator=torch.Generator().manual_seed(0))

    class Rows:
        num_rows, num_features = 4096, features

        def chunks(self):
            yield rows

    basis = InterpretableBasis(InterpretableBasisConfig(), LayerSpec("layer", (features,)))
    basis.fit_rows(Rows(), seed=0)
    optimizer = basis.optimizer()
    times: dict[str, list[float]] = {"step": [], "map": [], "products": []}
    for k in range(repeat):
        begin = time.process_time()
        sum(basis.losses(Batch(rows, torch.zeros(4096))).values()).backward()
        optimizer.step()
        optimizer.zero_grad()
        basis.after_step(k)
        times["step"].append(time.process_time() - begin)
        begin = time.process_time()
        basis.rotation.weight.sum().backward()
        basis.zero_grad()
        times["map"].append(time.process_time() - begin)
        weight = basis.basis.detach()
        begin = time.process_time()
        rows.T @ (rows @ weight)
        times["products"].append(time.process_time() - begin)
    return {name: 1e3 * sorted(values)[repeat // 2] for name, values in times.items()}


def peak(images: int, units: int) -> float:
    """Peak memory in MiB of a process that dissects so many images."""
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import dissection as d, torch; torch.set_num_threads(1); "
    code += f"d.one_pass({images}, {units}, 1); import resource; "
    code += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--units", type=int, default=512)
    parser.add_argument("--steps", type=int, nargs="+", default=[128, 512, 1280])
    options = parser.parse_args()
    torch.set_num_threads(1)
    size = (options.images, options.units)
    one_pass(20, options.units, 1)
    some = min(32, options.units)
    seconds, counts = one_pass(*size, 1)
    loop, loop_counts = unit_loop(*size, some)
    assert torch.equal(counts[:some].float(), loop_counts), "the loop and the pass count the same pixels"
    double, _ = one_pass(*size, 2)
    naive = unit_image_loop(*size, min(4, options.units))
    record = {
        "images": options.images,
        "units": options.units,
        "one_pass_s": seconds,
        "further_rule_s": double - seconds,
        "unit_loop_s": loop,
        "unit_image_loop_s": naive,
        "permutation_s": permutation(*size),
        "peak_mib": {str(n): peak(n, options.units) for n in (options.images, 4 * options.images)},
        "step_ms": {str(d): step(d) for d in options.steps},
        "load": [round(v, 1) for v in __import__("os").getloadavg()],
        "torch": torch.__version__,
        "max_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    (HERE / "dissection.json").write_text(json.dumps(record, indent=1) + "\n")
    (HERE / "dissection.md").write_text(markdown(record))


def markdown(r: dict) -> str:
    lines = [
        "# Dissection",
        "",
        f"`python benchmarks/dissection.py`: {r['images']} images, {r['units']} units (13 x 13), {LABELS} labels,",
        f"56 x 56, processor seconds of one thread, torch {r['torch']}, load average {r['load'][0]}.",
        "",
        "| | processor seconds | times one pass |",
        "|---|---|---|",
        f"| one pass | {r['one_pass_s']:.2f} | 1 |",
        f"| a further rule in the same pass | {r['further_rule_s']:.2f} | RATIO0 |",
        f"| loop over units and labels, all images at once | {r['unit_loop_s']:.1f} | RATIO1 |",
        f"| loop over images, units and labels | {r['unit_image_loop_s']:.0f} | RATIO2 |",
        f"| permutation test ({max(10_000, 40 * r['units']):,} permutations) | {r['permutation_s']:.1f} | |",
        "",
        "Peak memory: " + ", ".join(f"{v:.0f} MiB for {k} images" for k, v in r["peak_mib"].items()) + ".",
        "",
        "Training step of the basis, 4,096 rows, milliseconds (median of 7):",
        "",
        "| D | step | Cayley map | two products | step / (map + products) |",
        "|---|---|---|---|---|",
    ]
    one = r["one_pass_s"]
    lines = [line.replace("RATIO0", f"{r['further_rule_s'] / one:.2f}") for line in lines]
    lines = [line.replace("RATIO1", f"{r['unit_loop_s'] / one:.1f}") for line in lines]
    lines = [line.replace("RATIO2", f"{r['unit_image_loop_s'] / one:.0f}") for line in lines]
    for d, t in r["step_ms"].items():
        ratio = t["step"] / (t["map"] + t["products"])
        lines.append(f"| {d} | {t['step']:.0f} | {t['map']:.0f} | {t['products']:.0f} | {ratio:.2f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

"""Dissection in one pass against loops over units, the permutation test, and a training step of the basis.

    python benchmarks/dissection.py [--images 100] [--units 512] [--store STORE --layer LAYER]

One thread, processor time (the machine may be shared). The loops count the same pixels: ``unit loop`` takes one unit
and one label at a time over all images, ``unit and image loop`` one unit in one image at a time, as the published code
of network dissection does; the loops run on a share of the units and are scaled up. The work of the pass depends on how
much is on, so it is measured at three thresholds; the loops do not. Random numbers are the worst case, since what is on
lies scattered; ``--store`` adds the maps of a real layer. Writes benchmarks/dissection.md and .json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F

HERE = Path(__file__).parent
GRID, LABELS, CELLS = (56, 56), 18, 13
THRESHOLDS = (2.0, 1.5, 1.0)


def batch(images: int, units: int, seed: int):
    from netgloss.data.masks import Masks

    g = torch.Generator().manual_seed(seed)
    maps = torch.randn(images, units, CELLS, CELLS, generator=g)
    value = torch.randint(3 * LABELS, (images, 7, 7), generator=g).repeat_interleave(8, 1).repeat_interleave(8, 2)
    return maps, Masks(torch.stack([value == k for k in range(LABELS)], 1))


def one_pass(images: int, units: int, rules: int, threshold: float = THRESHOLDS[0]):
    """Seconds, the counts of the first rule and the share of pixels that are on."""
    from netgloss.data.masks import Vocabulary
    from netgloss.metrics.dissection.detectors import Dissection

    thresholds = torch.full((rules, units), threshold)
    metric = Dissection(thresholds, Vocabulary(tuple(map(str, range(LABELS)))), grid=GRID)
    seconds = 0.0
    for start in range(0, images, 20):
        maps, masks = batch(20, units, start)
        begin = time.process_time()
        metric.update(torch.arange(start, start + 20), maps, masks)
        seconds += time.process_time() - begin
    return seconds, metric.counts[0, :, :LABELS], float(metric.compute().on_rate()[0].mean())


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


def real(path: str, layer: str, images: int, some: int = 32) -> list[dict[str, float]]:
    """One pass and the unit loop over a layer's own channels, each on in the same share of the cells."""
    from netgloss.activations import Store
    from netgloss.data.masks import Vocabulary
    from netgloss.metrics.dissection.detectors import Dissection
    from netgloss.metrics.dissection.rates import rate_thresholds

    maps = torch.from_numpy(Store.open(path).read(layer, range(images))).float()
    masks = [batch(20, 1, start)[1] for start in range(0, images, 20)]
    found = []
    for rate in (0.005, 0.0114, 0.05):
        thresholds = rate_thresholds(lambda: [maps.permute(0, 2, 3, 1).flatten(0, 2)], [rate])
        metric = Dissection(thresholds, Vocabulary(tuple(map(str, range(LABELS)))), grid=GRID)
        begin = time.process_time()
        for part, mask in zip(maps.split(20), masks, strict=True):
            metric.update(torch.arange(20), part, mask)
        seconds = time.process_time() - begin
        counts = torch.zeros(some, LABELS)
        begin = time.process_time()
        for part, mask in zip(maps.split(20), masks, strict=True):
            for i in range(some):
                on = F.interpolate(part[:, i : i + 1], size=GRID, mode="bilinear", align_corners=False)[:, 0]
                on = on > thresholds[0, i]
                for c in range(LABELS):
                    counts[i, c] += (on & mask.labels[:, c]).sum()
        loop = (time.process_time() - begin) * maps.shape[1] / some
        off = float((metric.counts[0, :some, :LABELS] - counts).abs().sum() / counts.sum())
        found.append({"rate": rate, "pass_s": seconds, "loop_s": loop, "off": off})
    return found


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
    from netgloss.data.masks import Vocabulary
    from netgloss.metrics.dissection.significance import permutation_test

    maps, masks = batch(images, units, 0)
    chosen = torch.arange(units) % LABELS
    begin = time.process_time()
    permutation_test(maps, torch.full((units,), 2.0), masks, chosen, Vocabulary(tuple(map(str, range(LABELS)))))
    return time.process_time() - begin


def step(features: int, repeat: int = 15) -> dict[str, float]:
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
        rows.T @ (rows @ weight)  # the logits, and the gradient of the weights
        times["products"].append(time.process_time() - begin)
    return {name: 1e3 * sorted(values)[repeat // 2] for name, values in times.items()}


def blocks_test(images: int, units: int) -> None:
    """The permutation test as ``evaluation.dissect.significance`` streams it: a block of images after the other."""
    from netgloss.data.masks import Vocabulary
    from netgloss.metrics.dissection.significance import PermutationTest, blocks_of

    vocabulary = Vocabulary(tuple(map(str, range(LABELS))))
    test = PermutationTest(torch.full((units,), 2.0), torch.arange(units) % LABELS, vocabulary)
    for number, block in enumerate(blocks_of(images)):
        test.add(*batch(len(block), units, number))
    test.compute()


def peak(call: str) -> float:
    """Peak memory in MiB of a process that makes one call of this file."""
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import dissection as d, torch; torch.set_num_threads(1); "
    code += f"d.{call}; print([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(run.stdout) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--units", type=int, default=512)
    parser.add_argument("--steps", type=int, nargs="+", default=[128, 512, 1280])
    parser.add_argument("--store")
    parser.add_argument("--layer", default="features.12")
    parser.add_argument("--again", nargs="+", choices=["memory", "real"], help="measure this only; keep the rest")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.again:
        record = json.loads((HERE / "dissection.json").read_text())
        if "memory" in options.again:
            record["peak_mib"] = memory(options)
        if "real" in options.again:
            record["real"] = real(options.store, options.layer, options.images)
        write(record)
        return
    size = (options.images, options.units)
    one_pass(20, options.units, 1)
    some = min(32, options.units)
    passes = [one_pass(*size, 1, threshold) for threshold in THRESHOLDS]
    seconds, counts, _ = passes[0]
    loop, loop_counts = unit_loop(*size, some)
    assert torch.equal(counts[:some].float(), loop_counts), "the loop and the pass count the same pixels"
    double, _, _ = one_pass(*size, 2)
    naive = unit_image_loop(*size, min(4, options.units))
    record = {
        "images": options.images,
        "units": options.units,
        "one_pass_s": seconds,
        "by_threshold": [{"on": on, "seconds": s} for s, _, on in passes],
        "further_rule_s": double - seconds,
        "unit_loop_s": loop,
        "unit_image_loop_s": naive,
        "real": real(options.store, options.layer, options.images) if options.store else [],
        "permutation_s": permutation(*size),
        "peak_mib": memory(options),
        "step_ms": {str(d): step(d) for d in options.steps},
        "load": [round(v, 1) for v in __import__("os").getloadavg()],
        "torch": torch.__version__,
    }
    write(record)


def memory(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Peaks for some images and for four times as many."""
    calls = {"one pass": "one_pass({}, {}, 1)", "permutation test": "blocks_test({}, {})"}
    return {
        what: {str(n): peak(call.format(n, options.units)) for n in (options.images, 4 * options.images)}
        for what, call in calls.items()
    }


def write(record: dict) -> None:
    (HERE / "dissection.json").write_text(json.dumps(record, indent=1) + "\n")
    (HERE / "dissection.md").write_text(markdown(record))


def markdown(r: dict) -> str:
    one = r["one_pass_s"]
    lines = [
        "# Dissection",
        "",
        f"`python benchmarks/dissection.py`: {r['images']} images, {r['units']} units (13 x 13), {LABELS} labels,",
        f"56 x 56, processor seconds of one thread, torch {r['torch']}, load average {r['load'][0]}.",
        "",
        "| | processor seconds | times one pass |",
        "|---|---|---|",
        *(
            f"| one pass, {t['on']:.1%} of the pixels on | {t['seconds']:.2f} | {t['seconds'] / one:.2f} |"
            for t in r["by_threshold"]
        ),
        f"| a further rule in the same pass | {r['further_rule_s']:.2f} | {r['further_rule_s'] / one:.2f} |",
        f"| loop over units and labels, all images at once | {r['unit_loop_s']:.1f} | {r['unit_loop_s'] / one:.1f} |",
        f"| loop over images, units and labels | {r['unit_image_loop_s']:.0f} | {r['unit_image_loop_s'] / one:.1f} |",
        f"| permutation test ({max(10_000, 40 * r['units']):,} permutations) | {r['permutation_s']:.1f} | |",
        "",
        *layer_lines(r.get("real", [])),
        *memory_lines(r.get("peak_mib", {})),
        "Before pixels were counted only between cells that reach over the threshold, one pass took 0.41 s (the loop",
        "5.9 times that), a further rule 0.16 s, and the permutation test kept n^2 numbers a unit for n images.",
        "",
        "Training step of the basis, 4,096 rows, milliseconds (median of 15). Before the gradient of the row terms was",
        "worked out with their value, the last column was 3.20 (D = 128) and 1.72 (D = 512).",
        "",
        "| D | step | Cayley map | two products | step / (map + products) |",
        "|---|---|---|---|---|",
    ]
    for d, t in r["step_ms"].items():
        ratio = t["step"] / (t["map"] + t["products"])
        lines.append(f"| {d} | {t['step']:.0f} | {t['map']:.0f} | {t['products']:.0f} | {ratio:.2f} |")
    return "\n".join(lines) + "\n"


def layer_lines(rows: list[dict]) -> list[str]:
    """The table of a real layer, if it was measured."""
    if not rows:
        return []
    return [
        "The channels of a real layer on as many images, each on in the same share of the cells:",
        "",
        "| share of the cells | one pass | loop over units and labels | loop / pass |",
        "|---|---|---|---|",
        *(
            f"| {t['rate']:.2%} | {t['pass_s']:.2f} | {t['loop_s']:.1f} | {t['loop_s'] / t['pass_s']:.1f} |"
            for t in rows
        ),
        "",
    ]


def memory_lines(peaks: dict[str, dict[str, float]]) -> list[str]:
    if not peaks:
        return []
    told = (f"{what} {', '.join(f'{v:.0f} MiB for {k} images' for k, v in at.items())}" for what, at in peaks.items())
    return ["Peak memory: " + "; ".join(told) + ".", ""]


if __name__ == "__main__":
    main()

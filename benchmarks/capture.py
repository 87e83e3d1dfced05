"""Capture to disk against the limit: the same truncated forward on tensors that are already in memory.

Each capture stands between two runs of the bare forward, and its ratio is to their mean: on a shared machine equal runs
differ by a fifth. The images are arrays of the input's size, so that
neither decoding nor resizing is the limit. Also: decoding from JPEG files (which then is the
limit), the cost of an early layer against the whole network, and peak memory against the number of images.

    python benchmarks/capture.py [--images 512] [--repeat 5] [--data ../shared]

Writes benchmarks/capture.md and benchmarks/capture.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
BATCH = 32
CASES = [
    ("torchvision:mobilenet_v2", "features.4"),
    ("torchvision:mobilenet_v2", "features.18"),
    ("torchvision:squeezenet1_0", "features.12"),
]


def arrays(num: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (num, 224, 224, 3), dtype=np.uint8)


def bare_forward(classifier, layer: str, pixels: torch.Tensor) -> float:
    """Seconds of the truncated forward over tensors in memory."""
    from netgloss.classifiers import Taps

    start = time.perf_counter()
    with torch.inference_mode(), Taps(classifier.net, [layer]) as taps:
        for first in range(0, len(pixels), BATCH):
            taps(pixels[first : first + BATCH])
    return time.perf_counter() - start


def captured(classifier, source, layer: str, *, logits: bool = False) -> float:
    """Seconds of a capture to disk."""
    from netgloss.activations import CaptureOptions, capture

    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        capture(
            classifier, source, [layer], Path(folder) / "s", options=CaptureOptions(logits=logits, batch_size=BATCH)
        )
        return time.perf_counter() - start


def peak_memory(num: int) -> float:
    """Peak resident memory in MB of a process that captures ``num`` images drawn one by one."""
    code = (  # VmHWM, as ru_maxrss is handed down by the parent
        "import tempfile; from netgloss import open_images, load_classifier, capture\n"
        f"c = load_classifier('critters'); s = open_images('critters:{num}')\n"
        "with tempfile.TemporaryDirectory() as f: capture(c, s, ['block5'], f + '/s')\n"
        "print(next(int(x.split()[1]) for x in open('/proc/self/status') if x.startswith('VmHWM')) / 1024)"
    )
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=640)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--data", type=Path, default=Path("../shared"))
    options = parser.parse_args()
    import netgloss
    from netgloss.runs.run import versions

    numbers = arrays(options.images)
    source = netgloss.open_images(numbers)
    rows = []
    for name, layer in CASES:
        classifier = netgloss.load_classifier(name, random_weights=True, preprocessing={"resize": None})
        batch = torch.stack([classifier.preprocessing(source.image(i)) for i in range(options.images)])
        batch = batch.contiguous(memory_format=torch.channels_last)
        whole = [m for m, _ in classifier.net.named_modules() if m][-1]
        bare_forward(classifier, layer, batch[: 2 * BATCH])
        times: dict[str, list[float]] = {"memory": [], "disk": [], "with logits": [], "whole network": []}
        for repetition in range(options.repeat):
            before = bare_forward(classifier, layer, batch)
            times["disk"].append(captured(classifier, source, layer))
            times["memory"].append((before + bare_forward(classifier, layer, batch)) / 2)
            if repetition == 0:
                times["with logits"].append(captured(classifier, source, layer, logits=True))
                times["whole network"].append(bare_forward(classifier, whole, batch))
        ratios = np.array(times["memory"]) / np.array(times["disk"])
        rows.append(
            {
                "model": name,
                "layer": layer,
                "forward img/s": options.images / float(np.median(times["memory"])),
                "capture img/s": options.images / float(np.median(times["disk"])),
                "ratio median": float(np.median(ratios)),
                "ratio min": float(ratios.min()),
                "ratio max": float(ratios.max()),
                "capture with logits img/s": options.images / float(np.median(times["with logits"])),
                "whole forward img/s": options.images / float(np.median(times["whole network"])),
            }
        )
        print(rows[-1], flush=True)
    files = {}
    folder = options.data / "data" / "imagenette" / "val"
    if folder.is_dir():
        classifier = netgloss.load_classifier("torchvision:mobilenet_v2", random_weights=True)
        jpegs = netgloss.open_images(folder)
        start = time.perf_counter()
        for i in range(200):
            classifier.preprocessing(jpegs.image(i))
        files["decode and resize, one thread, img/s"] = 200 / (time.perf_counter() - start)
        files["capture features.18 from JPEG files, img/s"] = len(jpegs) / captured(classifier, jpegs, "features.18")
    memory = {num: peak_memory(num) for num in (500, 1500, 4500)}
    write(options, rows, files, memory, versions())


def write(options, rows, files, memory, versions) -> None:
    record = {
        "command": f"python benchmarks/capture.py --images {options.images} --repeat {options.repeat}",
        "threads": torch.get_num_threads(),
        "versions": versions,
        "cases": rows,
        "files": files,
        "peak_memory_mb": memory,
        "self_peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    (HERE / "capture.json").write_text(json.dumps(record, indent=1) + "\n")
    lines = [
        "# Capture against the same truncated forward on tensors in memory",
        "",
        f"`{record['command']}`, CPU, {record['threads']} threads, torch {versions['torch']}, batch {BATCH}, 224 px,",
        "random weights; medians; the ratio is the throughput of capture to disk (zarr, float16, compressed,",
        "checksummed) over the mean of the two bare forwards that it stands between.",
        "",
        "| model | layer | forward, memory | capture | ratio (min .. max) | capture with logits | whole forward |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r['model']} | {r['layer']} | {r['forward img/s']:.0f} img/s | {r['capture img/s']:.0f} img/s | "
            f"**{r['ratio median']:.2f}** ({r['ratio min']:.2f} .. {r['ratio max']:.2f}) | "
            f"{r['capture with logits img/s']:.0f} img/s | {r['whole forward img/s']:.0f} img/s |"
        )
    lines += ["", *(f"- {k}: {v:.0f}" for k, v in files.items()), "", "| images | peak memory, MB |", "|---|---|"]
    lines += [f"| {num} | {mb:.0f} |" for num, mb in memory.items()]
    (HERE / "capture.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

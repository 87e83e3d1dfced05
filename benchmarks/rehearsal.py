"""What a rehearsal costs: processor and clock seconds before the capture of ``explain``, for three networks.

    python benchmarks/rehearsal.py --data SHARED > benchmarks/rehearsal.md

The first rehearsal of a process also imports what the later stages need; the numbers of the others are the median of
three. One thread. "forward" is one pass of the same four images through the network.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import netgloss
from netgloss.workflows import explain as verb

METHODS = ("pca", "nmf", "topk-sae")


class Stop(BaseException):
    """The rehearsal is over."""


def rehearsal_seconds(method: str, classifier: Any, layer: str, images: Any) -> tuple[float, float]:
    """Processor and clock seconds of the rehearsal of one explain, which is not run."""
    real, spent = verb.rehearse, []

    def timed(*arguments: Any, **options: Any) -> Any:
        began = time.process_time(), time.perf_counter()
        real(*arguments, **options)
        spent.append((time.process_time() - began[0], time.perf_counter() - began[1]))
        raise Stop

    verb.rehearse = timed
    try:
        with tempfile.TemporaryDirectory() as folder:
            netgloss.explain(method, classifier, layer, images, out=Path(folder) / "run", device="cpu")
    except Stop:
        pass
    finally:
        verb.rehearse = real
    return spent[0]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    data = parser.parse_args().data
    torch.set_num_threads(1)
    cases: list[tuple[str, Any, str, Any]] = [
        ("critters, block5", netgloss.load_classifier("critters"), "block5", "critters:300"),
        (
            "squeezenet1_0, features.12",
            netgloss.load_classifier("torchvision:squeezenet1_0", checkpoint=data / "weights/squeezenet1_0.pth"),
            "features.12",
            data / "data/imagenette/train",
        ),
        (
            "mobilenet_v2, features.18",
            netgloss.load_classifier("torchvision:mobilenet_v2", checkpoint=data / "weights/mobilenet_v2.pth"),
            "features.18",
            data / "data/imagenette/train",
        ),
    ]
    print("# The cost of a rehearsal\n")
    print("`python benchmarks/rehearsal.py --data SHARED`, one thread. Seconds: processor (clock).\n")
    first = rehearsal_seconds("pca", *cases[0][1:])
    print(f"The first one of a process, with imports (pca on critters): {first[0]:.2f} ({first[1]:.2f}).\n")
    print("| network, layer |", " | ".join(METHODS), "| forward |")
    print("|---|" + "---|" * (len(METHODS) + 1))
    for name, classifier, layer, images in cases:
        cells = []
        for method in METHODS:
            turns = [rehearsal_seconds(method, classifier, layer, images) for _ in range(3)]
            cells.append("{:.2f} ({:.2f})".format(*(statistics.median(column) for column in zip(*turns, strict=True))))
        began = time.process_time()
        with torch.inference_mode():
            classifier(torch.zeros(4, *classifier.input_shape))
        print(f"| {name} |", " | ".join(cells), f"| {time.process_time() - began:.2f} |", flush=True)


if __name__ == "__main__":
    main()

"""Where the time of ``explain`` goes, from images to the report, and how near it is to what it cannot do without.

    python benchmarks/explain_profile.py --data SHARED --before PATH/TO/OTHER/src > benchmarks/explain_profile.md

MobileNetV2 with the weights of SHARED/weights, layer features.18, NMF with 32 concepts and one seed, 500 images of
SHARED/data/imagenette. Each run is a process of its own with one thread; the clock of a stage is the processor time of
that process between its calls.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

RUN = """
import functools, json, sys, time, resource
from pathlib import Path
data, out, count, network_images = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
def cpu():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
spent, stack = {}, []
def timed(name, function):
    @functools.wraps(function)
    def call(*a, **k):
        stack.append([name, cpu(), 0.0])
        try:
            return function(*a, **k)
        finally:
            _, began, inner = stack.pop()
            whole = cpu() - began
            spent[name] = spent.get(name, 0.0) + whole - inner
            if stack:
                stack[-1][2] += whole
    return call
started = cpu()
import torch, netgloss
from netgloss.workflows import explain as E, evaluate as V, fit as F
import netgloss.explanations.content as C, netgloss.evaluation.judge as J, netgloss.report.build as R
from netgloss.classifiers import Classifier
spent["imports"] = cpu() - started
classifier = netgloss.load_classifier("torchvision:mobilenet_v2", checkpoint=data / "weights/mobilenet_v2.pth")
source = netgloss.open_images(data / "data/imagenette/train")
source = source.subset(range(0, len(source), len(source) // count)[:count])
spent["loading the network"] = cpu() - started - spent["imports"]
for home, name, label in (
    (E, "rehearse", "rehearsal"), (E, "capture_store", "capture"), (E, "fit", "fit"), (E, "evaluate", "evaluate, rest"),
    (E, "write_report", "report"), (V, "evaluate_subjects", "scores and controls"), (V, "add_untrained_network",
    "untrained network"), (V, "explain_layer", "explanations"), (V, "per_concept_stability", "stability"),
    (V, "make_tail", "tail"), (V, "_write_explanations", "thumbnails and concepts.json"),
):
    if hasattr(home, name):
        setattr(home, name, timed(label, getattr(home, name)))
began, wall = cpu(), time.perf_counter()
whole = timed("rest", E.explain)
whole("nmf", classifier, "features.18", source, out=out, seeds=1, device="cpu", num_concepts=32,
      evaluation=netgloss.EvaluationOptions(untrained_images=network_images))
spent["explain in all"] = cpu() - began
spent["explain in all, by the clock"] = time.perf_counter() - wall
began = cpu()
from netgloss.activations import image_batches
from netgloss.classifiers import Taps
with torch.inference_mode(), Taps(classifier.net, ["features.18"], stop=False) as taps:
    for pixels, _ in image_batches(classifier, source, range(len(source)), workers=0):
        taps(pixels)
spent["decoding and one forward pass"] = cpu() - began
print(json.dumps({name: round(value, 2) for name, value in spent.items()}))
"""


def measure(data: Path, source: Path, count: int, network_images: int) -> dict[str, float]:
    """Seconds by stage of one explain in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", RUN, str(data), str(Path(folder) / "run"), str(count), str(network_images)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Prints the table: both trees in turns, each number the least of ``--repeats``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--before", type=Path, required=True)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--untrained-images", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=1)
    chosen = parser.parse_args()
    here = Path(__file__).resolve().parent.parent / "src"
    given = (chosen.images, chosen.untrained_images)
    turns = [[measure(chosen.data, tree, *given) for tree in (chosen.before, here)] for _ in range(chosen.repeats)]
    old, new = ({name: min(run[name] for run in side) for name in side[0]} for side in zip(*turns, strict=True))
    print("# Where the time of `explain` goes\n")
    print(f"`python benchmarks/explain_profile.py --data SHARED --before PATH --repeats {chosen.repeats}`: MobileNetV2")
    print(f"`features.18`, nmf with 32 concepts, one seed, {chosen.images} images of Imagenette, one thread. Processor")
    print("seconds; a stage is what it spends itself, without the stages inside.\n")
    print("| stage | before | now | ratio |\n|---|---|---|---|")
    for name in sorted(new, key=lambda stage: -new[stage]):
        ratio = f"{old[name] / new[name]:.2f}" if new[name] and name in old else ""
        print(f"| {name} | {old.get(name, 0.0):.1f} | {new[name]:.1f} | {ratio} |")
    needed = new["decoding and one forward pass"] + new["fit"]
    print(f"\nDecoding, one forward pass and the fit take {needed:.1f} s: explain takes", end=" ")
    print(f"{new['explain in all'] / needed:.2f} times as long.")


if __name__ == "__main__":
    main()

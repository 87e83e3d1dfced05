"""Decoder training on cached activations against the loop that runs the classifier at each step.

    python benchmarks/cladec.py

MobileNetV2 (random weights), decode size 64, batch 32, alpha 0, decoder and compact reference together: the same loss
and optimiser in all rows. "naive" reads 224 px images through the classifier up to the layer at each step; "cached"
reads the fp16 activations of one capture. Variants of the cached loop: memory order, and bfloat16 autocast. Medians
after a warm-up; the loss after the same steps is told for bfloat16. Writes benchmarks/cladec.md.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from pathlib import Path

import torch

import netgloss
from netgloss.classifiers import Taps
from netgloss.explainers.base import Batch, LayerSpec
from netgloss.explainers.cladec import ClaDec, ClaDecConfig
from netgloss.runs.run import versions

HERE = Path(__file__).parent
LAYERS = ("features.4", "features.13", "features.18")


def seconds(
    layer: str, steps: int, *, naive: bool = False, last: bool = True, bf16: bool = False
) -> tuple[float, float]:
    """(Median seconds of a step, loss of the last one)."""
    torch.manual_seed(0)
    classifier = netgloss.load_classifier("torchvision:mobilenet_v2", random_weights=True)
    inputs = torch.randn(32, 3, 224, 224)
    with torch.no_grad(), Taps(classifier.net, layer) as taps:
        taps(inputs[:2])
        cached = taps(inputs)[layer].half()
    spec = LayerSpec(layer, tuple(cached.shape[1:]), image=(3, 224, 224))
    explainer = ClaDec(ClaDecConfig(), spec).train()
    if not last:
        explainer.to(memory_format=torch.contiguous_format)
    optimizer = explainer.optimizer()
    image = torch.rand(32, 3, 64, 64)
    found, loss = [], torch.zeros(())
    context = torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext()
    for step in range(steps + 2):
        start = time.perf_counter()
        if naive:
            with torch.no_grad(), Taps(classifier.net, layer) as taps:
                taps.calls = {layer: 1}
                activation = taps(inputs)[layer]
        else:
            activation = cached.float()
        with context:
            terms = explainer.losses(Batch(activation, torch.arange(32), image=image))
            loss = torch.stack(list(terms.values())).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step >= 2:
            found.append(time.perf_counter() - start)
    return statistics.median(found), float(loss.detach())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lines = [
        "# Decoder training on cached activations",
        "",
        f"`python benchmarks/cladec.py --steps {options.steps}`; CPU, {options.threads} thread(s); torch "
        f"{versions()['torch']}; MobileNetV2 at 224 px, decode size 64, batch 32, alpha 0, decoder and compact "
        f"reference in one step; median of {options.steps} steps.",
        "",
        "| layer | naive, steps/s | cached, steps/s | naive / cached time | cached, contiguous | cached, bf16 | "
        "loss fp32; bf16 |",
        "|---|---|---|---|---|---|---|",
    ]
    for layer in LAYERS:
        naive, _ = seconds(layer, options.steps, naive=True)
        cached, loss = seconds(layer, options.steps)
        plain, _ = seconds(layer, options.steps, last=False)
        half, loss_half = seconds(layer, options.steps, bf16=True)
        lines.append(
            f"| {layer} | {1 / naive:.2f} | {1 / cached:.2f} | {naive / cached:.1f} | {1 / plain:.2f} | "
            f"{1 / half:.2f} | {loss:.4f}; {loss_half:.4f} |"
        )
        print(lines[-1], flush=True)
    (HERE / "cladec.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

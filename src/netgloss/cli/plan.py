"""``netgloss plan``: what a large run will take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from netgloss.cli.terminal import console
from netgloss.errors import UserError


@dataclass
class Plan:
    """Estimate time, disk and memory of large runs, from rates measured on this machine and stated assumptions."""

    model: str = "torchvision:resnet50"
    """The network, with random weights (they cost the same): timm:NAME, torchvision:NAME, path/to/file.py:factory."""
    layer: str = "layer4"
    """The layer."""
    num_images: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N [N ...]")] = (1_281_167, 100_000_000)
    """Images; default: ImageNet-1k and 100 million."""
    num_concepts: int = 512
    """Concepts of the fit, a top-k autoencoder."""
    seeds: int = 3
    """Number of fits."""
    steps: int = 10_000
    """Training steps of each fit."""
    batch_size: int = 4096
    """Rows per step."""
    judged: int | None = 50_000
    """Images that the scores are measured on (evaluate --max-images)."""
    gpu_tflops: float = 20.0
    """Assumed: sustained TFLOP/s of one GPU in float32 or TF32. Nothing is measured on a GPU."""
    cores: int = 8
    """Assumed: cores that decode pictures for each GPU."""
    disk_gb_s: float = 1.0
    """Assumed: GB/s that each node reads or writes."""
    dtype: str = "float16"
    """Number format of the activations on disk."""

    def run(self) -> None:
        from netgloss.classifiers import load_classifier
        from netgloss.workflows import plan as planning

        self._check()
        out = console()
        classifier = load_classifier(self.model, random_weights=self.model != "critters")
        rates = planning.measure_rates(
            classifier,
            self.layer,
            dtype=self.dtype,
            num_concepts=self.num_concepts,
            batch_rows=self.batch_size,
            say=lambda what: out.print(f"measuring {what} ..."),
        )
        out.print(f"\n{classifier.name} {self.layer}, measured on this machine with one process, no GPU:")
        for name, value in _told(rates):
            out.print(f"  {name:<42}{value}")
        machines = [
            planning.this_machine(),
            *(
                planning.Machine(name, processes, nodes, self.gpu_tflops * 1e12, self.cores, self.disk_gb_s * 1e9)
                for name, processes, nodes in (("1 GPU", 1, 1), ("8 GPUs", 8, 1), ("8 nodes of 8 GPUs", 8, 8))
            ),
        ]
        for count in self.num_images:
            job = planning.Job(count, self.seeds, self.num_concepts, self.steps, self.batch_size, self.judged)
            rows = [
                ("", "capture", "limited by", "fit: statistics", "fit: steps", "evaluate", "disk", "memory a process")
            ]
            for machine in machines:
                found = planning.plan(rates, job, machine)
                seconds = found.seconds
                rows.append(
                    (
                        machine.name,
                        duration(seconds["capture"]),
                        found.limit,
                        duration(seconds["fit, statistics"]),
                        duration(seconds["fit, steps"]),
                        duration(seconds["evaluate"]),
                        size(found.disk),
                        size(found.memory),
                    )
                )
            widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
            out.print(f"\n{count:,} images")
            for row in rows:
                out.print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        out.print(
            f"\nAssumed for GPUs ({self.gpu_tflops:g} TFLOP/s, {self.cores} cores, {self.disk_gb_s:g} GB/s a node; "
            f"nothing was measured on a GPU): {self.seeds} fits of {self.num_concepts} concepts, {self.steps} steps of "
            f"{self.batch_size} rows, scores on {self.judged or 'all held-out'} images;"
        )
        for line in planning.ASSUMPTIONS:
            out.print(f"- {line}")

    def _check(self) -> None:
        for name in ("seeds", "num_concepts", "steps", "batch_size", "cores"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("gpu_tflops", "disk_gb_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"{name} must be positive, got {getattr(self, name)}")
        if not self.num_images or min(self.num_images) < 2:
            raise UserError(f"num_images must be at least 2, got {self.num_images}")
        if self.judged is not None and self.judged < 1:
            raise UserError(f"judged must be at least 1, got {self.judged}")
        if self.dtype not in ("float16", "float32"):
            raise UserError(f"dtype must be float16 or float32, got {self.dtype!r}")


def _told(rates: object) -> list[tuple[str, str]]:
    from netgloss.workflows.plan import Rates

    assert isinstance(rates, Rates)
    return [
        ("the network", f"{rates.forward:,.1f} images/s ({rates.flops / 1e9:,.2f} GFLOP an image)"),
        ("decoding a JPEG of 500 x 375, one core", f"{rates.decode:,.0f} images/s"),
        ("writing a store", f"{rates.write / 1e6:,.0f} MB/s before compression"),
        ("reading it", f"{rates.read / 1e6:,.0f} MB/s before compression"),
        ("one image in the store", f"{rates.image_bytes / 1e3:,.1f} kB, {rates.compression:.2f} of it on disk"),
        ("training", f"{rates.fit_rows:,.0f} rows/s, {rates.rows_per_image} rows per image"),
        ("evaluating", f"{rates.evaluate:,.1f} images/s"),
        ("memory of a process", f"{rates.base_memory / 1e6:,.0f} MB"),
    ]


def duration(seconds: float) -> str:
    """``90 s``, ``12 min``, ``3.4 h``, ``12 days``."""
    for limit, unit, name in ((120, 1, "s"), (120 * 60, 60, "min"), (72 * 3600, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.3g} {name}" if seconds / unit < 10 else f"{seconds / unit:.0f} {name}"
    return f"{seconds / 86400:,.3g} days" if seconds < 1000 * 86400 else f"{seconds / 86400:,.0f} days"


def size(count: float) -> str:
    """``850 MB``, ``12 GB``, ``9.1 TB``."""
    for limit, unit, name in ((1e9, 1e6, "MB"), (1e12, 1e9, "GB")):
        if count < limit:
            return f"{count / unit:.3g} {name}"
    return f"{count / 1e12:,.3g} TB"

"""Plan: how long a large run takes, from rates measured on this machine and arithmetic for other ones.

:func:`measure_rates` times each step on a few images here. :func:`plan` turns the rates into times for a
:class:`Machine`, under :data:`ASSUMPTIONS`. Nothing is measured on a machine other than this one: times for GPUs follow
from the network's count of operations and an assumed speed.

Shape letters: B images, C features, N rows.
"""

from __future__ import annotations

import io
import os
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from netgloss.activations import Store, StoreInfo, StoreKey
from netgloss.activations.layer import Layer, make_tail
from netgloss.classifiers import Classifier, Taps
from netgloss.data.images import open_image
from netgloss.evaluation.judge import measure
from netgloss.evaluation.subjects import from_explainer
from netgloss.explainers.names import find_explainer
from netgloss.training import ActivationStream, build_explainer, fit
from netgloss.training.stream import DEFAULT_MEMORY

_PICTURE = (500, 375)  # width and height of an average ImageNet picture
_SECONDS = 1.5  # that each rate is measured for, at least
_FIT_SHARE = 0.8
_IMAGE_MEMORY = 600.0  # bytes of each image's name and class in a process (benchmarks/scale.md)


@dataclass(frozen=True)
class Rates:
    """What one process reaches on this machine.

    Parameters
    ----------
    forward : images/s through the network. flops : floating point operations per image.
    decode : JPEG pictures/s of 500 x 375 pixels, decoded, resized and cropped, on one core.
    write, read : uncompressed bytes/s into and out of a store.
    image_bytes : of one image's activations and logits before compression. compression : share of them on disk.
    rows_per_image : training rows per image. features : C.
    fit_rows : rows/s of the training steps of a top-k autoencoder.
    evaluate : images/s of an evaluation with three seeds and all baselines.
    base_memory : bytes of a process with the libraries, the network and one batch.
    """

    forward: float
    flops: float
    decode: float
    write: float
    read: float
    image_bytes: int
    compression: float
    rows_per_image: int
    features: int
    fit_rows: float
    evaluate: float
    base_memory: int


@dataclass(frozen=True)
class Machine:
    """A machine, or several.

    Parameters
    ----------
    processes : GPUs on each node, or CPU processes. cores : that decode pictures, per process.
    flops : sustained floating point operations/s of one process; 0: as measured here.
    disk : bytes/s that one node reads or writes.
    """

    name: str
    processes: int = 1
    nodes: int = 1
    flops: float = 0.0
    cores: int = 1
    disk: float = 1e9


def this_machine() -> Machine:
    """One process on this machine, with its cores to decode."""
    return Machine("this machine, 1 process", cores=os.cpu_count() or 1, disk=float("inf"))


@dataclass(frozen=True)
class Job:
    """Images, seeds and options of the fit; ``evaluated`` images are scored (default: the fifth held out)."""

    num_images: int
    seeds: int = 3
    num_concepts: int = 512
    steps: int = 10_000
    batch_size: int = 4096
    evaluated: int | None = None


@dataclass(frozen=True)
class Plan:
    """Seconds of each step, bytes on disk, bytes of memory per process, and what limits the capture."""

    seconds: dict[str, float]
    disk: float
    memory: float
    limit: str


ASSUMPTIONS = (
    "a GPU sustains --gpu-tflops on the network and on the fit",
    "every process has --cores that decode JPEG pictures of 500 x 375 pixels as fast as one core of this machine does",
    "each node reads and writes --disk-gb-s GB/s, and the store is as fast as its nodes together",
    "compression is as on noise through this network; real pictures differ",
    "a fit reads its rows once in every process for statistics, then draws blocks of 2 GiB",
    "exchanging gradients costs nothing; all processes share the rows of a step and the evaluated images",
    "explanations and the report are not counted, nor are queues, failures and cold starts",
)


def plan(rates: Rates, job: Job, machine: Machine) -> Plan:
    """Times, disk and memory of a job on a machine, under :data:`ASSUMPTIONS`."""
    world, n = machine.processes * machine.nodes, job.num_images
    forward, fit_rows = rates.forward, rates.fit_rows
    if machine.flops:
        forward = machine.flops / rates.flops
        fit_rows = machine.flops / (6 * 2 * rates.features * job.num_concepts)  # forward and backward, two matrices
    pace = {
        "the network": world * forward,
        "decoding": world * machine.cores * rates.decode,
        "writing": min(world * rates.write, machine.nodes * machine.disk) / rates.image_bytes,
    }
    limit = min(pace, key=lambda name: pace[name])
    fit_images, rows = _FIT_SHARE * n, job.steps * job.batch_size
    read, fit_bytes = min(rates.read, machine.disk), _FIT_SHARE * n * rates.image_bytes
    images_read = fit_images if fit_bytes <= DEFAULT_MEMORY else rows / rates.rows_per_image
    evaluated = n - fit_images if job.evaluated is None else min(job.evaluated, n - fit_images)
    seconds = {
        "capture": n / pace[limit],
        "fit, statistics": job.seeds * fit_bytes / read,
        "fit, steps": job.seeds * (rows / (world * fit_rows) + images_read * rates.image_bytes / read),
        "evaluate": evaluated / (rates.evaluate * world) + fit_bytes / read,
    }
    memory = rates.base_memory + _IMAGE_MEMORY * n + 2 * min(DEFAULT_MEMORY, fit_bytes)
    return Plan(seconds, n * rates.image_bytes * rates.compression, memory, limit)


def measure_rates(
    classifier: Classifier,
    layer: str,
    *,
    dtype: str = "float16",
    num_concepts: int = 512,
    batch_rows: int = 4096,
    say: Callable[[str], None] = lambda _: None,
) -> Rates:
    """Times every step on this machine, a few seconds each; a temporary store is written and removed."""
    pixels = torch.randn(16, *classifier.input_shape, generator=torch.Generator().manual_seed(0))
    say("the network")
    with torch.inference_mode(), Taps(classifier.net, [classifier.check_layer(layer)], stop=False) as taps:
        activation, logits = taps(pixels.to(classifier.device))[layer].cpu(), taps.logits.cpu()
        forward = len(pixels) * _pace(lambda: taps(pixels.to(classifier.device)))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        classifier.net(pixels[:1].to(classifier.device))
    say("decoding")
    picture = np.random.default_rng(0).integers(0, 256, (_PICTURE[1] // 8, _PICTURE[0] // 8, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(picture).resize(_PICTURE, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    decode = _pace(lambda: classifier.preprocessing.bytes(open_image(file, name="picture")))
    say("the store")
    with tempfile.TemporaryDirectory() as folder:
        store, write = _write_store(Path(folder) / "store", layer, activation.numpy().astype(dtype), logits.numpy())
        images = np.arange(len(store))
        image_bytes = activation[0].numel() * np.dtype(dtype).itemsize + logits[0].numel() * 4
        total = len(store) * image_bytes
        read = total * _pace(lambda: (store.read(layer, images), store.read_logits(images)))
        say("fitting")
        stream = ActivationStream(store, layer, images)
        options = {"num_concepts": num_concepts, "top_k": min(16, num_concepts), "batch_size": batch_rows, "steps": 10}
        cls = find_explainer("topk-sae")
        spec = stream.spec(num_classes=logits.shape[1], image=classifier.input_shape)
        build = partial(build_explainer, cls, cls.Config(**options), spec, seed=0)
        fit_rows = 10 * batch_rows * _pace(lambda: fit(build(), stream, seed=0))
        say("evaluating")
        at = Layer(store, layer, make_tail(classifier, layer, None), classifier)
        subjects = {str(i): from_explainer(build().eval()) for i in range(9)}  # of three seeds with their controls
        evaluate = len(images) * _pace(lambda: measure(subjects, at, images))
        compression = sum(f.stat().st_size for f in Path(store.path).rglob("*") if f.is_file()) / total
    return Rates(
        forward=forward,
        flops=float(max(counter.get_total_flops(), 1)),
        decode=decode,
        write=write,
        read=read,
        image_bytes=image_bytes,
        compression=compression,
        rows_per_image=activation[0, 0].numel(),
        features=activation.shape[1],
        fit_rows=fit_rows,
        evaluate=evaluate,
        base_memory=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def _pace(work: Callable[[], object]) -> float:
    """Calls per second, after one that warms up; at least two."""
    work()
    started, calls = time.perf_counter(), 0
    while calls < 2 or time.perf_counter() - started < _SECONDS:
        work()
        calls += 1
    return calls / (time.perf_counter() - started)


def _write_store(
    path: Path, layer: str, activation: np.ndarray, logits: np.ndarray, num: int = 256
) -> tuple[Store, float]:
    """A store of ``num`` entries of which no two are equal, and the bytes/s of writing it."""
    rng = np.random.default_rng(0)
    picked = rng.integers(len(activation), size=num)
    scale = rng.uniform(0.9, 1.1, (num, *[1] * (activation.ndim - 1))).astype(activation.dtype)
    activation, logits = activation[picked] * scale, logits[picked]
    store = Store.create(
        path,
        key=StoreKey("", {}, (layer,), "", dtype=str(activation.dtype), logits=logits.shape[1] > 0),
        info=StoreInfo(),
        shapes={layer: activation.shape[1:]},
        ids=[f"n01440764/n01440764_{i:08d}.JPEG" for i in range(num)],
        targets=np.zeros(num, np.int64),
        num_classes=logits.shape[1],
    )
    started = time.perf_counter()
    for chunk in store.pending:
        at = store.chunk_slice(chunk)
        values, given = {layer: activation[at]}, logits[at] if logits.shape[1] else None
        store.write_chunk(chunk, activations=values, positions={}, logits=given, problems=[""] * len(values[layer]))
    return Store.open(path), (activation.nbytes + logits.nbytes) / (time.perf_counter() - started)

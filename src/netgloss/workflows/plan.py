"""How long, how much disk and how much memory: rates measured on this machine, and arithmetic for other ones.

:func:`measure_rates` times each step on a few images here. :func:`plan` turns the rates into times for a
:class:`Machine`, by assumptions that :data:`ASSUMPTIONS` spells out. Nothing is ever measured on a machine that is not
this one: what is said of GPUs follows from the network's count of operations and an assumed speed.

Shape letters: B images, C features, H W grid, K concepts, N rows.
"""

from __future__ import annotations

import io
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from netgloss.classifiers import Classifier

_PICTURE = (500, 375)  # width and height of an average ImageNet picture
_SECONDS = 1.5  # that each rate is measured for, at least
_FIT_SHARE = 0.8
_IMAGE_MEMORY = 600.0  # bytes; benchmarks/scale.py memory: from 1,000 to 64,000 images, capture and training batches


@dataclass(frozen=True)
class Rates:
    """What was measured here, by one process.

    Parameters
    ----------
    forward : images/s through the network.
    flops : floating point operations of one image (a multiply-add counts as two).
    decode : JPEG pictures/s of 500 x 375 pixels, decoded, resized and cropped, on one core.
    write, read : uncompressed bytes/s into and out of a store.
    image_bytes : bytes of one image's activations and logits before compression.
    compression : size on disk over the size before compression, of this network's activations on noise.
    rows_per_image : training rows an image gives.
    fit_rows : rows/s of the training steps of a top-k autoencoder.
    evaluate : images/s of the evaluation with three seeds and all baselines.
    base_memory : bytes of a process with the libraries, the network and one batch.
    image_memory : bytes that each further image takes in every process (its name, its class, its places in lists); not
        measured anew, see benchmarks/scale.md.
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
    image_memory: float


@dataclass(frozen=True)
class Machine:
    """A machine, or several, that nothing was measured on (but for ``this machine``).

    Parameters
    ----------
    processes : GPUs on each node, or CPU processes.
    flops : sustained floating point operations/s of one process; 0: as measured here.
    cores : cores of each process that decode pictures.
    disk : bytes/s that one node reads or writes.
    """

    name: str
    processes: int = 1
    nodes: int = 1
    flops: float = 0.0
    cores: int = 1
    disk: float = 1e9

    @property
    def world(self) -> int:
        return self.processes * self.nodes


@dataclass(frozen=True)
class Job:
    """What is to be done: images, seeds and the fit's options."""

    num_images: int
    seeds: int = 3
    num_concepts: int = 512
    steps: int = 10_000
    batch_size: int = 4096
    judged: int | None = None
    """Images that the scores are measured on; default: the fifth that is held out."""


@dataclass(frozen=True)
class Plan:
    """Seconds of each step, bytes on disk, bytes of memory of each process, and what limits the capture."""

    machine: Machine
    seconds: dict[str, float]
    disk: float
    memory: float
    limit: str


ASSUMPTIONS = (
    "a GPU sustains --gpu-tflops on the network and on the fit; its rate is that over the counted operations",
    "every process has --cores that decode JPEG pictures of 500 x 375 pixels as fast as one core of this machine does",
    "each node reads and writes --disk-gb-s GB/s, and the store is as fast as its nodes together",
    "compression is as on noise through this network with these weights; real pictures differ",
    "reading, writing and packing a store scale with the processes; a fit passes once over its rows, in every process, "
    "for statistics, then draws blocks of 2 GiB",
    "the gradients' exchange between processes costs nothing; a step's rows are shared",
    "evaluation is per process as fast as measured here (its metrics run on the CPU) and is shared by all processes; "
    "the gloss and the report are not counted",
    "times are sums without waiting for queues, failures or a cold start",
)


def plan(rates: Rates, job: Job, machine: Machine) -> Plan:
    """Times, disk and memory of a job on a machine (see :data:`ASSUMPTIONS`)."""
    from netgloss.training.stream import DEFAULT_MEMORY

    world, n = machine.world, job.num_images
    forward = rates.forward if machine.flops == 0 else machine.flops / rates.flops
    fit_rows = rates.fit_rows
    if machine.flops:
        fit_rows = machine.flops / (6 * 2 * rates.features * job.num_concepts)  # forward and backward, two matrices
    pace = {
        "the network": world * forward,
        "decoding": world * machine.cores * rates.decode,
        "writing": min(world * rates.write, machine.nodes * machine.disk) / rates.image_bytes,
    }
    limit = min(pace, key=lambda name: pace[name])
    fit_images = _FIT_SHARE * n
    read = min(rates.read, machine.disk)
    statistics = fit_images * rates.image_bytes / read
    rows = job.steps * job.batch_size
    touched = min(rows / rates.rows_per_image, fit_images * max(1.0, rows / (fit_images * rates.rows_per_image)))
    if fit_images * rates.image_bytes <= DEFAULT_MEMORY:
        touched = fit_images
    steps = rows / (world * fit_rows) + touched * rates.image_bytes / read
    judged = n - fit_images if job.judged is None else min(job.judged, n - fit_images)
    seconds = {
        "capture": n / pace[limit],
        "fit, statistics": job.seeds * statistics,
        "fit, steps": job.seeds * steps,
        "evaluate": judged / (rates.evaluate * world) + statistics,
    }
    block = min(DEFAULT_MEMORY, fit_images * rates.image_bytes)
    memory = rates.base_memory + rates.image_memory * n + 2 * block
    return Plan(machine, seconds, n * rates.image_bytes * rates.compression, memory, limit)


def measure_rates(
    classifier: Classifier,
    layer: str,
    *,
    dtype: str = "float16",
    num_concepts: int = 512,
    batch_size: int = 16,
    batch_rows: int = 4096,
    say: Callable[[str], None] = lambda _: None,
) -> Rates:
    """Times every step on this machine, a few seconds each; a temporary store is written and removed."""
    from netgloss.classifiers import Taps

    classifier.check_layer(layer)
    shape = classifier.input_shape
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(batch_size, *shape, generator=generator).to(classifier.device)
    say("the network")
    with torch.inference_mode(), Taps(classifier.net, [layer], stop=False) as taps:
        activation = taps(pixels)[layer].cpu()
        logits = taps.logits.cpu()
        forward = batch_size * _pace(lambda: taps(pixels))
    flops = _count_flops(classifier, pixels[:1])
    say("decoding")
    decode = _pace_of_decoding(classifier)
    item = np.dtype(dtype).itemsize
    image_bytes = activation[0].numel() * item + logits[0].numel() * 4
    say("the store")
    write, read, compression = _pace_of_store(activation.numpy().astype(dtype), logits.numpy())
    say("fitting")
    rows_per_image = activation[0, 0].numel()
    fit_rows = batch_rows * _pace_of_fit(activation.shape[1], num_concepts, batch_rows)
    say("evaluating")
    evaluate = _pace_of_evaluation(classifier, layer, activation, logits)
    return Rates(
        forward=forward,
        flops=flops,
        decode=decode,
        write=write,
        read=read,
        image_bytes=image_bytes,
        compression=compression,
        rows_per_image=rows_per_image,
        features=activation.shape[1],
        fit_rows=fit_rows,
        evaluate=evaluate,
        base_memory=peak_memory(),
        image_memory=_IMAGE_MEMORY,
    )


def peak_memory() -> int:
    """Bytes that this process has held at most, as far as the system tells (0 elsewhere)."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def _pace(work: Callable[[], object], *, seconds: float = _SECONDS) -> float:
    """Calls a second, after one that warms up; at least two."""
    work()
    started, calls = time.perf_counter(), 0
    while calls < 2 or time.perf_counter() - started < seconds:
        work()
        calls += 1
    return calls / (time.perf_counter() - started)


def _count_flops(classifier: Classifier, pixels: torch.Tensor) -> float:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        classifier.net(pixels)
    return float(max(counter.get_total_flops(), 1))


def _pace_of_decoding(classifier: Classifier) -> float:
    from PIL import Image

    from netgloss.data.images import open_image

    width, height = _PICTURE
    coarse = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize(_PICTURE, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return _pace(lambda: classifier.preprocessing.bytes(open_image(file, name="picture")))


def _pace_of_store(activation: np.ndarray, logits: np.ndarray) -> tuple[float, float, float]:
    """Bytes/s written and read, and the compression."""
    from netgloss.activations.key import StoreInfo, StoreKey
    from netgloss.activations.store import Store

    activation, logits = _varied(activation), _varied(logits)
    num = len(activation)
    key = StoreKey("", {}, ("layer",), "", dtype=str(activation.dtype))
    total = activation.nbytes + logits.nbytes
    with tempfile.TemporaryDirectory() as folder:
        store = Store.create(
            Path(folder) / "store",
            key=key,
            info=StoreInfo(),
            shapes={"layer": activation.shape[1:]},
            ids=[f"n01440764/n01440764_{i:08d}.JPEG" for i in range(num)],
            targets=np.zeros(num, np.int64),
            num_classes=logits.shape[1],
        )
        started = time.perf_counter()
        for chunk in store.pending:
            where = store.chunk_slice(chunk)
            store.write_chunk(
                chunk,
                activations={"layer": activation[where]},
                positions={},
                logits=logits[where],
                problems=[""] * len(activation[where]),
            )
        write = total / (time.perf_counter() - started)
        on_disk = sum(f.stat().st_size for f in Path(store.path).rglob("*") if f.is_file())
        read = total * _pace(lambda: (store.read("layer", slice(0, num)), store.read_logits(slice(0, num))))
    return write, read, on_disk / total


def _varied(values: np.ndarray, num: int = 256) -> np.ndarray:
    """``num`` entries like those of ``values``, none like another, so that packing finds no repetitions: features in
    another order and a little stronger or weaker."""
    rng = np.random.default_rng(0)
    parts = [values]
    while sum(map(len, parts)) < num:
        other = values[:, rng.permutation(values.shape[1])].astype(np.float32)
        parts.append((other * rng.uniform(0.9, 1.1, other.shape)).astype(values.dtype))
    return np.concatenate(parts)[: max(num, len(values))]


def _pace_of_fit(features: int, num_concepts: int, batch_rows: int) -> float:
    """Steps a second of a top-k autoencoder."""
    from netgloss.explainers.base import Batch, LayerSpec
    from netgloss.explainers.names import find_explainer

    cls = find_explainer("topk-sae")
    config = cls.Config(num_concepts=num_concepts, top_k=min(16, num_concepts))  # type: ignore[call-arg]
    explainer = cls(config, LayerSpec("layer", (features,)))
    torch.nn.init.normal_(explainer.encoder)  # type: ignore[arg-type]
    torch.nn.init.normal_(explainer.decoder)  # type: ignore[arg-type]
    optimizer = explainer.optimizer()
    batch = Batch(torch.randn(batch_rows, features), torch.zeros(batch_rows, dtype=torch.long))

    def step() -> None:
        torch.stack(list(explainer.losses(batch).values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        explainer.after_step(0)

    return _pace(step)


def _pace_of_evaluation(
    classifier: Classifier, layer: str, activation: torch.Tensor, logits: torch.Tensor, *, subjects: int = 9
) -> float:
    """Images/s of all image metrics on as many subjects as an evaluation of three seeds has: three of the method and of
    random directions, the layer's own axes, shuffled codes and the mean."""
    from netgloss.activations.layer import Layer, LayerBatch, make_tail
    from netgloss.evaluation.measure import Rebuilt, measure

    tail = make_tail(classifier, layer, None)
    way_on = tail if tail.mode == "graph" else (lambda a: logits.to(a))

    class Held(Layer):
        def batches(self, images: np.ndarray, *, batch_size: int = 64, rank: int = 0, world: int = 1):  # type: ignore[no-untyped-def]
            yield LayerBatch(torch.arange(len(logits)), activation, logits, torch.zeros(len(logits)).long(), way_on)

    held = Held(None, layer, tail, classifier)  # type: ignore[arg-type]
    concepts = activation[:, : min(8, activation.shape[1])].relu()
    rebuilds = {str(i): lambda batch: Rebuilt(concepts, batch.activation * 0.99) for i in range(subjects)}
    return len(activation) * _pace(lambda: measure(rebuilds, held, np.arange(len(activation))))


def this_machine() -> Machine:
    """One process on this machine, with its cores to decode."""
    return Machine("this machine, 1 process", cores=os.cpu_count() or 1, disk=float("inf"))

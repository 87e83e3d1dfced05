"""What processes, blocks and shared passes bring, and what does not grow with the number of images.

    python benchmarks/scale.py processes   two processes against one: capture, fit, evaluation
    python benchmarks/scale.py reading     blocks in sequence against random access
    python benchmarks/scale.py together    four dictionaries in one pass against four passes
    python benchmarks/scale.py memory      peak memory against the number of images
    python benchmarks/scale.py precision   bfloat16 and torch.compile in the capture's forward

Each part adds its numbers to benchmarks/scale.json and writes benchmarks/scale.md anew. Parts whose data are made here
need no download.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
MODEL, LAYER = "torchvision:resnet18", "layer4"  # with random weights, unlike MobileNets, it tells images apart


def best(work: Callable[[], object], repeat: int = 3) -> tuple[float, float]:
    """Smallest and largest seconds of a few runs."""
    times = []
    for _ in range(repeat):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times), max(times)


def forget(folder: Path) -> None:
    """Drops the files below a folder from the system's cache, so that they are read from the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# -- processes --------------------------------------------------------------------------------------------------------


def processes() -> dict:
    """The same `explain` by one process with one thread, one with two, and two with one each."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images.npz"
        np.savez(images, x=np.random.default_rng(0).integers(0, 256, (360, 224, 224, 3), dtype=np.uint8))
        for name, devices, threads in (("1 process, 1 thread", 1, 1), ("1 process, 2 threads", 1, 2),
                                       ("2 processes, 1 thread each", 2, 1)):  # fmt: skip
            out = Path(folder) / name.replace(" ", "-")
            command = [sys.executable, "-m", "netgloss.cli", "explain", "topk-sae", "--model", MODEL, "--layer", LAYER,
                       "--random-weights", "--images", str(images), "--out", str(out), "--seeds", "1",
                       "--num-concepts", "512", "--steps", "40", "--batch-size", "4096", "--untrained-images", "0",
                       "--device", "cpu", "--devices", str(devices)]  # fmt: skip
            started = time.perf_counter()
            subprocess.run(
                command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)}
            )
            times = json.loads((out / "run.json").read_text())["times"]
            rows.append({"name": name, "total": time.perf_counter() - started, **times})
    return {"images": 360, "model": f"{MODEL} {LAYER}", "rows": rows}


# -- reading ----------------------------------------------------------------------------------------------------------


def make_store(path: Path, num: int, shape: tuple[int, ...] = (256, 7, 7)):
    """A store of half-empty random maps, as after a ReLU."""
    from netgloss.activations.key import StoreInfo, StoreKey
    from netgloss.activations.store import Store

    store = Store.create(
        path,
        key=StoreKey("", {}, ("layer",), "", logits=False),
        info=StoreInfo(),
        shapes={"layer": shape},
        ids=[f"{i:07d}" for i in range(num)],
        targets=np.zeros(num, np.int64),
        num_classes=0,
    )
    rng = np.random.default_rng(0)
    for chunk in store.pending:
        where = store.chunk_slice(chunk)
        count = where.stop - where.start
        values = np.maximum(rng.standard_normal((count, *shape), dtype=np.float32), 0).astype(np.float16)
        store.write_chunk(chunk, activations={"layer": values}, positions={}, logits=None, problems=[""] * count)
    return store


def reading() -> dict:
    """One pass over a store: in order, in random blocks of chunks, and by random images a batch at a time."""
    from netgloss.training import ActivationStream

    num, batch = 8192, 128
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder) / "store", num)
        size = num * int(np.prod(store.shapes["layer"])) * 2
        on_disk = sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file())
        every = np.arange(num)
        stream = ActivationStream(store, "layer", every, reads="maps", memory=size // 8)
        blocks = stream._epoch_blocks(np.random.default_rng(0))

        def in_order() -> None:
            for chunk in range(store.num_chunks):
                store.read("layer", store.chunk_slice(chunk))

        def in_blocks() -> None:
            batches = stream.batches(batch, seed=0)
            for _ in range(sum(len(b) // batch for b in blocks)):
                next(batches)

        def at_random(share: int = 16) -> None:
            order = np.random.default_rng(0).permutation(num)
            for i in range(0, num // share, batch):
                store.read("layer", order[i : i + batch])

        for name, work, count in (
            ("chunks in order", in_order, num),
            ("blocks of random chunks, shuffled inside (what a fit does)", in_blocks, num),
            ("random images, a batch at a time", at_random, num // 16),
        ):
            times = []
            for _ in range(2):
                forget(Path(folder))
                times.append(best(work, repeat=1)[0])
            rows.append({"name": name, "images/s": count / min(times), "slowest": count / max(times)})
        mixed = len({int(i) // store.chunk_images for i in blocks[0]})
    return {"images": num, "bytes": size, "on disk": on_disk, "chunks mixed": mixed,
            "chunks": store.num_chunks, "batch": batch, "rows": rows}  # fmt: skip


def together() -> dict:
    """Four autoencoders of different sparsity over a store that does not fit the memory budget."""
    from netgloss.explainers.names import find_explainer
    from netgloss.training import ActivationStream, build_explainer, fit, fit_together

    cls = find_explainer("topk-sae")
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder) / "store", 3072)
        size = 3072 * int(np.prod(store.shapes["layer"])) * 2

        def stream() -> ActivationStream:
            return ActivationStream(store, "layer", np.arange(3072), memory=size // 8)

        steps = stream().num_rows // 8192
        spec = stream().spec(num_classes=1, image=())
        configs = [cls.Config(num_concepts=64, top_k=k, steps=steps, batch_size=8192) for k in (2, 4, 8, 16)]

        def make() -> list:
            return [build_explainer(cls, config, spec, seed=0) for config in configs]

        forget(Path(folder))
        started = time.perf_counter()
        ours = fit_together(make(), stream(), seed=0)
        one_pass = time.perf_counter() - started
        forget(Path(folder))
        started = time.perf_counter()
        alone = [fit(explainer, stream(), seed=0) for explainer in make()]
        passes = time.perf_counter() - started
    same = all(
        torch.equal(a.state_dict()[name], b.state_dict()[name])
        for a, b in zip(ours, alone, strict=True)
        for name in a.state_dict()
    )
    return {"dictionaries": 4, "steps": steps, "one pass": one_pass, "four passes": passes, "equal bit for bit": same}


# -- memory -----------------------------------------------------------------------------------------------------------

PEAK = """
import sys, tempfile
import numpy as np, torch
from PIL import Image
sys.path.insert(0, {tests!r})
from test_capture import Small
from netgloss.activations import Store, capture
from netgloss.classifiers import load_classifier
from netgloss.data.base import ImageSource
from netgloss.training import ActivationStream

class Drawn(ImageSource):
    "Pictures that are drawn when asked for."
    def image(self, i):
        return Image.fromarray(np.full((8, 8, 3), i % 256, np.uint8))
    def _digest(self, i):
        return b""

torch.set_num_threads(1)
source = Drawn([f"n01440764/n01440764_{{i:08d}}.JPEG" for i in range({num})], description="drawn")
source.decodes = False
def peak():
    return next(int(x.split()[1]) for x in open("/proc/self/status") if x.startswith("VmHWM")) / 1024
with tempfile.TemporaryDirectory() as folder:
    store = capture(load_classifier(Small()), source, ["conv"], folder + "/s")
    captured = peak()
    stream = ActivationStream(store, "conv", np.arange(len(store)), memory=4 << 20)
    batches = stream.batches(1024, seed=0)
    for _ in range(200):
        next(batches)
    print(captured, peak())
"""


def memory() -> dict:
    """Peak resident memory of a process that captures, then draws 200 training batches with a budget of 4 MiB."""
    rows = []
    for num in (1_000, 8_000, 32_000, 64_000):
        code = PEAK.format(tests=str(HERE.parent / "tests"), num=num)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        captured, fitted = map(float, done.stdout.split()[-2:])
        rows.append({"images": num, "capture MB": captured, "capture and batches MB": fitted})
    slope = (rows[-1]["capture MB"] - rows[0]["capture MB"]) * 2**20 / (rows[-1]["images"] - rows[0]["images"])
    return {"rows": rows, "bytes an image": slope}


# -- precision --------------------------------------------------------------------------------------------------------


def precision() -> dict:
    """The truncated forward in float32, under bfloat16 autocast and compiled, and how far the activations move."""
    import netgloss

    classifier = netgloss.load_classifier(MODEL, random_weights=True)
    net = torch.nn.Sequential(*list(classifier.net.children())[:-2]).eval()
    pixels = torch.randn(32, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    rows = []

    def measure(name: str, forward: Callable[[], torch.Tensor]) -> torch.Tensor:
        started = time.perf_counter()
        found = forward().float()
        first = time.perf_counter() - started
        fast, slow = best(forward, repeat=5)
        rows.append({"name": name, "images/s": 32 / fast, "slowest": 32 / slow, "first call": first})
        return found

    with torch.inference_mode():
        plain = measure("float32", lambda: net(pixels))

        def halved() -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return net(pixels)

        moved = [("bfloat16 autocast", measure("bfloat16 autocast", halved))]
        compiled = torch.compile(net)
        moved.append(("torch.compile", measure("torch.compile", lambda: compiled(pixels))))
    for name, values in moved:
        gap = float((values - plain).norm() / plain.norm())
        next(r for r in rows if r["name"] == name)["relative deviation"] = gap
    return {"model": MODEL, "rows": rows}


# -- the page ---------------------------------------------------------------------------------------------------------

PARTS = {"processes": processes, "reading": reading, "together": together, "memory": memory, "precision": precision}


def page(record: dict) -> str:
    lines = ["# Scale", "", "Made by the commands below on one machine with 2 CPU cores and no GPU."]
    for name in PARTS:
        if name not in record:
            continue
        part = record[name]
        lines += ["", f"## {name.capitalize()}", "", f"`{part['command']}`, {part['threads']} threads, torch "
                  f"{part['versions']['torch']}. {(PARTS[name].__doc__ or '').strip()}", ""]  # fmt: skip
        lines += TABLES[name](part)
    return "\n".join(lines) + "\n"


def table(columns: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(c) + " |" for c in [columns, ["---"] * len(columns), *rows]]


def _processes(part: dict) -> list[str]:
    def cell(row: dict, key: str) -> str:
        return f"{row[key]:.1f} s ({part['rows'][0][key] / row[key]:.2f} x)"

    rows = [[r["name"], *(cell(r, k) for k in ("capture", "fit seed 0", "evaluate")), f"{r['total']:.0f} s"]
            for r in part["rows"]]  # fmt: skip
    return [f"{part['images']} images of 224 px, {part['model']}, random weights, one run each.", "",
            *table(["", "capture", "fit", "evaluate", "whole command"], rows)]  # fmt: skip


def _reading(part: dict) -> list[str]:
    rows = [[r["name"], f"{r['images/s']:,.0f} images/s", f"{r['slowest']:,.0f}"] for r in part["rows"]]
    told = (
        f"{part['images']} images, {part['bytes'] / 1e6:,.0f} MB before compression, {part['on disk'] / 1e6:,.0f} MB "
        f"on disk, {part['chunks']} chunks, dropped from the file cache before each run; two runs each. A block mixes "
        f"{part['chunks mixed']} chunks, a batch has {part['batch']} images."
    )
    return [told, "", *table(["", "faster run", "slower run"], rows)]


def _together(part: dict) -> list[str]:
    same = "yes" if part["equal bit for bit"] else "no"
    return [
        f"{part['dictionaries']} dictionaries of {part['steps']} steps, one epoch: {part['one pass']:.1f} s in one "
        f"pass, {part['four passes']:.1f} s in four. Equal bit for bit: {same}."
    ]


def _memory(part: dict) -> list[str]:
    rows = [
        [f"{r['images']:,}", f"{r['capture MB']:.0f} MB", f"{r['capture and batches MB']:.0f} MB"] for r in part["rows"]
    ]
    told = f"From the first row to the last: {part['bytes an image']:.0f} bytes an image (names, classes, chunk lists)."
    return [*table(["images", "after the capture", "after 200 batches"], rows), "", told]


def _precision(part: dict) -> list[str]:
    rows = [[r["name"], f"{r['images/s']:.0f} images/s", f"{r['slowest']:.0f}", f"{r['first call']:.1f} s",
             f"{r['relative deviation']:.1e}" if "relative deviation" in r else "-"] for r in part["rows"]]  # fmt: skip
    return [f"{part['model']}, random weights, 32 images of 224 px a batch, five runs.", "",
            *table(["", "fastest", "slowest", "first call", "relative deviation"], rows)]  # fmt: skip


TABLES = {
    "processes": _processes,
    "reading": _reading,
    "together": _together,
    "memory": _memory,
    "precision": _precision,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "page"])
    options = parser.parse_args()
    from netgloss.runs.run import versions

    file = HERE / "scale.json"
    record = json.loads(file.read_text()) if file.exists() else {}
    if options.part != "page":
        record[options.part] = {
            "command": f"python benchmarks/scale.py {options.part}",
            "threads": torch.get_num_threads(),
            "versions": versions(),
            **PARTS[options.part](),
        }
        file.write_text(json.dumps(record, indent=1) + "\n")
    (HERE / "scale.md").write_text(page(record))
    print(page(record))


if __name__ == "__main__":
    main()

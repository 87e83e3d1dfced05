"""Capture: what is stored is what the network computes; skips, resume after a kill, NaN, overflow, sub-sampling."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from netgloss.activations import CaptureOptions, Store, capture
from netgloss.activations.capture import sample_positions
from netgloss.activations.layer import check_origin
from netgloss.classifiers import load_classifier
from netgloss.data import open_images
from netgloss.errors import UserError
from netgloss.progress import Silent


class Small(nn.Module):
    """conv -> relu (in place) -> mean pool -> linear on 8 x 8 images."""

    preprocessing_spec = {"size": [8, 8], "resize": [8, 8], "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 5, 3, stride=2)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.relu(self.conv(x)).mean(dim=(2, 3)))


def images(num: int = 300, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num, 8, 8, 3), dtype=np.uint8)


def test_the_store_holds_what_the_network_computes(tmp_path: Path) -> None:
    classifier = load_classifier(Small())
    pixels = images()
    store = capture(
        classifier, open_images(pixels), ["conv", "head"], tmp_path / "s", options=CaptureOptions("float32")
    )
    batch = torch.stack([classifier.preprocessing(Image.fromarray(p)) for p in pixels])
    net = Small()
    expected = net.conv(batch)
    np.testing.assert_allclose(store.read("conv", slice(0, 300)), expected.detach().numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(store.read_logits(slice(0, 300)), net(batch).detach().numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(store.read("head", slice(0, 300)), net(batch).detach().numpy(), rtol=1e-4, atol=1e-5)
    assert not store.is_nonnegative("conv")
    store.require_complete()
    assert store.info.model == classifier.spec()


def test_the_batch_size_does_not_matter(tmp_path: Path) -> None:
    stores = [
        capture(
            load_classifier(Small()),
            open_images(images()),
            ["relu"],
            tmp_path / f"s{b}",
            options=CaptureOptions("float32", batch_size=b),
        )
        for b in (7, 64)
    ]
    first, second = (s.read("relu", slice(0, 300)) for s in stores)
    np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-6)
    assert stores[0].key == stores[1].key
    assert stores[0].is_nonnegative("relu")


def test_without_logits_the_forward_stops_after_the_layer(tmp_path: Path) -> None:
    net = Small()
    ran = []
    classifier = load_classifier(net)
    classifier.net.head.register_forward_hook(lambda *_: ran.append(1))
    store = capture(classifier, open_images(images(64)), ["conv"], tmp_path / "s", options=CaptureOptions(logits=False))
    assert len(ran) <= 4  # the probes that learn shapes and how often a layer runs, never one a batch
    assert store.read_logits(slice(0, 2)) is None


def test_sampled_positions_are_those_cells(tmp_path: Path) -> None:
    whole = capture(load_classifier(Small()), open_images(images()), ["conv"], tmp_path / "w")
    part = capture(
        load_classifier(Small()), open_images(images()), ["conv"], tmp_path / "p", options=CaptureOptions(positions=4)
    )
    cells = part.read_positions("conv", slice(0, 300))
    maps = whole.read("conv", slice(0, 300)).reshape(300, 5, 9)
    rows = part.read("conv", slice(0, 300))
    for i in (0, 17, 299):
        np.testing.assert_allclose(rows[i].T, maps[i][:, cells[i]], atol=2e-3)
        assert len(set(cells[i].tolist())) == 4
    assert (cells[0] != cells[1]).any()
    np.testing.assert_array_equal(sample_positions("x", 9, 4, seed=0), sample_positions("x", 9, 4, seed=0))


def folder_with_flaws(folder: Path, num: int = 12) -> Path:
    (folder / "cat").mkdir(parents=True)
    for i, pixels in enumerate(images(num)):
        Image.fromarray(pixels).save(folder / "cat" / f"{i:02d}.png")
    (folder / "cat" / "03.png").write_bytes(b"not an image")
    (folder / "cat" / "05.png").write_bytes((folder / "cat" / "04.png").read_bytes()[:40])
    return folder


def test_unreadable_images_are_skipped_and_listed(tmp_path: Path) -> None:
    source = open_images(folder_with_flaws(tmp_path / "images"))
    store = capture(load_classifier(Small()), source, ["conv"], tmp_path / "s")
    assert sorted(store.problems) == ["cat/03.png", "cat/05.png"]
    assert len(store.valid) == 10
    with pytest.raises(UserError, match=r"03\.png"):
        capture(load_classifier(Small()), source, ["conv"], tmp_path / "t", options=CaptureOptions(strict=True))


def test_a_store_is_refused_once_its_pictures_changed_in_place(tmp_path: Path) -> None:
    """Same names, same length, same time of the last change: still other pictures."""
    folder = folder_with_flaws(tmp_path / "images")
    make = lambda **given: capture(  # noqa: E731
        load_classifier(Small()), open_images(folder), ["conv"], tmp_path / "s", options=CaptureOptions(**given)
    )
    store = make()
    assert make().key == store.key
    assert make(verify=True).key == store.key
    file = folder / "cat" / "01.png"
    before = os.stat(file)
    data = bytearray(file.read_bytes())
    data[-20] ^= 1  # in the compressed pixels or their checksum, far from the middle
    file.write_bytes(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(UserError, match=r"holds something else: images:"):
        make()
    with pytest.raises(UserError, match="are not the images"):
        check_origin(Store.open(tmp_path / "s"), source=open_images(folder))


def test_a_store_of_an_earlier_version_is_used_and_said_so(tmp_path: Path) -> None:
    folder = folder_with_flaws(tmp_path / "images")
    capture(load_classifier(Small()), open_images(folder), ["conv"], tmp_path / "s")
    attributes = json.loads((tmp_path / "s" / "zarr.json").read_text())
    stored = attributes["attributes"]
    source = open_images(folder)
    stored["key"]["data_fingerprint"] = source._hash(source._sample)
    del stored["info"]["images"]["state"]
    (tmp_path / "s" / "zarr.json").write_text(json.dumps(attributes))
    said = Lines()
    store = capture(load_classifier(Small()), source, ["conv"], tmp_path / "s", progress=said)
    assert len(store.valid) == 10
    assert "samples of the files" in said.lines[0]
    check_origin(store, source=open_images(folder))


class Lines(Silent):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)


def test_no_readable_image_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"x")
    with pytest.raises(UserError, match=r"none of the 1 images .* could be read; the first: "):
        capture(load_classifier(Small()), open_images(tmp_path / "images"), ["conv"], tmp_path / "s")


def test_nan_is_told_with_layer_and_image(tmp_path: Path) -> None:
    class Poisoned(Small):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(torch.where(x.amax(dim=(1, 2, 3), keepdim=True) > 1e6, torch.nan, x))

    net = Poisoned()
    net.preprocessing_spec = {**Small.preprocessing_spec, "std": [1e-9, 1e-9, 1e-9]}
    pixels = np.zeros((40, 8, 8, 3), np.uint8)
    pixels[33] = 255
    with pytest.raises(UserError, match=r"layer 'conv' gives NaN or Inf at image .*33"):
        capture(load_classifier(net), open_images(pixels), ["conv"], tmp_path / "s", options=CaptureOptions("float32"))


def test_overflow_of_float16_names_the_way_out(tmp_path: Path) -> None:
    """In a later image; where the first ones show it, the store is of float32 by itself (test_modules.py)."""
    net = Small()
    net.conv.register_forward_hook(lambda _, given, maps: maps * (1e6 if (given[0] == -2).all(dim=3).any() else 1))
    pixels = images(40)
    pixels[39] = 0  # a black image
    with pytest.raises(UserError, match="too large for float16: use --dtype float32"):
        capture(load_classifier(net), open_images(pixels), ["conv"], tmp_path / "s")
    capture(load_classifier(net), open_images(pixels), ["conv"], tmp_path / "t", options=CaptureOptions("float32"))


def test_a_store_of_another_network_or_of_other_images_is_refused(tmp_path: Path) -> None:
    capture(load_classifier(Small()), open_images(images(20)), ["conv"], tmp_path / "s")
    other = Small()
    with torch.no_grad():
        other.head.weight += 1
    with pytest.raises(UserError, match="network's weights"):
        capture(load_classifier(other), open_images(images(20)), ["conv"], tmp_path / "s")
    with pytest.raises(UserError, match="images: "):
        capture(load_classifier(Small()), open_images(images(20, seed=1)), ["conv"], tmp_path / "s")
    with pytest.raises(UserError, match=r"layers: \('conv',\) in the store, \('relu',\) asked for"):
        capture(load_classifier(Small()), open_images(images(20)), ["relu"], tmp_path / "s")


def test_ranks_write_disjoint_chunks_of_one_store(tmp_path: Path) -> None:
    source, classifier = open_images(images(1000)), load_classifier(Small())
    whole = capture(classifier, source, ["conv"], tmp_path / "one")
    first = capture(classifier, source, ["conv"], tmp_path / "two", rank=0, world=2)
    assert first.pending == list(range(1, first.num_chunks, 2))
    capture(classifier, source, ["conv"], tmp_path / "two", rank=1, world=2)
    both = Store.open(tmp_path / "two")
    both.require_complete()
    np.testing.assert_array_equal(both.read("conv", slice(0, 1000)), whole.read("conv", slice(0, 1000)))


def test_bfloat16_is_near_and_never_taken_for_float32(tmp_path: Path) -> None:
    source, classifier = open_images(images(40)), load_classifier(Small())
    exact = capture(classifier, source, ["conv"], tmp_path / "e", options=CaptureOptions("float32"))
    options = CaptureOptions("float32", precision="bfloat16")
    near = capture(classifier, source, ["conv"], tmp_path / "n", options=options)
    one, two = exact.read("conv", slice(0, 40)), near.read("conv", slice(0, 40))
    assert 0 < np.linalg.norm(one - two) / np.linalg.norm(one) < 0.02
    assert exact.key.address != near.key.address
    with pytest.raises(UserError, match="precision: float32 in the store, bfloat16 asked for"):
        capture(classifier, source, ["conv"], tmp_path / "e", options=options)


def test_wrong_layers_and_options_are_one_line(tmp_path: Path) -> None:
    source = open_images(images(4))
    with pytest.raises(UserError, match="did you mean conv"):
        capture(load_classifier(Small()), source, ["cnov"], tmp_path / "s")
    with pytest.raises(UserError, match="dtype must be float16 or float32"):
        CaptureOptions("int8")
    with pytest.raises(UserError, match="batch_size must be at least 1"):
        CaptureOptions(batch_size=0)
    with pytest.raises(UserError, match="precision must be float32 or bfloat16"):
        CaptureOptions(precision="float8")


SLOW = """
import sys, time
sys.path.insert(0, {tests!r})
from test_capture import Small, images
import netgloss.activations.store as store_module
from netgloss.activations import capture
from netgloss.classifiers import load_classifier
from netgloss.data import open_images
write = store_module.Store.write_chunk
def slow(self, *a, **k):
    time.sleep(0.15)
    write(self, *a, **k)
    print("chunk", flush=True)
store_module.Store.write_chunk = slow
capture(load_classifier(Small()), open_images(images(2000)), ["conv"], {out!r})
"""


def test_a_killed_capture_continues_with_the_missing_chunks(tmp_path: Path) -> None:
    code = SLOW.format(tests=str(Path(__file__).parent), out=str(tmp_path / "s"))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(3):
        assert process.stdout.readline() == "chunk\n"
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    killed = Store.open(tmp_path / "s")
    missing = killed.pending
    assert 3 <= killed.num_chunks - len(missing) < killed.num_chunks
    written: list[int] = []
    original = Store.write_chunk

    def record(self: Store, chunk: int, **arrays: object) -> None:
        written.append(chunk)
        original(self, chunk, **arrays)  # type: ignore[arg-type]

    classifier, source = load_classifier(Small()), open_images(images(2000))
    Store.write_chunk = record  # type: ignore[method-assign,assignment]
    try:
        store = capture(classifier, source, ["conv"], tmp_path / "s")
    finally:
        Store.write_chunk = original  # type: ignore[method-assign]
    assert written == missing
    fresh = capture(classifier, source, ["conv"], tmp_path / "fresh")
    np.testing.assert_array_equal(store.read("conv", slice(0, 2000)), fresh.read("conv", slice(0, 2000)))
    np.testing.assert_array_equal(store.read_logits(slice(0, 2000)), fresh.read_logits(slice(0, 2000)))

"""Batches are halved when memory runs out, and nothing changes in what comes out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from netgloss.activations import CaptureOptions, capture
from netgloss.activations.layer import Layer, make_tail
from netgloss.classifiers import load_classifier
from netgloss.data import open_images
from netgloss.errors import UserError
from netgloss.evaluation.judge import measure
from netgloss.evaluation.subjects import from_explainer
from netgloss.explainers.base import LayerSpec
from netgloss.explainers.names import find_explainer
from netgloss.memory import Halving, is_out_of_memory
from test_capture import Small, images


class Cramped(Small):
    """A network on a device with room for ``room`` images."""

    room = 5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().forward(x)


def test_parts_cover_the_batch_and_the_size_is_kept() -> None:
    halving, seen = Halving(32), []

    def work(part: slice) -> int:
        if part.stop - part.start > 5:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        seen.append((part.start, part.stop))
        return part.stop - part.start

    assert sum(halving(20, work)) == 20
    assert seen == [(0, 5), (5, 10), (10, 15), (15, 20)]
    assert halving.size == 5
    assert halving(7, work) == [5, 2]


def test_other_errors_come_through_and_one_image_must_fit() -> None:
    def broken(part: slice) -> None:
        raise RuntimeError("shapes do not match")

    def never(part: slice) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(RuntimeError, match="shapes"):
        Halving(8)(8, broken)
    with pytest.raises(UserError, match="one image alone does not fit in memory: CUDA out of memory"):
        Halving(8)(8, never)
    assert not is_out_of_memory(ValueError("out of memory"))


def test_a_capture_goes_on_with_smaller_batches(tmp_path: Path) -> None:
    source, options = open_images(images(60)), CaptureOptions("float32")
    small = load_classifier(Cramped())
    store = capture(small, source, ["conv"], tmp_path / "s", options=options)
    plain = capture(load_classifier(Small()), source, ["conv"], tmp_path / "p", options=options)
    np.testing.assert_allclose(store.read("conv", slice(0, 60)), plain.read("conv", slice(0, 60)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(store.read_logits(slice(0, 60)), plain.read_logits(slice(0, 60)), rtol=1e-5, atol=1e-6)


def test_an_evaluation_counts_every_image_once(tmp_path: Path) -> None:
    classifier = load_classifier(Small())
    store = capture(classifier, open_images(images(90)), ["conv"], tmp_path / "s")
    cls = find_explainer("random-directions")
    explainer = cls(cls.Config(num_concepts=3), LayerSpec("conv", store.shapes["conv"]))
    explainer.atoms.copy_(torch.randn(3, 5, generator=torch.Generator().manual_seed(0)))
    layer = Layer(store, "conv", make_tail(classifier, "conv", None), classifier)
    plain = from_explainer(explainer)

    def cramped(batch):  # type: ignore[no-untyped-def]
        if len(batch.index) > 9:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(batch)

    found = measure({"plain": plain, "cramped": cramped}, layer, np.arange(90))
    assert found["plain"].keys() == found["cramped"].keys()
    assert found["plain"]
    for name, metric in found["plain"].items():
        assert found["cramped"][name].num_images == metric.num_images == 90
        torch.testing.assert_close(
            found["cramped"][name].compute(), metric.compute(), rtol=1e-6, atol=1e-8, equal_nan=True
        )

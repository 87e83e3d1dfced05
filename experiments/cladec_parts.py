"""Shared by the ClaDec experiments: data in memory, one training loop, one evaluation.

The loop is netgloss's fit loop without files: ``ClaDec.fit_rows``, ``losses``, ``after_step``; activations are cached
once. Used by cladec_fashion.py, cladec_cifar.py and cladec_imagenette.py.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fashion_mnist_classifier import accuracy, batches, train_classifier
from image_attributes import probe_attributes
from netgloss.classifiers import Classifier, Taps
from netgloss.explainers.base import Batch, LayerSpec
from netgloss.explainers.cladec import ClaDec, ClaDecConfig
from netgloss.training.inputs import logits_of_images


@dataclass
class Part:
    """Aligned images (N, m, S, S) in [0, 1], activations, logits, labels."""

    images: Tensor
    activations: Tensor
    logits: Tensor
    labels: Tensor

    def replace(self, **fields: Tensor) -> Part:
        return dataclasses.replace(self, **fields)


class MemoryRows:
    """The rows of a fit, from memory (netgloss.explainers.base.Rows)."""

    def __init__(self, part: Part, to_logits: Callable[[Tensor], Tensor] | None = None) -> None:
        self.part, self.to_logits = part, to_logits

    num_rows = property(lambda self: len(self.part.images))
    num_features = property(lambda self: self.part.activations.shape[1])

    def examples(self, fields: Any = ()) -> Iterator[Batch]:
        for picks in torch.arange(self.num_rows).split(256):
            yield self.batch(picks, 0)

    def batch(self, picks: Tensor, step: int) -> Batch:
        p = self.part
        return Batch(
            p.activations[picks].float(),
            picks,
            logits=p.logits[picks],
            labels=p.labels[picks],
            image=p.images[picks],
            to_logits=self.to_logits,
            step=step,
        )


@torch.no_grad()
def read(
    classifier: Classifier, layer: str, inputs: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor
) -> Part:
    """Runs the classifier once: activations of ``layer`` (fp16) and logits of ``inputs(images)``."""
    activations, logits = [], []
    with Taps(classifier.net, layer, stop=False) as taps:
        for picks in torch.arange(len(images)).split(64):
            activations.append(taps(inputs(images[picks]))[layer].half())
            logits.append(taps.logits)
    return Part(images, torch.cat(activations), torch.cat(logits), labels)


def train(
    explainer: ClaDec, part: Part, *, seed: int, to_logits: Callable[[Tensor], Tensor] | None = None
) -> tuple[ClaDec, float]:
    """Fits in memory; returns the explainer in eval mode and seconds a step."""
    rows = MemoryRows(part, to_logits)
    torch.manual_seed(seed)
    explainer.fit_rows(rows, seed=seed)
    optimizer = explainer.optimizer()
    rate = explainer.config.lr
    explainer.train()
    start = time.perf_counter()
    turns = batches(len(part.images), updates=explainer.max_steps, size=explainer.config.batch_size, seed=seed)
    for step, picks in enumerate(turns):
        if explainer.before_step(step, rows) == "reset":
            optimizer = explainer.optimizer()
        for group in optimizer.param_groups:
            group["lr"] = rate * explainer.lr_scale(step)
        loss = torch.stack(list(explainer.losses(rows.batch(picks, step)).values())).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        explainer.after_step(step)
    return explainer.eval(), (time.perf_counter() - start) / explainer.max_steps


def build(config: ClaDecConfig, classifier: Classifier, layer: str, part: Part, *, seed: int) -> ClaDec:
    """An unfitted ClaDec for a layer, with initial weights from the seed."""
    spec = LayerSpec(
        name=layer,
        shape=tuple(part.activations.shape[1:]),
        num_classes=part.logits.shape[1],
        image=classifier.input_shape,
    )
    torch.manual_seed(seed)
    return ClaDec(config, spec)


@torch.no_grad()
def decoded(explainer: ClaDec, part: Part, kind: str = "decoded") -> Tensor:
    """X_E or X_R of every image, raw."""
    made = []
    for picks in torch.arange(len(part.images)).split(128):
        if kind == "decoded":
            made.append(explainer(part.activations[picks].float()))
        else:
            made.append(explainer.reference(part.images[picks]))
    return torch.cat(made).contiguous()


def rec(images: Tensor, made: Tensor) -> float:
    """R: squared error summed over an image, averaged over images."""
    return float((images - made).square().flatten(1).sum(1).mean())


@torch.no_grad()
def seen_by(to_logits: Callable[[Tensor], Tensor], made: Tensor, part: Part, limit: int = 2000) -> dict[str, float]:
    """acc_c, agree_c and class_loss of pictures."""
    logits = torch.cat([to_logits(made[p]) for p in torch.arange(min(limit, len(made))).split(64)])
    labels, own = part.labels[: len(logits)], part.logits[: len(logits)]
    return {
        "acc_c": float((logits.argmax(1) == labels).float().mean()),
        "agree_c": float((logits.argmax(1) == own.argmax(1)).float().mean()),
        "class_loss": float(nn.functional.cross_entropy(logits, labels)),
    }


def class_means(train_part: Part, test_part: Part) -> tuple[Tensor, Tensor]:
    """The mean training image of the predicted class, for each test image and each training image."""
    predicted = train_part.logits.argmax(1)
    means = torch.stack(
        [
            train_part.images[predicted == c].mean(0) if (predicted == c).any() else train_part.images.mean(0)
            for c in range(train_part.logits.shape[1])
        ]
    )
    return means[test_part.logits.argmax(1)], means[predicted]


def one_hot(part: Part) -> Tensor:
    """One-hot of the prediction: the code of the label-only decoder."""
    return nn.functional.one_hot(part.logits.argmax(1), part.logits.shape[1]).float()


def judged_by_new_network(
    made_train: Tensor, made_test: Tensor, train_part: Part, test_part: Part, *, updates: int, seed: int, classes: int
) -> float:
    """acc_eval: accuracy on decoded test images of a V11 trained from scratch on decoded training images (32 px)."""
    small = [
        nn.functional.interpolate(m, (32, 32), mode="area") if m.shape[2] > 32 else m for m in (made_train, made_test)
    ]
    net = train_classifier(
        small[0], train_part.labels, updates=updates, seed=seed, channels=small[0].shape[1], classes=classes
    )
    return accuracy(net, small[1], test_part.labels)


def probes(
    explainer: ClaDec, train_part: Part, test_part: Part, *, foreground: bool, limit: int = 1500
) -> dict[str, Any]:
    """R2 of every attribute from X, X_R, X_E, and ``retained``."""
    kinds = {}
    for name, part in (("train", train_part), ("test", test_part)):
        some = Part(*(getattr(part, f.name)[:limit] for f in dataclasses.fields(Part)))
        kinds[name] = {
            "original": some.images,
            "reference": decoded(explainer, some, "reference"),
            "decoded": decoded(explainer, some),
        }
    found = probe_attributes(kinds["train"], kinds["test"], foreground=foreground)
    return {name: {**dataclasses.asdict(p), "retained": p.retained} for name, p in found.items()}


def spread(values: list[float]) -> dict[str, Any]:
    """Mean over seeds with Student's 95 % interval."""
    from netgloss.metrics.base import student_t

    found = np.asarray(values, dtype=float)
    half = student_t(len(found) - 1) * found.std(ddof=1) / np.sqrt(len(found)) if len(found) > 1 else None
    mean = float(found.mean())
    return {
        "mean": mean,
        "low": None if half is None else mean - float(half),
        "high": None if half is None else mean + float(half),
        "values": [float(v) for v in found],
    }


class Table:
    """Results kept on disk after every step, so that a stopped experiment goes on.

    Parameters
    ----------
    minutes : no new step is begun after so many minutes; the process ends with code 3 (run the command again).
    """

    def __init__(self, path: Path, minutes: float = float("inf")) -> None:
        self.path = path
        self.stop = time.monotonic() + 60 * minutes
        self.values: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def once(self, key: str, make: Callable[[], Any]) -> Any:
        """The value of ``key``, made now if it is not there."""
        if key not in self.values:
            if time.monotonic() > self.stop:
                sys.exit(3)
            start = time.perf_counter()
            self.values[key] = make()
            print(f"{key}: {time.perf_counter() - start:.0f} s {json.dumps(self.values[key])[:300]}", flush=True)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.values, indent=1))
        return self.values[key]


def way_to_logits(classifier: Classifier) -> Callable[[Tensor], Tensor]:
    """Differentiable logits of pictures."""
    return logits_of_images(classifier)

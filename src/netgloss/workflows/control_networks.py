"""Control networks: the methods of a comparison on the same architecture with other weights.

What a method scores on a network that was never trained, or was trained on shuffled labels, it does not owe to what the
network has learnt. Each method is fitted there once, with its own options, on images of the comparison.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from netgloss.activations import CaptureOptions, capture
from netgloss.activations.layer import make_tail, split_store
from netgloss.errors import UserError
from netgloss.evaluation.faithful import FaithfulnessOptions
from netgloss.evaluation.judge import Answer, Bench, answer_all, make_job
from netgloss.evaluation.result import Entry
from netgloss.progress import Progress
from netgloss.training import ActivationStream
from netgloss.training.inputs import upper_layers
from netgloss.training.stream import moments
from netgloss.workflows.capture import store_info
from netgloss.workflows.fit import fit_run

if TYPE_CHECKING:
    from netgloss.classifiers import Classifier
    from netgloss.data import ImageSource

UNTRAINED = "untrained_network"


def measure_network(
    name: str,
    network: Classifier,
    source: ImageSource,
    bench: Bench,
    entries: Sequence[Entry],
    out: Path,
    num_images: int,
    fabric: Any,
    progress: Progress,
) -> None:
    """Every method of the sweep on another network of the same architecture: one fit each, as a baseline."""
    network = network.to(fabric.device)
    count = min(num_images, len(source))
    picks = np.sort(np.random.default_rng(0).choice(len(source), size=count, replace=False))
    pictures = source.subset(picks)
    place = out / "networks" / name
    rows = [e for e in entries if not e.reason and e.kind == "method"]
    asked = [upper_layers(type(e.explainers[0]), e.explainers[0].config, network, bench.name) for e in rows]
    above = [layer for layers in asked for layer in layers]
    captured = capture(
        network,
        pictures,
        list(dict.fromkeys([bench.name, *above])),
        place / "activations.zarr",
        options=CaptureOptions(dtype="float32"),
        info=store_info(network, pictures),
        progress=progress,
    )
    fit_images, heldout = split_store(captured)
    if len(heldout) == 0:
        return
    other = dataclasses.replace(
        bench,
        store=captured,
        classifier=network,
        source=pictures,
        tail=make_tail(network, bench.name, pictures),
        judged=heldout,
        folder=place / "measured",
        faithfulness=FaithfulnessOptions(images=0),
        annotated=None,
    )
    for entry in rows:
        try:
            run = fit_run(
                entry.method,
                captured,
                bench.name,
                place / entry.name,
                config=entry.explainers[0].config,
                seeds=1,
                fabric=fabric,
                classifier=network,
                source=pictures,
                progress=progress,
            )
            job = make_job(other, "scores", run.explainer, view=entry.view)
            answers, reasons = answer_all(
                other, [job], mean=lambda: moments(ActivationStream(captured, bench.name, fit_images))[0]
            )
            if reasons:
                raise UserError(next(iter(reasons.values())))
        except UserError as error:
            entry.notes.append(f"{name}: {error}")
            continue
        if name == UNTRAINED:  # it predicts nearly one class: scores of its logits would look perfect
            answers = {key: _without_logits(answer) for key, answer in answers.items()}
        entry.beside.setdefault(name, {})["scores"] = list(answers.values())


def _without_logits(answer: Answer) -> Answer:
    from netgloss.metrics import image_metrics

    about_logits = {cls.name for cls in image_metrics() if "logits" in cls.inputs}
    return dataclasses.replace(answer, numbers={n: v for n, v in answer.numbers.items() if n not in about_logits})


def about_network(name: str, network: Classifier) -> str:
    if name == UNTRAINED:
        return "the same architecture with random weights (seed 0); scores of its logits are left out"
    return f"{network.name}, weights {network.weights_hash[:12]}"

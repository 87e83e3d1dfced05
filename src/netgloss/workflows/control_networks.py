"""Control networks: the methods of an evaluation on the same architecture with other weights.

What a method scores on a network that was never trained, or was trained on shuffled labels, it does not owe to what the
network has learnt. Each method is fitted there once, with its own options, on images of the evaluation.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from netgloss.activations import CaptureOptions, Store, capture
from netgloss.activations.layer import class_labels, make_tail, split_store
from netgloss.errors import UserError
from netgloss.evaluation.context import EvaluationContext
from netgloss.evaluation.faithful import FaithfulnessOptions
from netgloss.evaluation.judge import Result, make_job, run_jobs
from netgloss.evaluation.subjects import Subject, View
from netgloss.explainers.base import Explainer
from netgloss.metrics import image_metrics
from netgloss.training import build_explainer, fit
from netgloss.training.execution import Execution
from netgloss.training.inputs import open_stream, upper_layers
from netgloss.workflows.capture import store_info
from netgloss.workflows.fit import fit as fit_run

if TYPE_CHECKING:
    from netgloss.classifiers import Classifier
    from netgloss.data import ImageSource

UNTRAINED = "untrained_network"


def describe_network(name: str, network: Classifier) -> str:
    """What a comparison records of a control network."""
    if name == UNTRAINED:
        return "the same architecture with random weights (seed 0); scores of its logits are left out"
    return f"{network.name}, weights {network.weights_hash[:12]}"


def add_untrained_network(context: EvaluationContext, subject: Subject, count: int) -> None:
    """Adds the baseline ``untrained_network`` to one subject, from at most ``count`` images: half to fit, half to
    evaluate. Activations are kept in a temporary store. A method that refuses the network is left without it.
    """
    assert context.source is not None
    picked = _draw(context.source, count)
    if len(picked) < 4:
        return
    network, fitted = context.classifier.untrained(seed=0), subject.explainers[0]
    cls, config = type(fitted), fitted.config
    try:
        with tempfile.TemporaryDirectory() as folder:
            source = context.source.subset(picked)
            layers = [context.name, *upper_layers(cls, config, network, context.name)]
            store = capture(
                network,
                source,
                layers,
                Path(folder) / "untrained",
                options=CaptureOptions(dtype="float32"),
                progress=context.progress,
            )
            fit_images, images = store.valid[::2], store.valid[1::2]
            labels = class_labels(store, network.class_names, network.wnids)
            stream = open_stream(
                cls, config, store, context.name, fit_images, classifier=lambda: network, source=source, labels=labels
            )
            spec = stream.spec(num_classes=len(network.class_names), image=network.input_shape)
            explainer = fit(build_explainer(cls, config, spec, seed=0), stream, seed=0, progress=context.progress)
            other = _on_network(context, network, store, source, fit_images, images, None)
            result = _scores(other, explainer, subject.view)
    except UserError as error:
        context.progress.say(f"untrained-network control left out: {error}")
        return
    subject.baselines.setdefault(UNTRAINED, {})["scores"] = [_without_logits(result)]


def add_network(
    name: str,
    network: Classifier,
    context: EvaluationContext,
    subjects: Sequence[Subject],
    out: Path,
    num_images: int,
    execution: Execution,
) -> None:
    """Adds the baseline ``name`` to every method of a comparison: one fit each on another network.

    Stores and runs are kept below ``out/networks/name``; a method that fails there gets a note.
    """
    assert context.source is not None
    network = network.to(execution.torch_device)
    source = context.source.subset(_draw(context.source, num_images))
    folder = out / "networks" / name
    methods = [s for s in subjects if not s.reason and s.kind == "method"]
    above = [
        layer
        for s in methods
        for layer in upper_layers(type(s.explainers[0]), s.explainers[0].config, network, context.name)
    ]
    store = capture(
        network,
        source,
        list(dict.fromkeys([context.name, *above])),
        folder / "activations.zarr",
        options=CaptureOptions(dtype="float32"),
        info=store_info(network, source),
        progress=context.progress,
    )
    fit_images, heldout = split_store(store)
    if len(heldout) == 0:
        return
    other = _on_network(context, network, store, source, fit_images, heldout, folder / "measured")
    for subject in methods:
        try:
            run = fit_run(
                subject.method,
                store,
                context.name,
                folder / subject.name,
                config=subject.explainers[0].config,
                seeds=1,
                device=execution,
                classifier=network,
                source=source,
            )
            result = _scores(other, run.explainer, subject.view)
        except UserError as error:
            subject.notes.append(f"{name}: {error}")
            continue
        kept = _without_logits(result) if name == UNTRAINED else result
        subject.baselines.setdefault(name, {})["scores"] = [kept]


def _draw(source: ImageSource, count: int) -> np.ndarray:
    return np.sort(np.random.default_rng(0).choice(len(source), size=min(count, len(source)), replace=False))


def _on_network(
    context: EvaluationContext,
    network: Classifier,
    store: Store,
    source: ImageSource,
    fit_images: np.ndarray,
    images: np.ndarray,
    folder: Path | None,
) -> EvaluationContext:
    """The same evaluation on another network."""
    return dataclasses.replace(
        context,
        store=store,
        classifier=network,
        source=source,
        tail=make_tail(network, context.name, source),
        fit_images=fit_images,
        images=images,
        folder=folder,
        faithfulness=FaithfulnessOptions(images=0),
        annotated=None,
        fabric=None,
    )


def _scores(context: EvaluationContext, explainer: Explainer, view: View) -> Result:
    job = make_job(context, "scores", explainer, view=view)
    results, reasons = run_jobs(context, [job], mean=lambda: context.moments(view.pooled)[0])
    if reasons:
        raise UserError(reasons[job.key])
    return results[job.key]


def _without_logits(result: Result) -> Result:
    """An untrained network predicts nearly one class: scores of its logits would look perfect."""
    left_out = {cls.name for cls in image_metrics() if {"logits", "contributions"} & set(cls.inputs)}
    return dataclasses.replace(result, numbers={n: v for n, v in result.numbers.items() if n not in left_out})

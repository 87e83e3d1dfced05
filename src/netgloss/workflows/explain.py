"""The whole way in one call: classifier and images -> store -> fitted explainers -> scores -> report.

:func:`explain` does all of it; :func:`fit_run`, :func:`evaluate_run` and ``Run.write_report`` are its parts, for a
store that exists already. Every part continues where an interrupted one stopped.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from netgloss.activations import CaptureOptions
from netgloss.activations.locations import place_of
from netgloss.data.sources import open_sources
from netgloss.errors import UserError
from netgloss.explainers.base import ExplainerConfig
from netgloss.explainers.names import find_explainer
from netgloss.explanations import GlossOptions
from netgloss.progress import Progress, Silent
from netgloss.report import write_report
from netgloss.runs.run import Run
from netgloss.training import make_fabric
from netgloss.training.inputs import upper_layers
from netgloss.workflows.capture import shared_capture
from netgloss.workflows.evaluate import EvaluationOptions, evaluate_run, judged_with
from netgloss.workflows.fit import fit_run

if TYPE_CHECKING:
    from netgloss.classifiers import Classifier
    from netgloss.data import ImageSource


def explain(
    method: str,
    model: Classifier | str | torch.nn.Module,
    layer: str,
    images: ImageSource | str | Path,
    *,
    out: str | Path,
    eval_images: ImageSource | str | Path | None = None,
    config: ExplainerConfig | None = None,
    seeds: int | Sequence[int] = 3,
    device: str = "auto",
    devices: int = 1,
    nodes: int = 1,
    precision: str = "32-true",
    store: str | Path | None = None,
    capture_options: CaptureOptions | None = None,
    evaluation: EvaluationOptions | None = None,
    gloss: GlossOptions | None = None,
    command: str = "",
    progress: Progress | None = None,
    **config_fields: Any,
) -> Run:
    """Explains one layer of a classifier by concepts and writes a run folder with its report.

    Parameters
    ----------
    method : ``"nmf"``, ``"pca"``, ``"ica"``, ``"kmeans"``, ``"topk-sae"``, ..., or ``path/to/file.py:Class``.
    model : a classifier, its name (``"torchvision:mobilenet_v2"``), or any ``nn.Module`` that says its preprocessing.
    layer : dotted name, as ``netgloss layers`` lists them.
    images : a source, or what ``netgloss.open_images`` takes (a folder, an .npz file, ...).
    eval_images : images to judge on; default: a fifth of ``images``, held out from the fit by the hash of their ids.
    out : the run folder; an interrupted run with the same settings continues, a finished one is only reported again
        (``evaluate_run`` scores it anew).
    seeds : how many fits, or which seeds.
    device, devices, nodes, precision : as Fabric takes them; several processes (``devices`` on each of ``nodes``
        machines) share the capture and the judged images and train by DDP (the calling script is started once a
        process, as torchrun does).
    store : where the activations go; default ``out/activations.zarr``.
    config_fields : options of the method by name (``num_concepts=32``), instead of ``config``.

    Returns
    -------
    The run: ``run.explainer``, ``run.scores``, ``run.path / "report.html"``.

    Raises
    ------
    UserError
        One line for each mistake in names, files and options.
    """
    from netgloss.classifiers import Classifier, load_classifier

    progress = progress or Silent()
    cls = find_explainer(method)
    if config is None:
        known = [f.name for f in dataclasses.fields(cls.Config)]
        unknown = sorted(set(config_fields) - set(known))
        if unknown:
            raise UserError(f"{method} has no option {', '.join(unknown)}; it has {', '.join(known)}")
        config = cls.Config(**config_fields)
    fabric = make_fabric(device, devices=devices, nodes=nodes, precision=precision)
    fabric.launch()
    progress = (progress if fabric.is_global_zero else None) or Silent()
    classifier = model if isinstance(model, Classifier) else load_classifier(model)
    classifier = classifier.to(fabric.device)
    source = open_sources(images, eval_images)
    classifier.check_layer(layer)
    out = Path(out)
    layers = [layer, *upper_layers(cls, config, classifier, layer)]
    place = place_of(store) if store is not None else out / "activations.zarr"
    started = time.perf_counter()
    captured = shared_capture(fabric, classifier, source, layers, place, options=capture_options, progress=progress)
    seconds = time.perf_counter() - started
    if captured.problems:
        progress.say(
            f"{len(captured.problems)} image(s) could not be read and were skipped; they are listed in the report"
        )
    run = fit_run(
        method,
        captured,
        layer,
        out,
        config=config,
        seeds=seeds,
        fabric=fabric,
        classifier=classifier,
        source=source,
        command=command,
        progress=progress,
    )
    if fabric.is_global_zero:
        run.add_time("capture", seconds)
    judged = run.manifest["status"] == "complete"
    if not (judged and run.manifest.get("judged_with") == judged_with(evaluation, gloss)):
        evaluate_run(
            run,
            store=captured,
            source=source,
            classifier=classifier,
            options=evaluation,
            gloss=gloss,
            fabric=fabric,
            progress=progress,
        )
    if not fabric.is_global_zero:
        return run
    run.update(status="complete")
    write_report(run)
    return run


def demo(out: str | Path, *, num_images: int = 400, command: str = "", progress: Progress | None = None) -> Run:
    """Explains the shipped Critters network's last map by NMF: needs no download, network or data."""
    return explain(
        "nmf",
        "critters",
        "block5",
        f"critters:{num_images}",
        out=out,
        num_concepts=12,
        command=command,
        progress=progress,
    )

"""Explain: from a classifier and images to a run folder with fitted explainers, scores and a report, in one call.

:func:`explain` captures, fits, evaluates and reports; ``netgloss.fit``, ``netgloss.evaluate`` and
``netgloss.write_report`` do one step each, for a store that exists already. Every step continues where an interrupted
one stopped.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from netgloss.activations import CaptureOptions
from netgloss.activations.locations import place_of
from netgloss.classifiers import Classifier, load_classifier
from netgloss.data.images import few
from netgloss.data.sources import open_sources
from netgloss.errors import UserError
from netgloss.explainers.base import Explainer, ExplainerConfig
from netgloss.explainers.names import find_explainer
from netgloss.report import write_report
from netgloss.runs.run import Run
from netgloss.training.execution import Execution
from netgloss.training.inputs import upper_layers
from netgloss.workflows.capture import capture_store
from netgloss.workflows.evaluate import EvaluationOptions, evaluate, is_evaluated_with
from netgloss.workflows.fit import fit
from netgloss.workflows.rehearsal import FEW_EXPLANATIONS, Failed, Rehearsal, check_of, rehearse, unmatched_classes

if TYPE_CHECKING:
    from torch import nn

    from netgloss.data import ImageSource


@dataclass(frozen=True)
class ExplainOptions:
    """How an explanation is captured and evaluated.

    Parameters
    ----------
    store : where the activations go (a folder or a URL); default ``activations.zarr`` in the run folder.
    rehearsal : try every stage on four images first, so that what would end the run late ends it at once
        (``workflows/rehearsal.py``). It changes no result.
    """

    store: str | Path | None = None
    capture: CaptureOptions = field(default_factory=CaptureOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    rehearsal: bool = True


def explain(
    method: str,
    model: Classifier | str | nn.Module,
    layer: str,
    images: ImageSource | str | Path,
    *,
    out: str | Path,
    eval_images: ImageSource | str | Path | None = None,
    config: ExplainerConfig | None = None,
    seeds: int | Sequence[int] = 3,
    device: str | Execution = "auto",
    options: ExplainOptions | None = None,
    **fields: Any,
) -> Run:
    """Explains one layer of a classifier by concepts and writes a run folder with its report.

    Parameters
    ----------
    method : ``"nmf"``, ``"pca"``, ``"ica"``, ``"kmeans"``, ``"topk-sae"``, ..., or ``path/to/file.py:Class``.
    model : a classifier, its name (``"torchvision:mobilenet_v2"``), or any ``nn.Module`` that states its preprocessing.
    layer : dotted name, as ``netgloss layers`` lists them.
    images : a source, or what ``netgloss.open_images`` takes (a folder, an .npz file, ...).
    eval_images : images to evaluate on; default: a fifth of ``images``, held out from the fit by the hash of their ids.
    out : the run folder. An interrupted run with the same settings continues; of a finished one only the report is
        written again (``netgloss.evaluate`` scores it again).
    seeds : number of fits, or which seeds.
    device : "auto", "cpu", "cuda", "mps", or an :class:`~netgloss.Execution` with the number of processes, the
        precision and a progress bar. Several processes share capture and evaluation and train by DDP; the calling
        script is then started once per process, as torchrun does.
    fields : options of the method by name (``num_concepts=32``), instead of ``config``, and fields of ``options``
        (``store="acts.zarr"``).

    Returns
    -------
    The run: ``run.explainer``, ``run.scores``, ``run.path / "report.html"``.

    Raises
    ------
    UserError : one line for each mistake in names, files and options.
    """
    cls = find_explainer(method)
    own = {f.name for f in dataclasses.fields(ExplainOptions)} & set(fields)
    options = dataclasses.replace(options or ExplainOptions(), **{name: fields.pop(name) for name in own})
    config = config or _config(method, cls, fields)
    execution = Execution.of(device)
    classifier = model if isinstance(model, Classifier) else load_classifier(model)
    classifier = classifier.to(execution.torch_device)
    source = open_sources(images, eval_images)
    classifier.check_layer(layer)
    out = Path(out)
    layers = [layer, *upper_layers(cls, config, classifier, layer)]
    place = place_of(options.store) if options.store is not None else out / "activations.zarr"
    if not (out / "run.json").exists():
        _before(method, config, classifier, layer, source, options, execution)
    started = time.perf_counter()
    check = check_of({method: config}, layer)
    store = capture_store(classifier, source, layers, place, options=options.capture, check=check, device=execution)
    seconds = time.perf_counter() - started
    if store.problems:
        execution.shown.say(
            f"{len(store.problems)} image(s) could not be read and were skipped: {few(list(store.problems))}; "
            "the report has the reasons"
        )
    run = fit(
        method, store, layer, out, config=config, seeds=seeds, device=execution, classifier=classifier, source=source
    )
    if execution.leads:
        run.add_time("capture", seconds)
    if not (run.manifest["status"] == "complete" and is_evaluated_with(run, options.evaluation)):
        evaluate(run, images=source, store=store, classifier=classifier, options=options.evaluation, device=execution)
    if execution.leads:
        run.update(status="complete")
        write_report(run)
    return run


def _before(
    method: str,
    config: ExplainerConfig,
    classifier: Classifier,
    layer: str,
    source: ImageSource,
    options: ExplainOptions,
    execution: Execution,
) -> None:
    """What can be known before the capture: class names, and whether every stage runs."""
    note = unmatched_classes(classifier, source)
    if note:
        execution.shown.say(note)

    def act(rehearsal: Rehearsal) -> dict[str, Failed]:
        run = rehearsal.fit(method, config, "run")
        with rehearsal.stage("evaluate"):
            few = EvaluationOptions(untrained_images=0, explanations=FEW_EXPLANATIONS)
            common: dict[str, Any] = {"store": rehearsal.store, "classifier": classifier, "device": rehearsal.execution}
            evaluate(run, images=rehearsal.source, options=few, **common)
        with rehearsal.stage("report"):
            run.write_scores(run.scores[:1])  # a chart for each score takes most of a report's time
            write_report(run)
        return {}

    if options.rehearsal and execution.fabric.world_size == 1:  # metrics would wait for the other processes
        rehearse(classifier, layer, source, {method: config}, act, options=options.capture, execution=execution)


def _config(method: str, cls: type[Explainer], fields: dict[str, Any]) -> ExplainerConfig:
    known = [f.name for f in dataclasses.fields(cls.Config)]
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise UserError(f"{method} has no option {', '.join(unknown)}; it has {', '.join(known)}")
    return cls.Config(**fields)


def demo(out: str | Path, *, num_images: int = 400, device: str | Execution = "auto") -> Run:
    """Explains the last map of the network that ships with netgloss, by NMF: needs no download and no data."""
    return explain("nmf", "critters", "block5", f"critters:{num_images}", out=out, device=device, num_concepts=12)

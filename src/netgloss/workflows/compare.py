"""The comparison: every metric on every method, on one layer of one network, over the same held-out images.

:func:`compare` takes fitted runs of one store, or makes the whole sweep itself: one capture, one fit a method and seed,
one set of controls. What it writes into its folder::

    comparison.html, .csv, .json    the table, with intervals, controls, marks, differences and definitions
    activations.zarr                the store (sweep only; or where ``store`` says)
    runs/<method>/                  the fitted methods (sweep only)
    measured/                       numbers measured so far, by the hash of what they depend on
    networks/<name>/                stores and runs of control networks (untrained, ...)

Everything in it is made once: the same command continues an interrupted comparison, and adding a method measures that
method only.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from netgloss.activations import CaptureOptions, Store, capture
from netgloss.activations.layer import check_origin, make_tail, split_store
from netgloss.data.sources import open_sources
from netgloss.errors import UserError
from netgloss.evaluation.faithful import FaithfulnessOptions
from netgloss.evaluation.judge import Annotated, Bench
from netgloss.evaluation.measuring import measure_entries
from netgloss.evaluation.result import Entry, score_entries
from netgloss.explainers.names import find_explainer
from netgloss.progress import Progress, Silent
from netgloss.report.comparison import Comparison
from netgloss.runs.run import Run, versions
from netgloss.training import ActivationStream, make_fabric
from netgloss.training.inputs import upper_layers
from netgloss.workflows.capture import store_info
from netgloss.workflows.control_networks import UNTRAINED, about_network, measure_network
from netgloss.workflows.evaluate import check_image_counts
from netgloss.workflows.sweep import Configs, check_named, config_of, fill, fit_all, method_list

if TYPE_CHECKING:
    from torch import nn

    from netgloss.classifiers import Classifier
    from netgloss.data import ImageSource


@dataclasses.dataclass(frozen=True)
class CompareOptions:
    """What a comparison measures besides the scores of every evaluation; the fields are flags of the command line."""

    max_images: int | None = None
    """Judge on at most this many held-out images."""
    network_images: int = 0
    """Images for each control network (the untrained one, and those of --control); 0 leaves them out."""
    on_rate: float = 0.005
    """Share of positions where every concept counts as on, in the dissection by --annotations."""

    def __post_init__(self) -> None:
        check_image_counts(max_images=self.max_images, network_images=self.network_images)
        if not 0 < self.on_rate < 1:
            raise UserError(f"on_rate must lie between 0 and 1, got {self.on_rate:g}")


def compare(
    runs: Sequence[Run | str | Path] = (),
    *,
    out: str | Path,
    methods: str | Sequence[str] = (),
    model: Classifier | str | nn.Module | None = None,
    layer: str | None = None,
    images: ImageSource | str | Path | None = None,
    eval_images: ImageSource | str | Path | None = None,
    annotations: str | None = None,
    dictionaries: Mapping[str, Any] | None = None,
    controls: Mapping[str, Classifier] | None = None,
    num_concepts: int = 32,
    configs: Configs | None = None,
    without: Mapping[str, str] | None = None,
    seeds: int | Sequence[int] = 3,
    options: CompareOptions | None = None,
    faithfulness: FaithfulnessOptions | None = None,
    store: str | Path | None = None,
    capture_options: CaptureOptions | None = None,
    device: str = "auto",
    command: str = "",
    progress: Progress | None = None,
) -> Comparison:
    """Every metric on every method, with intervals, controls and paired differences; written to ``out``.

    Parameters
    ----------
    runs : fitted runs of one store and layer, compared as they are. With ``methods``, the sweep joins them.
    methods : "all", names, or ``path/to/file.py:Class``: fitted here, on ``layer`` of ``model`` over ``images``. A
        method that refuses the layer is listed with its reason.
    images, eval_images, model : as ``netgloss.explain`` takes them. With runs only, ``images`` is needed for layers
        inside a block alone.
    annotations : folder of images and masks, as ``netgloss evaluate --annotations``: adds the dissection.
    dictionaries : by name, dictionaries made elsewhere (``comparison/foreign.py``): files, folders, or in Python an
        overcomplete model.
    controls : by name, classifiers of the same architecture with other weights (trained on shuffled labels, say): each
        method is fitted there too, and what it scores stands beside.
    num_concepts, configs : number of concepts of every method that is free to choose, and more options by method.
    without : methods that are left out, with the reason that the table gives.

    Returns
    -------
    The comparison: ``.record`` (what comparison.json holds), ``.to_csv()``, ``.to_html()``.

    Raises
    ------
    UserError : nothing to compare; runs of different stores or layers; a store that is gone.
    """
    progress = progress or Silent()
    options = options or CompareOptions()
    if controls and options.network_images == 0:
        raise UserError("control networks need images: say how many by --network-images (network_images)")
    faithfulness = faithfulness or FaithfulnessOptions()
    fabric = make_fabric(device)
    check_named(configs or {}, without or {}, num_concepts)
    out = Path(out)
    opened = [run if isinstance(run, Run) else Run(run) for run in runs]
    source = open_sources(images, eval_images) if images is not None else None
    started = time.perf_counter()
    if methods or (dictionaries and not opened):
        given, layer, source = _need_model(model, layer, source)
        classifier = _classifier(given).to(fabric.device)
        place = Path(store) if store is not None else out / "activations.zarr"
        captured = capture(
            classifier,
            source,
            _layers(place, classifier, layer, method_list(methods) if methods else [], configs or {}, num_concepts),
            place,
            options=capture_options,
            info=store_info(classifier, source),
            progress=progress,
        )
    elif opened:
        first = opened[0]
        layer = layer or first.layer
        captured = Store.open(store if store is not None else first.store)
        captured.require_complete()
        classifier = (_classifier(model) if model is not None else first.classifier()).to(fabric.device)
    else:
        raise UserError("nothing to compare: name run folders, --methods (all, or nmf,pca,...) or --dictionary")
    assert layer is not None
    _check_same(opened, captured, layer, classifier, source)
    entries = [_of_run(run) for run in opened]
    if methods:
        assert source is not None
        entries += fit_all(
            method_list(methods),
            captured,
            layer,
            out / "runs",
            configs=configs or {},
            num_concepts=num_concepts,
            seeds=seeds,
            without=without or {},
            fabric=fabric,
            classifier=classifier,
            source=source,
            command=command,
            progress=progress,
        )
    fit_images, heldout = split_store(captured)
    warnings = []
    judged = heldout
    if len(judged) == 0:
        judged = fit_images
        warnings.append("too few images to hold any out: the scores are measured on the images of the fit")
    if options.max_images is not None and len(judged) > options.max_images:
        judged = np.sort(np.random.default_rng(0).choice(judged, size=options.max_images, replace=False))
    stream = ActivationStream(captured, layer, fit_images)
    if dictionaries:
        from netgloss.evaluation.foreign import foreign_entries

        spec = stream.spec(num_classes=len(classifier.class_names), image=classifier.input_shape)
        entries += foreign_entries(dictionaries, captured, spec, progress)
    if entries and all(entry.reason for entry in entries):
        told = "; ".join(f"{entry.name}: {entry.reason}" for entry in entries)
        raise UserError(f"nothing is left to compare: {told}")
    entries = _unique(entries)
    bench = Bench(
        captured,
        layer,
        classifier,
        source,
        make_tail(classifier, layer, source),
        judged,
        out / "measured",
        faithfulness,
        _annotated(annotations, classifier, layer, source, out, options, progress) if annotations else None,
        progress,
    )
    measure_entries(bench, entries, fit_images)
    networks = {} if options.network_images == 0 else {UNTRAINED: classifier.untrained(seed=0), **(controls or {})}
    for name, network in networks.items():
        if source is None:
            raise UserError("control networks need the images: say --images")
        measure_network(name, network, source, bench, entries, out, options.network_images, fabric, progress)
    questions = ["scores", "faithfulness", *(["dissection"] if bench.annotated else [])]
    record: dict[str, Any] = {
        "format_version": 1,
        "command": command,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "model": captured.info.model,
        "layer": layer,
        "layer_shape": list(captured.shapes[layer]),
        "data": {**captured.info.images, "fingerprint": captured.key.data_fingerprint, "num_images": len(captured)},
        "num_fit": len(fit_images),
        "num_judged": len(judged),
        "num_faithfulness": len(bench.importance_images) + len(bench.deletion_images),
        "num_importances": len(bench.importance_images),
        "annotations": annotations,
        "store_address": captured.key.address,
        "options": {**dataclasses.asdict(options), "faithfulness": dataclasses.asdict(faithfulness)},
        "tail": {"mode": bench.tail.mode, "affine": bench.affine, "reason": bench.tail.reason},
        "control_networks": {name: about_network(name, network) for name, network in networks.items()},
        "warnings": warnings,
        "methods": [entry.about() for entry in entries],
    }
    images_of = {question: bench.images_of(question) for question in questions}  # type: ignore[arg-type]
    record |= score_entries(entries, images_of, f"{options.on_rate:g}")
    record["seconds"] = round(time.perf_counter() - started, 1)
    return Comparison(record).write(out)


def _need_model(model: Any, layer: str | None, source: ImageSource | None) -> tuple[Any, str, ImageSource]:
    missing = [name for name, value in (("model", model), ("layer", layer), ("images", source)) if not value]
    if missing or model is None or layer is None or source is None:
        raise UserError(f"a sweep over methods needs {', '.join('--' + name for name in missing)}")
    return model, layer, source


def _layers(
    place: Path, classifier: Classifier, layer: str, methods: Sequence[str], configs: Configs, num_concepts: int
) -> list[str]:
    """The layers to capture: those of a store that holds the layer, else the layer and those that methods rebuild."""
    held = Store.open(place).layers if place.exists() else []
    if classifier.check_layer(layer) in held:
        return held
    wanted = [layer]
    for method in methods:
        try:
            cls = find_explainer(method)
            wanted += upper_layers(cls, config_of(method, configs, num_concepts), classifier, layer)
        except UserError:
            continue  # the fit says why
    return list(dict.fromkeys(wanted))


def _classifier(model: Any) -> Classifier:
    from netgloss.classifiers import Classifier, load_classifier

    return model if isinstance(model, Classifier) else load_classifier(model)


def _check_same(
    runs: Sequence[Run], store: Store, layer: str, classifier: Classifier, source: ImageSource | None
) -> None:
    for run in runs:
        if run.layer != layer:
            raise UserError(f"{run.path} explains layer {run.layer!r}, not {layer!r}: only one layer can be compared")
        if run.manifest["store_address"] != store.key.address:
            raise UserError(
                f"{run.path} was fitted on other activations than {store.path} holds (another network, other images "
                "or another dtype): only runs of one store can be compared; fit them on one (netgloss fit --store)"
            )
    check_origin(store, classifier=classifier, source=source)
    if store.is_subsampled(layer):
        raise UserError(f"layer {layer!r} was captured with --positions; a comparison needs whole maps")


def _of_run(run: Run) -> Entry:
    entry = Entry(run.path.name, run.method)
    fill(entry, run)
    return entry


def _unique(entries: list[Entry]) -> list[Entry]:
    """Entries with names that tell them apart."""
    seen: dict[str, int] = {}
    for entry in entries:
        seen[entry.name] = seen.get(entry.name, 0) + 1
        if seen[entry.name] > 1:
            entry.name = f"{entry.name}-{seen[entry.name]}"
    return entries


def _annotated(
    annotations: str,
    classifier: Classifier,
    layer: str,
    source: ImageSource | None,
    out: Path,
    options: CompareOptions,
    progress: Progress,
) -> Annotated:
    from netgloss.activations.annotated import MaskedLayer, split_annotated
    from netgloss.workflows.annotate import open_annotated

    pictures = open_annotated(annotations, source)
    captured = capture(
        classifier,
        pictures,
        [layer],
        out / "annotated.zarr",
        options=CaptureOptions(logits=False),
        info=store_info(classifier, pictures),
        progress=progress,
    )
    data = MaskedLayer(captured, layer, pictures, classifier.preprocessing)
    label, score = split_annotated(data)
    return Annotated(data, label, score, captured.key.address, f"rate:{options.on_rate:g}")

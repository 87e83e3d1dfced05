"""Compare: every metric on every method, on one layer of one network, over the same held-out images.

:func:`compare` takes fitted runs of one store, or makes the whole sweep itself: one capture, one fit per method and
seed, one set of controls. What it writes into its folder::

    comparison.html, .csv, .json    the table, with intervals, controls, verdicts, differences and definitions
    activations.zarr                the store (of a sweep; or where ``options.store`` says)
    runs/<method>/                  the fitted methods (of a sweep)
    measured/                       results measured so far, by the hash of what they depend on
    networks/<name>/                stores and runs of control networks (untrained, ...)

Everything in it is made once: the same command continues an interrupted comparison, and adding a method measures that
method only.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from netgloss.activations import CaptureOptions, Store, capture
from netgloss.activations.annotated import MaskedLayer, split_annotated
from netgloss.activations.layer import check_origin, make_tail
from netgloss.classifiers import Classifier, load_classifier
from netgloss.data.sources import open_sources
from netgloss.errors import UserError
from netgloss.evaluation.context import Annotated, EvaluationContext
from netgloss.evaluation.faithful import FaithfulnessOptions
from netgloss.evaluation.foreign import foreign_subjects
from netgloss.evaluation.judge import evaluate_subjects, reason_of
from netgloss.evaluation.scores import comparison_parts
from netgloss.evaluation.subjects import Subject
from netgloss.explainers.base import ExplainerConfig
from netgloss.explainers.names import explainer_names, find_explainer
from netgloss.report import write_comparison
from netgloss.runs.comparison import Comparison
from netgloss.runs.run import Run, versions
from netgloss.training.execution import Execution
from netgloss.training.inputs import upper_layers
from netgloss.trust import code_file
from netgloss.workflows.annotate import open_annotated
from netgloss.workflows.capture import store_info
from netgloss.workflows.control_networks import UNTRAINED, add_network, describe_network
from netgloss.workflows.evaluate import check_image_counts, choose_images
from netgloss.workflows.fit import fit
from netgloss.workflows.rehearsal import Failed, Rehearsal, lacks_gradient, rehearse, unmatched_classes

if TYPE_CHECKING:
    from torch import nn

    from netgloss.data import ImageSource

CONTROLS = ("random-directions", "natural-axes")
"""Methods that are listed as controls."""
Configs = Mapping[str, ExplainerConfig | Mapping[str, Any]]


@dataclass(frozen=True)
class CompareOptions:
    """What a comparison compares besides runs, and what it measures.

    Parameters
    ----------
    num_concepts, configs : number of concepts of every method that is free to choose, and more options by method.
    without : methods that are left out, with the reason that the table gives.
    annotations : folder of images and masks, as for :func:`netgloss.annotate`: adds the dissection.
    dictionaries : by name, dictionaries made elsewhere (``evaluation/foreign.py``): files, folders, or modules.
    controls : by name, classifiers of the same architecture with other weights (trained on shuffled labels, say): each
        method is fitted there too, and its scores are baselines.
    max_images : evaluate on at most this many held-out images.
    network_images : images for each control network (the untrained one, and ``controls``); 0 leaves them out.
    on_rate : share of positions where every concept counts as on, in the dissection.
    faithfulness : how many images concepts are deleted on.
    store : where the activations are, or go; default inside ``out``.
    rehearsal : before a sweep, try every stage and method on four images (``workflows/rehearsal.py``). It changes no
        result.
    """

    num_concepts: int = 32
    configs: Configs = field(default_factory=dict)
    without: Mapping[str, str] = field(default_factory=dict)
    annotations: str | None = None
    dictionaries: Mapping[str, Any] = field(default_factory=dict)
    controls: Mapping[str, Classifier] = field(default_factory=dict)
    max_images: int | None = None
    network_images: int = 0
    on_rate: float = 0.005
    faithfulness: FaithfulnessOptions = field(default_factory=FaithfulnessOptions)
    store: str | Path | None = None
    capture: CaptureOptions | None = None
    rehearsal: bool = True

    def __post_init__(self) -> None:
        check_image_counts(max_images=self.max_images, network_images=self.network_images)
        if not 0 < self.on_rate < 1:
            raise UserError(f"on_rate must lie between 0 and 1, got {self.on_rate:g}")
        if self.controls and self.network_images == 0:
            raise UserError("control networks need images: say how many by --network-images (network_images)")
        for method in self.without:
            find_explainer(method)
        for method in self.configs:
            self.config_of(method)

    def config_of(self, method: str) -> ExplainerConfig:
        """The config of a method: its own, or the fields given for it, with ``num_concepts`` where it is free.

        Raises
        ------
        UserError : an option that the method does not have.
        """
        given = self.configs.get(method, {})
        cls = find_explainer(method)
        if isinstance(given, ExplainerConfig):
            return given
        fields: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(cls.Config)}
        unknown = sorted(set(given) - set(fields))
        if unknown:
            raise UserError(f"{method} has no option {', '.join(unknown)}; it has {', '.join(fields)}")
        values = dict(given)
        of_classes = bool({"logits", "labels"} & set(cls.uses))  # so many concepts a class
        free = fields["num_concepts"] != 0 and not of_classes  # 0: the data decide
        if free:
            values.setdefault("num_concepts", self.num_concepts)
            for name in ("top_k", "target_l0"):
                if name in fields and name not in values:
                    values[name] = type(fields[name])(min(fields[name], max(1, self.num_concepts // 2)))
        try:
            return cls.Config(**values)
        except TypeError as error:  # a word where a number belongs
            said = ", ".join(f"{name}={value!r}" for name, value in given.items())
            raise UserError(f"{method} cannot take {said}: {error}") from error

    def record(self) -> dict[str, Any]:
        """What ``comparison.json`` records of the options."""
        measured = {name: getattr(self, name) for name in ("max_images", "network_images", "on_rate")}
        return {**measured, "faithfulness": dataclasses.asdict(self.faithfulness)}


def compare(
    runs: Sequence[Run | str | Path] = (),
    *,
    out: str | Path,
    methods: str | Sequence[str] = (),
    model: Classifier | str | nn.Module | None = None,
    layer: str | None = None,
    images: ImageSource | str | Path | None = None,
    eval_images: ImageSource | str | Path | None = None,
    seeds: int | Sequence[int] = 3,
    device: str | Execution = "auto",
    options: CompareOptions | None = None,
    **fields: Any,
) -> Comparison:
    """Every metric on every method, with intervals, controls and paired differences; written to ``out``.

    Parameters
    ----------
    runs : fitted runs of one store and layer, compared without fitting them again. With ``methods``, the sweep joins
        them.
    methods : "all", names, or ``path/to/file.py:Class``: fitted here, on ``layer`` of ``model`` over ``images``. A
        method that refuses the layer is listed with its reason.
    images, eval_images, model : as for :func:`netgloss.explain`. For runs alone, ``images`` is needed only for layers
        inside a block.
    seeds : number of fits per method, or which seeds.
    device : a device, or an :class:`~netgloss.Execution`.
    fields : fields of ``options`` by name (``num_concepts=32``).

    Returns
    -------
    The comparison: ``.record`` (the content of comparison.json), ``.to_csv()``.

    Raises
    ------
    UserError : nothing to compare; runs of different stores or layers; a store that is gone.
    """
    unknown = sorted(set(fields) - {f.name for f in dataclasses.fields(CompareOptions)})
    if unknown:
        raise UserError(f"compare has no option {', '.join(unknown)}")
    options = dataclasses.replace(options or CompareOptions(), **fields)
    execution, out = Execution.of(device), Path(out)
    started = time.perf_counter()
    opened = [run if isinstance(run, Run) else Run(run) for run in runs]
    source = open_sources(images, eval_images) if images is not None else None
    names = method_list(methods) if methods else []
    if options.annotations:
        open_annotated(options.annotations, source)  # a wrong path must not end the comparison after the fits
    if names or (options.dictionaries and not opened):
        classifier, layer, store = _captured(model, layer, source, out, names, options, execution)
    elif opened:
        layer = layer or opened[0].layer
        store = Store.open(options.store if options.store is not None else opened[0].store)
        store.require_complete()
        classifier = (_load(model) if model is not None else opened[0].classifier()).to(execution.torch_device)
    else:
        raise UserError("nothing to compare: name run folders, --methods (all, or nmf,pca,...) or --dictionary")
    _check_same(opened, store, layer, classifier, source)
    subjects = [Subject.of_run(run) for run in opened]
    if names:
        assert source is not None
        subjects += _fit_methods(names, store, layer, out / "runs", seeds, classifier, source, options, execution)
    fit_images, _, judged, warnings = choose_images(store, options.max_images)
    annotated = None
    if options.annotations:
        annotated = _annotated(options, classifier, layer, source, out, execution)
    context = EvaluationContext(
        store,
        layer,
        classifier,
        source,
        make_tail(classifier, layer, source),
        fit_images,
        judged,
        out / "measured",
        options.faithfulness,
        annotated,
        progress=execution.shown,
    )
    if options.dictionaries:
        spec = context.stream(False).spec(num_classes=len(classifier.class_names), image=classifier.input_shape)
        subjects += foreign_subjects(options.dictionaries, store, spec, execution.shown)
    if subjects and all(subject.reason for subject in subjects):
        reasons = "; ".join(f"{subject.name}: {subject.reason}" for subject in subjects)
        raise UserError(f"nothing is left to compare: {reasons}")
    _make_unique(subjects)
    evaluate_subjects(context, subjects)
    networks = {} if options.network_images == 0 else {UNTRAINED: classifier.untrained(seed=0), **options.controls}
    for name, network in networks.items():
        if source is None:
            raise UserError("control networks need the images: say --images")
        add_network(name, network, context, subjects, out, options.network_images, execution)
    record = {
        **_record(context, options, execution.command),
        "control_networks": {name: describe_network(name, network) for name, network in networks.items()},
        "warnings": [*warnings, *context.notes],
        "methods": [subject.record() for subject in subjects],
    }
    questions = ["scores", "faithfulness", *(["dissection"] if annotated else [])]
    images_of = {question: context.images_of(question) for question in questions}
    record |= comparison_parts(subjects, images_of, f"{options.on_rate:g}", classifier.outputs)
    record["seconds"] = round(time.perf_counter() - started, 1)
    return write_comparison(Comparison(record), out)


def method_list(methods: str | Sequence[str]) -> list[str]:
    """Methods by name or ``path/to/file.py:Class``; "all" stands for every built-in one, controls last.

    Raises
    ------
    UserError : no method, or a name that is none.
    """
    given = methods.split(",") if isinstance(methods, str) else list(methods)
    names: dict[str, None] = {}
    for name in (part.strip() for part in given):
        if name and name != "all":
            find_explainer(name)
        built_in = sorted(explainer_names(), key=lambda known: (known in CONTROLS, known))
        names |= dict.fromkeys(built_in if name == "all" else [name] if name else [])
    if not names:
        raise UserError("compare needs at least one method (--methods all, or --methods nmf,pca)")
    return list(names)


def _record(context: EvaluationContext, options: CompareOptions, command: str) -> dict[str, Any]:
    """The head of ``comparison.json``: what was compared, on what."""
    store = context.store
    return {
        "format_version": 1,
        "command": command,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "model": store.info.model,
        "layer": context.name,
        "layer_shape": list(store.shapes[context.name]),
        "data": {**store.info.images, "fingerprint": store.key.data_fingerprint, "num_images": len(store)},
        "num_fit": len(context.fit_images),
        "num_judged": len(context.images),
        "num_faithfulness": len(context.importance_images) + len(context.deletion_images),
        "num_importances": len(context.importance_images),
        "annotations": options.annotations,
        "store_address": store.key.address,
        "options": options.record(),
        "tail": {"mode": context.tail.mode, "affine": context.affine, "reason": context.tail.reason},
    }


# -- what is compared -------------------------------------------------------------------------------------------------


def _captured(
    model: Any,
    layer: str | None,
    source: ImageSource | None,
    out: Path,
    methods: Sequence[str],
    options: CompareOptions,
    execution: Execution,
) -> tuple[Classifier, str, Store]:
    """The classifier, its layer, and the store of the sweep, captured if need be."""
    missing = [name for name, value in (("model", model), ("layer", layer), ("images", source)) if not value]
    if missing or model is None or layer is None or source is None:
        raise UserError(f"a sweep over methods needs {', '.join('--' + name for name in missing)}")
    classifier = _load(model).to(execution.torch_device)
    place = Path(options.store) if options.store is not None else out / "activations.zarr"
    held = Store.open(place).layers if place.exists() else []
    layers = held if classifier.check_layer(layer) in held else [layer]
    for method in methods if layers is not held else ():
        try:
            layers += upper_layers(find_explainer(method), options.config_of(method), classifier, layer)
        except UserError:
            continue  # the fit says why
    if options.rehearsal and execution.fabric.world_size == 1:
        _rehearse(methods, classifier, layer, source, out, options, execution)
    store = capture(
        classifier,
        source,
        list(dict.fromkeys(layers)),
        place,
        options=options.capture,
        info=store_info(classifier, source),
        progress=execution.shown,
    )
    return classifier, layer, store


def _rehearse(
    methods: Sequence[str],
    classifier: Classifier,
    layer: str,
    source: ImageSource,
    out: Path,
    options: CompareOptions,
    execution: Execution,
) -> None:
    """Tries the methods that are not fitted yet on four images, and says which of them will be left out."""
    label_of = dict(zip(methods, _labels(methods), strict=True))
    todo = {
        method: options.config_of(method)
        for method, label in label_of.items()
        if method not in options.without
        and find_explainer(method).target != "image"
        and not (out / "runs" / label / "explainer.safetensors").exists()
    }
    if not todo:
        return

    def act(rehearsal: Rehearsal) -> dict[str, Failed]:
        failures: dict[str, Failed] = {}
        subjects: dict[str, Subject] = {}
        for method, config in todo.items():
            try:
                subject = Subject(label_of[method], method, kind="control" if method in CONTROLS else "method")
                subject.read(rehearsal.fit(method, config, subject.name))
            except Failed as failed:
                failures[method] = failed
            else:
                subjects[method] = subject
        if subjects:
            _rehearse_evaluation(rehearsal, list(subjects.values()), options)
        reasons = {method: subject.reason for method, subject in subjects.items() if subject.reason}
        failures |= {method: Failed("evaluate", UserError(reason)) for method, reason in reasons.items()}
        return failures

    unmatched = unmatched_classes(classifier, source)
    if unmatched:
        execution.shown.say(unmatched)
    given: dict[str, Any] = {"options": options.capture or CaptureOptions(), "execution": execution}
    for method, reason in rehearse(classifier, layer, source, todo, act, **given).items():
        execution.shown.say(f"{label_of[method]}: will be left out: {reason}")


def _rehearse_evaluation(rehearsal: Rehearsal, subjects: list[Subject], options: CompareOptions) -> None:
    """All metrics and the page, of methods that were fitted on few images."""
    classifier, layer, store = rehearsal.classifier, rehearsal.layer, rehearsal.store
    few = dataclasses.replace(
        options.faithfulness,
        images=min(options.faithfulness.images, 2),
        importance_images=min(options.faithfulness.importance_images, 1),
        steps=2,
        shapley_pairs=2,
        sobol_points=2,
        fits=1,
    )
    with rehearsal.stage("evaluate"):
        fit_images, _, images, warnings = choose_images(store, None)
        tail = make_tail(classifier, layer, rehearsal.source)
        given: dict[str, Any] = {"faithfulness": few, "progress": rehearsal.watch}
        context = EvaluationContext(store, layer, classifier, rehearsal.source, tail, fit_images, images, **given)
        evaluate_subjects(context, subjects)
        for subject in subjects:
            notes = [note for note in subject.notes if note.startswith("faithfulness could not") and not subject.reason]
            if notes and lacks_gradient(notes[0]):  # which holds for all methods
                raise RuntimeError(f"--faithfulness-images 0 leaves it out; {notes[0]}")
    with rehearsal.stage("page"):
        networks: dict[str, Any] = {}
        head = _record(context, options, "") | {"control_networks": networks, "warnings": warnings, "seconds": 0.0}
        record = {**head, "methods": [subject.record() for subject in subjects]}
        images_of = {question: context.images_of(question) for question in ("scores", "faithfulness")}
        record |= comparison_parts(subjects, images_of, f"{options.on_rate:g}", classifier.outputs)
        write_comparison(Comparison(record), rehearsal.folder / "comparison")


def _load(model: Any) -> Classifier:
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


def _fit_methods(
    methods: Sequence[str],
    store: Store,
    layer: str,
    folder: Path,
    seeds: int | Sequence[int],
    classifier: Classifier,
    source: ImageSource,
    options: CompareOptions,
    execution: Execution,
) -> list[Subject]:
    """One run folder per method below ``folder``; those that exist already are only read. A method that cannot be
    fitted gets the reason.
    """
    subjects = []
    for method, label in zip(methods, _labels(methods), strict=True):
        subject = Subject(label, method, kind="control" if method in CONTROLS else "method")
        subjects.append(subject)
        if method in options.without:
            subject.reason = options.without[method]
            continue
        try:
            if find_explainer(method).target == "image":
                raise UserError("it decodes into images: netgloss evaluate scores it, by metrics of its own")
            run = fit(
                method,
                store,
                layer,
                folder / label,
                config=options.config_of(method),
                seeds=seeds,
                device=execution,
                classifier=classifier,
                source=source,
            )
            subject.read(run)
        except Exception as error:
            if isinstance(error, UserError) and "choose another --out" in str(error):
                raise
            subject.reason = reason_of(error)
            execution.shown.say(f"{label}: left out: {subject.reason}")
    return subjects


def _labels(methods: Sequence[str]) -> list[str]:
    """A short, unique, file-safe name per method."""
    labels: list[str] = []
    for method in methods:
        label = method
        if ".py" in method:
            file, name = code_file(method)
            label = name or Path(file).stem
        label = re.sub(r"[^\w.-]+", "-", label).strip("-.") or "method"
        same = sum(other == label or other.startswith(f"{label}-") for other in labels)
        labels.append(f"{label}-{same + 1}" if label in labels else label)
    return labels


def _make_unique(subjects: Sequence[Subject]) -> None:
    """Gives subjects of the same name numbers."""
    seen: dict[str, int] = {}
    for subject in subjects:
        seen[subject.name] = seen.get(subject.name, 0) + 1
        if seen[subject.name] > 1:
            subject.name = f"{subject.name}-{seen[subject.name]}"


def _annotated(
    options: CompareOptions,
    classifier: Classifier,
    layer: str,
    source: ImageSource | None,
    out: Path,
    execution: Execution,
) -> Annotated:
    assert options.annotations is not None
    pictures = open_annotated(options.annotations, source)
    store = capture(
        classifier,
        pictures,
        [layer],
        out / "annotated.zarr",
        options=CaptureOptions(logits=False),
        info=store_info(classifier, pictures),
        progress=execution.shown,
    )
    data = MaskedLayer(store, layer, pictures, classifier.preprocessing)
    label, score = split_annotated(data)
    return Annotated(data, label, score, store.key.address, f"rate:{options.on_rate:g}")

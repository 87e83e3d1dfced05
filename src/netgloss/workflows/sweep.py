"""Fits every method on one store, and lists with its reason each one that could not be."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from netgloss.errors import UserError
from netgloss.evaluation.judge import reason_of
from netgloss.evaluation.result import Entry
from netgloss.explainers.base import ExplainerConfig
from netgloss.explainers.names import explainer_names, find_explainer
from netgloss.progress import Progress
from netgloss.runs.run import Run
from netgloss.workflows.fit import fit_run

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from netgloss.activations import Store
    from netgloss.classifiers import Classifier
    from netgloss.data import ImageSource

CONTROLS = ("random-directions", "natural-axes")

Configs = Mapping[str, ExplainerConfig | Mapping[str, Any]]


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


def config_of(method: str, configs: Configs, num_concepts: int) -> ExplainerConfig:
    """The config of a method: its own, or the fields given for it, with ``num_concepts`` where it is free to choose."""
    given = configs.get(method, {})
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
        values.setdefault("num_concepts", num_concepts)
        for name in ("top_k", "target_l0"):
            if name in fields and name not in values:
                values[name] = type(fields[name])(min(fields[name], max(1, num_concepts // 2)))
    try:
        return cls.Config(**values)
    except TypeError as error:  # a word where a number belongs
        said = ", ".join(f"{name}={value!r}" for name, value in given.items())
        raise UserError(f"{method} cannot take {said}: {error}") from error


def check_named(configs: Configs, without: Mapping[str, str], num_concepts: int) -> None:
    """Raises :class:`UserError` for options or reasons of a method that does not exist, and for options that a method
    does not have: before any work, not as a method that is left out."""
    for method in without:
        find_explainer(method)
    for method in configs:
        config_of(method, configs, num_concepts)


def fit_all(
    methods: Sequence[str],
    store: Store,
    layer: str,
    folder: Path,
    *,
    configs: Configs,
    num_concepts: int,
    seeds: int | Sequence[int],
    without: Mapping[str, str],
    fabric: Fabric,
    classifier: Classifier,
    source: ImageSource,
    command: str,
    progress: Progress,
) -> list[Entry]:
    """One run folder a method below ``folder``; those that are there already are only read."""
    entries = []
    labels = _labels(methods)
    for method, label in zip(methods, labels, strict=True):
        entry = Entry(label, method, kind="control" if method in CONTROLS else "method")
        entries.append(entry)
        if method in without:
            entry.reason = without[method]
            continue
        try:
            if find_explainer(method).target == "image":
                raise UserError("it decodes into images: netgloss evaluate scores it, by metrics of its own")
            config = config_of(method, configs, num_concepts)
            run = fit_run(
                method,
                store,
                layer,
                folder / label,
                config=config,
                seeds=seeds,
                fabric=fabric,
                classifier=classifier,
                source=source,
                command=command,
                progress=progress,
            )
            fill(entry, run)
        except Exception as error:
            if isinstance(error, UserError) and "choose another --out" in str(error):
                raise
            entry.reason = reason_of(error)
            progress.say(f"{label}: left out: {entry.reason}")
    return entries


def fill(entry: Entry, run: Run) -> None:
    """Reads a fitted run into its row; a method that does not depend on the seed counts once."""
    explainers = run.explainers()
    if explainers[0].deterministic:
        explainers = explainers[:1]
    entry.explainers, entry.seeds = explainers, run.seeds[: len(explainers)]
    entry.method, entry.config, entry.run = run.method, run.manifest["config"], run.path.name
    times = [seconds for name, seconds in run.manifest.get("times", {}).items() if name.startswith("fit seed")]
    entry.seconds = round(sum(times), 2) if times else None
    entry.notes = list(dict.fromkeys(note for e in explainers for note in getattr(e, "notes", [])))


def _labels(methods: Sequence[str]) -> list[str]:
    """A short, unique, file-safe name a method."""
    found: list[str] = []
    for method in methods:
        label = method
        if ".py" in method:
            file, _, name = method.partition(":")
            label = name or Path(file).stem
        label = re.sub(r"[^\w.-]+", "-", label).strip("-.") or "method"
        same = sum(other == label or other.startswith(f"{label}-") for other in found)
        found.append(f"{label}-{same + 1}" if label in found else label)
    return found

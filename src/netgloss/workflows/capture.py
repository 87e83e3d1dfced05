"""Capture: the activations of a network for all images, by one or several processes, into one store."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from netgloss.activations import CaptureOptions, Store, StoreInfo, capture, prepare_store
from netgloss.activations.capture import Check, origin
from netgloss.class_names import compare_classes
from netgloss.errors import one_line
from netgloss.processes import first_then_others, together
from netgloss.runs.run import versions
from netgloss.training.execution import Execution

if TYPE_CHECKING:
    from netgloss.classifiers import Classifier
    from netgloss.data import ImageSource


def store_info(classifier: Classifier, source: ImageSource) -> StoreInfo:
    """What a store records of its origin, and the versions that it was made with."""
    return dataclasses.replace(origin(classifier, source), created_with=versions())


def _say_what_is_read(classifier: Classifier, source: ImageSource, execution: Execution) -> None:
    """What was passed over, and which of the images' classes the network knows."""
    for note in (*classifier.notes, *source.notes):
        execution.shown.say(f"note: {one_line(note)}")
    if source.class_names and classifier.outputs not in ("multilabel", "none"):
        execution.shown.say(compare_classes(source.class_names, classifier.class_names, classifier.wnids).line)


def capture_store(
    classifier: Classifier,
    source: ImageSource,
    layers: Sequence[str],
    out: str | Path,
    *,
    options: CaptureOptions | None = None,
    check: Check | None = None,
    device: str | Execution = "auto",
) -> Store:
    """Captures into one store by all processes of an execution; complete when it returns.

    The store is the same, byte for byte, whatever the number of processes. ``check`` sees every batch, as in
    :func:`netgloss.capture`.

    Raises
    ------
    UserError : see :func:`netgloss.capture`; in every process.
    """
    execution = Execution.of(device)
    fabric = execution.fabric
    _say_what_is_read(classifier, source, execution)
    given: dict[str, Any] = {
        "options": options,
        "info": store_info(classifier, source),
        "progress": execution.shown,
    }
    first_then_others(
        fabric,
        lambda: prepare_store(classifier, source, layers, out, **given),
        lambda: Store.open(out),
    )
    given |= {"check": check, "rank": fabric.global_rank, "world": fabric.world_size}
    return together(fabric, lambda: capture(classifier, source, layers, out, **given))

"""Capture: the activations of a network for all images, by one or several processes, into one store."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from netgloss.activations import CaptureOptions, Store, StoreInfo, capture, prepare_store
from netgloss.activations.capture import origin
from netgloss.processes import first_then_others, together
from netgloss.progress import Progress
from netgloss.runs.run import versions

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from netgloss.classifiers import Classifier
    from netgloss.data import ImageSource


def store_info(classifier: Classifier, source: ImageSource) -> StoreInfo:
    """What a store remembers of its origin, and with which versions it was made."""
    return dataclasses.replace(origin(classifier, source), created_with=versions())


def shared_capture(
    fabric: Fabric,
    classifier: Classifier,
    source: ImageSource,
    layers: Sequence[str],
    out: str | Path,
    *,
    options: CaptureOptions | None = None,
    progress: Progress | None = None,
) -> Store:
    """Captures into one store by all processes of a launched ``fabric``; complete when it returns.

    The store is the same, byte for byte, whatever the number of processes.
    """
    what: dict[str, Any] = {"options": options, "info": store_info(classifier, source), "progress": progress}
    first_then_others(
        fabric,
        lambda: prepare_store(classifier, source, layers, out, **what),
        lambda: Store.open(out),
    )
    rank, world = fabric.global_rank, fabric.world_size
    return together(fabric, lambda: capture(classifier, source, layers, out, rank=rank, world=world, **what))

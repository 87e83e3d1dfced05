"""Where the affinity of the probe set's classes comes from, as the command line says it."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from netgloss.adversarial.pixels import LabelledPixels
from netgloss.errors import UserError
from netgloss.metrics.consistency.affinity import class_affinity
from netgloss.metrics.consistency.taxonomy import CLOSURE

if TYPE_CHECKING:
    from netgloss.classifiers import Classifier

SHIPPED = ("cifar10", "imagenet1k")
"""Lists of WordNet ids that come with netgloss, in the order of the classes."""


@dataclass(frozen=True)
class AffinityChoice:
    """Where the affinity of classes comes from; the first that is given, else the classifier's WordNet ids, else the
    class names if they are WordNet ids, else the identity.
    """

    affinity: Path | None = None
    """Matrix of classes by classes (.npy or .csv)."""
    taxonomy: Path | None = None
    """Hierarchy of the class names (JSON or CSV)."""
    wnids: str | None = None
    """WordNet 3.0 ids: a text file, one per line in the order of the classes or "name TAB wnid"; or cifar10
    or imagenet1k (shipped)."""
    groups: Path | None = None
    """JSON of class name to coarse group."""
    data_noun: Path | None = None
    """The data.noun of WordNet 3.0, for ids beyond ImageNet-1k and CIFAR-10."""
    kernel: Literal["gauss", "exp", "path", "identity"] = "gauss"
    """From distances to affinities."""

    def build(self, classifier: Classifier, data: LabelledPixels) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """A by each kernel (``chosen``, ``gauss``, ``exp``, ``identity``), and where it comes from."""
        options: dict[str, Any] = {"data_noun": self.data_noun}
        wnids = None if self.wnids is None else _read_wnids(self.wnids, data.class_names)
        if self.affinity is not None:
            options["matrix"] = self.affinity
        elif self.taxonomy is not None:
            options["taxonomy"] = self.taxonomy
        elif wnids is not None:
            options["wnids"] = wnids
        elif self.groups is not None:
            options["groups"] = _read_groups(self.groups)
        elif classifier.wnids is not None:
            options["wnids"] = [classifier.wnids[c] for c in data.net_classes.tolist()]
        elif all(len(n) == 9 and n[0] == "n" and n[1:].isdigit() for n in data.class_names):
            options["wnids"] = list(data.class_names)
        tables: dict[str, np.ndarray] = {}
        provenance: dict[str, Any] = {}
        for name in dict.fromkeys([str(self.kernel), "gauss", "exp", "identity"]):
            tables[name], found = class_affinity(data.class_names, kernel=name, **options)
            provenance = provenance or found
        provenance["wnids"] = options.get("wnids")
        return {"chosen": tables[self.kernel], **tables}, provenance


def _read_wnids(spec: str, class_names: Sequence[str]) -> list[str] | dict[str, str]:
    path = CLOSURE.with_name(f"wnids_{spec}.txt") if spec in SHIPPED else Path(spec)
    try:
        rows = [row for row in csv.reader(path.read_text(encoding="utf-8").splitlines(), delimiter="\t") if row]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"WordNet ids {spec!r} cannot be read as a text file ({error})") from error
    if all(len(row) == 2 for row in rows):
        return {row[0]: row[1] for row in rows}
    ids = [row[0] for row in rows]
    if len(ids) != len(class_names):
        raise UserError(f"{spec} has {len(ids)} WordNet ids, the images have {len(class_names)} classes")
    return ids


def _read_groups(path: Path) -> dict[str, str | int]:
    try:
        groups = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"the coarse groups {path} cannot be read as JSON: {error}") from error
    if not isinstance(groups, dict) or not all(isinstance(v, str | int) for v in groups.values()):
        raise UserError(f"the coarse groups {path} must be a JSON object of class name to group")
    return groups

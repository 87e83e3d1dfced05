"""How similar two classes are: the matrix A (C, C) behind the consistency of a unit.

From a distance d in a hierarchy (``metrics/taxonomy.py``), by one of the kernels::

    gauss  exp(-d^2 / (2 * 2.7^2))      exp  exp(-d / 2.3)      path  1 / (1 + d)      identity  1 if d = 0 else 0

or straight from a user's matrix, coarse groups, or embeddings of the class names. A is symmetric with ones on its
diagonal and entries in [0, 1]. Which kernel the papers used is unknown; the widths were calibrated on the published
floor of ImageNet. Names of classes are never looked up in WordNet ("crane" is a bird and a machine): pass wnids.

Shape letters: C classes.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from netgloss.errors import UserError, unknown
from netgloss.metrics.consistency.taxonomy import Taxonomy, read_data_noun, read_taxonomy, wordnet

Matrix = NDArray[np.float64]
Unmapped = Literal["error", "identity"]

SIGMA = 2.7
KERNELS: dict[str, Callable[[Matrix], Matrix]] = {
    "gauss": lambda d: np.exp(-(d**2) / (2 * SIGMA**2)),
    "exp": lambda d: np.exp(-d / 2.3),
    "path": lambda d: 1 / (1 + d),
    "identity": lambda d: (d == 0).astype(np.float64),
}


def kernel_affinity(distances: Matrix, kernel: str = "gauss") -> Matrix:
    """A (C, C) from distances d (C, C)."""
    if kernel not in KERNELS:
        raise unknown("kernel", kernel, KERNELS)
    return KERNELS[kernel](np.asarray(distances, np.float64))


def class_affinity(
    classes: Sequence[str],
    *,
    matrix: str | Path | NDArray[Any] | None = None,
    taxonomy: str | Path | Taxonomy | None = None,
    wnids: Sequence[str | None] | Mapping[str, str] | None = None,
    data_noun: str | Path | None = None,
    groups: Mapping[str, str | int] | None = None,
    embeddings: NDArray[Any] | None = None,
    kernel: str = "gauss",
    unmapped: Unmapped = "error",
) -> tuple[Matrix, dict[str, Any]]:
    """The affinity of ``classes``, from the first of these sources that is given.

    Parameters
    ----------
    classes : C names, in the order of the labels.
    matrix : A itself (C, C), or a .npy or .csv file of it.
    taxonomy : a hierarchy whose nodes are the class names, or its JSON or CSV file (``read_taxonomy``).
    wnids : the WordNet 3.0 id of each class, in their order (None: not known) or by class name.
    data_noun : the ``data.noun`` of WordNet 3.0, for wnids beyond ImageNet-1k and CIFAR-10.
    groups : coarse group of each class by name: A = 1 for the same class, 0.5 for the same group, else 0.
    embeddings : (C, D) of the class names, not computed by the evaluated network: A = cosine, at least 0.
    kernel : from distances to A; sources other than 2 and 3 know no kernel but ``identity``.
    unmapped : classes that the source lacks are an ``"error"``, or get no affinity to any other (``"identity"``).

    Without any source A is the identity, marked "no semantics".

    Returns
    -------
    A (C, C) float64, and where it comes from: ``source, kernel, num_unmapped, unmapped, semantics``.

    Raises
    ------
    UserError : for a source that does not fit the classes.
    """
    if len(set(classes)) != len(classes) or not classes:
        raise UserError(f"the affinity needs at least one class and no class twice, got {len(classes)} classes")
    missing: list[str] = []
    if matrix is not None:
        source, affinity = "matrix", _checked(_read_matrix(matrix), len(classes))
    elif taxonomy is not None:
        tree = taxonomy if isinstance(taxonomy, Taxonomy) else read_taxonomy(taxonomy)
        known = tree.nodes
        nodes = [name if name in known else None for name in classes]
        source, (affinity, missing) = tree.source, _from_tree(tree, classes, nodes, kernel, unmapped)
    elif wnids is not None:
        tree = wordnet() if data_noun is None else read_data_noun(data_noun)
        source, (affinity, missing) = (
            tree.source,
            _from_tree(tree, classes, _by_class(classes, wnids), kernel, unmapped),
        )
    elif groups is not None:
        missing = [name for name in classes if name not in groups]
        _report(missing, classes, "the coarse groups", unmapped)
        of = np.array([f"g{groups[name]}" if name in groups else f"u{i}" for i, name in enumerate(classes)])
        source, affinity = "groups", np.where(of[:, None] == of, 0.5, 0.0)
        np.fill_diagonal(affinity, 1.0)
    elif embeddings is not None:
        source, affinity = "embeddings", _cosines(np.asarray(embeddings, np.float64), len(classes))
    else:
        source, affinity = "identity", np.eye(len(classes))
    if kernel == "identity":
        affinity = np.eye(len(classes))
    distances_used = matrix is None and (taxonomy is not None or wnids is not None)
    provenance = {
        "source": source,
        "kernel": kernel if distances_used or kernel == "identity" else None,
        "num_unmapped": len(missing),
        "unmapped": missing,
        "semantics": bool((affinity != np.eye(len(classes))).any()),
    }
    return affinity, provenance


def _from_tree(
    tree: Taxonomy, classes: Sequence[str], nodes: Sequence[str | None], kernel: str, unmapped: Unmapped
) -> tuple[Matrix, list[str]]:
    """A of the classes that have a node; the others are isolated."""
    here = np.array([i for i, node in enumerate(nodes) if node is not None], np.int64)
    missing = [name for name, node in zip(classes, nodes, strict=True) if node is None]
    _report(missing, classes, tree.source, unmapped)
    known = [node for node in nodes if node is not None]
    affinity = np.eye(len(classes))
    affinity[np.ix_(here, here)] = kernel_affinity(tree.distances(known), kernel)
    return affinity, missing


def _by_class(classes: Sequence[str], wnids: Sequence[str | None] | Mapping[str, str]) -> list[str | None]:
    if isinstance(wnids, Mapping):
        return [wnids.get(name) for name in classes]
    if len(wnids) != len(classes):
        raise UserError(f"{len(classes)} classes need as many wnids, got {len(wnids)}")
    return list(wnids)


def _report(missing: Sequence[str], classes: Sequence[str], source: str, unmapped: Unmapped) -> None:
    if unmapped not in ("error", "identity"):
        raise UserError(f'unmapped must be "error" or "identity", got {unmapped!r}')
    if missing and unmapped == "error":
        raise UserError(
            f"{len(missing)} of {len(classes)} classes are not in {source}: {', '.join(map(repr, missing[:8]))}"
            f'{" ..." if len(missing) > 8 else ""}; map them, or pass unmapped="identity"'
        )


def _read_matrix(matrix: str | Path | NDArray[Any]) -> Matrix:
    if not isinstance(matrix, str | Path):
        return np.asarray(matrix, np.float64)
    path = Path(matrix)
    try:
        if path.suffix.lower() == ".npy":
            return np.asarray(np.load(path, allow_pickle=False), np.float64)
        with open(path, newline="", encoding="utf-8") as lines:
            return np.array([[float(cell) for cell in row] for row in csv.reader(lines) if row])
    except (OSError, ValueError) as error:
        raise UserError(f"the affinity matrix {path} cannot be read as numbers (.npy or .csv): {error}") from error


def _checked(affinity: Matrix, classes: int) -> Matrix:
    if affinity.shape != (classes, classes):
        raise UserError(f"the affinity of {classes} classes must be ({classes}, {classes}), got {affinity.shape}")
    if not np.isfinite(affinity).all() or affinity.min() < 0 or affinity.max() > 1:
        raise UserError(f"affinities must lie in [0, 1], got {affinity.min():g} to {affinity.max():g}")
    if not np.allclose(affinity, affinity.T, rtol=0, atol=1e-9) or not np.allclose(affinity.diagonal(), 1):
        raise UserError("the affinity matrix must be symmetric with ones on its diagonal")
    return affinity


def _cosines(vectors: Matrix, classes: int) -> Matrix:
    if vectors.ndim != 2 or len(vectors) != classes:
        raise UserError(f"embeddings of {classes} classes must be ({classes}, D), got {vectors.shape}")
    norms = np.linalg.norm(vectors, axis=1)
    if not np.isfinite(norms).all() or not norms.all():
        raise UserError("embeddings must be finite and none of them zero")
    unit = vectors / norms[:, None]
    affinity = np.clip(unit @ unit.T, 0, 1)
    np.fill_diagonal(affinity, 1.0)
    return affinity

"""Hypernym hierarchies and the distance between classes in them (Dong et al., arXiv 1708.05493 use WordNet's).

    d(i, j) = min over common hypernyms h of (edges i -> h) + (edges j -> h)

A class is its own hypernym. Paths that go up, down and up again do not count, so d is larger than the undirected
shortest path for some pairs of WordNet (airplane to cat: 18, not 17).

Shape letters: C classes.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from netgloss.errors import UserError, nearest

CLOSURE = Path(__file__).parents[2] / "data" / "wordnet30_closure.tsv"
CLOSURE_SHA256 = "702d544ef69b4bc5b2957b403b680edf3b62e1498cffde8987bd9ceb02bd1191"
"""Of the body, the lines that do not start with ``#``."""


@dataclass(frozen=True)
class Taxonomy:
    """A directed acyclic graph of nodes and their parents.

    Parameters
    ----------
    parents : the direct hypernyms of every node; a node that is only ever a parent is a root.
    names : what the nodes are called, where known.
    source : where it comes from.

    Raises
    ------
    UserError : if a node is its own ancestor.
    """

    parents: Mapping[str, tuple[str, ...]]
    names: Mapping[str, str] = field(default_factory=dict)
    source: str = "taxonomy"

    def __post_init__(self) -> None:
        waiting = {node: len(set(above)) for node, above in self.parents.items()}
        below: dict[str, list[str]] = {}
        for node, above in self.parents.items():
            for parent in set(above):
                below.setdefault(parent, []).append(node)
                waiting.setdefault(parent, 0)
        ready = [node for node, count in waiting.items() if count == 0]
        while ready:
            for node in below.get(ready.pop(), ()):
                waiting[node] -= 1
                if waiting[node] == 0:
                    ready.append(node)
        stuck = sorted(node for node, count in waiting.items() if count > 0)
        if stuck:
            raise UserError(f"{self.source} is no hierarchy: {', '.join(stuck[:5])} lie on or below a cycle of parents")

    @property
    def nodes(self) -> set[str]:
        return set(self.parents).union(*self.parents.values())

    def ancestors(self, node: str) -> dict[str, int]:
        """Every hypernym of ``node`` with the fewest edges up to it; the node itself at 0."""
        found = {node: 0}
        queue = deque([node])
        while queue:
            current = queue.popleft()
            for parent in self.parents.get(current, ()):
                if parent not in found:
                    found[parent] = found[current] + 1
                    queue.append(parent)
        return found

    def members(self, classes: Sequence[str]) -> dict[str, NDArray[np.int64]]:
        """For every hypernym of any class, the indices of the classes below it (or equal to it)."""
        below: dict[str, list[int]] = {}
        for i, node in enumerate(classes):
            for above in self.ancestors(node):
                below.setdefault(above, []).append(i)
        return {node: np.asarray(indices) for node, indices in below.items()}

    def distances(self, classes: Sequence[str]) -> NDArray[np.float64]:
        """D (C, C) as in the module docstring; inf for classes without a common hypernym.

        Raises
        ------
        UserError : for classes that the taxonomy does not have.
        """
        self.check(classes)
        above: dict[str, list[tuple[int, int]]] = {}
        for i, node in enumerate(classes):
            for hypernym, edges in self.ancestors(node).items():
                above.setdefault(hypernym, []).append((i, edges))
        d_CC = np.full((len(classes), len(classes)), np.inf)
        for pairs in above.values():
            index, edges_up = (np.asarray(column) for column in zip(*pairs, strict=True))
            block = np.ix_(index, index)
            d_CC[block] = np.minimum(d_CC[block], edges_up[:, None] + edges_up[None, :])
        return d_CC

    def check(self, classes: Sequence[str]) -> None:
        """Raise a UserError that lists the ``classes`` which the taxonomy does not have."""
        nodes = self.nodes
        unknown = [name for name in classes if name not in nodes]
        if unknown:
            hint = nearest(unknown[0], nodes, limit=3)
            raise UserError(
                f"{self.source} has no {', '.join(map(repr, unknown[:8]))}{' ...' if len(unknown) > 8 else ''} "
                f"({len(unknown)} of {len(classes)} classes)" + (f"; did you mean {', '.join(hint)}?" if hint else "")
            )


def read_taxonomy(path: str | Path) -> Taxonomy:
    """A user's hierarchy: JSON ``{"child": ["parent", ...]}`` (or one parent as a string), or CSV lines
    ``child,parent``, one an edge.

    Raises
    ------
    UserError : the file cannot be read, or is neither, or has a cycle.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the taxonomy {path} cannot be read: {error}") from error
    parents: dict[str, tuple[str, ...]] = {}
    if path.suffix.lower() == ".json":
        try:
            table = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"the taxonomy {path} is not JSON: {error}") from error
        for child, above in table.items() if isinstance(table, dict) else [("", None)]:
            listed = [above] if isinstance(above, str) else above
            if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
                raise UserError(f'the taxonomy {path} must be {{"child": ["parent", ...]}}; not so at {child!r}')
            parents[child] = tuple(listed)
    else:
        for number, row in enumerate(csv.reader(text.splitlines()), start=1):
            cells = [cell.strip() for cell in row]
            if not any(cells):
                continue
            if len(cells) != 2 or not all(cells):
                raise UserError(f"the taxonomy {path} must have lines child,parent; line {number} is {','.join(row)!r}")
            parents[cells[0]] = (*parents.get(cells[0], ()), cells[1])
    return Taxonomy(parents, source=str(path.name))


@cache
def wordnet() -> Taxonomy:
    """The hypernyms of the ImageNet-1k and CIFAR-10 synsets in WordNet 3.0, shipped with netgloss.

    Raises
    ------
    UserError : if the shipped file was changed.
    """
    return read_closure(CLOSURE)


def read_closure(path: str | Path, *, sha256: str = CLOSURE_SHA256) -> Taxonomy:
    """A file of lines ``wnid TAB first lemma TAB parents``, whose body must have the checksum."""
    try:
        lines = Path(path).read_bytes().decode("ascii").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the WordNet file {path} cannot be read: {error}") from error
    body = [line for line in lines if not line.startswith("#")]
    found = hashlib.sha256("".join(body).encode("ascii")).hexdigest()
    if found != sha256:
        raise UserError(f"the WordNet file {path} was changed (sha256 {found[:12]}... instead of {sha256[:12]}...)")
    rows = [line.rstrip("\n").split("\t") for line in body]
    return Taxonomy(
        parents={wnid: tuple(above.split(",")) if above else () for wnid, _, above in rows},
        names={wnid: lemma for wnid, lemma, _ in rows},
        source="WordNet 3.0",
    )


def read_data_noun(path: str | Path) -> Taxonomy:
    """All nouns of WordNet 3.0 from its ``data.noun`` (format: wndb(5WN)); hypernyms are ``@`` and ``@i``.

    Raises
    ------
    UserError : the file cannot be read or is no ``data.noun``.
    """
    parents: dict[str, tuple[str, ...]] = {}
    names: dict[str, str] = {}
    try:
        with open(path, encoding="ascii") as lines:
            for line in lines:
                if line.startswith("  "):
                    continue
                tokens = line.split(" | ")[0].split()
                words = int(tokens[3], 16)
                count = int(tokens[4 + 2 * words])
                links = tokens[5 + 2 * words : 5 + 2 * words + 4 * count]
                links_of = zip(links[0::4], links[1::4], links[2::4], strict=True)
                above = sorted(f"n{offset}" for symbol, offset, pos in links_of if symbol in ("@", "@i") and pos == "n")
                parents[f"n{tokens[0]}"], names[f"n{tokens[0]}"] = tuple(above), tokens[4]
    except (OSError, UnicodeDecodeError, ValueError, IndexError) as error:
        raise UserError(f"{path} cannot be read as data.noun of WordNet 3.0: {error}") from error
    return Taxonomy(parents, names, source="WordNet 3.0 (data.noun)")

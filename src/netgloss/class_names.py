"""Names of classes: one way to read them, and one matcher wherever folders or labels meet a classifier's classes.

Two spellings mean the same class if they agree in one of these, the first that applies: the WordNet id at their
beginning (``n01440764``, ``n02085620-Chihuahua``), every character, or the letters and digits without regard to case,
separators (space, ``_``, ``-``, ``/``, ``:``), Unicode form and leading zeros; then the same for the name before the
first comma ("tench, Tinca tinca"), and last without separators at all ("AnkleBoot"). A spelling that fits several
classes fits none.
"""

from __future__ import annotations

import operator
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from netgloss.errors import UserError, nearest, one_line

_MOST_CLASSES = 1_000_000
_MOST_NAMED = 5
_IMAGENET = 1000
_SEPARATORS = r"\s_\-\u2010-\u2015/\\:"
_WNID = re.compile(r"(n\d{8})(?!\d)", re.IGNORECASE)


# -- reading ----------------------------------------------------------------------------------------------------------


def class_list(given: Iterable[object] | Mapping[object, object]) -> list[str]:
    """Class names in the order of their indices.

    Parameters
    ----------
    given : names in order, ``{index: name}`` or ``{name: index}`` (a ``class_to_idx``), in any order. An index without
        a name is called ``class INDEX``.

    Raises
    ------
    UserError : not one of these, or an index that is negative or has two names.
    """
    if isinstance(given, str | Set):
        raise UserError(f"class names must be a list or a dict, got {one_line(given)[:60]!r}")
    if not isinstance(given, Mapping):
        return [str(name) for name in given]
    named = all(isinstance(value, str) for value in given.values())
    by_index = _indexed([(_number(key, text=named), value) for key, value in given.items()])
    by_name = _indexed([(_number(value), key) for key, value in given.items()])
    if by_index and by_name and by_index != by_name:  # numbers on both sides: only the indices have no gaps
        gapless = [found for found in (by_index, by_name) if sorted(found) == list(range(len(given)))]
        by_index, by_name = (gapless[0], None) if len(gapless) == 1 else (None, None)
    names = by_index or by_name
    if names is None and given:
        raise UserError(
            "class names must be {index: name} or {name: index}, each index once, if they are a dict, got "
            f"{one_line(dict(list(given.items())[:3]))}"
        )
    names = names or {}
    return [names.get(i, f"class {i}") for i in range(max(names, default=-1) + 1)]


def _number(value: object, *, text: bool = False) -> int | None:
    """A class index; with ``text`` also one that is written in digits, as the keys of JSON are."""
    if text and isinstance(value, str) and value.isdecimal():
        return int(value[:8])
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def _indexed(pairs: list[tuple[int | None, object]]) -> dict[int, str] | None:
    """The pairs as {index: name}; None if an index is none, or there twice."""
    found = {index: str(name) for index, name in pairs if index is not None and 0 <= index < _MOST_CLASSES}
    return found if len(found) == len(pairs) else None


# -- matching ---------------------------------------------------------------------------------------------------------


def plain(name: str) -> str:
    """A spelling without regard to case, separators, Unicode form and leading zeros; "class 007" is plain "7"."""
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold()).strip().strip("_")
    text = re.sub(rf"(?<=[^{_SEPARATORS}])[{_SEPARATORS}]+(?=[^{_SEPARATORS}])", " ", text)
    text = re.sub(r"(?<![\d.,])0+(?=\d)", "", text).strip()
    return re.sub(r"^class (?=\d+$)", "", text)


def _short(name: str) -> str:
    return plain(name.split(",")[0])


def _joined(name: str) -> str:
    """Plain, and without separators except between two digits."""
    return re.sub(r"(?<!\d) | (?!\d)", "", _short(name))


def _wnid(name: str) -> str:
    found = _WNID.match(name.strip())
    return found[1].lower() if found else ""


def class_finder(class_names: Sequence[str], wnids: Sequence[str] | None = None) -> Callable[[str], list[int]]:
    """A function from a spelling to the indices of the classes that it fits (see the module's text), [] for none."""
    levels: list[tuple[Sequence[str], Callable[[str], str]]] = [
        (list(wnids or ()), lambda name: _wnid(name) or name),
        (class_names, _wnid),
        (class_names, str),
        (class_names, plain),
        (class_names, _short),
        (class_names, _joined),
    ]
    tables: list[tuple[dict[str, list[int]], Callable[[str], str]]] = []
    for level, spelling in levels:
        table: dict[str, list[int]] = defaultdict(list)
        for index, name in enumerate(level):
            table[spelling(name)].append(index)
        table.pop("", None)
        tables.append((dict(table), plain if spelling is _short else spelling))

    def find(name: str) -> list[int]:
        return next((table[key] for table, spelling in tables if (key := spelling(name)) in table), [])

    return find


def match_classes(
    names: Sequence[str], class_names: Sequence[str], wnids: Sequence[str] | None = None
) -> NDArray[np.int64]:
    """Index of the classifier's class for each of ``names``, -1 where no single one agrees (see the module's text).

    Nothing is ever matched by its place, unless the names are the numbers from 0 ("0" or "class 0") and there are as
    many as classes: they are then taken as the classifier's indices.

    Parameters
    ----------
    names : of a source's classes. class_names, wnids : the classifier's names and, where known, WordNet ids.
    """
    find = class_finder(class_names, wnids)
    found = [find(name) for name in names]
    numbers = [plain(name) for name in names]
    if not any(found) and sorted(numbers) == sorted(map(str, range(len(class_names)))):
        return np.array([int(number) for number in numbers], np.int64)
    return np.array([places[0] if len(places) == 1 else -1 for places in found], np.int64)


@dataclass(frozen=True)
class ClassMatch:
    """Which classes of the images are classes of the classifier.

    Attributes
    ----------
    names : of the images' classes. index : (names,) class of the classifier, -1 for none.
    class_names, wnids : the classifier's.
    """

    names: Sequence[str]
    index: NDArray[np.int64]
    class_names: Sequence[str]
    wnids: Sequence[str] | None = None

    @property
    def missing(self) -> list[str]:
        """The names that are no class of the classifier."""
        return [name for name, place in zip(self.names, self.index.tolist(), strict=True) if place < 0]

    def nearest(self, name: str) -> str | None:
        """The class of the classifier whose name is spelled most like ``name``; None if none is."""
        if self._nameless:
            return None
        spelled = {plain(known.split(",")[0]): known.split(",")[0] for known in self.class_names}
        near = nearest(plain(name), spelled, limit=1)
        return spelled[near[0]] if near else None

    @property
    def listed(self) -> str:
        """The first of :attr:`missing`, each with the nearest class, and how many more there are."""
        parts = []
        for name in self.missing[:_MOST_NAMED]:
            near = self.nearest(name)
            parts.append(one_line(f"{name} (nearest: {near})" if near else name))
        more = len(self.missing) - len(parts)
        return ", ".join(parts) + (f" and {more} more" if more > 0 else "")

    @property
    def line(self) -> str:
        """How many match, which do not, and what helps."""
        missing, total = self.missing, len(self.names)
        count = f"{total - len(missing)} of {total} classes of the images are classes of the network"
        if not missing:
            return count
        rest = f"images of the others count as unlabelled: {self.listed}"
        if len(self.class_names) == _IMAGENET and not self.wnids and all(map(_wnid, missing)):
            return (
                f"{count}; they are named by WordNet ids such as {missing[0]} and the network has {_IMAGENET} outputs: "
                "if it was trained on ImageNet, say --class-names imagenet"
            )
        if self._nameless:
            return f"{count}, whose classes have no names (say them by --class-names); {rest}"
        return f"{count}; {rest}; rename the folders, or give the network's names by --class-names"

    @property
    def _nameless(self) -> bool:
        return all(re.fullmatch(r"class \d+", name) for name in self.class_names)


def compare_classes(names: Sequence[str], class_names: Sequence[str], wnids: Sequence[str] | None = None) -> ClassMatch:
    """:func:`match_classes` with the words to report it."""
    return ClassMatch(names, match_classes(names, class_names, wnids), class_names, wnids)

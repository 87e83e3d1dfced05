"""Definitions that the report prints with the numbers: the run's method, its options, and what each baseline is.

A method's text is the docstring that opens its file, an option's the docstring under its field: they are read from the
source without importing it. A method of the user's own (``path/to/file.py:Class``) is not read: a run folder must not
decide which files of this machine are opened.
"""

from __future__ import annotations

import ast
import importlib.resources
import re
import textwrap
from dataclasses import dataclass, field

BASELINES = {
    "random_directions": "A random subspace with as many directions, and the best reconstruction from it.",
    "natural_axes": "The layer's own features, as many as there are concepts, those that vary most.",
    "shuffled_codes": "The method's own decoder, fed the codes of another image: what is left is not about the image.",
    "mean_activation": "A constant: the mean of the layer at every position.",
    "untrained_network": "The same method on the same architecture with random weights. What is reached there does not "
    "come from what the network learned. It takes a further pass, and therefore few images (at most 256 unless "
    "--untrained-images says otherwise), half of them for its fit.",
    "random_dictionary": "Two random dictionaries of this size, with the layer's scale and sign.",
    "shuffled_dictionary": "The values of each feature shuffled among the concepts: scale and sparsity stay, what made "
    "concepts is gone.",
}
"""What each baseline is, by its name in ``scores.json``."""

_METHOD = re.compile(r"[a-z][a-z0-9-]*")


@dataclass(frozen=True)
class Block:
    """A paragraph, or equations to be kept as they are set."""

    text: str
    set_as_is: bool = False


@dataclass(frozen=True)
class MethodText:
    """The opening of a method's file, and what its options mean."""

    title: str
    blocks: list[Block]
    options: dict[str, str] = field(default_factory=dict)


def method_text(method: str | None) -> MethodText | None:
    """The definition of a built-in method; None for others."""
    if method is None or not _METHOD.fullmatch(method):
        return None
    file = importlib.resources.files("netgloss.explainers").joinpath(f"{method.replace('-', '_')}.py")
    if not file.is_file():
        return None
    tree = ast.parse(file.read_text(encoding="utf-8"))
    opening = ast.get_docstring(tree)
    if not opening:
        return None
    title, _, rest = opening.partition("\n")
    return MethodText(title.strip(), _blocks(rest), _options(tree) | _base_options())


def _blocks(text: str) -> list[Block]:
    """Paragraphs with their lines joined; indented ones, lists and tables of symbols as they are set."""
    found = []
    for part in re.split(r"\n\s*\n", text.strip("\n")):
        lines = part.split("\n")
        if lines[0].startswith("Shape letters"):
            continue
        aligned = any(re.search(r"\S {3,}\S", line) for line in lines)
        if aligned or any(line.startswith(("    ", "  ", "- ")) for line in lines):
            found.append(Block(textwrap.dedent("\n".join(lines)), set_as_is=True))
        else:
            found.append(Block(re.sub(r"::$", ":", " ".join(line.strip() for line in lines).strip())))
    return found


def _options(tree: ast.Module) -> dict[str, str]:
    """Field name -> the text under it, for the dataclasses of a file."""
    found = {}
    for cls in (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name.endswith("Config")):
        for before, after in zip(cls.body, cls.body[1:], strict=False):
            if (
                isinstance(before, ast.AnnAssign)
                and isinstance(before.target, ast.Name)
                and isinstance(after, ast.Expr)
            ):
                text = after.value.value if isinstance(after.value, ast.Constant) else None
                if isinstance(text, str):
                    found[before.target.id] = " ".join(text.split())
    return found


def _base_options() -> dict[str, str]:
    base = importlib.resources.files("netgloss.explainers").joinpath("base.py")
    return _options(ast.parse(base.read_text(encoding="utf-8")))

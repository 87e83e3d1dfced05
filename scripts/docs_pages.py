"""What the documentation site adds to the files of docs/: the order of its pages, and a reference of the metrics.

A hook of mkdocs (see mkdocs.yml). New files in docs/ and docs/methods/ are picked up by themselves; the reference is
made from the metrics' own definitions, so that it cannot differ from what a run writes.
"""

from __future__ import annotations

from typing import Any

FIRST = ("index.md", "concepts.md", "report.md", "gallery.md")
LAST = ("add-a-method.md", "api.md")
REFERENCE = "metrics-reference.md"


def on_files(files: Any, config: Any) -> Any:
    """Adds the reference and sets the order."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, REFERENCE, content=metrics_reference()))
    pages = sorted(file.src_uri for file in files.documentation_pages())
    top = [page for page in pages if "/" not in page]
    middle = [page for page in top if page not in (*FIRST, *LAST, REFERENCE, "metrics.md")]
    nav: list[Any] = [page for page in FIRST if page in top]
    nav.append({"Methods": [page for page in pages if page.startswith("methods/")]})
    nav.append({"Metrics": ["metrics.md", REFERENCE]})
    nav.append({"More": [*middle, *(page for page in pages if "/" in page and not page.startswith("methods/"))]})
    nav += [page for page in LAST if page in top]
    config.nav = nav
    return files


def metrics_reference() -> str:
    """One section a metric of every run: definition, direction, range, and what it stands beside."""
    from netgloss.metrics import dictionary_metrics, image_metrics
    from netgloss.report.glossary import BASELINES

    lines = [
        "# Metrics, one by one",
        "",
        "Made from the definitions in the code, which `scores.json` and the report repeat. [Metrics](metrics.md) has",
        "the formulas, the baselines to read beside each, and how the intervals are made.",
        "",
    ]
    for cls in sorted([*image_metrics(), *dictionary_metrics()], key=lambda cls: cls.name):
        better = {True: "higher is better", False: "lower is better", None: "neither direction is better"}
        low, high = ("unbounded" if abs(end) == float("inf") else f"{end:g}" for end in cls.bounds)
        inputs = ", ".join(f"`{name}`" for name in getattr(cls, "inputs", ()))
        reads = f"reads {inputs or 'the dictionaries of the seeds'}"
        lines += [f"## `{cls.name}` {{ #{cls.name} }}", "", cls.definition, ""]
        lines += [f"*Stands beside:* {', '.join(f'[{plain(n)}](#baseline-{n})' for n in baselines_of(cls))}.", ""]
        lines += [f"*{better[cls.higher_is_better]}; from {low} to {high}; {reads}; `{cls.__module__}`.*", ""]
    lines += ["## What the baselines are", ""]
    for name, text in BASELINES.items():
        lines += [f"**{plain(name)}** {text}", f"{{: #baseline-{name} }}", ""]
    return "\n".join(lines)


def plain(name: str) -> str:
    return name.replace("_", " ")


def baselines_of(cls: Any) -> list[str]:
    """The baselines that a run gives a metric: those that have what it reads (netgloss/evaluation/)."""
    if cls.name == "stability":
        return ["random_dictionary", "shuffled_dictionary"]
    found, inputs = ["random_directions", "natural_axes"], set(getattr(cls, "inputs", ()))
    if inputs and not inputs & {"concepts", "contributions"}:
        found += ["shuffled_codes", "mean_activation"]
    if inputs and not inputs & {"logits", "logits_rebuilt", "contributions"}:
        found.append("untrained_network")
    return found

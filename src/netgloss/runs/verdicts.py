"""What the numbers of a run say in words: how a score compares, which classes a concept stands for, what is explained.

Rules over the run's own numbers, so that the first screen says what a careful reader would conclude from the tables.
``doubts.py`` has what to distrust, and the one answer whether to trust.
"""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from netgloss.figures.style import brief, number
from netgloss.runs.files import RunFiles

Standing = Literal["better", "fair", "tie", "worse", "poor", "none"]

FIRST = ("agreement", "stability", "r2", "kl", "accuracy_change")
"""Metrics that the first screen prefers to show, where a run has them."""
DESCRIPTIVE = ("l0", "l0_share", "hoyer", "dead_share", "collinearity", "collinearity_max")
"""Metrics that say what a code is like: the layer's own axes are sparse and apart for free, whatever they mean."""
LEVELS = {
    "agreement": (0.7, 0.9),
    "stability": (0.5, 0.8),
    "r2": (0.5, 0.8),
    "kl": (1.0, 0.3),
    "accuracy_change": (-0.1, -0.03),
    "completeness": (0.7, 0.9),
}
"""Metrics whose value means something by itself: beyond the first level it is low, from the second on it is good.

They are conventions, and the report says them with the value.
"""
CONSTRUCTED = ("agreement", "kl", "accuracy_change", "completeness")
"""Metrics in which an image counts as unchanged if the class that it is predicted as is not explained."""
ROUNDING = 1e-4
"""Differences up to this are put down to rounding: an affine tail departs from its linear surrogate by 1e-7 to 1e-5."""
UNSTABLE = 0.5
"""Below this stability over seeds a concept is called unstable."""
HALF, MOST = 0.5, 0.8
"""Shares of a prediction below which the explanation leaves more open than it says, and from which it covers most."""
FEW_IMAGES = 50
"""Below this number of evaluated images the report says what they cannot show."""
NAMED_IMAGES, NAMED_SHARE = 5, 0.2
"""A class is named for a concept if it has so many images and this share of the concept's strongest contribution."""
NOT_EXPLAINED = "evaluated images are predicted as classes that are not explained"
"""How the warning reads that images count as unchanged by construction."""


@dataclass(frozen=True)
class Verdict:
    """How a score compares with its baselines: ``standing`` is the worst over them, ``words`` says it in words."""

    standing: Standing
    words: str
    marks: dict[str, Standing] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """One line of the first screen, with the page that shows more."""

    text: str
    link: str = ""
    grave: bool = False


def pretty(name: str) -> str:
    """``random_directions`` as "random directions"."""
    return name.replace("_", " ")


def model_name(spec: Mapping[str, Any]) -> str:
    """What a heading calls the classifier: of ``path/to/file.py:factory`` the file and factory, without the folders."""
    name = str(spec.get("name") or "the classifier")
    path, colon, factory = name.rpartition(":")
    return re.split(r"[/\\]", path)[-1] + colon + factory if path.endswith(".py") else name


def verdict(score: Mapping[str, Any], *, constructed: int = 0) -> Verdict:
    """What a score says by itself, then how it compares with its baselines.

    A baseline inside the interval is a tie, as is one that differs by no more than :data:`ROUNDING`.

    Parameters
    ----------
    constructed : evaluated images that keep their prediction by construction.
    """
    value, better = score["value"], score["higher_is_better"]
    baselines = {name: v for name, v in score["baselines"].items() if v is not None}
    if value is None:
        return Verdict("none", "not defined here")
    metric = score.get("metric")
    if better is None or metric in DESCRIPTIVE:
        return Verdict("none", "describes only")
    low = (value if score["low"] is None else score["low"]) - ROUNDING
    high = (value if score["high"] is None else score["high"]) + ROUNDING
    marks: dict[str, Standing] = {
        name: "tie" if low <= v <= high else "better" if (value > v) == better else "worse"
        for name, v in baselines.items()
    }
    n = score.get("n")
    if metric in CONSTRUCTED and constructed and n and constructed > n * (1 - MOST):
        return Verdict("poor", f"says little: {constructed} of {n} images count by construction", marks)
    standing, words = _compared(marks)
    own, said = level(metric, value)
    if own == "poor":
        return Verdict("poor", f"{said}; {words}" if marks else said, marks)
    if own == "fair" and standing in ("better", "none"):
        return Verdict("fair", f"{said}; {words}" if marks else said, marks)
    return Verdict(standing, words, marks)


def level(metric: str | None, value: float) -> tuple[Standing, str]:
    """Whether a value is low ("poor"), middling ("fair") or good by itself."""
    if metric not in LEVELS:
        return "none", ""
    low, good = LEVELS[metric]
    sign = 1 if low < good else -1
    if sign * value < sign * low:
        return "poor", f"{'low' if sign > 0 else 'high'}: {'below' if sign > 0 else 'above'} {number(low)}"
    return ("fair", "middling") if sign * value < sign * good else ("better", "good")


def _compared(marks: Mapping[str, Standing]) -> tuple[Standing, str]:
    """The worst standing over the baselines, and the words for it."""
    if not marks:
        return "none", "no baseline to compare with"
    worse, ties = ([brief(pretty(name)) for name, mark in marks.items() if mark == m] for m in ("worse", "tie"))
    if worse:
        return "worse", f"worse than {listed(worse)}"
    if ties:
        return "tie", f"not distinguishable from {listed(ties)}"
    return "better", "better than every baseline" if len(marks) > 1 else "better than its baseline"


def verdicts_of(files: RunFiles) -> list[tuple[dict[str, Any], Verdict]]:
    """Each score of a run with its verdict."""
    constructed = files.run["num_by_construction"]
    return [(score, verdict(score, constructed=constructed)) for score in files.scores or []]


def headline_scores(scores: list[dict[str, Any]], count: int = 4) -> list[dict[str, Any]]:
    """The scores of the first screen: the well-known ones first, then in the run's order."""
    rank = {name: i for i, name in enumerate(FIRST)}
    return sorted(scores, key=lambda s: rank.get(s["metric"], len(FIRST)))[:count]


def named_classes(concept: Mapping[str, Any], classes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The classes that a concept may be said to stand for, the largest contribution first.

    Each has at least :data:`NAMED_IMAGES` images and :data:`NAMED_SHARE` of the strongest contribution among those.
    """
    counts = {entry["class"]: entry["num_images"] for entry in classes}
    known = [
        entry
        for entry in concept["classes"]
        if (entry["contribution"] or 0) > 0 and (entry["images"] or counts.get(entry["class"]) or 0) >= NAMED_IMAGES
    ]
    strongest = max((entry["contribution"] for entry in known), default=0.0)
    kept = [entry for entry in known if entry["contribution"] >= NAMED_SHARE * strongest]
    return sorted(kept, key=lambda entry: -entry["contribution"])


def concept_sentence(concept: Mapping[str, Any], content: Mapping[str, Any]) -> str:
    """What a concept shows: the classes of its strongest images, and what it adds to the class it stands for."""
    shown = [content["images"][entry["image"]] for entry in concept["gallery"]]
    names = Counter(brief(image["label"] or image["prediction"] or "unknown") for image in shown)
    if not names:
        return "Never active in these images."
    (first, times), *others = names.most_common(3)
    text = f"Strongest on {first}, {times} of {len(shown)}"
    if times <= len(shown) / 2:
        parts = [f"{first} ({times} of {len(shown)})", *(f"{name} ({n})" for name, n in others)]
        text = f"Strongest on {listed(parts)}"
    named = named_classes(concept, content["classes"])
    if named:
        lead, value = brief(named[0]["class"]), number(named[0]["contribution"], signed=True)
        text += f"; {value} to its logit" if lead == first else f"; {value} to {lead}"
    return f"{text}."


def typical_share(files: RunFiles) -> dict[str, Any] | None:
    """How much of a prediction the concepts explain: ``share``, ``low``, ``high`` and ``images``.

    The one number for this: the first screen, the light and the terminal read it. Runs from before it was recorded have
    the median over the images that were explained one by one.
    """
    recorded: dict[str, Any] | None = files.concepts["importance"]["explained"]
    if recorded is not None:
        return recorded
    shares = [image["explained"]["share"] for image in files.concepts["images"] if image["explained"]]
    known = [share for share in shares if share is not None]
    if not known:
        return None
    return {"share": statistics.median(known), "low": None, "high": None, "images": len(known)}


def share_text(typical: Mapping[str, Any]) -> str:
    """``64 % of a typical prediction (58 to 70 %)``."""
    between = ""
    if typical["low"] is not None and typical["high"] is not None:
        between = f" ({100 * typical['low']:.0f} to {100 * typical['high']:.0f} %)"
    return f"{percent(typical['share'])} of a typical prediction{between}"


def num_judged(files: RunFiles) -> int | None:
    """How many images the scores are from."""
    judged: int | None = files.run["num_judged"]
    if judged is not None:
        return judged
    return files.run["data"]["num_heldout"] or None


def unstable_concepts(files: RunFiles) -> tuple[int, int]:
    """How many concepts did not come back with other seeds, and of how many this is known."""
    known = [c["stability"] for c in files.concepts["concepts"] if c["stability"] is not None]
    return sum(value < UNSTABLE for value in known), len(known)


def what_it_holds(files: RunFiles) -> list[Answer]:
    """How many concepts there are, how many are in use, how the predictions lean on them."""
    concepts = files.concepts["concepts"]
    shape = files.run["layer_spec"]["shape"]
    grid = f" on a grid of {shape[1]} × {shape[2]} positions" if len(shape) == 3 else ""
    features = f" from {shape[0]:,} features{grid}" if shape else ""
    answers = [Answer(f"{count(len(concepts), 'concept')}{features}.", "#/concepts")]
    places = "positions" if files.concepts["grid"] else "images"
    active = [c["share_active"] for c in concepts if c["share_active"]]
    if active:
        share = statistics.median(active)
        answers.append(
            Answer(f"{len(active)} of them are ever active, a typical one in {percent(share)} of all {places}.")
        )
    shares = sorted((abs(c["importance"]) for c in concepts if c["importance"]), reverse=True)
    if shares:
        half, total = 0, 0.0
        while total < sum(shares) / 2:
            total += shares[half]
            half += 1
        lean = "concept carries" if half == 1 else "concepts carry"
        answers.append(Answer(f"{half} {lean} half of all that the concepts add to the predictions.", "#/concepts"))
    labelled = sum(c["label"] is not None for c in concepts)
    if labelled:
        answers.append(Answer(f"{labelled} of {len(concepts)} carry a label with evidence."))
    return answers


def count(n: int, noun: str) -> str:
    """``3 concepts``, ``1 concept``."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def percent(share: float) -> str:
    """A share in percent, with a digit after the point below 10 %."""
    if 0 < share < 0.0005:
        return "< 0.1 %"
    return f"{100 * share:.0f} %" if share >= 0.0995 or share == 0 else f"{100 * share:.1f} %"


def plainly(value: Any) -> str:
    """A JSON value as a reader would write it."""
    if isinstance(value, dict):
        return "; ".join(f"{pretty(name)}: {plainly(item)}" for name, item in value.items())
    if isinstance(value, list):
        more = f" and {len(value) - 6:,} more" if len(value) > 8 else ""
        return (", ".join(plainly(item) for item in (value[:6] if more else value)) or "none") + more
    if value is None or isinstance(value, bool):
        return {None: "–", True: "yes", False: "no"}[value]
    return str(value)


def listed(names: list[str], limit: int = 3) -> str:
    """``a, b and c``; what exceeds the limit is counted."""
    if len(names) > limit:
        names = [*names[:limit], f"{len(names) - limit} more"]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"

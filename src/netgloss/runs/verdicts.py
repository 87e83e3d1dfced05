"""The report's sentences: what the layer holds, how well the explanation holds up, what to distrust.

Rules over the run's own numbers, so that the first screen says what a careful reader would conclude from the tables.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from netgloss.figures.style import brief, number
from netgloss.runs.files import RunFiles

Standing = Literal["better", "tie", "worse", "none"]

FIRST = ("r2", "agreement", "stability", "kl", "accuracy_change")
"""Metrics that the first screen prefers to show, where a run has them."""
DESCRIPTIVE = ("l0", "l0_share", "hoyer", "dead_share", "collinearity", "collinearity_max")
"""Metrics that say what a code is like: the layer's own axes are sparse and apart for free, whatever they mean."""
UNSTABLE = 0.5
"""Below this stability over seeds a concept is called unstable."""
LARGE_GAP = 0.1
"""Above this share of the logit the gap of the contributions is called large."""


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


def verdict(score: dict[str, Any]) -> Verdict:
    """A baseline inside the interval is a tie; without an interval only an equal value is."""
    value, better = score["value"], score["higher_is_better"]
    baselines = {name: v for name, v in score["baselines"].items() if v is not None}
    if value is None:
        return Verdict("none", "not defined here")
    if better is None or score.get("metric") in DESCRIPTIVE:
        return Verdict("none", "describes only")
    if not baselines:
        return Verdict("none", "no baseline to compare with")
    low = value if score["low"] is None else score["low"]
    high = value if score["high"] is None else score["high"]
    marks: dict[str, Standing] = {
        name: "tie" if low <= v <= high else "better" if (value > v) == better else "worse"
        for name, v in baselines.items()
    }
    worse, ties = ([brief(pretty(name)) for name, mark in marks.items() if mark == m] for m in ("worse", "tie"))
    if worse:
        return Verdict("worse", f"worse than {listed(worse)}", marks)
    if ties:
        return Verdict("tie", f"not distinguishable from {listed(ties)}", marks)
    return Verdict("better", "better than every baseline" if len(marks) > 1 else "better than its baseline", marks)


def headline_scores(scores: list[dict[str, Any]], count: int = 4) -> list[dict[str, Any]]:
    """The scores of the first screen: the well-known ones first, then in the run's order."""
    rank = {name: i for i, name in enumerate(FIRST)}
    return sorted(scores, key=lambda s: rank.get(s["metric"], len(FIRST)))[:count]


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
    for concept in sorted(concepts, key=lambda c: -abs(c["importance"] or 0))[:3]:
        if concept["importance"]:
            serves = [brief(entry["class"]) for entry in concept["classes"][:2] if (entry["contribution"] or 0) > 0]
            name = brief(concept["label"]["text"] if concept["label"] else concept["name"])
            text = f"{percent(concept['importance'])}: {name}" + (f", for {listed(serves)}" if serves else "")
            answers.append(Answer(text, f"#/concepts/{concept['id']}"))
    labelled = sum(c["label"] is not None for c in concepts)
    if labelled:
        answers.append(Answer(f"{labelled} of {len(concepts)} carry a label with evidence."))
    return answers


def how_well(files: RunFiles) -> list[Answer]:
    """How many scores beat their baselines, and how completely the contributions rebuild the logits."""
    scored = [v for s in files.scores or [] if (v := verdict(s)).standing != "none"]
    answers = []
    if scored:
        better = sum(v.standing == "better" for v in scored)
        answers.append(Answer(f"{better} of {count(len(scored), 'score')} beat every baseline.", "#/scores"))
    gap = files.concepts["importance"]["completeness_gap"]
    if gap and gap["mean_abs"] is not None:
        relative = "" if gap["relative"] is None else f" ({percent(gap['relative'])} of it)"
        answers.append(
            Answer(
                f"Base and concepts together miss an image's logit by {number(gap['mean_abs'])}{relative} on average."
            )
        )
    return answers


def what_to_distrust(files: RunFiles, missing: list[str]) -> list[Answer]:
    """Everything in the run that should lower a reader's trust, the gravest first."""
    run, concepts = files.run, files.concepts["concepts"]
    found: list[Answer] = []
    if files.scores is None:
        found.append(Answer("Nothing was scored in this run: how well the concepts hold is unknown.", grave=True))
    for standing, phrase in (("worse", "Worse than"), ("tie", "Not distinguishable from")):
        by_baseline: dict[str, list[str]] = {}
        for score in files.scores or []:
            for baseline, mark in verdict(score).marks.items():
                if mark == standing:
                    by_baseline.setdefault(pretty(baseline), []).append(brief(pretty(score["metric"])))
        for baseline, metrics in by_baseline.items():
            found.append(
                Answer(f"{phrase} {brief(baseline)} in {listed(metrics, 5)}.", "#/scores", standing == "worse")
            )
    found += [Answer(text, "#/run") for text in run["warnings"]]
    gap = files.concepts["importance"]["completeness_gap"]
    if gap and gap["relative"] is not None and gap["relative"] > LARGE_GAP:
        text = f"The contributions leave {percent(gap['relative'])} of the logit unexplained."
        found.append(Answer(text, "#/images", grave=True))
    if files.concepts["importance"]["kind"] not in (None, "exact"):
        text = f"What concepts add to a logit is an approximation ({files.concepts['importance']['kind']})."
        found.append(Answer(text, "#/run"))
    unstable = sum(c["stability"] is not None and c["stability"] < UNSTABLE for c in concepts)
    if unstable:
        text = (
            f"{count(unstable, 'concept')} of {len(concepts)} did not come back with other seeds (stability below 0.5)."
        )
        found.append(Answer(text, "#/concepts"))
    elif concepts and all(c["stability"] is None for c in concepts):
        found.append(Answer("Whether other seeds find the same concepts was not measured."))
    dead = sum(c["share_active"] == 0 for c in concepts)
    if dead:
        found.append(Answer(f"{count(dead, 'concept')} of {len(concepts)} never became active.", "#/concepts"))
    data = run["data"]
    if data["num_heldout"] == 0:
        found.append(
            Answer("No image was held out: the scores are from images that the concepts were fitted to.", grave=True)
        )
    if data["unreadable"]:
        found.append(Answer(f"{count(len(data['unreadable']), 'image')} left out: could not be read.", "#/run"))
    if missing:
        found.append(Answer(f"{count(len(missing), 'picture')} of the run folder could not be shown here."))
    return sorted(found, key=lambda answer: not answer.grave)


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

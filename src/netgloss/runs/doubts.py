"""What to distrust in a run, the gravest first, and the one answer to "can I trust this explanation?"."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from netgloss.figures.style import brief, number
from netgloss.runs.files import RunFiles
from netgloss.runs.verdicts import (
    FEW_IMAGES,
    HALF,
    MOST,
    NOT_EXPLAINED,
    Answer,
    Standing,
    concept_sentence,
    count,
    level,
    listed,
    model_name,
    num_judged,
    percent,
    pretty,
    share_text,
    typical_share,
    unstable_concepts,
    verdicts_of,
)

SHOWN = 4
"""Remarks that the first screen shows; the others are folded."""


def what_to_distrust(files: RunFiles, missing: list[str]) -> list[Answer]:
    """Everything in the run that should lower a reader's trust, what matters most for a decision first.

    First what the explanation leaves open, then what its scores mean by themselves, then how many images stand behind
    them, then the baselines, last what is odd about the run.
    """
    found = [*_open_questions(files), *_low_scores(files), *_few_images(files), *_baselines(files)]
    found += [Answer(text, "#/run") for text in files.run["warnings"] if NOT_EXPLAINED not in text]
    return found + _remarks(files, missing)


def _open_questions(files: RunFiles) -> list[Answer]:
    """What no score can make up for."""
    found = []
    if files.scores is None:
        found.append(Answer("Nothing was scored in this run: how well the concepts hold is unknown.", grave=True))
    typical = typical_share(files)
    if typical is not None and typical["share"] < HALF:
        text = f"The concepts explain only {share_text(typical)}: most of it lies elsewhere."
        found.append(Answer(text, "#/images", grave=True))
    if files.run["data"]["num_heldout"] == 0:
        found.append(
            Answer("No image was held out: the scores are from images that the concepts were fitted to.", grave=True)
        )
    constructed, judged = files.run["num_by_construction"], num_judged(files) or 0
    grave = constructed > judged * (1 - MOST)
    found += [Answer(f"{text}.", "#/scores", grave) for text in files.run["warnings"] if NOT_EXPLAINED in text]
    unstable, known = unstable_concepts(files)
    if unstable:
        text = f"{count(unstable, 'concept')} of {known} did not come back with other seeds (stability below 0.5)."
        found.append(Answer(text, "#/concepts", grave=unstable > known / 2))
    return sorted(found, key=lambda answer: not answer.grave)


def _low_scores(files: RunFiles) -> list[Answer]:
    """Scores that are low in themselves; the stability of concepts has its own line."""
    found = []
    for score, judged in verdicts_of(files):
        if judged.standing == "poor" and level(score["metric"], score["value"])[0] == "poor":
            words = level(score["metric"], score["value"])[1]
            found.append(Answer(f"{_sentence(score['metric'])} is {number(score['value'])} ({words}).", "#/scores"))
    return found


def _few_images(files: RunFiles) -> list[Answer]:
    judged = num_judged(files)
    if files.scores is None or judged is None or judged >= FEW_IMAGES:
        return []
    points = 100 * min(1.0, 0.98 / math.sqrt(judged))
    text = (
        f"Only {count(judged, 'image')} {'was' if judged == 1 else 'were'} scored: a share of them is known to about "
        f"± {points:.0f} percentage points, and smaller differences cannot be seen."
    )
    return [Answer(text, "#/scores")]


def _baselines(files: RunFiles) -> list[Answer]:
    """One line for the metrics in which a baseline is better, one for those in which it cannot be distinguished."""
    lines: dict[Standing, dict[str, list[str]]] = {"worse": {}, "tie": {}}
    for score, judged in verdicts_of(files):
        for standing, metrics in lines.items():
            names = [brief(pretty(name)) for name, mark in judged.marks.items() if mark == standing]
            if names:
                metrics.setdefault(listed(names), []).append(brief(pretty(score["metric"])))
    found = []
    for standing, phrase in (("worse", "Worse than"), ("tie", "Not distinguishable from")):
        parts = [f"{names} in {listed(metrics, 5)}" for names, metrics in lines[standing].items()]
        if parts:
            found.append(Answer(f"{phrase} {'; '.join(parts)}.", "#/scores"))
    return found


def _remarks(files: RunFiles, missing: list[str]) -> list[Answer]:
    """What is odd about the run, or was not measured."""
    concepts, data = files.concepts["concepts"], files.run["data"]
    found = []
    kind = files.concepts["importance"]["kind"]
    if kind not in (None, "none", "exact"):
        found.append(Answer(f"What concepts add to a logit is an approximation ({kind}).", "#/run"))
    if concepts and all(c["stability"] is None for c in concepts):
        found.append(Answer("Whether other seeds find the same concepts was not measured."))
    dead = sum(c["share_active"] == 0 for c in concepts)
    if dead:
        found.append(Answer(f"{count(dead, 'concept')} of {len(concepts)} never became active.", "#/concepts"))
    if data["unreadable"]:
        found.append(Answer(f"{count(len(data['unreadable']), 'image')} left out: could not be read.", "#/run"))
    if missing:
        found.append(Answer(f"{count(len(missing), 'picture')} of the run folder could not be shown here."))
    return found


def _sentence(metric: str) -> str:
    """A metric's name at the beginning of a sentence."""
    return pretty(metric)[:1].upper() + pretty(metric)[1:]


# -- the light ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trust:
    """The one answer to "can I trust this explanation?": a ``light`` and a ``sentence``."""

    light: Literal["green", "amber", "red"]
    sentence: str


def trust(files: RunFiles) -> Trust:
    """Red where the explanation leaves more open than it says or its concepts depend on chance; amber where something
    should be read first; green where it covers most of the predictions, comes back, and was scored on enough images.
    """
    if files.scores is None:
        return Trust("red", "Not yet: nothing was scored in this run.")
    typical, judged = typical_share(files), num_judged(files)
    unstable, known = unstable_concepts(files)
    values = {score["metric"]: (score["value"], v) for score, v in verdicts_of(files) if score["value"] is not None}
    red: list[str] = []
    amber: list[str] = []
    good: list[str] = []
    if files.run["data"]["num_heldout"] == 0:
        red.append("no image was held out")
    if typical is None:
        amber.append("how much of a prediction its concepts explain was not measured")
    else:
        only = "only " if typical["share"] < HALF else ""
        place = red if typical["share"] < HALF else amber if typical["share"] < MOST else good
        place.append(f"the concepts explain {only}{share_text(typical)}")
    if "agreement" in values:
        agreement, judged_so = values["agreement"]
        low = judged_so.standing == "poor" and level("agreement", agreement)[0] == "poor"
        text = f"{percent(agreement)} of the predictions stay the same when only the concepts are left"
        place = red if low else good if judged_so.standing == "better" else amber
        place.append(text if judged_so.standing != "poor" or low else judged_so.words.replace("says little: ", ""))
    if known and unstable > known / 2:
        red.append(f"{unstable} of {known} concepts did not come back with other seeds")
    elif unstable:
        amber.append(f"{unstable} of {known} concepts did not come back with other seeds")
    elif known:
        good.append("they come back with other seeds")
    else:
        amber.append("whether other seeds find the same concepts was not measured")
    if judged is not None and judged < FEW_IMAGES:
        amber.append(f"only {count(judged, 'image')} {'was' if judged == 1 else 'were'} scored")
    if red:
        return Trust("red", f"Not by itself: {listed(red[:2])}.")
    if amber:
        return Trust("amber", f"With care: {listed(amber[:2])}.")
    return Trust("green", f"Yes, for what it covers: {listed(good)}.")


def answer_lines(files: RunFiles, *, concepts: int = 3) -> list[str]:
    """The answer of a run in at most ten lines of text: what it looks at, whether to trust it, and why not."""
    run, content = files.run, files.concepts
    judged = num_judged(files)
    scored = "" if judged is None or files.scores is None else f", scored on {count(judged, 'image')}"
    name = f"{model_name(run['model'])} at {run['layer']}"
    lines = [f"{name}: {count(len(content['concepts']), 'concept')} by {run['method']}{scored}"]
    leading = sorted(content["concepts"], key=lambda c: -abs(c["importance"] or 0))[:concepts]
    for concept in leading:
        title = concept["label"]["text"] if concept["label"] else concept["name"]
        lines.append(f"  {brief(title)}: {concept_sentence(concept, content)}")
    answer, found = trust(files), what_to_distrust(files, [])
    lines.append(f"Can I trust it? {answer.sentence}")
    lines += [f"  - {brief(remark.text, 200)}" for remark in found[:SHOWN]]
    if found[SHOWN:]:
        lines.append(f"  - {count(len(found) - SHOWN, 'more remark')} in the report")
    return lines

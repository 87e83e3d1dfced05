"""From results to records: scores with baselines, verdicts against random, differences between methods.

A score is marked *not distinguishable from random* unless it is better than both controls (those of the two that
exist for it): random directions with as many concepts (as many fits), and the method's own decoder applied to the
codes of another image. Better means that the interval of the paired difference (``paired.py``) lies wholly on the
better side; for a metric without one, that it does not contain 0. Scores of the dictionary alone, which need no
images, are compared with random dictionaries: their interval must lie on the better side of the best of these.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch

from netgloss.classifiers.heads import Outputs
from netgloss.evaluation.faithful import FAITHFULNESS, RANDOM_RANKING
from netgloss.evaluation.judge import DISSECTION, Result
from netgloss.evaluation.paired import ROUNDING, Difference, Measured, difference
from netgloss.evaluation.subjects import Subject
from netgloss.metrics import Score, image_metrics, image_score
from netgloss.metrics.base import ImageMetric, interval

RANDOM = ("random_directions", "shuffled_codes")
"""Controls that a score must beat."""
_FIRST = (
    *("r2", "r2_feature_mean", "agreement", "kl", "accuracy_change", "completeness"),
    *("l0", "l0_share", "hoyer", "dead_share", "stability", "collinearity", "collinearity_max", DISSECTION),
    *("c_gain_logit", "c_insertion_logit", "c_deletion_logit", "c_carried_logit", "surrogate_departure"),
)
"""Metrics in the order in which they are shown; others follow."""
_DICTIONARIES = ("random_dictionary", "shuffled_dictionary", "random_directions")
"""Baselines of scores that need no images."""
_DISSECTION_TEXT = (
    "Mean over concepts of the IoU with the part that they fit best on other annotated images, all methods at the same "
    "on-rate ({}). Baselines: the same masks on another image's labels (layout), and scattered at random. It "
    "cannot show concepts that nobody annotated, and a few good detectors among many idle concepts have a low mean."
)


@dataclass(frozen=True)
class Meaning:
    """What is known of a metric besides its numbers."""

    definition: str
    bounds: tuple[float, float]
    higher_is_better: bool | None
    of_rows: bool
    """Reads activations or concepts: comparable only between methods that see the same rows."""


def meanings(rule: str = "", outputs: Outputs = "multiclass") -> dict[str, Meaning]:
    """Every metric that is measured on images, by name, for logits of the kind ``outputs``; ``rule`` is the on-rate of
    the dissection.
    """

    def of(cls: type[ImageMetric], *, of_rows: bool) -> Meaning:
        return Meaning(cls.definition, cls.bounds, cls.higher_is_better, of_rows)

    rows = {"activation", "reconstruction", "concepts", "contributions"}
    known = {cls.name: of(cls, of_rows=bool(rows & set(cls.inputs))) for cls in image_metrics(outputs)}
    known |= {name: of(cls, of_rows=False) for name, cls in FAITHFULNESS.items()}
    known[DISSECTION] = Meaning(_DISSECTION_TEXT.format(rule), (0.0, 1.0), True, True)
    return known


def _question(metric: str) -> str:
    if metric == DISSECTION:
        return "dissection"
    return "faithfulness" if metric in FAITHFULNESS else "scores"


def subject_scores(subject: Subject, question: str = "scores", *, outputs: Outputs = "multiclass") -> list[Score]:
    """Score records of one subject for one question, with its baselines; undefined scores are left out.

    Parameters
    ----------
    outputs : the kind of the classifier's logits.
    """
    known = meanings(outputs=outputs)
    records = []
    for metric in subject.results.get(question, [Result({}, {})])[0].numbers:
        if metric.startswith(RANDOM_RANKING):
            continue
        own = combine(subject.results[question], metric, "")
        if own is not None and own.defined:
            meaning = known.get(metric) or known[metric.partition(":")[0]]
            records.append(_score(subject, metric, meaning, own, dict(_baselines(subject, metric, ""))))
    return records


def image_scores(
    measured: Sequence[Mapping[str, ImageMetric]], baselines: Mapping[str, Sequence[Mapping[str, ImageMetric]]]
) -> list[Score]:
    """Score records from filled metrics, one dict per seed, with their baselines; undefined ones are left out."""
    scores = []
    for name in measured[0]:
        of_baselines = {
            baseline: fmean(float(metrics[name].compute()) for metrics in filled)
            for baseline, filled in baselines.items()
            if all(name in metrics for metrics in filled)
        }
        score = image_score([metrics[name] for metrics in measured], baselines=of_baselines)
        if score.value is not None and math.isfinite(score.value):
            scores.append(score)
    return scores


def comparison_parts(
    subjects: Sequence[Subject], images: Mapping[str, str], rule: str, outputs: Outputs
) -> dict[str, Any]:
    """The parts ``metrics``, ``scores``, ``verdicts`` and ``differences`` of ``comparison.json``.

    Parameters
    ----------
    images : identifies the set of images of each question.
    rule : the on-rate of the dissection. outputs : the kind of the classifier's logits.
    """
    known = meanings(rule, outputs)
    scores: dict[str, dict[str, Any]] = {}
    verdicts: dict[str, dict[str, Any]] = {}
    measured: dict[str, dict[str, Measured]] = {}
    evaluated = [subject for subject in subjects if not subject.reason]
    for subject in evaluated:
        scores[subject.name], verdicts[subject.name] = {}, {}
        for metric, meaning in known.items():
            on = images.get(_question(metric), "")
            own = combine(subject.results.get(_question(metric), []), metric, on)
            if own is None or not own.defined:
                continue
            baselines = dict(_baselines(subject, metric, on))
            against = {
                name: difference(own, other) for name, other in baselines.items() if name in (*RANDOM, "natural_axes")
            }
            scores[subject.name][metric] = _score(subject, metric, meaning, own, baselines).to_dict()
            verdicts[subject.name][metric] = _verdict(against, meaning.higher_is_better)
            measured.setdefault(metric, {})[subject.name] = own
        for score in subject.dictionary:
            scores[subject.name][score.metric] = score.to_dict()
            verdicts[subject.name][score.metric] = _dictionary_verdict(score)
    return {
        "metrics": _metrics(scores, verdicts, subjects),
        "scores": scores,
        "verdicts": verdicts,
        "differences": _differences(measured, known, {s.name: s.view.pooled for s in evaluated}),
    }


def combine(results: Sequence[Result], metric: str, images: str) -> Measured | None:
    """One metric over the fits of a method; None if a fit lacks it."""
    if not results or any(metric not in result.numbers for result in results):
        return None
    rows = torch.stack([result.numbers[metric] for result in results])
    return Measured(rows[:, 0], rows[:, 1:], images)


def _baselines(subject: Subject, metric: str, images: str) -> Iterator[tuple[str, Measured]]:
    """The same metric of each control of the subject."""
    question = _question(metric)
    for name, by_question in subject.baselines.items():
        other = combine(by_question.get(question, []), metric, images)
        if other is not None and other.defined:
            yield name, other
    own = subject.results.get(question, [])
    names = {"random_ranking": RANDOM_RANKING + metric}
    names |= {f"{kind}_chance": f"{kind}_chance {metric}" for kind in ("layout", "scattered")}
    for name, stored in names.items():
        other = combine(own, stored, images)
        if other is not None and other.defined:
            yield name, other


def _score(subject: Subject, metric: str, meaning: Meaning, own: Measured, baselines: Mapping[str, Measured]) -> Score:
    low, high = interval(own.values, own.replicates, bounds=meaning.bounds)
    return Score(
        metric=metric,
        value=float(own.values.mean()),
        low=low,
        high=high,
        baselines={name: fmean(other.values.tolist()) for name, other in baselines.items()},
        n=subject.results[_question(metric)][0].counts[metric],
        seeds=len(own.values),
        higher_is_better=meaning.higher_is_better,
        definition=meaning.definition,
    )


def _verdict(against: Mapping[str, Difference], higher_is_better: bool | None) -> dict[str, Any]:
    verdicts: dict[str, dict[str, Any]] = {
        name: {
            "difference": one.value,
            "low": one.low,
            "high": one.high,
            "verdict": one.verdict(higher_is_better),
        }
        for name, one in against.items()
    }
    return {"against": verdicts, "mark": _mark([v["verdict"] for n, v in verdicts.items() if n in RANDOM])}


def _mark(verdicts: Sequence[str]) -> str:
    """One of "beats random", "worse than random", "not distinguishable from random", "differs from random" or ""."""
    known = [verdict for verdict in verdicts if verdict != "unknown"]
    if not known:
        return ""
    if "same" in known:
        return "not distinguishable from random"
    if "worse" in known:
        return "worse than random"
    return "differs from random" if "higher" in known or "lower" in known else "beats random"


def _dictionary_verdict(score: Score) -> dict[str, Any]:
    """A score without images against the best of the random dictionaries, as fixed numbers."""
    others = {n: v for n, v in score.baselines.items() if n in _DICTIONARIES and v is not None and math.isfinite(v)}
    better = score.higher_is_better
    if score.value is None or better is None or not others:
        return {"against": {}, "mark": ""}
    low, high = (score.value if end is None or not math.isfinite(end) else end for end in (score.low, score.high))
    best = max(others.values()) if better else min(others.values())
    if low - ROUNDING <= best <= high + ROUNDING:
        mark = "not distinguishable from random"
    else:
        mark = "beats random" if (score.value > best) == better else "worse than random"
    against = {name: {"difference": score.value - value} for name, value in others.items()}
    return {"against": against, "mark": mark}


def _metrics(
    scores: Mapping[str, Mapping[str, Any]], verdicts: Mapping[str, Mapping[str, Any]], subjects: Sequence[Subject]
) -> list[dict[str, Any]]:
    """Each metric once, the most asked for first, with how many methods it distinguishes from random."""
    methods = [subject.name for subject in subjects if subject.kind != "control" and subject.name in scores]
    records = []
    there = dict.fromkeys(metric for record in scores.values() for metric in record)
    for metric in [*(m for m in _FIRST if m in there), *(m for m in there if m not in _FIRST)]:
        record = next(r[metric] for r in scores.values() if metric in r)
        marks = [verdicts[name][metric]["mark"] for name in methods if metric in scores[name]]
        counted = [mark for mark in marks if mark]
        records.append(
            {
                "name": metric,
                "higher_is_better": record["higher_is_better"],
                "definition": record["definition"],
                "methods": len(counted),
                "beat_random": sum(mark in ("beats random", "differs from random") for mark in counted),
                "not_distinguishable": sum(mark == "not distinguishable from random" for mark in counted),
                "worse_than_random": sum(mark == "worse than random" for mark in counted),
            }
        )
    return records


def _differences(
    measured: Mapping[str, Mapping[str, Measured]], known: Mapping[str, Meaning], pooled: Mapping[str, bool]
) -> dict[str, list[dict[str, Any]]]:
    """Every pair of methods whose scores are of the same rows, by metric."""
    differences: dict[str, list[dict[str, Any]]] = {}
    for metric, by_name in measured.items():
        names = list(by_name)
        for i, a in enumerate(names):
            for b in names[i + 1 :]:
                if known[metric].of_rows and pooled[a] != pooled[b]:
                    continue
                one = difference(by_name[a], by_name[b])
                record = {"a": a, "b": b, "value": one.value, "low": one.low, "high": one.high}
                record["verdict"] = one.verdict(known[metric].higher_is_better)
                differences.setdefault(metric, []).append(record)
    return differences

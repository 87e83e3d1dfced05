"""From measured answers to the comparison's record: scores, verdicts against random, pairwise differences.

A score is marked *not distinguishable from random* unless it is better than both controls (those of the two that
exist for it): random directions with as many concepts (as many fits), and the method's own decoder fed the codes of
another image. Better means that the interval of the paired difference (``paired.py``) lies wholly on the good side; for
a score without a good side, that it does not hold 0. Scores of the dictionary alone, which see no images, are compared
with the random dictionaries beside them: their interval must lie on the good side of the best of these.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from netgloss.evaluation.faithful import FAITHFULNESS, RANDOM_RANKING
from netgloss.evaluation.judge import Answer, View, together
from netgloss.evaluation.paired import ROUNDING, Difference, Measured, difference
from netgloss.explainers.base import Explainer
from netgloss.metrics import Score, image_metrics
from netgloss.metrics.base import ImageMetric, interval

RANDOM = ("random_directions", "shuffled_codes")
"""Controls that a score must beat."""
DISSECTION = "dissection_mean_iou"
_FIRST = (
    *("r2", "r2_feature_mean", "agreement", "kl", "accuracy_change", "completeness"),
    *("l0", "l0_share", "hoyer", "dead_share", "stability", "collinearity", "collinearity_max", DISSECTION),
    *("c_gain_logit", "c_insertion_logit", "c_deletion_logit", "c_carried_logit", "surrogate_departure"),
)
"""Metrics in the order in which they are shown; others follow."""
_AGAINST = ("random_dictionary", "shuffled_dictionary", "random_directions")
_DISSECTION_TEXT = (
    "Mean over concepts of the IoU with the part that they fit best on other annotated images, all methods at the same "
    "on-rate ({}). Beside it what the same masks reach on another image's labels (layout) and scattered at random. It "
    "cannot show concepts that nobody annotated, and a few good detectors among many idle concepts have a low mean."
)


@dataclass
class Entry:
    """A row of the comparison.

    Attributes
    ----------
    kind : "method", "control", "foreign" (made elsewhere).
    seeds : of the fits; one for a method that does not depend on it.
    reason : why it was not measured; empty if it was.
    answers : by question, one answer a fit ("shuffled" has one).
    beside : answers of other subjects by control's name and question.
    """

    name: str
    method: str
    kind: str = "method"
    config: dict[str, Any] = field(default_factory=dict)
    explainers: list[Explainer] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    seconds: float | None = None
    notes: list[str] = field(default_factory=list)
    run: str = ""
    reason: str = ""
    answers: dict[str, list[Answer]] = field(default_factory=dict)
    beside: dict[str, dict[str, list[Answer]]] = field(default_factory=dict)
    dictionary: list[Score] = field(default_factory=list)

    @property
    def view(self) -> View:
        """How its explainers see the layer."""
        explainer = self.explainers[0]
        return View(explainer.reads == "pooled", tuple(explainer.spec.upper) if explainer.target == "upper" else ())

    def about(self) -> dict[str, Any]:
        """What the record says of the row itself."""
        explainer = self.explainers[0] if self.explainers else None
        return {
            "name": self.name,
            "method": self.method,
            "kind": self.kind,
            "config": self.config,
            "reads": explainer.reads if explainer else None,
            "target": explainer.target if explainer else None,
            "num_concepts": explainer.num_concepts if explainer else None,
            "seeds": self.seeds,
            "deterministic": bool(explainer.deterministic) if explainer else None,
            "fit_seconds": self.seconds,
            "notes": self.notes,
            "run": self.run,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Meaning:
    """What is known of a metric besides its numbers."""

    definition: str
    bounds: tuple[float, float]
    higher_is_better: bool | None
    of_rows: bool
    """Reads activations or concepts: comparable only between methods that see the same rows."""


def meanings(rule: str) -> dict[str, Meaning]:
    """Every metric of a comparison that sees images, by name."""

    def of(cls: type[ImageMetric], *, of_rows: bool) -> Meaning:
        return Meaning(cls.definition, cls.bounds, cls.higher_is_better, of_rows)

    rows = {"activation", "reconstruction", "concepts", "contributions"}
    found = {cls.name: of(cls, of_rows=bool(rows & set(cls.inputs))) for cls in image_metrics()}
    found |= {name: of(cls, of_rows=False) for name, cls in FAITHFULNESS.items()}
    found[DISSECTION] = Meaning(_DISSECTION_TEXT.format(rule), (0.0, 1.0), True, True)
    return found


def _question(metric: str) -> str:
    if metric == DISSECTION:
        return "dissection"
    return "faithfulness" if metric in FAITHFULNESS else "scores"


def score_entries(entries: Sequence[Entry], images: Mapping[str, str], rule: str) -> dict[str, Any]:
    """The parts ``metrics``, ``scores``, ``verdicts`` and ``differences`` of the record.

    Parameters
    ----------
    images : names the set of images of each question.
    """
    known = meanings(rule)
    scores: dict[str, dict[str, Any]] = {}
    verdicts: dict[str, dict[str, Any]] = {}
    measured: dict[str, dict[str, Measured]] = {}
    judged = [entry for entry in entries if not entry.reason]
    for entry in judged:
        scores[entry.name], verdicts[entry.name] = {}, {}
        for metric, meaning in known.items():
            where = images.get(_question(metric), "")
            own = together(entry.answers.get(_question(metric), []), metric, where)
            if own is None or not own.defined:
                continue
            beside = dict(_beside(entry, metric, where))
            against = {
                name: difference(own, other) for name, other in beside.items() if name in (*RANDOM, "natural_axes")
            }
            scores[entry.name][metric] = _score(entry, metric, meaning, own, beside).to_dict()
            verdicts[entry.name][metric] = _verdict(against, meaning.higher_is_better)
            measured.setdefault(metric, {})[entry.name] = own
        for score in entry.dictionary:
            scores[entry.name][score.metric] = score.to_dict()
            verdicts[entry.name][score.metric] = _dictionary_verdict(score)
    return {
        "metrics": _metrics(scores, verdicts, entries),
        "scores": scores,
        "verdicts": verdicts,
        "differences": _differences(measured, known, {e.name: e.view.pooled for e in judged}),
    }


def _beside(entry: Entry, metric: str, images: str) -> Iterator[tuple[str, Measured]]:
    """The same metric of each control of the entry."""
    question = _question(metric)
    for name, by_question in entry.beside.items():
        other = together(by_question.get(question, []), metric, images)
        if other is not None and other.defined:
            yield name, other
    own = entry.answers.get(question, [])
    names = {"random_ranking": RANDOM_RANKING + metric}
    names |= {f"{kind}_chance": f"{kind}_chance {metric}" for kind in ("layout", "scattered")}
    for name, stored in names.items():
        other = together(own, stored, images)
        if other is not None and other.defined:
            yield name, other


def _score(entry: Entry, metric: str, meaning: Meaning, own: Measured, beside: Mapping[str, Measured]) -> Score:
    answer = entry.answers[_question(metric)][0]
    low, high = interval(own.values, own.replicates, bounds=meaning.bounds)
    return Score(
        metric=metric,
        value=float(own.values.mean()),
        low=low,
        high=high,
        baselines={name: fmean(other.values.tolist()) for name, other in beside.items()},
        n=answer.counts[metric],
        seeds=len(own.values),
        higher_is_better=meaning.higher_is_better,
        definition=meaning.definition,
    )


def _verdict(against: Mapping[str, Difference], higher_is_better: bool | None) -> dict[str, Any]:
    found: dict[str, dict[str, Any]] = {
        name: {
            "difference": one.value,
            "low": one.low,
            "high": one.high,
            "verdict": one.verdict(higher_is_better),
        }
        for name, one in against.items()
    }
    return {"against": found, "mark": _mark([v["verdict"] for n, v in found.items() if n in RANDOM])}


def _mark(told: Sequence[str]) -> str:
    """ "beats random", "worse than random", "not distinguishable from random", "differs from random" or ""."""
    known = [verdict for verdict in told if verdict != "unknown"]
    if not known:
        return ""
    if "same" in known:
        return "not distinguishable from random"
    if "worse" in known:
        return "worse than random"
    return "differs from random" if "higher" in known or "lower" in known else "beats random"


def _dictionary_verdict(score: Score) -> dict[str, Any]:
    """A score without images against the best of the random dictionaries, as fixed numbers."""
    others = {n: v for n, v in score.baselines.items() if n in _AGAINST and v is not None and math.isfinite(v)}
    better = score.higher_is_better
    if score.value is None or better is None or not others:
        return {"against": {}, "mark": ""}
    low, high = (score.value if end is None or not math.isfinite(end) else end for end in (score.low, score.high))
    best = max(others.values()) if better else min(others.values())
    if low - ROUNDING <= best <= high + ROUNDING:
        mark = "not distinguishable from random"
    else:
        mark = "beats random" if (score.value > best) == better else "worse than random"
    told = {name: {"difference": score.value - value} for name, value in others.items()}
    return {"against": told, "mark": mark}


def _metrics(
    scores: Mapping[str, Mapping[str, Any]], verdicts: Mapping[str, Mapping[str, Any]], entries: Sequence[Entry]
) -> list[dict[str, Any]]:
    """Each metric once, the most asked first, with how many methods it tells from random."""
    methods = [entry.name for entry in entries if entry.kind != "control" and entry.name in scores]
    found = []
    there = dict.fromkeys(metric for record in scores.values() for metric in record)
    for metric in [*(m for m in _FIRST if m in there), *(m for m in there if m not in _FIRST)]:
        record = next(r[metric] for r in scores.values() if metric in r)
        marks = [verdicts[name][metric]["mark"] for name in methods if metric in scores[name]]
        counted = [mark for mark in marks if mark]
        found.append(
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
    return found


def _differences(
    measured: Mapping[str, Mapping[str, Measured]], known: Mapping[str, Meaning], pooled: Mapping[str, bool]
) -> dict[str, list[dict[str, Any]]]:
    """Every pair of methods whose scores are of the same rows, by metric."""
    found: dict[str, list[dict[str, Any]]] = {}
    for metric, by_name in measured.items():
        names = list(by_name)
        for i, a in enumerate(names):
            for b in names[i + 1 :]:
                if known[metric].of_rows and pooled[a] != pooled[b]:
                    continue
                one = difference(by_name[a], by_name[b])
                record = {"a": a, "b": b, "value": one.value, "low": one.low, "high": one.high}
                record["verdict"] = one.verdict(known[metric].higher_is_better)
                found.setdefault(metric, []).append(record)
    return found

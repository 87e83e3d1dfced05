"""Mistakes grouped by the concept that drove them.

For an image of class t that the network takes for p, the margin of the mistake splits over the concepts::

    logit_p - logit_t = sum_k (contribution_k to p - contribution_k to t) + rest

The concept with the largest difference drove the mistake; where the rest (base, completeness gap and what the
reconstruction loses) is larger than every concept's share, the concepts do not explain why, and the group says so.

What this cannot show: the group is named after the largest of many shares, not after a cause. ``recognised_without``
counts, among the mistakes that were replayed with the concept taken out (see ``removal.py``), those that end right.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from netgloss.activations.layer import Layer
from netgloss.class_names import compare_classes
from netgloss.metrics.faithfulness.importance import Contributions

MAX_GROUPS = 12
_SHOWN = 6
_PAIRS = 4
_COMPARED = 30


@dataclass(frozen=True)
class Mistake:
    """One image taken for another class; ``concept`` is None where the concepts do not explain why."""

    image: int
    label: int
    predicted: int
    concept: int | None
    share: float
    margin: float


def find_mistakes(
    index: Tensor, logits: Tensor, labels: Tensor, of_label: Contributions, of_prediction: Contributions
) -> list[Mistake]:
    """The mistakes of a batch: ``index`` and ``labels`` (B,), ``logits`` (B, C); label -1 is unknown and no mistake."""
    predicted = logits.argmax(dim=1)
    split = (of_prediction.values - of_label.values).double().cpu()
    found = []
    for b in ((labels >= 0) & (labels != predicted)).nonzero()[:, 0].tolist():
        t, p = int(labels[b]), int(predicted[b])
        margin = float(logits[b, p] - logits[b, t])
        rest = margin - float(split[b].sum())
        concept = int(split[b].argmax())
        share = float(split[b, concept])
        explains = share > 0 and share >= rest
        found.append(Mistake(int(index[b]), t, p, concept if explains else None, share if explains else rest, margin))
    return found


def groups_of(mistakes: list[Mistake]) -> list[tuple[int | None, list[Mistake]]]:
    """The largest groups first, in each the largest share first."""
    members: dict[int | None, list[Mistake]] = {}
    for mistake in mistakes:
        members.setdefault(mistake.concept, []).append(mistake)
    ordered = sorted(members.items(), key=lambda item: (-len(item[1]), -1 if item[0] is None else item[0]))
    return [(concept, sorted(group, key=lambda m: (-m.share, m.image))) for concept, group in ordered[:MAX_GROUPS]]


def shown_images(mistakes: list[Mistake], limit: int) -> list[int]:
    """Images to explain one by one: in turn one of each group, the largest groups first."""
    groups = [group[:_SHOWN] for _, group in groups_of(mistakes)]
    turns = [group[i].image for i in range(_SHOWN) for group in groups if i < len(group)]
    return turns[:limit]


def mistakes_record(
    mistakes: list[Mistake],
    labelled: int,
    place: Mapping[int, int],
    class_names: list[str],
    explained: Mapping[int, dict[str, Any]],
) -> dict[str, Any]:
    """The entry of concepts.json.

    Parameters
    ----------
    labelled : images with a known label. place : store index -> index among the report's images.
    explained : the explanations of single images, with their replays (``removal``), by store index.
    """
    groups = []
    for concept, members in groups_of(mistakes):
        without = [
            _winner_without(explained.get(m.image), concept) == class_names[m.label]
            for m in members
            if _winner_without(explained.get(m.image), concept) is not None
        ]
        pairs = Counter((m.label, m.predicted) for m in members)
        groups.append(
            {
                "concept": concept,
                "count": len(members),
                "share": sum(m.share for m in members) / len(members),
                "margin": sum(m.margin for m in members) / len(members),
                "pairs": [
                    {"label": class_names[t], "prediction": class_names[p], "count": n}
                    for (t, p), n in pairs.most_common(_PAIRS)
                ],
                "images": [place[m.image] for m in members if m.image in place and m.image in explained][:_SHOWN],
                "recognised_without": sum(without),
                "replayed": len(without),
            }
        )
    return {"labelled": labelled, "wrong": len(mistakes), "groups": groups}


def unmatched_classes(layer: Layer, predictions: Mapping[int, tuple[int, float]]) -> list[dict[str, Any]]:
    """Classes of the images that are none of the network, the largest first: their images are neither right nor wrong.

    Parameters
    ----------
    predictions : (class, probability) by store index.
    """
    given, network = list(layer.store.info.class_names), layer.classifier
    if not network.num_classes:  # a network without a head predicts nothing
        return []
    match = compare_classes(given, network.class_names, network.wnids)
    targets = np.asarray(layer.store.targets)
    records: list[dict[str, Any]] = []
    for place in np.flatnonzero(match.index < 0).tolist():
        own = [i for i in np.flatnonzero(targets == place).tolist() if i in predictions]
        if own:
            most, times = Counter(predictions[i][0] for i in own).most_common(1)[0]
            answers = {"prediction": network.class_names[most], "predicted": times}
            records.append({"label": given[place], "images": len(own), "nearest": None, **answers})
    records.sort(key=lambda record: -record["images"])
    for record in records[:_COMPARED]:  # comparing a spelling with a thousand names takes a while
        record["nearest"] = match.nearest(record["label"])
    return records


def _winner_without(explained: dict[str, Any] | None, concept: int | None) -> str | None:
    """The class that wins with the concept taken out; None where that was not replayed."""
    removal = explained["removal"] if explained else None
    if removal is None or concept not in removal["drivers"]:
        return None
    left = removal["at"][removal["drivers"].index(concept)][removal["strengths"].index(0.0)]
    best = max(range(len(left)), key=lambda c: left[c])
    if removal["ceiling"] is not None and removal["ceiling"] > left[best]:
        return None
    return str(removal["classes"][best])

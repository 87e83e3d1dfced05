"""The content of concepts.json: concepts, classes and example images as the report shows them.

Shape letters: B images, K concepts, H W grid, P positions.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from netgloss.activations.layer import Layer
from netgloss.explainers.base import Explainer
from netgloss.explanations.accumulators import EPS, ConceptAccumulators, accumulate_concepts, by_position
from netgloss.explanations.deletion import cross_deletion
from netgloss.explanations.heatmaps import ConceptRange, concept_heatmaps
from netgloss.explanations.images import explain_images
from netgloss.explanations.mistakes import mistakes_record, shown_images, unmatched_classes
from netgloss.explanations.similarity import concept_map, concept_similarity, nearest
from netgloss.metrics.faithfulness.importance import strongest, typical_share
from netgloss.progress import Progress, Silent
from netgloss.runs.verdicts import NAMED_IMAGES

_CONTOUR_QUANTILE = 0.98
_ROWS_FOR_QUANTILE = 200_000
_MATTERS = 0.02


@dataclass(frozen=True)
class ExplanationOptions:
    """How much to show."""

    gallery: int = 9
    """Strongest images shown for each concept."""
    examples: int = 24
    """Held-out images explained one by one."""
    mistakes: int = 24
    """Mistakes explained besides, some of each group."""
    drivers: int = 6
    """Concepts shown for each explained image."""
    max_classes: int = 60
    """Classes shown, most frequent first."""
    histogram_images: int = 2000
    """Images that the activation histograms are drawn from."""


def explain_layer(
    explainer: Explainer,
    layer: Layer,
    *,
    fit_images: np.ndarray,
    heldout_images: np.ndarray,
    stability: list[float] | None,
    affine: bool,
    options: ExplanationOptions | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], dict[str, int]]:
    """The content of concepts.json, and the thumbnails it names (file name -> image index of the store).

    Parameters
    ----------
    stability : per-concept stability over seeds, or None.
    affine : True if the tail from this layer is affine, so that contributions are exact.
    """
    options = options or ExplanationOptions()
    images = np.sort(np.concatenate([fit_images, heldout_images]))
    keep = len(images) <= options.histogram_images  # the histograms are then drawn from all images
    progress = progress or Silent()
    sums = accumulate_concepts(explainer, layer, images, gallery=options.gallery, progress=progress, keep=keep)
    explained_classes = explainer.explained_classes
    candidates = heldout_images if len(heldout_images) else images
    if explained_classes is not None:
        candidates = np.array(
            [i for i in candidates.tolist() if sums.predictions[i][0] in explained_classes], dtype=int
        )
        sums.by_class = {c: entry for c, entry in sums.by_class.items() if c in explained_classes}
    if explained_classes is not None:
        sums.mistakes = [m for m in sums.mistakes if m.predicted in explained_classes]
    examples = _choose_examples(sums, layer, candidates, options)
    examples = sorted({*examples, *shown_images(sums.mistakes, options.mistakes)})
    shown = sorted({*sums.top_images.flatten().tolist(), *examples})
    codes = _codes(explainer, layer, np.array(shown))
    histograms, ranges = _histograms(explainer, layer, sums, images, options)
    drawn = {i: value for part in layer.maps(np.array(shown)) for i, value in _heat(explainer, *part).items()} or codes
    if drawn is not codes:
        ranges = _heatmap_ranges(drawn)
    drove = {m.image: m.concept for m in sums.mistakes if m.concept is not None}
    explained = _explain_examples(explainer, layer, examples, drawn, ranges, options, drove, affine=affine)
    similarity, of = concept_similarity(explainer, layer, images[:: -(-len(images) // options.histogram_images)])
    neighbours = nearest(similarity)
    names = explainer.name_concepts()
    place = {image: position for position, image in enumerate(shown)}
    influence = sums.influence_K / sums.influence_K.sum().clamp_min(EPS)
    concepts = [
        {
            "id": k,
            "name": names[k],
            "label": None,
            "share_active": float(sums.active_K[k] / sums.rows),
            "mean": float(sums.total_K[k] / sums.rows),
            "max": float(sums.high_K[k]),
            "importance": float(influence[k]),
            "histogram": histograms[k],
            "stability": None if stability is None else stability[k],
            "gallery": [
                {"image": place[i], "value": float(codes[i][k].max()), "map": ranges[k].encode(drawn[i][k])}
                for i in sums.top_images[:, k].tolist()
                if float(codes[i][k].max()) > float(sums.low_K[k])  # a dead concept has no strongest image
            ],
            "classes": _served_classes(sums, k, layer.classifier.class_names),
            "neighbours": neighbours[k],
            "scores": {},
        }
        for k in range(sums.num_concepts)
    ]
    pages = _class_pages(sums, layer.classifier.class_names, options)
    if explained_classes is not None and drawn is not codes and layer.source is not None:
        _add_deletion(pages, explainer, layer, candidates, sums)
    content = {
        "format_version": 1,
        "layer": layer.name,
        "grid": list(layer.store.shapes[layer.name][1:] if drawn is not codes else explainer.spec.grid),
        "importance": (
            _importance_note(sums, candidates.tolist(), affine=affine, own=explained_classes is not None)
            if layer.classifier.num_classes
            else {"kind": "none", "definition": "The network has no head, so that concepts add to no logit."}
        ),
        "images": _image_entries(sums, layer, shown, set(heldout_images.tolist()), explained),
        "concepts": concepts,
        "map": concept_map(similarity, of),
        "unmatched": unmatched_classes(layer, sums.predictions),
        "mistakes": mistakes_record(sums.mistakes, sums.labelled, place, layer.classifier.class_names, explained),
        "classes": pages,
    }
    return content, {_thumbnail(i): i for i in shown}


def _thumbnail(image: int) -> str:
    return f"{image:07d}.webp"


def _codes(explainer: Explainer, layer: Layer, images: np.ndarray) -> dict[int, np.ndarray]:
    """Codes (K,) or (K, H, W) of the images that are shown."""
    found: dict[int, np.ndarray] = {}
    with torch.no_grad():
        for batch in layer.batches(images):
            found.update(zip(batch.index.tolist(), explainer.encode(batch.activation).cpu().numpy(), strict=True))
    return found


def _heat(explainer: Explainer, images: np.ndarray, maps: torch.Tensor) -> dict[int, np.ndarray]:
    """Heatmaps (K, H, W) of the concepts of a pooled layer, by image."""
    heat = concept_heatmaps(explainer.encode, maps, range(explainer.num_concepts)).half().cpu().numpy()
    return dict(zip(images.tolist(), heat, strict=True))


def _heatmap_ranges(heat: dict[int, np.ndarray]) -> list[ConceptRange]:
    """One scale per concept over the images shown; the contour is at half of its strongest value."""
    tops = np.max([value.max(axis=(1, 2)) for value in heat.values()], axis=0).astype(float)
    return [ConceptRange(low=0.0, high=top, contour=top / 2) for top in tops.tolist()]


def _histograms(
    explainer: Explainer,
    layer: Layer,
    sums: ConceptAccumulators,
    images: np.ndarray,
    options: ExplanationOptions,
    bins: int = 24,
) -> tuple[list[dict[str, Any]], list[ConceptRange]]:
    """Histogram of each concept's peak in an image; contour at the concept's 98 % quantile over positions."""
    picked = images[:: max(1, -(-len(images) // options.histogram_images))]
    rng = np.random.default_rng(0)
    peaks, rows = [], []
    for codes_BKP in sums.codes or _codes_by_position(explainer, layer, picked):
        values = codes_BKP.numpy()
        peaks.append(values.max(axis=2))
        flat = values.transpose(0, 2, 1).reshape(-1, values.shape[1])
        keep = min(len(flat), _ROWS_FOR_QUANTILE * len(values) // len(picked) + 1)
        rows.append(flat[rng.choice(len(flat), size=keep, replace=False)])
    peak_NK = np.concatenate(peaks)
    quantile_K = np.quantile(np.concatenate(rows), _CONTOUR_QUANTILE, axis=0)
    histograms, ranges = [], []
    for k in range(sums.num_concepts):
        low, high = float(peak_NK[:, k].min()), float(peak_NK[:, k].max())
        counts, edges = np.histogram(peak_NK[:, k], bins=bins, range=(low, high if high > low else low + 1))
        histograms.append({"edges": edges.tolist(), "counts": counts.tolist()})
        top = float(sums.high_K[k])
        contour = min(float(quantile_K[k]), 0.9 * top) if quantile_K[k] > 0 else 0.5 * top
        ranges.append(ConceptRange(low=min(float(sums.low_K[k]), 0.0), high=top, contour=contour))
    return histograms, ranges


def _codes_by_position(explainer: Explainer, layer: Layer, images: np.ndarray) -> Iterator[torch.Tensor]:
    """(B, K, P) of every batch."""
    with torch.no_grad():
        for batch in layer.batches(images):
            yield by_position(explainer.encode(batch.activation))


def _choose_examples(
    sums: ConceptAccumulators, layer: Layer, images: np.ndarray, options: ExplanationOptions
) -> list[int]:
    """Images to explain one by one: in turn a sure hit and a sure mistake of each class, large classes first."""
    labels = layer.labels
    groups: dict[int, list[int]] = {}
    for i in images.tolist():
        predicted = sums.predictions.get(i, (-1, 0.0))[0]
        groups.setdefault(int(labels[i]) if labels[i] >= 0 else predicted, []).append(i)
    queues = []
    for members in sorted(groups.values(), key=len, reverse=True):
        surest = sorted(members, key=lambda i: -sums.predictions.get(i, (-1, 0.0))[1])
        wrong = [i for i in surest if labels[i] >= 0 and sums.predictions[i][0] != labels[i]]
        right = [i for i in surest if i not in set(wrong)]
        queues.append([i for pair in itertools.zip_longest(right, wrong) for i in pair if i is not None])
    turns = itertools.chain.from_iterable(itertools.zip_longest(*queues))
    return list(itertools.islice((i for i in turns if i is not None), options.examples))


def _explain_examples(
    explainer: Explainer,
    layer: Layer,
    examples: list[int],
    drawn: dict[int, np.ndarray],
    ranges: list[ConceptRange],
    options: ExplanationOptions,
    drove: dict[int, int],
    *,
    affine: bool,
) -> dict[int, dict[str, Any]]:
    """``drove``: the concept behind each mistake, which is then among the drivers that are shown."""
    if explainer.target == "image" or not examples or not layer.classifier.num_classes:
        return {}
    found: dict[int, dict[str, Any]] = {}
    for batch in layer.batches(np.array(sorted(examples))):
        images = batch.index.tolist()
        explained = explain_images(
            explainer,
            batch,
            layer.classifier.class_names,
            maps=[drawn[image] for image in images],
            drivers=options.drivers,
            also=[drove.get(image) for image in images],
            affine=affine,
        )
        found.update({image: one.record(ranges) for image, one in zip(images, explained, strict=True)})
    return found


def _image_entries(
    sums: ConceptAccumulators, layer: Layer, shown: list[int], heldout: set[int], explained: dict[int, dict[str, Any]]
) -> list[dict[str, Any]]:
    names, labels, targets = layer.classifier.class_names, layer.labels, layer.store.targets
    entries = []
    for i in shown:
        own_name = layer.store.info.class_names[targets[i]] if targets[i] >= 0 else None
        if layer.classifier.outputs == "multilabel":  # another strongest label would look like a mistake
            own_name = None
        predicted, probability = sums.predictions.get(i, (None, None))
        entries.append(
            {
                "id": layer.store.ids[i],
                "label": names[labels[i]] if labels[i] >= 0 else own_name,
                "known": bool(labels[i] >= 0),
                "prediction": None if predicted is None else names[predicted],
                "probability": probability,
                "thumbnail": f"images/{_thumbnail(i)}",
                "split": "held-out" if i in heldout else "fit",
                "explained": explained.get(i),
            }
        )
    return entries


def _served_classes(sums: ConceptAccumulators, concept: int, names: list[str], limit: int = 5) -> list[dict[str, Any]]:
    """Classes whose logit the concept raises most, with its share of the class's absolute contributions.

    Classes of a few images come last: a single image can have a large mean.
    """
    raised = []
    for c, entry in sums.by_class.items():
        mean_K = entry.contribution_K / entry.images
        share = float(mean_K[concept].abs() / mean_K.abs().sum().clamp_min(EPS))
        raised.append((entry.images >= NAMED_IMAGES, float(mean_K[concept]), share, names[c], entry.images))
    top = sorted((entry for entry in raised if entry[1] > 0), reverse=True)[:limit]
    return [
        {"class": name, "contribution": mean, "share": share, "images": images}
        for _, mean, share, name, images in sorted(top, key=lambda entry: -entry[1])
    ]


def _class_pages(
    sums: ConceptAccumulators, names: list[str], options: ExplanationOptions, limit: int = 12
) -> list[dict[str, Any]]:
    pages = []
    for c, entry in sorted(sums.by_class.items(), key=lambda item: -item[1].images)[: options.max_classes]:
        n = entry.images
        mean_K = entry.contribution_K / n
        error_K = ((entry.squares_K / n - mean_K**2).clamp_min(0) / max(n - 1, 1)).sqrt()
        half_K = 1.96 * error_K if n > 1 else torch.full_like(mean_K, float("nan"))
        pages.append(
            {
                "class": names[c],
                "num_images": n,
                "accuracy": entry.correct / entry.labelled if entry.labelled else None,
                "agreement": entry.agree / n,
                "mean_logit": entry.logit / n,
                "base": entry.base / n,
                "gap": entry.gap / n,
                "concepts": [
                    {
                        "concept": k,
                        "contribution": float(mean_K[k]),
                        "low": float(mean_K[k] - half_K[k]),
                        "high": float(mean_K[k] + half_K[k]),
                        "share": float(mean_K[k].abs() / mean_K.abs().sum().clamp_min(EPS)),
                    }
                    for k in strongest(mean_K, limit)
                ],
            }
        )
    return pages


def _add_deletion(
    pages: list[dict[str, Any]], explainer: Explainer, layer: Layer, images: np.ndarray, sums: ConceptAccumulators
) -> None:
    """The cross-deletion matrix of each class, on its surest images."""
    for page in pages:
        c = layer.classifier.class_names.index(page["class"])
        own = [i for i in images.tolist() if sums.predictions[i][0] == c]
        surest = sorted(own, key=lambda i: -sums.predictions[i][1])
        concepts = [entry["concept"] for entry in page["concepts"] if entry["share"] >= _MATTERS]
        if own and concepts:
            page["deletion"] = cross_deletion(explainer, layer, np.array(surest), concepts)


def _importance_note(sums: ConceptAccumulators, images: list[int], *, affine: bool, own: bool) -> dict[str, Any]:
    """How contributions are computed, and what they explain of the predictions of ``images``."""
    shares = torch.tensor([sums.shares.get(i, torch.nan) for i in images], dtype=torch.float64)
    typical = typical_share(shares)
    what = "its code times the gradient of the class's logit with respect to it, summed over positions"
    if own:
        what = "its weight in the class's rebuilt score times its value"
        sum_text = "Base and contributions add up to the rebuilt score exactly"
    elif affine:
        sum_text = (
            "The network is affine from this layer on, so base and contributions add up to the rebuilt logit exactly"
        )
    else:
        sum_text = (
            "The network is not linear from this layer on, so base and contributions only approximate the rebuilt "
            "logit; the completeness gap is what they leave unexplained"
        )
    return {
        "kind": "exact" if affine or own else "gradient x concept",
        "completeness_gap": {
            "mean_abs": sums.abs_gap / sums.explained if sums.explained else None,
            "relative": sums.abs_gap / sums.abs_scale if sums.abs_scale else None,
        },
        "explained": typical
        and {
            "share": typical[0],
            "low": typical[1],
            "high": typical[2],
            "images": int(shares.isfinite().sum()),
        },
        "definition": f"A concept's contribution is {what}. {sum_text}. What the reconstruction itself loses "
        "is part of the gap: the logit that it is compared with is the network's own.",
    }

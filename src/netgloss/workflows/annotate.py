"""Judges a fitted run against masks: dissection scores beside controls at the same on-rate, and labels for its
concepts.

Labels and thresholds come from 60 % of the annotated images, scores from the others, which must not be images of the
fit.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from netgloss.activations import CaptureOptions, Store, capture
from netgloss.activations.annotated import MaskedLayer, split_annotated
from netgloss.activations.layer import check_origin, split_store
from netgloss.errors import UserError
from netgloss.evaluation.dissect import Dissected, dissect, significance
from netgloss.evaluation.locate import landmarks_of, location_scores, peaks_of
from netgloss.evaluation.measure import make_controls
from netgloss.metrics import Score, interval
from netgloss.metrics.dissection.detectors import DETECTOR_IOU
from netgloss.metrics.dissection.rates import PUBLISHED_RATE
from netgloss.metrics.location import part_interpretability
from netgloss.progress import Progress, Silent
from netgloss.runs.run import Run, save_figure, to_json, write_atomically
from netgloss.training import ActivationStream

if TYPE_CHECKING:
    from netgloss.classifiers import Classifier
    from netgloss.data import ImageSource
    from netgloss.explainers.base import Explainer

_MEANING = {
    "S1": "sum over concepts of the IoU with their label's mask; grows with the number of concepts and the on-rate",
    "S1x": "S1 less what scattered masks of the same sizes reach",
    "S1xl": "S1 less what the same masks reach on another image's labels, so without what layout alone gives",
    "S2": "sum over labels of the best IoU of their concepts; cannot exceed the number of labels",
    "S2x": "S2 less what scattered masks of the same sizes reach",
    "S2xl": "S2 less what the same masks reach on another image's labels",
    "detectors": f"concepts with an IoU above {DETECTOR_IOU}; a mask of the right size passes it by chance",
    "unique_detectors": f"distinct labels among the concepts with an IoU above {DETECTOR_IOU}",
}
_SHOWN = 12
_LARGEST_RATE = 0.9999
_SAME = 1e-3
"""Distance of two images' answers, in mean distances from the middle, below which they are the same image."""


def open_annotated(annotations: str, source: ImageSource | None) -> ImageSource:
    """The annotated images: those beside the annotations (a folder ``images``), scenes that annotate themselves
    (``critters:N,seed=S``), else ``source``, the run's own images."""
    from netgloss.data import open_images

    path = Path(annotations)
    if not path.exists() and annotations.split(":")[0] == "critters":
        return open_images(annotations)
    folder = path if path.is_dir() else path.parent
    if (folder / "images").is_dir():
        return open_images(folder / "images", annotations=path)
    if source is None and path.exists():
        raise UserError(f"{path} has no folder 'images' beside it: pass the annotated images by --images")
    return open_images(source if source is not None else path, annotations=path)


def dissect_run(
    run: Run,
    annotations: str,
    *,
    store: Store,
    source: ImageSource | None = None,
    classifier: Classifier,
    progress: Progress | None = None,
) -> list[Score]:
    """Adds dissection scores to a run's scores, labels to its concepts, and ``dissection.json`` with every detector.

    Parameters
    ----------
    annotations : see :func:`open_annotated`.
    store : the activations of the fit, for the controls (the layer's own axes, random directions), which are judged at
        the run's own on-rate.
    source : the images of the run, with which annotated ones are compared; else their activations are.

    Raises
    ------
    UserError : no annotations; a score image that the run was fitted on; a store or network that is not the run's.
    """
    progress = progress or Silent()
    if run.explainer.target == "image":
        raise UserError(f"{run.method} decodes the layer's units and has no concepts of its own: label natural-axes")
    run.check_store(store)
    check_origin(store, classifier=classifier)
    images = open_annotated(annotations, source)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "store"
        capturing = CaptureOptions(logits=False)
        captured = capture(classifier, images, [run.layer], out, options=capturing, progress=progress)
        data = MaskedLayer(captured, run.layer, images, classifier.preprocessing)
        label_images, score_images = split_annotated(data)
        fit_images, _ = split_store(store)
        _refuse_fit_images(store, fit_images, data, images, source, score_images)
        label, score = (data, label_images), (data, score_images)
        explainers = [e.cpu() for e in run.explainers()]
        controls = make_controls(
            ActivationStream(store, run.layer, fit_images),
            explainers[0].spec,
            num_concepts=explainers[0].num_concepts,
            seeds=run.seeds,
        )
        published = f"rate:{PUBLISHED_RATE:g}"
        rules = ["own", published]
        progress.start("dissect", len(explainers) + sum(map(len, controls.values())), unit="explainers")
        found, at_published = [], []
        for explainer in explainers:
            by_rule = dissect(explainer, label, score, rules, replicates=200)
            found.append(next(iter(by_rule.values())))
            at_published.append(by_rule[published])
            progress.advance()
        rate = matched_rule([one.label_rate for one in found])
        beside: dict[str, list[Dissected]] = {}
        beside_published: dict[str, list[Dissected]] = {}
        for name, others in controls.items():
            for other in others:
                by_rule = dissect(other.cpu(), label, score, [rate, published])
                beside.setdefault(name, []).append(by_rule[rate])
                beside_published.setdefault(name, []).append(by_rule[published])
                progress.advance()
        progress.finish()
        test = significance(explainers[0], found[0], data, score_images)
        scores = _scores(found, beside, len(score_images), rate)
        scores += _part_scores(at_published, beside_published, len(score_images))
        if len(captured.shapes[run.layer]) == 3:
            unseen = _unseen(store, fit_images, images, source, data.images, score_images)
            scores += _location(explainers, controls, data, images, classifier, unseen)
        old = {score.metric for score in scores}
        kept = [s for s in run.scores if not s.metric.startswith("dissection_") and s.metric not in old]
        run.write_scores(kept + scores)
        records = _records(found[0], test)
        _label_concepts(run, records)
        record = {"annotations": annotations, "rule": found[0].rule, "matched": rate, "concepts": records}
        write_atomically(run.path / "dissection.json", to_json(record))
        _write_proof(run, explainers[0], found[0], records, data, images, classifier, score_images)
    return scores


def matched_rule(rates: Sequence[float]) -> str:
    """The rule at which controls are on as often as the method, on average; always on is no rule, and just missed."""
    return f"rate:{min(float(np.mean(rates)), _LARGEST_RATE):.4g}"


def _refuse_fit_images(
    store: Store,
    fit_images: np.ndarray,
    data: MaskedLayer,
    images: ImageSource,
    source: ImageSource | None,
    score_images: np.ndarray,
) -> None:
    """Score images must not be images of the fit: told by content if the run's images are at hand, else by what the
    layer answers to them."""
    if source is not None and store.key.data_fingerprint == source.fingerprint:
        fitted = {source._digest(int(i)) for i in fit_images}
        shared = [images.ids[i] for i in score_images.tolist() if images._digest(i) in fitted]
    elif store.is_subsampled(data.layer):
        return
    else:
        seen, asked = (_answers(s, data.layer, i) for s, i in ((store, fit_images), (data.store, score_images)))
        centre = seen.mean(0)
        apart = torch.cdist(asked - centre, seen - centre, compute_mode="donot_use_mm_for_euclid_dist").amin(1)
        same = apart < _SAME * seen.sub(centre).norm(dim=1).mean()
        shared = [images.ids[i] for i, found in zip(score_images.tolist(), same.tolist(), strict=True) if found]
    if shared:
        raise UserError(
            f"{len(shared)} of {len(score_images)} annotated score images are images of the fit ({shared[0]}, ...): "
            "annotate images that the run has not seen"
        )


def _answers(store: Store, layer: str, images: np.ndarray) -> torch.Tensor:
    """(n, C) the layer's mean activation of each image."""
    parts = []
    for start in range(0, len(images), 64):
        activation = torch.from_numpy(store.read(layer, images[start : start + 64])).double()
        parts.append(activation.flatten(2).mean(2) if activation.ndim == 4 else activation)
    return torch.cat(parts)


def _scores(found: list[Dissected], beside: dict[str, list[Dissected]], images: int, rate: str) -> list[Score]:
    scores = []
    for name, meaning in _MEANING.items():
        values = torch.tensor([one.scores()[name] for one in found], dtype=torch.float64)
        replicates = torch.stack([one.phi_replicates.sum(1) for one in found]) if name == "S1" else None
        low, high = interval(values, replicates)
        scores.append(
            Score(
                metric=f"dissection_{name}",
                value=float(values.mean()),
                low=low,
                high=high,
                baselines={k: float(np.mean([o.scores()[name] for o in others])) for k, others in beside.items()},
                n=images,
                seeds=len(found),
                higher_is_better=True,
                definition=f"{meaning}. Threshold: {found[0].rule} (on-rate {found[0].label_rate:.4f}); the baselines "
                f"are judged at the same on-rate ({rate}). Labels come from other annotated images.",
            )
        )
    return scores


def _part_scores(found: list[Dissected], beside: dict[str, list[Dissected]], images: int) -> list[Score]:
    """Part interpretability: IoU with the label's masks at the published on-rate, and the share that passes 0.2."""
    means: dict[str, Callable[[Dissected], float]] = {
        "part_iou": lambda one: float(one.detectors.phi.mean()),
        "part_interpretability": lambda one: part_interpretability(one.detectors.phi),
    }
    meaning = {
        "part_iou": "mean over concepts of the IoU with their label's masks",
        "part_interpretability": "share of concepts whose IoU with their label's masks passes 0.2",
    }
    scores = []
    for name, mean in means.items():
        values = torch.tensor([mean(one) for one in found], dtype=torch.float64)
        low, high = interval(values, bounds=(0.0, 1.0))
        scores.append(
            Score(
                metric=name,
                value=float(values.mean()),
                low=low,
                high=high,
                baselines={k: float(np.mean([mean(one) for one in others])) for k, others in beside.items()},
                n=images,
                seeds=len(found),
                higher_is_better=True,
                definition=f"Part interpretability: {meaning[name]}, each concept on in its strongest "
                f"{PUBLISHED_RATE:.1%} of positions; labels come from other annotated images. Large parts are easier.",
            )
        )
    return scores


def _location(
    explainers: list[Explainer],
    controls: dict[str, list[Explainer]],
    data: MaskedLayer,
    images: ImageSource,
    classifier: Classifier,
    unseen: np.ndarray,
) -> list[Score]:
    """Location instability on the annotated images that were not fitted on; none without landmarks."""
    names, places, size = landmarks_of(images, unseen, classifier.preprocessing)
    if not names or len(unseen) < 2:
        return []
    grid = data.store.shapes[data.layer][1:]
    found = [peaks_of(e, data.store, data.layer, unseen, size=size) for e in explainers]
    beside = {k: [peaks_of(e.cpu(), data.store, data.layer, unseen, size=size) for e in v] for k, v in controls.items()}
    return location_scores(found, beside, places, names, grid=(grid[0], grid[1]), size=size)


def _unseen(
    store: Store,
    fit_images: np.ndarray,
    images: ImageSource,
    source: ImageSource | None,
    annotated: np.ndarray,
    score_images: np.ndarray,
) -> np.ndarray:
    """Annotated images that are none of the fit; the score images where the run's own are not at hand."""
    if source is None or store.key.data_fingerprint != source.fingerprint:
        return score_images
    fitted = {source._digest(int(i)) for i in fit_images}
    return np.array([i for i in annotated.tolist() if images._digest(i) not in fitted], dtype=int)


def _records(found: Dissected, test: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    """Everything about every concept of one explainer."""
    detectors, names = found.detectors, found.detectors.vocabulary.labels

    def name(k: int) -> str | None:
        return names[k] if k >= 0 else None

    return [
        {
            "id": i,
            "label": name(int(detectors.labels[i])),
            "iou": float(detectors.phi[i]),
            "chance": float(detectors.chance[i]),
            "layout_chance": float(detectors.layout[i]),
            "precision": float(detectors.precision[i]),
            "recall": float(detectors.recall[i]),
            "runner_up": name(int(found.runner_up[i])),
            "runner_up_iou": float(found.runner_up_iou[i]),
            "threshold": float(found.thresholds[i]),
            "p": float(test["p"][i]),
            "z": float(test["z"][i]),
            "significant": bool(test["significant"][i]),
        }
        for i in range(len(detectors.phi))
    ]


def _is_detector(record: dict[str, Any]) -> bool:
    return record["label"] is not None and record["iou"] > DETECTOR_IOU and record["significant"]


def _label_concepts(run: Run, records: list[dict[str, Any]]) -> None:
    """A concept carries its label if it is a detector and the permutation test agrees."""
    if not (run.path / "concepts.json").exists():
        return
    content = run.concepts
    by_id = {record["id"]: record for record in records}
    for concept in content["concepts"]:
        record = by_id[concept["id"]]
        keep = ("runner_up", "runner_up_iou", "chance", "layout_chance", "precision", "recall", "p", "threshold")
        concept["label"] = (
            {
                "text": record["label"],
                "metric": f"IoU with its masks (chance {record['chance']:.3f}, next {record['runner_up'] or 'none'})",
                "value": record["iou"],
                **{k: record[k] for k in keep},
            }
            if _is_detector(record)
            else None
        )
    run.write_concepts(content)


@torch.no_grad()
def _write_proof(
    run: Run,
    explainer: Explainer,
    found: Dissected,
    records: list[dict[str, Any]],
    data: MaskedLayer,
    images: ImageSource,
    classifier: Classifier,
    score_images: np.ndarray,
    *,
    columns: int = 6,
) -> None:
    """For the best detectors, the score images with the strongest response: contour of the concept over the mask."""
    from netgloss.figures.dissection import concept_contours

    best = sorted(filter(_is_detector, records), key=lambda record: -record["iou"])[:_SHOWN]
    if not best or len(data.store.shapes[data.layer]) != 3:
        return
    picks = torch.tensor([record["id"] for record in best])
    maps = torch.cat([explainer.encode(activation)[:, picks] for _, activation in data.batches(score_images)])
    strongest = maps.flatten(2).amax(2).argsort(dim=0, descending=True)[:columns]
    for place, record in enumerate(best):
        chosen = strongest[:, place].tolist()
        masks = data.masks(score_images[chosen]).labels[:, int(found.detectors.labels[record["id"]])].numpy()
        pictures = [
            classifier.preprocessing.pixels(images.image(int(score_images[k]))).permute(1, 2, 0).clamp(0, 1).numpy()
            for k in chosen
        ]
        figure = concept_contours(
            pictures,
            [maps[k, place].numpy() for k in chosen],
            [record["threshold"]] * len(chosen),
            [images.ids[int(score_images[k])] for k in chosen],
            masks=list(masks),
            title=f"concept {record['id']}: {record['label']}, IoU {record['iou']:.2f} (chance {record['chance']:.2f})",
            columns=columns,
        )
        save_figure(run.path / "dissection", f"concept-{record['id']}", figure, record)

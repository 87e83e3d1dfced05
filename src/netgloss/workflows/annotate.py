"""Annotate: labels for a run's concepts from masks and landmarks, and scores against them.

Labels and thresholds come from 60 % of the annotated images, scores from the others, which must not be images of the
fit.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from netgloss.activations import CaptureOptions, Store, capture
from netgloss.activations.annotated import MaskedLayer, split_annotated
from netgloss.activations.layer import check_origin, split_store
from netgloss.data import open_images
from netgloss.errors import UserError
from netgloss.evaluation.annotation_scores import (
    detector_records,
    dissect_with_controls,
    dissection_scores,
    is_detector,
    landmark_scores,
    refuse_fit_images,
    unseen_images,
)
from netgloss.evaluation.subjects import make_controls
from netgloss.metrics import Score
from netgloss.progress import Progress, Silent
from netgloss.runs.run import Run, save_figure, to_json, write_atomically
from netgloss.training import ActivationStream

if TYPE_CHECKING:
    import numpy as np

    from netgloss.classifiers import Classifier
    from netgloss.data import ImageSource
    from netgloss.evaluation.dissect import Dissected
    from netgloss.explainers.base import Explainer

_SHOWN = 12


def open_annotated(annotations: str, source: ImageSource | None) -> ImageSource:
    """Annotated images: those next to the annotations (a folder ``images``), scenes that annotate themselves
    (``critters:N,seed=S``), else ``source``, the run's own images.
    """
    path = Path(annotations)
    if not path.exists() and annotations.split(":")[0] == "critters":
        return open_images(annotations)
    folder = path if path.is_dir() else path.parent
    if (folder / "images").is_dir():
        return open_images(folder / "images", annotations=path)
    if source is None and path.exists():
        raise UserError(f"{path} has no folder 'images' next to it: pass the annotated images by --images")
    return open_images(source if source is not None else path, annotations=path)


def annotate(
    run: Run,
    annotations: str,
    *,
    store: Store | None = None,
    source: ImageSource | None = None,
    classifier: Classifier | None = None,
    progress: Progress | None = None,
) -> list[Score]:
    """Adds scores against annotations to a run, labels to its concepts, and ``dissection.json`` with every concept.

    Parameters
    ----------
    annotations : a folder of images and masks, a COCO file, or ``critters:N,seed=S``.
    store, classifier : activations of the fit, for the controls (the layer's own axes, random directions), and the
        network; default: opened as the run names them.
    source : the images of the run. Annotated images are compared with them; without them, their activations are.

    Returns
    -------
    The added scores.

    Raises
    ------
    UserError : no annotations; a score image that the run was fitted on; a store or network that is not the run's.
    """
    progress, store = progress or Silent(), store or Store.open(run.store)
    if run.explainer.target == "image":
        raise UserError(f"{run.method} decodes the layer's units and has no concepts of its own: label natural-axes")
    run.check_store(store)
    classifier = classifier or run.network or run.classifier()
    check_origin(store, classifier=classifier)
    images = open_annotated(annotations, source)
    with tempfile.TemporaryDirectory() as folder:
        options = CaptureOptions(logits=False)
        captured = capture(classifier, images, [run.layer], Path(folder) / "store", options=options, progress=progress)
        data = MaskedLayer(captured, run.layer, images, classifier.preprocessing)
        label_images, score_images = split_annotated(data)
        fit_images, _ = split_store(store)
        refuse_fit_images(store, fit_images, data, images, source, score_images)
        explainers = [e.cpu() for e in run.explainers()]
        first = explainers[0]
        stream = ActivationStream(store, run.layer, fit_images)
        controls = make_controls(stream, first.spec, num_concepts=first.num_concepts, seeds=run.seeds)
        dissections = dissect_with_controls(explainers, controls, (data, label_images), (data, score_images), progress)
        scores = dissection_scores(dissections, len(score_images))
        if len(captured.shapes[run.layer]) == 3:
            unseen = unseen_images(store, fit_images, images, source, data.images, score_images)
            scores += landmark_scores(explainers, controls, data, images, classifier, unseen)
        added = {score.metric for score in scores}
        kept = [s for s in run.scores if not s.metric.startswith("dissection_") and s.metric not in added]
        run.write_scores(kept + scores)
        dissected = dissections.own[0]
        records = detector_records(first, dissected, data, score_images)
        _label_concepts(run, records)
        record = {
            "annotations": annotations,
            "rule": dissected.rule,
            "matched": dissections.matched,
            "concepts": records,
        }
        write_atomically(run.path / "dissection.json", to_json(record))
        _draw_detectors(run, first, dissected, records, data, images, classifier, score_images)
    return scores


def _label_concepts(run: Run, records: Sequence[dict[str, Any]]) -> None:
    """A concept carries its label if its IoU passes the threshold and the permutation test."""
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
            if is_detector(record)
            else None
        )
    run.write_concepts(content)


@torch.no_grad()
def _draw_detectors(
    run: Run,
    explainer: Explainer,
    dissected: Dissected,
    records: Sequence[dict[str, Any]],
    data: MaskedLayer,
    images: ImageSource,
    classifier: Classifier,
    score_images: np.ndarray,
    *,
    columns: int = 6,
) -> None:
    """For the best detectors, the score images with the strongest response: contour of the concept over the mask."""
    from netgloss.figures.dissection import concept_contours

    best = sorted(filter(is_detector, records), key=lambda record: -record["iou"])[:_SHOWN]
    if not best or len(data.store.shapes[data.layer]) != 3:
        return
    picks = torch.tensor([record["id"] for record in best])
    maps = torch.cat([explainer.encode(activation)[:, picks] for _, activation in data.batches(score_images)])
    strongest = maps.flatten(2).amax(2).argsort(dim=0, descending=True)[:columns]
    for place, record in enumerate(best):
        chosen = strongest[:, place].tolist()
        masks = data.masks(score_images[chosen]).labels[:, int(dissected.detectors.labels[record["id"]])].numpy()
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

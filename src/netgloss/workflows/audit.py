"""Audit: what a network relies on that it should not, tested on the network and shown first in the report."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from netgloss import figures
from netgloss.activations import Store, image_batches
from netgloss.activations.annotated import mask_grid
from netgloss.activations.layer import LayerReader, check_origin, class_labels
from netgloss.classifiers import Classifier, last_map, load_classifier
from netgloss.data import open_images, place
from netgloss.data.sources import open_sources
from netgloss.errors import UserError
from netgloss.explanations.audit import Audit, AuditOptions, ClassTest, Finding, audit_classes, wording
from netgloss.explanations.audit.concepts import ConceptsBehind, concepts_behind
from netgloss.explanations.audit.cues import CUES
from netgloss.explanations.audit.search import region_masks
from netgloss.explanations.audit.swaps import exchange
from netgloss.report import write_report
from netgloss.runs.run import Run
from netgloss.training.execution import Execution
from netgloss.workflows.explain import explain

if TYPE_CHECKING:
    from torch import nn

    from netgloss.data import ImageSource

_MOST_IMAGES = 2000
_PICTURES = 6
_SHOWN = 8


def audit(
    model: Run | Classifier | str | Path | nn.Module,
    images: ImageSource | str | Path,
    *,
    out: str | Path | None = None,
    layer: str = "auto",
    method: str = "nmf",
    annotations: str | None = None,
    options: AuditOptions | None = None,
    device: str | Execution = "auto",
    **fields: Any,
) -> Run:
    """Finds what a network relies on that is not the object, and writes it at the top of a run's report.

    For every class the region of the picture that decides most is searched, then tested by exchanging it between images
    (:mod:`netgloss.explanations.audit.swaps`); tint, brightness, contrast, sharpness and grain are tested likewise
    (:mod:`netgloss.explanations.audit.cues`). See :mod:`netgloss.explanations.audit.search` for what is a finding.

    Parameters
    ----------
    model : a finished run of ``explain`` (or its folder), or a classifier, which is explained first.
    images : labelled images, of the same kinds as ``netgloss.open_images`` takes. Sub-folders are classes.
    out : the run folder; only for a classifier.
    layer : of the classifier to explain; "auto" takes the last map before pooling.
    method, fields : how it is explained, as for ``netgloss.explain``.
    annotations : masks or boxes of the objects (a folder or a COCO file; "critters" for scenes that annotate
        themselves): what lies off them counts as a sign.
    options : how much is searched, and what counts as a finding.

    Returns
    -------
    The run, with ``audit.json`` in its folder.

    Raises
    ------
    UserError : no labelled image, fewer than two classes, or what ``explain`` raises.
    """
    execution = Execution.of(device)
    options = options or AuditOptions()
    source = open_sources(images)
    run = _opened(model, source, out, layer, method, execution, fields)
    if not execution.leads:
        return run
    started = time.perf_counter()
    classifier = (run.network or run.classifier()).to(execution.torch_device)
    photos = _Photos(run, classifier, source, annotations, execution)
    found = audit_classes(
        classifier,
        photos.pixels,
        classifier.preprocessing.normalise,
        photos.labels,
        photos.predictions,
        objects=photos.objects if annotations is not None else None,
        options=options,
        progress=execution.shown,
    )
    write_audit(run, photos, found, options)
    run.update(times={**run.manifest.get("times", {}), "audit": round(time.perf_counter() - started, 2)})
    write_report(run)
    return run


def _opened(
    model: Run | Classifier | str | Path | nn.Module,
    source: ImageSource,
    out: str | Path | None,
    layer: str,
    method: str,
    execution: Execution,
    fields: dict[str, Any],
) -> Run:
    """The finished run, or one of the classifier made now."""
    if isinstance(model, str | Path) and (Path(model) / "run.json").is_file():
        model = Run(model)
    if isinstance(model, Run):
        if not (model.path / "concepts.json").is_file():
            raise UserError(f"the run {model.path} is not finished: run its command again first")
        return model
    if isinstance(model, Path):
        raise UserError(f"{model} is not a run folder")
    if out is None:
        raise UserError("audit of a classifier needs out=, the folder of its run")
    classifier = model if isinstance(model, Classifier) else load_classifier(model)
    _refuse_labels(classifier)
    if layer == "auto":
        layer = last_map(classifier)
        execution.shown.say(f"layer {layer}: the last map before pooling")
    return explain(method, classifier, layer, source, out=out, device=execution, **fields)


def _refuse_labels(classifier: Classifier) -> None:
    classifier.require_head("audit")
    if classifier.outputs == "multilabel":
        raise UserError(
            f"{classifier.name} gives several labels per image (--multi-label); audit asks which one class a cue "
            "decides, and does not know such networks"
        )


class _Photos:
    """The images of the audit in memory, as cropped for the network, with labels and predictions.

    Attributes
    ----------
    index : (N,) of the source. labels, predictions : (N,) classes.
    """

    def __init__(
        self, run: Run, classifier: Classifier, source: ImageSource, annotations: str | None, execution: Execution
    ) -> None:
        _refuse_labels(classifier)
        store = Store.open(run.store)
        check_origin(store, classifier=classifier, source=source)
        self.run, self.classifier, self.source = run, classifier, source
        labels = class_labels(store, classifier.class_names, classifier.wnids)
        known = store.valid[labels[store.valid] >= 0]
        if len(known) == 0:
            raise UserError(
                "audit needs labelled images: a folder for each class, named as the network's classes are "
                "(see netgloss explain's report for how they matched)"
            )
        if len(np.unique(labels[known])) < 2:
            raise UserError("audit compares classes with each other: it needs labelled images of two or more")
        self.index = _balanced(known, labels[known], _MOST_IMAGES)
        self.labels = labels[self.index]
        self._pixels = torch.empty(len(self.index), *classifier.input_shape, dtype=torch.uint8)
        logits = []
        execution.shown.start("images for the audit", len(self.index), unit="images")
        done = 0
        std = torch.tensor(classifier.preprocessing.std)[:, None, None]
        mean = torch.tensor(classifier.preprocessing.mean)[:, None, None]
        for batch, _ in image_batches(classifier, source, self.index.tolist()):
            with torch.no_grad():
                logits.append(classifier(batch).argmax(dim=1).cpu())
            values = (batch.cpu() * std + mean).clamp(0, 1) * 255
            self._pixels[done : done + len(batch)] = values.round().to(torch.uint8)
            done += len(batch)
            execution.shown.advance(len(batch))
        execution.shown.finish()
        self.predictions = torch.cat(logits).numpy()
        self._objects = None if annotations is None else self._placed(annotations)

    def pixels(self, index: np.ndarray) -> Tensor:
        """(N, channels, H, W) in 0..1, on the network's device."""
        return self._pixels[torch.from_numpy(index)].to(self.classifier.device).float() / 255

    def objects(self, index: np.ndarray) -> Tensor:
        """(N, H, W) True on an annotated object; everywhere for an image without annotations."""
        assert self._objects is not None
        return self._objects[torch.from_numpy(index)].to(self.classifier.device)

    def _placed(self, annotations: str) -> Tensor:
        source = open_images(self.source, annotations=annotations) if Path(annotations).exists() else self.source
        masks = torch.ones(len(self.index), *self.classifier.input_shape[1:], dtype=torch.bool)
        annotated = 0
        for row, i in enumerate(self.index.tolist()):
            one = source.annotation(i)
            if one is not None:
                one = place(one, self.classifier.preprocessing.geometry(*self.source.size(i)))
                labels = [*one.mask_labels.values(), *(box[0] for box in one.boxes)]
                grid = mask_grid(one, list(dict.fromkeys(labels)), self.classifier.input_shape[1:])
                masks[row] = torch.from_numpy(grid.any(axis=0))
                annotated += 1
        if not annotated:
            raise UserError(f"none of the audited images has an annotation in {annotations}")
        return masks

    def id(self, row: int) -> str:
        """The image's name."""
        return self.source.ids[int(self.index[row])]


def _balanced(images: np.ndarray, labels: np.ndarray, most: int) -> np.ndarray:
    """At most ``most`` images, as evenly over the classes as they allow, in order."""
    if len(images) <= most:
        return images
    rng = np.random.default_rng(0)
    queues = [rng.permutation(images[labels == c]).tolist() for c in np.unique(labels)]
    chosen: list[int] = []
    while len(chosen) < most:
        for queue in queues:
            if queue and len(chosen) < most:
                chosen.append(queue.pop())
    return np.sort(np.array(chosen))


# -- writing ----------------------------------------------------------------------------------------------------------


def write_audit(run: Run, photos: _Photos, found: Audit, options: AuditOptions) -> None:
    """audit.json, and a picture of each finding."""
    names = photos.classifier.class_names
    shown = found.findings[:_SHOWN]
    reader = None
    if any(finding.test.kind not in _CUE_NAMES for finding in shown):
        reader = LayerReader(photos.classifier, run.layer, run.explainer, photos.source)
    records = []
    for number, finding in enumerate(shown, start=1):
        other, changed, masks = _exchanged(photos, finding.test)
        behind = None
        if reader is not None and masks is not None:
            behind = _behind(run, photos, reader, finding.test, masks)
        picture = f"audit-{number}"
        run.write_picture(picture, figures.finding_figure(_pictures(photos, finding.test, other, changed, masks)))
        records.append(_finding_record(photos, finding, behind, f"{picture}.png"))
    run.write_json(
        "audit.json",
        {
            "format_version": 1,
            "summary": wording.summary(found, names),
            "findings": records,
            "tested": [_test_record(test, names) for test in found.tests],
            "network": {"name": photos.classifier.name, "weights": photos.classifier.weights_hash},
            "options": dataclasses.asdict(options),
            "limits": wording.limits(found, options, names, masked=photos._objects is not None),
            "searched": found.searched,
            "images": len(photos.index),
        },
    )


_CUE_NAMES = {cue.name: cue for cue in CUES}


def _exchanged(photos: _Photos, test: ClassTest) -> tuple[Tensor, Tensor, Tensor | None]:
    """The other images, the changed ones (n, C, H, W) in 0..1, and the masks.

    Changed are the others with the region or cue put in; the class's own without it where that does more.
    """
    own, others = photos.pixels(np.array(test.images)), photos.pixels(np.array(test.others))
    if test.kind in _CUE_NAMES:
        cue = _CUE_NAMES[test.kind]
        level = float(cue.level(own).median())
        return others, cue.change(others, cue.strength(others, level)), None
    objects = photos.objects(np.array(test.images)) if test.kind == "background" else None
    masks = region_masks(test, own.shape[2], own.shape[3], None if objects is None else objects.cpu())
    masks = masks.to(own.device)
    changed = exchange(own, others, masks) if _shows_loss(test) else exchange(others, own, masks)
    return others, changed, masks


def _shows_loss(test: ClassTest) -> bool:
    """True if taking the region out does more than putting it in."""
    return test.kind not in _CUE_NAMES and test.lost > test.gained


def _behind(run: Run, photos: _Photos, reader: LayerReader, test: ClassTest, masks: Tensor) -> ConceptsBehind | None:
    normalise = photos.classifier.preprocessing.normalise
    own, others = photos.pixels(np.array(test.images)), photos.pixels(np.array(test.others))
    explainer = run.explainer.to(photos.classifier.device)
    return concepts_behind(explainer, reader, normalise(own), normalise(exchange(own, others, masks)), test.class_index)


def _pictures(
    photos: _Photos, test: ClassTest, other: Tensor, changed: Tensor, masks: Tensor | None
) -> figures.FindingPictures:
    """Pictures of a finding; images whose answer changed come first."""
    names, classifier = photos.classifier.class_names, photos.classifier
    with torch.no_grad():
        said = [classifier(classifier.preprocessing.normalise(p)).argmax(dim=1).tolist() for p in (other, changed)]
    turned = [i for i, c in enumerate(said[1]) if (c == test.class_index) != _shows_loss(test)]
    rows = [*turned, *(i for i in range(len(changed)) if i not in turned)][:_PICTURES]
    own = photos.pixels(np.array(test.images))

    def drawn(pixels: Tensor) -> list[np.ndarray]:
        return [p.permute(1, 2, 0).expand(-1, -1, 3).cpu().numpy() for p in pixels[rows]]

    return figures.FindingPictures(
        drawn(own),
        None if masks is None else [m[0].cpu().numpy() for m in masks[rows]],
        drawn(other),
        drawn(changed),
        [names[said[0][i]] for i in rows],
        [names[said[1][i]] for i in rows],
        names[test.class_index],
        taken_out=_shows_loss(test),
    )


def _finding_record(photos: _Photos, finding: Finding, behind: ConceptsBehind | None, picture: str) -> dict[str, Any]:
    test, names = finding.test, photos.classifier.class_names
    return {
        "kind": test.kind,
        "class": names[test.class_index],
        "region": test.kind not in _CUE_NAMES,
        "effect": test.gained,
        "low": test.low,
        "high": test.high,
        "q_value": finding.q_value,
        "sentence": wording.sentence(finding, names),
        "control": test.gained_control,
        "lost": test.lost,
        "lost_control": test.lost_control,
        "evidence": list(finding.evidence),
        "examples": [photos.id(i) for i in test.images[:_PICTURES]],
        "concept": None if behind is None else behind.concepts[0],
        "concepts": [] if behind is None else list(behind.concepts),
        "concept_share": None if behind is None else behind.share,
        "concept_lost": None if behind is None else behind.lost,
        "concept_lost_random": None if behind is None else behind.lost_random,
        "picture": picture,
        "boxes": test.boxes[:_PICTURES],
        "area": test.area,
    }


def _test_record(test: ClassTest, names: list[str]) -> dict[str, Any]:
    record = dataclasses.asdict(test)
    for name in ("images", "others", "boxes", "class_index", "size"):
        del record[name]
    return {"class": names[test.class_index], **record}

"""Show: new images explained with a saved run, as figures and numbers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from netgloss.activations import image_batches
from netgloss.activations.capture import odd_images
from netgloss.activations.layer import LayerReader
from netgloss.data.sources import open_sources, refuse_among_images
from netgloss.errors import UserError, one_line
from netgloss.evaluation.decoded import DecodedImage, Pictures, decode_images
from netgloss.explainers.cladec import ClaDec
from netgloss.explanations.excitation import HeatmapKind, chosen_heatmaps
from netgloss.explanations.heatmaps import ConceptRange, recorded_ranges
from netgloss.explanations.images import ImageExplanation, explain_images
from netgloss.runs.files import read_run
from netgloss.runs.run import Run, save_figure
from netgloss.training.execution import Execution

if TYPE_CHECKING:
    from netgloss.classifiers import Classifier
    from netgloss.data import ImageSource
    from netgloss.explainers.base import Explainer


def show(
    run: Run | str | Path,
    images: ImageSource | str | Path,
    *,
    out: str | Path | None = None,
    top: int = 5,
    heat: HeatmapKind = "gradient",
    device: str | Execution = "auto",
) -> list[ImageExplanation] | list[DecodedImage]:
    """Explains new images with a saved run.

    The logit of the prediction is split into base + contributions + gap (see
    :mod:`netgloss.metrics.faithfulness.importance`). The map of each of the ``top`` concepts is drawn over the picture
    that the network saw; for methods that decode into images the decoded image stands next to the original.

    Parameters
    ----------
    images : a source, or what ``netgloss.open_images`` takes.
    out : folder for a figure (PNG) and the numbers (JSON) of each image; None writes nothing.
    heat : how maps of methods on pooled layers are made (see :mod:`netgloss.explanations.excitation`).

    Returns
    -------
    One explanation per image, each with ``numbers()``, ``figure()`` and ``files``. An image that cannot be read is
    reported and left out.

    Raises
    ------
    UserError : no image could be explained, or the run's files or network are missing.
    """
    if top < 1:
        raise UserError(f"top must be at least 1, got {top}")
    execution = Execution.of(device)
    run = run if isinstance(run, Run) else Run(run)
    source = open_sources(images)
    if out is not None:
        refuse_among_images(out, source)
    classifier = (run.network or run.classifier()).to(execution.torch_device)
    classifier.require_head("show")
    explainer = run.explainer.to(classifier.device)
    reader = LayerReader(classifier, run.layer, explainer, source)
    if explainer.target == "image" and not isinstance(explainer, ClaDec):
        raise UserError(f"{run.method} decodes into images in a way that show does not know")
    shower = _Shower(run, classifier, explainer, reader, source, heat, top, _ranges(run, heat))
    shown: list[Any] = []
    reasons: list[str] = []
    remarks: dict[str, str] = {}
    for note in source.notes:
        execution.shown.say(f"note: {note}")
    for index, name in enumerate(source.ids):
        try:
            one = dataclasses.replace(shower.explain(index, remarks), image=name)
        except (UserError, MemoryError) as error:
            reasons.append(_why(error, name))
            execution.shown.say(f"left out: {reasons[-1]}")
            continue
        if out is not None:
            stem = Path(name).stem or "image"
            stem = f"{index:04d}-{stem}" if len(source) > 1 else stem
            files = save_figure(Path(out), stem, one.figure(), {"image": name, **one.numbers()})
            one = dataclasses.replace(one, files=tuple(files))
        shown.append(one)
    for line in odd_images(remarks):
        execution.shown.say(f"note: {line}")
    if not shown:
        raise UserError(reasons[0] if reasons else f"{source.description} holds no images")
    if reasons:
        execution.shown.say(f"{len(shown)} of {len(source)} images explained, {len(reasons)} left out")
    return shown


def _ranges(run: Run, heat: HeatmapKind) -> list[ConceptRange] | None:
    """The scales of the report's maps; None where maps are made in another way, or the run has no report yet."""
    if heat != "gradient" or not (run.path / "concepts.json").is_file():
        return None
    return recorded_ranges(read_run(run.path).concepts["concepts"])


def _why(error: Exception, name: str) -> str:
    """One line that names the image."""
    reason = str(error) or "it does not fit in memory"
    return reason if name in reason else f"{one_line(name)}: {reason}"


@dataclass(frozen=True)
class _Shower:
    """Explains the images of a source one by one."""

    run: Run
    classifier: Classifier
    explainer: Explainer
    reader: LayerReader
    source: ImageSource
    heat: HeatmapKind
    top: int
    ranges: list[ConceptRange] | None = None

    def explain(self, index: int, remarks: dict[str, str]) -> ImageExplanation | DecodedImage:
        """The explanation of image ``index``; ``remarks`` receives what is odd about it.

        Raises
        ------
        UserError : the image cannot be read, or the network answers with NaN or Inf.
        """
        classifier, explainer, source = self.classifier, self.explainer, self.source
        pixels, (reason,) = next(image_batches(classifier, source, [index], workers=0, remarks=remarks))
        if reason:
            raise UserError(reason)
        batch = self.reader.batch(pixels)
        if isinstance(explainer, ClaDec):
            pictures = Pictures.of(explainer, classifier, source)
            image = pictures.read(np.array([index]))
            (decoded,) = decode_images(
                explainer, batch, image, pictures, classifier.class_names, seed=self.run.seeds[0]
            )
            return decoded
        picture = classifier.preprocessing.pixels(source.image(index)).permute(1, 2, 0).clamp(0, 1).numpy()
        maps = batch.activation if batch.maps is None else batch.maps
        (one,) = explain_images(
            explainer,
            batch,
            classifier.class_names,
            heat=chosen_heatmaps(self.heat, explainer, classifier, self.run.layer, pixels.to(classifier.device), maps),
            drivers=self.top,
            pictures=[picture],
            ranges=self.ranges,
        )
        return one

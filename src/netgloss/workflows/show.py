"""Show: new images explained with a saved run, as figures and numbers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from netgloss.activations import image_batches
from netgloss.activations.layer import either_tail, make_tail, tail_for
from netgloss.errors import UserError
from netgloss.explainers.base import Explainer
from netgloss.explanations import describe_image
from netgloss.explanations.excitation import Heat, chosen_heat
from netgloss.runs.run import Run, save_figure
from netgloss.training.fit import pick_device

if TYPE_CHECKING:
    from netgloss.classifiers import Classifier
    from netgloss.data import ImageSource


def show(
    run: Run,
    images: ImageSource | str | Path,
    *,
    out: str | Path,
    top: int = 5,
    heat: Heat = "gradient",
    device: str = "auto",
) -> list[Path]:
    """Explains new images with a saved run: for each a figure (PNG) and its numbers (JSON); returns the files.

    The logit of the prediction is split into base + contributions + gap (see
    :mod:`netgloss.metrics.faithfulness.importance`). The map of each of the ``top`` concepts is drawn over the picture
    that the network saw; ``heat`` chooses how maps of methods on pooled layers are made (see
    :mod:`netgloss.explanations.excitation`).
    """
    from netgloss.classifiers import Taps
    from netgloss.data import ImageSource, open_images

    if top < 1:
        raise UserError(f"top must be at least 1, got {top}")
    source = images if isinstance(images, ImageSource) else open_images(images)
    classifier = run.classifier().to(pick_device(device))
    explainer = run.explainer.to(classifier.device)
    tail = make_tail(classifier, run.layer, source)
    above = list(explainer.spec.upper) if explainer.target == "upper" else []
    above_tail = make_tail(classifier, above[-1], source) if above else None
    written = []
    for index, name in enumerate(source.ids):
        pixels, (reason,) = next(image_batches(classifier, source, [index], workers=0))
        if reason:
            raise UserError(reason)
        pixels = pixels.to(classifier.device)
        with torch.no_grad(), Taps(classifier.net, [run.layer], stop=False) as taps:
            activation = taps(pixels)[run.layer]
            logits = taps.logits
        picture = classifier.preprocessing.pixels(source.image(index)).permute(1, 2, 0).clamp(0, 1).numpy()
        if explainer.target == "image":
            figure, numbers = _show_decoded(run, explainer, activation, logits, classifier, source, index)
        else:
            way_on = tail_for(tail, classifier, source, np.array([index]))
            if above_tail is not None:
                way_on = either_tail(way_on, tail_for(above_tail, classifier, source, np.array([index])), above[-1])
            figure, numbers = describe_image(
                explainer,
                activation,
                logits,
                way_on,
                picture,
                classifier.class_names,
                top=top,
                heat=chosen_heat(heat, explainer, classifier, run.layer, pixels, activation),
            )
        stem = Path(name).stem or "image"
        written += save_figure(
            Path(out), f"{index:04d}-{stem}" if len(source) > 1 else stem, figure, {"image": name, **numbers}
        )
    return written


def _show_decoded(
    run: Run,
    explainer: Explainer,
    activation: torch.Tensor,
    logits: torch.Tensor,
    classifier: Classifier,
    source: ImageSource,
    index: int,
) -> tuple[Any, dict[str, Any]]:
    """The triple of one image, for explainers that decode into images."""
    from netgloss.evaluation.decoded import Pictures, describe_decoded
    from netgloss.explainers.cladec import ClaDec

    if not isinstance(explainer, ClaDec):
        raise UserError(f"{run.method} decodes into images in a way that show does not know")
    pictures = Pictures.of(explainer, classifier, source)
    image = pictures.read(np.array([index]))
    return describe_decoded(explainer, activation, logits, image, pictures, classifier.class_names, seed=run.seeds[0])

"""Prediction differences of units on real and adversarial images, and what the agreement s(x) detects.

The prediction difference (PD) of a unit is what the predicted class's logit loses when the unit is taken out; the
agreement s(x) says whether the units of largest PD mean the predicted class (``metrics/consistency/difference.py``).

Shape letters: N images, U units, C classes of the probe set.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from netgloss.adversarial.crafting import PixelClassifier
from netgloss.adversarial.layer_consistency import LayerResult
from netgloss.adversarial.pixels import LabelledPixels
from netgloss.adversarial.probe import Adversarial
from netgloss.classifiers import Classifier, Tail, Taps
from netgloss.metrics.consistency.difference import (
    agreement_with_units,
    detection_auroc,
    prediction_difference,
    unchanged,
)
from netgloss.progress import Progress, Silent

BATCH = 32


@dataclass(frozen=True)
class Codec:
    """From a layer's activation to units and back; the default are the layer's channels.

    Parameters
    ----------
    encode, decode : of activations (B, C, ...). linear : whether decode is affine.
    """

    encode: Callable[[Tensor], Tensor] = unchanged
    decode: Callable[[Tensor], Tensor] = unchanged
    linear: bool = True


def prediction_differences(
    classifier: Classifier,
    pixels: PixelClassifier,
    data: LabelledPixels,
    adversarial: Adversarial | None,
    result: LayerResult,
    affinity: np.ndarray,
    *,
    num_images: int,
    codec: Codec | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """PD of a layer's units on some images of R and V.

    Parameters
    ----------
    result : the layer as measured on all of ``data`` and ``adversarial``. affinity : (C, C).
    num_images : how many images are drawn.

    Returns
    -------
    ``chosen`` (N,) are the indices of the images, ``tail`` the tail's mode. Only where the tail is a graph (else
    ``reason``): for "real" and "adversarial" a dict of ``pd`` (N, U), ``s``, ``confidence`` and ``right`` (N,), and
    AUROCs of s and of the largest probability for adversarial images (``auroc_s``, ``auroc_confidence``) and for wrong
    predictions on R (``auroc_wrong``, ``auroc_wrong_confidence``).
    """
    codec, progress = codec or Codec(), progress or Silent()
    chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:num_images].sort()[0]
    sets = {"real": data.pixels(chosen)}
    if adversarial is not None:
        sets["adversarial"] = adversarial.found.images[chosen].cpu()
    example = pixels.normalise(sets["real"][:2].to(pixels.mean.device))
    tail = Tail(classifier, result.layer, example=example)
    record: dict[str, Any] = {"chosen": chosen, "tail": tail.mode}
    if tail.mode != "graph":
        return {**record, "reason": f"no prediction differences: {tail.reason}"}
    positive = result.units.pole > 0  # a signed unit is taken out as a whole
    meaning = torch.as_tensor(affinity) @ result.scores.classes[:, positive]
    identity = torch.eye(len(meaning), dtype=torch.float64)
    progress.start(f"differences {result.layer}", len(sets) * len(chosen), unit="images")
    for name, images in sets.items():
        pd, logits = _read(pixels, images, result.layer, tail, codec, progress)
        record[name] = {
            "pd": pd,
            "s": agreement_with_units(pd, meaning, identity, logits[:, data.net_classes].argmax(1)),
            "confidence": logits.softmax(1).amax(1),
            "right": logits.argmax(1) == data.labels[chosen],
        }
    progress.finish()
    real = record["real"]
    for suffix, key in (("", "s"), ("_confidence", "confidence")):
        record[f"auroc_wrong{suffix}"] = detection_auroc(real[key][real["right"]], real[key][~real["right"]])
        if adversarial is not None:
            record[f"auroc{suffix or '_s'}"] = detection_auroc(real[key], record["adversarial"][key])
    return record


@torch.no_grad()
def _read(
    pixels: PixelClassifier, images: Tensor, layer: str, tail: Tail, codec: Codec, progress: Progress
) -> tuple[Tensor, Tensor]:
    """PD (N, U) and logits (N, classes), on the CPU."""
    differences, logits = [], []
    affine = None
    with Taps(pixels.net, layer, stop=False) as taps:
        for batch in images.split(BATCH):
            activation = taps(pixels.normalise(batch.to(pixels.mean.device)))[layer]
            logits.append(taps.logits.cpu())
            if affine is None:
                affine = codec.linear and tail.is_affine(tuple(activation.shape[1:]))
            differences.append(
                prediction_difference(activation, tail, encode=codec.encode, decode=codec.decode, affine=affine).cpu()
            )
            progress.advance(len(batch))
    return torch.cat(differences), torch.cat(logits)

"""A fitted decoder evaluated on held-out images, compared with what needs no layer: scores, pictures and shown units.

Baselines: ``mean_image`` (of the training images), ``class_mean`` (of those with the same prediction: a picture that
knows the class and nothing else), ``shuffled_codes`` (the decoder fed another image's activation), ``reference`` (the
reference autoencoder's pictures) and, where the classifier looks at pictures, ``original_resized`` (the ceiling: the
originals taken to the decode size and back). Controls that need a training of their own (a label-only decoder, shuffled
pairs, an untrained classifier, the evaluation classifier) are in experiments/cladec_*.py.

Shape letters: B images, U units, P values of a decoded image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from netgloss.activations.layer import Layer, LayerBatch
from netgloss.evaluation.scores import image_scores
from netgloss.explainers.base import Explainer, ExplainerConfig
from netgloss.explainers.cladec import ClaDec
from netgloss.figures.decoded import Triple, decoded_triples
from netgloss.metrics import ImageMetric, Score, image_metrics
from netgloss.progress import Progress, Silent
from netgloss.training.inputs import logits_of_images, pixel_reader

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from netgloss.classifiers import Classifier
    from netgloss.data import ImageSource

_CLASS_MEAN_IMAGES = 2000
_SHOWN = 8


@dataclass(frozen=True)
class Pictures:
    """The images of a store at the decode size, and the classifier's eye on them."""

    read: Callable[[np.ndarray], Tensor]
    to_logits: Callable[[Tensor], Tensor]
    device: torch.device

    @classmethod
    def of(cls, explainer: ClaDec, classifier: Classifier, source: ImageSource) -> Pictures:
        """Pictures for one decoder: its size, its classifier."""
        pixels = pixel_reader(classifier, source, (explainer.image_shape[1], explainer.image_shape[2]))
        read = lambda index: pixels(index).float().div_(255).to(classifier.device)  # noqa: E731
        return cls(read, logits_of_images(classifier), classifier.device)


class ShownUnits(Explainer):
    """The units of a decoder that vary most, as concepts for the report's gallery (nothing is learned)."""

    target = "image"
    reads = "maps"
    units: Tensor

    def __init__(self, decoder: ClaDec, limit: int = 24) -> None:
        super().__init__(ExplainerConfig(num_concepts=min(limit, decoder.num_units)), decoder.spec)
        picked = decoder.code_std.argsort(descending=True)[: self.num_concepts].sort().values
        self.register_buffer("units", decoder.units[picked])

    def encode(self, activation: Tensor) -> Tensor:
        """(B, K) or (B, K, h, w) of the shown units."""
        return activation[:, self.units]

    def name_concepts(self) -> list[str]:
        """``unit 17``."""
        return [f"unit {u}" for u in self.units.tolist()]


def class_mean_images(layer: Layer, images: np.ndarray, pictures: Pictures) -> dict[int, Tensor]:
    """The mean picture (m, H, W) of each predicted class, over at most 2,000 training images drawn once."""
    picked = np.sort(np.random.default_rng(0).choice(images, size=min(_CLASS_MEAN_IMAGES, len(images)), replace=False))
    sums: dict[int, Tensor] = {}
    counts: dict[int, int] = {}
    for batch in layer.batches(picked):
        shown = pictures.read(batch.index.numpy())
        for row, c in enumerate(batch.logits.argmax(dim=1).tolist()):
            sums[c] = sums.get(c, torch.zeros_like(shown[row])) + shown[row]
            counts[c] = counts.get(c, 0) + 1
    return {c: value / counts[c] for c, value in sums.items()}


@torch.no_grad()
def decoded_scores(
    explainers: Sequence[ClaDec],
    layer: Layer,
    pictures: Pictures,
    *,
    fit_images: np.ndarray,
    judged: np.ndarray,
    progress: Progress | None = None,
) -> list[Score]:
    """The records of all metrics of decoded images, one explainer a seed, with their baselines."""
    progress = progress or Silent()
    first = explainers[0]
    with_reference = first.reference_encoder is not None
    means = class_mean_images(layer, fit_images, pictures)
    found: dict[str, dict[str, ImageMetric]] = {}
    rng = np.random.default_rng(0)
    progress.start("evaluate", len(judged), unit="images")
    for batch in layer.batches(judged):
        image = pictures.read(batch.index.numpy())
        mean = first.mean_image.expand_as(image)
        of_class = torch.stack([means.get(c, first.mean_image) for c in batch.logits.argmax(dim=1).tolist()])
        other = _others(layer, batch, judged, rng)
        versions: dict[str, tuple[Tensor, Tensor | None]] = {}
        for i, explainer in enumerate(explainers):
            reference = explainer.reference(image) if with_reference else None
            versions[f"seed {i}"] = (explainer(batch.activation), reference)
            versions[f"shuffled_codes {i}"] = (explainer(other), None)
            if reference is not None:
                versions[f"reference {i}"] = (reference, None)
        versions |= {"mean_image": (mean, None), "class_mean": (of_class, None), "original_resized": (image, None)}
        for name, (decoded, reference) in versions.items():
            inputs = {
                "image": image,
                "decoded": decoded,
                "mean_image": mean,
                "logits": batch.logits,
                "logits_decoded": pictures.to_logits(decoded),
                "labels": batch.labels,
            }
            if reference is not None:
                inputs["reference"] = reference
            if name == "original_resized":  # its error is 0 by construction
                del inputs["decoded"]
            _update(found.setdefault(name, {}), batch, inputs)
        progress.advance(len(batch.index))
    progress.finish()
    numbers = range(len(explainers))
    baselines = {name: [found[name]] for name in ("mean_image", "class_mean", "original_resized")}
    baselines["shuffled_codes"] = [found[f"shuffled_codes {i}"] for i in numbers]
    if with_reference:
        baselines["reference"] = [found[f"reference {i}"] for i in numbers]
    return image_scores([found[f"seed {i}"] for i in numbers], dict(baselines))


def _others(layer: Layer, batch: LayerBatch, judged: np.ndarray, rng: np.random.Generator) -> Tensor:
    """Activations of other images, drawn again for each batch."""
    own = batch.index.numpy()
    drawn = rng.choice(judged, size=len(own))
    if len(judged) > 1:
        place = np.searchsorted(judged, drawn)
        drawn = np.where(drawn == own, judged[(place + 1) % len(judged)], drawn)
    unique, inverse = np.unique(drawn, return_inverse=True)
    values = torch.from_numpy(layer.store.read(layer.name, unique)).float()
    return values[torch.from_numpy(inverse)].to(batch.activation.device)


def _update(metrics: dict[str, ImageMetric], batch: LayerBatch, inputs: dict[str, Tensor]) -> None:
    given = {name: value.cpu() for name, value in inputs.items()}
    for cls in image_metrics():
        seen = any(name in ("decoded", "reference", "logits_decoded") for name in cls.inputs)
        if seen and all(name in given for name in cls.inputs):
            metrics.setdefault(cls.name, cls()).update(batch.index, **given)


@torch.no_grad()
def make_triples(
    explainer: ClaDec,
    activation: Tensor,
    image: Tensor,
    logits: Tensor,
    labels: Tensor,
    pictures: Pictures,
    names: Sequence[str],
) -> list[Triple]:
    """Original, reference and decoded version of each image (B, m, H, W), with what the classifier says."""
    decoded = explainer(activation)
    reference = explainer.reference(image) if explainer.reference_encoder is not None else None
    own, seen = logits.softmax(dim=1), pictures.to_logits(decoded).softmax(dim=1)
    triples = []
    for i in range(len(image)):
        predicted, seen_as = int(own[i].argmax()), int(seen[i].argmax())
        triples.append(
            Triple(
                image[i].cpu().numpy(),
                None if reference is None else reference[i].cpu().numpy(),
                decoded[i].cpu().numpy(),
                label=names[int(labels[i])] if labels[i] >= 0 else "",
                prediction=names[predicted],
                probability=float(own[i, predicted]),
                decoded_prediction=names[seen_as],
                decoded_probability=float(seen[i, seen_as]),
            )
        )
    return triples


def caption(explainer: ClaDec, seed: int) -> str:
    """Layer, units, alpha with P, and seed, as every display says them."""
    about = f"layer {explainer.spec.name}, {explainer.num_units} of {explainer.spec.num_features} units"
    alpha = f"alpha {explainer.config.alpha:g} (P = {explainer.num_values:,})"
    return f"{about}, {alpha}, seed {seed}"


def triple_figures(
    explainer: ClaDec, layer: Layer, pictures: Pictures, images: np.ndarray, *, seed: int
) -> list[tuple[str, Figure, str]]:
    """Figures of triples as (file stem, figure, what it shows): random images, and the classifier's mistakes."""
    rng = np.random.default_rng(0)
    order = rng.permutation(images)
    logits = layer.store.read_logits(np.sort(order))
    labels = layer.labels
    groups = {"random": np.sort(order[:_SHOWN])}
    if logits is not None:
        place = np.searchsorted(np.sort(order), order)
        wrong = np.array(
            [i for i, p in zip(order, logits.argmax(axis=1)[place], strict=True) if labels[i] not in (-1, p)]
        )
        if len(wrong):
            groups["mistakes"] = np.sort(wrong[:_SHOWN].astype(int))
    texts = {
        "random": "Images drawn at random from the evaluated ones.",
        "mistakes": "Images that the classifier gets wrong, drawn at random among those.",
    }
    found = []
    for name, picked in groups.items():
        (batch,) = layer.batches(picked)
        shown = pictures.read(batch.index.numpy())
        triples = make_triples(
            explainer, batch.activation, shown, batch.logits, batch.labels, pictures, layer.classifier.class_names
        )
        figure = decoded_triples(triples, title=caption(explainer, seed))
        found.append((f"decoded-{name}", figure, texts[name]))
    return found


def decoded_notes(scores: Sequence[Score]) -> list[str]:
    """What a reader of the scores must know before looking at the pictures."""
    by_name = {score.metric: score for score in scores}
    notes = []
    delta = by_name.get("delta_rec")
    if delta is not None and delta.value is not None and delta.value <= 0:
        notes.append(
            "the reference autoencoder is worse than the decoder: nothing that is missing in the decoded images can be "
            "put down to the classifier"
        )
    own = by_name.get("rec_cladec")
    if own is not None and own.value is not None:
        of_class = own.baselines.get("class_mean")
        if of_class is not None and own.value >= of_class:
            notes.append(
                "the decoded images are no nearer to the originals than the mean image of the predicted class: the "
                "pictures are no evidence of more than the class"
            )
    return notes


@dataclass(frozen=True)
class DecodedImage:
    """The decoded version of one image next to the original and the reference, as ``netgloss show`` gives it."""

    triple: Triple
    num_values: int
    alpha: float
    caption: str
    image: str = ""
    files: tuple[Path, ...] = ()

    def numbers(self) -> dict[str, Any]:
        """The numbers, ready for JSON."""
        triple = self.triple
        return {
            "prediction": triple.prediction,
            "probability": triple.probability,
            "decoded_prediction": triple.decoded_prediction,
            "decoded_probability": triple.decoded_probability,
            "rec_cladec": triple.rec,
            "rec_refae": triple.rec_reference,
            "reference_invalid": triple.reference_invalid,
            "num_values": self.num_values,
            "alpha": self.alpha,
        }

    def figure(self) -> Figure:
        """Original, reference and decoded version."""
        return decoded_triples([self.triple], title=self.caption)


def decode_images(
    explainer: ClaDec, batch: LayerBatch, image: Tensor, pictures: Pictures, class_names: Sequence[str], *, seed: int
) -> list[DecodedImage]:
    """Decodes the images of a batch; ``image`` (B, m, H, W) are they at the decode size."""
    given = (batch.activation, image, batch.logits, batch.labels)
    triples = make_triples(explainer, *given, pictures, class_names)
    about = (explainer.num_values, explainer.config.alpha, caption(explainer, seed))
    return [DecodedImage(triple, *about) for triple in triples]

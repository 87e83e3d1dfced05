"""Runs every metric over an explainer, its baselines and its controls, and makes the Score records.

Subjects, all judged on the same held-out images with the same code:

- the method, one explainer a seed;
- ``random_directions``, ``natural_axes``: the control explainers with as many concepts, fitted on the same rows;
- ``shuffled_codes``: the method's decoder fed the codes of another random image (what is left is not about the image);
- ``mean_activation``: a constant reconstruction;
- ``untrained_network``: the same method on the same architecture with random weights.

Shape letters: B images, C H W the layer, K concepts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from netgloss.errors import UserError
from netgloss.explainers.base import Explainer
from netgloss.explainers.names import find_explainer
from netgloss.memory import Halving
from netgloss.metrics import (
    CodeCorrelation,
    DictionaryMetric,
    ImageMetric,
    Score,
    Stability,
    UpperError,
    concept_stability,
    dictionary_metrics,
    dictionary_score,
    image_metrics,
    image_score,
    matched_similarity,
    random_stability,
    shuffled_stability,
)
from netgloss.metrics.importance import explain_class
from netgloss.processes import add_up
from netgloss.progress import Progress, Silent

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from netgloss.activations import Store
    from netgloss.classifiers import Classifier, Tail
    from netgloss.data import ImageSource
    from netgloss.run import Run

BATCH = 64
_POOL = 256  # images whose codes stand in for "another image's"


@dataclass(frozen=True)
class Layer:
    """A layer of a classifier as the evaluation sees it: its activations on disk and the way on to the logits.

    With ``pooled``, an activation is the mean (B, C) over the grid, and the tail reads it spread evenly over the grid.
    For an explainer that rebuilds layers above, ``above`` names them and ``above_tail`` is the tail of the last one;
    the batches' tail then takes a dict of their activations too.
    """

    store: Store
    name: str
    tail: Tail
    classifier: Classifier
    source: ImageSource | None = None
    pooled: bool = False
    above: tuple[str, ...] = ()
    above_tail: Tail | None = None

    def batches(
        self, images: np.ndarray, *, batch_size: int = BATCH, rank: int = 0, world: int = 1
    ) -> Iterator[LayerBatch]:
        """Activations, logits and class labels of some images, with the tail ready for each batch; every ``world``-th
        batch from ``rank`` on."""
        for start in range(rank * batch_size, len(images), world * batch_size):
            index = images[start : start + batch_size]
            activation = torch.from_numpy(self.store.read(self.name, index)).float().to(self.classifier.device)
            tail = tail_for(self.tail, self.classifier, self.source, index)
            stored = self.store.read_logits(index)
            with torch.no_grad():
                logits = tail(activation) if stored is None else torch.from_numpy(stored).to(activation.device)
            labels = torch.from_numpy(self.labels[index]).to(activation.device)
            if self.pooled:
                tail = spread_tail(tail, tuple(activation.shape[2:]))
                activation = activation.mean(dim=(2, 3)) if activation.ndim == 4 else activation
            upper = {
                name: torch.from_numpy(self.store.read(name, index)).float().to(activation.device)
                for name in self.above
            }
            if self.above_tail is not None:
                tail = either_tail(tail, tail_for(self.above_tail, self.classifier, self.source, index), self.above[-1])
            yield LayerBatch(torch.from_numpy(index).long(), activation, logits, labels, tail, upper)

    def maps(self, images: np.ndarray, *, batch_size: int = 64) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Image indices and activations before pooling, (B, C, H, W), of a pooled map layer; nothing of others."""
        if self.pooled and len(self.store.shapes[self.name]) == 3:
            for start in range(0, len(images), batch_size):
                index = images[start : start + batch_size]
                yield index, torch.from_numpy(self.store.read(self.name, index)).float().to(self.classifier.device)

    @property
    def labels(self) -> np.ndarray:
        """(N,) class index of the classifier for every image of the store, -1 where it is unknown."""
        return class_labels(self.store, self.classifier.class_names, self.classifier.wnids)


@dataclass(frozen=True)
class LayerBatch:
    """What one batch of images brings: (B,) index, activation, (B, classes) logits, (B,) labels, its tail, and the
    activations of the layers above where the explainer rebuilds them."""

    index: Tensor
    activation: Tensor
    logits: Tensor
    labels: Tensor
    tail: Callable[[Any], Tensor]
    upper: dict[str, Tensor] = field(default_factory=dict)


def check_origin(
    store: Store, *, run: Run | None = None, classifier: Classifier | None = None, source: ImageSource | None = None
) -> None:
    """Raises a UserError if ``run`` was fitted on another store, or if the store's activations are those of another
    network, or of other images."""
    if run is not None and store.key.address != run.manifest.get("store_address"):
        raise UserError(f"the store {store.path} is not the one that the run {run.path} was fitted on")
    if classifier is not None and classifier.weights_hash != store.key.weights_hash:
        raise UserError(f"the classifier {classifier.name!r} is not the one whose activations {store.path} holds")
    if source is not None and source.fingerprint != store.key.data_fingerprint:
        raise UserError(f"{source.description} are not the images whose activations {store.path} holds")


def class_labels(store: Store, class_names: Sequence[str], wnids: Sequence[str] | None) -> np.ndarray:
    """(N,) class index of the classifier for every image of a store, -1 where it is unknown."""
    from netgloss.data import match_classes

    names = list(store.info.class_names)
    if not names:
        return np.full(len(store), -1)
    mapping = match_classes(names, class_names, wnids)
    return np.where(store.targets >= 0, np.asarray(mapping)[np.maximum(store.targets, 0)], -1)


def tail_for(
    tail: Tail, classifier: Classifier, source: ImageSource | None, index: np.ndarray
) -> Callable[[Tensor], Tensor]:
    """The tail for the activations of images ``index`` of ``source``, which it needs unless its mode is "graph"."""
    if tail.mode == "graph":
        return tail
    if source is None:
        raise UserError(f"layer {tail.layer!r} needs the images to compute logits ({tail.reason})")
    from netgloss.activations import image_batches

    pixels, _ = next(image_batches(classifier, source, list(index), batch_size=len(index), workers=0))
    return lambda activation: tail(
        activation,
        images=pixels.repeat(len(activation) // len(pixels), 1, 1, 1),  # several versions an image
    )


def either_tail(
    tail: Callable[[Tensor], Tensor], above: Callable[[Tensor], Tensor], name: str
) -> Callable[[Any], Tensor]:
    """Logits of an activation of the layer, or of a dict with that of the layer ``name`` above it."""
    return lambda given: above(given[name]) if isinstance(given, dict) else tail(given)


def spread_tail(tail: Callable[[Tensor], Tensor], grid: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """The tail of a pooled activation (B, C), spread evenly over the grid (H, W) of the layer (() for vectors)."""
    return lambda pooled: tail(pooled.reshape(*pooled.shape, *(1 for _ in grid)).expand(*pooled.shape, *grid))


@dataclass(frozen=True)
class Rebuilt:
    """What a subject makes of a batch; ``logits`` where it rebuilds class scores itself, without the tail."""

    concepts: Tensor | None = None
    reconstruction: Tensor | None = None
    logits: Tensor | None = None
    contributions: Tensor | None = None
    upper: dict[str, Tensor] = field(default_factory=dict)


Rebuild = Callable[[LayerBatch], Rebuilt]


def explainer_subject(explainer: Explainer, *, contributions: bool = False) -> Rebuild:
    """Concepts and reconstruction of an explainer; contributions to the predicted class if asked for."""

    def rebuild(batch: LayerBatch) -> Rebuilt:
        concepts = explainer.encode(batch.activation)
        values = None
        if contributions:
            values = explain_class(
                explainer, batch.tail, concepts, batch.logits, batch.logits.argmax(dim=1), activation=batch.activation
            ).values
        upper = explainer(batch.activation) if explainer.target == "upper" else {}
        return Rebuilt(
            concepts,
            explainer.decode(concepts) if explainer.target == "activation" else None,
            batch.tail(upper) if upper else explainer.rebuilt_logits(concepts, batch.logits),
            values,
            upper,
        )

    return rebuild


def partial_subject(rebuild_upper: Callable[[Tensor], dict[str, Tensor]]) -> Rebuild:
    """One of the ways of an explainer that rebuilds layers above, alone."""

    def rebuild(batch: LayerBatch) -> Rebuilt:
        upper = rebuild_upper(batch.activation)
        return Rebuilt(logits=batch.tail(upper), upper=upper)

    return rebuild


def shuffled_subject(explainer: Explainer, layer: Layer, images: np.ndarray, *, seed: int) -> Rebuild:
    """The explainer's reconstruction from the codes of another, randomly drawn image."""
    rng = np.random.default_rng(seed)
    pool = np.sort(rng.choice(images, size=min(_POOL, len(images)), replace=False))
    with torch.no_grad():
        codes = torch.cat([explainer.encode(b.activation) for b in layer.batches(pool)])

    def rebuild(batch: LayerBatch) -> Rebuilt:
        picks = np.array([np.random.default_rng([seed, i]).integers(len(pool)) for i in batch.index.tolist()])
        same = pool[picks] == batch.index.numpy()
        picks = np.where(same, (picks + 1) % len(pool), picks)
        other = codes[torch.from_numpy(picks)]
        if explainer.target == "upper":
            upper = explainer.decoder_for(batch.activation)(other)
            return Rebuilt(logits=batch.tail(upper), upper=upper)
        return Rebuilt(None, explainer.decode(other), explainer.rebuilt_logits(other, batch.logits))

    return rebuild


def mean_subject(mean: Tensor) -> Rebuild:
    """The training mean (C,) at every position."""

    def rebuild(batch: LayerBatch) -> Rebuilt:
        shape = (1, -1) + (1,) * (batch.activation.ndim - 2)
        return Rebuilt(None, mean.to(batch.activation).reshape(shape).expand_as(batch.activation))

    return rebuild


def _seen(
    rebuild: Rebuild, layer: Layer, batch: LayerBatch, part: slice
) -> tuple[Tensor, dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]:
    """Image indices of a part of a batch, and all that metrics may ask of a subject there, on the CPU: of the layer,
    and of each layer above that it rebuilds (the network's and its own)."""
    index = batch.index[part]
    if len(index) < len(batch.index):
        batch = next(layer.batches(index.numpy(), batch_size=len(index)))
    rebuilt = rebuild(batch)
    logits = rebuilt.logits
    if logits is None and rebuilt.reconstruction is not None:
        logits = batch.tail(rebuilt.reconstruction)
    given = {
        "activation": batch.activation,
        "concepts": rebuilt.concepts,
        "reconstruction": rebuilt.reconstruction,
        "contributions": rebuilt.contributions,
        "logits": batch.logits,
        "logits_rebuilt": logits,
        "labels": batch.labels,
    }
    above = {name: (batch.upper[name].cpu(), values.cpu()) for name, values in rebuilt.upper.items()}
    return index, {key: value.cpu() for key, value in given.items() if value is not None}, above


def measure(
    subjects: dict[str, Rebuild],
    layer: Layer,
    images: np.ndarray,
    *,
    progress: Progress | None = None,
    fabric: Fabric | None = None,
) -> dict[str, dict[str, ImageMetric]]:
    """One pass over ``images``: every image metric on every subject that provides its inputs.

    The processes of ``fabric`` share the batches, and every one gets the metrics of all images. The batches are those
    of a single process, so that only the order of float64 sums differs: scores agree to about 1e-9.

    Returns
    -------
    For each subject, its metrics by name, ready to ``compute()``.
    """
    progress = progress or Silent()
    found: dict[str, dict[str, ImageMetric]] = {name: {} for name in subjects}
    classes = image_metrics()
    world = fabric.world_size if fabric is not None and len(images) > (fabric.world_size - 1) * BATCH else 1
    rank = fabric.global_rank if fabric is not None and world > 1 else 0
    halving = Halving(BATCH)
    progress.start("evaluate", len(images), unit="images")
    with torch.no_grad():
        for batch in layer.batches(images, rank=rank, world=world):
            for name, rebuild in subjects.items():
                for index, inputs, above in halving(len(batch.index), partial(_seen, rebuild, layer, batch)):
                    for cls in classes:
                        if all(key in inputs for key in cls.inputs):
                            metric = found[name].setdefault(cls.name, cls(sync_on_compute=False))
                            metric.update(index, **inputs)
                    for upper, values in above.items():
                        error = found[name].setdefault(
                            f"{UpperError.name}:{upper}", UpperError(upper, sync_on_compute=False)
                        )
                        error.update(index, upper=values[0], upper_rebuilt=values[1])
            progress.advance(min(len(batch.index) * world, len(images)))
    progress.finish()
    if fabric is not None and world > 1:
        for metrics in found.values():
            for name in sorted(metrics):
                add_up(metrics[name], fabric.device)
    return found


def image_scores(
    measured: Sequence[dict[str, ImageMetric]], baselines: dict[str, Sequence[dict[str, ImageMetric]]]
) -> list[Score]:
    """Score records of the method (one dict of metrics a seed) beside its baselines; undefined ones are left out."""
    scores = []
    for name in measured[0]:
        beside = {
            baseline: float(np.mean([float(run[name].compute()) for run in runs]))
            for baseline, runs in baselines.items()
            if all(name in run for run in runs)
        }
        score = image_score([run[name] for run in measured], baselines=beside)
        if score.value is not None and np.isfinite(score.value):
            scores.append(score)
    return scores


def dictionary_scores(
    explainers: Sequence[Explainer], controls: Mapping[str, Sequence[Explainer]], *, scale: Tensor
) -> list[Score]:
    """Scores of the decoder's directions, which need no images; none for methods without a dictionary.

    Parameters
    ----------
    scale : (C,) standard deviation of each feature, for random directions that favour the layer's features.
    """
    atoms = dictionaries(explainers)
    if atoms is None:
        return []
    others = {name: dictionaries(found) for name, found in controls.items()}
    scores = []
    for cls in dictionary_metrics():
        if cls is Stability:
            continue
        metric: DictionaryMetric = cls()
        beside = {name: metric.estimate(found)[0] for name, found in others.items() if found is not None}
        score = dictionary_score(metric, atoms, baselines=beside)
        if score.value is not None and np.isfinite(score.value):
            scores.append(score)
    if len(atoms) > 1:
        nonnegative = all(bool((d >= 0).all()) for d in atoms)
        k, c = atoms[0].shape
        baselines = {
            "random_dictionary": random_stability(k, c, scale=scale, nonnegative=nonnegative),
            "shuffled_dictionary": shuffled_stability(atoms),
        }
        score = dictionary_score(Stability(), atoms, baselines=baselines)
        if explainers[0].deterministic:
            note = " This method does not depend on the seed: 1 holds by construction."
            score = dataclasses.replace(score, definition=score.definition + note)
        scores.append(score)
    return scores


def dictionaries(explainers: Sequence[Explainer]) -> list[Tensor] | None:
    """The dictionaries (K, C) on the CPU, or None if the method has none."""
    found = [e.dictionary for e in explainers]
    return None if any(d is None for d in found) else [d.detach().cpu() for d in found if d is not None]


def per_concept_stability(explainers: Sequence[Explainer], layer: Layer, images: np.ndarray) -> list[float] | None:
    """How well the other seeds find each concept of the first one, in [0, 1]; None for a single seed.

    Matched |cosine| of directions; for methods without a dictionary, matched |correlation| of the codes on ``images``.
    """
    if len(explainers) < 2:
        return None
    atoms = dictionaries(explainers)
    if atoms is not None:
        return concept_stability(atoms).tolist()
    first, *others = explainers
    correlations = [CodeCorrelation(first.num_concepts, other.num_concepts) for other in others]
    with torch.no_grad():
        for batch in layer.batches(images):
            codes = first.encode(batch.activation)
            for other, correlation in zip(others, correlations, strict=True):
                correlation.update(codes.cpu(), other.encode(batch.activation).cpu())
    return torch.stack([matched_similarity(c.compute()) for c in correlations]).mean(dim=0).tolist()


def make_controls(stream: Any, spec: Any, *, num_concepts: int, seeds: Sequence[int]) -> dict[str, list[Explainer]]:
    """The control explainers with ``num_concepts`` concepts, fitted on the same rows; random ones once a seed."""
    from netgloss.training import build_explainer

    controls: dict[str, list[Explainer]] = {}
    for method in ("random-directions", "natural-axes"):
        cls = find_explainer(method)
        config = cls.Config(num_concepts=min(num_concepts, spec.num_features))
        runs = []
        for seed in seeds[:1] if cls.deterministic else seeds:
            explainer = build_explainer(cls, config, spec, seed=seed)
            explainer.fit_rows(stream, seed=seed)
            runs.append(explainer.eval())
        controls[method.replace("-", "_")] = runs
    return controls

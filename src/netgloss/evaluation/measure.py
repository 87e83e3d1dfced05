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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from netgloss.activations.layer import BATCH, Layer, LayerBatch
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
from netgloss.metrics.faithfulness.importance import explain_class
from netgloss.processes import add_up
from netgloss.progress import Progress, Silent

if TYPE_CHECKING:
    from lightning_fabric import Fabric


_POOL = 256  # images whose codes stand in for "another image's"


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

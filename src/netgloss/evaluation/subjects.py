"""What is evaluated: methods with their explainers, controls and baselines, and what each computes from a batch.

Every subject is evaluated on the same held-out images by the same code:

- a method, one explainer per seed, and each track of a method that rebuilds by several;
- ``random_directions``, ``natural_axes``: control explainers with as many concepts, fitted on the same rows;
- ``shuffled_codes``: the decoder applied to the codes of another, random image, so that nothing it says is about the
  image;
- ``mean_activation``: a constant reconstruction.

Shape letters: B images, C features, K concepts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from netgloss.activations.layer import Layer, LayerBatch
from netgloss.explainers.base import Explainer
from netgloss.explainers.names import find_explainer
from netgloss.metrics import CodeCorrelation, Score, concept_stability, matched_similarity
from netgloss.metrics.faithfulness.importance import explain_class

if TYPE_CHECKING:
    from netgloss.evaluation.judge import Result
    from netgloss.runs.run import Run

_POOL = 256
"""Images whose codes stand in for those of another image."""


class View(NamedTuple):
    """How a method reads the layer: its mean over the grid or whole, and which layers above it rebuilds."""

    pooled: bool = False
    above: tuple[str, ...] = ()


@dataclass
class Subject:
    """A method under evaluation: one row of a comparison.

    Attributes
    ----------
    kind : "method", "control" or "foreign" (a dictionary made elsewhere).
    explainers, seeds : one explainer per seed.
    seconds : time of the fits, where it is known.
    run : name of the run folder, "" without one.
    reason : why the subject could not be evaluated; empty if it was.
    results : by question, one result per explainer ("shuffled_codes" and "mean_activation" have one).
    baselines : by name of the control and question, the results of the controls.
    dictionary : scores of the dictionary alone, which need no images.
    """

    name: str
    method: str
    kind: str = "method"
    config: dict[str, Any] = field(default_factory=dict)
    explainers: list[Explainer] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    seconds: float | None = None
    notes: list[str] = field(default_factory=list)
    run: str = ""
    reason: str = ""
    results: dict[str, list[Result]] = field(default_factory=dict)
    baselines: dict[str, dict[str, list[Result]]] = field(default_factory=dict)
    dictionary: list[Score] = field(default_factory=list)

    @classmethod
    def of_run(cls, run: Run, *, name: str = "", every_seed: bool = False) -> Subject:
        """The subject of a fitted run.

        Parameters
        ----------
        every_seed : keep the explainers of all seeds of a method that does not depend on the seed; default one.
        """
        subject = cls(name or run.path.name, run.method)
        subject.read(run, every_seed=every_seed)
        return subject

    def read(self, run: Run, *, every_seed: bool = False) -> None:
        """Fills the subject in from a fitted run."""
        explainers = run.explainers()
        if explainers[0].deterministic and not every_seed:
            explainers = explainers[:1]
        self.explainers, self.seeds = explainers, run.seeds[: len(explainers)]
        self.method, self.config, self.run = run.method, run.manifest["config"], run.path.name
        times = [seconds for name, seconds in run.manifest.get("times", {}).items() if name.startswith("fit seed")]
        self.seconds = round(sum(times), 2) if times else None
        self.notes = list(dict.fromkeys(note for e in explainers for note in getattr(e, "notes", [])))

    @property
    def view(self) -> View:
        """How its explainers read the layer."""
        explainer = self.explainers[0]
        return View(explainer.reads == "pooled", tuple(explainer.spec.upper) if explainer.target == "upper" else ())

    def record(self) -> dict[str, Any]:
        """The row of ``comparison.json``, without its scores."""
        explainer = self.explainers[0] if self.explainers else None
        return {
            "name": self.name,
            "method": self.method,
            "kind": self.kind,
            "config": self.config,
            "reads": explainer.reads if explainer else None,
            "target": explainer.target if explainer else None,
            "num_concepts": explainer.num_concepts if explainer else None,
            "seeds": self.seeds,
            "deterministic": bool(explainer.deterministic) if explainer else None,
            "fit_seconds": self.seconds,
            "notes": self.notes,
            "run": self.run,
            "reason": self.reason,
        }


# -- what a subject computes from a batch -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Rebuilt:
    """What a subject computes from a batch.

    Attributes
    ----------
    logits : only where the subject rebuilds class scores itself, without the tail.
    upper : rebuilt activations of layers above, by name.
    """

    concepts: Tensor | None = None
    reconstruction: Tensor | None = None
    logits: Tensor | None = None
    contributions: Tensor | None = None
    upper: dict[str, Tensor] = field(default_factory=dict)


Rebuild = Callable[[LayerBatch], Rebuilt]


def encode(explainer: Explainer, index: Tensor, activation: Tensor) -> Tensor:
    """Concepts of images: ``explainer.encode``, or a look-up by image for codes that were made elsewhere."""
    lookup = getattr(explainer, "concepts_of_images", None)
    return explainer.encode(activation) if lookup is None else lookup(index)


def from_explainer(explainer: Explainer, *, contributions: bool = False) -> Rebuild:
    """Concepts, reconstruction and rebuilt logits of an explainer; contributions to the predicted class on request."""

    def rebuild(batch: LayerBatch) -> Rebuilt:
        concepts = encode(explainer, batch.index, batch.activation)
        values = None
        if contributions and batch.logits.shape[1]:
            predicted = batch.logits.argmax(dim=1)
            given = (explainer, batch.tail, concepts, batch.logits, predicted)
            values = explain_class(*given, activation=batch.activation).values
        upper = explainer(batch.activation) if explainer.target == "upper" else {}
        return Rebuilt(
            concepts,
            explainer.decode(concepts) if explainer.target == "activation" else None,
            batch.tail(upper) if upper else explainer.rebuilt_logits(concepts, batch.logits),
            values,
            upper,
        )

    return rebuild


def from_track(rebuild_upper: Callable[[Tensor], dict[str, Tensor]]) -> Rebuild:
    """One track alone of an explainer that rebuilds layers above."""

    def rebuild(batch: LayerBatch) -> Rebuilt:
        upper = rebuild_upper(batch.activation)
        return Rebuilt(logits=batch.tail(upper), upper=upper)

    return rebuild


def from_shuffled_codes(explainer: Explainer, layer: Layer, images: np.ndarray, *, seed: int) -> Rebuild:
    """Reconstruction by an explainer from the codes of another image, drawn at random from ``images``."""
    rng = np.random.default_rng(seed)
    pool = np.sort(rng.choice(images, size=min(_POOL, len(images)), replace=False))
    with torch.no_grad():
        codes = torch.cat([encode(explainer, b.index, b.activation) for b in layer.batches(pool)])

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


def from_mean(mean: Tensor) -> Rebuild:
    """The mean (C,) over the fit at every position."""

    def rebuild(batch: LayerBatch) -> Rebuilt:
        shape = (1, -1) + (1,) * (batch.activation.ndim - 2)
        return Rebuilt(None, mean.to(batch.activation).reshape(shape).expand_as(batch.activation))

    return rebuild


# -- controls and seeds -----------------------------------------------------------------------------------------------


def make_controls(stream: Any, spec: Any, *, num_concepts: int, seeds: Sequence[int]) -> dict[str, list[Explainer]]:
    """Control explainers with ``num_concepts`` concepts, fitted on the rows of ``stream``; random ones per seed."""
    from netgloss.training import build_explainer

    controls: dict[str, list[Explainer]] = {}
    for method in ("random-directions", "natural-axes"):
        cls = find_explainer(method)
        config = cls.Config(num_concepts=min(num_concepts, spec.num_features))
        fitted = []
        for seed in seeds[:1] if cls.deterministic else seeds:
            explainer = build_explainer(cls, config, spec, seed=seed)
            explainer.fit_rows(stream, seed=seed)
            fitted.append(explainer.eval())
        controls[method.replace("-", "_")] = fitted
    return controls


def dictionaries(explainers: Sequence[Explainer]) -> list[Tensor] | None:
    """The dictionaries (K, C) on the CPU, or None if the method has none."""
    atoms = [e.dictionary for e in explainers]
    return None if any(d is None for d in atoms) else [d.detach().cpu() for d in atoms if d is not None]


def per_concept_stability(explainers: Sequence[Explainer], layer: Layer, images: np.ndarray) -> list[float] | None:
    """How well the other seeds recover each concept of the first one, in [0, 1]; None for a single seed.

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

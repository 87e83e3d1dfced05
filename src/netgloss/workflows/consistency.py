"""A consistency run: units of a network on real and adversarial images, in a folder with a report.

::

    units.csv      one row per unit and layer
    result.json    settings, affinity, attack, summaries a layer, controls, histograms, galleries
    scores.json    consis_cal per layer, with random directions and the untrained network as baselines
    images/        top images of the units shown, with heatmaps
    run.json, report.html

Each seed draws other images (where fewer than all are asked for), targets and starts; the report shows the first seed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from netgloss.adversarial import PixelClassifier
from netgloss.adversarial.affinity_choice import AffinityChoice
from netgloss.adversarial.differences import Codec, prediction_differences
from netgloss.adversarial.layer_consistency import Encode, LayerResult, UnitOptions, measure_layers, network_mean
from netgloss.adversarial.pixels import LabelledPixels, load_pixels
from netgloss.adversarial.probe import Adversarial, AttackChoice, attack_probe
from netgloss.adversarial.records import (
    attack_record,
    layer_record,
    layer_score,
    over_seeds,
    run_warnings,
    to_csv,
    unit_rows,
)
from netgloss.adversarial.unit_gallery import gallery, trace
from netgloss.classifiers import Classifier
from netgloss.errors import UserError
from netgloss.metrics.consistency.units import top_set_size
from netgloss.report import write_report
from netgloss.runs.run import FileCheckpoint, Run, to_json, write_atomically
from netgloss.runs.saved import load_explainer
from netgloss.training.execution import Execution

if TYPE_CHECKING:
    from netgloss.data import ImageSource
    from netgloss.explainers.base import Explainer


@dataclass(frozen=True)
class ConsistencyOptions:
    """How units are scored and shown."""

    seeds: int = 1
    """Repetitions with other images, targets and starts; several give an interval."""
    max_images: int | None = None
    """Probe with this many images, equally many of every class; default all, cut to the smallest class."""
    k: int | None = None
    """Size of a unit's top set; default the larger of 1 % and 20, at most the smallest class (of 20 images or more)."""
    pooling: Literal["max", "mean"] = "max"
    """A unit's response to an image: maximum or mean of its map."""
    controls: bool = True
    """Measure random directions and the untrained network too."""
    null_draws: int = 2000
    """Random top sets for p-values; 0 leaves them out."""
    difference_images: int = 64
    """Images for prediction differences, the agreement s and the trace; 0 leaves them out."""
    shown_units: int = 12
    """Units with pictures in the report."""
    shown_images: int = 6
    """Top images of each."""

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise UserError(f"seeds must be at least 1, got {self.seeds}")
        if min(self.null_draws, self.difference_images, self.shown_units, self.shown_images) < 0:
            raise UserError("null_draws, difference_images, shown_units and shown_images must not be negative")


def consistency(
    classifier: Classifier,
    images: ImageSource,
    layers: Sequence[str] = (),
    *,
    out: str | Path,
    attack: AttackChoice | None = None,
    also: Sequence[Classifier] = (),
    affinity: AffinityChoice | None = None,
    options: ConsistencyOptions | None = None,
    explainer: str | Path | None = None,
    device: str | Execution = "auto",
) -> Run:
    """Scores how consistent the concept of each unit is, on real images and under attack, and writes the report.

    Parameters
    ----------
    images : labelled images R.
    layers : whose channels are the units.
    attack : how the adversarial images V are made from R.
    also : further networks that the ensemble attack brings to its target, with the same classes and input.
    affinity : how similar two classes are.
    explainer : a run folder, whose concepts are the units instead, at its layer.
    device : a device, or an :class:`~netgloss.Execution`.

    Raises
    ------
    UserError : images, layers or networks that do not fit, or ``out`` holds another run.
    """
    settings = _Settings(
        attack or AttackChoice(), affinity or AffinityChoice(), options or ConsistencyOptions(), tuple(also)
    )
    execution = Execution.of(device)
    units = _Units.channels(classifier, layers) if explainer is None else _Units.concepts(classifier, layers, explainer)
    _check_ensemble(classifier, settings)
    run = Run.create(out, _manifest(classifier, images, units, settings, execution.command))
    if run.manifest["status"] == "complete":
        return run
    began = time.monotonic()
    classifier = classifier.to(execution.torch_device)
    if units.explainer is not None:
        units.explainer.to(execution.torch_device)
    pixels = PixelClassifier.of(classifier, craft_layer=settings.attack.craft_layer)
    measured = [_measure(run, seed, classifier, images, pixels, units, settings, execution) for seed in run.seeds]
    first = measured[0]
    differences = {}
    if settings.options.difference_images and units.rebuilds:
        differences = {
            layer: prediction_differences(
                classifier,
                pixels,
                first.data,
                first.adversarial,
                result,
                first.affinities["chosen"],
                num_images=settings.options.difference_images,
                codec=units.codec,
                progress=execution.shown,
            )
            for layer, result in first.results.items()
        }
    result = _write(run, pixels, measured, units, differences, settings)
    unreadable = [{"id": i, "reason": r} for i, r in list(first.data.problems.items())[:200]]
    run.update(
        data={**run.manifest["data"], "unreadable": unreadable},
        warnings=run_warnings(result, pooling=settings.options.pooling),
    )
    run.add_time("consistency", time.monotonic() - began)
    write_report(run)
    for seed in run.seeds:
        _checkpoint(run, seed).remove()
    run.update(status="complete")
    return run


@dataclass(frozen=True)
class _Settings:
    """The options of a consistency run; ``also`` are the further networks of an ensemble."""

    attack: AttackChoice
    affinity: AffinityChoice
    options: ConsistencyOptions
    also: tuple[Classifier, ...]

    def record(self) -> dict[str, Any]:
        """What run.json records of them."""
        also = {"also": [c.spec() for c in self.also]} if self.also else {}
        return {
            **dataclasses.asdict(self.options),
            "attack": {**dataclasses.asdict(self.attack), **also},
            "affinity": {k: None if v is None else str(v) for k, v in dataclasses.asdict(self.affinity).items()},
        }


@dataclass(frozen=True)
class _Units:
    """What is scored: channels of layers, or the concepts of an explainer.

    Attributes
    ----------
    identity : what identifies the explainer in run.json.
    codec : from activations to units and back.
    rebuilds : whether the units can be written back to the layer's activation.
    """

    layers: list[str]
    method: str = "channels"
    identity: dict[str, str] = field(default_factory=dict)
    codec: Codec = field(default_factory=Codec)
    rebuilds: bool = True
    explainer: Explainer | None = None

    @property
    def encoders(self) -> dict[str, Encode]:
        """By layer, ``encode`` of the explainer; none for channels."""
        return {} if self.explainer is None else dict.fromkeys(self.layers, self.codec.encode)

    @classmethod
    def channels(cls, classifier: Classifier, layers: Sequence[str]) -> _Units:
        """The channels of ``layers``."""
        if not layers:
            raise UserError("say which layer's units are to be scored (--layer), or pass a run folder (--explainer)")
        return cls(list(dict.fromkeys(classifier.check_layer(name) for name in layers)))

    @classmethod
    def concepts(cls, classifier: Classifier, layers: Sequence[str], folder: str | Path) -> _Units:
        """The concepts of a run, at its layer."""
        run = Run(folder)
        named = list(dict.fromkeys(classifier.check_layer(name) for name in layers))
        if named not in ([], [run.layer]):
            raise UserError(f"the explainer in {folder} explains layer {run.layer!r}, not {', '.join(named)}")
        file = run.explainer_path(run.seeds[0])
        explainer = load_explainer(file, classifier=classifier)
        return cls(
            [run.layer],
            run.method,
            {"explainer": hashlib.sha256(file.read_bytes()).hexdigest()},
            Codec(explainer.encode, explainer.decode, explainer.dictionary is not None),
            # a mean over the grid rebuilds no map
            explainer.target == "activation" and explainer.reads != "pooled",
            explainer,
        )


@dataclass(frozen=True)
class _Measured:
    """Everything measured with one seed."""

    data: LabelledPixels
    adversarial: Adversarial | None
    results: dict[str, LayerResult]
    logits: dict[str, torch.Tensor]
    affinities: dict[str, np.ndarray]
    provenance: dict[str, Any]


def _checkpoint(run: Run, seed: int) -> FileCheckpoint:
    return FileCheckpoint(run.path / f"attack-seed{seed}.checkpoint.safetensors")


def _measure(
    run: Run,
    seed: int,
    classifier: Classifier,
    images: ImageSource,
    pixels: PixelClassifier,
    units: _Units,
    settings: _Settings,
    execution: Execution,
) -> _Measured:
    """Draws R, attacks it and scores the units; the first seed has p-values and the untrained network too."""
    options, progress = settings.options, execution.shown
    first = seed == run.seeds[0]
    data = load_pixels(classifier, images, number=options.max_images, seed=seed, progress=progress)
    data = data.stratified(options.max_images, seed=seed)
    top_set_size(data.probe_labels, k=options.k)  # refuses too few images before minutes of attack
    affinities, provenance = settings.affinity.build(classifier, data)
    adversarial = attack_probe(
        pixels,
        data,
        settings.attack,
        also=[PixelClassifier.of(other.to(execution.torch_device)) for other in settings.also],
        seed=seed,
        layer=units.layers[0],
        checkpoint=_checkpoint(run, seed),
        progress=progress,
    )
    results, logits = measure_layers(
        pixels,
        data,
        units.layers,
        affinities,
        adversarial=adversarial,
        encoders=units.encoders,
        untrained=PixelClassifier.of(classifier.untrained(0)) if first and options.controls else None,
        options=UnitOptions(options.controls, options.pooling, options.k, options.null_draws if first else 0, seed),
        progress=progress,
    )
    return _Measured(data, adversarial, results, logits, affinities, provenance)


def _manifest(
    classifier: Classifier, images: ImageSource, units: _Units, settings: _Settings, command: str
) -> dict[str, Any]:
    return {
        "command": command,
        "method": "consistency",
        "config": {"units": units.method, **units.identity, **settings.record()},
        "model": classifier.spec(),
        "layer": ", ".join(units.layers),
        "seeds": list(range(settings.options.seeds)),
        "store_address": hashlib.sha256(f"{images.fingerprint}\n{classifier.weights_hash}".encode()).hexdigest(),
        "data": {
            "description": images.description,
            "num_images": len(images),
            "fingerprint": images.fingerprint,
            "notes": list(images.notes),
        },
    }


def _write(
    run: Run,
    pixels: PixelClassifier,
    measured: Sequence[_Measured],
    units: _Units,
    differences: dict[str, dict[str, Any]],
    settings: _Settings,
) -> dict[str, Any]:
    """Writes units.csv, pictures, result.json and scores.json; returns the content of result.json."""
    first, options, affinity = measured[0], settings.options, settings.affinity
    data, adversarial, results = first.data, first.adversarial, first.results
    rows = [
        row
        for layer in units.layers
        for row in unit_rows(results[layer], data, affinity, first.provenance, units.method, differences.get(layer))
    ]
    write_atomically(run.path / "units.csv", to_csv(rows))
    shown = (options.shown_units, options.shown_images)
    result = {
        "affinity": {k: v for k, v in first.provenance.items() if k != "wnids"},
        "class_names": [data.title(c) for c in range(len(data.class_names))],
        "num_images": len(data),
        "attack": None if adversarial is None else attack_record(settings.attack, adversarial, first.logits, data),
        "v_regenerated": adversarial is not None,
        "layers": {
            layer: layer_record(results[layer], data, first.affinities, differences.get(layer))
            for layer in units.layers
        },
        "network": network_mean(results),
        "over_seeds": over_seeds([m.results for m in measured]),
        "gallery": {
            layer: gallery(run, pixels, data, adversarial, results[layer], *shown, units.encoders.get(layer))
            for layer in units.layers
        },
        "trace": {
            layer: trace(run, data, adversarial, results[layer], found)
            for layer, found in differences.items()
            if layer not in units.encoders and adversarial is not None and options.shown_images
        },
    }
    write_atomically(run.path / "result.json", to_json(result))
    run.write_scores([layer_score(layer, [m.results for m in measured]) for layer in units.layers])
    return result


def _check_ensemble(classifier: Classifier, settings: _Settings) -> None:
    if settings.also and settings.attack.attack != "ensemble":
        raise UserError(f"further networks are attacked by the ensemble attack, not by {settings.attack.attack}")
    for other in settings.also:
        for what, own, theirs in (
            ("classes", classifier.num_classes, other.num_classes),
            ("an input of", classifier.input_shape, other.input_shape),
        ):
            if own != theirs:
                raise UserError(f"the networks of an ensemble read the same images: {own} and {theirs} {what}")

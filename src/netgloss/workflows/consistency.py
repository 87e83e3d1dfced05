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
from netgloss.adversarial.pixels import LabelledPixels, load_pixels
from netgloss.adversarial.probe import (
    Adversarial,
    AttackChoice,
    Encode,
    LayerResult,
    UnitOptions,
    attack_probe,
    measure_layers,
    network_mean,
)
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
from netgloss.classifiers import Classifier, Tail
from netgloss.errors import UserError
from netgloss.metrics.consistency.difference import (
    agreement_with_units,
    detection_auroc,
    prediction_difference,
    unchanged,
)
from netgloss.metrics.consistency.units import top_set_size
from netgloss.progress import Progress
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
    attack, affinity, options = attack or AttackChoice(), affinity or AffinityChoice(), options or ConsistencyOptions()
    execution = Execution.of(device)
    progress = execution.shown
    units = _Units.channels(classifier, layers) if explainer is None else _Units.concepts(classifier, layers, explainer)
    _check_ensemble(classifier, also, attack)
    run = Run.create(out, _manifest(classifier, images, units, attack, also, affinity, options, execution.command))
    if run.manifest["status"] == "complete":
        return run
    began = time.monotonic()
    classifier = classifier.to(execution.torch_device)
    units.to(execution.torch_device)
    pixels = PixelClassifier.of(classifier, craft_layer=attack.craft_layer)
    others = [PixelClassifier.of(other.to(execution.torch_device)) for other in also]
    untrained = PixelClassifier.of(classifier.untrained(0)) if options.controls else None
    measured: list[_Measured] = []
    for seed in run.seeds:
        data = load_pixels(classifier, images, number=options.max_images, seed=seed, progress=progress)
        data = data.stratified(options.max_images, seed=seed)
        top_set_size(data.probe_labels, k=options.k)  # refuses too few images before minutes of attack
        affinities, provenance = affinity.build(classifier, data)
        adversarial = attack_probe(
            pixels,
            data,
            attack,
            also=others,
            seed=seed,
            layer=units.layers[0],
            checkpoint=_checkpoint(run, seed),
            progress=progress,
        )
        first = seed == run.seeds[0]
        results, logits = measure_layers(
            pixels,
            data,
            units.layers,
            affinities,
            adversarial=adversarial,
            encoders=units.encoders,
            untrained=untrained if first else None,
            options=UnitOptions(options.controls, options.pooling, options.k, options.null_draws if first else 0, seed),
            progress=progress,
        )
        measured.append(_Measured(data, adversarial, results, logits, affinities, provenance))
    differences = {
        layer: _differences(classifier, pixels, measured[0], layer, options.difference_images, units, progress)
        for layer in units.layers
        if options.difference_images and (layer not in units.encoders or units.decode is not None)
    }
    result = _write(run, pixels, measured, units, differences, attack, affinity, options)
    unreadable = [{"id": i, "reason": r} for i, r in list(measured[0].data.problems.items())[:200]]
    run.update(
        data={**run.manifest["data"], "unreadable": unreadable},
        warnings=run_warnings(result, pooling=options.pooling),
    )
    run.add_time("consistency", time.monotonic() - began)
    write_report(run)
    for seed in run.seeds:
        _checkpoint(run, seed).remove()
    run.update(status="complete")
    return run


@dataclass
class _Units:
    """What is scored: channels of layers, or the concepts of an explainer.

    Attributes
    ----------
    encoders : by layer, ``encode`` of the explainer; none for channels.
    decode : back to the layer, where the explainer can. linear : whether decode is affine.
    """

    layers: list[str]
    method: str = "channels"
    identity: dict[str, str] = field(default_factory=dict)
    encoders: dict[str, Encode] = field(default_factory=dict)
    decode: Encode | None = None
    linear: bool = True
    explainer: Explainer | None = None

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
        rebuilds = explainer.target == "activation" and explainer.reads != "pooled"  # from a mean over the grid, no map
        return cls(
            [run.layer],
            run.method,
            {"explainer": hashlib.sha256(file.read_bytes()).hexdigest()},
            {run.layer: explainer.encode},
            explainer.decode if rebuilds else None,
            explainer.dictionary is not None,
            explainer,
        )

    def to(self, device: torch.device) -> None:
        """Moves the explainer."""
        if self.explainer is not None:
            self.explainer.to(device)


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


def _manifest(
    classifier: Classifier,
    images: ImageSource,
    units: _Units,
    attack: AttackChoice,
    also: Sequence[Classifier],
    affinity: AffinityChoice,
    options: ConsistencyOptions,
    command: str,
) -> dict[str, Any]:
    return {
        "command": command,
        "method": "consistency",
        "config": {
            "units": units.method,
            **units.identity,
            **dataclasses.asdict(options),
            "attack": {**dataclasses.asdict(attack), **({"also": [c.spec() for c in also]} if also else {})},
            "affinity": {k: None if v is None else str(v) for k, v in dataclasses.asdict(affinity).items()},
        },
        "model": classifier.spec(),
        "layer": ", ".join(units.layers),
        "seeds": list(range(options.seeds)),
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
    attack: AttackChoice,
    affinity: AffinityChoice,
    options: ConsistencyOptions,
) -> dict[str, Any]:
    """units.csv, pictures, result.json and scores.json; returns the content of result.json."""
    first = measured[0]
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
        "attack": None if adversarial is None else attack_record(attack, adversarial, first.logits, data),
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


# -- prediction differences -------------------------------------------------------------------------------------------


def _check_ensemble(classifier: Classifier, also: Sequence[Classifier], attack: AttackChoice) -> None:
    if also and attack.attack != "ensemble":
        raise UserError(f"further networks are attacked by the ensemble attack, not by {attack.attack}")
    for other in also:
        for what, own, theirs in (
            ("classes", classifier.num_classes, other.num_classes),
            ("an input of", classifier.input_shape, other.input_shape),
        ):
            if own != theirs:
                raise UserError(f"the networks of an ensemble read the same images: {own} and {theirs} {what}")


def _differences(
    classifier: Classifier,
    pixels: PixelClassifier,
    measured: _Measured,
    layer: str,
    num_images: int,
    units: _Units,
    progress: Progress,
) -> dict[str, Any]:
    """Prediction differences (PD) of the units on some images of R and V, the agreement s of each image, and how well s
    and the largest probability detect V, and wrong images of R.
    """
    data, adversarial, result = measured.data, measured.adversarial, measured.results[layer]
    drawn = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    chosen = drawn[:num_images].sort()[0]
    device = pixels.mean.device
    sets = {"real": data.pixels(chosen)}
    if adversarial is not None:
        sets["adversarial"] = adversarial.found.images[chosen].cpu()
    example = pixels.normalise(sets["real"][:2].to(device))
    tail = Tail(classifier, result.layer, example=example)
    found: dict[str, Any] = {"chosen": chosen, "tail": tail.mode}
    if tail.mode != "graph":
        return {**found, "reason": f"no prediction differences: {tail.reason}"}
    from netgloss.classifiers import Taps

    positive = result.units.pole > 0  # a signed unit is taken out as a whole
    meaning = torch.as_tensor(measured.affinities["chosen"]) @ result.scores.classes[:, positive]
    progress.start(f"differences {result.layer}", len(sets) * len(chosen), unit="images")
    affine = None
    encode, decode = units.encoders.get(layer, unchanged), units.decode or unchanged
    for name, images in sets.items():
        parts, logits_parts = [], []
        with torch.no_grad(), Taps(pixels.net, result.layer, stop=False) as taps:
            for batch in images.split(32):
                activation = taps(pixels.normalise(batch.to(device)))[result.layer]
                logits_parts.append(taps.logits.cpu())
                if affine is None:
                    affine = units.linear and tail.is_affine(tuple(activation.shape[1:]))
                pd = prediction_difference(activation, tail, encode=encode, decode=decode, affine=affine)
                parts.append(pd.cpu())
                progress.advance(len(batch))
        logits = torch.cat(logits_parts)
        inside = logits[:, data.net_classes].argmax(1)
        found[name] = {
            "pd": torch.cat(parts),
            "s": agreement_with_units(torch.cat(parts), meaning, torch.eye(len(meaning), dtype=torch.float64), inside),
            "confidence": logits.softmax(1).amax(1),
            "right": logits.argmax(1) == data.labels[chosen],
        }
    progress.finish()
    real = found["real"]
    for name, key in (("auroc_wrong", "s"), ("auroc_wrong_confidence", "confidence")):
        found[name] = detection_auroc(real[key][real["right"]], real[key][~real["right"]])
    if adversarial is not None:
        for name, key in (("auroc_s", "s"), ("auroc_confidence", "confidence")):
            found[name] = detection_auroc(real[key], found["adversarial"][key])
    return found

"""A consistency run: units of a network on real and adversarial images, in a folder with a report.

::

    units.csv      one row a unit and layer
    result.json    settings, affinity, attack, summaries a layer, controls, histograms, galleries
    scores.json    consis_cal a layer, with random directions and the untrained network beside it
    images/        top images of the units shown, with heat
    run.json, report.html

Each seed draws other images (where fewer than all are asked for), targets and starts; the report shows the first seed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
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
from netgloss.progress import Progress, Silent
from netgloss.report import write_report
from netgloss.runs.run import FileCheckpoint, Run, to_json, write_atomically
from netgloss.runs.saved import load_explainer

if TYPE_CHECKING:
    from netgloss.data import ImageSource


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


def consistency_run(
    classifier: Classifier,
    images: ImageSource,
    layers: Sequence[str],
    *,
    out: str | Path,
    attack: AttackChoice | None = None,
    also: Sequence[Classifier] = (),
    affinity: AffinityChoice | None = None,
    options: ConsistencyOptions | None = None,
    explainer: str | Path | None = None,
    device: str = "cpu",
    command: str = "",
    progress: Progress | None = None,
) -> Run:
    """Scores the channels of ``layers``, or the concepts of a run folder's explainer at its layer.

    Parameters
    ----------
    also : further networks that the ensemble attack brings to its target, with the same classes and input.

    Raises
    ------
    UserError : for what does not fit, and if ``out`` holds another run.
    """
    attack, affinity, options = attack or AttackChoice(), affinity or AffinityChoice(), options or ConsistencyOptions()
    progress = progress or Silent()
    layers = list(dict.fromkeys(classifier.check_layer(name) for name in layers))
    encoders: dict[str, Encode] = {}
    method, decode, linear = "channels", None, True
    identity: dict[str, str] = {}
    if explainer is not None:
        explained = Run(explainer)
        if layers not in ([], [explained.layer]):
            raise UserError(f"the explainer in {explainer} explains layer {explained.layer!r}, not {', '.join(layers)}")
        layers = [explained.layer]
        file = explained.explainer_path(explained.seeds[0])
        fitted = load_explainer(file, classifier=classifier).to(device)
        encoders[explained.layer], method = fitted.encode, explained.method
        identity["explainer"] = hashlib.sha256(file.read_bytes()).hexdigest()
        rebuilds = fitted.target == "activation" and fitted.reads != "pooled"  # from a mean over the grid, no map
        decode = fitted.decode if rebuilds else None
        linear = fitted.dictionary is not None
    _check_ensemble(classifier, also, attack)
    if not layers:
        raise UserError("say which layer's units are to be scored (--layer), or pass a run folder (--explainer)")
    manifest = {
        "command": command,
        "method": "consistency",
        "config": {
            "units": method,
            **identity,
            **dataclasses.asdict(options),
            "attack": {**dataclasses.asdict(attack), **({"also": [c.spec() for c in also]} if also else {})},
            "affinity": {k: None if v is None else str(v) for k, v in dataclasses.asdict(affinity).items()},
        },
        "model": classifier.spec(),
        "layer": ", ".join(layers),
        "seeds": list(range(options.seeds)),
        "store_address": hashlib.sha256(f"{images.fingerprint}\n{classifier.weights_hash}".encode()).hexdigest(),
        "data": {
            "description": images.description,
            "num_images": len(images),
            "fingerprint": images.fingerprint,
            "notes": list(images.notes),
        },
    }
    run = Run.create(out, manifest)
    if run.manifest["status"] == "complete":
        return run
    began = time.monotonic()
    classifier = classifier.to(device)
    pixels = PixelClassifier.of(classifier, craft_layer=attack.craft_layer)
    others = [PixelClassifier.of(other.to(device)) for other in also]
    untrained = PixelClassifier.of(classifier.untrained(0)) if options.controls else None
    measured: list[dict[str, LayerResult]] = []
    for seed in run.seeds:
        data = load_pixels(classifier, images, number=options.max_images, seed=seed, progress=progress)
        data = data.stratified(options.max_images, seed=seed)
        top_set_size(data.probe_labels, k=options.k)  # too few images are told before minutes of attack
        affinities, provenance = affinity.build(classifier, data)
        kept = FileCheckpoint(run.path / f"attack-seed{seed}.checkpoint.safetensors")
        made = attack_probe(
            pixels, data, attack, also=others, seed=seed, layer=layers[0], checkpoint=kept, progress=progress
        )
        results, logits = measure_layers(
            pixels,
            data,
            layers,
            affinities,
            adversarial=made,
            encoders=encoders,
            untrained=untrained if seed == run.seeds[0] else None,
            controls=options.controls,
            pooling=options.pooling,
            k=options.k,
            null_draws=options.null_draws if seed == run.seeds[0] else 0,
            seed=seed,
            progress=progress,
        )
        measured.append(results)
        if seed == run.seeds[0]:
            first = (data, made, results, logits, affinities, provenance)
    data, made, results, logits, affinities, provenance = first
    differences = {}
    for layer in layers:
        if options.difference_images and (layer not in encoders or decode is not None):
            ways = (encoders[layer], decode) if layer in encoders and decode else (unchanged, unchanged)
            differences[layer] = _differences(
                classifier, pixels, data, made, results[layer], affinities, options, ways, linear, progress
            )
    rows = [
        row
        for layer in layers
        for row in unit_rows(results[layer], data, affinity, provenance, method, differences.get(layer))
    ]
    write_atomically(run.path / "units.csv", to_csv(rows))
    shown = {
        layer: gallery(
            run, pixels, data, made, results[layer], options.shown_units, options.shown_images, encoders.get(layer)
        )
        for layer in layers
    }
    traced = {
        layer: trace(run, data, made, results[layer], found)
        for layer, found in differences.items()
        if layer not in encoders and made is not None and options.shown_images
    }
    result = {
        "affinity": {k: v for k, v in provenance.items() if k != "wnids"},
        "class_names": [data.title(c) for c in range(len(data.class_names))],
        "num_images": len(data),
        "attack": None if made is None else attack_record(attack, made, logits, data),
        "v_regenerated": made is not None,
        "layers": {layer: layer_record(results[layer], data, affinities, differences.get(layer)) for layer in layers},
        "network": network_mean(results),
        "over_seeds": over_seeds(measured),
        "gallery": shown,
        "trace": traced,
    }
    write_atomically(run.path / "result.json", to_json(result))
    run.write_scores([layer_score(layer, measured) for layer in layers])
    data_record = {
        **run.manifest["data"],
        "unreadable": [{"id": i, "reason": r} for i, r in list(data.problems.items())[:200]],
    }
    run.update(data=data_record, warnings=run_warnings(result, pooling=options.pooling))
    run.add_time("consistency", time.monotonic() - began)
    write_report(run)
    for seed in run.seeds:
        FileCheckpoint(run.path / f"attack-seed{seed}.checkpoint.safetensors").remove()
    run.update(status="complete")
    return run


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
    data: LabelledPixels,
    made: Adversarial | None,
    result: LayerResult,
    affinities: dict[str, np.ndarray],
    options: ConsistencyOptions,
    ways: tuple[Encode, Encode],
    linear: bool,
    progress: Progress,
) -> dict[str, Any]:
    """PD of the units on some images of R and V, s of each, and how well s and the largest probability tell V, and
    wrong images of R.

    ``ways`` encode and decode; ``linear`` says that decode is affine.
    """
    drawn = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    chosen = drawn[: options.difference_images].sort()[0]
    device = pixels.mean.device
    sets = {"real": data.pixels(chosen)}
    if made is not None:
        sets["adversarial"] = made.found.images[chosen].cpu()
    example = pixels.normalise(sets["real"][:2].to(device))
    tail = Tail(classifier, result.layer, example=example)
    found: dict[str, Any] = {"chosen": chosen, "tail": tail.mode}
    if tail.mode != "graph":
        return {**found, "reason": f"no prediction differences: {tail.reason}"}
    from netgloss.classifiers import Taps

    positive = result.units.pole > 0  # a signed unit is taken out as a whole
    meaning = torch.as_tensor(affinities["chosen"]) @ result.scores.classes[:, positive]
    progress.start(f"differences {result.layer}", len(sets) * len(chosen), unit="images")
    affine = None
    for name, images in sets.items():
        parts, logits_parts = [], []
        with torch.no_grad(), Taps(pixels.net, result.layer, stop=False) as taps:
            for batch in images.split(32):
                activation = taps(pixels.normalise(batch.to(device)))[result.layer]
                logits_parts.append(taps.logits.cpu())
                if affine is None:
                    affine = linear and tail.is_affine(tuple(activation.shape[1:]))
                pd = prediction_difference(activation, tail, encode=ways[0], decode=ways[1], affine=affine)
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
    if made is not None:
        for name, key in (("auroc_s", "s"), ("auroc_confidence", "confidence")):
            found[name] = detection_auroc(real[key], found["adversarial"][key])
    return found

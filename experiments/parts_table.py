"""Measures the fits of experiments/parts.py on the reported half and writes the table. Nothing is chosen here."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

HERE = Path(__file__).parent
OTHERS: dict[str, dict[str, Any]] = {
    "pca": {"num_concepts": 32},
    "nmf": {"num_concepts": 32, "negative": "clip"},
    "kmeans": {"num_concepts": 32},
    "topk-sae": {"num_concepts": 96, "top_k": 8, "steps": 200},
    "random-directions": {"num_concepts": 96},
}
IOU_RATE = "rate:0.005"
TRACKS = (("both", "both"), ("part maps alone", "interpretable"), ("ordinary alone", "ordinary"))


class Judge:
    """Everything that is measured on the images that were not fitted on."""

    def __init__(self, name: str, study: Any, data: Path, runs: Path) -> None:
        from netgloss.activations.annotated import MaskedLayer, split_annotated
        from netgloss.activations.layer import class_labels, make_tail, split_store
        from netgloss.data import Joined
        from netgloss.evaluation.locate import landmarks_of
        from parts import images_of, store_of

        self.study, self.runs = study, runs
        self.classifier, _, self.store = store_of(name, study, data, runs)
        annotated = Joined(*images_of(name, data, annotated=True))
        self.fit_images, held = split_store(self.store)
        self.images = np.array([i for i in held.tolist() if annotated.annotation(i) is not None])
        self.names, self.landmarks, self.size = landmarks_of(annotated, self.images, self.classifier.preprocessing)
        self.grid = self.store.shapes[study.layer][1:]
        self.labels = class_labels(self.store, self.classifier.class_names, self.classifier.wnids)
        self.above = [name for name in self.store.layers if name != study.layer]
        self.tail = make_tail(self.classifier, self.above[-1], None)
        self.masked = MaskedLayer(
            self.store, study.layer, annotated, self.classifier.preprocessing, labels=self._part_labels(annotated)
        )
        label, score = split_annotated(self.masked)
        self.halves = tuple(np.intersect1d(part, self.images) for part in (label, score))
        logits = torch.from_numpy(self.store.read_logits(self.images))
        self.decided = logits.argmax(dim=1)
        self.truth = torch.from_numpy(self.labels[self.images])
        self.own_accuracy = self._accuracy(self.decided)

    def _part_labels(self, source: Any) -> list[str]:
        marks = [source.annotation(int(i)) for i in self.images]
        seen = {label for mark in marks for label in mark.mask_labels.values()}
        seen |= {box[0] for mark in marks for box in mark.boxes}
        return sorted(seen - set(source.class_names))

    def _accuracy(self, decided: Tensor) -> float:
        known = self.truth >= 0
        return float((decided == self.truth)[known].float().mean()) if known.any() else math.nan

    # -- places ---------------------------------------------------------------------------------------------------

    def places(self, explainer: Any) -> dict[str, Any]:
        """Location of one explainer, with bootstrap replicates of the ratio."""
        from netgloss.evaluation.locate import peaks_of

        return self.located(peaks_of(explainer, self.store, self.study.layer, self.images, size=self.size))

    def located(self, peaks: Any, grid: Any = None) -> dict[str, Any]:
        from netgloss.metrics.location import bootstrap, followed, locate, regression_error

        diagonal = math.hypot(*self.size)
        seen = followed(peaks, self.landmarks, diagonal=diagonal)
        top, every = (locate(peaks, self.landmarks, diagonal=diagonal, top=t).means() for t in (100, None))
        spans = bootstrap(peaks, self.landmarks, diagonal=diagonal)
        return {
            "D": top["instability"],
            "ratio": top["ratio"],
            "best_ratio": top["best_ratio"],
            "spread": every["spread"],
            "D_all": every["instability"],
            "ratio_all": every["ratio"],
            "coincidence": coincidence(
                peaks, [side / cells for side, cells in zip(self.size, grid or self.grid, strict=True)]
            ),
            "found": int(seen.found.sum()),
            "hits": float(seen.hits.nanmean()),
            "chance": float(seen.chance.nanmean()),
            "regression": regression_error(peaks, self.landmarks, diagonal=diagonal)[0],
            "ratio_replicates": spans["ratio"].tolist(),
        }

    def iou(self, explainer: Any) -> dict[str, float]:
        """Part IoU at the published on-rate; labels from one part of the reported images, scores from the other."""
        from netgloss.evaluation.dissect import dissect
        from netgloss.metrics.location import part_interpretability

        label, score = ((self.masked, images) for images in self.halves)
        phi = dissect(explainer, label, score, [IOU_RATE])[IOU_RATE].detectors.phi
        return {"part_iou": float(phi.mean()), "part_interpretability": part_interpretability(phi)}

    def natural(self, layer: str) -> dict[str, Any]:
        """The network's own filters of a layer with a grid."""
        from netgloss.metrics.location import Peaks, find_peaks

        parts = []
        for start in range(0, len(self.images), 64):
            activation = torch.from_numpy(self.store.read(layer, self.images[start : start + 64])).float()
            parts.append(find_peaks(activation, size=self.size))
        found = Peaks(torch.cat([p.places for p in parts]), torch.cat([p.strength for p in parts]))
        return self.located(found, self.store.shapes[layer][1:])

    # -- decisions ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decisions(self, explainer: Any) -> dict[str, Any]:
        """Agreement, accuracy and relative errors from both tracks and from each alone; shares; dead maps; p."""
        from netgloss.explainers.part_maps import peak_counts
        from netgloss.explanations.part_galleries import track_shares

        ways = TRACKS if explainer.rest is not None else TRACKS[:1]
        decided: dict[str, list[Tensor]] = {name: [] for name, _ in ways}
        errors = {name: torch.zeros(2, dtype=torch.float64) for name in self.above}
        counts = torch.zeros(explainer.num_concepts, math.prod(self.grid))
        for start in range(0, len(self.images), 32):
            index = self.images[start : start + 32]
            activation = torch.from_numpy(self.store.read(self.study.layer, index)).float()
            counts += peak_counts(explainer.encode(activation))
            for name, tracks in ways:
                upper = explainer.rebuild(activation, tracks)
                decided[name].append(self.tail(upper[self.above[-1]]).argmax(dim=1))
                if tracks == "both":
                    for layer in self.above:
                        target = torch.from_numpy(self.store.read(layer, index)).float()
                        gap = (upper[layer] - target).square().sum(dtype=torch.float64)
                        errors[layer] += torch.stack([gap, target.square().sum(dtype=torch.float64)])
        active = counts.sum(dim=1)
        found: dict[str, Any] = {
            "p": explainer.p,
            "dead": int((active == 0).sum()),
            "frozen": int(((active > 1) & (counts.amax(dim=1) > 0.95 * active)).sum()),
            "errors": {layer: float((gap / size).sqrt()) for layer, (gap, size) in errors.items()},
            "shares": track_shares(explainer, self.store, self.study.layer, self.images[:128]),
        }
        for name, parts in decided.items():
            labels = torch.cat(parts)
            found[name] = {
                "agreement": float((labels == self.decided).float().mean()),
                "accuracy_change": self._accuracy(labels) - self.own_accuracy,
            }
        return found

    # -- other methods ----------------------------------------------------------------------------------------------

    def other(self, method: str, options: dict[str, Any], seed: int) -> Any:
        """Another explainer of the project, fitted on the same images."""
        from netgloss.explainers.names import find_explainer
        from netgloss.training import ActivationStream, build_explainer, fit

        cls = find_explainer(method)
        config = cls.Config(**options)
        stream = ActivationStream(self.store, self.study.layer, self.fit_images)
        spec = stream.spec(num_classes=0, image=())
        return fit(build_explainer(cls, config, spec, seed=seed), stream, seed=seed)


def coincidence(peaks: Any, cell: list[float]) -> float:
    """Share of pairs of active concepts whose peaks lie within one cell (height, width) of each other, over all images:
    1 if all concepts look at the same place."""
    near = pairs = 0
    for place, strength in zip(peaks.places / torch.tensor(cell[::-1]), peaks.strength, strict=True):
        active = place[strength.isfinite()]
        near += int(((active[:, None] - active).abs().amax(dim=2) <= 1.01).sum()) - len(active)
        pairs += len(active) * (len(active) - 1)
    return near / pairs if pairs else math.nan


def write_table(name: str, study: Any, arms: dict[str, Any], data: Path, runs: Path) -> None:
    from netgloss.metrics.location import trivial_peaks
    from netgloss.runs.run import Run, versions

    judge = Judge(name, study, data, runs)
    cache = runs / "measured.json"
    rows: dict[str, list[dict[str, Any]]] = json.loads(cache.read_text()) if cache.exists() else {}

    def keep(row: str, seed: int, make: Any) -> None:
        found = rows[row] = rows.get(row, [])
        if all(entry["seed"] != seed for entry in found):
            start = time.perf_counter()
            found.append({"seed": seed, **make()})
            cache.write_text(json.dumps(rows))
            print(row, seed, f"{time.perf_counter() - start:.0f} s", flush=True)

    for predictor, peaks in trivial_peaks(judge.landmarks, grid=judge.grid, size=judge.size).items():
        keep(predictor, 0, lambda peaks=peaks: judge.located(peaks))
    for arm in arms:
        for seed in range(3):
            folder = runs / f"{arm}-{seed}"
            if (folder / "explainer.safetensors").exists():
                explainer = Run(folder).explainer

                def whole(explainer: Any = explainer) -> dict[str, Any]:
                    return {**judge.places(explainer), **judge.iou(explainer), **judge.decisions(explainer)}

                keep(arm, seed, whole)
    axes = judge.other("natural-axes", {"num_concepts": judge.store.shapes[study.layer][0]}, 0)
    keep(f"original filters of {study.layer}", 0, lambda: {**judge.places(axes), **judge.iou(axes)})
    for layer in judge.above:
        if len(judge.store.shapes[layer]) == 3 and min(judge.store.shapes[layer][1:]) > 1:
            keep(f"original filters of {layer}", 0, lambda layer=layer: judge.natural(layer))
    for method, options in OTHERS.items():
        for seed in range(3 if method == "random-directions" else 1):
            if all(entry["seed"] != seed for entry in rows.get(method, [])):
                explainer = judge.other(method, options, seed)
                keep(method, seed, lambda e=explainer: {**judge.places(e), **judge.iou(e)})
    record = {
        "study": name,
        "model": study.model,
        "layer": study.layer,
        "upper": judge.above,
        "steps": study.steps,
        "precision": study.precision,
        "fit_images": len(judge.fit_images),
        "reported_images": len(judge.images),
        "landmarks": {n: int(judge.landmarks[:, k, 0].isfinite().sum()) for k, n in enumerate(judge.names)},
        "network_accuracy": judge.own_accuracy,
        "versions": versions(),
        "rows": rows,
    }
    (HERE / f"parts-{name}.json").write_text(json.dumps(compact(record), indent=1) + "\n")
    (HERE / f"parts-{name}.md").write_text(markdown(record))


def compact(value: Any) -> Any:
    """Five significant digits, and replicates as their 95 % interval."""
    if isinstance(value, dict):
        kept = {k: compact(v) for k, v in value.items() if k != "ratio_replicates"}
        if "ratio_replicates" in value:
            kept["ratio_interval"] = [float(f"{q:.5g}") for q in np.quantile(value["ratio_replicates"], (0.025, 0.975))]
        return kept
    if isinstance(value, list):
        return [compact(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


def ratio_of(entries: list[dict[str, Any]]) -> tuple[float, float, float]:
    """Mean over seeds and its 95 % interval over images and seeds."""
    from netgloss.metrics import interval

    values = torch.tensor([e["ratio"] for e in entries], dtype=torch.float64)
    return float(values.mean()), *interval(values, torch.tensor([e["ratio_replicates"] for e in entries]))


def markdown(record: dict[str, Any]) -> str:
    rows = record["rows"]
    marks = ", ".join(f"{name} {n}" for name, n in record["landmarks"].items())
    own = record["network_accuracy"]
    accuracy = "" if math.isnan(own) else f"The network's own accuracy there is {own:.3f}. "
    lines = [
        f"# Parts: {record['study']} ({record['model']} `{record['layer']}`)",
        "",
        f"`python experiments/parts.py table {record['study']}`; {record['steps']} steps of 64 "
        f"images on {record['fit_images']} images without any annotation; all numbers are from "
        f"{record['reported_images']} other images (landmarks: {marks}). {accuracy}torch "
        f"{record['versions']['torch']}.",
        "",
        "## Places",
        "",
        "D: location instability (top 100, share of the diagonal). Ratio: D over that of the same peaks dealt to other "
        "images, with a 95 % interval over images and seeds; 1 for a constant. Best: each concept's best landmark. "
        "Coincide: share of pairs of concepts whose peaks lie within one cell of each other. Found: landmarks that "
        "some concept follows (docs/metrics.md, parts_found). Hits, chance: share of the images in which the best "
        "concept of a landmark peaks near it, and the same of permuted peaks. Regression: error of the landmarks read "
        "from all peaks. IoU: part interpretability at 0.5 % of positions.",
        "",
        "| row | seeds | D | ratio | best | coincide | found | hits (chance) | regression | ratio, all images | IoU |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, entries in rows.items():

        def mean(key: str, entries: list[dict[str, Any]] = entries) -> str:
            values = [e[key] for e in entries if e.get(key) is not None and math.isfinite(e[key])]
            return f"{np.mean(values):.3f}" if values else "-"

        value, low, high = ratio_of(entries)
        lines.append(
            f"| {name} | {len(entries)} | {mean('D')} | {value:.3f} [{low:.3f}, {high:.3f}] | {mean('best_ratio')} | "
            f"{mean('coincidence')} | {', '.join(str(e['found']) for e in entries)} | "
            f"{mean('hits')} ({mean('chance')}) | {mean('regression')} | {mean('ratio_all')} | {mean('part_iou')} |"
        )
    lines += [
        "",
        "## Decisions",
        "",
        "From the rebuilt upper layers through the network's own tail: agreement with the network / change of "
        "accuracy, from both tracks and from each alone. Share: what the part maps move of the last upper layer.",
        "",
        f"| row | both | part maps alone | ordinary alone | {' | '.join('error ' + n for n in record['upper'])} | p | "
        "share of parts | dead maps | frozen |",
        "|---|---|---|---|" + "---|" * (len(record["upper"]) + 4),
    ]
    for name, entries in rows.items():
        if "p" not in entries[0]:
            continue
        cells = [name]
        for way, _ in TRACKS:
            known = [e[way] for e in entries if way in e]
            agreement, change = (
                np.mean([t[k] for t in known]) if known else 0 for k in ("agreement", "accuracy_change")
            )
            cells.append(f"{agreement:.3f} / {change:+.3f}".replace("+nan", "-") if known else "-")
        cells += [f"{np.mean([e['errors'][layer] for e in entries]):.3f}" for layer in record["upper"]]
        share = [e["shares"]["part_maps_alone"] for e in entries if e["shares"]]
        cells += [f"{np.mean([e['p'] for e in entries]):.2f}", f"{np.mean(share):.2f}" if share else "-"]
        cells += [", ".join(str(e[k]) for e in entries) for k in ("dead", "frozen")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", "## Hypotheses", "", *hypotheses(record)]) + "\n"


def hypotheses(record: dict[str, Any]) -> list[str]:
    """The specification's statements against the numbers: holds, does not, or cannot tell."""
    rows = record["rows"]
    if "main" not in rows:
        return ["No fit of the main arm."]
    main = rows["main"]
    few = "" if len(main) > 2 else f" in {len(main)} seed(s) of the 3 that a claim needs: not settled"
    value, low, high = ratio_of(main)
    original = ratio_of(rows[f"original filters of {record['layer']}"])
    change = float(np.mean([e["both"]["accuracy_change"] for e in main]))
    dead = sum(e["dead"] for e in main)
    agreement = float(np.mean([e["both"]["agreement"] for e in main]))
    cost = f"agreement {agreement:.3f}" + ("" if math.isnan(change) else f", accuracy changes by {change:+.3f}")

    def verdict(below: bool, above: bool) -> str:
        return "holds" if below else "does not hold" if above else "cannot tell"

    first = verdict(high < original[1], low > original[2])
    lines = [
        f"1. The ratio of the part maps is below that of the original filters: **{first}**{few}: {value:.3f} "
        f"[{low:.3f}, {high:.3f}] against {original[0]:.3f} [{original[1]:.3f}, {original[2]:.3f}]; {cost}.",
        f"2. Accuracy falls by at most 2 points: **{verdict(change >= -0.02, change < -0.02)}**{few}: {cost}"
        + (" (the images have no classes of the network)." if math.isnan(change) else "."),
        f"3. The exact loss leaves no dead map: **{'holds' if dead == 0 else 'does not hold'}**{few}: {dead} dead.",
    ]
    if "no filter loss" in rows:
        plain = ratio_of(rows["no filter loss"])
        no_gain = verdict(plain[1] > original[2] or plain[1] <= original[0] <= plain[2], plain[2] < original[1])
        lines.append(
            f"4. Without the filter loss there is no gain: **{no_gain}** ({len(rows['no filter loss'])} seed(s)): "
            f"{plain[0]:.3f} [{plain[1]:.3f}, {plain[2]:.3f}] against {original[0]:.3f} for the original filters and "
            f"{value:.3f} with the loss."
        )
    return lines

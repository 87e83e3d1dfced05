"""What a consistency run writes down: rows of units.csv, records of result.json, scores and warnings."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from netgloss.adversarial.affinity_choice import AffinityChoice
from netgloss.adversarial.layer_consistency import LayerResult
from netgloss.adversarial.pixels import LabelledPixels
from netgloss.adversarial.probe import Adversarial, AttackChoice
from netgloss.metrics.base import Score, interval
from netgloss.metrics.consistency.companions import best_subtree, consistency_by_depth, half_reliability
from netgloss.metrics.consistency.taxonomy import read_data_noun, read_taxonomy, wordnet
from netgloss.metrics.consistency.units import STATUS, consistency_score


def unit_rows(
    result: LayerResult,
    data: LabelledPixels,
    affinity: AffinityChoice,
    provenance: dict[str, Any],
    method: str,
    differences: dict[str, Any] | None,
) -> list[dict[str, Any]]:
    """Rows of units.csv."""
    scores, comparison, fooled = result.scores, result.comparison, result.fooled
    selective = None
    tree, nodes = None, None
    if provenance.get("wnids") is not None and affinity.affinity is None:
        tree = wordnet() if affinity.data_noun is None else read_data_noun(affinity.data_noun)
        ids = provenance["wnids"]
        nodes = [ids[n] for n in data.class_names] if isinstance(ids, dict) else list(ids)
    elif affinity.taxonomy is not None and affinity.affinity is None:
        tree, nodes = read_taxonomy(affinity.taxonomy), list(data.class_names)
    if tree is not None and nodes is not None and int(data.probe_labels.bincount().min()) >= 4:
        selective = best_subtree(result.real, data.probe_labels, tree, nodes)
    pd = None if differences is None or "real" not in differences else differences["real"]["pd"].mean(0)
    rows = []
    for u in range(len(result.units)):
        top = scores.classes[:, u].topk(min(3, len(data.class_names)))
        concept, pole = int(result.units.concept[u]), int(result.units.pole[u])
        row: dict[str, Any] = {
            "layer": result.layer,
            "explainer": method,
            "unit": concept,
            "pole": pole,
            "status": STATUS[int(scores.status[u])],
            "tie_images": int(scores.tie_images[u]),
            "saturated": bool(scores.saturated[u]),
        }
        sets = (
            {"R": scores} if comparison is None else {"R": scores, "V": comparison.adversarial, "RV": comparison.union}
        )
        for name, found in sets.items():
            row |= {
                f"consis_{name}": float(found.consis[u]),
                f"E0_{name}": float(found.expected[u]),
                f"consis_cal_{name}": float(found.calibrated[u]),
                f"p_{name}": float(found.p_value[u]),
            }
        if comparison is not None:
            for name, compared in (("all", comparison), ("fooled", fooled)):
                for key in ("cs1", "cs2", "csc1", "csc2"):
                    row[f"{key}_{name}"] = math.nan if compared is None else float(getattr(compared, key)[u])
                for key in ("chance1", "chance2"):
                    row[f"{key}_{name}"] = math.nan if compared is None else float(getattr(compared, key))
        for rank, (share, c) in enumerate(zip(top.values.tolist(), top.indices.tolist(), strict=True), start=1):
            row |= {f"class{rank}": data.title(c), f"share{rank}": share}
        if selective is not None and tree is not None:
            row["best_subtree"] = tree.names.get(selective.nodes[u], selective.nodes[u])
            row |= {"auroc": float(selective.auroc[u]), "average_precision": float(selective.average_precision[u])}
        row["effective_concepts"] = 1 / max(float(scores.consis[u]), 1e-12)
        row["mean_pd"] = math.nan if pd is None or pole < 0 else float(pd[concept])
        rows.append(row)
    return rows


def to_csv(rows: Sequence[dict[str, Any]]) -> str:
    """CSV with LF; blank for what is not known; text that a spreadsheet would run is quoted by an apostrophe."""

    def shown(value: Any) -> Any:
        if isinstance(value, float):
            return f"{value:.6g}" if math.isfinite(value) else ""
        if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t"):
            return "'" + value
        return value

    buffer = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: shown(row.get(name, "")) for name in names} for row in rows)
    return buffer.getvalue()


def layer_record(
    result: LayerResult, data: LabelledPixels, affinities: dict[str, np.ndarray], differences: dict[str, Any] | None
) -> dict[str, Any]:
    """What the experiment stores of one layer: consistency, depth, affinities and differences."""
    depth = consistency_by_depth(result.real, data.probe_labels, affinities["chosen"])
    counts = data.probe_labels.bincount()
    halves = math.nan
    if int(counts[counts > 0].min()) >= 4:
        halves = half_reliability(result.real, data.probe_labels, affinities["chosen"], k=result.scores.k)
    record = {
        **result.summary(),
        "bins": result.bins,
        "depth": {name: float(values[result.scores.live].nanmean()) for name, values in depth.items()},
        "half_reliability": halves,
        "calibrated": {"real": result.scores.calibrated[result.scores.live].tolist()},
        "random": {part: values.tolist() for part, values in result.random.items()},
    }
    if result.comparison is not None:
        live = result.comparison.live
        record["calibrated"] = {
            part: getattr(result.comparison, part).calibrated[live].tolist()
            for part in ("real", "adversarial", "union")
        }
    if differences is not None:
        record["differences"] = {
            name: differences[name]
            for name in ("tail", "reason", "auroc_s", "auroc_confidence", "auroc_wrong", "auroc_wrong_confidence")
            if name in differences
        }
        record["differences"]["num_images"] = len(differences["chosen"])
    return record


def attack_record(
    attack: AttackChoice, adversarial: Adversarial, logits: dict[str, Tensor], data: LabelledPixels
) -> dict[str, Any]:
    """What the experiment stores of the attack: its strength, its success and its targets."""
    predicted = logits["real"].argmax(1)
    return {
        **dataclasses.asdict(attack),
        "reached": float(adversarial.found.success.float().mean()),
        "clean_accuracy": float((predicted == data.labels).float().mean()),
        "accuracy": float((adversarial.found.predictions.cpu() == data.labels).float().mean()),
        "largest_linf": float(adversarial.found.linf.max()),
        "mean_l2": float(adversarial.found.l2.mean()),
        "targeted": adversarial.targets is not None,
    }


def over_seeds(measured: Sequence[dict[str, LayerResult]]) -> dict[str, Any]:
    """Mean and 95 % interval over seeds of each layer's means on R and V, and of their difference."""
    found: dict[str, Any] = {}
    for layer in measured[0]:
        compared = [r[layer].comparison for r in measured]
        numbers = {"real": [r[layer].scores.summary()["consis_cal"] for r in measured]}
        summaries = [c.summary() for c in compared if c is not None]
        if summaries:
            numbers = {
                name: [s[f"consis_cal_{name}"] for s in summaries]
                for name in ("real", "adversarial", "union", "change")
            }
        found[layer] = {}
        for name, values in numbers.items():
            low, high = interval(torch.tensor(values, dtype=torch.float64))
            found[layer][name] = {"mean": sum(values) / len(values), "low": low, "high": high, "values": values}
    return found


def layer_score(layer: str, measured: Sequence[dict[str, LayerResult]]) -> Score:
    """The consistency of one layer over all seeds, with its baselines."""
    first = measured[0][layer].summary()
    baselines = {"random directions": first.get("random_real"), "untrained network": first["untrained"]}
    if "channels_real" in first:
        baselines["the layer's channels"] = first["channels_real"]
    attacked = first["attack"]
    if attacked is not None:
        baselines["the same units on adversarial images"] = attacked["consis_cal_adversarial"]
    score = consistency_score([r[layer].scores for r in measured], baselines=baselines)
    return dataclasses.replace(score, metric=f"consistency, {layer}")


def run_warnings(result: dict[str, Any], *, pooling: str) -> list[str]:
    """What a reader of the record must know before using its numbers."""
    found = []
    if not result["affinity"]["semantics"]:
        found.append(
            "no semantics: classes count as similar only if they are the same (pass --wnids, --groups or --affinity)"
        )
    for layer, record in result["layers"].items():
        low = {pair: rho for pair, rho in record["kernels"].items() if rho < 0.9}
        found += [
            f"{layer}: the ranking of units depends on the kernel ({p}: Spearman {r:.2f})" for p, r in low.items()
        ]
        if record["num_saturated"]:
            advice = "" if pooling == "mean" else ": use --pooling mean"
            found.append(f"{layer}: {record['num_saturated']} units are saturated (images tie at the top){advice}")
        for name, control in (("random_real", "random directions"), ("channels_real", "the layer's channels")):
            if record.get(name) is not None and record[name] >= record["consis_cal"]:
                found.append(f"{layer}: {control} are as consistent as the units ({record[name]:.3f})")
        if "reason" in record.get("differences", {}):
            found.append(f"{layer}: {record['differences']['reason']}")
    return found

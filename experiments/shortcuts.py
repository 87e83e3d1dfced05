"""The shortcut benchmark: does the audit find planted cues, and is it silent on clean networks?

    NETGLOSS_DATA=../shared python experiments/shortcuts.py --work shortcuts-work --out experiments

Trains networks of ``shortcuts_lab`` with a cue in 100, 95 or 80 % of one class's training images, measures that they
rely on it, audits each on held-out images with the same bias, and writes ``shortcuts.json`` and ``shortcuts.md``.
Weights and results are kept in ``--work``: the same command continues. Thresholds were chosen on seed 0 of CIFAR-10 and
Critters and are reported on the other seeds.

A cue counts as found if one of the first three findings names its class and, for a local cue, at least half of the
region lies in the cue or half of the cue in the region; for a global one, if the finding is of its kind.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import binomtest
from sklearn.decomposition import NMF

from netgloss.explanations.audit import Audit, AuditOptions, ClassTest, audit_classes
from netgloss.explanations.audit.search import region_masks
from netgloss.runs.run import versions
from shortcuts_lab import GLOBAL, LABS, LOCAL, MEAN, STD, Lab, Split, batched, biased, reliance, trained

SHARES = (1.0, 0.95, 0.8)
RELIES = 0.5
TUNED = (("cifar", 0), ("critters", 0))
KINDS = {"cast": ("tint red-blue", "tint green"), "blur": ("sharpness", "grain")}
_CONCEPTS = 24


def run_audit(net: Lab, given: Split, objects: bool) -> Audit:
    """The audit of a network on images with the cue."""
    pixels = torch.from_numpy(np.ascontiguousarray(given.images)).permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    masks = given.masks if objects else None
    return audit_classes(
        net,
        lambda i: pixels[torch.from_numpy(i)],
        lambda unit: (unit - mean) / std,
        given.labels,
        batched(net, given.images).argmax(dim=1).numpy(),
        objects=None if masks is None else lambda i: torch.from_numpy(masks[i]),
        options=AuditOptions(),
    )


def names_cue(test: ClassTest, cue: str, target: int, given: Split, place: np.ndarray) -> bool:
    """True if a finding names the planted cue."""
    if test.class_index != target:
        return False
    if cue in GLOBAL:
        return test.kind in KINDS[cue]
    if test.kind not in ("place", "patch", "border", "background"):
        return False
    index = np.array(test.images)
    objects = None if given.masks is None else torch.from_numpy(given.masks[index])
    region = region_masks(test, *place.shape[1:], objects)[:, 0].numpy() > 0
    shown = place[index]
    has = shown.any(axis=(1, 2))
    both = (region & shown)[has].sum()
    return bool(both >= 0.5 * min(region[has].sum(), shown[has].sum()))


def concepts_find_cue(net: Lab, given: Split, place: np.ndarray, target: int, seed: int) -> bool:
    """Baseline: is one of the three concepts of largest importance for any class the cue's?

    Concepts by NMF of the audited layer; importance by the head, which is linear: mean code times the logit's weight.
    """
    last = int(net.LAYER.split(".")[1]) + 1  # type: ignore[attr-defined]
    maps = batched(lambda x: net.upper[:last](net.lower(x)), given.images).numpy()
    n, features, height, width = maps.shape
    rows = maps.transpose(0, 2, 3, 1).reshape(-1, features).clip(min=0)
    chosen = np.random.default_rng(seed).choice(len(rows), min(len(rows), 12_000), replace=False)
    model = NMF(_CONCEPTS, init="nndsvda", max_iter=100, random_state=seed).fit(rows[chosen])
    codes = model.transform(rows).reshape(n, height, width, _CONCEPTS)
    weights = model.components_ @ net.upper[-1].weight.detach().numpy().T
    importance = np.stack([codes[given.labels == c].mean((0, 1, 2)) * weights[:, c] for c in range(len(given.names))])
    first = np.argsort(-importance, axis=None)[:3]
    cells = torch.nn.functional.adaptive_avg_pool2d(
        torch.from_numpy(place[:, None].astype(np.float32)), (height, width)
    )
    for c, k in zip(*np.unravel_index(first, importance.shape), strict=True):
        own = given.labels == target
        mass = codes[own, :, :, k]
        if c == target and (mass * cells[own, 0].numpy()).sum() >= 0.5 * mass.sum():
            return True
    return False


def audited(
    lab: str, cue: str | None, share: float, seed: int, data: tuple[Split, Split], work: Path
) -> dict[str, Any]:
    """One network: trained (or read), its reliance, its audit, and the baseline."""
    file = work / f"{lab}-{cue or 'clean'}-{share}-{seed}.pth"
    target = int(np.random.default_rng([seed, 7]).integers(len(data[0].names)))
    if file.exists():
        net = LABS[lab](data[0].names)
        net.load_state_dict(torch.load(file, weights_only=True))
        net.eval()
    else:
        net, target = trained(lab, cue, share, seed, data)
        torch.save(net.state_dict(), file)
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    clean = data[1]
    record: dict[str, Any] = {"lab": lab, "cue": cue or "clean", "share": share, "seed": seed, "target": target}
    if cue is not None:
        record |= reliance(net, clean, cue, target, seed)
    given, place = biased(clean, cue, target, share, np.random.default_rng(seed + 50))
    started = time.process_time()
    found = run_audit(net, given, objects=True)
    record["seconds"] = round(time.process_time() - started, 1)
    record["findings"] = [
        {"class": f.test.class_index, "kind": f.test.kind, "gained": f.test.gained, "lost": f.test.lost,
         "evidence": list(f.evidence)} for f in found.findings
    ]  # fmt: skip
    if cue is not None:
        ranks = [i for i, f in enumerate(found.findings, 1) if names_cue(f.test, cue, target, given, place)]
        record["rank"] = ranks[0] if ranks else None
        record["others"] = sum(f.test.class_index != target for f in found.findings)
        if cue in LOCAL:
            record["concepts"] = concepts_find_cue(net, given, place, target, seed)
    return record


def plan(seeds: int, clean: int, labs: list[str]) -> list[tuple[str, str | None, float, int]]:
    """Every network, seed by seed; 80 % on the first seed only."""
    planned: list[tuple[str, str | None, float, int]] = []
    for lab in labs:
        for seed in range(max(seeds, clean)):
            if seed < clean:
                planned.append((lab, None, 0.0, seed))
            shares = SHARES if seed == 0 else SHARES[:2]
            planned += [(lab, cue, share, seed) for cue in (*LOCAL, *GLOBAL) for share in shares if seed < seeds]
    return planned


def share_text(hits: list[bool]) -> str:
    """``hits of n (interval)``."""
    if not hits:
        return "-"
    interval = binomtest(sum(hits), len(hits)).proportion_ci(method="wilson")
    return f"{sum(hits)} of {len(hits)} ({interval.low:.2f} to {interval.high:.2f})"


def table(records: list[dict[str, Any]], command: str) -> str:
    """The committed page."""

    def rows(tuned: bool) -> list[dict[str, Any]]:
        return [r for r in records if ((r["lab"], r["seed"]) in TUNED) == tuned]

    lines = [
        "# The shortcut benchmark",
        "",
        f"Command: `{command}`. Versions: {json.dumps(versions())}, {platform.machine()}, CPU.",
        "",
        "A network *relies* on its cue if the cue, drawn into held-out images of the other classes, makes at least "
        "half of them the class. *Found*: one of the first three findings names the class and the cue (see the "
        "script). "
        "Intervals are Wilson's, 95 %, over networks.",
        "",
    ]
    for title, chosen in (
        ("Reported networks", rows(False)),
        ("Networks that the thresholds were chosen on", rows(True)),
    ):
        lines += [f"## {title}", "", "| network | cue | share | networks that rely / trained | found by the audit | "
                  "found among those that do not rely | found by the three most important concepts |",
                  "|---|---|---|---|---|---|---|"]  # fmt: skip
        for lab in LABS:
            for cue in (*LOCAL, *GLOBAL):
                for share in SHARES:
                    group = [r for r in chosen if (r["lab"], r["cue"], r["share"]) == (lab, cue, share)]
                    if group:
                        relying = [r for r in group if r["others_with_cue"] >= RELIES]
                        weak = [r for r in group if r["others_with_cue"] < RELIES]
                        hit = [r["rank"] is not None and r["rank"] <= 3 for r in relying]
                        lines.append(
                            f"| {lab} | {cue} | {share:.0%} | {len(relying)} / {len(group)} | {share_text(hit)} | "
                            f"{share_text([r['rank'] is not None for r in weak])} | "
                            f"{share_text([bool(r.get('concepts')) for r in relying]) if cue in LOCAL else '-'} |"
                        )
        lines.append("")
        for name, cues in (("local", LOCAL), ("global", GLOBAL)):
            strong = [r for r in chosen if r["cue"] in cues and r["share"] >= 0.95 and r["others_with_cue"] >= RELIES]
            hit = [r["rank"] is not None and r["rank"] <= 3 for r in strong]
            lines.append(f"- **{name} cues in 95 % and more**: found in {share_text(hit)}.")
            if cues is LOCAL:
                lines.append(
                    f"  The three most important concepts: {share_text([bool(r['concepts']) for r in strong])}."
                )
        clean = [r for r in chosen if r["cue"] == "clean"]
        lines.append(f"- **clean networks with a finding**: {share_text([bool(r['findings']) for r in clean])}.")
        other = [r["others"] > 0 for r in chosen if r["cue"] != "clean"]
        lines.append(f"- networks with a cue that also have a finding about another class: {share_text(other)}.")
        seconds = [r["seconds"] for r in chosen]
        lines += [f"- processor seconds per audit: median {np.median(seconds):.1f}." if seconds else "", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("shortcuts-work"), help="weights and results so far")
    parser.add_argument("--out", type=Path, default=Path("experiments"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--clean", type=int, default=10, help="clean networks of each kind")
    parser.add_argument("--labs", nargs="+", default=list(LABS), choices=list(LABS))
    parser.add_argument("--only-trained", action="store_true", help="leave out networks without weights in --work")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    kept = args.work / "results.jsonl"
    records = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    done = {(r["lab"], r["cue"], r["share"], r["seed"]) for r in records}
    data: tuple[tuple[str, int], tuple[Split, Split]] | None = None
    for lab, cue, share, seed in plan(args.seeds, args.clean, args.labs):
        file = args.work / f"{lab}-{cue or 'clean'}-{share}-{seed}.pth"
        if (lab, cue or "clean", share, seed) in done or (args.only_trained and not file.exists()):
            continue
        if data is None or data[0] != (lab, seed):
            data = ((lab, seed), LABS[lab].data(seed))
        record = audited(lab, cue, share, seed, data[1], args.work)
        records.append(record)
        said = {k: record.get(k) for k in ("lab", "cue", "share", "seed", "rank", "others_with_cue", "seconds")}
        print(json.dumps(said | {"findings": len(record["findings"])}), flush=True)
        with kept.open("a") as lines:
            lines.write(json.dumps(record) + "\n")
    command = "python experiments/shortcuts.py --work shortcuts-work --out experiments"
    (args.out / "shortcuts.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    (args.out / "shortcuts.md").write_text(table(records, command) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

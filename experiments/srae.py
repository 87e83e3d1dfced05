"""SRAE beside its ablations and linear baselines: faithfulness, sparsity, orthogonality, reconstruction and locality.

    python experiments/srae.py --network squeezenet1_0 --layer features.12 --images animals

One module a class, on the layer's pooled features. Fits on four fifths of the images (animals; imagenette: its train
images) and reports the rest (imagenette: its val images, true ImageNet validation pictures). Every arm runs with its
preset, all learned arms with the same steps and seeds. Writes experiments/srae-<network>-<images>.{md,json}.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import netgloss
from netgloss.activations import Store
from netgloss.appraisal import split_store
from netgloss.data import open_annotations, place, to_grid
from netgloss.evaluation import class_labels
from netgloss.explainers.srae import SRAE, SRAEConfig
from netgloss.gloss.heatmaps import concept_heatmaps
from netgloss.metrics.explanation_space import class_space, normalised_errors
from netgloss.metrics.importance import significant
from netgloss.metrics.localization import part_profile, part_shares
from netgloss.pipeline import store_info
from netgloss.run import versions
from netgloss.training import ActivationStream, build_explainer, fit

HERE = Path(__file__).parent
PARTS = ["head", "front_legs", "rest"]
LEARNED = ["srae", "no-pull-away", "released", "sae", "sae-pt", "nn", "nn-pt"]
SHOWN = {
    "agreement": "agreement, all",
    "agreement_positive": "agreement, class",
    "r2_positive": "R2 pos.",
    "rmse_positive": "RMSE pos.",
    "rmse_negative": "RMSE neg.",
    "live": "live",
    "significant": "significant",
    "single": "one alone",
    "orthogonality": "O_F",
    "pull_away": "pull-away",
    "rebuilt": "rebuilt",
    "nmse": "nMSE",
    "locality": "locality",
    "overlap": "part overlap",
}


@dataclass
class Data:
    """Pooled activations (N, D), logits (N, classes), labels (N,) and maps of the images to fit on or to judge on."""

    z: Tensor
    logits: Tensor
    labels: Tensor
    store: Store
    images: np.ndarray

    def maps(self, rows: np.ndarray, layer: str) -> Tensor:
        return torch.from_numpy(self.store.read(layer, self.images[rows])).float()


@dataclass
class Linear:
    """x = encode(z), a linear head, and a reconstruction: the family that SRAE must beat."""

    encode: object
    decode: object
    weight: Tensor
    bias: float


def gather(store: Store, layer: str, images: np.ndarray, labels: np.ndarray) -> Data:
    z = torch.from_numpy(store.read(layer, images)).float().flatten(2).mean(2)
    logits = torch.from_numpy(store.read_logits(images))
    return Data(z, logits, torch.from_numpy(labels[images]), store, images)


def with_head(encode, decode, data: Data, c: int) -> Linear:
    """Least squares from the codes to the class's logit."""
    x = encode(data.z).double()
    table = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], dim=1)
    solution = torch.linalg.lstsq(table, data.logits[:, c, None].double(), driver="gelsd").solution[:, 0]
    return Linear(encode, decode, solution[:-1].float(), float(solution[-1]))


def linear_arms(name: str, data: Data, c: int, n: int, seed: int) -> Linear:
    z, mean = data.z, data.z.mean(0)
    if name == "pca-n":
        basis = torch.linalg.svd(z - mean, full_matrices=False)[2][:n]
        return with_head(lambda a: (a - mean) @ basis.T, lambda x: x @ basis + mean, data, c)
    if name == "nmf-n":
        from sklearn.decomposition import NMF

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = NMF(n, init="random", random_state=seed, max_iter=400).fit(z.clamp_min(0).numpy())
        atoms = torch.from_numpy(model.components_).float()
        pinv = torch.linalg.pinv(atoms)  # a differentiable stand-in for NMF's own codes
        return with_head(lambda a: (a @ pinv).relu(), lambda x: x @ atoms, data, c)
    if name == "random-n":
        directions = torch.rand(n, z.shape[1], generator=torch.Generator().manual_seed(seed))
        pinv = torch.linalg.pinv(directions - directions.mean())
        return with_head(lambda a: a @ directions.T, lambda x: (x - mean @ directions.T) @ pinv.T + mean, data, c)
    positive = data.labels == c
    if name == "neurons-n":
        covariance = ((z - mean) * (data.logits[:, c] - data.logits[:, c].mean())[:, None]).mean(0)
        slope = covariance / z.var(0).clamp_min(1e-9)
        chosen = (slope * z[positive].mean(0)).abs().topk(n).indices
    else:
        from sklearn.linear_model import orthogonal_mp

        scaled = ((z - mean) / z.std(0).clamp_min(1e-6)).numpy()
        target = (data.logits[:, c] - data.logits[:, c].mean()).numpy()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            chosen = torch.from_numpy(np.flatnonzero(orthogonal_mp(scaled, target, n_nonzero_coefs=n)))

    def put_back(x: Tensor) -> Tensor:
        out = mean.expand(len(x), -1).clone()
        out[:, chosen] = x
        return out

    return with_head(lambda a: a[:, chosen], put_back, data, c)


def judge(
    encode, contributions: Tensor, rebuilt: Tensor, reconstruction: Tensor, held: Data, c: int, covers, layer
) -> dict:
    """All numbers of one explanation of one class on the images held out."""
    positive = held.labels == c
    found = class_space(contributions, held.logits[:, c], rebuilt, positive)
    swapped = held.logits.clone()
    swapped[:, c] = rebuilt
    same = (swapped.argmax(1) == held.logits.argmax(1)).float()
    errors = normalised_errors(held.z, reconstruction)
    found |= {
        "agreement": float(same.mean()),
        "agreement_positive": float(same[positive].mean()),
        "accuracy_positive": float((swapped.argmax(1) == c)[positive].float().mean()),
        "accuracy_network": float((held.logits.argmax(1) == c)[positive].float().mean()),
        "rebuilt": float((errors <= 0.5).double().mean()),
        "nmse": float(errors.mean()),
    }
    if covers:
        found |= locality(encode, contributions, held, positive, covers, layer)
    return found


def locality(encode, contributions: Tensor, held: Data, positive: Tensor, covers: dict, layer: str) -> dict:
    rows = np.array([i for i in np.flatnonzero(positive.numpy()) if i in covers])
    if not len(rows):
        return {}
    n = contributions.shape[1]
    heat = concept_heatmaps(encode, held.maps(rows, layer), range(n)).double().numpy()
    shares = np.full((len(rows), n, len(PARTS)), np.nan)
    background = np.full((len(rows), n), np.nan)
    for r, row in enumerate(rows):
        for k in range(n):
            if heat[r, k].any():
                shares[r, k], background[r, k] = part_shares(heat[r, k], covers[row], PARTS)
    ordered = contributions[rows].argsort(dim=1, descending=True)
    count = significant(contributions[rows])
    matters = torch.zeros(len(rows), n, dtype=torch.bool)
    matters.scatter_(1, ordered, torch.arange(n)[None] < count[:, None])
    matters = matters.numpy() & np.isfinite(shares).any(2)
    if not matters.any():
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        profile = part_profile(shares, matters)
        return {
            "locality": float(np.nanmean(profile.locality)),
            "covered": float(np.nanmean(profile.covered)),
            "covered_by_any": profile.covered_by_any,
            "overlap": profile.overlap,
            "consistency": float(np.nanmean(profile.consistency)),
            "background": float(background[matters].mean()),
            "head_share": float(np.nanmean(profile.shares[:, 0])),
        }


def part_covers(source, classifier, held: Data, grid: tuple[int, int]) -> dict[int, dict[str, np.ndarray]]:
    """Parts of each held-out image on the layer's grid; the rest of the object is a part of its own."""
    found = {}
    for row, image in enumerate(held.images.tolist()):
        annotation = source.annotation(image)
        if annotation is None:
            continue
        cells = to_grid(place(annotation, classifier.preprocessing.geometry(*annotation.size)), grid)
        if not {"head", "front_legs"} & set(cells):
            continue
        parts = {name: cells[name].astype(np.float64) for name in ("head", "front_legs") if name in cells}
        if len(parts) == 2:
            parts["front_legs"] = np.clip(parts["front_legs"] - parts["head"], 0, 1)
        whole = np.max([v for name, v in cells.items() if name not in parts], axis=0, initial=0.0)
        rest = np.clip(whole - sum(parts.values()), 0, 1)
        found[row] = {name: v for name, v in {**parts, "rest": rest}.items() if v.sum() > 0.05}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = Path(os.environ.get("NETGLOSS_DATA", "../shared"))
    parser.add_argument("--network", default="squeezenet1_0")
    parser.add_argument("--layer", default="features.12")
    parser.add_argument("--images", default="animals", choices=["animals", "imagenette"])
    parser.add_argument("--steps", type=int, default=1700)
    parser.add_argument("--attempts", type=int, default=5, help="of SRAE; all other arms take their first fit")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--classes", type=int, default=10, help="the first so many classes")
    parser.add_argument("--arms", nargs="+", default=None)
    parser.add_argument("--work", type=Path, default=Path("runs/srae"))
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

    classifier = netgloss.load_classifier(
        f"torchvision:{options.network}", checkpoint=root / "weights" / f"{options.network}.pth"
    )
    stores, sources = [], []
    for name in ("animals",) if options.images == "animals" else ("imagenette/train", "imagenette/val"):
        source = netgloss.open_images(root / "data" / name)
        where = options.work / f"{options.network}-{name.replace('/', '-')}"
        stores.append(netgloss.capture(classifier, source, [options.layer], where, info=store_info(classifier, source)))
        sources.append(source)
    known = [class_labels(store, classifier.class_names, classifier.wnids) for store in stores]
    if options.images == "animals":
        own, other = split_store(stores[0])
        sources[0].annotations = open_annotations(root / "data" / "animals", sources[0].ids)
    else:
        own, other = stores[0].valid, stores[-1].valid
    train = gather(stores[0], options.layer, own, known[0])
    held = gather(stores[-1], options.layer, other, known[-1])
    classes = np.unique(train.labels.numpy()).tolist()[: options.classes]
    grid = stores[0].shapes[options.layer][1:]
    covers = part_covers(sources[0], classifier, held, grid) if options.images == "animals" else {}
    stream = ActivationStream(stores[0], options.layer, own, reads="pooled", labels=known[0])
    shuffled = _Shuffled(stores[0], options.layer, own, reads="pooled", labels=known[0])
    spec = stream.spec(num_classes=classifier.num_classes, image=())

    arms = {name: {"preset": name, "attempts": options.attempts if name == "srae" else 1} for name in LEARNED}
    arms["srae, one attempt"] = {"attempts": 1}
    arms["srae, no repair"] = {"attempts": 1, "repair": False}
    arms["srae, shuffled logits"] = {"attempts": 1}
    arms |= {f"srae, n = {n}": {"num_concepts": n, "attempts": 1} for n in (1, 2, 3, 8, 12)}
    arms |= {f"srae, q = {q}": {"q": float(q), "attempts": 1} for q in (1, 10, 1000)}
    linear = ["pca-n", "nmf-n", "random-n", "neurons-n", "omp-n"]
    chosen = options.arms or [*arms, *linear]
    records: list[dict] = []
    for arm in chosen:
        start = time.perf_counter()
        for seed in range(options.seeds):
            if arm in linear:
                for c in classes:
                    model = linear_arms(arm, train, c, 5, seed)
                    x = model.encode(held.z)
                    numbers = judge(
                        model.encode, x * model.weight, x @ model.weight + model.bias, model.decode(x), held, c, covers,
                        options.layer,
                    )  # fmt: skip
                    records.append({"arm": arm, "seed": seed, "class": c, **numbers})
                continue
            config = SRAEConfig(classes=tuple(map(str, classes)), **({"steps": options.steps} | arms[arm]))
            explainer = build_explainer(SRAE, config, spec, seed=seed)
            fit(explainer, shuffled if arm == "srae, shuffled logits" else stream, seed=seed)
            n = config.num_concepts
            with torch.no_grad():
                x, scores = explainer.encode(held.z), explainer.class_scores(explainer.encode(held.z))
                each = explainer.decode_modules(x)
            for g, c in enumerate(classes):
                part = slice(g * n, (g + 1) * n)
                values = explainer.contributions(x, torch.full((len(x),), c))[0][:, part].detach()
                numbers = judge(
                    lambda a, e=explainer, p=part: e.encode(a)[:, p], values, scores[:, g], each[g], held, c, covers,
                    options.layer,
                )  # fmt: skip
                extra = {"tries": int(explainer.tries[g]), "accepted": bool(explainer.accepted[g])}
                records.append({"arm": arm, "seed": seed, "class": c, **extra, **numbers})
        print(f"{arm}: {time.perf_counter() - start:.0f} s", flush=True)
        write(options, records, len(train.z), len(held.z), [classifier.class_names[c] for c in classes])


class _Shuffled(ActivationStream):
    """The control: every image has the logits and label of another one."""

    def _block_logits(self, block: np.ndarray) -> Tensor | None:
        logits = super()._block_logits(block)
        order = np.random.default_rng(0).permutation(len(block))
        return None if logits is None else logits[order]

    def _batch(self, values: Tensor, index: Tensor, block: np.ndarray | None, step: int):
        batch = super()._batch(values, index, block, step)
        if block is not None:
            order = np.random.default_rng(0).permutation(len(block))
            batch.labels = torch.from_numpy(self.labels[block[order][np.searchsorted(block, index.numpy())]])
        return batch


def write(options: argparse.Namespace, records: list[dict], num_fit: int, num_held: int, names: list[str]) -> None:
    command = shlex.join(["python", "experiments/srae.py", *sys.argv[1:]])
    stem = HERE / f"srae-{options.network}-{options.images}"
    found = versions()
    stem.with_suffix(".json").write_text(
        json.dumps({"command": command, "versions": found, "records": [_plain(r) for r in records]}, indent=0) + "\n"
    )
    lines = [
        f"# SRAE on {options.network} {options.layer} (pooled), {options.images}",
        "",
        f"`{command}`; torch {found['torch']}. {num_fit} images to fit on, {num_held} held out; {len(names)} classes "
        f"({', '.join(n.split(',')[0] for n in names)}), one module each, {options.seeds} seeds, {options.steps} "
        "steps an attempt. Means over classes and seeds, then the standard deviation over classes (of seed means) / "
        "over seeds (of class means). 'class' and 'pos.': images of the class; 'neg.': all others. Undefined entries "
        "(a single live x-feature is orthogonal to nothing) are left out of the mean.",
        "",
        f"| arm | {' | '.join(SHOWN.values())} |",
        f"|---|{'---|' * len(SHOWN)}",
    ]
    for arm in dict.fromkeys(r["arm"] for r in records):
        cells = [_cell([r for r in records if r["arm"] == arm], key) for key in SHOWN]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    tries = [r for r in records if r["arm"] == "srae" and "tries" in r]
    if tries:
        refused = sum(not r["accepted"] for r in tries)
        lines += [
            "",
            f"Restart rule (arm srae): {sum(r['tries'] > 1 for r in tries)} of {len(tries)} modules were tried again, "
            f"{np.mean([r['tries'] for r in tries]):.2f} attempts on average, {refused} never accepted.",
        ]
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n")


def _cell(rows: list[dict], key: str) -> str:
    values = [r[key] for r in rows if key in r and math.isfinite(r[key])]
    if not values:
        return "-"

    def means(by: str) -> list[float]:
        groups: dict[int, list[float]] = {}
        for r in rows:
            if key in r and math.isfinite(r[key]):
                groups.setdefault(r[by], []).append(r[key])
        return [float(np.mean(g)) for g in groups.values()]

    spread = " / ".join(f"{np.std(m, ddof=1):.2f}" if len(m := means(by)) > 1 else "-" for by in ("class", "seed"))
    return f"{np.mean(values):.3f} ({spread})"


def _plain(record: dict) -> dict:
    return {
        k: None if isinstance(v, float) and not math.isfinite(v) else round(v, 5) if isinstance(v, float) else v
        for k, v in record.items()
    }


if __name__ == "__main__":
    main()

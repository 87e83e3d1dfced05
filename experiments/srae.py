"""SRAE beside its ablations and linear heads: faithfulness, sparsity, orthogonality, reconstruction and locality.

    python experiments/srae.py --network squeezenet1_0 --layer features.12 --images imagenette

One module a class, on the layer's pooled features. Fits on four fifths of the images (imagenette: its train images)
and reports the rest (imagenette: its val images, true ImageNet validation pictures). Every arm is an explainer with a
config, as ``netgloss explain`` runs it. Every (arm, seed) is a unit whose records go to the work folder: the same
command continues where a killed one stopped, and ``--minutes`` stops it early. Each call writes
experiments/srae-<network>-<images>.{md,json} of what is there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from torch import Tensor

import netgloss
from netgloss.activations import Store
from netgloss.activations.layer import class_labels, split_store
from netgloss.data import ImageSource, open_annotations, place, to_grid
from netgloss.explainers.base import Explainer, ExplainerConfig
from netgloss.explainers.class_scores import ClassScores
from netgloss.explainers.linear_head import LinearHead
from netgloss.explainers.srae import SRAE
from netgloss.explanations.heatmaps import concept_heatmaps
from netgloss.metrics.explanation_space import class_space, normalised_errors
from netgloss.metrics.faithfulness.importance import significant
from netgloss.metrics.localization import part_profile, part_shares
from netgloss.runs.run import versions
from netgloss.training import ActivationStream, build_explainer, fit
from netgloss.workflows.capture import store_info

HERE = Path(__file__).parent
PARTS = {
    "animals": {"head": ("head",), "front_legs": ("front_legs",)},
    "critters": {
        "crest": ("crest",), "wings": ("left wing", "right wing"), "tail": ("tail",), "beak": ("beak",),
    },
}  # fmt: skip
RANDOM = "srae, random network"


def arms(steps: int) -> dict[str, tuple[type[Explainer], dict]]:
    """Every arm: an explainer and its options (classes are added). One attempt each, but where it says otherwise."""
    found: dict[str, tuple[type[Explainer], dict]] = {}

    def srae(name: str, **options: object) -> None:
        found[name] = SRAE, {"attempts": 1, "steps": steps} | options

    srae("srae")
    srae("srae, restarts", attempts=3)
    srae("srae, 3400 steps", steps=3400)
    srae("srae, a_r and a_t x 0.1", weight_reconstruction=1.5, weight_pull_away=0.5)
    srae("srae, a_r and a_t x 10", weight_reconstruction=150.0, weight_pull_away=50.0)
    srae("srae, joint, n = 12", joint=True, num_concepts=12)
    for preset in ("released", "no-pull-away", "sae", "sae-pt", "nn", "nn-pt"):
        srae(preset, preset=preset)
    srae("nn, 3400 steps", preset="nn", steps=3400)
    srae("srae, no repair", repair=False)
    for n in (1, 2, 3, 8, 12):
        srae(f"srae, n = {n}", num_concepts=n)
    for q in (1, 10, 1000):
        srae(f"srae, q = {q}", q=float(q))
    srae("srae, shuffled logits", shuffle_logits=True)
    srae(RANDOM)
    for features in ("pca", "nmf", "random", "neurons", "omp", "lasso"):
        found[f"{features}-n"] = LinearHead, {"features": features}
    found["omp, n = 1"] = LinearHead, {"features": "omp", "num_concepts": 1}
    return found


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


def gather(store: Store, layer: str, images: np.ndarray, labels: np.ndarray) -> Data:
    z = torch.from_numpy(store.read(layer, images)).float().flatten(2).mean(2)
    logits = torch.from_numpy(store.read_logits(images))
    return Data(z, logits, torch.from_numpy(labels[images]), store, images)


def judge(explainer: ClassScores, g: int, held: Data, covers: dict, parts: list[str], layer: str) -> dict:
    """All numbers of the explanation of class ``g`` of the explained ones on the images held out."""
    c = explainer.class_index[g]
    positive = held.labels == c
    with torch.no_grad():
        concepts = explainer.encode(held.z)
        rebuilt = explainer.class_scores(concepts)[:, g]
        each = explainer.decode_modules(concepts)
        values = explainer.contributions(concepts, torch.full((len(held.z),), c))[0]
    groups, n = len(each), explainer.config.num_concepts
    own = slice(g * n, (g + 1) * n) if groups > 1 else slice(0, n)
    found = class_space(values[:, own], held.logits[:, c], rebuilt, positive)
    swapped = held.logits.clone()
    swapped[:, c] = rebuilt
    same = (swapped.argmax(1) == held.logits.argmax(1)).float()
    errors = normalised_errors(held.z, each[g if groups > 1 else 0])
    margin = (held.logits[:, c] - held.logits.index_fill(1, torch.tensor([c]), -torch.inf).amax(1)).abs()[positive]
    found |= {
        "agreement": float(same.mean()),
        "agreement_positive": float(same[positive].mean()),
        "accuracy_positive": float((swapped.argmax(1) == c)[positive].float().mean()),
        "accuracy_network": float((held.logits.argmax(1) == c)[positive].float().mean()),
        "margin": float(margin.median()),
        "rebuilt": float((errors <= 0.5).double().mean()),
        "nmse": float(errors.mean()),
    }
    if covers:
        found |= locality(lambda a: explainer.encode(a)[:, own], values[:, own], held, positive, covers, parts, layer)
    return found


def ceiling(train: Data, held: Data, classes: list[int]) -> dict[str, list[dict]]:
    """What regressions on all features reach: how far the pooled vector tells the decision at all (reference)."""
    scale = train.z.square().mean().sqrt()
    a, b = (train.z / scale).double(), (held.z / scale).double()
    near = torch.cdist(a, a).square()
    width = 0.2 / float(near.median())
    centre = a.mean(0)
    kernels = {
        "reference: ridge on all features": ((a - centre) @ (a - centre).T, (b - centre) @ (a - centre).T, 1.0),
        "reference: RBF kernel on all features": (
            (-width * near).exp(),
            (-width * torch.cdist(b, a).square()).exp(),
            1e-3,
        ),
    }
    found: dict[str, list[dict]] = {}
    for name, (gram, across, ridge) in kernels.items():
        for c in classes:
            y, mean = train.logits[:, c].double(), train.logits[:, c].double().mean()
            weight = torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=torch.float64), y - mean)
            rebuilt = across @ weight + mean
            positive = held.labels == c
            swapped = held.logits.clone()
            swapped[:, c] = rebuilt.float()
            same = (swapped.argmax(1) == held.logits.argmax(1)).float()
            error, spread = rebuilt - held.logits[:, c].double(), held.logits[positive, c].var(correction=0)
            found.setdefault(name, []).append(
                {
                    "arm": name, "seed": 0, "class": c,
                    "agreement": float(same.mean()), "agreement_positive": float(same[positive].mean()),
                    "r2_positive": 1 - float(error[positive].square().mean() / spread),
                    "rmse_positive": float(error[positive].square().mean().sqrt()),
                    "rmse_negative": float(error[~positive].square().mean().sqrt()),
                }
            )  # fmt: skip
    return found


def locality(
    encode, contributions: Tensor, held: Data, positive: Tensor, covers: dict, parts: list, layer: str
) -> dict:
    rows = np.array([i for i in np.flatnonzero(positive.numpy()) if i in covers])
    if not len(rows):
        return {}
    n = contributions.shape[1]
    heat = concept_heatmaps(encode, held.maps(rows, layer), range(n)).double().numpy()
    shares = np.full((len(rows), n, len(parts)), np.nan)
    background = np.full((len(rows), n), np.nan)
    for r, row in enumerate(rows):
        for k in range(n):
            if heat[r, k].any():
                shares[r, k], background[r, k] = part_shares(heat[r, k], covers[row], parts)
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
        }


def part_covers(source: ImageSource, classifier, images: np.ndarray, grid: tuple[int, int], parts: dict) -> dict:
    """Parts of each held-out image on the layer's grid, by its place in ``images``; the object's rest is one too."""
    found = {}
    for row, image in enumerate(images.tolist()):
        annotation = source.annotation(image)
        if annotation is None:
            continue
        cells = to_grid(place(annotation, classifier.preprocessing.geometry(*annotation.size)), grid)
        cells = {name: cover.astype(np.float64) for name, cover in cells.items()}
        members = {label for labels in parts.values() for label in labels}
        covers: dict[str, np.ndarray] = {}
        for name, labels in parts.items():  # boxes may overlap: a cell belongs to the first part
            here = [cells[label] for label in labels if label in cells]
            if here:
                covers[name] = np.clip(sum(here) - sum(covers.values()), 0, 1)
        if not covers:
            continue
        others = [cover for label, cover in cells.items() if label not in members]
        whole = np.clip(sum(others), 0, 1) if annotation.mask is not None else np.max(others, axis=0, initial=0.0)
        taken = 0 if annotation.mask is not None else sum(covers.values())
        covers["rest"] = np.clip(whole - taken, 0, 1) * np.ones(grid)
        found[row] = {name: cover for name, cover in covers.items() if cover.sum() > 0.05}
    return found


@dataclass
class Setting:
    """A network's activations, cut into images to fit on and images to report."""

    stream: ActivationStream
    train: Data
    held: Data
    source: ImageSource
    classes: list[int]


def open_setting(options: argparse.Namespace, classifier, root: Path, tag: str = "") -> Setting:
    names = {"imagenette": ("imagenette/train", "imagenette/val"), "critters": ("critters:1200",)}
    stores, sources = [], []
    for name in names.get(options.images, (options.images,)):
        source = netgloss.open_images(name if ":" in name else root / "data" / name)
        where = options.work / f"{options.network}{tag}-{name.replace('/', '-').replace(':', '-')}"
        stores.append(netgloss.capture(classifier, source, [options.layer], where, info=store_info(classifier, source)))
        sources.append(source)
    known = [class_labels(store, classifier.class_names, classifier.wnids) for store in stores]
    own, other = split_store(stores[0]) if len(stores) == 1 else (stores[0].valid, stores[1].valid)
    if options.images == "animals":
        sources[0].annotations = open_annotations(root / "data" / "animals", sources[0].ids)
    train = gather(stores[0], options.layer, own, known[0])
    held = gather(stores[-1], options.layer, other, known[-1])
    classes = np.unique(train.labels.numpy()).tolist()[: options.classes]
    stream = ActivationStream(stores[0], options.layer, own, reads="pooled", labels=known[0])
    return Setting(stream, train, held, sources[-1], classes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = Path(os.environ.get("NETGLOSS_DATA", "../shared"))
    parser.add_argument("--network", default="squeezenet1_0", help="of torchvision, or critters")
    parser.add_argument("--layer", default="features.12")
    parser.add_argument("--images", default="imagenette", choices=["animals", "imagenette", "critters"])
    parser.add_argument("--steps", type=int, default=850, help="of an attempt, where the arm does not say")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--classes", type=int, default=10, help="the first so many classes")
    parser.add_argument("--arms", nargs="+", default=None)
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no unit after so long")
    parser.add_argument("--work", type=Path, default=Path("runs/srae"))
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    started = time.perf_counter()
    known = arms(options.steps)
    chosen = options.arms or [*known]
    if unknown := [name for name in chosen if name not in known]:
        parser.error(f"unknown arms {unknown}; there are {', '.join(known)}")
    if options.network == "critters":
        classifier = netgloss.load_classifier("critters")
    else:
        checkpoint = root / "weights" / f"{options.network}.pth"
        classifier = netgloss.load_classifier(f"torchvision:{options.network}", checkpoint=checkpoint)
    setting = open_setting(options, classifier, root)
    grid = setting.train.store.shapes[options.layer][1:]
    parts = PARTS.get(options.images, {})
    covers = part_covers(setting.source, classifier, setting.held.images, grid, parts) if parts else {}
    untrained = open_setting(options, classifier.untrained(seed=0), root, "-untrained") if RANDOM in chosen else None
    kept = options.work / f"{options.network}-{options.images}.jsonl"
    records = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    done = {(r["arm"], r["seed"]) for r in records}
    for name, rows in ceiling(setting.train, setting.held, setting.classes).items():
        records = [r for r in records if r["arm"] != name] + rows
    for seed in range(options.seeds):
        for arm in chosen:
            if (arm, seed) in done or time.perf_counter() - started > 60 * options.minutes:
                continue
            start = time.perf_counter()
            found = unit(arm, seed, *known[arm], untrained if arm == RANDOM and untrained else setting, covers, parts)
            with kept.open("a") as file:
                file.writelines(json.dumps(r) + "\n" for r in found)
            records += found
            print(f"{arm}, seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)
    write(options, records, setting, classifier.class_names)


def unit(
    arm: str, seed: int, cls: type[Explainer], choices: dict, setting: Setting, covers: dict, parts: dict
) -> list[dict]:
    """One fit and its numbers for every class."""
    config: ExplainerConfig = cls.Config(classes=tuple(map(str, setting.classes)), **choices)
    spec = setting.stream.spec(num_classes=setting.train.logits.shape[1], image=())
    explainer = build_explainer(cls, config, spec, seed=seed)
    assert isinstance(explainer, ClassScores)
    fit(explainer, setting.stream, seed=seed)
    found = []
    for g, c in enumerate(setting.classes):
        numbers = judge(explainer, g, setting.held, covers, [*parts, "rest"], setting.stream.layer)
        if isinstance(explainer, SRAE):
            module = 0 if explainer.num_modules == 1 else g
            numbers |= {"tries": int(explainer.tries[module]), "accepted": bool(explainer.accepted[module])}
        found.append(_plain({"arm": arm, "seed": seed, "class": c, **numbers}))
    return found


def allowed_error(setting: Setting, share: float = 0.98) -> float:
    """Standard deviation of an error of the score that leaves ``share`` of the class's images with their decision."""
    margins = []
    for c in setting.classes:
        own = setting.held.logits[setting.held.labels == c]
        margins.append((own[:, c] - own.index_fill(1, torch.tensor([c]), -torch.inf).amax(1)).abs())
    margin = torch.cat(margins).double().numpy()
    low, high = 1e-3, 100.0
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if stats.norm.cdf(margin / middle).mean() > share else (low, middle)
    return low


def write(options: argparse.Namespace, records: list[dict], setting: Setting, names: list[str]) -> None:
    given = {k: v for k, v in vars(options).items() if k not in ("arms", "minutes", "work", "seeds")}
    command = "python experiments/srae.py " + " ".join(f"--{k} {v}" for k, v in given.items())
    stem = HERE / f"srae-{options.network}-{options.images}"
    found = versions()
    stem.with_suffix(".json").write_text(
        json.dumps({"command": command, "versions": found, "records": [_plain(r) for r in records]}, indent=0) + "\n"
    )
    classes = ", ".join(names[c].split(",")[0] for c in setting.classes)
    lines = [
        f"# SRAE on {options.network} {options.layer} (pooled), {options.images}",
        "",
        f"`{command}`, with the `--arms` below; torch {found['torch']}. {len(setting.train.z)} images to fit on, "
        f"{len(setting.held.z)} held out; {len(setting.classes)} classes ({classes}), {options.steps} steps an attempt "
        "where the arm does not say. Means over classes and seeds with the half-width of a 95 % t interval over the "
        "seeds (of class means), and the number of seeds. 'class' and 'pos.': images of the class; 'neg.': all others. "
        "Undefined entries (a single live x-feature is orthogonal to nothing) are left out of the mean.",
        "",
        f"| arm | seeds | {' | '.join(SHOWN.values())} |",
        f"|---|---|{'---|' * len(SHOWN)}",
    ]
    for arm in dict.fromkeys(r["arm"] for r in records):
        rows = [r for r in records if r["arm"] == arm]
        seeds = len({r["seed"] for r in rows})
        lines.append(f"| {arm} | {seeds} | {' | '.join(_cell(rows, key) for key in SHOWN)} |")
    own = [r for r in records if r["arm"] == "srae"]
    if own:
        margin = np.mean([r["margin"] for r in own if r["seed"] == 0])
        accuracy = [np.mean([r[key] for r in own]) for key in ("accuracy_positive", "accuracy_network")]
        lines += [
            "",
            f"The class's images: the logit is {margin:.1f} from the best other one (median of |margin|); 98 % "
            f"keep their decision if the score has a Gaussian error of {allowed_error(setting):.2f} logits. Accuracy "
            f"{accuracy[1]:.3f}, with the score of arm srae {accuracy[0]:.3f}.",
        ]
    tries = [r for r in records if r["arm"] == "srae, restarts"]
    if tries:
        refused = sum(not r["accepted"] for r in tries)
        lines += [
            "",
            f"Restart rule: {sum(r['tries'] > 1 for r in tries)} of {len(tries)} modules were tried again, "
            f"{np.mean([r['tries'] for r in tries]):.2f} attempts on average, {refused} never accepted.",
        ]
    if options.images == "animals":
        rows = [r for r in own if names[r["class"]].split(",")[0] not in ("koala", "zebra")]
        lines += [
            "",
            f"Without koala and zebra, on whose held-out images the repair was once chosen, arm srae: agreement "
            f"{_cell(rows, 'agreement')}, class {_cell(rows, 'agreement_positive')}, R2 pos. "
            f"{_cell(rows, 'r2_positive')}.",
        ]
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n")


def _cell(rows: list[dict], key: str) -> str:
    groups: dict[int, list[float]] = {}
    for r in rows:
        value = r.get(key)
        if value is not None and math.isfinite(value):
            groups.setdefault(r["seed"], []).append(value)
    means = [float(np.mean(g)) for g in groups.values()]
    if not means:
        return "-"
    if len(means) == 1 or np.ptp(means) == 0:
        return f"{means[0]:.3f}"
    half = stats.t.ppf(0.975, len(means) - 1) * np.std(means, ddof=1) / math.sqrt(len(means))
    return f"{np.mean(means):.3f} ± {half:.3f}"


def _plain(record: dict) -> dict:
    return {
        k: None if isinstance(v, float) and not math.isfinite(v) else round(v, 5) if isinstance(v, float) else v
        for k, v in record.items()
    }


if __name__ == "__main__":
    main()

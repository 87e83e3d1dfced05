"""PartExplainer beside its ablations, the original filters and the project's other explainers.

    python experiments/parts_data.py --out DATA
    python experiments/parts.py fit animals --data DATA --runs RUNS --fits main:0 main:1 main:2   (arm:seed each)
    python experiments/parts.py table animals --data DATA --runs RUNS

``fit`` captures the store once and fits explainers without any annotation; ``table`` judges what is there on the
other half of the pictures and writes experiments/parts-<study>.{json,md}. All options are those of the method's
defaults but for the number of steps. The defaults were chosen on a quarter of the fit half of the animals and on
Critters of other seeds; nothing was tuned on the reported half.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent


@dataclass(frozen=True)
class StudyOf:
    """A network, a layer, images, and how long to fit."""

    model: str
    layer: str
    steps: int
    upper: tuple[str, ...] = ()
    precision: str = "32-true"


STUDIES = {
    "animals": StudyOf("torchvision:mobilenet_v2", "features.13", 250),
    "animals-features.17": StudyOf("torchvision:mobilenet_v2", "features.17", 250),
    "animals-squeezenet": StudyOf("torchvision:squeezenet1_0", "features.12", 200, precision="bf16-mixed"),
    "carparts": StudyOf("torchvision:mobilenet_v2", "features.13", 250),
    "critters": StudyOf("critters", "block4", 300, ("block5", "flatten")),
}
PUBLISHED: dict[str, Any] = {"preset": "published", "eta": 1.0, "decoder_lr": 1e-4}
ARMS: dict[str, dict[str, Any]] = {
    "main": {},
    "published": PUBLISHED,
    "information loss": {"filter_loss": "information", "filter_weight": 0.1, "kappa": 30.0},
    "no filter loss": {"filter_weight": 0.0},
    "never the parts alone": {"alone": 0.0},
    "first maps masked": {"masks": "both"},
    "no masks": {"masks": "none"},
    "no mixing": {"mixing": False},
    "k-means start": {"start": "kmeans"},
    "random start": {"start": "random"},
    "frozen decoder": {"decoder_lr": 0.0},
    "random encoder": {"steps": 1, "lr": 1e-12, "decoder_lr": 0.0, "start": "random", "mixing": False},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=("fit", "table"))
    parser.add_argument("study", choices=tuple(STUDIES))
    parser.add_argument("--data", type=Path, required=True, help="folder of experiments/parts_data.py")
    parser.add_argument("--runs", type=Path, required=True, help="folder of stores and fits")
    parser.add_argument("--fits", nargs="+", default=["main:0"], help="arm:seed each, or all")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.job == "fit":
        fit_arms(options)
    else:
        from parts_table import write_table

        write_table(options.study, STUDIES[options.study], ARMS, options.data, options.runs / options.study)


def classifier_of(study: StudyOf) -> Any:
    """The network, its input squashed from the whole crop."""
    from netgloss.classifiers import load_classifier

    if study.model == "critters":
        return load_classifier("critters")
    data = Path(os.environ.get("NETGLOSS_DATA", "../shared"))
    name = study.model.split(":")[1]
    return load_classifier(
        study.model, checkpoint=data / "weights" / f"{name}.pth", preprocessing={"resize": (224, 224)}
    )


def images_of(name: str, data: Path, *, annotated: bool = False) -> Any:
    """(images to fit on, images to report on); with annotations if asked for."""
    from netgloss.data import open_images

    if name == "critters":
        return open_images("critters:600,seed=7"), open_images("critters:400,seed=8")
    halves = {"carparts": ("train", "test")}.get(name, ("fit", "report"))
    root = Path(os.environ.get("NETGLOSS_DATA", "../shared")) / "data" / "carparts"
    folders = [(root if name == "carparts" else data / "animals") / half for half in halves]
    marks = [folder / ("masks" if name == "carparts" else "annotations.json") for folder in folders]
    return tuple(
        open_images(folder / "images", **({"annotations": mark} if annotated else {}))
        for folder, mark in zip(folders, marks, strict=True)
    )


def store_of(name: str, study: StudyOf, data: Path, runs: Path) -> tuple[Any, Any, Any]:
    """Classifier, joined images and their store with the layers above."""
    from netgloss.activations import CaptureOptions, capture
    from netgloss.data.sources import open_sources
    from netgloss.explainers.parts import PartConfig, PartExplainer
    from netgloss.training.inputs import upper_layers
    from netgloss.workflows.capture import store_info

    classifier = classifier_of(study)
    source = open_sources(*images_of(name, data))
    above = upper_layers(PartExplainer, PartConfig(upper=study.upper), classifier, study.layer)
    what = {"options": CaptureOptions(workers=0), "info": store_info(classifier, source)}
    store = capture(classifier, source, [study.layer, *above], runs / "store.zarr", **what)
    return classifier, source, store


def fit_arms(options: argparse.Namespace) -> None:
    """Fits what is asked for and not there yet; an interrupted fit continues."""
    from netgloss import Execution
    from netgloss.explainers.parts import PartConfig
    from netgloss.workflows.fit import fit

    study, runs = STUDIES[options.study], options.runs / options.study
    runs.mkdir(parents=True, exist_ok=True)
    classifier, source, store = store_of(options.study, study, options.data, runs)
    config = {"steps": study.steps, "upper": study.upper}
    every = [f"{arm}:{seed}" for seed in range(3) for arm in ARMS]
    for wish in every if options.fits == ["all"] else options.fits:
        arm, _, seed = wish.partition(":")
        run = fit(
            "parts",
            store,
            study.layer,
            runs / f"{arm}-{seed}",
            config=PartConfig(**{**config, **ARMS[arm]}),
            seeds=[int(seed)],
            device=Execution("cpu", precision=study.precision),
            classifier=classifier,
            source=source,
        )
        print(options.study, arm, seed, run.manifest["times"], run.explainer.notes, flush=True)


if __name__ == "__main__":
    main()

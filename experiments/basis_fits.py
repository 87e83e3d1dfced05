"""Fits the bases that experiments/basis_dissection.py judges: one safetensors file and one history a fit.

    python experiments/basis_fits.py --store carparts-train.zarr --layer features.13 --out runs/basis/mobilenet
    --variants default

All positions of all images of the store are fit rows; no label is read. Variants: ``default``, ``tau0.9`` (gamma 3),
``cbe`` (tau 0.9, gamma 1.1, without the network term), ``cbe-net`` and ``cbe-uur`` (with it), ``whitened`` (default on
whitened rows), ``uibe`` (to convergence), ``uibe-early`` (1,200 steps at lr
1e-3), ``permuted`` (default on rows permuted within each channel), and every direct method by its name.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("basis", {}),
    "tau0.9": ("basis", {"tau": 0.9}),
    "cbe": ("basis", {"tau": 0.9, "gamma": 1.1}),
    "cbe-net": ("basis", {"preset": "cbe"}),
    "cbe-uur": ("basis", {"preset": "cbe", "network": "uur"}),
    "whitened": ("basis", {"whiten": True}),
    "uibe": ("basis", {"preset": "uibe", "steps": 3000}),
    "uibe-early": ("basis", {"preset": "uibe", "steps": 1200, "lr": 1e-3}),
    "permuted": ("basis", {}),
    "kmeans32": ("kmeans", {"num_concepts": 32, "n_init": 1}),
    "nmf32": ("nmf", {"num_concepts": 32, "negative": "clip"}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--layer", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--concepts", type=int, help="number of concepts of the other methods; default the features")
    parser.add_argument("--steps", type=int, help="steps of learned methods instead of their own")
    parser.add_argument("--fields", nargs="+", default=[], metavar="NAME=VALUE", help="options of the methods")
    options = parser.parse_args()
    torch.set_num_threads(1)

    from netgloss.activations import Store
    from netgloss.classifiers import load_from_spec
    from netgloss.explainers.names import find_explainer
    from netgloss.training import build_explainer, fit
    from netgloss.training.inputs import open_stream

    store = Store.open(options.store)
    options.out.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for variant in options.variants:
            path = options.out / f"{variant}-{seed}.safetensors"
            if path.exists():
                continue
            method, fields = VARIANTS.get(variant, (variant, {}))
            cls = find_explainer(method)
            if method != "basis":
                fields = {"num_concepts": options.concepts or store.shapes[options.layer][0], **fields}
            if options.steps and cls.learned:
                fields = {**fields, "steps": options.steps}
            for field in options.fields:
                name, _, value = field.partition("=")
                if hasattr(cls.Config(**fields), name):
                    fields = {**fields, name: json.loads(value)}
            config = cls.Config(**fields)
            stream: Any = open_stream(
                cls,
                config,
                store,
                options.layer,
                store.valid,
                classifier=lambda: load_from_spec(store.info.model),
                source=None,
            )
            spec = stream.spec(num_classes=0, image=())
            if variant == "permuted":
                stream = Permuted(stream, seed)
            history: list[dict[str, Any]] = []
            start = time.perf_counter()
            explainer = build_explainer(cls, config, spec, seed=seed)
            explainer = fit(explainer, stream, seed=seed, log=history.append)
            seconds = time.perf_counter() - start
            save(explainer, method, seed, path)
            record = {"seconds": seconds, "notes": list(getattr(explainer, "notes", [])), "history": history}
            path.with_suffix(".json").write_text(json.dumps(record))
            print(f"{options.layer} {variant} seed {seed}: {seconds:.0f} s {record['notes']}", flush=True)


class Permuted:
    """The rows of a stream, each feature shuffled over all rows by itself: its marginals without what joins
    features."""

    def __init__(self, stream: Any, seed: int) -> None:
        self.layer, self.store, self.num_rows, self.num_features = (
            stream.layer,
            stream.store,
            stream.num_rows,
            stream.num_features,
        )
        rng = np.random.default_rng(seed)
        self.rows = torch.cat(list(stream.chunks())).half()
        for feature in range(self.num_features):
            self.rows[:, feature] = self.rows[torch.from_numpy(rng.permutation(self.num_rows)), feature]

    def chunks(self) -> Any:
        for part in self.rows.split(1 << 16):
            yield part.float()

    def batches(self, size: int, *, seed: int, **unused: Any) -> Any:
        from netgloss.explainers.base import Batch

        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(self.num_rows, generator=generator)
            for picks in order.split(size)[:-1]:
                yield Batch(self.rows[picks].float(), picks)


def save(explainer: Any, method: str, seed: int, path: Path) -> None:
    """What ``netgloss.runs.saved.load_explainer`` reads."""
    from safetensors.torch import save_file

    header = {
        "method": method,
        "config": json.dumps(dataclasses.asdict(explainer.config)),
        "spec": json.dumps(dataclasses.asdict(explainer.spec)),
        "seed": str(seed),
        "notes": json.dumps(list(getattr(explainer, "notes", []))),
    }
    save_file({name: value.contiguous() for name, value in explainer.state_dict().items()}, path, metadata=header)


if __name__ == "__main__":
    main()

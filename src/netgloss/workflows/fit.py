"""Fit: an explainer per seed on the activations of a store, saved in a run folder."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from netgloss.activations import Store
from netgloss.activations.layer import split_store
from netgloss.classifiers import imagenet_wnids, load_from_spec
from netgloss.errors import UserError
from netgloss.explainers.base import Explainer, ExplainerConfig, LayerSpec
from netgloss.explainers.names import find_explainer, method_name
from netgloss.processes import first_then_others
from netgloss.progress import Progress, Silent
from netgloss.runs.run import Run
from netgloss.training import ActivationStream, build_explainer, fit, make_fabric
from netgloss.training.inputs import open_stream

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from netgloss.classifiers import Classifier
    from netgloss.data import ImageSource


def fit_run(
    method: str,
    store: Store,
    layer: str,
    out: str | Path,
    *,
    config: ExplainerConfig | None = None,
    seeds: int | Sequence[int] = 3,
    fabric: Fabric | None = None,
    classifier: Classifier | None = None,
    source: ImageSource | None = None,
    command: str = "",
    progress: Progress | None = None,
) -> Run:
    """Fits ``method`` once a seed on the fit images of a complete store and saves the explainers in a run folder.

    ``fabric`` says the device, precision and processes of learned methods (see ``netgloss.training.make_fabric``).
    ``classifier`` is loaded again where the method needs it; ``source``, the images of the store, is needed by methods
    that learn from images.

    Raises
    ------
    UserError
        If the method is unknown, the store incomplete or of another network, lacks a layer or the images that the
        method needs, or ``out`` holds another run.
    """
    progress = progress or Silent()
    store.require_complete()
    cls = find_explainer(method)
    config = config or cls.Config()
    seed_list = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not seed_list:
        raise UserError("at least one seed is needed")
    fit_images, heldout = split_store(store)
    model = store.info.model
    names = model.get("class_names", [])
    fabric = fabric or make_fabric()

    def network() -> Classifier:
        if classifier is None and not model:
            raise UserError(f"{store.path} does not say which network it is of: give fit_run the classifier")
        return (classifier or load_from_spec(model)).to(fabric.device)

    stream = open_stream(cls, config, store, layer, fit_images, classifier=network, source=source)
    if cls.needs(config):
        wnids = imagenet_wnids(model.get("imagenet")) or []
        if stream.mask_labels:
            config = dataclasses.replace(config, labels=stream.mask_labels)  # type: ignore[call-arg]
        config = cls.settle(config, class_names=names, wnids=wnids, decisions=stream.decisions(fit_images))
    shown = model.get("preprocessing", {})
    image = (shown["channels"], *shown["size"]) if shown else ()
    spec = stream.spec(num_classes=len(names), image=image)
    manifest = {
        "command": command,
        "method": method_name(cls),
        "config": dataclasses.asdict(config),
        "model": model,
        "layer": layer,
        "layer_spec": dataclasses.asdict(spec),
        "seeds": seed_list,
        "store": str(store.path),
        "store_address": store.key.address,
        "data": {
            **store.info.images,
            "fingerprint": store.key.data_fingerprint,
            "num_images": len(store),
            "num_fit": len(fit_images),
            "num_heldout": len(heldout),
            "unreadable": [{"id": i, "reason": r} for i, r in list(store.problems.items())[:200]],
        },
    }
    run = first_then_others(fabric, lambda: Run.create(out, manifest), lambda: Run(out))
    run.network = classifier
    for seed in seed_list:
        if not run.explainer_path(seed).exists():
            if cls.deterministic and seed != seed_list[0]:
                if fabric.is_global_zero:
                    run.save_explainer(run.explainer, seed)
            elif cls.learned or fabric.is_global_zero:
                _fit_seed(run, cls, config, spec, stream, seed, fabric, progress)
        elif fabric.is_global_zero:
            run.checkpoint(seed).remove()  # of a fit that was killed after its explainer was saved
        fabric.barrier()
    if not fabric.is_global_zero:
        return run
    run.update(status="fitted" if run.manifest["status"] == "started" else run.manifest["status"])
    return run


def _fit_seed(
    run: Run,
    cls: type[Explainer],
    config: ExplainerConfig,
    spec: LayerSpec,
    stream: ActivationStream,
    seed: int,
    fabric: Fabric,
    progress: Progress,
) -> None:
    checkpoint = run.checkpoint(seed)
    saved = checkpoint.load()
    if fabric.is_global_zero:
        run.trim_history(seed, saved[1]["step"] if saved else 0)
    started = time.perf_counter()
    explainer = fit(
        build_explainer(cls, config, spec, seed=seed),
        stream,
        seed=seed,
        fabric=fabric,
        checkpoint=checkpoint,
        log=run.log,
        progress=progress,
    )
    if fabric.is_global_zero:
        run.add_time(f"fit seed {seed}", time.perf_counter() - started)
        run.save_explainer(explainer, seed)
        checkpoint.remove()

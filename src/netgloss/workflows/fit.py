"""Fit: an explainer per seed on the activations of a store, saved in a run folder."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from netgloss.activations import Store
from netgloss.activations.layer import split_store
from netgloss.classifiers import imagenet_wnids, load_from_spec
from netgloss.errors import UserError
from netgloss.explainers.base import Explainer, ExplainerConfig, LayerSpec
from netgloss.explainers.names import find_explainer, method_name
from netgloss.processes import first_then_others
from netgloss.progress import Progress
from netgloss.runs.run import Run
from netgloss.training import ActivationStream, build_explainer
from netgloss.training import fit as fit_explainer
from netgloss.training.execution import Execution
from netgloss.training.inputs import open_stream

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from netgloss.classifiers import Classifier
    from netgloss.data import ImageSource


def fit(
    method: str,
    store: Store,
    layer: str,
    out: str | Path,
    *,
    config: ExplainerConfig | None = None,
    seeds: int | Sequence[int] = 3,
    device: str | Execution = "auto",
    classifier: Classifier | None = None,
    source: ImageSource | None = None,
) -> Run:
    """Fits ``method`` once per seed on the fit images of a store, and saves the explainers in a run folder.

    Parameters
    ----------
    method : name or ``path/to/file.py:Class``.
    store : complete. layer : one of its layers. out : the run folder; an interrupted fit continues.
    seeds : number of fits, or which seeds.
    device : a device, or an :class:`~netgloss.Execution`.
    classifier : the network of the store, for methods that need it; default: loaded by the name in the store.
    source : the images of the store, for methods that learn from images.

    Returns
    -------
    The run, with status "fitted".

    Raises
    ------
    UserError : the method is unknown; the store is incomplete, or lacks the layer or the images that the method needs;
        ``out`` holds another run.
    """
    execution = Execution.of(device)
    fabric, progress = execution.fabric, execution.shown
    if not (seed_list := list(range(seeds)) if isinstance(seeds, int) else list(seeds)):
        raise UserError("at least one seed is needed")
    ready = prepare_fit(method, store, layer, config=config, classifier=classifier, source=source, execution=execution)
    manifest = {"command": execution.command, **ready.manifest, "seeds": seed_list}
    run = first_then_others(fabric, lambda: Run.create(out, manifest), lambda: Run(out))
    run.network = classifier
    for seed in seed_list:
        if not run.explainer_path(seed).exists():
            if ready.cls.deterministic and seed != seed_list[0]:
                if fabric.is_global_zero:
                    run.save_explainer(run.explainer, seed)
            elif ready.cls.learned or fabric.is_global_zero:
                _fit_seed(run, ready.build(seed), ready.stream, seed, fabric, progress)
        elif fabric.is_global_zero:
            run.checkpoint(seed).remove()  # of a fit that was killed after its explainer was saved
        fabric.barrier()
    if fabric.is_global_zero:
        run.update(status="fitted" if run.manifest["status"] == "started" else run.manifest["status"])
    return run


@dataclass(frozen=True)
class PreparedFit:
    """All that a fit needs, and what run.json records of it."""

    cls: type[Explainer]
    config: ExplainerConfig
    stream: ActivationStream
    spec: LayerSpec
    manifest: dict[str, Any]

    def build(self, seed: int) -> Explainer:
        """The explainer with its initial values."""
        return build_explainer(self.cls, self.config, self.spec, seed=seed)


def prepare_fit(
    method: str,
    store: Store,
    layer: str,
    *,
    config: ExplainerConfig | None,
    classifier: Classifier | None,
    source: ImageSource | None,
    execution: Execution,
) -> PreparedFit:
    """Opens what :func:`fit` reads, and fills in the options that the data decides; the arguments are those of fit."""
    store.require_complete()
    cls = find_explainer(method)
    config = config or cls.Config()
    fit_images, heldout = split_store(store)
    model = store.info.model

    reads = set(cls.needs(config)) | ({"to_logits"} if cls.target == "image" else set())
    if model and not model.get("class_names") and {"logits", "tail", "to_logits"} & reads:
        raise UserError(
            f"{method_name(cls)} needs the network's logits, and this network has no head: choose another method"
        )
    if model.get("multi_label") and {"tail", "to_logits"} & reads:
        raise UserError(
            f"{method_name(cls)} learns from class probabilities that add up to 1, and this network gives several "
            "labels per image (--multi-label): choose another method"
        )

    def network() -> Classifier:
        if classifier is None and not model:
            raise UserError(f"{store.path} does not say which network it is of: give fit the classifier")
        return (classifier or load_from_spec(model)).to(execution.torch_device)

    stream = open_stream(cls, config, store, layer, fit_images, classifier=network, source=source)
    config = _settled(cls, config, stream, model, fit_images)
    shown = model.get("preprocessing", {})
    image = (shown["channels"], *shown["size"]) if shown else ()
    spec = stream.spec(num_classes=len(model.get("class_names", [])), image=image)
    manifest = {
        "method": method_name(cls),
        "config": dataclasses.asdict(config),
        "model": model,
        "layer": layer,
        "layer_spec": dataclasses.asdict(spec),
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
    return PreparedFit(cls, config, stream, spec, manifest)


def _settled(
    cls: type[Explainer],
    config: ExplainerConfig,
    stream: ActivationStream,
    model: dict[str, Any],
    fit_images: np.ndarray,
) -> ExplainerConfig:
    """The config with what the data decides filled in."""
    if not cls.needs(config):
        return config
    if stream.mask_labels:
        config = dataclasses.replace(config, labels=stream.mask_labels)  # type: ignore[call-arg]
    return cls.settle(
        config,
        class_names=model.get("class_names", []),
        wnids=imagenet_wnids(model.get("imagenet")) or [],
        decisions=stream.decisions(fit_images),
    )


def _fit_seed(
    run: Run, explainer: Explainer, stream: ActivationStream, seed: int, fabric: Fabric, progress: Progress
) -> None:
    checkpoint = run.checkpoint(seed)
    saved = checkpoint.load()
    if fabric.is_global_zero:
        run.trim_history(seed, saved[1]["step"] if saved else 0)
    started = time.perf_counter()
    explainer = fit_explainer(
        explainer, stream, seed=seed, fabric=fabric, checkpoint=checkpoint, log=run.log, progress=progress
    )
    if fabric.is_global_zero:
        run.add_time(f"fit seed {seed}", time.perf_counter() - started)
        run.save_explainer(explainer, seed)
        checkpoint.remove()

"""The whole way in one call: classifier and images -> store -> fitted explainers -> scores -> report.

:func:`explain` does all of it; :func:`fit_run`, :func:`evaluate_run` and ``Run.write_report`` are its parts, for a
store that exists already. Every part continues where an interrupted one stopped.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from netgloss.activations import CaptureOptions, Store, StoreInfo, capture, image_batches, prepare_store
from netgloss.activations.capture import origin
from netgloss.activations.places import place_of
from netgloss.classifiers import imagenet_wnids, load_from_spec
from netgloss.errors import UserError
from netgloss.evaluation.measure import either_tail, tail_for
from netgloss.evaluation.run import EvaluationOptions, evaluate_run, judged_with, pick_device, split_store
from netgloss.explainers.base import Explainer, ExplainerConfig, LayerSpec
from netgloss.explainers.names import find_explainer, method_name
from netgloss.fitting import make_tail, open_stream, upper_layers
from netgloss.gloss import GlossOptions, describe_image
from netgloss.gloss.excitation import Heat, chosen_heat
from netgloss.processes import first_then_others, together
from netgloss.progress import Progress, Silent
from netgloss.run import Run, save_figure, versions
from netgloss.training import ActivationStream, build_explainer, fit, make_fabric

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from netgloss.classifiers import Classifier
    from netgloss.data import ImageSource


def store_info(classifier: Classifier, source: ImageSource) -> StoreInfo:
    """What a store remembers of its origin, and with which versions it was made."""
    return dataclasses.replace(origin(classifier, source), created_with=versions())


def open_sources(images: ImageSource | str | Path, eval_images: ImageSource | str | Path | None = None) -> ImageSource:
    """The images to fit on, joined with those to judge on where these are given.

    Raises
    ------
    UserError : both are the same images.
    """
    from netgloss.data import ImageSource, Joined, open_images

    source, heldout = (s if s is None or isinstance(s, ImageSource) else open_images(s) for s in (images, eval_images))
    assert source is not None
    if heldout is not None and heldout.fingerprint == source.fingerprint:
        raise UserError(
            f"the images to judge on are those to fit on ({source.description}): explainers are judged on other "
            "images; without --eval-images a fifth of the images is held out"
        )
    return source if heldout is None else Joined(source, heldout)


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


def shared_capture(
    fabric: Fabric,
    classifier: Classifier,
    source: ImageSource,
    layers: Sequence[str],
    out: str | Path,
    *,
    options: CaptureOptions | None = None,
    progress: Progress | None = None,
) -> Store:
    """Captures into one store by all processes of a launched ``fabric``; complete when it returns.

    The store is the same, byte for byte, whatever the number of processes.
    """
    what: dict[str, Any] = {"options": options, "info": store_info(classifier, source), "progress": progress}
    first_then_others(
        fabric,
        lambda: prepare_store(classifier, source, layers, out, **what),
        lambda: Store.open(out),
    )
    rank, world = fabric.global_rank, fabric.world_size
    return together(fabric, lambda: capture(classifier, source, layers, out, rank=rank, world=world, **what))


def explain(
    method: str,
    model: Classifier | str | torch.nn.Module,
    layer: str,
    images: ImageSource | str | Path,
    *,
    out: str | Path,
    eval_images: ImageSource | str | Path | None = None,
    config: ExplainerConfig | None = None,
    seeds: int | Sequence[int] = 3,
    device: str = "auto",
    devices: int = 1,
    nodes: int = 1,
    precision: str = "32-true",
    store: str | Path | None = None,
    capture_options: CaptureOptions | None = None,
    evaluation: EvaluationOptions | None = None,
    gloss: GlossOptions | None = None,
    command: str = "",
    progress: Progress | None = None,
    **config_fields: Any,
) -> Run:
    """Explains one layer of a classifier by concepts and writes a run folder with its report.

    Parameters
    ----------
    method : ``"nmf"``, ``"pca"``, ``"ica"``, ``"kmeans"``, ``"topk-sae"``, ..., or ``path/to/file.py:Class``.
    model : a classifier, its name (``"torchvision:mobilenet_v2"``), or any ``nn.Module`` that says its preprocessing.
    layer : dotted name, as ``netgloss layers`` lists them.
    images : a source, or what ``netgloss.open_images`` takes (a folder, an .npz file, ...).
    eval_images : images to judge on; default: a fifth of ``images``, held out from the fit by the hash of their ids.
    out : the run folder; an interrupted run with the same settings continues, a finished one is only reported again
        (``evaluate_run`` scores it anew).
    seeds : how many fits, or which seeds.
    device, devices, nodes, precision : as Fabric takes them; several processes (``devices`` on each of ``nodes``
        machines) share the capture and the judged images and train by DDP (the calling script is started once a
        process, as torchrun does).
    store : where the activations go; default ``out/activations.zarr``.
    config_fields : options of the method by name (``num_concepts=32``), instead of ``config``.

    Returns
    -------
    The run: ``run.explainer``, ``run.scores``, ``run.path / "report.html"``.

    Raises
    ------
    UserError
        One line for each mistake in names, files and options.
    """
    from netgloss.classifiers import Classifier, load_classifier

    progress = progress or Silent()
    cls = find_explainer(method)
    if config is None:
        known = [f.name for f in dataclasses.fields(cls.Config)]
        unknown = sorted(set(config_fields) - set(known))
        if unknown:
            raise UserError(f"{method} has no option {', '.join(unknown)}; it has {', '.join(known)}")
        config = cls.Config(**config_fields)
    fabric = make_fabric(device, devices=devices, nodes=nodes, precision=precision)
    fabric.launch()
    progress = (progress if fabric.is_global_zero else None) or Silent()
    classifier = model if isinstance(model, Classifier) else load_classifier(model)
    classifier = classifier.to(fabric.device)
    source = open_sources(images, eval_images)
    classifier.check_layer(layer)
    out = Path(out)
    layers = [layer, *upper_layers(cls, config, classifier, layer)]
    place = place_of(store) if store is not None else out / "activations.zarr"
    started = time.perf_counter()
    captured = shared_capture(fabric, classifier, source, layers, place, options=capture_options, progress=progress)
    seconds = time.perf_counter() - started
    if captured.problems:
        progress.say(
            f"{len(captured.problems)} image(s) could not be read and were skipped; they are listed in the report"
        )
    run = fit_run(
        method,
        captured,
        layer,
        out,
        config=config,
        seeds=seeds,
        fabric=fabric,
        classifier=classifier,
        source=source,
        command=command,
        progress=progress,
    )
    if fabric.is_global_zero:
        run.add_time("capture", seconds)
    judged = run.manifest["status"] == "complete"
    if not (judged and run.manifest.get("judged_with") == judged_with(evaluation, gloss)):
        evaluate_run(
            run,
            store=captured,
            source=source,
            classifier=classifier,
            options=evaluation,
            gloss=gloss,
            fabric=fabric,
            progress=progress,
        )
    if not fabric.is_global_zero:
        return run
    run.update(status="complete")
    run.write_report()
    return run


def show(
    run: Run,
    images: ImageSource | str | Path,
    *,
    out: str | Path,
    top: int = 5,
    heat: Heat = "gradient",
    device: str = "auto",
) -> list[Path]:
    """Explains new images with a saved run: for each a figure (PNG) and its numbers (JSON); returns the files.

    The prediction's logit is told as base + contributions + gap (see netgloss.metrics.importance), with the map of
    each of the ``top`` concepts over the picture that the network saw; ``heat`` says how the maps of methods on pooled
    layers are made (see netgloss.gloss.excitation).
    """
    from netgloss.classifiers import Taps
    from netgloss.data import ImageSource, open_images

    if top < 1:
        raise UserError(f"top must be at least 1, got {top}")
    source = images if isinstance(images, ImageSource) else open_images(images)
    classifier = run.classifier().to(pick_device(device))
    explainer = run.explainer.to(classifier.device)
    tail = make_tail(classifier, run.layer, source)
    above = list(explainer.spec.upper) if explainer.target == "upper" else []
    above_tail = make_tail(classifier, above[-1], source) if above else None
    written = []
    for index, name in enumerate(source.ids):
        pixels, (reason,) = next(image_batches(classifier, source, [index], workers=0))
        if reason:
            raise UserError(reason)
        pixels = pixels.to(classifier.device)
        with torch.no_grad(), Taps(classifier.net, [run.layer], stop=False) as taps:
            activation = taps(pixels)[run.layer]
            logits = taps.logits
        picture = classifier.preprocessing.pixels(source.image(index)).permute(1, 2, 0).clamp(0, 1).numpy()
        if explainer.target == "image":
            figure, numbers = _show_decoded(run, explainer, activation, logits, classifier, source, index)
        else:
            way_on = tail_for(tail, classifier, source, np.array([index]))
            if above_tail is not None:
                way_on = either_tail(way_on, tail_for(above_tail, classifier, source, np.array([index])), above[-1])
            figure, numbers = describe_image(
                explainer,
                activation,
                logits,
                way_on,
                picture,
                classifier.class_names,
                top=top,
                heat=chosen_heat(heat, explainer, classifier, run.layer, pixels, activation),
            )
        stem = Path(name).stem or "image"
        written += save_figure(
            Path(out), f"{index:04d}-{stem}" if len(source) > 1 else stem, figure, {"image": name, **numbers}
        )
    return written


def _show_decoded(
    run: Run,
    explainer: Explainer,
    activation: torch.Tensor,
    logits: torch.Tensor,
    classifier: Classifier,
    source: ImageSource,
    index: int,
) -> tuple[Any, dict[str, Any]]:
    """The triple of one image, for explainers that decode into images."""
    from netgloss.decoding.judge import Pictures, describe_decoded
    from netgloss.explainers.cladec import ClaDec

    if not isinstance(explainer, ClaDec):
        raise UserError(f"{run.method} decodes into images in a way that show does not know")
    pictures = Pictures.of(explainer, classifier, source)
    image = pictures.read(np.array([index]))
    return describe_decoded(explainer, activation, logits, image, pictures, classifier.class_names, seed=run.seeds[0])


def demo(out: str | Path, *, num_images: int = 400, command: str = "", progress: Progress | None = None) -> Run:
    """Explains the shipped Critters network's last map by NMF: needs no download, network or data."""
    return explain(
        "nmf",
        "critters",
        "block5",
        f"critters:{num_images}",
        out=out,
        num_concepts=12,
        command=command,
        progress=progress,
    )

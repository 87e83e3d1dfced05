"""Where networks come from: timm, torchvision, transformers, a Python file, the network shipped with netgloss, a module
at hand.

Each source gives the network, how images are prepared for it and what its classes are called. Published weights are
downloaded only if asked for.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from netgloss.classifiers.downloads import downloading
from netgloss.classifiers.huggingface import HuggingFaceNetwork
from netgloss.classifiers.modules import prepared
from netgloss.classifiers.preprocessing import Preprocessing
from netgloss.errors import UserError, nearest
from netgloss.trust import code_file, importing_beside, note_code


@dataclass
class Built:
    """A network without its final weights, and what its source says of it."""

    net: nn.Module
    name: str
    origin: str
    preprocessing: Preprocessing | None = None
    class_names: Sequence[str] | Mapping[Any, Any] | None = None
    imagenet: str | None = None
    seeded: bool = False
    """True if its random weights came from the seed already."""


def build(
    source: str | nn.Module,
    *,
    pretrained: bool,
    num_classes: int | None,
    size: tuple[int, int] | None,
    state_names: Collection[str],
) -> Built:
    """The network of a name, a path or a module, and what its source says of input and labels."""
    if isinstance(source, nn.Module):
        if num_classes:
            raise UserError(f"num_classes={num_classes} cannot change a module that is built already")
        net = prepared(source)
        return _from_module(net, type(net).__name__, f"module:{type(net).__name__}")
    file, factory = code_file(source)
    if file.endswith(".py"):
        path = Path(file)
        net = _from_file(path, factory, num_classes)
        return _from_module(net, f"{path.name}:{factory}", f"{path.resolve()}:{factory}")
    library, _, name = source.partition(":")
    if library == "hf":
        found = HuggingFaceNetwork(name, pretrained=pretrained, num_classes=num_classes, size=size)
        named = f"hf:{name}", f"hf:{found.origin}"
        return Built(found.net, *named, found.preprocessing, found.class_names, seeded=True)
    if library == "timm" and name.startswith(_TIMM_SOURCES):
        return _from_timm_source(name, pretrained, num_classes, size)
    if library == "timm":
        return _from_timm(name, pretrained, num_classes, size)
    if library == "torchvision":
        return _from_torchvision(name, pretrained, num_classes, size, state_names)
    if source == "critters":
        from netgloss.data.critters_net import load_critters_net

        return _from_module(load_critters_net(), "critters", "critters")
    raise UserError(
        f"unknown classifier {source!r}; pass timm:NAME, torchvision:NAME, hf:NAME, path/to/file.py:factory or critters"
        + (f" (timm:{source}?)" if source.isidentifier() else "")
    )


def _from_module(net: nn.Module, name: str, origin: str) -> Built:
    spec = getattr(net, "preprocessing_spec", None)
    return Built(
        net,
        name,
        origin,
        preprocessing=None if spec is None else Preprocessing.from_dict(spec),
        class_names=getattr(net, "class_names", None),
    )


def _from_file(path: Path, factory: str, num_classes: int | None) -> nn.Module:
    if not path.is_file():
        raise UserError(f"the classifier's file {path} does not exist")
    note_code(path)
    module_name = f"netgloss_classifier_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        with importing_beside(path):
            spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"the classifier's file {path} cannot be run: {type(error).__name__}: {error}") from error
    make = getattr(module, factory, None) if factory else None
    if not callable(make):
        known = [n for n, value in vars(module).items() if callable(value) and value.__module__ == module_name]
        raise UserError(f"{path} has no factory {factory!r}; it has {', '.join(known) or 'none'} (write {path}:NAME)")
    with importing_beside(path):
        net = make() if num_classes is None else make(num_classes=num_classes)
    if not isinstance(net, nn.Module):
        raise UserError(f"the factory {factory!r} of {path} gave a {type(net).__name__}, not an nn.Module")
    return net


_TIMM_SOURCES = ("hf-hub:", "local-dir:")


def _from_timm_source(name: str, pretrained: bool, num_classes: int | None, size: tuple[int, int] | None) -> Built:
    """A network of timm from the hub (``hf-hub:OWNER/NAME``) or from a folder (``local-dir:FOLDER``).

    Its configuration is read in any case, which of the hub is a download.
    """
    import timm

    source, _, place = name.partition(":")
    local = source == "local-dir"
    if local and not (Path(place) / "config.json").is_file():
        raise UserError(f"{place} has no config.json: timm:local-dir:FOLDER reads what timm's save_for_hf wrote")
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    if size is not None and not pretrained:
        options["img_size"] = size
    with (
        contextlib.nullcontext()
        if local
        else downloading(f"timm:{name}", "give the folder of a copy (timm:local-dir:)")
    ):
        try:
            net: Any = timm.create_model(name, pretrained=pretrained, **options)
        except TypeError:  # an architecture that takes any size
            options.pop("img_size", None)
            net = timm.create_model(name, pretrained=pretrained, **options)
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            if not local and isinstance(error, OSError):
                raise
            raise UserError(f"timm:{name} cannot be read: {' '.join(str(error).split())[:100]}") from error
    described = net.pretrained_cfg
    if pretrained and num_classes not in (None, 0, described.get("num_classes")):
        raise UserError(
            f"the weights of timm:{name} have {described.get('num_classes')} classes, not {num_classes}; pass "
            "--checkpoint FILE or --random-weights"
        )
    names = described.get("label_names")
    fits = names is not None and len(names) == net.num_classes
    built = _of_timm(net, name if not local else f"{source}:{Path(place).resolve()}", list(names) if fits else None)
    built.name = f"timm:{name}"
    return built


def _from_timm(name: str, pretrained: bool, num_classes: int | None, size: tuple[int, int] | None) -> Built:
    import timm

    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        hint = nearest(architecture, timm.list_models()) or ["resnet50"]
        raise UserError(f"timm has no model {name!r}; did you mean {', '.join(hint)}?")
    tags = [n.partition(".")[2] for n in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise UserError(f"timm has no weights {tag!r} of {architecture}; it has {', '.join(tags) or 'none'}")
    config = timm.get_pretrained_cfg(name)
    assert config is not None
    if pretrained:
        if not tags:
            raise UserError(f"timm has no published weights of {name}; pass --checkpoint FILE or --random-weights")
        if num_classes not in (None, 0, config.num_classes):
            raise UserError(
                f"the published weights of {name} have {config.num_classes} classes, not {num_classes}; pass "
                "--checkpoint FILE or --random-weights"
            )
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    if size is not None and config.fixed_input_size and size != tuple(config.input_size[1:]):
        options["img_size"] = size
    with downloading(f"timm:{name}") if pretrained else contextlib.nullcontext():
        net = timm.create_model(name, pretrained=pretrained, **options)
    return _of_timm(net, name, None)


def _of_timm(net: Any, name: str, class_names: Sequence[str] | None) -> Built:
    """A network of timm with its preprocessing and, where its number of classes says so, ImageNet's class names."""
    from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_data_config

    data = resolve_data_config({}, model=net)
    channels, *sides = data["input_size"]
    scaled = tuple(math.floor(side / data["crop_pct"]) for side in sides)
    squash = data["crop_mode"] == "squash" or scaled[0] != scaled[1]
    preprocessing = Preprocessing(
        size=tuple(sides),
        resize=scaled if squash else scaled[0],
        interpolation=data["interpolation"],
        mean=data["mean"],
        std=data["std"],
        channels=channels,
    )
    subset = infer_imagenet_subset(net) if net.num_classes and class_names is None else None
    names = list(ImageNetInfo(subset).label_descriptions()) if subset else class_names
    return Built(net, f"timm:{name}", f"timm:{name}", preprocessing, names, subset, seeded=True)


def _from_torchvision(
    name: str, pretrained: bool, num_classes: int | None, size: tuple[int, int] | None, state_names: Collection[str]
) -> Built:
    from torchvision import models

    architecture, _, tag = name.partition(".")
    known = models.list_models(module=models)
    if architecture not in known:
        hint = nearest(architecture, known) or ["resnet50"]
        raise UserError(f"torchvision has no classifier {name!r}; did you mean {', '.join(hint)}?")
    published = models.get_model_weights(architecture)
    if tag and tag not in published.__members__:
        raise UserError(
            f"torchvision has no weights {tag!r} of {architecture}; it has {', '.join(published.__members__)}"
        )
    weights = published[tag] if tag else published.DEFAULT
    categories = weights.meta["categories"]
    classes = num_classes or len(categories)
    options: dict[str, Any] = {"num_classes": classes}
    if pretrained and classes != len(categories):
        raise UserError(
            f"the published weights of {name} have {len(categories)} classes, not {classes}; pass --checkpoint FILE or "
            "--random-weights"
        )
    if size is not None and architecture.startswith("vit_"):
        options["image_size"] = size[0]
    if not pretrained and architecture in ("googlenet", "inception_v3"):
        options["init_weights"] = not state_names
        options["transform_input"] = bool(state_names)
        options["aux_logits"] = any(n.startswith(("aux", "AuxLogits")) for n in state_names)
    with downloading(f"torchvision:{name}") if pretrained else contextlib.nullcontext():
        net = models.get_model(architecture, weights=weights if pretrained else None, progress=False, **options)
    transform = weights.transforms()
    preprocessing = Preprocessing(
        size=transform.crop_size[0],
        resize=transform.resize_size[0],
        interpolation=transform.interpolation.value,
        mean=tuple(transform.mean),
        std=tuple(transform.std),
    )
    own = classes == len(categories) and num_classes != 0  # without a head, it is built with one that is not read
    names, subset = (categories, "imagenet-1k") if own else (None, None)
    return Built(net, f"torchvision:{name}", f"torchvision:{name}", preprocessing, names, subset, seeded=True)

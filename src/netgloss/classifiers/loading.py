"""Classifiers by name, with weights, preprocessing and class names.

``timm:NAME`` (or ``timm:NAME.TAG``), ``torchvision:NAME`` (or ``torchvision:NAME.WEIGHTS``, as in
``resnet50.IMAGENET1K_V1``), ``hf:OWNER/NAME`` or ``hf:/path/to/folder`` (transformers), ``timm:hf-hub:OWNER/NAME``,
``path/to/file.py:factory``, ``critters``, or any ``nn.Module``. Nothing is downloaded unless a timm, torchvision or hub
name comes with neither checkpoint nor ``random_weights`` (of a hub name, the configuration in any case). A checkpoint
is taken to have been trained like the published weights of its name: their preprocessing is used unless stated
otherwise.

Shape letters: B images, C channels, H and W the network's input.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from netgloss.class_names import class_list
from netgloss.classifiers.checkpoints import (
    KEY,
    OtherHeadError,
    checkpoint_file,
    hash_weights,
    load_weights,
    read_weights,
)
from netgloss.classifiers.heads import Outputs, with_logits
from netgloss.classifiers.layouts import KINDS, POOLS, Layout, corner_images, find_layout, keep_layout
from netgloss.classifiers.modules import copied, frozen
from netgloss.classifiers.preprocessing import Preprocessing
from netgloss.classifiers.sources import Built, build
from netgloss.classifiers.taps import find_layer, watched
from netgloss.errors import UserError
from netgloss.trust import check_code

_MOST_CLASSES = 1_000_000


class Classifier:
    """A frozen network in eval mode, with what is needed to feed it and to read its answers.

    Attributes
    ----------
    net : the ``nn.Module``; no parameter requires a gradient.
    name : what it was loaded by; for a module its class.
    preprocessing : from a PIL image to the network's input.
    class_names : one name a logit (``"class 0"`` ... where nobody said).
    checkpoint : file of the weights, or None.
    origin : how to load it again; part of :meth:`spec`.
    notes : what was chosen when the weights were read.
    outputs : the kind of its logits: "multiclass", "multilabel", "binary", or "none" for a network without a head
        (``classifiers/heads.py``).

    Parameters
    ----------
    multi_label : whether an image may have several labels, each decided by the sign of its logit; default: what the
        network's attribute ``multi_label`` says, else no. It is never guessed from the network.
    head : False for a network that gives features and no logits; default: no head if the network's attribute
        ``num_classes`` is 0, as timm has it.
    """

    outputs: Outputs

    def __init__(
        self,
        net: nn.Module,
        *,
        name: str,
        preprocessing: Preprocessing,
        class_names: Sequence[str] | Mapping[Any, Any] | None = None,
        checkpoint: str | None = None,
        imagenet: str | None = None,
        origin: Mapping[str, Any] | None = None,
        multi_label: bool | None = None,
        head: bool | None = None,
    ) -> None:
        self.net = frozen(net)
        self.notes: list[str] = []
        self._checked: set[str] = set()
        self.name = name
        self.preprocessing = preprocessing
        self.checkpoint = checkpoint
        self.imagenet = imagenet
        self.origin = dict(origin or {})
        self.layout, self.prefix_tokens, self.pool = "auto", None, "mean"  # type: tuple[str, int | None, str]
        blank = torch.zeros(2, *self.input_shape, device=self.device)
        if multi_label is None:
            multi_label = getattr(net, "multi_label", False) is True
        if head is None:
            classes = getattr(net, "num_classes", None)
            head = not (isinstance(classes, int) and classes == 0)
        self.net, count, self.outputs = with_logits(self.net, blank, name, multi_label=multi_label, head=head)
        class_names = None if class_names is None else class_list(class_names)
        if class_names is not None and len(class_names) == 1 and count == 2:
            class_names = [f"not {class_names[0]}", class_names[0]]
        if class_names is not None and len(class_names) != count:
            raise UserError(f"{name} has {count or 'no'} logits but {len(class_names)} class names were given")
        self.class_names = (
            [f"class {i}" for i in range(count)] if class_names is None else [str(n) for n in class_names]
        )

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one input."""
        return self.preprocessing.input_shape

    @property
    def device(self) -> torch.device:
        tensors = (*self.net.parameters(), *self.net.buffers())
        return tensors[0].device if tensors else torch.device("cpu")

    @cached_property
    def weights_hash(self) -> str:
        """sha256 (hex) over names, dtypes, shapes and bytes of the state dict."""
        return hash_weights(self.net)

    @cached_property
    def wnids(self) -> list[str] | None:
        """The WordNet id of each class, for heads of ImageNet."""
        return imagenet_wnids(self.imagenet)

    def __call__(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of normalised images (B, C, H, W); differentiable in the images."""
        return self.net(images)

    def to(self, device: str | torch.device) -> Classifier:
        """Moves the network and returns the classifier."""
        self.net.to(device)
        return self

    def check_layer(self, name: str) -> str:
        """``name``, if it is a layer that can be read; its layout is found and kept on the layer.

        Raises
        ------
        UserError : no such layer (the nearest names are given), one that never runs, or one whose output is neither
            vectors, maps nor tokens.
        """
        module = find_layer(self.net, name)
        if name not in self._checked:
            outputs: list[Any] = []

            def see(_: str, ran: nn.Module, output: Any) -> None:
                if ran is module:
                    outputs.append(output)

            with torch.no_grad(), watched(self.net, see):
                self.net(corner_images(self))
            if len({output.ndim for output in outputs if isinstance(output, Tensor)}) > 1:
                raise UserError(f"layer {name!r} runs several times with outputs of different forms; choose another")
            if outputs:  # a layer that never runs is refused where it is read
                keep_layout(module, self.find_layout(name, outputs[-1]))
            self._checked.add(name)
        return name

    def find_layout(self, name: str, output: Any) -> Layout:
        """The layout of a layer's output for ``corner_images``."""
        square = self.input_shape[1] == self.input_shape[2]
        asked: dict[str, Any] = {"layout": self.layout, "prefix_tokens": self.prefix_tokens, "pool": self.pool}
        return find_layout(output, name, self.net, square=square, **asked)

    def untrained(self, seed: int) -> Classifier:
        """The same architecture with all weights reinitialised, as a control. The same on every device."""
        return Classifier(
            reinitialised(self.net, seed=seed).to(self.device),
            name=f"{self.name} (untrained)",
            preprocessing=self.preprocessing,
            class_names=self.class_names,
            imagenet=self.imagenet,
            origin={**self.origin, "checkpoint": None, "random_weights": True, "untrained": seed},
            multi_label=self.outputs == "multilabel",
            head=self.outputs != "none",
        ).with_layout(self.layout, self.prefix_tokens, self.pool)

    def with_layout(self, layout: str = "auto", prefix_tokens: int | None = None, pool: str = "mean") -> Classifier:
        """States the layout of layers where it cannot be seen, and how tokens are read; returns the classifier.

        Parameters
        ----------
        layout : of outputs with four axes: "auto", "nchw" or "nhwc".
        prefix_tokens : tokens before the patches (class token, registers); None finds them.
        pool : "mean" reads the patches of token layers as a map, whose mean methods of pooled vectors take; "cls" reads
            their class token as a vector.
        """
        if layout not in KINDS:
            raise UserError(f"unknown layout {layout!r}; choose from {', '.join(KINDS)}")
        if prefix_tokens is not None and prefix_tokens < 0:
            raise UserError(f"prefix_tokens must not be negative, got {prefix_tokens}")
        if pool not in POOLS:
            raise UserError(f"unknown pool {pool!r}; choose from {', '.join(POOLS)}")
        self.layout, self.prefix_tokens, self.pool = layout, prefix_tokens, pool
        self._checked.clear()
        return self

    def with_labels(self, multi_label: bool) -> Classifier:
        """States whether an image may have several labels; returns the classifier. Binary and headless ones stay so."""
        if self.outputs not in ("binary", "none"):
            self.outputs = "multilabel" if multi_label else "multiclass"
        return self

    def require_head(self, what: str) -> None:
        """UserError for a network without a head; ``what`` needs its logits."""
        if self.outputs == "none":
            raise UserError(f"{what} needs the network's logits, and {self.name} has no head (num_classes=0)")

    def spec(self) -> dict[str, Any]:
        """A JSON-able description from which :func:`load_from_spec` loads the classifier again."""
        return {
            **self.origin,
            "preprocessing": self.preprocessing.to_dict(),
            "class_names": list(self.class_names),
            "imagenet": self.imagenet,
            "weights_hash": self.weights_hash,
            **({"multi_label": True} if self.outputs == "multilabel" else {}),
            **({"layout": self.layout} if self.layout != "auto" else {}),
            **({} if self.prefix_tokens is None else {"prefix_tokens": self.prefix_tokens}),
            **({"pool": self.pool} if self.pool != "mean" else {}),
        }

    def __repr__(self) -> str:
        size = " x ".join(map(str, self.input_shape))
        return f"Classifier({self.name!r}, input {size}, {self.num_classes} classes, on {self.device})"


def imagenet_wnids(imagenet: str | None) -> list[str] | None:
    """The WordNet id of each class of one of timm's ImageNet sets (``Classifier.imagenet``); None for None."""
    if imagenet is None:
        return None
    from timm.data import ImageNetInfo

    try:
        return ImageNetInfo(imagenet).label_names()
    except (AssertionError, KeyError, OSError) as error:
        raise UserError(f"timm knows no ImageNet set {imagenet!r}") from error


def imagenet_names(imagenet: str) -> list[str]:
    """The description of each class of one of timm's ImageNet sets."""
    from timm.data import ImageNetInfo

    return list(ImageNetInfo(imagenet).label_descriptions())


def load_classifier(
    name_or_module: str | nn.Module,
    *,
    checkpoint: str | Path | None = None,
    random_weights: bool = False,
    num_classes: int | None = None,
    class_names: Sequence[str] | Mapping[Any, Any] | str | Path | None = None,
    preprocessing: Preprocessing | Mapping[str, Any] | None = None,
    input_size: int | tuple[int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
) -> Classifier:
    """Loads a classifier.

    Parameters
    ----------
    name_or_module : ``timm:NAME``, ``torchvision:NAME``, ``hf:NAME``, ``path/to/file.py:factory``, ``critters``, or a
        module, which is copied (yours stays as it is).
    checkpoint : .safetensors file, or a PyTorch state dict, read with ``weights_only=True``; nothing is downloaded
        then. ``FILE::KEY`` names one of several state dicts in it; by default a moving average is taken before the
        weights that it averages. A head of another size than the name's is built as the file has it.
    random_weights : draw the weights with ``seed`` instead; nothing is downloaded either.
    num_classes : handed to timm, torchvision or the factory. 0 leaves the head out, of any network: its layers are
        explained without logits.
    class_names : the names in order, a dict {index: name} or {name: index} in any order, a text file with one per line,
        a .json file of such a list or dict, or ``"imagenet"`` (names and WordNet ids of ImageNet-1k).
    preprocessing : the whole description, or a mapping that changes fields of the network's own. Modules and
        factories say theirs in an attribute ``preprocessing_spec`` (a dict of its fields), their classes in
        ``class_names``, and that an image may have several labels in ``multi_label`` (or say so afterwards, by
        :meth:`Classifier.with_labels`).
    input_size, mean, std : change these fields only; the resize follows the size.

    Raises
    ------
    UserError
        For anything that does not fit, in one line.
    """
    if checkpoint is not None and random_weights:
        raise UserError(f"checkpoint {checkpoint} and random_weights exclude each other")
    if num_classes is not None and not 0 <= num_classes <= _MOST_CLASSES:
        raise UserError(f"num_classes must be between 0 and {_MOST_CLASSES}, got {num_classes}")
    if not 0 <= seed < 2**63:
        raise UserError(f"seed must be between 0 and 2^63, got {seed}")
    if isinstance(preprocessing, Preprocessing):
        changes: dict[str, Any] = preprocessing.to_dict()
    else:
        changes = dict(preprocessing or {})
    changes |= {k: v for k, v in {"size": input_size, "mean": mean, "std": std}.items() if v is not None}
    state, notes = (None, []) if checkpoint is None else read_weights(checkpoint)

    def make(classes: int | None) -> Built:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return build(
                name_or_module,
                pretrained=state is None and not random_weights,
                num_classes=classes,
                size=None if changes.get("size") is None else Preprocessing(size=changes["size"]).size,
                state_names=state or (),
            )

    built = make(num_classes)
    net = built.net
    if state is not None:
        assert checkpoint is not None
        try:
            notes += load_weights(net, state, source=checkpoint)
        except OtherHeadError as other:
            if num_classes is not None or not built.origin.startswith(("timm:", "torchvision:")):
                raise
            num_classes = other.num_classes
            built = make(num_classes)
            net = built.net
            notes += load_weights(net, state, source=checkpoint)
            notes.append(f"the head has {other.num_classes} classes, as in {checkpoint_file(checkpoint)[0].name}")
    elif random_weights and not built.seeded:
        net = reinitialised(net, seed=seed)
    imagenet = str(class_names) == "imagenet" and not Path("imagenet").exists()
    if imagenet:
        names: Any = imagenet_names("imagenet-1k")
    else:
        names = _read_names(class_names) if isinstance(class_names, (str, Path)) else class_names
    if checkpoint is not None:
        file, key = checkpoint_file(checkpoint)
        checkpoint = f"{file.resolve()}{KEY}{key}" if key else str(file.resolve())
    classifier = Classifier(
        net,
        name=built.name,
        preprocessing=_preprocessing(built, changes),
        class_names=built.class_names if names is None else names,
        checkpoint=checkpoint,
        imagenet="imagenet-1k" if imagenet else built.imagenet if names is None else None,
        origin={
            "name": built.origin,
            "checkpoint": checkpoint,
            "random_weights": random_weights,
            "num_classes": num_classes,
            "seed": seed,
        },
        head=False if num_classes == 0 else None,
    )
    classifier.notes += notes
    return classifier


def load_from_spec(
    spec: Mapping[str, Any], *, checkpoint: str | Path | None = None, net: nn.Module | None = None
) -> Classifier:
    """The classifier that :meth:`Classifier.spec` described; its weights must be the same.

    Parameters
    ----------
    checkpoint : where the weights are now, if not where they were.
    net : the module, for classifiers that were given as one.

    Raises
    ------
    UserError
        If the weights differ from those described, or something is missing.
    """
    spec = _checked_spec(spec)
    name = spec["name"]
    check_code(name, "what describes the network")
    if net is None and name.startswith("module:"):
        raise UserError(
            f"the classifier {name.removeprefix('module:')!r} was given as a module: pass it again, as in "
            "netgloss.load(folder, classifier=...)"
        )
    moved = checkpoint or spec["checkpoint"]
    if moved is not None and not checkpoint_file(moved)[0].exists():
        raise UserError(
            f"the checkpoint {moved} of {name} is not there any more: say where it is with --checkpoint FILE "
            "(netgloss.load(folder, checkpoint=...))"
        )
    classifier = load_classifier(
        name if net is None else net,
        checkpoint=moved,
        random_weights=spec["random_weights"],
        num_classes=spec["num_classes"],
        class_names=spec["class_names"],
        preprocessing=Preprocessing.from_dict(spec["preprocessing"]),
        seed=spec["seed"],
    )
    asked = spec.get("layout", "auto"), spec.get("prefix_tokens"), spec.get("pool", "mean")
    classifier = classifier.with_layout(*asked)
    classifier = classifier.with_labels(spec.get("multi_label", False))
    if spec.get("untrained") is not None:
        classifier = classifier.untrained(spec["untrained"])
    classifier.imagenet = spec["imagenet"]
    if classifier.weights_hash != spec["weights_hash"]:
        raise UserError(
            f"the weights of {name} are not those described (sha256 {classifier.weights_hash[:12]}... instead of "
            f"{spec['weights_hash'][:12]}...)"
        )
    return classifier


def _checked_spec(spec: Any) -> dict[str, Any]:
    """``spec`` if its fields are of the right kinds: it may come from anybody's folder."""
    kinds: dict[str, Any] = {
        "name": str,
        "checkpoint": (str, type(None)),
        "random_weights": bool,
        "num_classes": (int, type(None)),
        "class_names": list,
        "preprocessing": dict,
        "seed": int,
        "imagenet": (str, type(None)),
        "weights_hash": str,
    }
    if not isinstance(spec, Mapping):
        raise UserError(f"a network is described by a record, not by a {type(spec).__name__}")
    given = {"layout": "auto", "prefix_tokens": None, "multi_label": False, "pool": "mean", **spec}
    kinds |= {"layout": str, "prefix_tokens": (int, type(None)), "multi_label": bool, "pool": str}
    wrong = [name for name, kind in kinds.items() if name not in given or not isinstance(given[name], kind)]
    if wrong:
        raise UserError(f"the description of the network is damaged: {', '.join(wrong)} missing or of the wrong kind")
    return dict(spec)


def reinitialised(net: nn.Module, *, seed: int) -> nn.Module:
    """A copy on the CPU with every weight reinitialised: ``reset_parameters`` where a module has it, else N(0,
    0.02^2).
    """
    net = copied(net).cpu()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        for module in net.modules():
            reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
            if callable(reset):
                reset()
            else:
                for parameter in module.parameters(recurse=False):
                    parameter.normal_(0, 0.02)
    return net


def _preprocessing(built: Built, changes: Mapping[str, Any]) -> Preprocessing:
    if built.preprocessing is not None:
        return built.preprocessing.with_options(**changes)
    missing = [name for name in ("size", "mean", "std") if name not in changes]
    if missing:
        flags = ", ".join({"size": "input_size"}.get(name, name) for name in missing)
        raise UserError(
            f"{built.name} does not say how images are prepared for it; pass {flags}, or give the module an attribute "
            "preprocessing_spec"
        )
    return Preprocessing.from_dict({"resize": changes["size"], "channels": len(changes["mean"]), **changes})


def _read_names(path: str | Path) -> list[str]:
    if Path(path).suffix.lower() == ".json" and Path(path).is_file():
        try:
            return class_list(json.loads(Path(path).read_bytes()))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise UserError(f"class names {path} cannot be read as a JSON list or dict ({error})") from error
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise OSError("it is not a regular file")
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"class names {path} cannot be read as a text file with one name a line ({error})") from error
    return [line.strip() for line in lines if line.strip()]

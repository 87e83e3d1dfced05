"""Image classifiers of Hugging Face's transformers, ``hf:OWNER/NAME`` or ``hf:/path/to/folder``.

A folder is what ``save_pretrained`` writes: config.json, model.safetensors and preprocessor_config.json. It is read
without a network. A hub id is downloaded, as it was named for that. Code that comes with a model is never run.

The configuration says whether the network is a classifier, how many classes there are and what they are called, and
whether an image may have several labels (``problem_type``). The image processor says how images are prepared: with
pixels v in 0..255, its rescaling ``v f - o`` and normalisation ``(. - m) / s`` are those of pixels ``p = v / 255`` with
mean ``(m + o) / (255 f)`` and standard deviation ``s / (255 f)``.
"""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from netgloss.classifiers.downloads import beginning, downloading
from netgloss.classifiers.preprocessing import Preprocessing
from netgloss.errors import UserError

if TYPE_CHECKING:
    from torch import nn

_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
"""Pillow's numbers of interpolations, as image processors give them."""
_PATH_STARTS = ("/", "./", "../", "~", ".\\", "..\\")


class HuggingFaceNetwork:
    """A network with what its folder says of it; read by :func:`~netgloss.classifiers.sources.build`.

    Parameters
    ----------
    name : hub id or folder. pretrained : with its weights; else they are random, and only the configuration is read.
    num_classes : None or 0 (no head), or another number for random weights and checkpoints.
    size : (H, W) of the input for random weights, where the architecture fixes it.

    Attributes
    ----------
    net, preprocessing, class_names : as in ``sources.Built``. origin : name without ``hf:``, absolute for folders.

    Raises
    ------
    UserError : transformers is not installed; no such folder, or it cannot be read or downloaded; no image classifier.
    """

    def __init__(
        self, name: str, *, pretrained: bool, num_classes: int | None = None, size: tuple[int, int] | None = None
    ) -> None:
        transformers = _transformers()
        path = Path(name).expanduser()
        self.local = path.is_dir() or name.startswith(_PATH_STARTS)
        self.origin = str(path.resolve()) if self.local else name
        if self.local:
            _check_folder(path)
        where: dict[str, Any] = {"local_files_only": self.local, "trust_remote_code": False}
        advice = "give the folder of a copy (hf:/path/to/folder)"
        fetching = contextlib.nullcontext() if self.local else downloading(f"hf:{name}", advice)
        with _quiet(transformers), fetching, self._readable(name):
            config = transformers.AutoConfig.from_pretrained(self.origin, **where)
            self.headless = not _is_classifier(config) and (pretrained or not num_classes)
            changes = _changes(name, config, pretrained=pretrained, num_classes=num_classes, size=size)
            for key, value in changes.items():
                setattr(config, key, value)
            made = transformers.AutoModel if self.headless else transformers.AutoModelForImageClassification
            if pretrained:
                net, found = made.from_pretrained(self.origin, config=config, output_loading_info=True, **where)
            else:
                net, found = made.from_config(config, trust_remote_code=False), {}
            self.preprocessing = _preprocessing(transformers, self.origin, config, where)
        missing = sorted(found.get("missing_keys", ()))
        if missing and not self.headless and num_classes != 0:
            raise UserError(
                f"the weights of hf:{name} lack {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}: they are "
                "not those of an image classifier; --num-classes 0 does not read them, --checkpoint FILE gives others"
            )
        if self.headless:
            net.num_classes = 0
        net.multi_label = getattr(config, "problem_type", None) == "multi_label_classification"
        self.net: nn.Module = net
        self.class_names = None if self.headless or num_classes == 0 else _class_names(config)

    @contextlib.contextmanager
    def _readable(self, name: str) -> Iterator[None]:
        """What transformers raises inside, in one line; downloads report by themselves."""
        try:
            yield
        except UserError:
            raise
        except (OSError, RuntimeError) as error:
            if not self.local:
                raise
            raise UserError(f"hf:{name} cannot be read: {beginning(error)}") from error
        except (ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
            raise UserError(f"hf:{name} is no image classifier of transformers: {beginning(error)}") from error


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise UserError(
            f"hf:NAME needs the package transformers: pip install 'netgloss[hf]' ({beginning(error)})"
        ) from error


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Transformers reports nothing and shows no bars inside: what matters is an error."""
    logging = transformers.utils.logging
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def _check_folder(path: Path) -> None:
    """UserError unless a folder holds a model of transformers."""
    if not path.is_dir():
        raise UserError(f"no such folder: {path} (hf:FOLDER reads what save_pretrained wrote)")
    if not (path / "config.json").is_file():
        raise UserError(f"{path} has no config.json: hf:FOLDER reads what save_pretrained wrote")
    try:
        config = json.loads((path / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path / 'config.json'} cannot be read ({beginning(error)})") from error
    if isinstance(config, dict) and "architecture" in config and "model_type" not in config:
        raise UserError(f"{path} holds a network of timm: say timm:local-dir:{path}")


def _is_classifier(config: Any) -> bool:
    """Whether the saved network has a head for image classes; one whose architecture is not said is taken to."""
    names = getattr(config, "architectures", None) or ["ForImageClassification"]
    return any("ImageClassification" in name for name in names)


def _changes(
    name: str, config: Any, *, pretrained: bool, num_classes: int | None, size: tuple[int, int] | None
) -> dict[str, Any]:
    """Fields of the configuration that the user's wishes change."""
    changes: dict[str, Any] = {}
    if getattr(config, "problem_type", None) == "regression":
        raise UserError(f"hf:{name} predicts numbers (problem_type regression), not classes")
    if num_classes and num_classes != config.num_labels:
        if pretrained:
            raise UserError(
                f"the weights of hf:{name} have {config.num_labels} classes, not {num_classes}; pass --checkpoint FILE "
                "or --random-weights"
            )
        changes["num_labels"] = num_classes
    if size is not None and not pretrained and isinstance(getattr(config, "image_size", None), int):
        changes["image_size"] = size[0]
    return changes


def _class_names(config: Any) -> list[str] | None:
    """``id2label`` in order, or None where it only counts."""
    names = {int(place): str(text) for place, text in (getattr(config, "id2label", None) or {}).items()}
    if sorted(names) != list(range(config.num_labels)):
        return None
    texts = [names[place] for place in range(config.num_labels)]
    return None if texts == [f"LABEL_{place}" for place in range(config.num_labels)] else texts


def _preprocessing(transformers: Any, origin: str, config: Any, where: Mapping[str, Any]) -> Preprocessing | None:
    """What the image processor does; None where there is none, or one that says nothing of images."""
    if where["local_files_only"] and not (Path(origin) / "preprocessor_config.json").is_file():
        return None
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(origin, **where)
    except (OSError, ValueError):
        return None
    return read_processor(processor.to_dict(), image_size=getattr(config, "image_size", None))


def read_processor(spec: Mapping[str, Any], *, image_size: Any = None) -> Preprocessing:
    """The preprocessing that a description of an image processor means.

    Parameters
    ----------
    spec : the fields of preprocessor_config.json. image_size : of the network's configuration, where ``spec`` names no
        size.

    Raises
    ------
    UserError : it does something that has no place here (another order of the colours), or names no size.
    """
    if spec.get("do_flip_channel_order"):
        raise UserError(
            "the image processor swaps the colours (do_flip_channel_order), which netgloss does not; give the same "
            "network by timm:NAME, or wrap it in a module of a .py file"
        )
    resize, crop = _sides(spec.get("size")), _sides(spec.get("crop_size"))
    if not spec.get("do_resize", True):
        resize = None
    ratio = spec.get("crop_pct")
    if isinstance(resize, int) and ratio:  # ConvNeXt: a share of a larger image is cropped, from 384 pixels on none
        size: Any = (resize, resize)
        resize = int(resize / ratio) if resize < 384 else size
    elif spec.get("do_center_crop") and crop is not None:
        size = crop
    else:
        size = resize if resize is not None else _sides(image_size)
    if size is None:
        raise UserError("the image processor names no size: pass --input-size (input_size=)")
    factor = 255 * float(spec.get("rescale_factor", 1 / 255)) if spec.get("do_rescale", True) else 255.0
    offset = 1.0 if spec.get("rescale_offset") and spec.get("do_rescale", True) else 0.0
    means, deviations = spec.get("image_mean"), spec.get("image_std")
    if not spec.get("do_normalize", True) or means is None or deviations is None:
        means, deviations = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    squared = bool(spec.get("include_top")) and spec.get("do_normalize", True)  # EfficientNet divides once more
    return Preprocessing(
        size=size,
        resize=resize,
        interpolation=_RESAMPLE.get(spec.get("resample", 2), "bilinear"),
        mean=tuple((float(m) + offset) / factor for m in means),
        std=tuple((float(s) ** 2 if squared else float(s)) / factor for s in deviations),
        channels=len(means),
    )


def _sides(size: Any) -> int | tuple[int, int] | None:
    """The shorter side, or (H, W), of a size as image processors give it; None for none."""
    if isinstance(size, Mapping):
        if size.get("height") and size.get("width"):
            return int(size["height"]), int(size["width"])
        return int(size["shortest_edge"]) if size.get("shortest_edge") else None
    if isinstance(size, (tuple, list)) and len(size) == 2:
        return int(size[0]), int(size[1])
    return int(size) if isinstance(size, (int, float)) else None

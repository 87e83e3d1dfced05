"""What a fit reads: the stream of a layer, with whatever of the network around it the method asks for.

A method says by ``needs`` which fields of a training batch it wants. Most want activations only, and then neither the
images nor the network are touched; the others get the layers above, the images, or differentiable paths to the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from netgloss.activations import Store
from netgloss.activations.layer import check_origin, class_labels, make_tail, tail_for
from netgloss.classifiers import imagenet_wnids, later_layers, section_of
from netgloss.errors import UserError
from netgloss.explainers.base import Explainer, ExplainerConfig
from netgloss.training import ActivationStream, Surroundings

if TYPE_CHECKING:
    from netgloss.classifiers import Classifier
    from netgloss.data import ImageSource

OWN_ANNOTATIONS = "own"
"""The annotations that a source of scenes (critters) brings along."""


def upper_layers(cls: type[Explainer], config: ExplainerConfig, classifier: Classifier, layer: str) -> tuple[str, ...]:
    """The layers above ``layer`` that a method rebuilds, so that they are captured with it."""
    if "upper" not in cls.needs(config):
        return ()
    later = later_layers(classifier, layer, input_shape=classifier.input_shape)
    learned = {name for name in later if any(True for _ in classifier.net.get_submodule(name).parameters())}
    return tuple(cls.upper_layers(config, later, learned=learned))


def open_stream(
    cls: type[Explainer],
    config: ExplainerConfig,
    store: Store,
    layer: str,
    images: np.ndarray,
    *,
    classifier: Callable[[], Classifier],
    source: ImageSource | None,
    labels: np.ndarray | None = None,
) -> ActivationStream:
    """The training stream of ``layer`` over ``images`` of a store.

    Parameters
    ----------
    classifier : gives the network, on the device of the fit; called only if the method needs it.
    source : the images of the store; needed by methods that learn from them.
    labels : (N,) the classifier's class of every image of the store, -1 for unknown; default as the store says.

    Raises
    ------
    UserError
        If the method needs images that were not given, or layers that the store does not hold.
    """
    needs = cls.needs(config)
    if needs and labels is None:
        model = store.info.model
        labels = class_labels(store, model.get("class_names", []), imagenet_wnids(model.get("imagenet")) or [])
    around = Surroundings()
    if {"upper", "image", "tail", "to_logits", "to_code", "section"} & set(needs):
        around = _surroundings(cls, config, store, layer, classifier(), source)
    stream = ActivationStream(store, layer, images, reads=cls.reads, labels=labels, around=around)
    if "masks" in needs:
        _add_masks(stream, config, classifier(), source)
    return stream


def _add_masks(stream: ActivationStream, config: Any, classifier: Classifier, source: ImageSource | None) -> None:
    """Lets the rows report which annotated labels they show: ``labelled`` and ``mask_labels``."""
    from netgloss.activations.annotated import MaskedLayer
    from netgloss.data import open_images

    if source is None:
        raise UserError(f"annotations belong to images: give those of {stream.store.path} again by --images")
    check_origin(stream.store, source=source)
    if config.annotations != OWN_ANNOTATIONS:
        source = open_images(source, annotations=config.annotations)
    data = MaskedLayer(stream.store, stream.layer, source, classifier.preprocessing, labels=config.labels or None)
    annotated = np.intersect1d(stream.images, data.images)
    if not len(annotated):
        raise UserError(f"none of the {len(stream.images)} images of the fit has an annotation")
    stream.labelled = lambda: data.rows(annotated)
    stream.mask_labels = data.vocabulary.labels


def _surroundings(
    cls: type[Explainer],
    config: ExplainerConfig,
    store: Store,
    layer: str,
    classifier: Classifier,
    source: ImageSource | None,
) -> Surroundings:
    needs = cls.needs(config)
    upper = upper_layers(cls, config, classifier, layer)
    missing = [name for name in upper if name not in store.layers]
    if missing:
        raise UserError(
            f"{cls.__name__} rebuilds {', '.join(upper)} from {layer!r}, but {store.path} holds only "
            f"{', '.join(store.layers)}: capture {' and '.join(missing)} too"
        )
    pixels = None
    image: tuple[int, ...] = ()
    if "image" in needs:
        if source is None:
            raise UserError(f"{cls.__name__} learns from the images of {store.path}: give them again by --images")
        check_origin(store, source=source)
        size = cls.image_size(config, classifier.input_shape)
        image = (classifier.input_shape[0], *size)
        pixels = pixel_reader(classifier, source, size)
    tail = None
    if "tail" in needs:
        way_on = make_tail(classifier, layer, source)
        tail = lambda index: tail_for(way_on, classifier, source, index)  # noqa: E731
    to_logits = logits_of_images(classifier) if "to_logits" in needs else None
    to_code = code_of_images(classifier, layer) if "to_code" in needs else None
    section = (lambda: section_of(classifier, layer, upper)) if "section" in needs else None
    return Surroundings(
        upper=upper, pixels=pixels, image=image, tail=tail, to_logits=to_logits, to_code=to_code, section=section
    )


def pixel_reader(classifier: Classifier, source: ImageSource, size: tuple[int, int]) -> Callable[[np.ndarray], Tensor]:
    """Images of ``source`` as the network sees them (its resize and crop), at ``size`` (S, S'): uint8 (n, m, S, S').

    Smaller sizes are averaged down (bilinear with anti-aliasing) from the network's input.
    """

    def read(index: np.ndarray) -> Tensor:
        if not len(index):
            return torch.empty(0, classifier.input_shape[0], *size, dtype=torch.uint8)
        pictures = []
        for i in index.tolist():
            picture = classifier.preprocessing.bytes(source.image(i))[None]
            if tuple(picture.shape[2:]) != tuple(size):
                resized = interpolate(picture.float(), size, mode="bilinear", antialias=True)
                picture = resized.round_().clamp_(0, 255).to(torch.uint8)
            pictures.append(picture)
        return torch.cat(pictures)

    return read


def logits_of_images(classifier: Classifier) -> Callable[[Tensor], Tensor]:
    """Differentiable logits of images (B, m, S, S') in [0, 1]: clipped, resized to the network's input, normalised."""
    return lambda images: classifier.net(_network_input(classifier, images))


def code_of_images(classifier: Classifier, layer: str) -> Callable[[Tensor], Tensor]:
    """Differentiable activations of ``layer``, of images as :func:`logits_of_images` takes them."""
    from netgloss.classifiers import Taps

    def to_code(images: Tensor) -> Tensor:
        with Taps(classifier.net, layer) as taps:
            return taps(_network_input(classifier, images))[layer]

    return to_code


def _network_input(classifier: Classifier, images: Tensor) -> Tensor:
    size = classifier.input_shape[1:]
    images = images.clamp(0, 1)
    if tuple(images.shape[2:]) != tuple(size):
        images = interpolate(images, size, mode="bilinear", antialias=True)
    return classifier.preprocessing.normalise(images)

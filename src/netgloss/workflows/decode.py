"""A run's concepts decoded by the decoder of another run on the same layer, into its galleries.

For each concept: its strongest held-out images decoded as they are and with the concept removed, the mean activation
without and with the concept, and ``visibility`` with its random control (see
:mod:`netgloss.explanations.decoded_concepts`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from netgloss.activations.layer import Layer, check_origin, make_tail, split_store
from netgloss.errors import UserError
from netgloss.evaluation.decoded import Pictures, caption
from netgloss.explainers.cladec import ClaDec
from netgloss.explanations.decoded_concepts import ConceptDecoder, Manifold, Visibility, spatial_mean, visibility
from netgloss.figures.decoded import ConceptPictures, concept_strip
from netgloss.figures.style import number
from netgloss.progress import Progress, Silent

if TYPE_CHECKING:
    from PIL.Image import Image

    from netgloss.activations import Store
    from netgloss.classifiers import Classifier
    from netgloss.data import ImageSource
    from netgloss.runs.run import Run

_IMAGES = 16
_DRAWN = 3
_STRIPS = 4
_TRAIN = 2000


@torch.no_grad()
def decode(
    run: Run,
    decoder_run: Run,
    *,
    store: Store,
    source: ImageSource | None,
    classifier: Classifier,
    progress: Progress | None = None,
) -> None:
    """Adds ``decoded`` to every concept of ``concepts.json``: files, visibility with interval, and a note.

    Raises
    ------
    UserError : ``decoder_run`` is no decoder, or of another layer or network; the run was not evaluated; store, network
        or images are not the run's.
    """
    progress = progress or Silent()
    decoder, explainer = decoder_run.explainer, run.explainer
    _check(run, decoder_run, decoder)
    run.check_store(store)
    check_origin(store, classifier=classifier, source=source)
    assert isinstance(decoder, ClaDec)
    decoder, explainer = decoder.to(classifier.device), explainer.to(classifier.device)
    fit_images, heldout = split_store(store)
    heldout = heldout if len(heldout) else fit_images
    tail = make_tail(classifier, run.layer, source)
    layer = Layer(store, run.layer, tail, classifier, source)
    seeing = ConceptDecoder(decoder, explainer, decoder.mean_activation, nonnegative=store.is_nonnegative(run.layer))
    content = run.concepts
    strongest, plain = _strongest(explainer, layer, heldout)
    manifold = Manifold(_means(layer, fit_images[:: max(1, len(fit_images) // _TRAIN)]), plain)
    pictures = None if source is None else Pictures.of(decoder, classifier, source)
    important = sorted(range(explainer.num_concepts), key=lambda k: -(content["concepts"][k]["importance"] or 0))
    strips = []
    progress.start("decode concepts", explainer.num_concepts, unit="concepts")
    for k in range(explainer.num_concepts):
        images = np.sort(strongest[:, k])
        (batch,) = layer.batches(images, batch_size=len(images))
        seen = visibility(seeing, batch.activation, [k], tail=batch.tail, manifold=manifold)
        drawn = np.searchsorted(images, strongest[:_DRAWN, k])
        shown = batch.activation[drawn]
        removed, alone = seeing.remove(shown, [k]).activation, seeing.alone(shown, [k]).activation
        mean = seeing.mean_activation.to(shown).expand_as(shown)
        files = {"removed": f"decoded-{k:04d}-removed.jpg", "alone": f"decoded-{k:04d}-alone.jpg"}
        run.write_image(files["removed"], _two_rows(decoder(shown), decoder(removed)))
        run.write_image(files["alone"], _two_rows(decoder(mean), decoder(alone)))
        content["concepts"][k]["decoded"] = {
            **{name: f"images/{file}" for name, file in files.items()},
            "visibility": seen.value,
            "low": seen.low,
            "high": seen.high,
            "logit_change": seen.logit,
            "logit_change_random": seen.logit_random,
            "note": _note(seen),
        }
        if k in important[:_STRIPS] and pictures is not None:
            changes = _logit_changes(batch.tail, batch.activation, seeing.remove(batch.activation, [k]).activation)
            rows = _rows(seeing, decoder, pictures.read(images[drawn]), shown, k, manifold, [changes[i] for i in drawn])
            name = content["concepts"][k]["name"]
            figure = concept_strip(
                rows,
                visibility=f"visibility {number(seen.value)} ({number(seen.low)}..{number(seen.high)}): {_note(seen)}",
                title=f"{name} of {run.method}, decoded from {caption(decoder, decoder_run.seeds[0])}",
            )
            strips.append((f"concept-{k:04d}", figure, f"{name}: taken out, and alone, at its strongest images."))
        progress.advance()
    progress.finish()
    run.write_concepts(content)
    run.write_figures(strips)
    run.update(decoder=str(decoder_run.path))


def _check(run: Run, decoder_run: Run, decoder: Any) -> None:
    if not isinstance(decoder, ClaDec):
        raise UserError(
            f"{decoder_run.path} holds {decoder_run.method}, not a decoder: make one by netgloss explain cladec"
        )
    if decoder_run.layer != run.layer:
        raise UserError(f"the decoder is of layer {decoder_run.layer!r}, the run of {run.layer!r}")
    one, other = (r.manifest["model"].get("weights_hash") for r in (run, decoder_run))
    if one != other:
        raise UserError(f"{decoder_run.path} decodes another network than that of {run.path}")
    if not (run.path / "concepts.json").exists():
        raise UserError(f"{run.path} was not evaluated yet: run netgloss evaluate on it first")


def _strongest(explainer: Any, layer: Layer, images: np.ndarray) -> tuple[np.ndarray, Tensor]:
    """Store indices (T, K) of each concept's strongest images, and the spatial means (N, C) of all of them."""
    peaks, means = [], []
    for batch in layer.batches(images):
        codes = explainer.encode(batch.activation)
        peaks.append(codes.flatten(2).amax(dim=2) if codes.ndim == 4 else codes)
        means.append(spatial_mean(batch.activation))
    best = torch.cat(peaks).topk(min(_IMAGES, len(images)), dim=0).indices.cpu().numpy()
    return images[best], torch.cat(means)


def _means(layer: Layer, images: np.ndarray) -> Tensor:
    return torch.cat([spatial_mean(batch.activation) for batch in layer.batches(images)])


def _rows(
    seeing: ConceptDecoder,
    decoder: ClaDec,
    image: Tensor,
    activation: Tensor,
    k: int,
    manifold: Manifold,
    changes: list[float],
) -> list[ConceptPictures]:
    removed = seeing.remove(activation, [k]).activation
    whole = {
        "image": image,
        "decoded": decoder(activation),
        "kept": seeing.kept(activation),
        "removed": decoder(removed),
        "alone": decoder(seeing.alone(activation, [k]).activation),
    }
    outside = manifold.is_outside(removed).tolist()
    return [
        ConceptPictures(
            **{name: value[i].cpu().numpy() for name, value in whole.items()},
            logit_change=changes[i],
            notes=["off manifold"] if outside[i] else [],
        )
        for i in range(len(image))
    ]


def _logit_changes(tail: Any, activation: Tensor, edited: Tensor) -> list[float]:
    before, after = tail(activation), tail(edited)
    predicted = before.argmax(dim=1, keepdim=True)
    return (after.gather(1, predicted) - before.gather(1, predicted))[:, 0].tolist()


def _note(seen: Visibility) -> str:
    if not np.isfinite(seen.value):
        return "nothing changes when it is removed from these images"
    parts = [
        "changes the picture more than random edits of its size"
        if seen.is_evidence
        else "no evidence: not more visible than random edits of its size"
    ]
    if seen.off_manifold >= 0.5:
        parts.append(f"off manifold in {100 * seen.off_manifold:.0f} % of the images")
    if seen.clamped >= 0.1:
        parts.append(f"{100 * seen.clamped:.0f} % of the edit was clamped at 0")
    return "; ".join(parts)


def _two_rows(above: Tensor, below: Tensor, *, side: int = 80) -> Image:
    """Pictures side by side, those of ``above`` over those of ``below``."""
    from torchvision.transforms.v2.functional import to_pil_image
    from torchvision.utils import make_grid

    scale = max(1, side // above.shape[-1])
    both = torch.cat([above, below]).clamp(0, 1).cpu()
    both = both.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    return to_pil_image(make_grid(both, nrow=len(above), padding=2, pad_value=1.0)).convert("RGB")

"""The adversarial images V of a consistency run: one for each real image, by the chosen attack, with checkpoints.

Shape letters: N real images, M adversarial ones.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from netgloss.adversarial import (
    AttackResult,
    PixelClassifier,
    assign_targets,
    attack_in_batches,
    ensemble,
    feature,
    fgsm,
    fgsm_rs,
    least_likely,
    pgd,
)
from netgloss.adversarial.pixels import LabelledPixels
from netgloss.errors import UserError
from netgloss.progress import Progress, Silent

if TYPE_CHECKING:
    from netgloss.training import Checkpoint

AttackName = Literal["pgd", "pgd-l2", "fgsm", "fgsm-rs", "least-likely", "ensemble", "feature", "none"]
SAVE_SECONDS = 15.0
"""Seconds of an attack that a kill may cost, in addition to the current batch."""


@dataclass(frozen=True)
class AttackChoice:
    """The adversarial images V of a consistency run."""

    attack: AttackName = "pgd"
    """pgd, pgd-l2, fgsm, fgsm-rs, least-likely, ensemble (of this network and those of --also, as in the paper),
    feature, or none (real images only)."""
    eps: float = 8.0
    """Radius in 1/255 of the pixel range before normalisation; for pgd-l2 the L2 radius in pixels of [0, 1]."""
    steps: int = 20
    """Steps of pgd, ensemble and feature."""
    restarts: int = 1
    """Starts of pgd."""
    untargeted: bool = False
    """Only away from the true class; CS2 is blank then."""
    craft_layer: str | None = None
    """Layer that attacks differentiate instead of the logits, where a ReLU ends the network (SqueezeNet:
    classifier.1)."""

    def __post_init__(self) -> None:
        if self.untargeted and self.attack == "ensemble":
            raise UserError("the ensemble attack brings images to a target: it cannot be untargeted")

    @property
    def radius(self) -> float:
        """Eps in pixels of [0, 1]."""
        return self.eps if self.attack == "pgd-l2" else self.eps / 255


@dataclass(frozen=True)
class Adversarial:
    """V and what is known of it.

    Attributes
    ----------
    found : images of 8 bits; predictions are the classifier's classes.
    targets : (M,) target classes of the probe set, or None.
    """

    found: AttackResult
    targets: Tensor | None


def attack_probe(
    pixels: PixelClassifier,
    data: LabelledPixels,
    choice: AttackChoice,
    *,
    also: Sequence[PixelClassifier] = (),
    seed: int = 0,
    layer: str | None = None,
    batch_size: int = 32,
    checkpoint: Checkpoint | None = None,
    progress: Progress | None = None,
) -> Adversarial | None:
    """One adversarial image for each of R, against this network; None for the attack "none".

    Targets are classes of the probe set, pairs (true, target) as even as can be. ``layer`` is where the feature attack
    works; ``also`` are the further networks of an ensemble. With ``checkpoint`` an interrupted attack continues after
    the last batch that was kept.
    """
    if choice.attack == "none":
        return None
    device = pixels.mean.device
    common: dict[str, Any] = {"eps": choice.radius, "batch_size": batch_size}
    targets = None
    if not choice.untargeted and choice.attack not in ("least-likely", "feature"):
        targets = assign_targets(data.probe_labels, classes=range(len(data.class_names)), seed=seed, ids=data.ids)
        common["targets"] = data.net_classes[targets].to(device)
    attacks: dict[str, tuple[Callable[..., AttackResult], dict[str, Any]]] = {
        "fgsm": (fgsm, {}),
        "fgsm-rs": (fgsm_rs, {"seed": seed}),
        "pgd": (pgd, {"steps": choice.steps, "restarts": choice.restarts, "seed": seed}),
        "pgd-l2": (pgd, {"steps": choice.steps, "restarts": choice.restarts, "seed": seed, "norm": "l2"}),
        "least-likely": (least_likely, {"classes": data.net_classes.tolist(), "seed": seed}),
        "feature": (feature, {"layer": layer, "steps": choice.steps, "seed": seed}),
        "ensemble": (ensemble, {"steps": choice.steps}),
    }
    attack, own = attacks[choice.attack]
    attacked = [pixels, *also] if choice.attack == "ensemble" else pixels
    progress = progress or Silent()
    parts = _kept(checkpoint, device)
    done = sum(len(part.images) for part in parts)
    progress.start(f"attack seed {seed}", len(data), unit="images", done=done)
    saved = time.monotonic()
    for place in torch.arange(done, len(data)).split(batch_size) if done < len(data) else ():
        x, y = data.pixels(place).to(device), data.labels[place].to(device)
        aligned = {"targets": common["targets"][place]} if "targets" in common else {}
        ids = [data.ids[i] for i in place]
        parts.append(
            attack_in_batches(attack, attacked, x, y, ids=ids, **{**common, **own, **aligned}).rounded(pixels, x, y)
        )
        last = int(place[-1]) == len(data) - 1
        if checkpoint is not None and (last or time.monotonic() - saved > SAVE_SECONDS):
            _keep(checkpoint, parts)
            saved = time.monotonic()
        progress.advance(len(place))
    progress.finish()
    found = AttackResult.join(parts)
    if choice.attack == "least-likely":
        assert found.targets is not None
        place = {int(c): i for i, c in enumerate(data.net_classes)}
        targets = torch.tensor([place[int(t)] for t in found.targets])
    return Adversarial(found, targets)


def _keep(checkpoint: Checkpoint, parts: Sequence[AttackResult]) -> None:
    found = AttackResult.join(parts)
    fields = {f.name: getattr(found, f.name) for f in dataclasses.fields(found) if getattr(found, f.name) is not None}
    checkpoint.save({**fields, "images": found.images.mul(255).round().to(torch.uint8)}, {"images": len(found.images)})


def _kept(checkpoint: Checkpoint | None, device: torch.device) -> list[AttackResult]:
    """What an interrupted attack has made, images of 8 bits as ``rounded`` gives them."""
    saved = None if checkpoint is None else checkpoint.load()
    if saved is None:
        return []
    fields: dict[str, Any] = {"targets": None, **{name: value.to(device) for name, value in saved[0].items()}}
    return [AttackResult(**{**fields, "images": fields["images"].float() / 255})]

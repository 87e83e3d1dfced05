"""What all attacks share: the network on pixels, its protection, projections, random starts and the result.

Shape letters: B images, C classes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from netgloss.classifiers.taps import Taps, find_layer
from netgloss.errors import UserError

if TYPE_CHECKING:
    from netgloss.classifiers import Classifier

Ids = Sequence[str] | Sequence[int] | range


class PixelClassifier(nn.Module):
    """A network that reads pixels in [0, 1]; its normalisation is part of it, so that eps is in pixels.

    Parameters
    ----------
    net : gives logits (B, C) of normalised images.
    mean, std : one number a channel.
    craft_layer : attacks differentiate the mean over the grid of this layer's output instead of the logits, where a
        ReLU at the end gives dead logits no gradient (SqueezeNet: ``classifier.1``). Success is decided by the logits.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, net: nn.Module, mean: Sequence[float], std: Sequence[float], *, craft_layer: str | None = None
    ) -> None:
        super().__init__()
        self.net = net
        self.craft_layer = craft_layer
        if craft_layer is not None:
            find_layer(net, craft_layer)
        if len(mean) != len(std) or min(std) <= 0:
            raise UserError(f"mean and std need one number a channel, std above 0; got {tuple(mean)} and {tuple(std)}")
        device = next((p.device for p in net.parameters()), torch.device("cpu"))
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values, device=device)[:, None, None], persistent=False)

    @classmethod
    def of(cls, classifier: Classifier, *, craft_layer: str | None = None) -> PixelClassifier:
        """With the classifier's own normalisation; the network is shared, not copied."""
        spec = classifier.preprocessing
        return cls(classifier.net, spec.mean, spec.std, craft_layer=craft_layer)

    def normalise(self, pixels: Tensor) -> Tensor:
        return (pixels - self.mean) / self.std

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (B, C) of pixels (B, channels, H, W) in [0, 1]."""
        logits: Tensor = self.net(self.normalise(pixels))
        return logits

    def craft(self, pixels: Tensor) -> Tensor:
        """The logits (B, C) that attacks differentiate."""
        if self.craft_layer is None:
            return self(pixels)
        with Taps(self.net, self.craft_layer) as taps:
            return taps(self.normalise(pixels))[self.craft_layer].flatten(2).mean(2)


@dataclass(frozen=True)
class AttackResult:
    """Adversarial images with what became of them.

    Attributes
    ----------
    images : (B, channels, H, W) in [0, 1].
    predictions : (B,) classes predicted for them.
    targets : (B,) classes aimed at, or None.
    success : (B,) the target is predicted; without targets: the true class is not.
    l2, linf : (B,) distance to the original, in pixels of [0, 1].
    """

    images: Tensor
    predictions: Tensor
    targets: Tensor | None
    success: Tensor
    l2: Tensor
    linf: Tensor

    @classmethod
    def measure(
        cls, classifier: PixelClassifier, x: Tensor, found: Tensor, y: Tensor, targets: Tensor | None
    ) -> AttackResult:
        """What ``found`` made of the images ``x`` of true classes ``y``, in the classifier's present mode."""
        with torch.no_grad():
            logits = classifier(found)
        if not logits.isfinite().all():
            raise UserError("the classifier gives NaN or Inf for adversarial images")
        predictions = logits.argmax(1)
        success = predictions != y if targets is None else predictions == targets
        change = (found - x).flatten(1)
        return cls(found, predictions, targets, success, change.norm(dim=1), change.abs().amax(1))

    def rounded(self, classifier: PixelClassifier, x: Tensor, y: Tensor) -> AttackResult:
        """As 8-bit pictures, measured again. Still in the Linf ball if x is 8-bit and eps a whole number of 1/255."""
        with crafting(classifier, x, y):
            return self.measure(classifier, x, self.images.mul(255).round() / 255, y, self.targets)

    @classmethod
    def join(cls, parts: Sequence[AttackResult]) -> AttackResult:
        """One result of several batches."""
        if not parts:
            raise UserError("there are no images to attack")
        fields = [field.name for field in dataclasses.fields(cls)]
        columns: dict[str, list[Any]] = {name: [getattr(part, name) for part in parts] for name in fields}
        joined: dict[str, Any] = {
            name: None if values[0] is None else torch.cat(values) for name, values in columns.items()
        }
        return cls(**joined)


@contextlib.contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Inside, ``module`` is in eval mode; the mode of each of its parts comes back, after exceptions too."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


@contextlib.contextmanager
def crafting(
    module: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float = 0.0,
    targets: Tensor | None = None,
    ids: Ids | None = None,
    norm: Literal["linf", "l2"] = "linf",
) -> Iterator[Tensor]:
    """Inside, ``module`` is in eval mode, gradients exist and nothing is cast; gives a copy of x. Modes come back.

    Raises
    ------
    UserError : as the attacks say.
    """
    if x.ndim != 4 or not x.is_floating_point() or not bool(((x >= 0) & (x <= 1)).all()):
        raise UserError(
            f"attacks read pixels (B, channels, H, W) in [0, 1] before normalisation; got {x.dtype} {tuple(x.shape)}"
            + (f" in {float(x.min()):g} to {float(x.max()):g}" if x.numel() else "")
        )
    for name, value in {"labels": y, "targets": targets, "ids": ids}.items():
        if value is not None and len(value) != len(x):
            raise UserError(f"{len(x)} images need as many {name}, got {len(value)}")
    if targets is not None and bool((targets == y).any()):
        raise UserError("a target must be another class than the true one")
    if not (0 <= eps < math.inf) or norm not in ("linf", "l2") or (norm == "linf" and eps > 1):
        raise UserError(f'eps is in pixels of [0, 1] (8/255, say; norm "linf" or "l2"), got {eps:g} for norm {norm!r}')
    with (
        eval_mode(module),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(x.device.type, enabled=False),
    ):
        yield x.detach().clone().float()


def gradient(loss: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """The gradient of a scalar by the images, and by nothing else."""
    z = z.detach().clone().requires_grad_()
    return torch.autograd.grad(loss(z), z)[0]


def project(z: Tensor, x: Tensor, eps: float, norm: Literal["linf", "l2"]) -> Tensor:
    """The nearest image in the eps ball around x, then cut to [0, 1] (which brings it nearer to x)."""
    if norm == "linf":
        return torch.minimum(torch.maximum(z, x - eps), x + eps).clamp(0, 1)
    change = z - x
    length = change.flatten(1).norm(dim=1).clamp_min(1e-12)[:, None, None, None]
    return (x + change * (eps / length).clamp_max(1)).clamp(0, 1)


def unit_steps(g: Tensor, norm: Literal["linf", "l2"]) -> Tensor:
    """Steepest direction of length 1 for each image (B, ...); zero where the gradient is."""
    if norm == "linf":
        return g.sign()
    scale = g.flatten(1).abs().amax(1).clamp_min(1e-38)[:, None, None, None]  # squares of tiny gradients underflow
    g = g / scale
    return g / g.flatten(1).norm(dim=1).clamp_min(1e-12)[:, None, None, None]


def projected_steps(
    loss: Callable[[Tensor], Tensor],
    start: Tensor,
    x: Tensor,
    *,
    eps: float,
    length: float,
    steps: int,
    norm: Literal["linf", "l2"] = "linf",
) -> Tensor:
    """``steps`` projected gradient steps from ``start`` in the ball of radius ``eps`` around ``x``.

    Parameters
    ----------
    loss : (B, channels, H, W) -> (), summed over images. length : of a step; negative lengths lower the loss.
    """
    z = start
    for _ in range(steps):
        z = project(z + length * unit_steps(gradient(loss, z), norm), x, eps, norm)
    return z


def image_generator(seed: int, image_id: str | int, draw: int = 0) -> torch.Generator:
    """Random numbers (on the CPU) of one image, the same whatever comes before it and on every device."""
    digest = hashlib.sha256(f"{seed}\0{image_id}\0{draw}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def random_start(
    x: Tensor, eps: float, norm: Literal["linf", "l2"], *, seed: int, ids: Ids | None = None, draw: int = 0
) -> Tensor:
    """A uniform point of the eps ball for every image of x (B, ...)."""
    starts = []
    for image_id in range(len(x)) if ids is None else ids:
        generator = image_generator(seed, image_id, draw)
        if norm == "linf":
            starts.append((torch.rand(x.shape[1:], generator=generator) * 2 - 1) * eps)
        else:
            direction = torch.randn(x.shape[1:], generator=generator)
            radius = eps * torch.rand((), generator=generator) ** (1 / direction.numel())
            starts.append(direction * (radius / direction.norm()))
    return torch.stack(starts).to(x)

"""Which pixels matter: relevance from decoded images against saliency maps and trivial orders.

::

    r_E = max(0, box(sum over channels of (X - mu)^2 - (X - X_E)^2))      mu: mean training image
    corrected: r_E / (r_R + mean r_R)
    deletion: the top 0, 5, 10, 20, 30, 50 % of pixels become the fill; area under the curve / 0.5, lower is better
    insertion: from the fill, the top pixels of X come back; higher is better

Where a decoder works at all, r_E is nearly (X - mu)^2: the order by \\|X - mu\\| is the baseline that decides. A curve
cannot tell "important" from "off the network's training distribution once deleted"; hence two fills.

Shape letters: B images, m channels, H W pixels, F fractions, L classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d
from torchvision.transforms.v2.functional import gaussian_blur

from image_attributes import edge_magnitude
from netgloss.errors import UserError
from netgloss.metrics.base import check_same_shape

FRACTIONS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5)

Logits = Callable[[Tensor], Tensor]


def decoded_relevance(image: Tensor, decoded: Tensor, mean_image: Tensor) -> Tensor:
    """r_E (B, H, W): by how much the decoded image is nearer to the image than the mean training image (m, H, W) is."""
    check_same_shape("image", image, "decoded image", decoded)
    gain = ((image - mean_image).square() - (image - decoded).square()).sum(dim=1)
    side = 2 * round(max(image.shape[2:]) / 32) + 1
    return avg_pool2d(gain[:, None], side, 1, side // 2, count_include_pad=False)[:, 0].clamp_min(0)


def corrected_relevance(relevance: Tensor, of_reference: Tensor) -> Tensor:
    """r_E / (r_R + mean r_R) of (B, H, W) maps: what the reference draws equally well counts less."""
    return relevance / (of_reference + of_reference.mean(dim=(1, 2), keepdim=True)).clamp_min(1e-12)


def trivial_orders(image: Tensor, mean_image: Tensor, *, seed: int = 0, draws: int = 5) -> dict[str, Tensor]:
    """Orders that know nothing of the network, (B, H, W) each: |X - mu|, nearness to the centre, edges, random."""
    batch, _, height, width = image.shape
    y = torch.arange(height, dtype=torch.float64) - (height - 1) / 2
    x = torch.arange(width, dtype=torch.float64) - (width - 1) / 2
    centre = -(y[:, None].square() + x[None].square()).sqrt()
    generator = torch.Generator().manual_seed(seed)
    found = {
        "distance_from_mean": (image - mean_image).square().sum(dim=1),
        "centre": centre.to(image).expand(batch, -1, -1),
        "edges": edge_magnitude(image.mean(dim=1)),
    }
    for draw in range(draws):
        found[f"random {draw}"] = torch.rand(batch, height, width, generator=generator).to(image)
    return found


def gradient_times_input(to_logits: Logits, image: Tensor) -> Tensor:
    """|gradient of the predicted class's logit x image|, summed over channels, (B, H, W)."""
    with torch.enable_grad():
        given = image.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(to_logits(given).max(dim=1).values.sum(), given)
    return (gradient * image).abs().sum(dim=1)


def fills(image: Tensor, mean_image: Tensor) -> dict[str, Tensor]:
    """What deleted pixels become: the mean training image, or the image blurred with sigma S / 8."""
    side = max(image.shape[2:])
    kernel = min(2 * (side // 2) - 1, 6 * (side // 8) + 1) if side >= 8 else 1
    blurred = (
        gaussian_blur(image, [kernel, kernel], [side / 8, side / 8])
        if kernel > 1
        else image.mean(dim=(2, 3), keepdim=True).expand_as(image)
    )
    return {"mean": mean_image.expand_as(image), "blur": blurred}


@dataclass(frozen=True)
class Curve:
    """What is left of the first prediction at each fraction; ``kept`` and ``probability`` are (B, F)."""

    fractions: tuple[float, ...]
    kept: Tensor
    probability: Tensor

    @property
    def areas(self) -> Tensor:
        """Normalised trapezoid area of the probability of each image, (B,)."""
        return self._area(self.probability)

    @property
    def kept_areas(self) -> Tensor:
        """The same for keeping the predicted class, (B,)."""
        return self._area(self.kept)

    def _area(self, values: Tensor) -> Tensor:
        x = torch.tensor(self.fractions, dtype=torch.float64)
        return torch.trapezoid(values.double(), x, dim=1) / (x[-1] - x[0])


@torch.no_grad()
def deletion(
    to_logits: Logits,
    image: Tensor,
    order: Tensor,
    fill: Tensor,
    *,
    fractions: Sequence[float] = FRACTIONS,
    insert: bool = False,
) -> Curve:
    """Deletes (or inserts) the pixels with the highest ``order`` first and watches the first prediction.

    Parameters
    ----------
    to_logits : images (B, m, H, W) in [0, 1] -> logits (B, L).
    order : (B, H, W), high means first; ties by position.
    fill : (B, m, H, W) what a deleted pixel becomes.
    insert : start from ``fill`` and put the pixels of ``image`` back.
    """
    check_same_shape("image", image, "fill", fill)
    if order.shape != (len(image), *image.shape[2:]):
        raise UserError(f"expected an order {(len(image), *image.shape[2:])}, got {tuple(order.shape)}")
    first = to_logits(image).argmax(dim=1)
    ranks = order.flatten(1).argsort(dim=1, descending=True, stable=True).argsort(dim=1).reshape(order.shape)
    pixels = order[0].numel()
    kept, probability = [], []
    for fraction in fractions:
        taken = (ranks < round(fraction * pixels))[:, None]
        logits = to_logits(torch.where(taken != insert, fill, image))
        kept.append((logits.argmax(dim=1) == first).double())
        probability.append(logits.double().softmax(dim=1).gather(1, first[:, None])[:, 0])
    return Curve(tuple(fractions), torch.stack(kept, dim=1).cpu(), torch.stack(probability, dim=1).cpu())


def paired_difference(
    first: Tensor, second: Tensor, *, resamples: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of ``first - second`` (B,) each over the same images, with a 95 % percentile bootstrap interval."""
    check_same_shape("first", first, "second", second)
    gap = (first - second).double().numpy()
    rng = np.random.default_rng(seed)
    means = gap[rng.integers(len(gap), size=(resamples, len(gap)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(gap.mean()), float(low), float(high)

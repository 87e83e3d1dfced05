"""What a picture's visible attributes tell of the original: probes in place of viewers.

::

    attributes(X): brightness, contrast, foreground share, log aspect of the foreground box, edge density, fine texture,
                   R-G, B-(R+G)/2
    probe: ridge regression (penalty by 5-fold cross validation) from an image pooled to 8 x 8 plus its own attributes
           to the attribute of the original;  retained = R2(decoded) / R2(reference) where R2(reference) >= 0.2

A proxy for what people could name in a decoded image; it is no user study. Ours, not the paper's.

Shape letters: B images, m channels (1 or 3), H W pixels, A attributes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d, conv2d, pad

from netgloss.errors import UserError

ATTRIBUTES = ("brightness", "contrast", "foreground", "log_aspect", "edges", "texture", "red_green", "blue_yellow")
MEASURABLE = 0.2
"""Below this R2 of the reference, nothing is said of an attribute."""

_SOBEL = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 8
_ALPHAS = tuple(float(a) for a in np.logspace(-2, 4, 13))


def attributes(image: Tensor, *, foreground: Tensor | None = None, threshold: float = 0.1) -> Tensor:
    """Attributes (B, 8) in the order of :data:`ATTRIBUTES`; a grey image has 0 in both colour contrasts.

    Parameters
    ----------
    image : (B, m, H, W), values about [0, 1].
    foreground : (B, H, W) bool; default where the grey value is above ``threshold`` (objects on black).
    """
    if image.ndim != 4 or image.shape[1] not in (1, 3):
        raise UserError(f"expected images (B, 1 or 3, H, W), got {tuple(image.shape)}")
    image = image.double()
    grey = image.mean(dim=1)
    mask = (grey > threshold if foreground is None else foreground).double()
    area = mask.sum(dim=(1, 2))
    texture = (grey - _box_mean(grey, 5)).abs()
    colour = torch.zeros(len(image), 2, dtype=torch.float64, device=image.device)
    if image.shape[1] == 3:
        red, green, blue = image.mean(dim=(2, 3)).unbind(1)
        colour = torch.stack([red - green, blue - (red + green) / 2], dim=1)
    found = [
        grey.mean(dim=(1, 2)),
        grey.std(dim=(1, 2), correction=0),
        mask.mean(dim=(1, 2)),
        _log_aspect(mask),
        edge_magnitude(grey).mean(dim=(1, 2)),
        (texture * mask).sum(dim=(1, 2)) / area.clamp_min(1),
    ]
    return torch.cat([torch.stack(found, dim=1), colour], dim=1)


def edge_magnitude(grey: Tensor) -> Tensor:
    """Sobel gradient magnitude of (B, H, W), edges replicated; a unit step per pixel gives 1."""
    kernel = _SOBEL.to(grey)
    padded = pad(grey[:, None], (1, 1, 1, 1), mode="replicate")
    dx, dy = conv2d(padded, kernel[None, None]), conv2d(padded, kernel.T[None, None])
    return (dx.square() + dy.square()).sqrt()[:, 0]


def _box_mean(grey: Tensor, side: int) -> Tensor:
    return avg_pool2d(grey[:, None], side, 1, side // 2, count_include_pad=False)[:, 0]


def _log_aspect(mask: Tensor) -> Tensor:
    """log(width / height) of the box round the foreground, 0 where there is none."""
    width = _extent(mask.amax(dim=1))
    height = _extent(mask.amax(dim=2))
    return torch.where(width > 0, (width.clamp_min(1) / height.clamp_min(1)).log(), 0.0)


def _extent(line: Tensor) -> Tensor:
    """Pixels from the first to the last non-zero entry of (B, n), 0 where there is none."""
    length = line.shape[1]
    first = line.argmax(dim=1)
    last = length - 1 - line.flip(1).argmax(dim=1)
    return torch.where(line.sum(dim=1) > 0, (last - first + 1).double(), 0.0)


@dataclass(frozen=True)
class Probed:
    """R2 on test images of one attribute of the original, read from each kind of picture.

    ``retained`` is None where the reference does not carry the attribute either: nothing can be said.
    """

    original: float
    reference: float
    decoded: float
    shuffled: float

    @property
    def retained(self) -> float | None:
        return self.decoded / self.reference if self.reference >= MEASURABLE else None


def probe_attributes(
    train: Mapping[str, Tensor], test: Mapping[str, Tensor], *, seed: int = 0, foreground: bool = True
) -> dict[str, Probed]:
    """Probes from three kinds of pictures to the attributes of the originals.

    Parameters
    ----------
    train, test : "original", "reference" and "decoded" images (B, m, H, W), aligned.
    foreground : False leaves out what needs objects on black (foreground, log_aspect, texture).

    Returns
    -------
    By attribute; those that do not vary over the test images are left out.
    """
    wanted = {part: attributes(images["original"]).cpu().numpy() for part, images in (("train", train), ("test", test))}
    features = {kind: (_features(train[kind]), _features(test[kind])) for kind in ("original", "reference", "decoded")}
    order = np.random.default_rng(seed).permutation(len(wanted["train"]))
    found = {}
    for i, name in enumerate(ATTRIBUTES):
        target, truth = wanted["train"][:, i], wanted["test"][:, i]
        if truth.std() < 1e-9 or (not foreground and name in ("foreground", "log_aspect", "texture")):
            continue
        scores = {kind: _ridge_r2(*features[kind], target, truth) for kind in features}
        scores["shuffled"] = _ridge_r2(*features["decoded"], target[order], truth)
        found[name] = Probed(**scores)
    return found


def _features(images: Tensor) -> np.ndarray:
    pooled = adaptive_avg_pool2d(images.double(), 8).flatten(1)
    return torch.cat([pooled, attributes(images)], dim=1).cpu().numpy()


def _ridge_r2(train: np.ndarray, test: np.ndarray, target: np.ndarray, truth: np.ndarray) -> float:
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    model: Any = make_pipeline(StandardScaler(), RidgeCV(alphas=_ALPHAS, cv=5))
    with threadpool_limits(1):  # many small products: a second thread makes them four times as slow
        return float(model.fit(train, target).score(test, truth))

"""How far the rebuilt activations of a layer above are from the network's own, for explainers that rebuild them.

With the network's y and the rebuilt y' of an image, summed over all features and positions::

    upper_error = sqrt(sum |y - y'|^2 / sum |y|^2)

Shape letters: B images, C features.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from netgloss.metrics.base import ImageMetric, check_same_shape


def upper_error(upper: Tensor, rebuilt: Tensor) -> Tensor:
    """Relative L2 error over all images of (B, ...), () float64; NaN where the layer is zero."""
    check_same_shape("upper", upper, "rebuilt", rebuilt)
    return _ratio((upper.double() - rebuilt.double()).square().sum(), upper.double().square().sum())


def _ratio(error: Tensor, size: Tensor) -> Tensor:
    return torch.where(size > 0, (error / size).sqrt(), math.nan)


class UpperError(ImageMetric):
    """Relative L2 error of one layer above; one instance a layer, named ``upper_error:LAYER``.

    Parameters
    ----------
    layer : its name, for the record.
    """

    name = "upper_error"
    inputs = ("upper", "upper_rebuilt")
    bounds = (0.0, math.inf)
    higher_is_better = False
    definition = (
        "Distance of the rebuilt activations of a layer above from the network's own, as a share of their length (root "
        "of summed squares): 0 is perfect, 1 is no better than zeros. It cannot show whether what is missed matters to "
        "the decision: see agreement and accuracy_change."
    )

    def __init__(self, layer: str = "", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if layer:
            self.name = f"{type(self).name}:{layer}"  # type: ignore[misc]

    def statistics(self, *, upper: Tensor, upper_rebuilt: Tensor) -> Tensor:
        check_same_shape("upper", upper, "upper_rebuilt", upper_rebuilt)
        x, y = upper.double().flatten(1), upper_rebuilt.double().flatten(1)
        return torch.stack([(x - y).square().sum(1), x.square().sum(1)], dim=1)

    def score(self, sums: Tensor, count: Tensor) -> Tensor:
        return _ratio(sums[..., 0], sums[..., 1])

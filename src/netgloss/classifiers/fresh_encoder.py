"""The published reference's encoder: the classifier up to the layer, with fresh weights and without dropout."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from netgloss.classifiers import Classifier, Taps
from netgloss.classifiers.modules import copied


class FreshEncoder(nn.Module):
    """Images (B, m, S, S') in [0, 1] to the code of a layer, by the classifier's architecture with new weights.

    Dropout in the path is taken out: left in, it would handicap the reference and favour the classifier.

    Parameters
    ----------
    classifier : whose architecture is copied; it is not touched.
    layer : dotted name.
    seed : of the new weights.
    units : (U,) indices of the units that form the code; default all.
    """

    def __init__(self, classifier: Classifier, layer: str, *, seed: int, units: Tensor | None = None) -> None:
        super().__init__()
        fresh = classifier.untrained(seed)
        self.net = copied(fresh.net).requires_grad_(True)
        for name, module in list(self.net.named_modules(remove_duplicate=False)):
            if isinstance(module, nn.modules.dropout._DropoutNd):
                parent, _, child = name.rpartition(".")
                setattr(self.net.get_submodule(parent), child, nn.Identity())
        self.layer = layer
        self.preprocessing = classifier.preprocessing
        self._units = units
        with torch.no_grad(), Taps(self.net, layer, stop=False) as taps:  # learns how often the layer runs
            taps(torch.zeros(2, *classifier.input_shape))
            self._calls = dict(taps.calls)
        self.net.train()

    def forward(self, image: Tensor) -> Tensor:
        """(B, U) or (B, U, h, w)."""
        size = self.preprocessing.size
        if tuple(image.shape[2:]) != tuple(size):
            image = interpolate(image, size, mode="bilinear", antialias=True)
        with Taps(self.net, self.layer) as taps:
            taps.calls = dict(self._calls)
            code = taps(self.preprocessing.normalise(image))[self.layer]
        return code if self._units is None else code[:, self._units]

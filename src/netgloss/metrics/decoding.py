"""What a decoder makes of a layer's activations: reconstruction, and the class that the classifier sees in it.

R(X, X') = |X - X'|^2, summed over an image's P values, raw decoder output; means over images. X: the image at the
decode size, X_E: decoded from the layer, X_R: from the reference autoencoder (netgloss.explainers.cladec).

Shape letters: B images, m channels, H W pixels, P = m H W, L classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from netgloss.metrics.base import ImageMetric, check_same_shape

_BLUR = (
    " The classifier never saw blurred images: this measures blur as well as content. Read it only together with the "
    "same "
    "number for the original at the decode size (original_resized) and for the reference."
)


def squared_error(image: Tensor, decoded: Tensor) -> Tensor:
    """Squared differences of images (B, m, H, W) summed over each image, (B,) float64."""
    check_same_shape("image", image, "decoded image", decoded)
    return (image.double() - decoded.double()).square().flatten(1).sum(dim=1)


class RecClaDec(ImageMetric):
    """Reconstruction error of the decoder."""

    name = "rec_cladec"
    higher_is_better = False
    bounds = (0.0, math.inf)
    inputs = ("image", "decoded")
    definition = (
        "Squared error of the images decoded from the layer, summed over an image's values and averaged over images. "
        "0 is perfect. It depends on image size, code size, decoder and length of training, so it ranks neither layers "
        "nor networks; and what the decoder fails to draw need not be lost in the layer: compare rec_refae."
    )

    def statistics(self, *, image: Tensor, decoded: Tensor) -> Tensor:
        return squared_error(image, decoded)[:, None]

    def score(self, sums: Tensor, count: Tensor) -> Tensor:
        return sums[..., 0] / count


class RecRefAE(ImageMetric):
    """Reconstruction error of the reference autoencoder."""

    name = "rec_refae"
    higher_is_better = False
    bounds = (0.0, math.inf)
    inputs = ("image", "reference")
    definition = (
        "The same error for the reference autoencoder: an encoder trained for reconstruction, with the same code shape "
        "and decoder. It says what this decoder can draw from a code of this size. Above rec_cladec the reference is "
        "too weak to conclude anything. It cannot show what a better reference would reach."
    )

    def statistics(self, *, image: Tensor, reference: Tensor) -> Tensor:
        return squared_error(image, reference)[:, None]

    def score(self, sums: Tensor, count: Tensor) -> Tensor:
        return sums[..., 0] / count


class DeltaRec(ImageMetric):
    """rec_cladec - rec_refae."""

    name = "delta_rec"
    inputs = ("image", "decoded", "reference")
    definition = (
        "rec_cladec minus rec_refae on the same images: the reconstruction error that is put down to the classifier "
        "having dropped something. Not above 0: nothing can be said. It cannot show what was dropped (look at the "
        "pictures), and training the reference longer or shorter moves it."
    )

    def statistics(self, *, image: Tensor, decoded: Tensor, reference: Tensor) -> Tensor:
        return (squared_error(image, decoded) - squared_error(image, reference))[:, None]

    def score(self, sums: Tensor, count: Tensor) -> Tensor:
        return sums[..., 0] / count


class R2Pixel(ImageMetric):
    """Share of the images' variation round the mean training image that is decoded."""

    name = "r2_pixel"
    higher_is_better = True
    bounds = (-math.inf, 1.0)
    inputs = ("image", "decoded", "mean_image")
    definition = (
        "1 - rec_cladec / (the error of the mean training image). 1 is perfect, 0 no better than one fixed picture. "
        "The only reconstruction score here that can be compared over image sizes and data sets. Brightness and large "
        "shapes dominate it: it cannot show whether fine detail is there."
    )

    def statistics(self, *, image: Tensor, decoded: Tensor, mean_image: Tensor) -> Tensor:
        return torch.stack([squared_error(image, decoded), squared_error(image, mean_image)], dim=1)

    def score(self, sums: Tensor, count: Tensor) -> Tensor:
        return 1 - sums[..., 0] / sums[..., 1]


class AccuracyOfDecoded(ImageMetric):
    """The classifier's accuracy on decoded images."""

    name = "acc_c"
    higher_is_better = True
    bounds = (0.0, 1.0)
    inputs = ("logits_decoded", "labels")
    definition = "Share of labelled images whose decoded version the classifier puts into the right class." + _BLUR

    def statistics(self, *, logits_decoded: Tensor, labels: Tensor) -> Tensor:
        known = labels >= 0
        right = (logits_decoded.argmax(1) == labels) & known
        return torch.stack([right.double(), known.double()], dim=1)

    def score(self, sums: Tensor, count: Tensor) -> Tensor:
        return sums[..., 0] / sums[..., 1]


class AgreementOfDecoded(ImageMetric):
    """Share of decoded images that the classifier puts into the class of the original."""

    name = "agree_c"
    higher_is_better = True
    bounds = (0.0, 1.0)
    inputs = ("logits", "logits_decoded")
    definition = "Share of images whose decoded version the classifier puts into the same class as the image." + _BLUR

    def statistics(self, *, logits: Tensor, logits_decoded: Tensor) -> Tensor:
        return (logits.argmax(1) == logits_decoded.argmax(1)).double()[:, None]

    def score(self, sums: Tensor, count: Tensor) -> Tensor:
        return sums[..., 0] / count


class ClassLoss(ImageMetric):
    """Cross entropy of the classifier on decoded images."""

    name = "class_loss"
    higher_is_better = False
    bounds = (0.0, math.inf)
    inputs = ("logits_decoded", "labels")
    definition = "Mean cross entropy, in nats, of the classifier on the decoded versions of labelled images." + _BLUR

    def statistics(self, *, logits_decoded: Tensor, labels: Tensor) -> Tensor:
        known = labels >= 0
        picked = logits_decoded.double().log_softmax(1).gather(1, labels.clamp_min(0)[:, None])[:, 0]
        return torch.stack([(-picked).where(known, 0.0), known.double()], dim=1)

    def score(self, sums: Tensor, count: Tensor) -> Tensor:
        return sums[..., 0] / sums[..., 1]

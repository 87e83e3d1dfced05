"""What the explainers of class scores share: which classes, their scores over the fit, and the linear map back to them.

Private to ``explainers/``.

Shape letters: B images, N images of the fit, K concepts, G modules, C explained classes, D features of the layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from netgloss.class_names import class_finder
from netgloss.errors import UserError, nearest
from netgloss.explainers.base import Batch, ExplainerConfig, LayerSpec, Rows
from netgloss.explainers.rows import RowsExplainer

_MAX_CLASSES = 10


class ClassScores(RowsExplainer):
    """An explainer of pooled activations whose concepts give the scores of some classes: ``y = x W + b``.

    A method's config has ``classes`` and ``shuffle_logits``; the method adds ``class_weights`` and ``decode_modules``.

    Attributes
    ----------
    class_index : (C,) indices of the explained classes.
    """

    reads: ClassVar[Literal["rows", "pooled", "maps"]] = "pooled"
    uses = ("logits", "labels")

    def __init__(self, config: ExplainerConfig, spec: LayerSpec) -> None:
        super().__init__(config, spec)
        self.class_index = [class_place(text, spec.num_classes) for text in self.class_texts]
        if not self.class_index:
            raise UserError(
                f"{type(self).__name__} needs the classes that it is to explain (classes = ('0', '217'), say)"
            )
        if len(set(self.class_index)) < len(self.class_index):
            raise UserError(f"a class was named twice: {', '.join(self.class_texts)}")
        self._shuffled: tuple[Tensor, Tensor] | None = None

    @property
    def class_texts(self) -> tuple[str, ...]:
        """The classes as the config names them."""
        classes: tuple[str, ...] = self.config.classes  # type: ignore[attr-defined]
        return classes

    @classmethod
    def settle(
        cls, config: ExplainerConfig, *, class_names: Sequence[str], wnids: Sequence[str], decisions: np.ndarray
    ) -> ExplainerConfig:
        """Classes as ``"index: name"``: those asked for, or the most frequent ones among the images."""
        asked: tuple[str, ...] = config.classes  # type: ignore[attr-defined]
        if asked:
            chosen = [find_class(text, class_names, wnids) for text in asked]
        else:
            known, counts = np.unique(decisions[decisions >= 0], return_counts=True)
            chosen = sorted(known[np.argsort(-counts, kind="stable")][:_MAX_CLASSES].tolist())
            if not chosen:
                raise UserError("the images have neither labels nor stored predictions: name the classes (classes)")
        settled = {"classes": tuple(f"{i}: {class_names[i]}" for i in chosen)}
        return dataclasses.replace(config, **settled)  # type: ignore[arg-type]

    @property
    def explained_classes(self) -> list[int]:
        return self.class_index

    # -- what a method adds ---------------------------------------------------------------------------------------

    def class_weights(self) -> tuple[Tensor, Tensor]:
        """Weights (K, C) and biases (C,) of the rebuilt logits, which are affine in the concepts."""
        raise NotImplementedError

    def decode_modules(self, concepts: Tensor) -> Tensor:
        """Concepts (B, K) -> the reconstruction of each module, (G, B, D)."""
        raise NotImplementedError

    # -- images explained -----------------------------------------------------------------------------------------

    def decode_rows(self, codes: Tensor) -> Tensor:
        """(B, K) -> (B, D), the mean of the modules' reconstructions."""
        return self.decode_modules(codes).mean(dim=0)

    def class_scores(self, concepts: Tensor) -> Tensor:
        """Concepts (B, K) -> rebuilt logits (B, C) of the explained classes, in their order."""
        weight_KC, bias_C = self.class_weights()
        return torch.addmm(bias_C, concepts.to(weight_KC.dtype), weight_KC)

    def rebuilt_logits(self, concepts: Tensor, logits: Tensor) -> Tensor:
        """``logits`` (B, classes) with the explained classes' replaced by the rebuilt scores."""
        rebuilt = logits.clone()
        rebuilt[:, self.class_index] = self.class_scores(concepts).to(logits.dtype)
        return rebuilt

    def contributions(self, concepts: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """``W_kc x_k`` in logits, (B, K), and the bias (B,); 0 and NaN for classes that are not explained."""
        weight_KC, bias_C = self.class_weights()
        places = {c: i for i, c in enumerate(self.class_index)}
        place_B = torch.tensor([places.get(int(c), -1) for c in classes], device=concepts.device)
        known_B = place_B >= 0
        values_BK = concepts * weight_KC[:, place_B.clamp_min(0)].T * known_B[:, None]
        return values_BK, torch.where(known_B, bias_C[place_B.clamp_min(0)], torch.nan)

    # -- the fit --------------------------------------------------------------------------------------------------

    def read_fit(self, rows: Rows, *, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Activations (N, D) float32, targets (N, C) float64 and decisions (N,) of the images of the fit, checked.

        With ``shuffle_logits`` the targets are those of other images, drawn by ``seed``.

        Raises
        ------
        UserError : no logits; a class without images; a constant score; NaN, Inf or only zeros in the layer.
        """
        values, scores, decided, index = [], [], [], []
        for batch in rows.examples():
            if not batch.activation.isfinite().all():
                raise UserError(f"NaN or Inf among the activations of layer {self.spec.name!r}")
            if batch.logits is None:
                raise UserError(
                    f"{type(self).__name__} explains the logits, which this store does not hold: capture with logits"
                )
            values.append(batch.activation.float())
            scores.append(batch.logits[:, self.class_index].double())
            decided.append(decisions(batch))
            index.append(batch.index)
        z_ND, y_NC, decided_N = torch.cat(values), torch.cat(scores), torch.cat(decided)
        for place, text in zip(self.class_index, self.class_texts, strict=True):
            if not (decided_N == place).any():
                raise UserError(f"class {text!r} has no image among the {len(y_NC)} to fit on")
        for text, sd in zip(self.class_texts, y_NC.std(dim=0, correction=0).tolist(), strict=True):
            if not sd > 1e-6:
                raise UserError(f"the score of class {text!r} is the same for all {len(y_NC)} images to fit on")
        if not z_ND.any():
            raise UserError(f"layer {self.spec.name!r} is zero on all {len(y_NC)} images to fit on")
        if self.config.shuffle_logits:  # type: ignore[attr-defined]
            y_NC = y_NC[torch.randperm(len(y_NC), generator=torch.Generator().manual_seed(seed))]
            self._shuffled = torch.cat(index), y_NC
            self.notes.append("control: every image was given the scores of another one (shuffle_logits)")
        return z_ND, y_NC, decided_N

    def targets(self, batch: Batch) -> Tensor:
        """Scores (B, C) of a training batch as :meth:`read_fit` gave them."""
        assert batch.logits is not None
        if self._shuffled is None:
            return batch.logits[:, self.class_index]
        index_N, y_NC = self._shuffled
        return y_NC[torch.searchsorted(index_N, batch.index.cpu())].to(batch.logits)


def decisions(batch: Batch) -> Tensor:
    """(B,) label of each image, or the network's prediction where it has none."""
    assert batch.logits is not None
    predicted = batch.logits.argmax(dim=1)
    return predicted if batch.labels is None else torch.where(batch.labels >= 0, batch.labels, predicted)


def class_name(text: str) -> str:
    """The name of ``"index: name"``, up to its first comma."""
    return text.partition(":")[2].strip().split(",")[0] or f"class {text.strip()}"


def class_place(text: str, num_classes: int) -> int:
    """The class index of ``"index: name"`` or ``"index"``."""
    number = text.partition(":")[0].strip()
    if not number.isdecimal() or int(number) >= num_classes:
        raise UserError(f"class {text!r} is not an index below {num_classes} (or 'index: name')")
    return int(number)


def find_class(text: str, class_names: Sequence[str], wnids: Sequence[str]) -> int:
    """The class that a user's text means: an index, a WordNet id, a name, or a name up to its first comma."""
    number = text.partition(":")[0].strip()
    if number.isdecimal():
        return class_place(text, len(class_names))
    places = class_finder(class_names, wnids)(text)
    if len(places) > 1:
        raise UserError(f"class {text!r} is ambiguous: say the index, {' or '.join(map(str, places))}")
    if places:
        return places[0]
    short = [name.split(",")[0].strip().lower() for name in class_names]
    hint = nearest(text.strip().lower(), short) or short[:5]
    raise UserError(f"the classifier has no class {text!r}; did you mean {', '.join(hint)}?")

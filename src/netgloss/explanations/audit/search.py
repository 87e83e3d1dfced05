"""The search of the audit: for every class the region and the global cue that decide most, tested on other images.

A class's images are divided: some pairs search, fresh ones test. A *finding* must pass a test that it could fail:

* **causal use**: putting the region (or the cue) into images of other classes makes them the class, and taking a region
  out of the class's own loses it, both more often than the controls do, at a false discovery rate over all tests and
  with a lower confidence bound of the first share above :attr:`AuditOptions.least_gain`. A cue such as blur cannot be
  taken out of an image, so that its loss is reported but not required. Where the region's pixels are the same from
  image to image, one of the two is enough: the first, or a loss above :attr:`AuditOptions.great_loss`;
* **not the object**: at least one sign: the region keeps to one place where other classes' do not, its pixels are the
  same from image to image, it is the border of the picture, or it lies off the annotated objects. A cue has no place;
  its sign is that the class's images differ in it.

What decides without such a sign is listed for each class, but is no finding: it may be the object itself.

Shape letters: N images, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.stats import binomtest, false_discovery_control
from torch import Tensor

from netgloss.explanations.audit import signs
from netgloss.explanations.audit.cues import CUES, Cue, level_difference
from netgloss.explanations.audit.swaps import (
    Forward,
    Region,
    Swaps,
    best_windows,
    decided,
    elsewhere,
    exchange,
    regions_to_try,
    swap,
    swap_attribution,
    window_sizes,
)
from netgloss.progress import Progress, Silent

Pixels = Callable[[np.ndarray], Tensor]
"""Image indices to pixels (N, channels, H, W) in 0..1, as cropped for the network."""


@dataclass(frozen=True)
class AuditOptions:
    """How much is searched, and what counts.

    Parameters
    ----------
    search_pairs, test_pairs : pairs of images per class that search, and fresh ones that test.
    least_images : rightly classified images that a class needs to be tested.
    max_classes : the most frequent classes are tested.
    promising : share of the search's images that must become the class before a region is tested.
    least_gain : what the lower confidence bound of the tested share must reach.
    least_loss : share of the class's own images that must be lost beyond the control. A region that covers more of the
        picture than this must take the class from as large a share: a border as wide as the picture holds the object.
    great_loss : the same for a region of equal pixels that is not enough to make other images the class.
    false_discoveries : rate over all tests of a network.
    same_pixels, place, outside : how strong a sign must be, as shares (see ``signs``).
    levels : images per class whose tint, sharpness and so on are measured.
    level : how clearly a class must differ in a cue to be tested on it (area under the ROC curve).
    """

    search_pairs: int = 10
    test_pairs: int = 32
    least_images: int = 16
    max_classes: int = 40
    steps: int = 4
    promising: float = 0.3
    least_gain: float = 0.3
    least_loss: float = 0.15
    great_loss: float = 0.5
    false_discoveries: float = 0.05
    same_pixels: float = 0.2
    place: float = 0.6
    outside: float = 0.7
    levels: int = 50
    level: float = 0.75
    seed: int = 0


@dataclass(frozen=True)
class ClassTest:
    """What was measured for a class and a region or cue.

    Attributes
    ----------
    kind : "place", "patch", "border", "background", or the name of a cue.
    gained, lost : shares of the test's other images that became the class, and of its own that were lost.
    gained_control, lost_control : the same of the controls.
    low, high : 95 % interval of ``gained`` (Clopper-Pearson).
    p_value, lost_p_value : that ``gained`` and ``lost`` are above their controls (McNemar, exact, one-sided).
    n : pairs of the test.
    area : share of the picture that the region covers (1 for a cue).
    boxes : of each of ``images``: row, column, height, width of the window in shares of the picture; empty for a cue.
    images, others : the class's images of the test, and the others that they exchanged with.
    size : side of the window or width of the border, in pixels; 0 otherwise.
    signs : measured signs by name.
    detail : in words ("colder (bluer)" for a cue).
    """

    class_index: int
    kind: str
    gained: float
    lost: float
    gained_control: float
    lost_control: float
    low: float
    high: float
    p_value: float
    lost_p_value: float
    n: int
    area: float
    boxes: list[tuple[float, float, float, float]] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    others: list[int] = field(default_factory=list)
    size: int = 0
    signs: dict[str, float] = field(default_factory=dict)
    detail: str = ""


@dataclass(frozen=True)
class Finding:
    """A test that passed, with its q-value and the names of its evidence."""

    test: ClassTest
    q_value: float
    evidence: tuple[str, ...]


@dataclass(frozen=True)
class Audit:
    """The result: findings first, then every test, and the classes that had too few images."""

    findings: list[Finding]
    tests: list[ClassTest]
    untested: list[int]
    searched: int


@dataclass(frozen=True)
class _Search:
    """What the search of one class leaves: its best region and where its windows lie."""

    target: int
    region: Region
    promising: bool
    corners: list[tuple[int, int]]
    test_own: np.ndarray
    test_other: np.ndarray


class _Auditor:
    """The network with its images; see :func:`audit_classes`."""

    def __init__(
        self, forward: Forward, pixels: Pixels, normalise: Callable[[Tensor], Tensor], labels: np.ndarray,
        predictions: np.ndarray, objects: Callable[[np.ndarray], Tensor] | None, options: AuditOptions,
    ) -> None:  # fmt: skip
        self.forward, self.pixels, self.normalise = forward, pixels, normalise
        self.labels, self.predictions, self.objects, self.options = labels, predictions, objects, options

    def read(self, index: np.ndarray) -> Tensor:
        """Normalised pixels, in the memory order that convolutions prefer."""
        return self.normalise(self.pixels(index)).contiguous(memory_format=torch.channels_last)

    def pairs(self, target: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Images of the class and of others: those that search, and those that test (the class's may be fewer)."""
        rng = np.random.default_rng([self.options.seed, target])
        own = rng.permutation(np.flatnonzero((self.labels == target) & (self.predictions == target)))
        other = rng.permutation(np.flatnonzero((self.labels != target) & (self.predictions != target)))
        search = min(self.options.search_pairs, len(own) // 2)
        number = min(len(own) - search, self.options.test_pairs, len(other) - search)
        return own[:search], other[:search], own[search : search + number], other[search : search + number]

    def support(self, own: np.ndarray, other: np.ndarray, target: int) -> Tensor:
        """Attributions (N, H, W)."""
        return swap_attribution(self.forward, self.read(own), self.read(other), target, steps=self.options.steps)

    def search(self, target: int) -> list[_Search]:
        """The window, and the border or background, that decide most in the pairs that search; small ones preferred."""
        own, other, test_own, test_other = self.pairs(target)
        support = self.support(own, other, target)
        objects = self.objects(own) if self.objects is not None else None
        own_pixels, other_pixels = self.read(own), self.read(other)
        best: dict[bool, tuple[float, Region, float, float]] = {}
        for region in regions_to_try(support, masked=objects is not None):
            masks = region.masks(support, objects)
            gain = self.share(exchange(other_pixels, own_pixels, masks), target)
            loss = 1 - self.share(exchange(own_pixels, other_pixels, masks), target)
            worth = gain + 0.5 * loss - float(masks.mean())
            if region.is_window not in best or worth > best[region.is_window][0]:
                best[region.is_window] = (worth, region, gain, loss)
        corners = best_windows(support, max(round(0.25 * min(support.shape[1:])), 1))
        options, found = self.options, []
        for _, region, gain, loss in best.values():
            same = region.is_window and loss >= options.great_loss
            promising = gain >= options.promising or (
                same and self.same_pixels(region, own, support) >= options.same_pixels
            )
            found.append(_Search(target, region, promising, corners, test_own, test_other))
        return found

    def share(self, pixels: Tensor, target: int) -> float:
        """Share of the images that the network takes for the class."""
        return float(decided(self.forward, pixels, target).float().mean())

    def test(self, found: _Search, all_found: Sequence[_Search]) -> ClassTest:
        """The region on fresh images, with its controls and signs."""
        rng = np.random.default_rng([self.options.seed, found.target, 1])
        own, other = found.test_own, found.test_other
        third = rng.permutation(np.flatnonzero((self.labels != found.target) & (self.predictions != found.target)))
        third = np.resize(third, len(own))
        moves = found.region.kind == "patch"
        shape = (len(own), *self.pixels(own[:1]).shape[2:])
        support = self.support(own, other, found.target) if moves else torch.zeros(shape)
        objects = self.objects(own) if self.objects is not None else None
        masks = found.region.masks(support, objects).to(self.pixels(own[:1]).device)
        outcome = swap(
            self.forward,
            self.read(own),
            self.read(other),
            masks,
            found.target,
            third=self.read(third),
            same=None if moves else self.read(np.roll(own, 1)),
            elsewhere=elsewhere(masks, torch.Generator().manual_seed(self.options.seed)) if moves else None,
        )
        size = found.region.size if found.region.kind in ("place", "patch") else 0
        height, width = support.shape[1:]
        corners = best_windows(support, size) if found.region.kind == "patch" else [found.region.corner] * len(own)
        boxes = [(y / height, x / width, size / height, size / width) for y, x in corners] if size else []
        measured = self.signs(found, all_found, support, masks)
        return _class_test(
            found.target, found.region.kind, outcome, area=float(masks.mean()), boxes=boxes, images=own.tolist(),
            others=other.tolist(),
            size=found.region.size,
            signs=measured,
        )  # fmt: skip

    def signs(
        self, found: _Search, all_found: Sequence[_Search], support: Tensor, masks: Tensor
    ) -> dict[str, float]:  # fmt: skip
        """The signs of a region, by name."""
        measured: dict[str, float] = {}
        if found.region.kind == "border":
            measured["border of the picture"] = 1.0
        if self.objects is not None:
            measured["off the object"] = signs.outside_share(masks, self.objects(found.test_own))
        if found.region.kind in ("place", "patch"):
            window = max(round(0.25 * min(support.shape[1:])), 1)
            own = best_windows(support, window) if found.region.kind == "patch" else found.corners
            place = tuple(int(v) for v in np.median(np.array(own), axis=0))
            mine = signs.share_at_place(own, (place[0], place[1]), window)
            theirs = [
                corner
                for other in all_found
                if other.target != found.target and other.region.is_window
                for corner in other.corners
            ]
            against = signs.share_at_place(theirs, (place[0], place[1]), window)
            if not signs.covers_middle(place[0], place[1], window, support.shape[1:]):
                measured["always at one place"] = mine[0] / mine[1]
                measured["place, p-value"] = signs.place_p_value(mine, against)
            measured["same pixels"] = self.same_pixels(found.region, found.test_own, support)
        return measured

    def same_pixels(self, region: Region, index: np.ndarray, support: Tensor) -> float:
        """Share of a window's pixels that are the same in nearly all images; 0 for other regions.

        For a window that lies elsewhere in each image, smaller ones are tried too: a cue that does not fill the window
        lies at another place in it each time.
        """
        if not region.is_window:
            return 0.0
        sizes = window_sizes(support.shape[1:]) if region.kind == "patch" else []
        pixels, found = self.pixels(index), 0.0
        for size in {region.size, *(size for size in sizes if size < region.size)}:
            corners = best_windows(support, size) if region.kind == "patch" else [region.corner] * len(index)
            edge = size // 3
            side = size + 2 * edge
            padded = torch.nn.functional.pad(pixels, (edge, edge, edge, edge), mode="reflect")
            windows = [p[:, y : y + side, x : x + side] for p, (y, x) in zip(padded, corners, strict=True)]
            found = max(found, signs.same_pixels(torch.stack(windows)))
        return found

    def cue(self, target: int, cue: Cue, own_levels: Tensor, other_levels: Tensor) -> ClassTest | None:
        """The test of a cue for a class, None where its images do not differ in it."""
        difference = level_difference(own_levels, other_levels)
        if max(difference, 1 - difference) < self.options.level:
            return None
        _, _, own, other = self.pairs(target)
        own_pixels, other_pixels = self.pixels(own), self.pixels(other)
        give = cue.strength(other_pixels, float(own_levels.median()))
        take = cue.strength(own_pixels, float(other_levels.median()))

        def answers(pixels: Tensor, strength: float) -> Tensor:
            changed = self.normalise(cue.change(pixels, strength)).contiguous(memory_format=torch.channels_last)
            return decided(self.forward, changed, target)

        outcome = Swaps(
            ~answers(own_pixels, take),
            ~answers(own_pixels, -take),
            answers(other_pixels, give),
            answers(other_pixels, -give),
        )
        differs = {"its images differ": max(difference, 1 - difference)}
        detail = cue.more if difference > 0.5 else cue.less
        return _class_test(
            target,
            cue.name,
            outcome,
            area=1.0,
            images=own.tolist(),
            others=other.tolist(),
            signs=differs,
            detail=detail,
        )


def _class_test(target: int, kind: str, outcome: Swaps, **facts: Any) -> ClassTest:
    n = len(outcome.gained)
    interval = binomtest(int(outcome.gained.sum()), n).proportion_ci()
    return ClassTest(
        class_index=target,
        kind=kind,
        gained=float(outcome.gained.float().mean()),
        lost=float(outcome.lost.float().mean()),
        gained_control=float(outcome.gained_control.float().mean()),
        lost_control=float(outcome.lost_control.float().mean()),
        low=float(interval.low),
        high=float(interval.high),
        p_value=_mcnemar(outcome.gained, outcome.gained_control),
        lost_p_value=_mcnemar(outcome.lost, outcome.lost_control),
        n=n,
        **facts,
    )


def _mcnemar(effect: Tensor, control: Tensor) -> float:
    """One-sided exact McNemar test that ``effect`` is true more often than ``control`` in the same pairs."""
    up, down = int((effect & ~control).sum()), int((~effect & control).sum())
    return float(binomtest(up, up + down, 0.5, alternative="greater").pvalue) if up + down else 1.0


def region_masks(test: ClassTest, height: int, width: int, objects: Tensor | None = None) -> Tensor:
    """(N, 1, H, W): the region of a test in each of its images; ``objects`` (N, H, W) for the background."""
    n = len(test.images)
    if test.kind in ("border", "background"):
        return Region(test.kind, test.size).masks(torch.zeros(n, height, width), objects)
    masks = torch.zeros(n, 1, height, width)
    for mask, (y, x, *_) in zip(masks, test.boxes, strict=True):
        top, left = round(y * height), round(x * width)
        mask[:, top : top + test.size, left : left + test.size] = 1
    return masks


def _some_of_each(labels: np.ndarray, most: int) -> np.ndarray:
    """At most ``most`` images of each class, drawn at random."""
    rng = np.random.default_rng(0)
    classes = np.unique(labels[labels >= 0])
    return np.sort(np.concatenate([rng.permutation(np.flatnonzero(labels == c))[:most] for c in classes]))


@torch.no_grad()
def _levels(pixels: Pixels, images: np.ndarray, cue: Cue) -> Tensor:
    return torch.cat([cue.level(pixels(images[i : i + 64])) for i in range(0, len(images), 64)]).cpu()


def audit_classes(
    forward: Forward,
    pixels: Pixels,
    normalise: Callable[[Tensor], Tensor],
    labels: np.ndarray,
    predictions: np.ndarray,
    *,
    objects: Callable[[np.ndarray], Tensor] | None = None,
    options: AuditOptions | None = None,
    progress: Progress | None = None,
) -> Audit:
    """Searches and tests every class that has enough images.

    Parameters
    ----------
    forward : normalised pixels (N, channels, H, W) to logits (N, classes), differentiable.
    pixels : image indices to pixels in 0..1; normalise : those to what ``forward`` takes.
    labels, predictions : (N,) classes of all images; -1 for an unknown label.
    objects : image indices to masks (N, H, W), True on the object, where annotations are at hand.

    Returns
    -------
    Findings, the strongest first, and all tests.
    """
    options, progress = options or AuditOptions(), progress or Silent()
    auditor = _Auditor(forward, pixels, normalise, labels, predictions, objects, options)
    right = labels[(labels == predictions) & (labels >= 0)]
    counts = np.bincount(right, minlength=1)
    order = [int(c) for c in np.argsort(-counts, kind="stable") if counts[c] > 0]
    tested = [c for c in order if counts[c] >= options.least_images][: options.max_classes]
    if len(set(labels[labels >= 0].tolist())) < 2:
        tested = []
    progress.start("search for what decides", len(tested), unit="classes")
    found: list[_Search] = []
    for target in tested:
        found += auditor.search(target)
        progress.advance()
    progress.finish()
    tests = [auditor.test(one, found) for one in found if one.promising]
    known = _some_of_each(labels, options.levels)
    progress.start("colour, sharpness, contrast", len(CUES), unit="cues")
    for cue in CUES if tested else ():
        levels = _levels(pixels, known, cue)
        for target in tested:
            is_own = torch.from_numpy(labels[known] == target)
            one = auditor.cue(target, cue, levels[is_own], levels[~is_own])
            if one is not None:
                tests.append(one)
        progress.advance()
    progress.finish()
    untested = sorted(set(order) - set(tested))
    return Audit(decide(tests, options), tests, untested, len(tested))


def decide(tests: Sequence[ClassTest], options: AuditOptions) -> list[Finding]:
    """Which tests are findings, the strongest first; a window of a class stands for its border and background."""
    if not tests:
        return []
    q_values = false_discovery_control([p for t in tests for p in (t.p_value, t.lost_p_value)]).reshape(-1, 2)
    found = []
    for test, (gained_q, lost_q) in zip(tests, q_values.tolist(), strict=True):
        signs = _strong_signs(test, options)
        loss, is_cue = test.lost - test.lost_control, test.kind in _CUE_NAMES
        put_in = gained_q <= options.false_discoveries and test.low >= options.least_gain
        lost = lost_q <= options.false_discoveries
        taken_out = lost and loss >= (options.least_loss if is_cue else max(options.least_loss, test.area))
        if "same pixels" in signs:  # no object: one of the two is enough
            used = put_in or (lost and loss >= options.great_loss)
        else:
            used = put_in and (taken_out or is_cue)
        if signs and used:
            evidence = (*(["put in"] * put_in), *(["taken out"] * taken_out), *signs)
            found.append(Finding(test, gained_q if put_in else lost_q, evidence))
    windows = {f.test.class_index for f in found if f.test.boxes}
    found = [f for f in found if f.test.boxes or f.test.kind in _CUE_NAMES or f.test.class_index not in windows]
    return sorted(found, key=lambda f: -max(f.test.gained - f.test.gained_control, f.test.lost - f.test.lost_control))


_CUE_NAMES = {cue.name for cue in CUES}


def _strong_signs(test: ClassTest, options: AuditOptions) -> list[str]:
    """Names of the signs that are strong enough."""
    s = test.signs
    found: list[str] = [name for name in ("border of the picture", "its images differ") if name in s]
    if s.get("always at one place", 0) >= options.place and s["place, p-value"] <= options.false_discoveries:
        found.append("always at one place")
    if s.get("same pixels", 0) >= options.same_pixels:
        found.append("same pixels")
    if s.get("off the object", 0) >= options.outside:
        found.append("off the object")
    return found

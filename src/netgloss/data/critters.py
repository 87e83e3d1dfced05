"""Critters: a procedural benchmark of part-made creatures with exact masks, that needs no download.

The class of a scene is the combination of three part variants (crest, wings, tail), so that no single part decides it.
Legs, eyes, colours, pose and occluders mean nothing; background and beak mean nothing either, unless a correlation is
asked for: then they are the shortcuts that a network may or may not have learned.

Scene i depends on (seed, i) and the options only: not on the number of scenes, on the order of the calls or on the
machine, and a scene at 128 px is the scene at 64 px drawn finer. Creature, background and occluder draw from streams of
their own, so that changing one option leaves the others' part of the scene alone.

Shape letters: N scenes, S pixels along a side.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import numbers
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from netgloss.data import critters_draw as draw
from netgloss.data.annotations import ImageAnnotation
from netgloss.errors import UserError, nearest

GENERATOR_VERSION = 1
"""Raised whenever any scene of any config changes."""

DECISIVE = ("crest", "wings", "tail")
"""The attributes whose variants together are the class."""

_GRIDS = {4: (2, 2, 1), 8: (2, 2, 2), 12: (3, 2, 2), 18: (3, 3, 2), 27: (3, 3, 3)}
_GROUPS = (("crest",), ("left wing", "right wing"), ("tail",))
_CREATURE, _BACKGROUND, _OCCLUDER, _GRAIN, _CLASSES = range(5)


@dataclass(frozen=True)
class CrittersConfig:
    """Options of the scenes.

    Raises
    ------
    UserError : an option out of range.
    """

    size: int = 64
    """Pixels along a side, 32 to 1024."""
    seed: int = 0
    """Every scene of another seed is another scene."""
    num_classes: int = 8
    """4, 8, 12, 18 or 27: the number of combinations of crest, wing and tail variants."""
    background_correlation: float = 0.0
    """Share of scenes whose background is their class's own; the others draw any background, evenly."""
    beak_correlation: float = 0.0
    """The same for the beak."""
    occlusion: bool = True
    """Put a reed or a leaf before half of the creatures; it never hides half of a part that decides the class."""

    def __post_init__(self) -> None:
        if not 32 <= self.size <= 1024:
            raise UserError(f"the size of critters must be between 32 and 1024 pixels, got {self.size}")
        if self.seed < 0:
            raise UserError(f"the seed of critters must be 0 or more, got {self.seed}")
        if self.num_classes not in _GRIDS:
            known = ", ".join(map(str, _GRIDS))
            raise UserError(f"critters have {known} classes, got num_classes={self.num_classes}")
        for name in ("background_correlation", "beak_correlation"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} must be between 0 and 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Scene:
    """One scene and all that is true of it.

    Attributes
    ----------
    image : RGB, S x S pixels.
    target, class_name : the class.
    mask : (S, S); k at pixels whose centre shows ``PARTS[k - 1]``, 0 at background and occluder.
    keypoints : part -> (x, y, visible), pixels from the image's corner (the first pixel spans 0 to 1); visible if the
        mask shows the part at that pixel.
    boxes : visible part -> (x0, y0, x1, y1), pixels, the tight box of its mask.
    attributes : what was drawn: variants by name, colours (hues 0..1), pose (degrees, shares of the side), occluder.
    """

    image: Image.Image
    target: int
    class_name: str
    mask: NDArray[np.uint8]
    keypoints: dict[str, tuple[float, float, bool]]
    boxes: dict[str, tuple[float, float, float, float]]
    attributes: dict[str, Any]


class Critters:
    """``num_scenes`` scenes of a config; an image source like those of ``netgloss.data.sources``.

    Parameters
    ----------
    config : the options; default ``CrittersConfig()``.
    num_scenes : N. Each block of ``num_classes`` scenes holds every class once, in an order of its own.

    Attributes
    ----------
    part_names : the parts; mask value k is ``part_names[k - 1]``.
    class_names : like ``"horned striped fantail"``.
    class_rules : class name -> {"crest": variant, "wings": variant, "tail": variant}.
    irrelevant_parts : the parts that never bear on the class (the beak goes with it if ``beak_correlation`` > 0).
    """

    part_names = draw.PARTS
    irrelevant_parts = tuple(part for part in draw.PARTS if part not in itertools.chain(*_GROUPS))

    def __init__(self, config: CrittersConfig | None = None, num_scenes: int = 2000) -> None:
        if num_scenes < 1:
            raise UserError(f"critters need at least 1 scene, got {num_scenes}")
        self.config = config or CrittersConfig()
        self.num_scenes = num_scenes
        variants = (draw.VARIANTS[name][:n] for name, n in zip(DECISIVE, _GRIDS[self.config.num_classes], strict=True))
        rules = [dict(zip(DECISIVE, combination, strict=True)) for combination in itertools.product(*variants)]
        self.class_rules = {" ".join(rule.values()): rule for rule in rules}
        self.class_names = list(self.class_rules)

    def __len__(self) -> int:
        return self.num_scenes

    def __repr__(self) -> str:
        return f"Critters({self.config}, {self.num_scenes})"

    @property
    def description(self) -> str:
        return f"{self.num_scenes} critters of {self.config.size} px, seed {self.config.seed}"

    @cached_property
    def ids(self) -> list[str]:
        return [f"critters-{i:06d}" for i in range(self.num_scenes)]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of everything that the scenes follow from."""
        what = {"critters": GENERATOR_VERSION, "num_scenes": self.num_scenes, **dataclasses.asdict(self.config)}
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()

    @cached_property
    def targets(self) -> NDArray[np.int64]:
        """Classes (N,), without drawing anything."""
        size = self.config.num_classes
        return np.concatenate([self._block(b) for b in range(-(-self.num_scenes // size))])[: self.num_scenes]

    def _block(self, block: int) -> NDArray[np.int64]:
        return np.argsort(self._stream(block, _CLASSES).random(self.config.num_classes), kind="stable")

    def _stream(self, i: int, stream: int) -> np.random.Generator:
        """Only ``.random`` is drawn from it: PCG64's doubles do not change between releases of numpy."""
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.config.seed, i, stream])))

    def attributes(self, i: int) -> dict[str, Any]:
        """What scene ``i`` shows, before drawing."""
        if not 0 <= i < self.num_scenes:
            raise IndexError(f"scene {i} of {self.num_scenes}")
        target = int(self._block(i // self.config.num_classes)[i % self.config.num_classes])
        creature, background = _Draws(self._stream(i, _CREATURE)), _Draws(self._stream(i, _BACKGROUND))
        occluder = _Draws(self._stream(i, _OCCLUDER))
        scale = creature.between(0.28, 0.35)
        play = 0.5 - 1.4 * scale  # hardly any creature reaches further from its middle, whatever its angle
        attributes: dict[str, Any] = {
            **self.class_rules[self.class_names[target]],
            "beak": creature.shortcut(draw.VARIANTS["beak"], self.config.beak_correlation, target),
            "legs": creature.choice(draw.VARIANTS["legs"]),
            "x": 0.5 + creature.between(-play, play),
            "y": 0.5 + creature.between(-play, play),
            "scale": scale,
            "angle": creature.between(-25.0, 25.0),
            "tail_side": creature.choice((-1, 1)),
            "turn": creature.between(-1.0, 1.0),
            "eye_size": creature.between(0.11, 0.17),
            "body_width": creature.between(0.42, 0.54),
            "leg_length": creature.between(0.1, 0.28),
            "wing_lift": creature.between(0.0, 25.0),
            "hue": creature.between(0.0, 1.0),
            "saturation": creature.between(0.45, 0.85),
            "value": creature.between(0.6, 0.9),
            "accent_hue": creature.between(0.0, 1.0),
            "light": creature.between(-0.12, 0.12),
            "background": background.shortcut(draw.VARIANTS["background"], self.config.background_correlation, target),
            "background_hue": background.between(0.0, 1.0),
            "background_saturation": background.between(0.08, 0.35),
            "background_angle": background.between(0.0, 180.0),
            "background_frequency": background.between(5.0, 9.0),
            "background_phase": background.between(0.0, 1.0),
            "occluder": "none",
        }
        if self.config.occlusion and occluder.between(0.0, 1.0) < 0.5:
            attributes["occluder"] = occluder.choice(draw.VARIANTS["occluder"][1:])
        return attributes

    def scene(self, i: int, **changes: Any) -> Scene:
        """Draw scene ``i``, with some of its attributes changed and all else equal (``scene(3, tail="pomtail")``).

        Raises
        ------
        UserError : an attribute or a variant that does not exist, or a combination that is no class of this config.
        IndexError : no such scene.
        """
        attributes = self.attributes(i)
        for name, value in changes.items():
            _check_change(name, value, attributes)
        attributes |= changes
        class_name = " ".join(attributes[name] for name in DECISIVE)
        if class_name not in self.class_rules:
            raise UserError(f"{class_name!r} is none of the {self.config.num_classes} classes of these critters")
        # (x, y) is the middle of the creature's height, 0.12 units above its origin.
        cos, sin = draw.turn(attributes["angle"])
        lift = 0.12 * attributes["scale"]
        center = attributes["x"] - sin * lift, attributes["y"] + cos * lift
        canvas = draw.Canvas(self.config.size, center=center, scale=attributes["scale"], angle=attributes["angle"])
        points = draw.draw_creature(canvas, attributes)
        if attributes["occluder"] != "none":
            attributes["occluder"] = self._occlude(canvas, i, attributes["occluder"])
        grain = self._stream(i, _GRAIN)
        colors = canvas.image(draw.draw_background(canvas, attributes, grain.random((12, 12))))
        size = self.config.size
        colors *= (1 + attributes["light"] * (2 * canvas.x[:, 1 :: draw.SUPER] - 1))[:, :, None]
        colors += (grain.random((size, size, 3), dtype=np.float32) - np.float32(0.5)) * np.float32(0.06)
        mask = canvas.mask()
        return Scene(
            image=Image.fromarray((np.clip(colors, 0, 1) * 255 + 0.5).astype(np.uint8)),
            target=self.class_names.index(class_name),
            class_name=class_name,
            mask=mask,
            keypoints={part: (*point, _shows(mask, point, k)) for k, (part, point) in enumerate(points.items(), 1)},
            boxes=dict(_boxes(mask)),
            attributes=attributes,
        )

    def _occlude(self, canvas: draw.Canvas, i: int, variant: str) -> str:
        stream = self._stream(i, _OCCLUDER)
        stream.random(2)  # the two draws of `attributes`
        tries = (draw.draw_occluder(canvas, variant, stream.random(5).tolist(), _GROUPS) for _ in range(8))
        return variant if any(tries) else "none"

    # -- image source -------------------------------------------------------------------------------------------------

    def image(self, i: int) -> Image.Image:
        """RGB image of scene ``i``."""
        return self.scene(i).image

    def annotation(self, i: int) -> ImageAnnotation:
        """Mask, boxes and visible keypoints of scene ``i``; all parts are annotated: absent means hidden."""
        scene = self.scene(i)
        return ImageAnnotation(
            size=(self.config.size, self.config.size),
            boxes=[(part, *box) for part, box in scene.boxes.items()],
            keypoints=[(part, x, y) for part, (x, y, visible) in scene.keypoints.items() if visible],
            mask=scene.mask,
            mask_labels=dict(enumerate(self.part_names, 1)),
        )


class _Draws:
    """Uniform doubles in the order of the calls; every choice takes the same number, whatever the options."""

    def __init__(self, generator: np.random.Generator) -> None:
        self.generator = generator

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * float(self.generator.random())

    def choice(self, options: tuple[Any, ...]) -> Any:
        return options[int(len(options) * self.generator.random())]

    def shortcut(self, options: tuple[str, ...], rate: float, target: int) -> str:
        """The class's own option in a share ``rate`` of the calls, otherwise any."""
        own, other = self.generator.random() < rate, self.choice(options)
        return options[target % len(options)] if own else other


def _check_change(name: str, value: Any, attributes: dict[str, Any]) -> None:
    if name not in attributes:
        hint = nearest(name, attributes) or sorted(attributes)
        raise UserError(f"critters have no attribute {name!r}; did you mean {', '.join(hint)}?")
    if name in draw.VARIANTS and value not in draw.VARIANTS[name]:
        raise UserError(f"{name} of a critter is one of {', '.join(draw.VARIANTS[name])}, got {value!r}")
    if name not in draw.VARIANTS and not isinstance(value, numbers.Real):
        raise UserError(f"{name} of a critter is a number, got {value!r}")


def _shows(mask: NDArray[np.uint8], point: draw.Point, value: int) -> bool:
    column, row = int(point[0] // 1), int(point[1] // 1)
    return 0 <= row < mask.shape[0] and 0 <= column < mask.shape[1] and bool(mask[row, column] == value)


def _boxes(mask: NDArray[np.uint8]) -> Iterator[tuple[str, tuple[float, float, float, float]]]:
    for value, part in enumerate(draw.PARTS, 1):
        shown = mask == value
        rows, columns = shown.any(1).nonzero()[0], shown.any(0).nonzero()[0]
        if len(rows):
            yield part, (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))

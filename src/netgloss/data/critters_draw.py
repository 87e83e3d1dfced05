"""Drawing of Critters scenes: the attributes of a scene in, its image, part mask and keypoints out.

A creature is drawn in its own frame (u to the right, v down, body near the origin, about 2.5 units high) as signed
distances of ellipses, tapered capsules and convex polygons, evaluated at SUPER x SUPER samples a pixel. Every sample
holds the number of the last shape painted there; colour and part are both looked up from it, so that mask and picture
agree. A pixel's colour is the mean of its samples, its part that of its middle sample, the pixel's centre.

Only +, -, *, / and sqrt touch arrays (no vendor-dependent sine), so that scenes agree between machines.

Shape letters: S pixels along a side, n = SUPER * S samples along a side, h x w the samples around one shape.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

SUPER = 3

PARTS = (
    "body",
    "head",
    "left eye",
    "right eye",
    "beak",
    "left wing",
    "right wing",
    "tail",
    "left leg",
    "right leg",
    "crest",
)
"""Part of mask value k at position k - 1; left and right are the creature's own (its left is on the image's right)."""

VARIANTS = {
    "crest": ("horned", "tufted", "bobbled"),
    "wings": ("striped", "spotted", "plain"),
    "tail": ("fantail", "forktail", "pomtail"),
    "beak": ("pointed", "billed", "snub"),
    "legs": ("stilts", "boots"),
    "background": ("stripes", "dots", "noise", "checks", "gradient", "waves", "rings", "bricks"),
    "occluder": ("none", "reed", "leaf"),
}
"""The named variants of each attribute that has names."""

Array = NDArray[np.floating[Any]]
"""Always float32; the type checker takes float32 times float for float64."""
Color = tuple[float, float, float]
Point = tuple[float, float]
Shape = Callable[[Array, Array], Array]
"""Signed distance, below zero inside, in the creature's units: (u, v) arrays (h, w) -> (h, w)."""

_INK: Color = (0.13, 0.10, 0.14)
_LINE = 0.045


# -- shapes -----------------------------------------------------------------------------------------------------------


def ellipse(center: Point, radii: Point, tilt: float = 0.0) -> Shape:
    """Ellipse turned by ``tilt`` degrees; first-order distance (r - 1) r / |grad r^2 / 2|, exact on the boundary."""
    cos, sin = turn(tilt)

    def distance(u: Array, v: Array) -> Array:
        a = (cos * (u - center[0]) + sin * (v - center[1])) / radii[0]
        b = (cos * (v - center[1]) - sin * (u - center[0])) / radii[1]
        square = a * a + b * b
        slope = np.sqrt((a / radii[0]) ** 2 + (b / radii[1]) ** 2) + 1e-6
        return (square - 1) / (2 * slope)

    return distance


def capsule(start: Point, end: Point, start_radius: float, end_radius: float) -> Shape:
    """Segment with round ends whose radius changes linearly from start to end."""
    du, dv = end[0] - start[0], end[1] - start[1]
    length2 = du * du + dv * dv

    def distance(u: Array, v: Array) -> Array:
        along = np.clip(((u - start[0]) * du + (v - start[1]) * dv) / length2, 0, 1)
        gap_u, gap_v = u - start[0] - along * du, v - start[1] - along * dv
        return np.sqrt(gap_u * gap_u + gap_v * gap_v) - (start_radius + along * (end_radius - start_radius))

    return distance


def polygon(*corners: Point) -> Shape:
    """Convex polygon, corners clockwise on the screen: the largest distance to its edges' lines."""

    def distance(u: Array, v: Array) -> Array:
        far = np.full_like(u, -np.inf)
        for (u0, v0), (u1, v1) in zip(corners, corners[1:] + corners[:1], strict=True):
            length = math.hypot(u1 - u0, v1 - v0)
            np.maximum(far, ((v1 - v0) * (u - u0) - (u1 - u0) * (v - v0)) / length, out=far)
        return far

    return distance


def turn(degrees: float) -> Point:
    """(cos, sin) of an angle in degrees."""
    return math.cos(math.radians(degrees)), math.sin(math.radians(degrees))


def _toward(start: Point, degrees: float, length: float) -> Point:
    """The point ``length`` away from ``start``; 0 degrees is right, 90 down."""
    cos, sin = turn(degrees)
    return start[0] + length * cos, start[1] + length * sin


# -- canvas -----------------------------------------------------------------------------------------------------------


class Canvas:
    """Samples (n, n) of a square scene, seen from the frame of a creature.

    Parameters
    ----------
    size : pixels S along a side.
    center : place of the creature's origin in the scene, in sides (0..1 from left and from top).
    scale : length of one unit of the creature, in sides.
    angle : in-plane rotation in degrees, clockwise on the screen.
    """

    def __init__(self, size: int, *, center: Point, scale: float, angle: float) -> None:
        self.size, self.center, self.scale = size, center, scale
        self.cos, self.sin = turn(angle)
        n = size * SUPER
        at = (np.arange(n, dtype=np.float32) + np.float32(0.5)) / n
        self.x, self.y = at[None, :], at[:, None]
        dx, dy = (self.x - center[0]) / scale, (self.y - center[1]) / scale
        self.u: Array = self.cos * dx + self.sin * dy
        self.v: Array = self.cos * dy - self.sin * dx
        self.shape_ids = np.zeros((n, n), np.uint8)
        self._colors: list[Color] = [(0.0, 0.0, 0.0)]
        self._parts: list[int] = [0]
        self._part = 0

    def to_pixels(self, point: Point) -> Point:
        """Creature's (u, v) -> image (x, y) in pixels; (0, 0) is the outer corner of the first pixel."""
        x = self.center[0] + self.scale * (self.cos * point[0] - self.sin * point[1])
        y = self.center[1] + self.scale * (self.sin * point[0] + self.cos * point[1])
        return x * self.size, y * self.size

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Shapes painted inside belong to this part; outside to none."""
        self._part = PARTS.index(name) + 1
        yield
        self._part = 0

    def window(self, middle: Point, reach: float) -> tuple[slice, slice]:
        """Rows and columns of the samples within ``reach`` of ``middle`` (creature's units)."""
        x, y = self.to_pixels(middle)
        half = reach * self.scale * self.size
        top, bottom, left, right = (
            max(0, math.floor(SUPER * e)) for e in (y - half, y + half + 1, x - half, x + half + 1)
        )
        return slice(top, bottom), slice(left, right)

    def paint(self, shape: Shape, middle: Point, reach: float, fill: Color, *, line: float = _LINE) -> None:
        """Paint the shape, which lies within ``reach`` of ``middle``; its rim, ``line`` wide, in ink."""
        rows, columns = self.window(middle, reach)
        distance = shape(self.u[rows, columns], self.v[rows, columns])
        ids = self.shape_ids[rows, columns]
        if line:
            ids[distance < 0] = self._number(_INK)
        ids[distance < -line] = self._number(fill)

    def _number(self, color: Color) -> int:
        self._colors.append(color)
        self._parts.append(self._part)
        assert len(self._colors) <= 256
        return len(self._colors) - 1

    def part_counts(self) -> NDArray[np.int64]:
        """Samples of each mask value (1 + number of parts,)."""
        per_shape = np.bincount(self.shape_ids.ravel(), minlength=len(self._parts))
        return np.bincount(self._parts, weights=per_shape, minlength=len(PARTS) + 1).astype(np.int64)

    def mask(self) -> NDArray[np.uint8]:
        """Mask (S, S): 1 + index into PARTS of the part at each pixel's centre, 0 elsewhere."""
        middle = SUPER // 2
        return np.asarray(self._parts, np.uint8)[self.shape_ids[middle::SUPER, middle::SUPER]]

    def image(self, background: Array) -> Array:
        """Colours (S, S, 3) in 0..1; ``background`` (n, n, 3) shows where nothing was painted."""
        samples = np.asarray(self._colors, np.float32)[self.shape_ids]
        np.copyto(samples, background, where=(self.shape_ids == 0)[:, :, None])
        rows = samples[0::SUPER] + samples[1::SUPER] + samples[2::SUPER]
        return (rows[:, 0::SUPER] + rows[:, 1::SUPER] + rows[:, 2::SUPER]) / (SUPER * SUPER)


# -- creature ---------------------------------------------------------------------------------------------------------


def draw_creature(canvas: Canvas, a: Mapping[str, Any]) -> dict[str, Point]:
    """Paint the creature with attributes ``a`` from back to front; returns a keypoint (x, y), pixels, of every part."""
    skin = _hsv(a["hue"], a["saturation"], a["value"])
    pale = _hsv(a["hue"], 0.45 * a["saturation"], 0.55 + 0.45 * a["value"])
    accent = _hsv(a["accent_hue"], 0.75, 0.95)
    deep = _hsv(a["accent_hue"], 0.8, 0.42)
    keypoints = {
        "tail": _tail(canvas, a["tail"], a["tail_side"], accent, deep),
        **_legs(canvas, a["legs"], a["leg_length"]),
    }
    width = a["body_width"]
    with canvas.part("body"):
        canvas.paint(ellipse((0, 0.3), (width, 0.58)), (0, 0.3), 0.75, skin)
        canvas.paint(ellipse((0, 0.42), (0.6 * width, 0.4)), (0, 0.42), 0.45, pale, line=0)
    keypoints["body"] = (0.0, 0.4)
    for side, name in ((1, "left wing"), (-1, "right wing")):
        keypoints[name] = _wing(canvas, name, a["wings"], side, width, a["wing_lift"], accent, deep)
    keypoints["crest"] = _crest(canvas, a["crest"], accent, deep)
    with canvas.part("head"):
        canvas.paint(ellipse((0, -0.5), (0.47, 0.42)), (0, -0.5), 0.5, skin)
    keypoints["head"] = (0.0, -0.76)
    face = 0.1 * a["turn"]
    for side, name in ((1, "left eye"), (-1, "right eye")):
        eye = (face + 0.19 * side, -0.56)
        with canvas.part(name):
            canvas.paint(ellipse(eye, (a["eye_size"], a["eye_size"])), eye, 0.2, (0.98, 0.98, 0.96))
            pupil = (eye[0] + 0.3 * face, eye[1] + 0.01)
            canvas.paint(ellipse(pupil, (0.55 * a["eye_size"],) * 2), pupil, 0.2, _INK, line=0)
        keypoints[name] = eye
    keypoints["beak"] = _beak(canvas, a["beak"], face)
    return {name: canvas.to_pixels(keypoints[name]) for name in PARTS}


def _tail(canvas: Canvas, variant: str, side: int, accent: Color, deep: Color) -> Point:
    root, middle = (0.28 * side, 0.68), (0.7 * side, 0.78)

    def feather(degrees: float, length: float, thin: float, thick: float, color: Color) -> Point:
        tip = _toward(root, degrees if side > 0 else 180 - degrees, length)
        canvas.paint(capsule(root, tip, thin, thick), middle, 0.9, color)
        return tip

    with canvas.part("tail"):
        if variant == "fantail":
            for degrees, color in ((-32, deep), (48, deep), (-12, accent), (28, accent)):
                feather(degrees, 0.62, 0.06, 0.17, color)
            tip = feather(8, 0.64, 0.06, 0.17, deep)
        elif variant == "forktail":
            feather(-14, 0.78, 0.13, 0.05, accent)
            tip = feather(40, 0.78, 0.13, 0.05, accent)
        else:
            tip = feather(16, 0.58, 0.07, 0.06, deep)
            canvas.paint(ellipse(tip, (0.22, 0.22)), tip, 0.3, accent)
            return tip
    return root[0] + 0.72 * (tip[0] - root[0]), root[1] + 0.72 * (tip[1] - root[1])


def _legs(canvas: Canvas, variant: str, length: float) -> dict[str, Point]:
    boots = variant == "boots"
    color = (0.45, 0.28, 0.2) if boots else (0.95, 0.6, 0.15)
    thick = 0.11 if boots else 0.055
    keypoints = {}
    for side, name in ((1, "left leg"), (-1, "right leg")):
        hip, foot = (0.2 * side, 0.75), (0.23 * side, 0.85 + length)
        toe = (foot[0] + 0.06 * side, foot[1])
        with canvas.part(name):
            canvas.paint(capsule(hip, foot, thick, thick), foot, 0.6, color, line=0.6 * _LINE)
            canvas.paint(ellipse(toe, (0.17, 0.08)), toe, 0.25, color, line=0.6 * _LINE)
        keypoints[name] = foot
    return keypoints


def _wing(
    canvas: Canvas, name: str, variant: str, side: int, width: float, lift: float, accent: Color, deep: Color
) -> Point:
    center, tilt = (side * (width + 0.14), 0.2 - 0.004 * lift), side * -(20 + lift)
    along, across = turn(90 + tilt), turn(tilt)
    whole = ellipse(center, (0.29, 0.5), tilt)

    def at(length: float, breadth: float) -> Point:
        return tuple(center[k] + length * along[k] + breadth * across[k] for k in (0, 1))  # type: ignore[return-value]

    def inside(shape: Shape) -> Shape:
        return lambda u, v: np.maximum(shape(u, v), whole(u, v) + _LINE)

    with canvas.part(name):
        canvas.paint(whole, center, 0.55, accent)
        if variant == "striped":
            for length in (-0.27, 0.0, 0.27):
                canvas.paint(inside(capsule(at(length, -0.4), at(length, 0.4), 0.07, 0.07)), center, 0.55, deep, line=0)
        elif variant == "spotted":
            for length, breadth in ((-0.31, 0.0), (0.31, 0.0), (0.0, -0.135), (0.0, 0.135)):
                spot = at(length, breadth)
                canvas.paint(inside(ellipse(spot, (0.095, 0.095))), spot, 0.15, deep, line=0)
    return center


def _crest(canvas: Canvas, variant: str, accent: Color, deep: Color) -> Point:
    with canvas.part("crest"):
        if variant == "horned":
            canvas.paint(polygon((-0.15, -0.8), (0, -1.42), (0.15, -0.8)), (0, -1.1), 0.4, (0.97, 0.93, 0.8))
            return 0.0, -1.02
        if variant == "tufted":
            for degrees, color in ((-138, deep), (-42, deep), (-90, accent)):
                tip = _toward((0, -0.82), degrees, 0.36)
                canvas.paint(capsule((0, -0.82), tip, 0.06, 0.13), (0, -1.0), 0.6, color)
            return 0.0, -1.12
        canvas.paint(capsule((0, -0.8), (0, -1.2), 0.055, 0.055), (0, -1.0), 0.4, _INK)
        canvas.paint(ellipse((0, -1.22), (0.18, 0.18)), (0, -1.22), 0.25, accent)
        return 0.0, -1.22


def _beak(canvas: Canvas, variant: str, face: float) -> Point:
    orange, center = (0.98, 0.66, 0.12), (1.3 * face, -0.33)
    with canvas.part("beak"):
        if variant == "pointed":
            u = center[0]
            canvas.paint(polygon((u - 0.13, -0.44), (u + 0.13, -0.44), (u, -0.1)), center, 0.3, orange)
        elif variant == "billed":
            canvas.paint(ellipse(center, (0.24, 0.1)), center, 0.3, orange)
        else:
            canvas.paint(ellipse(center, (0.1, 0.1)), center, 0.2, (0.95, 0.45, 0.5))
    return center


def draw_occluder(canvas: Canvas, variant: str, draws: list[float], keep: tuple[tuple[str, ...], ...]) -> bool:
    """Paint a reed or a leaf over the creature, unless it hides half of any group of parts in ``keep``.

    Five ``draws`` in 0..1 place, turn, size and colour it. Returns whether it was painted.
    """
    middle = (2.0 * draws[0] - 1.0, 2.4 * draws[1] - 1.2)
    green = _hsv(0.2 + 0.2 * draws[2], 0.55, 0.35 + 0.3 * draws[3])
    before, ids = canvas.part_counts(), canvas.shape_ids.copy()
    tilt = 360 * draws[4]
    if variant == "reed":
        ends = _toward(middle, tilt, -4.0), _toward(middle, tilt, 4.0)
        canvas.paint(capsule(*ends, 0.09 + 0.08 * draws[2], 0.07), middle, 4.5, green)
    else:
        canvas.paint(ellipse(middle, (0.3 + 0.2 * draws[2], 0.17 + 0.08 * draws[3]), tilt), middle, 0.6, green)
    after = canvas.part_counts()
    groups = [[PARTS.index(part) + 1 for part in group] for group in keep]
    if all(2 * after[group].sum() > before[group].sum() for group in groups):
        return True
    canvas.shape_ids[:] = ids
    return False


# -- background -------------------------------------------------------------------------------------------------------


def draw_background(canvas: Canvas, a: Mapping[str, Any], grain: NDArray[np.float64]) -> Array:
    """Textured background (n, n, 3) in 0..1; ``grain`` (k, k) in 0..1 gives the cells of the noise texture."""
    t: NDArray[Any]
    cos, sin = turn(a["background_angle"])
    f = a["background_frequency"]
    p: Array = f * (cos * canvas.x + sin * canvas.y) + a["background_phase"]
    q: Array = f * (cos * canvas.y - sin * canvas.x) + a["background_phase"]
    match a["background"]:
        case "stripes":
            t = _frac(p) < 0.5
        case "dots":
            t = (_frac(p) - 0.5) ** 2 + (_frac(q) - 0.5) ** 2 < 0.09
        case "checks":
            t = (_frac(p) < 0.5) ^ (_frac(q) < 0.5)
        case "noise":
            t = _value_noise(canvas, grain)
        case "gradient":
            t = 0.5 + (cos * (canvas.x - 0.5) + sin * (canvas.y - 0.5)) / 1.42
        case "waves":
            t = _frac(p + 0.6 * np.abs(2 * _frac(q) - 1)) < 0.5
        case "rings":
            t = _frac(np.sqrt((p - a["background_phase"] - f * 0.3) ** 2 + (q - f * 0.3) ** 2)) < 0.5
        case _:
            t = (_frac(q) < 0.16) | (_frac(0.5 * p + 0.5 * (_frac(0.5 * q) < 0.5)) < 0.08)
    low = np.asarray(_hsv(a["background_hue"], a["background_saturation"], 0.5), np.float32)
    high = np.asarray(_hsv(a["background_hue"] + 0.05, a["background_saturation"], 0.8), np.float32)
    return low + (high - low) * np.asarray(t, np.float32)[:, :, None]


def _frac(x: Array) -> Array:
    return x - np.floor(x)


def _value_noise(canvas: Canvas, grain: NDArray[np.float64]) -> Array:
    """Bilinear interpolation of the cells (k, k) over the scene, (n, n)."""
    cells = grain.astype(np.float32)
    at = canvas.x[0] * (len(cells) - 1)
    low = at.astype(np.int64)
    t = at - low
    rows = cells[low] * (1 - t)[:, None] + cells[low + 1] * t[:, None]
    return rows[:, low] * (1 - t) + rows[:, low + 1] * t


def _hsv(hue: float, saturation: float, value: float) -> Color:
    return colorsys.hsv_to_rgb(hue % 1.0, saturation, value)

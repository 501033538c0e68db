"""Draws a small fine-grained data set for ``paco``: moths that differ in one mark alone.

All classes are the same moth, of any colour, pattern and pose, on any ground. On each forewing it
has a pale eye, and only the shape of the dark mark in it, always of the same area, tells the
class. NumPy and OpenCV only: nothing here, nor what it imports, loads torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.random import Generator

from engineworks.runtime import images
from engineworks.runtime.tensors import Array
from engineworks.training import drawing
from engineworks.training.drawing import SCALE, camera, light, noise

# Outlines in the moth's own lengths: x to its right, y to its tail, 1 the reach of a wing.
_ROOT = np.array([0.05, -0.12])  # about which a wing opens
_FOREWING = np.array(
    [[0.04, -0.24], [0.5, -0.6], [0.95, -0.66], [1.0, -0.36], [0.76, -0.02], [0.06, 0.1]]
)
_HINDWING = np.array(
    [[0.05, 0.0], [0.68, -0.06], [0.8, 0.24], [0.6, 0.56], [0.26, 0.66], [0.05, 0.34]]
)
_BODY = np.array([[0, -0.34], [0.09, -0.2], [0.09, 0.0], [0.06, 0.3], [0, 0.48]])
_EYE = np.array([0.6, -0.32])
_EYE_RADIUS = 0.26
_NUM_FLECKS = 14
_MARK_AREA = 0.55  # in squares of the eye's radius
_SUBPIXEL = 4  # bits behind the point in OpenCV's coordinates


def _arc(radius: float, start: float = 0, stop: float = 360, centre: float = 0) -> Array:
    """Points (33, 2) on a circle about (centre, 0), from and to an angle in degrees."""
    angle = np.radians(np.linspace(start, stop, 33))
    return np.stack([centre + radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _bars(width: float) -> Array:
    """A cross of two bars with arms of length 1."""
    w = width
    corner = np.array([[w, 1], [w, w], [1, w]])
    quarters = [corner * [1, 1], corner[::-1] * [1, -1], corner * [-1, -1], corner[::-1] * [-1, 1]]
    return np.concatenate(quarters)


# Closed outlines of each class's mark, before they are scaled to the same area; where two overlap,
# there is a hole.
MARKS: dict[str, tuple[Array, ...]] = {
    "bar": (np.array([[1, 0.28], [1, -0.28], [-1, -0.28], [-1, 0.28]]),),
    "crescent": (np.concatenate([_arc(1, 40, 320), _arc(0.78, 305, 55, 0.18)]),),
    "cross": (_bars(0.2),),
    "disc": (_arc(1),),
    "pair": (_arc(0.5, centre=-0.62), _arc(0.5, centre=0.62)),
    "ring": (_arc(1), _arc(0.62)),
}


def sample(
    out: Path,
    *,
    seed: int = 0,
    size: int = 144,
    num_train: int = 24,
    num_val: int = 8,
    num_test: int = 12,
) -> dict[str, int]:
    """Draw the data set.

    Args:
        out: folder to make: train/<class>, val/<class>, test/<class>, and video.mp4, in which one
            moth of each class passes.
        size: side of the pictures in pixels.
        num_train, num_val, num_test: pictures per class.

    Returns:
        Folder (relative to ``out``) or file -> number of pictures or frames in it.

    Raises:
        RunError: ``out`` already holds something.
    """
    drawing.check_empty(out)
    counts: dict[str, int] = {}
    # one stream of random numbers per picture: more pictures do not change the first ones
    for s, (split, num) in enumerate(
        {"train": num_train, "val": num_val, "test": num_test}.items()
    ):
        for c, name in enumerate(MARKS):
            folder = f"{split}/{name}"
            for i in range(num):
                picture = draw(np.random.default_rng((seed, s, c, i)), size, name)[0]
                images.write(out / folder / f"{i:03d}.jpg", picture)
            counts[folder] = num
    out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng((seed, 3))
    stations = [draw(rng, size, name)[0] for name in MARKS]
    counts["video.mp4"] = drawing.write_ride(out / "video.mp4", rng, stations)
    return counts


def draw(rng: Generator, size: int, name: str) -> tuple[Array, Array]:
    """One picture of one moth.

    Args:
        size: side in pixels.
        name: a class in ``MARKS``; from the same state of ``rng``, two classes differ nowhere but
            in the eyes.

    Returns:
        (size, size, 3) uint8 RGB and a (size, size) uint8 mask, 255 in the eyes.
    """
    side = size * SCALE
    canvas = _ground(rng, side)
    pose = _pose(rng, side)
    hue, tone = rng.uniform(0, 1), rng.uniform(100, 165)
    wings = _tint(hue, rng.uniform(0.1, 0.35)) * tone
    pale = _tint(hue + rng.uniform(-0.1, 0.1), 0.12) * rng.uniform(205, 235)
    dark = _tint(hue + rng.uniform(-0.3, 0.3), 0.3) * rng.uniform(30, 55)
    opening, slant = rng.uniform(-9, 9, 2)
    mark = _mark(name)
    eyes = np.zeros((side, side), np.float32)
    flecks = [
        rng.uniform([0.25, -0.5], [0.9, 0.5]) + _arc(rng.uniform(0.01, 0.035))
        for _ in range(_NUM_FLECKS)
    ]

    for mirror in (-1, 1):
        for outline, turn in ((_HINDWING, 0.5), (_FOREWING, 1.0)):
            wing = pose @ _wing(mirror, turn * opening + rng.uniform(-2, 2))
            alpha = _filled(side, [_placed(wing, _rounded(outline))])
            canvas = _shaded(canvas, alpha)
            pattern = _scales(rng, alpha, wings)
            spots = [_placed(wing, spot) for spot in flecks]
            pattern = _over(pattern, dark, 0.45 * _filled(side, spots))
            veins = [np.stack([_ROOT, tip]) for tip in outline[1:-1]]
            pattern = _over(pattern, dark, 0.5 * _lines(side, [_placed(wing, v) for v in veins]))
            if outline is _FOREWING:
                eye = _filled(side, [_placed(wing, _EYE + _arc(_EYE_RADIUS))])
                pattern = _over(pattern, pale, eye)
                inner = wing @ _turn(slant + rng.uniform(-15, 15), _EYE)
                shape = [_placed(inner, _EYE + _EYE_RADIUS * part) for part in mark]
                pattern = _over(pattern, dark, _filled(side, shape))
                eyes = np.maximum(eyes, eye)
            canvas = _over(canvas, pattern, alpha)

    body = np.concatenate([_BODY, (_BODY * [-1, 1])[-2:0:-1]])
    alpha = _filled(side, [_placed(pose, _rounded(body))])
    canvas = _over(_shaded(canvas, alpha), _scales(rng, alpha, 0.6 * wings), alpha)
    for mirror in (-1, 1):
        feeler = np.array([[0.02, -0.32], [0.1, -0.5], [0.24, -0.62 - rng.uniform(0, 0.1)]])
        line = _lines(side, [_placed(pose, feeler * [mirror, 1])])
        canvas = _over(canvas, dark, 0.9 * line)

    picture = camera(rng, light(rng, canvas, gain=0.12, slope=0.2, warmth=0.05))
    small = cv2.resize(eyes, (size, size), interpolation=cv2.INTER_AREA)
    return picture, np.where(small > 0, 255, 0).astype(np.uint8)


def _mark(name: str) -> list[Array]:
    """Outlines of a mark about (0, 0), scaled to the area that all marks have."""
    sheet = np.zeros((512, 512), np.uint8)
    parts = MARKS[name]
    cv2.fillPoly(sheet, [np.round(256 + 200 * part).astype(np.int32) for part in parts], 1)
    area = np.count_nonzero(sheet) / 200**2
    return [part * math.sqrt(_MARK_AREA / area) for part in parts]


def _ground(rng: Generator, side: int) -> Array:
    """Bark, stone or a leaf: streaks of any direction on any dull colour, (side, side, 3)."""
    blotches = noise(rng, side, side, side / 12)
    grain = noise(rng, side, side, 1.5 * SCALE)
    wide = noise(rng, side, side, 3.0 * SCALE)
    angle = rng.uniform(0, 180)
    squeeze = cv2.getRotationMatrix2D((side / 2, side / 2), angle, 1.0)
    squeeze[0] *= 0.2
    streaks = cv2.warpAffine(
        wide,
        squeeze,
        (side, side),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REFLECT_101,
    )
    tone = rng.uniform(70, 190) + 14 * blotches + 6 * grain + rng.uniform(0, 16) * streaks
    tint = _tint(rng.uniform(0, 1), rng.uniform(0.02, 0.14))
    return np.asarray(tone[..., None] * tint)


def _pose(rng: Generator, side: int) -> Array:
    """Moth's lengths to pixels of the large drawing: (3, 3), turned, shifted and foreshortened."""
    scale = 0.42 * side * rng.uniform(0.88, 1.03)
    centre = side / 2 + side * rng.uniform(-0.04, 0.04, 2)
    placed = np.array([[scale, 0, centre[0]], [0, scale, centre[1]], [0, 0, 1]])
    turned = _turn(rng.uniform(-25, 25), np.zeros(2))
    return np.asarray(placed @ turned @ np.diag([1, rng.uniform(0.88, 1.0), 1]))


def _wing(mirror: int, degrees: float) -> Array:
    """(3, 3): a right wing, opened by an angle, on the right (1) or the left (-1) of the moth."""
    return np.diag([mirror, 1, 1]) @ _turn(degrees, _ROOT)


def _turn(degrees: float, centre: Array) -> Array:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    linear = np.array([[cos, -sin], [sin, cos]])
    turn = np.eye(3)
    turn[:2, :2], turn[:2, 2] = linear, centre - linear @ centre
    return turn


def _placed(pose_33: Array, points_N2: Array) -> Array:
    return np.asarray(points_N2 @ pose_33[:2, :2].T + pose_33[:2, 2])


def _rounded(outline_N2: Array) -> Array:
    """A closed outline without corners: each is cut off four times (Chaikin 1974)."""
    for _ in range(4):
        following = np.roll(outline_N2, -1, axis=0)
        cut = [0.75 * outline_N2 + 0.25 * following, 0.25 * outline_N2 + 0.75 * following]
        outline_N2 = np.stack(cut, axis=1).reshape(-1, 2)
    return outline_N2


def _fixed(outlines: Sequence[Array]) -> list[Array]:
    return [np.round(outline * 2**_SUBPIXEL).astype(np.int32) for outline in outlines]


def _filled(side: int, outlines: Sequence[Array]) -> Array:
    """(side, side) float32: 1 inside an odd number of the outlines, smooth at the edge."""
    sheet = np.zeros((side, side), np.uint8)
    cv2.fillPoly(sheet, _fixed(outlines), 255, cv2.LINE_AA, _SUBPIXEL)
    return np.asarray(sheet / np.float32(255))


def _lines(side: int, lines: Sequence[Array]) -> Array:
    """(side, side) float32: 1 on the lines, a pixel of the picture wide."""
    sheet = np.zeros((side, side), np.uint8)
    cv2.polylines(sheet, _fixed(lines), False, 255, SCALE, cv2.LINE_AA, _SUBPIXEL)
    return np.asarray(sheet / np.float32(255))


def _over(canvas: Array, colour: Array, alpha: Array) -> Array:
    # most shapes are small, and where alpha is 0 nothing changes
    x, y, width, height = cv2.boundingRect((alpha > 0).astype(np.uint8))
    part = slice(y, y + height), slice(x, x + width)
    drawn = canvas.astype(np.result_type(canvas, colour, alpha))
    under, over = drawn[part], np.broadcast_to(colour, canvas.shape)[part]
    drawn[part] = under + (over - under) * alpha[part][..., None]
    return np.asarray(drawn)


def _shaded(canvas: Array, alpha: Array) -> Array:
    """The canvas with the soft shadow of a shape that will be put there."""
    shift = np.array([[1, 0, 2 * SCALE], [0, 1, 3 * SCALE]], np.float32)
    shadow = cv2.GaussianBlur(cv2.warpAffine(alpha, shift, alpha.shape[::-1]), (0, 0), 2.0 * SCALE)
    return np.asarray(canvas * (1 - 0.4 * shadow[..., None]))


def _scales(rng: Generator, alpha: Array, colour: Array) -> Array:
    """Colour of a wing everywhere: clouded, dusty, darker towards its margin."""
    side = len(alpha)
    depth = cv2.distanceTransform((alpha > 0.5).astype(np.uint8), cv2.DIST_L2, 3)
    level = 1 - 0.45 * np.exp(-depth / (0.02 * side))
    level = level + 0.09 * noise(rng, side, side, side / 20) + 0.06 * noise(rng, side, side, SCALE)
    return np.asarray(level[..., None] * colour)


def _tint(hue: float, strength: float) -> Array:
    """Factors of red, green and blue about 1 for a hue in turns."""
    phase = 2 * math.pi * (hue - np.array([0, 1, 2]) / 3)
    return np.asarray(1 + strength * np.cos(phase), np.float32)

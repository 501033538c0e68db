"""Draws a small labelled data set for ``noising``: turned metal flanges in a fixture.

MVTec-style folders, plus a video of parts that pass. Good parts differ a little in angle, position,
size, tone and light, and altogether in lathe marks and sensor noise; the defects are scratches,
stains, dents, chipped rims and blocked holes. NumPy and OpenCV only: nothing here, nor what it
imports, loads torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.random import Generator

from engineworks.runtime import images
from engineworks.runtime.tensors import Array
from engineworks.training import drawing
from engineworks.training.drawing import SCALE, camera, light, noise

_NUM_HOLES = 6


@dataclass(frozen=True)
class _Part:
    """One flange before light and camera; lengths in pixels of the large drawing."""

    colour_HWC: Array
    solid_HW: Array
    centre: tuple[float, float]
    radius: float
    hole_angles: Array


def sample(
    out: Path, *, seed: int = 0, size: int = 256, num_train: int = 60, num_test: int = 40
) -> dict[str, int]:
    """Draw the data set; half of the test images are good, the others go round the defects.

    Args:
        out: folder to make: train/good, test/good, test/<defect>, ground_truth/<defect> with
            <name>_mask.png (255 = defective), video.mp4.
        size: side of the images in pixels.

    Returns:
        Folder (relative to ``out``) or file -> number of images or frames in it.

    Raises:
        RunError: ``out`` already holds something.
    """
    drawing.check_empty(out)
    counts: dict[str, int] = {}

    def save(folder: str, image: Array) -> str:
        name = f"{counts.get(folder, 0):03d}"
        counts[folder] = counts.get(folder, 0) + 1
        images.write(out / folder / f"{name}.png", image)
        return name

    # one stream of random numbers per picture: more pictures do not change the first ones
    for i in range(num_train):
        save("train/good", draw(np.random.default_rng((seed, 0, i)), size)[0])
    num_good = num_test // 2
    for i in range(num_good):
        save("test/good", draw(np.random.default_rng((seed, 1, i)), size)[0])
    names = list(DEFECTS)
    for i in range(num_test - num_good):
        defect = names[i % len(names)]
        image, mask = draw(np.random.default_rng((seed, 2, i)), size, defect)
        name = save(f"test/{defect}", image)
        images.write(out / "ground_truth" / defect / f"{name}_mask.png", mask)
    counts["video.mp4"] = _write_video(out / "video.mp4", np.random.default_rng((seed, 3)), size)
    return counts


def draw(rng: Generator, size: int, defect: str | None = None) -> tuple[Array, Array]:
    """One picture of one part.

    Args:
        size: side in pixels.
        defect: a name in ``DEFECTS``; None draws a good part.

    Returns:
        (size, size, 3) uint8 RGB and its (size, size) uint8 mask, 255 where it is defective.
    """
    side = size * SCALE
    belt = _belt(rng, side, side)
    part = _flange(rng, side)
    canvas, mask = _place(belt, part), np.zeros((side, side), bool)
    if defect is not None:
        canvas, mask = DEFECTS[defect](rng, canvas, belt, part)
    picture = camera(rng, light(rng, canvas, gain=0.02, slope=0.03, warmth=0.01))
    small = cv2.resize(mask.astype(np.float32), (size, size), interpolation=cv2.INTER_AREA)
    return picture, np.where(small >= 0.5, 255, 0).astype(np.uint8)


def _belt(rng: Generator, height: int, width: int) -> Array:
    y, x = np.mgrid[:height, :width].astype(np.float32)
    phase = rng.uniform(0, 2 * np.pi, 2)
    pitch = 5.0 * SCALE
    weave = np.sin(2 * np.pi * (x + y) / pitch + phase[0]) * np.sin(
        2 * np.pi * (x - y) / pitch + phase[1]
    )
    grey = 62 + 3 * weave + 3 * noise(rng, height, width, 12 * SCALE)
    grey = grey + 2 * noise(rng, height, width, 1.0)
    return np.asarray(grey[..., None] * np.array([0.92, 1.0, 1.04], np.float32))


def _flange(rng: Generator, side: int) -> _Part:
    radius = 0.37 * side * rng.uniform(0.985, 1.015)
    centre = (
        side / 2 + side * rng.uniform(-0.01, 0.01),
        side / 2 + side * rng.uniform(-0.01, 0.01),
    )
    y, x = np.mgrid[:side, :side].astype(np.float32)
    dx, dy = (x - centre[0]) / radius, (y - centre[1]) / radius
    rho, theta = np.hypot(dx, dy), np.arctan2(dy, dx)

    # lathe marks: noise along the radius, a little of it along the angle
    rings = cv2.GaussianBlur(rng.standard_normal((1, 512)).astype(np.float32), (0, 0), 1.2)
    marks = np.interp(rho, np.linspace(0, 1.1, 512), rings[0]).astype(np.float32)
    sheen = np.cos(2 * (theta - rng.uniform(-0.08, 0.08)))
    tone = rng.uniform(157, 165) + 6 * marks / rings.std() + 9 * sheen
    tone = tone + 2 * noise(rng, side, side, 2.0)

    edge = 2.0 * SCALE / radius
    groove = np.exp(-(((rho - 0.47) / 0.022) ** 2))
    bevel = np.clip((rho - 0.93) / 0.07, 0, 1) * (rho <= 1)
    tone = tone - 70 * groove + 26 * bevel * np.cos(theta + 2.3)
    solid = _inside(1 - rho, edge) * _inside(rho - 0.2, edge)
    tone = tone + 30 * np.exp(-(((rho - 0.215) / 0.015) ** 2))

    hole_angles = rng.uniform(-0.08, 0.08) + np.arange(_NUM_HOLES) * 2 * np.pi / _NUM_HOLES
    for angle in hole_angles:
        middle = np.array([np.sin(angle), np.cos(angle)]) * 0.72 * radius + centre[::-1]
        # nothing of a hole is seen further off
        reach = 0.2 * radius
        near = tuple(slice(max(0, int(at - reach)), int(at + reach) + 1) for at in middle)
        distance = np.hypot(
            dx[near] - np.float32(0.72 * np.cos(angle)), dy[near] - np.float32(0.72 * np.sin(angle))
        )
        tone[near] += 34 * np.exp(-(((distance - 0.125) / 0.014) ** 2))
        solid[near] *= _inside(distance - 0.105, edge)
    colour = tone[..., None] * np.array([1.0, 0.985, 0.955], np.float32)
    return _Part(colour, solid, centre, radius, hole_angles)


def _inside(distance: Array, edge: float) -> Array:
    """1 where the signed distance is positive, 0 where negative, smooth over ``edge``."""
    return np.asarray(np.clip(distance / edge + 0.5, 0, 1).astype(np.float32))


def _place(belt: Array, part: _Part, solid: Array | None = None) -> Array:
    solid = part.solid_HW if solid is None else solid
    shift = np.array([[1, 0, 5 * SCALE], [0, 1, 6 * SCALE]], np.float32)
    shadow = cv2.warpAffine(solid, shift, solid.shape[::-1])
    shadow = cv2.GaussianBlur(shadow, (0, 0), 4.0 * SCALE)
    ground = belt * (1 - 0.55 * shadow[..., None])
    alpha = solid[..., None]
    return np.asarray(part.colour_HWC * alpha + ground * (1 - alpha))


def _spot(rng: Generator, part: _Part, low: float, high: float) -> tuple[float, float]:
    """A random point on the part, ``low`` to ``high`` radii from its centre; (x, y) in pixels."""
    rho, theta = rng.uniform(low, high), rng.uniform(0, 2 * np.pi)
    return (
        part.centre[0] + part.radius * rho * np.cos(theta),
        part.centre[1] + part.radius * rho * np.sin(theta),
    )


def _scratch(rng: Generator, canvas: Array, belt: Array, part: _Part) -> tuple[Array, Array]:
    x, y = _spot(rng, part, 0.4, 0.7)
    heading, bend = rng.uniform(0, 2 * np.pi), rng.uniform(-0.35, 0.35)
    num, step = 24, rng.uniform(0.45, 0.9) * part.radius / 24
    points = []
    for _ in range(num):
        points.append((x, y))
        heading += bend / 6 + rng.normal(0, 0.06)
        x, y = x + step * np.cos(heading), y + step * np.sin(heading)
    line = np.zeros(part.solid_HW.shape, np.uint8)
    width = int(rng.integers(4, 6)) * SCALE // 2
    cv2.polylines(line, [np.array(points, np.int32)], isClosed=False, color=255, thickness=width)
    alpha = cv2.GaussianBlur(line.astype(np.float32) / 255, (0, 0), 0.5 * SCALE)
    alpha *= part.solid_HW
    depth = rng.choice([-85.0, 75.0])
    wide = cv2.dilate(line, np.ones((2 * SCALE + 1, 2 * SCALE + 1), np.uint8))
    return canvas + depth * alpha[..., None], (wide > 0) & (part.solid_HW > 0.5)


def _blob(rng: Generator, part: _Part, x: float, y: float, radius: float) -> Array:
    """An irregular patch about (x, y): 1 inside, smooth edge; (H, W) float32."""
    height, width = part.solid_HW.shape
    grid_y, grid_x = np.mgrid[:height, :width].astype(np.float32)
    distance = np.hypot(grid_x - x, grid_y - y) / radius
    rough = 0.22 * noise(rng, height, width, radius / 2)
    return _inside(1 - distance + rough, 0.25)


def _stain(rng: Generator, canvas: Array, belt: Array, part: _Part) -> tuple[Array, Array]:
    x, y = _spot(rng, part, 0.35, 0.85)
    alpha = _blob(rng, part, x, y, rng.uniform(0.09, 0.17) * part.radius) * part.solid_HW
    colour = np.array([92.0, 66.0, 40.0]) * rng.uniform(0.8, 1.2)
    strength = rng.uniform(0.45, 0.75) * alpha[..., None]
    return canvas * (1 - strength) + colour * strength, alpha > 0.5


def _dent(rng: Generator, canvas: Array, belt: Array, part: _Part) -> tuple[Array, Array]:
    """A hollow: the side towards the light is dark, the far side bright."""
    x, y = _spot(rng, part, 0.55, 0.85)
    sigma = rng.uniform(0.05, 0.075) * part.radius
    height, width = part.solid_HW.shape
    grid_y, grid_x = np.mgrid[:height, :width].astype(np.float32)
    dx, dy = (grid_x - x) / sigma, (grid_y - y) / sigma
    slope = (0.6 * dx + 0.8 * dy) * np.exp(0.5 - 0.5 * (dx**2 + dy**2))
    depth = rng.uniform(45, 70)
    mask = (np.hypot(dx, dy) < 2) & (part.solid_HW > 0.5)
    return canvas + depth * (slope * part.solid_HW)[..., None], mask


def _chip(rng: Generator, canvas: Array, belt: Array, part: _Part) -> tuple[Array, Array]:
    """A piece of the rim is missing: the belt shows."""
    x, y = _spot(rng, part, 0.98, 1.02)
    gone = _blob(rng, part, x, y, rng.uniform(0.10, 0.18) * part.radius)
    placed = _place(belt, part, part.solid_HW * (1 - gone))
    return placed, (gone > 0.5) & (part.solid_HW > 0.5)


def _blocked(rng: Generator, canvas: Array, belt: Array, part: _Part) -> tuple[Array, Array]:
    """One of the holes is filled with dull slag."""
    angle = rng.choice(part.hole_angles)
    x = part.centre[0] + 0.72 * part.radius * np.cos(angle)
    y = part.centre[1] + 0.72 * part.radius * np.sin(angle)
    height, width = part.solid_HW.shape
    grid_y, grid_x = np.mgrid[:height, :width].astype(np.float32)
    distance = np.hypot(grid_x - x, grid_y - y) / part.radius
    alpha = _inside(0.105 - distance, 2.0 * SCALE / part.radius)[..., None]
    slag = rng.uniform(95, 125) + 9 * noise(rng, height, width, 3.0 * SCALE)
    slag_HWC = slag[..., None] * np.array([1.0, 0.97, 0.92], np.float32)
    return canvas * (1 - alpha) + slag_HWC * alpha, distance < 0.105


DEFECTS: dict[str, Callable[[Generator, Array, Array, _Part], tuple[Array, Array]]] = {
    "scratch": _scratch,
    "stain": _stain,
    "dent": _dent,
    "chip": _chip,
    "blocked_hole": _blocked,
}


def _write_video(path: Path, rng: Generator, size: int) -> int:
    """Good and bad parts take turns on a belt."""
    defects: list[str | None] = [None, "scratch", None, "chip", None, "stain"]
    return drawing.write_ride(path, rng, [draw(rng, size, defect)[0] for defect in defects])

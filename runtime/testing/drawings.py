"""Pictures that are drawn: parts, flowers, strips, scenes and what they show."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from engineworks.runtime.tensors import Array

COLOURS = {
    "blue": (0.2, 0.3, 1.0),
    "green": (0.2, 0.9, 0.2),
    "red": (1.0, 0.2, 0.2),
    "violet": (0.7, 0.2, 0.9),
    "white": (1.0, 1.0, 1.0),
    "yellow": (1.0, 0.9, 0.1),
}
GREY = 128  # ground of a drawn scene
OBJECT = 3  # side of an object in it, in cells; the scene has 8 rows of 12 cells
SENSOR = (0.0, 255.0)  # value range of drawn strips


def draw_part(
    rng: np.random.Generator, size: tuple[int, int], *, defective: bool
) -> tuple[Array, Array]:
    """A picture of a grey ring on a dark ground, and where it is defective.

    Args:
        size: (height, width) in pixels, at least 32 each.
        defective: a bright scratch crosses it.

    Returns:
        (H, W, 3) uint8 RGB, and a (H, W) bool mask.
    """
    height, width = size
    canvas = np.full((height, width, 3), 60, np.uint8)
    radius = min(size) // 3
    centre = (
        width // 2 + int(rng.integers(-2, 3)),
        height // 2 + int(rng.integers(-2, 3)),
    )
    cv2.circle(canvas, centre, radius, (120, 125, 130), max(2, radius // 3), cv2.LINE_AA)
    marked = np.zeros((height, width), np.uint8)
    if defective:
        angle, length = rng.uniform(0, np.pi), 0.7 * radius
        reach = np.array([np.cos(angle), np.sin(angle)]) * length
        ends = [tuple(int(v) for v in np.round(centre + sign * reach)) for sign in (-1, 1)]
        cv2.line(marked, ends[0], ends[1], 1, max(2, radius // 4))
        canvas[marked > 0] = (250, 240, 60)
    noisy = canvas + rng.normal(0, 3, canvas.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8), marked.astype(bool)


def draw_flower(rng: np.random.Generator, size: tuple[int, int], label: str) -> Array:
    """A picture of five petals of one colour on a dark meadow.

    Args:
        size: (height, width) in pixels, at least 32 each.
        label: the colour: blue, green, red, violet, white or yellow.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    height, width = size
    red, green, blue = (int(220 * share) for share in COLOURS[label])
    canvas = np.full((height, width, 3), (40, 60, 30), np.uint8)
    radius, turn = min(size) / 6, rng.uniform(0, 2 * np.pi)
    centre = np.array([width / 2, height / 2]) + rng.uniform(-2, 2, 2)
    for angle in turn + np.arange(5) * (2 * np.pi / 5):
        petal = centre + 1.2 * radius * np.array([np.cos(angle), np.sin(angle)])
        place = (round(petal[0]), round(petal[1]))
        cv2.circle(canvas, place, round(radius), (red, green, blue), cv2.FILLED, cv2.LINE_AA)
    noisy = canvas + rng.normal(0, 5, canvas.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8)


def draw_strip(
    rng: np.random.Generator, size: tuple[int, int], *, defective: bool, dtype: str = "uint8"
) -> tuple[Array, Array]:
    """Three captures of one piece of stripes, with a spot that the target shares with a reference.

    Args:
        size: (height, width) in pixels, at least 32 each.
        defective: a second spot is in the target alone.

    Returns:
        (H, W, 3) planes of ``dtype``, in 0 ... 255, and a (H, W) bool mask of the second spot.
    """
    height, width = size
    stripes = 110 + 40 * np.sin(np.arange(width) * (2 * np.pi / 11) + rng.uniform(0, 2 * np.pi))
    planes_HWC = np.broadcast_to(stripes[:, None], (height, width, 3)) + rng.normal(
        0, 3, (height, width, 3)
    )
    spot = np.exp(-(np.square(np.mgrid[-1:2, -1:2]).sum(axis=0)) / (2 * 1.3**2))
    shared = int(rng.integers(4, width // 2 - 4)), int(rng.integers(4, height - 4))
    alone = int(rng.integers(width // 2 + 4, width - 4)), int(rng.integers(4, height - 4))
    marked = np.zeros((height, width), bool)
    x, y = shared
    for plane in (0, int(rng.integers(1, 3))):
        planes_HWC[y - 1 : y + 2, x - 1 : x + 2, plane] += 80 * spot
    if defective:
        x, y = alone
        planes_HWC[y - 1 : y + 2, x - 1 : x + 2, 0] += 80 * spot
        marked[y - 1 : y + 2, x - 1 : x + 2] = True
    return np.clip(planes_HWC, *SENSOR).astype(dtype), marked


def draw_scene(
    rng: np.random.Generator, size: tuple[int, int], names: Sequence[str]
) -> tuple[Array, Array]:
    """A picture of coloured squares on grey, which do not touch each other.

    Args:
        size: (height, width) in pixels, multiples of 8 and 12; best as 2 to 3.
        names: their colours, at most six: blue, green, red, violet, white or yellow.

    Returns:
        (H, W, 3) uint8 RGB, and (N, 4) float32 boxes in pixels.
    """
    height, width = size
    cell = np.array([width / 12, height / 8])
    places = [(column, row) for row in (0, 4) for column in (0, 4, 8)]
    chosen = [places[i] for i in rng.permutation(len(places))[: len(names)]]
    corners = (chosen + rng.integers(0, 2, (len(names), 2))).reshape(-1, 2)
    found = np.concatenate([corners * cell, (corners + OBJECT) * cell], axis=1)
    canvas = np.full((height, width, 3), float(GREY))
    for name, box in zip(names, found, strict=True):
        x1, y1, x2, y2 = np.rint(box).astype(int)
        canvas[y1:y2, x1:x2] = 255 * np.array(COLOURS[name])
    noisy = canvas + rng.normal(0, 5, canvas.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8), found.astype(np.float32)


def draw_reference(rng: np.random.Generator, size: tuple[int, int], name: str) -> Array:
    """A picture of one of the squares of ``draw_scene``: (H, W, 3) uint8 RGB."""
    height, width = size
    canvas = np.full((height, width, 3), float(GREY))
    inner = (slice(height // 4, -height // 4), slice(width // 4, -width // 4))
    canvas[inner] = 255 * np.array(COLOURS[name])
    noisy = canvas + rng.normal(0, 5, canvas.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8)

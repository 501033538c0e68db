"""Draws a small data set for ``refdet``: toys on a table, of which some are to be found again.

A toy is a silhouette with a pattern of two colours, and no toy shares more than two of these four
with another. Those of the validation and of the test are never seen in training: only their own
references tell what they look like. NumPy and OpenCV only: nothing here, nor what it imports, loads
torch.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from pathlib import Path

import cv2
import numpy as np
from numpy.random import Generator

from engineworks.runtime import files, images
from engineworks.runtime.tensors import Array
from engineworks.runtime.video import VideoWriter
from engineworks.training import drawing
from engineworks.training.drawing import SCALE, camera, light, noise

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "blue": (40, 90, 220),
    "green": (40, 170, 70),
    "yellow": (240, 200, 40),
    "violet": (150, 60, 190),
    "orange": (240, 130, 30),
    "cyan": (40, 190, 200),
    "white": (240, 240, 240),
    "black": (30, 30, 35),
    "pink": (240, 130, 190),
    "brown": (120, 80, 40),
}
PATTERNS = ("plain", "stripes", "checks", "dots", "half", "core", "fade")
_FREQUENCY = 2.2  # of stripes, checks and dots, in a toy's own length
_RADIUS = (0.09, 0.2)  # of a toy, as a share of the frame's side
_FLAT = (0.8, 1.0)  # its height by its width, as it lies there
_SUBPIXEL = 4  # bits behind the point in OpenCV's coordinates
_TRIES = 20  # places to try for each toy
_VIDEO_FRAMES, _FPS = 90, 12


def _regular(num: int, start: float = 0.0) -> Array:
    angle = start + 2 * np.pi * np.arange(num) / num
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _star() -> Array:
    return _regular(10, -np.pi / 2) * np.where(np.arange(10) % 2, 0.42, 1.0)[:, None]


def _cross() -> Array:
    w = 0.35
    corner = np.array([[w, 1], [w, w], [1, w]])
    quarters = [corner * [1, 1], corner[::-1] * [1, -1], corner * [-1, -1], corner[::-1] * [-1, 1]]
    return np.concatenate(quarters)


def _crescent() -> Array:
    outer, inner = np.linspace(0.7, 2 * np.pi - 0.7, 40), np.linspace(2 * np.pi - 1, 1, 40)
    bay = 0.75 * np.stack([np.cos(inner), np.sin(inner)], axis=1) + [0.35, 0]
    return np.concatenate([np.stack([np.cos(outer), np.sin(outer)], axis=1), bay])


# outlines within a circle of radius 1
SILHOUETTES: dict[str, Array] = {
    "disc": _regular(48),
    "square": _regular(4, np.pi / 4),
    "triangle": _regular(3, -np.pi / 2),
    "star": _star(),
    "cross": _cross(),
    "hexagon": _regular(6),
    "bar": np.array([[-1, -0.4], [1, -0.4], [1, 0.4], [-1, 0.4]]),
    "crescent": _crescent(),
}


@dataclass(frozen=True)
class Toy:
    """What a toy looks like, and so who it is."""

    silhouette: str
    pattern: str
    first: str
    second: str

    @property
    def name(self) -> str:
        return f"{self.first}-{self.second}-{self.pattern}-{self.silhouette}"

    def shares(self, other: Toy) -> int:
        """How many of the four it has in common with another one."""
        mine, its = vars(self).values(), vars(other).values()
        return sum(a == b for a, b in zip(mine, its, strict=True))


def sample(
    out: Path,
    *,
    seed: int = 0,
    size: int = 192,
    num_toys: int = 144,
    num_unseen: int = 8,
    num_train: int = 480,
    num_val: int = 48,
    num_test: int = 96,
    num_references: int = 4,
) -> dict[str, int]:
    """Draw the data set.

    Args:
        out: folder to make: ``images/``, ``annotations_{train,val,test}.json`` in COCO's form and
            ``references/<toy>/``; ``video.mp4``, in which a toy of the test moves about among
            others; ``wanted/<toy>/``, other pictures of the test's toys, to look for; ``ride/``,
            the same video with the boxes of the one that moves, as ``eval`` takes it.
        size: side of the frames in pixels.
        num_toys: of the training.
        num_unseen: of the validation, and as many others of the test.
        num_train, num_val, num_test: frames.
        num_references: per toy.

    Returns:
        Folder (relative to ``out``) or file -> number of pictures or frames in it.

    Raises:
        RunError: ``out`` already holds something.
    """
    drawing.check_empty(out)
    # the unseen ones first: how many are learned from does not change who is to be found
    toys = choose(np.random.default_rng((seed, 0)), 2 * num_unseen + num_toys)
    split = {
        "train": (toys[2 * num_unseen :], num_train),
        "val": (toys[num_unseen : 2 * num_unseen], num_val),
        "test": (toys[:num_unseen], num_test),
    }
    counts: dict[str, int] = {}
    for s, (name, (shown, num)) in enumerate(split.items()):
        frames = []
        for i in range(num):
            # one stream of random numbers per picture: more pictures do not change the first ones
            picture, boxes, found = scene(np.random.default_rng((seed, 1, s, i)), shown, size)
            file = f"{name}/{i:04d}.jpg"
            images.write(out / "images" / file, picture)
            frames.append((file, boxes, [toy.name for toy in found]))
        _write_coco(out / f"annotations_{name}.json", frames, [toy.name for toy in shown], size)
        counts[f"images/{name}"] = num
    for t, toy in enumerate(toys):
        for i in range(num_references):
            picture = reference(np.random.default_rng((seed, 2, t, i)), toy, size // 2)
            images.write(out / "references" / toy.name / f"{i}.jpg", picture)
    counts["references"] = len(toys) * num_references

    for t, toy in enumerate(toys[:num_unseen]):
        for i in range(num_references):
            rng = np.random.default_rng((seed, 3, num_references * t + i))
            images.write(out / "wanted" / toy.name / f"{i}.jpg", reference(rng, toy, size // 2))
    counts["wanted"] = num_unseen * num_references

    moving, others = toys[0], toys[1:num_unseen]
    folder = out / "ride" / "samples" / "ride"
    shutil.copytree(out / "wanted" / moving.name, folder / "object_images")
    tube = _write_ride(out / "video.mp4", np.random.default_rng((seed, 4)), moving, others, size)
    files.write(folder / "drone_video.mp4", (out / "video.mp4").read_bytes())
    corners = ("x1", "y1", "x2", "y2")
    known = [
        {"frame": i} | dict(zip(corners, box, strict=True))
        for i, box in enumerate(tube)
        if box is not None
    ]
    video = {"video_id": "ride", "object": moving.name, "annotations": [{"bboxes": known}]}
    files.write(out / "ride" / "annotations.json", json.dumps([video]))
    return counts | {"video.mp4": len(tube)}


def choose(rng: Generator, num: int) -> list[Toy]:
    """Toys of which any two share at most two of silhouette, pattern and colours."""
    pairs = [(a, b) for a, b in product(COLOURS, COLOURS) if a != b]
    known = [Toy(s, p, a, b) for s, p, (a, b) in product(SILHOUETTES, PATTERNS, pairs)]
    chosen: list[Toy] = []
    for i in rng.permutation(len(known)):
        if all(known[i].shares(toy) <= 2 for toy in chosen):
            chosen.append(known[i])
            if len(chosen) == num:
                break
    return chosen


def scene(
    rng: Generator, toys: Sequence[Toy], size: int, *, most: int = 4
) -> tuple[Array, Array, list[Toy]]:
    """A frame with some toys that do not touch each other.

    Args:
        size: side in pixels.
        most: so many toys at most.

    Returns:
        (size, size, 3) uint8 RGB, (N, 4) float32 boxes xyxy in pixels, and the N toys.
    """
    side = size * SCALE
    canvas = _ground(rng, side, num_lines=int(rng.integers(4, 12)))
    placed: list[Array] = []
    boxes, shown = [], []
    for i in rng.permutation(len(toys))[: rng.integers(1, most + 1)]:
        for _ in range(_TRIES):
            radius = side * rng.uniform(*_RADIUS)
            circle = np.array([*rng.uniform(radius, side - radius, 2), radius])
            if all(math.dist(circle[:2], c[:2]) > radius + c[2] for c in placed):
                placed.append(circle)
                pose = _pose(rng, circle[:2], circle[2])
                boxes.append(_paint(canvas, toys[i], pose, rng.uniform(0.75, 1.15)))
                shown.append(toys[i])
                break
    picture = camera(rng, light(rng, canvas, gain=0.15, slope=0.15, warmth=0.05))
    return picture, np.array(boxes, np.float32).reshape(-1, 4) / SCALE, shown


def reference(rng: Generator, toy: Toy, size: int) -> Array:
    """A picture of one toy alone: (size, size, 3) uint8 RGB."""
    side = size * SCALE
    canvas = _ground(rng, side, num_lines=int(rng.integers(0, 6)))
    centre = side / 2 + side * rng.uniform(-0.03, 0.03, 2)
    pose = _pose(rng, centre, side * rng.uniform(0.36, 0.46))
    _paint(canvas, toy, pose, rng.uniform(0.75, 1.15))
    return camera(rng, light(rng, canvas, gain=0.15, slope=0.15, warmth=0.05))


def _ground(rng: Generator, side: int, *, num_lines: int) -> Array:
    """A table of any colour with blotches and things that are no toys, (side, side, 3)."""
    tint = rng.uniform(60, 190, 3)
    canvas = np.stack([tone + 18 * noise(rng, side, side, side / 8) for tone in tint], axis=-1)
    canvas = np.ascontiguousarray(np.clip(canvas, 0, 255), np.float32)
    for _ in range(num_lines):
        start = rng.uniform(0, side, 2)
        stop = start + rng.uniform(-side / 3, side / 3, 2)
        ends = [tuple(int(v) for v in end) for end in (start, stop)]
        colour = tuple(float(v) for v in rng.uniform(30, 220, 3))
        cv2.line(canvas, ends[0], ends[1], colour, int(rng.integers(1, 4)) * SCALE, cv2.LINE_AA)
    return canvas


def _pose(rng: Generator, centre: Array, radius: float) -> Array:
    """Toy's lengths to pixels: (2, 3), turned anyhow and a little foreshortened."""
    return _placed(centre, radius, rng.uniform(0, 2 * np.pi), rng.uniform(*_FLAT))


def _placed(centre: Array, radius: float, angle: float, flat: float) -> Array:
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return np.column_stack([radius * turn @ np.diag([1, flat]), centre])


def _paint(canvas: Array, toy: Toy, pose: Array, brightness: float) -> tuple[int, int, int, int]:
    """Paint a toy into a drawing; returns its box xyxy, the last column and row not in it."""
    side = canvas.shape[0]
    outline = SILHOUETTES[toy.silhouette] @ pose[:, :2].T + pose[:, 2]
    filled = np.zeros((side, side), np.uint8)
    points = np.round(outline * 2**_SUBPIXEL).astype(np.int32)
    cv2.fillPoly(filled, [points], 255, cv2.LINE_AA, _SUBPIXEL)
    x1, y1 = np.clip(np.floor(outline.min(axis=0)).astype(int), 0, side - 1)
    x2, y2 = np.clip(np.ceil(outline.max(axis=0)).astype(int) + 1, 1, side)
    y, x = np.mgrid[y1:y2, x1:x2]
    inside = np.stack([x - pose[0, 2], y - pose[1, 2]], axis=-1) @ np.linalg.inv(pose[:, :2]).T
    share = _pattern(toy.pattern, inside[..., 0], inside[..., 1])[..., None]
    first, second = (np.array(COLOURS[name], np.float32) for name in (toy.first, toy.second))
    colour = np.clip(brightness * (first * (1 - share) + second * share), 0, 255)
    alpha = filled[y1:y2, x1:x2, None] / np.float32(255)
    canvas[y1:y2, x1:x2] += alpha * (colour - canvas[y1:y2, x1:x2])
    rows, columns = np.nonzero(filled > 127)
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def _pattern(name: str, u: Array, v: Array) -> Array:
    """Share of the second colour at places of a toy, in its own lengths."""
    waves = np.sin(u * np.pi * _FREQUENCY), np.sin(v * np.pi * _FREQUENCY)
    cells = [(x * _FREQUENCY) % 1 - 0.5 for x in (u, v)]
    share = {
        "plain": np.zeros_like(u),
        "stripes": waves[0] > 0,
        "checks": waves[0] * waves[1] > 0,
        "dots": cells[0] ** 2 + cells[1] ** 2 < 0.08,
        "half": v > 0,
        "core": u * u + v * v < 0.3,
        "fade": np.clip((u + 1) / 2, 0, 1),
    }[name]
    return np.asarray(share, np.float32)


def _write_coco(
    path: Path,
    frames: Sequence[tuple[str, Array, Sequence[str]]],
    names: Sequence[str],
    size: int,
) -> None:
    """Write (file, boxes, objects) of each frame in COCO's form."""
    ids = {name: i for i, name in enumerate(sorted(names), 1)}
    annotations = list[dict[str, object]]()
    for i, (_, boxes_N4, found) in enumerate(frames, 1):
        for (x1, y1, x2, y2), name in zip(boxes_N4.tolist(), found, strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i,
                    "category_id": ids[name],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": 0,
                }
            )
    content = {
        "images": [
            {"id": i, "file_name": file, "width": size, "height": size}
            for i, (file, *_) in enumerate(frames, 1)
        ],
        "categories": [{"id": i, "name": name} for name, i in ids.items()],
        "annotations": annotations,
    }
    files.write(path, json.dumps(content))


def _write_ride(
    path: Path, rng: Generator, moving: Toy, others: Sequence[Toy], size: int
) -> list[tuple[float, ...] | None]:
    """A video in which a toy moves about among others that lie still.

    Returns:
        Its box in each frame; None where it is outside.
    """
    side = size * SCALE
    ground = _ground(rng, side, num_lines=8)
    for corner, i in zip(((0.2, 0.2), (0.8, 0.75)), rng.permutation(len(others)), strict=False):
        pose = _pose(rng, side * np.array(corner), 0.14 * side)
        _paint(ground, others[i], pose, 1.0)
    boxes: list[tuple[float, ...] | None] = []
    with VideoWriter(path, Fraction(_FPS)) as writer:
        for i in range(_VIDEO_FRAMES):
            t = i / _VIDEO_FRAMES
            # from the left edge across and back, outside for a while at the end
            x = side * (0.5 + 0.5 * math.sin(2 * math.pi * (1.1 * t - 0.1)))
            y = side * (0.5 + 0.25 * math.sin(2 * math.pi * 2 * t))
            radius = side * (0.14 + 0.03 * math.sin(2 * math.pi * 1.5 * t))
            canvas, box = ground.copy(), None
            if radius < x < side - radius:
                pose = _placed(np.array([x, y]), radius, 2 * math.pi * 0.6 * t, 0.9)
                box = tuple(v / SCALE for v in _paint(canvas, moving, pose, 1.0))
            boxes.append(box)
            writer.write(camera(rng, canvas), i / _FPS)
    return boxes

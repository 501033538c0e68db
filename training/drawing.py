"""What the drawn data sets share: noise, light, a camera, and a video of things that pass.

NumPy and OpenCV only: nothing here, nor what it imports, loads torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
from numpy.random import Generator

from engineworks.runtime.errors import RunError
from engineworks.runtime.tensors import Array
from engineworks.runtime.video import VideoWriter

SCALE = 2  # drawn larger, then averaged down: smooth edges
_FRAMES_STILL, _FRAMES_MOVING, _FPS = 10, 6, 12


def check_empty(out: Path) -> None:
    """Refuse to draw over something else.

    Raises:
        RunError: ``out`` already holds something.
    """
    if out.exists() and any(out.iterdir()):
        raise RunError(f"{out} is not empty", fix="choose another --out, or empty it")


def noise(rng: Generator, height: int, width: int, sigma: float) -> Array:
    """Smooth noise (height, width), mean 0, standard deviation 1, correlated over ``sigma`` px."""
    step = max(1, int(sigma / 2))
    grid = rng.standard_normal((height // step + 4, width // step + 4)).astype(np.float32)
    grid = cv2.GaussianBlur(grid, (0, 0), max(sigma / step, 0.5))
    smooth = cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.asarray((smooth - smooth.mean()) / smooth.std())


def light(rng: Generator, canvas: Array, *, gain: float, slope: float, warmth: float) -> Array:
    """A drawing (H, W, 3) under a lamp: brightness, its fall across the picture, and colour.

    Args:
        gain: largest change of brightness, either way, as a fraction.
        slope: largest change of it from the middle to an edge.
        warmth: largest change of red and, the other way, of blue.
    """
    height, width = canvas.shape[:2]
    angle, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0, slope)
    across_W = (np.arange(width) / width - 0.5) * np.cos(angle)
    down_H = (np.arange(height) / height - 0.5) * np.sin(angle)
    colour = 1 + rng.uniform(-warmth, warmth) * np.array([1.0, 0.0, -1.0])
    mean = rng.uniform(1 - gain, 1 + gain)
    level_HW = (mean * (1 + strength * 2 * (down_H[:, None] + across_W))).astype(np.float32)
    return np.asarray(canvas * level_HW[..., None] * colour.astype(np.float32))


def camera(rng: Generator, canvas: Array) -> Array:
    """The large drawing (H, W, 3) in 0 ... 255 as a small picture with the noise of a sensor.

    Returns:
        (H / SCALE, W / SCALE, 3) uint8.
    """
    size = (canvas.shape[1] // SCALE, canvas.shape[0] // SCALE)
    small = cv2.resize(canvas.astype(np.float32), size, interpolation=cv2.INTER_AREA)
    small = small + rng.normal(0, 1.8, small.shape)
    return np.asarray(np.clip(np.round(small), 0, 255), np.uint8)


def write_ride(path: Path, rng: Generator, stations: Sequence[Array]) -> int:
    """A video of a belt that stops under the camera for each picture.

    Args:
        stations: (size, size, 3) uint8 RGB each; an odd last row and column are cut off.

    Returns:
        Number of frames.
    """
    size = stations[0].shape[0]
    strip = np.concatenate(stations, axis=1)
    positions: list[int] = []
    for station in range(len(stations)):
        positions += [station * size] * _FRAMES_STILL
        if station + 1 < len(stations):
            t = np.arange(1, _FRAMES_MOVING + 1) / (_FRAMES_MOVING + 1)
            ease = t * t * (3 - 2 * t)
            positions += [round(p) for p in (station + ease) * size]
    side = size // 2 * 2
    with VideoWriter(path, Fraction(_FPS), crf=16) as video:
        for i, left in enumerate(positions):
            frame = strip[:side, left : left + side]
            noisy = np.clip(frame + rng.normal(0, 1.2, frame.shape), 0, 255).astype(np.uint8)
            video.write(noisy, i / _FPS)
    return len(positions)

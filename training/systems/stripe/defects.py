"""Defects and disturbances, painted into one tile at a time.

Everything happens in the tile and, for a defect, in its few pixels: the whole strip is never
copied. All randomness comes from the generator that is handed in. NumPy and OpenCV only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.random import Generator

from engineworks.runtime.tensors import Array
from engineworks.training.systems.stripe.config import (
    DefectsConfig,
    DisturbanceConfig,
    KernelConfig,
)

# of a kernel's peak: from here on its pixels count as defective
MASK_LEVEL = 0.1
_TRIES = 16  # places to try for each defect before it is left out
_POOL = 1 << 20


@dataclass(frozen=True)
class Kernel:
    """A spot, computed once.

    Attributes:
        values_HW: float32, 1 at the centre.
        mask_HW: bool, what of it is marked.
    """

    values_HW: Array
    mask_HW: Array


@dataclass(frozen=True)
class Defect:
    """One spot and the planes that show it.

    Attributes:
        kernel: its place in the list of kernels.
        top, left: of its box in the tile.
        amplitude: signed, of its peak.
        scales: factor of the amplitude in target, ref1, ref2; 0 where it does not show.
        wanted: whether it is to be found.
    """

    kernel: int
    top: int
    left: int
    amplitude: float
    scales: tuple[float, float, float]
    wanted: bool


def kernel(config: KernelConfig) -> Kernel:
    """``exp(-(y^2 / 2 sigma_y^2 + x^2 / 2 sigma_x^2))`` in its box; the peak is 1."""
    (rows, columns), (down, across) = config.size, config.sigma
    y = np.arange(rows)[:, None] - rows // 2
    x = np.arange(columns) - columns // 2
    values = np.exp(-(y**2 / (2 * down**2) + x**2 / (2 * across**2)))
    return Kernel(values.astype(np.float32), values > MASK_LEVEL)


def allocate(
    rng: Generator, config: DefectsConfig
) -> list[tuple[tuple[float, float, float], bool]]:
    """Which planes show each defect of a tile, and whether it is to be found.

    Of n defects, 1 or 2 are in the target alone; a third each of the rest is also in the first
    reference or in the second, what remains in both.

    Returns:
        (scales of target, ref1, ref2; wanted) of each; empty for a clean tile.
    """
    if rng.random() < config.clean:
        return []
    num = int(rng.integers(config.num[0], config.num[1] + 1))
    low, high = config.num_target_only
    num_wanted = int(rng.integers(low, min(high, num // 2) + 1))
    found = [(_leaked(rng, config), True) for _ in range(num_wanted)]
    rest = num - num_wanted
    third = rest // 3
    shown = [(1, 0)] * third + [(0, 1)] * third + [(1, 1)] * (rest - 2 * third)
    if rest == 1:  # a single one cannot be split
        shown = [((1, 0), (0, 1))[rng.integers(2)]]
    present = (rng.random(rest) >= config.absent).tolist()
    strengths = rng.uniform(*config.shared_scale, (rest, 2)).tolist()
    for (ref1, ref2), target, (one, two) in zip(shown, present, strengths, strict=True):
        found.append(((float(target), ref1 * one, ref2 * two), False))
    return found


def _leaked(rng: Generator, config: DefectsConfig) -> tuple[float, float, float]:
    if config.leak and rng.random() < config.leak:
        scale = float(rng.uniform(*config.leak_scale))
        return (1.0, scale, 0.0) if rng.random() < 0.5 else (1.0, 0.0, scale)
    return (1.0, 0.0, 0.0)


def plan(
    rng: Generator, config: DefectsConfig, kernels: Sequence[Kernel], height: int, width: int
) -> list[Defect]:
    """The defects of one tile; no two boxes touch.

    One that finds no free place is left out, so a small tile may hold fewer.
    """
    planned: list[Defect] = []
    allocated = allocate(rng, config)
    if not allocated:
        return planned
    low, high = config.amplitude
    free = rng.random((len(allocated), _TRIES, 2))
    chosen = rng.integers(len(kernels), size=len(allocated))
    amplitudes = rng.uniform(low, high, len(allocated)) * rng.choice((-1, 1), len(allocated))
    taken: list[tuple[int, int, int, int]] = []
    for i, (scales, wanted) in enumerate(allocated):
        rows, columns = kernels[chosen[i]].values_HW.shape
        down, across = max(config.margin, rows // 2), max(config.margin, columns // 2)
        for y, x in free[i].tolist():
            top = down - rows // 2 + int(y * (height - 2 * down))
            left = across - columns // 2 + int(x * (width - 2 * across))
            box = (top, left, top + rows, left + columns)
            if all(_apart(box, other, config.spacing) for other in taken):
                taken.append(box)
                planned.append(
                    Defect(int(chosen[i]), top, left, float(amplitudes[i]), scales, wanted)
                )
                break
    return planned


def _apart(a: tuple[int, int, int, int], b: tuple[int, int, int, int], spacing: int) -> bool:
    return (
        a[0] >= b[2] + spacing
        or b[0] >= a[2] + spacing
        or a[1] >= b[3] + spacing
        or b[1] >= a[3] + spacing
    )


def paint(
    planes_CHW: Array,
    mask_HW: Array,
    defects: Sequence[Defect],
    kernels: Sequence[Kernel],
    value_range: tuple[float, float],
) -> None:
    """Add defects to a tile, and mark the wanted ones, both in place; nothing is clipped.

    A spot that the range would cut to less than half takes the other sign where there is more
    room: what cannot be seen must not be marked.

    Args:
        planes_CHW: (3, H, W) float32 in the sensor's values.
        mask_HW: bool.
    """
    low, high = value_range
    for defect in defects:
        spot = kernels[defect.kernel]
        rows, columns = spot.values_HW.shape
        box = (
            slice(defect.top, defect.top + rows),
            slice(defect.left, defect.left + columns),
        )
        amplitude = defect.amplitude * (high - low)
        centre = float(planes_CHW[0, defect.top + rows // 2, defect.left + columns // 2])
        above, below = high - centre, centre - low
        ahead, behind = (above, below) if amplitude > 0 else (below, above)
        if ahead < abs(amplitude) / 2 and behind > ahead:
            amplitude = -amplitude
        for plane_HW, scale in zip(planes_CHW, defect.scales, strict=True):
            if scale:
                plane_HW[box] += spot.values_HW * np.float32(amplitude * scale)
        if defect.wanted:
            mask_HW[box] |= spot.mask_HW


class Disturbances:
    """Gain, offset, noise, displacement and lines of single planes.

    Noise is read from one long row of normal numbers, each time from another place: drawing it
    anew would take longer than all the rest.
    """

    def __init__(self, config: DisturbanceConfig, value_range: tuple[float, float]) -> None:
        self.config = config
        self.low, self.high = value_range
        self.pool = np.random.default_rng(0).standard_normal(_POOL, np.float32)

    def apply(self, rng: Generator, planes_CHW: Array) -> None:
        """Disturb a tile in place; nothing is clipped.

        Args:
            planes_CHW: (3, H, W) float32 in the sensor's values, C-contiguous.
        """
        config, span, middle = self.config, self.high - self.low, (self.low + self.high) / 2
        num, height, width = planes_CHW.shape
        if config.shift or config.spread:
            shifts = rng.uniform(-config.shift, config.shift, 2)
            shifts = shifts + rng.uniform(-config.spread, config.spread, (num - 1, 2))
            if config.whole_pixels:
                shifts = np.rint(shifts)
            for reference_HW, shift in zip(planes_CHW[1:], shifts, strict=True):
                displace(reference_HW, shift)
        if rng.random() < config.lines:
            self._line(rng, planes_CHW[rng.integers(num)])
        gains, offsets, levels = rng.uniform(-1, 1, (3, num)).tolist()
        places = rng.integers(self.pool.size - height * width, size=num)
        for plane_HW, gain, offset, level, place in zip(
            planes_CHW, gains, offsets, levels, places, strict=True
        ):
            normal_HW = self.pool[place : place + height * width].reshape(height, width)
            gain *= config.gain
            # contrast changes about the middle of the range, so that brightness stays
            added = offset * config.offset * span - gain * middle
            sigma = abs(level) * config.noise * span
            cv2.addWeighted(plane_HW, 1 + gain, normal_HW, sigma, added, dst=plane_HW)

    def _line(self, rng: Generator, plane_HW: Array) -> None:
        """One to three pixels wide, along rows or columns, mostly a fifth of the tile or longer."""
        along_HW = plane_HW if rng.random() < 0.5 else plane_HW.T
        num, length = along_HW.shape
        start = int(rng.integers(length * 4 // 5))
        end = start + int(rng.integers(length // 5, length + 1))
        at, wide = int(rng.integers(num)), int(rng.integers(1, 4))
        amplitude = rng.uniform(*self.config.line_amplitude) * rng.choice((-1, 1))
        along_HW[at : at + wide, start:end] += np.float32(amplitude * (self.high - self.low))


def displace(plane_HW: Array, shift: Array) -> None:
    """Move a plane (down, across) by pixels and fractions of them, in place; mirrored at borders.

    Cubic (Catmull-Rom), one row of weights per axis.
    """
    down, across = taps(shift)
    cv2.sepFilter2D(plane_HW, -1, across, down, dst=plane_HW, borderType=cv2.BORDER_REFLECT_101)


def taps(shift_N: Array) -> Array:
    """Weights of the pixels about the one that is computed: f(x - shift), a row for each shift."""
    radius = math.ceil(np.abs(shift_N).max()) + 1
    distance = np.abs(np.arange(-radius, radius + 1) + shift_N[:, None])
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))

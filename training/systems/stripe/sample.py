"""Draws a small labelled data set for ``stripe``: strips of a periodic surface, captured thrice.

Half of the strips show stripes, half a grid. The two references are captures of the same place:
displaced by a fraction of a pixel, with their own brightness and noise. Spots of a few pixels are
the defects; where a reference shows a spot as well, or alone, it is a distractor and not marked.
NumPy and OpenCV only: nothing here, nor what it imports, loads torch.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from numpy.random import Generator

from engineworks.runtime import images, planes
from engineworks.runtime.tensors import Array
from engineworks.training.drawing import check_empty

# name of the folder -> sign of its spots
DEFECTS = {"bright_spots": 1, "dark_spots": -1}
# which planes show a distractor: target, ref1, ref2
_DISTRACTORS = ((1, 1, 1), (1, 1, 0), (1, 0, 1), (0, 1, 0), (0, 0, 1))
_BORDER = 8  # pixels without spots


def sample(
    out: Path,
    *,
    seed: int = 0,
    size: tuple[int, int] = (488, 176),
    num_train: int = 24,
    num_test: int = 24,
) -> dict[str, int]:
    """Draw the data set; half of the test strips are good, the others go round the defects.

    Args:
        out: folder to make: train/good, test/good, test/<defect>, ground_truth/<defect> with
            <name>_mask.png (255 = defective). A strip is one PNG.
        size: (height, width) of the strips in pixels.

    Returns:
        Folder (relative to ``out``) -> number of strips in it.

    Raises:
        RunError: ``out`` already holds something.
    """
    check_empty(out)
    counts: dict[str, int] = {}

    def save(folder: str, planes_HWC: Array) -> str:
        name = f"{counts.get(folder, 0):03d}"
        counts[folder] = counts.get(folder, 0) + 1
        planes.write(out / folder / f"{name}.png", planes_HWC)
        return name

    # one stream of random numbers per strip: more strips do not change the first ones
    for i in range(num_train):
        save("train/good", draw(np.random.default_rng((seed, 0, i)), size, distractors=0)[0])
    num_good = num_test // 2
    for i in range(num_good):
        save("test/good", draw(np.random.default_rng((seed, 1, i)), size)[0])
    names = list(DEFECTS)
    for i in range(num_test - num_good):
        defect = names[i % len(names)]
        strip, mask = draw(np.random.default_rng((seed, 2, i)), size, defect)
        name = save(f"test/{defect}", strip)
        images.write(out / "ground_truth" / defect / f"{name}_mask.png", mask)
    return counts


def draw(
    rng: Generator, size: tuple[int, int], defect: str | None = None, *, distractors: int = 6
) -> tuple[Array, Array]:
    """One strip.

    Args:
        size: (height, width) in pixels.
        defect: a name in ``DEFECTS``, of which one to three spots are drawn; None draws none.
        distractors: spots that are no defects.

    Returns:
        (height, width, 3) uint8 target and references, and the (height, width) uint8 mask, 255
        where the target is defective.
    """
    mask = np.zeros(size, np.uint8)
    strip = _captures(rng, _Surface(rng), size)
    shown = [_DISTRACTORS[rng.integers(len(_DISTRACTORS))] for _ in range(distractors)]
    signs = [int(rng.choice((-1, 1))) for _ in range(distractors)]
    if defect is not None:
        num = int(rng.integers(1, 4))
        shown, signs = shown + [(1, 0, 0)] * num, signs + [DEFECTS[defect]] * num
    places = _places(rng, len(shown), size)
    for i, (captures, sign, (y, x)) in enumerate(zip(shown, signs, places, strict=True)):
        box, spot = _spot(rng, y, x)
        for plane, shows in enumerate(captures):
            if shows:
                strip[(*box, plane)] += sign * rng.uniform(55, 90) * spot
        if i >= distractors:
            mask[box] = 255
    noisy = strip + rng.normal(0, rng.uniform(2, 4), strip.shape)
    return np.clip(np.round(noisy), 0, 255).astype(np.uint8), mask


class _Surface:
    """Stripes or a grid, everywhere: it can be looked at from any place."""

    def __init__(self, rng: Generator) -> None:
        self.is_grid = bool(rng.random() < 0.5)
        self.angle = rng.normal(0, 0.02) + (np.pi / 2 if rng.random() < 0.5 else 0)
        self.periods = rng.uniform(8, 16, 2)
        self.phases = rng.uniform(0, 2 * np.pi, 2)
        self.duty = rng.uniform(-0.3, 0.3)
        self.dark, self.contrast = rng.uniform(60, 90), rng.uniform(50, 80)
        self.grain = rng.normal(0, 1, (64, 64)).astype(np.float32)

    def seen(self, size: tuple[int, int], down: float, across: float) -> Array:
        """(height, width) float32 values of the surface, displaced by so many pixels."""
        y, x = np.mgrid[: size[0], : size[1]].astype(np.float32)
        y, x = y + np.float32(down), x + np.float32(across)
        along = x * np.cos(self.angle) + y * np.sin(self.angle)
        across_ = y * np.cos(self.angle) - x * np.sin(self.angle)
        pattern = self._bars(along, 0)
        if self.is_grid:
            pattern = np.maximum(pattern, self._bars(across_, 1))
        # blotches of the material, which all captures share
        blotches = cv2.remap(
            self.grain, x / 9 % 64, y / 9 % 64, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP
        )
        return np.asarray(self.dark + self.contrast * pattern + 3 * blotches, np.float32)

    def _bars(self, position: Array, axis: int) -> Array:
        """Bars with soft edges, 0 to 1."""
        wave = np.sin(2 * np.pi / self.periods[axis] * position + self.phases[axis])
        return np.asarray(0.5 + 0.5 * np.tanh(2.5 * (wave - self.duty)))


def _captures(rng: Generator, surface: _Surface, size: tuple[int, int]) -> Array:
    """(height, width, 3) float64: a target and two references that are not quite in register."""
    captures = []
    for plane in range(3):
        down, across = rng.uniform(-0.6, 0.6, 2) if plane else (0.0, 0.0)
        gain, offset = rng.uniform(0.97, 1.03), rng.uniform(-4, 4)
        slope = np.linspace(-1, 1, size[0])[:, None] * rng.uniform(-3, 3)
        captures.append(surface.seen(size, down, across) * gain + offset + slope)
    return np.stack(captures, axis=-1)


def _places(rng: Generator, num: int, size: tuple[int, int]) -> list[tuple[int, int]]:
    """Pixels (y, x) that are at least 12 apart along one of the axes."""
    places: list[tuple[int, int]] = []
    while len(places) < num:
        y, x = rng.integers(_BORDER, np.subtract(size, _BORDER)).tolist()
        if all(max(abs(y - v), abs(x - u)) >= 12 for v, u in places):
            places.append((y, x))
    return places


def _spot(rng: Generator, y: int, x: int) -> tuple[tuple[slice, slice], Array]:
    """A Gaussian about a point of a pixel, in a box of 3 x 3 or 3 x 5 pixels around it."""
    columns = 3 if rng.random() < 0.5 else 5
    down, across = rng.uniform(-0.25, 0.25, 2)
    v = (np.arange(-1, 2)[:, None] - down) / rng.uniform(1.0, 1.3)
    u = (np.arange(-(columns // 2), columns // 2 + 1) - across) / rng.uniform(1.2, 1.5)
    box = slice(y - 1, y + 2), slice(x - columns // 2, x + columns // 2 + 1)
    return box, np.exp(-(v**2 + u**2) / 2)

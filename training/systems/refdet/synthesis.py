"""Objects cut out of some frames and pasted into others: sizes, neighbours and light are new.

A frame gets one object with its name, at another size, mirrored and lit otherwise, and objects of
other names beside it or partly over it. Edges are soft, so that they tell nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.random import Generator

from engineworks.runtime import boxes
from engineworks.runtime.frames import Frames
from engineworks.runtime.objects import Frame, LabelledFrame
from engineworks.runtime.tensors import Array

_SHARES = (0.12, 0.6)  # of a frame's shorter side, that a pasted object's longer side takes
_LARGEST_ZOOM = 1.5
_LIGHT = 0.25  # largest change of brightness, as a share
_MIN_SIDE = 24.0  # pixels of what is cut out
_MOST = 3  # objects pasted into a frame
_SOFT = 0.06  # of its sides, over which an object fades
_VISIBLE = 0.4  # share of a box that must stay in sight


@dataclass(frozen=True, eq=False)
class Scene:
    """A picture with objects, (H, W, 3) uint8, (N, 4) xyxy in its pixels, and their names."""

    image: Array
    boxes_N4: Array
    objects: tuple[str, ...]


@dataclass(frozen=True)
class _Piece:
    frame: Frame
    box: tuple[float, float, float, float]
    name: str


class Synthesis:
    """Pastes objects of frames into frames."""

    def __init__(self, labelled: Sequence[LabelledFrame], frames: Frames) -> None:
        self._frames = frames
        self._labelled = labelled
        self._pieces: dict[str, list[_Piece]] = {}
        for each in labelled:
            for (x1, y1, x2, y2), name in zip(each.boxes_N4.tolist(), each.objects, strict=True):
                if min(x2 - x1, y2 - y1) >= _MIN_SIDE:
                    piece = _Piece(each.frame, (x1, y1, x2, y2), name)
                    self._pieces.setdefault(name, []).append(piece)
        self._names = sorted(self._pieces)

    def scene(self, rng: Generator) -> Scene:
        """A frame with up to three objects pasted into it."""
        below = self._labelled[int(rng.integers(len(self._labelled)))]
        image = self._frames.read(below.frame).copy()
        found, names = below.boxes_N4, list(below.objects)
        for _ in range(int(rng.integers(1, _MOST + 1)) if self._names else 0):
            pieces = self._pieces[self._names[int(rng.integers(len(self._names)))]]
            piece = pieces[int(rng.integers(len(pieces)))]
            box_4 = self._paste(image, piece, rng)
            shown = boxes.areas(found) > 0
            hidden = np.array(
                [_hidden(each, box_4) > 1 - _VISIBLE for each in found], dtype=bool
            ).reshape(-1)
            kept = shown & ~hidden
            names = [name for name, keep in zip(names, kept, strict=True) if keep]
            found = np.concatenate([found[kept], box_4[None]]).astype(np.float32)
            names.append(piece.name)
        return Scene(image, found, tuple(names))

    def _paste(self, image: Array, piece: _Piece, rng: Generator) -> Array:
        """Paste an object into an image, in place; gives its box there, (4,)."""
        x1, y1, x2, y2 = (round(v) for v in piece.box)
        cut = self._frames.read(piece.frame)[max(y1, 0) : y2, max(x1, 0) : x2]
        height, width = image.shape[:2]
        longer = rng.uniform(*_SHARES) * min(height, width)
        zoom = min(longer / max(cut.shape[:2]), _LARGEST_ZOOM)
        size = [max(8, round(zoom * side)) for side in cut.shape[1::-1]]
        size = [min(size[0], width), min(size[1], height)]
        cut = cv2.resize(cut, size, interpolation=cv2.INTER_AREA if zoom < 1 else cv2.INTER_LINEAR)
        if rng.random() < 0.5:
            cut = cut[:, ::-1]
        lit = cut * (1 + rng.uniform(-_LIGHT, _LIGHT))
        alpha = np.minimum.outer(_fade(size[1]), _fade(size[0]))[..., None]
        x = int(rng.integers(width - size[0] + 1))
        y = int(rng.integers(height - size[1] + 1))
        part = image[y : y + size[1], x : x + size[0]]
        part[:] = np.clip(alpha * lit + (1 - alpha) * part, 0, 255)
        return np.array([x, y, x + size[0], y + size[1]], np.float32)


def _fade(side: int) -> Array:
    """(side,) opacity: 1 in the middle, less towards both ends."""
    ends = np.minimum(np.arange(side) + 1, np.arange(side, 0, -1))
    return np.asarray(np.clip(ends / (_SOFT * side + 1), 0, 1))


def _hidden(box_4: Array, above_4: Array) -> float:
    """Share of a box that lies below another."""
    low, high = np.maximum(box_4[:2], above_4[:2]), np.minimum(box_4[2:], above_4[2:])
    area = float(np.prod(box_4[2:] - box_4[:2]))
    return float(np.prod((high - low).clip(0))) / area if area > 0 else 1.0

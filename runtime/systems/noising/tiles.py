"""Pictures of any size at their own resolution: tiles of the network's size that overlap.

Each tile is an image of its own: the highest of their scores is the picture's, and their maps are
put together to one of the picture's size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import cv2
import numpy as np
from pydantic import Field

from engineworks.runtime.errors import InputError
from engineworks.runtime.systems.noising.signals import Part, anomaly_map
from engineworks.runtime.tensors import Array
from engineworks.runtime.tiling import cut, overlapping, stitch


class Tiles(Part):
    """How pictures are covered.

    Attributes:
        overlap: pixels that neighbouring tiles share at least; at most half a tile.
    """

    overlap: int = Field(default=32, ge=0, le=1 << 15)

    def check(self, size: tuple[int, int]) -> None:
        """Refuse an overlap that tiles of (height, width) pixels cannot have.

        Raises:
            InputError: it is more than half of a side.
        """
        if 2 * self.overlap > min(size):
            raise InputError(
                f"tiles of {size[0]} x {size[1]} pixels cannot overlap by {self.overlap}",
                fix="take at most half of a tile's shorter side",
            )


@dataclass(frozen=True)
class Layout:
    """Where the tiles of a picture lie.

    Attributes:
        size: (height, width) of the picture in pixels. Where a side is shorter than a tile, the
            picture is mirrored beyond its bottom or right border up to there.
        tile: (height, width) of each tile.
        rows, columns: starts of the tiles.
    """

    size: tuple[int, int]
    tile: tuple[int, int]
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @classmethod
    def of(cls, size: tuple[int, int], tile: tuple[int, int], tiles: Tiles) -> Self:
        """The tiles of a picture of (height, width) pixels: as few as overlap as asked for."""
        rows, columns = (
            overlapping(max(side, length), length, tiles.overlap)
            for side, length in zip(size, tile, strict=True)
        )
        return cls(size, tile, rows, columns)

    def __len__(self) -> int:
        return len(self.rows) * len(self.columns)

    def cut(self, image: Array) -> list[Array]:
        """The tiles of an image (H, W, C) of this size, row by row: (height, width, C) each; views
        of it, where it needs no border.
        """
        down, right = (max(0, t - s) for s, t in zip(self.size, self.tile, strict=True))
        if down or right:
            image = cv2.copyMakeBorder(image, 0, down, 0, right, cv2.BORDER_REFLECT_101)
        planes = image.transpose(2, 0, 1)
        return [t.transpose(1, 2, 0) for t in cut(planes, self.rows, self.columns, self.tile)]

    def stitch(self, maps: Iterable[Array]) -> Array:
        """Maps (height, width) of the tiles, in the order of ``cut``, as one of the picture's size.

        Each is taken as it comes: there are never two in memory.
        """
        height, width = self.size
        return stitch(maps, self.rows, self.columns)[:height, :width]


def picture_map(
    scores: Sequence[Array],
    grid: tuple[int, int],
    size: tuple[int, int],
    smoothing: float,
    layout: Layout | None,
) -> Array:
    """The map of a picture from the patch values of its tiles.

    Args:
        scores: (N,) float32 of each tile; of the one image where there is no layout.
        grid, size, smoothing: see ``anomaly_map``.

    Returns:
        float32, (height, width) of the picture; without a layout ``size``.
    """
    maps = (anomaly_map(scores_N, grid, size, smoothing) for scores_N in scores)
    return np.asarray(next(maps) if layout is None else layout.stitch(maps))

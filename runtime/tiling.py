"""Large images in tiles: where they lie, and which tile answers for which pixel.

Tiles overlap. Between two neighbours the border runs through the middle of their overlap, so every
pixel has exactly one owner, the one in which it lies deeper: nothing is averaged, nothing is left
out, for any size of image.

Source: the sliding window of Background_Removal_Net; its margins, taken from the first step alone,
left rows without an owner where steps differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain, pairwise, product

import numpy as np

from engineworks.runtime.errors import InputError
from engineworks.runtime.tensors import Array


def positions(length: int, tile: int, minimum: int = 2) -> tuple[int, ...]:
    """Starts of the tiles along an axis, evenly spread from 0 to ``length - tile``, ascending.

    Args:
        length, tile: in pixels.
        minimum: at least so many tiles, where the axis is longer than one and has so many
            different places.

    Raises:
        InputError: the axis is shorter than a tile.
    """
    free = length - tile
    if free < 0:
        raise InputError(
            f"{length} pixels are less than a tile of {tile}",
            fix="take smaller tiles, or pad the image",
        )
    if free == 0:
        return (0,)
    num = min(max(minimum, -(-length // tile)), free + 1)
    return tuple(i * free // (num - 1) for i in range(num))


def overlapping(length: int, tile: int, overlap: int) -> tuple[int, ...]:
    """As ``positions``, with as few tiles as let neighbours share at least ``overlap`` pixels.

    Raises:
        InputError: the axis is shorter than a tile, or the overlap not smaller than one.
    """
    step = tile - overlap
    if not 0 < step <= tile:
        raise InputError(
            f"tiles of {tile} pixels cannot overlap by {overlap}",
            fix="take an overlap from 0 to less than a tile",
        )
    return positions(length, tile, max(1, 1 - (tile - length) // step))


def boundaries(starts: Sequence[int], tile: int) -> tuple[int, ...]:
    """Borders between the owners: tile i owns the pixels from border i up to border i + 1.

    Args:
        starts: as ``positions`` gives them.

    Returns:
        One more than there are tiles: 0, the middle of each overlap, the length of the axis.
    """
    inner = [(start + tile + after) // 2 for start, after in pairwise(starts)]
    return (0, *inner, starts[-1] + tile)


def cut(
    image: Array, rows: Sequence[int], columns: Sequence[int], size: tuple[int, int]
) -> list[Array]:
    """The tiles of an image, row by row, as views.

    Args:
        image: (..., H, W).
        rows, columns: starts of the tiles.
        size: (height, width) of a tile.

    Returns:
        (..., height, width) each.
    """
    height, width = size
    return [image[..., y : y + height, x : x + width] for y, x in product(rows, columns)]


def stitch(tiles: Iterable[Array], rows: Sequence[int], columns: Sequence[int]) -> Array:
    """Put maps of tiles together: each pixel from its owner.

    Args:
        tiles: (height, width) each, in the order of ``cut``; taken one by one.
        rows, columns: starts of the tiles, as given to ``cut``.

    Returns:
        (H, W) of the tiles' dtype.
    """
    remaining = iter(tiles)
    first = next(remaining)
    height, width = first.shape
    tops, lefts = boundaries(rows, height), boundaries(columns, width)
    whole = np.empty((tops[-1], lefts[-1]), first.dtype)
    down = zip(rows, pairwise(tops), strict=True)
    across = zip(columns, pairwise(lefts), strict=True)
    places = product(down, across)
    for tile_HW, (vertical, horizontal) in zip(chain([first], remaining), places, strict=True):
        (y, (top, bottom)), (x, (left, right)) = vertical, horizontal
        whole[top:bottom, left:right] = tile_HW[top - y : bottom - y, left - x : right - x]
    return whole

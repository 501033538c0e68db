"""Pictures for people: heat maps, outlines, boxes, panels. All images are (H, W, 3) uint8 RGB."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from engineworks.runtime.tensors import Array

MARK = (255, 40, 40)
_BAR = (24, 24, 24)
_TEXT = (240, 240, 240)
_FULL, _EMPTY = (50, 125, 215), (52, 52, 52)
_GAP = 4
# sides in pixels between which a picture of a panel is legible, and a video of panels playable
_MIN_HEIGHT, _MAX_SIDE = 192, 1280
_MIN_WIDTH = 80  # of a picture below a title of one word
_MIN_ROW, _MAX_ROW = 26, 48  # heights of a bar and its label
_SHEET_SIDE = 2560
# of a confusion matrix: sides of cells that hold a label, a count, and that need not grow
_LABEL_CELL, _COUNT_CELL, _MAX_CELL = 12, 26, 37


def heatmap(map_HW: Array, low: float, high: float) -> Array:
    """Colours of a map: ``low`` and below dark violet, ``high`` and above dark red."""
    scaled = np.clip((map_HW - low) / max(high - low, 1e-12), 0, 1)
    coloured = cv2.applyColorMap((scaled * 255).astype(np.uint8), cv2.COLORMAP_TURBO)
    return np.asarray(cv2.cvtColor(coloured, cv2.COLOR_BGR2RGB))


def blend(image: Array, over: Array, alpha: float) -> Array:
    """``over`` on ``image`` with opacity ``alpha`` in [0, 1]."""
    return np.asarray(cv2.addWeighted(image, 1 - alpha, over, alpha, 0))


def contour(image: Array, mask_HW: Array, colour: tuple[int, int, int] = MARK) -> Array:
    """A copy of the image with the outlines of a mask, its holes included.

    The line gets thicker with the image; a thin light rim sets it off from a ground of its colour.
    """
    outlines, _ = cv2.findContours(
        np.ascontiguousarray(mask_HW != 0, np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE
    )
    drawn = np.array(image, order="C")
    thickness = max(1, round(min(image.shape[:2]) / 160))
    if thickness > 1:
        cv2.drawContours(drawn, outlines, -1, _TEXT, thickness + 2)
    cv2.drawContours(drawn, outlines, -1, colour, thickness)
    return drawn


def rings(
    image: Array,
    places: Sequence[tuple[int, int]],
    radius: int,
    colour: tuple[int, int, int] = MARK,
) -> Array:
    """A copy of the image with a ring around each place.

    Args:
        places: (column, row) in pixels.
        radius: of the rings in pixels.
    """
    drawn = np.array(image, order="C")
    for place in places:
        cv2.circle(drawn, place, radius, colour, 1, cv2.LINE_AA)
    return drawn


@dataclass(frozen=True)
class Box:
    """A box to be drawn.

    Attributes:
        corners: x1, y1, x2, y2 in pixels.
        kind: boxes of a kind have a colour of their own, the same in every picture and run.
        label: written above it.
    """

    corners: tuple[float, float, float, float]
    kind: str
    label: str


def boxes(image: Array, found: Sequence[Box]) -> Array:
    """A copy of the image with boxes and their labels, the first on top.

    Lines and letters get larger with the image.
    """
    drawn = np.array(image, order="C")
    height, width = drawn.shape[:2]
    thickness = max(1, round(min(height, width) / 240))
    scale = max(0.35, min(height, width) / 1000)
    bar = round(30 * scale)
    for box in reversed(found):
        colour = colour_of(box.kind)
        left, top, right, bottom = (round(side) for side in box.corners)
        cv2.rectangle(drawn, (left, top), (right - 1, bottom - 1), colour, thickness)
        # a label that has no room above its box, or right of its corner, is moved into the image
        length = min(_width(box.label, scale) + 8, width)
        x, y = min(max(left, 0), width - length), min(max(top - bar, 0), max(height - bar, 0))
        plate = drawn[y : y + bar, x : x + length]
        plate[:] = colour
        text(plate, box.label, scale, _contrast(colour))
    return drawn


def colour_of(kind: str) -> tuple[int, int, int]:
    """A bright colour for a name, always the same."""
    number = zlib.crc32(kind.encode())
    hue, value = number % 180, 200 + number // 180 % 56  # OpenCV counts hues in steps of 2 degrees
    pixel = np.array([[[hue, 200, value]]], np.uint8)
    red, green, blue = cv2.cvtColor(pixel, cv2.COLOR_HSV2RGB)[0, 0].tolist()
    return red, green, blue


def _contrast(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    """Letters that can be read on a ground: dark ones on light, light ones on dark."""
    red, green, blue = colour
    light = 0.299 * red + 0.587 * green + 0.114 * blue  # luma of ITU-R BT.601
    return _BAR if light > 128 else _TEXT


def difference(values_HW: Array, limit: float) -> Array:
    """Grey levels of a signed map: 0 is medium grey, ``-limit`` black, ``limit`` white."""
    scaled = np.clip(values_HW / (2 * limit) + 0.5, 0, 1)
    return np.asarray(np.rint(scaled * 255).astype(np.uint8)[..., None].repeat(3, axis=2))


def panel(parts: Sequence[tuple[str, Array]]) -> Array:
    """Pictures side by side, each below its title.

    All get the height of the first. Small ones are enlarged by a whole factor, so that the titles
    can be read, and large ones reduced, so that a video of panels can be played.

    Args:
        parts: (title, image), at least one.

    Returns:
        (bar + H', sum of widths + gaps, 3) uint8; 192 <= H' <= 1280 unless a side ratio is extreme.
    """
    height = _panel_height(*parts[0][1].shape[:2])
    return _beside([(title, _scaled(image, height)) for title, image in parts])


def ranking(image: Array, title: str, values: Sequence[tuple[str, float]]) -> Array:
    """A picture beside a horizontal bar per value, the first at the top.

    Args:
        title: over the bars.
        values: (label, value in [0, 1]), at least one.

    Returns:
        As ``panel``; a picture too flat for the bars, or too narrow for its title, is centred on a
        dark ground.
    """
    picture = _scaled(image, _panel_height(*image.shape[:2]))
    height = max(picture.shape[0], _MIN_ROW * len(values))
    chart = _ground(height, int(np.clip(height, 256, 640)))
    row_height = min(height // len(values), _MAX_ROW)
    bar_height = row_height // 5
    for i, (label, value) in enumerate(values):
        row = chart[i * row_height : (i + 1) * row_height - bar_height // 2]
        text(row[:-bar_height], f"{value:.2f}  {label}")
        bar = row[-bar_height:, _GAP:-_GAP]
        bar[:] = _EMPTY
        bar[:, : round(value * bar.shape[1])] = _FULL
    width = max(picture.shape[1], _MIN_WIDTH)
    return _beside([("input", _centred(picture, height, width)), (title, chart)])


def grid(pictures: Sequence[Array]) -> Array:
    """A contact sheet: rows of pictures in their order, each centred in its cell.

    As square as the largest picture allows. Where the sheet would get larger than about 2560
    pixels, all pictures are reduced by the same factor.

    Args:
        pictures: at least one.
    """
    height, width = np.max([picture.shape[:2] for picture in pictures], axis=0)
    num = len(pictures)
    columns = min(range(1, num + 1), key=lambda n: max(n * width, -(-num // n) * height))
    rows = -(-num // columns)
    scale = min(1.0, _SHEET_SIDE / (columns * width), _SHEET_SIDE / (rows * height))
    small = [reduced(picture, scale) for picture in pictures]
    height, width = np.max([picture.shape[:2] for picture in small], axis=0)
    cells = [_centred(picture, height, width) for picture in small]
    cells += [_ground(height, width)] * (rows * columns - num)
    return _joined(
        [_joined(cells[i : i + columns], axis=1) for i in range(0, len(cells), columns)], axis=0
    )


def thumbnail(image: Array, side: int) -> Array:
    """Average an image down until no side is longer; a smaller one stays as it is."""
    return reduced(image, min(1.0, side / max(image.shape[:2])))


def confusion_matrix(counts_CC: Array, labels: Sequence[str]) -> Array:
    """What is taken for what: a row per class, a column per answer.

    Right answers are blue, wrong ones red: the square root of the share of their row is the depth
    of the colour. Labels are written where the cells have room for them, up to about a hundred
    classes, and counts up to about fifty.

    Args:
        counts_CC: (C, C) int, see ``runtime.metrics.ClassificationMetrics.confusion``.
        labels: C names.
    """
    num = len(labels)
    side = int(np.clip(_MAX_SIDE // num, 1, _MAX_CELL))
    share_CC = np.sqrt(counts_CC / np.maximum(counts_CC.sum(axis=1, keepdims=True), 1))
    full = np.where(np.eye(num, dtype=bool)[..., None], _FULL, MARK)
    colours = _EMPTY + share_CC[..., None] * (full - np.array(_EMPTY))
    cells = np.rint(colours).astype(np.uint8).repeat(side, axis=0).repeat(side, axis=1)
    if side >= _COUNT_CELL:
        for row, column in np.argwhere(counts_CC):
            cell = cells[row * side : (row + 1) * side, column * side : (column + 1) * side]
            text(cell[side // 5 : -side // 5], str(counts_CC[row, column]))
    if side > _COUNT_CELL:  # lines between cells that are large enough to spare them
        cells[::side] = cells[:, ::side] = _BAR
    if side >= _LABEL_CELL:
        margin = min(240, max(_width(label, side / 36) for label in labels) + 2 * _GAP)
        names = _ground(num * side, margin)
        for i, label in enumerate(labels):
            text(names[i * side : (i + 1) * side], label)
        above = np.concatenate([np.rot90(name) for name in np.split(names, num)], axis=1)
        cells = np.block([[[_ground(margin, margin)], [above]], [[names], [cells]]])
    width = max(cells.shape[1], 4 * _MIN_WIDTH)
    return _beside([("rows: class, columns: answer", _centred(cells, len(cells), width))])


def text(
    bar: Array, line: str, scale: float | None = None, colour: tuple[int, int, int] = _TEXT
) -> None:
    """Write a line into a bar (in place); without a scale, as large as the bar allows."""
    if scale is None:
        scale = _fitting(line, bar.shape[:2])
    origin = (4, round(bar.shape[0] * 0.5 + scale * 11))  # a capital is 22 pixels high at scale 1
    cv2.putText(
        bar, line, origin, cv2.FONT_HERSHEY_SIMPLEX, scale, colour, _weight(scale), cv2.LINE_AA
    )


def _beside(parts: Sequence[tuple[str, Array]]) -> Array:
    """Pictures of one height side by side, each below its title."""
    height = int(np.clip(parts[0][1].shape[0] // 10, 22, 56))
    scale = min(_fitting(title, (height, picture.shape[1])) for title, picture in parts)
    columns = []
    for title, picture in parts:
        bar = _ground(height, picture.shape[1])
        text(bar, title, scale)
        columns.append(np.concatenate([bar, picture]))
    return _joined(columns, axis=1)


def _joined(pictures: Sequence[Array], axis: int) -> Array:
    """Pictures in a row (axis 1) or a column (axis 0), with gaps between them."""
    height, width = pictures[0].shape[:2]
    gap = _ground(*((_GAP, width) if axis == 0 else (height, _GAP)))
    spaced = [each for picture in pictures for each in (gap, picture)]
    return np.concatenate(spaced[1:], axis=axis)


def _centred(picture: Array, height: int, width: int) -> Array:
    ground = _ground(height, width)
    top, left = (height - picture.shape[0]) // 2, (width - picture.shape[1]) // 2
    ground[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return ground


def _ground(height: int, width: int) -> Array:
    return np.full((height, width, 3), _BAR, np.uint8)


def _panel_height(height: int, width: int) -> int:
    if max(height, width) > _MAX_SIDE:
        return max(1, round(height * _MAX_SIDE / max(height, width)))
    return height * max(1, min(-(-_MIN_HEIGHT // height), _MAX_SIDE // max(height, width)))


def _scaled(image: Array, height: int) -> Array:
    if image.shape[0] == height:
        return image
    width = max(1, round(image.shape[1] * height / image.shape[0]))
    # enlarged pixels stay visible as such, reduced ones are averaged
    method = cv2.INTER_NEAREST if height > image.shape[0] else cv2.INTER_AREA
    return np.asarray(cv2.resize(image, (width, height), interpolation=method))


def _fitting(line: str, size: Sequence[int]) -> float:
    """The scale at which a line fits into a bar of (height, width)."""
    scale = size[0] / 36
    while scale > 0.2 and _width(line, scale) > size[1] - 8:
        scale *= 0.95
    return scale


def reduced(image: Array, scale: float) -> Array:
    """The image at ``scale`` times its size, averaged; no side gets lost."""
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    return np.asarray(cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA))


def _weight(scale: float) -> int:
    return max(1, round(scale * 1.4))


def _width(line: str, scale: float) -> int:
    font = cv2.FONT_HERSHEY_SIMPLEX
    return int(cv2.getTextSize(line, font, scale, _weight(scale))[0][0])

"""Pictures for people: heat maps, outlines and panels. All images are (H, W, 3) uint8 RGB."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from runtime.tensors import Array

MARK = (255, 40, 40)
_BAR = (24, 24, 24)
_TEXT = (240, 240, 240)
_GAP = 4
# sides in pixels between which a picture of a panel is legible, and a video of panels playable
_MIN_HEIGHT, _MAX_SIDE = 192, 1280


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
    bar_height = int(np.clip(height // 10, 22, 56))
    pictures = [_scaled(image, height) for _, image in parts]
    titles = [title for title, _ in parts]
    scale = min(map(_fitting, titles, [(bar_height, p.shape[1]) for p in pictures]))
    columns = []
    for i, (title, picture) in enumerate(zip(titles, pictures, strict=True)):
        bar = np.full((bar_height, picture.shape[1], 3), _BAR, np.uint8)
        text(bar, title, scale)
        if i:
            columns.append(np.full((bar_height + height, _GAP, 3), _BAR, np.uint8))
        columns.append(np.concatenate([bar, picture]))
    return np.concatenate(columns, axis=1)


def text(bar: Array, line: str, scale: float | None = None) -> None:
    """Write a line into a bar (in place); without a scale, as large as the bar allows."""
    if scale is None:
        scale = _fitting(line, bar.shape[:2])
    origin = (4, round(bar.shape[0] * 0.5 + scale * 11))  # a capital is 22 pixels high at scale 1
    cv2.putText(
        bar, line, origin, cv2.FONT_HERSHEY_SIMPLEX, scale, _TEXT, _weight(scale), cv2.LINE_AA
    )


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


def _weight(scale: float) -> int:
    return max(1, round(scale * 1.4))


def _width(line: str, scale: float) -> int:
    font = cv2.FONT_HERSHEY_SIMPLEX
    return int(cv2.getTextSize(line, font, scale, _weight(scale))[0][0])

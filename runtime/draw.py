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


def heatmap(map_HW: Array, low: float, high: float) -> Array:
    """Colours of a map: ``low`` and below dark blue, ``high`` and above dark red."""
    scaled = np.clip((map_HW - low) / max(high - low, 1e-12), 0, 1)
    coloured = cv2.applyColorMap((scaled * 255).astype(np.uint8), cv2.COLORMAP_TURBO)
    return np.asarray(cv2.cvtColor(coloured, cv2.COLOR_BGR2RGB))


def blend(image: Array, over: Array, alpha: float) -> Array:
    """``over`` on ``image`` with opacity ``alpha`` in [0, 1]."""
    return np.asarray(cv2.addWeighted(image, 1 - alpha, over, alpha, 0))


def contour(image: Array, mask_HW: Array, colour: tuple[int, int, int] = MARK) -> Array:
    """The image with the outline of a mask; thickness follows the image's size."""
    outlines, _ = cv2.findContours(
        mask_HW.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE
    )
    drawn = np.ascontiguousarray(image.copy())
    cv2.drawContours(drawn, outlines, -1, colour, max(1, round(min(image.shape[:2]) / 160)))
    return drawn


def panel(parts: Sequence[tuple[str, Array]]) -> Array:
    """Pictures of equal height side by side, each below its title.

    Args:
        parts: (title, image); the images share their height.

    Returns:
        (H + bar, sum of widths + gaps, 3) uint8.
    """
    height = parts[0][1].shape[0]
    bar_height = int(np.clip(height // 10, 18, 48))
    columns = []
    for i, (title, image) in enumerate(parts):
        bar = np.full((bar_height, image.shape[1], 3), _BAR, np.uint8)
        text(bar, title, bar_height)
        columns.append(np.concatenate([bar, image]))
        if i + 1 < len(parts):
            columns.append(np.full((height + bar_height, _GAP, 3), _BAR, np.uint8))
    return np.concatenate(columns, axis=1)


def text(bar: Array, line: str, height: int) -> None:
    """Write a line into a bar, shrunk until it fits its width."""
    scale = height / 40
    while scale > 0.2 and _width(line, scale) > bar.shape[1] - 6:
        scale *= 0.9
    origin = (4, round(height * 0.7))
    cv2.putText(bar, line, origin, cv2.FONT_HERSHEY_SIMPLEX, scale, _TEXT, 1, cv2.LINE_AA)


def _width(line: str, scale: float) -> int:
    return int(cv2.getTextSize(line, cv2.FONT_HERSHEY_SIMPLEX, scale, 1)[0][0])

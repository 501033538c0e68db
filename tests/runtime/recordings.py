"""Videos made for tests: pictures that know their number, at chosen times."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from engineworks.runtime.tensors import Array

TICK = Fraction(1, 60000)


UNEVEN = [0.0, 0.04, 0.09, 0.2, 0.21, 0.5, 0.533, 1.2, 1.21, 2.0]


def picture(i: int, height: int = 48, width: int = 64) -> Array:
    """Grey whose level tells the frame, with a red square at the top left."""
    image = np.full((height, width, 3), 20 + 20 * (i % 10), np.uint8)
    image[: height // 3, : width // 3] = (255, 0, 0)
    return image


def encode(
    path: Path,
    times: Sequence[float] = UNEVEN,
    *,
    size: tuple[int, int] = (48, 64),
    codec: str = "libx264",
    **options: str,
) -> Path:
    """A video written with PyAV alone, one frame at each time."""
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=25, options={"g": "5"})
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = TICK
        for i, time_s in enumerate(times):
            frame = av.VideoFrame.from_ndarray(picture(i, *size), "rgb24")
            frame.time_base, frame.pts = TICK, round(time_s / TICK)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path

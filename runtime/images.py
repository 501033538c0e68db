"""Files to pixels and back: the only image decoder of the project."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from runtime.bundle import write_atomic
from runtime.errors import ImageError
from runtime.tensors import Array

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})

_JPEG_START, _JPEG_END = b"\xff\xd8", b"\xff\xd9"
_PNG_START, _PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"
_TAIL_BYTES = 1 << 16  # cameras append thumbnails and notes behind the picture

cv2.utils.logging.setLogLevel(
    cv2.utils.logging.LOG_LEVEL_SILENT
)  # errors are raised, not printed by the library


def read(path: Path) -> Array:
    """Decode a picture.

    EXIF orientation is applied, grey becomes three equal channels, alpha is dropped, and 16-bit
    values are divided by 257.

    Args:
        path: a file with one of ``SUFFIXES``, but its content decides.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        ImageError: missing, truncated, corrupt, or no picture.
    """
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH
    return np.asarray(cv2.cvtColor(_decode(path, flags), cv2.COLOR_BGR2RGB))


def read_mask(path: Path) -> Array:
    """Decode a mask: (H, W) uint8, in the file's own values.

    Raises:
        ImageError: as ``read``.
    """
    return _decode(path, cv2.IMREAD_GRAYSCALE)


def write(path: Path, image: Array) -> None:
    """Encode (H, W, 3) uint8 RGB or (H, W) uint8 by the path's suffix, atomically.

    Raises:
        ImageError: a suffix that no encoder knows.
    """
    pixels = cv2.cvtColor(image, cv2.COLOR_RGB2BGR) if image.ndim == 3 else image
    if path.suffix.lower() not in SUFFIXES:
        raise ImageError(
            f"{path} has no picture's suffix", fix=f"use one of {', '.join(sorted(SUFFIXES))}"
        )
    _done, encoded = cv2.imencode(path.suffix, pixels)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, encoded.tobytes())


def _decode(path: Path, flags: int) -> Array:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ImageError(f"cannot read {path}: {error.strerror}") from error
    if _is_truncated(data):
        raise ImageError(f"{path} is truncated", fix="copy the file again")
    pixels = None
    if data:
        try:
            pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
        except cv2.error as error:
            raise ImageError(f"{path} cannot be decoded: {error.err}") from error
    if pixels is None:
        raise ImageError(f"{path} is corrupt or no picture")
    if pixels.dtype == np.uint16:
        pixels = (pixels // 257).astype(np.uint8)
    if pixels.dtype != np.uint8:
        raise ImageError(f"{path} has {pixels.dtype} pixels", fix="save it with 8 or 16 bits")
    return np.asarray(pixels)


def _is_truncated(data: bytes) -> bool:
    """Whether a JPEG or PNG lacks its end mark: OpenCV would fill the rest with grey."""
    if data.startswith(_JPEG_START):
        return _JPEG_END not in data[-_TAIL_BYTES:]
    if data.startswith(_PNG_START):
        return _PNG_END not in data[-_TAIL_BYTES:]
    return False

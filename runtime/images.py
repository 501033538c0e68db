"""Files to pixels and back: the only image decoder of the project."""

from __future__ import annotations

import os
import re
import stat
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, TypeVar

import cv2
import numpy as np

from engineworks.runtime import budgets, files
from engineworks.runtime.errors import ImageError
from engineworks.runtime.headers import MAX_PAGES, check_size, jpeg_segments
from engineworks.runtime.tensors import Array

_WRITTEN = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
# what can be read: other names of JPEG, and AVIF where this OpenCV has its decoder
SUFFIXES = _WRITTEN | {".jfif", ".jpe"} | ({".avif"} if cv2.haveImageWriter(".avif") else set())

_JPEG_START, _PNG_START = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
# how the lines of libjpeg, libpng and libtiff begin
_REMARK = re.compile(
    rb"^(Corrupt JPEG|Premature end of JPEG|Invalid SOS|Inconsistent progression|Unrecognized compo"
    rb"|Unknown Adobe|Warning: unknown JFIF|libpng |TIFF)"
)
# What of it means that pixels were made up. Bytes too many before the end mark (d9) are a habit of
# some cameras; before any other mark data has gone missing.
_DAMAGE = re.compile(rb"remature end|bad \w+ code|instead of RST|before marker 0x(?!d9)")
_SCAN, _END = 0xDA, 0xD9  # markers of a JPEG
_ROWS = 256  # of a 16-bit picture that are brought to 8 bits at once

_stderr_lock = threading.Lock()
# a process must not be forked off while standard error is turned away
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_stderr_lock.acquire,
        after_in_parent=_stderr_lock.release,
        after_in_child=_stderr_lock.release,
    )

_Decoded = TypeVar("_Decoded")

# errors are raised, not printed by the library
if hasattr(cv2, "setLogLevel"):  # OpenCV 4
    cv2.setLogLevel(0)
else:
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


def read(path: str | Path) -> Array:
    """Decode a picture.

    EXIF orientation is applied, grey becomes three equal channels, alpha is dropped, 16-bit values
    are divided by 257 and rounded. Trailing bytes behind the picture are ignored.

    Args:
        path: a file with one of ``SUFFIXES``, but its content decides.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        ImageError: missing, truncated, corrupt, no picture, or larger than ``runtime.budgets``
            allows. A changed byte in a format without
            checksums (JPEG, BMP, TIFF, WebP) is noticed only where decoding trips over it.
    """
    return decode(content(Path(path)), str(path))


def decode(data: bytes, name: str) -> Array:
    """As ``read``, of a picture that is part of another file.

    Args:
        data: the content of a picture's file.
        name: what errors call it.
    """
    pixels = _decode(data, name, cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
    if pixels.dtype == np.uint16:
        wide, pixels = pixels, np.empty(pixels.shape, np.uint8)
        for row in range(0, len(wide), _ROWS):
            part = wide[row : row + _ROWS].astype(np.uint32)
            pixels[row : row + _ROWS] = (part + 128) // 257
    _check_8_bit(name, pixels)
    return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, dst=pixels))


def read_mask(path: Path) -> Array:
    """Decode a mask: (H, W) uint8, in the file's own values.

    A 16-bit value above 255 becomes 255, so what is marked stays marked; colours become their
    luminance.

    Raises:
        ImageError: as ``read``.
    """
    pixels = _decode(content(path), str(path), cv2.IMREAD_GRAYSCALE | cv2.IMREAD_ANYDEPTH)
    if pixels.dtype == np.uint16:
        pixels = np.minimum(pixels, 255).astype(np.uint8)
    _check_8_bit(str(path), pixels)
    return pixels


def decode_pages(data: bytes, name: str) -> list[Array]:
    """All pages of a picture's file as they are stored: no rotation, no conversion.

    Args:
        data, name: as in ``decode``.

    Returns:
        (H, W) or (H, W, C) each, of the file's dtype; colours are blue, green, red, alpha. Most
        formats have one page.

    Raises:
        ImageError: as ``read``, or more pages than ``headers.MAX_PAGES``.
    """
    _check_whole(data, name)
    check_size(data, name, all_pages=True)

    def pages(buffer: Array) -> list[Array] | None:
        # not all at once: an animation says only at its end how many there are
        done, found = cv2.imdecodemulti(buffer, cv2.IMREAD_UNCHANGED, range=(0, MAX_PAGES + 1))
        return list(found) if done and found else None

    found = _decode_with(pages, data, name)
    if len(found) > MAX_PAGES:
        raise ImageError(f"{name} has more than {MAX_PAGES} pages", fix="save one image per file")
    return found


def write(path: Path, image: Array) -> None:
    """Encode (H, W, 3) uint8 RGB or (H, W) uint8 by the path's suffix; nobody sees half a file.

    Folders on the way are made. JPEG is written with quality 95, PNG at OpenCV's fast default
    level.

    Raises:
        ImageError: a suffix of another format, or a size that the format cannot hold.
    """
    # not forced onto the disk: that takes longer than encoding, and it can be made again
    files.write(path, encode(image, path.suffix, str(path)), durable=False)


def encode(image: Array, suffix: str, name: str = "a picture") -> bytes:
    """As ``write``, without a file.

    Args:
        name: what errors call it.
    """
    if suffix.lower() not in _WRITTEN:
        raise ImageError(
            f"{name} has no suffix that pictures are written with",
            fix=f"use one of {', '.join(sorted(_WRITTEN))}",
        )
    pixels = cv2.cvtColor(image, cv2.COLOR_RGB2BGR) if image.ndim == 3 else image
    try:
        done, encoded = cv2.imencode(suffix, pixels)
    except cv2.error as error:
        raise ImageError(f"{name} cannot be encoded: {error.err}") from error
    if not done:
        raise ImageError(f"{name}: the format cannot hold {image.shape}", fix="write it as .png")
    return bytes(encoded.tobytes())


def check(path: Path) -> None:
    """Refuse what decoding would refuse at once: nothing is decoded.

    Raises:
        ImageError: missing, empty, truncated, or no picture.
    """
    data = content(path)
    _check_whole(data, str(path))
    check_size(data, str(path))


def content(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        ImageError: it cannot be read.
    """
    try:
        # a pipe would wait for a writer
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(descriptor, "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise ImageError(f"{path} is no plain file", fix="give files with pictures")
            budgets.FILE_BYTES.check(found.st_size, str(path), ImageError)
            return file.read()
    except OSError as error:
        raise ImageError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # a name with a zero byte
        raise ImageError(f"cannot read {str(path)!r}: {error}") from error


def _decode(data: bytes, name: str, flags: int) -> Array:
    _check_whole(data, name)
    check_size(data, name)
    return _decode_with(lambda buffer: cv2.imdecode(buffer, flags), data, name)


def _check_whole(data: bytes, name: str) -> None:
    if not data:
        raise ImageError(f"{name} is empty", fix="copy the file again")
    if _is_truncated(data):
        raise ImageError(f"{name} is truncated", fix="copy the file again")


def _without_strays(data: bytes) -> bytes:
    """A JPEG without the bytes between the segments of its header: they cost no pixel.

    The decoder remarks on them as it does on data that has gone missing.
    """
    if not data.startswith(_JPEG_START):
        return data
    kept, at, strays = [data[:2]], 2, 0
    for kind, start, end in jpeg_segments(data):
        kept.append(data[start:end])
        strays += start - at
        at = end
        if kind == _SCAN:
            break
    return b"".join([*kept, data[at:]]) if strays else data


def _decode_with(decoder: Callable[[Array], _Decoded | None], data: bytes, name: str) -> _Decoded:
    try:
        pixels, remarks = _decode_quietly(decoder, _without_strays(data))
    except cv2.error as error:
        raise ImageError(f"{name} cannot be decoded: {error.err}") from error
    except MemoryError as error:
        raise ImageError(f"{name} needs more memory than there is") from error
    if pixels is None or _DAMAGE.search(remarks):
        raise ImageError(f"{name} is corrupt or no picture", fix="copy the file again")
    return pixels


def _decode_quietly(
    decoder: Callable[[Array], _Decoded | None], data: bytes
) -> tuple[_Decoded | None, bytes]:
    """Decode, and catch what libjpeg and libpng print about it.

    Both print to the process' standard error, past Python, and libjpeg says only there that it
    made pixels up. So that stream is turned into a file for the moment of decoding. What other
    threads write to it meanwhile is passed on afterwards.
    """
    buffer = np.frombuffer(data, np.uint8)
    if sys.__stderr__ is None:  # the process was started without one
        return decoder(buffer), b""
    with _stderr_lock, _scratch() as printed:
        stderr = os.dup(2)
        os.dup2(printed.fileno(), 2)
        try:
            pixels = decoder(buffer)
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
        printed.seek(0)
        lines = printed.readlines()
    remarks = [line for line in lines if _REMARK.match(line)]
    if others := b"".join(line for line in lines if line not in remarks):
        os.write(2, others)
    return pixels, b"".join(remarks)


def _scratch() -> IO[bytes]:
    """A file for a moment; on Linux in memory, for containers that can write nowhere."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("stderr"), "w+b")
    return tempfile.TemporaryFile()


def _check_8_bit(name: str, pixels: Array) -> None:
    if pixels.dtype != np.uint8:
        raise ImageError(f"{name} has {pixels.dtype} pixels", fix="save it with 8 or 16 bits")


def _is_truncated(data: bytes) -> bool:
    """Whether a JPEG or PNG breaks off before its end mark: the rest would decode as grey."""
    if data.startswith(_JPEG_START):
        return _jpeg_breaks_off(data)
    if data.startswith(_PNG_START):
        return _png_breaks_off(data)
    return False


def _jpeg_breaks_off(data: bytes) -> bool:
    """Whether no end-of-image marker follows: an embedded thumbnail has one of its own."""
    segments = list(jpeg_segments(data))
    return not segments or segments[-1][0] != _END


def _png_breaks_off(data: bytes) -> bool:
    """Walk the chunks (length, name, content, checksum) to the one named IEND."""
    at = len(_PNG_START)
    while at + 12 <= len(data):
        if data[at + 4 : at + 8] == b"IEND":
            return False
        at += 12 + int.from_bytes(data[at : at + 4], "big")
    return True

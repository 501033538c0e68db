"""How large a picture says it is, read from its first bytes: nothing is decoded.

A decoder takes the memory that a header asks for. So all that OpenCV decodes is asked here first,
and what it would decode and this module does not know is no picture.

Source: the formats' own specifications: PNG (W3C), JPEG (ITU T.81, B.2.2), GIF89a, WebP (RFC 9649),
BMP (Microsoft), JPEG 2000 (ITU T.800, A.5.1), HEIF (ISO 23008-12, ``ispe``), Netpbm, Radiance, Sun.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from engineworks.runtime import budgets, tiff
from engineworks.runtime.errors import ImageError

MAX_PAGES = 8  # more than an image can be made of

Size = tuple[int, int]  # width, height

_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_SPOT = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # a marker: no stuffed zero, restart or fill byte
_STANDALONE = (0x01, 0xD8)
_SCAN, _END, _APP1 = 0xDA, 0xD9, 0xE1
_EXIF = b"Exif\0\0"
_HEAD_BYTES = 1 << 14  # in which most headers end
_PNG, _WEBP = b"\x89PNG\r\n\x1a\n", b"WEBP"


@dataclass(frozen=True)
class Header:
    """What the first bytes of a picture say.

    Attributes:
        height, width: in pixels, as stored.
        orientation: EXIF's, 1 to 8; 1: as stored.
    """

    height: int
    width: int
    orientation: int = 1

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the upright picture; orientations 5 to 8 exchange the two."""
        turned = self.orientation >= 5
        return (self.width, self.height) if turned else (self.height, self.width)


def read(path: Path) -> Header | None:
    """What a picture's file says of itself; mostly a few thousand bytes of it are read.

    Returns:
        None: it cannot be read, or is of no known format; decoding says what is wrong with it.
    """
    try:
        status = path.stat()
        return _read(path, status.st_mtime_ns, status.st_size)
    except OSError:
        return None


@lru_cache(1 << 16)  # a set is looked at more than once before it is learnt from
def _read(path: Path, _mtime_ns: int, _size: int) -> Header | None:
    with path.open("rb", buffering=0) as file:
        data = file.read(_HEAD_BYTES)
        found = None if _needs_all(data) else parse(data)
        return found or parse(data + file.read())


def parse(data: bytes) -> Header | None:
    """As ``read``, of a file's content."""
    try:
        if tiff.is_tiff(data):
            (page,) = tiff.pages(data, 1)
            height, width = tiff.number(page, tiff.HEIGHT), tiff.number(page, tiff.WIDTH)
            return Header(height, width, _valid(tiff.number(page, tiff.ORIENTATION, 1)))
        if data[4:8] == b"ftyp" and b"irot" in data[: 1 << 16]:
            return None  # turned, in a way that only the decoder knows
        if data.startswith(b"\xff\xd8\xff"):
            return _jpeg_header(data)
        ((width, height),) = _sizes(data, 1)
        return Header(height, width, _orientation(_exif_blocks(data)))
    except (struct.error, IndexError, OverflowError, ValueError):
        return None


def check_size(data: bytes, name: str, *, all_pages: bool = False) -> None:
    """Refuse a picture that would take too much memory, or is none.

    Args:
        data: the content of a picture's file.
        name: what errors call it.
        all_pages: whether more than the first page will be decoded.

    Raises:
        ImageError: no known format, a broken header, no pixels, more pages than ``MAX_PAGES``, or
            more pixels than ``budgets.PIXELS`` allows.
    """
    try:
        sizes = _sizes(data, MAX_PAGES + 1 if all_pages else 1)
        _check_chunks(data)
    except (struct.error, IndexError, OverflowError, ValueError) as error:
        raise ImageError(
            f"{name} is corrupt: its header breaks off", fix="copy it again"
        ) from error
    if not sizes:
        raise ImageError(f"{name} is corrupt or no picture", fix="copy the file again")
    if len(sizes) > MAX_PAGES:
        raise ImageError(f"{name} has more than {MAX_PAGES} pages", fix="save one image per file")
    if any(width < 1 or height < 1 for width, height in sizes):
        raise ImageError(f"{name} says that it has no pixels", fix="copy the file again")
    budgets.PIXELS.check(sum(width * height for width, height in sizes), name, ImageError)


def _sizes(data: bytes, max_pages: int) -> list[Size]:
    if tiff.is_tiff(data):
        return [_of_tiff(page) for page in tiff.pages(data, max_pages)]
    return next((read(data) for begins, read in _FORMATS if begins.match(data)), [])


def _of_tiff(page: tiff.Entries) -> Size:
    width, height = tiff.number(page, tiff.WIDTH), tiff.number(page, tiff.HEIGHT)
    # tiles are decoded whole, and more than four channels are decoded as well
    across, down = tiff.number(page, tiff.TILE_WIDTH), tiff.number(page, tiff.TILE_HEIGHT)
    times = max(1, -(-tiff.number(page, tiff.NUM_SAMPLES, 1) // 4))
    if across * down > width * height:
        width, height = across, down
    return width * times, height


def _needs_all(data: bytes) -> bool:
    """Whether something that is needed may stand at the end of the file."""
    return tiff.is_tiff(data) or data[8:12] == _WEBP


def _jpeg_header(data: bytes) -> Header | None:
    """Size and orientation, without a look at what follows them."""
    at, exif = 2, list[bytes]()
    while spot := _SPOT.search(data, at):
        kind, at = data[spot.start() + 1], spot.end()
        if kind in _JPEG_FRAMES:
            height, width = struct.unpack_from(">HH", data, at + 3)
            return Header(height, width, _orientation(exif))
        if kind in (_SCAN, _END):
            return None
        if kind not in _STANDALONE:
            start, at = at, at + int.from_bytes(data[at : at + 2], "big")
            if kind == _APP1:
                exif.append(data[start + 2 : at])
    return None


def _orientation(exif_blocks: Iterable[bytes]) -> int:
    """How the camera was held; 1 where nothing sensible is said."""
    for block in exif_blocks:
        content = block.removeprefix(_EXIF)
        if tiff.is_tiff(content):
            try:
                return _valid(tiff.number(tiff.pages(content, 1)[0], tiff.ORIENTATION, 1))
            except (struct.error, IndexError, OverflowError, ValueError):
                return 1
    return 1


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Of a PNG, up to its end: name, and where the content begins and ends."""
    at, name = len(_PNG), b""
    while at + 8 <= len(data) and name != b"IEND":
        length, name = struct.unpack_from(">I4s", data, at)
        yield name, at + 8, at + 8 + length
        at += 12 + length


def _check_chunks(data: bytes) -> None:
    """Of a whole PNG: the decoder takes memory for what a chunk says that it holds.

    Raises:
        ValueError: more than the file has.
    """
    if data.startswith(_PNG) and any(end > len(data) for _, _, end in _chunks(data)):
        raise ValueError("a chunk is longer than the file")


def _exif_blocks(data: bytes) -> Iterator[bytes]:
    """Those of a PNG or WebP."""
    if data.startswith(_PNG):
        yield from (data[begin:end] for name, begin, end in _chunks(data) if name == b"eXIf")
    elif data[8:12] == _WEBP:
        at = 12
        while at + 8 <= len(data):
            name, length = struct.unpack_from("<4sI", data, at)
            if name == b"EXIF":
                yield data[at + 8 : at + 8 + length]
            at += 8 + length + length % 2


def _valid(orientation: int) -> int:
    return orientation if 1 <= orientation <= 8 else 1


def jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(kind, start, end) of the segments of a JPEG, end mark included; a scan ends with its header.

    Bytes between two segments are part of neither. One by one: who stops at the scan need not look
    through all that it codes.
    """
    at = 2
    while spot := _SPOT.search(data, at):
        kind, at = data[spot.start() + 1], spot.end()
        if kind not in _STANDALONE and kind != _END:
            at += int.from_bytes(data[at : at + 2], "big")
        yield kind, spot.start(), at
        if kind == _END:
            break


def _of_jpeg(data: bytes) -> list[Size]:
    for kind, start, _ in jpeg_segments(data):
        if kind in _JPEG_FRAMES:
            height, width = struct.unpack_from(">HH", data, start + 5)
            return [(width, height)]
    return []


def _of_bmp(data: bytes) -> list[Size]:
    (head,) = struct.unpack_from("<I", data, 14)
    width, height = struct.unpack_from("<HH" if head == 12 else "<ii", data, 18)
    return [(width, abs(height))]


def _of_webp(data: bytes) -> list[Size]:
    kind = data[12:16]
    if kind == b"VP8X":
        low = [int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27)]
    elif kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        low = [(bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1]
    else:
        low = [side & 0x3FFF for side in struct.unpack_from("<HH", data, 26)]
    return [(low[0], low[1])]


def _of_jpeg_2000(data: bytes) -> list[Size]:
    at = data.index(b"\xff\x4f\xff\x51") + 8
    right, bottom, left, top = struct.unpack_from(">IIII", data, at)
    (channels,) = struct.unpack_from(">H", data, at + 32)
    return [((right - left) * max(1, -(-channels // 4)), bottom - top)]


def _of_avif(data: bytes) -> list[Size]:
    places = [found.end() + 4 for found in re.finditer(rb"ispe", data[: 1 << 16])]
    found = [struct.unpack_from(">II", data, at) for at in places]
    return [max(((w, h) for w, h in found), key=lambda size: size[0] * size[1])]


def _of_netpbm(data: bytes) -> list[Size]:
    if data[:2] == b"P7":
        sides = [
            re.search(rb"\n%s\s+(\d{1,9})\s" % key, data[:4096]) for key in (b"WIDTH", b"HEIGHT")
        ]
        return [(int(sides[0][1]), int(sides[1][1]))] if sides[0] and sides[1] else []
    text = re.sub(rb"#[^\n]*\n", b" ", data[2:4096])
    found = re.match(rb"\s*(\d{1,9})\s+(\d{1,9})\s", text)
    return [(int(found[1]), int(found[2]))] if found else []


def _of_radiance(data: bytes) -> list[Size]:
    found = re.search(rb"\n-Y (\d{1,9}) \+X (\d{1,9})\n", data[:65536])
    return [(int(found[2]), int(found[1]))] if found else []


def _pair(form: str, at: int) -> Callable[[bytes], list[Size]]:
    def read(data: bytes) -> list[Size]:
        width, height = struct.unpack_from(form, data, at)
        return [(width, height)]

    return read


_FORMATS: tuple[tuple[re.Pattern[bytes], Callable[[bytes], list[Size]]], ...] = tuple(
    (re.compile(begins, re.DOTALL), read)
    for begins, read in (
        (rb"\x89PNG\r\n\x1a\n....IHDR", _pair(">II", 16)),
        (rb"\xff\xd8\xff", _of_jpeg),
        (rb"BM", _of_bmp),
        (rb"RIFF....WEBPVP8", _of_webp),
        (rb"GIF8[79]a", _pair("<HH", 6)),
        (rb"\x00\x00\x00\x0cjP  |\xff\x4f\xff\x51", _of_jpeg_2000),
        (rb"....ftyp", _of_avif),
        (rb"P[1-7Ff]", _of_netpbm),
        (rb"#\?R", _of_radiance),
        (rb"\x59\xa6\x6a\x95", _pair(">II", 4)),
    )
)

"""The directories of a TIFF: how large its pages are, and planes that are stored one by one.

Source: TIFF, revision 6.0, sections 2 and 8 ("PlanarConfiguration"); for BigTIFF the
"BigTIFF File Format Proposal" of AWare Systems.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from engineworks.runtime.errors import ImageError
from engineworks.runtime.tensors import Array

WIDTH, HEIGHT, NUM_SAMPLES, ORIENTATION = 256, 257, 277, 274
TILE_WIDTH, TILE_HEIGHT = 322, 323

# what is one number per plane, what is cut into pieces, and what else a page needs
_BITS, _FORMAT = 258, 339
_STRIPS, _STRIP_BYTES, _TILES, _TILE_BYTES = 273, 279, 324, 325
_PHOTOMETRIC, _ARRANGEMENT = 262, 284
_COMPRESSION, _STRIP_ROWS, _PREDICTOR = 259, 278, 317
_PER_PLANE = {_BITS, _FORMAT}
_PER_PIECE = {_STRIPS, _STRIP_BYTES, _TILES, _TILE_BYTES}
_ONCE = {WIDTH, HEIGHT, _COMPRESSION, _STRIP_ROWS, _PREDICTOR, TILE_WIDTH, TILE_HEIGHT}
_KNOWN = _PER_PLANE | _PER_PIECE | _ONCE | {_PHOTOMETRIC, NUM_SAMPLES, _ARRANGEMENT, ORIENTATION}
_ONE_BY_ONE = 2  # value of the arrangement
_SEPARATED = range(2, 5)  # so many planes one by one are an image; more is something else

Entries = Mapping[int, Array]  # tag -> (N,) whole numbers, N >= 1


@dataclass(frozen=True)
class _Layout:
    """How numbers lie in a file: byte order, and the types of counts and places."""

    order: str
    count: str
    place: str

    @property
    def first(self) -> int:
        """Where the place of the first directory stands."""
        return 4 if self.place == "I" else 8


_LAYOUTS = {
    b"II*\0": _Layout("<", "H", "I"),
    b"MM\0*": _Layout(">", "H", "I"),
    b"II+\0": _Layout("<", "Q", "Q"),
    b"MM\0+": _Layout(">", "Q", "Q"),
}
_TYPES = {1: "u1", 3: "u2", 4: "u4", 16: "u8"}


def is_tiff(data: bytes) -> bool:
    """Whether a file begins as one."""
    return data[:4] in _LAYOUTS


def pages(data: bytes, limit: int) -> list[Entries]:
    """The whole numbers of each page's directory, of no more than ``limit`` pages.

    Raises:
        struct.error, IndexError: the file is broken, or its pages go in a circle.
    """
    layout = _LAYOUTS[data[:4]]
    (at,) = struct.unpack_from(layout.order + layout.place, data, layout.first)
    found: list[Entries] = []
    while at and len(found) < limit:
        entries, at = _directory(data, layout, at)
        found.append(entries)
    return found


def _directory(data: bytes, layout: _Layout, at: int) -> tuple[Entries, int]:
    """One directory, and the place of the next one."""
    (num,) = struct.unpack_from(layout.order + layout.count, data, at)
    head = struct.Struct(f"{layout.order}HH{layout.place}")
    inline = struct.calcsize(layout.place)
    size = head.size + inline
    start = at + struct.calcsize(layout.count)
    found = {}
    for entry in range(start, start + num * size, size):
        tag, kind, count = head.unpack_from(data, entry)
        if tag not in _KNOWN or kind not in _TYPES or not count:
            continue
        dtype = np.dtype(layout.order + _TYPES[kind])
        place = entry + head.size
        if count * dtype.itemsize > inline:
            (place,) = struct.unpack_from(layout.order + layout.place, data, place)
        if place + count * dtype.itemsize > len(data):
            raise struct.error(f"tag {tag} lies outside of the file")
        found[tag] = np.frombuffer(data, dtype, count, place)
    (after,) = struct.unpack_from(layout.order + layout.place, data, start + num * size)
    return found, after


def number(entries: Entries, tag: int, default: int = 0) -> int:
    """The first value of a tag."""
    return int(entries[tag][0]) if tag in entries else default


def split_planes(data: bytes, name: str) -> list[bytes]:
    """A TIFF whose planes are stored one behind the other, as one file per plane; others as is.

    OpenCV misreads such files unless they have 8 bits. So a directory that names the strips of one
    plane alone is appended for each; the pixels stay what and where they are.

    Args:
        name: what errors call the file.

    Raises:
        ImageError: broken, of too many planes, or a BigTIFF of such planes.
    """
    if not is_tiff(data):
        return [data]
    try:
        entries = pages(data, 1)[0]
    except (struct.error, IndexError, OverflowError):
        return [data]  # broken: the decoder says so
    num = number(entries, NUM_SAMPLES, 1)
    if number(entries, _ARRANGEMENT, 1) != _ONE_BY_ONE or num == 1:
        return [data]
    layout = _LAYOUTS[data[:4]]
    pieces = {tag: len(entries[tag]) for tag in _PER_PIECE & set(entries)}
    whole = any({a, b} <= set(pieces) for a, b in ((_STRIPS, _STRIP_BYTES), (_TILES, _TILE_BYTES)))
    if num not in _SEPARATED or layout.place != "I" or not whole:
        raise ImageError(
            f"{name} holds {num} planes one by one, which cannot be read",
            fix="save target and references as three pages, or as NPY",
        )
    if any(count % num for count in pieces.values()):
        raise ImageError(f"{name} is corrupt: pieces of planes are missing", fix="save it again")
    return [_plane(data, layout.order, entries, plane, num) for plane in range(num)]


def _plane(data: bytes, order: str, entries: Entries, plane: int, num: int) -> bytes:
    """The file with a directory of one plane."""
    kept = {tag: values for tag, values in entries.items() if tag in _ONCE}
    kept |= {tag: entries[tag][:1] for tag in _PER_PLANE & set(entries)}
    for tag in _PER_PIECE & set(entries):
        count = len(entries[tag]) // num
        kept[tag] = entries[tag][plane * count : (plane + 1) * count]
    one = np.ones(1, np.uint16)
    kept |= {NUM_SAMPLES: one, _ARRANGEMENT: one, _PHOTOMETRIC: one}
    start = len(data) + len(data) % 2
    outside = start + 2 + 12 * len(kept) + 4
    directory, values = struct.pack(order + "H", len(kept)), b""
    for tag in sorted(kept):
        kind = 4 if kept[tag].max() >= 2**16 else 3
        packed = kept[tag].astype(order + _TYPES[kind]).tobytes()
        directory += struct.pack(order + "HHI", tag, kind, len(kept[tag]))
        if len(packed) <= 4:
            directory += packed.ljust(4, b"\0")
        else:
            directory += struct.pack(order + "I", outside + len(values))
            values += packed.ljust(len(packed) + len(packed) % 2, b"\0")
    header = data[:4] + struct.pack(order + "I", start)
    return header + data[8:].ljust(start - 8, b"\0") + directory + b"\0\0\0\0" + values

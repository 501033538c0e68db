"""What reads headers, led by atheris to bytes that reach new lines of it.

``python -m tests.campaign.explore READER CORPUS [options of libFuzzer]`` ends with 0 where an
answer or an error raised on purpose came of all bytes, within the memory and time that the options
allow.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import atheris
import cv2
import numpy as np

with atheris.instrument_imports(include=["engineworks.runtime"]):
    from engineworks.runtime import headers, npy, tiff
    from engineworks.runtime.errors import EngineworksError

_PICTURES = (
    *(".png", ".jpg", ".bmp", ".tif", ".webp", ".gif"),
    *(".jp2", ".avif", ".ppm", ".hdr", ".ras"),
)


def pictures(data: bytes) -> None:
    headers.parse(data)
    headers.check_size(data, "x", all_pages=True)


def planes(data: bytes) -> None:
    if tiff.is_tiff(data):
        tiff.split_planes(data, "x")


def arrays(data: bytes) -> None:
    with suppress(EngineworksError):
        npy.decode(data, "x")
    npy.decode_archive(data, "x")


READERS: dict[str, Callable[[bytes], None]] = {
    each.__name__: each for each in (pictures, planes, arrays)
}


def write_corpus(folder: Path) -> None:
    """Whole files of each kind to begin with."""
    noise = np.random.default_rng(0).integers(0, 255, (8, 9, 3), np.uint8)
    for suffix in _PICTURES:
        written, data = cv2.imencode(suffix, noise)
        if written:  # else a format that this build of OpenCV does not write
            (folder / f"x{suffix}").write_bytes(data.tobytes())
    np.save(folder / "x.npy", noise)
    np.savez_compressed(folder / "x.npz", a=noise, b=noise[0])


def main() -> None:
    reader, corpus, *options = READERS[sys.argv[1]], Path(sys.argv[2]), *sys.argv[3:]
    write_corpus(corpus)

    def one(data: bytes) -> None:
        with suppress(EngineworksError):
            reader(data)

    atheris.Setup([sys.argv[0], str(corpus), *options], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()

"""What a picture asks for is known before it is decoded."""

from __future__ import annotations

import contextlib
import struct
import tracemalloc
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engineworks.runtime import headers, images, planes
from engineworks.runtime.errors import ImageError, UsageError
from engineworks.runtime.headers import Header

FORMATS = (".png", ".jpg", ".bmp", ".tif", ".webp", ".gif", ".jp2", ".avif", ".pgm", ".ppm", ".ras")


def encoded(suffix: str, height: int, width: int) -> bytes:
    grey = suffix == ".pgm"
    picture = np.full((height, width) if grey else (height, width, 3), 90, np.uint8)
    done, data = cv2.imencode(suffix, picture)
    assert done
    return data.tobytes()


def png(width: int, height: int) -> bytes:
    """One whose header asks for more than there is."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


class TestAHeader:
    @pytest.mark.parametrize("suffix", FORMATS)
    @settings(max_examples=8, deadline=None)
    @given(height=st.integers(33, 70), width=st.integers(33, 70))
    def test_says_what_the_decoder_makes_of_it(self, suffix: str, height: int, width: int) -> None:
        data = encoded(suffix, height, width)
        assert headers._sizes(data, 8) == [(width, height)]
        assert images.decode(data, "x").shape == (height, width, 3)

    def test_of_something_else_is_no_picture(self) -> None:
        with pytest.raises(ImageError, match="no picture"):
            images.decode(b"\x00asm" + bytes(100), "x")

    @settings(max_examples=200, deadline=None)
    @given(st.sampled_from(FORMATS), st.data())
    def test_that_is_broken_is_an_image_error_or_a_picture(
        self, suffix: str, data: st.DataObject
    ) -> None:
        content = bytearray(encoded(suffix, 40, 44))
        for _ in range(data.draw(st.integers(1, 3))):
            at = data.draw(st.integers(0, min(len(content), 120) - 1))
            content[at] = data.draw(st.integers(0, 255))
        with contextlib.suppress(ImageError):
            assert images.decode(bytes(content), "x").dtype == np.uint8


class TestABudget:
    def test_of_pixels_is_checked_before_memory_is_taken(self) -> None:
        data = png(30_000, 30_000)
        tracemalloc.start()
        try:
            with pytest.raises(ImageError, match="900,000,000 pixels") as caught:
                images.decode(data, "bomb.png")
            assert tracemalloc.get_traced_memory()[1] < 1_000_000
        finally:
            tracemalloc.stop()
        assert "ENGINEWORKS_MAX_PIXELS" in str(caught.value.fix)

    @pytest.mark.parametrize("chunk", [b"IHDR", b"IDAT", b"IEND"])
    def test_of_a_png_is_that_of_its_chunks_too(self, chunk: bytes) -> None:
        data = bytearray(encoded(".png", 8, 8))
        at = data.index(chunk)
        data[at - 4 : at] = struct.pack(">I", 2**31 - 1)  # the decoder would make room for it

        with pytest.raises(ImageError, match=r"header breaks off|is truncated"):
            images.decode(bytes(data), "x")

    def test_of_a_png_ends_with_it(self) -> None:
        data = encoded(".png", 8, 8)
        assert images.decode(data + b"\xff" * 20, "x").shape == (8, 8, 3)

    def test_can_be_moved(self, monkeypatch: pytest.MonkeyPatch) -> None:
        data = encoded(".png", 20, 30)
        monkeypatch.setenv("ENGINEWORKS_MAX_PIXELS", "599")
        with pytest.raises(ImageError, match="600 pixels"):
            images.decode(data, "x")
        monkeypatch.setenv("ENGINEWORKS_MAX_PIXELS", "600")
        assert images.decode(data, "x").shape == (20, 30, 3)

    @pytest.mark.parametrize("text", ["0", "-1", "many", "1e9"])
    def test_that_is_no_number_is_a_usage_error(
        self, monkeypatch: pytest.MonkeyPatch, text: str
    ) -> None:
        monkeypatch.setenv("ENGINEWORKS_MAX_PIXELS", text)
        with pytest.raises(UsageError, match="ENGINEWORKS_MAX_PIXELS"):
            images.decode(encoded(".png", 20, 30), "x")

    def test_of_a_file_is_that_of_its_size(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "a.png").write_bytes(encoded(".png", 20, 30))
        monkeypatch.setenv("ENGINEWORKS_MAX_FILE_BYTES", "50")
        with pytest.raises(ImageError, match=r"asks for .* bytes"):
            images.read(tmp_path / "a.png")

    def test_of_pages_counts_all_of_them(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        planes.write(tmp_path / "a.tif", np.zeros((20, 30, 3), np.float32))
        assert planes.read(tmp_path / "a.tif").shape == (20, 30, 3)
        monkeypatch.setenv("ENGINEWORKS_MAX_PIXELS", "1799")
        with pytest.raises(ImageError, match="1,800 pixels"):
            planes.read(tmp_path / "a.tif")


class TestAFile:
    def test_is_read_where_nothing_can_be_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "a.png").write_bytes(encoded(".png", 20, 30))
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
        assert images.read(tmp_path / "a.png").shape == (20, 30, 3)

    @pytest.mark.parametrize("name", ["/dev/zero", "a\0b.png"])
    def test_that_is_none_is_an_image_error(self, name: str) -> None:
        with pytest.raises(ImageError):
            images.read(Path(name))

    def test_that_is_a_pipe_is_not_waited_for(self, tmp_path: Path) -> None:
        import os

        os.mkfifo(tmp_path / "a.png")
        with pytest.raises(ImageError, match="no plain file"):
            images.read(tmp_path / "a.png")

    def test_may_have_stray_bytes_between_the_segments_of_its_header(self) -> None:
        plain = encoded(".jpg", 40, 60)
        at = plain.index(b"\xff\xdb")
        stray = images.decode(plain[:at] + b"\0\0" + plain[at:], "x")
        assert np.array_equal(stray, images.decode(plain, "x"))


def turned(jpeg: bytes, orientation: int, order: str = ">") -> bytes:
    """A JPEG whose EXIF block says how the camera was held, and nothing else."""
    mark = b"MM\0*" if order == ">" else b"II*\0"
    entry = struct.pack(order + "HHHIHH", 1, 0x112, 3, 1, orientation, 0)
    exif = mark + struct.pack(order + "I", 8) + entry + struct.pack(order + "I", 0)
    block = b"Exif\0\0" + exif
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + jpeg[2:]


class TestAPicture:
    @pytest.mark.parametrize("suffix", sorted(images.SUFFIXES - {".jfif"}))
    @settings(max_examples=6, deadline=None)
    @given(height=st.integers(33, 70), width=st.integers(33, 70))
    def test_has_the_size_that_it_is_decoded_to(self, suffix: str, height: int, width: int) -> None:
        assert headers.parse(encoded(suffix, height, width)) == Header(height, width)

    @pytest.mark.parametrize("order", ["<", ">"])
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_that_was_turned_has_the_size_that_it_is_shown_in(
        self, orientation: int, order: str
    ) -> None:
        data = turned(encoded(".jpg", 20, 30), orientation, order)
        header = headers.parse(data)
        assert header is not None and header.orientation == orientation
        assert header.size == images.decode(data, "photo").shape[:2]

    def test_with_a_long_header_is_read_on(self, tmp_path: Path) -> None:
        data = encoded(".jpg", 20, 30)
        comment = b"\xff\xfe" + struct.pack(">H", 60_000) + bytes(59_998)
        (tmp_path / "a.jpg").write_bytes(data[:2] + comment + data[2:])
        assert headers.read(tmp_path / "a.jpg") == Header(20, 30)

    @pytest.mark.parametrize("suffix", sorted(images.SUFFIXES - {".jfif"}))
    def test_that_is_cut_off_has_no_size_or_the_right_one(self, suffix: str) -> None:
        data = encoded(suffix, 20, 30)
        for stop in range(min(len(data), 200)):
            assert headers.parse(data[:stop]) in (None, Header(20, 30))

    @given(st.binary(max_size=80), st.sampled_from([b"", b"\xff\xd8\xff", b"BM", b"II*\0"]))
    def test_of_any_bytes_has_some_header_or_none(self, data: bytes, start: bytes) -> None:
        headers.parse(start + data)

    def test_that_cannot_be_opened_has_none(self, tmp_path: Path) -> None:
        (tmp_path / "a.png").write_bytes(encoded(".png", 5, 6))
        assert headers.read(tmp_path / "a.png") == Header(5, 6)
        assert headers.read(tmp_path / "missing.png") is None
        assert headers.read(tmp_path) is None

from __future__ import annotations

import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engineworks.runtime import images
from engineworks.runtime.errors import ImageError
from engineworks.runtime.tensors import Array

LOSSLESS = (".png", ".bmp", ".tif", ".tiff")


def scene(height: int = 60, width: int = 80) -> Array:
    """Smooth colour ramps with a red square at the top left."""
    y, x = np.mgrid[:height, :width]
    image = np.stack([200 * x / width, 200 * y / height, 60 + 0 * x], axis=-1).astype(np.uint8)
    image[: height // 4, : width // 4] = (255, 0, 0)
    return image


def jpeg(image: Array) -> bytes:
    return bytes(cv2.imencode(".jpg", image[..., ::-1])[1].tobytes())


def png(image: Array) -> bytes:
    return bytes(cv2.imencode(".png", image)[1].tobytes())


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def with_orientation(data: bytes, orientation: int) -> bytes:
    """A JPEG with an EXIF segment of one entry: tag 0x0112, SHORT, one value."""
    entry = struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0)
    tiff = b"II*\x00" + struct.pack("<I", 8) + struct.pack("<H", 1) + entry + bytes(4)
    return data[:2] + segment(0xE1, b"Exif\x00\x00" + tiff) + data[2:]


class TestRead:
    @settings(max_examples=25)
    @given(st.integers(1, 40), st.integers(1, 40), st.sampled_from(LOSSLESS), st.integers(0, 99))
    def test_gives_back_every_pixel_that_a_lossless_format_was_given(
        self,
        tmp_path_factory: pytest.TempPathFactory,
        height: int,
        width: int,
        suffix: str,
        seed: int,
    ) -> None:
        image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        path = tmp_path_factory.mktemp("round") / f"a{suffix}"

        images.write(path, image)

        assert np.array_equal(images.read(path), image)

    @pytest.mark.parametrize("suffix", [".jpg", ".webp"])
    def test_gives_red_as_red_from_a_lossy_format(self, tmp_path: Path, suffix: str) -> None:
        images.write(tmp_path / f"a{suffix}", scene())

        back = images.read(tmp_path / f"a{suffix}")

        assert back.shape == (60, 80, 3)
        # 20: chroma is stored at half resolution and quantised; blue would differ by 255
        assert np.abs(back[5, 5].astype(int) - (255, 0, 0)).max() < 20

    @pytest.mark.parametrize(
        ("orientation", "turned"),
        [
            (1, lambda a: a),
            (2, lambda a: a[:, ::-1]),
            (3, lambda a: a[::-1, ::-1]),
            (4, lambda a: a[::-1]),
            (5, lambda a: a.transpose(1, 0, 2)),
            (6, lambda a: np.rot90(a, -1)),
            (7, lambda a: a[::-1, ::-1].transpose(1, 0, 2)),
            (8, lambda a: np.rot90(a, 1)),
        ],
    )
    def test_turns_the_picture_as_exif_says(self, tmp_path: Path, orientation: int, turned) -> None:
        plain, tagged = tmp_path / "plain.jpg", tmp_path / "tagged.jpg"
        plain.write_bytes(jpeg(scene()))
        tagged.write_bytes(with_orientation(jpeg(scene()), orientation))
        expected = turned(images.read(plain))

        assert np.array_equal(images.read(tagged), expected)
        mask = images.read_mask(tagged)
        assert mask.shape == expected.shape[:2]

    def test_makes_three_equal_channels_of_grey(self, tmp_path: Path) -> None:
        grey = scene()[..., 0]
        (tmp_path / "a.png").write_bytes(png(grey))

        assert np.array_equal(images.read(tmp_path / "a.png"), np.stack([grey] * 3, axis=-1))

    def test_drops_alpha_without_mixing_it_in(self, tmp_path: Path) -> None:
        alpha = np.zeros((60, 80, 1), np.uint8)
        (tmp_path / "a.png").write_bytes(png(np.concatenate([scene()[..., ::-1], alpha], axis=-1)))

        assert np.array_equal(images.read(tmp_path / "a.png"), scene())

    @pytest.mark.parametrize("channels", [1, 3])
    @pytest.mark.parametrize("suffix", [".png", ".tif"])
    def test_scales_sixteen_bits_by_257(self, tmp_path: Path, channels: int, suffix: str) -> None:
        deep = np.arange(65536, dtype=np.uint16).reshape(256, 256)
        stored = deep if channels == 1 else np.stack([deep] * 3, axis=-1)
        (tmp_path / f"a{suffix}").write_bytes(cv2.imencode(suffix, stored)[1].tobytes())
        expected = np.floor(deep.astype(np.float64) / 257 + 0.5).astype(np.uint8)

        assert np.array_equal(images.read(tmp_path / f"a{suffix}")[..., 1], expected)

    def test_refuses_floating_point_pixels(self, tmp_path: Path) -> None:
        floats = np.ones((4, 4, 3), np.float32)
        (tmp_path / "a.tif").write_bytes(cv2.imencode(".tif", floats)[1].tobytes())

        with pytest.raises(ImageError, match="float32") as caught:
            images.read(tmp_path / "a.tif")
        assert caught.value.fix is not None

    def test_ignores_bytes_behind_the_picture(self, tmp_path: Path) -> None:
        for suffix in (".jpg", ".png"):
            whole, longer = tmp_path / f"whole{suffix}", tmp_path / f"longer{suffix}"
            images.write(whole, scene())
            longer.write_bytes(whole.read_bytes() + b"notes of a camera \xff\xd8" * 5000)

            assert np.array_equal(images.read(longer), images.read(whole))

    def test_goes_by_content_and_not_by_suffix(self, tmp_path: Path) -> None:
        (tmp_path / "a.jpg").write_bytes(png(scene()[..., ::-1]))

        assert np.array_equal(images.read(tmp_path / "a.jpg"), scene())

    def test_opens_a_file_whose_name_is_not_ascii(self, tmp_path: Path) -> None:
        images.write(tmp_path / "größe 長.png", scene())

        assert np.array_equal(images.read(tmp_path / "größe 長.png"), scene())


class TestAPictureThatIsNotWhole:
    @settings(max_examples=60)
    @given(
        st.sampled_from([".jpg", ".png", ".bmp", ".tif", ".webp"]),
        st.floats(0, 1, exclude_max=True),
    )
    def test_is_refused_by_name_wherever_it_breaks_off(
        self, tmp_path_factory: pytest.TempPathFactory, suffix: str, share: float
    ) -> None:
        path = tmp_path_factory.mktemp("cut") / f"cut{suffix}"
        images.write(path, scene())
        data = path.read_bytes()
        path.write_bytes(data[: int(share * len(data))])

        for reader in (images.read, images.read_mask):
            with pytest.raises(ImageError, match=f"cut{suffix}"):
                reader(path)

    def test_is_refused_although_its_thumbnail_is_whole(self, tmp_path: Path) -> None:
        thumbnail, data = jpeg(scene(16, 16)), jpeg(scene())
        nested = data[:2] + segment(0xE1, b"Exif\x00\x00" + thumbnail) + data[2:]
        path = tmp_path / "a.jpg"
        path.write_bytes(nested)
        assert images.read(path).shape == (60, 80, 3)

        path.write_bytes(nested[:-30])

        with pytest.raises(ImageError, match="truncated"):
            images.read(path)

    def test_is_refused_although_an_end_mark_was_put_behind_the_hole(self, tmp_path: Path) -> None:
        data = jpeg(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))
        (tmp_path / "a.jpg").write_bytes(data[: len(data) // 2] + b"\xff\xd9")

        with pytest.raises(ImageError, match="corrupt"):
            images.read(tmp_path / "a.jpg")

    @pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
    def test_is_refused_for_a_lost_block_between_two_restart_marks(
        self, tmp_path: Path, share: float
    ) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8)
        options = [cv2.IMWRITE_JPEG_RST_INTERVAL, 4]
        data = bytearray(cv2.imencode(".jpg", noise, options)[1].tobytes())
        (tmp_path / "whole.jpg").write_bytes(data)
        assert images.read(tmp_path / "whole.jpg").shape == noise.shape
        at = round(share * len(data))
        data[at : at + 512] = bytes(512)  # a sector of a disk
        (tmp_path / "a.jpg").write_bytes(data)

        with pytest.raises(ImageError, match="corrupt"):
            images.read(tmp_path / "a.jpg")

    def test_is_not_what_a_camera_leaves_before_the_end_mark(self, tmp_path: Path) -> None:
        data = jpeg(scene())
        (tmp_path / "a.jpg").write_bytes(data)
        (tmp_path / "padded.jpg").write_bytes(data[:-2] + bytes(6) + data[-2:])

        padded = images.read(tmp_path / "padded.jpg")

        assert np.array_equal(padded, images.read(tmp_path / "a.jpg"))

    @settings(max_examples=40)
    @given(st.integers(0, 10**6), st.integers(0, 7))
    def test_is_refused_for_one_changed_bit_in_a_png(
        self, tmp_path_factory: pytest.TempPathFactory, at: int, bit: int
    ) -> None:
        data = bytearray(png(scene()))
        content = data.index(b"IDAT") + 4
        data[content + at % (len(data) - 16 - content)] ^= 1 << bit
        path = tmp_path_factory.mktemp("flip") / "a.png"
        path.write_bytes(data)

        with pytest.raises(ImageError, match=r"a\.png"):
            images.read(path)

    @settings(max_examples=60)
    @given(
        st.binary(max_size=300),
        st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM"]),
    )
    def test_is_refused_and_never_a_crash_whatever_the_bytes(
        self, tmp_path_factory: pytest.TempPathFactory, data: bytes, start: bytes
    ) -> None:
        path = tmp_path_factory.mktemp("any") / "a.png"
        path.write_bytes(start + data)

        with pytest.raises(ImageError, match=r"a\.png"):
            images.read(path)

    def test_is_refused_when_missing_a_folder_or_empty(self, tmp_path: Path) -> None:
        (tmp_path / "folder.png").mkdir()
        (tmp_path / "empty.png").touch()

        for name in ("missing.png", "folder.png", "empty.png"):
            with pytest.raises(ImageError, match=name):
                images.read(tmp_path / name)


class TestStandardError:
    """libjpeg and libpng print past Python."""

    def test_stays_silent_about_bad_pictures(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        data = jpeg(scene())
        hurt_png = bytearray(png(scene()))
        hurt_png[hurt_png.index(b"IDAT") + 30] ^= 1
        bad = {
            "cut.jpg": data[:-40] + b"\xff\xd9",
            "extra.jpg": data[:-2] + bytes(40) + b"\xff\xd9",
            "flip.png": bytes(hurt_png),
            "none.tif": b"II*\x00" + bytes(20),
        }
        for name, content in bad.items():
            (tmp_path / name).write_bytes(content)
            try:
                images.read(tmp_path / name)
            except ImageError:
                continue

        assert capfd.readouterr().err == ""

    def test_stays_silent_about_an_odd_colour_profile(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        data = png(scene()[..., ::-1])
        name = b"iCCP" + b"odd\x00\x00" + zlib.compress(bytes(200))
        chunk = struct.pack(">I", len(name) - 4) + name + struct.pack(">I", zlib.crc32(name))
        (tmp_path / "a.png").write_bytes(data[:33] + chunk + data[33:])

        assert np.array_equal(images.read(tmp_path / "a.png"), scene())
        assert capfd.readouterr().err == ""

    def test_keeps_what_other_threads_write_meanwhile(self, tmp_path: Path) -> None:
        images.write(tmp_path / "a.jpg", scene(400, 400))
        program = (
            "import os, sys, threading\n"
            "from pathlib import Path\n"
            "from engineworks.runtime import images\n"
            "def talk():\n"
            "    for i in range(3000): os.write(2, b'%d.jpeg\\n' % i)\n"
            "thread = threading.Thread(target=talk); thread.start()\n"
            "while thread.is_alive(): images.read(Path(sys.argv[1]))\n"
        )

        done = subprocess.run(
            [sys.executable, "-c", program, tmp_path / "a.jpg"], capture_output=True, check=True
        )

        lines = done.stderr.decode().splitlines()
        assert sorted(lines) == sorted(f"{i}.jpeg" for i in range(3000))

    def test_is_not_needed(self, tmp_path: Path) -> None:
        images.write(tmp_path / "a.jpg", scene())
        program = "import sys; from pathlib import Path; from engineworks.runtime import images\n"
        program += "assert images.read(Path(sys.argv[1])).shape == (60, 80, 3)\n"

        command = f'exec "{sys.executable}" -c "$0" "$1" 2>&-'
        subprocess.run(["sh", "-c", command, program, tmp_path / "a.jpg"], check=True)

    def test_is_shared_by_threads_that_decode_at_once(self, tmp_path: Path) -> None:
        images.write(tmp_path / "a.png", scene())
        (tmp_path / "b.jpg").write_bytes(jpeg(scene())[:-40] + b"\xff\xd9")
        wrong: list[str] = []

        def work() -> None:
            for _ in range(30):
                if not np.array_equal(images.read(tmp_path / "a.png"), scene()):
                    wrong.append("another picture")
                try:
                    images.read(tmp_path / "b.jpg")
                    wrong.append("the damage was not noticed")
                except ImageError:
                    continue

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert wrong == []


class TestReadMask:
    def test_keeps_the_values_of_the_file(self, tmp_path: Path) -> None:
        labels = np.arange(256, dtype=np.uint8).reshape(16, 16)
        images.write(tmp_path / "a.png", labels)

        assert np.array_equal(images.read_mask(tmp_path / "a.png"), labels)

    def test_loses_no_mark_of_a_mask_in_sixteen_bits(self, tmp_path: Path) -> None:
        deep = np.array([[0, 1, 2, 255, 256, 65535]], np.uint16)
        (tmp_path / "a.png").write_bytes(cv2.imencode(".png", deep)[1].tobytes())

        assert images.read_mask(tmp_path / "a.png").tolist() == [[0, 1, 2, 255, 255, 255]]


class TestWrite:
    def test_makes_the_folders_and_leaves_nothing_else(self, tmp_path: Path) -> None:
        images.write(tmp_path / "a" / "b" / "c.png", scene())

        assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["c.png"]

    def test_refuses_a_suffix_that_it_does_not_know(self, tmp_path: Path) -> None:
        with pytest.raises(ImageError, match="suffix") as caught:
            images.write(tmp_path / "a.exe", scene())
        assert ".png" in (caught.value.fix or "")

    def test_refuses_a_picture_that_the_format_cannot_hold(self, tmp_path: Path) -> None:
        # a JPEG's sides are 16-bit numbers
        with pytest.raises(ImageError, match=r"a\.jpg"):
            images.write(tmp_path / "a.jpg", np.zeros((2, 70000, 3), np.uint8))
        assert list(tmp_path.iterdir()) == []


class TestDecode:
    def test_gives_the_pixels_of_the_file_with_that_content(self, tmp_path: Path) -> None:
        (tmp_path / "a.jpg").write_bytes(with_orientation(jpeg(scene()), 6))

        decoded = images.decode((tmp_path / "a.jpg").read_bytes(), "row 3")

        assert np.array_equal(decoded, images.read(tmp_path / "a.jpg"))

    @pytest.mark.parametrize(
        ("data", "reason"),
        [(b"", "empty"), (b"no picture", "no picture"), (jpeg(scene())[:200], "truncated")],
    )
    def test_calls_what_cannot_be_decoded_by_its_name(self, data: bytes, reason: str) -> None:
        with pytest.raises(ImageError, match=f"row 3 .*{reason}"):
            images.decode(data, "row 3")

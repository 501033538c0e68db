"""Files of planes: every layout that is promised, and clear words about every other."""

from __future__ import annotations

import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from engineworks.runtime import images
from engineworks.runtime.errors import ImageError, InputError
from engineworks.runtime.folders import Tally
from engineworks.runtime.planes import (
    PLANES,
    check_planes,
    displacement,
    files,
    is_reference,
    read,
    read_triplet,
    write,
)
from engineworks.runtime.tensors import Array

DTYPES = ("uint8", "uint16", "float32")


def drawn(rng: np.random.Generator, dtype: str = "uint8", num: int = 3) -> Array:
    return (rng.random((20, 31, num)) * 200).astype(dtype)


def texture(rng: np.random.Generator, size: tuple[int, int] = (96, 80)) -> Array:
    """Blotches a few pixels wide, around 100."""
    return np.asarray(cv2.GaussianBlur(rng.normal(100, 200, size), (0, 0), 2)).astype(np.float32)


def tiff(planes_HWC: Array, *, separate: bool, order: str = "<", strips: int = 1) -> bytes:
    """An uncompressed TIFF; planes interleaved, or one behind the other."""
    height, width, num = planes_HWC.shape
    stored = planes_HWC.astype(planes_HWC.dtype.newbyteorder(order))
    blocks = [stored[..., i] for i in range(num)] if separate else [stored]
    rows = -(-height // strips)
    pieces = [block[y : y + rows].tobytes() for block in blocks for y in range(0, height, rows)]
    starts = (8 + np.cumsum([0, *map(len, pieces)])).tolist()
    kind = {"u": 1, "f": 3}[planes_HWC.dtype.kind]
    tags: dict[int, tuple[str, list[int]]] = {
        256: ("I", [width]),
        257: ("I", [height]),
        258: ("H", [8 * planes_HWC.itemsize] * num),
        259: ("H", [1]),
        262: ("H", [2]),
        273: ("I", starts[:-1]),
        277: ("H", [num]),
        278: ("I", [rows]),
        279: ("I", [len(piece) for piece in pieces]),
        284: ("H", [2 if separate else 1]),
        **({338: ("H", [0] * (num - 3))} if num > 3 else {}),
        339: ("H", [kind] * num),
    }
    end = starts[-1] + starts[-1] % 2
    outside = end + 2 + 12 * len(tags) + 4
    entries, values = b"", b""
    for tag, (code, numbers) in tags.items():
        packed = struct.pack(f"{order}{len(numbers)}{code}", *numbers)
        entries += struct.pack(f"{order}HHI", tag, {"H": 3, "I": 4}[code], len(numbers))
        if len(packed) > 4:
            entries += struct.pack(f"{order}I", outside + len(values))
            values += packed
        else:
            entries += packed.ljust(4, b"\0")
    magic = b"II*\0" if order == "<" else b"MM\0*"
    body = (magic + struct.pack(f"{order}I", end) + b"".join(pieces)).ljust(end, b"\0")
    return body + struct.pack(f"{order}H", len(tags)) + entries + b"\0\0\0\0" + values


class TestOneFile:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("suffix", [".npy", ".tif", ".tiff", ".png"])
    def test_comes_back_as_it_was_written(
        self, tmp_path: Path, rng: np.random.Generator, dtype: str, suffix: str
    ) -> None:
        if (suffix, dtype) == (".png", "float32"):
            with pytest.raises(ImageError, match=r"cannot hold .* float32"):
                write(tmp_path / "a.png", drawn(rng, dtype))
            return
        image = drawn(rng, dtype)
        path = tmp_path / "deep" / f"a{suffix}"
        write(path, image)
        found = read(path)
        assert found.dtype == image.dtype
        assert (found == image).all()
        assert [p.name for p in path.parent.iterdir()] == [path.name]

    @settings(max_examples=30)
    @given(
        image=hnp.arrays(
            st.sampled_from([np.uint8, np.uint16]),
            st.tuples(st.integers(1, 40), st.integers(1, 40), st.just(3)),
        )
    )
    def test_of_any_size_comes_back(
        self, tmp_path_factory: pytest.TempPathFactory, image: Array
    ) -> None:
        path = tmp_path_factory.mktemp("any") / "a.tif"
        write(path, image)
        assert (read(path) == image).all()

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("num", [3, 4])
    @pytest.mark.parametrize("separate", [False, True])
    def test_tiff_channels_are_planes_in_the_order_of_storage(
        self, tmp_path: Path, rng: np.random.Generator, dtype: str, num: int, separate: bool
    ) -> None:
        image = drawn(rng, dtype, num)
        path = tmp_path / "a.tif"
        path.write_bytes(tiff(image, separate=separate))
        assert (read(path) == image[..., :3]).all()

    @pytest.mark.parametrize("order", ["<", ">"])
    @pytest.mark.parametrize("strips", [3, 20])
    def test_tiff_planes_may_lie_in_strips_of_either_byte_order(
        self, tmp_path: Path, rng: np.random.Generator, order: str, strips: int
    ) -> None:
        image = drawn(rng, "float32")
        path = tmp_path / "a.tif"
        path.write_bytes(tiff(image, separate=True, order=order, strips=strips))
        assert (read(path) == image).all()

    @pytest.mark.parametrize("num", [3, 4])
    def test_tiff_pages_are_planes(
        self, tmp_path: Path, rng: np.random.Generator, num: int
    ) -> None:
        image = drawn(rng, "uint16", num)
        pages = [np.ascontiguousarray(image[..., i]) for i in range(num)]
        path = tmp_path / "a.tif"
        path.write_bytes(cv2.imencodemulti(".tif", pages)[1].tobytes())
        assert (read(path) == image[..., :3]).all()

    def test_png_planes_are_blue_green_and_red(
        self, tmp_path: Path, rng: np.random.Generator
    ) -> None:
        image = drawn(rng, num=4)
        path = tmp_path / "a.png"
        path.write_bytes(cv2.imencode(".png", image)[1].tobytes())
        assert (read(path) == image[..., :3]).all()
        assert (images.read(path) == image[..., 2::-1]).all()

    @pytest.mark.parametrize("num", [3, 4])
    @pytest.mark.parametrize("first", [False, True])
    def test_npy_planes_may_stand_first_or_last(
        self, tmp_path: Path, rng: np.random.Generator, num: int, first: bool
    ) -> None:
        image = drawn(rng, "float32", num)
        path = tmp_path / "a.npy"
        np.save(path, image.transpose(2, 0, 1) if first else image)
        assert (read(path) == image[..., :3]).all()

    @pytest.mark.parametrize("num", [1, 2, 5])
    def test_with_another_number_of_planes_is_refused(self, tmp_path: Path, num: int) -> None:
        path = tmp_path / "a.tif"
        pages = [np.zeros((20, 31), np.uint8)] * num
        path.write_bytes(cv2.imencodemulti(".tif", pages)[1].tobytes())
        with pytest.raises(ImageError, match=f"has {num} planes") as caught:
            read(path)
        assert "target" in (caught.value.fix or "")

    @pytest.mark.parametrize(
        ("array", "message"),
        [
            (np.zeros((20, 31, 3)), "holds float64"),
            (np.zeros((20, 31, 3), np.int16), "holds int16"),
            (np.zeros((20, 31, 7), np.uint8), r"shape \(20, 31, 7\)"),
            (np.zeros(9, np.uint8), r"shape \(9,\)"),
            (np.zeros((20, 31), np.uint8), "has 1 planes"),
            (np.full((20, 31, 3), np.nan, np.float32), "not finite"),
        ],
    )
    def test_npy_that_holds_no_planes_is_refused(
        self, tmp_path: Path, array: Array, message: str
    ) -> None:
        path = tmp_path / "a.npy"
        np.save(path, array)
        with pytest.raises(ImageError, match=message) as caught:
            read(path)
        assert caught.value.fix

    def test_npy_with_objects_is_not_unpickled(self, tmp_path: Path) -> None:
        path = tmp_path / "a.npy"
        np.save(path, np.array([{}], object))
        with pytest.raises(ImageError, match="no NPY file"):
            read(path)

    @pytest.mark.parametrize("suffix", [".npy", ".tif", ".png"])
    @pytest.mark.parametrize("share", [0, 0.02, 0.6])
    def test_that_breaks_off_is_refused(
        self, tmp_path: Path, rng: np.random.Generator, suffix: str, share: float
    ) -> None:
        path = tmp_path / f"a{suffix}"
        write(path, drawn(rng))
        data = path.read_bytes()
        path.write_bytes(data[: int(share * len(data))])
        with pytest.raises(ImageError):
            read(path)

    @pytest.mark.parametrize("cut", [3, 6, 60, 200])
    def test_separate_tiff_whose_directory_is_damaged_is_refused(
        self, tmp_path: Path, rng: np.random.Generator, cut: int
    ) -> None:
        path = tmp_path / "a.tif"
        path.write_bytes(tiff(drawn(rng, "uint16"), separate=True)[:-cut])
        with pytest.raises(ImageError):
            read(path)

    def test_that_is_missing_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(ImageError, match=r"a\.tif"):
            read(tmp_path / "a.tif")

    def test_with_pages_of_different_size_is_refused(self, tmp_path: Path) -> None:
        pages = [np.zeros((20, 31), np.uint8)] * 2 + [np.zeros((10, 15), np.uint8)]
        path = tmp_path / "a.tif"
        path.write_bytes(cv2.imencodemulti(".tif", pages)[1].tobytes())
        with pytest.raises(ImageError, match="pages of different sizes"):
            read(path)


class TestThreeFiles:
    @pytest.fixture
    def folders(self, tmp_path: Path, rng: np.random.Generator) -> Path:
        """target, ref1 and ref2 with an image of the same place."""
        surface = texture(rng)
        for name in ("target", "ref1", "ref2"):
            plane = np.clip(surface + rng.normal(0, 2, surface.shape), 0, 255).astype(np.uint8)
            images.write(tmp_path / name / "a.png", plane)
        return tmp_path

    def test_are_one_image_that_the_target_names(self, folders: Path) -> None:
        path = folders / "target" / "a.png"
        names = ("target", "ref1", "ref2")
        assert files(path) == tuple(folders / name / "a.png" for name in names)
        found = read(path)
        for i, name in enumerate(names):
            assert (found[..., i] == images.read_mask(folders / name / "a.png")).all()

    def test_one_reference_stands_for_both(self, folders: Path) -> None:
        (folders / "ref2" / "a.png").unlink()
        (folders / "ref2").rmdir()
        found = read(folders / "target" / "a.png")
        assert (found[..., 1] == found[..., 2]).all()
        assert (found[..., 0] != found[..., 1]).any()

    def test_a_missing_reference_is_named(self, folders: Path) -> None:
        (folders / "ref2" / "a.png").unlink()
        with pytest.raises(ImageError, match=r"has no reference .*ref2.a\.png") as caught:
            read(folders / "target" / "a.png")
        assert caught.value.fix

    def test_a_lone_folder_target_holds_whole_files(
        self, tmp_path: Path, rng: np.random.Generator
    ) -> None:
        write(tmp_path / "target" / "a.png", drawn(rng))
        assert files(tmp_path / "target" / "a.png") == (tmp_path / "target" / "a.png",)
        assert read(tmp_path / "target" / "a.png").shape == (20, 31, 3)

    def test_references_are_no_images_by_themselves(self, folders: Path) -> None:
        assert is_reference(folders / "ref1" / "a.png")
        assert not is_reference(folders / "target" / "a.png")
        assert not is_reference(folders / "elsewhere" / "ref1" / "a.png")
        found = PLANES.find(sorted(folders.rglob("*")), Tally())
        assert found == [folders / "target" / "a.png"]

    @pytest.mark.parametrize("other", [np.zeros((90, 80), np.uint8), np.zeros((96, 80), np.uint16)])
    def test_of_different_size_or_type_are_refused(self, folders: Path, other: Array) -> None:
        path = folders / "ref2" / "a.png"
        path.write_bytes(cv2.imencode(".png", other)[1].tobytes())
        with pytest.raises(ImageError, match=r"\(96, 80\) uint8") as caught:
            read(folders / "target" / "a.png")
        assert caught.value.fix

    def test_in_colour_are_refused_and_grey_in_three_channels_taken(self, folders: Path) -> None:
        path = folders / "ref1" / "a.png"
        before = read(folders / "target" / "a.png")
        grey = images.read(path)
        images.write(path, grey)  # the same, in three channels
        assert (read(folders / "target" / "a.png") == before).all()
        images.write(path, grey // np.array([1, 2, 1], np.uint8))
        with pytest.raises(ImageError, match="3 planes, where one is expected"):
            read(folders / "target" / "a.png")


class TestRegistration:
    @settings(max_examples=15)
    @given(dy=st.integers(-12, 12), dx=st.integers(-12, 12))
    def test_finds_by_how_much_a_capture_is_displaced(self, dy: int, dx: int) -> None:
        rng = np.random.default_rng(0)
        surface = texture(rng, (140, 120))
        plane, other = surface[20:116, 20:100], surface[20 + dy : 116 + dy, 20 + dx : 100 + dx]
        assert displacement(plane + rng.normal(0, 1, plane.shape), other) == (dy, dx)

    @pytest.mark.parametrize("power", [-140, -60, 60, 110])
    def test_tells_it_of_values_of_any_size(self, power: int) -> None:
        surface = texture(np.random.default_rng(0), (140, 120)) - 100
        plane, other = (
            np.ldexp(part.astype(np.float32), power)
            for part in (surface[20:116, 20:100], surface[25:121, 13:93])
        )
        assert displacement(plane, other) == (5, -7)

    def test_periodic_captures_in_register_are_taken_for_that(
        self, rng: np.random.Generator
    ) -> None:
        x = np.arange(176)
        stripes = np.broadcast_to(128 + 60 * np.sign(np.sin(x / 2.0)), (300, 176))
        for _ in range(5):
            a, b = (stripes + rng.normal(0, 4, stripes.shape) for _ in range(2))
            assert displacement(a, b) == (0, 0)

    def test_blank_captures_are_in_register(self) -> None:
        assert displacement(np.full((64, 64), 9.0), np.full((64, 64), 9.0)) == (0, 0)

    def test_that_fails_is_an_error_with_the_numbers(
        self, tmp_path: Path, rng: np.random.Generator
    ) -> None:
        surface = np.clip(texture(rng, (120, 120)), 0, 255).astype(np.uint8)
        for name, start in (("target", 10), ("ref1", 10), ("ref2", 17)):
            images.write(tmp_path / name / "a.png", surface[start : start + 96, 10:106])
        paths = [tmp_path / name / "a.png" for name in ("target", "ref1", "ref2")]
        with pytest.raises(ImageError, match=r"ref2.*by \+7 rows and \+0 columns") as caught:
            read(paths[0])
        assert "register" in (caught.value.fix or "")
        assert read_triplet(paths[0], paths[1], paths[2], max_shift=8).shape == (96, 96, 3)


class TestCheckPlanes:
    @pytest.mark.parametrize(
        "image",
        [
            np.zeros((4, 4), np.uint8),
            np.zeros((4, 4, 4), np.uint8),
            np.zeros((4, 4, 3)),
            np.zeros((0, 4, 3), np.uint8),
            np.full((4, 4, 3), np.inf, np.float32),
        ],
    )
    def test_refuses_everything_else(self, image: Array) -> None:
        with pytest.raises(InputError):
            check_planes(image)


def spots(*places: tuple[int, int]) -> Array:
    """Flat captures with a defect each, at another place in each."""
    image = np.full((300, 200, 3), 80, np.uint8)
    for plane, (y, x) in enumerate(places):
        image[y : y + 9, x : x + 9, plane] = 200
    return image


class TestOneFileOfThreeCaptures:
    def capture(self) -> Array:
        rng = np.random.default_rng(0)
        rough = rng.integers(0, 255, (60, 50), np.uint8)
        return np.asarray(cv2.resize(rough, (500, 600), interpolation=cv2.INTER_CUBIC))

    @pytest.mark.parametrize("suffix", [".npy", ".tif", ".png"])
    @pytest.mark.parametrize("plane", [1, 2])
    def test_is_refused_where_a_reference_is_displaced(
        self, tmp_path: Path, suffix: str, plane: int
    ) -> None:
        image = np.stack([self.capture()] * 3, axis=-1)
        write(tmp_path / f"good{suffix}", image)
        assert (read(tmp_path / f"good{suffix}") == image).all()
        image[..., plane] = np.roll(image[..., plane], (9, -7), (0, 1))
        write(tmp_path / f"bad{suffix}", image)
        with pytest.raises(ImageError, match=r"displaced against its target by -9 rows and .7"):
            read(tmp_path / f"bad{suffix}")

    def test_with_a_defect_in_both_on_flat_ground_is_taken(self, tmp_path: Path) -> None:
        image = np.random.default_rng(0).integers(95, 106, (96, 96, 3), np.uint8)
        for plane, centre in enumerate(((48, 48), (44, 49), (48, 48))):
            spot = np.ascontiguousarray(image[..., plane])
            image[..., plane] = cv2.circle(spot, centre, 10, 220, -1)
        assert displacement(image[..., 0], image[..., 1]) == (-1, 4)  # of the two defects
        write(tmp_path / "both.npy", image)
        assert (read(tmp_path / "both.npy") == image).all()

    def test_of_a_pattern_whose_next_period_fits_better_is_taken(self, tmp_path: Path) -> None:
        y, x = np.mgrid[:200.0, :160.0]

        def grid(dy: float, dx: float) -> np.ndarray:
            # 8.5 pixels from one to the next: beside half a pixel, 8 more are all of it
            wave = np.cos(2 * np.pi * (y + dy) / 8.5) + np.cos(2 * np.pi * (x + dx) / 8.5)
            return np.asarray(128 + 50 * np.sign(wave) * np.sqrt(np.abs(wave)), np.float32)

        image = np.stack([grid(0, 0), grid(-0.5, -0.5), grid(0, 0)], axis=-1)
        assert displacement(image[..., 0], image[..., 1]) == (8, 8)
        write(tmp_path / "grid.npy", image)
        assert (read(tmp_path / "grid.npy") == image).all()

    def test_of_unlike_or_empty_captures_is_taken(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(1)
        for i, image in enumerate(
            (
                rng.integers(0, 255, (300, 200, 3), np.uint8),
                np.zeros((300, 200, 3), np.uint8),
                spots((90, 80), (120, 70), (150, 120)),
            )
        ):
            write(tmp_path / f"{i}.npy", image)
            assert (read(tmp_path / f"{i}.npy") == image).all()

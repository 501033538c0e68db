"""Masks in the layouts that people have, and those that say nothing about their pictures."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engineworks.runtime import datasets, images, masks
from engineworks.runtime.errors import DatasetError
from engineworks.runtime.tensors import Array

MARKED = np.pad(np.full((9, 7), 255, np.uint8), 10)


def picture(path: Path, height: int = 30, width: int = 40) -> Path:
    images.write(path, np.full((height, width, 3), 90, np.uint8))
    return path


def mark(path: Path, height: int = 30, width: int = 40) -> Path:
    mask = np.zeros((height, width), np.uint8)
    mask[2 : height // 2, 2 : width // 2] = 255
    images.write(path, mask)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two scratched parts and their masks, as MVTec AD has them."""
    for name in ("train/good/0.png", "test/good/0.png", "test/scratch/a.png", "test/scratch/b.png"):
        picture(tmp_path / name)
    for name in ("a", "b"):
        mark(tmp_path / "ground_truth" / "scratch" / f"{name}_mask.png")
    return tmp_path


def as_strips(root: Path) -> list[Path | None]:
    return [sample.mask_path for sample in datasets.strips(root, "test")]


def as_mvtec(root: Path) -> list[Path | None]:
    return [sample.mask_path for sample in datasets.mvtec(root, "test")]


READERS = pytest.mark.parametrize("read", [as_mvtec, as_strips])


class TestAMask:
    @READERS
    @pytest.mark.parametrize(
        "place",
        [
            "ground_truth/scratch/a_mask.PNG",
            "ground_truth/scratch/a.png",
            "ground_truth/scratch/A_Mask.tif",
            "ground_truth/Scratch/a_gt.bmp",
            "masks/scratch/a.png",
            "GT/scratch/a_seg.png",
            "test/scratch/a_label.bmp",
        ],
    )
    def test_is_found_where_people_put_it(self, root: Path, read: object, place: str) -> None:
        for name in ("a", "b"):
            (root / "ground_truth" / "scratch" / f"{name}_mask.png").unlink()
        (root / "ground_truth" / "scratch").rmdir()
        (root / "ground_truth").rmdir()
        (root / "test/scratch/b.png").unlink()
        path = mark((root / place).with_suffix(".png"))
        path = path.rename(root / place)

        good, scratched = sorted(read(root), key=str)  # type: ignore[operator]

        assert sorted([good, scratched], key=str) == sorted([None, path], key=str)

    @READERS
    def test_that_is_missing_is_named(self, root: Path, read: object) -> None:
        (root / "ground_truth/scratch/b_mask.png").rename(root / "ground_truth/scratch/c.png")
        with pytest.raises(DatasetError, match=r"without a mask: 1 \(scratch/b\.png\)"):
            read(root)  # type: ignore[operator]

    @READERS
    def test_may_be_missing_where_there_is_none(self, root: Path, read: object) -> None:
        for mask in (root / "ground_truth" / "scratch").iterdir():
            mask.unlink()
        assert read(root) == [None, None, None]  # type: ignore[operator]

    @READERS
    def test_of_which_none_fits_is_no_set_without_masks(self, root: Path, read: object) -> None:
        for mask in (root / "ground_truth" / "scratch").iterdir():
            mask.rename(mask.with_name(f"mask of {mask.name}"))
        with pytest.raises(DatasetError, match=r"without a mask: 2"):
            read(root)  # type: ignore[operator]

    @READERS
    def test_of_another_shape_is_refused(self, root: Path, read: object) -> None:
        mark(root / "ground_truth/scratch/b_mask.png", 30, 30)
        with pytest.raises(DatasetError, match=r"b_mask\.png: 30 x 30 for 40 x 30"):
            read(root)  # type: ignore[operator]

    @READERS
    def test_of_another_size_is_taken_and_said(
        self, root: Path, read: object, caplog: pytest.LogCaptureFixture
    ) -> None:
        mark(root / "ground_truth/scratch/b_mask.png", 15, 20)
        assert len(read(root)) == 3  # type: ignore[operator]
        assert "another size, resized: 1 (scratch/b_mask.png: 20 x 15 for 40 x 30)" in caplog.text

    @READERS
    def test_beside_another_one_is_refused(self, root: Path, read: object) -> None:
        mark(root / "ground_truth/scratch/b.png")
        with pytest.raises(DatasetError, match="two masks"):
            read(root)  # type: ignore[operator]

    @READERS
    def test_without_a_picture_is_said(
        self, root: Path, read: object, caplog: pytest.LogCaptureFixture
    ) -> None:
        mark(root / "ground_truth/scratch/z_mask.png")
        read(root)  # type: ignore[operator]
        assert "mask without a picture: 1 (scratch/z_mask.png)" in caplog.text


class TestWhatIsMarked:
    def test_is_all_that_is_not_zero(self, tmp_path: Path) -> None:
        images.write(tmp_path / "a.png", np.array([[0, 1], [254, 255]], np.uint8))
        assert masks.read(tmp_path / "a.png").tolist() == [[False, True], [True, True]]

    def test_must_be_something(self, tmp_path: Path) -> None:
        images.write(tmp_path / "a.png", np.zeros((5, 5), np.uint8))
        with pytest.raises(DatasetError, match=r"empty masks.*a\.png"):
            masks.read(tmp_path / "a.png")

    @pytest.mark.parametrize(
        ("suffix", "quality"),
        [(".jpg", cv2.IMWRITE_JPEG_QUALITY), (".webp", cv2.IMWRITE_WEBP_QUALITY)],
    )
    def test_must_not_be_blurred_by_its_format(
        self, tmp_path: Path, suffix: str, quality: int
    ) -> None:
        data = cv2.imencode(suffix, MARKED, [quality, 60])[1]
        (tmp_path / f"a{suffix}").write_bytes(data.tobytes())
        with pytest.raises(DatasetError, match="blurred") as caught:
            masks.read(tmp_path / f"a{suffix}")
        assert "PNG" in str(caught.value.fix)

    def test_may_be_in_a_lossless_webp(self, tmp_path: Path) -> None:
        data = cv2.imencode(".webp", MARKED, [cv2.IMWRITE_WEBP_QUALITY, 101])[1]
        (tmp_path / "a.webp").write_bytes(data.tobytes())
        assert (masks.read(tmp_path / "a.webp") == (MARKED > 0)).all()

    def test_is_brought_to_the_size_of_its_picture(self, tmp_path: Path) -> None:
        images.write(tmp_path / "a.png", MARKED)
        height, width = MARKED.shape
        found = masks.read(tmp_path / "a.png", (2 * height, 2 * width))
        assert np.array_equal(found, MARKED.repeat(2, axis=0).repeat(2, axis=1) > 0)
        with pytest.raises(DatasetError, match="its picture"):
            masks.read(tmp_path / "a.png", (2 * height, width))


@given(
    sides=st.tuples(st.integers(8, 3000), st.integers(8, 3000)),
    scale=st.floats(0.1, 4),
    cut=st.sampled_from([np.floor, np.ceil, np.rint]),
)
def test_a_scaled_size_has_the_same_shape(
    sides: tuple[int, int], scale: float, cut: np.ufunc
) -> None:
    scaled: Array = np.maximum(cut(np.array(sides) * scale), 1).astype(int)
    assert masks.same_shape(sides, tuple(scaled.tolist()))
    assert masks.same_shape(tuple(scaled.tolist()), sides)


@pytest.mark.parametrize("other", [(70, 60), (96, 90), (192, 128), (48, 52)])
def test_another_shape_is_none(other: tuple[int, int]) -> None:
    assert not masks.same_shape((96, 96), other)
    assert not masks.same_shape(other, (96, 96))


@READERS
def test_a_mask_of_a_normal_picture_must_be_empty(root: Path, read: object) -> None:
    mask = mark(root / "ground_truth/good/0_mask.png")
    with pytest.raises(DatasetError, match=r"in normal pictures: 1 \(0_mask\.png\)"):
        read(root)  # type: ignore[operator]
    images.write(mask, np.zeros((30, 40), np.uint8))
    assert len(read(root)) == 3  # type: ignore[operator]

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import pytest

from engineworks.runtime import images
from engineworks.runtime.datasets import (
    ClassFolder,
    MvtecSample,
    class_folder,
    class_splits,
    mvtec,
    read,
    strips,
)
from engineworks.runtime.errors import BackendError, DatasetError, ImageError
from engineworks.runtime.tensors import Array


def make(root: Path, *names: str) -> Path:
    """Empty files: the layout is read without opening any."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


@pytest.fixture
def split(tmp_path: Path) -> Path:
    return make(
        tmp_path,
        "train/good/b.png",
        "train/good/a.JPG",
        "train/good/notes.txt",
        "test/scratch/1.png",
        "test/scratch/2.png",
        "test/good/0.png",
        "test/dent/1.png",
        "ground_truth/scratch/1_mask.png",
        "ground_truth/scratch/2_mask.png",
        "ground_truth/dent/1_mask.png",
        "ground_truth/good/0_mask.png",
    )


@pytest.fixture
def unsplit(tmp_path: Path) -> Path:
    good = [f"images/good/{i}.jpg" for i in range(5)]
    masks = [f"ground_truth/broken/{i}_mask.png" for i in range(2)]
    return make(tmp_path, *good, "images/broken/0.jpg", "images/broken/1.jpg", *masks)


def names(samples: list[MvtecSample]) -> list[str]:
    return [f"{sample.path.parent.name}/{sample.path.name}" for sample in samples]


class TestTheMvtecLayout:
    def test_trains_on_the_pictures_of_train_good_sorted(self, split: Path) -> None:
        samples = mvtec(split, "train")

        assert names(samples) == ["good/a.JPG", "good/b.png"]
        assert {(s.label, s.defect, s.mask_path) for s in samples} == {(0, "good", None)}

    def test_tests_on_every_folder_of_test_sorted(self, split: Path) -> None:
        samples = mvtec(split, "test")

        assert names(samples) == ["dent/1.png", "good/0.png", "scratch/1.png", "scratch/2.png"]
        assert [sample.label for sample in samples] == [1, 0, 1, 1]
        assert [sample.defect for sample in samples] == ["dent", "good", "scratch", "scratch"]

    def test_finds_the_mask_of_the_same_defect_and_name(self, split: Path) -> None:
        dent, good, first, second = (sample.mask_path for sample in mvtec(split, "test"))

        assert dent == split / "ground_truth/dent/1_mask.png"
        assert first == split / "ground_truth/scratch/1_mask.png"
        assert second == split / "ground_truth/scratch/2_mask.png"
        assert good is None, "a normal picture has none, whatever lies there"

    def test_needs_nothing_to_train_on_where_it_is_only_tested(self, split: Path) -> None:
        whole = names(mvtec(split, "test"))
        shutil.rmtree(split / "train")

        assert names(mvtec(split, "test")) == whole
        with pytest.raises(DatasetError, match="neither train/good"):
            mvtec(split, "train")


class TestTheUnsplitLayout:
    def test_trains_on_every_second_normal_picture(self, unsplit: Path) -> None:
        assert names(mvtec(unsplit, "train")) == ["good/0.jpg", "good/2.jpg", "good/4.jpg"]

    def test_tests_on_all_others(self, unsplit: Path) -> None:
        samples = mvtec(unsplit, "test")

        assert names(samples) == ["broken/0.jpg", "broken/1.jpg", "good/1.jpg", "good/3.jpg"]
        assert [sample.mask_path is not None for sample in samples] == [True, True, False, False]

    def test_is_not_taken_where_train_good_is_there(self, unsplit: Path) -> None:
        make(unsplit, "train/good/x.png")

        assert names(mvtec(unsplit, "train")) == ["good/x.png"]


class TestWhatLiesAround:
    def test_hidden_folders_and_appledouble_are_no_defects(
        self, split: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        whole = names(mvtec(split, "test"))
        make(split, "test/.ipynb_checkpoints/0.png", "test/good/._0.png", "train/good/._a.JPG")
        make(split, "test/good/Thumbs.db", "test/good/deep/1.png", "test/dent/2.heic", "film.mp4")

        assert names(mvtec(split, "test")) == whole
        assert len(mvtec(split, "train")) == 2
        for kind in ("hidden: 4", "nested folder: 1 (good/deep)", ".heic: 1", ".mp4: 1"):
            assert kind in caplog.text

    def test_linked_folders_are_defects_like_others(self, split: Path, tmp_path: Path) -> None:
        (split / "test" / "dent").rename(split / "elsewhere")
        (split / "test" / "dent").symlink_to(split / "elsewhere")

        assert "dent/1.png" in names(mvtec(split, "test"))

    @pytest.mark.parametrize("name", ["test/Good", "test/GOOD"])
    def test_good_in_another_case_is_no_defect(self, split: Path, name: str) -> None:
        make(split, f"{name}/0.png")
        with pytest.raises(DatasetError, match="is not called 'good'"):
            mvtec(split, "train")

    def test_a_split_in_another_case_is_refused(self, split: Path) -> None:
        (split / "train").rename(split / "Train")
        with pytest.raises(DatasetError, match="is not called 'train'"):
            mvtec(split, "train")


class TestWhatIsMissing:
    def test_neither_layout_is_refused_with_the_way_out(self, tmp_path: Path) -> None:
        with pytest.raises(DatasetError, match=r"neither train/good nor images/good") as error:
            mvtec(tmp_path, "train")

        assert "test/<defect>" in str(error.value)

    def test_a_folder_without_pictures_is_named(self, tmp_path: Path) -> None:
        make(tmp_path, "train/good/readme.txt", "test/good/readme.txt")

        with pytest.raises(DatasetError, match=r"train/good has no pictures"):
            mvtec(tmp_path, "train")
        with pytest.raises(DatasetError, match=r"test has no pictures"):
            mvtec(tmp_path, "test")

    def test_a_missing_test_folder_is_named(self, tmp_path: Path) -> None:
        make(tmp_path, "train/good/0.png")

        with pytest.raises(DatasetError, match=r"test does not exist"):
            mvtec(tmp_path, "test")

    def test_one_picture_leaves_nothing_to_test_on(self, tmp_path: Path) -> None:
        make(tmp_path, "images/good/0.png")

        with pytest.raises(DatasetError, match=r"images has no pictures"):
            mvtec(tmp_path, "test")


@pytest.mark.data
@pytest.mark.parametrize(
    ("folder", "train", "test", "defective"),
    [("mvtec_bottle", 209, 83, 63), ("aws_cookies", 16, 47, 32)],
)
def test_real_folders_have_their_known_counts(
    shared: Path, folder: str, train: int, test: int, defective: int
) -> None:
    root = shared / "data" / folder

    tested = mvtec(root, "test")

    assert len(mvtec(root, "train")) == train
    assert len(tested) == test
    assert sum(sample.label for sample in tested) == defective
    assert all((sample.mask_path is not None) == bool(sample.label) for sample in tested)


def by_class(folder: ClassFolder) -> list[tuple[str, int, str]]:
    return [(s.path.name, s.label, s.class_name) for s in folder.samples]


class TestFoldersOfClasses:
    @pytest.fixture
    def flowers(self, tmp_path: Path) -> Path:
        return make(
            tmp_path,
            "train/rose/2.png",
            "train/rose/1.JPG",
            "train/rose/notes.txt",
            "train/aster/1.png",
            "train/mallow/1.png",
            "test/rose/3.png",
            "test/mallow/4.png",
            "train/.cache/5.png",
        )

    def test_number_the_classes_of_train_by_name(self, flowers: Path) -> None:
        folder = class_folder(flowers, "train")

        assert folder.labels == ("aster", "mallow", "rose")
        assert by_class(folder) == [
            ("1.png", 0, "aster"),
            ("1.png", 1, "mallow"),
            ("1.JPG", 2, "rose"),
            ("2.png", 2, "rose"),
        ]
        assert folder.files == sorted(flowers.glob("train/[!.]*/*.[pJ]*"))

    def test_keep_the_numbers_in_a_split_that_lacks_classes(self, flowers: Path) -> None:
        folder = class_folder(flowers, "test")

        assert folder.labels == ("aster", "mallow", "rose")
        assert by_class(folder) == [("4.png", 1, "mallow"), ("3.png", 2, "rose")]

    def test_need_no_val_but_say_which_splits_there_are(self, flowers: Path) -> None:
        assert class_splits(flowers) == ("train", "test")
        with pytest.raises(DatasetError, match="'val', only of train, test") as caught:
            class_folder(flowers, "val")
        assert "val/<class>" in str(caught.value.fix)

        make(flowers, "val/rose/1.png")
        assert class_splits(flowers) == ("train", "val", "test")

    @pytest.mark.parametrize("split", ["val", "test"])
    def test_refuse_a_class_that_train_lacks(self, flowers: Path, split: str) -> None:
        make(flowers, f"{split}/tulip/1.png")

        with pytest.raises(DatasetError, match=f"'{split}' has pictures of the class 'tulip'"):
            class_folder(flowers, "train")

    def test_for_testing_alone_bring_their_own_classes(self, tmp_path: Path) -> None:
        make(tmp_path, "test/b/1.png", "test/a/1.png", "val/c/1.png")

        assert class_folder(tmp_path, "test").labels == ("a", "b", "c")
        assert class_splits(tmp_path) == ("val", "test")

    def test_are_not_what_editors_and_systems_leave_behind(
        self, flowers: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        whole = class_folder(flowers, "train")
        make(flowers, "train/rose/._1.JPG", "train/rose/more/1.png", "train/__MACOSX/1.png")
        make(flowers, "train/empty/notes.txt", "valid/rose/1.png", "train/1.png")
        caplog.clear()

        assert class_folder(flowers, "train") == whole
        assert len(caplog.messages) == 1
        for kind in ("hidden: 3", "nested folder: 1", "without pictures: 1", "folder: 1 (valid)"):
            assert kind in caplog.text

    def test_may_be_linked(self, flowers: Path) -> None:
        (flowers / "train" / "mallow").rename(flowers / "elsewhere")
        (flowers / "train" / "mallow").symlink_to(flowers / "elsewhere")
        assert class_folder(flowers, "train").labels == ("aster", "mallow", "rose")

    def test_refuse_a_split_without_pictures_or_of_another_case(self, flowers: Path) -> None:
        (flowers / "val").mkdir()
        with pytest.raises(DatasetError, match="val has no pictures by class"):
            class_folder(flowers, "train")
        (flowers / "val").rename(flowers / "Val")
        with pytest.raises(DatasetError, match="is not called 'val'"):
            class_folder(flowers, "train")

    def test_without_splits_are_for_evaluation_only(self, tmp_path: Path) -> None:
        make(tmp_path, "b/1.png", "a/1.png", "video.mp4")

        assert class_splits(tmp_path) == ("val", "test")
        for split in ("val", "test"):
            assert by_class(class_folder(tmp_path, split)) == [("1.png", 0, "a"), ("1.png", 1, "b")]
        with pytest.raises(DatasetError, match="'train', only of val, test"):
            class_folder(tmp_path, "train")

    def test_pictures_that_lie_beside_the_folders_of_classes_are_no_class(
        self, tmp_path: Path
    ) -> None:
        make(tmp_path, "train/1.png", "train/2.png")

        with pytest.raises(DatasetError, match="no pictures by class") as caught:
            class_folder(tmp_path, "train")
        assert "train/<class>" in str(caught.value.fix)

    def test_give_their_pixels(self, tmp_path: Path) -> None:
        picture = drawn(5)
        images.write(tmp_path / "test" / "a" / "1.png", picture)

        (sample,) = class_folder(tmp_path, "test").samples

        assert np.array_equal(read(sample), picture)


def drawn(level: int) -> Array:
    picture = np.full((9, 12, 3), level, np.uint8)
    picture[:4] = (255, 0, level)
    return picture


def encoded(level: int) -> bytes:
    return bytes(cv2.imencode(".png", drawn(level)[..., ::-1])[1].tobytes())


# as in the sets of ultra-fine-grained classes: labels in an order that is not that of the names
ROWS: dict[str, list[Any]] = {
    "image": [encoded(level) for level in range(6)],
    "label": [1, 0, 1, 0, 2, 2],
    "class_name": ["alpha", "zeta", "alpha", "zeta", "mu", "mu"],
    "split": ["train", "train", "test", "val", "train", "test"],
}


def write_parquet(path: Path, rows_in_group: int | None = None, **changes: Any) -> Path:
    """``ROWS`` with other columns; a column of None is left out."""
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    columns = {name: c for name, c in {**ROWS, **changes}.items() if c is not None}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=rows_in_group)
    return path


class TestAParquetFile:
    @pytest.mark.parametrize("rows_in_group", [None, 2, 1])
    def test_gives_the_pixels_of_every_row_in_any_order(
        self, tmp_path: Path, rows_in_group: int | None
    ) -> None:
        write_parquet(tmp_path / "set.parquet", rows_in_group)

        samples = [
            s for split in ("test", "train", "val") for s in class_folder(tmp_path, split).samples
        ]

        levels = [int(read(sample)[8, 0, 0]) for sample in samples]
        assert levels == [2, 5, 0, 1, 4, 3]
        assert np.array_equal(read(samples[1]), drawn(5))

    def test_numbers_classes_by_its_labels_and_names_them_by_its_names(
        self, tmp_path: Path
    ) -> None:
        write_parquet(tmp_path / "set.parquet")

        for split, labels in {"train": [1, 0, 2], "val": [0], "test": [1, 2]}.items():
            folder = class_folder(tmp_path, split)
            assert folder.labels == ("zeta", "alpha", "mu")
            assert [sample.label for sample in folder.samples] == labels
            assert all(folder.labels[s.label] == s.class_name for s in folder.samples)
            assert folder.files == [tmp_path / "set.parquet"]
        assert class_splits(tmp_path) == ("train", "val", "test")

    def test_may_count_from_one_or_leave_numbers_out(self, tmp_path: Path) -> None:
        write_parquet(tmp_path / "set.parquet", label=[4, 1, 4, 1, 9, 9])

        assert [s.label for s in class_folder(tmp_path, "train").samples] == [1, 0, 2]

    def test_may_hold_structs_with_bytes(self, tmp_path: Path) -> None:
        packed = [{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(ROWS["image"])]
        write_parquet(tmp_path / "set.parquet", image=packed)

        (sample,) = class_folder(tmp_path, "val").samples

        assert np.array_equal(read(sample), drawn(3))

    def test_may_be_named_itself(self, tmp_path: Path) -> None:
        path = write_parquet(tmp_path / "a" / "set.parquet")

        assert class_folder(path, "val") == class_folder(path.parent, "val")

    def test_that_was_replaced_is_read_anew(self, tmp_path: Path) -> None:
        path = write_parquet(tmp_path / "set.parquet")
        class_folder(path, "val")
        later = path.stat().st_mtime_ns + 10**9
        write_parquet(path, image=ROWS["image"][::-1])
        os.utime(path, ns=(later, later))

        (sample,) = class_folder(path, "val").samples

        assert np.array_equal(read(sample), drawn(2))

    def test_is_read_in_another_process_without_pyarrow(self, tmp_path: Path) -> None:
        """What a loader's worker does, however it was started."""
        write_parquet(tmp_path / "set.parquet")
        samples = class_folder(tmp_path, "test").samples
        context = multiprocessing.get_context("spawn")

        with ProcessPoolExecutor(1, mp_context=context, initializer=_forbid_pyarrow) as pool:
            pixels = list(pool.map(read, samples))

        assert [int(image[8, 0, 0]) for image in pixels] == [2, 5]

    def test_leaves_nothing_behind_when_the_process_ends(self, tmp_path: Path) -> None:
        write_parquet(tmp_path / "set.parquet")
        code = (
            "import sys, pathlib; from engineworks.runtime.datasets import class_folder;"
            "sample = class_folder(pathlib.Path(sys.argv[1]), 'val').samples[0];"
            "assert sample.packed.file.is_file(); sys.stdout.write(str(sample.packed.file))"
        )

        done = subprocess.run(
            [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True
        )

        assert not Path(done.stdout).parent.exists()


def _forbid_pyarrow() -> None:
    sys.modules["pyarrow"] = None  # type: ignore[assignment]


class TestAParquetFileThatIsNone:
    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"split": None}, r"lacks split"),
            ({"image": ["a"] * 6}, r"column image holds string"),
            ({"label": [1, 0, 1, 2, 2, 2]}, r"class 'zeta' has both label 0 and 2"),
            (
                {"class_name": ["a", "b", "c", "b", "d", "d"]},
                r"label 1 stands for both '.' and '.'",
            ),
            ({"split": ["train"] * 5 + ["dev"]}, r"row 5: .* split 'dev'"),
            ({"class_name": [None, "b", "a", "b", "d", "d"]}, r"row 0: .* class_name None"),
            ({"label": [1.5] * 6}, r"row 0: label 1.5"),
            ({"split": ["test", "train", "test", "val", "train", "test"]}, r"class 'alpha'"),
        ],
    )
    def test_of_this_layout_is_refused_with_the_reason(
        self, tmp_path: Path, changes: dict[str, Any], reason: str
    ) -> None:
        write_parquet(tmp_path / "set.parquet", **changes)

        with pytest.raises(DatasetError, match=reason) as caught:
            class_folder(tmp_path, "train")
        assert caught.value.fix

    def test_with_a_row_without_a_picture_is_refused(self, tmp_path: Path) -> None:
        write_parquet(tmp_path / "set.parquet", image=[*ROWS["image"][:4], None, b""])

        with pytest.raises(DatasetError, match="row 4 has no picture"):
            class_folder(tmp_path, "train")

    def test_names_the_row_that_cannot_be_decoded(self, tmp_path: Path) -> None:
        write_parquet(tmp_path / "set.parquet", image=[*ROWS["image"][:3], b"x", b"y", b"z"])
        (sample,) = class_folder(tmp_path, "val").samples

        with pytest.raises(ImageError, match=r"set\.parquet, row 3 is corrupt"):
            read(sample)

    def test_beside_another_one_is_refused(self, tmp_path: Path) -> None:
        write_parquet(tmp_path / "a.parquet")
        write_parquet(tmp_path / "b.parquet")

        with pytest.raises(DatasetError, match=r"2 parquet files: a\.parquet, b\.parquet"):
            class_splits(tmp_path)

    def test_at_all_is_refused(self, tmp_path: Path) -> None:
        pytest.importorskip("pyarrow")
        make(tmp_path, "set.parquet")

        with pytest.raises(DatasetError, match="cannot be read as parquet"):
            class_splits(tmp_path)

    def test_that_breaks_off_among_its_pictures_is_refused(self, tmp_path: Path) -> None:
        path = write_parquet(tmp_path / "set.parquet")
        damaged = bytearray(path.read_bytes())
        damaged[4:40] = bytes(36)  # headers of the first pages
        path.write_bytes(damaged)

        with pytest.raises(DatasetError, match=r"pictures of .* cannot be unpacked"):
            class_folder(tmp_path, "train")

    def test_without_pyarrow_is_refused_with_the_install_line(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        make(tmp_path, "set.parquet")
        monkeypatch.setitem(sys.modules, "pyarrow", None)

        with pytest.raises(BackendError, match="needs pyarrow") as caught:
            class_splits(tmp_path)
        assert "engineworks[parquet]" in str(caught.value.fix)


@pytest.mark.data
def test_a_real_folder_of_classes_has_its_known_counts(shared: Path) -> None:
    root = shared / "data" / "flower17"

    assert class_splits(root) == ("train", "test")
    for split, num in {"train": 70, "test": 10}.items():
        folder = class_folder(root, split)
        assert len(folder.labels) == 17
        assert Counter(s.label for s in folder.samples) == dict.fromkeys(range(17), num)


class TestStrips:
    def test_lists_every_split_with_labels_and_masks(self, tmp_path: Path) -> None:
        make(
            tmp_path,
            "train/good/b.tif",
            "train/good/a.npy",
            "train/good/.hidden.png",
            "train/good/notes.txt",
            "test/good/0.png",
            "test/bright/0.png",
            "test/bright/1.png",
            "ground_truth/bright/0_mask.tif",
            "ground_truth/bright/1_mask.PNG",
            "valid/bright/0.png",
            "ground_truth_valid/bright/0_mask.png",
        )

        train = strips(tmp_path, "train")
        assert [s.path.name for s in train] == ["a.npy", "b.tif"]
        assert {(s.label, s.defect, s.mask_path) for s in train} == {(0, "good", None)}
        test = strips(tmp_path, "test")
        assert [(s.defect, s.path.name, s.label) for s in test] == [
            ("bright", "0.png", 1),
            ("bright", "1.png", 1),
            ("good", "0.png", 0),
        ]
        mask = tmp_path / "ground_truth" / "bright" / "0_mask.tif"
        assert [s.mask_path for s in test] == [mask, mask.with_name("1_mask.PNG"), None]
        valid = strips(tmp_path, "valid")
        assert valid[0].mask_path == tmp_path / "ground_truth_valid" / "bright" / "0_mask.png"

    def test_takes_captures_in_folders_of_their_own(self, tmp_path: Path) -> None:
        captures = ("target", "ref1", "ref2")
        make(
            tmp_path,
            *(f"train/good/{name}/{i}.png" for name in captures for i in range(3)),
            *(f"test/spot/{name}/0.jpg" for name in captures),
            "ground_truth/spot/0_mask.png",
        )

        assert [s.path.name for s in strips(tmp_path, "train")] == ["0.png", "1.png", "2.png"]
        (sample,) = strips(tmp_path, "test")
        assert sample.paths == tuple(tmp_path / "test/spot" / n / "0.jpg" for n in captures)
        assert sample.path == sample.paths[0]
        assert sample.mask_path == tmp_path / "ground_truth/spot/0_mask.png"

    def test_a_target_without_its_reference_is_named(self, tmp_path: Path) -> None:
        make(tmp_path, "train/good/target/0.png", "train/good/ref1/1.png")

        with pytest.raises(ImageError, match=r"ref1.0\.png"):
            strips(tmp_path, "train")

    @pytest.mark.parametrize("split", ["train", "valid", "test"])
    def test_nothing_there_is_refused_with_the_folder(
        self, tmp_path: Path, split: Literal["train", "valid", "test"]
    ) -> None:
        make(tmp_path, "elsewhere/good/0.png")

        with pytest.raises(DatasetError, match=f"no images for '{split}'") as caught:
            strips(tmp_path, split)
        assert f"{split}/" in (caught.value.fix or "")


def test_references_without_a_target_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    captures = ("target/0.png", "ref1/0.png", "ref1/1.png", "ref1/._1.png")
    make(tmp_path, *(f"train/good/{name}" for name in captures))
    assert len(strips(tmp_path, "train")) == 1
    assert "reference without a target: 1 (ref1/1.png)" in caplog.text

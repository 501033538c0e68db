from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from runtime.datasets import MvtecSample, mvtec
from runtime.errors import DatasetError


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
        assert second is None, "a defective picture may have no mask"
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

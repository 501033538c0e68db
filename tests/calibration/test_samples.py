from __future__ import annotations

import hashlib
from pathlib import Path

import cv2
import numpy as np
import pytest

from engineworks.calibration.samples import choose
from engineworks.runtime.errors import DatasetError
from engineworks.runtime.planes import PLANES


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "good").mkdir()
    for i in range(10):
        image = np.full((4, 4, 3), 20 * i, np.uint8)
        cv2.imwrite(str(tmp_path / "good" / f"{i:02}.png"), image)
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


class TestChoose:
    def test_lists_as_many_as_asked_sorted_with_their_hashes(self, folder: Path) -> None:
        samples = choose(folder, 4)

        assert len(samples) == 4
        assert [s.name for s in samples] == sorted(s.name for s in samples)
        for sample in samples:
            assert sample.path == folder / sample.name
            assert sample.sha256 == hashlib.sha256(sample.path.read_bytes()).hexdigest()

    def test_draws_the_same_for_the_same_seed_and_others_for_another(self, folder: Path) -> None:
        assert choose(folder, 4, seed=1) == choose(folder, 4, seed=1)
        assert choose(folder, 4, seed=1) != choose(folder, 4, seed=2)

    def test_does_not_depend_on_where_the_folder_is(self, folder: Path, tmp_path: Path) -> None:
        moved = folder.parent / f"{folder.name}-moved"
        folder.rename(moved)

        names = [sample.name for sample in choose(moved, 4)]

        moved.rename(folder)
        assert names == [sample.name for sample in choose(folder, 4)]

    def test_knows_an_image_by_all_of_its_files(self, tmp_path: Path) -> None:
        for name in ("target", "ref1", "ref2"):
            (tmp_path / name).mkdir()
            cv2.imwrite(str(tmp_path / name / "a.png"), np.full((4, 4), 7, np.uint8))
        (before,) = choose(tmp_path, 1, reader=PLANES)
        cv2.imwrite(str(tmp_path / "ref2" / "a.png"), np.full((4, 4), 8, np.uint8))
        (after,) = choose(tmp_path, 1, reader=PLANES)
        assert before.name == after.name == "target/a.png"
        assert before.sha256 != after.sha256

    def test_can_take_all(self, folder: Path) -> None:
        assert len({sample.sha256 for sample in choose(folder, 10)}) == 10

    @pytest.mark.parametrize("num", [0, -1, 11])
    def test_refuses_a_number_that_is_not_there(self, folder: Path, num: int) -> None:
        with pytest.raises(DatasetError, match=rf"has 10 images, {num} were asked for"):
            choose(folder, num)

    def test_refuses_a_folder_without_images(self, tmp_path: Path) -> None:
        with pytest.raises(DatasetError, match="no images in"):
            choose(tmp_path, 1)

    def test_refuses_a_folder_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(DatasetError, match="no folder"):
            choose(tmp_path / "missing", 1)

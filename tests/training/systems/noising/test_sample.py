from __future__ import annotations

from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from engineworks.runtime import datasets
from engineworks.runtime.errors import RunError
from engineworks.training.systems.noising.sample import DEFECTS, draw, sample


class TestADrawnDataSet:
    def test_has_the_folders_of_mvtec(self, tmp_path: Path) -> None:
        counts = sample(tmp_path / "drawn", size=64, num_train=3, num_test=12)
        assert counts == {
            "train/good": 3,
            "test/good": 6,
            **{f"test/{name}": 1 for name in DEFECTS},
            "test/scratch": 2,
            "video.mp4": 90,
        }
        assert len(datasets.mvtec(tmp_path / "drawn", "train")) == 3
        labelled = datasets.mvtec(tmp_path / "drawn", "test")
        assert sum(s.label for s in labelled) == 6
        assert all(s.mask_path is not None for s in labelled if s.label)

    def test_is_the_same_for_the_same_seed(self, tmp_path: Path) -> None:
        for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
            sample(tmp_path / folder, seed=seed, size=48, num_train=2, num_test=2)
        pictures = [(tmp_path / f / "train/good/001.png").read_bytes() for f in "abc"]
        assert pictures[0] == pictures[1] != pictures[2]

    def test_keeps_its_first_pictures_when_it_grows(self, tmp_path: Path) -> None:
        for folder, num in (("a", 1), ("b", 3)):
            sample(tmp_path / folder, size=48, num_train=num, num_test=2)
        first = [(tmp_path / f / "train/good/000.png").read_bytes() for f in "ab"]
        assert first[0] == first[1]

    def test_has_a_video_that_can_be_read(self, tmp_path: Path) -> None:
        sample(tmp_path / "drawn", size=64, num_train=1, num_test=0)
        with av.open(str(tmp_path / "drawn/video.mp4")) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert len(frames) == 90
        assert frames[0].shape == (64, 64, 3)

    def test_is_not_drawn_over_something_else(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").write_text("years of work")
        with pytest.raises(RunError, match="not empty"):
            sample(tmp_path)


class TestADefect:
    @pytest.mark.parametrize("name", DEFECTS)
    @pytest.mark.parametrize("seed", range(3))
    def test_changes_the_picture_inside_its_mask_only(self, name: str, seed: int) -> None:
        bad, mask = draw(np.random.default_rng(seed), 96, name)
        assert bad.dtype == mask.dtype == np.uint8
        assert set(np.unique(mask)) == {0, 255}
        # the good part of the same seed differs by noise alone outside the defect
        good = draw(np.random.default_rng(seed), 96)[0]
        change = np.abs(bad.astype(float) - good).mean(axis=2)
        outside = cv2.dilate(mask, np.ones((13, 13), np.uint8)) == 0
        assert 0.0005 < (mask > 0).mean() < 0.1
        assert change[mask > 0].mean() > 2 * change[outside].mean()

    def test_leaves_a_good_part_without_a_mask(self) -> None:
        assert not draw(np.random.default_rng(0), 64)[1].any()

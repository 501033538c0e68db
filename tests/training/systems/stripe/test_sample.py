from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from engineworks.runtime import datasets, images, planes
from engineworks.runtime.errors import RunError
from engineworks.training.systems.stripe.sample import DEFECTS, draw, sample


class TestADrawnDataSet:
    def test_has_the_folders_of_strips(self, tmp_path: Path) -> None:
        counts = sample(tmp_path / "drawn", size=(96, 64), num_train=3, num_test=7)
        assert counts == {
            "train/good": 3,
            "test/good": 3,
            "test/bright_spots": 2,
            "test/dark_spots": 2,
        }
        assert len(datasets.strips(tmp_path / "drawn", "train")) == 3
        labelled = datasets.strips(tmp_path / "drawn", "test")
        assert sum(sample.label for sample in labelled) == 4
        assert all(sample.mask_path is not None for sample in labelled if sample.label)

    def test_gives_back_what_was_drawn(self, tmp_path: Path) -> None:
        sample(tmp_path / "drawn", size=(96, 64), num_train=1, num_test=2)
        strip, mask = draw(np.random.default_rng((0, 2, 0)), (96, 64), "bright_spots")
        (made,) = (s for s in datasets.strips(tmp_path / "drawn", "test") if s.label)
        assert made.mask_path is not None
        assert (planes.read(made.path) == strip).all()
        assert (images.read_mask(made.mask_path) == mask).all()

    def test_is_the_same_for_the_same_seed(self, tmp_path: Path) -> None:
        for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
            sample(tmp_path / folder, seed=seed, size=(64, 64), num_train=2, num_test=2)
        strips = [(tmp_path / f / "train/good/001.png").read_bytes() for f in "abc"]
        assert strips[0] == strips[1] != strips[2]

    def test_keeps_its_first_strips_when_it_grows(self, tmp_path: Path) -> None:
        for folder, num in (("a", 1), ("b", 3)):
            sample(tmp_path / folder, size=(64, 64), num_train=num, num_test=2)
        first = [(tmp_path / f / "train/good/000.png").read_bytes() for f in "ab"]
        assert first[0] == first[1]

    def test_is_not_drawn_over_something_else(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").write_text("years of work")
        with pytest.raises(RunError, match="not empty"):
            sample(tmp_path)


class TestAStrip:
    @pytest.mark.parametrize("defect", DEFECTS)
    @pytest.mark.parametrize("seed", range(4))
    def test_shows_its_defects_in_the_target_alone(self, defect: str, seed: int) -> None:
        strip, mask = draw(np.random.default_rng(seed), (120, 90), defect, distractors=0)
        assert strip.dtype == mask.dtype == np.uint8
        assert strip.shape == (120, 90, 3)
        marked = mask > 0
        assert 9 <= marked.sum() <= 45
        change = strip[..., 0].astype(int) - strip[..., 1:].mean(axis=2)
        level = np.median(change)
        # spots of 55 to 90 at the peak, captures that differ by a few and, at edges, by some more
        assert DEFECTS[defect] * (change[marked] - level).mean() > 15
        assert abs(change[~marked].mean() - level) < 3

    def test_without_defects_has_an_empty_mask(self) -> None:
        assert not draw(np.random.default_rng(0), (120, 90))[1].any()

    def test_has_distractors_that_a_reference_shows(self) -> None:
        with_, without = (
            draw(np.random.default_rng(0), (300, 200), distractors=num)[0].astype(int)
            for num in (12, 0)
        )
        # the surface and its captures are drawn first: beside spots only noise is another
        spots = np.abs(with_ - without) > 40
        near = cv2.dilate(spots[..., 1:].any(axis=2).astype(np.uint8), np.ones((5, 5))) > 0
        assert near.any()
        assert near[spots[..., 0]].all()

    def test_is_stripes_or_a_grid(self) -> None:
        spectra = []
        for seed in range(8):
            target = draw(np.random.default_rng(seed), (128, 128), distractors=0)[0][..., 0]
            power = np.abs(np.fft.rfft2(target - target.mean())) ** 2
            spectra.append(power.max() / power.sum())
        # a period carries a good part of what is seen
        assert min(spectra) > 0.1

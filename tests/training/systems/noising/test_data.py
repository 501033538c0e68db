from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engineworks.runtime import images
from engineworks.runtime.datasets import MvtecSample, mvtec
from engineworks.runtime.preprocess import PreprocessSpec
from engineworks.runtime.tensors import Array
from engineworks.training.systems.noising.config import AugmentConfig
from engineworks.training.systems.noising.data import Augmented, Patches, augment
from engineworks.training.systems.noising.sample import sample

pytestmark = pytest.mark.train


def picture(seed: int = 0, height: int = 12, width: int = 17) -> Array:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


class TestAnAugmentedPicture:
    @settings(deadline=None, max_examples=40)
    @given(
        flip=st.booleans(),
        rotation=st.floats(0, 180),
        brightness=st.floats(0, 0.99),
        height=st.integers(2, 20),
        width=st.integers(2, 20),
        seed=st.integers(0, 99),
    )
    def test_is_a_picture_of_the_same_size(
        self, flip: bool, rotation: float, brightness: float, height: int, width: int, seed: int
    ) -> None:
        config = AugmentConfig(flip=flip, rotation=rotation, brightness=brightness)
        before = picture(seed, height, width)
        kept = before.copy()
        changed = augment(before, config, np.random.default_rng(seed))
        assert changed.shape == before.shape and changed.dtype == np.uint8
        assert changed.flags.c_contiguous
        assert np.array_equal(before, kept)

    def test_is_unchanged_where_nothing_is_asked_for(self) -> None:
        assert np.array_equal(
            augment(picture(), AugmentConfig(), np.random.default_rng(0)), picture()
        )

    def test_is_mirrored_in_all_four_ways(self) -> None:
        image = picture()
        ways = [image, image[::-1], image[:, ::-1], image[::-1, ::-1]]
        seen = set()
        for seed in range(40):
            got = augment(image, AugmentConfig(flip=True), np.random.default_rng(seed))
            (way,) = (i for i, want in enumerate(ways) if np.array_equal(got, want))
            seen.add(way)
        assert seen == {0, 1, 2, 3}

    def test_is_brighter_by_a_factor(self) -> None:
        image = picture()
        rng = np.random.default_rng(3)
        got = augment(image, AugmentConfig(brightness=0.5), rng)
        factor = np.random.default_rng(3).uniform(0.5, 1.5)
        want = np.clip(image * factor, 0, 255)
        # rounded to whole values
        assert np.abs(got - want).max() <= 0.5 + 1e-4

    def test_turns_about_its_middle(self) -> None:
        image = np.zeros((21, 21, 3), np.uint8)
        image[10, 10] = 255
        for seed in range(5):
            turned = augment(image, AugmentConfig(rotation=180), np.random.default_rng(seed))
            assert turned[10, 10, 0] > 200  # interpolated at most a little
            assert int(turned[..., 0].astype(int).sum()) < 3 * 255


class TestBatches:
    def test_of_patches_come_from_the_images_that_are_named(self) -> None:
        features = np.broadcast_to(np.arange(6, dtype=np.float32)[:, None, None], (6, 9, 2))
        batches = Patches(features, np.array([1, 4]), steps=3, patches=50)
        assert len(batches) == 3
        rows = batches.get(0, np.random.default_rng(0))["rows"]
        assert rows.shape == (50, 2) and rows.dtype == np.float32
        assert set(np.unique(rows)) == {1.0, 4.0}

    def test_of_pictures_are_changed_anew(self, tmp_path: Path) -> None:
        sample(tmp_path / "drawn", size=48, num_train=2, num_test=2)
        samples: list[MvtecSample] = mvtec(tmp_path / "drawn", "train")
        spec = PreprocessSpec(size=(32, 32))
        batches = Augmented(samples, spec, AugmentConfig(flip=True), steps=2, batch_size=4)
        first, second = (batches.get(0, np.random.default_rng(s))["images"] for s in (0, 1))
        assert first.shape == (4, 3, 32, 32)
        assert not np.array_equal(first, second)
        assert images.read(samples[0].path).shape == (48, 48, 3)

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engineworks.runtime import planes
from engineworks.runtime.errors import ConfigError, DatasetError, InputError
from engineworks.runtime.tensors import Array
from engineworks.training.config import TrainConfig
from engineworks.training.data import loader
from engineworks.training.systems.stripe.config import (
    DefectsConfig,
    DisturbanceConfig,
    TaskConfig,
    TilesConfig,
)
from engineworks.training.systems.stripe.data import Strips, Tiles, pack

pytestmark = pytest.mark.train

STILL = DisturbanceConfig(gain=0, offset=0, noise=0, shift=0, spread=0, lines=0, flip=0)
CLEAN = DefectsConfig(clean=1)


def strips(
    folder: Path, *shapes: tuple[int, int], dtype: str = "uint8", high: float = 255
) -> list[Path]:
    """Files of random strips."""
    rng = np.random.default_rng(0)
    paths = []
    for i, shape in enumerate(shapes):
        paths.append(folder / f"{i:03d}.npy")
        planes.write(paths[-1], (rng.random((*shape, 3)) * high).astype(dtype))
    return paths


def packed(folder: Path, *shapes: tuple[int, int], **settings: Any) -> Strips:
    return pack(strips(folder / "data", *shapes, **settings), folder / "packed", "0" * 64)


def config(**changes: Any) -> TaskConfig:
    return TaskConfig(tiles=TilesConfig(size=32, jitter=0)).model_copy(update=changes)


class TestPackedStrips:
    @pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
    def test_are_the_files_values_plane_by_plane(self, tmp_path: Path, dtype: str) -> None:
        paths = strips(tmp_path / "data", (40, 50), (60, 45), dtype=dtype)
        made = pack(paths, tmp_path / "packed", "0" * 64)
        assert len(made) == 2
        assert made.dtype == dtype
        assert made.num_bytes == 3 * (40 * 50 + 60 * 45) * made.dtype.itemsize
        for path, strip_CHW in zip(paths, (made[0], made[1]), strict=True):
            assert (strip_CHW == planes.read(path).transpose(2, 0, 1)).all()

    def test_say_their_extremes(self, tmp_path: Path) -> None:
        paths = strips(tmp_path, (40, 50), (40, 50))
        values = np.stack([planes.read(path) for path in paths])
        made = pack(paths, tmp_path / "packed", "0" * 64)
        assert (made.lowest, made.highest) == (values.min(), values.max())

    def test_are_packed_once(self, tmp_path: Path) -> None:
        paths = strips(tmp_path / "data", (40, 50))
        first = pack(paths, tmp_path / "packed", "0" * 64)
        paths[0].unlink()  # not to be read again
        again = pack(paths, tmp_path / "packed", "0" * 64)
        assert (again[0] == first[0]).all()

    def test_of_other_content_lie_in_another_file(self, tmp_path: Path) -> None:
        paths = strips(tmp_path / "data", (40, 50), (40, 50))
        one = pack(paths[:1], tmp_path / "packed", "1" * 64)
        other = pack(paths, tmp_path / "packed", "2" * 64)
        assert (len(one), len(other)) == (1, 2)

    def test_of_a_stop_half_way_are_not_taken_for_whole(self, tmp_path: Path) -> None:
        paths = [*strips(tmp_path / "data", (40, 50)), tmp_path / "gone.npy"]
        with pytest.raises(InputError, match=r"gone\.npy"):
            pack(paths, tmp_path / "packed", "0" * 64)
        assert not list((tmp_path / "packed").iterdir())

    def test_that_lost_their_end_are_refused(self, tmp_path: Path) -> None:
        made = packed(tmp_path, (40, 50))
        os.truncate(made.path, 100)
        with pytest.raises(DatasetError, match="damaged"):
            Strips(made.path)

    def test_of_two_types_are_refused(self, tmp_path: Path) -> None:
        paths = strips(tmp_path / "a", (40, 50)) + strips(tmp_path / "b", (40, 50), dtype="uint16")
        with pytest.raises(DatasetError, match="uint8 and of uint16"):
            pack(paths, tmp_path / "packed", "0" * 64)

    def test_that_are_not_numbers_are_refused(self, tmp_path: Path) -> None:
        np.save(tmp_path / "bad.npy", np.full((40, 50, 3), np.nan, np.float32))
        with pytest.raises(InputError, match="not finite"):
            pack([tmp_path / "bad.npy"], tmp_path / "packed", "0" * 64)

    def test_are_shared_and_never_copied_into_a_process(self, tmp_path: Path) -> None:
        made = packed(tmp_path, (400, 500))
        rebuild, arguments = made.__reduce__()  # what a spawned process is sent
        assert arguments == (made.path,)
        assert (rebuild(*arguments)[0] == made[0]).all()
        with pytest.raises(ValueError, match="read-only"):
            made[0][0, 0, 0] = 1


class TestTiles:
    @settings(deadline=None, max_examples=30)
    @given(
        shapes=st.lists(
            st.tuples(st.integers(32, 140), st.integers(32, 140)), min_size=1, max_size=4
        )
    )
    def test_cover_every_pixel_of_every_strip(
        self, shapes: list[tuple[int, int]], tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        tiles = Tiles(packed(tmp_path_factory.mktemp("strips"), *shapes), config())
        seen = [np.zeros(shape, int) for shape in shapes]
        places = [tiles.place(index) for index in range(len(tiles))]
        for strip, top, left in places:
            seen[strip][top : top + 32, left : left + 32] += 1
            assert top + 32 <= shapes[strip][0]
            assert left + 32 <= shapes[strip][1]
        assert all(counts.all() for counts in seen)
        assert places == sorted(set(places))

    def test_that_are_left_alone_are_the_strip(self, tmp_path: Path) -> None:
        strips_ = packed(tmp_path, (50, 70))
        tiles = Tiles(strips_, config(defects=CLEAN, disturbances=STILL))
        for index in range(len(tiles)):
            strip, top, left = tiles.place(index)
            item = tiles.get(index, np.random.default_rng(0))
            assert (item["planes"] == strips_[strip][:, top : top + 32, left : left + 32]).all()
            assert not item["mask"].any()

    def test_visit_other_places_with_jitter(self, tmp_path: Path) -> None:
        strips_ = packed(tmp_path, (64, 64))
        tiles = Tiles(
            strips_,
            config(tiles=TilesConfig(size=32, jitter=9), defects=CLEAN, disturbances=STILL),
        )
        windows = np.lib.stride_tricks.sliding_window_view(strips_[0], (32, 32), axis=(1, 2))
        places = set()
        for seed in range(60):
            planes_CHW = tiles.get(0, np.random.default_rng(seed))["planes"]
            (found,) = np.argwhere((windows.transpose(1, 2, 0, 3, 4) == planes_CHW).all((2, 3, 4)))
            places.add(tuple(found.tolist()))
        assert len(places) > 20
        assert {max(axis) for axis in zip(*places, strict=True)} == {9}
        assert {min(axis) for axis in zip(*places, strict=True)} == {0}  # not beyond the border

    def test_are_mirrored_with_their_mask(self, tmp_path: Path) -> None:
        strips_ = packed(tmp_path, (32, 32))
        flips = STILL.model_copy(update={"flip": 0.5})
        tiles = Tiles(strips_, config(defects=CLEAN, disturbances=flips))
        strip = strips_[0]
        ways = [strip, strip[:, ::-1], strip[:, :, ::-1], strip[:, ::-1, ::-1]]
        seen = [0] * 4
        for seed in range(40):
            planes_CHW = tiles.get(0, np.random.default_rng(seed))["planes"]
            seen[[bool((planes_CHW == way).all()) for way in ways].index(True)] += 1
        assert min(seen) > 0

    @pytest.mark.parametrize(
        ("dtype", "high"), [("uint8", 255), ("uint16", 4095), ("float32", 1.0)]
    )
    def test_stay_in_the_sensors_type_and_range(
        self, tmp_path: Path, dtype: str, high: float
    ) -> None:
        strips_ = packed(tmp_path, (64, 64), dtype=dtype, high=high)
        tiles = Tiles(strips_, config(value_range=(0.0, float(high))))
        items = [tiles.get(0, np.random.default_rng(seed)) for seed in range(20)]
        values = np.stack([item["planes"] for item in items])
        assert values.dtype == dtype
        assert values.min() == 0
        assert values.max() == np.asarray(high, dtype)
        assert items[0]["mask"].shape == (1, 32, 32)
        assert items[0]["mask"].dtype == bool

    def test_are_rounded_not_truncated(self, tmp_path: Path) -> None:
        strips_ = packed(tmp_path, (64, 64))
        brighter = DisturbanceConfig(
            gain=0, offset=0.03, noise=0, shift=0, spread=0, lines=0, flip=0
        )
        tiles = Tiles(strips_, config(defects=CLEAN, disturbances=brighter))
        before = strips_[0][:, :32, :32].astype(float)
        for seed in range(10):
            change = tiles.get(0, np.random.default_rng(seed))["planes"] - before
            inside = (before > 10) & (before < 245)
            # the same whole number everywhere in a plane, where truncation gave two for darker ones
            assert all(np.ptp(plane[keep]) == 0 for plane, keep in zip(change, inside, strict=True))

    def test_show_in_the_target_what_their_mask_marks(self, tmp_path: Path) -> None:
        defects = DefectsConfig(clean=0, absent=0, num=(2, 3))
        strips_ = packed(tmp_path, (64, 64), dtype="float32")
        # a range that clips nothing
        settings = config(defects=defects, disturbances=STILL, value_range=(-1000.0, 1255.0))
        tiles = Tiles(strips_, settings)
        for seed in range(30):
            item = tiles.get(0, np.random.default_rng(seed))
            changed = item["planes"] != strips_[0][:, :32, :32]
            mask = item["mask"][0]
            assert mask.any()
            assert not changed[1:, mask].any()
            assert changed[0, mask].all()
            shared = changed[0] & ~mask
            assert (changed[1] | changed[2])[shared].all()

    def test_outside_of_the_value_range_are_refused(self, tmp_path: Path) -> None:
        strips_ = packed(tmp_path, (64, 64), dtype="uint16", high=4095)
        with pytest.raises(ConfigError, match=r"outside of value_range \(0 to 255\)"):
            Tiles(strips_, config())

    def test_larger_than_a_strip_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(DatasetError, match="64 x 31"):
            Tiles(packed(tmp_path, (64, 31)), config())

    def test_repeat_within_an_epoch(self, tmp_path: Path) -> None:
        strips_ = packed(tmp_path, (64, 64))
        once, thrice = (
            Tiles(strips_, config(tiles=TilesConfig(size=32, repeat=n, jitter=0))) for n in (1, 3)
        )
        assert len(thrice) == 3 * len(once)
        assert thrice.place(len(once) + 1) == once.place(1)


class TestAnEpoch:
    def batches(self, tiles: Tiles, workers: int, epoch: int = 0) -> list[Array]:
        settings = TrainConfig(batch_size=4, workers=workers, seed=3)
        made = loader(tiles, settings, shuffle=True)
        made.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        found = [np.concatenate([b["planes"], b["mask"]], axis=1) for b in made]
        assert all(isinstance(b["planes"], torch.Tensor) for b in made)
        return found

    def test_is_the_same_for_any_number_of_workers(self, tmp_path: Path) -> None:
        tiles = Tiles(packed(tmp_path, (80, 64)), config())
        none, two = self.batches(tiles, 0), self.batches(tiles, 2)
        assert all((a == b).all() for a, b in zip(none, two, strict=True))

    def test_differs_from_the_next(self, tmp_path: Path) -> None:
        tiles = Tiles(packed(tmp_path, (80, 64)), config())
        first, second = self.batches(tiles, 0), self.batches(tiles, 0, epoch=1)
        assert not any((a == b).all() for a, b in zip(first, second, strict=True))

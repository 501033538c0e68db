from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from engineworks.runtime.errors import RunError
from engineworks.training.drawing import SCALE, camera, check_empty, light, noise, write_ride


class TestNoise:
    @pytest.mark.parametrize("sigma", [1.0, 3.0, 12.0])
    def test_has_mean_0_and_deviation_1_and_is_as_smooth_as_asked(
        self, sigma: float, rng: np.random.Generator
    ) -> None:
        field = noise(rng, 150, 200, sigma)
        assert field.shape == (150, 200)
        assert abs(field.mean()) < 1e-4  # float32
        assert abs(field.std() - 1) < 1e-4
        far = round(4 * sigma)
        near = np.mean(field[:, 1:] * field[:, :-1])
        apart = np.mean(field[:, far:] * field[:, :-far])
        assert near > 0.5  # a pixel is like its neighbour
        assert abs(apart) < 0.5  # four correlation lengths away it is another one


def test_light_without_any_reach_changes_nothing(rng: np.random.Generator) -> None:
    canvas = rng.uniform(0, 255, (6, 8, 3))
    assert (light(rng, canvas, gain=0, slope=0, warmth=0) == canvas).all()


def test_light_changes_no_more_than_its_reach(rng: np.random.Generator) -> None:
    canvas = np.full((40, 60, 3), 100.0)
    for _ in range(20):
        lit = light(rng, canvas, gain=0.1, slope=0.2, warmth=0.05)
        # the corner is sqrt(2) times as far from the middle as an edge
        assert lit.max() <= 100 * 1.1 * (1 + 0.2 * np.sqrt(2)) * 1.05
        assert lit.min() >= 100 * 0.9 * (1 - 0.2 * np.sqrt(2)) * 0.95


def test_the_camera_averages_and_adds_noise(rng: np.random.Generator) -> None:
    canvas = np.zeros((100 * SCALE, 80 * SCALE, 3))
    canvas[::2] = 200
    picture = camera(rng, canvas)
    assert picture.shape == (100, 80, 3)
    assert picture.dtype == np.uint8
    assert abs(picture.mean() - 100) < 0.1  # 24,000 values with a deviation of 1.8
    assert 1.5 < picture.std() < 2.1


def test_a_ride_stops_at_every_station(tmp_path: Path, rng: np.random.Generator) -> None:
    greys = [40, 120, 200]
    stations = [np.full((33, 33, 3), grey, np.uint8) for grey in greys]
    num = write_ride(tmp_path / "video.mp4", rng, stations)
    with av.open(str(tmp_path / "video.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == num == 10 + 2 * (6 + 10)
    assert {frame.shape for frame in frames} == {(32, 32, 3)}  # an odd row and column are cut
    means = np.array([frame.mean() for frame in frames])
    # noise of 1.2 and the codec move a mean by less than two levels
    assert np.abs(means[[0, 9, 16, 25, 32, 41]] - np.repeat(greys, 2)).max() < 2
    assert (np.diff(means) > -2).all()


def test_nothing_is_drawn_over(tmp_path: Path) -> None:
    check_empty(tmp_path)
    check_empty(tmp_path / "new")
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match="not empty"):
        check_empty(tmp_path)

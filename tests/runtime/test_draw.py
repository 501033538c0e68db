from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime import draw
from runtime.tensors import Array


def grey(height: int, width: int, level: int = 120) -> Array:
    return np.full((height, width, 3), level, np.uint8)


class TestHeatmap:
    def test_runs_from_blue_over_green_to_red(self) -> None:
        colours = draw.heatmap(np.linspace(0, 1, 9, dtype=np.float32)[None], 0, 1)[0]

        red, green, blue = colours.astype(int).T
        assert blue[2] > red[2]
        assert green[4] == max(red[4], green[4], blue[4])
        assert red[7] > blue[7]

    def test_clips_below_low_and_above_high(self) -> None:
        colours = draw.heatmap(np.array([[-9.0, 1.0, 3.0, 99.0]], np.float32), 1, 3)[0]

        assert np.array_equal(colours[0], colours[1])
        assert np.array_equal(colours[2], colours[3])
        assert not np.array_equal(colours[1], colours[2])

    def test_of_a_flat_scale_is_no_division_by_zero(self) -> None:
        assert draw.heatmap(np.zeros((2, 3), np.float32), 0, 0).shape == (2, 3, 3)


class TestBlend:
    @pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
    def test_weighs_the_two(self, alpha: float) -> None:
        mixed = draw.blend(grey(4, 5, 100), grey(4, 5, 200), alpha)

        assert np.array_equal(mixed, grey(4, 5, round(100 + 100 * alpha)))


class TestContour:
    def mask(self, size: int = 64) -> Array:
        mask = np.zeros((size, size), bool)
        mask[size // 4 : 3 * size // 4, size // 4 : 3 * size // 4] = True
        return mask

    def test_marks_the_border_and_neither_inside_nor_outside(self) -> None:
        drawn = draw.contour(grey(64, 64), self.mask())

        assert tuple(drawn[16, 32]) == draw.MARK
        assert tuple(drawn[32, 32]) == tuple(drawn[4, 4]) == (120, 120, 120)

    def test_marks_holes_as_well(self) -> None:
        mask = self.mask()
        mask[26:38, 26:38] = False

        drawn = draw.contour(grey(64, 64), mask)

        assert tuple(drawn[25, 32]) == draw.MARK
        assert tuple(drawn[32, 32]) == (120, 120, 120)

    def test_leaves_its_input_alone(self) -> None:
        image = grey(64, 64)
        image.flags.writeable = False

        draw.contour(image[:, ::-1], self.mask())

        assert np.array_equal(image, grey(64, 64))

    def test_is_thicker_on_a_larger_picture(self) -> None:
        marked = [
            int((draw.contour(grey(s, s), self.mask(s))[s // 2] == draw.MARK).all(-1).sum())
            for s in (64, 1024)
        ]

        assert marked[1] >= 3 * marked[0]

    def test_of_an_empty_mask_is_the_picture(self) -> None:
        assert np.array_equal(draw.contour(grey(9, 9), np.zeros((9, 9), bool)), grey(9, 9))


class TestPanel:
    @settings(max_examples=30, deadline=None)
    @given(st.integers(100, 3000), st.integers(100, 3000), st.integers(1, 3))
    def test_has_a_size_that_people_and_players_can_use(
        self, height: int, width: int, num: int
    ) -> None:
        made = draw.panel([("title", grey(height, width))] * num)

        bar = int(np.clip(made.shape[0] / 11, 22, 56))
        assert made.dtype == np.uint8
        assert made.shape[0] <= 1280 + bar + 1
        # 15: half a row that the height is rounded by, times the largest ratio of the sides
        assert made.shape[1] <= num * (1280 + 15 + 4)
        if max(height, width) <= 1280 and 3 * min(height, width) > max(height, width):
            assert made.shape[0] >= 192

    def test_shows_small_pixels_as_squares(self) -> None:
        image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)

        made = draw.panel([("", image)])

        assert np.array_equal(made[-192:], np.kron(image, np.ones((6, 6, 1), np.uint8)))

    def test_gives_all_the_height_of_the_first(self) -> None:
        made = draw.panel([("a", grey(200, 300)), ("b", grey(400, 200, 50))])

        assert made.shape[1] == 300 + 4 + 100
        assert np.array_equal(made[-200:, -100:], grey(200, 100, 50))

    def test_has_titles_of_one_size(self) -> None:
        tall = grey(480, 120)

        made = draw.panel([("I", tall), ("I    and much more", tall)])

        bar = made[: made.shape[0] - 480].max(axis=-1) > 128
        first, second = bar[:, :12], bar[:, 124:136]
        assert first.any()
        assert np.array_equal(first, second)

    @pytest.mark.parametrize("size", [24, 256, 2000])
    def test_has_titles_that_can_be_seen_and_end_before_the_edge(self, size: int) -> None:
        title = "anomalous (border 12.34)"

        made = draw.panel([(title, grey(size, size)), ("", grey(size, size))])
        blank = draw.panel([("", grey(size, size)), ("", grey(size, size))])

        rows, columns = np.nonzero((made != blank).any(-1))
        width = (made.shape[1] - 4) // 2
        bar = made.shape[0] - width
        assert rows.max() < bar
        assert columns.max() < width
        assert rows.max() - rows.min() >= 8  # pixels: about the smallest print that can be read

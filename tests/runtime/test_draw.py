from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engineworks.runtime import draw
from engineworks.runtime.tensors import Array


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


TOP = (("rye", 0.75), ("wheat", 0.25), ("a cultivar with a rather long name", 0.0))


class TestRanking:
    def bars(self, made: Array, length: int) -> list[int]:
        """Lengths of the filled bars, from above, in the chart's last columns."""
        full = (made[:, -length:] == (50, 125, 215)).all(-1)
        rows = full.any(axis=1)
        starts = np.flatnonzero(rows & ~np.roll(rows, 1))
        return [int(full[start].sum()) for start in starts]

    @pytest.mark.parametrize(
        ("height", "width"), [(24, 24), (200, 300), (2000, 1500), (10, 900), (900, 10)]
    )
    def test_has_bars_as_long_as_their_values_beside_a_picture_of_any_size(
        self, height: int, width: int
    ) -> None:
        made = draw.ranking(grey(height, width), "rye", TOP)

        long, short = self.bars(made, 700)
        assert long >= 0.75 * (256 - 8) - 1  # of the narrowest chart
        assert long == pytest.approx(3 * short, abs=3)
        assert made.shape[0] <= 1280 + 57
        assert (made == 120).all(-1).any(), "the picture is there"

    @pytest.mark.parametrize("size", [(24, 24), (10, 900), (2000, 1500)])
    def test_has_labels_that_can_be_read(self, size: tuple[int, int]) -> None:
        made = draw.ranking(grey(*size), "", [("HHH", 0.0)] * 5)
        blank = draw.ranking(grey(*size), "", [("", 0.0)] * 5)

        rows = (made != blank).any(axis=(1, 2))
        starts = np.flatnonzero(rows & ~np.roll(rows, 1))
        ends = np.flatnonzero(~rows & np.roll(rows, 1))
        assert len(starts) == 5
        # pixels: about the smallest print that can be read
        assert (ends - starts).min() >= 8

    def test_shows_the_picture_as_it_is(self) -> None:
        image = np.random.default_rng(0).integers(0, 256, (200, 250, 3), dtype=np.uint8)

        made = draw.ranking(image, "rye", TOP)

        assert np.array_equal(made[-200:, :250], image)


class TestGrid:
    @settings(max_examples=15, deadline=None)
    @given(st.lists(st.tuples(st.integers(1, 640), st.integers(1, 640)), min_size=1, max_size=20))
    def test_is_bounded_and_has_every_picture_whole(self, sizes: list[tuple[int, int]]) -> None:
        # each of its own colour: averaging leaves a flat picture as it is
        pictures = [
            np.full((h, w, 3), (i + 60, 200, 90), np.uint8) for i, (h, w) in enumerate(sizes)
        ]

        sheet = draw.grid(pictures)

        # 20 pictures: rounding adds at most half a pixel to each, and there are 4 between them
        assert max(sheet.shape[:2]) <= 2560 + 20 * 4.5
        for i, (height, width) in enumerate(sizes):
            rows, columns = np.nonzero(sheet[..., 0] == i + 60)
            tall, wide = np.ptp(rows) + 1, np.ptp(columns) + 1
            assert len(rows) == tall * wide, "it is one rectangle, covered by no other"
            # both sides are rounded to half a pixel, and never to nothing
            assert abs(tall * width - wide * height) <= max(width, height)

    def test_goes_by_rows(self) -> None:
        sheet = draw.grid([grey(20, 30, level) for level in (10, 20, 30, 40, 50)])

        # 2 columns of 30 are less long than 3; 3 rows of 20
        assert sheet.shape == (3 * 20 + 2 * 4, 2 * 30 + 4, 3)
        centres = [int(sheet[10 + 24 * r, 15 + 34 * c, 0]) for r in range(3) for c in range(2)]
        assert centres == [10, 20, 30, 40, 50, 24]

    def test_reduces_large_pictures_alike(self) -> None:
        sheet = draw.grid([grey(1000, 1000), grey(500, 1000, 50)] * 8)

        assert sheet.shape[:2] == (4 * 640 + 12, 4 * 640 + 12)
        assert (sheet[:640, :640] == 120).all()
        assert (sheet[160:480, 644:1284] == 50).all()


class TestThumbnail:
    @given(st.integers(1, 900), st.integers(1, 900))
    @settings(max_examples=30, deadline=None)
    def test_has_the_same_shape_and_no_longer_side(self, height: int, width: int) -> None:
        made = draw.thumbnail(grey(height, width), 100)

        scale = min(1, 100 / max(height, width))
        assert made.shape == (max(1, round(height * scale)), max(1, round(width * scale)), 3)


class TestConfusionMatrix:
    def counts(self, num: int) -> Array:
        counts = np.diag(np.full(num, 3))
        counts[0, 1] = 1
        return counts

    @pytest.mark.parametrize("num", [17, 80, 300, 1000])
    def test_is_bounded_and_has_a_cell_per_pair(self, num: int) -> None:
        made = draw.confusion_matrix(self.counts(num), [f"class {i}" for i in range(num)])

        assert 200 < max(made.shape[:2]) <= 1280 + 57 + 240
        blue = (made == (50, 125, 215)).all(-1)
        red = (made == (154, 46, 46)).all(-1)  # half way: the root of a quarter
        assert red.any()
        # the diagonal falls from the second class on
        rows, columns = np.nonzero(blue)
        assert np.corrcoef(rows, columns)[0, 1] > 0.99
        assert np.nonzero(red)[0].max() < rows.min()
        assert np.nonzero(red)[1].min() == columns.min()

    def test_names_rows_and_columns_where_there_is_room(self) -> None:
        labels = [f"class {i}" for i in range(40)]

        named = draw.confusion_matrix(self.counts(40), labels)
        blank = draw.confusion_matrix(self.counts(40), [" " * len(label) for label in labels])

        assert named.shape[0] > 40 * 32
        assert blank.shape[0] >= 40 * 32
        bare = draw.confusion_matrix(self.counts(300), [f"class {i}" for i in range(300)])
        assert bare.shape[1] == 300 * 4

    def test_of_a_class_that_does_not_occur_has_an_empty_row(self) -> None:
        made = draw.confusion_matrix(np.zeros((3, 3), int), ["a", "b", "c"])

        assert not (made == draw.MARK).all(-1).any()


class TestRings:
    def test_surround_their_places_and_leave_the_image(self) -> None:
        image = grey(60, 80)

        drawn = draw.rings(image, [(20, 30), (60, 10)], 8)

        assert (image == 120).all()
        changed = (drawn != image).any(axis=2)
        rows, columns = np.nonzero(changed)
        for x, y in ((20, 30), (60, 10)):
            near = np.hypot(rows - y, columns - x) < 12
            # the line is a pixel wide, its soft edges one more
            assert np.abs(np.hypot(rows - y, columns - x)[near] - 8).max() < 2
            assert near.sum() > 30

    def test_of_no_places_change_nothing(self) -> None:
        assert (draw.rings(grey(9, 9), [], 8) == grey(9, 9)).all()


def test_a_difference_is_medium_grey_at_zero_and_keeps_its_sign() -> None:
    levels = draw.difference(np.array([[-9, -2, 0, 2, 9]], np.float32), 4.0)

    assert levels.shape == (1, 5, 3)
    # 255 / 2 rounds to the even 128
    assert levels[0, :, 0].tolist() == [0, 64, 128, 191, 255]


class TestBoxes:
    def test_stand_where_their_corners_are_and_leave_the_image(self) -> None:
        image = grey(200, 300)
        box = draw.Box((40.0, 60.0, 140.0, 160.0), "cup", "cup 0.91")

        drawn = draw.boxes(image, [box])

        assert (image == 120).all()
        colour = draw.colour_of("cup")
        for y, x in ((60, 90), (159, 90), (110, 40), (110, 139)):  # the middle of each side
            assert tuple(drawn[y, x]) == colour
        assert (drawn[70:150, 50:130] == 120).all()  # nothing inside
        changed = (drawn != image).any(axis=2)
        assert not changed[:40].any() and not changed[162:].any()
        assert changed[45:60, 40:100].any()  # the label stands on the box

    @settings(max_examples=60, deadline=None)
    @given(
        st.tuples(st.integers(1, 90), st.integers(1, 90)),
        st.lists(st.tuples(*[st.floats(-200, 300)] * 4), max_size=4),
        st.text(max_size=20),
    )
    def test_of_any_kind_fit_into_images_of_any_size(
        self, size: tuple[int, int], corners: list[tuple[float, float, float, float]], label: str
    ) -> None:
        image = grey(*size)
        drawn = draw.boxes(image, [draw.Box(each, label, label) for each in corners])
        assert drawn.shape == image.shape
        assert drawn.dtype == np.uint8

    def test_have_a_bright_colour_for_each_name_the_same_in_every_process(self) -> None:
        names = [f"object {i}" for i in range(40)]
        colours = [draw.colour_of(name) for name in names]

        assert len(set(colours)) == 40
        assert all(max(colour) >= 200 > min(colour) for colour in colours)
        # CRC-32 is no salted hash: this number holds for ever
        assert draw.colour_of("cup") == (111, 209, 45)

    def test_of_which_the_best_is_drawn_last(self) -> None:
        best, other = (draw.Box((20.0, 30.0, 60.0, 70.0), name, "") for name in ("a", "b"))
        drawn = draw.boxes(grey(100, 100), [best, other])
        assert tuple(drawn[30, 40]) == draw.colour_of("a")

"""Tiles: places, owners, and the way back to one map."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engineworks.runtime.errors import InputError
from engineworks.runtime.tensors import Array
from engineworks.runtime.tiling import boundaries, cut, overlapping, positions, stitch

TILE = 128


def owners(height: int, width: int, rows: tuple[int, ...], columns: tuple[int, ...]) -> Array:
    """Number of the tile that supplies each pixel, from 1."""
    num = len(rows) * len(columns)
    numbers = np.repeat(np.arange(1, num + 1), TILE * TILE).reshape(num, TILE, TILE)
    found = stitch(numbers, rows, columns)
    assert found.shape == (height, width)
    return found


class TestPositions:
    @given(
        length=st.integers(128, 2000),
        tile=st.sampled_from([32, 100, 128]),
        minimum=st.integers(1, 12),
    )
    def test_cover_the_axis_evenly_and_reach_both_ends(
        self, length: int, tile: int, minimum: int
    ) -> None:
        starts = positions(length, tile, minimum)
        assert starts[0] == 0
        assert starts[-1] == length - tile
        steps = np.diff(starts)
        assert all(0 < step <= tile for step in steps)
        assert len(steps) == 0 or steps.max() - steps.min() <= 1
        assert len(starts) >= min(minimum, length - tile + 1) or length == tile

    def test_an_axis_of_one_tile_has_one(self) -> None:
        assert positions(128, 128, 9) == (0,)

    def test_there_are_never_more_tiles_than_places(self) -> None:
        assert positions(130, 128, 9) == (0, 1, 2)

    def test_a_short_axis_is_refused(self) -> None:
        with pytest.raises(InputError, match="100 pixels are less than a tile of 128") as caught:
            positions(100, 128)
        assert caught.value.fix

    @pytest.mark.data
    def test_are_the_published_ones(self, shared: Path) -> None:
        published = json.loads((shared / "fixtures/stripe_positions.json").read_text())
        for key, starts in published.items():
            length, tile, minimum = map(int, key.split(","))
            if starts is None:
                with pytest.raises(InputError):
                    positions(length, tile, minimum)
            else:
                assert positions(length, tile, minimum) == tuple(starts), key


class TestOverlapping:
    @given(length=st.integers(128, 2000), tile=st.integers(16, 128), overlap=st.integers(0, 127))
    def test_neighbours_share_as_much_as_asked_for_with_as_few_tiles_as_can_be(
        self, length: int, tile: int, overlap: int
    ) -> None:
        overlap %= tile
        starts = overlapping(length, tile, overlap)
        assert all(a + tile - b >= overlap for a, b in pairwise(starts))
        # one tile less, and even touching its limit it would not reach the end
        assert (len(starts) - 2) * (tile - overlap) + tile < length or len(starts) == 1

    @pytest.mark.parametrize("overlap", [-1, 128])
    def test_an_overlap_that_is_none_is_refused(self, overlap: int) -> None:
        with pytest.raises(InputError, match="cannot overlap"):
            overlapping(500, 128, overlap)


class TestStitch:
    @given(height=st.integers(128, 2000), width=st.integers(128, 700), down=st.integers(1, 9))
    def test_every_pixel_is_written_exactly_once_for_every_size(
        self, height: int, width: int, down: int
    ) -> None:
        for length, starts in (
            (height, positions(height, TILE, down)),
            (width, positions(width, TILE)),
        ):
            written = np.zeros(length, int)
            borders = boundaries(starts, TILE)
            for start, (low, high) in zip(starts, pairwise(borders), strict=True):
                assert start <= low < high <= start + TILE  # from within the tile
                written[low:high] += 1
            assert (written == 1).all()

    @given(height=st.integers(16, 90), width=st.integers(16, 60), minimum=st.integers(1, 4))
    def test_cutting_and_stitching_gives_the_image_back(
        self, height: int, width: int, minimum: int
    ) -> None:
        image = np.arange(height * width).reshape(height, width)
        rows, columns = positions(height, 16, minimum), positions(width, 12, minimum)
        tiles = np.stack(cut(image, rows, columns, (16, 12)))
        assert (stitch(tiles, rows, columns) == image).all()

    @given(length=st.integers(128, 2000), minimum=st.integers(1, 9))
    def test_a_pixel_belongs_to_the_tile_in_which_it_lies_deepest(
        self, length: int, minimum: int
    ) -> None:
        starts = positions(length, TILE, minimum)
        borders = boundaries(starts, TILE)
        for i, (low, high) in enumerate(pairwise(borders)):
            for pixel in (low, high - 1):
                depth = [
                    min(
                        pixel - s + 1 if s else length,  # the image's own ends are no border
                        s + TILE - pixel if s + TILE < length else length,
                    )
                    for s in starts
                ]
                # a border between two pixels of equal depth may fall on either side
                assert depth[i] >= max(depth) - 1

    def test_planes_are_cut_alike(self) -> None:
        planes = np.arange(3 * 20 * 20).reshape(3, 20, 20)
        tiles = cut(planes, (0, 4), (0, 4), (16, 16))
        assert len(tiles) == 4
        assert (tiles[1] == planes[:, :16, 4:]).all()

    @pytest.mark.data
    def test_owners_on_the_published_strip_are_the_published_ones(self, shared: Path) -> None:
        published = np.load(shared / "fixtures/stripe_tile_owner.npz")
        found = owners(976, 176, positions(976, TILE, 9), positions(176, TILE, 2))
        assert (found == published["v1_976x176"]).all()

    @pytest.mark.data
    @pytest.mark.parametrize(
        ("key", "gap"),
        [("head_602x176", 352), ("v1_602x176", 1552), ("v1_384x384", 4572)],
    )
    def test_published_gaps_are_not_reproduced(self, shared: Path, key: str, gap: int) -> None:
        published = np.load(shared / "fixtures/stripe_tile_owner.npz")[key]
        assert (published == 0).sum() == gap
        height, width = published.shape
        found = owners(height, width, positions(height, TILE), positions(width, TILE))
        assert (found > 0).all()

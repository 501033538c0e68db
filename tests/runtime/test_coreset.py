from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engineworks.runtime import coreset
from engineworks.runtime.coreset import greedy_k_centre, projection
from engineworks.runtime.errors import BankError
from engineworks.runtime.tensors import Array


def plain(
    rows: Array,
    num: int,
    *,
    first: int | None = None,
    centres: Array | None = None,
    min_radius: float = 0.0,
) -> tuple[list[int], list[float], float]:
    """The greedy rule, one pick at a time, in float64 from differences."""
    rows = np.asarray(rows, np.float64)
    picked: list[int] = []
    radii: list[float] = []
    nearest = np.full(len(rows), np.inf)
    for centre in () if centres is None else np.asarray(centres, np.float64):
        nearest = np.minimum(nearest, np.sqrt(((rows - centre) ** 2).sum(axis=1)))
    while len(picked) < min(num, len(rows)) and nearest.max() > min_radius:
        best = first if first is not None and not picked else int(nearest.argmax())
        picked.append(best)
        radii.append(float(nearest[best]))
        nearest = np.minimum(nearest, np.sqrt(((rows - rows[best]) ** 2).sum(axis=1)))
    return picked, radii, float(nearest.max())


def normal(count: int, width: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)


def clusters(count: int, width: int) -> Array:
    rng = np.random.default_rng(1)
    centres = 20 * rng.standard_normal((7, width))
    spread = rng.choice([0.1, 1.0], (count, 1))
    noise = spread * rng.standard_normal((count, width))
    return (centres[rng.integers(7, size=count)] + noise).astype(np.float32)


def features(count: int, width: int) -> Array:
    """Like a network's: sparse, far from the origin, of few degrees of freedom."""
    rng = np.random.default_rng(2)
    mixed = rng.standard_normal((count, 6)) @ rng.standard_normal((6, width))
    return np.maximum(mixed + 5 * rng.random(width), 0).astype(np.float32)


def assert_near(got: Array | float, want: list[float] | float, rows: Array) -> None:
    """Squared distances by the product form in float32: a few 1e-7 of the longest |x - mean|²."""
    longest = float(np.square(rows - rows.mean(axis=0)).sum(axis=1).max())
    np.testing.assert_allclose(np.square(got), np.square(want), atol=5e-7 * longest, rtol=1e-6)


@pytest.fixture(params=["one front", "many fronts"])
def fronts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """All rows in the front at once, or fronts and chunks much smaller than the data."""
    if request.param == "many fronts":
        monkeypatch.setattr(coreset, "_FRONT_BYTES", 1)  # the smallest front has 64 rows
        monkeypatch.setattr(coreset, "_CHUNK_BYTES", 4000)
    return str(request.param)


@pytest.mark.usefixtures("fronts")
class TestTheGreedyRule:
    @pytest.mark.parametrize("draw", [normal, clusters, features])
    def test_picks_the_rows_of_the_plain_loop_in_its_order(
        self, draw: Callable[[int, int], Array]
    ) -> None:
        rows = draw(1500, 24)
        got = greedy_k_centre(rows, 120, first=7)
        picked, radii, radius = plain(rows, 120, first=7)
        assert got.indices.tolist() == picked
        assert got.indices.dtype == np.int64 and got.radii.dtype == np.float32
        assert got.radii[0] == np.inf
        assert_near(got.radii[1:], radii[1:], rows)
        assert_near(got.radius, radius, rows)

    def test_the_next_radius_is_the_radius_of_what_was_picked_before(self) -> None:
        rows = normal(800, 8)
        more, fewer = (greedy_k_centre(rows, num, first=0) for num in (51, 50))
        assert_near(fewer.radius, float(more.radii[50]), rows)
        assert np.all(np.diff(more.radii) <= 0)

    def test_goes_on_from_centres_that_are_there_already(self) -> None:
        rows, centres = clusters(900, 12), clusters(40, 12) + 3
        got = greedy_k_centre(rows, 60, centres_MD=centres)
        picked, radii, radius = plain(rows, 60, centres=centres)
        assert got.indices.tolist() == picked
        assert_near(got.radii, radii, rows)
        assert_near(got.radius, radius, rows)

    def test_stops_at_the_radius_that_was_asked_for(self) -> None:
        rows = normal(700, 6)
        got = greedy_k_centre(rows, 700, first=3, min_radius=1.5)
        assert got.indices.tolist() == plain(rows, 700, first=3, min_radius=1.5)[0]
        assert got.radius <= 1.5 < got.radii[-1]

    def test_adds_nothing_where_centres_cover_all(self) -> None:
        rows = normal(300, 6)
        got = greedy_k_centre(rows, 20, centres_MD=rows)
        assert len(got.indices) == len(got.radii) == 0
        assert got.radius == 0

    @pytest.mark.parametrize("width", [3, 64, 700])
    def test_copies_of_a_chosen_row_are_covered_by_it(self, width: int) -> None:
        distinct = 3 * normal(10, width) + 100
        rows = distinct[np.random.default_rng(0).integers(10, size=600)]
        got = greedy_k_centre(rows, 600, first=0)
        assert len(got.indices) == 10
        assert len(np.unique(rows[got.indices], axis=0)) == 10
        assert got.radius == 0

    def test_picks_every_row_when_more_are_asked_for(self) -> None:
        rows = normal(150, 5)
        got = greedy_k_centre(rows, 1000, first=4)
        assert sorted(got.indices) == list(range(150))
        assert got.radius == 0

    def test_reads_rows_from_a_file(self, tmp_path: Path) -> None:
        rows = features(1000, 16)
        np.save(tmp_path / "rows.npy", rows)
        mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
        from_file = greedy_k_centre(mapped, 40, first=1)
        assert isinstance(mapped, np.memmap)
        assert np.array_equal(from_file.indices, greedy_k_centre(rows, 40, first=1).indices)

    def test_a_shift_of_all_rows_changes_nothing(self) -> None:
        # multiples of 1/256 below 2^15 are exact in float32, shifted or not
        rows = np.round(256 * normal(600, 10)) / np.float32(256)
        near, far = (greedy_k_centre(rows + shift, 50, first=0) for shift in (0, 10_000))
        assert np.array_equal(near.indices, far.indices)

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("where", [0, 499])
    def test_a_value_that_is_not_finite_is_refused(self, value: float, where: int) -> None:
        rows = normal(500, 4)
        rows[where, 2] = value
        with pytest.raises(BankError, match="not finite"):
            greedy_k_centre(rows, 5, first=1)


class TestAnySmallSet:
    @given(data=st.data())
    @settings(max_examples=60, deadline=None)
    def test_each_pick_is_a_farthest_row_and_the_radius_covers(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(1, 200), "rows")
        width = data.draw(st.integers(1, 5), "width")
        num = data.draw(st.integers(1, 220), "picks")
        seed = data.draw(st.integers(0, 2**32 - 1), "seed")
        first = data.draw(st.integers(0, count - 1), "first")
        # a coarse grid has many equal distances and copies
        rows = np.random.default_rng(seed).integers(-3, 4, (count, width)).astype(np.float32)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(coreset, "_FRONT_BYTES", 1)
            patch.setattr(coreset, "_CHUNK_BYTES", 400)
            got = greedy_k_centre(rows, num, first=first)

        assert len(got.indices) == min(num, len(np.unique(rows, axis=0)))
        nearest = np.full(count, np.inf)
        for step, pick in enumerate(got.indices):
            if step:
                # equal distances may be told apart by the rounding of |x|² <= 45 in float32
                assert nearest[pick] == pytest.approx(nearest.max(), abs=1e-4)
                assert got.radii[step] == pytest.approx(nearest[pick], abs=1e-4)
            nearest = np.minimum(nearest, np.linalg.norm(rows - rows[pick], axis=1))
        assert got.indices[0] == first
        assert got.radius == pytest.approx(nearest.max(), abs=1e-4)


class TestWhatCannotBeCovered:
    def test_no_rows(self) -> None:
        with pytest.raises(BankError, match=r"\(0, 4\)"):
            greedy_k_centre(np.zeros((0, 4), np.float32), 3, first=0)

    def test_rows_of_another_rank(self) -> None:
        with pytest.raises(BankError, match="shape"):
            greedy_k_centre(np.zeros((2, 3, 4), np.float32), 3, first=0)

    def test_nowhere_to_begin(self) -> None:
        with pytest.raises(BankError, match="first row"):
            greedy_k_centre(normal(10, 4), 3)


class TestProgress:
    def test_counts_up_to_the_picks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(coreset, "_FRONT_BYTES", 1)
        seen: list[tuple[int, int]] = []
        greedy_k_centre(normal(900, 3), 50, first=0, progress=lambda *now: seen.append(now))
        assert seen == sorted(seen) and len(seen) > 1
        assert seen[-1] == (50, 50)


class TestTheProjection:
    def test_keeps_distances_roughly(self) -> None:
        rows = features(60, 512)
        space = projection(512, 128, seed=0)
        assert space.shape == (512, 128) and space.dtype == np.float32
        pairs = np.triu_indices(60, 1)
        before, after = (
            np.linalg.norm(x[:, None] - x[None], axis=2)[pairs] for x in (rows, rows @ space)
        )
        # the ratio's standard deviation is 1 / sqrt(2 * 128) = 0.0625; 1770 pairs stay within 5
        assert np.abs(after / before - 1).max() < 5 * 0.0625

    def test_depends_on_the_seed_alone(self) -> None:
        assert np.array_equal(projection(20, 8, 3), projection(20, 8, 3))
        assert not np.array_equal(projection(20, 8, 3), projection(20, 8, 4))


@pytest.mark.data
class TestThePublishedSelection:
    def test_is_picked_in_the_same_order(self, shared: Path) -> None:
        published = np.load(shared / "fixtures" / "noising_coreset.npz")
        rows, order = published["features"], published["selected_indices"]
        got = greedy_k_centre(rows, len(order), first=int(published["first_index"]))
        assert got.indices.tolist() == order.tolist()

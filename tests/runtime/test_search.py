from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from engineworks.runtime import overflow
from engineworks.runtime import search as search_module
from engineworks.runtime.bank import Bank
from engineworks.runtime.engines import products_overflow
from engineworks.runtime.errors import BankError, EngineError
from engineworks.runtime.search import FastSearch, _highest, _similar_rows_together
from engineworks.runtime.tensors import Array

K = 3  # the smallest bank with bounds then has 8 * 16 * (3 + 2) = 640 rows
WIDTH = 48


def normal(count: int, seed: int) -> Array:
    return np.random.default_rng(seed).standard_normal((count, WIDTH))


def clustered(count: int, seed: int) -> Array:
    which = np.random.default_rng(seed).integers(20, size=count)
    return 10 * normal(20, 99)[which] + 0.3 * normal(count, seed)


def sparse(count: int, seed: int) -> Array:
    """Few degrees of freedom behind a rectifier, like a network's features."""
    factors = np.random.default_rng(seed).standard_normal((count, 6))
    return np.maximum(factors @ normal(6, 98) - 1, 0)


def alike(count: int, seed: int) -> Array:
    """Two values, each in half of the dimensions: every rounding error occurs 24 times."""
    return np.repeat(np.random.default_rng(seed).standard_normal((count, 2)), WIDTH // 2, axis=1)


def one_value(count: int, seed: int) -> Array:
    return np.repeat(np.random.default_rng(seed).standard_normal((count, 1)), WIDTH, axis=1)


def heavy_tailed(count: int, seed: int) -> Array:
    return normal(count, seed) * np.where(np.arange(WIDTH) < 3, 300, 1)


def spiked(count: int, seed: int) -> Array:
    """One huge value per row, anywhere."""
    values = normal(count, seed)
    where = np.random.default_rng(seed).integers(WIDTH, size=count)
    values[np.arange(count), where] *= 300
    return values


def far_from_the_origin(count: int, seed: int) -> Array:
    return normal(count, seed) + 300


def copies(count: int, seed: int) -> Array:
    return normal(count // 4 + 1, 5)[
        np.random.default_rng(seed).integers(count // 4 + 1, size=count)
    ]


DATA = [
    normal,
    clustered,
    sparse,
    alike,
    one_value,
    heavy_tailed,
    spiked,
    far_from_the_origin,
    copies,
]
Draw = Callable[[int, int], Array]


@pytest.fixture(params=["openvino", "ort"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    yield request.param


def rows_of(draw: Draw, count: int, seed: int) -> Array:
    return np.asarray(draw(count, seed), np.float32)


def assert_exact(search: FastSearch, queries: Array) -> None:
    """The answer is that of the flat search; only rows at equal distances may differ."""
    bank = search.bank
    distances, indices = search.search(queries)
    want, _ = bank.search(queries, search.k)
    assert distances.dtype == np.float32 and indices.dtype == np.int64
    # both are measured from the differences; sums in another order differ by a rounding or two
    np.testing.assert_allclose(distances, want, rtol=1e-6)
    # the rows named are at the distances given: equal distances are then the only freedom left
    named = np.linalg.norm(queries[:, None].astype(np.float64) - bank.rows_MD[indices], axis=2)
    np.testing.assert_allclose(named, distances, rtol=1e-5)  # float32 sum of 48 squares
    assert all(len(set(found)) == search.k for found in indices.tolist())


@pytest.mark.parametrize("draw", DATA)
class TestTheAnswer:
    def test_is_that_of_the_flat_search(self, draw: Draw, backend: str) -> None:
        bank = Bank(rows_of(draw, 1531, 0))  # 191 blocks and 3 rows
        with closing(FastSearch(bank, K, backend=backend, threads=1)) as search:
            assert search._engine is not None
            assert_exact(search, rows_of(draw, 200, 1))

    def test_for_the_banks_own_rows_too(self, draw: Draw, backend: str) -> None:
        bank = Bank(rows_of(draw, 1100, 0))
        with closing(FastSearch(bank, K, backend=backend, threads=1)) as search:
            assert_exact(search, bank.rows_MD[:150])
            assert np.all(search.search(bank.rows_MD[:150])[0][:, 0] == 0)

    def test_for_queries_far_outside_the_bank_too(self, draw: Draw, backend: str) -> None:
        bank = Bank(rows_of(draw, 1100, 0))
        outside = 40 * rows_of(draw, 80, 1)
        with closing(FastSearch(bank, K, backend=backend, threads=1)) as search:
            assert_exact(search, outside)
            # INT8 saturates: no bound holds, and the flat search answers
            assert search.repeated > 0

    def test_rests_on_bounds_that_hold_for_every_row(self, draw: Draw, backend: str) -> None:
        bank = Bank(rows_of(draw, 1531, 0))
        queries = rows_of(draw, 200, 1)
        with closing(FastSearch(bank, K, backend=backend, threads=1)) as search:
            assert search._engine is not None
            answer = search._engine.run({"queries": queries})

            mean = bank.rows_MD.mean(axis=0)  # in float32, as the graph has it
            rows, centred = (x.astype(np.float64) - mean for x in (bank.rows_MD, queries))
            similarity = centred @ rows.T - np.square(rows).sum(axis=1) / 2
            members = search._members.copy()
            highest = similarity[:, members].max(axis=2)  # (queries, blocks), padding is row 0

            usable = answer["largest"] <= search._reach
            assert usable.mean() > 0.5
            extra = search._excess * np.maximum(answer["lengths"] - search._length, 0)
            bounds = answer["block_bounds"] + extra[:, None]
            # float32 rounding of the similarity itself
            allowed = -1e-6 * np.abs(similarity).max()
            real = np.arange(bounds.shape[1]) * 8 < len(bank)  # the others are padding
            real[search._short] = False  # row 0 is no member of a padded block
            assert ((bounds - highest)[usable][:, real] >= allowed).all()

            # a group's bound is its best block's, and what is left out lies below what is taken
            by_group = answer["block_bounds"].reshape(len(queries), -1, search_group_count(answer))
            assert (by_group.max(axis=1) == answer["group_bounds"]).all()
            blocks, outside = search._best_blocks(answer["block_bounds"], answer["group_bounds"])
            assert all(len(set(row)) == len(row) for row in blocks)
            left_out = answer["block_bounds"].copy()
            np.put_along_axis(left_out, blocks, -np.inf, axis=1)
            assert (left_out.max(axis=1) == outside).all()


@pytest.mark.parametrize("draw", DATA)
def test_bounds_leave_six_standard_deviations_of_the_rounding(
    draw: Draw, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors as large are too rare to be met here: so what the bounds leave is measured itself.

    All rows of a block are the same, but for their dither: so a block's bound leaves as much as a
    row's.
    """
    bank = Bank(np.repeat(rows_of(draw, 100, 0), 8, axis=0))
    queries = rows_of(draw, 60, 1)
    bounds = []
    for sigmas in (search_module._SIGMAS, 0.0):
        monkeypatch.setattr(search_module, "_SIGMAS", sigmas)
        with closing(FastSearch(bank, K, backend=backend, threads=1)) as search:
            assert search._engine is not None
            answer = search._engine.run({"queries": queries})
            extra = search._excess * np.maximum(answer["lengths"] - search._length, 0)
            bounds.append(answer["block_bounds"] + extra[:, None])
            usable, members = answer["largest"] <= search._reach, search._members
    real = np.arange(members.shape[0]) * 8 < len(bank)
    left = (bounds[0] - bounds[1])[usable][:, real].astype(np.float64)

    # as the module says it: x / a and m a, and their steps
    rows, centred = (
        (x - bank.rows_MD.mean(axis=0)).astype(np.float64) for x in (bank.rows_MD, queries[usable])
    )
    equaliser = np.sqrt(np.abs(rows).max(axis=0))
    query_step = np.abs(rows / equaliser).max() / 127
    whole = rows[members[real, 0]] * equaliser
    levels = overflow.LIMIT if products_overflow(backend) else 127
    row_steps = np.abs(whole).max(axis=1) / levels
    lengths = np.linalg.norm(centred / equaliser, axis=1)
    variance = np.square(query_step) * np.square(whole).sum(axis=1)
    variance = variance + 2 * np.square(row_steps * lengths[:, None])
    want = 6 * np.sqrt(variance / 12)

    assert usable.mean() > 0.5
    # differences of bounds in float32
    assert (left >= want - 1e-6 * np.abs(bounds[0]).max()).all()
    assert np.median(left / want) < 3  # of the shorter queries more


def search_group_count(answer: dict[str, np.ndarray]) -> int:
    return int(answer["group_bounds"].shape[1])


class TestTheHighestValues:
    @given(
        values=arrays(
            np.float32, st.tuples(st.integers(1, 6), st.integers(2, 20)), elements=st.integers(0, 5)
        ),
        data=st.data(),
    )
    def test_are_found_with_the_border_below_them(
        self, values: np.ndarray, data: st.DataObject
    ) -> None:
        num = data.draw(st.integers(1, values.shape[1]))
        places, border = _highest(values, num)
        assert all(len(set(row)) == num for row in places)
        taken = np.take_along_axis(values, places, axis=1)
        ordered = -np.sort(-values, axis=1)
        assert (-np.sort(-taken, axis=1) == ordered[:, :num]).all()
        last = ordered[:, num] if num < values.shape[1] else np.full(len(values), -np.inf)
        assert (border == last).all()


class TestAnyBank:
    @given(
        count=st.integers(1024, 1400),
        num_queries=st.integers(1, 90),
        k=st.integers(1, K),
        draw=st.sampled_from(DATA),
        scale=st.sampled_from([1e-4, 1.0, 1e4]),
        seed=st.integers(0, 2**32 - 1),
        backend=st.sampled_from(["openvino", "ort"]),
    )
    @settings(max_examples=25, deadline=None)
    def test_is_searched_exactly(
        self,
        count: int,
        num_queries: int,
        k: int,
        draw: Draw,
        scale: float,
        seed: int,
        backend: str,
    ) -> None:
        bank = Bank(np.float32(scale) * rows_of(draw, count, seed))
        queries = np.float32(scale) * rows_of(draw, num_queries, seed + 1)
        with closing(FastSearch(bank, k, backend=backend, threads=1)) as search:
            assert search._engine is not None
            assert_exact(search, queries)

    @pytest.mark.parametrize("count", [1024, 1025, 1031, 1087, 1088])
    def test_of_any_remainder_is_searched_exactly(self, count: int, backend: str) -> None:
        # the last rows fill a block, one place of it, all but one; and a group of blocks, or not
        bank = Bank(rows_of(clustered, count, 0))
        with closing(FastSearch(bank, K, backend=backend, threads=1)) as search:
            assert_exact(search, bank.rows_MD[-70:])
            assert_exact(search, rows_of(clustered, 70, 1))

    def test_of_one_row_over_and_over(self, backend: str) -> None:
        row = rows_of(normal, 1, 0)
        bank = Bank(np.repeat(row, 1100, axis=0))
        queries = np.concatenate([row, rows_of(normal, 3, 1)])
        with closing(FastSearch(bank, K, backend=backend, threads=1)) as search:
            assert_exact(search, queries)

    def test_with_a_dimension_that_never_varied(self, backend: str) -> None:
        rows, queries = rows_of(normal, 1100, 0), rows_of(normal, 80, 1)
        rows[:, 5] = 0
        with closing(FastSearch(Bank(rows), K, backend=backend, threads=1)) as search:
            assert_exact(search, queries)


class TestASmallBank:
    def test_is_searched_flat(self, backend: str) -> None:
        bank = Bank(rows_of(normal, 639, 0))
        search = FastSearch(bank, K, backend=backend)
        queries = rows_of(normal, 70, 1)
        assert search._engine is None
        assert all(map(np.array_equal, search.search(queries), bank.search(queries, K)))
        assert (search.searched, search.repeated) == (70, 0)
        search.close()

    def test_gives_all_its_rows_where_more_are_asked_for(self, backend: str) -> None:
        search = FastSearch(Bank(rows_of(normal, 4, 0)), 9, backend=backend)
        assert search.k == 4
        assert search.search(rows_of(normal, 6, 1))[1].shape == (6, 4)


class TestManyQueries:
    def test_are_searched_tile_by_tile(self, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
        bank, queries = Bank(rows_of(sparse, 1200, 0)), rows_of(sparse, 64 * 3 + 5, 1)
        with closing(FastSearch(bank, K, backend=backend, threads=1)) as search:
            whole = search.search(queries)
        monkeypatch.setattr(search_module, "_SCORES_BYTES", 1)  # the smallest tile: 64 queries
        with closing(FastSearch(bank, K, backend=backend, threads=1)) as search:
            assert search._tile == 64
            tiles = search.search(queries)
            assert_exact(search, queries)
        assert np.array_equal(whole[0], tiles[0])


class TestThreads:
    def test_do_not_change_the_answer(self, backend: str) -> None:
        bank, queries = Bank(rows_of(sparse, 1200, 0)), rows_of(sparse, 205, 1)
        queries[::20] *= 40
        with (
            closing(FastSearch(bank, K, backend=backend, threads=1)) as one,
            closing(FastSearch(bank, K, backend=backend, threads=3)) as three,
        ):
            want, got = one.search(queries), three.search(queries)
            assert one.repeated == three.repeated > 0
        np.testing.assert_allclose(got[0], want[0], rtol=1e-6)


class TestTheCounters:
    def test_say_how_many_queries_were_measured_again(
        self, backend: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bank, queries = Bank(rows_of(clustered, 1200, 0)), rows_of(clustered, 50, 1)
        queries[:7] *= 1000
        flat: list[int] = []

        def counted(
            self: Bank,
            queries: Array,
            k: int,
            real: Callable[..., tuple[Array, Array]] = Bank.search,
            **options: Any,
        ) -> tuple[Array, Array]:
            flat.append(len(queries))
            return real(self, queries, k, **options)

        monkeypatch.setattr(Bank, "search", counted)
        with closing(FastSearch(bank, K, backend=backend, threads=1)) as search:
            search.search(queries)
            assert search.searched == 50
            assert sum(flat) == 7  # INT8 saturates
            assert 7 <= search.repeated <= 50
            search.search(queries)
            assert search.searched == 100
            assert sum(flat) == 14

    def test_stay_low_where_rows_lie_in_clusters(self, backend: str) -> None:
        # what makes it fast: rows of a block are alike, so few blocks must be measured
        bank = Bank(rows_of(sparse, 2000, 0))
        with closing(FastSearch(bank, K, backend=backend, threads=1)) as search:
            search.search(rows_of(sparse, 300, 1))
            # rows of 7 bits, without VNNI, have wider bounds
            share = 0.6 if products_overflow(backend) else 0.2
            assert search.repeated < share * search.searched


class TestWithABackendOnTheGpu:
    def test_is_the_flat_search_where_faiss_has_none(self) -> None:
        bank, queries = Bank(rows_of(normal, 1100, 0)), rows_of(normal, 50, 1)
        with closing(FastSearch(bank, K, backend="tensorrt")) as search:
            got = search.search(queries)
        for ours, theirs in zip(got, bank.search(queries, K), strict=True):
            assert np.array_equal(ours, theirs)

    def test_is_faiss_on_the_gpu_where_it_has_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        bank, twin = Bank(rows_of(normal, 1100, 0)), Bank(rows_of(normal, 1100, 0))
        monkeypatch.setattr(search_module, "gpu_is_usable", lambda: True)
        monkeypatch.setattr(Bank, "on_gpu", lambda self: twin)
        assert FastSearch(bank, K, backend="ort-cuda").bank is twin
        assert FastSearch(bank, K, backend="openvino").bank is bank


class TestWhatDoesNotFit:
    @pytest.mark.parametrize("count", [100, 1100])
    def test_queries_of_another_width_are_refused(self, count: int, backend: str) -> None:
        with (
            closing(FastSearch(Bank(rows_of(normal, count, 0)), K, backend=backend)) as search,
            pytest.raises(BankError, match="width 48"),
        ):
            search.search(np.zeros((3, WIDTH + 1), np.float32))

    def test_a_closed_search_is_an_error(self, backend: str) -> None:
        search = FastSearch(Bank(rows_of(normal, 1100, 0)), K, backend=backend)
        search.close()
        search.close()
        with pytest.raises(EngineError, match="closed"):
            search.search(rows_of(normal, 3, 1))


class TestTheOrderOfRows:
    @given(
        count=st.integers(1, 300),
        block=st.integers(1, 16),
        distinct=st.integers(1, 300),
        seed=st.integers(0, 2**32 - 1),
    )
    @settings(max_examples=60, deadline=None)
    def test_is_a_permutation(self, count: int, block: int, distinct: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        rows = rng.standard_normal((distinct, 5))[rng.integers(distinct, size=count)]
        order = _similar_rows_together(rows.astype(np.float32), block)
        assert sorted(order.tolist()) == list(range(count))

    @pytest.mark.parametrize("count", [32, 33, 39, 1001])
    def test_keeps_clusters_in_blocks_of_their_own(self, count: int) -> None:
        # clusters of exactly one block, far apart, shuffled; the rest is a cluster of its own
        clusters = np.random.default_rng(0).permutation(np.arange(count) // 8)
        centres = 1000 * np.random.default_rng(1).standard_normal((clusters.max() + 1, 30))
        noise = 1e-3 * np.random.default_rng(2).standard_normal((count, 30))
        order = _similar_rows_together((centres[clusters] + noise).astype(np.float32), 8)
        whole = clusters[order[: count - count % 8]].reshape(-1, 8)
        spread = np.array([len(set(block)) for block in whole])
        # a cut in the middle of a cluster splits it; most blocks stay whole
        assert (spread == 1).mean() >= (1 if count == 32 else 0.5)

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engineworks.runtime import bank as bank_module
from engineworks.runtime.bank import Bank
from engineworks.runtime.errors import BankError
from engineworks.runtime.tensors import Array

MANY = bank_module._FEW_QUERIES  # from here on FAISS searches by a matrix product


def normal(count: int, width: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)


def all_distances(queries: Array, rows: Array) -> Array:
    """(N, M) in float64, from differences."""
    differences = np.asarray(queries, np.float64)[:, None] - np.asarray(rows, np.float64)
    return np.asarray(np.sqrt(np.square(differences).sum(axis=2)))


def assert_nearest(got: tuple[Array, Array], queries: Array, rows: Array, k: int) -> None:
    """The K smallest distances, and rows that really have them."""
    distances, indices = got
    want = all_distances(queries, rows)
    assert distances.shape == indices.shape == (len(queries), k)
    assert distances.dtype == np.float32 and indices.dtype == np.int64
    # a float32 sum of D squared differences: a few rounding errors of 6e-8 each
    np.testing.assert_allclose(distances, np.sort(want, axis=1)[:, :k], rtol=1e-5)
    np.testing.assert_allclose(distances, np.take_along_axis(want, indices, axis=1), rtol=1e-5)
    assert all(len(set(found)) == k for found in indices.tolist())


@pytest.mark.parametrize("num_queries", [1, MANY - 1, MANY, 300])
class TestASearch:
    @pytest.mark.parametrize("k", [1, 9])
    def test_finds_the_nearest_rows(self, num_queries: int, k: int) -> None:
        rows, queries = normal(500, 40), normal(num_queries, 40, seed=1)
        assert_nearest(Bank(rows).search(queries, k), queries, rows, k)

    def test_finds_them_far_from_the_origin_too(self, num_queries: int) -> None:
        rows, queries = normal(500, 300) + 1000, normal(num_queries, 300, seed=1) + 1000
        assert_nearest(Bank(rows).search(queries, 9), queries, rows, 9)

    def test_a_row_of_the_bank_is_at_distance_zero(self, num_queries: int) -> None:
        rows = 100 + normal(500, 64)
        distances, indices = Bank(rows).search(rows[:num_queries], 3)
        assert np.all(distances[:, 0] == 0)
        assert np.array_equal(indices[:, 0], np.arange(num_queries))

    def test_gives_all_rows_where_more_are_asked_for(self, num_queries: int) -> None:
        rows, queries = normal(12, 8), normal(num_queries, 8, seed=1)
        assert_nearest(Bank(rows).search(queries, 50), queries, rows, 12)

    def test_finds_copies_of_a_row_one_by_one(self, num_queries: int) -> None:
        rows = np.repeat(normal(40, 8), 5, axis=0)
        queries = normal(num_queries, 8, seed=1)
        assert_nearest(Bank(rows).search(queries, 9), queries, rows, 9)


class TestFewAndManyQueries:
    def test_have_the_same_answers(self) -> None:
        bank, queries = Bank(normal(700, 32)), normal(5 * MANY, 32, seed=1)
        together = bank.search(queries, 9)
        alone = [bank.search(query[None], 9) for query in queries]
        # distances are measured by the same code whichever way the rows were found
        assert np.array_equal(together[0], np.concatenate([d for d, _ in alone]))
        assert np.array_equal(together[1], np.concatenate([i for _, i in alone]))

    def test_more_than_one_block_is_searched_block_by_block(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bank, queries = Bank(normal(200, 8)), normal(150, 8, seed=1)
        whole = bank.search(queries, 5)
        monkeypatch.setattr(bank_module, "_QUERY_BLOCK", 70)
        blocks = bank.search(queries, 5)
        assert np.array_equal(whole[0], blocks[0]) and np.array_equal(whole[1], blocks[1])

    @given(
        count=st.integers(1, 60),
        num_queries=st.integers(1, 2 * MANY),
        width=st.integers(1, 9),
        k=st.integers(1, 70),
        seed=st.integers(0, 2**32 - 1),
    )
    @settings(max_examples=60, deadline=None)
    def test_are_right_for_any_sizes(
        self, count: int, num_queries: int, width: int, k: int, seed: int
    ) -> None:
        rng = np.random.default_rng(seed)
        # a coarse grid: many equal distances, copies, and zeros
        rows = rng.integers(-3, 4, (count, width)).astype(np.float32)
        queries = rng.integers(-3, 4, (num_queries, width)).astype(np.float32)
        assert_nearest(Bank(rows).search(queries, k), queries, rows, min(k, count))


class TestSquaredDistances:
    def test_are_those_of_the_chosen_rows(self) -> None:
        rows, queries = normal(50, 20) + 30, normal(6, 20, seed=1) + 30
        chosen = np.random.default_rng(0).integers(50, size=(6, 11))
        want = np.take_along_axis(all_distances(queries, rows), chosen, axis=1) ** 2
        # float32 sums of squares, as above
        np.testing.assert_allclose(Bank(rows).squared_distances(queries, chosen), want, rtol=1e-5)


class TestWhatDoesNotFit:
    @pytest.mark.parametrize("shape", [(4, 7), (4, 9), (8,), (2, 4, 8)])
    def test_queries_of_another_shape_are_refused_with_both(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(BankError, match="width 8") as caught:
            Bank(normal(30, 8)).search(np.zeros(shape, np.float32), 3)
        assert str(shape) in str(caught.value) and caught.value.fix

    @pytest.mark.parametrize("shape", [(0, 4), (4,), (2, 2, 2)])
    def test_a_bank_of_no_rows_or_another_rank_is_refused(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(BankError, match="rows"):
            Bank(np.zeros(shape, np.float32))

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_a_bank_with_a_value_that_is_not_finite_is_refused(self, value: float) -> None:
        rows = normal(5, 3)
        rows[4, 1] = value
        with pytest.raises(BankError, match="not finite"):
            Bank(rows)


class TestABankThatGrows:
    def test_gains_exactly_the_rows_farther_than_the_radius(self) -> None:
        rows = normal(200, 6)
        known = rows[:50] + np.float32(1e-3)
        # far from the bank and from each other
        unknown = 100 * np.eye(6, dtype=np.float32)
        grown = Bank(rows).extended(np.concatenate([known, unknown]), 40, min_radius=1.0)
        assert len(grown) == 206
        assert np.array_equal(grown.rows_MD[:200], rows)
        assert sorted(map(tuple, grown.rows_MD[200:])) == sorted(map(tuple, unknown))
        assert np.all(grown.search(unknown, 1)[0] == 0)

    def test_takes_the_farthest_first_and_no_more_than_allowed(self) -> None:
        line = np.linspace(1, 100, 100, dtype=np.float32)[:, None]
        grown = Bank(np.zeros((1, 1), np.float32)).extended(line, 3)
        # 100 lies farthest from 0, then 50 from both, then 25 or 75
        assert grown.rows_MD[1:3].ravel().tolist() == [100, 50]
        assert grown.rows_MD[3, 0] in (25, 75)
        assert len(grown) == 4

    def test_stays_as_it_is_where_all_is_known(self) -> None:
        rows = normal(100, 5)
        assert np.array_equal(Bank(rows).extended(rows[::3], 20).rows_MD, rows)

    def test_refuses_features_of_another_width(self) -> None:
        with pytest.raises(BankError, match="width 5"):
            Bank(normal(9, 5)).extended(normal(9, 4), 3)


class TestTheFile:
    def test_gives_back_the_same_bank_and_the_same_bytes(self, tmp_path: Path) -> None:
        bank, queries = Bank(normal(130, 12) + 7), normal(90, 12)
        bank.save(tmp_path / "a.faiss")
        loaded = Bank.load(tmp_path / "a.faiss")
        loaded.save(tmp_path / "b.faiss")
        assert np.array_equal(loaded.rows_MD, bank.rows_MD)
        assert (len(loaded), loaded.width) == (130, 12)
        assert all(map(np.array_equal, loaded.search(queries, 4), bank.search(queries, 4)))
        assert (tmp_path / "a.faiss").read_bytes() == (tmp_path / "b.faiss").read_bytes()

    def test_is_a_flat_index_of_the_rows_that_faiss_itself_reads(self, tmp_path: Path) -> None:
        rows = normal(30, 4) + 100
        Bank(rows).save(tmp_path / "bank.faiss")
        index = faiss.read_index(str(tmp_path / "bank.faiss"))
        assert isinstance(index, faiss.IndexFlatL2)
        assert np.array_equal(index.reconstruct_n(0, 30), rows)

    def test_that_is_missing_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(BankError, match=r"none\.faiss"):
            Bank.load(tmp_path / "none.faiss")

    @pytest.mark.parametrize("content", [b"", b"x", b"not an index at all", bytes(4096)])
    def test_of_garbage_is_refused(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "bank.faiss"
        path.write_bytes(content)
        with pytest.raises(BankError, match="not a FAISS index"):
            Bank.load(path)

    def test_cut_anywhere_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "bank.faiss"
        Bank(normal(20, 3)).save(path)
        whole = path.read_bytes()
        for length in range(0, len(whole), 7):
            path.write_bytes(whole[:length])
            with pytest.raises(BankError):
                Bank.load(path)

    @pytest.mark.parametrize("kind", ["HNSW8,Flat", "IVF4,Flat", "SQ8"])
    def test_of_another_kind_of_index_is_refused_by_name(self, tmp_path: Path, kind: str) -> None:
        rows = normal(200, 4)
        index = faiss.index_factory(4, kind)
        index.train(rows)
        index.add(rows)
        faiss.write_index(index, str(tmp_path / "bank.faiss"))
        with pytest.raises(BankError, match=f"{type(index).__name__}.*flat L2"):
            Bank.load(tmp_path / "bank.faiss")

    def test_of_inner_products_is_refused(self, tmp_path: Path) -> None:
        index = faiss.IndexFlatIP(4)
        index.add(normal(5, 4))
        faiss.write_index(index, str(tmp_path / "bank.faiss"))
        with pytest.raises(BankError, match="flat L2"):
            Bank.load(tmp_path / "bank.faiss")

    def test_without_rows_is_refused(self, tmp_path: Path) -> None:
        faiss.write_index(faiss.IndexFlatL2(4), str(tmp_path / "bank.faiss"))
        with pytest.raises(BankError, match="rows"):
            Bank.load(tmp_path / "bank.faiss")


class HalfGpu:
    """FAISS' functions for GPUs, on the CPU; rows are rounded to float16 where that is asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.halves: list[bool] = []
        self.widths: list[int] = []
        monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
        for name, stand_in in (
            ("StandardGpuResources", object),
            ("GpuClonerOptions", SimpleNamespace),
            ("index_cpu_to_gpu", self._clone),
        ):
            monkeypatch.setattr(faiss, name, stand_in, raising=False)

    def _clone(self, resources: object, device: int, index: Any, options: Any) -> HalfGpu:
        assert device == 0
        self.halves.append(options.useFloat16)
        rows = index.reconstruct_n(0, index.ntotal)
        self._index = faiss.IndexFlatL2(rows.shape[1])
        self._index.add(rows.astype(np.float16).astype(np.float32) if options.useFloat16 else rows)
        return self

    def search(self, queries: Array, k: int) -> Any:
        self.widths.append(k)
        return self._index.search(queries, k)


class TestOnTheGpu:
    @pytest.mark.parametrize("half", [False, True])
    @pytest.mark.parametrize("num_queries", [1, 300])
    def test_finds_what_the_cpu_finds(
        self, monkeypatch: pytest.MonkeyPatch, half: bool, num_queries: int
    ) -> None:
        gpu = HalfGpu(monkeypatch)
        rows, queries = 5 + normal(900, 48), 5 + normal(num_queries, 48, seed=1)
        bank = Bank(rows)
        distances, indices = bank.on_gpu(half=half).search(queries, 5)
        # candidates may come in another order, distances are measured alike
        assert np.array_equal(distances, bank.search(queries, 5)[0])
        assert_nearest((distances, indices), queries, rows, 5)
        assert gpu.halves == [half] and gpu.widths == [5 + 32]

    def test_gives_all_rows_where_more_are_asked_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        HalfGpu(monkeypatch)
        rows, queries = normal(12, 8), normal(40, 8, seed=1)
        assert_nearest(Bank(rows).on_gpu().search(queries, 50), queries, rows, 12)

    def test_leaves_the_bank_as_it_was(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        gpu = HalfGpu(monkeypatch)
        bank = Bank(normal(50, 8))
        bank.on_gpu(half=True).save(tmp_path / "bank.faiss")
        bank.search(normal(40, 8), 2)
        assert gpu.widths == []
        assert np.array_equal(Bank.load(tmp_path / "bank.faiss").rows_MD, bank.rows_MD)

    def test_is_refused_where_faiss_has_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0)
        with pytest.raises(BankError, match="no GPU") as caught:
            Bank(normal(50, 8)).on_gpu()
        assert "[gpu]" in str(caught.value.fix)

    @pytest.mark.gpu
    @pytest.mark.parametrize("half", [False, True])
    def test_finds_on_a_real_one_what_the_cpu_finds(self, half: bool) -> None:
        if not faiss.get_num_gpus():
            pytest.skip("this FAISS sees no GPU")
        rows, queries = 5 + normal(9000, 384), 5 + normal(1000, 384, seed=1)
        bank = Bank(rows)
        got, want = bank.on_gpu(half=half).search(queries, 9), bank.search(queries, 9)
        # a row that is missed is at most the rounding of a product farther: 1e-3 of it
        np.testing.assert_allclose(got[0], want[0], rtol=1e-3)

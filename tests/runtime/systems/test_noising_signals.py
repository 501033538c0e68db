from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engineworks.runtime.bank import Bank
from engineworks.runtime.systems.noising import signals as mathematics
from engineworks.runtime.systems.noising.signals import (
    SIGNALS,
    Statistics,
    anomaly_map,
    combine,
    concentration,
    influence,
    noise_std,
    patch_signals,
    response,
)
from engineworks.runtime.tensors import Array
from tests.runtime.systems.noising_reference import (
    RANGE,
    plain_nearest,
    plain_noise_std,
    plain_response,
    plain_signals,
)


def neighbours(
    num: int = 20, k: int = 5, width: int = 12, dtype: str = "float64"
) -> tuple[Array, Array, Array]:
    """Drawn patches (N, D), rows (N, K, D) near them and their distances (N, K)."""
    rng = np.random.default_rng(0)
    queries = rng.standard_normal((num, width)).astype(dtype)
    rows = (queries[:, None] + rng.standard_normal((num, k, width))).astype(dtype)
    rows = rows.astype(dtype)
    return queries, rows, np.linalg.norm(queries[:, None] - rows, axis=2).astype(dtype)


class TestInfluence:
    def test_is_the_gradient_of_the_mean_distance(self) -> None:
        queries, rows, distances = neighbours()
        step = 1e-6
        got = influence(queries, rows, distances)
        for i in range(queries.shape[1]):
            moved = np.zeros(queries.shape[1])
            moved[i] = step
            higher, lower = (
                np.linalg.norm((queries + sign * moved)[:, None] - rows, axis=2).mean(axis=1)
                for sign in (1, -1)
            )
            # central differences: 1e-16 / 1e-6 of rounding, 1e-12 of the third derivative
            np.testing.assert_allclose(got[:, i], np.abs(higher - lower) / (2 * step), atol=1e-8)

    @pytest.mark.train
    # float64: 16 digits, a sum of K; float32: 7 digits (what the published model computes in)
    @pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-6)])
    def test_is_what_autograd_finds(self, dtype: str, tolerance: float) -> None:
        import torch

        queries, rows, distances = neighbours(num=200, k=9, width=96, dtype=dtype)
        x = torch.from_numpy(queries).requires_grad_()
        torch.linalg.vector_norm(x[:, None] - torch.from_numpy(rows), dim=2).mean(
            dim=1
        ).sum().backward()
        assert x.grad is not None
        got = influence(queries, rows, distances)
        assert got.dtype == dtype
        np.testing.assert_allclose(got, x.grad.abs().numpy(), rtol=0, atol=tolerance)

    def test_of_a_neighbour_at_distance_zero_is_nothing(self) -> None:
        queries, rows, _ = neighbours()
        rows[:, 0] = queries
        distances = np.linalg.norm(queries[:, None] - rows, axis=2)
        without = influence(queries, rows[:, 1:], distances[:, 1:])
        got = influence(queries, rows, distances)
        # the others share the mean with it: 4 of 5; float64 sums of numbers up to 1
        np.testing.assert_allclose(got, without * 4 / 5, atol=1e-15)

    def test_of_a_patch_that_is_in_the_bank_k_times_is_zero(self) -> None:
        queries = np.ones((3, 7), np.float32)
        rows = np.ones((3, 4, 7), np.float32)
        assert not influence(queries, rows, np.zeros((3, 4), np.float32)).any()

    @given(
        num=st.integers(1, 5),
        k=st.integers(1, 9),
        width=st.integers(1, 20),
        scale=st.sampled_from([1e-6, 1.0, 1e6]),
        seed=st.integers(0, 2**32 - 1),
    )
    @settings(max_examples=60, deadline=None)
    def test_is_never_longer_than_one(
        self, num: int, k: int, width: int, scale: float, seed: int
    ) -> None:
        rng = np.random.default_rng(seed)
        queries = rng.standard_normal((num, width)) * scale
        rows = rng.standard_normal((num, k, width)) * scale
        got = influence(queries, rows, np.linalg.norm(queries[:, None] - rows, axis=2))
        # a mean of unit vectors; 1e-12 for rounding in float64
        assert (np.linalg.norm(got, axis=1) <= 1 + 1e-12).all() and (got >= 0).all()


class TestTheProposedNoise:
    statistics = Statistics(mean=2.0, std=0.5)

    def propose(self, g: Array, mean_distance: Array, weight: float = 1.0) -> Array:
        return noise_std(
            g,
            mean_distance,
            statistics=self.statistics,
            noise_range=RANGE,
            distance_weight=weight,
        )

    def test_is_the_formula(self) -> None:
        queries, rows, distances = neighbours()
        g, mean_distance = influence(queries, rows, distances), distances.mean(axis=1)
        want = [
            plain_noise_std(g_D, mean, self.statistics, 0.7)
            for g_D, mean in zip(g, mean_distance, strict=True)
        ]
        np.testing.assert_allclose(self.propose(g, mean_distance, 0.7), want, rtol=1e-13)  # float64

    @pytest.mark.parametrize("mean_distance", [-1e30, 0.0, 1e30])
    def test_stays_in_its_range_whatever_the_distance(self, mean_distance: float) -> None:
        g = neighbours()[0].astype(np.float32)
        got = self.propose(np.abs(g), np.full(len(g), mean_distance, np.float32))
        assert got.dtype == np.float32
        # the border itself in float32
        assert got.min() >= np.float32(RANGE[0]) and got.max() <= np.float32(RANGE[1])

    def test_is_the_same_everywhere_where_no_dimension_stands_out(self) -> None:
        got = self.propose(np.full((2, 6), 0.1), np.array([2.0, 3.0]))
        assert (got == got[:, :1]).all()
        assert got[0, 0] == pytest.approx((RANGE[0] + RANGE[1]) / 2)  # an average distance

    def test_of_a_patch_does_not_depend_on_its_batch(self) -> None:
        queries, rows, distances = neighbours()
        g, mean_distance = influence(queries, rows, distances), distances.mean(axis=1)
        together = self.propose(g, mean_distance)
        alone = [self.propose(g[i : i + 1], mean_distance[i : i + 1])[0] for i in range(len(g))]
        assert np.array_equal(together, alone)


class TestTheResponse:
    def test_is_the_formula(self) -> None:
        queries, rows, distances = neighbours()
        rows[0, 0] = queries[0]  # distance 0
        rows[1, 1] = queries[1] + 1e-9  # so near that the second order is far above the cap
        distances = np.linalg.norm(queries[:, None] - rows, axis=2)
        sigma = np.asarray(np.random.default_rng(1).uniform(*RANGE, size=queries.shape))
        want = [plain_response(x, r, s) for x, r, s in zip(queries, rows, sigma, strict=True)]
        np.testing.assert_allclose(
            response(queries[:, None] - rows, distances, sigma), want, rtol=1e-12
        )  # float64

    def test_is_what_small_noise_really_adds_to_the_mean_distance(self) -> None:
        queries, rows, distances = neighbours(num=4, k=3, width=30)
        sigma = np.asarray(np.random.default_rng(1).uniform(0.02, 0.1, size=queries.shape))
        noise = np.random.default_rng(2).standard_normal((20_000, *queries.shape)) * sigma
        # noise and its mirror image: what is odd in it cancels, only the second order is left
        grown = np.mean(
            [
                np.linalg.norm((queries + sign * noise)[:, :, None] - rows, axis=3).mean(axis=2)
                for sign in (1, -1)
            ],
            axis=(0, 1),
        ) - distances.mean(axis=1)
        got = response(queries[:, None] - rows, distances, sigma)
        # 1 / sqrt(20000 * D / 2) of sampling, and sigma² D / d² / 4 = 1 % of the fourth order
        np.testing.assert_allclose(got, grown, rtol=0.03)

    def test_is_never_longer_than_the_noise(self) -> None:
        queries, _, _ = neighbours()
        rows = queries[:, None] + 1e-12 * np.random.default_rng(0).standard_normal((20, 5, 12))
        distances = np.linalg.norm(queries[:, None] - rows, axis=2)
        sigma = np.full(queries.shape, 0.3)
        got = response(queries[:, None] - rows, distances, sigma)
        np.testing.assert_allclose(got, 0.3 * np.sqrt(12), rtol=1e-12)  # float64

    def test_of_noise_along_the_way_to_the_neighbour_is_nothing(self) -> None:
        # to second order: moving to and fro along the line to the row changes nothing on average
        queries, rows = np.array([[3.0, 0.0]]), np.zeros((1, 1, 2))
        got = response(queries[:, None] - rows, np.array([[3.0]]), np.array([[0.4, 0.0]]))
        assert got == pytest.approx(0)


class TestTheConcentration:
    def test_is_zero_where_all_dimensions_carry_alike(self) -> None:
        assert concentration(np.full((2, 40), 0.03)) == pytest.approx(0, abs=1e-12)

    def test_is_log_d_where_one_dimension_carries_all(self) -> None:
        assert concentration(np.eye(40)[:3] * 0.2) == pytest.approx(np.log(40))

    def test_of_no_influence_is_zero(self) -> None:
        assert not concentration(np.zeros((2, 5), np.float32)).any()

    @given(
        width=st.integers(1, 50),
        exponent=st.integers(-18, 0),
        seed=st.integers(0, 2**32 - 1),
    )
    @settings(max_examples=60, deadline=None)
    def test_does_not_depend_on_the_unit_and_stays_between(
        self, width: int, exponent: int, seed: int
    ) -> None:
        g = np.abs(np.random.default_rng(seed).standard_normal((3, width)))
        got = concentration((g * 10.0**exponent).astype(np.float32))
        assert (got >= 0).all() and (got <= np.log(width) + 1e-5).all()
        # logarithm of a sum of float32 numbers: a few 1e-7
        np.testing.assert_allclose(got, concentration(g), atol=1e-5)


class TestSignals:
    def test_of_many_patches_are_those_of_each(self) -> None:
        rng = np.random.default_rng(0)
        rows = rng.standard_normal((60, 10)).astype(np.float32)
        queries = rng.standard_normal((mathematics._TILE + 30, 10)).astype(np.float32)
        queries[5] = rows[7]  # a patch that the bank knows
        bank, statistics = Bank(rows), Statistics(mean=3.0, std=0.4)
        got = patch_signals(
            bank,
            queries,
            *bank.search(queries, 4),
            names=SIGNALS,
            mean_distance=statistics,
            noise_range=RANGE,
            distance_weight=0.6,
        )
        assert list(got) == list(SIGNALS)
        for n, x in enumerate(queries):
            want = plain_signals(x, plain_nearest(x, rows, 4), statistics, 0.6)
            for name in SIGNALS:
                assert got[name].dtype == np.float32
                # float32 arithmetic over 10 dimensions
                assert got[name][n] == pytest.approx(want[name], rel=2e-5, abs=2e-6), name

    def test_are_only_those_asked_for(self) -> None:
        rows = np.random.default_rng(0).standard_normal((20, 6)).astype(np.float32)
        bank = Bank(rows)
        for names in (("distance",), ("influence",), ("distance", "concentration"), ()):
            got = patch_signals(
                bank,
                rows[:3] + 1,
                *bank.search(rows[:3] + 1, 2),
                names=names,
                mean_distance=None,
                noise_range=RANGE,
                distance_weight=1.0,
            )
            assert tuple(got) == names

    def test_add_up_with_their_weights_in_standard_deviations(self) -> None:
        signals = {"distance": np.array([1.0, 5.0]), "influence": np.array([0.2, 0.1])}
        statistics = {
            "distance": Statistics(mean=3, std=2),
            "influence": Statistics(mean=0.1, std=0.05),
        }
        weights = {"distance": 2.0, "influence": -1.0, "response": 0.0}
        got = combine(signals, statistics, weights)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, [-4, 2], rtol=1e-6)  # float32


class TestAMap:
    def test_places_patches_row_by_row_and_samples_between_their_centres(self) -> None:
        scores = np.arange(6, dtype=np.float32)
        got = anomaly_map(scores, (2, 3), (4, 9), 0)
        assert got.shape == (4, 9) and got.dtype == np.float32
        # (H, W) = (4, 9) over a grid of (2, 3): centres at half a cell, edges repeated
        y = np.clip((np.arange(4) + 0.5) / 2 - 0.5, 0, 1)
        x = np.clip((np.arange(9) + 0.5) / 3 - 0.5, 0, 2)
        want = 3 * y[:, None] + x[None]  # the scores are linear in row and column
        # OpenCV interpolates floats in float32
        np.testing.assert_allclose(got, want, atol=1e-5)

    def test_is_smoothed_by_a_gaussian_of_that_many_pixels(self) -> None:
        size, sigma = 41, 3.0
        spot = np.zeros(size * size, np.float32)
        spot[size * (size // 2) + size // 2] = 1
        got = anomaly_map(spot, (size, size), (size, size), sigma)
        place = np.arange(size) - size // 2
        bell = np.exp(-(place**2) / (2 * sigma**2))
        want = np.outer(bell, bell) / bell.sum() ** 2
        # OpenCV cuts the kernel of floats off at 4 sigma: 1e-4 of its mass
        np.testing.assert_allclose(got, want, atol=2e-4 * want.max())
        assert got.sum() == pytest.approx(1, rel=1e-5)


@pytest.mark.data
class TestThePublishedValues:
    @pytest.fixture
    def published(self, shared: Path) -> Any:
        return np.load(shared / "fixtures" / "noising_influence.npz")

    @staticmethod
    def found(published: Any) -> tuple[Array, Array, Array, Array]:
        features = published["features"].reshape(-1, 24)
        bank = Bank(published["bank"])
        distances, indices = bank.search(features, int(published["K"]))
        weight = published["influence_weight"]
        return (
            distances,
            indices,
            influence(features, bank.rows_MD[indices], distances),
            influence(features, bank.rows_MD[indices], distances) * weight,
        )

    def test_of_the_search_are_found(self, published: Any) -> None:
        distances, indices, _, _ = self.found(published)
        assert np.array_equal(indices, published["knn_idx"].reshape(-1, 9))
        # torch's cdist by a product, and float32
        np.testing.assert_allclose(distances, published["knn_dist"].reshape(-1, 9), rtol=1e-5)

    def test_of_the_influence_are_found(self, published: Any) -> None:
        _, _, g, weighted = self.found(published)
        # both in float32, values up to 0.6
        np.testing.assert_allclose(weighted, published["influence"].reshape(-1, 24), atol=1e-6)
        differences = published["finite_difference_of_mean_knn_distance"].reshape(-1, 24)
        np.testing.assert_allclose(g, np.abs(differences), atol=1e-6)

    def test_of_the_noise_are_found_with_the_statistics_of_the_batch(self, published: Any) -> None:
        distances, _, _, weighted = self.found(published)
        mean_distance = distances.mean(axis=1)
        # the original repeats the distance over the D dimensions and takes the unbiased deviation
        repeated = np.repeat(mean_distance.astype(np.float64), 24)
        got = noise_std(
            weighted,
            mean_distance,
            statistics=Statistics(mean=repeated.mean(), std=repeated.std(ddof=1)),
            noise_range=tuple(published["noise_std_range"].tolist()),
            distance_weight=float(published["distance_weight"][0]),
        )
        # float32 on both sides, through a sigmoid
        np.testing.assert_allclose(got, published["noise_std"].reshape(-1, 24), atol=1e-6)

    def test_of_the_noise_depended_on_the_batch_and_ours_do_not(
        self, published: Any, shared: Path
    ) -> None:
        fault = np.load(shared / "fixtures" / "noising_batch_dependence_bug.npz")
        assert np.abs(fault["std_in_batch_of_2"] - fault["std_alone"]).max() > 0.04

        distances, _, g, _ = self.found(published)
        mean_distance = distances.mean(axis=1)
        together, alone = (
            noise_std(
                g[:count],
                mean_distance[:count],
                statistics=Statistics(mean=2.0, std=0.5),
                noise_range=RANGE,
                distance_weight=0.7,
            )
            for count in (18, 9)
        )
        assert np.array_equal(together[:9], alone)

    def test_of_the_patch_score_are_a_combination_of_signals(self, shared: Path) -> None:
        published = np.load(shared / "fixtures" / "noising_patch_score.npz")
        names = ("influence", "distance", "noise")
        got = combine(
            {name: published[f"{name}_patch"] for name in names},
            dict.fromkeys(names, Statistics(mean=0, std=1)),  # published: not standardised
            dict(zip(names, published["weights"].tolist(), strict=True)),
        )
        np.testing.assert_allclose(got, published["patch_scores"], rtol=1e-6)  # float32
        np.testing.assert_allclose(got.max(axis=1), published["image_score"], rtol=1e-6)

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from pydantic import ValidationError

from engineworks.runtime import bundle as bundles
from engineworks.runtime import images, preprocess
from engineworks.runtime import search as search_module
from engineworks.runtime.bank import Bank
from engineworks.runtime.bundle import Bundle
from engineworks.runtime.datasets import MvtecSample, mvtec
from engineworks.runtime.errors import BankError, BundleError, DatasetError, EngineError, InputError
from engineworks.runtime.systems import extend, noising, open_system
from engineworks.runtime.systems.noising import signals as mathematics
from engineworks.runtime.systems.noising.ablation import Labelled, ablation
from engineworks.runtime.systems.noising.fit import FitConfig, Fitted, calibrate, fit, hold_out
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
from engineworks.runtime.tensors import Array, TensorSpec
from engineworks.runtime.testing import (
    FunctionEngine,
    draw_part,
    write_parts,
    write_tiny_noising_bundle,
)

RANGE = (0.01, 0.5)


def neighbours(
    num: int = 20, k: int = 5, width: int = 12, dtype: str = "float64"
) -> tuple[Array, Array, Array]:
    """Drawn patches (N, D), rows (N, K, D) near them and their distances (N, K)."""
    rng = np.random.default_rng(0)
    queries = rng.standard_normal((num, width)).astype(dtype)
    rows = (queries[:, None] + rng.standard_normal((num, k, width))).astype(dtype)
    rows = rows.astype(dtype)
    return queries, rows, np.linalg.norm(queries[:, None] - rows, axis=2).astype(dtype)


# --- the same formulas again, one number at a time in float64 -------------------------------------


def plain_influence(x: Array, rows: Array) -> Array:
    total = np.zeros(len(x))
    for row in rows.astype(np.float64):
        distance = np.sqrt(((x - row) ** 2).sum())
        if distance > 0:
            total += (x - row) / distance
    return np.abs(total / len(rows))


def plain_noise_std(g: Array, mean_distance: float, statistics: Statistics, weight: float) -> Array:
    z = (g - g.mean()) / (np.sqrt(((g - g.mean()) ** 2).sum() / (len(g) - 1)) + 1e-8)
    drive = z + weight * (mean_distance - statistics.mean) / statistics.std
    return np.asarray(RANGE[0] + (RANGE[1] - RANGE[0]) / (1 + np.exp(-drive)))


def plain_response(x: Array, rows: Array, sigma: Array) -> float:
    longest = np.sqrt((sigma**2).sum())
    growth = []
    for row in rows.astype(np.float64):
        distance = np.sqrt(((x - row) ** 2).sum())
        if distance == 0:
            growth.append(longest)
            continue
        across = 1 - ((x - row) / distance) ** 2
        growth.append(min(float((sigma**2 * across).sum() / (2 * distance)), longest))
    return float(np.mean(growth))


def plain_signals(
    x: Array, rows: Array, mean_distance: Statistics | None, weight: float = 1.0
) -> dict[str, float]:
    x = x.astype(np.float64)
    distances = np.sqrt(((x - rows.astype(np.float64)) ** 2).sum(axis=1))
    g = plain_influence(x, rows)
    shares = g**2 / (g**2).sum() if g.any() else np.full(len(g), 1 / len(g))
    signals = {
        "distance": float(distances.min()),
        "influence": float(g.mean()),
        "concentration": float(np.log(len(g) * (shares**2).sum())),
    }
    if mean_distance is not None:
        sigma = plain_noise_std(g, float(distances.mean()), mean_distance, weight)
        signals["response"] = plain_response(x, rows, sigma)
    return signals


def plain_nearest(x: Array, rows: Array, k: int) -> Array:
    distances = ((x.astype(np.float64) - rows) ** 2).sum(axis=1)
    return np.asarray(rows[np.argsort(distances)[:k]])


# --- signals --------------------------------------------------------------------------------------


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


# --- published values -----------------------------------------------------------------------------


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


# --- fitting --------------------------------------------------------------------------------------


def drawn_features(num_images: int = 8, grid: tuple[int, int] = (3, 4), width: int = 6) -> Array:
    rng = np.random.default_rng(0)
    place = rng.standard_normal((1, grid[0] * grid[1], width))  # each place has its own look
    noise = rng.standard_normal((num_images, grid[0] * grid[1], width))
    return (place + 0.5 * noise).astype(np.float32)


def fit_drawn(
    features: Array, *, seed: int = 0, pictures: Array | None = None, **config: Any
) -> Fitted:
    settings = FitConfig(**{"image_score": "patch", "rule": "rank"} | config)
    # of a picture's images all but the first are changed copies
    copies = None if pictures is None else np.diff(pictures, prepend=-1) == 0
    return fit(
        features, (3, 4), (12, 16), settings, seed=seed, pictures_I=pictures, copies_I=copies
    )


def images_of_rows(bank: Bank, features: Array) -> Array:
    same = (bank.rows_MD[:, None, None] == features[None]).all(axis=3)
    assert (same.sum(axis=(1, 2)) == 1).all()
    return np.asarray(same.any(axis=2).argmax(axis=1))


class TestFitting:
    weights = {"distance": 1.0, "influence": 0.5, "concentration": 0.25, "response": 2.0}  # noqa: RUF012

    def test_standardises_with_patches_that_do_not_see_their_own_image(self) -> None:
        features = drawn_features()
        fitted = fit_drawn(
            features, k=3, coreset_ratio=1.0, folds=8, weights=self.weights, smoothing=0.0
        )
        rows = [np.concatenate(np.delete(features, i, axis=0)) for i in range(len(features))]
        near = [[plain_nearest(x, r, 3) for x in f] for f, r in zip(features, rows, strict=True)]
        means = [
            np.linalg.norm(x.astype(np.float64) - rows_of_x, axis=1).mean()
            for f, per_image in zip(features, near, strict=True)
            for x, rows_of_x in zip(f, per_image, strict=True)
        ]
        params = fitted.params
        # float32 signals: 1e-5
        assert params.mean_distance.mean == pytest.approx(np.mean(means), rel=1e-5)
        assert params.mean_distance.std == pytest.approx(np.std(means), rel=1e-5)
        table = {name: np.empty(features.shape[:2]) for name in SIGNALS}
        for i, f in enumerate(features):
            for n, x in enumerate(f):
                for name, value in plain_signals(x, near[i][n], params.mean_distance).items():
                    table[name][i, n] = value
        for name, values in table.items():
            assert params.signals[name].mean == pytest.approx(values.mean(), rel=1e-5), name
            assert params.signals[name].std == pytest.approx(values.std(), rel=1e-4), name
        scores = sum(
            w * (table[n] - table[n].mean()) / table[n].std() for n, w in self.weights.items()
        )
        assert params.score_std == pytest.approx(np.std(scores), rel=1e-4)
        # no budget: the threshold lies above every held-out image, and next to the highest
        assert fitted.thresholds["image"].value == pytest.approx(
            np.max(scores) / np.std(scores), rel=1e-3
        )

    def test_would_be_fooled_by_an_images_own_rows(self) -> None:
        # all patches are in the bank: searched with their own rows, all distances were 0
        fitted = fit_drawn(drawn_features(), k=1, coreset_ratio=1.0)
        assert len(fitted.bank) == 96
        assert fitted.params.signals["distance"].mean > 0.5

    def test_finds_what_two_images_share_near_when_one_of_them_is_held_out(self) -> None:
        # the coreset takes one row of each pair: without it the other image's patch must do
        features = np.repeat(drawn_features(num_images=4), 2, axis=0)
        fitted = fit_drawn(features, k=1, coreset_ratio=0.6, folds=8)
        assert len(fitted.bank) == 48
        assert fitted.params.mean_distance.mean == pytest.approx(0, abs=1e-3)  # product form

    @pytest.mark.parametrize(("budget", "rejects"), [(0.0, 0), (0.1, 1), (0.25, 3), (0.5, 7)])
    def test_keeps_the_budget_of_false_rejects(self, budget: float, rejects: int) -> None:
        features = drawn_features(num_images=14)
        fitted = fit_drawn(features, k=3, coreset_ratio=1.0, folds=14, false_reject=budget)
        params = fitted.params
        scores, highest = [], []
        for i, f in enumerate(features):
            others = Bank(np.concatenate(np.delete(features, i, axis=0)))
            signals = patch_signals(
                others,
                f,
                *others.search(f, params.k),
                names=SIGNALS,
                mean_distance=params.mean_distance,
                noise_range=params.noise_range,
                distance_weight=params.distance_weight,
            )
            patches = combine(signals, params.signals, params.weights) / params.score_std
            scores.append(patches.max())
            highest.append(anomaly_map(patches, (3, 4), (12, 16), params.smoothing).max())
        for name, values in (("image", scores), ("pixel", highest)):
            assert sum(v >= fitted.thresholds[name].value for v in values) == rejects
            assert "14 held-out" in fitted.thresholds[name].source

    def test_says_what_it_did(self) -> None:
        fitted = fit_drawn(drawn_features(), k=3, coreset_ratio=0.25)
        assert fitted.report == {
            "num_images": 8,
            "num_patches": 96,
            "bank_rows": 24,
            "covering_radius": fitted.report["covering_radius"],
            "k": 3,
            # of the rank's border of 3 % of 8 pictures: none; Wilson's interval
            "held_out_above_border": "0 of 8 (0.0 to 32.4 %)",
            "border": "rests on 8 pictures: of good parts up to 32% may lie above it",
        }
        covered = fitted.bank.search(drawn_features().reshape(-1, 6), 1)[0].max()
        # product form against differences, float32
        assert fitted.report["covering_radius"] == pytest.approx(covered, rel=1e-4)
        json.dumps(fitted.report, allow_nan=False)

    def test_with_the_same_seed_gives_the_same_bundle(self, tmp_path: Path) -> None:
        first, again, other = (
            fit_drawn(drawn_features(), coreset_ratio=0.3, k=2, projection=8, seed=seed)
            for seed in (3, 3, 4)
        )
        assert np.array_equal(first.bank.rows_MD, again.bank.rows_MD)
        assert first.params == again.params and first.thresholds == again.thresholds
        assert not np.array_equal(first.bank.rows_MD, other.bank.rows_MD)

    def test_takes_features_from_a_file(self, tmp_path: Path) -> None:
        np.save(tmp_path / "features.npy", drawn_features())
        mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
        assert fit_drawn(mapped, k=2).params == fit_drawn(drawn_features(), k=2).params

    def test_of_fewer_images_for_statistics_scores_all_of_them(self) -> None:
        fitted = fit_drawn(drawn_features(), k=2, statistics_images=3)
        assert "on 8 held-out" in fitted.thresholds["image"].source
        held_out = fitted.thresholds["image"].held_out
        assert held_out is not None and held_out.count == 8

    def test_group_by_group_covers_every_patch_within_the_radius_it_reports(self) -> None:
        features = np.random.default_rng(0).standard_normal((50, 64, 4)).astype(np.float32)
        config = FitConfig(
            k=2, coreset_ratio=0.02, sampled=None, max_patches=1024, statistics_images=2
        )
        fitted = fit(features, (8, 8), (8, 8), config, seed=0)
        assert len(fitted.bank) == int(0.02 * 3200)
        images_of_rows(fitted.bank, features)  # every row is a patch
        farthest = fitted.bank.search(features.reshape(-1, 4), 1)[0].max()
        assert farthest <= fitted.report["covering_radius"]
        whole = fit(
            features, (8, 8), (8, 8), config.model_copy(update={"max_patches": 10**6}), seed=0
        )
        # greedy is within twice the best radius; two rounds of it are within four times
        assert farthest <= 2 * whole.report["covering_radius"]

    def test_tells_how_far_it_is_while_it_chooses_rows_and_while_it_scores(self) -> None:
        told: list[tuple[str, int, int]] = []
        features = np.random.default_rng(0).standard_normal((9, 64, 4)).astype(np.float32)
        fit(features, (8, 8), (8, 8), FitConfig(), seed=0, progress=lambda *now: told.append(now))
        assert {what for what, _, _ in told} == {"coreset", "held-out images"}
        scored = [now[1:] for now in told if now[0] == "held-out images"]
        assert scored == [(i + 1, 9) for i in range(9)]


class TestABankOfManyPatches:
    features = np.random.default_rng(0).standard_normal((50, 64, 4)).astype(np.float32)

    def fitted(self, **config: Any) -> Fitted:
        return fit(self.features, (8, 8), (8, 8), FitConfig(coreset_ratio=0.02, **config), seed=0)

    def test_is_chosen_among_some_that_are_drawn(self) -> None:
        drawn, of_all = self.fitted(sampled=1024), self.fitted(sampled=None)
        assert len(drawn.bank) == len(of_all.bank) == 64
        images_of_rows(drawn.bank, self.features)  # every row is a patch
        again = self.fitted(sampled=1024)
        assert np.array_equal(drawn.bank.rows_MD, again.bank.rows_MD)

        def oddness(found: Fitted) -> float:
            return float(np.linalg.norm(found.bank.rows_MD, axis=1).mean())

        # of a third of the patches, fewer are far from everything
        assert oddness(drawn) < oddness(of_all)

    def test_is_chosen_among_all_where_those_are_not_more(self) -> None:
        same = self.fitted(sampled=3200), self.fitted(sampled=None)
        assert np.array_equal(same[0].bank.rows_MD, same[1].bank.rows_MD)


class TestFewImages:
    def test_two_are_enough(self) -> None:
        fitted = fit_drawn(drawn_features(2), coreset_ratio=1.0)
        assert fitted.params.k == 9 and len(fitted.bank) == 24

    def test_none_are_refused(self) -> None:
        with pytest.raises(InputError, match="normal images, got none") as caught:
            fit_drawn(drawn_features(0))
        assert caught.value.fix

    def test_the_quarters_of_one_stand_for_pictures(self) -> None:
        features = drawn_features(1, (4, 6))
        settings = FitConfig(coreset_ratio=1.0, image_score="patch", rule="rank", smoothing=0.0)
        fitted = fit(features, (4, 6), (16, 24), settings, seed=0)
        assert len(fitted.bank) == 24
        quarters = features[0].reshape(2, 2, 2, 3, 6).swapaxes(1, 2).reshape(4, 6, 6)
        nearest = [
            np.linalg.norm(x - np.concatenate(np.delete(quarters, i, axis=0)), axis=1).min()
            for i, quarter in enumerate(quarters)
            for x in quarter
        ]
        distance = fitted.params.signals["distance"]
        assert distance.mean == pytest.approx(np.mean(nearest), rel=1e-5)
        highest = (np.max(nearest) - np.mean(nearest)) / np.std(nearest)
        assert fitted.thresholds["image"].value == pytest.approx(highest, rel=1e-4)

    def test_one_that_has_no_quarters_is_refused(self) -> None:
        with pytest.raises(InputError, match="1 x 6 patches"):
            fit(drawn_features(1, (1, 6)), (1, 6), (4, 24), FitConfig(), seed=0)

    def test_with_few_rows_k_is_what_every_search_can_answer(self) -> None:
        features = drawn_features(3)
        fitted = fit_drawn(features, coreset_ratio=0.2, k=9)
        owner = images_of_rows(fitted.bank, features)
        assert len(owner) == 7
        others = [int((owner != i).sum()) for i in range(3)]
        assert fitted.params.k == fitted.report["k"] == min(n for n in others if n)

    @pytest.mark.parametrize("seed", range(6))
    def test_one_may_own_the_whole_bank(self, seed: int) -> None:
        features = drawn_features(2)
        features[1] = features[0, 0]  # nothing new in it, and most often not in the bank
        fitted = fit_drawn(features, coreset_ratio=0.1, seed=seed)
        assert len(fitted.bank) == 2
        assert 1 <= fitted.params.k <= 2

    def test_all_alike_leave_no_spread_but_an_answer(self) -> None:
        fitted = fit_drawn(np.ones((4, 12, 6), np.float32))
        assert len(fitted.bank) == 1 and fitted.params.k == 1
        fitted_json = fitted.params.model_dump(mode="json")
        json.dumps(fitted_json, allow_nan=False)


class TestFeaturesThatDoNotFit:
    def test_another_number_of_patches_is_refused(self) -> None:
        with pytest.raises(InputError, match=r"12 patches.*\(3, 5\)"):
            fit(drawn_features(), (3, 5), (12, 16), FitConfig(), seed=0)

    def test_a_value_that_is_not_finite_is_refused(self) -> None:
        features = drawn_features()
        features[3, 2, 1] = np.nan
        with pytest.raises(BankError, match="not finite"):
            fit_drawn(features)


class TestAConfiguration:
    def test_has_defaults_for_all(self) -> None:
        config = FitConfig()
        assert config.k == 9 and set(config.weights) == set(SIGNALS)

    @pytest.mark.parametrize(
        "wrong",
        [
            {"neighbours": 5},
            {"k": 0},
            {"k": "9"},
            {"coreset_ratio": 0.0},
            {"coreset_ratio": 1.5},
            {"false_reject": 1.0},
            {"statistics_images": 1},
            {"weights": {"distance": 1.0}},
            {"weights": dict.fromkeys(SIGNALS, 1.0) | {"distanc": 1.0}},
            {"weights": dict.fromkeys(SIGNALS, 0.0)},
        ],
    )
    def test_refuses_what_is_unknown_or_out_of_range(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(ValidationError):
            FitConfig(**wrong)


class TestTheAblation:
    def test_compares_the_distance_alone_with_each_addition(self) -> None:
        features = drawn_features(10)
        weights = dict.fromkeys(SIGNALS, 0.0) | {"distance": 1.0}
        fitted = fit_drawn(features[:6], coreset_ratio=1.0, k=3, weights=weights)
        defective = features[8:].copy()
        defective[:, 5] += 4  # one patch of twelve
        mask = np.zeros((12, 16), bool)
        mask[4:8, 4:8] = True
        labelled = [
            *(Labelled([f], 0, None) for f in features[6:8]),
            *(Labelled([f], 1, mask) for f in defective),
        ]
        judged = ablation(fitted.bank, fitted.params, (12, 16), labelled)
        found = {name: metrics.compute() for name, metrics in judged.items()}
        assert list(found) == [
            "distance",
            "distance + influence",
            "distance + concentration",
            "distance + response",
            "all equal",
            "shipped",
        ]
        assert found["shipped"] == found["distance"]
        assert found["distance"]["image_auroc"] == 1.0
        assert found["distance"]["pixel_auroc"] > 0.9
        assert all(set(metrics) == set(found["distance"]) for metrics in found.values())


# --- the system -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_tiny_noising_bundle(tmp_path_factory.mktemp("noising") / "bundle")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(params=["openvino", "ort"])
def system(request: pytest.FixtureRequest, tiny: Bundle) -> Iterator[Any]:
    with closing(open_noising(tiny, backend=request.param, threads=1)) as opened:
        yield opened


def pictures(count: int, *, defective: bool = False, seed: int = 5) -> list[Array]:
    rng = np.random.default_rng(seed)
    sizes = [(64, 64), (80, 60), (48, 100)]
    return [draw_part(rng, sizes[i % 3], defective=defective)[0] for i in range(count)]


def open_noising(bundle: Bundle, **options: Any) -> Any:
    """An opened bundle, with all that this system has beyond the protocol."""
    return open_system(bundle, **options)


def with_engine(bundle: Bundle, features: Sequence[Any] | Array) -> Any:
    """The system of a bundle whose graph answers the same features for every image."""
    entry = bundle.manifest.graphs["features"]
    engine = FunctionEngine(
        lambda feeds: {"features": np.repeat(np.asarray(features)[None], len(feeds["images"]), 0)},
        entry.inputs,
        entry.outputs,
    )
    return open_noising(bundle, backend="ort", engines={"features": engine})


class TestTheSystem:
    def test_tells_defective_from_good_parts(self, system: Any) -> None:
        good, bad = system.infer(pictures(4)[:1]), system.infer(pictures(1, defective=True))
        assert bad[0].score > good[0].score
        assert bad[0].is_anomalous

    def test_answers_with_maps_at_the_networks_size(self, system: Any) -> None:
        for result in system.infer(pictures(3)):
            for map_HW in (result.map_HW, result.influence_HW):
                assert map_HW.shape == (64, 64) and map_HW.dtype == np.float32
            assert result.threshold == system.bundle.manifest.thresholds["image"].value
            assert result.pixel_threshold == system.bundle.manifest.thresholds["pixel"].value

    def test_searches_the_patches_of_a_batch_together(
        self, system: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        features_BND = np.stack(
            [
                system.engines["features"].run({"images": preprocess.apply(system.spec, [each])})[
                    "features"
                ][0]
                for each in pictures(3)
            ]
        )
        apart = [system.judge.scores(each[None])[0] for each in features_BND]
        asked: list[int] = []
        real = system.judge.search.search

        def counted(queries_ND: Array) -> Any:
            asked.append(len(queries_ND))
            return real(queries_ND)

        monkeypatch.setattr(system.judge.search, "search", counted)
        together = system.judge.scores(features_BND)
        assert asked == [features_BND.shape[0] * features_BND.shape[1]]
        for (scores_N, influence_N), (alone_N, alone_influence_N) in zip(
            together, apart, strict=True
        ):
            np.testing.assert_array_equal(scores_N, alone_N)
            np.testing.assert_array_equal(influence_N, alone_influence_N)

    def test_gives_an_image_the_same_answer_whatever_its_batch(self, system: Any) -> None:
        images_of_both = pictures(3) + pictures(3, defective=True)
        together = system.infer(images_of_both)
        for image, result in zip(images_of_both, together, strict=True):
            (alone,) = system.infer([image])
            # a convolution may sum in another order for another batch: float32 rounding, in
            # standard deviations of a normal patch
            assert alone.score == pytest.approx(result.score, rel=1e-4, abs=1e-4)
            np.testing.assert_allclose(alone.map_HW, result.map_HW, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(
                alone.influence_HW, result.influence_HW, rtol=1e-4, atol=1e-3
            )

    def test_scores_a_patch_as_the_formulas_say(self, system: Any, tiny: Bundle) -> None:
        (image,) = pictures(1, defective=True)
        batch = preprocess.apply(tiny.manifest.preprocess, [image])
        features = system.engines["features"].run({"images": batch})["features"][0]
        params, rows = system.params, system.judge.bank.rows_MD
        scores, uneven = [], []
        for x in features:
            signals = plain_signals(x, plain_nearest(x, rows, params.k), params.mean_distance)
            standard = {
                n: (signals[n] - params.signals[n].mean) / params.signals[n].std for n in SIGNALS
            }
            scores.append(sum(params.weights[n] * standard[n] for n in SIGNALS) / params.score_std)
            uneven.append(standard["influence"])
        (result,) = system.infer([image])
        # float32 distances divided by the normal spread
        assert result.score == pytest.approx(max(scores), rel=1e-4)
        want = anomaly_map(np.array(scores), params.grid, (64, 64), params.smoothing)
        np.testing.assert_allclose(result.map_HW, want, rtol=1e-4, atol=1e-4)
        want = anomaly_map(np.array(uneven), params.grid, (64, 64), 0)
        np.testing.assert_allclose(result.influence_HW, want, rtol=1e-4, atol=1e-3)

    def test_answers_alike_with_the_fast_search(
        self, system: Any, tiny: Bundle, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(search_module, "_WORTHWHILE_BLOCKS", 2)
        with closing(open_noising(tiny, backend=system.backend, threads=1)) as fast:
            assert fast.judge.search._engine is not None and system.judge.search._engine is None
            for one, other in zip(fast.infer(pictures(2)), system.infer(pictures(2)), strict=True):
                # the same rows: only ties may be named in another order
                np.testing.assert_allclose(one.map_HW, other.map_HW, rtol=1e-5, atol=1e-5)

    def test_writes_results_as_json(self, system: Any) -> None:
        for result in system.infer(pictures(1) + pictures(1, defective=True)):
            content = json.loads(json.dumps(result.to_json(), allow_nan=False))
            assert content["label"] == ("anomalous" if result.is_anomalous else "normal")
            assert content["score"] == pytest.approx(result.score, abs=1e-6)
            assert content["anomalous_area"] == pytest.approx(
                (result.map_HW >= result.pixel_threshold).mean(), abs=1e-6
            )

    def test_a_score_on_the_border_is_anomalous(self, system: Any) -> None:
        (result,) = system.infer(pictures(1))
        assert replace(result, threshold=result.score).is_anomalous
        assert not replace(result, threshold=float(np.nextafter(result.score, np.inf))).is_anomalous

    def test_draws_image_map_and_marks_side_by_side(self, system: Any) -> None:
        image = pictures(2)[1]
        (result,) = system.infer([image])
        drawn = system.draw(image, result)
        assert drawn.dtype == np.uint8 and drawn.ndim == 3 and drawn.shape[2] == 3
        assert drawn.shape[1] >= 3 * image.shape[1]

    def test_of_no_images_answers_nothing(self, system: Any) -> None:
        assert system.infer([]) == []

    @pytest.mark.parametrize(
        "image",
        [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3), np.float32)],
        ids=["grey", "float"],
    )
    def test_refuses_what_is_no_picture(self, system: Any, image: Array) -> None:
        with pytest.raises(InputError, match="uint8"):
            system.infer([image])

    def test_closed_twice_is_closed(self, tiny: Bundle) -> None:
        opened = open_noising(tiny, backend="ort")
        opened.close()
        opened.close()
        with pytest.raises(EngineError, match="closed"):
            opened.infer(pictures(1))


class TestFeaturesOfABrokenNetwork:
    @pytest.mark.parametrize("value", [np.nan, np.inf])
    @pytest.mark.parametrize("fast", [False, True])
    def test_are_an_error_and_no_normal_image(
        self, tiny: Bundle, value: float, fast: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if fast:
            monkeypatch.setattr(search_module, "_WORTHWHILE_BLOCKS", 2)
        features = np.zeros((64, 16), np.float32)
        features[10, 3] = value
        with (
            closing(with_engine(tiny, features)) as system,
            pytest.raises(EngineError, match="not finite") as caught,
        ):
            system.infer(pictures(1))
        assert caught.value.fix

    def test_of_another_width_are_refused(self, tiny: Bundle) -> None:
        entry = tiny.manifest.graphs["features"]
        spec = entry.outputs["features"].model_copy(update={"shape": ("batch", 64, 15)})
        engine = FunctionEngine(
            lambda feeds: {"features": np.zeros((len(feeds["images"]), 64, 15), np.float32)},
            entry.inputs,
            {"features": spec},
        )
        with (
            closing(open_noising(tiny, backend="ort", engines={"features": engine})) as system,
            pytest.raises(BankError, match="width 16"),
        ):
            system.infer(pictures(1))


class TestABundleOfOtherParameters:
    def test_is_refused_with_the_field(self, tiny: Bundle, tmp_path: Path) -> None:
        params = tiny.manifest.params | {"score_std": -1.0}
        manifest = tiny.manifest.model_copy(update={"params": params})
        files = {name: tiny.path(name) for name in tiny.manifest.files}
        broken = bundles.write(tmp_path / "bundle", manifest, files)
        with pytest.raises(BundleError, match="parameters"):
            open_noising(broken, backend="ort")


class TestAnEvaluation:
    def test_measures_the_test_images(self, system: Any, parts: Path) -> None:
        seen: list[tuple[int, int]] = []
        found = system.evaluate(parts, progress=lambda *now: seen.append(now)).metrics
        assert seen[-1] == (8, 8)
        samples = mvtec(parts, "test")
        scores = np.array([system.infer([images.read(s.path)])[0].score for s in samples])
        labels = np.array([s.label for s in samples], bool)
        wins = scores[labels][:, None] > scores[~labels]
        assert found["image_auroc"] == pytest.approx(wins.mean())
        assert {"image_ap", "image_f1max", "pixel_auroc", "pixel_ap", "aupro"} <= set(found)
        assert found["image_auroc"] > 0.9 and found["pixel_auroc"] > 0.8

    def test_of_a_folder_without_test_images_is_refused(self, system: Any, tmp_path: Path) -> None:
        images.write(tmp_path / "train/good/0.png", pictures(1)[0])
        with pytest.raises(DatasetError):
            system.evaluate(tmp_path)


class TestGroundTruth:
    spec = preprocess.PreprocessSpec(size=(32, 32))

    def test_of_a_normal_image_is_empty(self, tmp_path: Path) -> None:
        got = noising.target_mask(MvtecSample(tmp_path / "a.png", 0, "good", None), self.spec)
        assert got is not None and got.shape == (32, 32) and not got.any()

    def test_of_a_defect_without_a_mask_is_unknown(self, tmp_path: Path) -> None:
        sample = MvtecSample(tmp_path / "a.png", 1, "cut", None)
        assert noising.target_mask(sample, self.spec) is None

    def test_is_placed_like_the_image(self, tmp_path: Path) -> None:
        mask = np.zeros((64, 64), np.uint8)
        mask[16:32, 32:48] = 255
        images.write(tmp_path / "m.png", mask)
        sample = MvtecSample(tmp_path / "a.png", 1, "cut", tmp_path / "m.png")
        got = noising.target_mask(sample, self.spec)
        want = np.zeros((32, 32), bool)
        want[8:16, 16:24] = True
        assert got is not None and got.dtype == bool and np.array_equal(got, want)


class TestMoreNormalImages:
    @pytest.fixture
    def unusual(self, tmp_path: Path) -> Path:
        """Parts that the bank has not seen: another colour; one suffix in capitals."""
        folder = tmp_path / "new"
        for i, image in enumerate(pictures(3, seed=9)):
            images.write(folder / f"{i}.png", image[..., ::-1] // 2 + np.uint8(100))
        (folder / "2.png").rename(folder / "2.PNG")
        return folder

    def test_make_their_like_normal_and_leave_the_rest(
        self, tiny: Bundle, unusual: Path, tmp_path: Path
    ) -> None:
        count = extend(tiny, unusual, tmp_path / "out", max_rows=50, backend="ort")
        grown = bundles.read(tmp_path / "out")
        old, new = (Bank.load(b.asset("bank")) for b in (tiny, grown))
        assert count == len(new) - len(old) == 50
        assert np.array_equal(new.rows_MD[: len(old)], old.rows_MD)
        assert grown.manifest.thresholds == tiny.manifest.thresholds
        assert grown.manifest.params == tiny.manifest.params
        with (
            closing(open_noising(tiny, backend="ort")) as before,
            closing(open_noising(grown, backend="ort")) as after,
        ):
            for path in sorted(unusual.iterdir()):
                image = images.read(path)
                assert after.infer([image])[0].score < before.infer([image])[0].score

    def test_never_add_more_rows_than_there_are(
        self, tiny: Bundle, unusual: Path, tmp_path: Path
    ) -> None:
        count = extend(tiny, unusual, tmp_path / "out", max_rows=10_000, backend="ort")
        assert 0 < count <= 3 * 64

    def test_must_be_pictures(self, tiny: Bundle, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        (tmp_path / "film.mp4").write_bytes(b"x")
        for source in (tmp_path / "empty", tmp_path / "film.mp4"):
            with pytest.raises(InputError, match="pictures"):
                extend(tiny, source, tmp_path / "out", max_rows=5, backend="ort")
        assert not (tmp_path / "out").exists()

    def test_cannot_be_added_to_another_system(
        self, tiny: Bundle, unusual: Path, tmp_path: Path
    ) -> None:
        other = replace(tiny, manifest=tiny.manifest.model_copy(update={"system": "stripe"}))
        with pytest.raises(BundleError, match="'stripe'"):
            extend(other, unusual, tmp_path / "out", max_rows=5)


# --- a discriminator in the bank's place ----------------------------------------------------------


class TestHoldingOut:
    @given(num=st.integers(2, 300), folds=st.integers(2, 10), seed=st.integers(0, 99))
    @settings(max_examples=60, deadline=None)
    def test_parts_the_images(self, num: int, folds: int, seed: int) -> None:
        learned, held_out = hold_out(num, FitConfig(folds=folds), seed=seed)
        assert np.array_equal(np.sort(np.concatenate([learned, held_out])), np.arange(num))
        assert 1 <= len(held_out) <= -(-num // folds)
        assert len(learned) >= 1

    def test_needs_two_images(self) -> None:
        with pytest.raises(InputError, match="two normal images"):
            hold_out(1, FitConfig(), seed=0)


class TestTheUnitOfADiscriminator:
    grid = (4, 6)

    def scores(self, num: int = 40) -> Array:
        rng = np.random.default_rng(0)
        return (rng.standard_normal((num, 24)) * 3 - 7).astype(np.float32)

    def test_is_the_spread_of_held_out_patches(self) -> None:
        scores = self.scores()
        params, _ = calibrate(scores, self.grid, (32, 48), FitConfig())
        exact = scores.astype(np.float64)
        assert params.scores.mean == pytest.approx(exact.mean(), rel=1e-12)
        assert params.scores.std == pytest.approx(exact.std(), rel=1e-12)
        want = (exact[0] - exact.mean()) / exact.std()
        # float32
        np.testing.assert_allclose(params.standardise(scores[0]), want, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("budget", [0.0, 0.1])
    def test_has_thresholds_that_keep_the_budget(self, budget: float) -> None:
        scores = self.scores()
        config = FitConfig(false_reject=budget, smoothing=2.0, image_score="patch", rule="rank")
        params, thresholds = calibrate(scores, self.grid, (32, 48), config)
        standard = [params.standardise(scores_N) for scores_N in scores]
        rejected = sum(s.max() >= thresholds["image"].value for s in standard)
        assert rejected == budget * len(scores)
        maps = [anomaly_map(s, self.grid, (32, 48), 2.0) for s in standard]
        assert sum(m.max() >= thresholds["pixel"].value for m in maps) == budget * len(scores)
        assert "40 held-out training pictures" in thresholds["image"].source

    def test_of_scores_that_are_all_alike_is_not_nothing(self) -> None:
        params, thresholds = calibrate(
            np.zeros((3, 24), np.float32), self.grid, (32, 48), FitConfig()
        )
        assert params.scores.std > 0 and thresholds["image"].value > 0


def brightness_graph() -> onnx.ModelProto:
    """images (batch, 3, 64, 64) -> scores (batch, 64): twice a patch's mean colours."""
    weight = numpy_helper.from_array(np.full((1, 3, 8, 8), 2 / 64, np.float32), "weight")
    shape = numpy_helper.from_array(np.array([0, -1], np.int64), "shape")
    nodes = [
        helper.make_node("Conv", ["images", "weight"], ["map"], strides=[8, 8], name="conv"),
        helper.make_node("Reshape", ["map", "shape"], ["scores"], name="flatten"),
    ]
    images_info = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 64, 64])
    scores_info = helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", 64])
    graph = helper.make_graph(nodes, "brightness", [images_info], [scores_info], [weight, shape])
    opset = [helper.make_opsetid("", 20)]
    return helper.make_model(graph, opset_imports=opset, ir_version=10)


@pytest.fixture(scope="module")
def bankless(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle whose discriminator takes what is bright for a defect."""
    work = tmp_path_factory.mktemp("bankless")
    onnx.save(brightness_graph(), work / "discriminate.onnx")
    params = noising.DiscriminatorParams(
        grid=(8, 8), smoothing=2.0, scores=Statistics(mean=1.5, std=0.25)
    )
    specs = {
        "inputs": {"images": TensorSpec(dtype="float32", shape=("batch", 3, 64, 64))},
        "outputs": {"scores": TensorSpec(dtype="float32", shape=("batch", 64))},
    }
    manifest = bundles.Manifest(
        system=noising.NAME,
        graphs={
            "discriminate": bundles.GraphEntry(**specs, variants={"float": "discriminate.onnx"})
        },
        preprocess=preprocess.PreprocessSpec(size=(64, 64)),
        thresholds={
            "image": bundles.Threshold(value=2.0, source="drawn"),
            "pixel": bundles.Threshold(value=1.0, source="drawn"),
        },
        params=params.model_dump(mode="json"),
    )
    return bundles.write(
        work / "bundle", manifest, {"discriminate.onnx": work / "discriminate.onnx"}
    )


class TestASystemWithADiscriminator:
    @pytest.mark.parametrize("backend", ["openvino", "ort"])
    def test_answers_with_the_graphs_scores_in_its_unit(
        self, bankless: Bundle, backend: str
    ) -> None:
        pictures_of_both = pictures(3)
        batch = preprocess.apply(bankless.manifest.preprocess, pictures_of_both)
        patches = batch.astype(np.float64).reshape(3, 3, 8, 8, 8, 8).mean(axis=(3, 5))
        with closing(open_noising(bankless, backend=backend, threads=1)) as system:
            results = system.infer(pictures_of_both)
            assert system.infer([]) == []
        for patch_C88, result in zip(patches, results, strict=True):
            want = (2 * patch_C88.sum(axis=0).ravel() - 1.5) / 0.25
            # float32 sums of 192 products
            assert result.score == pytest.approx(want.max(), rel=1e-4, abs=1e-4)
            want_map = anomaly_map(want, (8, 8), (64, 64), 2.0)
            np.testing.assert_allclose(result.map_HW, want_map, rtol=1e-4, atol=1e-4)
            assert result.influence_HW is None
            assert (result.threshold, result.pixel_threshold) == (2.0, 1.0)
            assert result.is_anomalous == (result.score >= 2.0)

    def test_is_judged_and_drawn_as_any_other(self, bankless: Bundle, parts: Path) -> None:
        (image,) = pictures(1)
        with closing(open_noising(bankless, backend="ort", threads=1)) as system:
            (result,) = system.infer([image])
            assert system.draw(image, result).dtype == np.uint8
            assert 0 <= system.evaluate(parts).metrics["image_auroc"] <= 1

    def test_refuses_scores_that_are_not_finite(self, bankless: Bundle) -> None:
        entry = bankless.manifest.graphs["discriminate"]
        engine = FunctionEngine(
            lambda feeds: {"scores": np.full((len(feeds["images"]), 64), np.nan, np.float32)},
            entry.inputs,
            entry.outputs,
        )
        system = open_noising(bankless, backend="ort", engines={"discriminate": engine})
        with pytest.raises(EngineError, match="'discriminate'"):
            system.infer(pictures(1))

    def test_has_no_bank_that_could_be_extended(
        self, bankless: Bundle, parts: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(BundleError, match="has no bank") as caught:
            extend(bankless, parts / "train/good", tmp_path / "out", max_rows=5)
        assert "judge=bank" in str(caught.value.fix)
        assert not (tmp_path / "out").exists()

    def test_with_parameters_of_a_bank_is_refused(self, bankless: Bundle, tiny: Bundle) -> None:
        mixed = bankless.manifest.model_copy(update={"params": tiny.manifest.params})
        with pytest.raises(BundleError, match="parameters"):
            open_noising(replace(bankless, manifest=mixed), backend="ort")

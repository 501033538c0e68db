from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from engineworks.runtime.bank import Bank
from engineworks.runtime.errors import BankError, InputError
from engineworks.runtime.systems.noising.ablation import Labelled, ablation
from engineworks.runtime.systems.noising.fit import FitConfig, Fitted, fit, hold_out
from engineworks.runtime.systems.noising.signals import (
    SIGNALS,
    anomaly_map,
    combine,
    patch_signals,
)
from engineworks.runtime.tensors import Array
from tests.runtime.systems.noising_reference import (
    plain_nearest,
    plain_signals,
)


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

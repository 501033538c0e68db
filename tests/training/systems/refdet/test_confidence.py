"""Scores to shares of right boxes."""

from __future__ import annotations

import numpy as np
import pytest

from engineworks.training.systems.refdet.confidence import fitted

pytestmark = pytest.mark.train


def sigmoid(x: np.ndarray) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-x)))


def test_finds_the_scale_and_shift_that_the_data_have() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, 40_000)
    right = rng.random(len(logits)) < sigmoid(0.7 * logits - 1.5)
    found = fitted(sigmoid(logits), right)
    # the deviation of both is about 0.02 with so many
    assert found == pytest.approx((0.7, -1.5), abs=0.08)


def test_half_of_the_boxes_at_a_half_are_right_afterwards() -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(1, 1.5, 40_000)
    right = rng.random(len(logits)) < sigmoid(2 * logits - 3)
    factors = fitted(sigmoid(logits), right)
    assert factors is not None
    sure = sigmoid(factors[0] * logits + factors[1])
    near = np.abs(sure - 0.5) < 0.1
    assert right[near].mean() == pytest.approx(0.5, abs=0.04)


def test_nothing_is_fitted_on_too_little_or_on_what_falls() -> None:
    scores = np.linspace(0.1, 0.9, 100)
    assert fitted(scores, np.arange(100) < 5) is None
    assert fitted(scores, scores < 0.5) is None


def test_what_is_told_apart_without_error_stays_finite() -> None:
    scores = np.linspace(0.1, 0.9, 100)
    factors = fitted(scores, scores > 0.5)
    assert factors is not None
    assert np.isfinite(factors).all()


@pytest.mark.parametrize("middle", [-10.0, -6.0, 6.0, 10.0])
def test_finds_them_where_nearly_all_scores_are_small_or_large(middle: float) -> None:
    rng = np.random.default_rng(2)
    logits = rng.normal(middle, 1, 40_000)
    right = rng.random(len(logits)) < sigmoid(2 * (logits - middle) - 1)
    found = fitted(sigmoid(logits), right)
    # the deviation of the scale is about 0.03, and of the shift that times the middle
    assert found == pytest.approx((2, -2 * middle - 1), abs=0.1 * abs(middle))

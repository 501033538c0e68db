from __future__ import annotations

import numpy as np
import pytest

from engineworks.training.systems.noising.whitening import whitening


def pictures(seed: int = 0, width: int = 6) -> list[np.ndarray]:
    """Patches whose directions vary by 1 to 100 times, far from zero."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((width, width)) * np.logspace(0, 2, width)[:, None]
    return [(rng.standard_normal((200, width)) @ mixed + 50).astype(np.float32) for _ in range(3)]


def test_is_a_power_of_the_shrunk_covariance() -> None:
    rows = np.concatenate(pictures()).astype(np.float64)
    covariance = np.cov(rows.T, bias=True)
    shrunk = covariance + 0.1 * np.trace(covariance) / 6 * np.eye(6)
    found = whitening(pictures(), 0.5).astype(np.float64)
    # its fourth power is the inverse up to a factor: strength 0.5 is the root of an inverse root
    product = np.linalg.matrix_power(found, 4) @ shrunk
    assert np.abs(product / product[0, 0] - np.eye(6)).max() < 1e-3  # of float32 to the fourth
    assert np.array_equal(found, found.T) or np.abs(found - found.T).max() < 1e-6


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_keeps_the_sum_of_all_variances(strength: float) -> None:
    rows = np.concatenate(pictures()).astype(np.float64)
    after = rows @ whitening(pictures(), strength)
    assert after.var(axis=0).sum() == pytest.approx(rows.var(axis=0).sum(), rel=1e-5)


def test_without_strength_changes_nothing() -> None:
    assert np.abs(whitening(pictures(), 0.0) - np.eye(6)).max() < 1e-6


def test_of_pictures_without_anything_in_them_changes_nothing() -> None:
    blank = [np.full((5, 4), 3, np.float32)]
    assert np.array_equal(whitening(blank, 0.5), np.eye(4))


def test_brings_variances_together() -> None:
    rows = np.concatenate(pictures())

    def ratio(values: np.ndarray) -> float:
        variances = np.linalg.eigvalsh(np.cov(values.T.astype(np.float64)))
        return float(variances[-1] / variances[0])

    spreads = [ratio(rows @ whitening(pictures(), s)) for s in (0.0, 0.25, 0.5)]
    assert spreads[0] > spreads[1] > spreads[2]

from __future__ import annotations

import numpy as np
import pytest

from engineworks.runtime.systems.noising.foreground import Foreground
from engineworks.runtime.tensors import Array

GRID = (9, 12)


def pictures(num: int, *, offset: float = 0.0) -> tuple[Array, Array]:
    """Features (num, N, D) of a part amid ground, and which patches show it (N,)."""
    rng = np.random.default_rng(0)
    is_part = np.zeros(GRID, bool)
    is_part[2:7, 3:9] = True
    part, ground = rng.standard_normal((2, 16)) * 2
    features = np.where(is_part.ravel()[:, None], part, ground) + offset
    noise = rng.standard_normal((num, is_part.size, 16)) * 0.3
    return (features + noise).astype(np.float32), is_part.ravel()


@pytest.mark.parametrize("offset", [0.0, 5.0])  # the border may lie anywhere along the direction
def test_the_part_is_told_from_the_ground(offset: float) -> None:
    features_IND, is_part_N = pictures(6, offset=offset)
    told = Foreground.learn(features_IND[:5], GRID, np.random.default_rng(0))
    assert told.direction_D.shape == (16,)
    assert told.direction_D.dtype == np.float32
    found = told.shows(features_IND[5], GRID)
    assert found[is_part_N].all()
    grown = np.zeros(GRID, bool)
    grown[1:8, 2:10] = True  # its rim belongs to it
    assert not found[~grown.ravel()].any()


def test_a_hole_in_the_part_still_belongs_to_it() -> None:
    features_IND, is_part_N = pictures(6)
    told = Foreground.learn(features_IND[:5], GRID, np.random.default_rng(0))
    damaged_ND = features_IND[5].copy()
    damaged_ND[4 * GRID[1] + 5] = damaged_ND[0]  # ground shows amid the part
    assert told.shows(damaged_ND, GRID)[is_part_N].all()


def test_pictures_without_any_contrast_are_no_error() -> None:
    flat_IND = np.ones((2, 108, 16), np.float32)
    told = Foreground.learn(flat_IND, GRID, np.random.default_rng(0))
    assert np.isfinite(told.direction_D).all()
    assert np.isfinite(told.border)


def test_the_ground_is_no_more_than_normal() -> None:
    features_IND, is_part_N = pictures(6)
    told = Foreground.learn(features_IND[:5], GRID, np.random.default_rng(0))
    scores_N = np.linspace(-2, 5, is_part_N.size, dtype=np.float32)
    got = told.judge(scores_N, features_IND[5], GRID)
    is_ground_N = ~told.shows(features_IND[5], GRID)
    np.testing.assert_array_equal(got[~is_ground_N], scores_N[~is_ground_N])
    np.testing.assert_array_equal(got[is_ground_N], np.minimum(scores_N[is_ground_N], 0))

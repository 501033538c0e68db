from __future__ import annotations

from contextlib import closing
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engineworks.runtime.errors import BundleError, InputError
from engineworks.runtime.systems.noising.fit import FitConfig, fit
from engineworks.runtime.systems.noising.layers import (
    LayerBank,
    Layers,
    LayerSearch,
    layer_scores,
    slices,
    window_rows,
    window_scores,
)
from engineworks.runtime.tensors import Array

WIDTHS = (6, 3, 8)


def unit_rows(rng: np.random.Generator, *shape: int) -> Array:
    """(..., D) float32, each layer of each row of length 1."""
    rows = rng.standard_normal((*shape, sum(WIDTHS)))
    for part in slices(WIDTHS):
        rows[..., part] /= np.linalg.norm(rows[..., part], axis=-1, keepdims=True)
    return rows.astype(np.float32)


def published(
    image_ND: Array,
    bank_IND: Array,
    grid: tuple[int, int],
    radius: int,
    widths: tuple[int, ...] = WIDTHS,
) -> Array:
    """RAD's patch scores, one number at a time in float64, from features of any length."""
    h, w = grid
    ends = np.cumsum([0, *widths])
    scores = np.zeros(h * w)
    for j in range(h * w):
        r, c = divmod(j, w)
        for first, last in pairwise(ends):
            x = image_ND[j, first:last].astype(np.float64)
            best = -np.inf
            for rows_ND in bank_IND:
                for rr in range(max(0, r - radius), min(h - 1, r + radius) + 1):
                    for cc in range(max(0, c - radius), min(w - 1, c + radius) + 1):
                        m = rows_ND[rr * w + cc, first:last].astype(np.float64)
                        cosine = sum(a * b for a, b in zip(x, m, strict=True))
                        cosine /= np.sqrt(sum(a * a for a in x)) * np.sqrt(sum(b * b for b in m))
                        best = max(best, cosine)
            scores[j] += (1 - best) / len(widths)
    return scores


@settings(max_examples=25, deadline=None)
@given(
    h=st.integers(1, 4),
    w=st.integers(1, 4),
    images=st.integers(1, 3),
    radius=st.integers(0, 5),
    seed=st.integers(0, 99),
)
def test_scores_are_the_published_ones(h: int, w: int, images: int, radius: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    bank_IND, image_ND = unit_rows(rng, images, h * w), unit_rows(rng, h * w)
    image_ND[0] = bank_IND[0, 0]  # a patch that is known: its score is 0
    rows_MD = bank_IND.swapaxes(0, 1).reshape(-1, sum(WIDTHS))  # place by place
    want = published(image_ND, bank_IND, (h, w), radius)
    got = window_scores(image_ND, rows_MD, WIDTHS, grid=(h, w), window=radius)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert got.dtype == np.float32
    anywhere = published(image_ND, bank_IND, (h, w), max(h, w))
    np.testing.assert_allclose(layer_scores(image_ND, rows_MD, WIDTHS), anywhere, atol=1e-5)


@pytest.mark.parametrize("backend", ["ort", "openvino"])
def test_the_fast_search_gives_the_same_scores(backend: str) -> None:
    rng = np.random.default_rng(1)
    # enough rows for the INT8 product, not too far from the patches
    rows_MD = unit_rows(rng, 4000)
    features_ND = rows_MD[rng.permutation(4000)[:64]] + 0.1 * unit_rows(rng, 64)
    for part in slices(WIDTHS):
        features_ND[:, part] /= np.linalg.norm(features_ND[:, part], axis=1, keepdims=True)
    bank = LayerBank(rows_MD, Layers(widths=WIDTHS), (8, 8))
    with closing(LayerSearch(bank, backend=backend)) as fast:
        got, _ = fast.search(features_ND)
    want, _ = bank.search(features_ND, 1)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_what_is_normal_elsewhere_is_none_here() -> None:
    rng = np.random.default_rng(2)
    bank_IND = unit_rows(rng, 3, 25)
    rows_MD = bank_IND.swapaxes(0, 1).reshape(-1, sum(WIDTHS))
    image_ND = bank_IND[0].copy()
    image_ND[0] = bank_IND[1, 24]  # from the other corner
    anywhere = layer_scores(image_ND, rows_MD, WIDTHS)
    assert anywhere.max() < 1e-5
    nearby = window_scores(image_ND, rows_MD, WIDTHS, grid=(5, 5), window=1)
    assert nearby[0] > 0.05
    assert nearby[1:].max() < 1e-5


class TestTheRowsOfAWindow:
    def test_are_as_many_for_each_place_and_as_different_as_they_can_be(self) -> None:
        features_IND = unit_rows(np.random.default_rng(3), 6, 4)
        images = np.array([0, 2, 3, 5])
        rows, radius = window_rows(features_IND, images, 9, np.random.default_rng(0))
        rows = rows.reshape(4, 2, -1)
        for place in range(4):
            known = {row.tobytes() for row in features_IND[images, place]}
            assert {row.tobytes() for row in rows[place]} <= known
            # the second is the farthest from the first
            first, second = rows[place]
            others = features_IND[images, place]
            farthest = np.linalg.norm(others - first, axis=1).max()
            assert np.linalg.norm(second - first) == pytest.approx(farthest, rel=1e-5)
            distances = np.linalg.norm(others[:, None] - rows[place], axis=2)
            assert distances.min(axis=1).max() <= radius * (1 + 1e-5)

    def test_are_filled_up_where_images_are_equal(self) -> None:
        features_IND = np.repeat(unit_rows(np.random.default_rng(3), 1, 4), 3, axis=0)
        rows, radius = window_rows(features_IND, np.arange(3), 12, np.random.default_rng(0))
        assert radius == 0
        assert rows.shape == (12, sum(WIDTHS))
        assert (rows.reshape(4, 3, -1) == features_IND[0][:, None]).all()

    def test_need_room_for_each_place(self) -> None:
        features_IND = unit_rows(np.random.default_rng(3), 2, 4)
        with pytest.raises(InputError, match="each of 4 places, and the bank has room for 3"):
            window_rows(features_IND, np.arange(2), 3, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("widths", "window", "message"),
    [((6, 3), None, "17 wide"), (WIDTHS, 1, "7 rows .* each place")],
)
def test_a_bank_that_does_not_fit_is_refused(
    widths: tuple[int, ...], window: int | None, message: str
) -> None:
    with pytest.raises(BundleError, match=message):
        LayerBank(
            unit_rows(np.random.default_rng(0), 7), Layers(widths=widths, window=window), (2, 3)
        )


class TestAFit:
    def config(self, **settings: Any) -> FitConfig:
        chosen = {"layers": True, "coreset_ratio": 1.0, "max_rows": 64, "projection": None}
        return FitConfig(**{**chosen, "folds": 3, "smoothing": 0.0, **settings})

    @pytest.mark.parametrize("window", [None, 1])
    def test_takes_its_unit_from_pictures_that_the_bank_does_not_know(
        self, window: int | None
    ) -> None:
        features_IND = unit_rows(np.random.default_rng(4), 3, 16)
        fitted = fit(
            features_IND, (4, 4), (32, 32), self.config(window=window), seed=0, widths=WIDTHS
        )
        assert fitted.params.layers == Layers(widths=WIDTHS, window=window)
        assert len(fitted.bank) == 48  # every patch: as published
        radius = 4 if window is None else window
        raw = [
            published(features_IND[i], np.delete(features_IND, i, 0), (4, 4), radius)
            for i in range(3)
        ]
        found = fitted.params.signals["distance"]
        assert found.mean == pytest.approx(np.mean(raw), abs=1e-5)
        assert found.std == pytest.approx(np.std(raw), abs=1e-5)
        held_out = fitted.thresholds["image"].held_out
        assert held_out is not None
        highest = (np.max(raw) - found.mean) / found.std / fitted.params.score_std
        assert held_out.quantiles[-1] == pytest.approx(highest, abs=1e-4)

    @pytest.mark.parametrize("window", [None, 1])
    def test_of_one_picture_takes_its_quarters(self, window: int | None) -> None:
        features_IND = unit_rows(np.random.default_rng(5), 1, 36)
        fitted = fit(
            features_IND, (6, 6), (48, 48), self.config(window=window), seed=0, widths=WIDTHS
        )
        assert len(fitted.bank) == 36
        assert np.isfinite(fitted.thresholds["image"].value)

    def test_with_a_foreground_scores_the_part_alone(self) -> None:
        rng = np.random.default_rng(6)
        features_IND = unit_rows(rng, 1, 1) + 0.05 * unit_rows(rng, 4, 36)
        is_part_N = np.zeros((6, 6), bool)
        is_part_N[2:4, 2:4] = True
        features_IND[:, is_part_N.ravel()] += unit_rows(rng, 1, 1)
        features_IND[3, 0] += 0.5 * unit_rows(rng, 1)[0]  # a blot on the ground
        for part in slices(WIDTHS):
            features_IND[..., part] /= np.linalg.norm(features_IND[..., part], axis=-1)[..., None]
        with_ground, without = (
            fit(features_IND, (6, 6), (48, 48), self.config(foreground=on), seed=0, widths=WIDTHS)
            for on in (False, True)
        )
        assert with_ground.foreground is with_ground.params.foreground is None
        assert without.foreground is not None
        assert without.params.foreground == without.foreground.border
        highest = [f.thresholds["image"].held_out for f in (with_ground, without)]
        assert highest[0] is not None
        assert highest[1] is not None
        assert highest[1].quantiles[-1] < highest[0].quantiles[-1] / 2

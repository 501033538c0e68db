"""More pixels than fit into memory give the same measures."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engineworks.runtime import curves, pixels, spool
from engineworks.runtime.metrics import AnomalyMetrics
from engineworks.runtime.pixels import Pixels
from engineworks.runtime.tensors import Array


def drawn(seed: int, num: int, decimals: int) -> list[tuple[Array, Array]]:
    rng = np.random.default_rng(seed)
    found = []
    for i in range(num):
        height, width = rng.integers(4, 20, 2)
        mask = np.zeros((height, width), bool)
        if i % 3:
            mask[1:4, 2 : 2 + i] = True
            mask[-1, -1] = i % 2
        scores = np.round(rng.random((height, width)) + 0.4 * mask, decimals)
        found.append((scores.astype(np.float32), mask))
    return found


def measured(images: list[tuple[Array, Array]]) -> dict[str, float]:
    metrics = AnomalyMetrics()
    for scores, mask in images:
        metrics.update(float(scores.max()), int(mask.any()), scores, mask)
    return metrics.compute()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 9), st.integers(1, 6))
def test_measures_do_not_depend_on_what_is_kept_in_memory(
    seed: int, num: int, decimals: int
) -> None:
    images = drawn(seed, num, decimals)
    whole = measured(images)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pixels, "_AT_ONCE", 50)
        patch.setattr(curves, "_POSITIVES_AT_ONCE", 7)
        patch.setattr(spool, "_IN_MEMORY", 100)
        parted = measured(images)
    assert parted == pytest.approx(whole, abs=1e-12)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 5))
def test_maps_and_masks_come_back_as_they_were(seed: int, num: int) -> None:
    images, kept = drawn(seed, num, 6), Pixels()
    for scores, mask in images:
        kept.add(scores, mask)
    for _ in range(2):
        for (scores, mask), (got, got_mask) in zip(images, kept, strict=True):
            assert np.array_equal(scores, got) and np.array_equal(mask, got_mask)
    assert kept.num_positives == sum(int(mask.sum()) for _, mask in images)
    assert kept.num_negatives == sum(int((~mask).sum()) for _, mask in images)


def test_a_sample_has_the_quantiles_of_all() -> None:
    kept = Pixels()
    everything = [
        (i + np.arange(400, dtype=np.float32).reshape(20, 20), np.zeros((20, 20), bool))
        for i in range(20)
    ]
    for scores, mask in everything:
        kept.add(scores, mask)
    positives, normal = kept.sample(200)
    assert len(positives) == 0 and 200 <= len(normal) <= 220
    wanted = np.quantile(np.concatenate([s.ravel() for s, _ in everything]), [0.1, 0.5, 0.9])
    assert np.quantile(normal, [0.1, 0.5, 0.9]) == pytest.approx(
        wanted, abs=21
    )  # half a step of 40


def test_memory_does_not_grow_with_the_number_of_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pixels, "_AT_ONCE", 1 << 16)
    monkeypatch.setattr(spool, "_IN_MEMORY", 1 << 18)
    rng = np.random.default_rng(0)
    mask = np.zeros((256, 256), bool)
    mask[3:9, 3:9] = True

    def peak(num: int) -> int:
        metrics = AnomalyMetrics()
        tracemalloc.start()
        for _ in range(num):
            metrics.update(1.0, 1, rng.random((256, 256)), mask)
        metrics.update(0.0, 0, rng.random((256, 256)), None)
        metrics.evaluation("image", 0.5, ["x"] * (num + 1))
        return tracemalloc.get_traced_memory()[1]

    try:
        few, many = peak(4), peak(40)
    finally:
        tracemalloc.stop()
    assert many < 1.2 * few  # positives and image scores are all that is added

"""Every method against a plain, slow reference in float64 on the raw data."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engineworks.calibration import ranges
from engineworks.calibration.observe import Histogram
from engineworks.runtime.errors import CalibrationError, UsageError


def draw(kind: str, seed: int = 0, size: int = 20_000) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = {
        "normal": rng.normal(size=size),
        "relu": np.maximum(rng.normal(size=size), 0),
        "outliers": np.where(rng.random(size) < 1e-3, 12, 1) * rng.normal(size=size),
        "laplace": rng.laplace(size=size),
        "sparse": np.where(rng.random(size) < 0.01, rng.normal(size=size), 0),
        "uniform": rng.uniform(-3, 3, size),
    }[kind]
    return values.astype(np.float32)


KINDS = ("normal", "relu", "outliers", "laplace", "sparse", "uniform")


def observed(values: np.ndarray) -> Histogram:
    histogram = Histogram()
    for part in np.array_split(values, 5):
        histogram.add(part)
    return histogram


def fake_quantized(values: np.ndarray, amax: float) -> np.ndarray:
    step = amax / 127
    return np.clip(np.rint(values.astype(np.float64) / step), -127, 127) * step


def slow_entropy(counts: np.ndarray) -> int:
    """Migacz 2017, literally: number of bins of the best range; the widest among equals."""
    best, best_divergence = 0, math.inf
    last = int(np.flatnonzero(counts)[-1])
    for i in range(128, last + 2):
        p = counts[:i].astype(np.float64).copy()
        p[-1] += counts[i:].sum()
        q = np.zeros(i)
        levels = np.arange(i) * 128 // i
        for level in range(128):
            members = (levels == level) & (counts[:i] > 0)
            if members.any():
                q[members] = counts[:i][members].sum() / members.sum()
        if not q.any() or ((p > 0) & (q == 0)).any():
            continue
        p, q = p / p.sum(), q / q.sum()
        divergence = float((p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum())
        if divergence <= best_divergence + 1e-12:
            best, best_divergence = i, min(divergence, best_divergence)
    return best


class TestMinmax:
    @pytest.mark.parametrize("kind", KINDS)
    def test_is_the_largest_magnitude(self, kind: str) -> None:
        values = draw(kind)

        assert ranges.amax(observed(values), "minmax") == np.abs(values).max()


class TestPercentile:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("percentile", [50.0, 99.0, 99.9, 99.99, 100.0])
    def test_is_the_ranked_value_within_one_bin(self, kind: str, percentile: float) -> None:
        values = draw(kind)
        histogram = observed(values)
        magnitudes = np.abs(values.astype(np.float64))

        got = ranges.amax(histogram, "percentile", percentile=percentile)

        rank = math.ceil(len(values) * Fraction(str(percentile)) / 100)
        want = np.sort(magnitudes)[rank - 1]
        assert 0 <= got - want <= histogram.width

    @pytest.mark.parametrize(
        ("num", "percentile", "rank"),
        [
            (1000, 99.9, 999),  # 999.0000000000001 in binary floats
            (1000, 99.91, 1000),
            (3000, 99.9, 2997),
            (100, 29, 29),
            (100, 28.999, 29),
            (10, 100, 10),
        ],
    )
    def test_counts_in_decimals(self, num: int, percentile: float, rank: int) -> None:
        """All values up to that rank are 1, those beyond it 9."""
        values = np.where(np.arange(num) < rank, 1, 9).astype(np.float32)

        fits = ranges.amax(observed(values), "percentile", percentile=percentile)
        values[rank - 1] = 9
        exceeds = ranges.amax(observed(values), "percentile", percentile=percentile)

        assert fits == pytest.approx(1, rel=0.01)  # a bin is less
        assert exceeds == pytest.approx(9, rel=0.01)

    @pytest.mark.parametrize("percentile", [0.0, -1.0, 100.1])
    def test_outside_its_limits_is_refused(self, percentile: float) -> None:
        with pytest.raises(UsageError, match=r"not in \(0, 100\]"):
            ranges.amax(observed(draw("normal")), "percentile", percentile=percentile)


class TestEntropy:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("seed", range(2))
    def test_is_the_literal_algorithms_choice(self, kind: str, seed: int) -> None:
        histogram = observed(draw(kind, seed, size=5000))
        # bins joined by eights: the literal loops over all 4,096 would take a minute
        histogram.counts = histogram.counts.reshape(-1, 8).sum(axis=1)

        got = ranges.entropy_amax(histogram) / histogram.width

        assert got == slow_entropy(histogram.counts)

    def test_cuts_off_rare_outliers(self) -> None:
        values = draw("normal", size=200_000)
        values[0] = 40.0

        amax = ranges.amax(observed(values), "entropy")

        assert 2.5 < amax < 10

    def test_is_not_moved_by_exact_zeros(self) -> None:
        values = draw("laplace")

        with_zeros = observed(np.concatenate([values, np.zeros(1_000_000, np.float32)]))

        assert ranges.amax(with_zeros, "entropy") == ranges.amax(observed(values), "entropy")


class TestMse:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("size", [300, 20_000])
    def test_has_nearly_the_least_error_on_the_raw_data(self, kind: str, size: int) -> None:
        values = draw(kind, size=size)
        largest = float(np.abs(values).max())

        def error(amax: float) -> float:
            return float(((fake_quantized(values, amax) - values) ** 2).mean())

        best = min(error(largest * k / 256) for k in range(1, 257))
        # few values do not fill the bins evenly, as the closed form takes them to
        assert error(ranges.amax(observed(values), "mse")) <= best * (1.02 if size > 5000 else 1.25)

    @given(step=st.floats(1e-3, 10), a=st.floats(0, 50), length=st.floats(1e-3, 5))
    @settings(max_examples=60, deadline=None)
    def test_error_in_closed_form_is_the_numeric_integral(
        self, step: float, a: float, length: float
    ) -> None:
        t = a + length * (np.arange(200_000) + 0.5) / 200_000
        want = float(((fake_quantized(t, 127 * step) - t) ** 2).mean()) * length

        got = ranges._error_integral(np.array(a + length), step) - ranges._error_integral(
            np.array(a), step
        )

        # the midpoint rule errs at the jumps of the quantizer, closed form by cancellation
        assert got == pytest.approx(want, rel=2e-3, abs=1e-7)


class TestAnyMethod:
    @pytest.mark.parametrize("method", ranges.METHODS)
    @pytest.mark.parametrize("kind", KINDS)
    def test_is_positive_and_not_beyond_what_was_seen(self, method: str, kind: str) -> None:
        values = draw(kind)

        amax = ranges.amax(observed(values), method)

        assert 0 < amax <= np.abs(values).max()

    @pytest.mark.parametrize("method", ranges.METHODS)
    @pytest.mark.parametrize("factor", [2.0**-20, 2.0**9])
    def test_scales_with_its_tensor(self, method: str, factor: float) -> None:
        values = draw("laplace")

        scaled = ranges.amax(observed((factor * values).astype(np.float32)), method)

        # powers of two scale the bins exactly; candidates are multiples of a rounded number
        assert scaled == pytest.approx(factor * ranges.amax(observed(values), method), rel=1e-12)

    @pytest.mark.parametrize("method", ranges.METHODS)
    def test_of_a_dead_tensor_is_the_documented_floor(self, method: str) -> None:
        assert ranges.amax(observed(np.zeros(100, np.float32)), method) == ranges.DEAD_AMAX

    @pytest.mark.parametrize("method", ranges.METHODS)
    def test_of_a_constant_is_that_constant(self, method: str) -> None:
        values = np.full(100, -0.7, np.float32)

        # mse may prefer a range of which the constant is a nearer level; within one candidate
        assert ranges.amax(observed(values), method) == pytest.approx(0.7, rel=0.02)

    def test_of_nothing_is_refused(self) -> None:
        with pytest.raises(CalibrationError, match="nothing was seen"):
            ranges.amax(Histogram(), "minmax")

    def test_that_does_not_exist_is_refused_with_the_choice(self) -> None:
        with pytest.raises(UsageError, match=r"(?s)'median'.*minmax, percentile, entropy, mse"):
            ranges.amax(observed(draw("normal")), "median")

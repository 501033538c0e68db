"""Histogram -> amax: the largest magnitude that INT8 shall represent; beyond it values saturate.

All methods serve symmetric int8 with 127 steps on either side: step = amax / 127.
"""

from __future__ import annotations

import math

import numpy as np

from engineworks.calibration.observe import Histogram
from engineworks.runtime.errors import CalibrationError, UsageError
from engineworks.runtime.tensors import Array

METHODS = ("minmax", "percentile", "entropy", "mse")
LEVELS = 127
DEFAULT_PERCENTILE = 99.99

# A tensor that was 0 on every sample says nothing about its unit. Any range is right for zeros; one
# of ordinary size keeps the scales ordinary.
DEAD_AMAX = 1.0

_MSE_CANDIDATES = 256
_ENTROPY_LEVELS = 128


def amax(histogram: Histogram, method: str, *, percentile: float = DEFAULT_PERCENTILE) -> float:
    """The range of a tensor by one of ``METHODS``.

    Args:
        histogram: what was seen; at least one value.
        method: one of ``METHODS``.
        percentile: in (0, 100]; for method ``percentile`` only.

    Returns:
        amax > 0, at most the largest magnitude seen; ``DEAD_AMAX`` where only zeros were seen.

    Raises:
        UsageError: no such method, or a percentile outside (0, 100].
        CalibrationError: nothing was seen.
    """
    check_method(method, percentile)
    if histogram.num_values == 0:
        raise CalibrationError(
            "nothing was seen of a tensor", fix="calibrate with at least one sample"
        )
    if histogram.limit == 0:
        return DEAD_AMAX
    match method:
        case "percentile":
            found = percentile_amax(histogram, percentile)
        case "entropy":
            found = entropy_amax(histogram)
        case "mse":
            found = mse_amax(histogram)
        case _:
            found = histogram.amax  # minmax: nothing saturates
    return min(found, histogram.amax)


def check_method(method: str, percentile: float) -> None:
    """Refuse what ``amax`` does not know.

    Raises:
        UsageError: no such method, or a percentile outside (0, 100].
    """
    if method not in METHODS:
        raise UsageError(
            f"there is no range method '{method}'", fix=f"choose one of {', '.join(METHODS)}"
        )
    if not 0 < percentile <= 100:
        raise UsageError(f"percentile {percentile} is not in (0, 100]", fix="try 99.99")


def percentile_amax(histogram: Histogram, percentile: float) -> float:
    """The magnitude that ``percentile`` per cent of all values, zeros included, do not exceed.

    The upper border of the bin in which that value lies: high by less than one bin.
    """
    # rounded first: 1000 values * 99.9 / 100 is 999, not the 999.0000000000001 of binary floats
    rank = math.ceil(round(histogram.num_values * percentile / 100, 6))
    below = np.cumsum(histogram.counts) + histogram.num_zeros
    return float((np.searchsorted(below, rank) + 1) * histogram.width)


def entropy_amax(histogram: Histogram) -> float:
    """The range whose 128-level distribution is nearest to the float one (least KL divergence).

    For a range of i bins, P is the histogram cut there, what lies beyond added to the last bin; Q
    is the histogram cut there, without it, averaged over the filled bins of each of 128 levels.
    Exact zeros are left out, because every range represents them exactly and behind a ReLU they
    would drown the rest. Of equal divergences the widest range wins.

    Source: Migacz, "8-bit Inference with TensorRT", GTC 2017. All i are computed at once: with
    S the sum and n the number of filled bins of a level, Q is S / n there, so prefix sums over the
    histogram give every term.
    """
    counts = histogram.counts.astype(np.float64)
    last_filled = int(np.flatnonzero(counts)[-1])
    ends = np.arange(_ENTROPY_LEVELS, max(_ENTROPY_LEVELS, last_filled + 1) + 1)
    # bin k of a range of i bins belongs to level floor(k * 128 / i)
    borders = -(-np.arange(_ENTROPY_LEVELS + 1) * ends[:, None] // _ENTROPY_LEVELS)
    sums = np.diff(_prefix(counts)[borders], axis=1)
    filled = np.diff(_prefix(counts > 0)[borders], axis=1)
    log_q = np.log(np.divide(sums, filled, out=np.ones_like(sums), where=filled > 0))

    total = counts.sum()
    inside = _prefix(counts)[ends]
    outside = total - inside
    last = counts[ends - 1]
    p_log_p = _prefix(_x_log_x(counts))[ends] - _x_log_x(last) + _x_log_x(last + outside)
    p_log_q = (sums * log_q).sum(axis=1) + outside * log_q[:, -1]
    with np.errstate(divide="ignore"):  # a range with nothing inside is out of question anyway
        divergence = (p_log_p - p_log_q) / total - np.log(total) + np.log(inside)
    # Q has nothing where P gathers what was cut off: infinitely far
    divergence[(last == 0) & (outside > 0)] = np.inf
    divergence[inside == 0] = np.inf
    best = len(ends) - 1 - int(np.argmin(divergence[::-1]))
    return float(ends[best] * histogram.width)


def mse_amax(histogram: Histogram) -> float:
    """The range of least expected squared error of rounding and saturation together.

    Each bin is taken as evenly filled, so its error is an integral in closed form; ranges are
    tried in steps of 1/256 of the largest magnitude.
    """
    filled = np.flatnonzero(histogram.counts)
    counts = histogram.counts[filled].astype(np.float64)
    lower, upper = filled * histogram.width, (filled + 1) * histogram.width
    candidates = histogram.amax * np.arange(1, _MSE_CANDIDATES + 1) / _MSE_CANDIDATES
    errors = [
        float(counts @ (_error_integral(upper, step) - _error_integral(lower, step)))
        for step in candidates / LEVELS
    ]
    return float(candidates[int(np.argmin(errors))])


def _error_integral(x: Array, step: float) -> Array:
    """Integral of (t - quantized(t))^2 over t from 0 to x.

    With n = min(round(x / step), 127) and r = x - n * step: step^3 / 12 for each of the n levels
    passed, and r^3 / 3 for the piece around (or, saturated, beyond) the last.
    """
    passed = np.minimum(np.rint(x / step), LEVELS)
    rest = x - passed * step
    result: Array = passed * step**3 / 12 + rest**3 / 3
    return result


def _prefix(values: Array) -> Array:
    """Sums of the first 0, 1, ..., n values."""
    return np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])


def _x_log_x(x: Array) -> Array:
    result: Array = x * np.log(np.where(x > 0, x, 1.0))
    return result

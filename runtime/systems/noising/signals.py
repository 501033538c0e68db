"""The mathematics of ``noising``: neighbours in the bank -> signals -> scores -> a map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, TypeAlias

import cv2
import numpy as np
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from engineworks.runtime.bank import Bank
from engineworks.runtime.tensors import Array
from engineworks.runtime.threads import available_threads, in_parts

SIGNALS = ("distance", "influence", "concentration", "response")

ImageScore: TypeAlias = Literal["top", "patch"]

_TILE = 128  # patches whose neighbours fit into a core's cache together


class Part(BaseModel):
    """Of settings and parameters: unknown or ill-typed fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


# a statistic, and one that is divided by; float32 holds both
Measure: TypeAlias = Annotated[FiniteFloat, Field(ge=-1e30, le=1e30)]
Spread: TypeAlias = Annotated[FiniteFloat, Field(ge=1e-30, le=1e30)]


class Statistics(Part):
    """Mean and standard deviation over held-out training patches."""

    mean: Measure
    std: Spread


def influence(queries_ND: Array, neighbours_NKD: Array, distances_NK: Array) -> Array:
    """|d/dx of the mean distance to the neighbours|, in closed form.

    Args:
        queries_ND: (N, D) patches.
        neighbours_NKD: (N, K, D) their nearest rows.
        distances_NK: (N, K) Euclidean distances to them; a neighbour at distance 0 has no direction
            and adds nothing.

    Returns:
        (N, D), of the inputs' float dtype, in [0, 1].
    """
    return _influence(queries_ND[:, None] - neighbours_NKD, distances_NK)


def _influence(differences_NKD: Array, distances_NK: Array) -> Array:
    """The same from x - m_k."""
    weights = _reciprocal(distances_NK) / distances_NK.shape[1]
    return np.asarray(np.abs(np.matmul(weights[:, None], differences_NKD)[:, 0]))


def _reciprocal(distances: Array) -> Array:
    return np.divide(1, distances, out=np.zeros_like(distances), where=distances > 0)


def noise_std(
    influence_ND: Array,
    mean_distance_N: Array,
    *,
    statistics: Statistics,
    noise_range: tuple[float, float],
    distance_weight: float,
) -> Array:
    """Standard deviation of the proposed noise, per patch and dimension.

    Args:
        influence_ND: (N, D) as ``influence`` gives it.
        mean_distance_N: (N,) mean distance to the K neighbours.
        statistics: of the mean distance, over held-out training patches.

    Returns:
        (N, D) in ``noise_range``.
    """
    low, high = noise_range
    spread = influence_ND.std(axis=1, ddof=1, keepdims=True)
    z_ND = (influence_ND - influence_ND.mean(axis=1, keepdims=True)) / (spread + 1e-8)
    delta_N = (mean_distance_N - statistics.mean) / statistics.std
    drive = z_ND + (distance_weight * delta_N)[:, None]
    # 0.5 (1 + tanh(x / 2)) is the sigmoid without an overflow
    sigmoid = 0.5 * (1 + np.tanh(0.5 * drive))
    return np.asarray(low + (high - low) * sigmoid, influence_ND.dtype)


def response(differences_NKD: Array, distances_NK: Array, noise_std_ND: Array) -> Array:
    """Expected growth of the mean distance under the proposed noise.

    Args:
        differences_NKD: (N, K, D) x - m_k.
        distances_NK: (N, K) their lengths.
        noise_std_ND: (N, D) standard deviation of independent noise.

    Returns:
        (N,): mean over k of min(sum_i sigma_i^2 (1 - u_ki^2) / (2 d_k), sqrt(sum_i sigma_i^2)).
    """
    variance_ND = np.square(noise_std_ND)
    total_N = variance_ND.sum(axis=1)
    reciprocal = _reciprocal(distances_NK)
    along_NK = np.matmul(np.square(differences_NKD), variance_ND[..., None])[..., 0]
    second_order = 0.5 * (total_N[:, None] - along_NK * reciprocal**2) * reciprocal
    limit_N1 = np.sqrt(total_N)[:, None]
    growth = np.where(distances_NK > 0, np.minimum(second_order, limit_N1), limit_N1)
    return np.asarray(growth.mean(axis=1))


def concentration(influence_ND: Array) -> Array:
    """Minus the logarithm of the participation ratio of g^2: (N,) in [0, log D]."""
    square = np.square(influence_ND)
    total = square.sum(axis=1, keepdims=True)
    # shares first: the fourth power of a small influence would vanish
    share_ND = np.divide(square, total, out=np.zeros_like(square), where=total > 0)
    ratio = influence_ND.shape[1] * np.square(share_ND).sum(axis=1)
    return np.asarray(np.log(np.maximum(ratio, 1.0)))


def patch_signals(
    bank: Bank,
    queries_ND: Array,
    distances_NK: Array,
    indices_NK: Array,
    *,
    names: Sequence[str],
    mean_distance: Statistics | None,
    noise_range: tuple[float, float],
    distance_weight: float,
    threads: int | None = None,
) -> dict[str, Array]:
    """The named signals of each patch, not standardised.

    Args:
        bank: rows that ``indices_NK`` points to.
        queries_ND: (N, D) float32 patches.
        distances_NK, indices_NK: their K nearest rows, ascending.
        names: of ``SIGNALS``; only what they need is computed.
        mean_distance: statistics for the noise proposal; needed for ``response``.
        threads: None takes all cores that this process may use.

    Returns:
        name -> (N,) float32.
    """
    signals = {name: np.empty(len(queries_ND), np.float32) for name in names}

    def fill(part: slice) -> None:
        differences = np.take(bank.rows_MD, indices_NK[part], axis=0)
        np.subtract(queries_ND[part, None], differences, out=differences)
        g_ND = _influence(differences, distances_NK[part])
        if "influence" in signals:
            signals["influence"][part] = g_ND.mean(axis=1)
        if "concentration" in signals:
            signals["concentration"][part] = concentration(g_ND)
        if "response" in signals:
            assert mean_distance is not None
            std_ND = noise_std(
                g_ND,
                distances_NK[part].mean(axis=1),
                statistics=mean_distance,
                noise_range=noise_range,
                distance_weight=distance_weight,
            )
            signals["response"][part] = response(differences, distances_NK[part], std_ND)

    def fill_tiles(part: slice) -> None:
        for start in range(part.start, part.stop, _TILE):
            fill(slice(start, min(start + _TILE, part.stop)))

    if "distance" in signals:
        signals["distance"][:] = distances_NK[:, 0]
    if set(names) - {"distance"}:
        in_parts(fill_tiles, len(queries_ND), threads or available_threads())
    return signals


def combine(
    signals: Mapping[str, Array], statistics: Mapping[str, Statistics], weights: Mapping[str, float]
) -> Array:
    """Weighted sum of the standardised signals: (N,) float32."""
    return np.asarray(
        sum(
            weight * (signals[name] - statistics[name].mean) / statistics[name].std
            for name, weight in weights.items()
            if weight
        ),
        np.float32,
    )


def anomaly_map(
    scores_N: Array, grid: tuple[int, int], size: tuple[int, int], smoothing: float
) -> Array:
    """Patch values as a picture: bilinear to ``size`` (height, width), then a Gaussian.

    Args:
        scores_N: (h * w,) float32 in row-major order.
        smoothing: sigma in pixels; 0 leaves the map as it is.

    Returns:
        (height, width) float32.
    """
    height, width = size
    upsampled = cv2.resize(
        scores_N.reshape(grid).astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR
    )
    if smoothing:
        upsampled = cv2.GaussianBlur(upsampled, (0, 0), smoothing, borderType=cv2.BORDER_REFLECT)
    return np.asarray(upsampled)


def image_score(which: ImageScore, scores_N: Array, top: float) -> float:
    """The score of an image from those of its patches, (N,) float32.

    Args:
        which: ``top``: the mean of the highest; ``patch``: the highest alone.
        top: share of the patches that counts as the highest, at least one.
    """
    if which == "patch":
        return float(scores_N.max())
    num = max(1, round(top * len(scores_N)))
    return float(np.partition(scores_N, -num)[-num:].mean(dtype=np.float64))

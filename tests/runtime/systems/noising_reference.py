"""The published equations of `noising`, pixel by pixel and row by row in float64."""

from __future__ import annotations

import numpy as np

from engineworks.runtime.systems.noising.signals import (
    Statistics,
)
from engineworks.runtime.tensors import Array

RANGE = (0.01, 0.5)


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

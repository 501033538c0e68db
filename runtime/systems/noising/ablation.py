"""What each signal earns: the metrics of the task on labelled pictures, signal by signal."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from engineworks.runtime.bank import Bank
from engineworks.runtime.metrics import AnomalyMetrics
from engineworks.runtime.systems.noising.foreground import Foreground
from engineworks.runtime.systems.noising.params import Params
from engineworks.runtime.systems.noising.signals import SIGNALS, combine, image_score, patch_signals
from engineworks.runtime.systems.noising.tiles import Layout, picture_map
from engineworks.runtime.tensors import Array


@dataclass(frozen=True)
class Labelled:
    """A picture to judge by.

    Attributes:
        features: (N, D) float32 of each of its tiles, or of the one image that it is; read once.
        label: 0 normal, 1 defective.
        mask_HW: bool, of the map's size; None: not known.
        layout: of its tiles.
    """

    features: Iterable[Array]
    label: int
    mask_HW: Array | None
    layout: Layout | None = None


def ablation(
    bank: Bank,
    params: Params,
    image_size: tuple[int, int],
    labelled: Iterable[Labelled],
    *,
    foreground: Foreground | None = None,
) -> dict[str, AnomalyMetrics]:
    """The task's metrics for the distance alone and with each addition.

    Returns:
        name of the combination -> its metrics; ``shipped`` is the bundle's own weights.
    """
    alone = dict.fromkeys(SIGNALS, 0.0)
    combinations: dict[str, dict[str, float]] = {"distance": alone | {"distance": 1.0}}
    if params.layers is None:
        for name in SIGNALS[1:]:
            combinations[f"distance + {name}"] = alone | {"distance": 1.0, name: 1.0}
        combinations["all equal"] = dict.fromkeys(SIGNALS, 1.0)
    combinations["shipped"] = params.weights
    metrics = {name: AnomalyMetrics() for name in combinations}
    for picture in labelled:
        scores = _scores(bank, params, picture.features, combinations, foreground)
        for name, of_tiles in scores.items():
            size, smoothing = image_size, params.smoothing
            scored = picture_map(of_tiles, params.grid, size, smoothing, picture.layout)
            score = max(image_score(params.image_score, each, params.top) for each in of_tiles)
            metrics[name].update(score, picture.label, scored, picture.mask_HW)
    return metrics


def _scores(
    bank: Bank,
    params: Params,
    features: Iterable[Array],
    combinations: dict[str, dict[str, float]],
    foreground: Foreground | None,
) -> dict[str, list[Array]]:
    """Patch scores (N,) of each tile, by each combination."""
    found: dict[str, list[Array]] = {name: [] for name in combinations}
    for features_ND in features:
        signals = patch_signals(
            bank,
            features_ND,
            *bank.search(features_ND, params.k),
            names=SIGNALS if params.layers is None else SIGNALS[:1],
            mean_distance=params.mean_distance,
            noise_range=params.noise_range,
            distance_weight=params.distance_weight,
        )
        for name, weights in combinations.items():
            scores = combine(signals, params.signals, weights) / np.float32(params.score_std)
            if foreground is not None and name == "shipped":
                scores = foreground.judge(scores, features_ND, params.grid)
            found[name].append(scores)
    return found

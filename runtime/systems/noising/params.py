"""What the bundle of a ``noising`` system says beyond graphs, bank and preprocessing."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from runtime.systems.noising.signals import Part, Statistics
from runtime.tensors import Array


class Params(Part):
    """What the bundle of a ``noising`` system says beyond graphs, bank and preprocessing."""

    grid: tuple[int, int]
    k: int
    noise_range: tuple[float, float]
    distance_weight: float
    weights: dict[str, float]
    smoothing: float
    mean_distance: Statistics
    signals: dict[str, Statistics]
    score_std: float = Field(gt=0)


class DiscriminatorParams(Part):
    """What the bundle of a discriminator says beyond its graph and preprocessing.

    Attributes:
        scores: of the graph's scores, over the patches of held-out training images.
    """

    grid: tuple[int, int]
    smoothing: float
    scores: Statistics

    def standardise(self, scores_N: Array) -> Array:
        """The graph's scores as standard deviations above a normal patch: (N,) float32."""
        centred = scores_N - np.float32(self.scores.mean)
        return np.asarray(centred / np.float32(self.scores.std), np.float32)

"""What the bundle of a ``noising`` system says beyond graphs, bank and preprocessing."""

from __future__ import annotations

from typing import Annotated, Self, TypeAlias

import numpy as np
from pydantic import Field, FiniteFloat, model_validator

from runtime.systems.noising.signals import SIGNALS, Measure, Part, Spread, Statistics
from runtime.tensors import Array

Grid: TypeAlias = tuple[Annotated[int, Field(ge=1, le=4096)], Annotated[int, Field(ge=1, le=4096)]]
Smoothing: TypeAlias = Annotated[FiniteFloat, Field(ge=0, le=256)]


class Params(Part):
    """What the bundle of a ``noising`` system says beyond graphs, bank and preprocessing."""

    grid: Grid
    k: int = Field(ge=1, le=10_000)
    noise_range: tuple[Measure, Measure]
    distance_weight: Measure
    weights: dict[str, Measure]
    smoothing: Smoothing
    mean_distance: Statistics
    signals: dict[str, Statistics]
    score_std: Spread

    @model_validator(mode="after")
    def _of_all_signals(self) -> Self:
        if set(self.weights) != set(SIGNALS) or set(self.signals) != set(SIGNALS):
            raise ValueError(f"weights and signals must name exactly {', '.join(SIGNALS)}")
        return self


class DiscriminatorParams(Part):
    """What the bundle of a discriminator says beyond its graph and preprocessing.

    Attributes:
        scores: of the graph's scores, over the patches of held-out training images.
    """

    grid: Grid
    smoothing: Smoothing
    scores: Statistics

    def standardise(self, scores_N: Array) -> Array:
        """The graph's scores as standard deviations above a normal patch: (N,) float32."""
        centred = scores_N - np.float32(self.scores.mean)
        return np.asarray(centred / np.float32(self.scores.std), np.float32)

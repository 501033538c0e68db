"""What the bundle of a ``noising`` system says beyond graphs, bank and preprocessing."""

from __future__ import annotations

from typing import Annotated, Self, TypeAlias

import numpy as np
from pydantic import Field, FiniteFloat, model_validator

from engineworks.runtime.bank import Bank
from engineworks.runtime.systems.noising.layers import LayerBank, Layers
from engineworks.runtime.systems.noising.signals import (
    SIGNALS,
    ImageScore,
    Measure,
    Part,
    Spread,
    Statistics,
    combine,
    patch_signals,
)
from engineworks.runtime.systems.noising.tiles import Tiles
from engineworks.runtime.tensors import Array

Grid: TypeAlias = tuple[Annotated[int, Field(ge=1, le=4096)], Annotated[int, Field(ge=1, le=4096)]]
Top: TypeAlias = Annotated[float, Field(gt=0, le=1)]
Smoothing: TypeAlias = Annotated[FiniteFloat, Field(ge=0, le=256)]


class Params(Part):
    """What the bundle of a ``noising`` system says beyond graphs, bank and preprocessing.

    Attributes:
        image_score, top: see ``signals.image_score``; bundles that do not say it mean ``patch``.
        layers: a bank for each; None: one of them all.
        tiles: how pictures are covered; None: each is brought to the network's size.
        foreground: the border of ``foreground.Foreground``; None: every patch counts.
    """

    grid: Grid
    k: int = Field(ge=1, le=10_000)
    noise_range: tuple[Measure, Measure]
    distance_weight: Measure
    weights: dict[str, Measure]
    smoothing: Smoothing
    image_score: ImageScore = "patch"
    top: Top = 0.01
    mean_distance: Statistics
    signals: dict[str, Statistics]
    score_std: Spread
    # left out where there is none: bundles without it are what they were
    layers: Layers | None = Field(default=None, exclude_if=lambda value: value is None)
    tiles: Tiles | None = Field(default=None, exclude_if=lambda value: value is None)
    foreground: Measure | None = Field(default=None, exclude_if=lambda value: value is None)

    @model_validator(mode="after")
    def _of_all_signals(self) -> Self:
        if set(self.weights) != set(SIGNALS) or set(self.signals) != set(SIGNALS):
            raise ValueError(f"weights and signals must name exactly {', '.join(SIGNALS)}")
        return self

    def bank(self, bank: Bank) -> Bank:
        """The bank as these parameters search it.

        Raises:
            BundleError: it has other layers, or not as many rows for each place.
        """
        return bank if self.layers is None else LayerBank(bank.rows_MD, self.layers, self.grid)

    @property
    def neighbours(self) -> int:
        """How many rows of the bank must be found: only the distance is content with one."""
        others = any(weight for name, weight in self.weights.items() if name != "distance")
        return self.k if others else 1

    def judge(
        self,
        bank: Bank,
        features_ND: Array,
        distances_NK: Array,
        indices_NK: Array,
        *,
        threads: int | None = None,
    ) -> tuple[Array, Array | None]:
        """Of each patch, (N,) float32: score, and influence where it has a weight; in standard
        deviations.

        Args:
            features_ND: (N, D) float32 patches.
            distances_NK, indices_NK: their nearest rows, ``neighbours`` of them.
        """
        signals = patch_signals(
            bank,
            features_ND,
            distances_NK,
            indices_NK,
            names=[name for name in SIGNALS if self.weights[name]],
            mean_distance=self.mean_distance,
            noise_range=self.noise_range,
            distance_weight=self.distance_weight,
            threads=threads,
        )
        scores_N = combine(signals, self.signals, self.weights) / np.float32(self.score_std)
        if "influence" not in signals:
            return scores_N, None
        statistics = self.signals["influence"]
        return scores_N, (signals["influence"] - statistics.mean) / statistics.std


class DiscriminatorParams(Part):
    """What the bundle of a discriminator says beyond its graph and preprocessing.

    Attributes:
        scores: of the graph's scores, over the patches of held-out training images.
    """

    grid: Grid
    smoothing: Smoothing
    image_score: ImageScore = "patch"
    top: Top = 0.01
    scores: Statistics

    def standardise(self, scores_N: Array) -> Array:
        """The graph's scores as standard deviations above a normal patch: (N,) float32."""
        centred = scores_N - np.float32(self.scores.mean)
        return np.asarray(centred / np.float32(self.scores.std), np.float32)

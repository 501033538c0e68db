"""What systems answer: frozen values with documented units, and their JSON form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from runtime.tensors import Array


@dataclass(frozen=True, eq=False)
class AnomalyMap:
    """The answer of ``noising`` for one image.

    Attributes:
        score: image score: the largest patch score; standard deviations above a normal patch.
        threshold: decision border for ``score``.
        pixel_threshold: decision border for ``map_HW``.
        map_HW: (H, W) float32 at the network's input size: anomaly score of each pixel, same unit.
        influence_HW: (H, W) float32, same size: how unevenly the feature dimensions carry the
            distance to the memory bank; standard deviations above a normal patch.
    """

    score: float
    threshold: float
    pixel_threshold: float
    map_HW: Array
    influence_HW: Array

    @property
    def is_anomalous(self) -> bool:
        return self.score >= self.threshold

    def to_json(self) -> dict[str, Any]:
        """Plain numbers for one JSON line; maps are summarised, not listed."""
        return {
            "label": "anomalous" if self.is_anomalous else "normal",
            "score": round(float(self.score), 6),
            "threshold": round(float(self.threshold), 6),
            "anomalous_area": round(float((self.map_HW >= self.pixel_threshold).mean()), 6),
        }

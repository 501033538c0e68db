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

    def summary(self) -> str:
        """One line for people."""
        label = "anomalous" if self.is_anomalous else "normal"
        return f"{label}, score {self.score:.2f} (border {self.threshold:.2f})"


@dataclass(frozen=True, eq=False)
class Classification:
    """The answer of ``paco`` for one image.

    Attributes:
        label: name of the most probable class; of equal ones the first of the bundle's labels.
        index: its place among the labels.
        probability: of that class, in [0, 1]; all classes together have 1.
        top: (label, probability) of the most probable classes, best first.
        embedding_F: (F,) float32: what the classifier saw of the image.
    """

    label: str
    index: int
    probability: float
    top: tuple[tuple[str, float], ...]
    embedding_F: Array

    def to_json(self) -> dict[str, Any]:
        """Names and plain numbers for one JSON line; the embedding is left out."""
        return {
            "label": self.label,
            "probability": round(float(self.probability), 6),
            "top": [
                {"label": label, "probability": round(float(probability), 6)}
                for label, probability in self.top
            ],
        }

    def summary(self) -> str:
        """One line for people."""
        return ", ".join(f"{label} {probability:.2f}" for label, probability in self.top)

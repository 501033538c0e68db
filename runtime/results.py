"""What systems answer: frozen values with documented units, and their JSON form."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from engineworks.runtime.tensors import Array


@dataclass(frozen=True, eq=False)
class AnomalyMap:
    """How unlike the normal parts one image is, and where.

    Attributes:
        score: image score: the largest patch score; standard deviations above a normal patch.
        threshold: decision border for ``score``.
        pixel_threshold: decision border for ``map_HW``.
        map_HW: (H, W) float32 at the network's input size: anomaly score of each pixel, same unit.
        influence_HW: (H, W) float32, same size: how unevenly the feature dimensions carry the
            distance to the memory bank; standard deviations above a normal patch. None where a
            discriminator stands in the bank's place.
    """

    score: float
    threshold: float
    pixel_threshold: float
    map_HW: Array
    influence_HW: Array | None

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
    """Which class one image shows.

    Attributes:
        label: name of the most probable class; of equal ones the first of the bundle's labels.
        index: its place among the labels.
        probability: of that class, in [0, 1]; all classes together have 1.
        top: (label, probability) of the most probable classes, best first.
        embedding_F: (F,) float32: what the classifier saw of the image.
        prediction_set: labels among which the right one is, in a stated share of images, most
            probable first; it may be empty. None where the bundle has no confidence for the
            precision that runs, see ``runtime.confidence``.
        is_unknown: whether the image is of no class that the classifier learned; None likewise.
    """

    label: str
    index: int
    probability: float
    top: tuple[tuple[str, float], ...]
    embedding_F: Array
    prediction_set: tuple[str, ...] | None = None
    is_unknown: bool | None = None

    @property
    def score(self) -> float:
        """The probability."""
        return self.probability

    def to_json(self) -> dict[str, Any]:
        """Names and plain numbers for one JSON line; the embedding is left out.

        ``unknown`` and ``set`` are there where the bundle has a confidence.
        """
        confident: dict[str, Any] = {}
        if self.is_unknown is not None:
            confident["unknown"] = self.is_unknown
        if self.prediction_set is not None:
            confident["set"] = list(self.prediction_set)
        return {
            "label": self.label,
            "probability": round(float(self.probability), 6),
            **confident,
            "top": [
                {"label": label, "probability": round(float(probability), 6)}
                for label, probability in self.top
            ],
        }

    def summary(self) -> str:
        """One line for people."""
        ranked = ", ".join(f"{label} {probability:.2f}" for label, probability in self.top)
        return f"unknown: {ranked}" if self.is_unknown else ranked


@dataclass(frozen=True, eq=False)
class Embedding:
    """One image as a vector, by which images are compared.

    Attributes:
        vector_F: (F,) float32 of length 1: what the net says of the image. The product of two is
            their similarity, in [-1, 1].
    """

    vector_F: Array

    def to_json(self) -> dict[str, Any]:
        """All numbers of the vector, for one JSON line."""
        return {"embedding": [round(value, 7) for value in self.vector_F.tolist()]}

    def summary(self) -> str:
        """One line for people."""
        first = ", ".join(f"{value:+.3f}" for value in self.vector_F[:3].tolist())
        return f"{len(self.vector_F)} numbers: {first}, ..."


@dataclass(frozen=True)
class Candidate:
    """A place where a defect may be.

    Attributes:
        x: column of its peak in pixels of the image.
        y: row of its peak.
        score: mean of the three highest pixels around the peak, in [0, 1].
    """

    x: int
    y: int
    score: float


@dataclass(frozen=True, eq=False)
class DefectMap:
    """What only the target of one image shows, and where.

    Attributes:
        map_HW: (H, W) float32 at the image's size: probability that the target has a defect there
            that no reference has.
        candidates: peaks of the map, best first, those below the threshold included.
        threshold: decision border for the score of a candidate.
    """

    map_HW: Array
    candidates: tuple[Candidate, ...]
    threshold: float

    @property
    def score(self) -> float:
        """Of the image: that of its best candidate."""
        return self.candidates[0].score

    @property
    def defects(self) -> tuple[Candidate, ...]:
        """The candidates that reach the threshold."""
        return tuple(c for c in self.candidates if c.score >= self.threshold)

    @property
    def is_defective(self) -> bool:
        return bool(self.defects)

    def to_json(self) -> dict[str, Any]:
        """Plain numbers for one JSON line, with a list of the defects; the map is left out."""
        return {
            "label": "defective" if self.is_defective else "good",
            "score": round(self.score, 6),
            "threshold": round(self.threshold, 6),
            "num_defects": len(self.defects),
            "defects": [{"x": d.x, "y": d.y, "score": round(d.score, 6)} for d in self.defects],
        }

    def summary(self) -> str:
        """One line for people."""
        num = len(self.defects)
        found = f"{num} defect{'s' if num > 1 else ''}" if num else "good"
        return f"{found}, score {self.score:.2f} (border {self.threshold:.2f})"


@dataclass(frozen=True)
class Detection:
    """An object that was found.

    Attributes:
        name: of the object: a base class of the bundle, or one that was asked for by references.
        score: in [0, 1].
        box: x1, y1, x2, y2 in pixels of the image; see ``runtime.boxes``.
        track: number of the object that this is throughout a video; None where it is not followed,
            or was not seen often enough yet.
    """

    name: str
    score: float
    box: tuple[float, float, float, float]
    track: int | None = None

    def to_json(self) -> dict[str, Any]:
        x1, y1, x2, y2 = (round(float(side), 2) for side in self.box)
        return {
            "name": self.name,
            "score": round(float(self.score), 6),
            **{"x1": x1, "y1": y1, "x2": x2, "y2": y2},
            "track": self.track,
        }


@dataclass(frozen=True)
class Detections:
    """Which objects one image shows, and where.

    Attributes:
        objects: what was found, best first.
        border: score that an object needed.
    """

    objects: tuple[Detection, ...]
    border: float | None = field(default=None, compare=False, repr=False)

    @property
    def score(self) -> float:
        """Of the best object; 0 where nothing was found."""
        return float(self.objects[0].score) if self.objects else 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain values for one JSON line, with a list of the objects."""
        return {
            "num_objects": len(self.objects),
            "best": self.objects[0].name if self.objects else None,
            "score": round(float(self.objects[0].score), 6) if self.objects else None,
            "objects": [found.to_json() for found in self.objects],
        }

    def summary(self) -> str:
        """One line for people."""
        return ", ".join(f"{found.name} {found.score:.2f}" for found in self.objects) or "nothing"

"""What calibration pictures are like, and whether those of today still are: brightness and score.

A camera that was moved, a lamp that ages or a new batch of material shows in both long before
somebody looks. Quantiles of the calibration pictures stand in the bundle; the middle ones of the
last pictures are held against them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from engineworks.runtime.tensors import Array

REPORT = "usual"  # of a manifest's reports
_SHARES = (0.0, 0.05, 0.5, 0.95, 1.0)
_STEP = 4  # of the pixels that are looked at
_RECENT, _ENOUGH = 200, 50  # pictures that are compared, and how many there must be


def brightness(image: Array) -> float:
    """Mean of an (H, W, 3) image in its own unit, from every fourth pixel of every fourth row."""
    return float(image[::_STEP, ::_STEP].mean(dtype=np.float64))


def score_of(result: Any) -> float | None:
    """The score of a result, where it has one; see ``runtime.results``."""
    score = getattr(result, "score", None)
    return None if score is None else float(score)


class Usual(BaseModel):
    """Quantiles of calibration pictures: least, 5 %, median, 95 %, largest.

    Attributes:
        num: pictures.
        brightness: in the unit of their pixels.
        score: of the float graphs' answers; None of a system without scores.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    num: int = Field(ge=1)
    brightness: tuple[FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat]
    score: tuple[FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat] | None = None

    @classmethod
    def of(cls, seen: Sequence[tuple[float, float | None]]) -> Self:
        """From (brightness, score) of at least one picture."""
        scores = [score for _, score in seen if score is not None]
        return cls(
            num=len(seen),
            brightness=_quantiles([level for level, _ in seen]),
            score=_quantiles(scores) if scores else None,
        )

    @classmethod
    def in_reports(cls, reports: dict[str, Any]) -> Self | None:
        """That of a bundle, by its manifest's reports; None where none was measured."""
        return cls.model_validate(reports[REPORT]) if REPORT in reports else None


def _quantiles(values: Iterable[float]) -> Any:
    return tuple(round(value, 6) for value in np.quantile(list(values), _SHARES).tolist())


class Drift:
    """The last pictures of one source, held against the calibration's."""

    def __init__(self, usual: Usual | None) -> None:
        self._usual = usual
        self._brightness: deque[float] = deque(maxlen=_RECENT)
        self._score: deque[float] = deque(maxlen=_RECENT)

    def add(self, level: float, score: float | None) -> None:
        """Count a picture."""
        self._brightness.append(level)
        if score is not None:
            self._score.append(score)

    @property
    def signs(self) -> dict[str, str]:
        """What has drifted, in words: its median is outside of the calibration's middle 90 %."""
        return {
            name: f"the median {name} of {len(recent)} pictures is {np.median(recent):.4g}, "
            f"nine of ten calibration pictures have {known[1]:.4g} to {known[3]:.4g}"
            for name, recent, known in self._compared()
            if len(recent) >= _ENOUGH and not known[1] <= np.median(recent) <= known[3]
        }

    def to_json(self) -> dict[str, Any]:
        """Quantiles of 5 %, 50 % and 95 %, now and of the calibration, and what has drifted."""
        return {
            **{
                name: {
                    "recent": [round(v, 6) for v in np.quantile(recent, _SHARES[1:4]).tolist()],
                    "calibration": list(known[1:4]),
                }
                for name, recent, known in self._compared()
                if recent
            },
            "drifted": sorted(self.signs),
        }

    def _compared(self) -> list[tuple[str, deque[float], Any]]:
        if self._usual is None:
            return []
        found = [("brightness", self._brightness, self._usual.brightness)]
        if self._usual.score is not None:
            found.append(("score", self._score, self._usual.score))
        return found

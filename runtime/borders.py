"""Where the border of a decision lies: from scores of normal samples that the judge had not seen.

The border for a budget of false rejects is the scores' quantile, where the budget is at least two
samples. Where it is less, the highest score would decide, which is what the oddest sample says. A
picture's score comes from the highest of many places, and the law of a maximum tends to Gumbel's,
F(s) = exp(-exp(-(s - m) / b)): median and 90 % quantile give m and b, and the border is read off
that tail. So one odd sample of ten or more moves the border little, however many there are.

Source: Fisher and Tippett, "Limiting forms of the frequency distribution of the largest or smallest
member of a sample", 1928; Gumbel, "Statistics of Extremes", 1958.
"""

from __future__ import annotations

import math
from typing import Annotated, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from engineworks.runtime.errors import InputError
from engineworks.runtime.tensors import Array

_STEPS = 200
_FITTED = (0.5, 0.9)  # the quantiles that fix the tail
_ENOUGH = 2  # samples beyond the border, for the quantile to be trusted


class HeldOut(BaseModel):
    """Scores of normal samples, each by a judge that had not seen it.

    Attributes:
        count: of samples.
        quantiles: of their scores at 0, 0.5 %, 1 %, ... 100 %, ascending.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    count: int = Field(ge=1)
    quantiles: Annotated[
        tuple[FiniteFloat, ...], Field(min_length=_STEPS + 1, max_length=_STEPS + 1)
    ]

    @model_validator(mode="after")
    def _ascends(self) -> Self:
        if list(self.quantiles) != sorted(self.quantiles):
            raise ValueError("quantiles must ascend")
        return self

    @classmethod
    def of(cls, scores_N: Array) -> HeldOut:
        """Of (N,) finite scores.

        Raises:
            InputError: no scores, or one that is not finite.
        """
        if scores_N.size == 0 or not np.isfinite(scores_N).all():
            raise InputError("a border needs scores of normal samples, all of them finite")
        levels = np.arange(_STEPS + 1) / _STEPS
        found = np.quantile(scores_N.astype(np.float64), levels, method="linear")
        # interpolation between equal scores may lose the last bit
        return cls(count=int(scores_N.size), quantiles=tuple(np.maximum.accumulate(found).tolist()))

    def quantile(self, share: float) -> float:
        """The score that a share of the samples stays below, linear between the known ones."""
        return float(np.interp(share * _STEPS, np.arange(_STEPS + 1), self.quantiles))


def border(held_out: HeldOut, budget: float) -> float:
    """The score that a share ``budget`` of normal samples is expected to lie above.

    Args:
        budget: share in (0, 1).

    Returns:
        The border; a sample at or above it is rejected. It is the next number above the quantile:
        samples without any spread are not rejected by their own value.

    Raises:
        InputError: a budget outside of that range.
    """
    if not 0 < budget < 1:
        raise InputError(
            f"a false-reject budget is a share above 0 and below 1, got {budget}",
            fix="take e.g. 0.01",
        )
    if held_out.count * budget >= _ENOUGH:
        return _above(held_out.quantile(1 - budget))
    low, high = (held_out.quantile(share) for share in _FITTED)
    at_low, at_high, at_border = (_reduced(share) for share in (*_FITTED, 1 - budget))
    fitted = low + (high - low) * (at_border - at_low) / (at_high - at_low)
    return _above(fitted)


def _above(score: float) -> float:
    """The next float32, which is what scores and maps are."""
    return float(np.nextafter(np.float32(score), np.float32(np.inf)))


def _reduced(share: float) -> float:
    """The quantile of Gumbel's law with m = 0 and b = 1."""
    return -math.log(-math.log(share))

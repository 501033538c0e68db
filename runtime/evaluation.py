"""What judging a system on labelled data gives: one form for every system.

Metrics rank; a border decides. ``Evaluation`` holds both, and what each picture brought to the
metrics, so that a drop can be told from noise. Training, ``eval``, ``bench`` and the gate of the
export read it from here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from engineworks.runtime.errors import InputError
from engineworks.runtime.evidence import ROUNDS, Drop, Evidence, paired_drops
from engineworks.runtime.tensors import Array

_Z = 1.959963984540054  # of a 95 % interval
_MAX_KINDS = 20  # of a table for people


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def wilson(count: int, of: int) -> tuple[float, float]:
    """95 % interval of a share of which ``count`` of ``of`` were seen; (0, 1) of nothing.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", 1927;
    recommended for small numbers by Brown, Cai and DasGupta, "Interval Estimation for a Binomial
    Proportion", 2001.
    """
    if not of:
        return 0.0, 1.0
    share, square = count / of, _Z**2
    centre = (share + square / (2 * of)) / (1 + square / of)
    half = _Z * math.sqrt(share * (1 - share) / of + square / (4 * of**2)) / (1 + square / of)
    # the ends of none and all are exact, whatever is rounded
    return (
        0.0 if count == 0 else max(0.0, centre - half),
        1.0 if count == of else min(1.0, centre + half),
    )


class Rate(_Part):
    """So many of so many, with the 95 % interval of the share: see ``wilson``."""

    count: int = Field(ge=0)
    of: int = Field(ge=0)
    low: FiniteFloat
    high: FiniteFloat

    @classmethod
    def counted(cls, count: int, of: int) -> Self:
        low, high = wilson(count, of)
        return cls(count=count, of=of, low=low, high=high)

    @property
    def most(self) -> bool:
        return 2 * self.count > self.of

    @property
    def fraction(self) -> str:
        return f"{self.count} of {self.of}"

    def __str__(self) -> str:
        if not self.of:
            return "none there"
        return f"{self.fraction} ({100 * self.low:.1f} to {100 * self.high:.1f} %)"


class Decisions(_Part):
    """What one border decides on labelled data.

    Attributes:
        border: its name, e.g. that of a threshold of the bundle.
        value: at or above it the answer is yes.
        source: where it comes from.
        rates: what went wrong, by name, e.g. ``false rejects`` and ``misses``.
        kinds: the same for parts of the data, e.g. per kind of defect.
        warnings: what nobody would want, in plain words.
    """

    border: str
    value: FiniteFloat
    source: str
    rates: dict[str, Rate]
    kinds: dict[str, dict[str, Rate]] = {}
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """How well a system does on labelled data.

    Attributes:
        metrics: by name, see the system.
        decisions: at the border that is shipped first, then at others; empty where a system
            decides nothing.
        evidence: what each picture brought to the metrics that a gate may ask for.
        groups_I: (I,) int: pictures of one number are drawn among themselves in a resample.
        failures: why pictures were left out, which inference would leave out as well.
    """

    metrics: dict[str, float]
    decisions: tuple[Decisions, ...] = ()
    evidence: tuple[Evidence, ...] = ()
    groups_I: Array = field(default_factory=lambda: np.zeros(0, np.int64))
    failures: tuple[str, ...] = ()

    @property
    def num_pictures(self) -> int:
        return len(self.groups_I)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Of the border that is shipped."""
        return self.decisions[0].warnings if self.decisions else ()

    def drops_to(
        self, other: Evaluation, names: Sequence[str], *, rounds: int = ROUNDS
    ) -> dict[str, Drop]:
        """By how much another system's metrics are lower on the same pictures, with intervals.

        Metrics that either lacks are left out; those that no evidence tells of have no interval.

        Raises:
            InputError: the two did not judge the same pictures.
        """
        if not np.array_equal(self.groups_I, other.groups_I):
            raise InputError(
                f"{self.num_pictures} and {other.num_pictures} pictures cannot be paired",
                fix="judge both systems on the same folder",
            )
        exact = {
            name: self.metrics[name] - other.metrics[name]
            for name in names
            if name in self.metrics and name in other.metrics
        }
        return paired_drops(exact, self.evidence, other.evidence, self.groups_I, rounds=rounds)

    def to_json(self) -> dict[str, Any]:
        """Everything but the evidence."""
        return {
            "num_pictures": self.num_pictures,
            "metrics": self.metrics,
            "decisions": [each.model_dump(mode="json") for each in self.decisions],
        }


def table(decisions: Sequence[Decisions]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows for people: a column per border, a row per rate, those of kinds below.

    Of many kinds those with the most that is wrong at the first border are shown.
    """
    header = ("", *(f"{each.border} {each.value:.4g}, {each.source}" for each in decisions))
    rows = _rows("", [each.rates for each in decisions])
    kinds = list(dict.fromkeys(kind for each in decisions for kind in each.kinds))
    shown = kinds
    if len(kinds) > _MAX_KINDS:
        wrong = {kind: sum(r.count for r in decisions[0].kinds[kind].values()) for kind in kinds}
        shown = sorted(kinds, key=lambda kind: -wrong[kind])[:_MAX_KINDS]
    for kind in shown:
        rows += _rows(f": {kind}", [each.kinds.get(kind, {}) for each in decisions])
    if left := len(kinds) - len(shown):
        rows.append((f"{left} more, with less that is wrong", *("" for _ in decisions)))
    return header, rows


def _rows(of: str, columns: Sequence[Mapping[str, Rate]]) -> list[tuple[str, ...]]:
    names = dict.fromkeys(name for column in columns for name in column)
    return [
        (f"{name}{of}", *(str(column[name]) if name in column else "" for column in columns))
        for name in names
    ]


# --- decisions that several systems make --------------------------------------------------------


def decide(
    border: str,
    value: float,
    source: str,
    scores_I: Array,
    labels_I: Array,
    kinds: Sequence[str],
) -> Decisions:
    """Whole pictures, each rejected where its score reaches a border.

    Args:
        scores_I: one per picture.
        labels_I: 0 good, 1 defective.
        kinds: of each picture; those of defective ones are told apart.
    """
    defective, passed = labels_I.astype(bool), scores_I < value
    rates = {
        "false rejects": Rate.counted(int((~passed & ~defective).sum()), int((~defective).sum())),
        "misses": Rate.counted(int((passed & defective).sum()), int(defective.sum())),
    }
    names = np.array(kinds, dtype=object)
    missed = {
        kind: Rate.counted(int((passed & of).sum()), int(of.sum()))
        for kind in dict.fromkeys(names[defective].tolist())
        for of in [defective & (names == kind)]
    }
    warnings = warned(
        rates,
        {
            "misses": "passes {} of {} labelled defects at its border",
            "false rejects": "rejects {} of {} good pictures at its border",
        },
    )
    if not rates["misses"].most:
        warnings += tuple(
            f"passes {rate.fraction} labelled defects of '{kind}'"
            for kind, rate in missed.items()
            if rate.most
        )
    return Decisions(
        border=border,
        value=value,
        source=source,
        rates=rates,
        kinds={kind: {"misses": rate} for kind, rate in missed.items()},
        warnings=warnings,
    )


def warned(rates: Mapping[str, Rate], sentences: Mapping[str, str]) -> tuple[str, ...]:
    """The sentences of the rates that are more than a half, with their counts filled in."""
    return tuple(
        sentence.format(rates[name].count, rates[name].of)
        for name, sentence in sentences.items()
        if name in rates and rates[name].most
    )

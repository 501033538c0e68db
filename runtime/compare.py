"""Two reports of ``bench --json`` side by side: which rows became faster, and what else differs.

The two were measured at different times, perhaps on different machines, so there is no interval
around these ratios: for a fair race let contenders take turns in one ``bench``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from rich.console import Console
from rich.table import Table

from engineworks.runtime.errors import InputError

# facts of the environment that change times
_FACTS = ("cpu", "gpu", "cores", "threads", "system", "python")


class Timed(BaseModel):
    """What is read of a row; the report holds more."""

    model_config = ConfigDict(frozen=True)

    name: str
    precision: str
    batch: int
    covers: str
    p50_ms: float
    verdict: str

    @property
    def key(self) -> tuple[str, int, str, str]:
        return self.covers, self.batch, self.name, self.precision


class Timings(BaseModel):
    """What is read of a report of ``bench``."""

    model_config = ConfigDict(frozen=True)

    environment: dict[str, Any]
    bundle_digest: str
    inputs: dict[str, Any]
    rows: tuple[Timed, ...]


@dataclass(frozen=True)
class Pair:
    """One row of both reports.

    Attributes:
        ratio: how many times as fast the second is, by the medians.
        doubts: of which report the figures were not stable, in words; empty where both were.
    """

    first: Timed
    second: Timed

    @property
    def ratio(self) -> float:
        return self.first.p50_ms / self.second.p50_ms

    @property
    def doubts(self) -> str:
        sides = {"A": self.first.verdict, "B": self.second.verdict}
        return ", ".join(f"{s}: {verdict}" for s, verdict in sides.items() if verdict != "stable")


@dataclass(frozen=True)
class Comparison:
    """Two reports.

    Attributes:
        pairs: rows that both have, in the order of the first.
        only: names of rows that one has, by report.
        differences: what else differs: fact -> (first, second).
    """

    pairs: tuple[Pair, ...]
    only: tuple[tuple[str, ...], tuple[str, ...]]
    differences: dict[str, tuple[str, str]]


def compare(first: Path, second: Path) -> Comparison:
    """Read two reports and match their rows by what was measured.

    Raises:
        InputError: a file is missing, is no report of ``bench``, or they share no row.
    """
    reports = [read(first), read(second)]
    rows = [{row.key: row for row in report.rows} for report in reports]
    shared = [key for key in rows[0] if key in rows[1]]
    if not shared:
        raise InputError(
            f"{first} and {second} have no row in common",
            fix="measure the same backends, precisions and --batch in both",
        )
    return Comparison(
        pairs=tuple(Pair(rows[0][key], rows[1][key]) for key in shared),
        only=(_missing(rows[0], rows[1]), _missing(rows[1], rows[0])),
        differences=_differences(*reports),
    )


def read(path: Path) -> Timings:
    """A report of ``bench``.

    Raises:
        InputError: it is none.
    """
    try:
        return Timings.model_validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    except ValidationError as error:
        raise InputError(
            f"{path} is no report of bench: {error.errors()[0]['msg']} at "
            f"{'.'.join(map(str, error.errors()[0]['loc'])) or 'the top'}",
            fix="write one with `cli.py bench BUNDLE --json FILE`",
        ) from error


def _missing(have: dict[tuple[str, int, str, str], Timed], other: Any) -> tuple[str, ...]:
    return tuple(
        f"{name} {precision}, {covers}, batch {batch}"
        for covers, batch, name, precision in have
        if (covers, batch, name, precision) not in other
    )


def _differences(first: Timings, second: Timings) -> dict[str, tuple[str, str]]:
    found = {name: (first.environment.get(name), second.environment.get(name)) for name in _FACTS}
    found["bundle"] = (first.bundle_digest[:12], second.bundle_digest[:12])
    found["images"] = (first.inputs.get("sha256"), second.inputs.get("sha256"))
    versions = [report.environment.get("packages", {}) for report in (first, second)]
    for package in sorted({*versions[0], *versions[1]}):
        found[package] = (versions[0].get(package), versions[1].get(package))
    return {
        name: (_text(before), _text(after))
        for name, (before, after) in found.items()
        if before != after
    }


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value if len(value) < 64 else value[:12]  # a hash
    return "none" if value is None else json.dumps(value)


def render(comparison: Comparison) -> str:
    """The comparison as text."""
    out = StringIO()
    console = Console(file=out, width=150, highlight=False)
    table = Table("clock covers", "batch", "what", "A p50 ms", "B p50 ms", "A / B", "doubts")
    for pair in comparison.pairs:
        row = pair.first
        table.add_row(
            row.covers,
            str(row.batch),
            f"{row.name} {row.precision}",
            f"{row.p50_ms:.2f}",
            f"{pair.second.p50_ms:.2f}",
            f"{pair.ratio:.2f}",
            pair.doubts,
        )
    console.print(table)
    for side, names in zip("AB", comparison.only, strict=True):
        _list(console, f"only in {side}", names)
    _list(
        console,
        "what else differs",
        [f"{name}: {a} / {b}" for name, (a, b) in comparison.differences.items()],
    )
    return out.getvalue()


def _list(console: Console, title: str, lines: Sequence[str]) -> None:
    if lines:
        console.print(f"{title}: {'; '.join(lines)}", markup=False)

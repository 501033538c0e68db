"""What the labels of a data set say, alike for every system, and what is wrong with them.

A reader gathers its faults, so that one error names all of them with counts; what it can live with
is a note, and logged in one line.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from engineworks.runtime import folders
from engineworks.runtime.errors import DatasetError
from engineworks.runtime.folders import Tally
from engineworks.runtime.parquet import PackedPicture
from engineworks.runtime.tensors import Array

# x1, y1, x2, y2 in pixels of the upright picture
Box: TypeAlias = tuple[float, float, float, float]

_log = logging.getLogger(__name__)


class Faults(Tally):
    """Contradictions by kind, each kind with what to do about it."""

    def __init__(self) -> None:
        super().__init__()
        self.fixes: dict[str, str] = {}

    def note(self, kind: str, name: str | Path, fix: str) -> None:
        self.add(kind, name)
        self.fixes[kind] = fix

    def check(self, place: Path) -> None:
        """Refuse labels with faults.

        Raises:
            DatasetError: names each kind, how often it is there, and where first.
        """
        if self:
            fix = "; ".join(dict.fromkeys(self.fixes.values()))
            raise DatasetError(f"{place}: {self.describe()}", fix=fix)


@dataclass(frozen=True)
class Item:
    """A labelled picture, frame or image of planes.

    Attributes:
        name: what messages call it, unique in its split; no part of it is the set's own place.
        files: that hold it.
        read: decodes it, for people: (H, W, 3) uint8 RGB.
        label: its class or defect; where boxes say what is there, "".
        mask: file of its mask.
        boxes: name of the object and its place, each.
        packed: where its bytes are, if not in files of its own.
        frame: of the video that it is of.
    """

    name: str
    files: tuple[Path, ...]
    read: Callable[[], Array]
    label: str = ""
    mask: Path | None = None
    boxes: tuple[tuple[str, Box], ...] = ()
    packed: PackedPicture | None = None
    frame: int | None = None


@dataclass(frozen=True)
class Labelled:
    """All splits of a data set.

    Attributes:
        splits: in the order of their use.
        left_out: what lies in the folder and is no part of any split.
        notes: what was done with labels that are not quite right.
        faults: what must be mended, by split.
    """

    splits: Mapping[str, tuple[Item, ...]]
    left_out: Tally = field(default_factory=Tally)
    notes: Tally = field(default_factory=Tally)
    faults: Mapping[str, Faults] = field(default_factory=dict)


def tell(place: Path, left_out: Tally, notes: Tally) -> None:
    """Log a line of what was left out, and one of what was done to labels."""
    folders.tell(place, left_out)
    if notes:
        _log.warning("%s: %s", place, notes.describe())

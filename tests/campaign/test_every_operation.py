"""The process dies, or the disk is full, at each operation by which a bundle is written."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from engineworks.runtime.bundle import GraphEntry, Manifest, Threshold, read, set_threshold, write
from engineworks.runtime.errors import EngineworksError
from engineworks.runtime.preprocess import PreprocessSpec
from engineworks.runtime.tensors import TensorSpec
from tests.campaign import faults
from tests.campaign.conftest import Ledger

_MOST = 500


def manifest(label: str) -> Manifest:
    spec = TensorSpec(dtype="float32", shape=("batch", 3, 8, 8))
    return Manifest(
        system="backbone",
        graphs={
            "features": GraphEntry(
                inputs={"images": spec}, outputs={"maps": spec}, variants={"float": "f/x.onnx"}
            )
        },
        preprocess=PreprocessSpec(size=(8, 8)),
        labels=(label,),
        thresholds={"image": Threshold(value=1.0, source="drawn")},
    )


class Place:
    """A folder with a bundle ``out`` in it, and what to do there."""

    def __init__(self, folder: Path, *, old: bool) -> None:
        self.folder, self.out = folder, folder / "out"
        self.files = {"f/x.onnx": folder.parent / "x.onnx", "bank.faiss": folder.parent / "bank"}
        for path in self.files.values():
            path.write_bytes(os.urandom(1000))
        folder.mkdir()
        if old:
            self.write("old")

    def write(self, label: str) -> None:
        write(self.out, manifest(label), self.files, replace=True)

    def move(self) -> None:
        set_threshold(read(self.out), "image", 7.0)

    def state(self) -> str:
        """``none``, ``old``, ``new``, or what is wrong."""
        try:
            found = read(self.out).manifest
        except EngineworksError as error:
            return "none" if not self.out.exists() else f"refused: {error}"
        return "new" if found.thresholds["image"].value == 7.0 else found.labels[0]

    def leftovers(self) -> list[str]:
        return sorted(path.name for path in self.folder.rglob(".*"))


ACTIONS: dict[str, tuple[Callable[[Place], None], bool]] = {
    "write a new bundle": (lambda place: place.write("new"), False),
    "replace a bundle": (lambda place: place.write("new"), True),
    "move a threshold": (Place.move, True),
}
SYSTEMS: dict[str, Callable[[], Any]] = {
    "exchange": nullcontext,
    "journal": faults.without_exchange,
}
each = pytest.mark.parametrize(
    ("action", "system"), [(action, system) for action in ACTIONS for system in SYSTEMS]
)


def tries(
    ledger: Ledger, tmp_path: Path, action: str, system: str
) -> Iterator[tuple[int, Place, set[str]]]:
    """A fresh place for each operation, and the states that it may be in afterwards."""
    old = ACTIONS[action][1]
    for at in range(1, _MOST, 1 if ledger.scale > 1 else 3):
        folder = tmp_path / f"{at}"
        folder.mkdir()
        with SYSTEMS[system]():
            yield at, Place(folder / "place", old=old), {"old" if old else "none", "new"}


@each
def test_a_kill_at_every_operation(
    ledger: Ledger, tmp_path: Path, action: str, system: str
) -> None:
    for at, place, allowed in tries(ledger, tmp_path, action, system):

        def run(at: int = at, place: Place = place) -> None:
            with faults.operations(at, faults.die):
                ACTIONS[action][0](place)

        code = faults.in_child(run)
        state = place.state()
        ledger.add(f"operation {at}", None if state in allowed else f"the bundle is {state}")
        place.write("next")
        left = place.leftovers()
        ledger.add(f"operation {at}, next command", f"{left} left over" if left else None)
        if code == 0:
            break
    assert code == 0
    assert at > 5


@each
def test_a_full_disk_at_every_operation(
    ledger: Ledger, tmp_path: Path, action: str, system: str
) -> None:
    for at, place, allowed in tries(ledger, tmp_path, action, system):
        with faults.operations(at, faults.refuse) as count:
            try:
                ACTIONS[action][0](place)
            except OSError as error:
                assert error.errno == errno.ENOSPC
                named = error.filename is not None and ".engineworks" not in str(error.filename)
                ledger.add(f"operation {at} is named", None if named else repr(error))
        state = place.state()
        ledger.add(f"operation {at}", None if state in allowed else f"the bundle is {state}")
        if state == "new":  # the old one could not be removed: that is for the next command
            place.write("next")
        left = place.leftovers()
        ledger.add(f"operation {at}, at once", f"{left} left over" if left else None)
        if count.num < at:
            break
    assert count.num < at
    assert at > 5

"""The folder of results: a record says what inference wrote there, and nothing else is touched.

``infer.json`` lists the files of the last run and how it ended. What a run that finished left is
removed by the next one; what one left that was stopped, failed or killed is set aside in
``earlier-N/`` with its record, so that a service that is started again loses nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path, PurePosixPath
from typing import Literal

from engineworks.runtime import files
from engineworks.runtime.claims import claim, real
from engineworks.runtime.errors import InputError

RECORD_NAME = "infer.json"
_FORMAT = "engineworks-results"
_LINES = (".csv", ".jsonl")

Status = Literal["running", "finished", "stopped", "failed"]


class Outputs:
    """The files of one run in a folder that belongs to this process meanwhile.

    A file is in the record before it is made. At the end the record lists what is there.

    Attributes:
        status: how the run ends; ``failed`` until somebody knows better.
    """

    def __init__(self, out: Path, planned: Iterable[str], sources: Sequence[Path]) -> None:
        """Name the files that will be written.

        Args:
            planned: paths below ``out``, with ``/``.
            sources: what is read, which is never written over nor removed.

        Raises:
            InputError: a planned file is a source.
        """
        self.out = out
        self.status: Status = "failed"
        self._names = list(dict.fromkeys(planned))
        self._sources = {real(path) for path in sources}
        self._stack = ExitStack()
        for name in self._names:
            self._refuse_source(name)

    def __enter__(self) -> Outputs:
        """Claim the folder, clear it of earlier runs and begin the record.

        Raises:
            InUseError: another process writes results there.
            InputError: a planned file is there and not of an earlier run.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        with self._stack:
            self._stack.enter_context(claim(self.out))
            files.sweep(self.out, deep=True)
            self._clear()
            for name in self._names:
                self._refuse_foreign(name)
            self._write("running")
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_error: object) -> None:
        if self.status == "finished" and kind is not None:
            self.status = "failed"  # the last files could not be written
        with self._stack:
            self._names = [name for name in self._names if (self.out / name).is_file()]
            self._write(self.status)

    def add(self, name: str) -> Path:
        """The path of a file that was not planned, now in the record.

        Raises:
            InputError: it is there, and not of this run; or it is a source.
        """
        if name not in self._names:
            self._refuse_source(name)
            self._refuse_foreign(name)
            self._names.append(name)
            self._write("running")
        return self.out / name

    def written(self) -> list[Path]:
        """The files of this run that are there."""
        return [path for name in self._names if (path := self.out / name).is_file()]

    def _refuse_source(self, name: str) -> None:
        if real(self.out / name) in self._sources:
            raise InputError(
                f"results would be written over their source {self.out / name}",
                fix="choose another --out",
            )

    def _refuse_foreign(self, name: str) -> None:
        path = self.out / name
        if path.exists() or path.is_symlink():
            raise InputError(
                f"{path} is there, and was not written by inference",
                fix="choose another --out, or move it away",
            )

    def _write(self, status: Status) -> None:
        record = {"format": _FORMAT, "status": status, "files": self._names}
        files.write(self.out / RECORD_NAME, json.dumps(record, indent=1) + "\n")

    def _clear(self) -> None:
        """Remove, or set aside, what the last run left."""
        path = self.out / RECORD_NAME
        if not path.exists():
            return
        status, names = _read(path)
        there = [name for name in names if self._is_own(name)]
        if status != "finished" and any(_has_lines(self.out / name) for name in there):
            _set_aside(self.out, there)
        else:
            for name in there:
                (self.out / name).unlink()
            path.unlink()
        _remove_empty(self.out, names)

    def _is_own(self, name: str) -> bool:
        """Whether a name of a record is a file below the folder, and none that is read now."""
        path = self.out / name
        below = real(path.parent).is_relative_to(real(self.out))
        plain = ".." not in PurePosixPath(name).parts and not PurePosixPath(name).is_absolute()
        return plain and below and path.is_file() and real(path) not in self._sources


def recorded(out: Path) -> list[Path]:
    """The files of the last run in a folder; none where it has no record of one.

    Raises:
        InputError: the record is damaged.
    """
    path = out / RECORD_NAME
    return [out / name for name in _read(path)[1]] if path.exists() else []


def _read(path: Path) -> tuple[str, list[str]]:
    """Status and files of a record.

    Raises:
        InputError: it is none.
    """
    try:
        record = json.loads(path.read_bytes())
        names = record["files"]
        if record["format"] != _FORMAT or not all(isinstance(name, str) for name in names):
            raise ValueError("another format")
        return str(record["status"]), names
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise InputError(
            f"{path} is not the record of an earlier inference ({error})",
            fix="choose another --out, or move it away",
        ) from error


def _has_lines(path: Path) -> bool:
    return path.suffix in _LINES and path.stat().st_size > 0


def _set_aside(out: Path, names: Sequence[str]) -> None:
    """Move the files of a run, its record last, to a folder of their own."""
    taken = [
        int(match[1])
        for path in out.glob("earlier-*")
        if (match := re.fullmatch(r"earlier-(\d+)", path.name))
    ]
    number = max(taken, default=1)
    if (out / f"earlier-{number}" / RECORD_NAME).exists():
        number += 1  # else a process was killed here: go on with what it began
    folder = out / f"earlier-{number}"
    for name in (*names, RECORD_NAME):
        if (folder / name).exists():
            continue  # of the user, in a folder of this name
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).rename(folder / name)
        if (folder / name).suffix in _LINES:
            files.cut_to_whole_lines(folder / name)
    files.sync(folder)


def _remove_empty(out: Path, names: Sequence[str]) -> None:
    """Remove the folders that a run made below ``out``, where nothing is left in them."""
    folders = {folder for name in names for folder in PurePosixPath(name).parents}
    for folder in sorted(folders - {PurePosixPath()}, key=lambda each: -len(each.parts)):
        with suppress(OSError):  # not empty, or gone
            (out / folder).rmdir()


def is_free(out: Path) -> bool:
    """Whether a folder is empty or not there; what dead processes left unfinished is removed."""
    if not out.exists():
        return True
    files.sweep(out)
    return all(files.is_temporary(path.name) for path in out.iterdir())

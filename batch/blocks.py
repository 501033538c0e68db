"""A folder of blocks: each is the answers to one share of the sources, there whole or not at all.

    OUT/_batch.json             what the blocks are made of: bundle, settings, sources
    OUT/block-000000.parquet    a row for each source of the first share, in their order

So a job that ended early is taken up by the blocks that are missing. Readers of a folder of
parquet files leave out names that begin with ``_``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from engineworks.batch.rows import ERROR
from engineworks.runtime import files
from engineworks.runtime.errors import InputError, ResourceError, UsageError
from engineworks.runtime.outputs import is_free

RECORD_NAME = "_batch.json"
_TRIED = "_tried-"  # a byte for each time that a block was begun and not ended
_FORMAT = "engineworks-batch"
_ERROR_PLACE = 1  # of the column among those of a file


@dataclass(frozen=True)
class Blocks:
    """Shares of a list of sources, and the files of their answers.

    Attributes:
        out: the folder.
        sources: in the order of the rows.
        size: sources of a block; the last one may have fewer.
    """

    out: Path
    sources: tuple[str, ...]
    size: int

    def __len__(self) -> int:
        return -(-len(self.sources) // self.size)

    def share(self, number: int) -> tuple[str, ...]:
        """The sources of a block."""
        return self.sources[number * self.size : (number + 1) * self.size]

    def missing(self) -> list[int]:
        """The blocks that are not there yet."""
        there = {entry.name for entry in os.scandir(self.out)}
        return [
            number for number in range(len(self)) if block_path(self.out, number).name not in there
        ]

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Write the record of a new folder, or hold an old one's against it.

        Args:
            settings: all else that rows depend on, as JSON has it.

        Raises:
            UsageError: the folder holds something else, or blocks that were made otherwise.
            InputError: its record is damaged.
        """
        wanted = {
            "format": _FORMAT,
            **settings,
            "sources": _digest(self.sources),
            "num_sources": len(self.sources),
            "block": self.size,
        }
        path = self.out / RECORD_NAME
        if path.exists():
            _compare(path, wanted)
            files.sweep(self.out)
            for tried in self.out.glob(f"{_TRIED}*"):
                tried.unlink()
        elif is_free(self.out):
            files.write(path, json.dumps(wanted, indent=1) + "\n")
        else:
            raise UsageError(
                f"{self.out} is not empty, and holds no blocks of a batch",
                fix="choose another --out",
            )

    def counts(self) -> tuple[int, int]:
        """Rows of all blocks that are there: those with an answer, and those with an error.

        Raises:
            InputError: a block is damaged.
        """
        num_rows = num_done = 0
        missing = set(self.missing())
        for number in set(range(len(self))) - missing:
            path = block_path(self.out, number)
            try:
                metadata = parquet.read_metadata(path)
            except (pa.ArrowException, OSError) as error:
                raise InputError(
                    f"{path} is damaged: {error}", fix="remove it, and give the command again"
                ) from error
            num_rows += metadata.num_rows
            groups = map(metadata.row_group, range(metadata.num_row_groups))
            columns = [group.column(_ERROR_PLACE) for group in groups]
            assert all(column.path_in_schema == ERROR for column in columns)
            num_done += sum(column.statistics.null_count for column in columns)
        return num_done, num_rows - num_done


def block_path(out: Path, number: int) -> Path:
    """The file of a block."""
    return out / f"block-{number:06d}.parquet"


@contextmanager
def attempt(out: Path, number: int, tries: int) -> Iterator[None]:
    """Try to make a block, which may end this process.

    Raises:
        ResourceError: so many processes have died of it already.
    """
    path = out / f"{_TRIED}{number:06d}"
    with path.open("ab") as tried:
        if tried.tell() >= tries:
            raise ResourceError(
                f"{tries} processes died over block {number}, one after the other",
                fix="give them more memory, or run `infer` on its pictures to see which it is",
            )
        tried.write(b".")
    yield
    path.unlink(missing_ok=True)


def write(path: Path, schema: Any, tables: Iterable[Any]) -> None:
    """Write a block in one step; each table is a row group."""
    with files.naming(path), files.NewFile(path.parent) as new:
        with parquet.ParquetWriter(new.file, schema, compression="zstd") as writer:
            for table in tables:
                writer.write_table(table)
        new.place(path)


def _digest(sources: Sequence[str]) -> str:
    """SHA-256 of names, each ended by a zero byte, which none can hold."""
    hashed = hashlib.sha256()
    for source in sources:
        hashed.update(os.fsencode(source) + b"\0")
    return hashed.hexdigest()


def _compare(path: Path, wanted: Mapping[str, Any]) -> None:
    try:
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict) or found.get("format") != _FORMAT:
            raise ValueError("another format")
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is not the record of a batch ({error})", fix="choose another --out"
        ) from error
    names = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]
    if names:
        # of a digest its beginning
        pairs = ((name, f"{found.get(name)}"[:12], f"{wanted.get(name)}"[:12]) for name in names)
        other = "; ".join(f"{name}: {before}, now {now}" for name, before, now in pairs)
        raise UsageError(
            f"{path.parent} holds blocks that were made otherwise ({other})",
            fix="choose another --out, or give the command that it was begun with",
        )

"""Classification sets in a parquet file: its rows, and its pictures where loaders can read them."""

from __future__ import annotations

import atexit
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from engineworks.runtime.errors import BackendError, DatasetError
from engineworks.runtime.files import scratch

Split: TypeAlias = Literal["train", "val", "test"]
# class name, file, row of a parquet file
Found: TypeAlias = tuple[str, Path, int | None]

COLUMNS = ("image", "label", "class_name", "split")

_SPLITS: tuple[Split, ...] = get_args(Split)
_ROWS_AT_ONCE = 16  # that are unpacked


@dataclass(frozen=True)
class PackedPicture:
    """An encoded picture that came from a parquet file's row: bytes ``start`` to ``stop``."""

    row: int
    file: Path
    start: int
    stop: int


def find(path: Path) -> tuple[dict[Split, list[Found]], list[str]]:
    """Rows by split, and the class names in the order of their labels.

    Args:
        path: a file with the columns ``image`` (a picture's encoded bytes, or a struct with the
            field ``bytes``), ``label`` (integer), ``class_name`` and ``split`` (train, val, test).

    Raises:
        DatasetError: another file, or columns that contradict each other.
        BackendError: pyarrow is not installed.
    """
    file = _open(path)
    table = file.read(columns=list(COLUMNS[1:]))
    labels, names, splits = (table.column(name).to_pylist() for name in COLUMNS[1:])
    for row, (label, name, split) in enumerate(zip(labels, names, splits, strict=True)):
        if not isinstance(label, int) or not isinstance(name, str) or split not in _SPLITS:
            raise DatasetError(
                f"{path}, row {row}: label {label!r}, class_name {name!r}, split {split!r}",
                fix="every row needs an integer, a text and one of train, val and test",
            )
    name_of = dict(zip(labels, names, strict=True))
    label_of = dict(zip(names, labels, strict=True))
    for label, name in zip(labels, names, strict=True):
        if name_of[label] != name:
            raise DatasetError(
                f"{path}: label {label} stands for both '{name}' and '{name_of[label]}'",
                fix="give every class one label",
            )
        if label_of[name] != label:
            raise DatasetError(
                f"{path}: class '{name}' has both label {label} and {label_of[name]}",
                fix="give every class one label",
            )
    rows: dict[Split, list[Found]] = {
        split: [(names[i], path, i) for i, value in enumerate(splits) if value == split]
        for split in _SPLITS
    }
    return {split: found for split, found in rows.items() if found}, [
        name_of[label] for label in sorted(name_of)
    ]


def _open(path: Path) -> Any:
    """A ``pyarrow.parquet.ParquetFile`` with the columns of a classification set."""
    try:
        from pyarrow import ArrowException, types
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError as error:
        raise BackendError(
            f"reading {path} needs pyarrow, which is not installed",
            fix='pip install "engineworks[parquet]"',
        ) from error
    try:
        # buffered: else the pictures of a whole row group are read at once
        file = ParquetFile(path, pre_buffer=False, buffer_size=2**20)
    except (ArrowException, OSError) as error:
        raise DatasetError(
            f"{path} cannot be read as parquet: {error}", fix="copy the file again"
        ) from error
    schema = file.schema_arrow
    if missing := [name for name in COLUMNS if name not in schema.names]:
        raise DatasetError(
            f"{path} lacks {', '.join(missing)}: its columns are {', '.join(schema.names)}",
            fix=f"the columns must be called {', '.join(COLUMNS)}",
        )
    kind = schema.field("image").type
    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if not (types.is_binary(kind) or types.is_large_binary(kind)):
        raise DatasetError(
            f"{path}: the column image holds {kind}",
            fix="store encoded pictures: binary, or a struct with a binary field bytes",
        )
    return file


def unpack(path: Path) -> dict[int, PackedPicture]:
    """Write the pictures of all rows one behind the other into a temporary file, once.

    The file lives as long as the process: loaders read it in any order and share one copy, which
    the format does not allow (its smallest unit, a page, often holds a thousand pictures).

    Raises:
        DatasetError: a row without a picture, or a damaged file.
    """
    return _unpack(path, path.stat().st_mtime_ns)


@cache
def _unpack(path: Path, _mtime_ns: int) -> dict[int, PackedPicture]:
    from pyarrow import ArrowException

    kept = ExitStack()
    atexit.register(kept.close)
    folder = kept.enter_context(scratch(path.parent))
    unpacked = folder / "pictures"
    found: dict[int, PackedPicture] = {}
    try:
        with unpacked.open("wb") as target:
            for batch in _open(path).iter_batches(_ROWS_AT_ONCE, columns=["image"]):
                for value in batch.column(0).to_pylist():
                    row, start = len(found), target.tell()
                    data = value["bytes"] if isinstance(value, dict) else value
                    if not data:
                        raise DatasetError(
                            f"{path}, row {row} has no picture", fix="leave the row out"
                        )
                    stop = start + target.write(data)
                    found[row] = PackedPicture(row, unpacked, start, stop)
    except (ArrowException, OSError) as error:
        raise DatasetError(
            f"the pictures of {path} cannot be unpacked into {folder}: {error}",
            fix="copy the file again, and make room in the temporary folder",
        ) from error
    return found

"""Results in files that grow: JSON lines, tables, and a data set in COCO's form.

Lines are whole at every moment, and put on the disk every few seconds.
"""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from engineworks.runtime.files import Lines, NewFile, naming
from engineworks.runtime.outputs import Outputs
from engineworks.runtime.results import Detections
from engineworks.runtime.sinks import Item
from engineworks.runtime.systems import Result
from engineworks.runtime.tensors import Array
from engineworks.runtime.texts import cell

COCO_NAME = "coco.json"
LINES_NAME = "results.jsonl"
NOT_FINITE = "the result holds a number that is not finite"
_ORIGIN = "source"  # first column of every table
_SYNC_S = 2.0  # between two times that tables are put on the disk


class _Table:
    """One CSV file, its header from the first row."""

    def __init__(self, lines: Lines) -> None:
        self._lines = lines
        self._columns: list[str] | None = None

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns or list(rows[0]), extrasaction="ignore")
        if self._columns is None:
            self._columns = list(rows[0])
            writer.writerow({name: cell(name) for name in rows[0]})
        writer.writerows(
            {k: cell(value) if isinstance(value, str) else value for k, value in row.items()}
            for row in rows
        )
        self._lines.add(text.getvalue())


class Tables:
    """``results.csv``, one per field that lists objects and, if asked for, ``results.jsonl``."""

    def __init__(self, outputs: Outputs, *, jsonl: bool) -> None:
        self._outputs = outputs
        self._jsonl = jsonl
        self._stack = ExitStack()
        self._files: list[Lines] = []
        self._lines: Lines | None = None
        self._tables: dict[str, _Table] = {}
        self._synced = time.monotonic()

    def __enter__(self) -> Tables:
        with ExitStack() as opened:  # closes the first where the second cannot be opened
            opened.push(self._stack)
            self._open("results")
            if self._jsonl:
                self._lines = self._new(LINES_NAME)
            opened.pop_all()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()

    def add(self, item: Item, image: Array, result: Result) -> str | None:
        """Write one result.

        Returns:
            None, or why the result cannot be used; then nothing is written.
        """
        record = record_of(item, image, result)
        line = line_of(record)
        if line is None:
            return NOT_FINITE
        self._line(line)
        self._tables["results"].add([dict(_scalars(record))])
        for name, values in record.items():
            if isinstance(values, list) and values and isinstance(values[0], Mapping):
                table = self._tables.get(name) or self._open(name)
                table.add([{**_origin(item), **dict(_scalars(value))} for value in values])
        self._sync()
        return None

    def failed(self, item: Item, error: str) -> None:
        """Note that there is no result for a picture."""
        self._line(json.dumps(failure_of(item, error)))
        self._sync()

    def _open(self, name: str) -> _Table:
        self._tables[name] = _Table(self._new(f"{name}.csv"))
        return self._tables[name]

    def _new(self, name: str) -> Lines:
        lines = Lines(self._outputs.add(name))
        self._stack.callback(lines.close)
        self._files.append(lines)
        return lines

    def _line(self, line: str) -> None:
        if self._lines is not None:
            self._lines.add(line + "\n")

    def _sync(self) -> None:
        """Put the files on the disk, every now and then."""
        if time.monotonic() - self._synced >= _SYNC_S:
            for lines in self._files:
                lines.sync()
            self._synced = time.monotonic()


class Coco:
    """``coco.json``: images, categories and, as annotations with a score, what was found.

    Annotations are written as they come: of an image no more than a line is kept. The file has its
    name when it is whole.

    Args:
        names: of the categories, which get numbers from 1 in this order.
    """

    def __init__(self, out: Path, names: Sequence[str]) -> None:
        self._path = out / COCO_NAME
        self._new: NewFile | None = None
        self._images: list[str] = []
        self._categories = {name: i + 1 for i, name in enumerate(dict.fromkeys(names))}
        self._num_found = 0

    def __enter__(self) -> Coco:
        with naming(self._path):
            self._new = NewFile(self._path.parent)
        self._write('{"annotations": [')
        return self

    def __exit__(self, *_error: object) -> None:
        assert self._new is not None
        with naming(self._path), self._new:
            categories = [{"id": k, "name": name} for name, k in self._categories.items()]
            self._write('\n],\n"images": [\n' + ",\n".join(self._images))
            self._write(f'\n],\n"categories": {json.dumps(categories)}}}\n')
            self._new.place(self._path, replace=False)

    def failed(self, item: Item, error: str) -> None:
        """What could not be judged is no image of the set."""

    def _write(self, text: str) -> None:
        assert self._new is not None
        with naming(self._path):
            self._new.file.write(text.encode("utf-8", "surrogateescape"))

    def add(self, item: Item, image: Array, result: Result) -> None:
        """List an image and what was found on it."""
        assert isinstance(result, Detections)  # of other systems nobody gets this far
        number = len(self._images) + 1
        height, width = image.shape[:2]
        origin = _origin(item)
        size = {"id": number, "file_name": origin.pop(_ORIGIN), "width": width, "height": height}
        self._images.append(json.dumps({**size, **origin}))
        for found in result.objects:
            x1, y1, x2, y2 = (round(float(side), 2) for side in found.box)
            width, height = round(x2 - x1, 2), round(y2 - y1, 2)
            self._num_found += 1
            annotation: dict[str, Any] = {
                "id": self._num_found,
                "image_id": number,
                "category_id": self._categories[found.name],
                "bbox": [x1, y1, width, height],
                "area": round(width * height, 2),
                "iscrowd": 0,
                "score": round(float(found.score), 6),
            }
            if found.track is not None:
                annotation["track_id"] = found.track
            self._write(("," if self._num_found > 1 else "") + "\n" + json.dumps(annotation))


def record_of(item: Item, image: Array, result: Result) -> dict[str, Any]:
    """A result as JSON has it: where it is from, the picture's size, and what the system says."""
    height, width = image.shape[:2]
    return {**_origin(item), "width": width, "height": height, **result.to_json()}


def line_of(record: Mapping[str, Any]) -> str | None:
    """A record as a line of JSON; None where it holds a number that is not finite."""
    try:
        return json.dumps(record, allow_nan=False)
    except ValueError:
        return None


def failure_of(item: Item, error: str) -> dict[str, Any]:
    """Likewise, of a picture without a result."""
    return {**_origin(item), "error": error}


def _origin(item: Item) -> dict[str, Any]:
    """Where a record comes from."""
    origin: dict[str, Any] = {"camera": item.camera} if item.camera else {}
    origin[_ORIGIN] = item.name
    if item.index is not None:
        origin["frame"] = item.index
    if item.time_s is not None:
        origin["time_s"] = round(item.time_s, 6)
    return origin


def _scalars(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The plain values of a record; nested names are joined by dots.

    A list of numbers becomes numbered columns; other lists are left out.
    """
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{key}.")
        elif isinstance(value, list) and all(isinstance(each, float) for each in value):
            yield from ((f"{prefix}{key}.{i}", each) for i, each in enumerate(value))
        elif not isinstance(value, (list, tuple)):
            yield f"{prefix}{key}", value

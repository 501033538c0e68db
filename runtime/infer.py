"""A whole source through a system: decoding overlaps inference, results are written as they come.

    source -> decoder thread -> bounded queue -> system.infer -> JSON lines, CSV, overlays, video

Files are written under temporary names and renamed at the end; after an interrupt they are renamed
as well, so that no result is lost.
"""

from __future__ import annotations

import csv
import json
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from runtime import images, video
from runtime.errors import EngineworksError, ImageError
from runtime.sources import Source
from runtime.systems import Result, System
from runtime.tensors import Array

Progress = Callable[[int, int], None]

_QUEUE_BATCHES = 2  # decoded ahead of inference


@dataclass
class Summary:
    """What came of a source.

    Attributes:
        failures: (name, message) of every picture or stream that could not be read.
        seconds: wall time; ``infer_seconds`` of it inside the system, ``wait_seconds`` waiting for
            decoded pictures.
        num_dropped: frames of a live stream that were skipped to stay current.
    """

    num_done: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0
    infer_seconds: float = 0.0
    wait_seconds: float = 0.0
    num_dropped: int = 0

    @property
    def num_failed(self) -> int:
        return len(self.failures)

    @property
    def images_per_second(self) -> float:
        return self.num_done / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class _Item:
    """A decoded picture, or the message why there is none."""

    name: str
    image: Array | None = None
    error: str | None = None
    index: int | None = None
    time_s: float | None = None


def infer(
    system: System,
    source: Source,
    out: Path,
    *,
    batch: int = 8,
    jsonl: bool = False,
    overlays: bool = False,
    frame_step: int = 1,
    progress: Progress | None = None,
) -> Summary:
    """Run a system over a source.

    Writes into ``out``: ``results.csv``; with ``jsonl`` ``results.jsonl``, one object per picture;
    with ``overlays`` ``overlays/<name>.png`` per picture, or an annotated video.

    Args:
        batch: pictures per call; a live stream is always served one by one.
        frame_step: only every n-th frame of a video or stream.
        progress: called with (done, total); total is 0 where it is not known.

    Returns:
        Counts and times. Pictures that cannot be read are in ``failures``, not raised.
    """
    out.mkdir(parents=True, exist_ok=True)
    summary = Summary()
    total = len(source.paths) if source.kind == "images" else 0
    start = time.perf_counter()
    size = 1 if source.kind == "stream" else batch
    with ExitStack() as stack:
        decoder = stack.enter_context(_Decoder(source, frame_step, size))
        writer = stack.enter_context(_Writer(out, source, jsonl, overlays))
        for items in decoder.batches():
            good = [item for item in items if item.image is not None]
            begin = time.perf_counter()
            results = system.infer([item.image for item in good if item.image is not None])
            summary.infer_seconds += time.perf_counter() - begin
            answers = iter(results)
            for item in items:
                if item.error is not None:
                    summary.failures.append((item.name, item.error))
                    writer.failed(item)
                else:
                    writer.add(system, item, next(answers))
                    summary.num_done += 1
            if progress:
                progress(summary.num_done + summary.num_failed, total)
    summary.seconds = time.perf_counter() - start
    summary.wait_seconds = decoder.wait_seconds
    summary.num_dropped = decoder.num_dropped
    return summary


class _Decoder:
    """Decodes in a thread, a bounded number of pictures ahead, in order."""

    def __init__(self, source: Source, step: int, batch: int) -> None:
        self.wait_seconds = 0.0
        self.num_dropped = 0
        self._source = source
        self._step = step
        self._batch = batch
        self._queue: queue.Queue[_Item | BaseException | None] = queue.Queue(_QUEUE_BATCHES * batch)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> _Decoder:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stop.set()
        while self._thread.is_alive():
            try:  # a full queue would hold the thread back
                self._queue.get(timeout=0.05)
            except queue.Empty:
                self._thread.join(timeout=0.05)

    def batches(self) -> Iterator[list[_Item]]:
        """Lists of up to ``batch`` items, until the source ends."""
        items: list[_Item] = []
        while True:
            begin = time.perf_counter()
            item = self._queue.get()
            self.wait_seconds += time.perf_counter() - begin
            if isinstance(item, BaseException):
                raise item
            if item is not None:
                items.append(item)
            if items and (item is None or len(items) == self._batch):
                yield items
                items = []
            if item is None:
                return

    def _work(self) -> None:
        last: BaseException | None = None
        try:
            for item in self._items():
                if not self._put(item):
                    return
        except BaseException as error:  # handed over: the consumer raises it
            last = error
        self._put(last)

    def _put(self, item: _Item | BaseException | None) -> bool:
        """Queue an item; False once the consumer has gone."""
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def _items(self) -> Iterator[_Item]:
        if self._source.kind == "images":
            for path in self._source.paths:
                try:
                    yield _Item(str(path), images.read(path))
                except ImageError as error:
                    yield _Item(str(path), error=str(error))
            return
        address = self._source.address
        live = video.LiveStream(address, step=self._step) if self._source.kind == "stream" else None
        try:
            for frame in live or video.frames(address, step=self._step):
                yield _Item(address, frame.image, index=frame.index, time_s=frame.time_s)
                if live:
                    self.num_dropped = live.num_dropped
        except EngineworksError as error:
            # what was decoded before stands; the source as a whole counts as failed
            yield _Item(address, error=str(error))
        finally:
            if live:
                live.close()


class _Writer:
    """Result files of one run of ``infer``."""

    def __init__(self, out: Path, source: Source, jsonl: bool, overlays: bool) -> None:
        self._out = out
        self._source = source
        self._overlays = overlays
        self._files: list[tuple[IO[str], Path, Path]] = []
        self._lines = self._open("results.jsonl") if jsonl else None
        self._table = self._open("results.csv")
        self._csv: Any = None
        self._video: video.VideoWriter | None = None
        self._names = overlay_names(source.paths) if source.kind == "images" else {}

    def __enter__(self) -> _Writer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._video is not None:
            self._video.__exit__(kind, error, trace)
        for file, temporary, final in self._files:
            file.flush()
            os.fsync(file.fileno())
            file.close()
            temporary.replace(final)

    def add(self, system: System, item: _Item, result: Result) -> None:
        """Write one result everywhere that it was asked for."""
        assert item.image is not None
        height, width = item.image.shape[:2]
        record = {**_origin(item), "width": width, "height": height, **result.to_json()}
        self._line(record)
        if self._csv is None:
            flat = [key for key, value in record.items() if not isinstance(value, (dict, list))]
            self._csv = csv.DictWriter(self._table, flat, extrasaction="ignore")
            self._csv.writeheader()
        self._csv.writerow(record)
        self._table.flush()
        if self._overlays:
            self._draw(item, system.draw(item.image, result))

    def failed(self, item: _Item) -> None:
        """Note that a picture could not be read."""
        self._line({**_origin(item), "error": item.error})

    def _line(self, record: dict[str, Any]) -> None:
        if self._lines is not None:
            self._lines.write(json.dumps(record, allow_nan=False) + "\n")
            self._lines.flush()

    def _draw(self, item: _Item, picture: Array) -> None:
        if self._source.kind == "images":
            images.write(self._out / "overlays" / self._names[Path(item.name)], picture)
            return
        if self._video is None:
            path = Path(item.name)
            is_file = self._source.kind == "video"
            rate = video.frame_rate(item.name) if is_file else video.LIVE_RATE
            name = path.stem if is_file else "stream"
            self._video = video.VideoWriter(self._out / f"{name}.mp4", rate)
        assert item.time_s is not None
        self._video.write(picture, item.time_s)

    def _open(self, name: str) -> IO[str]:
        temporary = self._out / f".{name}.tmp"
        file = temporary.open("w", encoding="utf-8", newline="")
        self._files.append((file, temporary, self._out / name))
        return file


def overlay_names(paths: Sequence[Path]) -> dict[Path, Path]:
    """A file name for each picture's overlay: its path below the common folder, never one twice.

    Returns:
        picture -> relative PNG path.
    """
    if not paths:
        return {}
    base = Path(os.path.commonpath([path.absolute().parent for path in paths]))
    names: dict[Path, Path] = {}
    taken: set[Path] = set()
    for path in paths:
        name = path.absolute().relative_to(base).with_suffix(".png")
        if name in taken:  # a.jpg beside a.png: keep the suffix in the name
            name = name.with_name(f"{path.name}.png")
        taken.add(name)
        names[path] = name
    return names


def _origin(item: _Item) -> dict[str, Any]:
    """Where a record comes from."""
    origin: dict[str, Any] = {"source": item.name}
    if item.index is not None:
        origin["frame"] = item.index
    if item.time_s is not None:
        origin["time_s"] = round(item.time_s, 6)
    return origin

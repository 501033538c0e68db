"""A whole source through a system: decoding and drawing overlap inference, results keep the order.

    source -> decoder thread -> bounded queue -> system.infer -> JSON lines, CSV, COCO's JSON
                                                            `--> drawing threads -> overlays and
                                                                 their overview, or a video

Files are written under temporary names and renamed at the end; after an interrupt they are renamed
as well, so that no result is lost. A live stream has no queue: its newest frame is taken, one at a
time, until Ctrl-C.
"""

from __future__ import annotations

import csv
import json
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from runtime import draw, images, live, video
from runtime.decoding import LIVE_RATE, Frame
from runtime.errors import ImageError, InputError, NotFiniteError, UsageError, VideoError
from runtime.names import overlay_names
from runtime.results import Detections
from runtime.sources import Source
from runtime.systems import Promptable, Result, System
from runtime.tensors import Array
from runtime.texts import cell
from runtime.tracking import Tracks

Progress = Callable[[int, int], None]
Say = Callable[[str], None]

OVERVIEW_NAME = "overview.jpg"
COCO_NAME = "coco.json"
_LINES_NAME = "results.jsonl"
_ORIGIN = "source"  # first column of every table

_QUEUE_BATCHES = 2  # decoded ahead of inference
_DRAWING_THREADS = 2
_MAX_UNDRAWN = 8  # results that wait for a drawing thread, each with its picture
_MAX_OVERVIEW, _OVERVIEW_SIDE = 64, 640  # pictures of the overview, and their longer side at most


@dataclass
class Summary:
    """What came of a source.

    Attributes:
        failures: (name, message) of every picture or stream that could not be read, and of results
            that are not finite.
        seconds: wall time; ``infer_seconds`` of it inside the system, ``wait_seconds`` waiting for
            decoded pictures, the rest writing results and waiting for overlays. ``decode_seconds``
            is spent beside it, in the decoder's thread (0 for a live stream).
        num_dropped: frames of a live stream that were skipped to stay current.
        freezes: (time, seconds) of a live stream's pictures that stood still.
    """

    num_done: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0
    infer_seconds: float = 0.0
    wait_seconds: float = 0.0
    decode_seconds: float = 0.0
    num_dropped: int = 0
    freezes: list[tuple[float, float]] = field(default_factory=list)

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
    coco: bool = False,
    track: bool = False,
    frame_step: int = 1,
    progress: Progress | None = None,
    say: Say | None = None,
) -> Summary:
    """Run a system over a source.

    Writes into ``out``: ``results.csv``, the scalar fields of each result, its header from the
    first one; ``<field>.csv`` for a field that lists objects, a line for each, once there is any;
    with ``jsonl`` ``results.jsonl``, one object per picture, those that failed included;
    with ``overlays`` ``overlays/<name>.png`` per picture and ``overview.jpg``, the first 64 of them
    on a sheet, or one annotated ``<name>.mp4``; with ``coco`` ``coco.json``, detections in COCO's
    form. Files of these names from an earlier run are removed, asked for or not: nobody shall take
    its pictures for those of the new results.
    ``system.draw`` is called in other threads than ``system.infer``.

    Args:
        batch: pictures per call; a live stream is always served one by one.
        coco: only for a system that gives ``Detections``, and not for a live stream.
        track: give detections in a video or stream the numbers of their tracks.
        frame_step: only every n-th frame of a video or stream.
        progress: called with (done, total); total is 0 where it is not known.
        say: called with a line per picture, its name and result; not for frames. Of a live stream
            with what happens to it, from another thread.

    Returns:
        Counts and times. Pictures that cannot be read, or that the system refuses, are in
        ``failures``, not raised.

    Raises:
        InputError: results would be written over the source.
        UsageError: ``coco`` where there is no such result.
        BackendError: ``track`` without the package that does it.
        KeyboardInterrupt: passed on, after the results until then are in their files; for a live
            stream it is the ordinary end and not raised.
    """
    names = _names_for_coco(system, source) if coco else ()
    tracks = Tracks() if track and source.kind != "images" else None
    out.mkdir(parents=True, exist_ok=True)
    summary = Summary()
    total = _num_expected(source, frame_step)
    start = time.perf_counter()
    size = 1 if source.kind == "stream" else batch
    with ExitStack() as stack:
        drawer = _Drawer(system, out, source, frame_step) if overlays else None
        _remove_earlier(out, source)
        tables = stack.enter_context(_Tables(out, jsonl=jsonl))
        dataset = stack.enter_context(_Coco(out, names)) if coco else None
        if drawer:
            stack.enter_context(drawer)
        decoder = stack.enter_context(_Decoder(source, frame_step, size, say))

        def keep(item: _Item, result: Any) -> str | None:
            """Write one result; None, or why it cannot be used."""
            assert item.image is not None
            if tracks and isinstance(result, Detections):
                result = tracks.update(result)
            if error := tables.add(item, item.image, result):
                return error
            if dataset and isinstance(result, Detections):
                dataset.add(item, item.image, result)
            if drawer:
                drawer.add(item, item.image, result)
            if say and item.time_s is None:
                say(f"{item.name}: {result.summary()}")
            return None

        try:
            for items in decoder.batches():
                pictures = [item.image for item in items if item.image is not None]
                begin = time.perf_counter()
                answers = iter(_answers(system, pictures))
                summary.infer_seconds += time.perf_counter() - begin
                for item in items:
                    answer = item.error if item.image is None else next(answers)
                    error = answer if isinstance(answer, str) else keep(item, answer)
                    if error is None:
                        summary.num_done += 1
                    else:
                        summary.failures.append((item.name, error))
                        tables.failed(item, error)
                if progress:
                    progress(summary.num_done + summary.num_failed, total)
        except KeyboardInterrupt:
            if source.kind != "stream":
                raise
    summary.seconds = time.perf_counter() - start
    summary.wait_seconds = decoder.wait_seconds
    summary.decode_seconds = decoder.decode_seconds
    summary.num_dropped = decoder.num_dropped
    summary.freezes = decoder.freezes
    return summary


def _answers(system: System, pictures: Sequence[Array]) -> Sequence[Result | str]:
    """A result for each picture, or why there is none.

    A picture that the system refuses must not take the others of its batch along.
    """
    try:
        return system.infer(pictures) if pictures else ()
    except (InputError, NotFiniteError) as error:
        if len(pictures) == 1:
            return (error.message,)
        return [_answers(system, [picture])[0] for picture in pictures]


def _num_expected(source: Source, step: int) -> int:
    """How many pictures will come, 0 where that is not known."""
    if source.num_images is not None:
        return source.num_images
    if source.kind == "stream":
        return 0
    try:
        return -(-video.info(source.address).num_frames // step)
    except VideoError:
        return 0  # the decoder meets the same error and reports it


class _Decoder:
    """Decodes in a thread, a bounded number of pictures ahead, in order."""

    def __init__(self, source: Source, step: int, batch: int, say: Say | None) -> None:
        self.wait_seconds = 0.0
        self.decode_seconds = 0.0
        self.num_dropped = 0
        self.freezes: list[tuple[float, float]] = []
        self._say = say or (lambda _: None)
        self._source = source
        self._step = step
        self._batch = batch
        self._queue: queue.Queue[_Item | BaseException | None] = queue.Queue(_QUEUE_BATCHES * batch)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._live: live.LiveStream | None = None

    def __enter__(self) -> _Decoder:
        if self._source.kind == "stream":  # has a thread of its own
            self._live = live.LiveStream(self._source.address, step=self._step, say=self._say)
        else:
            self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stop.set()
        if self._live is not None:
            self.num_dropped, self.freezes = self._live.num_dropped, self._live.freezes
            self._live.close()
        else:
            self._thread.join()

    def batches(self) -> Iterator[list[_Item]]:
        """Lists of up to ``batch`` items, until the source ends."""
        source = self._queued() if self._live is None else self._frames(self._live)
        items: list[_Item] = []
        while True:
            begin = time.perf_counter()
            item = next(source, None)
            self.wait_seconds += time.perf_counter() - begin
            if item is not None:
                items.append(item)
            if items and (item is None or len(items) == self._batch):
                yield items
                items = []
            if item is None:
                return

    def _queued(self) -> Iterator[_Item]:
        while (item := self._queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def _work(self) -> None:
        last: BaseException | None = None
        try:
            if self._source.kind == "images":
                source = self._pictures()
            else:
                source = self._frames(video.frames(self._source.address, step=self._step))
            while True:
                begin = time.perf_counter()
                item = next(source, None)
                self.decode_seconds += time.perf_counter() - begin
                if item is None or not self._put(item):
                    break
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

    def _pictures(self) -> Iterator[_Item]:
        for path in self._source.paths:
            try:
                yield _Item(str(path), self._source.reader.read(path))
            except ImageError as error:
                yield _Item(str(path), error=error.message)

    def _frames(self, frames: Iterable[Frame]) -> Iterator[_Item]:
        name = self._source.name
        try:
            for frame in frames:
                yield _Item(name, frame.image, index=frame.index, time_s=frame.time_s)
        except VideoError as error:
            # what was decoded before stands; the source as a whole counts as failed
            yield _Item(name, error=error.message)


class _Table:
    """One CSV file, its header from the first row."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._writer: csv.DictWriter[str] | None = None

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        if self._writer is None:
            self._writer = csv.DictWriter(self._file, list(rows[0]), extrasaction="ignore")
            self._writer.writerow({name: cell(name) for name in rows[0]})
        self._writer.writerows(
            {k: cell(value) if isinstance(value, str) else value for k, value in row.items()}
            for row in rows
        )
        self._file.flush()


class _Tables:
    """``results.csv``, one per field that lists objects and, if asked for, ``results.jsonl``."""

    def __init__(self, out: Path, *, jsonl: bool) -> None:
        self._out = out
        self._jsonl = jsonl
        self._stack = ExitStack()
        self._lines: IO[str] | None = None
        self._tables: dict[str, _Table] = {}

    def __enter__(self) -> _Tables:
        with ExitStack() as opened:  # closes the first where the second cannot be opened
            opened.push(self._stack)
            self._open("results")
            if self._jsonl:
                self._lines = self._stack.enter_context(_text(self._out / _LINES_NAME))
            opened.pop_all()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()

    def add(self, item: _Item, image: Array, result: Result) -> str | None:
        """Write one result.

        Returns:
            None, or why the result cannot be used; then nothing is written.
        """
        height, width = image.shape[:2]
        record = {**_origin(item), "width": width, "height": height, **result.to_json()}
        try:
            line = json.dumps(record, allow_nan=False)
        except ValueError:
            return "the result holds a number that is not finite"
        self._line(line)
        self._tables["results"].add([dict(_scalars(record))])
        for name, values in record.items():
            if isinstance(values, list) and values and isinstance(values[0], Mapping):
                table = self._tables.get(name) or self._open(name)
                table.add([{**_origin(item), **dict(_scalars(value))} for value in values])
        return None

    def failed(self, item: _Item, error: str) -> None:
        """Note that there is no result for a picture."""
        self._line(json.dumps({**_origin(item), "error": error}))

    def _open(self, name: str) -> _Table:
        file = self._stack.enter_context(_text(self._out / f"{name}.csv"))
        self._tables[name] = _Table(file)
        return self._tables[name]

    def _line(self, line: str) -> None:
        if self._lines is not None:
            self._lines.write(line + "\n")
            self._lines.flush()


class _Coco:
    """``coco.json``: images, categories and, as annotations with a score, what was found.

    Annotations are written as they come: of an image no more than a line is kept.

    Args:
        names: of the categories, which get numbers from 1 in this order.
    """

    def __init__(self, out: Path, names: Sequence[str]) -> None:
        self._path = out / COCO_NAME
        self._stack = ExitStack()
        self._images: list[str] = []
        self._categories = {name: i + 1 for i, name in enumerate(dict.fromkeys(names))}
        self._num_found = 0

    def __enter__(self) -> _Coco:
        self._file = self._stack.enter_context(_text(self._path))
        self._file.write('{"annotations": [')
        return self

    def __exit__(self, *_error: object) -> None:
        with self._stack:
            categories = [{"id": k, "name": name} for name, k in self._categories.items()]
            self._file.write('\n],\n"images": [\n' + ",\n".join(self._images))
            self._file.write(f'\n],\n"categories": {json.dumps(categories)}}}\n')

    def add(self, item: _Item, image: Array, result: Detections) -> None:
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
            self._file.write(("," if self._num_found > 1 else "") + "\n" + json.dumps(annotation))


class _Drawer:
    """Draws, encodes and writes overlays in threads: that takes longer than many a network.

    An error there is raised by a later ``add`` or at the end.
    """

    def __init__(self, system: System, out: Path, source: Source, step: int) -> None:
        self._system = system
        self._step = step
        self._source = source
        names = overlay_names(source.paths) if source.kind == "images" else {}
        self._pictures = {path: out / "overlays" / name for path, name in names.items()}
        self._video_path = _video_path(out, source)
        self._overview_path = out / OVERVIEW_NAME
        self._thumbnails: dict[str, Array | None] = {}  # None until it is drawn
        targets = [*self._pictures.values(), self._overview_path, self._video_path]
        _check_apart(targets, source.paths)
        self._video: video.VideoWriter | None = None
        # the frames of a video stay in order
        self._threads = ThreadPoolExecutor(_DRAWING_THREADS if source.kind == "images" else 1)
        self._undrawn: deque[Future[None]] = deque()

    def __enter__(self) -> _Drawer:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        with ExitStack() as stack:
            stack.callback(self._close_video)
            stack.callback(self._write_overview)
            self._threads.shutdown()  # draws what is left: its results have been written
            if error is None:
                for each in self._undrawn:
                    each.result()

    def add(self, item: _Item, image: Array, result: Result) -> None:
        """Queue one overlay; waits while too many are queued."""
        while self._undrawn and (len(self._undrawn) == _MAX_UNDRAWN or self._undrawn[0].done()):
            self._undrawn.popleft().result()
        if item.time_s is None and len(self._thumbnails) < _MAX_OVERVIEW:
            self._thumbnails[item.name] = None
        self._undrawn.append(self._threads.submit(self._draw, item, image, result))

    def _draw(self, item: _Item, image: Array, result: Result) -> None:
        picture = self._system.draw(image, result)
        if item.time_s is None:
            images.write(self._pictures[Path(item.name)], picture)
            if item.name in self._thumbnails:
                self._thumbnails[item.name] = draw.thumbnail(picture, _OVERVIEW_SIDE)
            return
        if self._video is None:
            of_file = self._source.kind == "video"
            rate = video.info(self._source.address).rate if of_file else LIVE_RATE
            self._video = video.VideoWriter(self._video_path, rate / self._step)
        self._video.write(picture, item.time_s)

    def _write_overview(self) -> None:
        drawn = [picture for picture in self._thumbnails.values() if picture is not None]
        if drawn:
            images.write(self._overview_path, draw.grid(drawn))

    def _close_video(self) -> None:
        if self._video is not None:
            self._video.close()


@contextmanager
def _text(path: Path) -> Iterator[IO[str]]:
    """A text file that grows under a temporary name and gets its own at the end, come what may."""
    temporary = path.with_name(f".{path.name}.tmp")
    # file names need not be UTF-8: their bytes pass through
    with temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        try:
            yield file
        finally:
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(path)


def _video_path(out: Path, source: Source) -> Path:
    """Where the annotated video of a video or stream goes."""
    return out / f"{source.paths[0].stem if source.kind == 'video' else 'stream'}.mp4"


def _remove_earlier(out: Path, source: Source) -> None:
    """Remove what an earlier run may have left beside its table, but nothing that is to be read."""
    drawn = [*(out / "overlays").rglob("*.png"), out / OVERVIEW_NAME, _video_path(out, source)]
    tables = [path for path in out.glob("*.csv") if _is_table(path)]
    sources = {path.resolve() for path in source.paths}
    for path in [*drawn, *tables, out / _LINES_NAME, out / COCO_NAME]:
        if path.resolve() not in sources:
            path.unlink(missing_ok=True)


def _is_table(path: Path) -> bool:
    """Whether a file begins as our tables do; the names of lists are their systems' affair."""
    with path.open(encoding="utf-8", errors="surrogateescape") as file:
        return file.readline().startswith(f"{_ORIGIN},")


def _names_for_coco(system: System, source: Source) -> tuple[str, ...]:
    """What may be found; refused where there will be nothing in COCO's form."""
    if not isinstance(system, Promptable):
        raise UsageError(
            f"the system '{system.bundle.manifest.system}' gives no boxes", fix="leave --coco out"
        )
    if source.kind == "stream":
        raise UsageError(
            "a live stream has no end, and so no list of its images",
            fix="take --jsonl, which is written line by line",
        )
    return system.names()


def _check_apart(targets: Iterable[Path], sources: Sequence[Path]) -> None:
    """Refuse to write over what is being read."""
    clashes = {path.resolve() for path in targets} & {path.resolve() for path in sources}
    if clashes:
        raise InputError(
            f"overlays would be written over their source {min(clashes)}",
            fix="choose another --out",
        )


def _origin(item: _Item) -> dict[str, Any]:
    """Where a record comes from."""
    origin: dict[str, Any] = {_ORIGIN: item.name}
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

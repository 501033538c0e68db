"""A whole source through a system: decoding and drawing overlap inference, results keep the order.

    source -> decoder thread -> bounded queue -> system.infer -> JSON lines, CSV, COCO's JSON
                                                            `--> drawing threads -> overlays and
                                                                 their overview, or a video

Tables and videos grow under their own names and are put on the disk every few seconds: whatever
ends the process, what was found until then stands in them; ``infer.json`` says whether it is all. A
live stream has no queue: its newest frame is taken, one at a time, until Ctrl-C.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGINT
from typing import Any

from engineworks.runtime import images, live, video
from engineworks.runtime.decoding import Frame
from engineworks.runtime.errors import (
    ImageError,
    InputError,
    NotFiniteError,
    UsageError,
    VideoError,
)
from engineworks.runtime.outputs import Outputs
from engineworks.runtime.overlays import Overlays
from engineworks.runtime.overlays import planned as planned_overlays
from engineworks.runtime.results import Detections
from engineworks.runtime.signals import unbroken
from engineworks.runtime.sinks import Item, Sink
from engineworks.runtime.sources import Source
from engineworks.runtime.systems import (
    Follows,
    Promptable,
    Result,
    ShowsReferences,
    Stream,
    System,
)
from engineworks.runtime.tables import COCO_NAME, LINES_NAME, Coco, Tables
from engineworks.runtime.tensors import Array
from engineworks.runtime.tracking import Tracks

Progress = Callable[[int, int], None]
Say = Callable[[str], None]

REFERENCES_NAME = "references.jpg"  # what a system knows objects by

_QUEUE_BATCHES = 2  # decoded ahead of inference


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
        files: what was written.
        freezes: (time, seconds) of a live stream's pictures that stood still.
    """

    num_done: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0
    infer_seconds: float = 0.0
    wait_seconds: float = 0.0
    decode_seconds: float = 0.0
    num_dropped: int = 0
    files: list[Path] = field(default_factory=list)
    freezes: list[tuple[float, float]] = field(default_factory=list)

    @property
    def num_failed(self) -> int:
        return len(self.failures)

    @property
    def images_per_second(self) -> float:
        return self.num_done / self.seconds if self.seconds else 0.0


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
    follow: bool = False,
    frame_step: int = 1,
    progress: Progress | None = None,
    say: Say | None = None,
    summary: Summary | None = None,
) -> Summary:
    """Run a system over a source.

    Writes into ``out``: ``results.csv``, the scalar fields of each result, its header from the
    first one; ``<field>.csv`` for a field that lists objects, a line for each, once there is any;
    with ``jsonl`` ``results.jsonl``, one object per picture, those that failed included;
    with ``overlays`` ``overlays/<name>.png`` per picture and ``overview.jpg``, the first 64 of them
    on a sheet, or one annotated ``<name>.mp4``, and ``references.jpg``, what the system knows
    objects by; with ``coco`` ``coco.json``, detections in COCO's
    form; and ``infer.json``, the list of these files. What an earlier run wrote is removed, or set
    aside where it did not come to its end; see ``runtime.outputs``.
    ``system.draw`` is called in other threads than ``system.infer``.

    Args:
        batch: pictures per call; a live stream is always served one by one.
        coco: only for a system that gives ``Detections``, and not for a live stream.
        track: give detections in a video or stream the numbers of their tracks.
        follow: let a system that can look for what it found around its last place, in a video or
            stream, where it would search every frame whole.
        frame_step: only every n-th frame of a video or stream.
        progress: called with (done, total); total is 0 where it is not known.
        say: called with a line per picture, its name and result; not for frames. Of a live stream
            with what happens to it, from another thread.
        summary: is filled and returned; it is whole also where an error or interrupt is raised.

    Returns:
        Counts and times. Pictures that cannot be read, or that the system refuses, are in
        ``failures``, not raised.

    Raises:
        InputError: results would be written over the source, or over a file of somebody else's.
        InUseError: another process writes results there.
        UsageError: ``coco`` where there is no such result.
        BackendError: ``track`` without the package that does it.
        KeyboardInterrupt: passed on, after the results until then are in their files; Ctrl-C on a
            live stream is the ordinary end and not raised.
    """
    names = _names_for_coco(system, source) if coco else ()
    tracks = Tracks() if track and source.kind != "images" else None
    run: Stream = system
    if follow and source.kind != "images" and isinstance(system, Follows):
        run = system.follower() or system
    summary = summary or Summary()
    references = (
        system.draw_references() if overlays and isinstance(system, ShowsReferences) else None
    )
    planned = _planned(source, jsonl, coco, overlays)
    planned += [] if references is None else [REFERENCES_NAME]
    outputs = Outputs(out, planned, source.paths)
    total = _num_expected(source, frame_step)
    start = time.perf_counter()
    size = 1 if source.kind == "stream" else batch
    with _Closing() as stack:
        stack.callback(_tell, summary, outputs, start)
        stack.enter_context(outputs)
        if references is not None:
            images.write(out / REFERENCES_NAME, references)
        # the first says of each result whether it can be used
        sinks: list[Sink] = [stack.enter_context(Tables(outputs, jsonl=jsonl))]
        if coco:
            sinks.append(stack.enter_context(Coco(out, names)))
        if overlays:
            sinks.append(stack.enter_context(Overlays(system, out, source, frame_step)))
        decoder = _Decoder(source, frame_step, size, say)
        stack.callback(decoder.tell, summary)
        stack.enter_context(decoder)
        keeper = _Keeper(sinks, tracks, summary, say)
        try:
            for items in decoder.batches():
                pictures = [item.image for item in items if item.image is not None]
                begin = time.perf_counter()
                answers = iter(_answers(run, pictures))
                summary.infer_seconds += time.perf_counter() - begin
                for item in items:
                    keeper.take(item, item.error if item.image is None else next(answers))
                if progress:
                    progress(summary.num_done + summary.num_failed, total)
            outputs.status = "finished"
        except KeyboardInterrupt as stopped:
            ordinary = source.kind == "stream" and getattr(stopped, "number", SIGINT) == SIGINT
            outputs.status = "finished" if ordinary else "stopped"
            if not ordinary:
                raise
    return summary


class _Keeper:
    """Hands results to the sinks, and counts what came of them."""

    def __init__(
        self, sinks: Sequence[Sink], tracks: Tracks | None, summary: Summary, say: Say | None
    ) -> None:
        self._sinks = sinks
        self._tracks = tracks
        self._summary = summary
        self._say = say

    def take(self, item: Item, answer: Result | str | None) -> None:
        """Keep the result of a picture, or note why there is none."""
        error = answer if isinstance(answer, str) else self._keep(item, answer)
        if error is None:
            self._summary.num_done += 1
            return
        self._summary.failures.append((item.name, error))
        for sink in self._sinks:
            sink.failed(item, error)

    def _keep(self, item: Item, result: Result | None) -> str | None:
        """Write one result; None, or why it cannot be used."""
        assert item.image is not None and result is not None
        if self._tracks and isinstance(result, Detections):
            result = self._tracks.update(result)
        for sink in self._sinks:
            if error := sink.add(item, item.image, result):
                return error
        if self._say and item.time_s is None:
            self._say(f"{item.name}: {result.summary()}")
        return None


def _answers(run: Stream, pictures: Sequence[Array]) -> Sequence[Result | str]:
    """A result for each picture, or why there is none.

    A picture that the system refuses must not take the others of its batch along.
    """
    try:
        return run.infer(pictures) if pictures else ()
    except (InputError, NotFiniteError) as error:
        if len(pictures) == 1:
            return (error.message,)
        return [_answers(run, [picture])[0] for picture in pictures]


class _Closing(ExitStack):
    """Closes all that is open; a signal that comes meanwhile has to wait."""

    def __exit__(self, *error: Any) -> bool | None:
        with unbroken():
            return super().__exit__(*error)


def _tell(summary: Summary, outputs: Outputs, start: float) -> None:
    summary.seconds = time.perf_counter() - start
    summary.files = outputs.written()


def _planned(source: Source, jsonl: bool, coco: bool, overlays: bool) -> list[str]:
    """The files that will be written, but for tables of what is listed in results."""
    planned = ["results.csv", *([LINES_NAME] if jsonl else []), *([COCO_NAME] if coco else [])]
    return [*planned, *(planned_overlays(source) if overlays else [])]


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
        self._queue: queue.Queue[Item | BaseException | None] = queue.Queue(_QUEUE_BATCHES * batch)
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

    def tell(self, summary: Summary) -> None:
        """Note what decoding took."""
        summary.wait_seconds = self.wait_seconds
        summary.decode_seconds = self.decode_seconds
        summary.num_dropped = self.num_dropped
        summary.freezes = self.freezes

    def batches(self) -> Iterator[list[Item]]:
        """Lists of up to ``batch`` items, until the source ends."""
        source = self._queued() if self._live is None else self._frames(self._live)
        items: list[Item] = []
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

    def _queued(self) -> Iterator[Item]:
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

    def _put(self, item: Item | BaseException | None) -> bool:
        """Queue an item; False once the consumer has gone."""
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def _pictures(self) -> Iterator[Item]:
        for path in self._source.paths:
            try:
                yield Item(str(path), self._source.reader.read(path))
            except ImageError as error:
                yield Item(str(path), error=error.message)

    def _frames(self, frames: Iterable[Frame]) -> Iterator[Item]:
        name = self._source.name
        try:
            for frame in frames:
                yield Item(name, frame.image, index=frame.index, time_s=frame.time_s)
        except VideoError as error:
            # what was decoded before stands; the source as a whole counts as failed
            yield Item(name, error=error.message)


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

"""Whole sources through a system: decoding and drawing overlap inference, results keep the order.

    source -> decoder thread -> its buffer -+-> system.infer -+-> JSON lines, CSV, COCO's JSON
    source -> decoder thread -> its buffer -+                 |-> drawing threads -> overlays and
                                                              |   their overview, or a video
                                                              `-> what hears of all sources

Tables and videos grow under their own names and are put on the disk every few seconds: whatever
ends the process, what was found until then stands in them; ``infer.json`` says whether it is all. A
live stream has its newest frame taken, until Ctrl-C. One source or many, there is one loop.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGINT
from typing import Any

from engineworks.runtime import files, images, video
from engineworks.runtime.cameras import Camera
from engineworks.runtime.counters import Counters
from engineworks.runtime.errors import InputError, NotFiniteError, UsageError, VideoError
from engineworks.runtime.feeds import Feeds
from engineworks.runtime.outputs import Outputs, Status
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
from engineworks.runtime.usual import Drift, Usual

Progress = Callable[[int, int], None]
Say = Callable[[str], None]

_log = logging.getLogger(__name__)

REFERENCES_NAME = "references.jpg"  # what a system knows objects by
COUNTERS_NAME = "counters.json"  # of several sources, or of a stream

_COUNT_S, _TELL_S = 5.0, 30.0  # between two times that counters are written, and told


@dataclass
class Summary:
    """What came of the sources.

    Attributes:
        failures: (name, message) of every picture or stream that could not be read, and of results
            that are not finite.
        seconds: wall time; ``infer_seconds`` of it inside the system, ``wait_seconds`` waiting for
            decoded pictures, the rest writing results and waiting for overlays. ``decode_seconds``
            is spent beside it, in the decoder's thread (0 for a live stream).
        num_dropped: frames of a live stream that were skipped to stay current.
        files: what was written.
        freezes: (time, seconds) of live streams' pictures that stood still.
        counters: of each source, by its name; the only one has none.
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
    counters: dict[str, Counters] = field(default_factory=dict)

    @property
    def num_failed(self) -> int:
        return len(self.failures)

    @property
    def images_per_second(self) -> float:
        return self.num_done / self.seconds if self.seconds else 0.0


def infer(
    system: System,
    source: Source | Sequence[Camera],
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
    sinks: Sequence[Sink] = (),
) -> Summary:
    """Run a system over a source, or over several at the same time.

    Writes into ``out``: ``results.csv``, the scalar fields of each result, its header from the
    first one; ``<field>.csv`` for a field that lists objects, a line for each, once there is any;
    with ``jsonl`` ``results.jsonl``, one object per picture, those that failed included;
    with ``overlays`` ``overlays/<name>.png`` per picture and ``overview.jpg``, the first 64 of them
    on a sheet, or one annotated ``<name>.mp4``, and ``references.jpg``, what the system knows
    objects by; with ``coco`` ``coco.json``, detections in COCO's
    form; and ``infer.json``, the list of these files. What an earlier run wrote is removed, or set
    aside where it did not come to its end; see ``runtime.outputs``.
    ``system.draw`` is called in other threads than ``system.infer``.

    Of several sources each has its own folder of these, ``out/<name>``, and its pictures share
    batches with those of the others. A source that ends, fails or is slow holds up no other; a live
    stream is tried again for ever. Of several sources, or of a stream, ``counters.json`` says every
    few seconds what came of each until now.

    Args:
        source: one, or named ones; see ``runtime.cameras``.
        batch: pictures per call; of a live stream never more than wait, mostly one.
        coco: only for a system that gives ``Detections``, and not for a live stream.
        track: give detections in a video or stream the numbers of their tracks.
        follow: let a system that can look for what it found around its last place, in a video or
            stream, where it would search every frame whole.
        frame_step: only every n-th frame of a video or stream; of cameras they say it themselves.
        progress: called with (done, total); total is 0 where it is not known.
        say: called with a line per picture, its name and result; not for frames. Of several sources
            or a stream, with counters; of streams with what happens to them, from another thread.
        summary: is filled and returned; it is whole also where an error or interrupt is raised.
        sinks: take the results of all sources too; opened and closed here.

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
    cameras = [Camera("", source, frame_step)] if isinstance(source, Source) else list(source)
    summary = summary or Summary()
    channels = [
        _Channel(system, camera, out / camera.name, jsonl, overlays, coco, track, follow)
        for camera in cameras
    ]
    folders = [channel.outputs for channel in channels]
    if cameras[0].name:  # beside theirs, one of all sources
        folders.insert(0, Outputs(out, [], []))
    live = any(camera.source.kind == "stream" for camera in cameras)
    total = _num_expected(cameras)
    start = time.perf_counter()
    with _Closing() as stack:
        stack.callback(_tell, summary, folders, start)
        for outputs in folders:
            stack.enter_context(outputs)
        together = [stack.enter_context(sink) for sink in sinks]
        keepers = [channel.opened(stack, together, summary, say) for channel in channels]
        path = folders[0].add(COUNTERS_NAME) if live or cameras[0].name else None
        feeds = Feeds(cameras, batch, say)
        counting = _Counting(feeds, keepers, summary, path, say)
        stack.callback(counting.end)
        stack.enter_context(feeds)
        try:
            for taken in feeds.batches():
                asked = [
                    (channels[place].run, item.image)
                    for place, item in taken
                    if item.image is not None
                ]
                begin = time.perf_counter()
                answers = iter(_answered(system, asked))
                summary.infer_seconds += time.perf_counter() - begin
                for place, item in taken:
                    answer = item.error if item.image is None else next(answers)
                    keepers[place].take(item, answer)
                counting.go_on()
                if progress and taken:
                    progress(summary.num_done + summary.num_failed, total)
            _end(folders, "finished")
        except KeyboardInterrupt as stopped:
            ordinary = live and getattr(stopped, "number", SIGINT) == SIGINT
            _end(folders, "finished" if ordinary else "stopped")
            if not ordinary:
                raise
    return summary


def _end(folders: Sequence[Outputs], status: Status) -> None:
    for outputs in folders:
        outputs.status = status


class _Channel:
    """One source's folder of results, and what writes there."""

    def __init__(
        self,
        system: System,
        camera: Camera,
        out: Path,
        jsonl: bool,
        overlays: bool,
        coco: bool,
        track: bool,
        follow: bool,
    ) -> None:
        self._system = system
        self._camera = camera
        self._out = out
        self._jsonl, self._overlays = jsonl, overlays
        self._names = _names_for_coco(system, camera.source) if coco else None
        moving = camera.source.kind != "images"
        self._tracks = Tracks() if track and moving else None
        # what answers for its pictures
        self.run: Stream = system
        if follow and moving and isinstance(system, Follows):
            self.run = system.follower() or system
        self._references = (
            system.draw_references() if overlays and isinstance(system, ShowsReferences) else None
        )
        planned = _planned(camera.source, jsonl, coco, overlays)
        planned += [] if self._references is None else [REFERENCES_NAME]
        self.outputs = Outputs(out, planned, camera.source.paths)

    def opened(
        self, stack: ExitStack, together: Sequence[Sink], summary: Summary, say: Say | None
    ) -> _Keeper:
        """What keeps its results, open until the stack closes.

        Args:
            together: take those of all sources.
        """
        if self._references is not None:
            images.write(self._out / REFERENCES_NAME, self._references)
        # the first says of each result whether it can be used
        sinks: list[Sink] = [stack.enter_context(Tables(self.outputs, jsonl=self._jsonl))]
        if self._names is not None:
            sinks.append(stack.enter_context(Coco(self._out, self._names)))
        if self._overlays:
            drawing = Overlays(self._system, self._out, self._camera.source, self._camera.step)
            sinks.append(stack.enter_context(drawing))
        usual = Usual.in_reports(self._system.bundle.manifest.reports)
        counters = summary.counters[self._camera.name] = Counters(drift=Drift(usual))
        return _Keeper([*sinks, *together], self._tracks, summary, counters, say)


class _Keeper:
    """Hands results to the sinks, and counts what came of them."""

    def __init__(
        self,
        sinks: Sequence[Sink],
        tracks: Tracks | None,
        summary: Summary,
        counters: Counters,
        say: Say | None,
    ) -> None:
        self.counters = counters
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
        self._summary.failures.append((_name_of(item), error))
        self.counters.num_failed += 1
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
        self.counters.answered(item, result)
        if self._say and item.time_s is None:
            self._say(f"{_name_of(item)}: {result.summary()}")
        return None


def _name_of(item: Item) -> str:
    return f"{item.camera}: {item.name}" if item.camera else item.name


class _Counting:
    """Writes and tells what came of each source until now, every now and then and at the end."""

    def __init__(
        self,
        feeds: Feeds,
        keepers: Sequence[_Keeper],
        summary: Summary,
        path: Path | None,
        say: Say | None,
    ) -> None:
        """Begin.

        Args:
            path: of the file; None: only the summary is filled, at the end.
        """
        self._feeds = feeds
        self._keepers = keepers
        self._summary = summary
        self._path = path
        self._say = say or (lambda _: None)
        self._written_s = self._told_s = time.monotonic()
        self._drifted: dict[str, set[str]] = {name: set() for name in summary.counters}

    def go_on(self) -> None:
        """Do what is due."""
        if time.monotonic() - self._written_s >= _COUNT_S:
            self._written_s = time.monotonic()
            self._watch()
            if self._path is not None:
                self._write(tell=time.monotonic() - self._told_s >= _TELL_S)

    def end(self) -> None:
        """Of a run that is over."""
        self._watch()
        self._count()
        if self._path is not None:
            self._write(tell=True)

    def _watch(self) -> None:
        """Tell of what has drifted since it was last looked at."""
        for name, counters in self._summary.counters.items():
            signs = counters.drift.signs
            for what in signs.keys() - self._drifted[name]:
                _log.warning("drift: %s%s", f"{name}: " if name else "", signs[what])
            self._drifted[name] = set(signs)

    def _count(self) -> None:
        summary = self._summary
        for feed, keeper in zip(self._feeds, self._keepers, strict=True):
            keeper.counters.num_seen = feed.buffer.num_seen
            keeper.counters.num_dropped = feed.buffer.num_dropped
            keeper.counters.num_reconnects = feed.num_reconnects
        summary.wait_seconds = self._feeds.wait_seconds
        summary.decode_seconds = sum(feed.decode_seconds for feed in self._feeds)
        summary.num_dropped = sum(each.num_dropped for each in summary.counters.values())
        summary.freezes = [freeze for feed in self._feeds for freeze in feed.freezes]

    def _write(self, *, tell: bool) -> None:
        assert self._path is not None
        self._count()
        named = self._summary.counters
        table = {"sources": {name: each.to_json() for name, each in named.items()}}
        files.write(self._path, json.dumps(table, indent=1) + "\n", durable=False)
        if tell:
            self._told_s = time.monotonic()
            for name, each in named.items():
                self._say(f"{name}: {each.line()}" if name else each.line())


def _answered(system: System, asked: Sequence[tuple[Stream, Array]]) -> list[Result | str]:
    """Of each picture what the one beside it answers, in their order.

    Those of the system are one batch. Who follows a video gets its frames one by one: none may go
    through it twice where another one is refused.
    """
    together = iter(answers(system, [image for run, image in asked if run is system]))
    return [next(together) if run is system else answers(run, [image])[0] for run, image in asked]


def answers(run: Stream, pictures: Sequence[Array]) -> Sequence[Result | str]:
    """A result for each picture, or why there is none.

    A picture that the system refuses must not take the others of its batch along.
    """
    try:
        return run.infer(pictures) if pictures else ()
    except (InputError, NotFiniteError) as error:
        if len(pictures) == 1:
            return (error.message,)
        return [answers(run, [picture])[0] for picture in pictures]


class _Closing(ExitStack):
    """Closes all that is open; a signal that comes meanwhile has to wait."""

    def __exit__(self, *error: Any) -> bool | None:
        with unbroken():
            return super().__exit__(*error)


def _tell(summary: Summary, folders: Sequence[Outputs], start: float) -> None:
    summary.seconds = time.perf_counter() - start
    summary.files = [path for outputs in folders for path in outputs.written()]


def _planned(source: Source, jsonl: bool, coco: bool, overlays: bool) -> list[str]:
    """The files that will be written, but for tables of what is listed in results."""
    planned = ["results.csv", *([LINES_NAME] if jsonl else []), *([COCO_NAME] if coco else [])]
    return [*planned, *(planned_overlays(source) if overlays else [])]


def _num_expected(cameras: Sequence[Camera]) -> int:
    """How many pictures will come of all, 0 where that is not known."""
    counts = [_num_of(camera.source, camera.step) for camera in cameras]
    return sum(counts) if all(counts) else 0


def _num_of(source: Source, step: int) -> int:
    """How many pictures will come, 0 where that is not known."""
    if source.num_images is not None:
        return source.num_images
    if source.kind == "stream":
        return 0
    try:
        return -(-video.info(source.address).num_frames // step)
    except VideoError:
        return 0  # the decoder meets the same error and reports it


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

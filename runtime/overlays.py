"""Results drawn on their pictures: a file each and a sheet of the first ones, or a video."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from engineworks.runtime import draw, images, video
from engineworks.runtime.decoding import LIVE_RATE
from engineworks.runtime.names import overlay_names
from engineworks.runtime.sinks import Item
from engineworks.runtime.sources import Source
from engineworks.runtime.systems import Result, System
from engineworks.runtime.tensors import Array

OVERVIEW_NAME = "overview.jpg"

_DRAWING_THREADS = 2
_MAX_UNDRAWN = 8  # results that wait for a drawing thread, each with its picture
_MAX_OVERVIEW, _OVERVIEW_SIDE = 64, 640  # pictures of the overview, and their longer side at most


def planned(source: Source) -> list[str]:
    """The files that will be written."""
    if source.kind != "images":
        return [video_name(source)]
    names = overlay_names(source.paths).values()
    return [OVERVIEW_NAME, *(f"overlays/{name.as_posix()}" for name in names)]


def video_name(source: Source) -> str:
    """What the annotated video of a video or stream is called."""
    return f"{source.paths[0].stem if source.kind == 'video' else 'stream'}.mp4"


class Overlays:
    """Draws, encodes and writes overlays in threads: that takes longer than many a network.

    An error there is raised by a later ``add`` or at the end.
    """

    def __init__(self, system: System, out: Path, source: Source, step: int) -> None:
        self._system = system
        self._step = step
        self._source = source
        names = overlay_names(source.paths) if source.kind == "images" else {}
        self._pictures = {path: out / "overlays" / name for path, name in names.items()}
        self._video_path = out / video_name(source)
        self._overview_path = out / OVERVIEW_NAME
        self._thumbnails: dict[str, Array | None] = {}  # None until it is drawn
        self._video: video.VideoWriter | None = None
        # the frames of a video stay in order
        self._threads = ThreadPoolExecutor(_DRAWING_THREADS if source.kind == "images" else 1)
        self._undrawn: deque[Future[None]] = deque()

    def __enter__(self) -> Overlays:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        with ExitStack() as stack:
            stack.callback(self._close_video)
            stack.callback(self._write_overview)
            self._threads.shutdown()  # draws what is left: its results have been written
            if error is None:
                for each in self._undrawn:
                    each.result()

    def add(self, item: Item, image: Array, result: Result) -> None:
        """Queue one overlay; waits while too many are queued."""
        while self._undrawn and (len(self._undrawn) == _MAX_UNDRAWN or self._undrawn[0].done()):
            self._undrawn.popleft().result()
        if item.time_s is None and len(self._thumbnails) < _MAX_OVERVIEW:
            self._thumbnails[item.name] = None
        self._undrawn.append(self._threads.submit(self._draw, item, image, result))

    def failed(self, item: Item, error: str) -> None:
        """There is nothing to draw."""

    def _draw(self, item: Item, image: Array, result: Result) -> None:
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

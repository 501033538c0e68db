"""Sources that are read at the same time: each decodes in a thread of its own, into its own buffer.

Batches are taken from all of them in turn. A source that has nothing is passed over; one that has
more than its share fills its own buffer and no other's.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence

from engineworks.runtime import live, video
from engineworks.runtime.buffers import Buffer
from engineworks.runtime.cameras import Camera
from engineworks.runtime.decoding import Frame
from engineworks.runtime.errors import EngineworksError, ImageError, VideoError
from engineworks.runtime.sinks import Item

Say = Callable[[str], None]

_AHEAD_BATCHES = 2  # decoded ahead of inference, by all sources together
_TICK_S = 1.0  # after which an empty batch is given, where nothing comes


class Feed:
    """One source that is read.

    Attributes:
        decode_seconds: spent in the decoder's thread (0 for a live stream).
    """

    def __init__(
        self, camera: Camera, size: int, changed: threading.Condition, *, together: bool, say: Say
    ) -> None:
        """Nothing is read before ``open``.

        Args:
            size: frames that may wait, where the camera does not say.
            together: with other sources, which go on without it.
        """
        self.camera = camera
        self.decode_seconds = 0.0
        self._together = together
        self._say = say
        is_stream = camera.source.kind == "stream"
        size = camera.buffer or (1 if is_stream and camera.drops else size)
        self.buffer: Buffer[Item | Frame] = Buffer(size, drops=camera.drops, changed=changed)
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._live: live.LiveStream | None = None

    @property
    def freezes(self) -> list[tuple[float, float]]:
        """(time, seconds) of a live stream's pictures that stood still."""
        return [] if self._live is None else list(self._live.freezes)

    @property
    def num_reconnects(self) -> int:
        return 0 if self._live is None else self._live.num_reconnects

    def open(self) -> None:
        """Begin to read."""
        source = self.camera.source
        if source.kind == "stream":  # has a thread of its own
            self._live = live.LiveStream(
                source.address,
                step=self.camera.step,
                say=self._say,
                buffer=self.buffer,  # type: ignore[arg-type]  # of frames alone
                patient=self._together,
            )
        else:
            self._thread.start()

    def close(self) -> None:
        """Stop reading."""
        self.buffer.close()
        if self._live is not None:
            self._live.close()
        elif self._thread.ident is not None:
            self._thread.join()

    def take(self) -> Item | None:
        """The next picture, or the message why there is none; None where nothing waits.

        Raises:
            BaseException: a fault of the decoder that is no bad picture.
        """
        try:
            taken = self.buffer.take()
        except VideoError as error:
            return self._lost(error)
        if taken is None:
            return None
        arrived_s, thing = taken
        if isinstance(thing, Frame):
            thing = self._item(thing)
        return thing.arrived(arrived_s)

    def _item(self, frame: Frame) -> Item:
        camera = self.camera
        return Item(
            camera.source.name,
            frame.image,
            index=frame.index,
            time_s=frame.time_s,
            camera=camera.name,
        )

    def _lost(self, error: EngineworksError) -> Item:
        # what was decoded before stands; the source as a whole counts as failed
        source = self.camera.source
        name = source.name or (str(source.paths[0]) if source.paths else "")
        return Item(name, error=error.message, camera=self.camera.name)

    def _work(self) -> None:
        last: BaseException | None = None
        items = self._pictures() if self.camera.source.kind == "images" else self._frames()
        try:
            while True:
                begin = time.perf_counter()
                item = next(items, None)
                self.decode_seconds += time.perf_counter() - begin
                if item is None or not self.buffer.put(item):
                    break
        except BaseException as error:  # handed over: the consumer raises it
            last = error
        self.buffer.end(last)

    def _pictures(self) -> Iterator[Item]:
        for path in self.camera.source.paths:
            try:
                image = self.camera.source.reader.read(path)
                yield Item(str(path), image, camera=self.camera.name)
            except ImageError as error:
                yield Item(str(path), error=error.message, camera=self.camera.name)

    def _frames(self) -> Iterator[Item]:
        address, step = self.camera.source.address, self.camera.step
        # decoders with threads of their own would take these from each other
        frames = video.frames(address, step=step, threads=1 if self._together else None)
        try:
            yield from map(self._item, frames)
        except VideoError as error:
            yield self._lost(error)


class Feeds:
    """The sources of a run, read while the context is open.

    Attributes:
        wait_seconds: in which nothing could be taken.
    """

    def __init__(self, cameras: Sequence[Camera], batch: int, say: Say | None = None) -> None:
        """Prepare to read.

        Args:
            batch: pictures in a batch, of all sources together.
            say: is called from other threads with what happens to live streams.
        """
        self.wait_seconds = 0.0
        self._batch = batch
        self._changed = threading.Condition()
        self._first = 0  # that the next batch begins with
        size = max(2, -(-_AHEAD_BATCHES * batch // len(cameras)))
        self._feeds = [
            Feed(
                camera,
                size,
                self._changed,
                together=len(cameras) > 1,
                say=_named(camera, say or (lambda _: None)),
            )
            for camera in cameras
        ]

    def __enter__(self) -> Feeds:
        for feed in self._feeds:
            feed.open()
        return self

    def __exit__(self, *_error: object) -> None:
        for feed in self._feeds:
            feed.buffer.close()  # all stop at once
        for feed in self._feeds:
            feed.close()

    def __iter__(self) -> Iterator[Feed]:
        return iter(self._feeds)

    def batches(self) -> Iterator[list[tuple[int, Item]]]:
        """Lists of up to ``batch`` pictures with the places of their sources, until all have ended.

        Where nothing comes for a second, the list is empty.
        """
        while True:
            begin = time.perf_counter()
            with self._changed:
                self._changed.wait_for(self._is_ready, _TICK_S)
            self.wait_seconds += time.perf_counter() - begin
            if taken := self._take():
                yield taken
            elif all(feed.buffer.is_over for feed in self._feeds):
                return
            else:
                yield []

    def _is_ready(self) -> bool:
        """Whether to go on: there is a batch, or nothing that would be worth a wait for more."""
        buffers = [feed.buffer for feed in self._feeds]
        num_waiting = sum(map(len, buffers))
        if num_waiting >= self._batch or all(buffer.is_over for buffer in buffers):
            return True
        if any(buffer and (buffer.drops or buffer.is_full) for buffer in buffers):
            return True
        return num_waiting > 0 and all(buffer.has_ended for buffer in buffers if not buffer.drops)

    def _take(self) -> list[tuple[int, Item]]:
        taken: list[tuple[int, Item]] = []
        places = range(len(self._feeds))
        waiting = [*places[self._first :], *places[: self._first]]
        while waiting and len(taken) < self._batch:
            place = waiting.pop(0)
            try:
                item = self._feeds[place].take()
            except BaseException as error:
                if not taken:
                    raise
                self._feeds[place].buffer.end(error)  # when these have been answered
                break
            if item is not None:
                taken.append((place, item))
                waiting.append(place)
                self._first = (place + 1) % len(self._feeds)
        return taken


def _named(camera: Camera, say: Say) -> Say:
    return (lambda line: say(f"{camera.name}: {line}")) if camera.name else say

"""A camera or network stream: its newest picture, for answers that are about now."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import av
import numpy as np

from engineworks.runtime.buffers import Buffer
from engineworks.runtime.decoding import (
    TIMEOUT_S,
    Frame,
    Tally,
    open_live,
    pictures,
    upright,
    video_stream,
)
from engineworks.runtime.errors import VideoError
from engineworks.runtime.tensors import Array
from engineworks.runtime.texts import hide_secrets

# waits between attempts, about two minutes; then the stream is given up, unless others go on
_RECONNECT_S = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 30.0, 30.0)
_FROZEN_S = 10.0  # a camera's noise never stands still for so long
_FROZEN_STEP = 8  # of the pixels that are compared
_JUMP_S = 10.0  # by which a clock may run ahead of ours between two frames
_TICK_S = 1 / 60000  # between two frames at least


class LiveStream:
    """The newest frame of a camera or network stream.

    A thread decodes all the time and keeps only the newest frame: a slow consumer gets current
    pictures, and ``num_dropped`` counts what it missed. A connection that breaks is tried again
    with growing pauses (``num_reconnects`` times so far); the size of the picture may change with
    it, and times go on by the wall clock. An address that cannot be opened at the start is an error
    at once. What has an end, such as a file on a web server, ends there.

    A camera that hangs may go on sending its last picture: where that has not changed for ten
    seconds it is told, at once and in ``freezes``.

    Args:
        address: a webcam's number (Video4Linux) or an address such as ``rtsp://...``.
        step: only every ``step``-th frame is offered.
        say: called from another thread with a line for each reconnection and frozen picture.
        buffer: takes the frames, in the place of one that keeps the newest.
        patient: an address is tried for ever, also where it cannot be opened at the start.

    Attributes:
        freezes: (time, seconds) of the pictures that stood still, the last one until now.
    """

    def __init__(
        self,
        address: str,
        *,
        step: int = 1,
        say: Callable[[str], None] = lambda _: None,
        buffer: Buffer[Frame] | None = None,
        patient: bool = False,
    ) -> None:
        self.num_reconnects = 0
        self.freezes: list[tuple[float, float]] = []
        self._say = say
        self._name = hide_secrets(address)
        self._address = address
        self._step = step
        self._buffer = Buffer[Frame](1, drops=True) if buffer is None else buffer
        self._patient = patient
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def __enter__(self) -> LiveStream:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    @property
    def num_dropped(self) -> int:
        """Frames that made room for newer ones."""
        return self._buffer.num_dropped

    def __iter__(self) -> Iterator[Frame]:
        """Frames until the stream ends or ``close``.

        Raises:
            VideoError: it cannot be opened, or stays broken after all attempts.
        """
        return iter(self._buffer)

    def close(self) -> None:
        """Stop decoding; waits for the read that is under way."""
        self._closing.set()
        self._buffer.close()
        self._thread.join(timeout=TIMEOUT_S)

    def _work(self) -> None:
        try:
            self._read()
        except BaseException as error:  # handed over: the consumer raises it
            self._buffer.end(error)
        else:
            self._buffer.end()

    def _read(self) -> None:
        clock, still = _Clock(), _Still()
        index, attempt = 0, 0
        while True:
            try:
                with open_live(self._address) as container:
                    clock.restart()
                    stream = video_stream(container, self._name)
                    for decoded in pictures(container, stream, Tally()):
                        attempt = 0
                        if self._closing.is_set():
                            return
                        time_s = clock.read(decoded.time)
                        if index % self._step == 0:
                            frame = Frame(index, time_s, upright(decoded))
                            self._note(still.since(frame), time_s)
                            self._buffer.put(frame)
                        index += 1
                    if container.duration:
                        return
                problem = "the stream ended"
            except (VideoError, av.FFmpegError) as error:
                if index == 0 and not self._patient:
                    raise
                problem = error.message if isinstance(error, VideoError) else error.strerror
            if attempt == len(_RECONNECT_S) and not self._patient:
                raise VideoError(
                    f"{self._name}: {problem}; gave up after {attempt} attempts",
                    fix="check the address and the camera",
                )
            pause_s = _RECONNECT_S[min(attempt, len(_RECONNECT_S) - 1)]
            if attempt < len(_RECONNECT_S):
                self._say(f"{self._name}: {problem}; connecting again in {pause_s:g} s")
            if self._closing.wait(pause_s):
                return
            attempt += 1
            self.num_reconnects += 1

    def _note(self, since_s: float, now_s: float) -> None:
        """Keep and tell how long a picture has stood still."""
        if now_s - since_s < _FROZEN_S:
            return
        if self.freezes and self.freezes[-1][0] == since_s:
            self.freezes.pop()
        else:
            self._say(
                f"{self._name}: the picture has not changed since {since_s:.1f} s: is it frozen?"
            )
        self.freezes.append((since_s, now_s - since_s))


class _Clock:
    """Times of a stream's frames that only grow: its own where they are sane, else by our clock."""

    def __init__(self) -> None:
        self._start_s: float | None = None  # of our clock, at the first frame
        self._offset_s: float | None = None  # of the stream's own clock
        self._last_s = 0.0  # time of the last frame
        self._last_arrival_s = 0.0

    def restart(self) -> None:
        """A new connection: the clock of the stream starts anew."""
        self._offset_s = None

    def read(self, stamp_s: float | None) -> float:
        """The time of the frame that arrives now, in seconds after the first one."""
        now_s = time.monotonic()
        first = self._start_s is None
        self._start_s = now_s if self._start_s is None else self._start_s
        arrival_s = now_s - self._start_s
        passed_s, self._last_arrival_s = arrival_s - self._last_arrival_s, arrival_s
        if stamp_s is None:
            time_s = arrival_s
        else:
            if self._offset_s is None or not (
                0 <= stamp_s + self._offset_s - self._last_s <= passed_s + _JUMP_S
            ):
                self._offset_s = max(arrival_s, self._last_s) - stamp_s
            time_s = stamp_s + self._offset_s
        self._last_s = time_s if first else max(time_s, self._last_s + _TICK_S)
        return self._last_s


class _Still:
    """Since when the picture has been the same."""

    def __init__(self) -> None:
        self._pixels: Array | None = None
        self._since_s = 0.0

    def since(self, frame: Frame) -> float:
        """Time of the first frame that looks like this one and all between them."""
        pixels = frame.image[::_FROZEN_STEP, ::_FROZEN_STEP]
        if self._pixels is None or not np.array_equal(pixels, self._pixels):
            self._pixels, self._since_s = pixels.copy(), frame.time_s
        return self._since_s

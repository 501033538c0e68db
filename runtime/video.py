"""Streams to frames and back: the only video decoder of the project (PyAV)."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import av
import numpy as np

from runtime.errors import VideoError
from runtime.tensors import Array

LIVE_RATE = Fraction(25)  # of an annotated recording; frames keep their own times
_RECONNECT_S = (0.5, 1.0, 2.0, 4.0, 8.0)  # waits between attempts; then the stream is given up
_POLL_S = 0.5


@dataclass(frozen=True)
class Frame:
    """One picture of a stream.

    Attributes:
        index: position in the stream, dropped and skipped frames counted.
        time_s: presentation time in seconds from the stream's own clock, not index / rate.
        image: (H, W, 3) uint8 RGB.
    """

    index: int
    time_s: float
    image: Array


def frame_rate(path: str) -> Fraction:
    """Mean frames per second of a video file.

    Raises:
        VideoError: it cannot be opened or has no video.
    """
    with _open(path) as container:
        rate = _video_stream(container, path).average_rate
        return Fraction(rate) if rate else Fraction(25)


def frames(path: str, *, step: int = 1) -> Iterator[Frame]:
    """Every ``step``-th frame of a video file, none lost.

    Raises:
        VideoError: it cannot be opened; or, after the frames before the fault, it is damaged.
    """
    with _open(path) as container:
        stream = _video_stream(container, path)
        stream.thread_type = "AUTO"
        index = 0
        try:
            for decoded in container.decode(stream):
                if index % step == 0:
                    yield _frame(decoded, index)
                index += 1
        except av.FFmpegError as error:
            raise VideoError(
                f"{path} is damaged after frame {index}: {error.strerror}", fix="copy it again"
            ) from error
        if index == 0:
            raise VideoError(f"{path} holds no frames")


class LiveStream:
    """The newest frame of a camera or network stream.

    A thread decodes all the time and keeps only the newest frame, so a slow consumer gets current
    pictures and ``num_dropped`` counts what it missed. A broken connection is tried again with
    growing pauses, ``num_reconnects`` times so far; the picture's size may change meanwhile.

    Args:
        address: a webcam's number (Video4Linux) or an address such as ``rtsp://...``.
        step: only every ``step``-th frame is offered.
    """

    def __init__(self, address: str, *, step: int = 1) -> None:
        self.num_dropped = 0
        self.num_reconnects = 0
        self._address = address
        self._step = step
        self._ready = threading.Condition()
        self._newest: Frame | None = None
        self._error: VideoError | None = None
        self._stop = False
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Frame]:
        while True:
            with self._ready:
                while self._newest is None and self._error is None and not self._stop:
                    self._ready.wait(_POLL_S)
                frame, self._newest = self._newest, None
                if frame is None:
                    if self._error is not None:
                        raise self._error
                    return
            yield frame

    def close(self) -> None:
        """Stop decoding."""
        with self._ready:
            self._stop = True
            self._ready.notify_all()
        self._thread.join(timeout=5)

    def _read(self) -> None:
        index, attempt = 0, 0
        while not self._stop:
            try:
                with _open(self._address) as container:
                    for decoded in container.decode(_video_stream(container, self._address)):
                        attempt = 0
                        if self._stop:
                            return
                        if index % self._step == 0:
                            self._offer(_frame(decoded, index))
                        index += 1
                problem = "the stream ended"
            except (VideoError, av.FFmpegError) as error:
                problem = str(error)
            if attempt == len(_RECONNECT_S):
                with self._ready:
                    self._error = VideoError(
                        f"{self._address}: {problem}; gave up after {attempt} attempts",
                        fix="check the address and the camera",
                    )
                    self._ready.notify_all()
                return
            time.sleep(_RECONNECT_S[attempt])
            attempt += 1
            self.num_reconnects += 1

    def _offer(self, frame: Frame) -> None:
        with self._ready:
            self.num_dropped += self._newest is not None
            self._newest = frame
            self._ready.notify_all()


class VideoWriter:
    """An MP4 file (H.264, or MPEG-4 Part 2 where PyAV was built without libx264).

    Written beside its destination and renamed at the end; frames keep the times they are given.
    """

    def __init__(self, path: Path, rate: Fraction) -> None:
        self._path = path
        self._temporary = path.with_name(f".{path.name}.tmp.mp4")
        self._rate = rate
        self._stream: Any = None
        path.parent.mkdir(parents=True, exist_ok=True)
        self._container = av.open(str(self._temporary), "w")

    def write(self, image: Array, time_s: float) -> None:
        """Add (H, W, 3) uint8 RGB at a time in seconds, later than the one before."""
        height, width = (side // 2 * 2 for side in image.shape[:2])  # 4:2:0 needs even sides
        if self._stream is None:
            codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
            self._stream = self._container.add_stream(codec, rate=self._rate)
            self._stream.width, self._stream.height = width, height
            self._stream.pix_fmt = "yuv420p"
            self._stream.codec_context.time_base = Fraction(1, 90000)
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image[:height, :width]), "rgb24")
        if (width, height) != (self._stream.width, self._stream.height):
            frame = frame.reformat(self._stream.width, self._stream.height)
        frame.time_base = Fraction(1, 90000)
        frame.pts = round(time_s * 90000)
        self._container.mux(self._stream.encode(frame))

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._stream is not None:
            self._container.mux(self._stream.encode())
        self._container.close()
        if self._stream is None:
            self._temporary.unlink(missing_ok=True)
        else:
            # also after an interrupt: what was annotated is a whole, playable file
            self._temporary.replace(self._path)


def _open(address: str) -> Any:
    options = {"rtsp_transport": "tcp"} if address.startswith("rtsp") else {}
    camera = address.isdecimal()
    try:
        return av.open(
            f"/dev/video{address}" if camera else address,
            format="v4l2" if camera else None,
            options=options,
        )
    except (av.FFmpegError, ValueError) as error:
        raise VideoError(
            f"cannot open video {address}: {getattr(error, 'strerror', error)}",
            fix="check that it exists and is a video",
        ) from error


def _video_stream(container: Any, address: str) -> Any:
    if not container.streams.video:
        raise VideoError(f"{address} has no video stream")
    return container.streams.video[0]


def _frame(decoded: Any, index: int) -> Frame:
    return Frame(index, float(decoded.time or 0.0), decoded.to_ndarray(format="rgb24"))

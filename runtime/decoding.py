"""PyAV behind a few functions: open a file or a stream, decode its pictures, turn them upright."""

from __future__ import annotations

import heapq
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from engineworks.runtime import budgets
from engineworks.runtime.errors import VideoError
from engineworks.runtime.tensors import Array
from engineworks.runtime.texts import hide_secrets

LIVE_RATE = Fraction(25)  # players' hint for a recorded stream; its frames keep their own times
TIMEOUT_S = 10.0  # of a connection that sends nothing

_MAX_UNSHOWN = 64  # pictures that a decoder holds back


@dataclass(frozen=True)
class Frame:
    """One picture of a stream.

    Attributes:
        index: position among the decoded frames, dropped and skipped ones counted.
        time_s: presentation time in seconds after the first frame, from the timestamps in the
            stream, not from ``index`` and a rate. It only grows: where the stream's own times run
            back, it goes on from the frame before.
        image: (H, W, 3) uint8 RGB, turned upright as the stream says.
    """

    index: int
    time_s: float
    image: Array


def open_file(path: str | Path) -> Any:
    """A plain file, and none that it names: a pipe would be waited for, a playlist leads away."""
    whole = Path(path).absolute()  # a colon in a relative path would mean a protocol
    try:
        plain = stat.S_ISREG(whole.stat().st_mode)
    except (OSError, ValueError) as error:
        raise VideoError(
            f"cannot open video {path}: {getattr(error, 'strerror', error)}",
            fix="check that it exists and is a video",
        ) from error
    if not plain:
        raise VideoError(f"{path} is no plain file", fix="give a file with a video")
    return _open(str(whole), options={"protocol_whitelist": "file"})


def open_live(address: str) -> Any:
    # UDP loses packets, and with them pictures
    options = {"rtsp_transport": "tcp"} if address.startswith("rtsp") else {}
    return _open(address, live=True, options=options)


def _open(address: str, *, live: bool = False, options: dict[str, str]) -> Any:
    camera = live and address.isdecimal()
    try:
        return av.open(
            f"/dev/video{address}" if camera else address,
            format="v4l2" if camera else None,
            options=options,
            timeout=TIMEOUT_S if live else None,
        )
    except (av.FFmpegError, ValueError) as error:
        raise VideoError(
            f"cannot open video {hide_secrets(address)}: {getattr(error, 'strerror', error)}",
            fix="check that it exists and is a video",
        ) from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    try:
        yield
    except av.FFmpegError as error:
        raise VideoError(
            f"{path} cannot be read: {error.strerror}", fix="copy or record the video again"
        ) from error


def video_stream(container: Any, address: str | Path) -> Any:
    if not container.streams.video:
        raise VideoError(f"{address} has no video stream", fix="give a file with pictures in it")
    stream = container.streams.video[0]
    decoder = stream.codec_context
    if decoder is None:
        raise VideoError(f"{address} is coded in a way that is not known", fix="convert the video")
    budgets.FRAME_PIXELS.check(decoder.width * decoder.height, str(address), VideoError)
    # for what comes later: the size may change
    decoder.options = {"max_pixels": str(budgets.FRAME_PIXELS.limit)}
    return stream


@dataclass
class Tally:
    """Packets of a stream that were read, and how often one could not be decoded in full."""

    num_packets: int = 0
    num_damaged: int = 0
    last_tick: int = 0  # of the last one, in the time base of the stream
    longest_gap: int = 1  # between two of them, in ticks
    # AVI says when a picture is decoded, not when it is shown. Pictures come in the order in which
    # they are shown, so the times of the packets until now are theirs, from the earliest on.
    unshown: list[int] = field(default_factory=list)

    def show(self) -> int | None:
        """The time of the picture that comes next, in ticks; None where the picture says it."""
        return heapq.heappop(self.unshown) if self.unshown else None


def pictures(container: Any, stream: Any, tally: Tally) -> Iterator[Any]:
    """Decoded frames; a damaged packet costs its own frames only, also where FFmpeg conceals it."""
    in_order = container.format.name == "avi"
    for packet in container.demux(stream):
        if packet.size:  # the last one is empty: it drains the decoder
            tally.num_packets += 1
            tick = tally.last_tick if packet.dts is None else packet.dts
            tally.longest_gap = max(tally.longest_gap, tick - tally.last_tick)
            tally.last_tick = tick
            if in_order and packet.pts is not None:
                heapq.heappush(tally.unshown, packet.pts)
                del tally.unshown[_MAX_UNSHOWN:]
        try:
            decoded = packet.decode()
        except av.InvalidDataError:
            tally.num_damaged += 1
            if in_order and packet.pts in tally.unshown:
                tally.unshown.remove(packet.pts)
                heapq.heapify(tally.unshown)
            continue
        for frame in decoded:
            if frame.is_corrupt:
                tally.num_damaged += 1
                tally.show()
            else:
                yield frame


def upright(decoded: Any) -> Array:
    """RGB pixels after the quarter turns that the container asks players for (phones do)."""
    pixels = decoded.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(pixels, k=round(decoded.rotation / 90)))

"""Video files to frames and back: read whole, no frame is lost."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from engineworks.runtime.decoding import (
    LIVE_RATE,
    Frame,
    Tally,
    open_file,
    pictures,
    reading,
    upright,
    video_stream,
)
from engineworks.runtime.errors import VideoError
from engineworks.runtime.tensors import Array

CODEC = "libx264" if "libx264" in av.codecs_available else "mpeg4"

# 24, 25, 30, 50, 60 and 30000/1001 frames per second are exact in it; MPEG-4 allows at most 65535
_TICK = Fraction(1, 60000)
# a file is written in fragments, and gets an index of the whole when it is closed
_FRAGMENTS = {
    "movflags": "frag_keyframe+empty_moov+default_base_moof+hybrid_fragmented",
    "frag_duration": "2000000",  # microseconds
    "flush_packets": "1",
}
# formats in which a time leads to its frame; of others a frame is found by counting from the start
_SEEKABLE = ("mov", "matroska")


@dataclass(frozen=True)
class VideoInfo:
    """What a video file says about itself.

    Attributes:
        rate: mean frames per second; ``LIVE_RATE`` where the format does not say.
        num_frames: 0 where the format does not say.
    """

    rate: Fraction
    num_frames: int


def info(path: str | Path) -> VideoInfo:
    """Read the head of a video file.

    Raises:
        VideoError: it cannot be opened or has no video.
    """
    with open_file(path) as container:
        stream = video_stream(container, path)
        return VideoInfo(Fraction(stream.average_rate or LIVE_RATE), _num_indexed(stream))


def frames(path: str | Path, *, step: int = 1, threads: int | None = None) -> Iterator[Frame]:
    """Every ``step``-th frame of a video file, none lost.

    Damaged places are left out and reported at the end, after everything that can be decoded.

    Args:
        threads: of the decoder; None takes all cores.

    Raises:
        VideoError: it cannot be opened; or, after the last frame, it is damaged or ends before the
            length that its head states (MP4, MOV, AVI, Matroska; MPEG streams state none).
    """
    with open_file(path) as container:
        stream = video_stream(container, path)
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = threads or 0
        tally = Tally()
        clock = _Clock(stream)
        index, last_s = 0, 0.0
        problem = None
        try:
            for decoded in pictures(container, stream, tally):
                last_s = _time(decoded, path, index, tally)
                time_s = clock.read(last_s)
                if index % step == 0:
                    yield Frame(index, time_s, upright(decoded))
                index += 1
        except av.FFmpegError as error:
            problem = f"cannot be read after frame {index}: {error.strerror}"
        problem = problem or _fault(stream, tally, index, last_s)
        if problem is not None:
            raise VideoError(f"{path} {problem}", fix="copy or record it again")


class VideoFile:
    """Any frame of a video file, in any order; frames are numbered as by ``frames``.

    The decoder stays where it is between two reads. Close it, or use it in a ``with`` statement;
    reading on opens it again.
    """

    def __init__(self, path: Path) -> None:
        """Find all frames; none is decoded yet.

        Raises:
            VideoError: it cannot be opened, has no video, or no frames.
        """
        self.path = path
        self._container: Any = None
        self._next = 0  # number of the frame that the decoder gives next
        with open_file(path) as container, reading(path):
            stream = video_stream(container, path)
            # what a trimmed clip only decodes, and does not show, has no number
            packets = [p for p in container.demux(stream) if p.size and not p.is_discard]
            self._seekable = container.format.name.startswith(_SEEKABLE)
        if not packets:
            raise VideoError(f"{path} holds no frames", fix="copy or record the video again")
        self._num_frames = len(packets)
        ticks = {packet.pts for packet in packets}
        self._seekable = self._seekable and len(ticks - {None}) == len(packets)
        self._keys = [0]
        if self._seekable:
            self._ticks = sorted(ticks)  # packets come in the order of decoding
            self._index_of = {tick: i for i, tick in enumerate(self._ticks)}
            self._keys = sorted({0, *(self._index_of[p.pts] for p in packets if p.is_keyframe)})

    def __len__(self) -> int:
        return self._num_frames

    def __enter__(self) -> VideoFile:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def read(self, index: int) -> Array:
        """One frame: (H, W, 3) uint8 RGB.

        Args:
            index: from 0, in the order in which frames are shown.

        Raises:
            VideoError: there is no such frame, or it cannot be decoded.
        """
        if not 0 <= index < len(self):
            raise VideoError(
                f"{self.path} has {len(self)} frames, no frame {index}",
                fix="check the numbers of its frames: they count from 0",
            )
        key = self._keys[bisect_right(self._keys, index) - 1]
        with reading(self.path):
            if self._container is None or not key <= self._next <= index:
                self._go_to(key)
            for decoded in self._decoded:
                place = self._index_of.get(decoded.pts, -1) if self._seekable else self._next
                self._next = place + 1
                if place >= index:
                    break
            else:
                place = -1
        if place != index or (self._tally.num_damaged and not self._seekable):
            self.close()
            raise VideoError(
                f"{self.path}: frame {index} is damaged", fix="copy or record the video again"
            )
        return upright(decoded)

    def close(self) -> None:
        """Release the decoder; closing twice is allowed."""
        if self._container is not None:
            self._container.close()
            self._container = None

    def _go_to(self, key: int) -> None:
        """Have the decoder begin at a frame that needs no other."""
        if self._container is None or not self._seekable:
            self.close()
            self._container = open_file(self.path)
            self._stream = video_stream(self._container, self.path)
            self._stream.codec_context.thread_count = 1  # many files may be open in many processes
        if self._seekable:
            self._container.seek(self._ticks[key], stream=self._stream, backward=True)
        self._tally = Tally()
        self._decoded = pictures(self._container, self._stream, self._tally)
        self._next = key


class VideoWriter:
    """An MP4 file: H.264 by libx264, or MPEG-4 Part 2 where PyAV came without it (``CODEC``).

    It grows under its own name, in fragments of two seconds: what stands in the file is playable
    also after SIGKILL. Closed, also after an interrupt, it is an ordinary file with one index.
    Without a frame, or where writing failed, there is no file.

    Args:
        path: of the file, ending in ``.mp4``; one that is there is replaced.
        rate: mean frames per second, a hint for players; each frame keeps the time it is given.
        crf: of libx264, from 0 (without loss) to 51.
    """

    def __init__(self, path: Path, rate: Fraction, *, crf: int | None = None) -> None:
        self._path = path
        self._rate = rate
        self._crf = crf
        self._stream: Any = None
        self._failed: str | None = None  # why writing failed
        self._last_tick = -1
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._explained():
            self._container = av.open(
                str(path.absolute()), "w", format="mp4", container_options=_FRAGMENTS
            )

    def write(self, image: Array, time_s: float) -> None:
        """Add a frame.

        Args:
            image: (H, W, 3) uint8 RGB; the first one sets the size (an odd side loses a pixel, for
                4:2:0 needs even sides), later ones are resized to it.
            time_s: its time in seconds, kept to 1/60000 s; one that is not after the frame before
                is moved just behind it, because the format has an order and sources do repeat.

        Raises:
            VideoError: the encoder refuses it, or the disk is full; so is every frame after that.
        """
        # FFmpeg crashes where it is given more after a write that failed
        if self._failed is not None:
            raise self._refused(self._failed)
        with self._explained():
            if self._stream is None:
                self._stream = self._add_stream(*(max(2, n // 2 * 2) for n in image.shape[:2]))
            width, height = self._stream.width, self._stream.height
            if 0 <= image.shape[1] - width <= 1 and 0 <= image.shape[0] - height <= 1:
                image = image[:height, :width]
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), "rgb24")
            frame = frame.reformat(width, height, "yuv420p")
            self._last_tick = max(round(time_s / _TICK), self._last_tick + 1)
            frame.time_base, frame.pts = _TICK, self._last_tick
            self._container.mux(self._stream.encode(frame))

    def _add_stream(self, height: int, width: int) -> Any:
        # inference needs the cores more than the file needs to be small
        options = {"preset": "veryfast"} if CODEC == "libx264" else {}
        if self._crf is not None and CODEC == "libx264":
            options["crf"] = str(self._crf)
        stream: Any = self._container.add_stream(CODEC, rate=self._rate, options=options)
        stream.height, stream.width = height, width
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = _TICK
        return stream

    def close(self) -> None:
        """Finish the file.

        Raises:
            VideoError: the encoder fails, the disk is full, or somebody removed the file; then
                there is none.
        """
        try:
            with self._explained(), self._container:
                if self._stream is not None and self._failed is None:
                    self._container.mux(self._stream.encode())
        finally:
            if self._stream is None or self._failed is not None:
                self._path.unlink(missing_ok=True)
        if self._stream is not None and self._failed is None and not self._path.exists():
            raise VideoError(
                f"cannot write {self._path}: removed while it was being written",
                fix="leave the folder of results alone until the end",
            )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except av.FFmpegError as error:
            self._failed = error.strerror
            raise self._refused(error.strerror) from error

    def _refused(self, why: str) -> VideoError:
        return VideoError(
            f"cannot write {self._path}: {why}",
            fix="make room on the disk, or draw smaller pictures",
        )

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


class _Clock:
    """Times of a file's frames that only grow, from 0."""

    def __init__(self, stream: Any) -> None:
        self._usual_s = float(1 / (stream.average_rate or LIVE_RATE))
        self._offset_s: float | None = None
        self._last_s = 0.0

    def read(self, stamp_s: float) -> float:
        """The time of the next frame, in seconds after the first one."""
        if self._offset_s is None:
            self._offset_s = -stamp_s
        elif stamp_s + self._offset_s <= self._last_s:  # repeated, or begun anew
            self._offset_s = self._last_s + self._usual_s - stamp_s
        self._last_s = stamp_s + self._offset_s
        return self._last_s


def _time(decoded: Any, path: str | Path, index: int, tally: Tally) -> float:
    tick = tally.show()
    if tick is not None:
        return float(tick * decoded.time_base)
    if decoded.time is None:
        raise VideoError(
            f"{path}: frame {index} has no timestamp",
            fix="put the stream into a container: ffmpeg -i FILE -c copy OUT.mkv",
        )
    return float(decoded.time)


def _num_indexed(stream: Any) -> int:
    """Frames that a file's index leads to: a trimmed clip and an AVI with gaps state more."""
    return int(min(stream.frames, len(stream.index_entries) or stream.frames))


def _fault(stream: Any, tally: Tally, num_frames: int, last_s: float) -> str | None:
    """What was wrong with a file that was read to its end, in words."""
    if stream.container.format.name == "avi":  # counts ticks, also those without a frame
        breaks_off = stream.frames - tally.last_tick > tally.longest_gap
        num_stated = stream.frames
    else:
        num_stated = _num_indexed(stream)
        breaks_off = tally.num_packets < num_stated
    if breaks_off:
        return f"breaks off after {tally.num_packets} of {num_stated} frames"
    # Matroska counts no frames, but its writers leave the time at which the last one ends
    if stated := re.fullmatch(r"(\d+):(\d+):([\d.]+)", stream.metadata.get("DURATION", "")):
        hours, minutes, seconds = (float(part) for part in stated.groups())
        end_s = 3600 * hours + 60 * minutes + seconds
        if last_s < end_s - max(1.0, 2 / (stream.average_rate or LIVE_RATE)):
            return f"breaks off at {last_s:.2f} s of {end_s:.2f} s"
    if tally.num_damaged:
        return f"is damaged in {tally.num_damaged} places; {num_frames} frames could be decoded"
    return None if num_frames else "holds no frames"

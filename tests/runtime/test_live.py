from __future__ import annotations

import itertools
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path

import av
import numpy as np
import pytest

from engineworks.runtime import live, video
from engineworks.runtime.errors import VideoError
from tests.runtime.recordings import (
    UNEVEN,
    encode,
)


class Camera:
    """Sends one MPEG stream per connection over TCP on this machine, then hangs up for good."""

    def __init__(self, streams: Sequence[bytes], *, seconds: float = 0.0) -> None:
        self._streams = streams
        self._seconds = seconds
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._server.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        with self._server:
            for data in self._streams:
                connection, _peer = self._server.accept()
                # a reader that hangs up early is no fault of the camera
                with connection, suppress(ConnectionError):
                    size = len(data) // 10 + 1
                    for at in range(0, len(data), size):
                        connection.sendall(data[at : at + size])
                        time.sleep(self._seconds / 10)

    def close(self) -> None:
        self._thread.join()


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "_RECONNECT_S", (0.01, 0.02))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    times = [i / 25 for i in range(50)]
    return encode(tmp_path_factory.mktemp("ts") / "a.ts", times).read_bytes()


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    times = [i / 25 for i in range(50)]
    return encode(tmp_path_factory.mktemp("ts") / "b.ts", times, size=(96, 128)).read_bytes()


def take(stream: Iterator[video.Frame]) -> tuple[list[video.Frame], VideoError]:
    got: list[video.Frame] = []
    with pytest.raises(VideoError) as caught:
        for frame in stream:
            got.append(frame)  # noqa: PERF402
    return got, caught.value


class TestALiveStream:
    @pytest.mark.usefixtures("hurry")
    def test_connects_again_takes_another_size_and_then_gives_up(
        self, small: bytes, large: bytes
    ) -> None:
        with (
            closing(Camera([small, large])) as camera,
            live.LiveStream(camera.address) as stream,
        ):
            got, error = take(iter(stream))

            assert stream.num_reconnects >= 3
        sizes = [frame.image.shape for frame in got]
        assert {(48, 64, 3), (96, 128, 3)} == set(sizes)
        assert sizes == sorted(sizes)
        assert camera.address in error.message
        assert "gave up after 2 attempts" in error.message

    @pytest.mark.usefixtures("hurry")
    def test_has_times_and_indices_that_only_grow(self, small: bytes, large: bytes) -> None:
        with (
            closing(Camera([small, large, small])) as camera,
            live.LiveStream(camera.address) as stream,
        ):
            got, _error = take(iter(stream))

        assert got[0].time_s >= 0
        assert all(a.time_s < b.time_s for a, b in itertools.pairwise(got))
        assert all(a.index < b.index for a, b in itertools.pairwise(got))

    @pytest.mark.usefixtures("hurry")
    def test_skips_to_the_newest_frame_for_a_slow_reader_and_counts_the_rest(
        self, small: bytes
    ) -> None:
        got = []
        with closing(Camera([small])) as camera, live.LiveStream(camera.address) as stream:
            with pytest.raises(VideoError):
                for frame in stream:
                    got.append(frame)
                    time.sleep(0.3)

            assert stream.num_dropped == 50 - len(got)
        assert len(got) < 10
        assert got[-1].index == 49

    @pytest.mark.usefixtures("hurry")
    def test_whose_picture_stands_still_is_told_of(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(live, "_FROZEN_S", 0.5)
        path = tmp_path / "a.ts"
        moving = [np.full((48, 64, 3), 10 * i, np.uint8) for i in range(10)]
        with av.open(str(path), "w") as container:
            stream = container.add_stream("mpeg2video", rate=25)
            stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
            for image in [*moving, *moving[-1:] * 50, *moving]:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
            container.mux(stream.encode())
        said: list[str] = []
        with (
            closing(Camera([path.read_bytes()])) as camera,
            live.LiveStream(camera.address, say=said.append) as frames,
        ):
            take(iter(frames))
        assert len(frames.freezes) == 1
        since, seconds = frames.freezes[0]
        assert since == pytest.approx(9 / 25, abs=0.2) and seconds == pytest.approx(2, abs=0.3)
        assert sum("frozen" in line for line in said) == 1

    def test_never_says_a_password(self) -> None:
        with live.LiveStream("tcp://joe:S3cret@127.0.0.1:9") as stream:
            _got, error = take(iter(stream))
        assert "S3cret" not in str(error) and "***@127.0.0.1:9" in str(error)

    def test_that_cannot_be_opened_is_an_error_at_once(self) -> None:
        said: list[str] = []
        with live.LiveStream("tcp://127.0.0.1:9", say=said.append) as stream:
            _got, error = take(iter(stream))

        assert "tcp://127.0.0.1:9" in error.message
        assert (stream.num_reconnects, said) == (0, [])

    def test_from_a_webcam_that_is_not_there_names_the_device(self) -> None:
        with live.LiveStream("87") as stream:
            _got, error = take(iter(stream))

        assert "87" in error.message
        assert error.fix is not None

    def test_that_has_an_end_ends(self, tmp_path: Path) -> None:
        path = encode(tmp_path / "a.mp4")

        with live.LiveStream(str(path)) as stream:
            last = list(stream)[-1]

        assert last.index == len(UNEVEN) - 1

    def test_offers_every_nth_frame(self, tmp_path: Path) -> None:
        path = encode(tmp_path / "a.mp4")

        with live.LiveStream(str(path), step=4) as stream:
            assert {frame.index % 4 for frame in stream} == {0}

    def test_stops_while_it_waits_for_the_next_attempt_and_ends_for_its_reader(
        self, small: bytes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(live, "_RECONNECT_S", (3600.0,))
        waiting = threading.Event()
        with closing(Camera([small])) as camera:
            stream = live.LiveStream(camera.address, say=lambda _line: waiting.set())
            assert waiting.wait(120)  # seconds; a test that hangs should end
            stream.close()

            assert not stream._thread.is_alive()
            assert len(list(stream)) <= 1

"""Frames through a bounded cache, and any frame of a video."""

from __future__ import annotations

from copy import deepcopy
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engineworks.runtime import images
from engineworks.runtime.errors import ImageError, VideoError
from engineworks.runtime.frames import Frames
from engineworks.runtime.objects import Frame, Reference
from engineworks.runtime.tensors import Array
from engineworks.runtime.video import VideoFile, VideoWriter, frames

NUM_FRAMES = 40


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video in which every frame is another grey, with key frames in between."""
    path = tmp_path_factory.mktemp("video") / "a.mp4"
    with VideoWriter(path, Fraction(10)) as writer:
        for i in range(NUM_FRAMES):
            writer.write(np.full((32, 48, 3), 6 * i, np.uint8), i / 10)
    return path


@pytest.fixture(scope="module")
def decoded(video: Path) -> list[Array]:
    return [frame.image for frame in frames(video)]


def encode(path: Path, codec: str = "libx264") -> Path:
    """Frames of other greys, some of which are decoded in another order than they are shown."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10, options={"g": "12", "bf": "2"})
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        for i in range(NUM_FRAMES):
            grey = np.full((32, 48, 3), 6 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, "rgb24")))
        container.mux(stream.encode())
    return path


def trim(path: Path, num: int) -> Path:
    """The same packets, but the first frames stand before time 0: players do not show them."""
    out = path.with_name(f"trimmed-{path.name}")
    with av.open(str(path)) as source, av.open(str(out), "w") as target:
        stream = source.streams.video[0]
        copied = target.add_stream_from_template(stream)
        assert stream.time_base is not None
        shift = round(num / 10 / stream.time_base)
        for packet in source.demux(stream):
            if packet.pts is not None and packet.dts is not None:
                packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
                packet.stream = copied
                target.mux(packet)
    return out


class TestAVideoFile:
    def test_knows_how_many_frames_it_has(self, video: Path) -> None:
        with VideoFile(video) as opened:
            assert len(opened) == NUM_FRAMES

    @given(order=st.lists(st.integers(0, NUM_FRAMES - 1), max_size=12))
    @settings(max_examples=25, deadline=None)
    def test_gives_each_frame_as_reading_from_the_start_does(
        self, video: Path, decoded: list[Array], order: list[int]
    ) -> None:
        with VideoFile(video) as opened:
            for index in order:
                assert np.array_equal(opened.read(index), decoded[index])

    @pytest.mark.parametrize(
        ("name", "codec"),
        [
            ("a.mp4", "libx264"),
            ("a.mkv", "libx264"),
            ("a.ts", "libx264"),  # of this and the next two, seeking by time misses
            ("a.avi", "mpeg4"),
            ("a.mpg", "mpeg2video"),
        ],
    )
    def test_gives_the_frames_of_every_format_in_any_order(
        self, tmp_path: Path, name: str, codec: str
    ) -> None:
        path = encode(tmp_path / name, codec)
        one_by_one = [frame.image for frame in frames(path)]
        order = np.random.default_rng(0).permutation(NUM_FRAMES).tolist()
        with VideoFile(path) as opened:
            assert len(opened) == len(one_by_one) == NUM_FRAMES
            for index in [*order[:20], *range(5), *range(NUM_FRAMES - 1, NUM_FRAMES - 5, -1)]:
                assert np.array_equal(opened.read(index), one_by_one[index])

    def test_of_a_trimmed_clip_counts_from_the_first_frame_that_is_shown(
        self, tmp_path: Path
    ) -> None:
        path = trim(encode(tmp_path / "a.mp4"), 5)
        shown = [frame.image for frame in frames(path)]
        with VideoFile(path) as opened:
            assert len(opened) == len(shown) == NUM_FRAMES - 5
            for index in (20, 3, 0, len(shown) - 1):
                assert np.array_equal(opened.read(index), shown[index])

    def test_can_be_read_on_after_it_was_closed(self, video: Path, decoded: list[Array]) -> None:
        opened = VideoFile(video)
        for index in (7, 8, 3):
            assert np.array_equal(opened.read(index), decoded[index])
            opened.close()
            opened.close()

    def test_that_is_damaged_in_one_place_still_gives_the_others(self, tmp_path: Path) -> None:
        path = encode(tmp_path / "a.mp4")
        whole = [frame.image for frame in frames(path)]
        with av.open(str(path)) as container:
            packets = [p for p in container.demux(video=0) if p.size]
            hurt = [p for p in packets if p.is_keyframe][1]
            at, size = hurt.pos, hurt.size
        assert at is not None
        data = bytearray(path.read_bytes())
        data[at : at + size] = b"\xff" * size
        path.write_bytes(data)
        with VideoFile(path) as opened:
            with pytest.raises(VideoError, match="frame 12"):
                opened.read(12)
            for index in (3, 30, 5):
                assert np.array_equal(opened.read(index), whole[index])

    @given(at=st.integers(0, 10**6), patch=st.binary(min_size=1, max_size=60))
    @settings(max_examples=25, deadline=None)
    def test_is_never_a_crash_whatever_is_written_over_it(
        self, video: Path, tmp_path_factory: pytest.TempPathFactory, at: int, patch: bytes
    ) -> None:
        data = bytearray(video.read_bytes())
        at %= len(data)
        data[at : at + len(patch)] = patch
        path = tmp_path_factory.getbasetemp() / "patched.mp4"
        path.write_bytes(data)
        for index in (0, NUM_FRAMES - 1, 20):
            try:
                with VideoFile(path) as opened:
                    assert opened.read(index).ndim == 3
            except VideoError as error:
                assert "patched.mp4" in error.message

    @pytest.mark.parametrize("index", [-1, NUM_FRAMES])
    def test_has_no_other_frames(self, video: Path, index: int) -> None:
        with VideoFile(video) as opened, pytest.raises(VideoError, match=f"no frame {index}"):
            opened.read(index)

    def test_that_is_none_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "a.mp4").write_bytes(b"no video")
        with pytest.raises(VideoError, match=r"a\.mp4"):
            VideoFile(tmp_path / "a.mp4")


def write(folder: Path, num: int) -> list[Frame]:
    for i in range(num):
        images.write(folder / f"{i}.png", np.full((10, 10, 3), i, np.uint8))
    return [Frame(folder / f"{i}.png") for i in range(num)]


class TestTheCache:
    def test_answers_a_second_time_without_the_file(self, tmp_path: Path) -> None:
        (frame,) = write(tmp_path, 1)
        cache = Frames(1000)
        first = cache.read(frame)
        frame.path.unlink()
        assert cache.read(frame) is first
        assert (cache.num_hits, cache.num_misses) == (1, 1)

    def test_lets_the_least_recently_used_go(self, tmp_path: Path) -> None:
        a, b, c = write(tmp_path, 3)
        cache = Frames(600)  # two pictures of 300 bytes
        for frame in (a, b, a, c):
            cache.read(frame)
        assert cache.num_hits == 1
        cache.read(a)
        assert cache.num_hits == 2
        cache.read(b)
        assert cache.num_misses == 4

    def test_of_no_bytes_keeps_nothing(self, tmp_path: Path) -> None:
        (frame,) = write(tmp_path, 1)
        cache = Frames(0)
        assert np.array_equal(cache.read(frame), cache.read(frame))
        assert cache.num_hits == 0

    def test_gives_frames_that_nobody_can_spoil(self, tmp_path: Path) -> None:
        (frame,) = write(tmp_path, 1)
        with pytest.raises(ValueError, match="read-only"):
            Frames(1000).read(frame)[:] = 1

    def test_reads_frames_of_videos(self, video: Path, decoded: list[Array]) -> None:
        cache = Frames(0)
        for index in (5, 6, 30, 2):
            assert np.array_equal(cache.read(Frame(video, index)), decoded[index])
        cache.close()
        cache.close()
        assert np.array_equal(cache.read(Frame(video, 7)), decoded[7])
        cache.close()

    def test_reads_from_more_videos_than_are_kept_open(
        self, tmp_path: Path, video: Path, decoded: list[Array]
    ) -> None:
        copies = [tmp_path / f"{i}.mp4" for i in range(10)]
        for path in copies:
            path.write_bytes(video.read_bytes())
        cache = Frames(0)
        for index in (3, 30):
            for path in copies:
                assert np.array_equal(cache.read(Frame(path, index)), decoded[index])
        cache.close()

    def test_starts_empty_in_another_process(self, tmp_path: Path) -> None:
        (frame,) = write(tmp_path, 1)
        cache = Frames(1000)
        cache.read(frame)
        there = deepcopy(cache)  # by the same state that a loader's process is sent
        assert there.num_misses == 0 and there.max_bytes == 1000
        assert np.array_equal(there.read(frame), cache.read(frame))

    def test_names_what_it_cannot_read(self, tmp_path: Path) -> None:
        with pytest.raises(ImageError, match=r"missing\.png"):
            Frames(1000).read(Frame(tmp_path / "missing.png"))


class TestAReference:
    def test_is_the_picture_where_it_has_no_box(self, tmp_path: Path) -> None:
        (frame,) = write(tmp_path, 1)
        assert Frames(1000).reference(Reference(frame)).shape == (10, 10, 3)

    @given(
        corner=st.tuples(st.floats(0, 90), st.floats(0, 50)),
        sides=st.tuples(st.floats(1, 99), st.floats(1, 59)),
    )
    @settings(max_examples=50, deadline=None)
    def test_holds_its_whole_box_and_little_more(
        self,
        tmp_path_factory: pytest.TempPathFactory,
        corner: tuple[float, float],
        sides: tuple[float, float],
    ) -> None:
        path = tmp_path_factory.getbasetemp() / "places.png"
        if not path.exists():
            y, x = np.mgrid[:60, :100].astype(np.uint8)
            images.write(path, np.stack([x, y, x], axis=-1))
        x1, y1 = corner
        x2, y2 = min(x1 + sides[0], 100), min(y1 + sides[1], 60)
        cut = Frames(0).reference(Reference(Frame(path), (x1, y1, x2, y2)))
        xs, ys = cut[..., 0], cut[..., 1]
        assert xs.min() <= x1 and ys.min() <= y1
        assert xs.max() + 1 >= x2 and ys.max() + 1 >= y2
        # a twentieth of the side, and what whole pixels add
        assert cut.shape[1] <= 1.1 * (x2 - x1) + 2
        assert cut.shape[0] <= 1.1 * (y2 - y1) + 2

"""Frames through a bounded cache, and any frame of a video."""

from __future__ import annotations

from copy import deepcopy
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime import images
from runtime.errors import ImageError, VideoError
from runtime.frames import Frames
from runtime.objects import Frame, Reference
from runtime.tensors import Array
from runtime.video import VideoFile, VideoWriter, frames

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

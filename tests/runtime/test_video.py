from __future__ import annotations

import itertools
import os
import weakref
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engineworks.runtime import live, video
from engineworks.runtime.errors import VideoError
from engineworks.runtime.tensors import Array
from tests.runtime.recordings import (
    TICK,
    UNEVEN,
    encode,
    picture,
)

# a tick of 1/60000 s rounds by at most half of itself; MPEG-TS ticks are finer still
TIME_TOLERANCE_S = 0.51 / 60000


def number(image: Array) -> int:
    """The ``i`` of ``picture``, read back from the lower right."""
    return round((float(image[-8:, -8:].mean()) - 20) / 20)


def read_until_error(path: Path) -> tuple[list[video.Frame], VideoError]:
    got: list[video.Frame] = []
    with pytest.raises(VideoError, match=path.name) as caught:
        for frame in video.frames(path):
            got.append(frame)  # noqa: PERF402
    return got, caught.value


class TestFrames:
    @pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
    def test_come_in_order_at_their_own_uneven_times(self, tmp_path: Path, name: str) -> None:
        got = list(video.frames(encode(tmp_path / name)))

        assert [frame.index for frame in got] == list(range(len(UNEVEN)))
        assert [number(frame.image) for frame in got] == list(range(len(UNEVEN)))
        # Matroska counts in milliseconds
        tolerance = 0.00051 if name == "a.mkv" else TIME_TOLERANCE_S
        assert [frame.time_s for frame in got] == pytest.approx(UNEVEN, abs=tolerance)

    def test_are_rgb_of_the_size_of_the_video(self, tmp_path: Path) -> None:
        frame = next(video.frames(encode(tmp_path / "a.mp4")))

        assert frame.image.shape == (48, 64, 3)
        assert frame.image.dtype == np.uint8
        # 12: BT.601 in 8 bits and lossy; red against blue would differ by 255
        assert np.abs(frame.image[4, 4].astype(int) - (255, 0, 0)).max() < 12

    def test_of_an_avi_with_gaps_are_all_there(self, tmp_path: Path) -> None:
        # AVI counts a tick without a frame as a frame
        path = encode(tmp_path / "a.avi", UNEVEN, codec="mpeg4")

        got = list(video.frames(path))

        assert [number(frame.image) for frame in got] == list(range(len(UNEVEN)))
        assert video.info(path).num_frames == len(UNEVEN)

    @pytest.mark.parametrize("step", [2, 3, 100])
    def test_can_be_thinned_and_keep_index_and_time(self, tmp_path: Path, step: int) -> None:
        path = encode(tmp_path / "a.mp4")
        all_frames = list(video.frames(path))

        thinned = list(video.frames(path, step=step))

        want = all_frames[::step]
        assert [(f.index, f.time_s) for f in thinned] == [(f.index, f.time_s) for f in want]

    def test_are_let_go_one_by_one(self, tmp_path: Path) -> None:
        path = encode(tmp_path / "a.mp4", [i / 25 for i in range(300)])
        alive: list[weakref.ref[video.Frame]] = []

        for frame in video.frames(path):
            alive = [*(each for each in alive if each() is not None), weakref.ref(frame)]
            assert len(alive) <= 2  # this one, and the one that the loop has just let go

    def test_count_time_from_the_first_frame(self, tmp_path: Path) -> None:
        late = encode(tmp_path / "a.mkv", [3600.0 + t for t in UNEVEN])

        got = [frame.time_s for frame in video.frames(late)]

        assert got == pytest.approx(UNEVEN, abs=0.00051)  # milliseconds

    @pytest.mark.parametrize(
        ("matrix", "turned"),
        [
            # x' = a x + c y, y' = b x + d y, y downwards (ISO 14496-12): a quarter turn clockwise
            ((0, 1, -1, 0), lambda a: np.rot90(a, -1)),
            ((-1, 0, 0, -1), lambda a: np.rot90(a, 2)),
            ((0, -1, 1, 0), lambda a: np.rot90(a, 1)),
        ],
    )
    def test_are_upright_as_a_phone_meant_them(
        self, tmp_path: Path, matrix: tuple[int, ...], turned
    ) -> None:
        path = encode(tmp_path / "a.mp4")
        plain = next(video.frames(path)).image
        data = bytearray(path.read_bytes())
        at = data.index(b"tkhd") + 4 + 40  # version 0: the matrix follows 40 bytes of header
        assert data[at : at + 4] == (1 << 16).to_bytes(4, "big")
        for place, value in zip((0, 4, 12, 16), matrix, strict=True):
            data[at + place : at + place + 4] = (value << 16).to_bytes(4, "big", signed=True)
        path.write_bytes(data)

        assert np.array_equal(next(video.frames(path)).image, turned(plain))

    def test_come_from_a_name_with_a_colon(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        with video.VideoWriter(Path("a:b.mp4"), Fraction(25)) as writer:
            writer.write(picture(0), 0.0)

        assert len(list(video.frames("a:b.mp4"))) == 1

    def test_of_a_trimmed_clip_are_all_that_it_shows(self, tmp_path: Path) -> None:
        path = encode(tmp_path / "a.mp4", [i / 25 for i in range(50)])
        data = bytearray(path.read_bytes())
        # one edit: its length in the movie's clock (milliseconds), then where it starts in the
        # track's; ISO 14496-12, edit list box, version 0
        at = data.index(b"elst") + 12
        track_ticks_per_s = int.from_bytes(data[(m := data.index(b"mdhd") + 16) : m + 4], "big")
        start = int.from_bytes(data[at + 4 : at + 8], "big")
        data[at : at + 4] = (400).to_bytes(4, "big")
        data[at + 4 : at + 8] = (start + track_ticks_per_s).to_bytes(4, "big")
        path.write_bytes(data)

        got = list(video.frames(path))

        assert 10 <= len(got) <= 12  # 0.4 s at 25 per second, and what the format rounds up to
        assert got[-1].time_s - got[0].time_s == pytest.approx(0.4, abs=0.05)


class TestADamagedVideo:
    def test_gives_what_can_be_decoded_and_then_says_where_it_ends(self, tmp_path: Path) -> None:
        times = [i / 25 for i in range(60)]
        whole = encode(tmp_path / "whole.mp4", times, movflags="faststart").read_bytes()
        (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) * 2 // 3])

        got, error = read_until_error(tmp_path / "cut.mp4")

        assert 10 < len(got) < 60
        assert [number(frame.image) for frame in got] == [i % 10 for i in range(len(got))]
        assert "of 60 frames" in error.message
        assert error.fix is not None

    def test_is_found_in_an_avi_too(self, tmp_path: Path) -> None:
        whole = encode(tmp_path / "a.avi", [i / 25 for i in range(60)], codec="mpeg4").read_bytes()
        (tmp_path / "cut.avi").write_bytes(whole[: whole.index(b"idx1") * 2 // 3])

        got, error = read_until_error(tmp_path / "cut.avi")

        assert 10 < len(got) < 60
        assert "breaks off" in error.message

    def test_is_found_by_its_stated_length_where_frames_are_not_counted(
        self, tmp_path: Path
    ) -> None:
        whole = encode(tmp_path / "whole.mkv", [i / 5 for i in range(60)]).read_bytes()
        (tmp_path / "cut.mkv").write_bytes(whole[: len(whole) // 2])

        got, error = read_until_error(tmp_path / "cut.mkv")

        assert 10 < len(got) < 60
        assert "of 11.84 s" in error.message  # the last frame starts at 11.8 and lasts 1/25 s

    def test_loses_only_the_damaged_places(self, tmp_path: Path) -> None:
        times = [i / 25 for i in range(60)]
        data = bytearray(encode(tmp_path / "a.mp4", times).read_bytes())
        middle = data.index(b"mdat") + (data.index(b"moov") - data.index(b"mdat")) // 2
        data[middle : middle + 200] = b"\xff" * 200
        (tmp_path / "hurt.mp4").write_bytes(data)

        got, error = read_until_error(tmp_path / "hurt.mp4")

        assert 30 < len(got) < 60
        assert got[-1].time_s == pytest.approx(times[-1], abs=TIME_TOLERANCE_S)
        assert "damaged" in error.message

    def test_does_not_show_what_the_decoder_made_up(self, tmp_path: Path) -> None:
        times = [i / 25 for i in range(60)]
        path = encode(tmp_path / "a.avi", times, codec="mpeg4")
        with av.open(str(path)) as container:
            packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
        at, size = packets[20]  # a key frame, for there is one every five
        data = bytearray(path.read_bytes())
        # late in the packet: the decoder has begun the picture and fills up the rest
        first, last = at + round(0.6 * size), at + round(0.7 * size)
        data[first:last] = bytes(last - first)
        path.write_bytes(data)

        got, error = read_until_error(path)

        assert "damaged in 1 places" in error.message
        assert [number(frame.image) for frame in got[:20]] == [i % 10 for i in range(20)]
        assert len(got) == 59

    @pytest.mark.parametrize(
        "content", [b"", b"no video", b"\x00\x00\x00\x18ftypisom" + bytes(200), b"RIFF" + bytes(99)]
    )
    def test_that_is_none_is_refused_by_name(
        self, tmp_path: Path, content: bytes, capfd: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "a.mp4").write_bytes(content)

        got, error = read_until_error(tmp_path / "a.mp4")

        assert got == []
        assert error.fix is not None
        assert capfd.readouterr().err == ""

    def test_without_its_index_at_the_end_is_refused(self, tmp_path: Path) -> None:
        data = encode(tmp_path / "a.mp4").read_bytes()
        (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])

        assert read_until_error(tmp_path / "cut.mp4")[0] == []

    def test_that_is_missing_is_refused(self, tmp_path: Path) -> None:
        assert "cannot open" in read_until_error(tmp_path / "none.mp4")[1].message

    def test_with_sound_alone_is_refused(self, tmp_path: Path) -> None:
        with av.open(str(tmp_path / "a.mkv"), "w") as container:
            stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
            sound.sample_rate = 8000
            container.mux(stream.encode(sound))

        assert "no video stream" in read_until_error(tmp_path / "a.mkv")[1].message

    @settings(max_examples=25, deadline=None)
    @given(st.integers(0, 10**6), st.binary(min_size=1, max_size=60))
    def test_is_never_a_crash_whatever_is_written_over_it(
        self, tmp_path_factory: pytest.TempPathFactory, at: int, patch: bytes
    ) -> None:
        path = encode(tmp_path_factory.mktemp("patch") / "a.mp4")
        data = bytearray(path.read_bytes())
        at %= len(data)
        data[at : at + len(patch)] = patch
        path.write_bytes(data)

        try:
            got = list(itertools.islice(video.frames(path), 1000))
        except VideoError as error:
            assert "a.mp4" in error.message
        else:
            assert all(frame.image.ndim == 3 for frame in got)


class TestAHostileVideo:
    def test_that_is_a_pipe_or_a_device_is_not_waited_for(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "a.mp4")
        for path in (tmp_path / "a.mp4", Path("/dev/zero"), tmp_path):
            with pytest.raises(VideoError, match="no plain file"):
                list(video.frames(path))

    def test_in_an_unknown_code_is_refused(self, tmp_path: Path) -> None:
        data = encode(tmp_path / "a.mkv").read_bytes()
        assert b"V_MPEG4/ISO/AVC" in data
        (tmp_path / "b.mkv").write_bytes(data.replace(b"V_MPEG4/ISO/AVC", b"V_MPEG9/ISO/AVC"))
        for use in (video.info, lambda path: list(video.frames(path)), video.VideoFile):
            with pytest.raises(VideoError, match=r"not known|no video"):
                use(tmp_path / "b.mkv")

    def test_of_huge_frames_is_refused_before_one_is_decoded(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = encode(tmp_path / "a.mp4")
        monkeypatch.setenv("ENGINEWORKS_MAX_FRAME_PIXELS", str(48 * 64 - 1))
        with pytest.raises(VideoError, match="3,072 pixels per frame"):
            list(video.frames(path))
        monkeypatch.setenv("ENGINEWORKS_MAX_FRAME_PIXELS", str(48 * 64))
        assert len(list(video.frames(path))) == len(UNEVEN)

    def test_that_names_another_file_is_refused(self, tmp_path: Path) -> None:
        other = encode(tmp_path / "a.mp4")
        (tmp_path / "b.mp4").write_text(f"ffconcat version 1.0\nfile '{other}'\n")
        with pytest.raises(VideoError):
            list(video.frames(tmp_path / "b.mp4"))


class TestTimes:
    @pytest.mark.parametrize("frames_ahead", ["0", "2", "3"])
    def test_of_an_avi_never_run_back(self, tmp_path: Path, frames_ahead: str) -> None:
        path = tmp_path / "a.avi"
        with av.open(str(path), "w") as container:
            options = {"bf": frames_ahead, "b_strategy": "0"}
            stream = container.add_stream("libx264", rate=10, options=options)
            stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
            for i in range(14):
                frame = av.VideoFrame.from_ndarray(picture(i), "rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())

        got = list(video.frames(path))

        assert [number(frame.image) for frame in got] == [i % 10 for i in range(14)]
        assert [frame.time_s for frame in got] == pytest.approx([i / 10 for i in range(14)])

    @given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30))
    def test_only_grow_whatever_the_container_says(self, stamps: list[float]) -> None:
        clock = video._Clock(SimpleNamespace(average_rate=Fraction(25)))
        times = [clock.read(stamp) for stamp in stamps]
        assert times[0] == 0
        assert all(a < b for a, b in itertools.pairwise(times))

    @given(st.lists(st.none() | st.floats(-1e9, 1e9), min_size=1, max_size=30))
    def test_of_a_stream_only_grow_and_stay_near_the_clock(
        self, stamps: list[float | None]
    ) -> None:
        clock = live._Clock()
        times = [clock.read(stamp) for stamp in stamps]
        assert all(a < b for a, b in itertools.pairwise(times))
        # each may run ahead by as much as is taken for a burst, and no further
        assert 0 <= times[0] <= times[-1] <= 1 + live._JUMP_S * len(times)


class TestInfo:
    def test_tells_rate_and_number_of_frames(self, tmp_path: Path) -> None:
        path = encode(tmp_path / "a.mp4", [i / 20 for i in range(30)])

        got = video.info(path)

        assert got.num_frames == 30
        assert float(got.rate) == pytest.approx(20, abs=0.5)  # the last frame's length is a guess

    def test_counts_nothing_where_the_format_does_not(self, tmp_path: Path) -> None:
        assert video.info(encode(tmp_path / "a.mkv")).num_frames == 0


class TestVideoWriter:
    @settings(max_examples=15, deadline=None)
    @given(
        st.lists(st.integers(1, 60000), min_size=1, max_size=12),
        st.integers(2, 40),
        st.integers(2, 40),
    )
    def test_gives_back_times_and_size(
        self, tmp_path_factory: pytest.TempPathFactory, gaps: list[int], height: int, width: int
    ) -> None:
        path = tmp_path_factory.mktemp("write") / "a.mp4"
        times = [float(t * TICK) for t in itertools.accumulate([0, *gaps])]

        with video.VideoWriter(path, Fraction(25)) as writer:
            for i, time_s in enumerate(times):
                writer.write(picture(i, height, width), time_s)

        got = list(video.frames(path))
        assert [frame.time_s for frame in got] == pytest.approx(times, abs=TIME_TOLERANCE_S)
        # odd sides lose a pixel
        assert got[0].image.shape == (height // 2 * 2, width // 2 * 2, 3)

    def test_of_a_file_that_was_removed_meanwhile_says_so(self, tmp_path: Path) -> None:
        writer = video.VideoWriter(tmp_path / "a.mp4", Fraction(25))
        for i in range(150):  # more than the encoder holds back
            writer.write(picture(i % 10), i / 25)
        (tmp_path / "a.mp4").unlink()

        with pytest.raises(VideoError, match="removed while it was being written"):
            writer.close()

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no full device")
    def test_on_a_full_disk_says_so_and_leaves_no_file(self, tmp_path: Path) -> None:
        (tmp_path / "a.mp4").symlink_to("/dev/full")
        writer = video.VideoWriter(tmp_path / "a.mp4", Fraction(25))
        writer.write(picture(0), 0.0)  # stays in the encoder

        with pytest.raises(VideoError, match=r"cannot write .*a\.mp4: No space left") as caught:
            writer.close()

        assert caught.value.fix is not None
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no full device")
    def test_on_a_full_disk_refuses_what_comes_after(self, tmp_path: Path) -> None:
        (tmp_path / "a.mp4").symlink_to("/dev/full")
        writer = video.VideoWriter(tmp_path / "a.mp4", Fraction(25))
        with pytest.raises(VideoError, match="No space left"):
            for i in range(150):  # more than the encoder holds back
                writer.write(picture(i % 10), i / 25)

        for i in range(150, 153):  # FFmpeg would crash
            with pytest.raises(VideoError, match=r"cannot write .*a\.mp4: No space left"):
                writer.write(picture(0), i / 25)
        writer.close()

        assert list(tmp_path.iterdir()) == []

    def test_keeps_the_pictures_in_order(self, tmp_path: Path) -> None:
        with video.VideoWriter(tmp_path / "a.mp4", Fraction(25)) as writer:
            for i, time_s in enumerate(UNEVEN):
                writer.write(picture(i), time_s)

        assert [number(f.image) for f in video.frames(tmp_path / "a.mp4")] == list(range(10))

    def test_can_do_without_x264(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(video, "CODEC", "mpeg4")

        with video.VideoWriter(tmp_path / "a.mp4", Fraction(30000, 1001)) as writer:
            for i, time_s in enumerate(UNEVEN):
                writer.write(picture(i), time_s)

        got = list(video.frames(tmp_path / "a.mp4"))
        assert [number(frame.image) for frame in got] == list(range(10))
        assert [frame.time_s for frame in got] == pytest.approx(UNEVEN, abs=TIME_TOLERANCE_S)

    def test_takes_times_that_stand_still_or_go_back(self, tmp_path: Path) -> None:
        with video.VideoWriter(tmp_path / "a.mp4", Fraction(25)) as writer:
            for i, time_s in enumerate([0.0, 0.0, 0.5, 0.4, 0.4, 1.0]):
                writer.write(picture(i), time_s)

        got = [frame.time_s for frame in video.frames(tmp_path / "a.mp4")]
        expected = [0, 1 / 60000, 0.5, 0.5 + 1 / 60000, 0.5 + 2 / 60000, 1]
        assert got == pytest.approx(expected, abs=TIME_TOLERANCE_S)

    def test_takes_pictures_whose_size_changes(self, tmp_path: Path) -> None:
        with video.VideoWriter(tmp_path / "a.mp4", Fraction(25)) as writer:
            for i in range(4):
                writer.write(picture(i, 48 + 10 * i, 64 + 3 * i), i / 25)

        got = list(video.frames(tmp_path / "a.mp4"))
        assert {frame.image.shape for frame in got} == {(48, 64, 3)}
        assert [number(frame.image) for frame in got] == [0, 1, 2, 3]

    def test_appears_whole_and_only_at_the_end(self, tmp_path: Path) -> None:
        with video.VideoWriter(tmp_path / "a.mp4", Fraction(25)) as writer:
            writer.write(picture(0), 0.0)
            assert not (tmp_path / "a.mp4").exists()

        assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]

    def test_keeps_what_was_written_before_an_interrupt(self, tmp_path: Path) -> None:
        with (
            pytest.raises(KeyboardInterrupt),
            video.VideoWriter(tmp_path / "a.mp4", Fraction(25)) as writer,
        ):
            for i in range(5):
                writer.write(picture(i), i / 25)
            raise KeyboardInterrupt

        assert len(list(video.frames(tmp_path / "a.mp4"))) == 5

    def test_without_a_frame_leaves_no_file(self, tmp_path: Path) -> None:
        with video.VideoWriter(tmp_path / "a.mp4", Fraction(25)):
            pass

        assert list(tmp_path.iterdir()) == []

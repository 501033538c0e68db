from __future__ import annotations

import csv
import json
import math
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from engineworks.runtime import feeds, images, live, tables, video
from engineworks.runtime.buffers import Buffer
from engineworks.runtime.decoding import Frame
from engineworks.runtime.errors import (
    EngineError,
    EngineworksError,
    ImageError,
    InputError,
    NotFiniteError,
    VideoError,
)
from engineworks.runtime.infer import Summary, infer
from engineworks.runtime.sources import Reader, Source, open_source
from engineworks.runtime.tensors import Array
from tests.runtime.levels import (
    Level,
    Levels,
    Marked,
    grey,
    lines,
    names,
    table,
    write_pictures,
    write_video,
)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Ten pictures, the third of them cut short."""
    folder = tmp_path / "pictures"
    write_pictures(folder, range(0, 100, 10))
    cut = folder / "002.png"
    cut.write_bytes(cut.read_bytes()[:40])
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


class TestPictures:
    def test_give_a_line_and_a_row_each_in_their_order(self, pictures: Path, out: Path) -> None:
        system = Levels()

        summary = infer(system, open_source(str(pictures)), out, batch=4, jsonl=True)

        got = lines(out)
        assert [Path(line["source"]).name for line in got] == [f"{i:03}.png" for i in range(10)]
        good = [line for line in got if "error" not in line]
        assert good[0] == {
            "source": str(pictures / "000.png"),
            "width": 24,
            "height": 16,
            "level": 0.0,
            "of": {"kind": "grey", "deep": {"x": 1}},
            "boxes": [[1, 2]],
        }
        assert [line["level"] for line in good] == [0, 10, 30, 40, 50, 60, 70, 80, 90]
        assert [float(row["level"]) for row in table(out)] == [line["level"] for line in good]
        assert list(table(out)[0]) == ["source", "width", "height", "level", "of.kind", "of.deep.x"]
        assert summary.num_done == 9
        assert names(out) == ["infer.json", "results.csv", "results.jsonl"]

    def test_whose_results_list_objects_give_a_table_of_them(self, tmp_path: Path) -> None:
        class Listing(Levels):
            """As many marks as the picture is bright."""

            def infer(self, images: Sequence[Array]) -> list[Any]:
                return [Marked(int(image.mean())) for image in images]

        write_pictures(tmp_path / "pictures", [0, 2, 0, 1])
        out = tmp_path / "out"

        infer(Listing(), open_source(str(tmp_path / "pictures")), out)

        with (out / "marks.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert [(Path(row["source"]).name, row["x"], row["at.y"]) for row in rows] == [
            ("001.png", "0", "10"),
            ("001.png", "1", "11"),
            ("003.png", "0", "10"),
        ]
        assert list(table(out)[0]) == ["source", "width", "height", "level"]

    def test_that_cannot_be_read_are_reported_and_skipped(self, pictures: Path, out: Path) -> None:
        listed = pictures / "list.txt"
        listed.write_text("000.png\nnone.png\n002.png\n003.png\n")

        summary = infer(Levels(), open_source(str(listed)), out, jsonl=True)

        assert (summary.num_done, summary.num_failed) == (2, 2)
        assert [Path(name).name for name, _ in summary.failures] == ["none.png", "002.png"]
        assert "truncated" in summary.failures[1][1]
        failed = [line for line in lines(out) if "error" in line]
        assert [(line["source"], line["error"]) for line in failed] == summary.failures
        assert len(table(out)) == 2

    def test_are_given_in_batches_of_what_could_be_read(self, pictures: Path, out: Path) -> None:
        system = Levels()

        infer(system, open_source(str(pictures)), out, batch=4)

        assert system.batches == [3, 4, 2]

    def test_that_are_all_bad_never_reach_the_system(self, tmp_path: Path, out: Path) -> None:
        (tmp_path / "a.png").write_bytes(b"no picture")
        system = Levels()

        summary = infer(system, open_source(str(tmp_path / "a.png")), out, jsonl=True)

        assert system.batches == []
        assert (summary.num_done, summary.num_failed) == (0, 1)
        assert "a.png" in lines(out)[0]["error"]
        assert table(out) == []

    def test_count_progress_up_to_their_number(self, pictures: Path, out: Path) -> None:
        seen: list[tuple[int, int]] = []

        infer(
            Levels(),
            open_source(str(pictures)),
            out,
            batch=4,
            progress=lambda done, total: seen.append((done, total)),
        )

        assert seen == [(4, 10), (8, 10), (10, 10)]

    def test_with_names_that_are_not_unicode_are_written_too(
        self, tmp_path: Path, out: Path
    ) -> None:
        path = tmp_path / b"caf\xe9.png".decode("utf-8", "surrogateescape")
        images.write(path, grey(7))

        infer(Levels(), Source("images", (path,)), out, jsonl=True, overlays=True)

        assert lines(out)[0]["source"] == str(path)
        assert b"caf\xe9.png" in (out / "results.csv").read_bytes()


class TestWhatIsSaid:
    def test_is_a_line_per_picture_that_has_a_result(self, pictures: Path, out: Path) -> None:
        said: list[str] = []

        infer(Levels(), open_source(str(pictures)), out, batch=4, say=said.append)

        levels = {0: 0, 1: 10, 3: 30, 4: 40, 5: 50, 6: 60, 7: 70, 8: 80, 9: 90}
        assert said == [f"{pictures / f'{i:03}.png'}: level {v}" for i, v in levels.items()]

    def test_is_nothing_about_frames(self, tmp_path: Path, out: Path) -> None:
        write_video(tmp_path / "film.mp4", [0.0, 0.1])
        said: list[str] = []

        infer(Levels(), open_source(str(tmp_path / "film.mp4")), out, say=said.append)

        assert said == []


class TestAVideo:
    times = (0.0, 0.04, 0.2, 0.21, 0.5, 0.9, 1.0)

    @pytest.fixture
    def film(self, tmp_path: Path) -> Path:
        write_video(tmp_path / "film.mp4", self.times)
        return tmp_path / "film.mp4"

    def test_gives_a_line_per_frame_with_its_index_and_time(self, film: Path, out: Path) -> None:
        seen: list[tuple[int, int]] = []

        summary = infer(
            Levels(),
            open_source(str(film)),
            out,
            batch=3,
            jsonl=True,
            progress=lambda done, total: seen.append((done, total)),
        )

        got = lines(out)
        assert [line["frame"] for line in got] == list(range(7))
        # times are kept to 1/60000 s and printed with six decimals
        assert [line["time_s"] for line in got] == pytest.approx(self.times, abs=1e-5)
        # 2: a flat grey survives the codec up to rounding
        assert [line["level"] for line in got] == pytest.approx(range(20, 160, 20), abs=2)
        assert {line["source"] for line in got} == {str(film)}
        assert seen == [(3, 7), (6, 7), (7, 7)]
        assert summary.num_failed == 0

    def test_is_annotated_as_a_video_with_the_same_times(self, film: Path, out: Path) -> None:
        infer(Levels(), open_source(str(film)), out, overlays=True)

        drawn = list(video.frames(out / "film.mp4"))
        assert [frame.time_s for frame in drawn] == pytest.approx(self.times, abs=1e-5)
        assert names(out) == ["film.mp4", "infer.json", "results.csv"]

    def test_can_be_thinned(self, film: Path, out: Path) -> None:
        seen: list[int] = []

        infer(
            Levels(),
            open_source(str(film)),
            out,
            jsonl=True,
            overlays=True,
            frame_step=3,
            progress=lambda _done, total: seen.append(total),
        )

        assert [line["frame"] for line in lines(out)] == [0, 3, 6]
        assert len(list(video.frames(out / "film.mp4"))) == 3
        assert seen == [3]

    def test_that_breaks_off_gives_its_frames_and_one_failure(
        self, tmp_path: Path, out: Path
    ) -> None:
        rng = np.random.default_rng(0)
        with av.open(str(tmp_path / "film.mp4"), "w", options={"movflags": "faststart"}) as film:
            stream = film.add_stream("mpeg4", rate=25)
            stream.width, stream.height = 64, 48
            for _ in range(10):
                noise = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
                film.mux(stream.encode(av.VideoFrame.from_ndarray(noise, "rgb24")))
            film.mux(stream.encode())
        data = (tmp_path / "film.mp4").read_bytes()
        (tmp_path / "film.mp4").write_bytes(data[: len(data) * 3 // 4])

        summary = infer(
            Levels(), open_source(str(tmp_path / "film.mp4")), out, jsonl=True, overlays=True
        )

        assert summary.num_failed == 1
        assert 0 < summary.num_done < 10
        assert lines(out)[-1] == {
            "source": str(tmp_path / "film.mp4"),
            "error": summary.failures[0][1],
        }
        assert len(list(video.frames(out / "film.mp4"))) == summary.num_done

    def test_that_is_none_is_one_failure(self, tmp_path: Path, out: Path) -> None:
        (tmp_path / "film.mp4").write_bytes(b"no film")

        summary = infer(Levels(), open_source(str(tmp_path / "film.mp4")), out, overlays=True)

        assert (summary.num_done, summary.num_failed) == (0, 1)
        assert not (out / "film.mp4").exists()


class TestALiveStream:
    class Camera:
        """Stands in for ``live.LiveStream``: five frames, then what ``end`` raises."""

        closed = False
        end: BaseException | None = None

        freezes = ((0.1, 12.0),)
        num_reconnects = 0

        def __init__(self, address: str, *, buffer: Buffer[Frame], **_options: Any) -> None:
            self.buffer = buffer
            threading.Thread(target=self.send).start()

        def send(self) -> None:
            for i in range(5):
                with self.buffer.changed:  # each is taken before the next one comes
                    self.buffer.changed.wait_for(lambda: not self.buffer.is_full)
                    self.buffer.put(Frame(3 * i, i / 10, grey(i, 16 + 2 * i)))
            self.buffer.num_dropped += 7
            self.buffer.end(self.end)

        def close(self) -> None:
            type(self).closed = True

    @pytest.fixture
    def camera(self, monkeypatch: pytest.MonkeyPatch) -> type[Camera]:
        camera = type("Camera", (self.Camera,), {})
        monkeypatch.setattr(live, "LiveStream", camera)
        return camera

    def test_is_served_one_by_one_and_counts_what_was_dropped(
        self, camera: type[Camera], out: Path
    ) -> None:
        system = Levels()

        summary = infer(system, open_source("0"), out, batch=8, jsonl=True, overlays=True)

        assert system.batches == [1] * 5
        assert [line["frame"] for line in lines(out)] == [0, 3, 6, 9, 12]
        assert summary.num_dropped == 7
        assert list(summary.freezes) == [(0.1, 12.0)]
        assert camera.closed
        assert len(list(video.frames(out / "stream.mp4"))) == 5

    def test_ends_with_ctrl_c_as_it_should(self, camera: type[Camera], out: Path) -> None:
        camera.end = KeyboardInterrupt()

        summary = infer(Levels(), open_source("rtsp://camera"), out, jsonl=True)

        assert (summary.num_done, summary.num_failed) == (5, 0)
        assert len(lines(out)) == 5
        assert camera.closed

    def test_that_is_lost_for_good_is_one_failure(self, camera: type[Camera], out: Path) -> None:
        camera.end = VideoError("rtsp://camera: gave up", fix="look at it")

        summary = infer(Levels(), open_source("rtsp://camera"), out)

        assert summary.num_done == 5
        assert summary.failures == [("rtsp://camera", "rtsp://camera: gave up")]


class TestAPictureThatTheSystemRefuses:
    @pytest.mark.parametrize("batch", [1, 3, 8])
    @pytest.mark.parametrize("error", [InputError, NotFiniteError])
    def test_is_one_failure_and_the_others_are_answered(
        self, tmp_path: Path, out: Path, batch: int, error: type[EngineworksError]
    ) -> None:
        class Particular(Levels):
            def infer(self, images: Sequence[Array]) -> list[Level]:
                if any(image[0, 0, 0] == 20 for image in images):
                    raise error("out of range")
                return super().infer(images)

        write_pictures(tmp_path / "in", [10, 20, 30, 40])

        summary = infer(Particular(), open_source(str(tmp_path / "in")), out, batch=batch)

        assert summary.num_done == 3
        assert [message for _, message in summary.failures] == ["out of range"]
        assert len(table(out)) == 3

    def test_does_not_hide_a_broken_engine(self, tmp_path: Path, out: Path) -> None:
        class Broken(Levels):
            def infer(self, images: Sequence[Array]) -> list[Level]:
                raise EngineError("broken")

        write_pictures(tmp_path / "in", [10, 20])
        with pytest.raises(EngineError, match="broken"):
            infer(Broken(), open_source(str(tmp_path / "in")), out)


class TestResultsThatAreNotFinite:
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_are_failures_and_the_lines_stay_json(
        self, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch, value: float
    ) -> None:
        write_pictures(tmp_path / "in", [10, 20, 30])
        monkeypatch.setattr(
            Level, "to_json", lambda self: {"level": value if self.level == 20 else self.level}
        )

        summary = infer(Levels(), open_source(str(tmp_path / "in")), out, jsonl=True, overlays=True)

        assert summary.num_done == 2
        assert "not finite" in summary.failures[0][1]
        assert [line.get("level") for line in lines(out)] == [10, None, 30]
        assert len(table(out)) == 2
        assert not (out / "overlays" / "001.png").exists()


class TestDecodingAhead:
    def test_keeps_the_order_when_decoding_is_slow_and_uneven(
        self, tmp_path: Path, out: Path
    ) -> None:
        rng = np.random.default_rng(0)

        def read(path: Path) -> Array:
            time.sleep(float(rng.uniform(0, 0.004)))
            return grey(int(path.stem))

        source = Source("images", tuple(Path(f"{i}.png") for i in range(50)), reader=Reader(read))

        summary = infer(Levels(), source, out, batch=7, jsonl=True)

        assert [line["level"] for line in lines(out)] == list(range(50))
        assert summary.decode_seconds > 0.05
        assert summary.seconds >= summary.wait_seconds + summary.infer_seconds

    @pytest.mark.parametrize("batch", [1, 3])
    def test_holds_a_bounded_number_of_pictures(self, out: Path, batch: int) -> None:
        num_read, num_seen, ahead = [0], [0], [0]

        def read(path: Path) -> Array:
            num_read[0] += 1
            return grey(int(path.stem))

        def slowly() -> None:
            time.sleep(0.005)
            num_seen[0] += batch
            ahead.append(num_read[0] - num_seen[0])

        source = Source("images", tuple(Path(f"{i}.png") for i in range(60)), reader=Reader(read))

        infer(Levels(before=slowly), source, out, batch=batch)

        # the queue, and the picture that waits for room in it
        assert max(ahead) <= feeds._AHEAD_BATCHES * batch + 1
        assert max(ahead) >= 1

    def test_overlaps_inference(self, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        together = threading.Barrier(2, timeout=5)

        def read(path: Path) -> Array:
            if path.stem == "1":
                together.wait()
            return grey(1)

        source = Source("images", (Path("0.png"), Path("1.png")), reader=Reader(read))
        system = Levels(before=lambda: together.wait() if not system.batches else None)

        # breaks the barrier unless picture 1 is decoded while picture 0 is inferred
        infer(system, source, out, batch=1)


class TestAFault:
    def num_threads(self) -> int:
        return threading.active_count()

    @pytest.mark.parametrize("error", [EngineError("no"), KeyboardInterrupt(), ValueError("bug")])
    def test_of_the_system_stops_the_decoder_and_keeps_the_results(
        self, tmp_path: Path, out: Path, error: BaseException
    ) -> None:
        write_pictures(tmp_path / "in", range(30))
        system = Levels()

        def fail_third() -> None:
            if len(system.batches) == 2:
                raise error

        system.before = fail_third
        threads = self.num_threads()

        with pytest.raises(type(error)):
            infer(system, open_source(str(tmp_path / "in")), out, batch=2, jsonl=True)

        assert self.num_threads() == threads
        assert [line["level"] for line in lines(out)] == [0, 1, 2, 3]
        assert len(table(out)) == 4
        assert names(out) == ["infer.json", "results.csv", "results.jsonl"]

    @pytest.mark.parametrize("error", [MemoryError("too large"), ValueError("bug")])
    def test_of_the_decoder_that_is_no_bad_picture_reaches_the_caller(
        self, out: Path, error: BaseException
    ) -> None:
        def read(path: Path) -> Array:
            if path.stem == "5":
                raise error
            return grey(int(path.stem))

        source = Source("images", tuple(Path(f"{i}.png") for i in range(9)), reader=Reader(read))
        threads = self.num_threads()

        with pytest.raises(type(error), match=str(error)):
            infer(Levels(), source, out, batch=1, jsonl=True)

        assert self.num_threads() == threads
        assert [line["level"] for line in lines(out)] == [0, 1, 2, 3, 4]

    def test_in_a_batch_leaves_no_result_of_it(self, tmp_path: Path, out: Path) -> None:
        write_pictures(tmp_path / "in", range(3))

        def fail() -> None:
            raise EngineError("no")

        with pytest.raises(EngineError):
            infer(Levels(before=fail), open_source(str(tmp_path / "in")), out, jsonl=True)

        assert lines(out) == []


class TestTables:
    def test_are_all_closed_where_one_cannot_be_opened(
        self, pictures: Path, out: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = len(list(Path("/proc/self/fd").iterdir()))
        new = tables.Lines

        def fail(path: Path) -> tables.Lines:
            if path.suffix == ".jsonl":
                raise OSError(28, "No space left on device", str(path))
            return new(path)

        monkeypatch.setattr(tables, "Lines", fail)
        with pytest.raises(OSError, match=r"results\.jsonl") as caught:
            infer(Levels(), open_source(str(pictures)), out, jsonl=True)

        # the traceback would keep files open otherwise
        assert len(list(Path("/proc/self/fd").iterdir())) == before and caught.tb


class TestWhileItRuns:
    def test_lines_can_be_followed(self, tmp_path: Path, out: Path) -> None:
        write_pictures(tmp_path / "in", range(4))
        seen: list[tuple[int, int]] = []

        def look(_done: int, _total: int) -> None:
            assert json.loads((out / "infer.json").read_text())["status"] == "running"
            seen.append((len(lines(out)), len(table(out))))

        infer(Levels(), open_source(str(tmp_path / "in")), out, batch=1, jsonl=True, progress=look)

        assert seen == [(1, 1), (2, 2), (3, 3), (4, 4)]

    def test_lines_are_put_on_the_disk_every_now_and_then(
        self, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_pictures(tmp_path / "in", range(4))
        synced = []
        monkeypatch.setattr(tables, "_SYNC_S", 0)
        monkeypatch.setattr(tables.Lines, "sync", lambda lines: synced.append(lines.path.name))

        infer(Levels(), open_source(str(tmp_path / "in")), out, jsonl=True)

        assert synced.count("results.csv") == synced.count("results.jsonl") == 4 + 1


class TestAFolderThatIsRemovedMeanwhile:
    @pytest.mark.parametrize("options", [{}, {"overlays": True}, {"jsonl": True}])
    def test_is_an_error_and_not_the_end_of_a_run_that_finished(
        self, tmp_path: Path, out: Path, options: dict[str, bool]
    ) -> None:
        write_pictures(tmp_path / "in", range(4))

        def remove(done: int, _total: int) -> None:
            if done == 2:
                shutil.rmtree(out)

        with pytest.raises((OSError, EngineworksError)) as caught:
            source = open_source(str(tmp_path / "in"))
            infer(Levels(), source, out, batch=1, progress=remove, **options)

        assert str(out) in str(caught.value)
        assert json.loads((out / "infer.json").read_text())["status"] == "failed"


class TestSummary:
    def test_of_nothing_has_no_rate(self) -> None:
        assert Summary().images_per_second == 0

    def test_counts_pictures_per_second_of_the_whole_run(self) -> None:
        summary = Summary(num_done=30, seconds=2.0, failures=[("a", "b")])

        assert (summary.images_per_second, summary.num_failed) == (15.0, 1)


def test_image_errors_name_the_picture_once(tmp_path: Path) -> None:
    with pytest.raises(ImageError) as caught:
        images.read(tmp_path / "none.png")

    assert caught.value.message.count("none.png") == 1

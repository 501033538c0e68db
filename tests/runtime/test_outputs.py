from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from engineworks.runtime import images, video
from engineworks.runtime.errors import InputError, InUseError
from engineworks.runtime.infer import Summary, infer
from engineworks.runtime.outputs import Outputs, is_free, recorded
from engineworks.runtime.signals import Stopped, stoppable
from engineworks.runtime.sources import Source, open_source
from tests.campaign.faults import die, in_child, other_process
from tests.runtime.test_infer import Levels, names, table, write_pictures, write_video


@pytest.fixture
def pictures(tmp_path: Path) -> Source:
    write_pictures(tmp_path / "in", range(6))
    return open_source(str(tmp_path / "in"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def status(out: Path) -> str:
    return str(json.loads((out / "infer.json").read_text())["status"])


def stopping_at(num_batches: int, number: int = signal.SIGTERM) -> Levels:
    """A system that is told to end, or killed, at its n-th call."""
    system = Levels()

    def stop() -> None:
        if len(system.batches) == num_batches:
            os.kill(os.getpid(), number)

    system.before = stop
    return system


class TestWhatSomebodyElseWrote:
    @pytest.mark.parametrize(
        "mine", ["results.csv", "overview.jpg", "overlays/000.png", "film.mp4", "infer.json"]
    )
    def test_is_neither_replaced_nor_removed(
        self, tmp_path: Path, pictures: Source, out: Path, mine: str
    ) -> None:
        path = out / mine
        path.parent.mkdir(parents=True)
        path.write_text("source,mine\n")
        write_video(tmp_path / "film.mp4", [0.0])
        source = open_source(str(tmp_path / "film.mp4")) if mine == "film.mp4" else pictures

        with pytest.raises(InputError, match=rf"{path.name} is "):
            infer(Levels(), source, out, overlays=True)

        assert path.read_text() == "source,mine\n"
        assert names(out) == [mine.split("/")[0]]

    def test_stays_where_an_earlier_run_is_removed(self, pictures: Source, out: Path) -> None:
        infer(Levels(), pictures, out, jsonl=True, overlays=True)
        mine = ["truth.csv", "overlays/mine.png", "clip.mp4", "results.1.csv", "earlier-1/x"]
        for name in mine:
            (out / name).parent.mkdir(exist_ok=True)
            (out / name).write_text("source,label\n")

        infer(Levels(), pictures, out)

        found = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
        assert found == {*mine, "infer.json", "results.csv"}

    def test_is_not_reached_by_a_record_that_lies(
        self, tmp_path: Path, pictures: Source, out: Path
    ) -> None:
        out.mkdir()
        (tmp_path / "precious").mkdir()
        (tmp_path / "precious" / "thesis").write_text("years of work")
        (out / "link").symlink_to(tmp_path / "precious")
        lies = ["../precious/thesis", str(tmp_path / "precious" / "thesis"), "link/thesis", "."]
        record = {"format": "engineworks-results", "status": "finished", "files": lies}
        (out / "infer.json").write_text(json.dumps(record))

        infer(Levels(), pictures, out)

        assert (tmp_path / "precious" / "thesis").read_text() == "years of work"

    @pytest.mark.parametrize("content", ["", "[]", "{}", '{"files": 3}', "[" * 100_000])
    def test_is_what_is_no_record(self, pictures: Source, out: Path, content: str) -> None:
        out.mkdir()
        (out / "infer.json").write_text(content)

        with pytest.raises(InputError, match="not the record"):
            infer(Levels(), pictures, out)

        assert (out / "infer.json").read_text() == content

    def test_as_a_table_of_objects_is_found_when_it_is_met(self, out: Path) -> None:
        out.mkdir()
        (out / "objects.csv").write_text("mine")
        with Outputs(out, ["results.csv"], ()) as outputs, pytest.raises(InputError):
            outputs.add("objects.csv")
        assert (out / "objects.csv").read_text() == "mine"


class TestAFolder:
    def test_belongs_to_one_process(self, pictures: Source, out: Path) -> None:
        out.mkdir()
        with other_process(out) as pid, pytest.raises(InUseError, match=f"process {pid} "):
            infer(Levels(), pictures, out)
        assert names(out) == []

    def test_is_free_where_only_the_dead_left_something(self, out: Path) -> None:
        assert is_free(out)
        out.mkdir()
        (out / ".engineworks-0123456789abcdef.tmp").touch()
        assert is_free(out)
        assert names(out) == []
        (out / "x").touch()
        assert not is_free(out)


class TestBeingToldToEnd:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
    def test_closes_everything_and_tells_what_was_done(
        self, pictures: Source, out: Path, number: int
    ) -> None:
        summary = Summary()

        with stoppable(), pytest.raises(Stopped):
            infer(stopping_at(2, number), pictures, out, batch=2, overlays=True, summary=summary)

        assert (summary.num_done, len(table(out)), status(out)) == (4, 4, "stopped")
        assert summary.seconds > 0
        assert images.read(out / "overview.jpg").size
        assert len(list((out / "overlays").iterdir())) == 4
        assert summary.files == recorded(out)

    def test_leaves_a_video_that_plays(self, tmp_path: Path, out: Path) -> None:
        write_video(tmp_path / "film.mp4", [i / 10 for i in range(30)])
        film = open_source(str(tmp_path / "film.mp4"))

        with stoppable(), pytest.raises(Stopped):
            infer(stopping_at(20), film, out, batch=1, overlays=True)

        assert len(list(video.frames(out / "film.mp4"))) == 20 == len(table(out))
        assert video.info(out / "film.mp4").num_frames == 20

    def test_by_a_kill_leaves_what_was_found_and_a_video_that_plays(
        self, tmp_path: Path, out: Path
    ) -> None:
        write_video(tmp_path / "film.mp4", [i / 5 for i in range(100)])
        film = open_source(str(tmp_path / "film.mp4"))

        def run() -> None:
            system = Levels()

            def kill() -> None:
                if len(system.batches) == 90:
                    time.sleep(0.5)  # the drawing thread is behind
                    die()

            system.before = kill
            infer(system, film, out, batch=1, jsonl=True, overlays=True)

        assert in_child(run) == -9
        assert (status(out), len(table(out))) == ("running", 90)
        drawn = list(video.frames(out / "film.mp4"))
        assert 10 <= len(drawn) <= 90


class TestTheNextRun:
    @pytest.mark.parametrize("end", ["stopped", "killed"])
    def test_keeps_what_one_left_that_did_not_come_to_its_end(
        self, pictures: Source, out: Path, end: str
    ) -> None:
        number = signal.SIGTERM if end == "stopped" else signal.SIGKILL

        def run() -> None:
            with stoppable():
                infer(stopping_at(2, number), pictures, out, batch=2, overlays=True)

        in_child(run)
        rows = (out / "results.csv").read_bytes()
        (out / "mine.txt").write_text("mine")

        for _ in range(2):  # what is kept is kept for good
            infer(Levels(), pictures, out)

            assert (out / "earlier-1" / "results.csv").read_bytes() == rows
            # they are drawn beside the rest: a kill may come before the first
            num_drawn = len(list((out / "earlier-1").glob("overlays/*")))
            assert num_drawn == 4 or (end == "killed" and num_drawn < 4)
            assert names(out) == ["earlier-1", "infer.json", "mine.txt", "results.csv"]
            assert len(table(out)) == 6

    def test_counts_what_it_keeps(self, pictures: Source, out: Path) -> None:
        for _ in range(3):
            with stoppable(), pytest.raises(Stopped):
                infer(stopping_at(1), pictures, out, batch=2)
        assert names(out) == ["earlier-1", "earlier-2", "infer.json", "results.csv"]

    def test_keeps_nothing_where_nothing_was_found(self, pictures: Source, out: Path) -> None:
        with stoppable(), pytest.raises(Stopped):
            infer(stopping_at(0), pictures, out)
        infer(Levels(), pictures, out)
        assert names(out) == ["infer.json", "results.csv"]

    def test_cuts_a_line_that_was_not_written_to_its_end(self, pictures: Source, out: Path) -> None:
        with stoppable(), pytest.raises(Stopped):
            infer(stopping_at(2), pictures, out, batch=2)
        whole = (out / "results.csv").read_bytes()
        (out / "results.csv").write_bytes(whole + b"half a li")

        infer(Levels(), pictures, out)

        assert (out / "earlier-1" / "results.csv").read_bytes() == whole

    def test_goes_on_where_setting_aside_was_broken_off(self, pictures: Source, out: Path) -> None:
        with stoppable(), pytest.raises(Stopped):
            infer(stopping_at(2), pictures, out, batch=2, jsonl=True)
        (out / "earlier-1").mkdir()
        (out / "results.csv").rename(out / "earlier-1" / "results.csv")

        infer(Levels(), pictures, out)

        assert names(out / "earlier-1") == ["infer.json", "results.csv", "results.jsonl"]
        assert names(out) == ["earlier-1", "infer.json", "results.csv"]

    def test_leaves_a_source_where_it_is(self, pictures: Source, out: Path) -> None:
        infer(Levels(), pictures, out, overlays=True)

        infer(Levels(), open_source(str(out / "overlays")), out)

        assert len(list((out / "overlays").iterdir())) == 6
        assert len(table(out)) == 6

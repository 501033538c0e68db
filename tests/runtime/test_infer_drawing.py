from __future__ import annotations

import csv
import json
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engineworks.runtime import images, video
from engineworks.runtime import overlays as drawing
from engineworks.runtime.errors import (
    EngineError,
    InputError,
    UsageError,
)
from engineworks.runtime.infer import infer
from engineworks.runtime.names import overlay_names
from engineworks.runtime.sources import Source, open_source
from engineworks.runtime.systems import System, open_system
from engineworks.runtime.tensors import Array
from engineworks.runtime.testing import draw_scene, write_tiny_refdet_bundle
from tests.runtime.levels import (
    Level,
    Levels,
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


class TestOverlays:
    def test_keep_the_folders_so_that_equal_names_do_not_meet(
        self, tmp_path: Path, out: Path
    ) -> None:
        for name, level in {"a/x.png": 10, "b/x.png": 20, "a/x.jpg": 30}.items():
            images.write(tmp_path / "in" / name, grey(level))

        infer(Levels(), open_source(str(tmp_path / "in")), out, overlays=True)

        found = {
            path.relative_to(out / "overlays").as_posix(): int(images.read(path)[0, 0, 0])
            for path in (out / "overlays").rglob("*.png")
        }
        assert found == {"a/x.png": 30, "a/x.png.png": 10, "b/x.png": 20}

    def test_are_never_written_over_their_source(self, tmp_path: Path) -> None:
        images.write(tmp_path / "overlays" / "a.png", grey(10))
        before = (tmp_path / "overlays" / "a.png").read_bytes()

        with pytest.raises(InputError, match=r"a\.png"):
            infer(Levels(), open_source(str(tmp_path / "overlays")), tmp_path, overlays=True)
        write_video(tmp_path / "film.mp4", [0.0])
        with pytest.raises(InputError, match=r"film\.mp4"):
            infer(Levels(), open_source(str(tmp_path / "film.mp4")), tmp_path, overlays=True)

        assert (tmp_path / "overlays" / "a.png").read_bytes() == before

    def test_of_an_earlier_run_are_not_left_beside_new_results(
        self, pictures: Path, tmp_path: Path, out: Path
    ) -> None:
        write_video(tmp_path / "film.mp4", [0.0, 0.1])
        film = open_source(str(tmp_path / "film.mp4"))
        infer(Levels(), open_source(str(pictures)), out, jsonl=True, overlays=True)
        infer(Levels(), film, out, overlays=True)
        drawn = {path.name for path in out.rglob("*") if path.is_file()}
        assert drawn == {"results.csv", "film.mp4", "infer.json"}
        (out / "objects.csv").write_text("source,name\nfilm.mp4,cup\n")
        (out / "film.avi").write_text("mine")
        infer(Levels(), film, out)
        assert names(out) == ["film.avi", "infer.json", "objects.csv", "results.csv"]

    def test_stay_where_they_are_what_is_read(self, tmp_path: Path) -> None:
        images.write(tmp_path / "overlays" / "a.png", grey(10))
        images.write(tmp_path / "overlays" / "b.png", grey(10))

        summary = infer(Levels(), open_source(str(tmp_path / "overlays" / "a.png")), tmp_path)

        assert summary.num_done == 1
        assert names(tmp_path / "overlays") == ["a.png", "b.png"]

    @settings(max_examples=200)
    @given(
        st.lists(
            st.lists(
                st.sampled_from(["a", "b", "..", ".", "a.png", "b.jpg", "a.jpg", "a.png.png"]),
                min_size=1,
                max_size=4,
            ).map(lambda parts: Path(*parts, "a.jpg" if parts[-1] in ("..", ".") else "")),
            max_size=8,
        )
    )
    def test_have_names_that_differ_and_stay_below_their_folder(self, paths: list[Path]) -> None:
        names = overlay_names(paths)

        assert set(names) == set(paths)
        assert len(set(names.values())) == len(set(paths))
        for name in names.values():
            assert name.suffix == ".png"
            assert not name.is_absolute()
            assert ".." not in name.parts
        # no file stands where another one needs a folder
        assert not set(names.values()) & {up for name in names.values() for up in name.parents}


class TestTheOverview:
    def test_shows_the_overlays_in_their_order(self, pictures: Path, out: Path) -> None:
        infer(Levels(), open_source(str(pictures)), out, batch=3, overlays=True)

        sheet = images.read(out / "overview.jpg")
        # of nine overlays of 16 x 24 three columns are nearest to a square; gaps of 4
        assert sheet.shape == (3 * 16 + 2 * 4, 3 * 24 + 2 * 4, 3)
        centres = [sheet[8 + 20 * r, 12 + 28 * c, 0] for r in range(3) for c in range(3)]
        # 3: of a flat grey beside another one, JPEG keeps the middle
        assert centres == pytest.approx([0, 10, 30, 40, 50, 60, 70, 80, 90], abs=3)

    def test_shows_no_more_than_it_can(
        self, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(drawing, "_MAX_OVERVIEW", 4)
        write_pictures(tmp_path / "in", range(0, 200, 20))

        infer(Levels(), open_source(str(tmp_path / "in")), out, overlays=True)

        assert len(list((out / "overlays").iterdir())) == 10
        sheet = images.read(out / "overview.jpg")
        assert sheet.shape[:2] == (2 * 16 + 4, 2 * 24 + 4)
        assert sheet.max() < 80  # the first four, of levels 0 to 60

    def test_keeps_only_small_copies_of_large_overlays(self, tmp_path: Path, out: Path) -> None:
        images.write(tmp_path / "in.png", grey(40, 900, 1500))

        infer(Levels(), open_source(str(tmp_path / "in.png")), out, overlays=True)

        assert images.read(out / "overview.jpg").shape[:2] == (384, 640)

    def test_is_there_after_an_interrupt(self, tmp_path: Path, out: Path) -> None:
        def interrupt() -> None:
            if len(system.batches) == 2:
                raise KeyboardInterrupt

        write_pictures(tmp_path / "in", range(9))
        system = Levels(before=interrupt)

        with pytest.raises(KeyboardInterrupt):
            infer(system, open_source(str(tmp_path / "in")), out, batch=2, overlays=True)

        assert images.read(out / "overview.jpg").shape[:2] == (2 * 16 + 4, 2 * 24 + 4)

    def test_is_not_made_of_nothing(self, tmp_path: Path, out: Path) -> None:
        (tmp_path / "a.png").write_bytes(b"no picture")

        infer(Levels(), open_source(str(tmp_path / "a.png")), out, overlays=True)

        assert not (out / "overview.jpg").exists()

    def test_is_never_written_over_a_source(self, tmp_path: Path) -> None:
        images.write(tmp_path / "overview.jpg", grey(10))

        with pytest.raises(InputError, match=r"overview\.jpg"):
            infer(Levels(), open_source(str(tmp_path / "overview.jpg")), tmp_path, overlays=True)


class TestDrawing:
    def test_overlaps_inference(self, tmp_path: Path, out: Path) -> None:
        together = threading.Barrier(2, timeout=5)

        class Slow(Levels):
            def draw(self, image: Array, result: Level) -> Array:
                if result.level == 0:
                    together.wait()
                return super().draw(image, result)

        write_pictures(tmp_path / "in", range(2))
        system = Slow()
        system.before = lambda: together.wait() if system.batches else None

        # breaks the barrier unless picture 0 is drawn while picture 1 is inferred
        infer(system, open_source(str(tmp_path / "in")), out, batch=1, overlays=True)

        assert len(list((out / "overlays").iterdir())) == 2

    @pytest.mark.parametrize("kind", ["pictures", "video"])
    def test_holds_a_bounded_number_of_results(self, tmp_path: Path, out: Path, kind: str) -> None:
        waiting: list[int] = []

        class Slow(Levels):
            num_drawn = 0

            def draw(self, image: Array, result: Level) -> Array:
                time.sleep(0.002)
                self.num_drawn += 1
                return super().draw(image, result)

        if kind == "pictures":
            write_pictures(tmp_path / "in", range(40))
        else:
            write_video(tmp_path / "in.mp4", [i / 25 for i in range(40)])
        system = Slow()
        system.before = lambda: waiting.append(sum(system.batches) - system.num_drawn)
        source = open_source(str(tmp_path / ("in" if kind == "pictures" else "in.mp4")))

        infer(system, source, out, batch=1, overlays=True)

        assert drawing._MAX_UNDRAWN // 2 < max(waiting) <= drawing._MAX_UNDRAWN
        assert system.num_drawn == sum(system.batches)

    @pytest.mark.parametrize("bad", [1, 29])
    def test_faults_reach_the_caller_and_leave_results_and_no_thread(
        self, tmp_path: Path, out: Path, bad: int
    ) -> None:
        class Faulty(Levels):
            def draw(self, image: Array, result: Level) -> Array:
                if result.level == bad:
                    raise EngineError("no ink")
                return super().draw(image, result)

        write_pictures(tmp_path / "in", range(30))
        threads = threading.active_count()

        with pytest.raises(EngineError, match="no ink"):
            infer(Faulty(), open_source(str(tmp_path / "in")), out, batch=1, overlays=True)

        assert threading.active_count() == threads
        assert len(table(out)) >= min(bad + 1, 29)
        assert not (out / "overlays" / f"{bad:03}.png").exists()

    @pytest.mark.parametrize("kind", ["pictures", "video"])
    def test_is_finished_for_the_results_before_an_interrupt(
        self, tmp_path: Path, out: Path, kind: str
    ) -> None:
        def interrupt() -> None:
            if len(system.batches) == 3:
                raise KeyboardInterrupt

        write_pictures(tmp_path / "in", range(30))
        write_video(tmp_path / "in.mp4", [i / 25 for i in range(10)])
        system = Levels(before=interrupt)
        source = open_source(str(tmp_path / ("in" if kind == "pictures" else "in.mp4")))

        with pytest.raises(KeyboardInterrupt):
            infer(system, source, out, batch=2, overlays=True)

        assert len(table(out)) == 6
        if kind == "pictures":
            assert len(list((out / "overlays").iterdir())) == 6
        else:
            assert len(list(video.frames(out / "in.mp4"))) == 6

    def test_forces_only_the_results_onto_the_disk(
        self, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_pictures(tmp_path / "in", range(5))
        synced: list[int] = []
        monkeypatch.setattr("os.fsync", synced.append)

        infer(Levels(), open_source(str(tmp_path / "in")), out, jsonl=True, overlays=True)

        # two tables; the record and its folder, at the beginning and at the end
        assert len(synced) == 2 + 4


@pytest.fixture(scope="module")
def finder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """Looks for blue and red squares."""
    bundle = write_tiny_refdet_bundle(tmp_path_factory.mktemp("infer") / "bundle")
    with closing(open_system(bundle, backend="ort", threads=1)) as system:
        yield system


class TestBoxes:
    @pytest.fixture
    def film(self, tmp_path: Path) -> Source:
        """24 frames, 0.1 s apart; a red square moves right, a blue one comes after a second."""
        with video.VideoWriter(tmp_path / "film.mp4", Fraction(10)) as writer:
            for i in range(24):
                frame = grey(128, 64, 96)
                frame[40:64, 2 * i : 2 * i + 24] = (255, 50, 50)
                if i >= 10:
                    frame[8:32, 64:88] = (50, 75, 255)
                writer.write(frame, i / 10)
        return open_source(str(tmp_path / "film.mp4"))

    def scenes(self, folder: Path, rng: np.random.Generator) -> list[Array]:
        """Three pictures of one red and one blue square, and one of a white one."""
        boxes = []
        for i, kinds in enumerate((["red", "blue"], ["red", "blue"], ["white"], ["red", "blue"])):
            image, found = draw_scene(rng, (64, 96), kinds)
            images.write(folder / f"{i}.png", image)
            boxes.append(found)
        return boxes

    def test_of_pictures_become_a_data_set_in_cocos_form(
        self, finder: System, tmp_path: Path, out: Path, rng: np.random.Generator
    ) -> None:
        truth = self.scenes(tmp_path / "in", rng)
        (tmp_path / "in" / "bad.png").write_bytes(b"no picture")

        infer(finder, open_source(str(tmp_path / "in")), out, coco=True)

        content = json.loads((out / "coco.json").read_text())
        assert content["categories"] == [{"id": 1, "name": "blue"}, {"id": 2, "name": "red"}]
        assert content["images"] == [
            {"id": i + 1, "file_name": str(tmp_path / "in" / f"{i}.png"), "width": 96, "height": 64}
            for i in range(4)
        ]
        rows = content["annotations"]
        assert [row["id"] for row in rows] == list(range(1, 7))
        for row in rows:
            x1, y1, x2, y2 = truth[row["image_id"] - 1][{2: 0, 1: 1}[row["category_id"]]]
            assert row["bbox"] == [x1, y1, x2 - x1, y2 - y1]
            assert row["area"] == (x2 - x1) * (y2 - y1)
            assert 0.9 < row["score"] < 1
            assert "track_id" not in row

    def test_in_cocos_form_are_what_its_tools_read(
        self, finder: System, tmp_path: Path, out: Path, rng: np.random.Generator
    ) -> None:
        coco = pytest.importorskip("faster_coco_eval")
        self.scenes(tmp_path / "in", rng)

        infer(finder, open_source(str(tmp_path / "in")), out, coco=True)

        truth = coco.COCO(str(out / "coco.json"))
        found = truth.loadRes(json.loads((out / "coco.json").read_text())["annotations"])
        judged = coco.COCOeval_faster(truth, found, "bbox", print_function=lambda *_: None)
        judged.evaluate()
        judged.accumulate()
        assert judged.eval["precision"][:, :, :, 0, -1].min() == 1  # against itself

    def test_in_cocos_form_need_boxes_and_an_end(self, finder: System, out: Path) -> None:
        levels = Levels()
        levels.bundle = finder.bundle
        with pytest.raises(UsageError, match="gives no boxes"):
            infer(levels, Source("images"), out, coco=True)
        with pytest.raises(UsageError, match="no end") as caught:
            infer(finder, Source("stream", address="0"), out, coco=True)
        assert "--jsonl" in str(caught.value.fix)
        assert not out.exists()

    def test_in_cocos_form_are_whole_after_an_interrupt(
        self, finder: System, film: Source, out: Path
    ) -> None:
        def stop(done: int, _total: int) -> None:
            if done == 16:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            infer(finder, film, out, coco=True, progress=stop)

        content = json.loads((out / "coco.json").read_text())
        assert len(content["images"]) == 16
        assert {row["image_id"] for row in content["annotations"]} == set(range(1, 17))

    def test_of_nothing_are_a_data_set_as_well(
        self, finder: System, tmp_path: Path, out: Path
    ) -> None:
        images.write(tmp_path / "grey.png", grey(128))
        infer(finder, open_source(str(tmp_path / "grey.png")), out, coco=True)
        content = json.loads((out / "coco.json").read_text())
        assert (len(content["images"]), content["annotations"]) == (1, [])
        assert not (out / "objects.csv").exists()

    @pytest.mark.parametrize("batch", [1, 5])
    def test_in_a_video_keep_their_numbers(
        self, finder: System, film: Source, out: Path, batch: int
    ) -> None:
        infer(finder, film, out, batch=batch, jsonl=True, coco=True, overlays=True, track=True)

        got = lines(out)
        assert [line["frame"] for line in got] == list(range(24))
        tracks: dict[str, list[int | None]] = {"red": [], "blue": []}
        for line in got:
            for found in line["objects"]:
                tracks[found["name"]].append(found["track"])
        assert tracks == {"red": [None] * 2 + [1] * 22, "blue": [None] * 2 + [2] * 12}
        content = json.loads((out / "coco.json").read_text())
        assert content["images"][7]["frame"] == 7
        assert content["images"][7]["time_s"] == pytest.approx(0.7)
        assert {row.get("track_id") for row in content["annotations"]} == {None, 1, 2}
        with (out / "objects.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert [row["track"] for row in rows if row["name"] == "red"] == [""] * 2 + ["1"] * 22
        drawn = list(video.frames(out / "film.mp4"))
        assert len(drawn) == 24
        assert drawn[0].image.shape == (64, 96, 3)

    def test_in_a_video_that_is_thinned_keep_their_numbers_and_times(
        self, finder: System, film: Source, out: Path
    ) -> None:
        infer(finder, film, out, jsonl=True, overlays=True, track=True, frame_step=3)

        got = lines(out)
        assert [line["frame"] for line in got] == list(range(0, 24, 3))
        assert [line["time_s"] for line in got] == pytest.approx([0.3 * i for i in range(8)])
        numbers = [f["track"] for line in got for f in line["objects"] if f["name"] == "red"]
        assert numbers == [None] * 2 + [1] * 6
        # the encoder keeps times to 1/60000 s
        times = [frame.time_s for frame in video.frames(out / "film.mp4")]
        assert times == pytest.approx([0.3 * i for i in range(8)], abs=1e-4)

    def test_are_not_numbered_unasked_nor_in_pictures(
        self, finder: System, film: Source, tmp_path: Path, out: Path, rng: np.random.Generator
    ) -> None:
        infer(finder, film, out, jsonl=True)
        assert {found["track"] for line in lines(out) for found in line["objects"]} == {None}
        self.scenes(tmp_path / "in", rng)
        infer(finder, open_source(str(tmp_path / "in")), out, jsonl=True, track=True)
        assert {found["track"] for line in lines(out) for found in line["objects"]} == {None}

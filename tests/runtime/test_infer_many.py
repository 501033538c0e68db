"""Several sources at once through one system."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

from engineworks.runtime import infer as driver
from engineworks.runtime import live
from engineworks.runtime.buffers import Buffer
from engineworks.runtime.cameras import Camera
from engineworks.runtime.decoding import Frame
from engineworks.runtime.engines import Engine
from engineworks.runtime.errors import ImageError, InputError, VideoError
from engineworks.runtime.infer import infer
from engineworks.runtime.sources import PICTURES, Reader, Source
from engineworks.runtime.tensors import Array
from engineworks.runtime.usual import Usual
from tests.runtime.recordings import encode


@dataclass(frozen=True)
class Level:
    level: float

    @property
    def score(self) -> float:
        return self.level

    def to_json(self) -> dict[str, Any]:
        return {"level": self.level}

    def summary(self) -> str:
        return f"level {self.level:.0f}"


@dataclass
class Levels:
    """A system that measures the mean of a picture and notes how it was called."""

    reader: ClassVar[Reader] = PICTURES
    reports: dict[str, Any] = field(default_factory=dict)
    engines: Mapping[str, Engine] = field(default_factory=dict)
    backend: str = "none"
    precision: str = "float"
    batches: list[int] = field(default_factory=list)

    @property
    def bundle(self) -> Any:
        return SimpleNamespace(manifest=SimpleNamespace(reports=self.reports))

    def infer(self, images: Sequence[Array]) -> list[Level]:
        self.batches.append(len(images))
        if any(image[0, 0, 0] == 13 for image in images):
            raise InputError("unlucky")
        return [Level(float(image.mean())) for image in images]

    def draw(self, image: Array, result: Level) -> Array:
        return image

    def evaluate(self, data: Path, *, progress: Any = None) -> Any:
        raise NotImplementedError

    def close(self) -> None: ...


class Follower:
    """Of one video; refuses its third frame."""

    def __init__(self) -> None:
        self.seen: list[int] = []  # the numbers of frames, told by their grey

    def infer(self, images: Sequence[Array]) -> list[Level]:
        for image in images:
            self.seen.append(round((float(image[-8:].mean()) - 20) / 20))
            if len(self.seen) == 3:
                raise InputError("lost")
        return [Level(100.0 + len(self.seen)) for _ in images]


@dataclass
class FollowedLevels(Levels):
    """Levels, but a follower for each video."""

    followers: list[Follower] = field(default_factory=list)

    def follower(self) -> Follower:
        self.followers.append(Follower())
        return self.followers[-1]

    def rehearse(self, images: Sequence[Array]) -> None: ...


def grey(level: int) -> Array:
    return np.full((8, 12, 3), level, np.uint8)


def pictures(name: str, levels: Sequence[int], **options: Any) -> Camera:
    def read(path: Path) -> Array:
        if int(path.stem) == 99:
            raise ImageError(f"{path} is broken")
        return grey(int(path.stem))

    paths = tuple(Path(f"{name}/{i}/{level}.png") for i, level in enumerate(levels))
    return Camera(name, Source("images", paths, reader=Reader(read)), **options)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


class TestSeveralSources:
    def test_have_their_own_folders_orders_and_names(self, out: Path) -> None:
        system = Levels()
        cameras = [pictures("a", range(20, 40)), pictures("b", range(60, 63)), pictures("c", [])]
        summary = infer(system, cameras, out, batch=4, jsonl=True)
        assert [line["level"] for line in lines(out / "a")] == list(range(20, 40))
        assert [line["level"] for line in lines(out / "b")] == list(range(60, 63))
        assert lines(out / "c") == []
        assert {line["camera"] for line in lines(out / "a")} == {"a"}
        assert sum(system.batches) == 23
        assert len(system.batches) <= 8  # they share batches
        assert summary.num_done == 23
        assert {name: each.num_done for name, each in summary.counters.items()} == {
            **{"a": 20, "b": 3, "c": 0}
        }
        for name in "abc":
            assert json.loads((out / name / "infer.json").read_text())["status"] == "finished"
        told = json.loads((out / "counters.json").read_text())["sources"]
        assert told["a"]["frames_seen"] == 20 and told["a"]["frames_dropped"] == 0

    def test_do_not_share_their_faults(self, out: Path) -> None:
        cameras = [pictures("a", [20, 99, 13, 21]), pictures("b", range(60, 70))]
        summary = infer(Levels(), cameras, out, batch=3, jsonl=True)
        assert [line.get("error", line.get("level")) for line in lines(out / "a")] == [
            *(20, "a/1/99.png is broken", "unlucky", 21)
        ]
        assert [line["level"] for line in lines(out / "b")] == list(range(60, 70))
        assert [name for name, _ in summary.failures] == ["a: a/1/99.png", "a: a/2/13.png"]
        assert summary.counters["a"].num_failed == 2

    def test_are_replaced_by_the_next_run(self, out: Path) -> None:
        for _ in range(2):
            infer(Levels(), [pictures("a", [20]), pictures("b", [30])], out, jsonl=True)
        assert len(lines(out / "a")) == 1
        assert sorted(path.name for path in out.iterdir()) == [
            *("a", "b", "counters.json", "infer.json")
        ]

    def test_give_their_results_to_sinks_of_all(self, out: Path) -> None:
        class Sink:
            def __init__(self) -> None:
                self.got: list[tuple[str, float | str]] = []

            def __enter__(self) -> Sink:
                return self

            def __exit__(self, *_: object) -> None: ...

            def add(self, item: Any, image: Array, result: Any) -> None:
                self.got.append((item.camera, result.level))

            def failed(self, item: Any, error: str) -> None:
                self.got.append((item.camera, error))

        sink = Sink()
        infer(Levels(), [pictures("a", [20, 13]), pictures("b", [30])], out, sinks=[sink])
        assert sorted(sink.got, key=str) == [("a", "unlucky"), ("a", 20.0), ("b", 30.0)]


class TestAStreamAmongOthers:
    @pytest.fixture
    def camera(self, monkeypatch: pytest.MonkeyPatch) -> type[Any]:
        class Stream:
            """Sends some frames, then dies; noted is how it was asked for."""

            freezes = ((0.1, 12.0),)
            num_reconnects = 3
            options: ClassVar[list[dict[str, Any]]] = []

            def __init__(self, address: str, *, buffer: Buffer[Frame], **options: Any) -> None:
                self.options.append(options)
                self.buffer = buffer
                threading.Thread(target=self.send).start()

            def send(self) -> None:
                for i in range(50):
                    self.buffer.put(Frame(i, i / 10, grey(100)))
                self.buffer.end(VideoError("rtsp://gate: gave up"))

            def close(self) -> None: ...

        monkeypatch.setattr(live, "LiveStream", Stream)
        return Stream

    def test_that_dies_is_one_failure(self, camera: type[Any], out: Path) -> None:
        gate = Camera("gate", Source("stream", address="rtsp://gate"))
        summary = infer(Levels(), [gate, pictures("b", range(20, 60))], out, jsonl=True)
        assert len(lines(out / "b")) == 40
        counters = summary.counters["gate"]
        assert counters.num_seen == 50
        assert counters.num_done + counters.num_dropped == 50
        assert counters.num_reconnects == 3
        assert summary.failures == [("gate: rtsp://gate", "rtsp://gate: gave up")]
        assert camera.options[0]["patient"]


class TestDrift:
    def test_is_told_once_and_counted(
        self, out: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(driver, "_COUNT_S", 0.0)
        usual = Usual.of([(100.0 + i, 100.0 + i) for i in range(21)])
        system = Levels(reports={"usual": usual.model_dump()})
        cameras = [pictures("a", [110] * 80), pictures("b", [140] * 80)]
        with caplog.at_level(logging.WARNING):
            infer(system, cameras, out)
        told = [record.getMessage() for record in caplog.records]
        assert all(line.startswith("drift: b: the median") for line in told)
        assert len(told) == 2
        sources = json.loads((out / "counters.json").read_text())["sources"]
        assert sources["a"]["pictures"]["drifted"] == []
        assert sources["b"]["pictures"]["drifted"] == ["brightness", "score"]

    def test_of_one_folder_of_pictures_is_told_too(
        self, out: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        usual = Usual.of([(100.0, None), (110.0, None)])
        system = Levels(reports={"usual": usual.model_dump()})
        with caplog.at_level(logging.WARNING):
            infer(system, [pictures("", [140] * 80)], out)
        assert ["drift: the median brightness" in each.getMessage() for each in caplog.records] == [
            True
        ]


class TestVideosThatAreFollowed:
    def cameras(self, folder: Path) -> list[Camera]:
        films = [
            encode(folder / f"{name}.mp4", [i / 25 for i in range(5)]) for name in ("left", "right")
        ]
        return [
            *(Camera(film.stem, Source("video", address=str(film))) for film in films),
            pictures("still", [1, 2, 3]),
        ]

    def test_have_a_follower_each_that_no_frame_goes_through_twice(
        self, tmp_path: Path, out: Path
    ) -> None:
        system = FollowedLevels()

        infer(system, self.cameras(tmp_path), out, jsonl=True, batch=8, follow=True)

        assert [each.seen for each in system.followers] == [[0, 1, 2, 3, 4]] * 2
        for name in ("left", "right"):
            found = lines(out / name)
            assert [line.get("level") for line in found] == [101, 102, None, 104, 105]
            assert found[2]["error"] == "lost"
        assert [line["level"] for line in lines(out / "still")] == [1, 2, 3]
        assert sum(system.batches) == 3  # pictures alone

    def test_are_searched_whole_where_nobody_asks_to_follow(
        self, tmp_path: Path, out: Path
    ) -> None:
        system = FollowedLevels()

        infer(system, self.cameras(tmp_path), out, batch=8)

        assert not system.followers
        assert sum(system.batches) == 13

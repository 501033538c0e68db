from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from engineworks.runtime import feeds as module
from engineworks.runtime.cameras import Camera
from engineworks.runtime.errors import ImageError
from engineworks.runtime.feeds import Feeds
from engineworks.runtime.sources import Reader, Source
from engineworks.runtime.tensors import Array


def grey(level: int) -> Array:
    return np.full((4, 4, 3), level, np.uint8)


def pictures(name: str, count: int, read: Reader | None = None) -> Camera:
    paths = tuple(Path(f"{name}/{i}") for i in range(count))
    return Camera(name, Source("images", paths, reader=read or Reader(lambda _: grey(1))))


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TICK_S", 0.01)


def names(batch: list[tuple[int, module.Item]]) -> list[str]:
    return [item.name for _, item in batch]


class TestBatches:
    def test_of_one_source_are_full_but_the_last(self) -> None:
        with Feeds([pictures("a", 10)], 4) as feeds:
            batches = [names(batch) for batch in feeds.batches() if batch]
        assert list(map(len, batches)) == [4, 4, 2]
        assert [name for batch in batches for name in batch] == [f"a/{i}" for i in range(10)]

    def test_of_several_take_from_each_in_its_order_and_lose_none(self) -> None:
        cameras = [pictures("a", 7), pictures("b", 20), pictures("c", 1), pictures("d", 0)]
        with Feeds(cameras, 5) as feeds:
            taken = [each for batch in feeds.batches() for each in batch]
        for place, camera in enumerate(cameras):
            own = [item.name for at, item in taken if at == place]
            assert own == [str(path) for path in camera.source.paths]

    def test_are_shared_fairly_by_those_that_have_more(self) -> None:
        """Also where there are more of them than fit in a batch."""
        with Feeds([pictures(name, 100) for name in "abc"], 2) as feeds:
            batches, taken = feeds.batches(), []
            for _ in range(30):
                for feed in feeds:  # all have more than their share
                    with feed.buffer.changed:
                        assert feed.buffer.changed.wait_for(lambda f=feed: f.buffer.is_full, 30)
                taken += [place for place, _ in next(batches)]
        assert [taken.count(place) for place in range(3)] == [20, 20, 20]

    def test_do_not_wait_for_more_than_a_source_can_hold(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "_TICK_S", 3600.0)
        free = threading.Event()

        def read(_path: Path) -> Array:
            assert free.wait(30)
            return grey(0)

        small = pictures("b", 6)
        cameras = [pictures("hangs", 1, Reader(read)), Camera("b", small.source, buffer=2)]
        with Feeds(cameras, 8) as feeds:
            found: list[str] = []
            for batch in feeds.batches():
                found += names(batch)
                if len(found) >= 2:
                    free.set()
        assert len(found) == 7

    def test_go_on_without_a_source_that_hangs(self) -> None:
        free = threading.Event()

        def read(_path: Path) -> Array:
            assert free.wait(30)
            return grey(0)

        with Feeds([pictures("hangs", 5, Reader(read)), pictures("b", 9)], 8) as feeds:
            found: list[str] = []
            for batch in feeds.batches():
                found += names(batch)
                if len(found) == 9:
                    free.set()
        assert found[:9] == [f"b/{i}" for i in range(9)]
        assert sorted(found[9:]) == [f"hangs/{i}" for i in range(5)]

    def test_hold_failures_in_their_places(self) -> None:
        def read(path: Path) -> Array:
            if path.name == "1":
                raise ImageError("broken")
            return grey(0)

        with Feeds([pictures("a", 3, Reader(read))], 8) as feeds:
            items = [item for batch in feeds.batches() for _, item in batch]
        assert [item.error for item in items] == [None, "broken", None]
        assert {item.camera for item in items} == {"a"}
        assert all(item.arrived_s is not None for item in items)

    def test_raise_what_is_a_fault_of_our_own(self) -> None:
        def read(_path: Path) -> Array:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError), Feeds([pictures("a", 3, Reader(read))], 2) as feeds:
            list(feeds.batches())

    def test_come_whole_before_a_fault_is_raised(self) -> None:
        def read(path: Path) -> Array:
            if path.name == "3":
                raise ZeroDivisionError
            return grey(0)

        found: list[str] = []
        with pytest.raises(ZeroDivisionError), Feeds([pictures("a", 9, Reader(read))], 8) as feeds:
            for batch in feeds.batches():
                found += names(batch)
        assert found == ["a/0", "a/1", "a/2"]

    def test_hold_no_more_ahead_for_many_sources_than_for_one(self) -> None:
        alive = most = 0
        guard = threading.Lock()

        def read(_path: Path) -> Array:
            nonlocal alive, most
            with guard:
                alive += 1
                most = max(most, alive)
            return grey(0)

        cameras = [pictures(str(i), 12, Reader(read)) for i in range(8)]
        with Feeds(cameras, 8) as feeds:
            for batch in feeds.batches():
                with guard:
                    alive -= len(batch)
        # two batches, one that is at work, and what each decoder has in its hand
        assert most <= 2 * 8 + 8 + 8


class TestAFloodingSource:
    def test_drops_its_own_frames_alone(self) -> None:
        stop = threading.Event()

        def flood() -> Iterator[Path]:
            i = 0
            while not stop.is_set():
                yield Path(f"flood/{i}")
                i += 1

        source = Source("images", flood(), reader=Reader(lambda _: grey(9)))  # type: ignore[arg-type]
        flooding = Camera("flood", source, keep="newest", buffer=2)
        with Feeds([flooding, pictures("b", 50)], 8) as feeds:
            found: list[str] = []
            for batch in feeds.batches():
                found += [item.name for place, item in batch if place == 1]
                if len(found) == 50:
                    stop.set()
            first, second = (feed.buffer for feed in feeds)
        assert found == [f"b/{i}" for i in range(50)]
        assert second.num_dropped == 0
        assert first.num_dropped > 0

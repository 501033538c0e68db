from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engineworks.runtime.bundle import Bundle
from engineworks.runtime.errors import EngineError, InputError
from engineworks.runtime.systems import SYSTEMS, open_bundle
from engineworks.runtime.systems.calls import Calls
from engineworks.runtime.tensors import Array
from engineworks.runtime.testing import (
    draw_flower,
    draw_part,
    draw_scene,
    draw_strip,
    write_tiny_backbone_bundle,
    write_tiny_noising_bundle,
    write_tiny_paco_bundle,
    write_tiny_refdet_bundle,
    write_tiny_stripe_bundle,
)


def image(value: int) -> Array:
    return np.full((1, 1, 3), value, np.uint8)


def values(images: Sequence[Array]) -> list[int]:
    return [int(each[0, 0, 0]) for each in images]


class Work:
    """Answers with the pictures' values; the first call waits until ``go``."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.begun, self.go = threading.Event(), threading.Event()
        self.at_once = self.most = 0
        self._lock = threading.Lock()

    def __call__(self, images: Sequence[Array]) -> list[int]:
        with self._lock:
            self.calls.append(values(images))
            self.at_once += 1
            self.most = max(self.most, self.at_once)
        self.begun.set()
        assert self.go.wait(30)
        with self._lock:
            self.at_once -= 1
        if 13 in values(images):
            raise InputError("unlucky")
        return values(images)


def queue(
    calls: Calls, work: Work, pool: ThreadPoolExecutor, *pictures: Sequence[int]
) -> list[Future[Any]]:
    """Calls that wait one behind the other, in this order; the first runs."""
    asked: list[Future[Any]] = []
    for values_ in pictures:
        asked.append(pool.submit(calls.run, work, [image(value) for value in values_]))
        wait_for(lambda: len(calls._waiting) + calls._num_running == len(asked))
        assert work.begun.wait(30)  # before, the second might be joined to the first
    return asked


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(30_000):
        if condition():
            return
        time.sleep(0.001)
    raise AssertionError("it never came to that")


@pytest.fixture
def work() -> Work:
    return Work()


class TestCalls:
    def test_run_one_at_a_time_in_their_order(self, work: Work) -> None:
        calls = Calls(1)
        with ThreadPoolExecutor(4) as pool:
            asked = queue(calls, work, pool, [1], [2, 3], [4], [5])
            work.go.set()
            assert [each.result() for each in asked] == [[1], [2, 3], [4], [5]]
        assert work.calls == [[1], [2, 3], [4], [5]]
        assert work.most == 1

    def test_run_as_many_at_once_as_may(self, work: Work) -> None:
        calls = Calls(1, at_once=2)
        calls_work = calls.run

        def both(pictures: Sequence[Array]) -> list[int]:
            barrier.wait()
            return values(pictures)

        barrier = threading.Barrier(2, timeout=30)
        with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(4) as pool:
            patch.setattr("engineworks.runtime.systems.calls.cores", lambda: Free())
            asked = [pool.submit(calls_work, both, [image(i)]) for i in range(4)]
            assert [each.result() for each in asked] == [[0], [1], [2], [3]]

    def test_within_a_call_go_on_at_once(self) -> None:
        calls = Calls(1)
        assert calls.run(lambda images: calls.run(values, images), [image(3)]) == [3]

    def test_that_fail_let_the_next_one_run(self, work: Work) -> None:
        calls = Calls(1)
        work.go.set()
        with pytest.raises(InputError, match="unlucky"):
            calls.run(work, [image(13)])
        assert calls.run(work, [image(1)]) == [1]


class Free:
    """Threads for everybody."""

    def lent(self, _threads: int) -> Any:
        return threading.Lock()


class TestCallsThatWait:
    def test_are_joined_to_batches_where_that_was_asked_for(self, work: Work) -> None:
        calls = Calls(1, max_batch=4)
        with ThreadPoolExecutor(6) as pool:
            asked = queue(calls, work, pool, [1], [2], [3, 4], [5, 6], [7, 8, 9, 10, 11], [12])
            work.go.set()
            answers = [each.result() for each in asked]
        assert answers == [[1], [2], [3, 4], [5, 6], [7, 8, 9, 10, 11], [12]]
        assert work.calls == [[1], [2, 3, 4], [5, 6], [7, 8, 9, 10, 11], [12]]
        assert calls.num_joined == 1

    def test_wait_for_others_only_as_long_as_they_may(self, work: Work) -> None:
        work.go.set()
        calls = Calls(1, max_batch=3, max_wait_ms=30_000)
        with ThreadPoolExecutor(3) as pool:
            asked = [pool.submit(calls.run, work, [image(i)]) for i in range(3)]
            assert [each.result() for each in asked] == [[0], [1], [2]]
        assert sorted(map(len, work.calls)) == [3]
        alone = Calls(1, max_batch=3, max_wait_ms=1)
        assert alone.run(work, [image(7)]) == [7]

    def test_do_not_fail_with_another_one(self, work: Work) -> None:
        calls = Calls(1, max_batch=8)
        with ThreadPoolExecutor(5) as pool:
            asked = queue(calls, work, pool, [1], [2], [13], [3], [4])
            work.go.set()
            assert [asked[i].result() for i in (0, 1, 3, 4)] == [[1], [2], [3], [4]]
            assert isinstance(asked[2].exception(), InputError)
        assert work.calls == [[1], [2, 13, 3, 4], [2], [13], [3], [4]]
        assert calls.num_joined == 0

    def test_are_answered_also_where_the_one_that_answers_is_interrupted(self) -> None:
        def interrupted(images: Sequence[Array]) -> list[int]:
            if len(images) > 1:
                calls._max_wait_s = 0.0
                raise KeyboardInterrupt
            return values(images)

        calls = Calls(1, max_batch=2, max_wait_ms=30_000)
        with ThreadPoolExecutor(2) as pool:
            asked = [pool.submit(calls.run, interrupted, [image(i)]) for i in (1, 2)]
            found = [each.exception() or each.result() for each in asked]
        assert sorted(map(str, found)) in (["", "[1]"], ["", "[2]"])
        assert calls.run(interrupted, [image(3)]) == [3]


class TestClosing:
    def test_waits_for_the_calls_that_were_made_and_refuses_others(self, work: Work) -> None:
        calls = Calls(1)
        with ThreadPoolExecutor(4) as pool:
            asked = queue(calls, work, pool, [1], [2], [3])
            closed = pool.submit(calls.close)
            wait_for(lambda: calls._closed)
            with pytest.raises(EngineError, match="closed"):
                calls.run(work, [image(4)])
            assert not closed.done()
            work.go.set()
            closed.result(30)
            assert [each.result() for each in asked] == [[1], [2], [3]]
        calls.close()


# --- the systems ---------------------------------------------------------------------------------

SIZE = (64, 64)
WRITERS: dict[str, Callable[[Path], Bundle]] = {
    "backbone": write_tiny_backbone_bundle,
    "noising": write_tiny_noising_bundle,
    "paco": write_tiny_paco_bundle,
    "refdet": write_tiny_refdet_bundle,
    "stripe": write_tiny_stripe_bundle,
}
DRAWERS: dict[str, Callable[[np.random.Generator], Array]] = {
    "backbone": lambda rng: draw_flower(rng, SIZE, "red"),
    "noising": lambda rng: draw_part(rng, SIZE, defective=True)[0],
    "paco": lambda rng: draw_flower(rng, SIZE, "red"),
    "refdet": lambda rng: draw_scene(rng, (64, 96), ["red", "blue"])[0],
    "stripe": lambda rng: draw_strip(rng, SIZE, defective=True)[0],
}
NUM_CALLERS, NUM_PICTURES = 16, 32


@pytest.fixture(scope="module", params=sorted(SYSTEMS))
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return WRITERS[request.param](tmp_path_factory.mktemp("calls") / "bundle")


def pictures_of(name: str) -> list[Array]:
    rng = np.random.default_rng(0)
    return [DRAWERS[name](rng) for _ in range(NUM_PICTURES)]


def bits(result: Any) -> dict[str, Any]:
    """All that a result says, arrays by their bytes."""
    return {
        name: value.tobytes() if isinstance(value, np.ndarray) else value
        for name, value in vars(result).items()
    }


@pytest.mark.parametrize("backend", ["ort", "openvino"])
class TestASystem:
    def test_answers_many_threads_as_it_answers_one(self, bundle: Bundle, backend: str) -> None:
        pictures = pictures_of(bundle.manifest.system)
        with open_bundle(bundle.root, backend=backend, threads=2) as system:
            alone = [bits(system.infer([each])[0]) for each in pictures]
            with ThreadPoolExecutor(NUM_CALLERS) as pool:
                found = list(pool.map(lambda each: bits(system.infer([each])[0]), pictures))
        assert found == alone

    def test_may_be_closed_while_calls_run(self, bundle: Bundle, backend: str) -> None:
        pictures = pictures_of(bundle.manifest.system)
        system = open_bundle(bundle.root, backend=backend, threads=1)
        want = bits(system.infer(pictures[:1])[0])
        first = threading.Event()

        def call(_number: int) -> dict[str, Any] | None:
            try:
                answer = bits(system.infer(pictures[:1])[0])
            except EngineError as error:
                assert "this system is closed" in error.message
                return None
            first.set()
            return answer

        with ThreadPoolExecutor(NUM_CALLERS) as pool:
            calls = [pool.submit(call, i) for i in range(200)]
            assert first.wait(30)
            system.close()
            system.close()
            found = [each.result() for each in calls]
        assert all(each in (want, None) for each in found)
        assert found[0] == want

    def test_joins_calls_where_that_is_asked_for(self, bundle: Bundle, backend: str) -> None:
        pictures = pictures_of(bundle.manifest.system)
        with open_bundle(bundle.root, backend=backend, max_batch=8, max_wait_ms=50) as system:
            with ThreadPoolExecutor(NUM_CALLERS) as pool:
                found = list(pool.map(lambda each: system.infer([each])[0], pictures))
            assert system.calls.num_joined > 0  # type: ignore[attr-defined]
            alone = [system.infer([each])[0] for each in pictures]
        # the same answers, to rounding
        assert [type(each) for each in found] == [type(each) for each in alone]
        for one, other in zip(found, alone, strict=True):
            assert one.to_json().get("label") == other.to_json().get("label")

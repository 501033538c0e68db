from __future__ import annotations

import threading

import pytest

from engineworks.runtime.buffers import Buffer


def taken(buffer: Buffer[int]) -> list[int]:
    found = []
    while (each := buffer.take()) is not None:
        found.append(each[1])
    return found


class TestABuffer:
    def test_that_drops_keeps_the_newest_and_counts(self) -> None:
        buffer = Buffer[int](3, drops=True)
        assert all(buffer.put(i) for i in range(10))

        assert taken(buffer) == [7, 8, 9]
        assert (buffer.num_seen, buffer.num_dropped) == (10, 7)

    def test_that_drops_nothing_has_who_puts_wait(self) -> None:
        buffer, done = Buffer[int](2, drops=False), threading.Event()

        def put() -> None:
            for i in range(20):
                buffer.put(i)
                assert len(buffer) <= 2
            done.set()
            buffer.end()

        thread = threading.Thread(target=put)
        thread.start()
        with buffer.changed:
            assert buffer.changed.wait_for(lambda: buffer.is_full, 30)
        assert not done.is_set()
        assert list(buffer) == list(range(20))
        thread.join()
        assert (buffer.num_seen, buffer.num_dropped) == (20, 0)

    def test_lets_who_puts_go_when_it_is_closed(self) -> None:
        buffer = Buffer[int](1, drops=False)
        buffer.put(0)
        answers: list[bool] = []
        thread = threading.Thread(target=lambda: answers.append(buffer.put(1)))
        thread.start()
        buffer.close()
        thread.join(30)
        assert answers == [False]

    def test_gives_the_error_once_behind_all_else(self) -> None:
        buffer = Buffer[int](4, drops=True)
        buffer.put(1)
        buffer.end(ValueError("broken"))
        assert (buffer.has_ended, buffer.is_over, len(buffer)) == (True, False, 2)
        assert buffer.take() is not None
        assert not buffer.is_over
        with pytest.raises(ValueError, match="broken"):
            buffer.take()
        assert buffer.is_over
        assert buffer.take() is None

    def test_says_when_a_thing_came(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("engineworks.runtime.buffers.time.monotonic", lambda: 17.0)
        buffer = Buffer[int](1, drops=True)
        buffer.put(3)
        assert buffer.take() == (17.0, 3)

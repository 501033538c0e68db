"""Calls of one system from any number of threads: each has the system's CPU threads to itself.

They come to their turn in the order in which they were made. A call that finds nobody runs in its
own thread. Those that come meanwhile wait, and a thread that lives as long as any wait answers them
one after the other: the processor goes on with the next one while their own threads wake up.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from engineworks.runtime.errors import EngineError
from engineworks.runtime.tensors import Array
from engineworks.runtime.threads import cores

Work = Callable[[Sequence[Array]], Sequence[Any]]


class _Call:
    """Of one thread, which waits at ``answered`` where another one answers it."""

    def __init__(self, work: Work, images: Sequence[Array]) -> None:
        self.work = work
        self.images = images
        self.results: Sequence[Any] | None = None
        self.error: BaseException | None = None
        self.answered = threading.Lock()
        self.answered.acquire()


class Calls:
    """The calls of one system.

    With ``max_batch`` above 1 calls that wait are joined to batches of so many images. Then an
    answer may differ in its last bits from that of a picture by itself: some backends compute
    batches in another order.

    Attributes:
        num_joined: calls that were answered together with an earlier one.
    """

    def __init__(
        self, threads: int, *, at_once: int = 1, max_batch: int = 1, max_wait_ms: float = 0.0
    ) -> None:
        """No call yet.

        Args:
            threads: CPU threads that a call takes.
            at_once: calls that may run at a time.
            max_batch: images in a batch of joined calls; a call of more is not cut.
            max_wait_ms: how long a call that could be joined to others waits for these to come.
        """
        self.num_joined = 0
        self._threads = threads
        self._at_once = at_once
        self._max_batch = max_batch
        self._max_wait_s = max_wait_ms / 1000
        self._closed = False
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._changed = threading.Condition()
        self._waiting: deque[_Call] = deque()
        self._num_running = 0
        self._inside = threading.local()  # whether a thread is in a call

    def run(self, work: Work, images: Sequence[Array]) -> Sequence[Any]:
        """The results of ``work``, one per image, once it is this call's turn.

        A call within a call of the same thread goes on at once.

        Raises:
            EngineError: after ``close``.
            Exception: what ``work`` raises.
        """
        if self._process != os.getpid():  # forked: the others' threads did not come along
            self._begin()
        if getattr(self._inside, "call", False):
            return work(images)
        call, runs = _Call(work, images), False
        try:
            with self._changed:
                if self._closed:
                    raise EngineError("this system is closed", fix="open it again")
                runs = self._num_running < self._at_once
                if runs:
                    self._num_running += 1
                else:
                    self._waiting.append(call)
                    self._changed.notify_all()
            if runs:
                self._answer(call)
            call.answered.acquire()
        finally:
            if runs:
                self._go_on()
            elif not _is_done(call):  # interrupted, or closed
                self._leave(call)
        if call.error is not None:
            raise call.error
        assert call.results is not None
        return call.results

    def close(self) -> None:
        """Refuse calls from now on; returns when those that were made before have their answers."""
        if self._process != os.getpid():
            self._begin()
        with self._changed:
            self._closed = True
            mine = int(getattr(self._inside, "call", False))
            self._changed.wait_for(lambda: not self._waiting and self._num_running <= mine)

    def _leave(self, call: _Call) -> None:
        with self._changed:
            if call in self._waiting:
                self._waiting.remove(call)

    def _go_on(self) -> None:
        """Have those answered that wait, now that a call is done."""
        with self._changed:
            if not self._waiting:
                self._num_running -= 1
                self._changed.notify_all()
                return
        try:
            threading.Thread(target=self._answer_all, daemon=True).start()
        except RuntimeError:  # no more threads, or the process is about to end
            self._answer_all()

    def _answer_all(self) -> None:
        while True:
            with self._changed:
                if not self._waiting:
                    self._num_running -= 1
                    self._changed.notify_all()
                    return
                call = self._waiting.popleft()
            self._answer(call)

    def _answer(self, call: _Call) -> None:
        """Answer a call, and those that can be joined to it."""
        self._inside.call = True
        joined = [call]
        try:
            with cores().lent(self._threads):
                self._join(joined)
                if len(joined) == 1 or not self._answer_together(joined):
                    for each in joined:
                        _answer_alone(each)
        except BaseException as error:  # an interrupt: it is this call's alone
            with self._changed:
                self._waiting.extendleft(
                    each for each in reversed(joined[1:]) if not _is_done(each)
                )
            joined = [each for each in joined if _is_done(each) or each is call]
            call.error = error
        finally:
            self._inside.call = False
            for each in joined:
                each.answered.release()

    def _answer_together(self, joined: Sequence[_Call]) -> bool:
        """As one batch; False where it fails: one picture must not take others along."""
        try:
            results = joined[0].work([image for each in joined for image in each.images])
        except Exception:
            return False
        self.num_joined += len(joined) - 1
        for each in joined:
            each.results, results = results[: len(each.images)], results[len(each.images) :]
        return True

    def _join(self, joined: list[_Call]) -> None:
        """Add calls that wait, as many as fit in a batch."""
        room = self._max_batch - len(joined[0].images)
        if room <= 0:
            return
        until = time.monotonic() + self._max_wait_s
        with self._changed:
            while True:
                while self._waiting and len(self._waiting[0].images) <= room:
                    joined.append(self._waiting.popleft())
                    room -= len(joined[-1].images)
                rest_s = until - time.monotonic()
                if self._waiting or room <= 0 or rest_s <= 0:
                    return
                self._changed.wait(rest_s)


def _answer_alone(call: _Call) -> None:
    try:
        call.results = call.work(call.images)
    except Exception as error:  # its caller raises it
        call.error = error


def _is_done(call: _Call) -> bool:
    return call.results is not None or call.error is not None

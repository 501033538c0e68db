"""What one thread makes and another takes: a bounded number, and what gives way to more."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

Thing = TypeVar("Thing")


class Buffer(Generic[Thing]):
    """Things in their order, taken by one thread; ``end`` says that no more will come.

    Attributes:
        num_seen: things that were put in.
        num_dropped: those of them that made room for newer ones.
        drops: whether the oldest goes where there is no room; else ``put`` waits.
    """

    def __init__(
        self, size: int, *, drops: bool, changed: threading.Condition | None = None
    ) -> None:
        """An empty one.

        Args:
            size: how many it holds.
            changed: is notified of all that happens; buffers that are watched together share it.
        """
        self.num_seen = self.num_dropped = 0
        self.drops = drops
        self.changed = changed or threading.Condition()
        self._size = size
        self._things: deque[tuple[float, Thing]] = deque()
        self._ended = False
        self._error: BaseException | None = None
        self._closed = False

    def __len__(self) -> int:
        """How often ``take`` has something now; the error that it ended with is something."""
        return len(self._things) + (self._error is not None)

    @property
    def is_full(self) -> bool:
        return len(self._things) >= self._size

    @property
    def has_ended(self) -> bool:
        """Whether nothing will come."""
        return self._ended

    @property
    def is_over(self) -> bool:
        """Whether nothing is left, and nothing will come."""
        return self._ended and not len(self)

    def put(self, thing: Thing) -> bool:
        """Add one; False once nobody takes any more."""
        with self.changed:
            if self.drops and self.is_full:
                self._things.popleft()
                self.num_dropped += 1
            self.changed.wait_for(lambda: self._closed or not self.is_full)
            if self._closed:
                return False
            self._things.append((time.monotonic(), thing))
            self.num_seen += 1
            self.changed.notify_all()
            return True

    def end(self, error: BaseException | None = None) -> None:
        """No more will come; who has taken all gets the error."""
        with self.changed:
            self._ended, self._error = True, error
            self.changed.notify_all()

    def close(self) -> None:
        """Nobody takes any more: whoever puts goes on at once."""
        with self.changed:
            self._closed = True
            self.changed.notify_all()

    def take(self) -> tuple[float, Thing] | None:
        """The oldest, with the time of ``time.monotonic`` when it came; None where there is none.

        Raises:
            BaseException: what it ended with, once.
        """
        with self.changed:
            if self._things:
                taken = self._things.popleft()
                self.changed.notify_all()
                return taken
            if self._error is not None:
                error, self._error = self._error, None
                raise error
            return None

    def __iter__(self) -> Iterator[Thing]:
        """All that come, until the end.

        Raises:
            BaseException: what it ended with.
        """
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self._things or self._ended)
                taken = self.take()
            if taken is None:
                return
            yield taken[1]

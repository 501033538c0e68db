"""A command that is told to end (SIGTERM, SIGHUP) ends as by Ctrl-C: files are closed and named."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

_STOPPING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


class Stopped(KeyboardInterrupt):
    """A signal asked this process to end.

    Attributes:
        number: of the signal; ``exit_code`` is 128 more, as of a process that it ended.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number
        self.exit_code = 128 + number

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.number).name}"


class _State:
    """Of the one process that has signals.

    Attributes:
        before: handlers that were there, by signal; those of ``_STOPPING`` that are taken.
        told: an end was asked for. What comes then must not break off the work of ending, but for
            Ctrl-C, which a person may press again.
        num_unbroken: how many blocks must not be broken off; ``waiting`` is the signal that came.
    """

    def __init__(self) -> None:
        self.before: dict[int, Any] = {}
        self.told = False
        self.num_unbroken = 0
        self.waiting: int | None = None


_state = _State()


@contextmanager
def stoppable() -> Iterator[None]:
    """Within the block, the first signal to end raises ``Stopped`` in the main thread.

    A signal that was ignored before (``nohup``) stays ignored. Outside of the main thread, and
    within another such block, nothing happens.
    """
    if threading.current_thread() is not threading.main_thread() or _state.before:
        yield
        return
    _state.told = False
    for number in _STOPPING:
        if (before := signal.getsignal(number)) != signal.SIG_IGN:
            _state.before[number] = before
            signal.signal(number, _stop)
    try:
        yield
    finally:
        _restore()


@contextmanager
def unbroken() -> Iterator[None]:
    """Let the block come to its end; a signal that came meanwhile is raised after it."""
    _state.num_unbroken += 1
    try:
        yield
    finally:
        _state.num_unbroken -= 1
    if not _state.num_unbroken and (number := _state.waiting) is not None:
        _state.waiting = None
        raise Stopped(number)


@contextmanager
def broken() -> Iterator[None]:
    """Within an unbroken block, one that a signal may end at once, also one that came before."""
    around, _state.num_unbroken = _state.num_unbroken, 0
    try:
        if number := asked():
            raise Stopped(number)
        yield
    finally:
        _state.num_unbroken = around


def asked() -> int:
    """The signal that waits for the end of an unbroken block, taken from it; 0 where none does."""
    number, _state.waiting = _state.waiting or 0, None
    return number


def end(number: int) -> NoReturn:
    """End as by a signal that another process was sent.

    Raises:
        Stopped: always.
    """
    _state.told, _state.waiting = True, None
    raise Stopped(number)


def _stop(number: int, _frame: FrameType | None) -> None:
    if _state.told and number != signal.SIGINT:
        return
    _state.told = True
    if _state.num_unbroken:
        _state.waiting = number
        return
    raise Stopped(number)


def _restore() -> None:
    for number, before in _state.before.items():
        signal.signal(number, before)
    _state.before.clear()
    _state.waiting = None


# a child, such as a worker of a data loader, ends at once: there is nothing of its own to close
os.register_at_fork(after_in_child=_restore)

"""How many CPU threads this process may use, who has them, NumPy and FAISS on all of them."""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path, PurePosixPath
from typing import TypeVar

import cv2
from threadpoolctl import ThreadpoolController

Part = TypeVar("Part")

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")


def available_threads() -> int:
    """Cores that this process may run on, and no more than a container's share of them.

    More threads than that share would be stopped together in the middle of a graph.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return min(cores, _quota() or cores)


def bound_pools(threads: int) -> None:
    """Bound the threads that OpenCV and NumPy's BLAS keep for the whole process.

    FAISS' need no bound: ``runtime.bank`` calls it from the threads of ``in_parts`` alone.
    """
    cv2.setNumThreads(threads)
    ThreadpoolController().select(internal_api="openblas").limit(limits=threads)


class _Ask:
    """For threads, by somebody who waits at ``granted`` until ``has`` them."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.has = False
        self.granted = threading.Lock()
        self.granted.acquire()


class Lending:
    """So many CPU threads, lent in the order in which they are asked for.

    Who waits for many is not overtaken by those that want few.
    """

    def __init__(self, size: int) -> None:
        self._size = self._free = size
        self._lock = threading.Lock()
        self._waiting: deque[_Ask] = deque()
        self._local = threading.local()

    @contextmanager
    def lent(self, threads: int) -> Iterator[None]:
        """Have threads to oneself; all there are, where that is fewer.

        Within such a block another one changes nothing: who has threads waits for no more.
        """
        if getattr(self._local, "lent", False):
            yield
            return
        ask = _Ask(min(threads, self._size))
        self._local.lent = True
        try:
            with self._lock:
                self._waiting.append(ask)
                self._serve()
            ask.granted.acquire()
            yield
        finally:
            self._local.lent = False
            with self._lock:
                if ask.has:
                    self._free += ask.threads
                elif ask in self._waiting:  # interrupted while it waited
                    self._waiting.remove(ask)
                self._serve()

    def _serve(self) -> None:
        while self._waiting and self._waiting[0].threads <= self._free:
            ask = self._waiting.popleft()
            self._free -= ask.threads
            ask.has = True
            ask.granted.release()


@cache
def cores() -> Lending:
    """The threads that all calls of this process share."""
    return Lending(available_threads())


def _after_fork() -> None:
    _helpers.cache_clear()  # their threads did not come along
    cores.cache_clear()  # nor did those that had some


def in_parts(work: Callable[[slice], Part], count: int, threads: int) -> list[Part]:
    """Calls ``work`` on equal parts of ``range(count)``, in as many threads; results in order.

    NumPy holds Python's lock only between its loops, so this pays for arrays of 100 KB and more.
    ``work`` must not call this function.
    """
    parts = max(1, min(threads, count))
    borders = [count * i // parts for i in range(parts + 1)]
    slices = [slice(*borders[i : i + 2]) for i in range(parts)]
    # this thread takes the last part
    others = [_helpers(parts - 1).submit(work, part) for part in slices[:-1]]
    last = work(slices[-1])
    return [*(other.result() for other in others), last]


@cache
def _helpers(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="numpy")


def _quota() -> int | None:
    """Whole cores that control groups grant, rounded up; None without a limit.

    Those above a group limit it as well, and a container sees its own group as the topmost one.

    Source: Linux kernel, "Control Group v2", cpu.max: microseconds granted (or max), and period;
    "CFS Bandwidth Control", cpu.cfs_quota_us (-1: no limit) and cpu.cfs_period_us, of version 1.
    """
    granted = [share for folder in _folders() for share in _granted(folder)]
    return min((max(1, math.ceil(share)) for share in granted), default=None)


def _folders() -> Iterator[Path]:
    """Of the groups of this process, and of all above them, where they may be mounted."""
    yield _CGROUPS
    yield _CGROUPS / "cpu"
    try:
        lines = _OWN_CGROUPS.read_text().splitlines()
    except OSError:  # no Linux, or no /proc
        return
    for line in lines:
        _, controllers, place = line.split(":", 2)
        if not controllers or "cpu" in controllers.split(","):
            group = PurePosixPath(place)
            for root in (_CGROUPS, _CGROUPS / "cpu", _CGROUPS / "cpu,cpuacct"):
                yield from (root / str(each).lstrip("/") for each in (group, *group.parents))


def _granted(folder: Path) -> Iterator[float]:
    """Cores that a group grants, if it limits them."""
    try:
        if (limit := folder / "cpu.max").is_file():
            quota, period = limit.read_text().split()
        elif (limit := folder / "cpu.cfs_quota_us").is_file():
            quota, period = limit.read_text(), (folder / "cpu.cfs_period_us").read_text()
        else:
            return
    except OSError:  # not for us to read
        return
    if quota != "max" and int(quota) > 0 and int(period) > 0:
        yield int(quota) / int(period)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

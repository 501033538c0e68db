"""How many CPU threads this process may use, and NumPy on all of them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import TypeVar

Part = TypeVar("Part")

_CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def available_threads() -> int:
    """Cores that this process may run on, and no more than a container's share of them.

    More threads than that share would be stopped together in the middle of a graph.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return min(cores, _quota(_CGROUP_QUOTA) or cores)


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


def _quota(path: Path) -> int | None:
    """Whole cores that cgroup v2 grants, rounded up; None without a limit.

    Source: Linux kernel, "Control Group v2", cpu.max: microseconds granted (or max), and period.
    """
    if not path.is_file():
        return None
    granted, period = path.read_text().split()
    return None if granted == "max" else math.ceil(int(granted) / int(period))

"""How many CPU threads this process may use."""

from __future__ import annotations

import math
import os
from pathlib import Path

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


def _quota(path: Path) -> int | None:
    """Whole cores that cgroup v2 grants, rounded up; None without a limit.

    Source: Linux kernel, "Control Group v2", cpu.max: microseconds granted (or max), and period.
    """
    if not path.is_file():
        return None
    granted, period = path.read_text().split()
    return None if granted == "max" else math.ceil(int(granted) / int(period))

"""Where the time of a training step goes: named sections, measured only where somebody asks.

``with section("forward"):`` costs next to nothing unless a ``Profiler`` is active. Sections may
be nested; each keeps its own time, without what is inside of it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_active: Profiler | None = None


class Profiler:
    """Collects the sections of this process while it is entered.

    On CUDA every border of a section waits for the device: a profiled run is slower than others,
    but its shares are true.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = 0.0

    def __enter__(self) -> Profiler:
        global _active
        _active = self
        self._since = self._now()
        return self

    def __exit__(self, *_error: object) -> None:
        global _active
        self._lap()
        _active = None

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        self._lap()
        self._open.append(name)
        try:
            yield
        finally:
            self._lap()
            self._open.pop()

    def shares(self) -> dict[str, dict[str, float]]:
        """Section -> ``seconds`` and ``share`` of all measured time in [0, 1], largest first."""
        total = sum(self.seconds.values())
        return {
            name: {"seconds": seconds, "share": seconds / total}
            for name, seconds in sorted(self.seconds.items(), key=lambda item: -item[1])
        }

    def _lap(self) -> None:
        """Book the time since the last border on the innermost open section."""
        now = self._now()
        name = self._open[-1] if self._open else "other"
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


@contextmanager
def section(name: str) -> Iterator[None]:
    """Book the time spent inside under ``name``, where a profiler is active."""
    if _active is None:
        yield
    else:
        with _active.section(name):
            yield

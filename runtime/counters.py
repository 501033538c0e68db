"""What came of each source until now: frames, drops, failures, and how long answers took."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engineworks.runtime.sinks import Item
from engineworks.runtime.systems import Result
from engineworks.runtime.usual import Drift, brightness, score_of

_RECENT = 1000  # answers whose latencies are kept


@dataclass
class Counters:
    """Of one source.

    Attributes:
        num_seen: pictures that were decoded.
        num_dropped: those of them that were skipped to stay current.
        num_done, num_failed: those that have a result, and that have none.
        num_reconnects: of a live stream.
        drift: what the last pictures are like, beside those of the calibration.
    """

    num_seen: int = 0
    num_dropped: int = 0
    num_done: int = 0
    num_failed: int = 0
    num_reconnects: int = 0
    drift: Drift = field(default_factory=lambda: Drift(None))
    _latencies_s: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT))
    _begun_s: float = field(default_factory=time.monotonic)
    _last: tuple[float, int] | None = None

    def answered(self, item: Item, result: Result) -> None:
        """Note that the result of a picture is written now."""
        assert item.image is not None
        self.num_done += 1
        self.drift.add(brightness(item.image), score_of(result))
        if item.arrived_s is not None:
            self._latencies_s.append(time.monotonic() - item.arrived_s)

    def latency_ms(self, quantile: float) -> float | None:
        """From decoding to the written result, of the last 1,000; None before the first."""
        if not self._latencies_s:
            return None
        return round(1000 * float(np.quantile(np.array(self._latencies_s), quantile)), 1)

    def to_json(self) -> dict[str, Any]:
        seconds = time.monotonic() - self._begun_s
        return {
            "frames_seen": self.num_seen,
            "frames_dropped": self.num_dropped,
            "done": self.num_done,
            "failed": self.num_failed,
            "reconnects": self.num_reconnects,
            "per_second": round(self.num_done / seconds, 2) if seconds else 0.0,
            "latency_ms": {"p50": self.latency_ms(0.5), "p99": self.latency_ms(0.99)},
            "pictures": self.drift.to_json(),
        }

    def line(self) -> str:
        """For people: the rate is that since the last line."""
        now_s = time.monotonic()
        since_s, before = self._last or (self._begun_s, 0)
        rate = (self.num_done - before) / max(now_s - since_s, 1e-9)
        self._last = (now_s, self.num_done)
        failed = f", {self.num_failed} failed" if self.num_failed else ""
        p50, p99 = self.latency_ms(0.5), self.latency_ms(0.99)
        latency = "" if p50 is None else f", latency {p50:.0f} ms (p99 {p99:.0f} ms)"
        return (
            f"{self.num_seen} seen, {self.num_dropped} dropped, {self.num_done} done{failed}, "
            f"{rate:.1f}/s{latency}"
        )

"""Timing that can be trusted: warm-up, percentiles, contenders taking turns, a stability verdict.

On a shared machine a slow spell hits whoever runs in it. So contenders are called in turns, and
samples during which other processes took more than ``FOREIGN_CORES`` of a core are set aside, as
long as enough quiet ones are left.
"""

from __future__ import annotations

import hashlib
import os
import platform
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from runtime.doctor import cpu_model, installed, int8_features
from runtime.tensors import Array

FOREIGN_CORES = 0.15
_MIN_RUNS = 15
_MAX_RUNS = 2000
_TICK_S = 0.2  # load of other processes is read over at least this long
_STEADY = 0.1  # largest spread and drift, relative to the median, that counts as stable

Clock = Callable[[], float]


@dataclass(frozen=True)
class Timing:
    """Times of one contender.

    Attributes:
        samples_ms: of the calls that count, in the order of the calls.
        num_disturbed: calls set aside because other processes were busy.
        num_runs: calls that count.
        p50_ms, p90_ms, p95_ms, p99_ms, mean_ms, min_ms: of them.
        spread: median absolute deviation over the median.
        drift: median of the second half over that of the first, minus 1.
        stable: spread and drift are small and the machine was quiet.
    """

    samples_ms: tuple[float, ...]
    num_disturbed: int
    disturbed: bool

    @property
    def num_runs(self) -> int:
        return len(self.samples_ms)

    def percentile(self, q: float) -> float:
        return float(np.percentile(self.samples_ms, q))

    @property
    def p50_ms(self) -> float:
        return self.percentile(50)

    @property
    def p90_ms(self) -> float:
        return self.percentile(90)

    @property
    def p95_ms(self) -> float:
        return self.percentile(95)

    @property
    def p99_ms(self) -> float:
        return self.percentile(99)

    @property
    def mean_ms(self) -> float:
        return float(np.mean(self.samples_ms))

    @property
    def min_ms(self) -> float:
        return float(np.min(self.samples_ms))

    @property
    def spread(self) -> float:
        return float(np.median(np.abs(np.array(self.samples_ms) - self.p50_ms)) / self.p50_ms)

    @property
    def drift(self) -> float:
        half = self.num_runs // 2
        first, second = self.samples_ms[:half], self.samples_ms[half:]
        return float(np.median(second) / np.median(first) - 1) if half else 0.0

    @property
    def stable(self) -> bool:
        return not self.disturbed and self.spread <= _STEADY and abs(self.drift) <= _STEADY

    def to_json(self) -> dict[str, Any]:
        """Figures without the samples."""
        names = ("num_runs", "num_disturbed", "p50_ms", "p90_ms", "p95_ms", "p99_ms", "mean_ms")
        figures = {name: getattr(self, name) for name in (*names, "min_ms", "spread", "drift")}
        return {**figures, "stable": self.stable}


@dataclass(frozen=True)
class Ratio:
    """How many times as fast: the ratio of medians with its 95 % bootstrap interval."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """One line of a benchmark.

    Attributes:
        name: backend or framework.
        batch: images per call.
        covers: what the clock covers.
        accuracy: the task's metrics, where they were measured.
    """

    name: str
    precision: str
    batch: int
    threads: int
    covers: str
    timing: Timing
    accuracy: Mapping[str, float] | None = None

    @property
    def images_per_second(self) -> float:
        return 1000 * self.batch / self.timing.p50_ms

    def to_json(self) -> dict[str, Any]:
        """Everything but the single samples."""
        plain = {key: value for key, value in asdict(self).items() if key != "timing"}
        return {**plain, **self.timing.to_json(), "images_per_second": self.images_per_second}


class _Machine:
    """CPU seconds that other processes used, from /proc; none are seen on other systems."""

    def __init__(self) -> None:
        self._stat = Path("/proc/stat")
        self._known = self._stat.is_file()
        self._hertz = os.sysconf("SC_CLK_TCK") if self._known else 1

    def foreign_seconds(self) -> float:
        if not self._known:
            return 0.0
        fields = [int(value) for value in self._stat.read_text().split("\n", 1)[0].split()[1:9]]
        user, nice, system, _idle, _iowait, irq, softirq, steal = fields
        own = os.times()
        busy = (user + nice + system + irq + softirq + steal) / self._hertz
        return busy - own.user - own.system - own.children_user - own.children_system


def interleave(
    contenders: Mapping[str, Callable[[], object]],
    *,
    warmup: int = 3,
    max_seconds: float = 10.0,
    max_runs: int = _MAX_RUNS,
    clock: Clock = time.perf_counter,
) -> dict[str, Timing]:
    """Time several functions in turns, a burst of calls each.

    Args:
        contenders: name -> what to call.
        warmup: untimed calls of each before the first turn.
        max_seconds: stop after this long in all, but never before ``15`` calls of each.
        max_runs: stop after so many calls of each.
        clock: seconds.

    Returns:
        name -> timing.
    """
    machine = _Machine()
    for call in contenders.values():
        for _ in range(warmup):
            call()
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    foreign: dict[str, list[bool]] = {name: [] for name in contenders}
    begin = clock()
    while True:
        for name, call in contenders.items():
            call()  # the caches were another contender's
            burst_begin, busy = clock(), machine.foreign_seconds()
            burst = 0
            while burst < _MIN_RUNS // 3 or clock() - burst_begin < _TICK_S:
                start = clock()
                call()
                samples[name].append(1000 * (clock() - start))
                burst += 1
                if burst >= max_runs:
                    break
            elapsed = max(clock() - burst_begin, 1e-9)
            load = (machine.foreign_seconds() - busy) / elapsed
            foreign[name] += [load > FOREIGN_CORES] * burst
        fewest = min(len(taken) for taken in samples.values())
        if fewest >= max_runs or (fewest >= _MIN_RUNS and clock() - begin >= max_seconds):
            break
    return {name: _timing(samples[name], foreign[name]) for name in contenders}


def _timing(samples: Sequence[float], foreign: Sequence[bool]) -> Timing:
    quiet = [sample for sample, disturbed in zip(samples, foreign, strict=True) if not disturbed]
    if len(quiet) >= _MIN_RUNS:
        return Timing(tuple(quiet), len(samples) - len(quiet), disturbed=False)
    return Timing(tuple(samples), 0, disturbed=any(foreign))


def ratio(slow: Timing, fast: Timing, *, seed: int = 0, rounds: int = 1000) -> Ratio:
    """Median time of ``slow`` over that of ``fast``, with a seeded bootstrap interval."""
    rng = np.random.default_rng(seed)
    a, b = np.array(slow.samples_ms), np.array(fast.samples_ms)
    medians_a = np.median(rng.choice(a, (rounds, len(a))), axis=1)
    medians_b = np.median(rng.choice(b, (rounds, len(b))), axis=1)
    low, high = np.percentile(medians_a / medians_b, [2.5, 97.5])
    return Ratio(float(np.median(a) / np.median(b)), float(low), float(high))


def render(rows: Sequence[Row]) -> str:
    """The rows as a text table; speed-ups are against the first row of the same kind."""
    header = ("what", "precision", "batch", "p50 ms", "p90", "p95", "p99", "images/s", "x", "")
    metrics = list(dict.fromkeys(key for row in rows for key in row.accuracy or ()))
    shown = [name for name in metrics if name.endswith(("auroc", "aupro", "top1", "map50"))]
    out = StringIO()
    console = Console(file=out, width=150)
    for covers in dict.fromkeys(row.covers for row in rows):
        for batch in dict.fromkeys(row.batch for row in rows):
            group = [row for row in rows if row.covers == covers and row.batch == batch]
            if not group:
                continue
            table = Table(
                *header,
                *shown,
                title=f"{covers}, batch {batch}, {group[0].threads} threads",
                title_justify="left",
            )
            for row in group:
                timing = row.timing
                accuracy = row.accuracy or {}
                table.add_row(
                    row.name,
                    row.precision,
                    str(row.batch),
                    *(f"{timing.percentile(q):.2f}" for q in (50, 90, 95, 99)),
                    f"{row.images_per_second:.1f}",
                    f"{ratio(group[0].timing, timing).median:.2f}",
                    "" if timing.stable else "unstable",
                    *(f"{accuracy[name]:.4f}" if name in accuracy else "" for name in shown),
                )
            console.print(table)
    return out.getvalue()


def environment(*, threads: int) -> dict[str, Any]:
    """Machine and versions: what a figure must be read with."""
    names = ("numpy", "opencv-python-headless", "onnxruntime", "openvino", "faiss-cpu", "torch")
    return {
        "cpu": cpu_model(),
        "int8_features": int8_features(),
        "cores": os.cpu_count(),
        "threads": threads,
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: installed(name) for name in names},
        "peak_rss_bytes": peak_rss_bytes(),
    }


def inputs_hash(arrays: Sequence[Array]) -> str:
    """SHA-256 over shapes, dtypes and bytes."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.shape} {array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

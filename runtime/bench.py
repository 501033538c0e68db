"""Timing that can be trusted: warm-up, percentiles, contenders taking turns, a stability verdict.

On a shared machine a slow spell hits whoever runs in it. So contenders are called in turns, their
ratio is taken turn by turn, and turns during which other processes took more than
``FOREIGN_CORES`` of a core are set aside, as long as enough quiet ones are left.
"""

from __future__ import annotations

import hashlib
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from engineworks.runtime import gpu
from engineworks.runtime.doctor import cpu_model, installed, int8_features
from engineworks.runtime.errors import InputError
from engineworks.runtime.evaluation import Evaluation, Rate
from engineworks.runtime.tensors import Array
from engineworks.runtime.threads import available_threads

FOREIGN_CORES = 0.15
MIN_RUNS = 15
_MAX_RUNS = 2000
_TURN_RUNS = 3  # calls of a turn, at least
_TURN_S = 0.2  # shorter spans are too few of the kernel's ticks to read a load from
_MIN_TURNS = 5
_PACKAGES = (
    "numpy",
    "opencv-python-headless",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt",
    "faiss-cpu",
    "faiss-gpu-cu12",
    "torch",
    "timm",
)
_PERCENTILES = (50, 90, 95, 99)
_STEADY = 0.1  # largest spread and drift, relative to the median, that counts as stable

Clock = Callable[[], float]


@dataclass(frozen=True)
class DeviceTime:
    """A contender returns it where the device timed the call: that counts, not the wall clock."""

    ms: float


@dataclass(frozen=True)
class Turn:
    """Calls of one contender in a row.

    Attributes:
        samples_ms: time of each call.
        foreign_cores: CPU time that other processes used meanwhile, over the time passed.
        joules: that the GPU used meanwhile; None where nothing counts them.
    """

    samples_ms: tuple[float, ...]
    foreign_cores: float
    joules: float | None = None

    @property
    def quiet(self) -> bool:
        return self.foreign_cores <= FOREIGN_CORES


@dataclass(frozen=True)
class Timing:
    """Times of one contender. All figures are over the calls that count: those of quiet turns, or
    all of them where quiet turns hold fewer than ``MIN_RUNS`` calls.

    Attributes:
        samples_ms: those calls, in their order.
        num_runs: their number.
        num_disturbed: calls that do not count, because other processes were busy.
        p50_ms, mean_ms, min_ms: median, mean and smallest of them.
        spread: median absolute deviation over the median.
        drift: median of the second half over that of the first, minus 1.
        verdict: ``stable``, or what speaks against it.
        joules_per_call: that the GPU used, idle power included; None where nothing counts them.
    """

    turns: tuple[Turn, ...]

    @cached_property
    def disturbed(self) -> bool:
        """Whether calls count during which other processes were busy."""
        quiet = sum(len(turn.samples_ms) for turn in self.turns if turn.quiet)
        return quiet < MIN_RUNS and not all(turn.quiet for turn in self.turns)

    def counts(self, turn: Turn) -> bool:
        return turn.quiet or self.disturbed

    @cached_property
    def samples_ms(self) -> tuple[float, ...]:
        return tuple(ms for turn in self.turns if self.counts(turn) for ms in turn.samples_ms)

    @property
    def num_runs(self) -> int:
        return len(self.samples_ms)

    @property
    def num_disturbed(self) -> int:
        return sum(len(turn.samples_ms) for turn in self.turns) - self.num_runs

    def percentile(self, q: float) -> float:
        """Milliseconds that ``q`` percent of the calls do not exceed."""
        return float(np.percentile(self.samples_ms, q))

    @property
    def p50_ms(self) -> float:
        return self.percentile(50)

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
        return self.verdict == "stable"

    @property
    def verdict(self) -> str:
        doubts = []
        if self.disturbed:
            doubts.append("others busy")
        if self.spread > _STEADY:
            doubts.append(f"spread {self.spread:.0%}")
        if abs(self.drift) > _STEADY:
            doubts.append(f"drift {self.drift:+.0%}")
        return ", ".join(doubts) or "stable"

    @property
    def joules_per_call(self) -> float | None:
        counting = [turn for turn in self.turns if self.counts(turn)]
        joules = [turn.joules for turn in counting if turn.joules is not None]
        return sum(joules) / self.num_runs if len(joules) == len(counting) else None

    def to_json(self) -> dict[str, Any]:
        """Figures without the samples."""
        return {
            "num_runs": self.num_runs,
            "num_disturbed": self.num_disturbed,
            **{f"p{q}_ms": self.percentile(q) for q in _PERCENTILES},
            "mean_ms": self.mean_ms,
            "min_ms": self.min_ms,
            "spread": self.spread,
            "drift": self.drift,
            "stable": self.stable,
            "verdict": self.verdict,
        }


@dataclass(frozen=True)
class Ratio:
    """How many times as fast, with its 95 % bootstrap interval."""

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
        evaluation: how well it does, where that was measured.
    """

    name: str
    precision: str
    batch: int
    threads: int
    covers: str
    timing: Timing
    evaluation: Evaluation | None = None

    @property
    def accuracy(self) -> Mapping[str, float]:
        """The task's metrics; none where they were not measured."""
        return {} if self.evaluation is None else self.evaluation.metrics

    @property
    def decided(self) -> Mapping[str, Rate]:
        """What goes wrong at the border that is shipped."""
        decisions = () if self.evaluation is None else self.evaluation.decisions
        return decisions[0].rates if decisions else {}

    @property
    def images_per_second(self) -> float:
        return 1000 * self.batch / self.timing.p50_ms

    @property
    def joules_per_image(self) -> float | None:
        joules = self.timing.joules_per_call
        return None if joules is None else joules / self.batch

    def to_json(self) -> dict[str, Any]:
        """Everything but the single samples."""
        return {
            "name": self.name,
            "precision": self.precision,
            "batch": self.batch,
            "threads": self.threads,
            "covers": self.covers,
            "accuracy": None if self.evaluation is None else dict(self.accuracy),
            "decisions": None
            if self.evaluation is None
            else self.evaluation.to_json()["decisions"],
            **self.timing.to_json(),
            "images_per_second": self.images_per_second,
            "joules_per_image": self.joules_per_image,
        }


@dataclass(frozen=True)
class ForeignLoad:
    """Reads how much CPU time other processes have used; none is seen where /proc is not.

    Attributes:
        stat: the kernel's counters.
        own: user and system seconds of this process and its children that have ended.
        hertz: ticks per second of those counters.
    """

    stat: Path = Path("/proc/stat")
    own: Callable[[], float] = lambda: sum(os.times()[:4])
    hertz: int = field(default_factory=lambda: os.sysconf("SC_CLK_TCK"))

    def seconds(self) -> float:
        """Since some fixed moment; time that a hypervisor took away counts as well."""
        if not self.stat.is_file():
            return 0.0
        with self.stat.open() as lines:
            # cpu user nice system idle iowait irq softirq steal ...
            ticks = [int(value) for value in lines.readline().split()[1:9]]
        return (sum(ticks) - ticks[3] - ticks[4]) / self.hertz - self.own()


def interleave(
    contenders: Mapping[str, Callable[[], object]],
    *,
    warmup: int = 3,
    max_seconds: float = 10.0,
    max_runs: int = _MAX_RUNS,
    clock: Clock = time.perf_counter,
    foreign_seconds: Clock | None = None,
    joules: Clock | None = None,
) -> dict[str, Timing]:
    """Time functions that take turns, so that what disturbs one disturbs all.

    A turn is one call that is not timed (the caches were another contender's), then at least 3
    calls and 0.2 s of them.

    Args:
        contenders: name -> what to call.
        warmup: untimed calls of each before the first turn.
        max_seconds: begin no further round after this long, but never stop before 15 calls and 5
            turns of each.
        max_runs: begin no further round after so many calls of each.
        clock: seconds.
        foreign_seconds: seconds that other processes have computed; None reads /proc.
        joules: that the GPU has used; None asks it, where there is one.

    Returns:
        name -> timing; the n-th turns of all contenders belong together.
    """
    foreign = foreign_seconds or ForeignLoad().seconds
    meter = joules or gpu.energy()
    for call in contenders.values():
        for _ in range(warmup):
            call()
    turns: dict[str, list[Turn]] = {name: [] for name in contenders}
    runs = dict.fromkeys(contenders, 0)
    begin, rounds = clock(), 0
    while True:
        for name, call in contenders.items():
            turn = _turn(call, max_runs, clock, foreign, meter)
            turns[name].append(turn)
            runs[name] += len(turn.samples_ms)
        rounds += 1
        fewest = min(runs.values())
        enough = fewest >= MIN_RUNS and rounds >= _MIN_TURNS
        if enough and (fewest >= max_runs or clock() - begin >= max_seconds):
            return {name: Timing(tuple(taken)) for name, taken in turns.items()}


def _turn(
    call: Callable[[], object],
    max_runs: int,
    clock: Clock,
    foreign: Clock,
    meter: Clock | None,
) -> Turn:
    call()
    samples: list[float] = []
    used = meter() if meter else 0.0
    begin, busy = clock(), foreign()
    while len(samples) < max_runs and (len(samples) < _TURN_RUNS or clock() - begin < _TURN_S):
        start = clock()
        result = call()
        elapsed_ms = 1000 * (clock() - start)
        samples.append(result.ms if isinstance(result, DeviceTime) else elapsed_ms)
    load = (foreign() - busy) / (clock() - begin)
    return Turn(tuple(samples), load, meter() - used if meter else None)


def ratio(slow: Timing, fast: Timing, *, seed: int = 0, rounds: int = 2000) -> Ratio:
    """How many times as fast ``fast`` is: the median over turns of the ratio of their medians.

    Only turns that count for both are compared, or all where there are none. The interval is a
    seeded bootstrap over turns, not over calls, because the calls of one turn are alike.

    Raises:
        InputError: the two did not take turns in one ``interleave``.
    """
    if len(slow.turns) != len(fast.turns):
        raise InputError(
            "these timings were not taken in turns", fix="time both in one call of interleave"
        )
    pairs = list(zip(slow.turns, fast.turns, strict=True))
    common = [(a, b) for a, b in pairs if slow.counts(a) and fast.counts(b)]
    ratios = np.array(
        [np.median(a.samples_ms) / np.median(b.samples_ms) for a, b in common or pairs]
    )
    draws = np.random.default_rng(seed).choice(ratios, (rounds, len(ratios)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return Ratio(float(np.median(ratios)), float(low), float(high))


def _groups(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that can be compared: the same batch size, the same thing covered by the clock."""
    keys = [(row.covers, row.batch) for row in rows]
    return [
        [row for row, of in zip(rows, keys, strict=True) if of == key]
        for key in dict.fromkeys(keys)
    ]


def to_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as plain values, each with its speed-up against the first one of its kind."""
    return [
        {**row.to_json(), "speedup": asdict(ratio(group[0].timing, row.timing))}
        for group in _groups(rows)
        for row in group
    ]


def render(rows: Sequence[Row], metrics: Collection[str] = ()) -> str:
    """The rows as text tables, one per kind; speed-ups are against the first row of each.

    Args:
        metrics: of accuracy, to be shown, such as those of the bundle's gate; none: the first that
            each evaluation names.
    """
    times = ("p50 ms", *(f"p{q}" for q in _PERCENTILES[1:]))
    found = dict.fromkeys(key for row in rows for key in row.accuracy)
    leading = dict.fromkeys(key for row in rows for key in list(row.accuracy)[:1])
    shown = [name for name in metrics if name in found] or list(leading)
    rates = list(dict.fromkeys(key for row in rows for key in row.decided))
    energy = any(row.joules_per_image is not None for row in rows)
    out = StringIO()
    console = Console(file=out, width=170)
    for group in _groups(rows):
        first = group[0]
        table = Table(
            *("what", "precision", *times, "images/s", *["J/image"] * energy),
            *("speed-up (95 %)", "verdict", *shown, *rates),
            title=f"{first.covers}, batch {first.batch}, {first.threads} threads",
            title_justify="left",
        )
        for row in group:
            faster = ratio(first.timing, row.timing)
            table.add_row(
                row.name,
                row.precision,
                *(f"{row.timing.percentile(q):.2f}" for q in _PERCENTILES),
                f"{row.images_per_second:.1f}",
                *[f"{row.joules_per_image or 0.0:.4f}"] * energy,
                "1"
                if row is first
                else f"{faster.median:.2f} ({faster.low:.2f} to {faster.high:.2f})",
                row.timing.verdict,
                *(f"{row.accuracy[name]:.4f}" if name in row.accuracy else "" for name in shown),
                *(row.decided[name].fraction if name in row.decided else "" for name in rates),
            )
        console.print(table)
    return out.getvalue()


def environment(*, threads: int) -> dict[str, Any]:
    """Machine and versions: what a figure must be read with.

    Returns:
        cpu, int8_features (instruction sets), gpu (null where there is none), cores, threads,
        memory_bytes, load (processes that wanted to run, mean of the last minute), system, python,
        packages (installed ones with versions), peak_rss_bytes.
    """
    versions = {name: installed(name) for name in _PACKAGES}
    return {
        "cpu": cpu_model(),
        "int8_features": int8_features(),
        "gpu": asdict(found) if (found := gpu.find()) else None,
        "cores": available_threads(),
        "threads": threads,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: version for name, version in versions.items() if version},
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
    """Largest resident memory of this process so far.

    On Linux from VmHWM: ru_maxrss also knows that of the process which started this one.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

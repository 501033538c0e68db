"""What of a bundle ships: parity and speed of INT8, and the decision. The stage verdict.

What decides, and how it is told, is ``runtime.verdict``: whoever opens the bundle reads it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any

from engineworks.export.config import ExportConfig
from engineworks.export.gate import int8_backends
from engineworks.export.job import Job
from engineworks.export.parity import Feeds, answers, compare
from engineworks.runtime import bench
from engineworks.runtime.bundle import Bundle
from engineworks.runtime.engines import BACKENDS, Engine
from engineworks.runtime.systems import open_engines
from engineworks.runtime.usual import REPORT
from engineworks.runtime.verdict import decide, describe

_PRECISIONS = ("float", "bf16", "int8", "int8-bf16")  # whose speed the verdict names
# what export says of INT8; of an earlier one, and of 16-bit graphs that are gone, nothing stays
_REPORTS = (
    "calibration",
    "kept_float",
    "parity_int8",
    "gate",
    "speed",
    "verdict",
    "sensitivity",
    "parity_half",
)


def verdict(job: Job) -> None:
    """Compare and time INT8 and float, and decide what ships.

    Raises:
        BackendError: no backend that can run INT8 graphs.
    """
    made, config = job.calibration, job.config
    gate = job.manifest.reports["gate"] if config.evaluation is not None else {}
    parity = _parity(job.bundle, made.feeds, config.threads)
    job.say("timing float against INT8")
    speed = _speed(job.bundle, made.feeds, config)
    decided = decide(gate, speed, unjudged=config.unjudged)
    reports: dict[str, Any] = {
        **{k: v for k, v in job.manifest.reports.items() if k not in _REPORTS},
        REPORT: made.usual.model_dump(mode="json"),
        "calibration": {
            "method": made.table.method,
            "percentile": made.table.percentile,
            "num_samples": made.num_samples,
            "seed": config.seed,
            "output_error": dict(made.errors),
        },
        "kept_float": {name: sorted(rule.nodes) for name, rule in made.keep.items() if rule.nodes},
        "parity_int8": parity,
        "gate": gate,
        "speed": speed,
        "verdict": decided,
    }
    if made.costs:
        reports["sensitivity"] = {
            name: [asdict(cost) for cost in found] for name, found in made.costs.items()
        }
    job.update(reports=reports)
    for line in describe(decided):
        job.say(line)


def _parity(bundle: Bundle, feeds: Feeds, threads: int | None) -> dict[str, Any]:
    """INT8 against float outputs of every graph, per backend."""
    report: dict[str, Any] = {}
    for backend in int8_backends():
        got, want = (
            answers(bundle, backend, precision, feeds, threads=threads)
            for precision in ("int8", "float")
        )
        report[backend] = {
            name: {k: v.model_dump() for k, v in compare(got[name], want[name]).items()}
            for name in want
        }
    return report


def _speed(bundle: Bundle, feeds: Feeds, config: ExportConfig) -> dict[str, Any]:
    """Float against INT8 network time on one sample, contenders taking turns, per backend.

    Of the graphs that every sample meets: what runs once, when a system is opened, is left out.
    """
    report: dict[str, Any] = {}
    most = max(map(len, feeds.values()))
    every = [name for name, fed in feeds.items() if len(fed) == most]
    for backend in int8_backends():
        with ExitStack() as stack:
            contenders = {}
            for precision in [p for p in _PRECISIONS if p in BACKENDS[backend].variants]:
                engines = stack.enter_context(_opened(bundle, backend, precision, config.threads))

                def call(engines: Mapping[str, Engine] = engines) -> None:
                    for name in every:
                        engines[name].run(feeds[name][0])

                contenders[precision] = call
            timings = bench.interleave(contenders, max_seconds=config.seconds)
        ratio = bench.ratio(timings["float"], timings["int8"])
        report[backend] = {
            "p50_ms": {name: timing.p50_ms for name, timing in timings.items()},
            "stable": all(timing.stable for timing in timings.values()),
            "int8_speedup": ratio.median,
            "int8_speedup_low": ratio.low,
            "int8_speedup_high": ratio.high,
        }
    return report


@contextmanager
def _opened(
    bundle: Bundle, backend: str, precision: str, threads: int | None
) -> Iterator[dict[str, Engine]]:
    engines = open_engines(bundle, backend, precision, threads=threads)
    try:
        yield engines
    finally:
        for engine in engines.values():
            engine.close()

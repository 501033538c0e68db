"""Callers from many threads: throughput, CPU per answer and answers, against one caller.

    python -m tests.benchmarks.callers BUNDLE PICTURES [--callers 16] [--seconds 5] [--batch 1,8]

One caller and many take turns, several times each; the medians are printed for each backend and
precision that the bundle has here. Answers are compared bit for bit with those of one thread.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engineworks.runtime.bundle import read
from engineworks.runtime.engines import BACKENDS
from engineworks.runtime.errors import EngineworksError
from engineworks.runtime.sources import open_source
from engineworks.runtime.systems import System, choose, open_system
from engineworks.runtime.tensors import Array
from engineworks.runtime.threads import available_threads

TURNS = 3


def bits(result: Any) -> dict[str, Any]:
    """All that a result says, arrays by their bytes."""
    return {
        name: value.tobytes() if isinstance(value, np.ndarray) else value
        for name, value in vars(result).items()
    }


def load(
    system: System, pictures: Sequence[Array], callers: int, seconds: float
) -> tuple[float, float, list[tuple[int, Any]]]:
    """Answers per second, CPU milliseconds per answer, and the answers: (picture, result)."""
    numbers, found = itertools.count(), []
    start, cpu = time.perf_counter(), time.process_time()
    end = start + seconds

    def call() -> None:
        while time.perf_counter() < end:
            number = next(numbers) % len(pictures)
            found.append((number, system.infer([pictures[number]])[0]))

    threads = [threading.Thread(target=call) for _ in range(callers)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    return len(found) / wall, 1000 * cpu / len(found), found


def compare(system: System, pictures: Sequence[Array], callers: int, seconds: float) -> str:
    want = [bits(system.infer([each])[0]) for each in pictures]
    rates: dict[int, list[tuple[float, float]]] = {1: [], callers: []}
    other = 0
    for _ in range(TURNS):
        for num in rates:
            rate, cpu_ms, found = load(system, pictures, num, seconds / TURNS)
            rates[num].append((rate, cpu_ms))
            other += sum(bits(result) != want[number] for number, result in found)
    one, many = (
        [statistics.median(each) for each in zip(*rates[num], strict=True)] for num in rates
    )
    return (
        f"{one[0]:7.1f} {many[0]:7.1f} {many[0] / one[0]:5.2f}   "
        f"{one[1]:7.1f} {many[1]:7.1f} {many[1] / one[1]:5.2f}   {other:6d}"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("pictures")
    parser.add_argument("--callers", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each kind of caller")
    parser.add_argument("--threads", type=int, default=available_threads())
    parser.add_argument("--batch", default="1", help="max_batch, one or several: 1,8")
    asked = parser.parse_args()
    bundle = read(asked.bundle)
    print(f"{bundle.manifest.system}, {asked.threads} threads, 1 and {asked.callers} callers")
    print("                                  answers/s              CPU ms/answer         differ")
    for backend, precision, batch in itertools.product(
        BACKENDS, ("float", "int8"), map(int, asked.batch.split(","))
    ):
        try:
            choose(bundle, backend, precision)
        except EngineworksError:
            continue
        with open_system(
            bundle, backend=backend, precision=precision, threads=asked.threads, max_batch=batch
        ) as system:
            source = open_source(asked.pictures, system.reader)
            pictures = [source.reader.read(path) for path in source.paths[:32]]
            line = compare(system, pictures, asked.callers, asked.seconds)
            print(f"{backend:9} {precision:6} max_batch {batch:<3} {line}", flush=True)


if __name__ == "__main__":
    main()

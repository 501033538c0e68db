"""What a benchmark compares: one bundle on every backend and precision, and its rivals.

Each contender is timed twice: its network alone, and the whole path from decoded images to results.
On a GPU both include the copies to it and back, because that is what a caller waits for; its
network is timed once more by CUDA events, from tensors that are there to tensors that stay there.
All contenders of a batch size take turns in one run, so a slow spell of the machine hits all alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from engineworks.runtime import bench
from engineworks.runtime.bundle import Bundle
from engineworks.runtime.engines import BACKENDS, check_backend
from engineworks.runtime.errors import BundleError, UsageError
from engineworks.runtime.evaluation import Evaluation
from engineworks.runtime.preprocess import apply
from engineworks.runtime.sources import open_source
from engineworks.runtime.systems import Promptable, System, choose, open_system, reader_of
from engineworks.runtime.tensors import Array

NETWORK = "network"
ON_GPU = "network on the GPU"
PATH = "images to results"

Say = Callable[[str], None]
Prepare = Callable[[System], None]


@dataclass(frozen=True)
class Contender:
    """Something that can be timed.

    Attributes:
        name: e.g. ``openvino`` or ``eager channels_last``.
        precision: of its arithmetic.
        network: runs the graphs on a prepared batch (B, C, H, W) float32.
        path: from B images (H, W, 3) uint8 RGB to B results.
        evaluate: judges it on a labelled folder; None where that is not offered.
        close: releases what it holds.
        on_gpu: from a prepared batch to a call that runs the graphs on its copy on the GPU and
            gives the GPU's own time; None where there is none.
    """

    name: str
    precision: str
    network: Callable[[Array], object]
    path: Callable[[Sequence[Array]], object]
    evaluate: Callable[[Path], Evaluation] | None
    close: Callable[[], None]
    on_gpu: Callable[[Array], Callable[[], bench.DeviceTime]] | None = None

    @property
    def label(self) -> str:
        return f"{self.name} {self.precision}"


def images_for(bundle: Bundle, source: str | None) -> list[Array]:
    """Images to time on: those of ``source``, or seeded noise at the network's size."""
    if source is None:
        height, width = bundle.manifest.preprocess.size
        rng = np.random.default_rng(0)
        return [rng.integers(0, 256, (height, width, 3), np.uint8) for _ in range(8)]
    reader = reader_of(bundle.manifest.system)
    opened = open_source(source, reader)
    if opened.kind != "images":
        raise UsageError("bench takes pictures, not video", fix="give a folder of pictures")
    return [reader.read(path) for path in opened.paths[:32]]


def describe_images(samples: Sequence[Array]) -> dict[str, Any]:
    """Count, sizes and hash of the images that were timed."""
    return {
        "count": len(samples),
        "shapes": sorted({str(image.shape) for image in samples}),
        "sha256": bench.inputs_hash(samples),
    }


def of_bundle(
    bundle: Bundle,
    backend: str,
    threads: int,
    prepare: Prepare = lambda _: None,
    *,
    host_code: bool = False,
) -> list[Contender]:
    """One contender per usable backend and precision that the bundle has graphs for.

    Args:
        backend: only this one; ``auto`` takes all that can be used here.
        prepare: called with each system before it is timed.
        host_code: see ``runtime.systems.open_engines``.

    Raises:
        UsageError, BackendError: there is no such backend, or not here.
        BundleError: the bundle has no graphs for any of them.
    """
    if backend != "auto":
        check_backend(backend)
        names = [backend]
    else:
        names = [name for name in BACKENDS if BACKENDS[name].why_not() is None]
    found = []
    for name in names:
        for precision in ("float", "fp16", "bf16", "int8", "int8-bf16"):
            if precision not in BACKENDS[name].variants:
                continue
            try:
                choose(bundle, name, precision)
            except BundleError:
                continue  # the bundle was exported without that precision
            system = open_system(
                bundle, backend=name, precision=precision, threads=threads, host_code=host_code
            )
            prepare(system)
            found.append(
                Contender(
                    name=name,
                    precision=precision,
                    network=partial(_run, system),
                    path=system.infer,
                    evaluate=system.evaluate,
                    close=system.close,
                    on_gpu=partial(_on_gpu, system) if BACKENDS[name].needs_gpu else None,
                )
            )
    if not found:
        raise BundleError(
            f"bundle {bundle.root} has no graphs for backend {' or '.join(names) or '(none here)'}",
            fix="choose another --backend, or export the bundle for it",
        )
    return found


def _feeds(system: System, batch: Array) -> Mapping[str, Mapping[str, Array]]:
    """What the graphs that run for every batch are fed."""
    if isinstance(system, Promptable):
        return system.feeds(batch)
    engines = system.engines.items()
    return {name: dict.fromkeys(engine.inputs, batch) for name, engine in engines}


def _run(system: System, batch: Array) -> object:
    return [system.engines[name].run(feed) for name, feed in _feeds(system, batch).items()]


def _on_gpu(system: System, batch: Array) -> Callable[[], bench.DeviceTime]:
    from engineworks.runtime.engines import cuda  # needs pycuda

    stopwatch = cuda.Stopwatch()
    feeds = {
        graph: {name: cuda.upload(array) for name, array in feed.items()}
        for graph, feed in _feeds(system, batch).items()
    }

    def work(stream: int) -> object:
        return [system.engines[graph].run(feed, stream=stream) for graph, feed in feeds.items()]

    return lambda: bench.DeviceTime(stopwatch.time(work))


def measure(
    bundle: Bundle,
    samples: Sequence[Array],
    *,
    eager: Sequence[Contender] = (),
    backend: str,
    batches: Sequence[int],
    threads: int,
    seconds: float,
    evaluation: Path | None,
    prepare: Prepare = lambda _: None,
    host_code: bool = False,
    say: Say,
) -> list[bench.Row]:
    """Time all contenders.

    Args:
        samples: images to cycle through.
        eager: rivals of the bundle that stand before it, see ``training.eager.of_run``.
        seconds: spent on each row, warm-up not counted.
        evaluation: labelled folder; adds accuracy to each row that offers it.
        prepare, host_code: see ``of_bundle``.

    Returns:
        Rows by batch size and what the clock covers, in the order of the contenders.
    """
    found = [*eager, *of_bundle(bundle, backend, threads, prepare, host_code=host_code)]
    with ExitStack() as stack:
        for contender in found:
            stack.callback(contender.close)
        judged = {} if evaluation is None else _judged(found, evaluation, say)
        rows = []
        for size in batches:
            batch = [samples[i % len(samples)] for i in range(size)]
            prepared = apply(bundle.manifest.preprocess, batch)
            for covers in (NETWORK, ON_GPU, PATH):
                calls: dict[str, Callable[[], object]] = {}
                for contender in found:
                    if covers == NETWORK:
                        calls[contender.label] = partial(contender.network, prepared)
                    elif covers == PATH:
                        calls[contender.label] = partial(contender.path, batch)
                    elif contender.on_gpu is not None:
                        calls[contender.label] = contender.on_gpu(prepared)
                if not calls:
                    continue
                say(f"batch {size}, {covers}: {len(calls)} contenders take turns")
                timings = bench.interleave(calls, max_seconds=seconds * len(calls))
                rows += [
                    bench.Row(
                        name=contender.name,
                        precision=contender.precision,
                        batch=size,
                        threads=threads,
                        covers=covers,
                        timing=timings[contender.label],
                        evaluation=judged.get(contender.label),
                    )
                    for contender in found
                    if contender.label in calls
                ]
        return rows


def _judged(contenders: Sequence[Contender], data: Path, say: Say) -> dict[str, Evaluation]:
    """Label -> how well it does, of those that can be judged."""
    judged = {}
    for contender in contenders:
        if contender.evaluate is not None:
            say(f"accuracy of {contender.label}")
            judged[contender.label] = contender.evaluate(data)
    return judged

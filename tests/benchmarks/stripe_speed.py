"""A strip end to end: the published network tile by tile against the bundle, whole and in tiles.

    python -m tests.benchmarks.stripe_speed RUN BUNDLE STRIPS [--threads 2] [--rounds 5]

All take turns; the published way is called once per round, each of the others five times.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from engineworks.runtime import planes
from engineworks.runtime.bundle import Bundle, read
from engineworks.runtime.sources import open_source
from engineworks.runtime.systems import open_system
from engineworks.runtime.tensors import Array
from engineworks.training.run import open_run
from engineworks.training.systems.stripe.eager import (
    EagerStripe,
    PublishedWindow,
    published_net,
    trained_net,
)

_PUBLISHED = "published, tile by tile"
_CALLS = 5  # of the others per round
_TILE, _OVERLAP = 128, 24  # twice what the default network looks beyond a pixel


def tiled(bundle: Bundle) -> Bundle:
    """The same bundle, cutting its images into tiles."""
    inference = {**bundle.manifest.params["inference"], "tile": _TILE, "overlap": _OVERLAP}
    params = {**bundle.manifest.params, "inference": inference}
    return Bundle(bundle.root, bundle.manifest.model_copy(update={"params": params}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("run", "bundle", "strips"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    bundle = read(given.bundle)
    strips = [planes.read(p) for p in open_source(str(given.strips), planes.PLANES).paths]
    net = trained_net(open_run(given.run)).to(memory_format=torch.channels_last)
    calls: dict[str, Callable[[Sequence[Array]], object]] = {
        _PUBLISHED: PublishedWindow(published_net(), bundle).infer,
        "eager float, whole": EagerStripe(net, bundle).infer,
    }
    for precision in ("float", "bf16", "int8"):
        for way, each in (("whole", bundle), ("tiles", tiled(bundle))):
            system = open_system(
                each, backend="openvino", precision=precision, threads=given.threads
            )
            calls[f"openvino {precision}, {way}"] = system.infer
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call(strips[:1])
    for number in range(given.rounds):
        strip = strips[number % len(strips)]
        for name, call in calls.items():
            for _ in range(1 if name == _PUBLISHED else _CALLS):
                begin = time.perf_counter()
                call([strip])
                taken[name].append(1000 * (time.perf_counter() - begin))
    first = float(np.median(taken[_PUBLISHED]))
    print(f"{strips[0].shape}, {given.threads} threads, {given.rounds} rounds")
    for name, times in taken.items():
        median = float(np.median(times))
        print(f"{name:28} {median:9.2f} ms  {first / median:7.1f}x")


if __name__ == "__main__":
    main()

"""The fast search against the flat one, over all test images of a bundle, in one run.

python -m tests.benchmarks.search BUNDLE --data DIR [--backend openvino]
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np

from runtime import bench, datasets, images
from runtime.bundle import read
from runtime.preprocess import apply
from runtime.systems import open_system


class _Flat:
    """The reference search in the place of the fast one."""

    def __init__(self, fast: object, bank: object, k: int) -> None:
        self.search = lambda queries: bank.search(queries, k)  # type: ignore[attr-defined]


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--backend", default="openvino")
@click.option("--precision", default="int8")
def main(bundle: Path, data: Path, backend: str, precision: str) -> None:
    """Print recall, the largest difference of the anomaly maps, and both times."""
    system = open_system(read(bundle), backend=backend, precision=precision)
    fast, bank, k = system.search, system.bank, system.params.k  # type: ignore[attr-defined]
    flat = _Flat(fast, bank, k)
    found = total = 0
    worst = 0.0
    for sample in datasets.mvtec(data, "test"):
        batch = apply(system.bundle.manifest.preprocess, [images.read(sample.path)])
        features = system.engines["features"].run({"images": batch})["features"][0]
        _, ours = fast.search(features)
        _, exact = bank.search(features, k)
        found += sum(len(np.intersect1d(a, b)) for a, b in zip(ours, exact, strict=True))
        total += exact.size
        system.search = fast  # type: ignore[attr-defined]
        one = system.score(features).map_HW  # type: ignore[attr-defined]
        system.search = flat  # type: ignore[attr-defined]
        other = system.score(features).map_HW  # type: ignore[attr-defined]
        worst = max(worst, float(np.abs(one - other).max()))
    timings = bench.interleave(
        {"flat": lambda: bank.search(features, k), "fast": lambda: fast.search(features)}
    )
    ratio = bench.ratio(timings["flat"], timings["fast"])
    click.echo(
        f"{len(bank)} rows x {bank.width}, K = {k}, {backend}: recall {found / total:.6f}, "
        f"largest map difference {worst:.2e}, searched again {fast.repeated / fast.searched:.4f}; "
        f"flat {timings['flat'].p50_ms:.2f} ms, fast {timings['fast'].p50_ms:.2f} ms, "
        f"{ratio.median:.2f}x ({ratio.low:.2f} to {ratio.high:.2f})"
    )


if __name__ == "__main__":
    main()

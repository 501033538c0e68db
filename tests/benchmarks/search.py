"""The fast search against FAISS' flat one and against float64, over all test images of a bundle.

python -m tests.benchmarks.search BUNDLE --data DIR [--backend openvino]
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np

from engineworks.runtime import bench, datasets, images
from engineworks.runtime.bank import Bank, ascending
from engineworks.runtime.bundle import read
from engineworks.runtime.preprocess import apply
from engineworks.runtime.systems import open_system
from engineworks.runtime.tensors import Array


class Exact:
    """K nearest rows by float64 arithmetic: FAISS' float32 products swap near ties."""

    def __init__(self, bank: Bank, k: int) -> None:
        self._bank = bank
        self._k = k
        self._mean = bank.rows_MD.mean(axis=0, dtype=np.float64)
        self._rows = bank.rows_MD - self._mean
        self._half_norms = np.einsum("md,md->m", self._rows, self._rows) / 2

    def search(self, queries_ND: Array) -> tuple[Array, Array]:
        """As ``Bank.search``."""
        similarity = (queries_ND - self._mean) @ self._rows.T - self._half_norms
        nearest = np.argpartition(-similarity, self._k - 1, axis=1)[:, : self._k]
        return ascending(self._bank.squared_distances(queries_ND, nearest), nearest)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--backend", default="openvino")
@click.option("--precision", default="int8")
def main(bundle: Path, data: Path, backend: str, precision: str) -> None:
    """Print recall, the largest difference of the anomaly maps, and both times."""
    system: Any = open_system(read(bundle), backend=backend, precision=precision)
    judge = system.judge
    fast, bank, k = judge.search, judge.bank, judge.params.k
    exact = Exact(bank, k)
    found = total = 0
    worst = 0.0
    for sample in datasets.mvtec(data, "test"):
        batch = apply(system.bundle.manifest.preprocess, [images.read(sample.path)])
        features = system.engines["features"].run({"images": batch})["features"][0]
        _, ours = fast.search(features)
        _, wanted = exact.search(features)
        found += sum(len(np.intersect1d(a, b)) for a, b in zip(ours, wanted, strict=True))
        total += wanted.size
        judge.search = fast
        one = system.score(features).map_HW
        judge.search = exact
        other = system.score(features).map_HW
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

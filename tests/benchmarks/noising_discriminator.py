r"""A discriminator in the place of the memory bank: accuracy, size, latency.

    python -m tests.benchmarks.noising_discriminator --data DIR --weights FILE --out DIR \
        [--seeds 3] [--arm NAME ...] [--engine BUNDLE] [--backend openvino] [--threads 2] \
        [--set key=value ...]

Each judge is trained, exported with INT8 and evaluated through the runtime, once per seed. With
``--engine`` a third arm learns from features that a bundle of the same net extracts (INT8), as
``cli.py export backbone:NAME`` and ``--int8`` make it; what it deploys is the eager net all the
same. Latency is that of the first seed's bundles, from the decoded picture to score and map, all
taking turns. Finished runs and bundles are not repeated.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import click

from engineworks.runtime import bench, datasets, images
from engineworks.runtime.bundle import Bundle, read
from engineworks.runtime.systems import open_system, variant_of

PRECISIONS = ("float", "int8")
METRICS = ("image_auroc", "pixel_auroc", "pixel_ap", "aupro")
ARMS: dict[str, tuple[str, ...]] = {
    "bank": ("judge=bank",),
    "discriminator": ("judge=discriminator",),
}


def cli(*arguments: object, threads: int) -> float:
    """Run a command; seconds on the clock, imports included."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "cli.py", "--quiet", *map(str, arguments)]
    start = time.perf_counter()
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def bundle_of(
    root: Path, data: Path, settings: list[str], *, threads: int
) -> tuple[Bundle, float | None]:
    """The INT8 bundle of an arm and seed, and the seconds that its training took, if it had to."""
    run, floats, out = (root / name for name in ("run", "float", "bundle"))
    seconds = None
    record = run / "run.json"
    if not (record.is_file() and json.loads(record.read_text())["status"] == "finished"):
        chosen = [part for setting in settings for part in ("--set", setting)]
        seconds = cli(
            *("train", "noising", "--data", data, "--out", run, "--exist-ok", *chosen),
            threads=threads,
        )
    if not out.is_dir():
        cli("export", run, "--out", floats, "--exist-ok", threads=threads)
        good = datasets.mvtec(data, "train")[0].path.parent
        cli("export", floats, "--int8", "--samples", good, "--out", out, threads=threads)
    return read(out), seconds


def size_bytes(bundle: Bundle, precision: str, backend: str) -> int:
    """What one precision needs on disk: its graph and the assets that the system reads."""
    manifest = bundle.manifest
    names = []
    for entry in manifest.graphs.values():
        variant = variant_of(entry.variants, backend, precision)
        assert variant is not None
        names.append(entry.variants[variant])
    names += [name for role, name in manifest.assets.items() if role == "bank"]
    return sum(manifest.files[name].size_bytes for name in names)


@click.command()
@click.option("--data", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--weights", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--seeds", default=3)
@click.option("--arm", "chosen", type=click.Choice(list(ARMS)), multiple=True, default=list(ARMS))
@click.option("--engine", type=click.Path(path_type=Path, exists=True))
@click.option("--backend", default="openvino")
@click.option("--threads", default=2)
@click.option("--seconds", default=3.0, help="Timed per row.")
@click.option("--set", "overrides", multiple=True, help="Of the settings that all arms share.")
def main(
    data: Path,
    weights: Path,
    out: Path,
    seeds: int,
    chosen: tuple[str, ...],
    engine: Path | None,
    backend: str,
    threads: int,
    seconds: float,
    overrides: tuple[str, ...],
) -> None:
    arms = {arm: ARMS[arm] for arm in chosen}
    if engine is not None:
        faster = (f"backbone.engine={engine}", "backbone.engine_precision=int8")
        arms["discriminator, engine"] = (*ARMS["discriminator"], *faster)
    firsts: dict[str, Bundle] = {}
    for arm, choice in arms.items():
        found: dict[str, list[dict[str, float]]] = {precision: [] for precision in PRECISIONS}
        for seed in range(seeds):
            root = out / f"{arm.replace(', ', '_')}_{seed}"
            root.mkdir(parents=True, exist_ok=True)
            settings = [*choice, *overrides, f"backbone.weights={weights}", f"train.seed={seed}"]
            bundle, took = bundle_of(root, data, settings, threads=threads)
            firsts.setdefault(arm, bundle)
            if took is not None:
                print(f"{arm}, seed {seed}: trained in {took:.0f} s", flush=True)
            for precision in PRECISIONS:
                system = open_system(bundle, backend=backend, precision=precision, threads=threads)
                found[precision].append(system.evaluate(data).metrics)
                system.close()
        for precision, rows in found.items():
            print(f"{arm}, {precision}: {size_bytes(firsts[arm], precision, backend) / 1e6:.1f} MB")
            for name in METRICS:
                values = [row[name] for row in rows]
                spread = statistics.stdev(values) if seeds > 1 else 0.0
                each = ", ".join(f"{value:.4f}" for value in values)
                print(f"  {name:12s} {statistics.mean(values):.4f} +- {spread:.4f}  ({each})")
    picture = images.read(datasets.mvtec(data, "test")[0].path)
    opened = {
        f"{arm}, {precision}": open_system(
            bundle, backend=backend, precision=precision, threads=threads
        )
        for arm, bundle in firsts.items()
        for precision in PRECISIONS
    }
    calls = {name: partial(system.infer, [picture]) for name, system in opened.items()}
    timings = bench.interleave(calls, max_seconds=seconds * len(calls))
    for name, timing in timings.items():
        print(f"{name}: p50 {timing.p50_ms:.2f} ms ({timing.verdict})")
    for system in opened.values():
        system.close()


if __name__ == "__main__":
    main()

r"""Are objects found that training never saw? Drawn toys, from random weights, several seeds.

    python -m tests.benchmarks.refdet_drawn --out DIR [--seeds 3] [--epochs 20] \
        [--set key=value ...]

Each seed draws another data set and trains with small.yaml; the best epoch by the validation's
toys is exported and judged on the toys of the test, which are others again: with their own
references, and with another toy's (swapped), where nothing should be found.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click


def call(*arguments: str | Path) -> float:
    """Run a command of the command line; its seconds."""
    start = time.perf_counter()
    command = [sys.executable, "cli.py", "--quiet", *map(str, arguments)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def one(root: Path, seed: int, overrides: tuple[str, ...]) -> dict[str, float]:
    """Metrics of one seed on the toys of the test, and the seconds of training."""
    data, record = root / "data", root / "test.json"
    if not data.exists():
        call("sample", "refdet", "--out", data, "--seed", str(seed))
    settings = [f"train.seed={seed}", *overrides]
    sets = [part for setting in settings for part in ("--set", setting)]
    run, bundle = root / "run", root / "bundle"
    seconds = call(
        *("train", "refdet", "--config", "small", "--data", data, "--out", run, "--exist-ok", *sets)
    )
    call("export", run, "--out", bundle, "--exist-ok")
    call("eval", bundle, "--data", data, "--json", record)
    found: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
    return {"seconds": seconds, **found["metrics"]}


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--seeds", default=3)
@click.option("--epochs", default=20, help="Of 100 steps; small.yaml has 10.")
@click.option("--set", "overrides", multiple=True, help="Settings beside small.yaml.")
def main(out: Path, seeds: int, epochs: int, overrides: tuple[str, ...]) -> None:
    overrides = (f"train.epochs={epochs}", *overrides)
    rows = []
    for seed in range(seeds):
        rows.append(one(out / str(seed), seed, overrides))
        print(f"seed {seed}: " + ", ".join(f"{k} {v:.3f}" for k, v in rows[-1].items()), flush=True)
    print(f"\n{seeds} seeds: mean +- standard deviation")
    for name in rows[0]:
        values = [row[name] for row in rows]
        spread = statistics.stdev(values) if seeds > 1 else 0.0
        print(f"{name:15s} {statistics.mean(values):8.3f} +- {spread:.3f}")


if __name__ == "__main__":
    main()

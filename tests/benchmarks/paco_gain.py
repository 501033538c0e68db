r"""Does part contrast help? Cross-entropy alone, with the published settings, and with ours.

    python -m tests.benchmarks.paco_gain --data DIR --weights FILE --out DIR [--seeds 3] \
        [--jobs 2] [--arm NAME ...] [--set key=value ...]

All arms have the same pictures, views, steps and optimizer; each seed gives another classifier,
order of pictures and augmentation. The published settings run in our code, so without the faults of
the published one. Finished runs are not repeated.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click

SETTINGS = [
    "backbone.name=mobilenetv2_100",
    "backbone.args={pad_type: same}",
    "backbone.frozen_norms=true",
    "backbone.channels_last=true",
    "preprocess.size=[160, 160]",
    "preprocess.mean=[0.5, 0.5, 0.5]",
    "preprocess.std=[0.5, 0.5, 0.5]",
    "num_overlays=17",
    "loss.label_smoothing=0.1",
    "train.epochs=6",
    "train.batch_size=16",
    "train.precision=bf16",
    "train.optimizer.lr=2e-4",
    "train.optimizer.warmup_epochs=0.5",
]
ARMS = {
    "cross-entropy": ["loss.pac=0", "loss.soc=0"],
    "published settings": [
        "parts.window=5",
        "parts.radius=0",
        "loss.warmup_epochs=0",
        "loss.normalise=false",
        "loss.metric=pair",
        "loss.shrinkage=null",
        "loss.ridge=1e-2",
        "loss.top_m=64",
        "loss.matching=cosine",
        "loss.soc_normalise=false",
        "loss.saliency=0.1",
    ],
    "ours": [
        "loss.pac=0.6",  # weighed on a split of the training pictures
        "loss.soc=0.2",
        "loss.warmup_epochs=1",
        "loss.matching_warmup_epochs=1",
    ],
}


def train(
    data: Path, weights: Path, out: Path, overrides: tuple[str, ...], arm: str, seed: int
) -> dict[str, float]:
    """Metrics of one run on the pictures that judge it; one thread."""
    root = out / f"{arm.replace(' ', '_')}_{seed}"
    settings = [*SETTINGS, *overrides, *ARMS[arm]]
    settings += [f"backbone.weights={weights}", f"train.seed={seed}"]
    record = root / "run.json"
    if not (record.is_file() and json.loads(record.read_text())["status"] == "finished"):
        command = [sys.executable, "cli.py", "train", "paco", "--data", str(data)]
        command += ["--out", str(root), "--exist-ok"]
        command += [part for setting in settings for part in ("--set", setting)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    results = json.loads(record.read_text())["results"]
    metrics: dict[str, float] = results.get("val") or results["test"]
    print(f"{arm}, seed {seed}: top-1 {metrics['top1']:.4f}", flush=True)
    return metrics


@click.command()
@click.option("--data", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--weights", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--seeds", default=3)
@click.option("--jobs", default=2, help="Runs at a time, of one thread each.")
@click.option("--arm", "arms", type=click.Choice(list(ARMS)), multiple=True, default=list(ARMS))
@click.option("--set", "overrides", multiple=True, help="Of the settings that all arms share.")
def main(
    data: Path,
    weights: Path,
    out: Path,
    seeds: int,
    jobs: int,
    arms: tuple[str, ...],
    overrides: tuple[str, ...],
) -> None:
    runs = [(arm, seed) for seed in range(seeds) for arm in arms]
    with ThreadPoolExecutor(jobs) as pool:
        metrics = dict(
            zip(
                runs,
                pool.map(lambda run: train(data, weights, out, overrides, *run), runs),
                strict=True,
            )
        )
    print(f"\n{seeds} seeds: mean +- standard deviation, and each")
    for arm in arms:
        for name in ("top1", "balanced_accuracy", "ece", "nll"):
            values = [metrics[arm, seed][name] for seed in range(seeds)]
            spread = statistics.stdev(values) if seeds > 1 else 0.0
            each = ", ".join(f"{value:.4f}" for value in values)
            print(f"{arm:20s} {name:18s} {statistics.mean(values):.4f} +- {spread:.4f}  ({each})")


if __name__ == "__main__":
    main()

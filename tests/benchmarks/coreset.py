"""Greedy k-centre against the plain loop, on real features, in one run.

    python -m tests.benchmarks.coreset --data DIR [--images 60] [--num 614]

The features are those of a wide_resnet50_2 with seeded random weights, pooled to 1024 channels.
"""

from __future__ import annotations

import time
from pathlib import Path

import click
import numpy as np
import torch

from engineworks.runtime import datasets, images
from engineworks.runtime.coreset import greedy_k_centre
from engineworks.runtime.preprocess import PreprocessSpec, apply
from engineworks.runtime.tensors import Array
from engineworks.training.config import load_config
from engineworks.training.systems.noising.config import TaskConfig
from engineworks.training.systems.noising.task import build_model


def plain_loop(rows_ND: Array, num: int, first: int) -> Array:
    """The textbook rule: one pass over all rows per pick."""
    nearest = np.full(len(rows_ND), np.inf)
    picked = [first]
    while len(picked) < num:
        distance = np.linalg.norm(rows_ND - rows_ND[picked[-1]], axis=1)
        nearest = np.minimum(nearest, distance)
        picked.append(int(nearest.argmax()))
    return np.array(picked)


@click.command()
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--images", "num_images", default=60)
@click.option("--num", default=614)
def main(data: Path, num_images: int, num: int) -> None:
    """Print both times, their ratio and whether the same rows were chosen."""
    overrides = ["backbone.name=wide_resnet50_2", "backbone.weights=none", "width=1024"]
    config = load_config("noising", None, overrides)
    assert isinstance(config, TaskConfig)
    model, _ = build_model(config)
    spec = PreprocessSpec(size=(256, 256))
    samples = datasets.mvtec(data, "train")[:num_images]
    with torch.inference_mode():
        features = [
            model(torch.from_numpy(apply(spec, [images.read(sample.path)]))).numpy()[0]
            for sample in samples
        ]
    rows = np.concatenate(features)
    start = time.perf_counter()
    ours = greedy_k_centre(rows, num, first=0)
    ours_s = time.perf_counter() - start
    start = time.perf_counter()
    plain = plain_loop(rows, num, 0)
    plain_s = time.perf_counter() - start
    same = bool(np.array_equal(ours.indices, plain))
    click.echo(
        f"{num} of {rows.shape}: plain {plain_s:.2f} s, ours {ours_s:.3f} s, "
        f"{plain_s / ours_s:.1f}x, same rows: {same}"
    )


if __name__ == "__main__":
    main()

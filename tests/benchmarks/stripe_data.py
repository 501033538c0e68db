"""Samples per second of the data path, beside the method that was published first.

The old method decodes a whole strip for every tile, paints defects as Gaussians of the strip's full
size into copies of all planes, and then cuts out the tile. Both run in one process on one thread.

python -m tests.benchmarks.stripe_data [--strips 518] [--seconds 10]
"""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from pathlib import Path

import click
import cv2
import numpy as np
import torch
from numpy.random import Generator

from engineworks.runtime import planes
from engineworks.runtime.tensors import Array
from engineworks.training.config import TrainConfig
from engineworks.training.data import loader
from engineworks.training.systems.stripe.config import TaskConfig
from engineworks.training.systems.stripe.data import Strips, Tiles, pack
from engineworks.training.systems.stripe.sample import draw

_SIZE = (976, 176)


def old_tile(paths: list[Path], index: int, rng: Generator) -> tuple[Array, Array]:
    """One tile by the old method: (3, 128, 128) float32 in [0, 1] and its mask."""
    tops, lefts = np.linspace(0, 848, 8).astype(int), (0, 48)
    strip, tile = divmod(index % (16 * len(paths)), 16)
    captures = [plane.astype(np.float32) for plane in np.moveaxis(planes.read(paths[strip]), -1, 0)]
    height, width = captures[0].shape
    masks = np.zeros((3, height, width), bool)
    num = int(rng.integers(5, 15))
    shown = [np.ones(num, bool), rng.random(num) < 0.5, rng.random(num) < 0.5]
    for i in range(num):
        rows, columns = ((3, 3), (3, 5))[rng.integers(2)]
        cy, cx = rng.integers(5, height - 5), rng.integers(5, width - 5)
        y, x = np.mgrid[:height, :width].astype(np.float64)
        kernel = np.exp(-((y - cy) ** 2 / 2 + (x - cx) ** 2 / 2))
        kernel[(np.abs(y - cy) > rows / 2) | (np.abs(x - cx) > columns / 2)] = 0
        kernel /= kernel.max()
        amplitude = rng.choice((-80, -60, 60, 80))
        for plane in range(3):
            if shown[plane][i]:
                captures[plane] = np.clip(captures[plane] + kernel * amplitude, 0, 255)
                masks[plane] |= kernel > 0.1
    top, left = int(tops[tile // 2]), lefts[tile % 2]
    window = (slice(top, top + 128), slice(left, left + 128))
    wanted = masks[0] & ~masks[1] & ~masks[2]
    tile_CHW = np.stack([plane[window] for plane in captures]).astype(np.float32) / 255
    return tile_CHW, wanted[window]


def rate(samples: Iterable[int], seconds: float) -> float:
    """Samples per second; ``samples`` yields how many each step gave."""
    num, start = 0, time.perf_counter()
    for made in samples:
        num += made
        if (elapsed := time.perf_counter() - start) > seconds:
            return num / elapsed
    return num / (time.perf_counter() - start)


def each(get: Callable[[int, Generator], object], order: Iterable[int]) -> Iterator[int]:
    """Take samples one by one."""
    for index in order:
        get(index, np.random.default_rng((0, 0, index)))
        yield 1


def out_of_the_cache(path: Path) -> None:
    """Have the system forget the pages of a file that nobody maps."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def own_megabytes() -> float:
    """Memory of this process that it shares with nobody."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(r"RssAnon:\s+(\d+)", status)
    assert found is not None
    return int(found[1]) / 1024


@click.command()
@click.option("--strips", "num", type=click.IntRange(min=1), default=518)
@click.option("--seconds", type=float, default=10.0)
@click.option("--dtype", type=click.Choice(["uint8", "float32"]), default="float32")
def main(num: int, seconds: float, dtype: str) -> None:
    """Print samples per second of both, and what a process holds in memory."""
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        drawn = [draw(np.random.default_rng(i), _SIZE)[0] for i in range(8)]
        paths = [root / "strips" / f"{i:04d}.tif" for i in range(num)]
        for i, path in enumerate(paths):
            planes.write(path, drawn[i % 8].astype(dtype))
        order = np.random.default_rng(0).permutation(num * 16).tolist()

        start = time.perf_counter()
        path = pack(paths, root / "packed", "0" * 64).path
        packing = time.perf_counter() - start
        old = rate(each(lambda i, rng: old_tile(paths, i, rng), order), seconds)
        out_of_the_cache(path)
        tiles = Tiles(Strips(path), TaskConfig())
        before = own_megabytes()
        cold = rate(each(tiles.get, order), 1e9)  # a whole epoch: every page is read once
        warm = rate(each(tiles.get, (order[i % len(order)] for i in count())), seconds)
        grown = own_megabytes() - before
        batches = loader(tiles, TrainConfig(batch_size=16), shuffle=True)
        loaded = rate((len(batch["mask"]) for batch in batches), seconds)

        click.echo(
            f"{num} strips of {_SIZE[0]}x{_SIZE[1]} {dtype}, tiles of 128, one process, one thread"
        )
        click.echo(f"old method          {old:8.1f} samples/s")
        for name, ours in (("cold file cache", cold), ("warm", warm), ("in batches of 16", loaded)):
            click.echo(f"{name:19} {ours:8.1f} samples/s  {ours / old:6.1f}x")
        click.echo(
            f"packed in {packing:.1f} s to {tiles.strips.num_bytes / 1e6:.0f} MB; "
            f"an epoch adds {grown:.1f} MB to the process' own memory"
        )


if __name__ == "__main__":
    main()

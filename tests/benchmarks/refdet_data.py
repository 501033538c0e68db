"""What the data path of refdet costs: frames of a video, and whole episodes, beside the old way.

The old way opens the video anew for every frame and seeks, opens references for every frame that
is searched for them, changes frames at their full size, and forgets everything. One process, one
thread, unless workers are asked for; the ways take turns.

python -m tests.benchmarks.refdet_data [--video FILE.mp4] [--size 640] [--turns 3]
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import cv2
import numpy as np
import torch
from numpy.random import Generator

from engineworks.runtime import images
from engineworks.runtime.frames import Frames
from engineworks.runtime.objects import Frame, ObjectData, read_objects
from engineworks.runtime.preprocess import PreprocessSpec, apply
from engineworks.runtime.tensors import Array
from engineworks.runtime.video import VideoFile
from engineworks.training.config import TrainConfig
from engineworks.training.data import loader
from engineworks.training.systems.refdet import data
from engineworks.training.systems.refdet.config import (
    EncoderConfig,
    EpisodesConfig,
    StageConfig,
    TaskConfig,
)
from engineworks.training.systems.refdet.data import Episodes
from engineworks.training.systems.refdet.sample import sample

_WAYS, _QUERIES, _SHOTS = 2, 4, 3  # of the published protocol
_NUM_EPISODES = 12  # of a turn
_NUM_READS = 60


def configuration(size: int, workers: int = 0) -> TaskConfig:
    return TaskConfig(
        preprocess=PreprocessSpec(size=(size, size), resize="letterbox"),
        reference_preprocess=PreprocessSpec(size=(256, 256), resize="letterbox"),
        encoder=EncoderConfig(name="resnet18", weights="none"),
        stages=(StageConfig(name="only"),),
        train=TrainConfig(batch_size=_WAYS * _QUERIES, workers=workers),
        episodes=EpisodesConfig(num=_NUM_EPISODES, ways=_WAYS, objects=_WAYS, shots=_SHOTS),
    )


def old_episode(found: ObjectData, config: TaskConfig, rng: Generator) -> tuple[Array, Array]:
    """Frames (B, 3, H, W) and, for each of them, all references of its object."""
    changed, pictures = [], []
    names = rng.permutation(sorted(found.references))
    for name in names[:_WAYS]:
        places = [i for i, each in enumerate(found.frames) if name in each.objects]
        for i in rng.choice(places, _QUERIES):
            frame = found.frames[int(i)]
            image = images.read(frame.frame.path)
            spec = config.preprocess.model_copy(update={"size": image.shape[:2]})
            image, _, _ = data.change(image, frame.boxes_N4, spec, config.augment, rng)
            changed.append(image)
            references = [images.read(r.frame.path) for r in found.references[name][:_SHOTS]]
            pictures += [data.shaded(each, config.augment, rng) for each in references]
    return apply(config.preprocess, changed), apply(config.reference_preprocess, pictures)


class Clock:
    """Milliseconds by name, a list each."""

    def __init__(self) -> None:
        self.times = defaultdict[str, list[float]](list)

    @contextmanager
    def __call__(self, name: str, num: int) -> Iterator[None]:
        """Note what one of the ``num`` things takes that are done meanwhile."""
        start = time.perf_counter()
        yield
        self.times[name].append((time.perf_counter() - start) / num * 1e3)

    def show(self) -> None:
        first = statistics.median(next(iter(self.times.values())))
        for name, values in self.times.items():
            middle = statistics.median(values)
            click.echo(f"  {name:28} {middle:8.2f} ms  {first / middle:7.1f}x")


def opened_anew(path: Path, index: int) -> None:
    capture = cv2.VideoCapture(str(path))
    capture.set(cv2.CAP_PROP_POS_FRAMES, index)
    assert capture.read()[0]
    capture.release()


def of_video(path: Path, turns: int) -> Clock:
    """A frame of a video, by each way."""
    clock, cache = Clock(), Frames(2**31)
    with VideoFile(path) as video:
        order = np.random.default_rng(0).integers(0, len(video), _NUM_READS).tolist()
    for index in order:
        cache.read(Frame(path, index))
    for _ in range(turns):
        with clock("opened anew for each", _NUM_READS):
            for index in order:
                opened_anew(path, index)
        for name, chosen in (("in any order", order), ("in ascending order", sorted(order))):
            with clock(name, _NUM_READS), VideoFile(path) as video:
                for index in chosen:
                    video.read(index)
        with clock("kept in memory", _NUM_READS):
            for index in order:
                cache.read(Frame(path, index))
    cache.close()
    return clock


def of_episodes(found: ObjectData, size: int, turns: int, workers: int) -> Clock:
    """A whole episode, by each way."""
    clock, config = Clock(), configuration(size, workers)
    kept = Episodes(found, config)
    loaded: Any = loader(Episodes(found, config), config.train, shuffle=False, batched=True)
    for _ in loaded:  # starts the workers, which stay
        pass
    for turn in range(turns):
        seeds = [(turn, i) for i in range(_NUM_EPISODES)]
        with clock("old way", _NUM_EPISODES):
            for seed in seeds:
                old_episode(found, config, np.random.default_rng(seed))
        fresh = Episodes(found, config)
        for name, episodes in (("nothing in memory", fresh), ("all in memory", kept)):
            for frame in kept.data.frames:
                kept.frames.read(frame.frame)
            with clock(name, _NUM_EPISODES):
                for seed in seeds:
                    episodes.get(0, np.random.default_rng(seed))
        loaded.sampler.set_epoch(turn)
        with clock(f"from {workers} workers", _NUM_EPISODES):
            for _ in loaded:
                pass
    return clock


@click.command()
@click.option("--video", type=click.Path(path_type=Path, exists=True), help="Default: a drawn one.")
@click.option("--size", type=click.IntRange(min=64), default=640)
@click.option("--turns", type=click.IntRange(min=1), default=3)
@click.option("--workers", type=click.IntRange(min=0), default=1)
def main(video: Path | None, size: int, turns: int, workers: int) -> None:
    """Print milliseconds per frame and per episode, the median of all turns."""
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "data"
        sample(root, size=size, num_toys=16, num_train=48, num_val=1, num_test=1)
        video = video or root / "video.mp4"
        click.echo(f"a frame of {video.name}, {_NUM_READS} at random")
        of_video(video, turns).show()
        click.echo(
            f"an episode of {_WAYS} objects: {_QUERIES} frames of {size} px and {_SHOTS} "
            f"references each"
        )
        of_episodes(read_objects(root, "train"), size, turns, workers).show()


if __name__ == "__main__":
    main()

r"""How much of the engine's speed is left of a video's end-to-end speed.

    python -m tests.benchmarks.refdet_video BUNDLE VIDEO --refs DIR [--backend auto] \
        [--precision auto] [--batch 1] [--rounds 5]

Engine: the graph ``detect`` on frames that are prepared already. End to end: ``infer`` as the
command line runs it, from the compressed file to numbered tracks in JSON lines, without and with
an annotated video. They take turns; medians of frames per second, the first round left out.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import click

from engineworks.runtime.bundle import read
from engineworks.runtime.infer import infer
from engineworks.runtime.preprocess import apply
from engineworks.runtime.sources import open_source
from engineworks.runtime.systems import Promptable, open_system, prompt
from engineworks.runtime.video import VideoFile

_ENGINE_FRAMES = 64


@click.command(help=__doc__, context_settings={"show_default": True})
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("video")
@click.option("--refs", type=click.Path(path_type=Path), required=True)
@click.option("--backend", default="auto")
@click.option("--precision", default="auto")
@click.option("--batch", default=1)
@click.option("--rounds", default=5)
def main(
    bundle: Path, video: str, refs: Path, backend: str, precision: str, batch: int, rounds: int
) -> None:
    opened = read(bundle)
    with closing(open_system(opened, backend=backend, precision=precision)) as system:
        assert isinstance(system, Promptable)
        prompt(system, refs)
        with VideoFile(Path(video)) as file:
            frames = [file.read(i) for i in range(min(_ENGINE_FRAMES, len(file)))]
        feeds = [
            system.feeds(apply(opened.manifest.preprocess, frames[i : i + batch]))
            for i in range(0, len(frames) - batch + 1, batch)
        ]

        def engine() -> int:
            for feed in feeds:
                for name, inputs in feed.items():
                    system.engines[name].run(inputs)
            return len(feeds) * batch

        def end_to_end(overlays: bool) -> int:
            with tempfile.TemporaryDirectory() as out:
                source = open_source(video)
                options = {"batch": batch, "jsonl": True, "overlays": overlays, "track": True}
                return infer(system, source, Path(out), **options).num_done

        ways: dict[str, Callable[[], int]] = {
            "engine": engine,
            "end to end": lambda: end_to_end(False),
            "end to end, annotated video": lambda: end_to_end(True),
        }
        speeds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds + 1):
            for name, run in ways.items():
                start = time.perf_counter()
                count = run()
                speeds[name].append(count / (time.perf_counter() - start))
        print(f"{system.backend} {system.precision}, batch {batch}, {frames[0].shape} frames")
        for name, found in speeds.items():
            # each round is held against its own engine: a machine that slows down slows both
            shares = [fps / engine for fps, engine in zip(found, speeds["engine"], strict=True)]
            share = statistics.median(shares[1:])
            print(f"{name}: {statistics.median(found[1:]):.1f} frames/s, {share:.1%} of the engine")


if __name__ == "__main__":
    main()

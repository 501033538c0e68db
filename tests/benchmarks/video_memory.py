r"""Peak memory of inference on a short and on a long video.

    python -m tests.benchmarks.video_memory BUNDLE VIDEO [--refs DIR] [--frames 300 --frames 3000]

The frames of VIDEO are shown over and over. Each length is run by ``cli.py infer`` in a fresh
process, with tracks, JSON lines and an annotated video.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from fractions import Fraction
from pathlib import Path

import click

from engineworks.runtime.video import VideoFile, VideoWriter

_RATE = 25


def repeat(source: Path, out: Path, num_frames: int) -> None:
    """Write a video of that many frames; its source's come again and again."""
    with VideoFile(source) as file:
        frames = [file.read(i) for i in range(len(file))]
    with VideoWriter(out, Fraction(_RATE)) as writer:
        for i in range(num_frames):
            writer.write(frames[i % len(frames)], i / _RATE)


@click.command(help=__doc__, context_settings={"show_default": True})
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("video", type=click.Path(path_type=Path))
@click.option("--refs", type=click.Path(path_type=Path), help="Of a system that searches.")
@click.option("--frames", "lengths", multiple=True, type=int, default=(300, 3000))
def main(bundle: Path, video: Path, refs: Path | None, lengths: tuple[int, ...]) -> None:
    searched = [] if refs is None else ["--refs", str(refs)]
    with tempfile.TemporaryDirectory() as folder:
        for length in lengths:
            source = Path(folder) / f"{length}.mp4"
            repeat(video, source, length)
            command = [sys.executable, "cli.py", "--quiet", "infer", str(bundle), *searched]
            command += ["--source", str(source), "--out", f"{folder}/{length}"]
            process = subprocess.Popen([*command, "--jsonl", "--save-overlays"])
            _, status, usage = os.wait4(process.pid, 0)
            if status:
                raise click.ClickException(f"{' '.join(command)} failed")
            lines = (Path(folder) / str(length) / "results.jsonl").read_text().count("\n")
            click.echo(f"{lines} frames: peak {usage.ru_maxrss / 1024:.1f} MiB")


if __name__ == "__main__":
    main()

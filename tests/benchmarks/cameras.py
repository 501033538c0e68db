r"""Eight videos at once in one process, against the engine alone, one video, and eight processes.

    python -m tests.benchmarks.cameras BUNDLE VIDEO [--sources 8] [--frames 200] [--broken 2]

Copies of VIDEO, its frames over and over, are read by ``cli.py infer``, each run in processes of
its own. Of the broken ones one is cut off in its middle and one is no video at all.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import click

from engineworks.runtime import video
from engineworks.runtime.systems import open_bundle
from tests.benchmarks.video_memory import repeat

BATCH = 8


def engine_alone(bundle: Path, source: Path, seconds: float) -> float:
    """Frames per second of ``System.infer`` on frames that are decoded already."""
    frames = [frame.image for frame, _ in zip(video.frames(source), range(4 * BATCH), strict=False)]
    with open_bundle(bundle) as system:
        for start in range(0, len(frames), BATCH):
            system.infer(frames[start : start + BATCH])
        begin, done = time.perf_counter(), 0
        while time.perf_counter() - begin < seconds:
            start = done % len(frames)
            done += len(system.infer(frames[start : start + BATCH]))
        return done / (time.perf_counter() - begin)


def infer(bundle: Path, sources: Sequence[Path], out: Path) -> subprocess.Popen[str]:
    given = [part for source in sources for part in ("--source", str(source))]
    command = [sys.executable, "cli.py", "--quiet", "infer", str(bundle), *given]
    command += ["--out", str(out), "--batch", str(BATCH), "--jsonl"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def ended(process: subprocess.Popen[str]) -> tuple[float, float]:
    """Frames per second as the command tells them, and its peak memory in MiB."""
    assert process.stdout is not None
    text = process.stdout.read()
    _, _, usage = os.wait4(process.pid, 0)
    told = re.search(r"([\d.]+) images/s", text)
    if told is None:
        raise click.ClickException(f"a run failed: {text}")
    return float(told[1]), usage.ru_maxrss / 1024


@click.command(help=__doc__, context_settings={"show_default": True})
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--sources", "num", type=int, default=8)
@click.option("--frames", type=int, default=200, help="Of each source.")
@click.option("--broken", type=int, default=2)
@click.option("--seconds", type=float, default=10.0, help="That the engine is timed alone.")
@click.option("--only", default="engine,one,many,processes,broken", help="What is run.")
def main(
    bundle: Path, source: Path, num: int, frames: int, broken: int, seconds: float, only: str
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first = folder / "0.mp4"
        repeat(source, first, frames)
        videos = [first]
        for i in range(1, num):
            videos.append(folder / f"{i}.mp4")
            videos[-1].write_bytes(first.read_bytes())
        if "engine" in only:
            click.echo(f"engine alone: {engine_alone(bundle, first, seconds):.1f} frames/s")
        if "one" in only:
            rate, memory = ended(infer(bundle, videos[:1], folder / "one"))
            click.echo(f"1 source: {rate:.1f} frames/s, peak {memory:.0f} MiB")
        if "many" in only:
            begin = time.perf_counter()
            rate, memory = ended(infer(bundle, videos, folder / "many"))
            took = time.perf_counter() - begin
            click.echo(
                f"{num} sources, one process: {rate:.1f} frames/s ({num * frames / took:.1f} with "
                f"its start), peak {memory:.0f} MiB"
            )
        if "processes" in only:
            begin = time.perf_counter()
            running = [infer(bundle, [each], folder / f"p{i}") for i, each in enumerate(videos)]
            memory = sum(memory for _, memory in map(ended, running))
            took = time.perf_counter() - begin
            click.echo(
                f"{num} processes: {num * frames / took:.1f} frames/s, start included, "
                f"peak {memory:.0f} MiB together"
            )
        if "broken" in only:
            content = first.read_bytes()
            for i in range(broken):
                videos[i].write_bytes(content[: len(content) // 2] if i % 2 else b"no video")
            rate, _ = ended(infer(bundle, videos, folder / "broken"))
            told = json.loads((folder / "broken" / "counters.json").read_text())["sources"]
            done = [told[each.stem]["done"] for each in videos]
            click.echo(f"{broken} of {num} broken: {rate:.1f} frames/s, frames done {done}")


if __name__ == "__main__":
    main()

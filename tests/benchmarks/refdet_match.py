r"""Matching without training on real pictures: two videos, and categories that are all new.

    python -m tests.benchmarks.refdet_match BUNDLE DATA --out DIR [--only video|oneshot] \
        [--precision auto] [--frames N]

BUNDLE is one of ``train refdet --config match``; DATA holds ``video/{tlp_drone1,otb_man_frames}``
and ``oneshot``. Each video is searched, frame by frame, for what its first three boxes show: with
what is around them (boxes of frames), as cut out (pictures), and for the other video's object. The
sets of ``oneshot`` are searched by the references that their files name.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import click

from engineworks.runtime.bundle import read
from engineworks.runtime.objects import read_objects
from engineworks.runtime.references import Prototypes, View
from engineworks.runtime.systems import open_system
from engineworks.runtime.systems.refdet import System
from engineworks.runtime.video import VideoFile
from tests.benchmarks.refdet_real import write_videos

_CROPS = 3
_VIDEOS = ("man", "drone")


def first_boxes(source: Path, folder: Path, name: str) -> list[View]:
    """The first frames of a video with its object's boxes."""
    (path,) = (folder / "samples" / name).glob("*.mp4")
    if name == "drone":
        text = (source / "tlp_drone1/groundtruth.csv").read_text().splitlines()[1:]
        rows = [[float(v) for v in line.split(",")[1:5]] for line in text[:_CROPS]]
    else:
        text = (source / "otb_man_frames/groundtruth_rect.txt").read_text().splitlines()
        rows = [[float(v) for v in line.split(",")] for line in text[:_CROPS]]
    with VideoFile(path) as video:
        return [
            View(video.read(i).copy(), (x, y, x + w, y + h)) for i, (x, y, w, h) in enumerate(rows)
        ]


def videos(system: System, source: Path, out: Path) -> Iterator[tuple[str, dict[str, float]]]:
    """Metrics by name of video and kind of references."""
    if not out.is_dir():
        write_videos(source, out)
    views = {name: first_boxes(source, out / name, name) for name in _VIDEOS}
    for name, other in zip(_VIDEOS, reversed(_VIDEOS), strict=True):
        for kind, pictures in (
            ("boxes", views[name]),
            ("pictures", [view.cut() for view in views[name]]),
            ("the other's", views[other]),
        ):
            made = system.encode({name: pictures})
            system.prompt(Prototypes((name,), made.rows_NP, made.encoder))
            yield f"{name}, {kind}", system.evaluate(out / name).metrics


def sets(system: System, source: Path, out: Path) -> Iterator[tuple[str, dict[str, float]]]:
    """Metrics of new and of known categories."""
    for part in ("novel", "val_seen"):
        folder = out / part
        if not folder.is_dir():
            folder.mkdir(parents=True)
            (folder / "images").symlink_to((source / "images").resolve())
            for kind in ("annotations", "references"):
                shutil.copy(source / f"{kind}_{part}.json", folder / f"{kind}_test.json")
        found = read_objects(folder, "test")
        system._prompt = None  # by the folder's own references
        yield f"oneshot {part}, {len(found.frames)} pictures", system.evaluate(folder).metrics


@click.command(help=__doc__)
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.argument("data", type=click.Path(path_type=Path, exists=True))
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--only", type=click.Choice(["video", "oneshot"]))
@click.option("--precision", default="auto")
@click.option("--backend", default="auto")
@click.option("--frames", type=int, help="So many of each object alone.")
def main(
    bundle: Path,
    data: Path,
    out: Path,
    only: str | None,
    precision: str,
    backend: str,
    frames: int | None,
) -> None:
    with closing(open_system(read(bundle), backend=backend, precision=precision)) as system:
        assert isinstance(system, System)
        system.config = system.config.model_copy(update={"max_evaluated": frames})
        click.echo(f"{system.backend} {system.precision}")
        rows = []
        if only != "oneshot":
            rows.append(videos(system, data / "video", out / "videos"))
        if only != "video":
            rows.append(sets(system, data / "oneshot", out / "oneshot"))
        for each in rows:
            for name, metrics in each:
                values = "  ".join(f"{key} {value:.3f}" for key, value in metrics.items())
                click.echo(f"{name:32} {values}")
                with (out / "metrics.jsonl").open("a") as file:
                    file.write(json.dumps({"name": name, **metrics}) + "\n")


if __name__ == "__main__":
    main()

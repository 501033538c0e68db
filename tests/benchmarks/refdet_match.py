r"""Matching without training on real pictures: two videos, and categories that are all new.

    python -m tests.benchmarks.refdet_match BUNDLE DATA --out DIR [--only video|sets ...] \
        [--precision auto] [--frames N]

BUNDLE is one of ``train refdet --config match|learn``; DATA holds ``oneshot``, ``playing_cards``,
``bccd`` and ``video/{tlp_drone1,otb_man_frames}``. Each video is searched, frame by frame, for what
its first three boxes show: with what is around them (boxes of frames), as cut out (pictures), and
for the other video's object; and once more with the object followed. The sets of ``oneshot`` are
searched by the references that their files name, the others for what is held out elsewhere, by
boxes of training frames.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import product
from pathlib import Path

import click
import numpy as np

from engineworks.runtime.bundle import read
from engineworks.runtime.metrics import precision_20px, st_iou, success_auc
from engineworks.runtime.objects import read_objects
from engineworks.runtime.references import Prototypes, View
from engineworks.runtime.systems import open_system
from engineworks.runtime.systems.refdet import System
from engineworks.runtime.tensors import Array
from engineworks.runtime.tracking import Tracks
from engineworks.runtime.video import VideoFile, frames
from tests.benchmarks.refdet_real import SETS, write_videos

_CROPS = 3
_HIDDEN = range(60, 90)
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


def followed(system: System, source: Path, out: Path) -> Iterator[tuple[str, dict[str, float]]]:
    """Metrics of each video, its object followed from the first frame to the last; as it is, and
    with grey frames in the middle.
    """
    for name, hidden in product(_VIDEOS, (range(0), _HIDDEN)):
        made = system.encode({name: first_boxes(source, out / name, name)})
        system.prompt(Prototypes((name,), made.rows_NP, made.encoder))
        if (follower := system.follower()) is None:
            return
        truth = {
            each.frame.index: each.boxes_N4
            for each in read_objects(out / name, "test").frames
            if each.frame.index is not None
        }
        (path,) = (out / name / "samples" / name).glob("*.mp4")
        tracks, numbers = Tracks(), dict[int, int | None]()
        found: dict[int, Array] = {}
        seconds = {True: 0.0, False: 0.0}  # searched whole, and not
        for i, each in enumerate(frames(str(path))):
            before, start = follower.num_searched, time.perf_counter()
            image = np.full_like(each.image, 114) if i in hidden else each.image
            (result,) = follower.infer([image])
            seconds[follower.num_searched > before] += time.perf_counter() - start
            if result.objects and i in truth:
                found[i] = np.array(result.objects[0].box, np.float32)
                numbers[i] = tracks.update(result).objects[0].track
            else:
                tracks.update(result)
        num_whole, num_local = follower.num_searched, follower.num_followed
        yield (
            f"{name}, followed{f', hidden in frames {hidden}' if hidden else ''}",
            {
                "numbers": len({number for number in numbers.values() if number is not None}),
                "st_iou": st_iou(found, {i: t for i, t in truth.items() if i not in hidden}),
                "success_auc": success_auc(found, truth),
                "precision_20px": precision_20px(found, truth),
                "searched": num_whole,
                "followed": num_local,
                "ms_searched": 1e3 * seconds[True] / max(1, num_whole),
                "ms_followed": 1e3 * seconds[False] / max(1, num_local),
            },
        )


def held_out(source: Path, folder: Path, names: Sequence[str]) -> None:
    """A data set's labels of some categories alone."""
    folder.mkdir(parents=True)
    (folder / "images").symlink_to((source / "images").resolve())
    for split in ("train", "test"):
        labels = json.loads((source / f"annotations_{split}.json").read_text())
        kept = {each["id"] for each in labels["categories"] if each["name"] in names}
        boxes = [each for each in labels["annotations"] if each["category_id"] in kept]
        text = json.dumps({**labels, "annotations": boxes})
        (folder / f"annotations_{split}.json").write_text(text)


def sets(system: System, data: Path, out: Path) -> Iterator[tuple[str, dict[str, float]]]:
    """Metrics of categories of pictures."""
    for part in ("novel", "val_seen"):
        folder, source = out / part, data / "oneshot"
        if not folder.is_dir():
            folder.mkdir(parents=True)
            (folder / "images").symlink_to((source / "images").resolve())
            for kind in ("annotations", "references"):
                shutil.copy(source / f"{kind}_{part}.json", folder / f"{kind}_test.json")
    for part, (folder_name, names) in SETS.items():
        if not (out / part).is_dir():
            held_out(data / folder_name, out / part, names)
    for part in ("novel", "val_seen", *SETS):
        system._prompt = None  # by the folder's own references
        yield part, system.evaluate(out / part).metrics


@click.command(help=__doc__)
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.argument("data", type=click.Path(path_type=Path, exists=True))
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--only", type=click.Choice(["video", "followed", "sets"]), multiple=True)
@click.option("--precision", default="auto")
@click.option("--backend", default="auto")
@click.option("--frames", "num_frames", type=int, help="So many of each object alone.")
def main(
    bundle: Path,
    data: Path,
    out: Path,
    only: tuple[str, ...],
    precision: str,
    backend: str,
    num_frames: int | None,
) -> None:
    with closing(open_system(read(bundle), backend=backend, precision=precision)) as system:
        assert isinstance(system, System)
        system.config = system.config.model_copy(update={"max_evaluated": num_frames})
        click.echo(f"{system.backend} {system.precision}")
        if not (out / "videos").is_dir():
            write_videos(data / "video", out / "videos")
        rows = {
            "video": videos(system, data / "video", out / "videos"),
            "followed": followed(system, data / "video", out / "videos"),
            "sets": sets(system, data, out / "sets"),
        }
        for each in (rows[name] for name in only or rows):
            for name, metrics in each:
                values = "  ".join(f"{key} {value:.3f}" for key, value in metrics.items())
                click.echo(f"{name:32} {values}")
                with (out / "metrics.jsonl").open("a") as file:
                    file.write(json.dumps({"name": name, **metrics}) + "\n")


if __name__ == "__main__":
    main()

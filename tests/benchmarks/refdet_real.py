r"""Objects of real pictures that training never saw, found by their references.

    python -m tests.benchmarks.refdet_real DATA --out DIR [--only cards|cells] [--config FILE] \
        [--set key=value ...]

DATA holds ``playing_cards``, ``bccd`` (COCO files), ``video/{tlp_drone1,otb_man_frames}``, and
``weights`` of a MobileNetV2 that knows ImageNet: the encoder, frozen. All else is learned from the
training frames of one of the first two. Some of its classes are held out: the largest window of a
frame without such an object is kept, so that none of its pixels is ever learned. Judged is the
exported bundle, on the test frames, prompted with up to five boxes that were cut out of training
frames: by the held-out classes, and by those that were learned. Then both videos are searched for
what is in their first boxes; nothing of them was learned either. Finished runs are not repeated.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterable, Sequence
from contextlib import closing
from fractions import Fraction
from itertools import product
from pathlib import Path

import click
import numpy as np

from engineworks.export.trace import trace
from engineworks.runtime import boxes, images
from engineworks.runtime.bundle import Bundle, read
from engineworks.runtime.frames import Frames
from engineworks.runtime.objects import Frame, LabelledFrame, Reference, read_objects
from engineworks.runtime.systems import open_system
from engineworks.runtime.tensors import Array
from engineworks.runtime.video import VideoWriter
from engineworks.training.config import load_config
from engineworks.training.train import train

# folder of a set, and what is held out of it
SETS = {"cards": ("playing_cards", ("king", "nine")), "cells": ("bccd", ("WBC",))}
SETTINGS = (
    "preprocess.size=[320, 320]",
    "reference_preprocess.size=[224, 224]",
    "reference_preprocess.mean=[0.5, 0.5, 0.5]",
    "reference_preprocess.std=[0.5, 0.5, 0.5]",
    "encoder.name=mobilenetv2_100",
    "encoder.args={pad_type: same}",
    "detector.scales=[3, 4, 5]",
    "stages=[{name: all, weights: {prototype: 1.0, supervised: 1.0}}]",
    "train.epochs=40",
)
WEIGHTS = "weights/mobilenetv2_100_imagenet_from_int8_samepad.safetensors"
_LEAST = 0.25  # of a frame that a window must keep, and of a box that must be in it
_CROPS = 3  # references of a video


def window(frame: LabelledFrame, held_out: Sequence[str], size: tuple[int, int]) -> Array:
    """xyxy of the largest part of a (height, width) frame without a held-out object."""
    forbidden = frame.boxes_N4[[name in held_out for name in frame.objects]]
    xs = sorted({0, size[1], *np.floor(forbidden[:, 0]), *np.ceil(forbidden[:, 2])})
    ys = sorted({0, size[0], *np.floor(forbidden[:, 1]), *np.ceil(forbidden[:, 3])})
    windows = np.array([(x1, y1, x2, y2) for x1, y1, x2, y2 in product(xs, ys, xs, ys)], np.float64)
    windows = windows[(windows[:, 2] > windows[:, 0]) & (windows[:, 3] > windows[:, 1])]
    free = (boxes.iou(windows, forbidden) == 0).all(axis=1)
    return np.asarray(windows[free][boxes.areas(windows[free]).argmax()].astype(int))


def cropped(
    frame: LabelledFrame, image: Array, held_out: Sequence[str]
) -> tuple[Array, Array, list[str]]:
    """The window of a frame, and the boxes of which enough is in it, with their names."""
    x1, y1, x2, y2 = window(frame, held_out, image.shape[:2])
    moved = frame.boxes_N4 - [x1, y1, x1, y1]
    inside = boxes.clip(moved, y2 - y1, x2 - x1)
    kept = boxes.areas(inside) >= _LEAST * boxes.areas(moved)
    kept &= [name not in held_out for name in frame.objects]
    return image[y1:y2, x1:x2], inside[kept], [frame.objects[i] for i in np.flatnonzero(kept)]


def write_coco(
    path: Path, labelled: Iterable[tuple[str, Array, Array, Sequence[str]]], names: Sequence[str]
) -> None:
    """Write frames (file, image, boxes, names) in COCO's form, and those names alone."""
    pictures, annotations = [], []
    for i, (file, image, boxes_N4, found) in enumerate(labelled):
        height, width = image.shape[:2]
        pictures.append({"id": i, "file_name": file, "width": width, "height": height})
        for (x1, y1, x2, y2), name in zip(boxes_N4.tolist(), found, strict=True):
            if name in names:
                box, category = [x1, y1, x2 - x1, y2 - y1], names.index(name)
                annotations.append({"image_id": i, "category_id": category, "bbox": box})
    categories = [{"id": i, "name": name} for i, name in enumerate(names)]
    content = {"images": pictures, "categories": categories, "annotations": annotations}
    path.write_text(json.dumps(content), encoding="utf-8")


def hold_out(source: Path, out: Path, held_out: Sequence[str]) -> None:
    """Make ``novel`` (training without the held-out objects, test by them) and ``seen`` in ``out``.

    ``seen`` has the same test frames, judged by the objects that training has seen.
    """
    frames = Frames(0)
    learned = read_objects(source, "train")
    seen = sorted(set(learned.references) - set(held_out))
    test = read_objects(source, "test")  # its references are cut out of training frames
    for part in ("novel", "seen"):
        for name, references in test.references.items():
            for i, reference in enumerate(references):
                picture = frames.reference(reference)
                images.write(out / part / "references" / name / f"{i}.png", picture)
    train_frames = []
    for i, each in enumerate(learned.frames):
        image, found, names = cropped(each, frames.read(each.frame), held_out)
        whole = frames.read(each.frame)
        if names and image.size >= _LEAST * whole.size:
            images.write(out / "novel" / "images" / f"train/{i:04d}.png", image)
            train_frames.append((f"train/{i:04d}.png", image, found, names))
    write_coco(out / "novel" / "annotations_train.json", train_frames, seen)
    for part, judged in (("novel", list(held_out)), ("seen", seen)):
        test_frames = []
        for each in test.frames:
            file = f"test/{each.frame.path.name}"
            (out / part / "images/test").mkdir(parents=True, exist_ok=True)
            shutil.copyfile(each.frame.path, out / part / "images" / file)
            image = frames.read(each.frame)
            test_frames.append((file, image, each.boxes_N4, each.objects))
        write_coco(out / part / "annotations_test.json", test_frames, judged)


def write_video(out: Path, name: str, source: Sequence[Path] | Path, boxes_N4: Array) -> None:
    """Add a video to a folder as ``read_objects`` takes it; its first frames become references.

    Args:
        source: an MP4 file, or pictures, which are encoded.
        boxes_N4: (frames, 4) xyxy of the object.
    """
    folder = out / "samples" / name
    folder.mkdir(parents=True)
    if isinstance(source, Path):
        shutil.copyfile(source, folder / "video.mp4")
    else:
        with VideoWriter(folder / "video.mp4", Fraction(25)) as writer:
            for i, path in enumerate(source):
                writer.write(images.read(path), i / 25)
    frames = Frames(0)
    for i in range(_CROPS):
        box = tuple(float(v) for v in boxes_N4[i])
        reference = Reference(Frame(folder / "video.mp4", i), box)  # type: ignore[arg-type]
        images.write(folder / "object_images" / f"{i}.png", frames.reference(reference))
    frames.close()
    shown = [
        {"frame": i, "x1": x1, "y1": y1, "x2": x2, "y2": y2}
        for i, (x1, y1, x2, y2) in enumerate(boxes_N4.tolist())
        if i >= _CROPS
    ]
    video = {"video_id": name, "annotations": [{"bboxes": shown}]}
    (out / "annotations.json").write_text(json.dumps([video]), encoding="utf-8")


def write_videos(source: Path, out: Path) -> None:
    """Both videos, a folder each."""
    with (source / "tlp_drone1/groundtruth.csv").open() as file:
        rows = [[float(row[key]) for key in "xywh"] for row in csv.DictReader(file)]
    drone = np.array(rows)
    man = np.loadtxt(source / "otb_man_frames/groundtruth_rect.txt", delimiter=",")
    for boxes_N4 in (drone, man):
        boxes_N4[:, 2:] += boxes_N4[:, :2]
    write_video(out / "drone", "drone", source / "tlp_drone1/tlp_drone1.mp4", drone)
    pictures = sorted((source / "otb_man_frames/img").glob("*.jpg"))
    write_video(out / "man", "man", pictures, man)


def trained(data: Path, root: Path, config: Path | None, settings: Sequence[str]) -> Bundle:
    """The bundle of a run on a folder; both are made where they are not there."""
    if not (root / "bundle").is_dir():
        run = train(load_config("refdet", config, settings), data, root / "run")
        trace(run.root, root / "bundle")
    return read(root / "bundle")


@click.command()
@click.argument("data", type=click.Path(path_type=Path, exists=True))
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--only", type=click.Choice(list(SETS)), help="One of the sets.")
@click.option("--config", type=click.Path(path_type=Path, exists=True))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE")
def main(
    data: Path, out: Path, only: str | None, config: Path | None, overrides: tuple[str, ...]
) -> None:
    """Print average precision of unseen and of seen classes, and ST-IoU of the videos."""
    # a configuration of one's own says all
    own = () if config else (*SETTINGS, f"encoder.weights={data / WEIGHTS}")
    rides = out / "videos"
    if not rides.is_dir():
        write_videos(data / "video", rides)
    for name in [only] if only else SETS:
        folder, held_out = SETS[name]
        if not (out / name).is_dir():
            hold_out(data / folder, out / name, held_out)
        bundle = trained(out / name / "novel", out / name, config, (*own, *overrides))
        click.echo(f"{folder} without {', '.join(held_out)}")
        with closing(open_system(bundle)) as system:
            for part in (out / name / "novel", out / name / "seen", *sorted(rides.iterdir())):
                metrics = system.evaluate(part).metrics
                values = (f"{key} {value:.4f}" for key, value in metrics.items())
                click.echo(f"  {part.name:6} {'  '.join(values)}")


if __name__ == "__main__":
    main()

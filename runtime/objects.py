"""Labelled objects: COCO files, and videos with boxes, to frames and references.

Two layouts are known:

* COCO: ``annotations_{train,val,test}.json`` beside ``images/``, a category per object; files are
  named from ``images/``, with or without that in front. Pictures of an object lie in
  ``references/<name>/``; or ``references_{train,val,test}.json`` says which boxes are taken, as
  ``{id of a category: [ids of annotations]}``; where there is neither, boxes of the object are cut
  out of training frames that show it, or else of the split's own. A frame that a reference was cut
  from is not searched. Crowds are left out. Boxes are pixels of the upright picture, EXIF's turn
  included.
* videos: ``annotations.json``, a list of ``{"video_id", "annotations": [{"bboxes": [{"frame", "x1",
  "y1", "x2", "y2"}]}]}``, and ``samples/<video_id>/`` with one video and ``object_images/``. A
  video may say of which ``object`` it is; otherwise its own id is the object's name. Objects, not
  videos, are divided between training and test. Only frames with a box are known: nothing says
  that others do not show the object.

Labels that contradict each other or the picture's size are refused; of a picture no more than its
header is read.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Literal, TypeAlias

import numpy as np
from pydantic import FiniteFloat, NonNegativeInt, TypeAdapter

from engineworks.runtime import folders, images, labels
from engineworks.runtime.coco import MIN_AREA, CocoFile, Part, clipped, validated
from engineworks.runtime.errors import DatasetError, InputError
from engineworks.runtime.folders import Tally
from engineworks.runtime.labels import Box, Faults, Item, Labelled
from engineworks.runtime.names import file_name
from engineworks.runtime.references import pictures_in
from engineworks.runtime.sources import VIDEO_SUFFIXES
from engineworks.runtime.tensors import Array
from engineworks.runtime.video import VideoFile

Split: TypeAlias = Literal["train", "val", "test"]

_SPLITS: tuple[Split, ...] = ("train", "val", "test")
_TEST_SHARE = 0.1  # of the objects of videos
_NUM_CUT = 5  # references that are cut out of frames, at most
_MIN_SIDE = 12.0  # pixels of a box that is cut out


@dataclass(frozen=True)
class Frame:
    """A picture, or a frame of a video.

    Attributes:
        index: of the frame; None: ``path`` is a picture.
    """

    path: Path
    index: int | None = None


@dataclass(frozen=True)
class Reference:
    """A picture of an object.

    Attributes:
        box: xyxy in pixels: what of the frame shows it; None: all of it.
    """

    frame: Frame
    box: Box | None = None


@dataclass(frozen=True, eq=False)
class LabelledFrame:
    """A frame and what is on it.

    Attributes:
        boxes_N4: (N, 4) float32 xyxy in pixels.
        objects: name of each box' object.
        video: id of the video that it is of; None for a picture.
    """

    frame: Frame
    boxes_N4: Array
    objects: tuple[str, ...]
    video: str | None = None


@dataclass(frozen=True)
class ObjectData:
    """A split of a data set.

    Attributes:
        frames: in the order of their file.
        references: object -> at least one.
    """

    frames: tuple[LabelledFrame, ...]
    references: Mapping[str, tuple[Reference, ...]]

    def files(self) -> list[Path]:
        """All files that frames and references lie in, each once."""
        paths = {each.frame.path for each in self.frames}
        paths |= {each.frame.path for found in self.references.values() for each in found}
        return sorted(paths)


def object_splits(root: Path) -> tuple[Split, ...]:
    """What a folder is divided into, ``train`` first; videos have no ``val``."""
    if _holds_videos(root):
        return "train", "test"
    return tuple(name for name in _SPLITS if (root / f"annotations_{name}.json").is_file())


def read_objects(
    root: Path, split: Split, *, hold_out: Sequence[str] = (), seed: int = 42
) -> ObjectData:
    """Read one split.

    Args:
        hold_out: objects that training never sees: frames with one of them are left out of
            ``train``, and the other splits look for no other object.
        seed: of the division of videos' objects.

    Raises:
        DatasetError: neither layout, a damaged file, a missing picture or video, an object without
            references, an unknown one to hold out, or nothing left.
    """
    if _holds_videos(root):
        found = _read_videos(root, split, hold_out, seed)
    else:
        found = _read_coco(root, split, hold_out)
    if not found.frames:
        raise DatasetError(
            f"{root} has no frames for '{split}' that are not references or left out",
            fix="add labelled frames, put pictures into references/, or hold out fewer objects",
        )
    if not found.references:
        raise DatasetError(
            f"{root} has no box for '{split}' of an object that is to be found",
            fix="label the frames, or leave the split out, or hold out other objects",
        )
    return found


def object_labels(root: Path) -> Labelled:
    """All splits, as ``runtime.survey`` looks at them.

    Raises:
        DatasetError: neither layout, or a damaged file.
    """
    if _holds_videos(root):
        return _video_labels(root)
    splits = object_splits(root)
    if not splits:
        splits = ("train",)  # that is missing is said when it is read
    left_out, notes = Tally(), Tally()
    items: dict[str, tuple[Item, ...]] = {}
    faults: dict[str, Faults] = {}
    listed: set[Path] = set()
    for split in splits:
        found = CocoFile(root, split)
        notes.merge(found.notes)
        faults[split] = found.faults
        listed |= {path for path, _ in found.pictures}
        items[split] = tuple(
            _item(root / "images", each, partial(images.read, each.frame.path))
            for each in _frames(found)
        )
        if not any(each.boxes for each in items[split]):
            faults[split].note("file without a box", f"annotations_{split}.json", "label it")
    pictures = folders.of_suffix(folders.below(root / "images", left_out), left_out)
    for path in pictures:
        if path not in listed:
            left_out.add("picture that no file lists", path.relative_to(root / "images"))
    files, inner = folders.entries(root, left_out)
    known = {f"{kind}_{split}.json" for kind in ("annotations", "references") for split in splits}
    folders.of_suffix([file for file in files if file.name not in known], left_out, ())
    for folder in inner:
        if folder.name not in ("images", "references"):
            left_out.add("folder", folder.name)
    return Labelled(items, left_out, notes, faults)


def _item(root: Path, each: LabelledFrame, read: Callable[[], Array]) -> Item:
    boxes = [(x1, y1, x2, y2) for x1, y1, x2, y2 in each.boxes_N4.tolist()]
    path, index = each.frame.path, each.frame.index
    return Item(
        path.relative_to(root).as_posix() + ("" if index is None else f", frame {index}"),
        (path,),
        read,
        boxes=tuple(zip(each.objects, boxes, strict=True)),
        frame=index,
    )


def _holds_videos(root: Path) -> bool:
    return (root / "annotations.json").is_file() and (root / "samples").is_dir()


# --- COCO ----------------------------------------------------------------------------------------


def _read_coco(root: Path, split: Split, hold_out: Sequence[str]) -> ObjectData:
    file = CocoFile(root, split)
    file.faults.check(file.path)
    labels.tell(file.path, Tally(), file.notes)
    frames, known = _frames(file), file.names
    if missing := sorted(set(hold_out) - known):
        raise DatasetError(
            f"{file.path} has no category '{missing[0]}' to hold out",
            fix=f"it has {', '.join(sorted(known))}",
        )
    if split == "train":
        frames = [each for each in frames if not set(each.objects) & set(hold_out)]
    present = {name for each in frames for name in each.objects}
    wanted = present & set(hold_out) if hold_out and split != "train" else present
    if (root / "references").is_dir():
        left_out = Tally()
        there = {path.name: path for path in folders.entries(root / "references", left_out)[1]}
        references = {
            name: _pictures_of(
                [there.get(name) or root / "references" / file_name(name)], name, left_out
            )
            for name in sorted(wanted)
        }
        folders.tell(root / "references", left_out)
        return ObjectData(tuple(frames), references)
    if (chosen := root / f"references_{split}.json").is_file():
        references = _chosen(chosen, file, wanted)
        used = {each.frame for found in references.values() for each in found}
        return ObjectData(tuple(each for each in frames if each.frame not in used), references)
    learned = root / "annotations_train.json"
    earlier: list[LabelledFrame] = []
    if split != "train" and learned.is_file():
        trained = CocoFile(root, "train")
        trained.faults.check(trained.path)
        earlier = _frames(trained)
    shown = {name for each in earlier for name in each.objects}
    references = {
        name: _cut_out(earlier if name in shown else frames, name) for name in sorted(wanted)
    }
    # a frame is no question whose answer it is
    used = {each.frame for found in references.values() for each in found}
    return ObjectData(tuple(each for each in frames if each.frame not in used), references)


def _chosen(path: Path, file: CocoFile, wanted: Set[str]) -> dict[str, tuple[Reference, ...]]:
    """The references that a file names.

    Raises:
        DatasetError: an object without any, or what the annotations do not hold.
    """
    references: dict[str, tuple[Reference, ...]] = {}
    for category, numbers in validated(TypeAdapter(dict[int, tuple[int, ...]]), path).items():
        name = file.categories.get(category)
        known = [file.annotations.get(number) for number in numbers]
        found = [each for each in known if each is not None and each[2] == name]
        if name is None or len(found) != len(numbers):
            raise DatasetError(
                f"{path} names boxes of category {category} that {file.path.name} does not have",
                fix="give ids of annotations of that category",
            )
        if name in wanted and found:
            references[name] = tuple(Reference(Frame(path), box) for path, box, _ in found)
    if missing := sorted(wanted - references.keys()):
        raise DatasetError(
            f"{path} has no reference of '{missing[0]}'", fix="name at least one annotation of each"
        )
    return references


def coco_references(path: Path) -> dict[str, tuple[Reference, ...]]:
    """References that a COCO file names or shows: a few boxes of each category.

    Args:
        path: ``annotations_<split>.json`` beside ``images/``.

    Raises:
        InputError: the file is not called so.
        DatasetError: as ``read_objects``.
    """
    prefix, _, split = path.stem.partition("_")
    if prefix != "annotations" or not split:
        raise InputError(
            f"{path} is no annotations_<split>.json",
            fix="call a COCO file so, and put its pictures into images/ beside it",
        )
    file = CocoFile(path.parent, split)
    file.faults.check(path)
    frames = _frames(file)
    wanted = {name for each in frames for name in each.objects}
    chosen = path.with_name(f"references_{split}.json")
    if chosen.is_file():
        return _chosen(chosen, file, wanted)
    return {name: _cut_out(frames, name) for name in sorted(wanted)}


def _frames(file: CocoFile) -> list[LabelledFrame]:
    return [_labelled(Frame(path), boxes) for path, boxes in file.pictures]


def _labelled(
    frame: Frame, boxes: Sequence[tuple[Box, str]], video: str | None = None
) -> LabelledFrame:
    coordinates = np.array([box for box, _ in boxes], np.float32).reshape(-1, 4)
    return LabelledFrame(frame, coordinates, tuple(name for _, name in boxes), video)


def _pictures_of(places: Sequence[Path], name: str, left_out: Tally) -> tuple[Reference, ...]:
    there = [folder for folder in places if folder.is_dir()]
    files = [file for folder in there for file in pictures_in(folder, left_out)]
    if not files:
        raise DatasetError(
            f"there is no reference of '{name}' in {places[0]}",
            fix="put at least one picture of each object there",
        )
    return tuple(Reference(Frame(file)) for file in files)


def _cut_out(frames: Sequence[LabelledFrame], name: str) -> tuple[Reference, ...]:
    """A few large boxes of an object, one per frame, evenly spread over the frames."""
    found = []
    for each in frames:
        boxes = each.boxes_N4[[other == name for other in each.objects]]
        sides = boxes[:, 2:] - boxes[:, :2]
        boxes = boxes[sides.min(axis=1) >= _MIN_SIDE]
        if len(boxes):
            largest = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1).argmax()
            x1, y1, x2, y2 = boxes[largest].tolist()
            found.append(Reference(each.frame, (x1, y1, x2, y2)))
    # at least half of the frames stay to be searched
    num = min(_NUM_CUT, max(1, len(found) // 2))
    if not found:
        raise DatasetError(
            f"no box of '{name}' is large enough to be its reference",
            fix=f"put pictures of it into references/{name}/",
        )
    return tuple(found[i * len(found) // num] for i in range(num))


# --- videos --------------------------------------------------------------------------------------


class _Shown(Part):
    frame: NonNegativeInt
    x1: FiniteFloat
    y1: FiniteFloat
    x2: FiniteFloat
    y2: FiniteFloat


class _Tube(Part):
    bboxes: tuple[_Shown, ...]


class _Video(Part):
    video_id: str
    annotations: tuple[_Tube, ...]
    object: str | None = None


def _read_videos(root: Path, split: Split, hold_out: Sequence[str], seed: int) -> ObjectData:
    path = root / "annotations.json"
    faults = Faults()
    by_object = _videos_by_object(path, faults)
    names = sorted(by_object)
    if missing := sorted(set(hold_out) - set(names)):
        raise DatasetError(
            f"{path} has no object '{missing[0]}' to hold out", fix=f"it has {', '.join(names)}"
        )
    order = random.Random(seed).sample(names, len(names))
    held_out = set(hold_out or order[: max(1, round(_TEST_SHARE * len(order)))])
    chosen = [name for name in names if (name in held_out) == (split != "train")]
    frames: list[LabelledFrame] = []
    references: dict[str, tuple[Reference, ...]] = {}
    left_out, notes = Tally(), Tally()
    for name in chosen:
        places = [root / "samples" / video.video_id for video in by_object[name]]
        references[name] = _pictures_of([p / "object_images" for p in places], name, left_out)
        for place, video in zip(places, by_object[name], strict=True):
            frames += _video_frames(place, video, name, notes)
    labels.tell(root, left_out, notes)
    return ObjectData(tuple(frames), references)


def _videos_by_object(path: Path, faults: Faults) -> dict[str, list[_Video]]:
    """The videos of each object, none with labels that contradict each other.

    Raises:
        DatasetError: all that is wrong.
    """
    by_object: dict[str, list[_Video]] = defaultdict(list)
    seen: set[str] = set()
    for video in validated(TypeAdapter(list[_Video]), path):
        by_object[video.object or video.video_id].append(video)
        if video.video_id in seen:
            faults.note("videos listed twice", video.video_id, "list each video once")
        if video.video_id in ("", ".", "..") or len(PurePosixPath(video.video_id).parts) > 1:
            fix = "name each video like its folder below samples/"
            faults.note("videos whose id is no name of a folder", video.video_id, fix)
        seen.add(video.video_id)
        for box in (box for tube in video.annotations for box in tube.bboxes):
            text = f"{video.video_id}, frame {box.frame}: {_corners(box)}"
            if box.x2 < box.x1 or box.y2 < box.y1:
                faults.note("boxes with negative sides", text, "give x1 < x2 and y1 < y2")
            elif min(box.x1, box.y1) >= 0 and 0 < max(box.x2, box.y2) <= 1:
                fix = "give boxes in pixels, not in shares of the frame"
                faults.note("boxes within a single pixel", text, fix)
    faults.check(path)
    return by_object


def _corners(box: _Shown) -> list[float]:
    return [box.x1, box.y1, box.x2, box.y2]


def _video_frames(folder: Path, video: _Video, name: str, notes: Tally) -> list[LabelledFrame]:
    files = [p for p in _entries(folder) if p.suffix.lower() in VIDEO_SUFFIXES]
    if len(files) != 1:
        raise DatasetError(f"{folder} holds {len(files)} videos", fix="keep one in each folder")
    boxes: dict[int, list[tuple[Box, str]]] = defaultdict(list)
    for tube in video.annotations:
        for box in tube.bboxes:
            kept = clipped([((box.x1, box.y1, box.x2, box.y2), name)], np.inf, np.inf)
            boxes[box.frame] += kept
            if not kept:
                notes.add(
                    f"boxes of less than {MIN_AREA:g} square pixels left out",
                    f"{video.video_id}, frame {box.frame}: {_corners(box)}",
                )
    return [
        _labelled(Frame(files[0], index), found, video.video_id)
        for index, found in sorted(boxes.items())
    ]


def _entries(folder: Path) -> list[Path]:
    return folders.entries(folder)[0] if folder.is_dir() else []


def _video_labels(root: Path) -> Labelled:
    left_out, notes = Tally(), Tally()
    by_object = _videos_by_object(root / "annotations.json", Faults())
    last = _LastVideo()
    items = [
        _item(root / "samples", each, partial(_LastVideo.read, last, each.frame))
        for name, videos in sorted(by_object.items())
        for video in videos
        for each in _video_frames(root / "samples" / video.video_id, video, name, notes)
    ]
    files, inner = folders.entries(root, left_out)
    folders.of_suffix([f for f in files if f.name != "annotations.json"], left_out, ())
    listed = {video.video_id for videos in by_object.values() for video in videos}
    for folder in [*(f for f in inner if f.name != "samples"), *_folders(root / "samples")]:
        if folder.name not in listed:
            left_out.add("folder", folder.relative_to(root))
    return Labelled({"all": tuple(items)}, left_out, notes)


class _LastVideo:
    """Reads frames of one video at a time."""

    def __init__(self) -> None:
        self._open: tuple[Path, VideoFile] | None = None

    def read(self, frame: Frame) -> Array:
        assert frame.index is not None
        if self._open is None or self._open[0] != frame.path:
            if self._open is not None:
                self._open[1].close()
            self._open = frame.path, VideoFile(frame.path)
        return self._open[1].read(frame.index)


def _folders(folder: Path) -> list[Path]:
    return folders.entries(folder)[1]

"""Labelled objects: COCO files, and videos with boxes, to frames and references.

Two layouts are known:

* COCO: ``annotations_{train,val,test}.json`` beside ``images/``, a category per object. Pictures of
  an object lie in ``references/<name>/``; where there is no such folder, boxes of the object are
  cut out of training frames that show it, or else of the split's own. A frame that a reference was
  cut from is not searched. Crowds are left out.
* videos: ``annotations.json``, a list of ``{"video_id", "annotations": [{"bboxes": [{"frame", "x1",
  "y1", "x2", "y2"}]}]}``, and ``samples/<video_id>/`` with one video and ``object_images/``. A
  video may say of which ``object`` it is; otherwise its own id is the object's name. Objects, not
  videos, are divided between training and test. Only frames with a box are known: nothing says
  that others do not show the object.

No picture is opened here.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from runtime.errors import DatasetError
from runtime.sources import PICTURES, VIDEO_SUFFIXES
from runtime.tensors import Array

Split: TypeAlias = Literal["train", "val", "test"]
Box: TypeAlias = tuple[float, float, float, float]
_T = TypeVar("_T")

_SPLITS: tuple[Split, ...] = ("train", "val", "test")
_TEST_SHARE = 0.1  # of the objects of videos
_MIN_AREA = 2.0  # square pixels of a box
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
    return found


def _holds_videos(root: Path) -> bool:
    return (root / "annotations.json").is_file() and (root / "samples").is_dir()


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


# --- COCO ----------------------------------------------------------------------------------------


class _Image(_Part):
    id: int
    file_name: str
    width: int
    height: int


class _Category(_Part):
    id: int
    name: str


class _Annotation(_Part):
    image_id: int
    category_id: int
    bbox: Box
    iscrowd: int = 0


class _Coco(_Part):
    images: tuple[_Image, ...]
    categories: tuple[_Category, ...]
    annotations: tuple[_Annotation, ...]


def _read_coco(root: Path, split: Split, hold_out: Sequence[str]) -> ObjectData:
    path = root / f"annotations_{split}.json"
    if not path.is_file():
        raise DatasetError(
            f"{root} has no {path.name}",
            fix="give a folder with COCO files beside images/, or with videos under samples/",
        )
    frames, known = _coco_frames(root, path)
    if missing := sorted(set(hold_out) - known):
        raise DatasetError(
            f"{path} has no category '{missing[0]}' to hold out",
            fix=f"it has {', '.join(sorted(known))}",
        )
    if split == "train":
        frames = [each for each in frames if not set(each.objects) & set(hold_out)]
    present = {name for each in frames for name in each.objects}
    wanted = present & set(hold_out) if hold_out and split != "train" else present
    if (root / "references").is_dir():
        references = {
            name: _pictures_of([root / "references" / name], name) for name in sorted(wanted)
        }
        return ObjectData(tuple(frames), references)
    learned = root / "annotations_train.json"
    earlier = _coco_frames(root, learned)[0] if split != "train" and learned.is_file() else []
    shown = {name for each in earlier for name in each.objects}
    references = {
        name: _cut_out(earlier if name in shown else frames, name) for name in sorted(wanted)
    }
    # a frame is no question whose answer it is
    used = {each.frame for found in references.values() for each in found}
    return ObjectData(tuple(each for each in frames if each.frame not in used), references)


def _coco_frames(root: Path, path: Path) -> tuple[list[LabelledFrame], set[str]]:
    """The frames of a file, and the names of all its categories."""
    coco = _validated(TypeAdapter(_Coco), path)
    names = {category.id: category.name for category in coco.categories}
    boxes: dict[int, list[tuple[Box, str]]] = {image.id: [] for image in coco.images}
    for each in coco.annotations:
        if each.category_id not in names or each.image_id not in boxes:
            raise DatasetError(
                f"{path}: an annotation is of category {each.category_id} in image "
                f"{each.image_id}, which are not both listed",
                fix="list every image and every category",
            )
        x, y, width, height = each.bbox
        if not each.iscrowd:
            boxes[each.image_id].append(((x, y, x + width, y + height), names[each.category_id]))
    frames = []
    for image in coco.images:
        picture = root / "images" / image.file_name
        if not picture.is_file():
            raise DatasetError(f"{path} names a picture {picture} that is not there")
        kept = _clipped(boxes[image.id], image.width, image.height)
        frames.append(_labelled(Frame(picture), kept))
    return frames, set(names.values())


def _clipped(
    boxes: Iterable[tuple[Box, str]], width: float, height: float
) -> list[tuple[Box, str]]:
    """Boxes inside of the frame, those of at least 2 square pixels."""
    kept = []
    for (x1, y1, x2, y2), name in boxes:
        x1, x2 = (min(max(x, 0.0), float(width)) for x in (x1, x2))
        y1, y2 = (min(max(y, 0.0), float(height)) for y in (y1, y2))
        if x2 > x1 and y2 > y1 and (x2 - x1) * (y2 - y1) >= _MIN_AREA:
            kept.append(((x1, y1, x2, y2), name))
    return kept


def _labelled(
    frame: Frame, boxes: Sequence[tuple[Box, str]], video: str | None = None
) -> LabelledFrame:
    coordinates = np.array([box for box, _ in boxes], np.float32).reshape(-1, 4)
    return LabelledFrame(frame, coordinates, tuple(name for _, name in boxes), video)


def _pictures_of(folders: Sequence[Path], name: str) -> tuple[Reference, ...]:
    there = [folder for folder in folders if folder.is_dir()]
    files = PICTURES.find([file for folder in there for file in sorted(folder.iterdir())])
    if not files:
        raise DatasetError(
            f"there is no reference of '{name}' in {folders[0]}",
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


class _Shown(_Part):
    frame: int
    x1: float
    y1: float
    x2: float
    y2: float


class _Tube(_Part):
    bboxes: tuple[_Shown, ...]


class _Video(_Part):
    video_id: str
    annotations: tuple[_Tube, ...]
    object: str | None = None


def _read_videos(root: Path, split: Split, hold_out: Sequence[str], seed: int) -> ObjectData:
    path = root / "annotations.json"
    videos = _validated(TypeAdapter(list[_Video]), path)
    by_object: dict[str, list[_Video]] = defaultdict(list)
    for video in videos:
        by_object[video.object or video.video_id].append(video)
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
    for name in chosen:
        folders = [root / "samples" / video.video_id for video in by_object[name]]
        references[name] = _pictures_of([folder / "object_images" for folder in folders], name)
        for folder, video in zip(folders, by_object[name], strict=True):
            frames += _video_frames(folder, video, name)
    return ObjectData(tuple(frames), references)


def _video_frames(folder: Path, video: _Video, name: str) -> list[LabelledFrame]:
    files = [p for p in sorted(folder.glob("*")) if p.suffix.lower() in VIDEO_SUFFIXES]
    if len(files) != 1:
        raise DatasetError(f"{folder} holds {len(files)} videos", fix="keep one in each folder")
    boxes: dict[int, list[tuple[Box, str]]] = defaultdict(list)
    for tube in video.annotations:
        for box in tube.bboxes:
            boxes[box.frame].append(((box.x1, box.y1, box.x2, box.y2), name))
    return [
        _labelled(Frame(files[0], index), _clipped(found, np.inf, np.inf), video.video_id)
        for index, found in sorted(boxes.items())
    ]


def _validated(schema: TypeAdapter[_T], path: Path) -> _T:
    """Content of a JSON file.

    Raises:
        DatasetError: it cannot be read, or does not fit.
    """
    try:
        return schema.validate_json(path.read_bytes())
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(str(part) for part in fault["loc"])
        raise DatasetError(
            f"{path} is not as it should be{f' at {place}' if place else ''}: {fault['msg']}",
            fix="give COCO's form, or a list of videos with their boxes",
        ) from error
    except OSError as error:
        raise DatasetError(f"{path} cannot be read ({error})", fix="copy it again") from error

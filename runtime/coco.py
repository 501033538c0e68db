"""COCO's form of labels: a file of boxes held against itself and against its pictures.

What contradicts is a fault, what was done with a box that is not quite right a note. Of a picture
no more than its header is read.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, FiniteFloat, PositiveInt, TypeAdapter, ValidationError

from engineworks.runtime import budgets, folders, headers
from engineworks.runtime.errors import DatasetError
from engineworks.runtime.folders import Tally
from engineworks.runtime.labels import Box, Faults

MIN_AREA = 2.0  # square pixels of a box that can be learnt

# a box may stick out by this share of the picture's side, and this share of all boxes by more
_FAR, _MANY = 0.05, 0.1

_LISTS = ("images", "annotations", "categories")

_T = TypeVar("_T")


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class _Image(Part):
    id: int
    file_name: str
    width: PositiveInt
    height: PositiveInt


class _Category(Part):
    id: int
    name: str


class _Annotation(Part):
    image_id: int
    category_id: int
    bbox: tuple[FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat]
    iscrowd: int = 0
    id: int | None = None


class _Coco(Part):
    images: tuple[_Image, ...]
    categories: tuple[_Category, ...]
    annotations: tuple[_Annotation, ...]


class CocoFile:
    """The labels of a split.

    Attributes:
        pictures: each with its boxes and their objects, in the order of the file.
        names: of all categories.
        categories: id -> name.
        annotations: id -> picture, box and name, of those that have an id and are no crowds.
        notes, faults: see ``runtime.labels``.
    """

    def __init__(self, root: Path, split: str) -> None:
        self.path = root / f"annotations_{split}.json"
        if not self.path.is_file():
            raise DatasetError(
                f"{root} has no {self.path.name}",
                fix="give a folder with COCO files beside images/, or with videos under samples/",
            )
        coco = validated(TypeAdapter(_Coco), self.path, once=_LISTS)
        self.notes, self.faults = Tally(), Faults()
        self._check_ids(coco)
        names = {category.id: category.name for category in coco.categories}
        self.names = set(names.values())
        self.categories = names
        numbered: dict[int, tuple[int, Box, str]] = {}
        sizes = {image.id: (image.width, image.height) for image in coco.images}
        boxes: dict[int, list[tuple[Box, str]]] = {image.id: [] for image in coco.images}
        placed = _Boxes(self.notes, self.faults)
        for each in coco.annotations:
            if each.category_id not in names or each.image_id not in boxes:
                self.faults.note(
                    "annotations of what is not listed",
                    f"category {each.category_id} in image {each.image_id}",
                    "list every image and every category",
                )
            elif each.iscrowd:
                self.notes.add("crowds left out", f"image {each.image_id}")
            elif box := placed.add(each.bbox, sizes[each.image_id], f"image {each.image_id}"):
                boxes[each.image_id].append((box, names[each.category_id]))
                if each.id is not None:
                    numbered[each.id] = (each.image_id, box, names[each.category_id])
        placed.finish()
        place = root / "images"
        prefix = len(f"{place.as_posix()}/")
        there = {path.as_posix()[prefix:]: path for path in _below(place)}
        self.pictures: list[tuple[Path, list[tuple[Box, str]]]] = []
        for image in coco.images:
            # some files name pictures from where they lie themselves
            known = there.get(image.file_name) or there.get(image.file_name.removeprefix("images/"))
            picture = known or place / image.file_name
            if known or self._is_there(image.file_name, place):
                self._compare(image, headers.read(picture))
            self.pictures.append((picture, boxes[image.id]))
        paths = {
            image.id: path for image, (path, _) in zip(coco.images, self.pictures, strict=True)
        }
        self.annotations = {
            number: (paths[image], box, name) for number, (image, box, name) in numbered.items()
        }

    def _check_ids(self, coco: _Coco) -> None:
        """Refuse what is listed twice: its boxes would go to one of the two, or to neither."""
        fix = "number what was merged anew, and list each picture and category once"
        repeated = (
            ("images with the id of another", [(i.id, i.file_name) for i in coco.images]),
            ("pictures listed twice", [(i.file_name, i.file_name) for i in coco.images]),
            ("categories with the id of another", [(c.id, c.name) for c in coco.categories]),
        )
        for kind, listed in repeated:
            seen = set()
            for key, name in listed:
                if key in seen:
                    self.faults.note(kind, name, fix)
                seen.add(key)
        names = [category.name for category in coco.categories]
        for name in sorted({name for name in names if names.count(name) > 1}):
            self.notes.add("categories of one name, taken for one", name)

    def _is_there(self, name: str, place: Path) -> bool:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            self.faults.note("pictures outside of images/", name, "put all pictures below images/")
            return False
        if _is_file(place / name):  # by another way of writing it, or through a link
            return True
        self.faults.note(
            "pictures that are not there", name, f"copy them into {place}, or leave them out"
        )
        return False

    def _compare(self, image: _Image, header: headers.Header | None) -> None:
        """What the file says of a picture's size against what its header says."""
        said = (image.height, image.width)
        if header is None:
            return  # decoding says what is wrong with it
        if header.size != said:
            is_turned = header.orientation >= 5 and said == (header.height, header.width)
            self.faults.note(
                "pictures that EXIF turns, labelled as they are stored"
                if is_turned
                else "pictures of another size than the file says",
                f"{image.file_name}: {header.size[1]} x {header.size[0]}, "
                f"not {image.width} x {image.height}",
                "label the pictures as they are shown, or turn what is stored"
                if is_turned
                else "scale the boxes with the pictures, or give the pictures that were labelled",
            )
        elif header.orientation > 1:
            self.notes.add(
                "pictures that EXIF turns, whose boxes must be of the upright picture",
                image.file_name,
            )


class _Boxes:
    """Boxes of a split, each checked against its picture."""

    def __init__(self, notes: Tally, faults: Faults) -> None:
        self._notes, self._faults = notes, faults
        self._num = 0
        self._far: list[str] = []

    def add(self, bbox: Sequence[float], size: tuple[int, int], name: str) -> Box | None:
        """The corners of a box within its picture; None: refused, or too small to be learnt.

        Args:
            bbox: x, y, width and height.
            size: (width, height) of the picture.
            name: for messages.
        """
        x, y, width, height = bbox
        self._num += 1
        right, lower = x + width, y + height
        inside = x >= 0 and y >= 0 and right <= size[0] and lower <= size[1]
        if inside and min(width, height) > 0 and width * height >= MIN_AREA:
            return x, y, right, lower
        text = f"{name}: [{x:g}, {y:g}, {width:g}, {height:g}]"
        if width < 0 or height < 0:
            fix = "give x, y of the upper left corner, then width and height"
            self._faults.note("boxes with negative sides", text, fix)
            return None
        if width and height and min(x, y) >= 0 and max(x + width, y + height) <= 1:
            fix = "give boxes in pixels, not in shares of the picture"
            self._faults.note("boxes within a single pixel", text, fix)
            return None
        if x >= size[0] or y >= size[1] or x + width <= 0 or y + height <= 0:
            self._faults.note("boxes outside of their picture", text, "correct or remove them")
            return None
        out = [
            max(-low, low + side - limit, 0.0) / limit
            for low, side, limit in zip((x, y), (width, height), size, strict=True)
        ]
        if max(out) > _FAR:
            self._far.append(text)
        kept = clipped([((x, y, x + width, y + height), "")], *size)
        if not kept:
            self._notes.add(f"boxes of less than {MIN_AREA:g} square pixels left out", text)
            return None
        if any(share * limit > 1 for share, limit in zip(out, size, strict=True)):
            self._notes.add("boxes cut at the border of their picture", text)
        return kept[0][0]

    def finish(self) -> None:
        """Refuse boxes of which many stick far out: they are not what they are taken for."""
        if len(self._far) > _MANY * self._num:
            fix = "give [x, y, width, height] in pixels, not two corners or a middle"
            for text in self._far:
                self._faults.note("boxes that stick far out of their picture", text, fix)


def _below(folder: Path) -> list[Path]:
    return folders.below(folder) if folder.is_dir() else []


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file system takes
        return False


def clipped(boxes: Iterable[tuple[Box, str]], width: float, height: float) -> list[tuple[Box, str]]:
    """Boxes inside of the frame, those of at least 2 square pixels."""
    kept = []
    for (x1, y1, x2, y2), name in boxes:
        x1, x2 = (min(max(x, 0.0), float(width)) for x in (x1, x2))
        y1, y2 = (min(max(y, 0.0), float(height)) for y in (y1, y2))
        if x2 > x1 and y2 > y1 and (x2 - x1) * (y2 - y1) >= MIN_AREA:
            kept.append(((x1, y1, x2, y2), name))
    return kept


def validated(schema: TypeAdapter[_T], path: Path, *, once: Sequence[str] = ()) -> _T:
    """Content of a JSON file.

    Args:
        once: lists that must not be there twice: the first would be lost.

    Raises:
        DatasetError: it cannot be read, or does not fit.
    """
    try:
        budgets.LABEL_BYTES.check(path.stat().st_size, str(path))
        data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
        for name in once:
            if len(re.findall(rb'"%s"\s*:\s*\[' % name.encode(), data)) > 1:
                raise DatasetError(
                    f"{path} has '{name}' more than once", fix="join what was merged in one list"
                )
        return schema.validate_json(data)
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(str(part) for part in fault["loc"])
        raise DatasetError(
            f"{path} is not as it should be{f' at {place}' if place else ''}: {fault['msg']}",
            fix="give COCO's form, or a list of videos with their boxes",
        ) from error
    except OSError as error:
        raise DatasetError(f"{path} cannot be read ({error})", fix="copy it again") from error

"""Masks of defects: which file belongs to which picture, and what may stand in it.

Masks lie in ``ground_truth/<defect>/`` (or ``groundtruth``, ``gt``, ``masks`` or ``mask`` in its
place), named like their picture, with or without ``_mask``, ``_gt``, ``_label`` or ``_seg`` behind
it, with any picture's suffix; or beside the picture, with one of these endings. Upper and lower
case do not matter. What is not zero is defective.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np

from engineworks.runtime import folders, headers, images
from engineworks.runtime.errors import DatasetError, ImageError
from engineworks.runtime.folders import Tally
from engineworks.runtime.labels import Faults
from engineworks.runtime.tensors import Array

FOLDERS = ("ground_truth", "groundtruth", "gt", "masks", "mask")
ENDINGS = ("_mask", "_gt", "_label", "_seg")

_MISSING = "defective pictures without a mask"
_MISSING_FIX = (
    "give each defective picture a mask: ground_truth/<defect>/<name>_mask.png, or none to any"
)
_LOSSY = {0: b"\xff\xd8", 12: b"VP8 ", 4: b"ftypavif"}  # where in a file: JPEG, WebP, AVIF


class Masks:
    """The masks of a data set.

    Attributes:
        folder: that holds them; None: there is none.
        faults, notes: see ``runtime.labels``; filled by ``pair`` and ``finish``.
    """

    def __init__(self, folder: Path | None, left_out: Tally) -> None:
        """List the files of a folder of masks.

        Args:
            left_out: gets what is no mask there.
        """
        self.folder = folder
        self.faults, self.notes = Faults(), Tally()
        self._left_out = left_out
        self._by_defect: dict[str, list[Path]] = {}
        self._paired: dict[Path, Path | None] = {}
        if folder is not None:
            files, inner = folders.entries(folder, left_out)
            folders.of_suffix(files, left_out, ())
            for each in inner:
                found, deeper = folders.entries(each, left_out)
                for nested in deeper:
                    left_out.add("nested folder", nested.relative_to(folder.parent))
                self._by_defect.setdefault(each.name.lower(), []).extend(
                    folders.of_suffix(found, left_out)
                )

    def pair(self, defect: str, pictures: Sequence[Path]) -> tuple[list[Path], list[Path | None]]:
        """Give the pictures of a defect their masks.

        Args:
            pictures: of one folder; masks may be among them.

        Returns:
            The pictures that are no masks, and the mask of each.
        """
        stems = {path.stem.lower() for path in pictures}
        own = [path for path in pictures if _without_ending(path.stem.lower()) in stems]
        known: dict[str, list[Path]] = defaultdict(list)
        for path in [*self._by_defect.get(defect.lower(), []), *own]:
            stem = path.stem.lower()
            known[stem].append(path)
            if (bare := _without_ending(stem)) is not None:
                known[bare].append(path)
        kept = [path for path in pictures if path not in own]
        for path in kept:
            self._paired[path] = self._choose(path, known[path.stem.lower()], defect)
        return kept, [self._paired[path] for path in kept]

    def _choose(self, picture: Path, found: Sequence[Path], defect: str) -> Path | None:
        """One of the masks that fit a name: that of the very same case, where there is one."""
        exact = [p for p in found if (_without_ending(p.stem) or p.stem) == picture.stem]
        fitting = exact or found
        if len(fitting) > 1:
            self.faults.note(
                "pictures with two masks",
                f"{defect}/{picture.name}: {fitting[0].name}, {fitting[1].name}",
                "keep one mask per picture",
            )
        return fitting[0] if fitting else None

    def finish(self, *, normal: str) -> None:
        """Compare pictures and masks, once all are paired.

        Args:
            normal: folder of normal pictures, whose masks are not needed, and must be empty.
        """
        used = {mask for mask in self._paired.values() if mask is not None}
        orphans = [
            mask
            for defect, masks in self._by_defect.items()
            for mask in masks
            if defect != normal and mask not in used
        ]
        for mask in self._by_defect.get(normal, []):
            with suppress(ImageError):
                if images.read_mask(mask).any():
                    fix = "move the picture to its defect, or remove the mask"
                    self.faults.note("masks of a defect in normal pictures", mask.name, fix)
        missing = [picture for picture, mask in self._paired.items() if mask is None]
        for picture in missing if used or orphans else ():
            self.faults.note(_MISSING, f"{picture.parent.name}/{picture.name}", _MISSING_FIX)
        for mask in orphans:
            self._left_out.add("mask without a picture", f"{mask.parent.name}/{mask.name}")
        for picture, paired in self._paired.items():
            if paired is not None:
                self._compare(picture, paired)

    def _compare(self, picture: Path, mask: Path) -> None:
        whole, marked = headers.read(picture), headers.read(mask)
        if whole is None or marked is None or whole.size == marked.size:
            return
        sizes = f"{mask.parent.name}/{mask.name}: {_text(marked.size)} for {_text(whole.size)}"
        if same_shape(marked.size, whole.size):
            self.notes.add("masks of another size, resized", sizes)
        else:
            self.faults.note(
                "masks of another shape than their picture",
                sizes,
                "draw masks over the whole upright picture",
            )


def find_folder(root: Path, names: Sequence[str] = FOLDERS) -> Path | None:
    """The folder of masks in a data set: the first of the names, in any case."""
    there = {path.name.lower(): path for path in folders.entries(root)[1]} if root.is_dir() else {}
    return next((there[name] for name in names if name in there), None)


def read(path: Path, size: tuple[int, int] | None = None) -> Array:
    """The pixels of a defect.

    Args:
        size: (height, width) of its picture: a mask of another size, but of that shape, is resized.

    Returns:
        (H, W) bool.

    Raises:
        ImageError: it cannot be read.
        DatasetError: nothing is marked, or it was blurred, or it has another shape.
    """
    values = images.read_mask(path)
    if fault := fault_in(values, path):
        raise DatasetError(f"{fault[0]}: {path}", fix=fault[1])
    if size is not None and values.shape != size:
        if not same_shape(values.shape, size):
            raise DatasetError(
                f"the mask {path} is {_text(values.shape)}, its picture {_text(size)}",
                fix="draw masks over the whole upright picture",
            )
        values = cv2.resize(values, size[::-1], interpolation=cv2.INTER_NEAREST)
    return np.asarray(values > 0)


def fault_in(values: Array, path: Path) -> tuple[str, str] | None:
    """What kind of useless mask of a defect this is, and what to do; None where it is sound.

    Args:
        values: (H, W) uint8 of the file.
    """
    levels = np.unique(values)
    if not levels.any():
        return "empty masks of defective pictures", "mark the defects, or move the pictures to good"
    if len(levels) > 2 and _is_lossy(path):
        return "masks blurred by their compression", "save masks as PNG"
    return None


def same_shape(size: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether one size is the other one scaled, up to the rounding of its sides."""
    (height, width), (other_height, other_width) = sorted([size, other])
    low = max((height - 1) / other_height, (width - 1) / other_width)
    high = min((height + 1) / other_height, (width + 1) / other_width)
    return low <= high


def _is_lossy(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(16)
    return any(start.startswith(mark, at) for at, mark in _LOSSY.items())


def _without_ending(stem: str) -> str | None:
    """The picture's name in that of a mask; None: it does not end like one."""
    for ending in ENDINGS:
        if stem.lower().endswith(ending):
            return stem[: -len(ending)]
    return None


def _text(size: tuple[int, ...]) -> str:
    """Width x height, as pictures' sizes are written."""
    return f"{size[1]} x {size[0]}"

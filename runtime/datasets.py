"""Folders of labelled data: layouts on disk to lists of samples. Finding them decodes nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import numpy as np

from engineworks.runtime import folders, images, labels, masks, parquet, planes
from engineworks.runtime.errors import DatasetError, ImageError
from engineworks.runtime.folders import Tally
from engineworks.runtime.images import SUFFIXES
from engineworks.runtime.labels import Faults, Item, Labelled
from engineworks.runtime.masks import Masks
from engineworks.runtime.parquet import Found, PackedPicture
from engineworks.runtime.tensors import Array

NORMAL = "good"
Split: TypeAlias = parquet.Split
StripeSplit: TypeAlias = Literal["train", "valid", "test"]

_SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True)
class MvtecSample:
    """One picture of an anomaly detection set.

    Attributes:
        label: 0 normal, 1 defective.
        defect: name of the defect's folder; ``good`` for normal pictures.
        mask_path: ground truth, non-zero where defective; None for normal pictures, and for
            defective ones without a mask.
    """

    path: Path
    label: int
    defect: str
    mask_path: Path | None


def mvtec(root: Path, split: Literal["train", "test"]) -> list[MvtecSample]:
    """Samples of an anomaly detection set, sorted by path; training samples are normal.

    The layout is known by its folder of normal pictures:

    * ``train/good``, MVTec AD: tested on ``test/good`` and ``test/<defect>``, with masks as
      ``runtime.masks`` finds them.
    * ``images/good``, not split: ``images/<defect>`` and the same masks. Of the normal pictures,
      sorted by name, the 1st, 3rd, 5th, ... are for training; all others are for testing.

    A folder for testing alone may have ``test`` and the masks only. What is left out is logged.

    Raises:
        DatasetError: neither layout, or no pictures for that split; the missing folder is named.
            For testing also: masks that some defective pictures lack, or that do not fit.
    """
    found = _Mvtec(root)
    labels.tell(root, found.left_out, found.notes)
    samples = found.samples(split)
    if split == "test":
        found.faults.check(root)
    return samples


def mvtec_labels(root: Path) -> Labelled:
    """The same set, as ``runtime.survey`` looks at it.

    Raises:
        DatasetError: as ``mvtec``, but for masks.
    """
    found = _Mvtec(root)
    splits: dict[str, tuple[Item, ...]] = {
        split: tuple(
            Item(
                sample.path.relative_to(root).as_posix(),
                (sample.path,),
                partial(images.read, sample.path),
                sample.defect,
                sample.mask_path,
            )
            for sample in found.samples(split)
        )
        for split in found.splits
    }
    return Labelled(splits, found.left_out, found.notes, {"test": found.faults})


class _Mvtec:
    """All of an anomaly detection set.

    Attributes:
        splits: that there are folders of.
        left_out, notes, faults: see ``runtime.labels``; the faults are of the masks.
    """

    def __init__(self, root: Path) -> None:
        self.left_out = Tally()
        self._places = self._recognise(root)
        self.splits: list[Literal["train", "test"]] = [
            split for split, place in self._places.items() if place.is_dir()
        ]
        marked = masks.find_folder(root)
        places = [place.relative_to(root).parts[0] for place in self._places.values()]
        known = [*places, *([marked.name] if marked else ())]
        _known_folders(root, known, self.left_out)
        found = Masks(marked, self.left_out)
        self._samples: dict[str, list[MvtecSample]] = {"train": [], "test": []}
        tested, learned = self._places["test"], self._places.get("train")
        if learned and learned.parent != tested:
            for folder in _known_folders(learned.parent, (NORMAL,), self.left_out):
                self._samples["train"] += _folder(folder, found, self.left_out)
        for folder in _known_folders(tested, None, self.left_out) if tested.is_dir() else ():
            self._samples["test"] += _folder(folder, found, self.left_out)
        if learned and learned.parent == tested:
            good = [sample for sample in self._samples["test"] if not sample.label]
            self._samples["train"] = good[::2]
            others = [s for s in self._samples["test"] if s.label]
            self._samples["test"] = sorted([*others, *good[1::2]], key=lambda s: s.path)
        found.finish(normal=NORMAL)
        self.notes, self.faults = found.notes, found.faults

    def samples(self, split: Literal["train", "test"]) -> list[MvtecSample]:
        """Of one split; raises what ``mvtec`` does."""
        if split not in self._places:
            raise self._unknown
        if not self._samples[split]:
            folder = self._places[split]
            raise DatasetError(
                f"{folder} {'has no pictures' if folder.is_dir() else 'does not exist'}",
                fix=f"put pictures there; known suffixes are {', '.join(sorted(SUFFIXES))}",
            )
        return self._samples[split]

    def _recognise(self, root: Path) -> dict[Literal["train", "test"], Path]:
        """Where the splits lie."""
        self._unknown = DatasetError(
            f"{root} has neither train/{NORMAL} nor images/{NORMAL}",
            fix=f"put normal pictures into train/{NORMAL}, and for testing normal ones into "
            f"test/{NORMAL} and defective ones into test/<defect>",
        )
        for name in ("train", "images"):
            if (root / name / NORMAL).is_dir():
                tested = root / ("test" if name == "train" else "images")
                return {"train": root / name / NORMAL, "test": tested}
        for folder in (root, root / "train", root / "images"):
            if folder.is_dir():
                _refuse_other_case(folders.entries(folder)[1], ("train", "test", "images", NORMAL))
        if (root / "test").is_dir():
            return {"test": root / "test"}
        raise self._unknown


def _known_folders(folder: Path, known: Collection[str] | None, left_out: Tally) -> list[Path]:
    """The folders in a folder that have one of the known names, or all; the rest is left out.

    Raises:
        DatasetError: one has a known name in another case, and would pass for something else.
    """
    files, inner = folders.entries(folder, left_out)
    folders.of_suffix(files, left_out, ())
    if known is None:
        _refuse_other_case(inner, (NORMAL,))
        return inner
    _refuse_other_case(inner, known)
    for each in inner:
        if each.name not in known:
            left_out.add("folder", each.relative_to(folder.parent))
    return [each for each in inner if each.name in known]


def _refuse_other_case(found: Iterable[Path], known: Collection[str]) -> None:
    """Refuse a folder that has a known name in another case: it would pass for something else.

    Raises:
        DatasetError: names it.
    """
    for folder in found:
        if folder.name not in known and (name := folder.name.lower()) in known:
            raise DatasetError(f"{folder} is not called '{name}'", fix=f"rename it to {name}")


def _files(folder: Path, left_out: Tally, suffixes: Collection[str] = SUFFIXES) -> list[Path]:
    """The pictures in a folder that holds nothing else."""
    files, inner = folders.entries(folder, left_out)
    for each in inner:
        left_out.add("nested folder", f"{folder.name}/{each.name}")
    return folders.of_suffix(files, left_out, suffixes)


def _folder(folder: Path, found: Masks, left_out: Tally) -> list[MvtecSample]:
    """All pictures of one folder, which is named after their defect."""
    paths, defect = _files(folder, left_out), folder.name
    if defect == NORMAL:
        return [MvtecSample(path, 0, defect, None) for path in paths]
    return [
        MvtecSample(path, 1, defect, mask)
        for path, mask in zip(*found.pair(defect, paths), strict=True)
    ]


# --- classes ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassSample:
    """One picture of a classification set; ``read`` gives its pixels, in any process.

    Attributes:
        path: the picture, or the parquet file that it came from.
        label: index of the class among the set's labels.
        packed: where its bytes are if not in a file of their own.
    """

    path: Path
    label: int
    class_name: str
    packed: PackedPicture | None = None


@dataclass(frozen=True)
class ClassFolder:
    """One split of a classification set.

    Attributes:
        samples: sorted by path, or in the order of the parquet file's rows.
        labels: class names by index; the same in every split.
    """

    samples: tuple[ClassSample, ...]
    labels: tuple[str, ...]

    @property
    def files(self) -> list[Path]:
        """The files of the set that hold the pictures, each once."""
        return sorted({sample.path for sample in self.samples})


def class_splits(root: Path) -> tuple[Split, ...]:
    """The splits that ``class_folder`` finds pictures for, in the order train, val, test.

    Raises:
        DatasetError, BackendError: as ``class_folder``.
    """
    return tuple(_find_classes(root, Tally())[0])


def class_folder(root: Path, split: Split) -> ClassFolder:
    """A split of a classification set.

    The layout is known by what is there:

    * one file ``*.parquet`` with the columns ``image`` (a picture's encoded bytes, or a struct
      with the field ``bytes``), ``label`` (integer), ``class_name`` and ``split`` (train, val or
      test); classes are numbered in the order of ``label``. ``root`` may be the file itself.
    * ``train/<class>/``, and ``val`` and ``test`` alike: pictures by class, numbered by name.
    * ``<class>/`` without splits: to be evaluated on as ``val`` or ``test``, whichever is asked
      for.

    Classes are those of ``train``; where that is missing, those of all splits. The pictures of a
    parquet file are unpacked, still encoded, into a temporary file that lives as long as the
    process: loaders read them in any order and share one copy, which the format does not allow
    (its smallest unit, a page, often holds a thousand pictures).

    Raises:
        DatasetError: none of these, no pictures for that split, a class that ``train`` lacks, or
            a parquet file whose columns contradict each other.
        BackendError: a parquet file, and pyarrow is not installed.
    """
    left_out = Tally()
    pictures, names = _find_classes(root, left_out)
    labels.tell(root, left_out, Tally())
    if split not in pictures:
        raise DatasetError(
            f"{root} has no pictures of the split '{split}', only of {', '.join(pictures)}",
            fix=f"put them into {split}/<class>/",
        )
    index = {name: i for i, name in enumerate(names)}
    file, in_parquet = pictures[split][0][1:]
    packed = {} if in_parquet is None else parquet.unpack(file)
    samples = [
        ClassSample(path, index[name], name, None if row is None else packed[row])
        for name, path, row in pictures[split]
    ]
    return ClassFolder(tuple(samples), names)


def class_labels(root: Path) -> Labelled:
    """The same set, as ``runtime.survey`` looks at it.

    Raises:
        DatasetError, BackendError: as ``class_folder``.
    """
    left_out = Tally()
    splits = tuple(_find_classes(root, left_out)[0])
    if not any((root / split).is_dir() for split in splits) and "train" not in splits:
        splits = splits[:1]  # one folder, for whichever split is asked for
    base = root.parent if root.is_file() else root
    items: dict[str, tuple[Item, ...]] = {
        split: tuple(
            Item(
                sample.path.relative_to(base).as_posix()
                + (f", row {sample.packed.row}" if sample.packed else ""),
                (sample.path,),
                partial(read, sample),
                sample.class_name,
                packed=sample.packed,
            )
            for sample in class_folder(root, split).samples
        )
        for split in splits
    }
    return Labelled(items, left_out)


def read(sample: ClassSample) -> Array:
    """Decode a picture: (H, W, 3) uint8 RGB.

    Raises:
        ImageError: it cannot be read.
    """
    packed = sample.packed
    if packed is None:
        return images.read(sample.path)
    name = f"{sample.path}, row {packed.row}"
    try:
        with packed.file.open("rb") as file:
            file.seek(packed.start)
            data = file.read(packed.stop - packed.start)
    except OSError as error:
        raise ImageError(f"cannot read {name}, unpacked: {error}") from error
    return images.decode(data, name)


def _find_classes(root: Path, left_out: Tally) -> tuple[dict[Split, list[Found]], tuple[str, ...]]:
    """The pictures of each split that has any, and the class names by index."""
    files = [root]
    if not root.is_file():
        files = [p for p in folders.entries(root)[0] if p.suffix.lower() == ".parquet"]
    if len(files) > 1:
        raise DatasetError(
            f"{root} has {len(files)} parquet files: {files[0].name}, {files[1].name}, ...",
            fix="give each data set a folder of its own",
        )
    found, order = parquet.find(files[0]) if files else _find_in_folders(root, left_out)
    if "train" not in found:
        return found, tuple(order)
    known = {name for name, _, _ in found["train"]}
    for split, pictures in found.items():
        if unknown := sorted({name for name, _, _ in pictures} - known):
            raise DatasetError(
                f"{root}: '{split}' has pictures of the class '{unknown[0]}', 'train' has none",
                fix="train on every class, or leave its pictures out",
            )
    return found, tuple(name for name in order if name in known)


def _find_in_folders(root: Path, left_out: Tally) -> tuple[dict[Split, list[Found]], list[str]]:
    """Pictures by split, and the class names in their order."""
    files, inner = folders.entries(root, left_out)
    _refuse_other_case(inner, _SPLITS)
    splits = [split for split in _SPLITS if (root / split).is_dir()]
    by_split: dict[Split, list[Found]]
    if splits:
        by_split = {split: _find_by_class(root / split, left_out) for split in splits}
        folders.of_suffix(files, left_out, ())
        for folder in inner:
            if folder.name not in _SPLITS:
                left_out.add("folder", folder.name)
    else:
        by_split = dict.fromkeys(("val", "test"), _find_by_class(root, left_out))
    found = {split: pictures for split, pictures in by_split.items() if pictures}
    if found and (empty := [split for split in splits if split not in found]):
        raise DatasetError(
            f"{root / empty[0]} has no pictures by class",
            fix=f"put them into {empty[0]}/<class>, or remove the folder",
        )
    if not found:
        raise DatasetError(
            f"{root} has no pictures by class",
            fix="put them into train/<class>, val/<class> and test/<class>, or give a parquet "
            f"file with the columns {', '.join(parquet.COLUMNS)}; known suffixes are "
            f"{', '.join(sorted(SUFFIXES))}",
        )
    return found, sorted({name for pictures in found.values() for name, _, _ in pictures})


def _find_by_class(parent: Path, left_out: Tally) -> list[Found]:
    files, inner = folders.entries(parent, left_out)
    folders.of_suffix(files, left_out, ())
    found: list[Found] = []
    for folder in inner:
        paths = _files(folder, left_out)
        found += [(folder.name, path, None) for path in paths]
        if not paths:
            left_out.add("folder without pictures", folder.relative_to(parent.parent))
    return found


# --- target and references ----------------------------------------------------------------------


@dataclass(frozen=True)
class StripeSample:
    """One image of planes: a target and two references of the same place.

    Attributes:
        path: names the image, as ``runtime.planes.read`` takes it.
        paths: its files: one with all planes, or target and references.
        label: 0 normal, 1 with a defect in the target alone.
        defect: name of the defect's folder; ``good`` for normal images.
        mask_path: ground truth, non-zero where the target is defective; None for normal images,
            and for defective ones without a mask.
    """

    path: Path
    paths: tuple[Path, ...]
    label: int
    defect: str
    mask_path: Path | None


def strips(root: Path, split: StripeSplit) -> list[StripeSample]:
    """Images of planes, sorted by path; training images are normal.

    Images lie in ``train/good``, and in ``good`` and ``<defect>`` below ``valid`` and ``test``:
    one file with all planes each, or files of the same name in ``target``, ``ref1`` and ``ref2``
    below each of these folders. Masks are found as ``runtime.masks`` does; those of ``valid`` in
    ``ground_truth_valid`` where that exists. What is left out is logged.

    Raises:
        DatasetError: no images for that split; the missing folder is named. Or masks that some
            defective images lack, or that do not fit.
        ImageError: a target lacks a reference.
    """
    found = _Strips(root)
    labels.tell(root, found.left_out, found.notes)
    samples = found.samples(split)
    found.faults[split].check(root / split)
    return samples


def strip_labels(root: Path) -> Labelled:
    """The same set, as ``runtime.survey`` looks at it.

    Raises:
        DatasetError, ImageError: as ``strips``.
    """
    found = _Strips(root)
    splits: dict[str, tuple[Item, ...]] = {
        split: tuple(
            Item(
                sample.path.relative_to(root).as_posix(),
                sample.paths,
                partial(_target, sample.path),
                sample.defect,
                sample.mask_path,
            )
            for sample in found.samples(split)
        )
        for split in found.splits
    }
    return Labelled(splits, found.left_out, found.notes, found.faults)


class _Strips:
    """All of a set of planes.

    Attributes:
        splits: that there are folders of.
        left_out, notes, faults: see ``runtime.labels``; the faults are of the masks.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self.left_out = Tally()
        everything = masks.find_folder(root)
        for_valid = masks.find_folder(root, ("ground_truth_valid",))
        whole = Masks(everything, self.left_out)
        apart = Masks(for_valid, self.left_out) if for_valid else whole
        self._found: dict[StripeSplit, list[tuple[str, Path, Path | None]]] = {}
        known = {*get_args(StripeSplit), *(f.name for f in (everything, for_valid) if f)}
        for folder in _known_folders(root, known, self.left_out):
            if folder.name in get_args(StripeSplit):
                split: StripeSplit = folder.name  # type: ignore[assignment]
                self._found[split] = self._find(folder, apart if split == "valid" else whole)
        self.splits = [split for split in get_args(StripeSplit) if split in self._found]
        self.notes = Tally()
        for found in {id(each): each for each in (whole, apart)}.values():
            found.finish(normal=NORMAL)
            self.notes.merge(found.notes)
        self.faults: dict[str, Faults] = {
            "train": Faults(),
            "valid": apart.faults,
            "test": whole.faults,
        }

    def samples(self, split: StripeSplit) -> list[StripeSample]:
        """Of one split; raises what ``strips`` does."""
        if not self._found.get(split):
            raise DatasetError(
                f"{self._root} has no images for '{split}'",
                fix=f"put them into {'train/good' if split == 'train' else f'{split}/<defect>'}, "
                "or into target, ref1 and ref2 below that; known suffixes are "
                f"{', '.join(sorted(planes.SUFFIXES))}",
            )
        return [
            StripeSample(path, planes.files(path), int(defect != NORMAL), defect, mask)
            for defect, path, mask in self._found[split]
        ]

    def _find(self, split: Path, found: Masks) -> list[tuple[str, Path, Path | None]]:
        """Defect, place and mask of each image of a split."""
        images_of: list[tuple[str, Path, Path | None]] = []
        known = (NORMAL,) if split.name == "train" else None
        for folder in _known_folders(split, known, self.left_out):
            place = folder
            if (folder / planes.TARGET).is_dir():
                place = folder / planes.TARGET
                captures = _known_folders(
                    folder, {planes.TARGET, *planes.REFERENCES}, self.left_out
                )
                self._leave_out_references(captures)
            paths = _files(place, self.left_out, planes.SUFFIXES)
            if folder.name == NORMAL:
                images_of += [(NORMAL, path, None) for path in paths]
            else:
                kept, marked = found.pair(folder.name, paths)
                images_of += [(folder.name, *pair) for pair in zip(kept, marked, strict=True)]
        return images_of

    def _leave_out_references(self, captures: Iterable[Path]) -> None:
        """Say which references have no target."""
        files = {capture.name: folders.entries(capture)[0] for capture in captures}
        targets = {path.name for path in files.pop(planes.TARGET)}
        for name, found in files.items():
            for path in found:
                if path.name not in targets:
                    self.left_out.add("reference without a target", f"{name}/{path.name}")


def _target(path: Path) -> Array:
    """The first plane of an image as a grey picture, stretched over what it holds."""
    plane_HW = planes.read(path)[..., 0].astype(np.float32)
    low, high = float(plane_HW.min()), float(plane_HW.max())
    grey_HW = np.rint(255 * (plane_HW - low) / max(high - low, 1e-12)).astype(np.uint8)
    return np.repeat(grey_HW[..., None], 3, axis=2)

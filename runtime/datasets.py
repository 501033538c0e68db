"""Folders of labelled data: layouts on disk to lists of samples. Finding them decodes nothing."""

from __future__ import annotations

import atexit
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from runtime import images, planes
from runtime.errors import BackendError, DatasetError, ImageError
from runtime.files import scratch
from runtime.images import SUFFIXES
from runtime.tensors import Array

NORMAL = "good"
Split: TypeAlias = Literal["train", "val", "test"]

_SPLITS: tuple[Split, ...] = get_args(Split)
_COLUMNS = ("image", "label", "class_name", "split")
_ROWS_AT_ONCE = 16  # that are unpacked from a parquet file


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

    * ``train/good``, MVTec AD: tested on ``test/good`` and ``test/<defect>``, with masks in
      ``ground_truth/<defect>/<name>_mask.png``.
    * ``images/good``, not split: ``images/<defect>`` and the same masks. Of the normal pictures,
      sorted by name, the 1st, 3rd, 5th, ... are for training; all others are for testing.

    A folder for testing alone may have ``test`` and the masks only.

    Raises:
        DatasetError: neither layout, or no pictures for that split; the missing folder is named.
    """
    if (root / "train" / NORMAL).is_dir():
        if split == "train":
            return _checked(_folder(root / "train" / NORMAL, root), root / "train" / NORMAL)
        return _checked(_folders(root / "test", root), root / "test")
    if (root / "images" / NORMAL).is_dir():
        training = _folder(root / "images" / NORMAL, root)[::2]
        if split == "train":
            return _checked(training, root / "images" / NORMAL)
        seen = {sample.path for sample in training}
        found = [s for s in _folders(root / "images", root) if s.path not in seen]
        return _checked(found, root / "images")
    if split == "test" and (root / "test").is_dir():
        return _checked(_folders(root / "test", root), root / "test")
    raise DatasetError(
        f"{root} has neither train/{NORMAL} nor images/{NORMAL}",
        fix=f"put normal pictures into train/{NORMAL}, and for testing normal ones into "
        f"test/{NORMAL} and defective ones into test/<defect>",
    )


def _checked(samples: list[MvtecSample], folder: Path) -> list[MvtecSample]:
    if not samples:
        raise DatasetError(
            f"{folder} {'has no pictures' if folder.is_dir() else 'does not exist'}",
            fix=f"put pictures there; known suffixes are {', '.join(sorted(SUFFIXES))}",
        )
    return samples


def _folders(parent: Path, root: Path) -> list[MvtecSample]:
    folders = sorted(p for p in parent.iterdir() if p.is_dir()) if parent.is_dir() else []
    return [sample for folder in folders for sample in _folder(folder, root)]


def _folder(folder: Path, root: Path) -> list[MvtecSample]:
    """All pictures of one folder, which is named after their defect."""
    defect = folder.name
    label = int(defect != NORMAL)
    samples = []
    for path in sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES):
        mask = root / "ground_truth" / defect / f"{path.stem}_mask.png"
        known = label and mask.is_file()
        samples.append(MvtecSample(path, label, defect, mask if known else None))
    return samples


# --- classes ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PackedPicture:
    """An encoded picture that came from a parquet file's row: bytes ``start`` to ``stop``."""

    row: int
    file: Path
    start: int
    stop: int


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
    return tuple(_find_classes(root)[0])


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
    pictures, labels = _find_classes(root)
    if split not in pictures:
        raise DatasetError(
            f"{root} has no pictures of the split '{split}', only of {', '.join(pictures)}",
            fix=f"put them into {split}/<class>/",
        )
    index = {name: i for i, name in enumerate(labels)}
    file, in_parquet = pictures[split][0][1:]
    packed = {} if in_parquet is None else _unpack(file, file.stat().st_mtime_ns)
    samples = [
        ClassSample(path, index[name], name, None if row is None else packed[row])
        for name, path, row in pictures[split]
    ]
    return ClassFolder(tuple(samples), labels)


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


# class name, file, row of a parquet file
_Found: TypeAlias = tuple[str, Path, int | None]


def _find_classes(root: Path) -> tuple[dict[Split, list[_Found]], tuple[str, ...]]:
    """The pictures of each split that has any, and the class names by index."""
    files = [root] if root.is_file() else sorted(root.glob("*.parquet"))
    if len(files) > 1:
        raise DatasetError(
            f"{root} has {len(files)} parquet files: {files[0].name}, {files[1].name}, ...",
            fix="give each data set a folder of its own",
        )
    found, order = _find_in_parquet(files[0]) if files else _find_in_folders(root)
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


def _find_in_folders(root: Path) -> tuple[dict[Split, list[_Found]], list[str]]:
    """Pictures by split, and the class names in their order."""
    if any((root / split).is_dir() for split in _SPLITS):
        by_split = {split: _find_by_class(root / split) for split in _SPLITS}
    else:
        by_split = dict.fromkeys(("val", "test"), _find_by_class(root))
    found = {split: pictures for split, pictures in by_split.items() if pictures}
    if not found:
        raise DatasetError(
            f"{root} has no pictures by class",
            fix="put them into train/<class>, val/<class> and test/<class>, or give a parquet "
            f"file with the columns {', '.join(_COLUMNS)}; known suffixes are "
            f"{', '.join(sorted(SUFFIXES))}",
        )
    return found, sorted({name for pictures in found.values() for name, _, _ in pictures})


def _find_by_class(parent: Path) -> list[_Found]:
    # a hidden folder, such as an editor leaves behind, is no class
    paths = [path for path in sorted(parent.glob("[!.]*/*")) if path.suffix.lower() in SUFFIXES]
    return [(path.parent.name, path, None) for path in paths]


def _find_in_parquet(path: Path) -> tuple[dict[Split, list[_Found]], list[str]]:
    """Rows by split, and the class names in the order of their labels."""
    file = _open_parquet(path)
    table = file.read(columns=list(_COLUMNS[1:]))
    labels, names, splits = (table.column(name).to_pylist() for name in _COLUMNS[1:])
    for row, (label, name, split) in enumerate(zip(labels, names, splits, strict=True)):
        if not isinstance(label, int) or not isinstance(name, str) or split not in _SPLITS:
            raise DatasetError(
                f"{path}, row {row}: label {label!r}, class_name {name!r}, split {split!r}",
                fix="every row needs an integer, a text and one of train, val and test",
            )
    name_of = dict(zip(labels, names, strict=True))
    label_of = dict(zip(names, labels, strict=True))
    for label, name in zip(labels, names, strict=True):
        if name_of[label] != name:
            raise DatasetError(
                f"{path}: label {label} stands for both '{name}' and '{name_of[label]}'",
                fix="give every class one label",
            )
        if label_of[name] != label:
            raise DatasetError(
                f"{path}: class '{name}' has both label {label} and {label_of[name]}",
                fix="give every class one label",
            )
    rows: dict[Split, list[_Found]] = {
        split: [(names[i], path, i) for i, value in enumerate(splits) if value == split]
        for split in _SPLITS
    }
    return {split: found for split, found in rows.items() if found}, [
        name_of[label] for label in sorted(name_of)
    ]


def _open_parquet(path: Path) -> Any:
    """A ``pyarrow.parquet.ParquetFile`` with the columns of a classification set."""
    try:
        from pyarrow import ArrowException, types
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError as error:
        raise BackendError(
            f"reading {path} needs pyarrow, which is not installed",
            fix='pip install "engineworks[parquet]"',
        ) from error
    try:
        # buffered: else the pictures of a whole row group are read at once
        file = ParquetFile(path, pre_buffer=False, buffer_size=2**20)
    except (ArrowException, OSError) as error:
        raise DatasetError(
            f"{path} cannot be read as parquet: {error}", fix="copy the file again"
        ) from error
    schema = file.schema_arrow
    if missing := [name for name in _COLUMNS if name not in schema.names]:
        raise DatasetError(
            f"{path} lacks {', '.join(missing)}: its columns are {', '.join(schema.names)}",
            fix=f"the columns must be called {', '.join(_COLUMNS)}",
        )
    kind = schema.field("image").type
    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if not (types.is_binary(kind) or types.is_large_binary(kind)):
        raise DatasetError(
            f"{path}: the column image holds {kind}",
            fix="store encoded pictures: binary, or a struct with a binary field bytes",
        )
    return file


@cache
def _unpack(path: Path, _mtime_ns: int) -> dict[int, PackedPicture]:
    """Write the pictures of all rows one behind the other into a temporary file."""
    from pyarrow import ArrowException

    kept = ExitStack()
    atexit.register(kept.close)
    folder = kept.enter_context(scratch(path.parent))
    unpacked = folder / "pictures"
    found: dict[int, PackedPicture] = {}
    try:
        with unpacked.open("wb") as target:
            for batch in _open_parquet(path).iter_batches(_ROWS_AT_ONCE, columns=["image"]):
                for value in batch.column(0).to_pylist():
                    row, start = len(found), target.tell()
                    data = value["bytes"] if isinstance(value, dict) else value
                    if not data:
                        raise DatasetError(
                            f"{path}, row {row} has no picture", fix="leave the row out"
                        )
                    stop = start + target.write(data)
                    found[row] = PackedPicture(row, unpacked, start, stop)
    except (ArrowException, OSError) as error:
        raise DatasetError(
            f"the pictures of {path} cannot be unpacked into {folder}: {error}",
            fix="copy the file again, and make room in the temporary folder",
        ) from error
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


def strips(root: Path, split: Literal["train", "valid", "test"]) -> list[StripeSample]:
    """Images of planes, sorted by path; training images are normal.

    Images lie in ``train/good``, and in ``good`` and ``<defect>`` below ``valid`` and ``test``:
    one file with all planes each, or files of the same name in ``target``, ``ref1`` and ``ref2``
    below each of these folders. Masks are ``ground_truth/<defect>/<name>_mask`` with any suffix,
    for ``valid`` in ``ground_truth_valid`` where that exists.

    Raises:
        DatasetError: no images for that split; the missing folder is named.
        ImageError: a target lacks a reference.
    """
    if split == "train":
        folders = [root / "train" / NORMAL]
    else:
        folders = sorted(p for p in (root / split).glob("[!.]*") if p.is_dir())
    apart = root / "ground_truth_valid"
    masks = apart if split == "valid" and apart.is_dir() else root / "ground_truth"
    found = [sample for folder in folders for sample in _strips(folder, masks)]
    if not found:
        raise DatasetError(
            f"{root} has no images for '{split}'",
            fix=f"put them into {'train/good' if split == 'train' else f'{split}/<defect>'}, or "
            "into target, ref1 and ref2 below that; known suffixes are "
            f"{', '.join(sorted(planes.SUFFIXES))}",
        )
    return found


def _strips(folder: Path, masks: Path) -> list[StripeSample]:
    """All images of one folder, which is named after their defect."""
    defect = folder.name
    label = int(defect != NORMAL)
    place = folder / planes.TARGET if (folder / planes.TARGET).is_dir() else folder
    paths = sorted(place.glob("[!.]*")) if place.is_dir() else []
    known = {p.stem: p for p in (masks / defect).glob("[!.]*") if p.suffix.lower() in SUFFIXES}
    return [
        StripeSample(
            path,
            planes.files(path),
            label,
            defect,
            known.get(f"{path.stem}_mask") if label else None,
        )
        for path in paths
        if path.suffix.lower() in planes.SUFFIXES
    ]

"""Folders of labelled data: layouts on disk to lists of samples. No pixels are read here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from runtime.errors import DatasetError
from runtime.images import SUFFIXES

NORMAL = "good"


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

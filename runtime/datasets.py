"""Folders of labelled data: layouts on disk to lists of samples. No pixels are read here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from runtime.errors import DatasetError
from runtime.images import SUFFIXES


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
    """Samples of an anomaly detection set, sorted by path.

    Two layouts are known:

    * MVTec AD: ``train/good``, ``test/good``, ``test/<defect>`` and
      ``ground_truth/<defect>/<name>_mask.png``.
    * unsplit: ``images/good``, ``images/<defect>`` and the same ground truth. Of the sorted good
      pictures the 1st, 3rd, 5th, ... are for training; all others are for testing.

    Raises:
        DatasetError: neither layout, or no normal pictures to train on.
    """
    if (root / "train" / "good").is_dir():
        folder = root / split
        if split == "train":
            return _normal(_pictures(folder / "good"), folder / "good")
        if not folder.is_dir():
            raise DatasetError(f"{root} has no folder test")
        return _folders(folder, root / "ground_truth")
    if (root / "images" / "good").is_dir():
        everything = _folders(root / "images", root / "ground_truth")
        good = [sample for sample in everything if not sample.label]
        train = good[::2]
        if split == "train":
            return _normal([sample.path for sample in train], root / "images" / "good")
        return [sample for sample in everything if sample not in train]
    raise DatasetError(
        f"{root} has neither train/good nor images/good",
        fix="put normal pictures into train/good, defective ones into test/<defect>",
    )


def _normal(paths: list[Path], folder: Path) -> list[MvtecSample]:
    if not paths:
        raise DatasetError(f"{folder} has no pictures", fix="put normal pictures there")
    return [MvtecSample(path, 0, "good", None) for path in paths]


def _folders(root: Path, truth: Path) -> list[MvtecSample]:
    samples = []
    for folder in sorted(p for p in root.iterdir() if p.is_dir()):
        for path in _pictures(folder):
            mask = truth / folder.name / f"{path.stem}_mask.png"
            defective = folder.name != "good"
            samples.append(
                MvtecSample(
                    path,
                    int(defective),
                    folder.name,
                    mask if defective and mask.is_file() else None,
                )
            )
    return samples


def _pictures(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)

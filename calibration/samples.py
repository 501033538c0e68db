"""Which images calibrate: chosen by a seed, listed with their hashes."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engineworks.runtime.bundle import sha256_file
from engineworks.runtime.errors import DatasetError
from engineworks.runtime.sources import PICTURES, Reader


@dataclass(frozen=True)
class Sample:
    """One image.

    Attributes:
        path: where it is now.
        name: its path relative to the folder it was chosen from, with ``/``.
        sha256: of its bytes, lower-case hex; of the hashes of its files where it has several.
    """

    path: Path
    name: str
    sha256: str


def choose(folder: Path, num: int, seed: int = 0, *, reader: Reader = PICTURES) -> list[Sample]:
    """Draw images from a folder and its sub-folders: the same ones for the same files and seed.

    Args:
        folder: with at least ``num`` images.
        num: how many, at least 1.
        seed: of the draw.
        reader: of the system that the images are for.

    Returns:
        ``num`` samples, sorted by name.

    Raises:
        DatasetError: no such folder, no image in it, or fewer than ``num``.
        ImageError: a file of a chosen image is missing.
    """
    if not folder.is_dir():
        raise DatasetError(f"there is no folder {folder}", fix="give the folder of sample images")
    names = sorted(path.relative_to(folder).as_posix() for path in reader.below(folder))
    if not names:
        raise DatasetError(
            f"there are no images in {folder}",
            fix=f"give a folder with files of {', '.join(sorted(reader.suffixes))}",
        )
    if not 1 <= num <= len(names):
        raise DatasetError(
            f"{folder} has {len(names)} images, {num} were asked for",
            fix=f"ask for 1 to {len(names)}, or add images",
        )
    chosen = sorted(random.Random(seed).sample(names, num))
    return [Sample(folder / name, name, _sha256(reader.files(folder / name))) for name in chosen]


def _sha256(files: Sequence[Path]) -> str:
    digests = [sha256_file(file) for file in files]
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("".join(digests).encode()).hexdigest()

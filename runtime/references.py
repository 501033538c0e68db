"""References, pictures of objects to be found, and prototypes, the vectors that they become.

    folder of pictures -> references -> ``encode`` graph -> Prototypes <-> small .npz file

Neither file holds a pickle. Prototypes mean something to the encoder that made them and to no
other, so they carry the SHA-256 of its float graph.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np

from engineworks.runtime import files, folders, images, npy
from engineworks.runtime.errors import InputError
from engineworks.runtime.folders import Tally
from engineworks.runtime.preprocess import PreprocessSpec, place
from engineworks.runtime.sources import PICTURES
from engineworks.runtime.tensors import Array

# name of an object -> pictures of it, (H, W, 3) uint8 each, of any sizes
References: TypeAlias = Mapping[str, Sequence[Array]]

SUFFIX = ".npz"


@dataclass(frozen=True, eq=False)
class Prototypes:
    """What frames can be searched for: a vector per object.

    Attributes:
        names: of the N objects, none twice.
        rows_NP: (N, P) float32; the part of each scale has unit length.
        encoder: SHA-256 of the float ``encode`` graph that made them, lower-case hex.
    """

    names: tuple[str, ...]
    rows_NP: Array
    encoder: str

    def save(self, path: Path) -> None:
        """Write them into a file of a few kB, in one step.

        Raises:
            InputError: the name does not end in ``.npz``.
        """
        if path.suffix != SUFFIX:
            raise InputError(
                f"prototypes are kept in {SUFFIX} files, not in {path.name}",
                fix=f"call it {path.stem}{SUFFIX}",
            )
        _write(path, names=_texts(self.names), rows=self.rows_NP, encoder=_texts([self.encoder]))

    @classmethod
    def load(cls, path: Path) -> Prototypes:
        """Read what ``save`` wrote.

        Raises:
            InputError: there is no such file, it is damaged, or holds something else.
        """
        kinds = {"names": "U", "rows": "f", "encoder": "U"}
        content = _arrays(_content(path), str(path), kinds, "prototypes")
        names, rows = content["names"], content["rows"]
        fits = names.ndim == 1 and rows.ndim == 2 and len(names) == len(rows)
        if not fits or content["encoder"].shape != (1,) or len(set(names.tolist())) != len(names):
            raise InputError(
                f"{path} does not hold a vector for each of its names", fix="make the file again"
            )
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite
            rows = rows.astype(np.float32)
        if not np.isfinite(rows).all():
            raise InputError(
                f"{path} holds prototypes that are not finite", fix="make the file again"
            )
        return cls(tuple(names.tolist()), rows, str(content["encoder"][0]))


def average(rows_KP: Array, widths: Sequence[int]) -> Array:
    """The prototype of an object of which there are K pictures.

    Args:
        rows_KP: (K, P) one row per picture, as the ``encode`` graph gives them; K >= 1.
        widths: of the parts of a row, one per scale; their sum is P.

    Returns:
        (P,) float32: the mean of each part, brought back to unit length.
    """
    mean_P = rows_KP.mean(axis=0, dtype=np.float64)
    parts = np.split(mean_P, np.cumsum(widths)[:-1])
    lengths = np.repeat([max(float(np.linalg.norm(part)), 1e-12) for part in parts], widths)
    return np.asarray(mean_P / lengths, np.float32)


def read_references(path: Path) -> dict[str, list[Array]]:
    """References as a user keeps them.

    Args:
        path: a folder with a folder of pictures per object, named like it; a folder of pictures of
            one object; or a single picture. The last two give the object their own name.

    Returns:
        name -> pictures, both in alphabetical order.

    Raises:
        InputError: nothing there, no pictures, or pictures beside folders of pictures.
        ImageError: a picture cannot be read.
    """
    if path.is_file():
        files = {path.stem: PICTURES.find([path], Tally())}
    elif path.is_dir():
        left_out = Tally()
        beside, inner = folders.entries(path, left_out)
        flat = PICTURES.find(beside, left_out)
        files = {each.name: pictures_in(each, left_out) for each in inner}
        files = {name: found for name, found in files.items() if found}
        folders.tell(path, left_out)
        if flat and files:
            raise InputError(
                f"{path} holds pictures beside folders of pictures ({', '.join(files)})",
                fix="put the pictures of each object into a folder of its name",
            )
        if flat:
            files = {path.resolve().name: flat}
    else:
        raise InputError(f"there is nothing at {path}", fix="give a folder of reference pictures")
    if not any(files.values()):
        raise InputError(
            f"there are no pictures in {path}",
            fix="give DIR/<name of object>/*.png, or a folder of pictures of one object",
        )
    return {name: [images.read(file) for file in found] for name, found in files.items()}


def pictures_in(folder: Path, left_out: Tally) -> list[Path]:
    """The pictures of one object, sorted; what lies beside them goes to ``left_out``."""
    files, inner = folders.entries(folder, left_out)
    for each in inner:
        left_out.add("nested folder", each.relative_to(folder.parent))
    return PICTURES.find(files, left_out)


def save_references(path: Path, references: References, spec: PreprocessSpec) -> None:
    """Write references into one file, at the size that the ``encode`` graph takes.

    Args:
        path: ends in ``.npz``.
        spec: of the references.
    """
    names = [name for name, pictures in references.items() for _ in pictures]
    pictures = [place(spec, picture) for found in references.values() for picture in found]
    _write(path, names=_texts(names), pictures=np.stack(pictures))


def load_references(path: Path) -> dict[str, list[Array]]:
    """Read what ``save_references`` wrote: name -> (S, S, 3) uint8 pictures, in its order.

    Raises:
        InputError: there is no such file, it is damaged, or holds something else.
    """
    return decode_references(_content(path), str(path))


def decode_references(data: bytes, name: str) -> dict[str, list[Array]]:
    """As ``load_references``, of the content of such a file.

    Args:
        name: what errors call it.
    """
    content = _arrays(data, name, {"names": "U", "pictures": "u"}, "references")
    names, pictures = content["names"].tolist(), content["pictures"]
    whole = pictures.ndim == 4 and pictures.dtype == np.uint8 and pictures.size > 0
    if not whole or pictures.shape[3] != 3 or not isinstance(names, list):
        raise InputError(f"{name} does not hold (N, S, S, 3) pictures with their names")
    if len(names) != len(pictures):
        raise InputError(f"{name} does not hold a name for each of its pictures")
    found: dict[str, list[Array]] = {name: [] for name in names}
    for name, picture in zip(names, pictures, strict=True):
        found[name].append(picture)
    return found


def _texts(texts: Sequence[str]) -> Array:
    return np.array(texts, np.str_)


def _write(path: Path, **arrays: Array) -> None:
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)  # type: ignore[arg-type]
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, content.getvalue())


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


def _arrays(data: bytes, name: str, kinds: Mapping[str, str], what: str) -> dict[str, Array]:
    """The arrays of a file, each of the NumPy kind that it must have."""
    try:
        content = npy.decode_archive(data, name)
    except InputError as error:
        raise InputError(
            f"{name} cannot be read as {what}: {error.message}",
            fix=error.fix if "allowed" in error.message else "make it with `cli.py refs`",
        ) from error
    if {name: array.dtype.kind for name, array in content.items()} != kinds:
        raise InputError(f"{name} does not hold {what}", fix="make it with `cli.py refs`")
    return content

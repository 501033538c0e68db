"""References, pictures of objects to be found, and prototypes, the vectors that they become.

    folder of pictures -> references -> ``encode`` graph -> Prototypes <-> small .npz file

Neither file holds a pickle. Prototypes mean something to the encoder that made them and to no
other, so they carry the SHA-256 of its float graph.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import cv2
import numpy as np

from engineworks.runtime import files, folders, images, npy
from engineworks.runtime.errors import InputError
from engineworks.runtime.folders import Tally
from engineworks.runtime.preprocess import PreprocessSpec, check_image, place
from engineworks.runtime.sources import PICTURES
from engineworks.runtime.tensors import Array
from engineworks.runtime.video import VideoFile

SUFFIX = ".npz"
NOT = "not-"  # how names begin of what must not be taken for an object
_MARGIN = 0.05  # around a box that is cut out, as a share of its sides
Box: TypeAlias = tuple[float, float, float, float]  # xyxy in pixels


@dataclass(frozen=True, eq=False)
class View:
    """A picture that shows an object among other things.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        box: of the object in it.
    """

    image: Array
    box: Box

    def cut(self) -> Array:
        """The object with a little around it."""
        x1, y1, x2, y2 = self.box
        across, down = _MARGIN * (x2 - x1), _MARGIN * (y2 - y1)
        height, width = self.image.shape[:2]
        left, right = max(0, int(x1 - across)), min(width, int(x2 + across) + 1)
        top, bottom = max(0, int(y1 - down)), min(height, int(y2 + down) + 1)
        return self.image[top:bottom, left:right]


# (H, W, 3) uint8 of the object alone, or a view of it among other things; of any sizes
Picture: TypeAlias = Array | View
# name of an object -> pictures of it
References: TypeAlias = Mapping[str, Sequence[Picture]]


def alone(picture: Picture) -> Array:
    """What of a picture shows the object."""
    return picture.cut() if isinstance(picture, View) else picture


def centred(spec: PreprocessSpec, share: float, picture: Picture) -> View:
    """The object in the middle of a picture of ``spec.size``, with what is around it.

    Args:
        share: of the picture's shorter side, that the object's longer side takes.

    Raises:
        InputError: the box has no area, or the picture another dtype or layout.
    """
    view = picture if isinstance(picture, View) else _whole(picture)
    check_image(view.image)
    x1, y1, x2, y2 = view.box
    if not (x2 > x1 and y2 > y1):
        raise InputError(f"the box {view.box} of a reference has no area", fix="give another box")
    height, width = spec.size
    scale = share * min(height, width) / max(x2 - x1, y2 - y1)
    image, centre = view.image, np.array([x1 + x2, y1 + y2]) / 2
    half = scale * np.array([x2 - x1, y2 - y1]) / 2
    if scale < 1:  # averaged, not sampled: the warp below reads four pixels
        before = np.array(image.shape[1::-1])
        small = np.maximum(1, np.round(scale * before)).astype(int)
        image = cv2.resize(image, tuple(small.tolist()), interpolation=cv2.INTER_AREA)
        factors = small / before
        centre, zoom = centre * factors, scale / factors
    else:
        zoom = np.array([scale, scale])
    middle = np.array([width, height]) / 2
    # the warp counts from pixel centres at integers
    shift = middle - zoom * centre + 0.5 * zoom - 0.5
    affine = np.column_stack([np.diag(zoom), shift])
    placed = cv2.warpAffine(
        image,
        affine,
        (width, height),
        flags=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=(spec.pad_value,) * 3,
    )
    left, top, right, bottom = np.concatenate([middle - half, middle + half]).tolist()
    return View(np.asarray(placed), (left, top, right, bottom))


def _whole(picture: Array) -> View:
    return View(picture, (0.0, 0.0, float(picture.shape[1]), float(picture.shape[0])))


@dataclass(frozen=True, eq=False)
class Prototypes:
    """What frames can be searched for: a vector per object.

    Attributes:
        names: of the N objects, none twice.
        rows_NP: (N, P) float32; the part of each scale has unit length.
        encoder: SHA-256 of the float ``encode`` graph that made them, lower-case hex.
        pictures: what they were made of, to be shown; a file does not keep it.
    """

    names: tuple[str, ...]
    rows_NP: Array
    encoder: str
    pictures: References = field(default_factory=dict)

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


def mean_template(rows_KP: Array) -> Array:
    """The prototype of an object from rows that are templates: their mean, (P,) float32.

    Where references agree, the mean of their cells stays long, and it counts more.
    """
    return np.asarray(rows_KP.mean(axis=0, dtype=np.float64), np.float32)


def read_references(*paths: Path) -> dict[str, list[Picture]]:
    """References as a user keeps them.

    Args:
        paths: each a folder with a folder of pictures per object, named like it; a folder of
            pictures of one object; a single picture; a box in a picture or in a frame of a video:
            ``[NAME=]FILE[#FRAME]@X,Y,W,H``, in pixels from the top left corner, frames counted from
            0; the box around a mask, a picture of the same size that is 0 beside the object:
            ``[NAME=]FILE[#FRAME]@MASK``; or COCO's ``annotations_<split>.json``, see
            ``runtime.objects``: a few boxes of each of its categories. What has no name is named
            like its folder or file. All references of a name are of one object.

    Returns:
        name -> pictures, both in alphabetical order.

    Raises:
        InputError: nothing there, no pictures, or pictures beside folders of pictures.
        ImageError, VideoError: a picture or frame cannot be read.
    """
    found: dict[str, list[Picture]] = {}
    for path in paths:
        boxed = None if path.exists() else _BOXED.fullmatch(str(path))
        named = (
            {boxed["name"] or Path(boxed["file"]).stem: [_view(boxed)]} if boxed else _read(path)
        )
        for name, pictures in named.items():
            found.setdefault(name, []).extend(pictures)
    return {name: found[name] for name in sorted(found)}


_BOXED = re.compile(
    r"(?:(?P<name>[^=/]+)=)?(?P<file>[^=].*?)(?:#(?P<frame>\d+))?"
    r"@(?:(?P<box>[-+.\d]+(?:,[-+.\d]+){3})|(?P<mask>[^@]+\.\w+))"
)


def _view(boxed: re.Match[str]) -> View:
    """The picture and the box of a text that ``_BOXED`` matches."""
    path = Path(boxed["file"])
    if not path.is_file():
        raise InputError(f"there is nothing at {path}", fix="give a picture, or a video")
    if boxed["frame"] is None:
        image = images.read(path)
    else:
        with VideoFile(path) as video:
            if (index := int(boxed["frame"])) >= len(video):
                raise InputError(f"{path} has no frame {index}, the last one is {len(video) - 1}")
            image = video.read(index)
    return View(image, _masked(boxed, image) if boxed["mask"] else _boxed(boxed, image))


def _boxed(boxed: re.Match[str], image: Array) -> Box:
    """The box xyxy that a text names."""
    path = boxed["file"]
    try:
        x, y, width, height = map(float, boxed["box"].split(","))
    except ValueError:
        x = y = width = height = 0.0
    if not (width > 0 and height > 0):
        raise InputError(
            f"'@{boxed['box']}' behind {path} is no box", fix="write @X,Y,W,H with W and H above 0"
        )
    if x < 0 or y < 0 or x + width > image.shape[1] or y + height > image.shape[0]:
        raise InputError(
            f"the box {boxed['box']} lies outside of {path}, of "
            f"{image.shape[1]} x {image.shape[0]} pixels",
            fix="give x, y, width and height in pixels of the picture",
        )
    return x, y, x + width, y + height


def _masked(boxed: re.Match[str], image: Array) -> Box:
    """The box xyxy around what a mask shows."""
    path = Path(boxed["mask"])
    if not path.is_file():
        raise InputError(f"there is no mask at {path}", fix="give FILE@X,Y,W,H or FILE@MASK")
    mask = images.read_mask(path) > 0
    if mask.shape != image.shape[:2]:
        raise InputError(
            f"the mask {path} has {mask.shape[1]} x {mask.shape[0]} pixels, {boxed['file']} has "
            f"{image.shape[1]} x {image.shape[0]}",
            fix="give a mask of the picture's size",
        )
    if not mask.any():
        raise InputError(f"the mask {path} shows nothing", fix="what is not 0 is the object")
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return float(columns[0]), float(rows[0]), columns[-1] + 1.0, rows[-1] + 1.0


def _read(path: Path) -> dict[str, list[Picture]]:
    """Pictures of objects that lie in a folder or a file."""
    if path.suffix == ".json":
        from engineworks.runtime.frames import (
            read_coco_references,
        )  # which knows references as well

        return read_coco_references(path)
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
        raise InputError(
            f"there is nothing at {path}",
            fix="give a folder of reference pictures, or a box in one: FILE@X,Y,W,H",
        )
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


def save_references(
    path: Path, references: References, spec: PreprocessSpec, share: float | None = None
) -> None:
    """Write references into one file, at the size that the ``encode`` graph takes.

    Args:
        path: ends in ``.npz``.
        spec: of the references.
        share: see ``centred``, for a graph that takes objects with what is around them; None: it
            takes them alone.
    """
    names = [name for name, pictures in references.items() for _ in pictures]
    found = [picture for pictures in references.values() for picture in pictures]
    if share is None:
        pictures = [place(spec, alone(picture)) for picture in found]
        _write(path, names=_texts(names), pictures=np.stack(pictures))
        return
    views = [centred(spec, share, picture) for picture in found]
    _write(
        path,
        names=_texts(names),
        pictures=np.stack([view.image for view in views]),
        boxes=np.array([view.box for view in views], np.float32),
    )


def load_references(path: Path) -> dict[str, list[Picture]]:
    """Read what ``save_references`` wrote: name -> pictures (S, S, 3) or views, in its order.

    Raises:
        InputError: there is no such file, it is damaged, or holds something else.
    """
    return decode_references(_content(path), str(path))


def decode_references(data: bytes, name: str) -> dict[str, list[Picture]]:
    """As ``load_references``, of the content of such a file.

    Args:
        name: what errors call it.
    """
    content = _arrays(data, name, {"names": "U", "pictures": "u"}, "references", {"boxes": "f"})
    names, pictures = content["names"].tolist(), content["pictures"]
    whole = pictures.ndim == 4 and pictures.dtype == np.uint8 and pictures.size > 0
    if not whole or pictures.shape[3] != 3 or not isinstance(names, list):
        raise InputError(f"{name} does not hold (N, S, S, 3) pictures with their names")
    if len(names) != len(pictures):
        raise InputError(f"{name} does not hold a name for each of its pictures")
    boxes = content.get("boxes")
    if boxes is not None and (boxes.shape != (len(names), 4) or not np.isfinite(boxes).all()):
        raise InputError(f"{name} does not hold a box for each of its pictures")
    found: dict[str, list[Picture]] = {name: [] for name in names}
    for i, (name, picture) in enumerate(zip(names, pictures, strict=True)):
        if boxes is not None:
            x1, y1, x2, y2 = boxes[i].tolist()
            picture = View(picture, (x1, y1, x2, y2))
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


def _arrays(
    data: bytes,
    name: str,
    kinds: Mapping[str, str],
    what: str,
    optional: Mapping[str, str] | None = None,
) -> dict[str, Array]:
    """The arrays of a file, each of the NumPy kind that it must have."""
    try:
        content = npy.decode_archive(data, name)
    except InputError as error:
        raise InputError(
            f"{name} cannot be read as {what}: {error.message}",
            fix=error.fix if "allowed" in error.message else "make it with `cli.py refs`",
        ) from error
    found = {name: array.dtype.kind for name, array in content.items()}
    if found not in (dict(kinds), {**kinds, **(optional or {})}):
        raise InputError(f"{name} does not hold {what}", fix="make it with `cli.py refs`")
    return content

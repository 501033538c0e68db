"""Three captures of one place as the planes of one image: files to (H, W, 3) in their own dtype.

Plane 0 is the target, planes 1 and 2 are the references. Values are the sensor's own, never
rescaled here. The planes may lie

* in one file: TIFF (pages, or channels in either arrangement) and NPY in the order in which they
  are stored; PNG and JPEG as blue, green, red. Of four planes the last is dropped.
* in three files of the same name in the folders ``target``, ``ref1`` and ``ref2`` side by side, or
  in two: where there is no ``ref2``, the one reference stands for both. Such an image is named by
  its file in ``target``.
"""

from __future__ import annotations

import io
import itertools
import math
from pathlib import Path

import cv2
import numpy as np

from engineworks.runtime import images, npy, tiff
from engineworks.runtime.errors import ImageError, InputError
from engineworks.runtime.files import write as write_file
from engineworks.runtime.sources import Reader
from engineworks.runtime.tensors import Array

SUFFIXES = images.SUFFIXES | {".npy"}
DTYPES = ("uint8", "uint16", "float32")
TARGET, REFERENCES = "target", ("ref1", "ref2")
MAX_SHIFT = 3.0  # pixels between captures that are still taken for registered

_PARTS = (-0.5, 0.0, 0.5)  # of a pixel
_ALIKE = 0.9  # correlation of captures that agree
_MIN_SIDE = 32  # of planes whose displacement can be told
_CHECKED_SIDE = 384  # of a file that holds all three: a correlation of all of it takes too long

_NUM_CHANNELS = (3, 4)


def check_planes(image: Array) -> None:
    """Refuse what is not an (H, W, 3) image of a known dtype with finite values.

    Raises:
        InputError: names shape and dtype.
    """
    if image.dtype.name not in DTYPES or image.ndim != 3 or image.shape[2] != 3:
        raise InputError(
            f"planes must be (H, W, 3) {', '.join(DTYPES)}, got {image.shape} {image.dtype}",
            fix="read them with runtime.planes.read, or convert them",
        )
    if image.size == 0:
        raise InputError(f"planes of shape {image.shape} have no pixels")
    if image.dtype == np.float32 and not np.isfinite(image).all():
        raise InputError("planes hold values that are not finite", fix="mend or leave out the file")


def files(path: Path) -> tuple[Path, ...]:
    """The files of the image that ``path`` names: one, or target and references.

    Raises:
        ImageError: there are folders of references, and one lacks the file.
    """
    if path.parent.name != TARGET:
        return (path,)
    folders = [folder for name in REFERENCES if (folder := path.parent.with_name(name)).is_dir()]
    if not folders:
        return (path,)
    found = (path, *(folder / path.name for folder in folders))
    for file in found[1:]:
        if not file.is_file():
            raise ImageError(
                f"{path} has no reference {file}",
                fix="give the files of one image the same name in each folder",
            )
    return found


def is_reference(path: Path) -> bool:
    """Whether a file is no image by itself: it lies in a folder of references beside ``target``."""
    return path.parent.name in REFERENCES and path.parent.with_name(TARGET).is_dir()


def read(path: str | Path) -> Array:
    """Read the image that ``path`` names, from one file or from its three.

    Returns:
        (H, W, 3) uint8, uint16 or float32.

    Raises:
        ImageError: a file is missing, corrupt, of another layout or dtype, or the captures do not
            fit each other.
    """
    path = Path(path)
    found = files(path)
    if len(found) == 1:
        return decode(images.content(path), str(path))
    return read_triplet(found[0], found[1], found[-1])


def decode(data: bytes, name: str) -> Array:
    """As ``read``, of one file that holds all three planes.

    Args:
        data: the content of the file.
        name: what errors call it.
    """
    planes_HWC = _decode(data, name)
    if planes_HWC.shape[2] not in _NUM_CHANNELS:
        raise ImageError(
            f"{name} has {planes_HWC.shape[2]} planes, not target and two references",
            fix="give files with 3 planes, or the folders target, ref1 and ref2 with one each",
        )
    image = np.ascontiguousarray(planes_HWC[..., :3])
    _check_registered(name, image)
    return image


def _check_registered(name: str, planes_HWC: Array) -> None:
    """Refuse an image whose references are displaced, by what lies in its middle."""
    height, width = planes_HWC.shape[:2]
    top, left = max(0, height - _CHECKED_SIDE) // 2, max(0, width - _CHECKED_SIDE) // 2
    middle = planes_HWC[top : top + _CHECKED_SIDE, left : left + _CHECKED_SIDE]
    for plane in (1, 2):
        dy, dx = displacement(middle[..., 0], middle[..., plane])
        too_far = np.hypot(dy, dx) > MAX_SHIFT
        if too_far and _everywhere(middle[..., 0], middle[..., plane], dy, dx):
            raise ImageError(
                f"reference {plane} of {name} is displaced against its target by {dy:+d} rows and "
                f"{dx:+d} columns, more than {MAX_SHIFT:g} pixels",
                fix="register the captures, or pair the right ones",
            )


def _everywhere(plane_HW: Array, other_HW: Array, dy: int, dx: int) -> bool:
    """Whether each quarter of the overlap is explained by a displacement.

    Two defects on flat ground, one in each plane, lie on each other once moved, and are none: what
    is much brighter or darker than the rest counts no more than that. Nor is a pattern that repeats
    displaced, whose next period happens to fit by the part of a pixel better.
    """
    plane_HW, other_HW = map(_without_extremes, _within_one(plane_HW, other_HW))
    rows, columns = _overlap(plane_HW.shape[0], dy), _overlap(plane_HW.shape[1], dx)
    here, moved = plane_HW[rows[0], columns[0]], other_HW[rows[1], columns[1]]
    unmoved = other_HW[rows[0], columns[0]]
    nearby = [_moved(unmoved, y, x) for y in _PARTS for x in _PARTS]
    halves = [(slice(0, n // 2), slice(n // 2, n)) for n in here.shape]
    for q in itertools.product(*halves):
        as_they_lie = max(_correlation(here[q], near[q]) for near in nearby)
        explained = 1 - _correlation(here[q], moved[q]) < 0.5 * (1 - as_they_lie)
        if as_they_lie > _ALIKE or not explained:
            return False
    return True


def _within_one(*planes_HW: Array) -> list[Array]:
    """As float32 from -1 to 1, whose squares have sums: by a power of two, which rounds nothing.

    Values so small beside the largest one that float32 cannot hold them become 0.
    """
    largest = max(float(np.abs(p, dtype=np.float64).max()) for p in planes_HW)
    scale = -math.frexp(largest)[1]
    return [np.ldexp(p.astype(np.float32), scale) for p in planes_HW]


def _without_extremes(plane_HW: Array) -> Array:
    """Values below and above the 10 % and 90 % quantile are those: float32."""
    low, high = np.quantile(plane_HW, (0.1, 0.9))
    return np.asarray(np.clip(plane_HW, low, high), np.float32)


def _moved(plane_HW: Array, dy: float, dx: float) -> Array:
    """Down and right by parts of a pixel, bilinear; the border is repeated."""
    way = np.array([[1, 0, dx], [0, 1, dy]], np.float32)
    height, width = plane_HW.shape
    return np.asarray(
        cv2.warpAffine(plane_HW, way, (width, height), borderMode=cv2.BORDER_REPLICATE)
    )


def read_triplet(target: Path, ref1: Path, ref2: Path, *, max_shift: float = MAX_SHIFT) -> Array:
    """Read three files of one plane each; pictures in colour must be grey.

    Args:
        max_shift: how far a reference may be displaced against the target, in pixels.

    Returns:
        (H, W, 3) uint8, uint16 or float32.

    Raises:
        ImageError: as ``read``; also files of different size or dtype, and a reference that is
            displaced further.
    """
    paths = (target, ref1, ref2)
    found = [_read_plane(path) for path in paths]
    for path, plane_HW in zip(paths[1:], found[1:], strict=True):
        if plane_HW.shape != found[0].shape or plane_HW.dtype != found[0].dtype:
            raise ImageError(
                f"{path} is {plane_HW.shape} {plane_HW.dtype}, "
                f"{target} is {found[0].shape} {found[0].dtype}",
                fix="give captures of the same place with the same settings",
            )
        dy, dx = displacement(found[0], plane_HW)
        too_far = np.hypot(dy, dx) > max_shift
        if too_far and _everywhere(found[0], plane_HW, dy, dx):
            raise ImageError(
                f"{path} is displaced against {target} by {dy:+d} rows and {dx:+d} columns, "
                f"more than {max_shift:g} pixels",
                fix="register the captures, or pair the right files",
            )
    return np.stack(found, axis=-1)


def displacement(plane_HW: Array, other_HW: Array) -> tuple[int, int]:
    """How far ``other`` must be moved to lie on ``plane``: (rows, columns) in whole pixels.

    Phase correlation proposes a displacement. On periodic images many are equally good, so it is
    taken only where it explains more than half of what is left unexplained without it; else (0, 0),
    as for planes of less than 32 pixels, which say too little.

    Args:
        plane_HW, other_HW: (H, W), of one size.
    """
    a, b = (p - np.float32(p.mean(dtype=np.float64)) for p in _within_one(plane_HW, other_HW))
    height, width = a.shape
    if min(height, width) < _MIN_SIDE:
        return 0, 0
    window = np.outer(np.hanning(height + 2)[1:-1], np.hanning(width + 2)[1:-1])
    (x, y), _ = cv2.phaseCorrelate(b, a, window.astype(np.float32))
    dy, dx = round(y), round(x)
    if (dy, dx) == (0, 0) or abs(dy) >= height - 1 or abs(dx) >= width - 1:
        return 0, 0
    rows, columns = _overlap(height, dy), _overlap(width, dx)
    before = _correlation(a, b)
    after = _correlation(a[rows[0], columns[0]], b[rows[1], columns[1]])
    return (dy, dx) if 1 - after < 0.5 * (1 - before) else (0, 0)


def write(path: Path, planes_HWC: Array) -> None:
    """Write (H, W, 3) planes as ``read`` takes them, by the path's suffix: npy, tif, tiff or png.

    Raises:
        InputError: not planes.
        ImageError: another suffix, or a dtype that the format cannot hold.
    """
    check_planes(planes_HWC)
    suffix = path.suffix.lower()
    if suffix == ".npy":
        buffer = io.BytesIO()
        np.save(buffer, planes_HWC)
        write_file(path, buffer.getvalue(), durable=False)
    elif suffix in (".tif", ".tiff"):
        pages = [np.ascontiguousarray(planes_HWC[..., i]) for i in range(3)]
        write_file(path, cv2.imencodemulti(suffix, pages)[1].tobytes(), durable=False)
    elif suffix == ".png" and planes_HWC.dtype != np.float32:
        write_file(path, cv2.imencode(suffix, planes_HWC)[1].tobytes(), durable=False)
    else:
        raise ImageError(
            f"{path} cannot hold planes of {planes_HWC.dtype}", fix="write .npy or .tif"
        )


PLANES = Reader(
    read, SUFFIXES, lambda path: not is_reference(path), files, takes_video=False, decode=decode
)


def _overlap(length: int, shift: int) -> tuple[slice, slice]:
    """Where the first lies on the moved second, in the first and in the second."""
    ahead = slice(max(shift, 0), length + min(shift, 0))
    behind = slice(max(-shift, 0), length + min(-shift, 0))
    return ahead, behind


def _correlation(a: Array, b: Array) -> float:
    a, b = a - a.mean(dtype=np.float64), b - b.mean(dtype=np.float64)
    power = float((a * a).sum() * (b * b).sum())
    return float((a * b).sum()) / power**0.5 if power > 0 else 1.0  # nothing to be moved


def _read_plane(path: Path) -> Array:
    """(H, W) of a file with one plane, or with equal colours."""
    planes_HWC = _decode(images.content(path), str(path))
    if planes_HWC.shape[2] != 1 and (planes_HWC[..., :3] != planes_HWC[..., :1]).any():
        raise ImageError(
            f"{path} has {planes_HWC.shape[2]} planes, where one is expected",
            fix="save each capture as one grey picture",
        )
    return np.ascontiguousarray(planes_HWC[..., 0])


def _decode(data: bytes, name: str) -> Array:
    """(H, W, C) in the file's own dtype, one of ``DTYPES``."""
    if data.startswith(npy.MAGIC) or name.lower().endswith(".npy"):
        planes = _from_npy(data, name)
    else:
        parts = tiff.split_planes(data, name)
        pages = [page for part in parts for page in images.decode_pages(part, name)]
        stored = [page if page.ndim == 3 else page[..., None] for page in pages]
        if len({(page.shape, page.dtype) for page in stored}) > 1:
            raise ImageError(
                f"{name} has pages of different sizes or types",
                fix="save one image per file, without a preview",
            )
        planes = np.concatenate(stored, axis=2)
        if len(stored) == 1 and tiff.is_tiff(data) and planes.shape[2] in _NUM_CHANNELS:
            planes[..., :3] = planes[..., 2::-1].copy()  # the decoder has turned the order round
    if not planes.size:
        raise ImageError(f"{name} has no pixels", fix="leave it out")
    if planes.dtype.name not in DTYPES:
        raise ImageError(
            f"{name} holds {planes.dtype}", fix=f"save it as one of {', '.join(DTYPES)}"
        )
    if planes.dtype == np.float32 and not np.isfinite(planes).all():
        raise ImageError(f"{name} holds values that are not finite", fix="mend it or leave it out")
    return planes


def _from_npy(data: bytes, name: str) -> Array:
    try:
        array = npy.decode(data, name)
    except InputError as error:
        raise ImageError(error.message, fix=error.fix) from error
    if array.ndim == 2:
        return array[..., None]
    if array.ndim == 3 and array.shape[2] in _NUM_CHANNELS:
        return array
    if array.ndim == 3 and array.shape[0] in _NUM_CHANNELS:
        return array.transpose(1, 2, 0)
    raise ImageError(
        f"{name} holds an array of shape {array.shape}", fix="save it as (3, H, W) or (H, W, 3)"
    )

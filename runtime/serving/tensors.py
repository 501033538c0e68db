"""Pictures and answers as named tensors: what every server of a system takes and gives.

Of N pictures in a request each output has N rows; one value each is (N, 1). Lists of different
lengths (objects, candidates) are filled up with zeros to the longest one, at least to one, and
``num_...`` says how many count. Numbers of Python travel as FP64, so that nothing is rounded.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engineworks.runtime import budgets, headers
from engineworks.runtime.errors import InputError
from engineworks.runtime.planes import DTYPES, PLANES
from engineworks.runtime.results import (
    AnomalyMap,
    Classification,
    DefectMap,
    Detections,
    Embedding,
)
from engineworks.runtime.sources import Reader
from engineworks.runtime.tensors import Array

RAW, ENCODED, JSON = "images", "encoded", "json"

DATATYPES = {
    "BOOL": "bool",
    "UINT8": "uint8",
    "UINT16": "uint16",
    "INT64": "int64",
    "FP32": "float32",
    "FP64": "float64",
    "BYTES": "object",
}


@dataclass(frozen=True)
class Tensor:
    """One input or output.

    Attributes:
        datatype: of the protocol, a key of ``DATATYPES``.
        shape: -1 for an axis of any length; the first one is the number of pictures.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "datatype": self.datatype, "shape": list(self.shape)}


_JSON = Tensor(JSON, "BYTES", (-1, 1))


def inputs(reader: Reader) -> tuple[Tensor, ...]:
    """What a request may bring: one of these.

    ``images`` are (N, H, W, 3) RGB, or planes in the sensor's own values: FP32, or as they are in
    UINT8 and UINT16. ``encoded`` are (N, 1) files: PNG, JPEG and the like, for planes also TIFF
    and NPY.
    """
    datatype = "FP32" if reader is PLANES else "UINT8"
    return (Tensor(RAW, datatype, (-1, -1, -1, 3)), Tensor(ENCODED, "BYTES", (-1, 1)))


def pictures(reader: Reader, feeds: Mapping[str, Array], *, max_pictures: int) -> list[Array]:
    """The images of one request.

    Args:
        reader: of the system that they are for.
        feeds: of ``inputs``, by name: ``images`` (N, H, W, 3), or ``encoded``, N bytes, or texts
            in base64.
        max_pictures: that a request may bring.

    Raises:
        InputError: none or both of them, another shape or dtype, too many; more pixels than
            ``budgets.REQUEST_PIXELS`` allows.
        ImageError: a picture that cannot be decoded.
    """
    if len(feeds) != 1 or not feeds.keys() <= {RAW, ENCODED}:
        raise InputError(
            f"the request has the inputs {', '.join(map(repr, feeds)) or 'none'}",
            fix=f"send '{RAW}' (N, H, W, 3) or '{ENCODED}' (N, 1)",
        )
    ((name, given),) = feeds.items()
    num = given.size if name == ENCODED else len(given) if given.ndim else 0
    if not 1 <= num <= max_pictures:
        raise InputError(
            f"the request has {num} pictures", fix=f"send 1 to {max_pictures} in a request"
        )
    if name == ENCODED:
        if given.dtype != np.object_:
            raise InputError(f"'{ENCODED}' is {given.dtype}", fix="send BYTES, a file each")
        files = [_content(item) for item in given.ravel()]
        # 100 KB may unpack to 400 MB, each of them, and a map is as large as its picture
        sizes = [header for file in files if (header := headers.parse(file))]
        asked = sum(header.height * header.width for header in sizes)
        budgets.REQUEST_PIXELS.check(asked, "the request")
        return [reader.decode(file, f"picture {i}") for i, file in enumerate(files)]
    dtypes = DTYPES if reader is PLANES else ("uint8",)
    if given.ndim != 4 or given.shape[3] != 3 or given.dtype.name not in dtypes:
        raise InputError(
            f"'{RAW}' is {given.dtype} {given.shape}",
            fix=f"send {' or '.join(dtypes)} (N, H, W, 3)",
        )
    return list(given)


def _content(item: object) -> bytes:
    if isinstance(item, bytes):
        return item
    try:
        return base64.b64decode(str(item), validate=True)
    except ValueError as error:
        raise InputError(f"'{ENCODED}' is no base64: {error}", fix="JSON takes base64") from error


def answers(results: Sequence[Any]) -> dict[str, Array]:
    """The outputs for the results of one request, by name; see ``outputs``.

    Raises:
        InputError: maps of different sizes, which are no one tensor.
    """
    kind = _KINDS[type(results[0])]
    made = {tensor.name: kind.make[tensor.name](results) for tensor in kind.tensors}
    made[JSON] = _texts([json.dumps(result.to_json()) for result in results])
    return made


def outputs(kind: type) -> tuple[Tensor, ...]:
    """What a system answers whose results are of this class, in the order of ``answers``."""
    return (*_KINDS[kind].tensors, _JSON)


def _texts(texts: Sequence[str]) -> Array:
    made = np.empty((len(texts), 1), np.object_)
    made[:, 0] = [text.encode() for text in texts]
    return made


def _numbers(name: str, dtype: str = "float64") -> Callable[[Sequence[Any]], Array]:
    return lambda results: np.array([[getattr(result, name)] for result in results], dtype)


def _stacked(name: str) -> Callable[[Sequence[Any]], Array]:
    def make(results: Sequence[Any]) -> Array:
        arrays = [getattr(result, name) for result in results]
        if len({array.shape for array in arrays}) > 1:
            raise InputError(
                "the pictures of the request have maps of different sizes",
                fix="send pictures of one size together, or one in a request",
            )
        return np.stack(arrays).astype(np.float32, copy=False)

    return make


def _lists(
    of: Callable[[Any], Sequence[Any]], value: Callable[[Any], Any], width: int = 1
) -> Callable[[Sequence[Any]], Array]:
    """(N, K, width) FP64, or (N, K) for a width of 1."""

    def make(results: Sequence[Any]) -> Array:
        lists = [of(result) for result in results]
        longest = max(1, *map(len, lists))
        shape = (len(lists), longest) if width == 1 else (len(lists), longest, width)
        made = np.zeros(shape, np.float64)
        for row, items in zip(made, lists, strict=True):
            if items:
                row[: len(items)] = [value(item) for item in items]
        return made

    return make


def _names(results: Sequence[Detections]) -> Array:
    made = np.full((len(results), max(1, *(len(r.objects) for r in results))), b"", np.object_)
    for row, result in zip(made, results, strict=True):
        row[: len(result.objects)] = [found.name.encode() for found in result.objects]
    return made


def _counts(of: Callable[[Any], Sequence[Any]]) -> Callable[[Sequence[Any]], Array]:
    return lambda results: np.array([[len(of(result))] for result in results], np.int64)


@dataclass(frozen=True)
class _Kind:
    """How results of one class become tensors; ``make`` has a function for each."""

    tensors: tuple[Tensor, ...]
    make: Mapping[str, Callable[[Sequence[Any]], Array]]


def _kind(*rows: tuple[str, str, tuple[int, ...], Callable[[Sequence[Any]], Array]]) -> _Kind:
    tensors = tuple(Tensor(name, datatype, (-1, *shape)) for name, datatype, shape, _ in rows)
    return _Kind(tensors, {name: make for name, _, _, make in rows})


def _objects(result: Detections) -> Sequence[Any]:
    return result.objects


def _candidates(result: DefectMap) -> Sequence[Any]:
    return result.candidates


_KINDS: dict[type, _Kind] = {
    AnomalyMap: _kind(
        ("score", "FP64", (1,), _numbers("score")),
        ("threshold", "FP64", (1,), _numbers("threshold")),
        ("is_anomalous", "BOOL", (1,), _numbers("is_anomalous", "bool")),
        ("map", "FP32", (-1, -1), _stacked("map_HW")),
    ),
    Classification: _kind(
        ("label", "BYTES", (1,), lambda results: _texts([result.label for result in results])),
        ("index", "INT64", (1,), _numbers("index", "int64")),
        ("probability", "FP64", (1,), _numbers("probability")),
        ("embedding", "FP32", (-1,), _stacked("embedding_F")),
    ),
    DefectMap: _kind(
        ("score", "FP64", (1,), _numbers("score")),
        ("threshold", "FP64", (1,), _numbers("threshold")),
        ("is_defective", "BOOL", (1,), _numbers("is_defective", "bool")),
        ("num_candidates", "INT64", (1,), _counts(_candidates)),
        ("candidates", "FP64", (-1, 3), _lists(_candidates, lambda c: (c.x, c.y, c.score), 3)),
        ("map", "FP32", (-1, -1), _stacked("map_HW")),
    ),
    Detections: _kind(
        ("num_objects", "INT64", (1,), _counts(_objects)),
        ("boxes", "FP64", (-1, 4), _lists(_objects, lambda found: found.box, 4)),
        ("scores", "FP64", (-1,), _lists(_objects, lambda found: found.score)),
        ("names", "BYTES", (-1,), _names),
    ),
    Embedding: _kind(("embedding", "FP32", (-1,), _stacked("vector_F"))),
}


def in_letters(tensor: Tensor) -> Tensor:
    """As it travels where BYTES cannot: text is UINT8, its letters along the last axis."""
    if tensor.datatype != "BYTES":
        return tensor
    shape = tensor.shape[:-1] if tensor.shape[1:] == (1,) else tensor.shape
    return Tensor(tensor.name, "UINT8", (*shape, -1))


def letters(tensor: Tensor, array: Array) -> Array:
    """An output as ``in_letters`` says: texts are filled up with spaces."""
    if tensor.datatype != "BYTES":
        return array
    longest = max(1, *map(len, array.ravel()))
    joined = b"".join(text.ljust(longest) for text in array.ravel())
    shape = array.shape[:-1] if tensor.shape[1:] == (1,) else array.shape
    return np.frombuffer(joined, np.uint8).reshape(*shape, longest)


def blank(reader: Reader, size: tuple[int, int]) -> Array:
    """An image without content, to see what a system answers and to make what first calls make.

    Args:
        reader: of the system.
        size: (height, width).
    """
    return np.zeros((*size, 3), np.float32 if reader is PLANES else np.uint8)

"""NPY and NPZ files to arrays, their headers checked before memory is taken.

``numpy.load`` takes what a header asks for before it looks at the file, unpacks an archive
whatever its size, and ends in a dozen kinds of errors.

Source: NumPy Enhancement Proposal 1, "A simple file format for NumPy arrays".
"""

from __future__ import annotations

import io
import math
import tokenize
import zipfile
import zlib

import numpy as np
from numpy.lib import format as npy_format

from engineworks.runtime import budgets
from engineworks.runtime.errors import InputError
from engineworks.runtime.tensors import Array

MAGIC = b"\x93NUMPY"
_READERS = {(1, 0): npy_format.read_array_header_1_0, (2, 0): npy_format.read_array_header_2_0}
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
# what Python's parser, NumPy's reading of a type and the unpacking of an archive end in
_BROKEN = (
    ValueError, SyntaxError, TypeError, OverflowError, RecursionError, MemoryError, KeyError,
    EOFError, NotImplementedError, RuntimeError, tokenize.TokenError, zipfile.BadZipFile,
    zlib.error,
)  # fmt: skip


def decode(data: bytes, name: str) -> Array:
    """The array of an NPY file: numbers or text, never objects. Bytes behind it are ignored.

    Args:
        data: the content of the file.
        name: what errors call it.

    Raises:
        InputError: not such a file, or one that ends before its array does.
    """
    try:
        return _decode(data)
    except _BROKEN as error:
        raise InputError(
            f"{name} is no NPY file: {_one_line(error)}", fix="write it with numpy.save"
        ) from error


def decode_archive(data: bytes, name: str) -> dict[str, Array]:
    """The arrays of an NPZ file.

    Args:
        data, name: see ``decode``.

    Raises:
        InputError: not such a file, or its arrays are larger than ``budgets.ARRAY_BYTES`` allows.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
            unpacked = sum(member.file_size for member in members)
            budgets.ARRAY_BYTES.check(unpacked, name)
            arrays = {}
            for member in members:
                if member.flag_bits & 1 or member.compress_type not in _METHODS:
                    raise ValueError(f"'{member.filename}' is encrypted or of another compression")
                with archive.open(member) as file:
                    content = file.read(member.file_size + 1)
                arrays[member.filename.removesuffix(".npy")] = _decode(content)
            return arrays
    except _BROKEN as error:
        raise InputError(
            f"{name} is no NPZ file: {_one_line(error)}", fix="write it with numpy.savez"
        ) from error


def _decode(data: bytes) -> Array:
    file = io.BytesIO(data)
    if not data.startswith(MAGIC):
        raise ValueError("it does not begin as one")
    reader = _READERS.get(npy_format.read_magic(file))
    if reader is None:
        raise ValueError("it has another version")
    shape, in_columns, dtype = reader(file)
    if dtype.kind not in "biufU" or not dtype.itemsize or dtype.fields:
        raise ValueError(f"it holds {dtype}")
    if any(not isinstance(side, int) or isinstance(side, bool) or side < 0 for side in shape):
        raise ValueError(f"it has the shape {shape}")
    count, start = math.prod(shape), file.tell()
    if count * dtype.itemsize > len(data) - start:
        raise ValueError(f"it ends before its array of shape {shape} does")
    values = np.frombuffer(data, dtype, count, start)
    array = values.reshape(shape, order="F" if in_columns else "C")
    return array.astype(dtype.newbyteorder("="))  # a copy: the file's bytes are not kept


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]

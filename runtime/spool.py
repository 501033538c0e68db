"""Arrays one after the other: more than fit into memory."""

from __future__ import annotations

import tempfile
import weakref
from array import array
from contextlib import suppress
from typing import Any

import numpy as np

from engineworks.runtime.tensors import Array

_IN_MEMORY = 64 << 20  # bytes; what is more goes into a temporary file


class Spool:
    """Arrays in the order in which they came, each of its own dtype and shape.

    They are kept in memory while they take no more than 64 MiB in all, and in a temporary file from
    then on (``TMPDIR`` says where). Not for several threads at once.
    """

    def __init__(self) -> None:
        self._kinds: list[tuple[np.dtype[Any], tuple[int, ...]]] = []
        self._starts = array("q", [0])
        self._file = tempfile.SpooledTemporaryFile(_IN_MEMORY)  # noqa: SIM115  # closed below
        weakref.finalize(self, _close, self._file)

    def append(self, values: Array) -> None:
        """Keep an array.

        Raises:
            OSError: the temporary folder is full, or there is none.
        """
        try:
            self._file.seek(self._starts[-1])
            self._file.write(np.ascontiguousarray(values).tobytes())
            self._file.flush()
        except OSError as error:
            error.filename = error.filename or tempfile.gettempdir()
            raise
        self._kinds.append((values.dtype, values.shape))
        self._starts.append(self._file.tell())

    def __len__(self) -> int:
        return len(self._kinds)

    def __getitem__(self, place: int) -> Array:
        """The array that came at ``place``; not to be written to."""
        start, stop = self._starts[place], self._starts[place + 1]
        dtype, shape = self._kinds[place]
        self._file.seek(start)
        return np.frombuffer(self._file.read(stop - start), dtype).reshape(shape)


def _close(file: tempfile.SpooledTemporaryFile[bytes]) -> None:
    with suppress(OSError):  # a full disk has been told of
        file.close()

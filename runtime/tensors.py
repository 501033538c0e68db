"""What crosses an engine's border: named arrays, and the specs that they must fit.

Legend of shape suffixes used in the whole project: B batch, C channels, H height, W width,
N items (patches, boxes, rows), D feature width, K neighbours. ``images_BCHW`` is an array of
that layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from engineworks.runtime.errors import EngineError, InputError

Array: TypeAlias = np.ndarray[Any, Any]


@runtime_checkable
class DeviceArray(Protocol):
    """An array in CUDA memory, known by its structure: torch, CuPy and pycuda arrays all fit.

    Source: Numba's CUDA Array Interface, version 3.
    """

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...


DType: TypeAlias = Literal[
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    "float16", "float32", "float64",
]  # fmt: skip
# a fixed axis, or the name of a free one
Axis: TypeAlias = Annotated[int, Field(ge=0, lt=2**31)] | Annotated[str, Field(max_length=1000)]

Feeds: TypeAlias = Mapping[str, "Array | DeviceArray"]


class TensorSpec(BaseModel):
    """Dtype and shape of one named input or output of a graph.

    ``shape`` holds an int for a fixed axis and the axis' name for a free one, e.g.
    ``("batch", 3, 256, 256)``. ``dtype`` is NumPy's name of it, e.g. ``"float32"``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    dtype: DType
    shape: Annotated[tuple[Axis, ...], Field(max_length=16)]

    def check(self, name: str, array: Array | DeviceArray) -> None:
        """Refuse an array that the graph cannot take.

        Raises:
            InputError: no array, or another dtype, rank or fixed axis; both shapes are named.
        """
        if isinstance(array, np.ndarray):
            shape: tuple[int, ...] = array.shape
            dtype = array.dtype
        elif not isinstance(array, DeviceArray):
            raise InputError(
                f"input '{name}' is a {type(array).__name__}, not an array",
                fix="feed a NumPy array, or an array in CUDA memory",
            )
        else:
            interface = array.__cuda_array_interface__
            shape, dtype = tuple(interface["shape"]), np.dtype(interface["typestr"])
        fits = len(shape) == len(self.shape) and all(
            isinstance(want, str) or want == got
            for want, got in zip(self.shape, shape, strict=True)
        )
        if not fits:
            raise InputError(
                f"input '{name}' has shape {shape}, the graph takes {self.describe()}",
                fix="prepare the input with the bundle's PreprocessSpec, or export again with "
                "that axis free",
            )
        if dtype != np.dtype(self.dtype):
            raise InputError(
                f"input '{name}' has dtype {dtype}, the graph takes {self.dtype}",
                fix=f"convert it with .astype('{self.dtype}')",
            )

    def describe(self) -> str:
        """The shape as text, e.g. ``(batch, 3, 256, 256)``."""
        return "(" + ", ".join(str(axis) for axis in self.shape) + ")"


def check_feeds(specs: Mapping[str, TensorSpec], feeds: Feeds) -> None:
    """Refuse feeds with a missing or unknown name, or an array that does not fit its spec.

    Raises:
        InputError: names what is missing, unknown or of the wrong shape or dtype.
    """
    missing, unknown = sorted(set(specs) - set(feeds)), sorted(set(feeds) - set(specs))
    if missing or unknown:
        raise InputError(
            f"feeds do not match the graph's inputs {sorted(specs)}: "
            f"missing {missing}, unknown {unknown}",
            fix="feed exactly the named inputs",
        )
    for name, spec in specs.items():
        spec.check(name, feeds[name])


def check_host(feeds: Feeds, stream: int | None, backend: str) -> None:
    """Refuse what only a CUDA backend takes.

    Raises:
        EngineError: a stream or a device array was given.
    """
    on_device = [name for name, feed in feeds.items() if hasattr(feed, "__cuda_array_interface__")]
    if stream is not None or on_device:
        raise EngineError(
            f"backend '{backend}' runs on the CPU: it takes no CUDA stream and no device arrays "
            f"{on_device}",
            fix="feed NumPy arrays, or open the bundle with --backend tensorrt",
        )

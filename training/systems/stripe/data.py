"""The strips of ``stripe``: packed once, then cut into tiles that are painted on the way.

Packing decodes every strip a single time into one file of raw values that is mapped into memory:
a tile is then a slice, all loader processes share the same pages, and none holds a cache of its
own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from engineworks.runtime import files, planes, tiling
from engineworks.runtime.errors import ConfigError, DatasetError
from engineworks.runtime.tensors import Array
from engineworks.training.systems.stripe import defects
from engineworks.training.systems.stripe.config import TaskConfig


class _Index(BaseModel):
    """What lies where in a file of packed strips.

    Attributes:
        dtype: of all strips.
        shapes: (height, width) of each; it takes 3 x height x width values, plane by plane.
        lowest, highest: of all values.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    dtype: str
    shapes: tuple[tuple[int, int], ...]
    lowest: float
    highest: float


class Strips:
    """Packed strips as one array in a mapped file.

    Attributes:
        path: ``<name>.planes``, beside its ``<name>.json``.
        dtype: of the strips' files.
        shapes: (height, width) of each strip.
        lowest, highest: of all values.
    """

    def __init__(self, path: Path) -> None:
        """Map a file that ``pack`` wrote.

        Raises:
            DatasetError: it is damaged.
        """
        try:
            index = _Index.model_validate_json(path.with_suffix(".json").read_text("utf-8"))
            sizes = [3 * height * width for height, width in index.shapes]
            values = np.memmap(path, index.dtype, "r", shape=(sum(sizes),))
        except (OSError, ValueError) as error:  # a ValidationError is a ValueError
            raise DatasetError(
                f"the packed strips {path} are damaged ({error})", fix="remove them"
            ) from error
        self.path = path
        self.dtype = values.dtype
        self.shapes = index.shapes
        self.lowest, self.highest = index.lowest, index.highest
        self._values = np.asarray(values)  # the same pages, without the slow indexing of memmap
        self._starts = np.cumsum([0, *sizes]).tolist()

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, index: int) -> Array:
        """(3, height, width) of one strip: target, ref1, ref2; a view, nothing is read yet."""
        return self._values[self._starts[index] : self._starts[index + 1]].reshape(
            3, *self.shapes[index]
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return Strips, (self.path,)  # a process that is spawned maps the file, and copies nothing

    @property
    def num_bytes(self) -> int:
        return int(self._values.nbytes)


def pack(paths: Sequence[Path], folder: Path, key: str) -> Strips:
    """Decode strips into one file, unless the folder has them already.

    The index is written last: where it is, the file beside it is whole.

    Args:
        paths: the strips, as ``runtime.planes.read`` takes them.
        folder: for the file; it is made.
        key: hash of the strips' content; the file is named after it.

    Raises:
        DatasetError: strips of different dtypes, or a damaged file.
        InputError: a strip cannot be read, or holds values that are not finite.
    """
    path = folder / f"strips-{key[:16]}.planes"
    if path.with_suffix(".json").is_file():
        return Strips(path)
    folder.mkdir(parents=True, exist_ok=True)
    shapes, lowest, highest = list[tuple[int, int]](), math.inf, -math.inf
    dtype: np.dtype[Any] | None = None
    with files.naming(path), files.NewFile(folder) as new:
        for strip in paths:
            strip_HWC = planes.read(strip)
            planes.check_planes(strip_HWC)
            dtype = dtype or strip_HWC.dtype
            if strip_HWC.dtype != dtype:
                raise DatasetError(
                    f"the strips have values of {dtype} and of {strip_HWC.dtype}",
                    fix="convert them to one type: they share one value_range",
                )
            shapes.append(strip_HWC.shape[:2])
            lowest = min(lowest, float(strip_HWC.min()))
            highest = max(highest, float(strip_HWC.max()))
            new.file.write(np.ascontiguousarray(strip_HWC.transpose(2, 0, 1)).data)
        new.place(path, durable=False)
    index = _Index(dtype=str(dtype), shapes=tuple(shapes), lowest=lowest, highest=highest)
    files.write(path.with_suffix(".json"), index.model_dump_json())
    return Strips(path)


class Tiles:
    """Painted tiles of packed strips, for ``training.data.loader``.

    Which tile an index means is computed: from the strip's number and its place in the strip's
    grid of tiles.
    """

    def __init__(self, strips: Strips, config: TaskConfig) -> None:
        """Check strips and configuration against each other.

        Raises:
            ConfigError: values outside of ``value_range``.
            DatasetError: a strip smaller than a tile.
        """
        low, high = config.value_range
        if not (low <= strips.lowest and strips.highest <= high):
            raise ConfigError(
                f"the strips hold values from {strips.lowest:g} to {strips.highest:g}, outside of "
                f"value_range ({low:g} to {high:g})",
                fix="set value_range to the range of the sensor",
            )
        size = config.tiles.size
        for height, width in strips.shapes:
            if min(height, width) < size:
                raise DatasetError(
                    f"a strip of {height} x {width} pixels is smaller than a tile of {size}",
                    fix="lower tiles.size",
                )
        self.strips = strips
        self.config = config
        self.kernels = [defects.kernel(kernel) for kernel in config.defects.kernels]
        self.disturbances = defects.Disturbances(config.disturbances, config.value_range)
        self._grids = {
            (height, width): (tiling.positions(height, size), tiling.positions(width, size))
            for height, width in set(strips.shapes)
        }
        counts = [math.prod(map(len, self._grids[shape])) for shape in strips.shapes]
        self._first = np.cumsum([0, *counts])  # tile of each strip, and the number of all

    def __len__(self) -> int:
        return int(self._first[-1]) * self.config.tiles.repeat

    def place(self, index: int) -> tuple[int, int, int]:
        """(strip, top, left) of a tile; row by row, strip by strip."""
        index %= int(self._first[-1])
        strip = int(np.searchsorted(self._first, index, "right")) - 1
        tops, lefts = self._grids[self.strips.shapes[strip]]
        row, column = divmod(index - int(self._first[strip]), len(lefts))
        return strip, tops[row], lefts[column]

    def get(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """``planes`` (3, size, size) in the files' dtype, and ``mask`` (1, size, size) bool."""
        config, size = self.config, self.config.tiles.size
        strip, top, left = self.place(index)
        height, width = self.strips.shapes[strip]
        down, across = rng.integers(-config.tiles.jitter, config.tiles.jitter, 2, endpoint=True)
        top = min(max(top + int(down), 0), height - size)
        left = min(max(left + int(across), 0), width - size)
        crop = self.strips[strip][:, top : top + size, left : left + size]
        upside_down, mirrored = rng.random(2) < config.disturbances.flip
        planes_CHW = crop[:, :: -1 if upside_down else 1, :: -1 if mirrored else 1].astype(
            np.float32, order="C"
        )
        mask_HW = np.zeros((size, size), bool)
        planned = defects.plan(rng, config.defects, self.kernels, size, size)
        defects.paint(planes_CHW, mask_HW, planned, self.kernels, config.value_range)
        self.disturbances.apply(rng, planes_CHW)
        return {"planes": self._captured(planes_CHW), "mask": mask_HW[None]}

    def distracted(self, strip: int, rng: np.random.Generator) -> Array:
        """A whole strip (height, width, 3) as it is, but with spots that are not to be found."""
        planes_CHW = self.strips[strip].astype(np.float32)
        config = self.config.defects.model_copy(update={"clean": 0.0})
        planned = defects.plan(rng, config, self.kernels, *self.strips.shapes[strip])
        shared = [defect for defect in planned if not defect.wanted]
        nothing_HW = np.zeros(self.strips.shapes[strip], bool)
        defects.paint(planes_CHW, nothing_HW, shared, self.kernels, self.config.value_range)
        return self._captured(planes_CHW).transpose(1, 2, 0)

    def _captured(self, planes_CHW: Array) -> Array:
        """As the sensor gives it: in its range and its type; changes its argument.

        A fraction that no file holds would tell what is painted, and cost memory.
        """
        np.clip(planes_CHW, *self.config.value_range, out=planes_CHW)
        if np.issubdtype(self.strips.dtype, np.integer):
            np.rint(planes_CHW, out=planes_CHW)
        return planes_CHW.astype(self.strips.dtype)

"""Run a float graph with its inner tensors in sight; keep histograms and means, not values."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx

from engineworks.runtime.engines.ort import OrtEngine
from engineworks.runtime.errors import CalibrationError
from engineworks.runtime.tensors import Array, Feeds

NUM_BINS = 4096
_CHUNK = 1 << 16  # values handled at a time: temporaries stay in the cache
_MIN_LIMIT = 2.0**-100  # keeps NUM_BINS / limit a finite float32


class Histogram:
    """How often each magnitude |x| of a tensor was seen, in memory that does not grow.

    The bins divide [0, limit) evenly and ``limit`` is a power of two: when a larger value comes,
    neighbouring bins are merged, which is exact. So the histogram depends on the values alone, not
    on their order or their batches, and the largest magnitude lies in its upper half.

    Attributes:
        counts: (NUM_BINS,) int64, of the values that are not zero; bin i holds
            i * width <= |x| < (i + 1) * width.
        num_zeros: how many values were exactly 0.
        limit: upper border of the last bin; 0.0 as long as nothing but zeros was seen.
        min, max: the true extremes, 0.0 included only if it was seen.
    """

    def __init__(self) -> None:
        self.counts = np.zeros(NUM_BINS, np.int64)
        self.num_zeros = 0
        self.limit = 0.0
        self.min = math.inf
        self.max = -math.inf

    @property
    def width(self) -> float:
        """Of one bin, in the tensor's unit."""
        return self.limit / self.counts.size

    @property
    def amax(self) -> float:
        """The largest magnitude seen; 0.0 before anything was."""
        return max(abs(self.min), abs(self.max)) if self.num_values else 0.0

    @property
    def num_values(self) -> int:
        return int(self.counts.sum()) + self.num_zeros

    def add(self, values: Array) -> None:
        """Count a tensor's values.

        Args:
            values: float32 of any shape.

        Raises:
            CalibrationError: a NaN or an infinity is among them.
        """
        flat = np.ascontiguousarray(values, np.float32).reshape(-1)
        if flat.size == 0:
            return
        low, high = float(flat.min()), float(flat.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise CalibrationError("NaN or infinity among the values")
        self.min, self.max = min(self.min, low), max(self.max, high)
        amax = max(abs(low), abs(high))
        if amax > 0:
            self._cover(amax)
        if self.limit == 0:
            self.num_zeros += flat.size
            return
        scale = np.float32(NUM_BINS / self.limit)  # a power of two: the product is exact
        for start in range(0, flat.size, _CHUNK):
            magnitudes = np.abs(flat[start : start + _CHUNK])
            num_zeros = magnitudes.size - int(np.count_nonzero(magnitudes))
            bins = (magnitudes * scale).astype(np.intp)
            self.counts += np.bincount(bins, minlength=NUM_BINS)
            self.counts[0] -= num_zeros
            self.num_zeros += num_zeros

    def _cover(self, amax: float) -> None:
        """Merge bins until ``amax`` is below ``limit``."""
        needed = max(math.ldexp(1.0, math.frexp(amax)[1]), _MIN_LIMIT)
        if needed <= self.limit:
            return
        if self.limit > 0:
            factor = min(int(needed / self.limit), NUM_BINS)
            merged = self.counts.reshape(-1, factor).sum(axis=1)
            self.counts[:] = 0
            self.counts[: merged.size] = merged
        self.limit = needed


class ChannelMean:
    """The mean of a tensor's values per channel: axis 1 of a map (B, C, H, W), else the last.

    Attributes:
        mean: (C,) float64; () before anything was seen.
    """

    def __init__(self) -> None:
        self._sum: Array = np.zeros(())
        self._count = 0

    @property
    def mean(self) -> Array:
        return self._sum / max(self._count, 1)

    def add(self, values: Array) -> None:
        """Count in a tensor of any rank from 1, always of the same number of channels."""
        axis = channel_axis(values.ndim)
        others = tuple(i for i in range(values.ndim) if i != axis)
        self._sum = self._sum + values.sum(axis=others, dtype=np.float64)
        self._count += values.size // values.shape[axis]


def channel_axis(rank: int) -> int:
    """Which axis of a tensor holds its channels."""
    return 1 if rank == 4 else rank - 1


class Observer:
    """A float graph on ONNX Runtime that fills a histogram and a mean per chosen tensor.

    Every chosen tensor is made an output, so no fusion can swallow it: its values are the float
    graph's, up to rounding.

    Attributes:
        engine: the graph with the chosen tensors among its outputs.
        outputs: names of the graph's own outputs.
        histograms, means: tensor name -> what was seen so far; tensors without an axis, and empty
            ones, have no mean.
    """

    def __init__(
        self, model: Path | bytes, tensors: Sequence[str], *, threads: int | None = None
    ) -> None:
        """Load a graph.

        Args:
            model: a float ONNX file or its bytes.
            tensors: names of float32 tensors: inputs, inner ones or outputs.
            threads: None takes all cores that this process may use.

        Raises:
            CalibrationError: the graph has no such tensor.
            EngineError: not a graph that ONNX Runtime can run.
        """
        proto = onnx.load_from_string(model) if isinstance(model, bytes) else onnx.load(model)
        graph = proto.graph
        inputs = {value.name for value in graph.input}
        inner = {name for node in graph.node for name in node.output}
        self.outputs = [value.name for value in graph.output]
        if unknown := [name for name in tensors if name not in inputs | inner]:
            raise CalibrationError(
                f"the graph has no tensors {unknown}",
                fix="take the names from the graph file that is calibrated",
            )
        for name in dict.fromkeys(tensors):
            if name not in inputs and name not in self.outputs:
                kind = onnx.TensorProto.FLOAT
                graph.output.append(onnx.helper.make_tensor_value_info(name, kind, None))
        self.histograms = {name: Histogram() for name in tensors}
        self.means = {name: ChannelMean() for name in tensors}
        self.engine = OrtEngine(proto.SerializeToString(), threads=threads)
        self._lock = threading.Lock()

    def observe(self, feeds: Feeds) -> dict[str, Array]:
        """Run once, count, and hand on the graph's own outputs.

        Raises:
            InputError, EngineError: see ``runtime.engines.Engine.run``.
            CalibrationError: a tensor holds NaN or infinity; it is named.
        """
        results = self.engine.run(feeds)
        with self._lock:
            for name, histogram in self.histograms.items():
                values = results[name] if name in results else np.asarray(feeds[name])
                try:
                    histogram.add(values)
                except CalibrationError as error:
                    raise CalibrationError(
                        f"tensor '{name}' of the float graph: {error.message}",
                        fix="check the weights, and the sample that was being run",
                    ) from error
                if values.ndim and values.size:
                    self.means[name].add(values)
        return {name: results[name] for name in self.outputs}

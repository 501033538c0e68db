"""TensorRT: a plan on the GPU, by the runtime of TensorRT 10.x and 11.x.

Host arrays go through pinned memory into buffers of ours, and a shape that comes again is replayed
as a CUDA graph. Arrays in device memory are read where they are, and the answers are new arrays in
device memory.

Never run with TensorRT's runtime, which needs a GPU: the tests run it on stand-ins with the same
signatures, for both versions.

Source: NVIDIA TensorRT documentation, Python API, "Engine", "Execution Context"; Developer Guide,
"CUDA Graphs" and "Threading".
"""

from __future__ import annotations

import math
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import tensorrt as trt

from engineworks.runtime.engines import cuda
from engineworks.runtime.engines.recorder import Recorder
from engineworks.runtime.errors import EngineError, InputError
from engineworks.runtime.plans import ShapeRange
from engineworks.runtime.tensors import Array, DeviceArray, Feeds, TensorSpec, check_feeds

Shapes = dict[str, tuple[int, ...]]

_REBUILD = "build it here: cli.py export BUNDLE --out OUT --plan PRECISION"
_ALIGNMENT = 256  # of addresses; allocations have it, views into them may not
_MAX_GRAPHS = 16  # shapes that a lane remembers
# TensorRT keeps the first logger that it is given for the life of the process. Errors are taken
# from the recorder, so only its own faults are left to print.
_LOGGER = trt.Logger(trt.Logger.INTERNAL_ERROR)


class TrtEngine:
    """One plan, with a lane (stream, contexts, buffers) for every run that is under way at once.

    Attributes:
        capture_failure: why CUDA graphs are not used, in words; None while nothing speaks against
            them. Results do not depend on it.
    """

    backend = "tensorrt"

    def __init__(
        self, model: Path | bytes, *, graphs: bool = True, host_code: bool = False
    ) -> None:
        """Load a plan.

        Args:
            model: a plan file or its bytes.
            graphs: replay shapes that come again as CUDA graphs.
            host_code: let the plan bring program code of its own, as version-compatible plans do.
                Only for plans that you built yourself.

        Raises:
            BackendError: there is no CUDA device.
            EngineError: not a plan that this TensorRT takes on this GPU.
        """
        name = str(model) if isinstance(model, Path) else "the plan"
        try:
            data = model.read_bytes() if isinstance(model, Path) else model
        except OSError as error:
            raise EngineError(f"{name} cannot be read: {error}", fix=_REBUILD) from error
        self._loaded = _Loaded(data, name, graphs=graphs, host_code=host_code)
        self.inputs: Mapping[str, TensorSpec] = self._loaded.inputs
        self.outputs: Mapping[str, TensorSpec] = self._loaded.outputs
        # also at exit, before the interpreter takes things apart in an order of its own
        self._finalizer = weakref.finalize(self, self._loaded.close)

    @property
    def capture_failure(self) -> str | None:
        return self._loaded.capture_failure

    def run(self, feeds: Feeds, *, stream: int | None = None) -> dict[str, Array]:
        """See ``runtime.engines.Engine.run``; feeds are all on the host or all on the device.

        With ``stream``, feeds are in device memory and written on that stream. Without it, device
        feeds that do not say on which stream they are written (PyTorch's) make the run wait for
        the whole device first.
        """
        if not self._finalizer.alive:
            raise EngineError("this engine is closed", fix="open it again")
        check_feeds(self.inputs, feeds)
        on_device = [name for name, feed in feeds.items() if not isinstance(feed, np.ndarray)]
        if on_device and len(on_device) < len(feeds):
            raise InputError(
                f"only {on_device} of {list(feeds)} are in device memory",
                fix="feed all inputs from one side",
            )
        if stream is not None and not on_device:
            raise InputError(
                "a run on a stream takes feeds in device memory",
                fix="leave the stream out, or copy the feeds to the device first",
            )
        shapes = {name: _shape_of(feed) for name, feed in feeds.items()}
        profile = self._loaded.profile_for(shapes)
        with self._loaded.lane() as lane:
            station = lane.station(profile)
            if on_device:
                found = station.run_on_device(cast("dict[str, DeviceArray]", feeds), shapes, stream)
                return cast("dict[str, Array]", found)  # arrays by structure
            return station.run_on_host(cast("dict[str, Array]", feeds), shapes)

    def close(self) -> None:
        self._finalizer()


class _Loaded:
    """A deserialised plan and its lanes: all that has to be released, and in which order."""

    def __init__(self, data: bytes, name: str, *, graphs: bool, host_code: bool) -> None:
        self.device = cuda.device()
        self.graphs = graphs
        self.capture_failure: str | None = None
        self.recorder = Recorder()  # outlives all that reports to it
        self.engine: Any = None
        self._runtime: Any = None
        self._lock = threading.Lock()
        self._free: list[_Lane] = []
        self._closed = False
        try:
            self._open(data, name, host_code=host_code)
        except EngineError:
            self.close()
            raise

    def _open(self, data: bytes, name: str, *, host_code: bool) -> None:
        with self.device.active():
            self._runtime = trt.Runtime(_LOGGER)
            self._runtime.error_recorder = self.recorder  # the engine and contexts inherit it
            if host_code:
                self._runtime.engine_host_code_allowed = True
            self.engine = self._runtime.deserialize_cuda_engine(data)
        if self.engine is None:
            raise EngineError(
                f"TensorRT {trt.__version__} cannot load {name}: {self._reasons()}",
                fix=_REBUILD,
            )
        self.inputs, self.outputs = _tensors(self.engine)
        self.profiles = [
            {name: self._range(name, index) for name in self.inputs}
            for index in range(self.engine.num_optimization_profiles)
        ]

    def _range(self, name: str, profile: int) -> ShapeRange:
        if not any(isinstance(axis, str) for axis in self.inputs[name].shape):
            fixed = tuple(self.engine.get_tensor_shape(name))
            return ShapeRange(fixed, fixed, fixed)
        return ShapeRange(*map(tuple, self.engine.get_tensor_profile_shape(name, profile)))

    def profile_for(self, shapes: Shapes) -> int:
        """The first profile that these shapes are within.

        Raises:
            InputError: there is none; the ranges are named.
        """
        for index, ranges in enumerate(self.profiles):
            if all(_holds(ranges[name], shape) for name, shape in shapes.items()):
                return index
        known = "; ".join(
            ", ".join(f"{name} {found.min} to {found.max}" for name, found in ranges.items())
            for ranges in self.profiles
        )
        raise InputError(
            f"inputs of shapes {shapes} are outside of the plan's profiles: {known}",
            fix="feed another batch or size, or build the plan with --profile for these",
        )

    @contextmanager
    def lane(self) -> Iterator[_Lane]:
        """A lane that nobody else uses meanwhile, on the active device."""
        with self.device.active():
            with self._lock:
                lane = self._free.pop() if self._free else None
            lane = lane or _Lane(self)
            try:
                yield lane
            finally:
                with self._lock:
                    closed = self._closed
                    if not closed:
                        self._free.append(lane)
                if closed:
                    lane.close()

    def failure(self, what: str) -> EngineError:
        return EngineError(f"TensorRT: {what} failed: {self._reasons()}")

    def _reasons(self) -> str:
        return "; ".join(self.recorder.take()) or "no reason given"

    def close(self) -> None:
        """Contexts before the engine, the engine before the runtime, the recorder last."""
        with self._lock:
            self._closed = True
            lanes, self._free = self._free, []
        with self.device.active():
            while lanes:
                lanes.pop().close()
            self.engine = None
            self._runtime = None


class _Lane:
    """A stream, and for each profile in use the contexts and buffers on it; one run at a time.

    All contexts of a lane work in the same scratch memory, because their runs follow each other on
    one stream.
    """

    def __init__(self, loaded: _Loaded) -> None:
        self.loaded = loaded
        self.stream = cuda.Stream()
        self._scratch_bytes = int(loaded.engine.device_memory_size_v2)
        self._scratch = loaded.device.allocate(self._scratch_bytes)
        self._stations: dict[int, _Station] = {}

    def station(self, profile: int) -> _Station:
        if profile not in self._stations:
            self._stations[profile] = _Station(self, profile)
        return self._stations[profile]

    def context(self, profile: int) -> Any:
        """A new execution context with a profile chosen."""
        engine = self.loaded.engine
        context = engine.create_execution_context(
            trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        if context is None:
            raise self.loaded.failure("creating a context")
        context.set_device_memory(int(self._scratch), self._scratch_bytes)
        if profile != 0:  # the one of a new context
            if not context.set_optimization_profile_async(profile, self.stream.handle):
                raise self.loaded.failure(f"choosing profile {profile}")
            self.stream.synchronize()
        return context

    def close(self) -> None:
        self.stream.synchronize()
        while self._stations:
            self._stations.popitem()[1].close()
        self._scratch.free()
        self.stream.close()


class _Station:
    """One profile in a lane: a context, buffers for its largest shapes, graphs of shapes."""

    def __init__(self, lane: _Lane, profile: int) -> None:
        self._lane = lane
        self._loaded = lane.loaded
        self._profile = profile
        self._context = lane.context(profile)
        ranges = self._loaded.profiles[profile]
        largest = {name: found.max for name, found in ranges.items()}
        largest |= self._set_shapes(self._context, largest)
        self._buffers = {
            name: _Buffer(self._loaded.device, self._bytes(name, shape))
            for name, shape in largest.items()
        }
        # shapes that were met, the latest last; None until they come again
        self._replays: OrderedDict[tuple[Any, ...], _Replay | None] = OrderedDict()

    def run_on_host(self, feeds: Mapping[str, Array], shapes: Shapes) -> dict[str, Array]:
        """Upload, compute, download, wait."""
        stream = self._lane.stream
        for name, feed in feeds.items():
            buffer, used = self._buffers[name], feed.nbytes
            np.copyto(buffer.host[:used].view(feed.dtype).reshape(feed.shape), feed)
            stream.upload(buffer.device, buffer.host[:used])
        outputs = self._compute(shapes)
        for name, shape in outputs.items():
            buffer = self._buffers[name]
            stream.download(buffer.host[: self._bytes(name, shape)], buffer.device)
        stream.synchronize()
        return {
            name: self._buffers[name]
            .host[: self._bytes(name, shape)]
            .view(self._loaded.outputs[name].dtype)
            .reshape(shape)
            .copy()
            for name, shape in outputs.items()
        }

    def run_on_device(
        self, feeds: Mapping[str, DeviceArray], shapes: Shapes, stream: int | None
    ) -> dict[str, cuda.DeviceTensor]:
        """Compute from the feeds' own memory into new memory."""
        own = self._lane.stream
        told = [cuda.await_feed(own, feed) for feed in feeds.values()]
        if stream is not None:
            own.follow(stream)
        elif not all(told):
            self._loaded.device.synchronize()
        addresses = {name: cuda.address_of(name, feed) for name, feed in feeds.items()}
        for name, address in addresses.items():
            if address % _ALIGNMENT:
                buffer = self._buffers[name].device
                own.copy(buffer, address, self._bytes(name, shapes[name]))
                addresses[name] = int(buffer)
        outputs = {
            name: cuda.DeviceTensor(
                self._loaded.device, shape, self._loaded.outputs[name].dtype, stream=stream
            )
            for name, shape in self._set_shapes(self._context, shapes).items()
        }
        addresses |= {name: tensor.address for name, tensor in outputs.items()}
        self._enqueue(self._context, addresses)
        if stream is None:
            own.synchronize()
        else:
            own.lead(stream)
        return outputs

    def _compute(self, shapes: Shapes) -> Shapes:
        """Queue a computation from buffers to buffers; the shapes of the outputs."""
        key = tuple(shapes.values())
        replay = self._replays.get(key)
        if replay is not None:
            self._replays.move_to_end(key)
            self._lane.stream.launch(replay.graph)
            return replay.outputs
        context, addresses = self._context, {n: int(b.device) for n, b in self._buffers.items()}
        wanted = self._loaded.graphs and self._loaded.capture_failure is None
        capture = wanted and key in self._replays
        if capture:  # a graph is bound to its context: what that does later would change it
            context = self._lane.context(self._profile)
        outputs = self._set_shapes(context, shapes)
        if too_large := [
            n for n, s in outputs.items() if self._bytes(n, s) > self._buffers[n].size
        ]:
            raise EngineError(
                f"outputs {too_large} are larger than those of the profile's largest inputs",
                fix="feed arrays in device memory, or build the plan with a profile for this shape",
            )
        self._enqueue(context, addresses)  # outside of the capture: the first run sets things up
        self._remember(key, self._capture(context, addresses, outputs) if capture else None)
        return outputs

    def _capture(self, context: Any, addresses: dict[str, int], outputs: Shapes) -> _Replay | None:
        stream = self._lane.stream
        stream.synchronize()
        try:
            graph = stream.capture(lambda: self._enqueue(context, addresses))
        except EngineError as error:  # e.g. weights that are streamed; the run itself is queued
            self._loaded.capture_failure = error.message
            return None
        return _Replay(context, graph, outputs)

    def _remember(self, key: tuple[Any, ...], replay: _Replay | None) -> None:
        self._replays[key] = replay
        self._replays.move_to_end(key)
        if len(self._replays) > _MAX_GRAPHS:
            _, oldest = self._replays.popitem(last=False)
            if oldest is not None:
                self._lane.stream.synchronize()
                oldest.graph.close()

    def _set_shapes(self, context: Any, shapes: Shapes) -> Shapes:
        """Give a context the shapes of its inputs; the shapes of its outputs.

        Raises:
            EngineError: TensorRT refuses them, or an output's shape depends on the data.
        """
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                raise self._loaded.failure(f"setting '{name}' to {shape}")
        try:
            missing = context.infer_shapes()
        except RuntimeError as error:
            raise self._loaded.failure(f"shape inference for {shapes} ({error})") from error
        if missing:
            raise EngineError(f"TensorRT: shapes {shapes} leave {missing} open")
        found = {name: tuple(context.get_tensor_shape(name)) for name in self._loaded.outputs}
        if any(axis < 0 for shape in found.values() for axis in shape):
            raise EngineError(f"output shapes {found} depend on the data, which is not supported")
        return found

    def _enqueue(self, context: Any, addresses: Mapping[str, int]) -> None:
        for name, address in addresses.items():
            if not context.set_tensor_address(name, address):
                raise self._loaded.failure(f"placing '{name}'")
        if not context.execute_async_v3(self._lane.stream.handle):
            raise self._loaded.failure("a run")

    def _bytes(self, name: str, shape: tuple[int, ...]) -> int:
        spec = (self._loaded.inputs | self._loaded.outputs)[name]
        return math.prod(shape) * np.dtype(spec.dtype).itemsize

    def close(self) -> None:
        for replay in self._replays.values():
            if replay is not None:
                replay.graph.close()
        self._replays.clear()
        del self._context
        for buffer in self._buffers.values():
            buffer.device.free()
        self._buffers.clear()


class _Buffer:
    """Device memory of one tensor and the pinned host memory beside it."""

    def __init__(self, device: cuda.Device, num_bytes: int) -> None:
        self.size = num_bytes
        self.device = device.allocate(num_bytes)
        self.host = device.pinned(num_bytes)


@dataclass(frozen=True)
class _Replay:
    """A graph, the context that it was captured from, the shapes that it gives."""

    context: Any
    graph: cuda.Graph
    outputs: Shapes


def _tensors(engine: Any) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec]]:
    """Inputs and outputs of an engine.

    Raises:
        EngineError: a tensor of a type that NumPy does not have, or one that is read on the host.
    """
    specs: dict[Any, dict[str, TensorSpec]] = {
        trt.TensorIOMode.INPUT: {},
        trt.TensorIOMode.OUTPUT: {},
    }
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        if engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
            raise EngineError(f"tensor '{name}' of the plan is a shape, which is not supported")
        dtype = engine.get_tensor_dtype(name)
        try:
            known = np.dtype(trt.nptype(dtype)).name
        except TypeError as error:
            raise EngineError(
                f"tensor '{name}' of the plan is {dtype}, which NumPy does not have",
                fix="keep inputs and outputs of the graph float32",
            ) from error
        shape = enumerate(engine.get_tensor_shape(name))
        specs[engine.get_tensor_mode(name)][name] = TensorSpec(
            dtype=known,
            shape=tuple(f"axis{i}" if axis < 0 else int(axis) for i, axis in shape),
        )
    return specs[trt.TensorIOMode.INPUT], specs[trt.TensorIOMode.OUTPUT]


def _holds(found: ShapeRange, shape: tuple[int, ...]) -> bool:
    return all(a <= b <= c for a, b, c in zip(found.min, shape, found.max, strict=True))


def _shape_of(feed: Array | DeviceArray) -> tuple[int, ...]:
    shape: tuple[int, ...] = (
        feed.shape if isinstance(feed, np.ndarray) else feed.__cuda_array_interface__["shape"]
    )
    return tuple(shape)


def open_graph(
    model: Path | bytes, *, precision: str, threads: int | None, host_code: bool = False
) -> TrtEngine:
    """Backend table's entry; the plan already is of the precision asked for."""
    return TrtEngine(model, host_code=host_code)

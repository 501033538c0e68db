"""A GPU in host memory: ``pycuda``, the driver's library and TensorRT's runtime, on stand-ins.

Work on a stream stays undone until somebody waits for it, so that a wait that is missing shows in
the numbers. Each call's arguments must fit the signature of the real one, a name that the real
module lacks is missing here too, memory may be touched only while it lives, and CUDA is used only
while a context is current. What was called is kept in ``Gpu.calls``, in order.

A plan is an ONNX file behind a line of JSON; ONNX Runtime computes it.

Source: pycuda 2026.1, ``src/wrapper/wrap_cudadrv.cpp``; the signatures that pybind11 prints for
TensorRT's bindings of 10.13 and 11.4; CUDA Driver API.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import sys
import threading
import types
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.machinery import ModuleSpec
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

import engineworks.runtime.engines
from engineworks.runtime.tensors import Array
from tests.runtime.tensorrt_stub import ALIGNMENT, tensorrt

Ranges = Mapping[str, Sequence[tuple[int, ...]]]


def plan(model: bytes, profiles: Sequence[Ranges] = (), *, data_dependent: bool = False) -> bytes:
    """A plan of the stand-in: profiles are input -> (min, opt, max)."""
    header = {"profiles": list(profiles), "data_dependent": data_dependent}
    return json.dumps(header).encode() + b"\n" + model


class Gpu:
    """The device: memory, streams, what was called."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.memory: dict[int, Any] = {}  # address -> the bytes behind it
        self.streams: dict[int, _Stream] = {}
        self.events: dict[int, tuple[_Stream, int] | None] = {}
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.capture_fails = False
        self.lacking = ""  # a provider of ONNX Runtime's that does not start
        self.ops_on_cpu: Sequence[str] = ()  # operators that ONNX Runtime puts there
        self.context = threading.local()
        self._next = 0x7000
        self.new_stream(1)  # the legacy default stream
        self.streams[0] = self.streams[1]

    def handle(self) -> int:
        self._next += 1
        return self._next

    def new_stream(self, handle: int | None = None) -> _Stream:
        handle = handle or self.handle()
        self.streams[handle] = _Stream(handle)
        return self.streams[handle]

    def log(self, *call: Any) -> None:
        self.calls.append(call)

    def named(self, name: str) -> list[tuple[Any, ...]]:
        """The calls of one name, in order."""
        return [call for call in self.calls if call[0] == name]

    def check_current(self) -> None:
        if not getattr(self.context, "depth", 0):
            raise CudaError("invalid device context: no context is current in this thread")

    def allocate(self, num_bytes: int) -> int:
        block = ctypes.create_string_buffer(num_bytes + ALIGNMENT)
        address = -(-ctypes.addressof(block) // ALIGNMENT) * ALIGNMENT
        self.memory[address] = (block, num_bytes)
        return address

    def at(self, address: int, num_bytes: int) -> Array:
        """The bytes at an address, which must be alive."""
        for begin, (_, size) in list(self.memory.items()):
            if begin <= address and address + num_bytes <= begin + size:
                content = (ctypes.c_uint8 * num_bytes).from_address(address)
                return np.ctypeslib.as_array(content)
        raise CudaError(f"illegal address {address:#x}, {num_bytes} bytes")

    def drain(self) -> None:
        for stream in list(self.streams.values()):
            stream.run()

    def install(self, version: str, monkeypatch: pytest.MonkeyPatch) -> Any:
        """Put ``tensorrt`` of a version and ``pycuda`` in the place of the real ones.

        ONNX Runtime gets sessions that pretend to run on the GPU.

        Returns:
            ``runtime.engines.trt``, imported anew on top of them, as ``cuda`` and ``ort_gpu`` are.
        """
        for name, module in {**_pycuda(self), "tensorrt": tensorrt(self, version)}.items():
            module.__spec__ = ModuleSpec(name, None)
            monkeypatch.setitem(sys.modules, name, module)
        for name in ("cuda", "recorder", "ort_gpu", "trt"):
            spec = importlib.util.find_spec(f"engineworks.runtime.engines.{name}")
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            monkeypatch.setitem(sys.modules, spec.name, module)
            monkeypatch.setattr(engineworks.runtime.engines, name, module, raising=False)
            spec.loader.exec_module(module)
        trt: Any = module
        monkeypatch.setattr(trt.cuda, "_library", lambda: DriverLibrary(self))
        sessions = types.SimpleNamespace(
            SessionOptions=ort.SessionOptions, InferenceSession=partial(Session, self)
        )
        monkeypatch.setattr(sys.modules["engineworks.runtime.engines.ort_gpu"], "ort", sessions)
        return trt


class CudaError(Exception):
    """``pycuda.driver.Error``."""


class _Stream:
    """Work that is done when somebody waits for it."""

    def __init__(self, handle: int) -> None:
        self.handle = handle
        self.queue: list[Callable[[], None]] = []
        self.done = 0  # pieces of work that have run
        self.captured: list[Callable[[], None]] | None = None

    def add(self, work: Callable[[], None]) -> None:
        (self.queue if self.captured is None else self.captured).append(work)

    def run(self, until: int | None = None) -> None:
        while self.queue and (until is None or self.done < until):
            self.done += 1
            self.queue.pop(0)()


# --- pycuda --------------------------------------------------------------------------------------


def _pycuda(gpu: Gpu) -> dict[str, Any]:
    driver: Any = types.ModuleType("pycuda.driver")

    class Device:
        def __init__(self, index: int) -> None:
            assert index == 0

        @staticmethod
        def count() -> int:
            return 1

        def retain_primary_context(self) -> Context:
            gpu.log("retain_primary_context")
            return Context()

    class Context:
        def push(self) -> None:
            gpu.context.depth = getattr(gpu.context, "depth", 0) + 1

        @staticmethod
        def pop() -> None:
            gpu.check_current()
            gpu.context.depth -= 1

        @staticmethod
        def synchronize() -> None:
            gpu.check_current()
            gpu.log("Context.synchronize")
            gpu.drain()

        def detach(self) -> None:
            gpu.log("detach")

    class Stream:
        def __init__(self, flags: int = 0) -> None:
            gpu.check_current()
            gpu.log("Stream", flags)
            self._stream = gpu.new_stream()

        @property
        def handle(self) -> int:
            return self._stream.handle

        def synchronize(self) -> None:
            gpu.check_current()
            gpu.log("synchronize", self.handle)
            assert self._stream.captured is None, "not while it is captured"
            self._stream.run()

        def __del__(self) -> None:
            gpu.log("del Stream")
            del gpu.streams[self.handle]

    class DeviceAllocation:
        def __init__(self, address: int) -> None:
            self._address = address

        def __int__(self) -> int:
            return self._address

        def free(self) -> None:
            gpu.check_current()
            gpu.drain()  # cuMemFree waits for the device
            gpu.log("free", self._address)
            del gpu.memory[self._address]

    def mem_alloc(num_bytes: int, /) -> DeviceAllocation:
        gpu.check_current()
        assert num_bytes > 0, "cuMemAlloc refuses 0"
        address = gpu.allocate(num_bytes)
        gpu.log("mem_alloc", address, num_bytes)
        return DeviceAllocation(address)

    def pagelocked_empty(shape: Any, dtype: Any, order: str = "C", mem_flags: int = 0) -> Array:
        gpu.check_current()
        gpu.log("pagelocked_empty", shape)
        return np.full(shape, 0xEE, dtype, order="C")

    def queue(stream: Stream, work: Callable[[], None]) -> None:
        gpu.check_current()
        assert isinstance(stream, Stream), "pycuda takes its own streams only"
        gpu.streams[stream.handle].add(work)

    def as_bytes(array: Array) -> Array:
        assert array.flags.c_contiguous
        return array.reshape(-1).view(np.uint8)

    def memcpy_htod_async(dest: Any, src: Array, stream: Any = None) -> None:
        gpu.log("memcpy_htod_async", int(dest), src.nbytes, stream.handle)
        queue(stream, lambda: np.copyto(gpu.at(int(dest), src.nbytes), as_bytes(src)))

    def memcpy_dtoh_async(dest: Array, src: Any, stream: Any = None) -> None:
        gpu.log("memcpy_dtoh_async", int(src), dest.nbytes, stream.handle)
        queue(stream, lambda: np.copyto(as_bytes(dest), gpu.at(int(src), dest.nbytes)))

    def memcpy_dtod_async(dest: Any, src: int, size: int, stream: Any = None) -> None:
        gpu.log("memcpy_dtod_async", int(dest), src, size, stream.handle)
        queue(stream, lambda: np.copyto(gpu.at(int(dest), size), gpu.at(src, size)))

    def memcpy_htod(dest: int, src: Array) -> None:
        gpu.check_current()
        np.copyto(gpu.at(dest, src.nbytes), as_bytes(src))

    def memcpy_dtoh(dest: Array, src: int) -> None:
        gpu.check_current()
        np.copyto(as_bytes(dest), gpu.at(src, dest.nbytes))

    class MemoryError(CudaError):  # noqa: A001  # pycuda's name
        pass

    class Event:
        """Its time is the number of pieces of work that its stream has done before."""

        def __init__(self, flags: int = 0) -> None:
            gpu.check_current()
            self.place: int | None = None

        def record(self, stream: Stream) -> None:
            gpu.check_current()
            self._stream = gpu.streams[stream.handle]
            self._stream.add(self._note)

        def _note(self) -> None:
            self.place = self._stream.done

        def synchronize(self) -> Event:
            gpu.check_current()
            self._stream.run()
            return self

        def time_since(self, other: Event) -> float:
            assert self.place is not None and other.place is not None, "not recorded yet"
            return float(self.place - other.place)

    driver.Error, driver.MemoryError = CudaError, MemoryError
    driver.init = lambda flags=0: gpu.log("init")
    for kind in (Device, Context, Stream, Event):
        setattr(driver, kind.__name__, kind)
    copies = (memcpy_dtoh, memcpy_htod, memcpy_htod_async, memcpy_dtoh_async, memcpy_dtod_async)
    for function in (mem_alloc, pagelocked_empty, *copies):
        setattr(driver, function.__name__, function)
    package: Any = types.ModuleType("pycuda")
    package.driver = driver
    package.__path__ = []
    return {"pycuda": package, "pycuda.driver": driver}


class DriverLibrary:
    """``libcuda.so.1`` as ctypes sees it: arguments are ctypes' own types, never bare numbers."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu

    def _stream(self, handle: ctypes.c_void_p) -> _Stream:
        assert isinstance(handle, ctypes.c_void_p), "a bare number would be cut to 32 bits"
        self._gpu.check_current()
        return self._gpu.streams[handle.value or 0]

    def cuEventCreate(self, event: Any, flags: ctypes.c_uint) -> int:
        assert flags.value == 2
        event._obj.value = self._gpu.handle()
        self._gpu.events[event._obj.value] = None
        return 0

    def cuEventRecord(self, event: ctypes.c_void_p, stream: ctypes.c_void_p) -> int:
        found = self._stream(stream)
        self._gpu.log("cuEventRecord", found.handle)
        assert event.value in self._gpu.events
        self._gpu.events[event.value] = (found, found.done + len(found.queue))
        return 0

    def cuStreamWaitEvent(
        self, stream: ctypes.c_void_p, event: ctypes.c_void_p, flags: ctypes.c_uint
    ) -> int:
        assert flags.value == 0 and event.value is not None
        found, record = self._stream(stream), self._gpu.events[event.value]
        self._gpu.log("cuStreamWaitEvent", found.handle)
        if record is not None:
            first, until = record
            found.add(lambda: first.run(until))
        return 0

    def cuEventDestroy_v2(self, event: ctypes.c_void_p) -> int:
        assert event.value is not None
        del self._gpu.events[event.value]
        return 0

    def cuStreamSynchronize(self, stream: ctypes.c_void_p) -> int:
        self._stream(stream).run()
        return 0

    def cuStreamBeginCapture_v2(self, stream: ctypes.c_void_p, mode: ctypes.c_int) -> int:
        found = self._stream(stream)
        assert mode.value == 1 and not found.queue, "set-up is to be done before"
        self._gpu.log("begin capture", found.handle)
        found.captured = []
        return 0

    def cuStreamEndCapture(self, stream: ctypes.c_void_p, graph: Any) -> int:
        found = self._stream(stream)
        self._gpu.log("end capture", found.handle)
        captured, found.captured = found.captured, None
        assert captured is not None
        if self._gpu.capture_fails:
            return 901
        graph._obj.value = self._gpu.handle()
        self._gpu.graphs[graph._obj.value] = captured
        return 0

    def cuGraphInstantiateWithFlags(
        self, instance: Any, graph: ctypes.c_void_p, flags: ctypes.c_ulonglong
    ) -> int:
        assert flags.value == 0 and graph.value is not None
        instance._obj.value = self._gpu.handle()
        self._gpu.graphs[instance._obj.value] = self._gpu.graphs[graph.value]
        return 0

    def cuGraphLaunch(self, instance: ctypes.c_void_p, stream: ctypes.c_void_p) -> int:
        found = self._stream(stream)
        assert instance.value is not None
        self._gpu.log("cuGraphLaunch", instance.value, found.handle)
        for work in self._gpu.graphs[instance.value]:
            found.add(work)
        return 0

    def cuGraphDestroy(self, graph: ctypes.c_void_p) -> int:
        assert graph.value is not None
        del self._gpu.graphs[graph.value]
        return 0

    def cuGraphExecDestroy(self, instance: ctypes.c_void_p) -> int:
        self._gpu.log("cuGraphExecDestroy")
        return self.cuGraphDestroy(instance)

    def cuGetErrorString(self, code: int, text: Any) -> int:
        text._obj.value = f"error {code} of the stand-in".encode()
        return 0


# --- ONNX Runtime --------------------------------------------------------------------------------


class Session:
    """ONNX Runtime's session on the CPU, with the GPU's names on it."""

    def __init__(
        self,
        gpu: Gpu,
        model: bytes | str,
        options: ort.SessionOptions,
        providers: Sequence[tuple[str, dict[str, str]]],
    ) -> None:
        self._gpu = gpu
        self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self._provider = providers[0][0]
        self._names = [name for name, _ in providers if name != gpu.lacking]
        gpu.log("Session", *providers)
        self.get_inputs = self._session.get_inputs
        self.get_outputs = self._session.get_outputs

    def get_providers(self) -> list[str]:
        return [*self._names, "CPUExecutionProvider"]

    def get_provider_graph_assignment_info(self) -> list[Any]:
        parts = self._session.get_provider_graph_assignment_info()
        nodes = [node for part in parts for node in part.get_nodes()]
        on_cpu = [node for node in nodes if node.op_type in self._gpu.ops_on_cpu]
        on_gpu = [node for node in nodes if node not in on_cpu]
        assigned = {"CPUExecutionProvider": on_cpu, self._provider: on_gpu}
        return [
            types.SimpleNamespace(ep_name=name, get_nodes=partial(list, part))
            for name, part in assigned.items()
        ]

    def io_binding(self) -> _Binding:
        return _Binding(self._gpu, self._session)

    def run_with_iobinding(self, binding: _Binding) -> None:
        binding.run()


class _Binding:
    def __init__(self, gpu: Gpu, session: ort.InferenceSession) -> None:
        self._gpu = gpu
        self._session = session
        self._feeds: dict[str, Array] = {}
        self._outputs: dict[str, str] = {}
        self._values: list[_Value] = []

    def bind_cpu_input(self, name: str, arr_on_cpu: Array) -> None:
        self._feeds[name] = arr_on_cpu

    def bind_input(
        self,
        name: str,
        device_type: str,
        device_id: int,
        element_type: Any,
        shape: tuple[int, ...],
        buffer_ptr: int,
    ) -> None:
        assert (device_type, device_id) == ("cuda", 0)
        dtype = np.dtype(element_type)
        content = self._gpu.at(buffer_ptr, int(np.prod(shape)) * dtype.itemsize)
        self._feeds[name] = content.view(dtype).reshape(shape)

    def bind_output(self, name: str, device_type: str = "cpu") -> None:
        self._outputs[name] = device_type

    def run(self) -> None:
        found = self._session.run(list(self._outputs), self._feeds)
        devices = self._outputs.values()
        self._values = [_Value(self._gpu, a, to) for a, to in zip(found, devices, strict=True)]

    def synchronize_outputs(self) -> None:
        self._gpu.log("synchronize_outputs")

    def get_outputs(self) -> list[_Value]:
        return self._values


class _Value:
    """``OrtValue``."""

    def __init__(self, gpu: Gpu, content: Array, device: str) -> None:
        self._content = content
        if device == "cuda":
            self._address = gpu.allocate(content.nbytes)
            gpu.at(self._address, content.nbytes)[:] = content.reshape(-1).view(np.uint8)

    def shape(self) -> list[int]:
        return list(self._content.shape)

    def data_ptr(self) -> int:
        return self._address

    def numpy(self) -> Array:
        return self._content

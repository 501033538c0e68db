"""CUDA as the engines need it: the device, a stream, memory, graphs. The only importer of pycuda.

pycuda holds the device's primary context, which is the one that PyTorch uses, so that pointers and
streams of either are good in the other. Two things pycuda does not offer are asked of the driver
itself: order between a stream of ours and somebody else's, and graphs.

Never run on a GPU. What was run is pycuda 2026.1 over a driver that computes in host memory.

Source: pycuda's ``src/wrapper/wrap_cudadrv.cpp``; CUDA Driver API, "Stream Management", "Event
Management" and "Graph Management"; Numba's CUDA Array Interface, version 3.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import pycuda.driver as driver

from engineworks.runtime.errors import BackendError, EngineError, InputError
from engineworks.runtime.tensors import Array, DeviceArray

# CU_STREAM_NON_BLOCKING: no implicit order with the legacy default stream
_NON_BLOCKING = 1
# CU_EVENT_DISABLE_TIMING
_NO_TIMING = 2
# CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: other threads may use CUDA meanwhile
_THREAD_LOCAL = 1
_LEGACY_STREAM = 1


class Device:
    """The first CUDA device, by its primary context. One per process: see ``device``.

    Raises:
        BackendError: there is no device.
    """

    def __init__(self) -> None:
        try:
            driver.init()
            if driver.Device.count() == 0:
                raise BackendError("there is no CUDA device", fix="choose a CPU backend")
            self._context = driver.Device(0).retain_primary_context()
        except driver.Error as error:
            raise BackendError(f"CUDA cannot start: {error}", fix="see `cli.py doctor`") from error
        # Finalizers run last in, first out: at exit, whatever was made on the device goes first.
        weakref.finalize(self, self._context.detach)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Makes the context this thread's current one; every call below needs that.

        Raises:
            EngineError: a call of CUDA's failed inside.
        """
        self._context.push()
        try:
            yield
        except driver.MemoryError as error:
            raise EngineError(
                f"the GPU's memory is full: {error}",
                fix="use a smaller batch, or a plan with a smaller profile",
            ) from error
        except driver.Error as error:
            raise EngineError(f"CUDA failed: {error}") from error
        finally:
            driver.Context.pop()

    def allocate(self, num_bytes: int) -> Any:
        """Device memory; ``int()`` of it is the address, a multiple of 256."""
        return driver.mem_alloc(max(num_bytes, 1))

    def pinned(self, num_bytes: int) -> Array:
        """(bytes,) uint8 host memory that the device copies from and to by itself."""
        staging: Array = driver.pagelocked_empty(max(num_bytes, 1), np.uint8)
        return staging

    def synchronize(self) -> None:
        """Wait for all that was queued on the device, by anyone in this process."""
        driver.Context.synchronize()


@cache
def device() -> Device:
    """The device of this process.

    Raises:
        BackendError: there is none.
    """
    return Device()


class Stream:
    """A queue of work of our own, never the default one. Needs an active device, also to close."""

    def __init__(self) -> None:
        self._stream = driver.Stream(_NON_BLOCKING)
        self.handle = int(self._stream.handle)
        event = ctypes.c_void_p()
        _call("cuEventCreate", ctypes.byref(event), ctypes.c_uint(_NO_TIMING))
        self._event = event

    def upload(self, to: Any, host: Array) -> None:
        """Queue a copy of contiguous, pinned host memory to the device."""
        driver.memcpy_htod_async(to, host, self._stream)

    def download(self, host: Array, source: Any) -> None:
        """Queue a copy from the device into contiguous, pinned host memory."""
        driver.memcpy_dtoh_async(host, source, self._stream)

    def copy(self, to: Any, source: int, num_bytes: int) -> None:
        """Queue a copy within the device."""
        driver.memcpy_dtod_async(to, source, num_bytes, self._stream)

    def follow(self, other: int) -> None:
        """What is queued here from now on waits for what is queued on another stream so far."""
        self._order(first=other, then=self.handle)

    def lead(self, other: int) -> None:
        """What is queued on another stream from now on waits for what is queued here so far."""
        self._order(first=self.handle, then=other)

    def _order(self, first: int, then: int) -> None:
        # an event may be recorded again at once: a wait keeps the record that it was queued with
        _call("cuEventRecord", self._event, ctypes.c_void_p(first))
        _call("cuStreamWaitEvent", ctypes.c_void_p(then), self._event, ctypes.c_uint(0))

    def capture(self, work: Callable[[], None]) -> Graph:
        """What ``work`` queues on this stream, as a graph; nothing of it runs.

        Raises:
            EngineError: some of it cannot be captured; the stream is as before.
        """
        stream, graph = ctypes.c_void_p(self.handle), ctypes.c_void_p()
        _call("cuStreamBeginCapture_v2", stream, ctypes.c_int(_THREAD_LOCAL))
        try:
            work()
        finally:
            failure = _try("cuStreamEndCapture", stream, ctypes.byref(graph))
        if failure:
            raise EngineError(failure)
        return Graph(graph)

    def launch(self, graph: Graph) -> None:
        """Queue all that a graph holds."""
        _call("cuGraphLaunch", graph.handle, ctypes.c_void_p(self.handle))

    def synchronize(self) -> None:
        """Wait for all that is queued here."""
        self._stream.synchronize()

    def close(self) -> None:
        self.synchronize()
        _call("cuEventDestroy_v2", self._event)
        del self._stream


class Stopwatch:
    """Milliseconds that work takes on the device, by events; on a stream of its own."""

    def __init__(self) -> None:
        with device().active():
            self._stream = driver.Stream(_NON_BLOCKING)
            self._begin, self._end = driver.Event(), driver.Event()

    def time(self, work: Callable[[int], object]) -> float:
        """From when the device comes to what ``work`` queues until that is done.

        Where the host is slower at queueing than the device at working, this includes the waiting.

        Args:
            work: queues on the stream whose handle it is given; what it returns is kept meanwhile.
        """
        with device().active():
            self._begin.record(self._stream)
            # kept until the end: freeing results waits for the device
            results = work(int(self._stream.handle))
            self._end.record(self._stream)
            self._end.synchronize()
            del results
            return float(self._end.time_since(self._begin))


class Graph:
    """Queued work that can be launched again: with the same addresses, without its overhead.

    Args:
        captured: the ``CUgraph``; released here.
    """

    def __init__(self, captured: ctypes.c_void_p) -> None:
        self.handle = ctypes.c_void_p()
        try:
            _call(
                "cuGraphInstantiateWithFlags",
                ctypes.byref(self.handle),
                captured,
                ctypes.c_ulonglong(0),
            )
        finally:
            _call("cuGraphDestroy", captured)

    def close(self) -> None:
        _call("cuGraphExecDestroy", self.handle)


class DeviceTensor:
    """An array in device memory that belongs to whoever holds it; freed with its last reference.

    torch, CuPy and pycuda read it without a copy, e.g. ``torch.as_tensor(tensor, device="cuda")``.

    Args:
        stream: handle of the stream that its content is queued on; None where it is complete.
    """

    def __init__(
        self, on: Device, shape: tuple[int, ...], dtype: str, *, stream: int | None = None
    ) -> None:
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self._stream = stream
        allocation = on.allocate(math.prod(shape) * self.dtype.itemsize)
        self.address = int(allocation)
        weakref.finalize(self, _free, on, allocation)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.address, False),
            "strides": None,
            "stream": _LEGACY_STREAM if self._stream == 0 else self._stream,
            "version": 3,
        }

    def numpy(self) -> Array:
        """A copy in host memory; waits for the device."""
        host = np.empty(self.shape, self.dtype)
        with device().active():
            device().synchronize()
            if host.nbytes:
                driver.memcpy_dtoh(host, self.address)
        return host


def upload(array: Array) -> DeviceTensor:
    """A copy in device memory; complete when this returns."""
    with device().active():
        tensor = DeviceTensor(device(), array.shape, array.dtype.name)
        if array.nbytes:
            driver.memcpy_htod(tensor.address, np.ascontiguousarray(array))
    return tensor


def _free(on: Device, allocation: Any) -> None:
    # in whichever thread the last reference was dropped; waits for work that uses the memory
    with on.active():
        allocation.free()


def address_of(name: str, feed: DeviceArray) -> int:
    """Where an array in device memory begins.

    Raises:
        InputError: its elements do not lie one after the other.
    """
    interface = feed.__cuda_array_interface__
    shape, strides = tuple(interface["shape"]), interface.get("strides")
    itemsize = np.dtype(interface["typestr"]).itemsize
    dense = tuple(itemsize * math.prod(shape[i + 1 :]) for i in range(len(shape)))
    if strides is not None and any(
        have != want for have, want, axis in zip(strides, dense, shape, strict=True) if axis > 1
    ):
        raise InputError(
            f"input '{name}' is not contiguous in device memory: strides {tuple(strides)} bytes, "
            f"shape {shape}",
            fix="feed .contiguous() of it",
        )
    return int(interface["data"][0])


def await_feed(stream: Stream | None, feed: DeviceArray) -> bool:
    """Order ``stream`` after whoever writes a feed, as far as the feed tells.

    Args:
        stream: None waits for the writer here and now.

    Returns:
        False where the feed does not say on which stream it is written (interface version 2, as
        PyTorch's): then its content is only sure after the caller's stream, or after the device.
    """
    interface = feed.__cuda_array_interface__
    if "stream" not in interface:
        return False
    if interface["stream"] is not None:
        if stream is None:
            _call("cuStreamSynchronize", ctypes.c_void_p(interface["stream"]))
        else:
            stream.follow(interface["stream"])
    return True


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")  # pycuda has loaded it already


def _try(name: str, *arguments: Any) -> str | None:
    """Call the driver; why it failed, or None."""
    code = getattr(_library(), name)(*arguments)
    if code == 0:
        return None
    text = ctypes.c_char_p()
    _library().cuGetErrorString(code, ctypes.byref(text))
    return f"CUDA: {name} failed: {(text.value or str(code).encode()).decode()}"


def _call(name: str, *arguments: Any) -> None:
    if failure := _try(name, *arguments):
        raise EngineError(failure)

"""TensorRT's runtime on a stand-in: its part of ``gpu_stub``, which says what it holds to."""

from __future__ import annotations

import json
import types
from collections.abc import Mapping
from enum import Enum, IntEnum
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort

from engineworks.runtime.tensors import Array

if TYPE_CHECKING:
    from tests.runtime.gpu_stub import Gpu

ALIGNMENT = 256


class _Mode(Enum):
    INPUT = 1
    OUTPUT = 2


class _Location(Enum):
    DEVICE = 0
    HOST = 1


class _Strategy(Enum):
    STATIC = 0
    ON_PROFILE_CHANGE = 1
    USER_MANAGED = 2


class _Severity(IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2


_TYPES = {
    "tensor(float)": "FLOAT",
    "tensor(float16)": "HALF",
    "tensor(bfloat16)": "BF16",
    "tensor(int64)": "INT64",
    "tensor(int32)": "INT32",
}
_DataType = Enum("_DataType", list(_TYPES.values()))  # type: ignore[misc]  # names are known
_NUMPY = {"FLOAT": np.float32, "HALF": np.float16, "INT64": np.int64, "INT32": np.int32}


def _nptype(dtype: Any, /) -> Any:
    if dtype.name not in _NUMPY:
        raise TypeError(f"Could not resolve TensorRT datatype {dtype.name} to a numpy type")
    return _NUMPY[dtype.name]


def tensorrt(gpu: Gpu, version: str) -> Any:
    module: Any = types.ModuleType("tensorrt")
    module.__version__ = version

    class Logger(_Severity_holder):
        def __init__(self, min_severity: _Severity = _Severity.WARNING) -> None:
            gpu.log("Logger", min_severity)

    class IErrorRecorder:
        def __init__(self) -> None:
            self._started = True

    class Runtime:
        __slots__ = ("engine_host_code_allowed", "error_recorder")

        def __init__(self, logger: Logger, /) -> None:
            gpu.check_current()
            assert isinstance(logger, Logger)
            self.engine_host_code_allowed = False
            self.error_recorder: Any = None

        def deserialize_cuda_engine(self, serialized: bytes, /) -> Engine | None:
            gpu.check_current()
            assert self.error_recorder is not None and self.error_recorder._started
            gpu.log("deserialize", self.engine_host_code_allowed)
            try:
                header, model = serialized.split(b"\n", 1)
                content = json.loads(header)
                session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
            except Exception as error:  # whatever the bytes are, TensorRT answers None
                self.error_recorder.report_error("SERIALIZATION", f"no plan: {error}"[:80])
                return None
            return Engine(self, content, session)

        def __del__(self) -> None:
            gpu.log("del Runtime")

    class Engine:
        device_memory_size_v2 = 1000

        def __init__(self, runtime: Runtime, content: dict[str, Any], session: Any) -> None:
            self._runtime = runtime
            self._recorder = runtime.error_recorder
            self._content = content
            self._session = session
            self._inputs = {value.name: value for value in session.get_inputs()}
            self._outputs = {value.name: value for value in session.get_outputs()}
            self._all: dict[str, Any] = {**self._inputs, **self._outputs}
            self.num_io_tensors = len(self._all)
            self.num_optimization_profiles = max(1, len(content["profiles"]))

        def get_tensor_name(self, index: int) -> str:
            return list(self._all)[index]

        def get_tensor_mode(self, name: str) -> _Mode:
            return _Mode.INPUT if name in self._inputs else _Mode.OUTPUT

        def get_tensor_dtype(self, name: str) -> Any:
            return _DataType[_TYPES[self._all[name].type]]

        def get_tensor_shape(self, name: str) -> list[int]:
            return [axis if isinstance(axis, int) else -1 for axis in self._all[name].shape]

        def get_tensor_location(self, name: str) -> _Location:
            host = name in self._content.get("host", ())
            return _Location.HOST if host else _Location.DEVICE

        def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[list[int]]:
            assert name in self._inputs, "of an output it is no shape"
            return list(self._content["profiles"][profile_index][name])

        def create_execution_context(self, strategy: _Strategy = _Strategy.STATIC) -> Context:
            gpu.check_current()
            gpu.log("create_execution_context", strategy.name)
            assert strategy is _Strategy.USER_MANAGED
            return Context(self)

        def __del__(self) -> None:
            gpu.log("del Engine")

    class Context:
        def __init__(self, engine: Engine) -> None:
            self._engine = engine
            self._profile = 0
            self._shapes: dict[str, tuple[int, ...]] = {}
            self._addresses: dict[str, int] = {}
            self._scratch = (0, 0)

        def set_device_memory(self, memory: int, size: int) -> None:
            gpu.log("set_device_memory", memory, size)
            gpu.at(memory, size)
            self._scratch = (memory, size)

        def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
            gpu.log("set_optimization_profile_async", profile_index)
            gpu.streams[stream_handle].add(lambda: setattr(self, "_profile", profile_index))
            return True

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            gpu.log("set_input_shape", id(self), name, tuple(shape))
            if self._engine._content["profiles"] and -1 in self._engine.get_tensor_shape(name):
                low, _, high = self._engine.get_tensor_profile_shape(name, self._profile)
                if not all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True)):
                    self._engine._recorder.report_error("INVALID", f"{shape} is out of range")
                    return False
            self._shapes[name] = tuple(shape)
            return True

        def infer_shapes(self) -> list[str]:
            missing = [name for name in self._engine._inputs if name not in self._shapes]
            if not missing:
                try:
                    self._compute({name: self._zeros(name) for name in self._engine._inputs})
                except Exception as error:
                    self._engine._recorder.report_error("INVALID", "axes do not agree")
                    raise RuntimeError("shape inference") from error
            return missing

        def get_tensor_shape(self, name: str) -> list[int]:
            if name in self._shapes:
                return list(self._shapes[name])
            if self._engine._content["data_dependent"]:
                return [-1]
            zeros = {name: self._zeros(name) for name in self._engine._inputs}
            return list(self._compute(zeros)[name].shape)

        def set_tensor_address(self, name: str, memory: int) -> bool:
            gpu.log("set_tensor_address", name, memory)
            assert memory % ALIGNMENT == 0, "TensorRT asks for 256 bytes"
            self._addresses[name] = memory
            return True

        def execute_async_v3(self, stream_handle: int) -> bool:
            gpu.check_current()
            gpu.log("execute_async_v3", stream_handle)
            assert stream_handle not in (0, 1), "never the default stream"
            if self._engine._content.get("fails"):
                self._engine._recorder.report_error("FAILED_EXECUTION", "as asked")
                return False
            assert self._addresses.keys() == self._engine._all.keys(), "all of them, each time"
            assert not self.infer_shapes() and self._scratch[1] == 1000
            shapes, addresses = dict(self._shapes), dict(self._addresses)
            stream = gpu.streams[stream_handle]
            captured = stream.captured is not None
            stream.add(lambda: self._execute(shapes, addresses, captured))
            return True

        def _execute(
            self, shapes: Mapping[str, Any], addresses: Mapping[str, int], captured: bool
        ) -> None:
            if captured:
                assert shapes == self._shapes, "a graph is bound to the state of its context"
            feeds = {}
            for name in self._engine._inputs:
                dtype = np.dtype(_nptype(self._engine.get_tensor_dtype(name)))
                size = int(np.prod(shapes[name])) * dtype.itemsize
                feeds[name] = gpu.at(addresses[name], size).view(dtype).reshape(shapes[name]).copy()
            for name, array in self._compute(feeds).items():
                flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
                np.copyto(gpu.at(addresses[name], array.nbytes), flat)

        def _zeros(self, name: str) -> Array:
            return np.zeros(self._shapes[name], _nptype(self._engine.get_tensor_dtype(name)))

        def _compute(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
            names = list(self._engine._outputs)
            outputs = self._engine._session.run(names, dict(feeds))
            return dict(zip(names, outputs, strict=True))

        def __del__(self) -> None:
            gpu.log("del Context")

    module.Logger, module.Runtime, module.IErrorRecorder = Logger, Runtime, IErrorRecorder
    module.nptype = _nptype
    module.TensorIOMode, module.TensorLocation = _Mode, _Location
    module.ExecutionContextAllocationStrategy = _Strategy
    if version.startswith("10."):  # names that 11 took away
        Engine.device_memory_size = 1000  # type: ignore[attr-defined]
    return module


class _Severity_holder:  # noqa: N801
    INTERNAL_ERROR = _Severity.INTERNAL_ERROR
    WARNING = _Severity.WARNING

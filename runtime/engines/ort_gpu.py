"""ONNX Runtime on the GPU: its CUDA provider, and its TensorRT provider.

Chosen by name only, never by ``auto``. ONNX Runtime would fall back to the CPU in silence, as a
whole or node by node; here both are errors.

Never run on a GPU: the tests run it on the CPU provider in their place.

Source: ONNX Runtime's Python API (``IOBinding``), "CUDA Execution Provider" and "TensorRT Execution
Provider"; ``get_provider_graph_assignment_info`` is there from 1.24.1 on.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnxruntime as ort

from engineworks.runtime.engines import cuda
from engineworks.runtime.engines.ort import specs_of
from engineworks.runtime.errors import BackendError, EngineError, InputError
from engineworks.runtime.tensors import Array, Feeds, TensorSpec, check_feeds

Provider = tuple[str, dict[str, str]]

# products of float32 in float32: the provider's default rounds them to 10 bits of mantissa
_CUDA: Provider = ("CUDAExecutionProvider", {"device_id": "0", "use_tf32": "0"})
_CPU_NAME = "CPUExecutionProvider"
# ONNX Runtime computes shapes on the CPU on purpose: the GPU would have to wait for them
_SHAPE_OPS = frozenset(
    {"Shape", "Size", "Gather", "Concat", "Slice", "Squeeze", "Unsqueeze", "Cast"}
    | {
        "Add",
        "Sub",
        "Mul",
        "Div",
        "Mod",
        "Equal",
        "Where",
        "ConstantOfShape",
        "Range",
        "ReduceProd",
    }
)


class OrtGpuEngine:
    """One ONNX graph in a session whose nodes all run on the GPU.

    Attributes:
        cpu_nodes: names of the nodes that run on the CPU all the same: they compute shapes.
    """

    def __init__(self, model: Path | bytes, *, backend: str, providers: list[Provider]) -> None:
        """Load a graph.

        Args:
            model: an ONNX file or its bytes.
            backend: name in the table.
            providers: those that may run nodes, preferred first.

        Raises:
            BackendError: the provider cannot start here.
            EngineError: not a graph that it can run, or not without the CPU.
        """
        self.backend = backend
        self._device = cuda.device()
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        name = str(model) if isinstance(model, Path) else "the graph"
        try:
            session = ort.InferenceSession(
                model if isinstance(model, bytes) else str(model), options, providers=providers
            )
        except Exception as error:  # ONNX Runtime's own errors share no public base class
            raise EngineError(
                f"ONNX Runtime cannot load {name} on {backend}: {error}",
                fix="export the bundle again, or try another --backend",
            ) from error
        wanted = [provider for provider, _ in providers]
        if missing := set(wanted) - set(session.get_providers()):
            raise BackendError(
                f"ONNX Runtime has no working {' and '.join(sorted(missing))}, only "
                f"{', '.join(session.get_providers())}",
                fix="see `cli.py doctor`; its own log says which library it lacks",
            )
        self.cpu_nodes = _check_assignment(session, backend)
        self._session: ort.InferenceSession | None = session
        self.inputs: Mapping[str, TensorSpec] = specs_of(session.get_inputs())
        self.outputs: Mapping[str, TensorSpec] = specs_of(session.get_outputs())

    def run(self, feeds: Feeds, *, stream: int | None = None) -> dict[str, Array]:
        """See ``runtime.engines.Engine.run``; runs on a stream of the session's own, and blocks.

        Device feeds that do not say on which stream they are written (PyTorch's) make the run wait
        for the whole device first.
        """
        session = self._session
        if session is None:
            raise EngineError("this engine is closed", fix="open it again")
        if stream is not None:
            raise EngineError(
                f"backend '{self.backend}' runs on a stream of its own",
                fix="leave the stream out, or open the bundle with --backend tensorrt",
            )
        check_feeds(self.inputs, feeds)
        on_device = [name for name, feed in feeds.items() if not isinstance(feed, np.ndarray)]
        if on_device and len(on_device) < len(feeds):
            raise InputError(
                f"only {on_device} of {list(feeds)} are in device memory",
                fix="feed all inputs from one side",
            )
        binding = session.io_binding()
        self._bind(binding, feeds)
        for name in self.outputs:
            binding.bind_output(name, "cuda" if on_device else "cpu")
        try:
            session.run_with_iobinding(binding)
            binding.synchronize_outputs()
        except Exception as error:  # as above
            raise EngineError(f"ONNX Runtime failed: {error}") from error
        values = zip(self.outputs.items(), binding.get_outputs(), strict=True)
        if on_device:
            tensors = {name: OrtTensor(value, spec, session) for (name, spec), value in values}
            return cast("dict[str, Array]", tensors)  # arrays by structure
        # the binding owns its outputs: copy, because they belong to the caller
        return {name: np.array(value.numpy()) for (name, _), value in values}

    def _bind(self, binding: Any, feeds: Feeds) -> None:
        with self._device.active():
            told = [
                cuda.await_feed(None, feed)
                for feed in feeds.values()
                if not isinstance(feed, np.ndarray)
            ]
            if not all(told):
                self._device.synchronize()
        for name, feed in feeds.items():
            if isinstance(feed, np.ndarray):
                binding.bind_cpu_input(name, np.ascontiguousarray(feed))
            else:
                binding.bind_input(
                    name=name,
                    device_type="cuda",
                    device_id=0,
                    element_type=np.dtype(self.inputs[name].dtype).type,
                    shape=tuple(feed.__cuda_array_interface__["shape"]),
                    buffer_ptr=cuda.address_of(name, feed),
                )

    def close(self) -> None:
        self._session = None


class OrtTensor:
    """An output in device memory; it keeps the session alive that allocated it."""

    def __init__(self, value: Any, spec: TensorSpec, session: Any) -> None:
        self._value = value
        self._session = session
        self.shape: tuple[int, ...] = tuple(value.shape())
        self.dtype = np.dtype(spec.dtype)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self._value.data_ptr(), False),
            "strides": None,
            "stream": None,
            "version": 3,
        }

    def numpy(self) -> Array:
        """A copy in host memory."""
        return np.array(self._value.numpy())


def _check_assignment(session: Any, backend: str) -> tuple[str, ...]:
    """The nodes on the CPU, which must be such that compute shapes.

    Raises:
        EngineError: others are there; they are named.
    """
    nodes = [
        node
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name == _CPU_NAME
        for node in part.get_nodes()
    ]
    if others := [
        f"{node.name} ({node.op_type})" for node in nodes if node.op_type not in _SHAPE_OPS
    ]:
        raise EngineError(
            f"backend '{backend}' would run {len(others)} nodes on the CPU: "
            f"{', '.join(others[:5])}{', ...' if len(others) > 5 else ''}",
            fix="choose --backend tensorrt, or a CPU backend",
        )
    return tuple(node.name for node in nodes)


def open_cuda(model: Path | bytes, *, precision: str, threads: int | None) -> OrtGpuEngine:
    """Backend table's entry for ``ort-cuda``; the variant already is of the precision asked for."""
    return OrtGpuEngine(model, backend="ort-cuda", providers=[_CUDA])


def open_tensorrt(model: Path | bytes, *, precision: str, threads: int | None) -> OrtGpuEngine:
    """Backend table's entry for ``ort-tensorrt``; builds its engine in the first run of a shape."""
    options = {"device_id": "0", "trt_int8_enable": "1" if precision == "int8" else "0"}
    providers = [("TensorrtExecutionProvider", options), _CUDA]
    return OrtGpuEngine(model, backend="ort-tensorrt", providers=providers)

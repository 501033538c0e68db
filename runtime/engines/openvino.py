"""OpenVINO on the CPU."""

from __future__ import annotations

import os
import weakref
from collections import deque
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
import openvino as ov

from engineworks.runtime.errors import EngineError
from engineworks.runtime.tensors import Array, Feeds, TensorSpec, check_feeds, check_host
from engineworks.runtime.threads import available_threads

# compiled for a size of the input and kept for when it comes again; without a limit they fill the
# memory where every picture has another size
_MAX_KERNELS = 256


class OpenVinoEngine:
    """One ONNX graph compiled by OpenVINO for latency; as many infer requests as calls at a time.

    Requests belong to no thread: one that a thread took along at its end would ask for Python's
    lock, and where Python is ending meanwhile, that aborts the process.
    """

    backend = "openvino"

    def __init__(
        self, model: Path | bytes, *, precision: str = "float", threads: int | None = None
    ) -> None:
        """Compile a graph.

        Args:
            model: an ONNX file or its bytes.
            precision: ``bf16`` and ``int8-bf16`` let float layers run in bfloat16; otherwise they
                are float32 (OpenVINO's own default would silently take bfloat16 where the CPU has
                it).
            threads: None takes all cores that this process may use.

        Raises:
            EngineError: not a graph that OpenVINO can compile.
        """
        core = _core()
        self._threads = threads or available_threads()
        _check_idle(self._threads)
        try:
            graph = core.read_model(model if isinstance(model, bytes) else str(model))
            names = _tensor_names(graph)
            self._compiled: ov.CompiledModel | None = core.compile_model(
                graph,
                "CPU",
                {
                    "PERFORMANCE_HINT": "LATENCY",
                    "INFERENCE_NUM_THREADS": str(self._threads),
                    "CPU_RUNTIME_CACHE_CAPACITY": str(_MAX_KERNELS),
                    "INFERENCE_PRECISION_HINT": "bf16" if "bf16" in precision else "f32",
                },
            )
        except Exception as error:  # OpenVINO raises RuntimeError and pybind11's own types
            raise EngineError(
                f"OpenVINO cannot load {model if isinstance(model, Path) else 'the graph'}: "
                f"{error}",
                fix="export the bundle again, or try --backend ort",
            ) from error
        self.inputs: Mapping[str, TensorSpec] = names[0]
        self.outputs: Mapping[str, TensorSpec] = names[1]
        self._requests: deque[ov.InferRequest] = deque()
        self._finalizer = weakref.finalize(self, _idle.add, (os.getpid(), self._threads))

    def run(self, feeds: Feeds, *, stream: int | None = None) -> dict[str, Array]:
        """See ``runtime.engines.Engine.run``; device feeds and streams are refused."""
        compiled = self._compiled
        if compiled is None:
            raise EngineError("this engine is closed", fix="open it again")
        check_host(feeds, stream, self.backend)
        check_feeds(self.inputs, feeds)
        try:
            request = self._requests.pop()
        except IndexError:
            request = compiled.create_infer_request()
        try:
            results = request.infer(
                [np.ascontiguousarray(feeds[name]) for name in self.inputs], share_inputs=True
            )
        except Exception as error:  # as above
            raise EngineError(f"OpenVINO failed: {error}") from error
        # the request keeps its output buffers: copy, because outputs belong to the caller
        outputs = {name: np.array(results[i]) for i, name in enumerate(self.outputs)}
        self._requests.append(request)
        return outputs

    def close(self) -> None:
        self._compiled = None
        self._requests.clear()
        self._finalizer()


# (process, threads) of engines that were closed: OpenVINO gives their threads to the next engine
# with as many, also in a forked process, where there are none
_idle: set[tuple[int, int]] = set()


def _check_idle(threads: int) -> None:
    if any(process != os.getpid() and count == threads for process, count in _idle):
        raise EngineError(
            f"an OpenVINO engine with {threads} threads was closed before this process was forked "
            "off: OpenVINO would wait for its threads for ever",
            fix="start processes with 'spawn', or open OpenVINO's engines only after the fork, or "
            "take --backend ort",
        )


def _tensor_names(
    graph: ov.Model,
) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec]]:
    def specs(ports: list[ov.Output]) -> dict[str, TensorSpec]:
        return {
            port.get_any_name(): TensorSpec(
                dtype=np.dtype(port.get_element_type().to_dtype()).name,
                shape=tuple(
                    axis.get_length() if axis.is_static else f"axis{i}"
                    for i, axis in enumerate(port.get_partial_shape())
                ),
            )
            for port in ports
        }

    return specs(graph.inputs), specs(graph.outputs)


def open_graph(model: Path | bytes, *, precision: str, threads: int | None) -> OpenVinoEngine:
    """Backend table's entry."""
    return OpenVinoEngine(model, precision=precision, threads=threads)


@cache
def _core() -> ov.Core:
    """The one core of this process, never released.

    OpenVINO's CPU plugin gives the thread that loads it an alternate signal stack, and unmaps it
    when the last user of the core is gone, also where a later core has taken it for the thread's
    old one. The next signal that Python handles (Ctrl-C, a loader process that ends) would then be
    delivered to memory that is not there, and the process dies without a trace.
    """
    return ov.Core()

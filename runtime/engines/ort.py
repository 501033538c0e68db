"""ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnxruntime as ort

from engineworks.runtime.errors import EngineError
from engineworks.runtime.tensors import Array, DType, Feeds, TensorSpec, check_feeds, check_host
from engineworks.runtime.threads import available_threads

_DTYPES: dict[str, DType] = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(uint8)": "uint8",
    "tensor(int8)": "int8",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}


class OrtEngine:
    """One ONNX graph in an ONNX Runtime session on the CPU provider, all graph optimisations on."""

    backend = "ort"

    def __init__(self, model: Path | bytes, *, threads: int | None = None) -> None:
        """Load a graph.

        Args:
            model: an ONNX file or its bytes.
            threads: intra-op threads; None takes all cores that this process may use.

        Raises:
            EngineError: not a graph that ONNX Runtime can run.
        """
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or available_threads()
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3
        # within a run threads spin while they wait: waking them costs a fifth of the time; between
        # two runs they would take the cores from all else
        options.add_session_config_entry("session.intra_op.allow_spinning", "1")
        options.add_session_config_entry("session.force_spinning_stop", "1")
        source = model if isinstance(model, bytes) else str(model)
        try:
            self._session: ort.InferenceSession | None = ort.InferenceSession(
                source, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime's own errors share no public base class
            raise EngineError(
                f"ONNX Runtime cannot load {model if isinstance(model, Path) else 'the graph'}: "
                f"{error}",
                fix="export the bundle again, or try --backend openvino",
            ) from error
        self.inputs: Mapping[str, TensorSpec] = specs_of(self._session.get_inputs())
        self.outputs: Mapping[str, TensorSpec] = specs_of(self._session.get_outputs())
        self._names = list(self.outputs)

    def run(self, feeds: Feeds, *, stream: int | None = None) -> dict[str, Array]:
        """See ``runtime.engines.Engine.run``; device feeds and streams are refused."""
        session = self._session
        if session is None:
            raise EngineError("this engine is closed", fix="open it again")
        check_host(feeds, stream, self.backend)
        check_feeds(self.inputs, feeds)
        try:
            return dict(zip(self._names, session.run(self._names, dict(feeds)), strict=True))
        except Exception as error:  # as above
            raise EngineError(f"ONNX Runtime failed: {error}") from error

    def close(self) -> None:
        self._session = None


def specs_of(values: list[ort.NodeArg]) -> dict[str, TensorSpec]:
    """What a session tells about its inputs or outputs."""
    return {
        value.name: TensorSpec(
            dtype=_DTYPES[value.type],
            shape=tuple(
                axis if isinstance(axis, int) else str(axis or f"axis{i}")
                for i, axis in enumerate(value.shape)
            ),
        )
        for value in values
    }


def open_graph(model: Path | bytes, *, precision: str, threads: int | None) -> OrtEngine:
    """Backend table's entry; the graph variant already is of the precision asked for."""
    return OrtEngine(model, threads=threads)

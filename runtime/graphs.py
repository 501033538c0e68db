"""ONNX graphs, looked at before a backend sees them.

Backends are made for speed and trust what they are given: on a graph of nonsense one of them ends
the process. So what an exporter never writes is refused here: files beside the graph, operators
that no backend of ours knows, control flow, tensors that do not hold what their shape says, and
whatever ONNX' own checker does not take. This makes a crash unlikely, and not impossible; against
who can write bundles only a signature helps (``runtime.signing``).

Source: ONNX, "IR specification".
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import onnx
from google.protobuf.message import DecodeError
from onnx import AttributeProto, TensorProto

from engineworks.runtime.errors import EngineError

# domain -> oldest and newest version of its operators; ONNX Runtime's own are its fused ones
_NEWEST = onnx.defs.onnx_opset_version()
_OPSETS = {"": (13, _NEWEST), "ai.onnx": (13, _NEWEST), "com.microsoft": (1, 1)}
_FUSED = frozenset({"QuickGelu"})
# they run graphs of their own, some without end
_CONTROL_FLOW = frozenset({"If", "Loop", "Scan", "SequenceMap"})
_MAX_ELEMENTS = 1 << 31
_NARROW = {TensorProto.INT4: 2, TensorProto.UINT4: 2}  # elements to a byte


def check_graph(data: bytes, name: str) -> None:
    """Refuse what is no plain, complete ONNX graph.

    Args:
        data: the content of an ONNX file.
        name: what errors call it.

    Raises:
        EngineError: says what is wrong with it.
    """
    try:
        model = onnx.load_model_from_string(data)
    except DecodeError as error:
        raise _refused(name, "it cannot be parsed") from error
    if problem := _problem(model, len(data)):
        raise _refused(name, problem)
    try:
        onnx.checker.check_model(model, full_check=True)
    # the checker's own errors, and those of what it is written in
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise _refused(name, " ".join(str(error).split())[:300]) from error
    except (RuntimeError, ValueError, IndexError) as error:
        raise _refused(name, f"the checker of ONNX ends in {error!r}"[:300]) from error


def _problem(model: onnx.ModelProto, size: int) -> str | None:
    for opset in model.opset_import:
        oldest, newest = _OPSETS.get(opset.domain, (1, 0))
        if not oldest <= opset.version <= newest:
            return f"it takes version {opset.version} of the operators '{opset.domain}'"
    if len(model.functions) or len(model.graph.sparse_initializer):
        return "it has functions or sparse tensors"
    for node in model.graph.node:
        own = node.domain in ("", "ai.onnx")
        if node.op_type in _CONTROL_FLOW or not (own or node.op_type in _FUSED):
            return f"it has the operator '{node.domain}.{node.op_type}'".replace("'.", "'")
        if any(a.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) for a in node.attribute):
            return f"node '{node.name}' holds a graph of its own"
    for tensor in _tensors(model.graph):
        if problem := _lacks(tensor, size):
            return f"tensor '{tensor.name}' {problem}"
    return None


def _tensors(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.TENSOR:
                yield attribute.t
            yield from attribute.tensors


def _lacks(tensor: TensorProto, size: int) -> str | None:
    """What is wrong with a tensor's content, in words."""
    if tensor.data_location == TensorProto.EXTERNAL or len(tensor.external_data):
        return "lies in another file"
    if any(side < 0 for side in tensor.dims):
        return f"has the shape {list(tensor.dims)}"
    count = math.prod(tensor.dims)
    if count > _MAX_ELEMENTS or count > 2 * size:
        return f"has {count} elements, in a file of {size} bytes"
    if tensor.HasField("raw_data"):
        try:
            width = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        except KeyError:
            return f"is of the unknown type {tensor.data_type}"
        narrow = _NARROW.get(tensor.data_type)
        wanted = -(-count // narrow) if narrow else count * width
        if len(tensor.raw_data) != wanted:
            return f"has {len(tensor.raw_data)} bytes, its shape needs {wanted}"
    return None


def _refused(name: str, problem: str) -> EngineError:
    return EngineError(
        f"{name} is no graph that can be trusted: {problem}", fix="export the bundle again"
    )

"""INT8 products where the processor adds them up in 16 bits.

x86 without VNNI multiplies uint8 by int8 values and adds every two products into 16 bits, which
saturate: 255 * 127 * 2 is more than 32,767. ONNX Runtime's and OpenVINO's kernels are built on that
instruction and give wrong sums without a word. They cannot where weights reach 64 at most
(255 * 64 * 2 = 32,640), nor where unsigned activations reach 127 (127 * 127 * 2 = 32,258). So the
other layers' weights are rounded to 7 bits there when a graph is opened. Signed activations count
as the larger ones: the kernels add 128 to them.

Source: Intel, "Lower Numerical Precision Deep Learning Inference and Training", 2018 (VPMADDUBSW);
ONNX Runtime's ``reduce_range`` and NNCF's ``overflow_fix`` are the same cure, at export.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from engineworks.runtime.tensors import Array

LIMIT = 64  # largest magnitude of a weight with which no pair of products saturates

_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# what passes on values that it read; backends quantize behind it what is quantized before it
_PASSES_ON = (
    *("Concat", "Flatten", "MaxPool", "Reshape", "Resize", "Slice", "Split", "Squeeze"),
    *("Transpose", "Unsqueeze"),
)
_WIDTH = 64  # of the probe


def probe() -> bytes:
    """ONNX: ``x`` (1, 64) float32 -> ``y`` (1, 64): an INT8 product that saturates where it can.

    ``PROBED`` goes in, and all values of ``y`` are ``ANSWER`` where sums are exact.
    """
    values = {
        "scale": np.float32(1),
        "zero": np.uint8(128),
        "weights": np.full((_WIDTH, _WIDTH), 127, np.int8),
        "steps": np.ones(_WIDTH, np.float32),
        "zeros": np.zeros(_WIDTH, np.int8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["dq"]),
        helper.make_node("DequantizeLinear", ["weights", "steps", "zeros"], ["rows"], axis=1),
        helper.make_node("MatMul", ["dq", "rows"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "probe",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, _WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, _WIDTH])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return bytes(model.SerializeToString())


PROBED: Array = np.full((1, _WIDTH), 127, np.float32)
ANSWER = 127.0 * 127.0 * _WIDTH


def narrow(model: bytes) -> tuple[bytes, int]:
    """A Q/DQ graph whose products stay within 16 bits, and how many weights were rounded for it.

    A rounded weight w with the step s becomes round(w / 2) with 2 s: its error may grow to s.
    """
    proto = onnx.load_from_string(model)
    graph = proto.graph
    constants = {value.name: value for value in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output}
    rounded: set[str] = set()
    for node in graph.node:
        fixed = producers.get(node.input[1]) if node.op_type in _WEIGHTED else None
        if fixed is None or fixed.op_type != "DequantizeLinear" or fixed.output[0] in rounded:
            continue
        live = _sources(node.input[0], producers)
        wide = [n for n in live if not _is_within_7_bits(n, producers, constants)]
        if not wide or fixed.input[0] not in constants:
            continue
        weights = numpy_helper.to_array(constants[fixed.input[0]])
        if weights.dtype != np.int8 or np.abs(weights.astype(np.int16)).max(initial=0) <= LIMIT:
            continue
        halves = np.rint(weights / 2).astype(np.int8)
        steps = numpy_helper.to_array(constants[fixed.input[1]])
        for place, value in ((0, halves), (1, (2 * steps).astype(steps.dtype))):
            name = f"{fixed.output[0]}.7bit{place}"  # others may read the old one
            graph.initializer.append(numpy_helper.from_array(value, name))
            fixed.input[place] = name
        rounded.add(fixed.output[0])
    used = {name for node in graph.node for name in node.input}
    kept = [value for value in graph.initializer if value.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    return bytes(proto.SerializeToString()), len(rounded)


def _sources(name: str, producers: Mapping[str, onnx.NodeProto]) -> list[onnx.NodeProto]:
    """The DequantizeLinear nodes whose values a tensor holds."""
    node = producers.get(name)
    if node is None:
        return []
    if node.op_type == "DequantizeLinear":
        return [node]
    if node.op_type not in _PASSES_ON:
        return []
    read = node.input if node.op_type == "Concat" else node.input[:1]
    return [source for each in read for source in _sources(each, producers)]


def _is_within_7_bits(
    dequantize: onnx.NodeProto,
    producers: Mapping[str, onnx.NodeProto],
    constants: Mapping[str, onnx.TensorProto],
) -> bool:
    """Whether what a layer reads is unsigned and 127 at most."""
    zero = constants.get(dequantize.input[2]) if len(dequantize.input) > 2 else None
    if zero is None or numpy_helper.to_array(zero).dtype != np.uint8:
        return False
    if numpy_helper.to_array(zero).any():
        return False
    node = producers.get(dequantize.input[0])
    while node is not None and node.op_type == "MaxPool":
        node = producers.get(node.input[0])
    if node is None or node.op_type != "Clip" or len(node.input) < 3:
        return False
    top = constants.get(node.input[2])
    return top is not None and int(numpy_helper.to_array(top)) <= 127

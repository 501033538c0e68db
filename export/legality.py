"""Whether TensorRT will take a Q/DQ graph: the rules of its parser and builder, checked without it.

Some rules are stricter than TensorRT's own verdict: where it builds a graph and silently means
other numbers (uint8 read as int8), or accepts what has no meaning (a per-channel scale along the
wrong axis), the graph is refused here.

Source: onnx-tensorrt, docs/operators.md (QuantizeLinear, DequantizeLinear); NVIDIA TensorRT
documentation, "Working with Quantized Types", explicit quantization; verdicts of a TensorRT 11
builder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import onnx
from onnx import TensorProto

from engineworks.export.passes import GraphView, attribute
from engineworks.export.quantize import weight_axis
from engineworks.runtime.errors import QuantizationError

_PAIR = ("QuantizeLinear", "DequantizeLinear")
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_INTEGER_OPS = ("MatMulInteger", "ConvInteger", "DynamicQuantizeLinear")
_UNSUPPORTED_OPS = ("Unique",)
_DEFAULT_DOMAINS = ("", "ai.onnx")
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
_SAME_TYPE_OPS = (*_WEIGHTED, "Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Concat")


def check_legal(model: onnx.ModelProto) -> None:
    """Refuse a graph that breaks a rule.

    Raises:
        QuantizationError: lists every violation with the node's name and op type.
    """
    try:
        onnx.checker.check_model(model)
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError) as error:
        raise QuantizationError(f"the graph is not valid ONNX: {error}") from error
    view = GraphView(inferred.graph)
    violations = [
        f"{node.op_type} '{node.name}': {message}"
        for node in inferred.graph.node
        for rule in RULES
        for message in rule(node, view)
    ]
    if violations:
        listed = "\n  ".join(violations)
        raise QuantizationError(
            f"the graph breaks {len(violations)} rules of TensorRT's INT8 format:\n  {listed}",
            fix="write it with export.quantize.quantize from a float graph",
        )


def _is_pair(node: onnx.NodeProto) -> bool:
    return node.op_type in _PAIR and node.domain in (*_DEFAULT_DOMAINS, "com.microsoft")


def _constant(name: str, view: GraphView) -> bool:
    return name in view.initializers


def no_integer_operators(node: onnx.NodeProto, view: GraphView) -> Iterator[str]:
    if node.op_type.startswith("QLinear") or node.op_type in _INTEGER_OPS:
        yield "integer operators are not taken; write QuantizeLinear/DequantizeLinear pairs"
    if node.op_type in _UNSUPPORTED_OPS:
        yield "TensorRT does not have this operator"


def known_domain(node: onnx.NodeProto, view: GraphView) -> Iterator[str]:
    if node.domain not in _DEFAULT_DOMAINS and not _is_pair(node):
        yield f"domain '{node.domain}' is not known to TensorRT"


def explicit_zero_point(node: onnx.NodeProto, view: GraphView) -> Iterator[str]:
    if _is_pair(node) and (len(node.input) < 3 or not node.input[2]):
        yield "has no zero point; without one the type is uint8"


def zero_point_is_zero(node: onnx.NodeProto, view: GraphView) -> Iterator[str]:
    if not _is_pair(node) or len(node.input) < 3 or not node.input[2]:
        return
    if not _constant(node.input[2], view):
        yield f"zero point '{node.input[2]}' is not a constant"
    elif np.any(view.constant(node.input[2]) != 0):
        yield "the zero point is not 0; only symmetric quantization is taken"


def only_int8(node: onnx.NodeProto, view: GraphView) -> Iterator[str]:
    if not _is_pair(node):
        return
    by_input = node.op_type == "DequantizeLinear"
    # the zero point has the quantized tensor's type, also where shape inference knows no such op
    explicit = len(node.input) > 2 and node.input[2]
    dtype = view.dtype(node.input[2] if explicit else (node.input if by_input else node.output)[0])
    if dtype == TensorProto.INT8:
        return
    if dtype == TensorProto.INT32 and by_input:
        yield "dequantizes int32; a bias must stay float"
    else:
        kind = "unknown" if dtype is None else TensorProto.DataType.Name(dtype).lower()
        yield f"the quantized type is {kind}; only int8 is taken"


def positive_scale(node: onnx.NodeProto, view: GraphView) -> Iterator[str]:
    if not _is_pair(node):
        return
    if not _constant(node.input[1], view):
        yield f"scale '{node.input[1]}' is not a constant"
        return
    scale = view.constant(node.input[1])
    if not np.isfinite(scale).all():
        yield "a scale is not finite"
    elif not (scale > 0).all():
        yield f"a scale is {scale.min()}; all must be positive"


def one_scale_per_activation(node: onnx.NodeProto, view: GraphView) -> Iterator[str]:
    if not _is_pair(node) or not _constant(node.input[1], view):
        return
    if attribute(node, "block_size", 0):
        yield "blocked quantization is not taken for int8"
    scale = view.initializers[node.input[1]]
    if not _holds_weight(node, view) and np.prod(scale.dims) != 1:
        yield f"an activation has {np.prod(scale.dims)} scales; only weights have one per channel"


def _holds_weight(node: onnx.NodeProto, view: GraphView) -> bool:
    """Whether a Q or DQ works on a constant: directly, or as the DQ of a constant's Q."""
    source = view.producer.get(node.input[0])
    return _constant(node.input[0], view) or (
        source is not None and _is_pair(source) and _constant(source.input[0], view)
    )


def scale_per_output_channel(node: onnx.NodeProto, view: GraphView) -> Iterator[str]:
    if not _is_pair(node) or not _constant(node.input[1], view) or not _holds_weight(node, view):
        return
    scale = view.constant(node.input[1])
    if scale.ndim == 0:
        return
    source = view.producer.get(node.input[0])
    weight = view.shape(source.input[0] if source is not None else node.input[0])
    axis = attribute(node, "axis", 1)
    assert weight is not None  # a constant
    if scale.size != 1 and weight[axis] != scale.size:
        yield f"has {scale.size} scales for {weight[axis]} channels on axis {axis}"
    for reader in view.consumers[node.output[0]] if node.op_type == _PAIR[1] else ():
        if reader.op_type not in _WEIGHTED or list(reader.input).index(node.output[0]) != 1:
            yield f"has one scale per channel, but {reader.op_type} '{reader.name}' has no channels"
        elif axis % len(weight) != _output_axis(reader, len(weight)):
            yield (
                f"has its scales on axis {axis}; the output channels of {reader.op_type} "
                f"'{reader.name}' are on axis {_output_axis(reader, len(weight))}"
            )


def _output_axis(node: onnx.NodeProto, rank: int) -> int:
    return rank - 1 if node.op_type == "MatMul" else weight_axis(node)


def zero_points_like_scales(node: onnx.NodeProto, view: GraphView) -> Iterator[str]:
    if not _is_pair(node) or len(node.input) < 3:
        return
    if _constant(node.input[1], view) and _constant(node.input[2], view):
        scales, zeros = (list(view.initializers[name].dims) for name in node.input[1:3])
        if scales != zeros:
            yield f"scales have shape {scales}, zero points {zeros}"


def float_bias(node: onnx.NodeProto, view: GraphView) -> Iterator[str]:
    if node.op_type in _WEIGHTED and len(node.input) > 2:
        source = view.producer.get(node.input[2])
        if source is not None and _is_pair(source):
            yield "the bias comes from a DequantizeLinear; it must stay float"


def quantized_only_to_be_dequantized(node: onnx.NodeProto, view: GraphView) -> Iterator[str]:
    if not _is_pair(node) or node.op_type != "QuantizeLinear":
        return
    readers = view.consumers[node.output[0]]
    if node.output[0] in view.outputs:
        yield "the quantized tensor is an output of the graph"
    if not readers and node.output[0] not in view.outputs:
        yield "nothing reads the quantized tensor"
    for reader in readers:
        if reader.op_type != "DequantizeLinear":
            yield f"the quantized tensor goes into {reader.op_type} '{reader.name}'"


def pair_agrees(node: onnx.NodeProto, view: GraphView) -> Iterator[str]:
    source = view.producer.get(node.input[0]) if node.input else None
    if node.op_type != "DequantizeLinear" or source is None or not _is_pair(source):
        return
    if node.input[1] != source.input[1] and not (
        all(_constant(n.input[1], view) for n in (node, source))
        and np.array_equal(view.constant(node.input[1]), view.constant(source.input[1]))
    ):
        yield f"its scale is not that of '{source.name}'"


def one_float_type(node: onnx.NodeProto, view: GraphView) -> Iterator[str]:
    dtypes = {view.dtype(name) for name in node.input if name} & set(_FLOATS)
    if TensorProto.DOUBLE in {*dtypes, *(view.dtype(name) for name in node.output)}:
        yield "works on float64, which TensorRT does not have"
    elif node.op_type in _SAME_TYPE_OPS and len(dtypes) > 1:
        names = sorted(TensorProto.DataType.Name(dtype).lower() for dtype in dtypes if dtype)
        yield f"its inputs mix {' and '.join(names)}; put a Cast between"


RULES: tuple[Callable[[onnx.NodeProto, GraphView], Iterator[str]], ...] = (
    no_integer_operators,
    known_domain,
    explicit_zero_point,
    zero_point_is_zero,
    only_int8,
    positive_scale,
    one_scale_per_activation,
    scale_per_output_channel,
    zero_points_like_scales,
    float_bias,
    quantized_only_to_be_dequantized,
    pair_agrees,
    one_float_type,
)

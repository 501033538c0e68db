"""Float graph -> mixed graph of float32 and a 16-bit type, typed by Casts alone.

A strongly typed engine computes each node in the type of its inputs, so the graph decides. Three
kinds of nodes:

- weighted (Conv, ConvTranspose, Gemm, MatMul): 16 bits, always. That is where the time goes.
- followers (additions, activations, what moves values about): 16 bits where all that they read is;
  float32 as soon as one input is, so no precision is thrown away beside a value worth keeping.
- all others, normalisations, softmax, reductions, powers and exponentials among them: float32. So
  are rotary position embeddings, whose small angles 16 bits would round to steps.

Inputs and outputs of the graph stay float32.

Source: Micikevicius et al., "Mixed Precision Training", 2018, section 3 (what to keep in single
precision); Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, version_converter

from engineworks.export.passes import GraphView, check_flat, drop_unused, infer_shapes
from engineworks.export.quantize import NOTHING, KeepFloat
from engineworks.runtime.errors import ExportError

HalfType = Literal["fp16", "bf16"]

TYPES: dict[HalfType, int] = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}

# the largest finite values; a constant beyond them would become infinite
_LARGEST: dict[HalfType, float] = {
    "fp16": float(np.finfo(np.float16).max),
    "bf16": float(np.finfo(np.float32).max),
}
# the first opset in which every operator of a convolutional net or a transformer takes bfloat16
_BF16_OPSET = 22

_WEIGHTED = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
_MOVING = {
    *("Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "Identity", "MaxPool", "Pad"),
    *("Reshape", "Resize", "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose"),
    *("Unsqueeze", "Where"),
}
_ELEMENTWISE = {
    *("Abs", "Add", "Clip", "Div", "Elu", "Erf", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu"),
    *("Max", "Min", "Mul", "Neg", "PRelu", "Relu", "Sigmoid", "Sub", "Tanh"),
}
_FOLLOWERS = _MOVING | _ELEMENTWISE
# inputs that stay float32 whatever the values are: a region and factors, no values
_FIXED_INPUTS = {"Resize": (1, 2)}


def halve(
    model: onnx.ModelProto, kind: HalfType, keep_float: KeepFloat = NOTHING
) -> onnx.ModelProto:
    """Write the mixed graph.

    Args:
        model: a float32 graph as ``passes.prepare`` leaves it; not changed.
        kind: the 16-bit type.
        keep_float: nodes that stay float32 beside those named above.

    Returns:
        The same graph with Casts; initializers that only 16-bit nodes read are stored in 16 bits.

    Raises:
        ExportError: a graph that the passes do not take, or one that is quantized.
    """
    check_flat(model)
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            raise ExportError(
                f"{node.op_type} '{node.name}': a quantized graph is not written in {kind}",
                fix="give the float graph",
            )
    if kind == "bf16":
        model = version_converter.convert_version(model, max(_opset(model), _BF16_OPSET))
    model = infer_shapes(model)
    return infer_shapes(drop_unused(_Halver(model, kind, keep_float).written()))


def num_half(model: onnx.ModelProto) -> int:
    """How many nodes compute in 16 bits."""
    view = GraphView(model.graph)
    return sum(
        node.op_type != "Cast" and any(view.dtype(name) in TYPES.values() for name in node.output)
        for node in model.graph.node
    )


class _Halver:
    """Writes the nodes anew, in their order, with what each reads cast to its type."""

    def __init__(self, model: onnx.ModelProto, kind: HalfType, keep_float: KeepFloat) -> None:
        self._model = model
        self._kind = kind
        self._view = GraphView(model.graph)
        self._keep_float = keep_float
        self._rotary = set(_rotary(self._view))
        self._half: set[str] = set()  # tensors whose own type is the 16-bit one
        self._computed: set[str] = set()  # those, and outputs, which have a 16-bit twin
        self._nodes: list[onnx.NodeProto] = []
        self._casts: dict[str, str] = {}  # tensor -> its twin in the other type
        self._constants: list[onnx.TensorProto] = []

    def written(self) -> onnx.ModelProto:
        result = onnx.ModelProto()
        result.CopyFrom(self._model)
        graph = result.graph
        for node in self._model.graph.node:
            self._write(node)
        del graph.node[:], graph.value_info[:]  # their types are other ones now
        graph.node.extend(self._nodes)
        graph.initializer.extend(self._constants)
        return result

    def _write(self, original: onnx.NodeProto) -> None:
        node = onnx.NodeProto()
        node.CopyFrom(original)
        half = self._in_half(original)
        fixed = _FIXED_INPUTS.get(node.op_type, ())
        for i, name in enumerate(original.input):
            if name and i not in fixed and self._is_float(name) and half != (name in self._half):
                node.input[i] = self._cast(name, half)
        self._nodes.append(node)
        if not half:
            return
        self._computed.update(original.output)
        for i, name in enumerate(original.output):
            if name in self._view.outputs:  # the border stays float32
                node.output[i] = self._casts[name] = f"{name}.{self._kind}"
                self._nodes.append(_cast_node(node.output[i], name, TensorProto.FLOAT))
            elif name:
                self._half.add(name)

    def _in_half(self, node: onnx.NodeProto) -> bool:
        live = [n for n in self._values(node) if n not in self._view.initializers]
        constants = [n for n in self._values(node) if n in self._view.initializers]
        if not any(self._is_float(name) for name in node.output):
            return False
        if self._keep_float.covers(node) or node.name in self._rotary:
            return False
        if not all(self._fits(name) for name in constants):
            return False
        if node.op_type in _WEIGHTED:
            return True
        return node.op_type in _FOLLOWERS and self._computed.issuperset(live)

    def _values(self, node: onnx.NodeProto) -> list[str]:
        """What a node computes with: its float inputs, but for those that say how."""
        fixed = _FIXED_INPUTS.get(node.op_type, ())
        return [n for i, n in enumerate(node.input) if n and i not in fixed and self._is_float(n)]

    def _is_float(self, name: str) -> bool:
        return bool(self._view.dtype(name) == TensorProto.FLOAT)

    def _fits(self, constant: str) -> bool:
        value = self._view.constant(constant)
        return bool(np.abs(value).max(initial=0) <= _LARGEST[self._kind])

    def _cast(self, name: str, half: bool) -> str:
        """The twin of a tensor in the other type, made where it is first asked for."""
        if name not in self._casts:
            twin = self._casts[name] = f"{name}.{self._kind if half else 'fp32'}"
            dtype = TYPES[self._kind] if half else TensorProto.FLOAT
            if name in self._view.initializers:
                self._constants.append(_constant(twin, self._view, name, dtype))
            else:
                self._nodes.append(_cast_node(name, twin, dtype))
        return self._casts[name]


def _cast_node(source: str, target: str, dtype: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"Cast_{source}_{target}", to=dtype)


def _constant(twin: str, view: GraphView, name: str, dtype: int) -> onnx.TensorProto:
    rounded = view.constant(name).astype(helper.tensor_dtype_to_np_dtype(dtype))
    return numpy_helper.from_array(rounded, twin)


def _rotary(view: GraphView) -> Iterator[str]:
    """Nodes of x cos + rotated(x) sin: the Add, both Muls, and from the second back to its Neg.

    ``rotated`` swaps halves, or neighbours, and negates one: a Concat with a Neg behind it.
    """
    for add in view.graph.node:
        if add.op_type != "Add":
            continue
        terms = [view.producer.get(name) for name in add.input]
        if not all(term is not None and term.op_type == "Mul" for term in terms):
            continue
        muls = [term for term in terms if term is not None]
        paths = [path for mul in muls for name in mul.input if (path := _to_neg(name, view))]
        if paths:
            yield from (add.name, *(mul.name for mul in muls))
            yield from (name for path in paths for name in path)


def _to_neg(name: str, view: GraphView, *, joined: bool = False) -> list[str]:
    """Names of the nodes from a tensor back to the Neg of its rotation; [] where there is none."""
    node = view.producer.get(name)
    if node is None:
        return []
    if node.op_type == "Neg":
        return [node.name] if joined else []
    if node.op_type not in ("Concat", "Reshape", "Unsqueeze", "Transpose"):
        return []
    inputs = node.input if node.op_type == "Concat" else node.input[:1]
    for source in inputs:
        if rest := _to_neg(source, view, joined=joined or node.op_type == "Concat"):
            return [node.name, *rest]
    return []


def rounded(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same numbers in float32: every 16-bit result rounded to 16 bits, then kept in float32.

    What a mixed graph means can so be measured where nothing computes in its 16-bit type.

    Args:
        model: a graph that ``halve`` wrote; not changed.
    """
    view = GraphView(model.graph)
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    del graph.node[:], graph.value_info[:], graph.initializer[:]
    for tensor in model.graph.initializer:
        if tensor.data_type in TYPES.values():
            values = numpy_helper.to_array(tensor).astype(np.float32)
            tensor = numpy_helper.from_array(values, tensor.name)
        graph.initializer.append(tensor)
    for original in model.graph.node:
        node = onnx.NodeProto()
        node.CopyFrom(original)
        narrow = [name for name in original.output if view.dtype(name) in TYPES.values()]
        if node.op_type == "Cast" and (narrow or view.dtype(node.input[0]) in TYPES.values()):
            node.op_type = "Identity"  # between two tensors that are both float32 here
            del node.attribute[:]
        for i, name in enumerate(original.output):
            if name in narrow:
                node.output[i] = f"{name}.exact"
        graph.node.append(node)
        for name in narrow:
            dtype = view.dtype(name)
            assert dtype is not None
            graph.node.append(_cast_node(f"{name}.exact", f"{name}.narrow", dtype))
            graph.node.append(_cast_node(f"{name}.narrow", name, TensorProto.FLOAT))
    return infer_shapes(result)


def _opset(model: onnx.ModelProto) -> int:
    return next(int(o.version) for o in model.opset_import if o.domain in ("", "ai.onnx"))

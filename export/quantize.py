"""Ranges -> Q/DQ pairs: the one canonical INT8 graph, and its dialect for x86.

Canonical: everything is int8, symmetric, with explicit zero point 0. Weights of Conv,
ConvTranspose, Gemm and MatMul are int8 initializers behind a DequantizeLinear, one scale per output
channel. Activations get one shared pair per tensor, with one scale, where such a node reads them,
and on both inputs of residual Adds. Nothing is quantized after a node, and biases stay float:
that is what TensorRT, OpenVINO and ONNX Runtime all fuse.

Rounded weights W' shift the mean of a node's output by (W' - W) E[x]. That shift is known from the
channel means of the input and is taken off the bias: it costs nothing, and in nets whose weights
are few per channel (depthwise convolutions) it is most of the error.

    q = clip(round_half_even(x / scale), -128, 127),  scale = amax / 127     activations
    q in [-127, 127]                                                         weights

Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", 2018; Nagel et al., "Data-Free Quantization Through Weight
Equalization and Bias Correction", 2019, section 4.2; ONNX operators QuantizeLinear and
DequantizeLinear.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from itertools import pairwise

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from pydantic import BaseModel, ConfigDict, field_serializer

from engineworks.export.passes import GraphView, attribute, check_flat, drop_unused
from engineworks.runtime.errors import QuantizationError
from engineworks.runtime.tensors import Array

LEVELS = 127  # the largest quantized magnitude that both signs have

# No scale is smaller: the product of an activation's and a weight's scale must stay a normal
# float32, and TensorRT refuses 0, which a dead channel would otherwise get.
SCALE_FLOOR = 2.0**-60

# A backend that quantizes the bias itself stores it in int32 steps of activation scale x weight
# scale. In a channel whose weights are (nearly) dead that step would be so small that the bias
# overflows; a weight scale is raised until it fits, with half the range left to the accumulator.
_BIAS_STEPS = 2.0**30

# Zero points of the unsigned dialect.
_ZERO, _MIDDLE = "zero_uint8", "middle_uint8"

_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


class KeepFloat(BaseModel):
    """Which nodes stay float: what a recipe states, and what sensitivity adds.

    Attributes:
        op_types: ONNX operator types.
        patterns: regular expressions that match a whole node name.
        nodes: node names.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    op_types: frozenset[str] = frozenset()
    patterns: tuple[str, ...] = ()
    nodes: frozenset[str] = frozenset()

    @field_serializer("op_types", "nodes")
    def _sorted(self, names: frozenset[str]) -> list[str]:
        return sorted(names)  # a set's order changes from process to process, a digest must not

    def covers(self, node: onnx.NodeProto) -> bool:
        return (
            node.op_type in self.op_types
            or node.name in self.nodes
            or any(re.fullmatch(pattern, node.name) for pattern in self.patterns)
        )

    def plus(self, nodes: Iterable[str]) -> KeepFloat:
        """The same rule with more nodes."""
        return self.model_copy(update={"nodes": self.nodes | set(nodes)})


NOTHING = KeepFloat()


def quantizable(model: onnx.ModelProto, keep_float: KeepFloat = NOTHING) -> list[str]:
    """Names of the nodes that ``quantize`` would quantize, in graph order.

    Conv, ConvTranspose, Gemm and MatMul (2-D) with a constant float32 weight, and residual Adds:
    two live float32 inputs of the same known shape.

    Raises:
        ExportError: a graph that the passes do not take.
        QuantizationError: a node without a unique name, or a name in ``keep_float.nodes`` that the
            graph does not have.
    """
    return [node.name for node in _quantizable(model, keep_float)]


def activations(model: onnx.ModelProto, keep_float: KeepFloat = NOTHING) -> list[str]:
    """Names of the tensors whose ranges ``quantize`` needs, in order of first use.

    Raises:
        ExportError, QuantizationError: as ``quantizable``.
    """
    names = [name for node in _quantizable(model, keep_float) for name in _data_inputs(node)]
    return list(dict.fromkeys(names))


def quantize(
    model: onnx.ModelProto,
    ranges: Mapping[str, float],
    keep_float: KeepFloat = NOTHING,
    *,
    means: Mapping[str, Array] | None = None,
) -> onnx.ModelProto:
    """Write the canonical Q/DQ graph.

    Args:
        model: a float graph as ``export.passes.prepare`` leaves it.
        ranges: tensor name -> amax, the largest magnitude that is represented; more than needed is
            allowed.
        keep_float: the nodes to leave alone.
        means: tensor name -> channel means (C,); the biases of Conv and Gemm nodes whose input is
            there are corrected. More than needed is allowed.

    Raises:
        ExportError, QuantizationError: as ``quantizable``; or a range that is missing, not positive
            or not finite, a weight that is not finite.
    """
    chosen = _quantizable(model, keep_float)
    names = {node.name for node in chosen}
    scales = {
        name: activation_scale(check_amax(name, ranges))
        for node in chosen
        for name in _data_inputs(node)
    }
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    view = GraphView(model.graph)

    zero = numpy_helper.from_array(np.zeros((), np.int8), "zero_int8")
    graph.initializer.append(zero)
    nodes: list[onnx.NodeProto] = []
    paired: set[str] = set()
    for node in graph.node:
        if node.name in names:
            data = _data_inputs(node)
            for tensor in data:
                if tensor not in paired:
                    paired.add(tensor)
                    nodes += activation_pair(graph, tensor, scales[tensor], zero.name)
            if node.op_type != "Add":
                mean = (means or {}).get(data[0])
                nodes.append(_quantize_weight(graph, node, view, scales[data[0]], mean))
            for i in range(len(data)):
                node.input[i] = f"{node.input[i]}.dequantized"
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    return drop_unused(result)


def _quantizable(model: onnx.ModelProto, keep_float: KeepFloat) -> list[onnx.NodeProto]:
    check_flat(model)
    names = [node.name for node in model.graph.node]
    if "" in names or len(set(names)) < len(names):
        raise QuantizationError(
            "the graph has nodes without a unique name", fix="run export.passes.prepare on it first"
        )
    if unknown := sorted(keep_float.nodes - set(names)):
        raise QuantizationError(
            f"nodes to keep float are not in the graph: {unknown}",
            fix="take the names from the float graph of this export",
        )
    view = GraphView(model.graph)
    return [
        node
        for node in model.graph.node
        if _can_quantize(node, view) and not keep_float.covers(node)
    ]


def _can_quantize(node: onnx.NodeProto, view: GraphView) -> bool:
    if any(view.dtype(name) != TensorProto.FLOAT for name in node.input[:2]):
        return False
    if node.op_type == "Add":
        live = all(name not in view.initializers for name in node.input)
        shape = view.shape(node.input[0])
        return live and shape is not None and shape == view.shape(node.input[1])
    if node.op_type not in _WEIGHTED or node.input[1] not in view.initializers:
        return False
    if node.op_type == "MatMul" and len(view.initializers[node.input[1]].dims) != 2:
        return False
    return node.input[0] not in view.initializers


def _data_inputs(node: onnx.NodeProto) -> list[str]:
    return list(node.input) if node.op_type == "Add" else [node.input[0]]


def check_amax(name: str, ranges: Mapping[str, float]) -> float:
    """The range of one tensor.

    Raises:
        QuantizationError: it is missing, not positive or not finite.
    """
    if name not in ranges:
        raise QuantizationError(
            f"there is no range for tensor '{name}'", fix="calibrate this graph again"
        )
    amax = ranges[name]
    if not (np.isfinite(amax) and amax > 0):
        raise QuantizationError(
            f"the range of tensor '{name}' is {amax}, it must be positive and finite",
            fix="calibrate this graph again",
        )
    return amax


def activation_scale(amax: float) -> np.float32:
    """The step of a tensor with that range."""
    return np.float32(max(amax / LEVELS, SCALE_FLOOR))


def weight_axis(node: onnx.NodeProto) -> int:
    """The output-channel axis of a node's weight (its second input)."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "Gemm":
        return 0 if attribute(node, "transB", 0) else 1
    return 1  # ConvTranspose: (C_in, C_out / group, ...); MatMul: (D_in, D_out)


def quantize_weight(
    weight: Array, axis: int, min_scale: float | Array = SCALE_FLOOR
) -> tuple[Array, Array]:
    """Symmetric int8 per channel.

    Args:
        weight: float32, finite.
        axis: the output-channel axis.
        min_scale: floor of the scales: one number, or one per channel.

    Returns:
        (int8 of the weight's shape in [-127, 127], float32 scales (channels,)).
    """
    others = tuple(i for i in range(weight.ndim) if i != axis)
    amax = np.abs(weight).max(axis=others).astype(np.float64)
    scale = np.maximum(amax / LEVELS, np.maximum(min_scale, SCALE_FLOOR)).astype(np.float32)
    shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
    steps = np.rint(weight.astype(np.float64) / scale.astype(np.float64).reshape(shape))
    return np.clip(steps, -LEVELS, LEVELS).astype(np.int8), scale


def _quantize_weight(
    graph: onnx.GraphProto,
    node: onnx.NodeProto,
    view: GraphView,
    activation_scale: np.float32,
    mean: Array | None,
) -> onnx.NodeProto:
    """Put int8 initializers in the place of a node's weight; returns the DequantizeLinear.

    With the input's channel means, the bias is corrected as well.
    """
    weight = view.constant(node.input[1])
    if not np.isfinite(weight).all():
        raise QuantizationError(
            f"weight '{node.input[1]}' of node '{node.name}' holds NaN or infinity",
            fix="train again, or export another checkpoint",
        )
    axis = weight_axis(node)
    values, scale = quantize_weight(weight, axis, _bias_floor(node, view, axis, activation_scale))
    if mean is not None and node.op_type in ("Conv", "Gemm"):
        _correct_bias(graph, node, view, weight, (values, scale), mean)
    stem = f"{node.name}.weight"
    parts = (values, scale, np.zeros(scale.shape, np.int8))
    names = [f"{stem}.int8", f"{stem}.scale", f"{stem}.zero"]
    for name, part in zip(names, parts, strict=True):
        graph.initializer.append(numpy_helper.from_array(part, name))
    node.input[1] = f"{stem}.dequantized"
    return helper.make_node(
        "DequantizeLinear", names, [node.input[1]], name=f"{stem}.dequantize", axis=axis
    )


def _correct_bias(
    graph: onnx.GraphProto,
    node: onnx.NodeProto,
    view: GraphView,
    weight: Array,
    quantized: tuple[Array, Array],
    mean_C: Array,
) -> None:
    """Take the mean of what rounding the weight adds to the output off the bias.

    What a border's padding contributes is counted as if it were the mean.

    Raises:
        QuantizationError: means of another number of channels.
    """
    bias_name = node.input[2] if len(node.input) > 2 else ""
    if bias_name and bias_name not in view.initializers:
        return  # computed by the graph
    if any(a.name in ("alpha", "beta") and a.f != 1 for a in node.attribute):
        return  # a Gemm that scales its parts, which no layer of torch is exported as
    values, scale = quantized
    axis = weight_axis(node)
    shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
    error = values * scale.astype(np.float64).reshape(shape) - weight
    if node.op_type == "Gemm":
        error_OI = np.moveaxis(error, axis, 0)
    else:
        error_OI = error.sum(axis=tuple(range(2, error.ndim)))
    groups = attribute(node, "group", 1)
    num_out, num_in = error_OI.shape
    if len(mean_C) != groups * num_in:
        raise QuantizationError(
            f"there are means of {len(mean_C)} channels for the input of node '{node.name}', "
            f"which has {groups * num_in}",
            fix="calibrate this graph again",
        )
    # each group of outputs reads its own inputs
    mean_GI1 = mean_C.reshape(groups, num_in, 1)
    shift_O = (error_OI.reshape(groups, num_out // groups, num_in) @ mean_GI1).ravel()
    bias = view.constant(bias_name) if bias_name else np.zeros(num_out, np.float32)
    name = f"{node.name}.bias.corrected"
    corrected = (bias - shift_O).astype(np.float32)
    graph.initializer.append(numpy_helper.from_array(corrected, name))
    if len(node.input) > 2:
        node.input[2] = name
    else:
        node.input.append(name)


def _bias_floor(
    node: onnx.NodeProto, view: GraphView, axis: int, activation_scale: np.float32
) -> float | Array:
    """The smallest weight scales with which the bias still fits int32 (see ``_BIAS_STEPS``)."""
    bias_name = node.input[2] if len(node.input) > 2 else ""
    if bias_name not in view.initializers:
        return SCALE_FLOOR
    bias = np.abs(view.constant(bias_name).astype(np.float64))
    channels = view.initializers[node.input[1]].dims[axis]
    if node.op_type == "ConvTranspose":  # the groups share one scale per channel
        bias = bias.reshape(-1, channels).max(axis=0)
    elif node.op_type == "Gemm":  # the bias may be any shape that broadcasts to (B, channels)
        bias = np.broadcast_to(bias, (*bias.shape[:-1], channels)).reshape(-1, channels).max(axis=0)
    floor: Array = bias / (float(activation_scale) * _BIAS_STEPS)
    return floor


def activation_pair(
    graph: onnx.GraphProto, tensor: str, scale: np.float32, zero: str
) -> list[onnx.NodeProto]:
    """QuantizeLinear and DequantizeLinear: ``tensor`` -> ``tensor.dequantized``.

    Args:
        graph: gets the scale as an initializer.
        zero: name of the zero point, an initializer.
    """
    graph.initializer.append(numpy_helper.from_array(np.asarray(scale), f"{tensor}.scale"))
    parameters = [f"{tensor}.scale", zero]
    quantized, dequantized = f"{tensor}.quantized", f"{tensor}.dequantized"
    return [
        helper.make_node(
            "QuantizeLinear", [tensor, *parameters], [quantized], name=f"{tensor}.quantize"
        ),
        helper.make_node(
            "DequantizeLinear", [quantized, *parameters], [dequantized], name=f"{tensor}.dequantize"
        ),
    ]


def to_unsigned(model: onnx.ModelProto, *, centred: Collection[str] = ()) -> onnx.ModelProto:
    """The same numbers in unsigned activations, for x86.

    ONNX Runtime's kernels there are fast for uint8 activations times int8 weights only, and only
    where QuantizeLinear directly follows the node; OpenVINO's joins of int8 tensors are wrong.
    Three exact rewrites bring the canonical graph there; the scales, the weights and every
    dequantized value stay what they are (saturation included):

    - zero point 128: clip(round(x/s), -128, 127) + 128 = clip(round(x/s) + 128, 0, 255).
    - Rounding is monotone, so it commutes with Relu and with Clip(0, h): behind them the zero point
      is 0, and the activation becomes a Clip of the integers to [0, min(127, round(h/s))].
    - For the same reason it commutes with MaxPool, which then runs on integers.

    CPUs without VNNI may saturate inside ONNX Runtime's uint8 kernels; that is not corrected here.

    Args:
        model: a canonical graph, as ``quantize`` writes it.
        centred: tensors whose zero point is 128 whatever is before them.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    view = GraphView(model.graph)
    for value, name in ((0, _ZERO), (128, _MIDDLE)):
        graph.initializer.append(numpy_helper.from_array(np.asarray(value, np.uint8), name))
    gone: set[str] = set()  # names of nodes that are replaced
    nodes: dict[str, list[onnx.NodeProto]] = {}  # node name -> what comes in its place
    zeros: dict[str, str] = {}  # quantized tensor -> its zero point
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] not in view.initializers:
            keeps = node.input[0] in centred
            nodes[node.name], replaced = _unsigned_quantize(graph, node, view, centred=keeps)
            gone |= replaced
            zeros[node.output[0]] = nodes[node.name][0].input[2]
        elif node.op_type == "DequantizeLinear" and node.input[0] in zeros:
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            copy.input[2] = zeros[node.input[0]]
            nodes[node.name] = [copy]
    kept = [
        new
        for node in model.graph.node
        if node.name not in gone
        for new in nodes.get(node.name, [node])
    ]
    del graph.node[:]
    graph.node.extend(kept)
    for value in [v for v in graph.value_info if v.name in zeros]:
        graph.value_info.remove(value)  # it says int8
    return drop_unused(result)


def _unsigned_quantize(
    graph: onnx.GraphProto, node: onnx.NodeProto, view: GraphView, *, centred: bool
) -> tuple[list[onnx.NodeProto], set[str]]:
    """What comes in the place of one QuantizeLinear, and the names of the nodes it swallows."""
    source = node.input[0]
    swallowed: set[str] = set()

    def behind(name: str) -> onnx.NodeProto | None:
        """The producer of a tensor that nobody else reads."""
        return view.producer.get(name) if view.is_private(name) else None

    pools: list[onnx.NodeProto] = []
    while (pool := behind(source)) and pool.op_type == "MaxPool" and len(pool.output) == 1:
        pools.insert(0, pool)
        swallowed.add(pool.name)
        source = pool.input[0]

    activation = None if centred else view.producer.get(source)
    top = _ceiling(activation, view, view.constant(node.input[1]))
    if top is not None and activation is not None and view.is_private(source):
        swallowed.add(activation.name)
        source = activation.input[0]

    stem = node.output[0]
    new = onnx.NodeProto()
    new.CopyFrom(node)
    new.input[0], new.input[2] = source, _MIDDLE if top is None else _ZERO
    chain = [new]
    if top is not None:
        limit = f"{stem}.max"
        graph.initializer.append(numpy_helper.from_array(np.asarray(top, np.uint8), limit))
        chain.append(helper.make_node("Clip", ["", "", limit], [""], name=f"{node.name}.clip"))
    for pool in pools:
        copy = onnx.NodeProto()
        copy.CopyFrom(pool)
        chain.append(copy)
    for i, (first, second) in enumerate(pairwise(chain)):
        first.output[0] = second.input[0] = f"{stem}.{i}"
    chain[-1].output[0] = stem
    return chain, swallowed


def is_rectified(name: str, view: GraphView) -> bool:
    """Whether a tensor comes from a Relu, or from a Clip from 0."""
    return _ceiling(view.producer.get(name), view, np.float32(1)) is not None


def _ceiling(
    activation: onnx.NodeProto | None, view: GraphView, scale: Array | np.float32
) -> int | None:
    """The largest step that leaves a Relu or a Clip from 0, at most 127; None behind others."""
    if activation is None:
        return None
    if activation.op_type == "Relu":
        return LEVELS
    bounds = list(activation.input[1:])
    if (
        activation.op_type != "Clip"
        or len(bounds) != 2
        or not set(bounds) <= set(view.initializers)
    ):
        return None
    low, high = (float(view.constant(name)) for name in bounds)
    # the division is in float32, as QuantizeLinear's own
    return min(LEVELS, int(np.rint(np.float32(high) / scale))) if low == 0 < high else None

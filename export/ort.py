"""The INT8 graph of ONNX Runtime for nets whose convolutions feed SiLU, x sigmoid(x).

ONNX Runtime runs a convolution in integers only if a QuantizeLinear stands right behind it, or
behind a ReLU. In the canonical graph SiLU stands between: the convolution runs in float between
conversions, and the net is slower than its float graph. Here what the convolution gives to SiLU is
quantized as well, with uint8 of its own zero point, and SiLU is ONNX Runtime's own operator: it
would not find the pattern of two behind a DequantizeLinear.

    q = clip(round_half_even(x / s) + z, 0, 255)
    s = (high - low) / 255,  z = round(-low / s)
    low = max(-amax of x, TAIL),  high sigmoid(high) = amax of x sigmoid(x)

Below ``TAIL`` SiLU is nearly zero. It is one more rounding per layer than in the canonical graph,
so the accuracy is its own. What ONNX Runtime would still run in float, or is slower at in integers,
is float from the beginning, with float weights. Other scales and weights are the canonical ones.

Source: ONNX Runtime, contrib operator com.microsoft.QuickGelu; the rest is measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import chain

import numpy as np
import onnx
from onnx import helper, numpy_helper

from engineworks.export.passes import GraphView, attribute, drop_unused
from engineworks.export.quantize import (
    NOTHING,
    SCALE_FLOOR,
    KeepFloat,
    activation_pair,
    check_amax,
    quantizable,
    quantize,
    to_unsigned,
)
from engineworks.runtime.tensors import Array

TAIL = -6.0  # SiLU(TAIL) = -0.015

# With as few input channels, a convolution of 640 px takes three times as long as the float one.
_FEW_CHANNELS = 4

_DOMAIN = "com.microsoft"


def silus(model: onnx.ModelProto, keep_float: KeepFloat = NOTHING) -> list[str]:
    """Names of the tensors whose ranges ``quantize_for_ort`` needs beside those of ``quantize``.

    They are what a SiLU reads and writes that alone reads a quantizable convolution's output.

    Args:
        model: a float graph as ``export.passes.prepare`` leaves it.

    Raises:
        ExportError, QuantizationError: see ``export.quantize.quantizable``.
    """
    return [name for pair in _silus(model, keep_float).values() for name in pair]


def quantize_for_ort(
    model: onnx.ModelProto,
    ranges: Mapping[str, float],
    keep_float: KeepFloat = NOTHING,
    *,
    means: Mapping[str, Array] | None = None,
) -> onnx.ModelProto | None:
    """Write the graph; None where no SiLU gives a reason to, and ``to_unsigned`` is all there is.

    Args:
        model, ranges, keep_float, means: as ``export.quantize.quantize`` takes them.

    Raises:
        ExportError, QuantizationError: see ``export.quantize.quantize``.
    """
    found = _silus(model, keep_float)
    if not found:
        return None
    limits = {
        conv: (max(-check_amax(x, ranges), TAIL), inverse_silu(check_amax(y, ranges)))
        for conv, (x, y) in found.items()
    }
    view = GraphView(model.graph)
    keep = keep_float.plus(node.name for node in model.graph.node if _is_slow(node, view))
    result = to_unsigned(quantize(model, ranges, keep, means=means))
    # with a convolution that is left float the pair before it goes, and the next one may be alone
    while alone := _alone(result) - set(found):
        keep = keep.plus(alone)
        result = to_unsigned(quantize(model, ranges, keep, means=means))
    quantized = _quantized(result)
    return _fuse_silus(result, {conv: limits[conv] for conv in limits if conv in quantized})


def _silus(model: onnx.ModelProto, keep_float: KeepFloat) -> dict[str, tuple[str, str]]:
    """Name of each convolution -> input and output of its SiLU, in graph order."""
    names = set(quantizable(model, keep_float))
    view = GraphView(model.graph)
    return {
        node.name: (node.output[0], silu[1].output[0])
        for node in model.graph.node
        if node.op_type == "Conv" and node.name in names
        if (silu := _silu(node.output[0], view))
    }


def _silu(source: str, view: GraphView) -> tuple[onnx.NodeProto, onnx.NodeProto] | None:
    """The Sigmoid and the Mul that make SiLU of a tensor, where nothing else reads it."""
    readers = sorted(view.consumers[source], key=lambda node: node.op_type)
    if source in view.outputs or [node.op_type for node in readers] != ["Mul", "Sigmoid"]:
        return None
    product, gate = readers
    inner = gate.output[0]
    return (gate, product) if inner in product.input and view.is_private(inner) else None


def _is_slow(node: onnx.NodeProto, view: GraphView) -> bool:
    """Whether conversions cost more than integers save.

    So it is with few input channels, with several outputs of each of them alone, for which there is
    no kernel, and where the output is one pixel.
    """
    if node.op_type != "Conv" or node.input[1] not in view.initializers:
        return False
    shape = view.shape(node.output[0])
    if shape is not None and set(shape[2:]) == {1}:
        return True
    groups = attribute(node, "group", 1)
    num_out, num_in = view.initializers[node.input[1]].dims[:2]
    return bool(num_in <= _FEW_CHANNELS if groups == 1 else num_in == 1 and num_out > groups)


def _quantized(model: onnx.ModelProto) -> dict[str, str]:
    """Name of each convolution that reads a DequantizeLinear -> its output."""
    view = GraphView(model.graph)
    return {
        node.name: node.output[0]
        for node in model.graph.node
        if node.op_type == "Conv"
        and (before := view.producer.get(node.input[0]))
        and before.op_type == "DequantizeLinear"
    }


def _alone(model: onnx.ModelProto) -> set[str]:
    """The quantized convolutions that more than QuantizeLinear reads."""
    view = GraphView(model.graph)
    return {
        name
        for name, output in _quantized(model).items()
        if output in view.outputs
        or any(reader.op_type != "QuantizeLinear" for reader in view.consumers[output])
    }


def _fuse_silus(
    model: onnx.ModelProto, limits: Mapping[str, tuple[float, float]]
) -> onnx.ModelProto | None:
    """Conv, Sigmoid, Mul -> Conv, a pair, QuickGelu; None where there is none to fuse.

    Args:
        limits: name of the convolution -> the ends of what its SiLU reads.
    """
    if not limits:
        return None
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    view = GraphView(model.graph)
    nodes: dict[str, list[onnx.NodeProto]] = {}  # node name -> what comes in its place
    for node in model.graph.node:
        if node.name not in limits:
            continue
        source = node.output[0]
        silu = _silu(source, view)
        assert silu is not None  # to_unsigned moves Relu, Clip and MaxPool only
        gate, product = silu
        low, high = limits[node.name]
        scale = np.float32(max((high - low) / 255, SCALE_FLOOR))
        zero = numpy_helper.from_array(np.rint(-low / scale).astype(np.uint8), f"{source}.zero")
        graph.initializer.append(zero)
        nodes[node.name] = [node, *activation_pair(graph, source, scale, zero.name)]
        nodes[gate.name] = []
        quick = helper.make_node(
            "QuickGelu",
            [f"{source}.dequantized"],
            product.output,
            name=product.name,
            domain=_DOMAIN,
            alpha=1.0,
        )
        nodes[product.name] = [quick]
    kept = chain.from_iterable(nodes.get(node.name, [node]) for node in model.graph.node)
    del graph.node[:]
    graph.node.extend(kept)
    result.opset_import.append(helper.make_opsetid(_DOMAIN, 1))
    return drop_unused(result)


def inverse_silu(value: float) -> float:
    """The x > 0 with x sigmoid(x) = value, which is above 0."""
    low, high = value, value + 1.0  # x - 0.28 < x sigmoid(x) < x
    while low < (middle := (low + high) / 2) < high:
        is_below = middle / (1 + math.exp(-middle)) < value
        low, high = (middle, high) if is_below else (low, middle)
    return high

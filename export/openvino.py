"""The INT8 graph of OpenVINO for nets that split and join their maps.

In the canonical graph each reader's tensor is quantized where it is read. Where a Concat stands
before a reader, OpenVINO moves that pair to the Concat's inputs: a map that a convolution and a
Concat read is then quantized twice, by two scales, each in a kernel of its own between two changes
of layout, and the convolution that writes the map does so in float.

Here all tensors that Concat, Split, Slice, MaxPool and nearest Resize connect have one range, the
widest of theirs, and are quantized once, where they are computed: every reader takes the quantized
values, and what is between passes the integers on. Tensors are connected only as far as no
convolution reads one in steps of more than ``WIDEST`` times its own. The coarser steps, and the
float readers that see quantized values, make the accuracy the graph's own.

Source: the rule that inputs of a Concat share a scale is Jacob et al., "Quantization and Training
of Neural Networks for Efficient Integer-Arithmetic-Only Inference", 2018, appendix A.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx

from engineworks.export.passes import GraphView, drop_unused
from engineworks.export.quantize import (
    NOTHING,
    KeepFloat,
    activation_pair,
    activation_scale,
    activations,
    check_amax,
    is_rectified,
    quantize,
    to_unsigned,
)
from engineworks.runtime.tensors import Array

WIDEST = 2.0


@dataclass
class _Group:
    """Tensors that share a range.

    Attributes:
        lowest, widest: of the measured ranges among them.
        passing: names of the nodes that connect them.
        joined: whether a Concat is among these.
    """

    members: set[str]
    lowest: float
    widest: float
    passing: set[str] = field(default_factory=set)
    joined: bool = False


def quantize_for_openvino(
    model: onnx.ModelProto,
    ranges: Mapping[str, float],
    keep_float: KeepFloat = NOTHING,
    *,
    means: Mapping[str, Array] | None = None,
) -> onnx.ModelProto | None:
    """Write the graph; None where no Concat gives a reason to, and ``to_unsigned`` is all there is.

    Args:
        model, ranges, keep_float, means: as ``export.quantize.quantize`` takes them.

    Raises:
        ExportError, QuantizationError: see ``export.quantize.quantize``.
    """
    groups = _groups(model, {n: check_amax(n, ranges) for n in activations(model, keep_float)})
    if not groups:
        return None
    group_of = {name: group for group in groups for name in group.members}
    shared = dict(ranges) | {name: group.widest for name, group in group_of.items()}
    canonical = quantize(model, shared, keep_float, means=means)
    view = GraphView(model.graph)
    passed = {
        name
        for group in groups
        for node in model.graph.node
        if node.name in group.passing
        for name in node.output
    }
    sources = {name: group_of[name].widest for name in group_of.keys() - passed}
    at_source = _pairs_at_sources(canonical, sources, passed)
    # what is joined must have one zero point: 0 only if all of it was rectified
    mixed = {
        name
        for group in groups
        if not all(is_rectified(name, view) for name in group.members & sources.keys())
        for name in group.members
    }
    return to_unsigned(at_source, centred=mixed)


def _groups(model: onnx.ModelProto, measured: Mapping[str, float]) -> list[_Group]:
    """What the moves connect, as far as every value in it lies in a range that was measured."""
    view = GraphView(model.graph)
    groups = {name: _Group({name}, amax, amax) for name, amax in measured.items()}
    for node in reversed(model.graph.node):
        data = list(node.input) if node.op_type == "Concat" else list(node.input[:1])
        results = [name for name in node.output if name]
        if (
            not _moves(node)
            or not all(name in groups for name in results)
            or any(name in view.initializers or name in view.outputs for name in [*data, *results])
        ):
            continue
        # a Concat's range holds its inputs; another input has values that its results may lack
        if node.op_type != "Concat" and not all(
            name in groups or _only_moved(name, view, groups) for name in data
        ):
            continue
        parts = {id(groups[n]): groups[n] for n in [*data, *results] if n in groups}.values()
        lowest, widest = min(p.lowest for p in parts), max(p.widest for p in parts)
        if widest > WIDEST * lowest:
            continue
        merged = _Group(
            set(data).union(*(part.members for part in parts)),
            lowest,
            widest,
            {node.name}.union(*(part.passing for part in parts)),
            node.op_type == "Concat" or any(part.joined for part in parts),
        )
        groups |= dict.fromkeys(merged.members, merged)
    return [group for group in {id(g): g for g in groups.values()}.values() if group.joined]


def _moves(node: onnx.NodeProto) -> bool:
    """Whether a node's results are values of its inputs: it commutes with a rounding then."""
    if node.op_type == "Resize":
        return any(a.name == "mode" and a.s == b"nearest" for a in node.attribute)
    if node.op_type == "MaxPool":
        return len(node.output) == 1
    return node.op_type in ("Concat", "Split", "Slice")


def _only_moved(name: str, view: GraphView, groups: Mapping[str, _Group]) -> bool:
    """Whether nothing but moves reads a tensor, all of them into groups."""
    return all(
        _moves(reader) and reader.input[0] == name and all(r in groups for r in reader.output if r)
        for reader in view.consumers[name]
    )


def _pairs_at_sources(
    canonical: onnx.ModelProto, sources: Mapping[str, float], passed: set[str]
) -> onnx.ModelProto:
    """Move the pairs of all tensors in groups to those that are computed there.

    Args:
        sources: name -> range.
        passed: the results of moves: they read and are read without a pair.
    """
    result = onnx.ModelProto()
    result.CopyFrom(canonical)
    graph = result.graph
    gone = {f"{name}.{part}" for name in [*sources, *passed] for part in ("quantize", "dequantize")}
    dequantized = {f"{name}.dequantized": name for name in [*sources, *passed]}
    for scale in [s for s in graph.initializer if s.name.removesuffix(".scale") in sources]:
        graph.initializer.remove(scale)

    def pair(name: str) -> list[onnx.NodeProto]:
        return activation_pair(graph, name, activation_scale(sources[name]), "zero_int8")

    nodes = [new for value in graph.input if value.name in sources for new in pair(value.name)]
    for node in canonical.graph.node:
        if node.name in gone:
            continue
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        for i, name in enumerate(node.input):
            plain = dequantized.get(name, name)
            copy.input[i] = f"{plain}.dequantized" if plain in sources else plain
        nodes.append(copy)
        nodes += [new for name in node.output if name in sources for new in pair(name)]
    del graph.node[:]
    graph.node.extend(nodes)
    return drop_unused(result)

"""Graph clean-ups: ``ModelProto -> ModelProto``, each with what it needs and what it promises.

No pass changes its argument. ``prepare`` runs them in the order that the quantizer relies on. All
take flat graphs (no control flow, no local functions left) of opset 18 or later.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

import numpy as np
import onnx
from onnx import helper, numpy_helper

from engineworks.runtime.errors import ExportError
from engineworks.runtime.tensors import Array

MIN_OPSET = 18

# onnxslim's rewrites that are left out: its Gemm fusions lose ONNX Runtime's INT8 MatMul kernels
# and add reshapes; its BatchNorm folding forgets the names of the weights (``fold_batchnorm`` here
# keeps them, and recipes address nodes by them).
_SKIPPED_FUSIONS = [
    "FusionGemm",
    "FusionGemmMul",
    "FusionGemmAdd",
    "FusionConvBN",
    "FusionConvTransposeBN",
]


class GraphView:
    """Look-ups in a graph that is not changed while they are used.

    Attributes:
        initializers: name -> tensor.
        producer: tensor name -> the node that writes it.
        consumers: tensor name -> the nodes that read it, once per reading input.
        outputs: names of the graph's outputs.
    """

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.initializers: dict[str, onnx.TensorProto] = {t.name: t for t in graph.initializer}
        self.producer: dict[str, onnx.NodeProto] = {
            name: node for node in graph.node for name in node.output if name
        }
        self.consumers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in graph.node:
            for name in node.input:
                if name:
                    self.consumers[name].append(node)
        self.outputs = {value.name for value in graph.output}
        self._types = {
            value.name: value.type.tensor_type
            for value in [*graph.value_info, *graph.input, *graph.output]
        }

    def constant(self, name: str) -> Array:
        """Value of an initializer."""
        return np.asarray(numpy_helper.to_array(self.initializers[name]))

    def is_private(self, name: str) -> bool:
        """Whether exactly one node input, and no output of the graph, reads a tensor."""
        return len(self.consumers[name]) == 1 and name not in self.outputs

    def dtype(self, name: str) -> int | None:
        """ONNX element type of a tensor, None where shape inference has not said it."""
        if name in self.initializers:
            return int(self.initializers[name].data_type)
        return int(self._types[name].elem_type) if name in self._types else None

    def shape(self, name: str) -> tuple[int | str, ...] | None:
        """Shape with names for free axes; None where it or one of its axes is unknown."""
        if name in self.initializers:
            return tuple(self.initializers[name].dims)
        if name not in self._types or not self._types[name].HasField("shape"):
            return None
        axes = [
            axis.dim_value if axis.HasField("dim_value") else axis.dim_param
            for axis in self._types[name].shape.dim
        ]
        return None if "" in axes else tuple(axes)


def attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    """An integer attribute of a node."""
    return next((int(a.i) for a in node.attribute if a.name == name), default)


def prepare(model: onnx.ModelProto) -> onnx.ModelProto:
    """Everything below, in order: what ``trace`` writes as the float graph.

    Raises:
        ExportError: see the passes.
    """
    for step in (inline, simplify, fold_batchnorm, order_gelu, infer_shapes, name_nodes):
        model = step(model)
    return model


def check_flat(model: onnx.ModelProto) -> None:
    """Refuse a graph that the passes and the quantizer cannot see through.

    Raises:
        ExportError: opset below 18, control flow, or local functions.
    """
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if opset < MIN_OPSET:
        raise ExportError(
            f"the graph has opset {opset}, at least {MIN_OPSET} is needed",
            fix=f"export it with opset_version={MIN_OPSET} or later",
        )
    if model.functions:
        raise ExportError(
            f"the graph has local functions {[f.name for f in model.functions]}",
            fix="run export.passes.prepare on it first",
        )
    for node in model.graph.node:
        if any(a.HasField("g") or a.graphs for a in node.attribute):
            raise ExportError(
                f"node '{node.name}' ({node.op_type}) holds a subgraph",
                fix="write the model without data-dependent control flow",
            )


def inline(model: onnx.ModelProto) -> onnx.ModelProto:
    """Expand local functions, and turn every CastLike into the Cast that it amounts to.

    A CastLike of a constant reads a live tensor for its type alone, and so hides the constant from
    folding.

    Raises:
        ExportError: see ``check_flat``.
    """
    from onnx import inliner

    model = inliner.inline_local_functions(model)
    check_flat(model)
    model = onnx.shape_inference.infer_shapes(model)
    view = GraphView(model.graph)
    for node in model.graph.node:
        if node.op_type == "CastLike" and (dtype := view.dtype(node.input[1])):
            node.op_type = "Cast"
            del node.input[1:]
            del node.attribute[:]
            node.attribute.append(helper.make_attribute("to", dtype))
    return model


def simplify(model: onnx.ModelProto) -> onnx.ModelProto:
    """Fold constants, drop what is dead or does nothing, fuse Pad, Mul and Add into Conv.

    Afterwards constants are initializers and inputs and outputs are what they were.

    Raises:
        ExportError: see ``check_flat``; or the simplifier changed the graph's inputs or outputs.
    """
    import onnxslim  # here: a machine that quantizes and builds plans needs no simplifier

    check_flat(model)
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    slim: onnx.ModelProto = onnxslim.slim(copy, skip_fusion_patterns=_SKIPPED_FUSIONS)
    for before, after in (
        (model.graph.input, slim.graph.input),
        (model.graph.output, slim.graph.output),
    ):
        if _signature(before) != _signature(after):
            raise ExportError(
                f"simplifying changed the graph's border from {_signature(before)} "
                f"to {_signature(after)}",
                fix="report it with the graph; onnxslim made the change",
            )
    return slim


def _signature(values: Iterable[onnx.ValueInfoProto]) -> list[tuple[str, int]]:
    return [(value.name, value.type.tensor_type.elem_type) for value in values]


def fold_batchnorm(model: onnx.ModelProto) -> onnx.ModelProto:
    """Fold BatchNormalization into the Conv or ConvTranspose that alone feeds it.

    Weights keep their names; the arithmetic is done in float64. Left alone: a normalisation whose
    input is also read elsewhere or is a graph output, and one that does not follow a convolution.

    Source: Jacob et al., "Quantization and Training of Neural Networks ...", 2018, section 3.2.
    """
    check_flat(model)
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    view = GraphView(graph)
    kept = []
    for node in graph.node:
        conv = _foldable(node, view)
        if conv is None:
            kept.append(node)
        else:
            _fold(node, conv, view, graph)
    _replace(graph.node, kept)
    return drop_unused(result)


def _foldable(norm: onnx.NodeProto, view: GraphView) -> onnx.NodeProto | None:
    if norm.op_type != "BatchNormalization":
        return None
    conv = view.producer.get(norm.input[0])
    if (
        conv is None
        or conv.op_type not in ("Conv", "ConvTranspose")
        or not view.is_private(norm.input[0])
        or attribute(norm, "training_mode", 0)
        or not all(name in view.initializers for name in [*conv.input[1:], *norm.input[1:]] if name)
    ):
        return None
    return conv


def _fold(
    norm: onnx.NodeProto, conv: onnx.NodeProto, view: GraphView, graph: onnx.GraphProto
) -> None:
    gamma, beta, mean, variance = (
        view.constant(name).astype(np.float64) for name in norm.input[1:]
    )
    epsilon = next((a.f for a in norm.attribute if a.name == "epsilon"), 1e-5)
    factor = gamma / np.sqrt(variance + epsilon)
    weight = view.constant(conv.input[1])
    has_bias = len(conv.input) > 2 and conv.input[2] != ""
    bias = view.constant(conv.input[2]).astype(np.float64) if has_bias else 0.0
    if conv.op_type == "Conv":
        per_channel = factor.reshape(-1, *[1] * (weight.ndim - 1))
    else:  # (C_in, C_out / group, ...): every group has its own stretch of output channels
        group = attribute(conv, "group", 1)
        per_channel = np.repeat(factor.reshape(group, -1), weight.shape[0] // group, axis=0)
        per_channel = per_channel.reshape(*weight.shape[:2], *[1] * (weight.ndim - 2))
    name = conv.input[1]
    alone = len(view.consumers[name]) == 1
    new_weight = name if alone else f"{name}.{norm.output[0]}"
    new_bias = f"{new_weight.removesuffix('.weight')}.folded_bias"
    if alone:
        graph.initializer.remove(view.initializers[name])
    for key, value in (
        (new_weight, weight * per_channel),
        (new_bias, (bias - mean) * factor + beta),
    ):
        tensor = numpy_helper.from_array(value.astype(weight.dtype), key)
        graph.initializer.append(tensor)
    _replace(conv.input, [conv.input[0], new_weight, new_bias])
    conv.output[0] = norm.output[0]


def order_gelu(model: onnx.ModelProto) -> onnx.ModelProto:
    """Halve a Gelu last, which is the order in which ONNX Runtime finds one.

    x (0.5 (1 + erf(x / sqrt 2))) becomes (x (1 + erf(x / sqrt 2))) 0.5. No value changes: to halve
    a number rounds nothing.
    """
    check_flat(model)
    result = onnx.ModelProto()
    result.CopyFrom(model)
    view = GraphView(model.graph)
    products = {node.output[0]: node for node in result.graph.node if node.op_type == "Mul"}
    for outer in products.values():
        for gate, x in (list(outer.input), list(outer.input)[::-1]):
            inner = products.get(gate)
            if inner is None or not view.is_private(gate):
                continue
            for half, whole in (list(inner.input), list(inner.input)[::-1]):
                is_half = half in view.initializers and np.all(view.constant(half) == 0.5)
                if is_half and _is_gate(whole, x, view):
                    _replace(inner.input, [x, whole])
                    _replace(outer.input, [gate, half])
    return result


def _is_gate(name: str, x: str, view: GraphView) -> bool:
    """Whether a tensor is 1 + erf(x c), with any constant c."""
    add = view.producer.get(name)
    if add is None or add.op_type != "Add":
        return False
    for source in add.input:
        erf = view.producer.get(source)
        scaled = view.producer.get(erf.input[0]) if erf is not None else None
        if erf is not None and erf.op_type == "Erf" and scaled is not None and x in scaled.input:
            return True
    return False


def drop_unused(model: onnx.ModelProto) -> onnx.ModelProto:
    """Remove initializers that nothing reads, and notes about tensors that are gone."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    read = {name for node in graph.node for name in node.input} | {o.name for o in graph.output}
    written = {name for node in graph.node for name in node.output}
    _replace(graph.initializer, [t for t in graph.initializer if t.name in read])
    _replace(graph.value_info, [v for v in graph.value_info if v.name in written])
    return result


def infer_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Note dtype and shape of every inner tensor.

    Raises:
        ExportError: the graph contradicts itself; the checker's message is kept.
    """
    check_flat(model)
    try:
        inferred: onnx.ModelProto = onnx.shape_inference.infer_shapes(
            model, check_type=True, strict_mode=True, data_prop=True
        )
        onnx.checker.check_model(inferred, full_check=True)
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError) as error:
        raise ExportError(f"the graph is not valid ONNX: {error}") from error
    return inferred


def name_nodes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Give every node and inner tensor a unique name that no exporter's version changes.

    A node with a weight ``<path>.weight`` is called ``<path>``; any other ``<OpType>_<k>``, counted
    per type in graph order. Its output is called ``<node>:0`` (``:1``, ...). Inputs, outputs and
    initializers keep their names. Doing it twice changes nothing.
    """
    check_flat(model)
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    initializers = {tensor.name for tensor in graph.initializer}
    outputs = {value.name for value in graph.output}
    fixed = initializers | outputs | {value.name for value in graph.input}
    counts: Counter[str] = Counter()
    renamed: dict[str, str] = {}
    for node in graph.node:
        weights = [
            n.removesuffix(".weight")
            for n in node.input
            if n in initializers and n.endswith(".weight")
        ]
        stem = weights[0] if weights else node.op_type
        node.name = f"{stem}_{counts[stem]}" if not weights or counts[stem] else stem
        counts[stem] += 1
        for i, name in enumerate(node.output):
            if name and name not in fixed:
                renamed[name] = f"{node.name}:{i}"
        _replace(node.input, [renamed.get(n, n) for n in node.input])
        _replace(node.output, [renamed.get(n, n) for n in node.output])
    for value in graph.value_info:
        value.name = renamed.get(value.name, value.name)
    return result


def before_choice(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with what its outputs are chosen from, under the outputs' names.

    An output that picks entries of a tensor by computed indices (the best candidates of a detector)
    says little about an error: the least of them swaps rows. Such an output becomes the tensor that
    it picks from, without what is done to the entries afterwards; whole numbers are left out, since
    what they count is nowhere defined but at the choice. Other outputs stay as they are.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    view = GraphView(model.graph)
    whole = (onnx.TensorProto.INT32, onnx.TensorProto.INT64)
    for value in list(graph.output):
        choice = _choice(value.name, view)
        if choice is None:
            continue
        graph.output.remove(value)
        if value.type.tensor_type.elem_type in whole:
            continue
        kind = value.type.tensor_type.elem_type
        graph.output.append(helper.make_tensor_value_info(value.name, kind, None))
        for node in graph.node:  # the name is free for another tensor
            _replace(node.output, [f"{n}.chosen" if n == value.name else n for n in node.output])
            _replace(node.input, [f"{n}.chosen" if n == value.name else n for n in node.input])
        name = f"{value.name}.before_choice"
        graph.node.append(helper.make_node("Identity", [choice.input[0]], [value.name], name=name))
    return result


def _choice(name: str, view: GraphView) -> onnx.NodeProto | None:
    """The one node on the ways to a tensor that picks by computed indices, the last on each way."""
    found: dict[str, onnx.NodeProto] = {}
    seen: set[str] = set()
    pending = [name]
    while pending:
        node = view.producer.get(pending.pop())
        if node is None or node.name in seen:
            continue
        seen.add(node.name)
        if node.op_type == "GatherElements" and node.input[1] in view.producer:
            found[node.name] = node
        else:
            pending += node.input
    return next(iter(found.values())) if len(found) == 1 else None


def telling_choice(model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[str]]:
    """The graph with the indices of each TopK among its outputs, and their names."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    indices = _choices(model)
    known = {value.name for value in model.graph.output}
    result.graph.output.extend(value for name, value in indices.items() if name not in known)
    return result, list(indices)


def given_choice(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph that is told, as inputs, what ``telling_choice`` tells; it chooses no more.

    So two graphs of one net can be compared entry by entry behind a choice: the least error of one
    would have it choose others, or the same ones in another order.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    chosen = _choices(model)
    graph.input.extend(chosen.values())
    nodes = []
    for node in model.graph.node:
        if node.op_type == "TopK" and node.output[-1] in chosen:
            if not node.output[0]:  # nobody reads its values
                continue
            taken, values = [node.input[0], node.output[1]], [node.output[0]]
            axis = attribute(node, "axis", -1)
            node = helper.make_node("GatherElements", taken, values, name=node.name, axis=axis)
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    for known in (graph.value_info, graph.output):  # an output that is the choice says nothing now
        for value in [each for each in known if each.name in chosen]:
            known.remove(value)
    return result


def _choices(model: onnx.ModelProto) -> dict[str, onnx.ValueInfoProto]:
    """Indices that TopK gives, by name; their axes are free."""
    names = [n.output[1] for n in model.graph.node if n.op_type == "TopK" and len(n.output) > 1]
    inferred = onnx.shape_inference.infer_shapes(model).graph
    rank = {
        value.name: len(value.type.tensor_type.shape.dim)
        for value in [*inferred.value_info, *inferred.output]
    }
    return {
        name: helper.make_tensor_value_info(
            name, onnx.TensorProto.INT64, [f"{name}.{axis}" for axis in range(rank[name])]
        )
        for name in names
        if name
    }


def _replace(field: object, values: Iterable[object]) -> None:
    """Assign to a repeated protobuf field, which has no assignment of its own."""
    new = list(values)
    del field[:]  # type: ignore[attr-defined]
    field.extend(new)  # type: ignore[attr-defined]

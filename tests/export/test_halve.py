"""Mixed graphs: which nodes compute in 16 bits, that types agree, and how far the numbers move."""

from __future__ import annotations

from typing import Any, get_args

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from engineworks.export.halve import HalfType, halve, num_half, rounded
from engineworks.export.passes import GraphView
from engineworks.export.quantize import KeepFloat, quantize
from engineworks.runtime.errors import ExportError
from tests.export.residual_net import images, measured, residual_net, run

KINDS = get_args(HalfType)
DTYPES: dict[str, Any] = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}
# distance of 1 to the next number above it
EPS = {"fp16": 2.0**-10, "bf16": 2.0**-7}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


class Net:
    """Nodes by name: ``net.add("Add", "sum", "x", "y")`` writes tensor ``sum``."""

    def __init__(self, **inputs: list[int | str]) -> None:
        self.inputs = inputs
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.rng = np.random.default_rng(0)

    def constant(self, name: str, value: Any, dtype: Any = np.float32) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def weight(self, name: str, *shape: int) -> str:
        return self.constant(name, self.rng.normal(0, 0.3, shape))

    def add(self, op_type: str, name: str, *inputs: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op_type, inputs, [name], name=name, **attributes))
        return name

    def model(self, opset: int = 18, **outputs: list[int | str]) -> onnx.ModelProto:
        ends = [
            [helper.make_tensor_value_info(k, TensorProto.FLOAT, v) for k, v in end.items()]
            for end in (self.inputs, outputs)
        ]
        graph = helper.make_graph(self.nodes, "net", *ends, self.constants)
        imports = [helper.make_opsetid("", opset)]
        return helper.make_model(graph, opset_imports=imports, ir_version=9)


def types(model: onnx.ModelProto) -> dict[str, str]:
    """Node -> name of its first output's type, Casts left out."""
    view = GraphView(model.graph)
    return {
        node.name: TensorProto.DataType.Name(view.dtype(node.output[0]) or 0).lower()
        for node in model.graph.node
        if node.op_type != "Cast"
    }


def halves(model: onnx.ModelProto) -> set[str]:
    return {name for name, dtype in types(model).items() if dtype in ("float16", "bfloat16")}


class TestAConvolutionalNet:
    def test_computes_in_16_bits_but_for_its_reduction(self, kind: HalfType) -> None:
        mixed = halve(residual_net(), kind)
        kept = {name for name, dtype in types(mixed).items() if dtype == "float"}
        pools = {n.name for n in residual_net().graph.node if n.op_type == "GlobalAveragePool"}
        # what follows the reduction follows its type, up to the next weights
        flat = {n.name for n in residual_net().graph.node if n.op_type == "Flatten"}
        assert kept == pools | flat
        assert num_half(mixed) == len(residual_net().graph.node) - len(kept)

    def test_keeps_names_and_types_of_its_border(self, kind: HalfType) -> None:
        exact = residual_net()
        mixed = halve(exact, kind)
        for before, after in (
            (exact.graph.input, mixed.graph.input),
            (exact.graph.output, mixed.graph.output),
        ):
            assert [v.SerializeToString() for v in before] == [v.SerializeToString() for v in after]

    def test_stores_the_weights_in_16_bits_once(self, kind: HalfType) -> None:
        exact, mixed = residual_net(), halve(residual_net(), kind)
        assert len(mixed.graph.initializer) == len(exact.graph.initializer)
        # 2 of 4 bytes per weight, and the names
        assert mixed.ByteSize() < 0.6 * exact.ByteSize()

    def test_is_not_changed_itself(self, kind: HalfType) -> None:
        exact = residual_net()
        before = exact.SerializeToString()
        halve(exact, kind)
        assert exact.SerializeToString() == before

    def test_answers_as_in_float32_up_to_rounding(self, kind: HalfType) -> None:
        exact = residual_net()
        feeds = {"image": images(num=4)}
        got, want = run(rounded(halve(exact, kind)), feeds), run(exact, feeds)
        for name in want:
            error = np.abs(got[name] - want[name]).max() / np.abs(want[name]).max()
            # a dozen roundings in a row, each by half a step, add up to less than so many steps
            assert 0 < error < 12 * EPS[kind]

    def test_is_the_same_to_onnx_runtime_where_that_knows_the_type(self) -> None:
        mixed = halve(residual_net(), "fp16")
        feeds = {"image": images(num=4)}
        got, want = run(mixed, feeds), run(rounded(mixed), feeds)
        for name in want:
            # both round to float16 after each node, up to the order of float32 sums before it
            np.testing.assert_allclose(got[name], want[name], atol=2 * EPS["fp16"] * 8, rtol=0)

    def test_leaves_what_it_is_told_in_float32(self, kind: HalfType) -> None:
        mixed = halve(residual_net(), kind, KeepFloat(patterns=(r"node_Conv_\d+",)))
        convs = [n.name for n in mixed.graph.node if n.op_type == "Conv"]
        assert convs
        assert not halves(mixed) & set(convs)


def test_rounding_is_to_nearest_even_as_ml_dtypes_does_it(kind: HalfType) -> None:
    """x -> identity in 16 bits by a convolution with weight 1."""
    net = Net(x=["n", 1, 4, 4])
    net.constant("w", np.ones((1, 1, 1, 1)))
    net.add("Conv", "y", "x", "w")
    mixed = rounded(halve(net.model(y=["n", 1, 4, 4]), kind))
    x = np.random.default_rng(1).normal(0, 100, (64, 1, 4, 4)).astype(np.float32)
    got = run(mixed, {"x": x})["y"]
    np.testing.assert_array_equal(got, x.astype(DTYPES[kind]).astype(np.float32))


class TestANodeOf:
    def layer_norm(self) -> Net:
        net = Net(x=["n", 6, 8])
        net.add("MatMul", "a", "x", net.weight("wa", 8, 8))
        net.constant("gamma", np.ones(8))
        net.constant("beta", np.zeros(8))
        return net

    def test_layer_normalisation_stays_float32(self, kind: HalfType) -> None:
        net = self.layer_norm()
        net.add("LayerNormalization", "norm", "a", "gamma", "beta")
        net.add("MatMul", "y", "norm", net.weight("wb", 8, 8))
        mixed = halve(net.model(y=["n", 6, 8]), kind)
        assert halves(mixed) == {"a", "y"}

    def test_layer_normalisation_in_parts_stays_float32(self, kind: HalfType) -> None:
        net = self.layer_norm()
        axes = net.constant("axes", [-1], np.int64)
        net.add("ReduceMean", "mean", "a", axes)
        net.add("Sub", "centred", "a", "mean")
        net.add("Pow", "squared", "centred", net.constant("two", 2.0))
        net.add("ReduceMean", "variance", "squared", axes)
        net.add("Add", "safe", "variance", net.constant("epsilon", 1e-6))
        net.add("Sqrt", "std", "safe")
        net.add("Div", "divided", "centred", "std")
        net.add("Mul", "scaled", "divided", "gamma")
        net.add("Add", "shifted", "scaled", "beta")
        net.add("MatMul", "y", "shifted", net.weight("wb", 8, 8))
        mixed = halve(net.model(y=["n", 6, 8]), kind)
        assert halves(mixed) == {"a", "y"}

    @pytest.mark.parametrize(
        "op_type", ["Softmax", "Exp", "Log", "Sqrt", "Sin", "GlobalAveragePool", "Softplus"]
    )
    def test_softmax_and_its_like_stay_float32(self, kind: HalfType, op_type: str) -> None:
        net = Net(x=["n", 6, 8, 8])
        net.add("MatMul", "a", "x", net.weight("wa", 8, 8))
        net.add(op_type, "y", "a")
        shape: list[int | str] = ["n", 6, *([1, 1] if op_type == "GlobalAveragePool" else [8, 8])]
        assert halves(halve(net.model(y=shape), kind)) == {"a"}

    def test_rescaling_before_the_first_weights_stays_float32(self, kind: HalfType) -> None:
        """Values of a sensor may be too large for 16 bits until they are rescaled."""
        net = Net(x=["n", 1, 8, 8])
        net.add("Sub", "shifted", "x", net.constant("low", 20_000.0))
        net.add("Div", "scaled", "shifted", net.constant("range", 40_000.0))
        net.add("Conv", "y", "scaled", net.weight("w", 2, 1, 3, 3), pads=[1] * 4)
        mixed = halve(net.model(y=["n", 2, 8, 8]), kind)
        assert halves(mixed) == {"y"}
        assert np.isfinite(
            run(rounded(mixed), {"x": np.full((1, 1, 8, 8), 60_000, np.float32)})["y"]
        ).all()

    def test_a_constant_beyond_the_type_stays_float32(self) -> None:
        net = Net(x=["n", 6, 8])
        net.add("MatMul", "a", "x", net.weight("wa", 8, 8))
        net.add("Add", "masked", "a", net.constant("mask", np.full(8, -1e9)))
        net.add("Relu", "y", "masked")
        assert halves(halve(net.model(y=["n", 6, 8]), "fp16")) == {"a"}
        assert halves(halve(net.model(y=["n", 6, 8]), "bf16")) == {"a", "masked", "y"}

    def test_resize_keeps_its_factors_in_float32(self, kind: HalfType) -> None:
        net = Net(x=["n", 1, 8, 8])
        net.add("Conv", "a", "x", net.weight("w", 2, 1, 1, 1))
        net.add("Resize", "y", "a", "", net.constant("factors", [1, 1, 2, 2]), mode="linear")
        mixed = halve(net.model(y=["n", 2, 16, 16]), kind)
        assert halves(mixed) == {"a", "y"}
        assert GraphView(mixed.graph).dtype("factors") == TensorProto.FLOAT

    def test_integers_are_no_business_of_it(self, kind: HalfType) -> None:
        net = Net(x=["n", 6, 8])
        net.add("MatMul", "a", "x", net.weight("wa", 8, 8))
        net.add("Shape", "shape", "a")
        net.add("Reshape", "y", "a", "shape")
        mixed = halve(net.model(y=["n", 6, 8]), kind)
        assert types(mixed)["shape"] == "int64"
        assert halves(mixed) == {"a", "y"}

    @pytest.mark.parametrize("neighbours", [False, True])
    def test_a_rotary_embedding_stays_float32(self, kind: HalfType, neighbours: bool) -> None:
        net = Net(x=["n", 5, 8])
        net.add("MatMul", "q", "x", net.weight("wq", 8, 8))
        half = [4, 4]
        if neighbours:  # (x0, x1) -> (-x1, x0)
            net.add("Reshape", "pairs", "q", net.constant("by two", [0, 5, 4, 2], np.int64))
            half = [1, 1]
        source, axis = ("pairs", 3) if neighbours else ("q", 2)
        net.nodes.append(
            helper.make_node(
                "Split",
                [source, net.constant("halves", half, np.int64)],
                ["first", "second"],
                name="split",
                axis=axis,
            )
        )
        net.add("Neg", "negated", "second")
        turned = net.add("Concat", "turned", "negated", "first", axis=axis)
        if neighbours:
            flat = net.constant("flat", [0, 5, 8], np.int64)
            turned = net.add("Reshape", "flattened", "turned", flat)
        net.add("Mul", "cos part", "q", net.weight("cos", 5, 8))
        net.add("Mul", "sin part", turned, net.weight("sin", 5, 8))
        net.add("Add", "rotated", "cos part", "sin part")
        net.add("MatMul", "y", "rotated", net.weight("wy", 8, 8))
        mixed = halve(net.model(y=["n", 5, 8]), kind)
        kept = {"negated", "turned", "cos part", "sin part", "rotated"}
        assert {name for name, dtype in types(mixed).items() if dtype == "float"} >= kept
        assert {"q", "y"} <= halves(mixed)

    def test_the_same_sum_without_a_rotation_is_in_16_bits(self, kind: HalfType) -> None:
        net = Net(x=["n", 5, 8])
        net.add("MatMul", "q", "x", net.weight("wq", 8, 8))
        net.add("Neg", "negated", "q")
        net.add("Mul", "one", "q", net.weight("a", 5, 8))
        net.add("Mul", "two", "negated", net.weight("b", 5, 8))
        net.add("Add", "y", "one", "two")
        assert halves(halve(net.model(y=["n", 5, 8]), kind)) == {"q", "negated", "one", "two", "y"}


class TestAnOutput:
    def test_that_is_also_read_inside_is_cast_once(self, kind: HalfType) -> None:
        net = Net(x=["n", 6, 8])
        net.add("MatMul", "a", "x", net.weight("wa", 8, 8))
        net.add("Relu", "b", "a")
        net.add("MatMul", "c", "b", net.weight("wc", 8, 8))
        mixed = halve(net.model(a=["n", 6, 8], b=["n", 6, 8], c=["n", 6, 8]), kind)
        casts = [node for node in mixed.graph.node if node.op_type == "Cast"]
        assert len(casts) == 4  # of the input, and of each output
        relu = next(node for node in mixed.graph.node if node.op_type == "Relu")
        assert relu.input[0] == f"a.{kind}"

    def test_may_be_an_input_of_a_float_node_too(self, kind: HalfType) -> None:
        net = Net(x=["n", 6, 8])
        net.add("MatMul", "a", "x", net.weight("wa", 8, 8))
        net.add("Softmax", "b", "a")
        mixed = halve(net.model(a=["n", 6, 8], b=["n", 6, 8]), kind)
        softmax = next(node for node in mixed.graph.node if node.op_type == "Softmax")
        assert softmax.input[0] == "a"


def test_a_quantized_graph_is_refused(kind: HalfType) -> None:
    net = residual_net()
    graph = quantize(net, measured(net, {"image": images()}))
    with pytest.raises(ExportError, match="a quantized graph is not written in") as caught:
        halve(graph, kind)
    assert caught.value.fix


def test_an_overflow_is_not_hidden_by_the_twin() -> None:
    """ONNX Runtime computes float16 in float32 here and there; the twin must not."""
    net = Net(x=["n", 6, 8])
    net.add("MatMul", "a", "x", net.constant("w", np.eye(8) * 3e4))
    net.add("MatMul", "y", "a", net.constant("v", np.eye(8) * 1e-4))
    x = np.full((1, 6, 8), 4, np.float32)
    mixed = halve(net.model(y=["n", 6, 8]), "fp16")
    assert not np.isfinite(
        run(rounded(mixed), {"x": x}, ort.GraphOptimizationLevel.ORT_ENABLE_ALL)["y"]
    ).all()


OPS = ("Relu", "MatMul", "Softmax", "Add", "Mul", "Sigmoid", "Exp", "Concat", "Neg")


@st.composite
def nets(draw: st.DrawFn) -> onnx.ModelProto:
    """Up to a dozen nodes on (n, 8) tensors, each reading earlier ones; the last are outputs."""
    net = Net(x=["n", 8])
    tensors = ["x"]
    for i in range(draw(st.integers(1, 12))):
        op_type = draw(st.sampled_from(OPS))
        name, first = f"t{i}", draw(st.sampled_from(tensors))
        if op_type == "MatMul":
            net.add(op_type, name, first, net.weight(f"w{i}", 8, 8))
        elif op_type in ("Add", "Mul"):
            net.add(op_type, name, first, draw(st.sampled_from([*tensors, net.weight(f"w{i}", 8)])))
        elif op_type == "Concat":
            net.add(op_type, f"{name}c", first, draw(st.sampled_from(tensors)), axis=1)
            net.add("MatMul", name, f"{name}c", net.weight(f"w{i}", 16, 8))
        elif op_type == "Exp":  # of what cannot overflow
            net.add("Sigmoid", f"{name}s", first)
            net.add(op_type, name, f"{name}s")
        else:
            net.add(op_type, name, first)
        tensors.append(name)
    count = draw(st.integers(1, min(3, len(tensors) - 1)))
    return net.model(**{name: ["n", 8] for name in tensors[-count:]})


@settings(max_examples=60, deadline=None)
@given(model=nets(), kind=st.sampled_from(KINDS))
def test_any_graph_comes_out_typed_with_every_rule_kept(model: onnx.ModelProto, kind: Any) -> None:
    mixed = halve(model, kind)  # refuses itself what is not typed
    view = GraphView(mixed.graph)
    for node in mixed.graph.node:
        dtypes = {view.dtype(name) for name in [*node.input, *node.output]}
        if node.op_type == "Cast":
            assert len(dtypes) == 2
        else:
            assert len(dtypes) == 1
        if node.op_type in ("Softmax", "Exp"):
            assert dtypes == {TensorProto.FLOAT}
        if node.op_type == "MatMul":
            assert TensorProto.FLOAT not in dtypes
    run(rounded(mixed), {"x": np.ones((2, 8), np.float32)})

from __future__ import annotations

from contextlib import closing

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from engineworks.export import passes
from engineworks.export.openvino import WIDEST, quantize_for_openvino
from engineworks.export.quantize import KeepFloat, activations, quantize
from engineworks.runtime.engines import open_engine, products_overflow
from engineworks.runtime.errors import QuantizationError
from engineworks.runtime.tensors import Array
from tests.export.residual_net import deployed, measured, run

ADDS = KeepFloat(op_types=frozenset({"Add"}))

# a map is split, one half passes a layer with a shortcut, and all is joined
SPLIT = """<ir_version: 9, opset_import: ["" : 18]>
g (float[n, 8, 12, 12] x) => (float[n, 8, 12, 12] y) {
    entered = Conv(x, enter)
    gate = Sigmoid(entered)
    whole = Mul(entered, gate)
    near, far = Split<axis = 1, num_outputs = 2>(whole)
    through = Conv<pads = [1, 1, 1, 1]>(far, middle)
    shortcut = Add(far, through)
    joined = Concat<axis = 1>(near, far, shortcut)
    y = Conv(joined, leave)
}"""
# maxima of a map beside it, and what is twice as large beside a finer map; nothing is float between
POOLED = """<ir_version: 9, opset_import: ["" : 18]>
g (float[n, 8, 12, 12] x) => (float[n, 8, 12, 12] y) {
    fine_raw = Conv<pads = [1, 1, 1, 1]>(x, middle)
    fine = ACTIVATION(fine_raw)
    coarse_raw = Conv<pads = [1, 1, 1, 1], strides = [2, 2]>(fine, middle)
    coarse = Relu(coarse_raw)
    pooled = MaxPool<kernel_shape = [3, 3], pads = [1, 1, 1, 1], strides = [1, 1]>(coarse)
    pyramid = Concat<axis = 1>(coarse, pooled)
    large = Resize<mode = "nearest", coordinate_transformation_mode = "asymmetric",
        nearest_mode = "floor">(pyramid, , twice)
    joined = Concat<axis = 1>(large, fine)
    y = Conv(joined, leave)
}"""


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Array:
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


WEIGHTS = {
    "enter": draw(16, 8, 1, 1, seed=1, scale=0.4),
    "middle": draw(8, 8, 3, 3, seed=2, scale=0.15),
    "leave": draw(8, 24, 1, 1, seed=3, scale=0.3),
    "twice": np.array([1, 1, 2, 2], np.float32),
}


def parse(text: str, **changed: Array) -> onnx.ModelProto:
    model = onnx.parser.parse_model(text)
    for name, value in (WEIGHTS | changed).items():
        if name in {i for node in model.graph.node for i in node.input}:
            model.graph.initializer.append(numpy_helper.from_array(value, name))
    return passes.name_nodes(passes.infer_shapes(model))


SPLITTING = parse(SPLIT)
RELU, LEAKY = (
    parse(POOLED.replace("ACTIVATION", name)) for name in ("Relu", "LeakyRelu<alpha = 0.5>")
)


def feeds(seed: int = 5) -> dict[str, Array]:
    return {"x": draw(2, 8, 12, 12, seed=seed)}


def written(
    model: onnx.ModelProto, keep: KeepFloat = ADDS, ranges: dict[str, float] | None = None
) -> onnx.ModelProto:
    graph = quantize_for_openvino(model, ranges or measured(model, feeds()), keep)
    assert graph is not None
    onnx.checker.check_model(graph)
    return graph


def lost(want: Array, got: Array) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def constants(graph: onnx.ModelProto, place: int) -> dict[str, float]:
    """Of what is quantized by the graph: name of the tensor -> an input of its QuantizeLinear."""
    view = passes.GraphView(graph.graph)
    return {
        node.name.removesuffix(".quantize"): float(view.constant(node.input[place]))
        for node in graph.graph.node
        if node.op_type == "QuantizeLinear"
    }


def scales(graph: onnx.ModelProto) -> dict[str, float]:
    return constants(graph, 1)


def zero_points(graph: onnx.ModelProto) -> dict[str, float]:
    return constants(graph, 2)


class TestWhatIsJoined:
    def test_is_quantized_once_where_it_is_computed(self) -> None:
        found = scales(written(SPLITTING))

        # x, the map before the Split, the sum: not the halves, not the Concat
        assert set(found) == {"x", "Mul_0:0", "Add_0:0"}
        assert found["Mul_0:0"] == found["Add_0:0"]

    def test_has_the_widest_range_of_all(self) -> None:
        ranges = measured(SPLITTING, feeds())
        found = scales(written(SPLITTING))

        half = next(name for name in activations(SPLITTING, ADDS) if name.startswith("Split"))
        assert ranges[half] < ranges["Concat_0:0"]
        assert found["Mul_0:0"] == np.float32(ranges["Concat_0:0"] / 127)

    def test_goes_through_pools_and_nearest_resizes(self) -> None:
        assert set(scales(written(RELU))) == {"x", "Relu_0:0", "Relu_1:0"}
        assert set(scales(written(LEAKY))) == {"x", "LeakyRelu_0:0", "Relu_0:0"}

    def test_has_one_zero_point(self) -> None:
        assert zero_points(written(RELU)) == {"x": 128, "Relu_0:0": 0, "Relu_1:0": 0}
        assert set(zero_points(written(LEAKY)).values()) == {128}

    @pytest.mark.parametrize("backend", ["openvino", "ort"])
    @pytest.mark.parametrize("model", [SPLITTING, RELU, LEAKY])
    @pytest.mark.parametrize("keep", [ADDS, KeepFloat()])
    def test_gives_nearly_what_the_float_graph_gives(
        self, model: onnx.ModelProto, keep: KeepFloat, backend: str
    ) -> None:
        want = run(model, feeds())["y"]
        graph = written(model, keep)
        with closing(
            open_engine(graph.SerializeToString(), backend, precision="int8", threads=1)
        ) as engine:
            got = engine.run(feeds())["y"]
        # a step is 1 / 127 of a range of some 4 deviations, so a rounding adds 1 %; up to five do.
        # Steps of weights of 7 bits, without VNNI, are twice as large
        assert lost(want, got) < (0.1 if products_overflow(backend) else 0.05)
        # and both backends read the same graph
        assert lost(run(deployed(graph), feeds())["y"], got) < 0.01

    @given(seed=st.integers(0, 2**32 - 1), model=st.sampled_from([RELU, LEAKY]))
    @settings(max_examples=20, deadline=None)
    def test_is_the_canonical_graph_with_shared_ranges(
        self, seed: int, model: onnx.ModelProto
    ) -> None:
        # without float readers nothing but the place of the rounding differs
        ranges = measured(model, feeds())
        shared = ranges | dict.fromkeys(ranges.keys() - {"x"}, max(ranges[n] for n in ranges))
        graph, canonical = written(model, ranges=shared), quantize(model, shared)
        np.testing.assert_array_equal(
            run(graph, feeds(seed))["y"], run(canonical, feeds(seed))["y"]
        )


class TestWhatIsNotJoined:
    def test_nets_without_a_concat_keep_the_unsigned_graph(self) -> None:
        text = SPLIT.replace("Concat<axis = 1>(near, far, shortcut)", "Add(near, shortcut)")
        model = parse(text, leave=draw(8, 8, 1, 1))
        assert quantize_for_openvino(model, measured(model, feeds()), ADDS) is None

    def test_a_layer_never_gets_steps_much_coarser_than_its_own(self) -> None:
        ranges = measured(SPLITTING, feeds())
        half = next(name for name in activations(SPLITTING, ADDS) if name.startswith("Split"))
        narrow = ranges | {half: ranges["Concat_0:0"] / WIDEST / 1.01}
        assert quantize_for_openvino(SPLITTING, narrow, ADDS) is None
        narrow[half] *= 1.02
        assert quantize_for_openvino(SPLITTING, narrow, ADDS) is not None

    def test_an_output_of_the_graph_stays_as_it_is(self) -> None:
        text = SPLIT.replace("y) {", "y, float[n, 24, 12, 12] joined) {")
        model = parse(text)
        assert quantize_for_openvino(model, measured(model, feeds()), ADDS) is None

    def test_nor_is_a_constant(self) -> None:
        text = SPLIT.replace("(near, far, shortcut)", "(near, far, extra)")
        model = parse(text, extra=draw(1, 8, 12, 12))
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
        assert quantize_for_openvino(model, measured(model, {"x": draw(1, 8, 12, 12)})) is None

    def test_a_resize_that_computes_values_stays_between_pairs(self) -> None:
        text = POOLED.replace("ACTIVATION", "Relu").replace('"nearest"', '"linear"')
        found = scales(written(parse(text)))
        assert "Resize_0:0" in found
        assert "Relu_1:0" not in found  # its readers are the pool and the Concat, which is float

    def test_what_stays_float_has_no_pair(self) -> None:
        convs = frozenset(n.name for n in SPLITTING.graph.node if n.op_type == "Conv")
        assert quantize_for_openvino(SPLITTING, {}, ADDS.plus(convs)) is None

    def test_a_range_that_is_missing_is_named(self) -> None:
        del (less := measured(SPLITTING, feeds()))["Concat_0:0"]
        with pytest.raises(QuantizationError, match="no range for tensor 'Concat_0:0'"):
            quantize_for_openvino(SPLITTING, less)

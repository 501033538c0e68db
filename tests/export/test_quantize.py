from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import numpy_helper

from engineworks.export import passes
from engineworks.export.quantize import (
    SCALE_FLOOR,
    KeepFloat,
    activations,
    quantizable,
    quantize,
    quantize_weight,
    to_unsigned,
)
from engineworks.runtime.engines.openvino import OpenVinoEngine
from engineworks.runtime.errors import QuantizationError
from tests.export.residual_net import FUSED, LITERAL, deployed, images, measured, residual_net, run


def parse(text: str, **constants: np.ndarray) -> onnx.ModelProto:
    model = onnx.parser.parse_model(text)
    for name, value in constants.items():
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    return passes.name_nodes(passes.infer_shapes(model))


def lost(want: np.ndarray, got: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def constant(model: onnx.ModelProto, name: str) -> np.ndarray:
    return passes.GraphView(model.graph).constant(name)


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


@pytest.fixture(scope="module")
def net() -> onnx.ModelProto:
    return passes.prepare(residual_net(bn=True))


@pytest.fixture(scope="module")
def feeds() -> dict[str, np.ndarray]:
    return {"image": images(num=4)}


@pytest.fixture(scope="module")
def ranges(net: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> dict[str, float]:
    return measured(net, feeds)


@pytest.fixture(scope="module")
def canonical(net: onnx.ModelProto, ranges: dict[str, float]) -> onnx.ModelProto:
    return quantize(net, ranges)


class TestWhatIsQuantized:
    def test_layers_with_constant_weights_and_residual_adds(self, net: onnx.ModelProto) -> None:
        convolutions = {n.name for n in net.graph.node if n.op_type == "Conv"}

        names = quantizable(net)

        assert set(names) == convolutions | {"Add_0", "Add_1", "Add_2", "fc"}
        assert names == [n.name for n in net.graph.node if n.name in set(names)]  # graph order

    def test_every_tensor_that_they_read_needs_one_range(self, net: onnx.ModelProto) -> None:
        names = activations(net)

        assert len(set(names)) == len(names)
        assert names[:3] == ["image", "MaxPool_0:0", "Relu_1:0"]
        assert "layer1" in names and "logits" not in names

    def test_products_of_activations_and_broadcasting_adds_stay_float(self) -> None:
        model = parse(
            """<ir_version: 9, opset_import: ["" : 18]>
            g (float[2, 4] x, float[4, 4] k, float[4] r) => (float[2, 4] y) {
                a = MatMul(x, k)  b = Add(a, r)  c = Add(b, bias)  y = Mul(c, x)
            }""",
            bias=draw(4),
        )

        assert quantizable(model) == []

    def test_a_recipe_keeps_types_patterns_and_names_float(self, net: onnx.ModelProto) -> None:
        rule = KeepFloat(
            op_types=frozenset({"Gemm"}),
            patterns=(r"layer2\..*conv\d",),
            nodes=frozenset({"Add_0"}),
        )

        assert set(quantizable(net, rule)) == {
            *("conv1", "layer1.0.conv1", "layer1.0.conv2", "layer2.0.downsample.0"),
            *("Add_1", "Add_2"),
        }

    def test_a_name_that_the_graph_does_not_have_is_refused(self, net: onnx.ModelProto) -> None:
        with pytest.raises(QuantizationError, match=r"\['layer9'\]"):
            quantizable(net, KeepFloat().plus(["layer9"]))

    def test_nodes_without_names_are_refused_with_the_way_out(self) -> None:
        model = residual_net()
        model.graph.node[3].name = ""

        with pytest.raises(QuantizationError, match=r"(?s)unique name.*passes.prepare"):
            quantizable(model)


class TestTheCanonicalGraph:
    def test_is_valid_and_keeps_inputs_and_outputs(
        self, net: onnx.ModelProto, canonical: onnx.ModelProto
    ) -> None:
        onnx.checker.check_model(canonical, full_check=True)

        assert canonical.graph.input == net.graph.input
        assert canonical.graph.output == net.graph.output

    def test_has_one_pair_per_tensor_and_one_dequantize_per_weight(
        self, net: onnx.ModelProto, canonical: onnx.ModelProto
    ) -> None:
        count = Counter(node.op_type for node in canonical.graph.node)

        assert count["QuantizeLinear"] == len(activations(net))
        assert count["DequantizeLinear"] == len(activations(net)) + 9  # 8 Conv, 1 Gemm

    def test_leaves_biases_float_and_drops_the_float_weights(
        self, canonical: onnx.ModelProto
    ) -> None:
        initializers = {t.name: t.data_type for t in canonical.graph.initializer}

        assert initializers["fc.bias"] == onnx.TensorProto.FLOAT
        assert "fc.weight" not in initializers
        assert initializers["fc.weight.int8"] == onnx.TensorProto.INT8

    def test_feeds_float_readers_the_float_tensor(self, canonical: onnx.ModelProto) -> None:
        pool = next(n for n in canonical.graph.node if n.op_type == "MaxPool")

        assert list(pool.input) == ["Relu_0:0"]

    def test_quantizes_activations_to_half_even_saturating_int8(
        self, canonical: onnx.ModelProto, feeds: dict[str, np.ndarray], ranges: dict[str, float]
    ) -> None:
        scale = np.float32(ranges["layer1"] / 127)
        got = run(canonical, feeds, inner=["layer1.quantized"])

        want = np.clip(np.rint(got["layer1"] / scale), -128, 127)

        np.testing.assert_array_equal(got["layer1.quantized"], want)

    def test_stays_near_the_float_graph(
        self,
        net: onnx.ModelProto,
        canonical: onnx.ModelProto,
        feeds: dict[str, np.ndarray],
    ) -> None:
        want, got = run(net, feeds), run(canonical, feeds)

        for name, value in want.items():
            assert lost(value, got[name]) < 0.1, (
                name
            )  # a ResNet-18 with minmax ranges loses 9 % (8 bits, 15 layers)

    @pytest.mark.parametrize("amax", [0.0, -1.0, float("nan"), float("inf")])
    def test_is_not_written_from_a_range_that_is_none(
        self, net: onnx.ModelProto, ranges: dict[str, float], amax: float
    ) -> None:
        with pytest.raises(QuantizationError, match="'MaxPool_0:0' is"):
            quantize(net, ranges | {"MaxPool_0:0": amax})

    def test_is_not_written_without_all_ranges(
        self, net: onnx.ModelProto, ranges: dict[str, float]
    ) -> None:
        del (less := dict(ranges))["layer1"]

        with pytest.raises(QuantizationError, match="no range for tensor 'layer1'"):
            quantize(net, less)

    def test_is_not_written_from_a_weight_with_nan(self, ranges: dict[str, float]) -> None:
        model = residual_net()
        weight = next(t for t in model.graph.initializer if t.name == "fc.weight")
        value = numpy_helper.to_array(weight).copy()
        value[3, 3] = np.nan
        weight.CopyFrom(numpy_helper.from_array(value, "fc.weight"))
        model = passes.prepare(model)

        with pytest.raises(QuantizationError, match=r"'fc.weight' of node 'fc' holds NaN"):
            quantize(model, dict.fromkeys(activations(model), 1.0))


class TestWeights:
    @given(
        weight=hnp.arrays(
            np.float32,
            hnp.array_shapes(min_dims=2, max_dims=4, max_side=5),
            elements=st.floats(-1e3, 1e3, width=32),
        ),
        axis=st.integers(0, 1),
    )
    @settings(max_examples=60, deadline=None)
    def test_agree_with_a_plain_loop_in_float64(self, weight: np.ndarray, axis: int) -> None:
        values, scales = quantize_weight(weight, axis)

        for c in range(weight.shape[axis]):
            channel = weight.take(c, axis).astype(np.float64)
            scale = np.float32(max(np.abs(channel).max() / 127, SCALE_FLOOR))
            assert scales[c] == scale
            want = np.clip(
                np.round(channel / np.float64(scale)), -127, 127
            )  # np.round: half to even
            np.testing.assert_array_equal(values.take(c, axis), want)

    def test_use_the_full_width_but_never_minus_128(self) -> None:
        values, _ = quantize_weight(draw(64, 9), 0)

        assert values.min() >= -127
        assert (np.abs(values).max(axis=1) == 127).all()

    @pytest.mark.parametrize(
        ("node", "weight", "axis"),
        [
            ("Conv(x, w)", (6, 4, 3, 3), 0),
            ("Conv <group = 4> (x, w)", (8, 1, 3, 3), 0),
            ("ConvTranspose(x, w)", (4, 6, 3, 3), 1),
            ("ConvTranspose <group = 2> (x, w)", (4, 3, 3, 3), 1),
        ],
    )
    def test_have_their_scales_on_the_output_channels_of_convolutions(
        self, node: str, weight: tuple[int, ...], axis: int
    ) -> None:
        model = parse(
            f"""<ir_version: 9, opset_import: ["" : 18]>
            g (float[1, 4, 8, 8] x) => (float[a, b, c, d] y) {{ y = {node} }}""",
            w=draw(*weight),
        )

        quantized = quantize(model, {"x": 4.0})

        name = next(t.name for t in quantized.graph.initializer if t.name.endswith("weight.scale"))
        assert constant(quantized, name).shape == (weight[axis],)
        dequantize = next(n for n in quantized.graph.node if n.input[1] == name)
        assert passes.attribute(dequantize, "axis", 1) == axis

    @pytest.mark.parametrize(
        ("node", "weight"),
        [("Gemm(x, w)", (4, 6)), ("Gemm <transB = 1> (x, w)", (6, 4)), ("MatMul(x, w)", (4, 6))],
    )
    def test_have_their_scales_on_the_output_features_of_products(
        self, node: str, weight: tuple[int, ...]
    ) -> None:
        model = parse(
            f"""<ir_version: 9, opset_import: ["" : 18]>
            g (float[2, 4] x) => (float[2, 6] y) {{ y = {node} }}""",
            w=draw(*weight),
        )
        quantized = quantize(model, {"x": 4.0})

        got = run(quantized, {"x": draw(2, 4)})["y"]

        scale = next(t for t in quantized.graph.initializer if t.name.endswith("weight.scale"))
        assert list(scale.dims) == [6]
        want = run(model, {"x": draw(2, 4)})["y"]
        # |x| <= 4 and |w| <= 4: four products, each off by half a step of either factor
        assert np.abs(got - want).max() < 4 * (4 * 4 / 127)

    def test_a_dead_channel_gets_a_positive_scale_and_stays_dead(self) -> None:
        weight = draw(3, 2, 1, 1)
        weight[1] = 0

        values, scales = quantize_weight(weight, 0)

        assert (scales > 0).all()
        assert not values[1].any()

    @pytest.mark.parametrize("size", [0.0, 1e-30, 1e-9])
    def test_the_bias_of_a_nearly_dead_channel_survives_integer_kernels(self, size: float) -> None:
        # a backend that keeps the bias in int32 steps of both scales would overflow here
        weight = draw(4, 2, 1, 1)
        weight[1] = size
        model = parse(
            """<ir_version: 9, opset_import: ["" : 18]>
            g (float[1, 2, 4, 4] x) => (float[1, 4, 4, 4] z) {
                y = Conv(x, w, b)  z = Conv(y, v)
            }""",
            w=weight,
            b=np.array([0.1, 50.0, -0.1, 0.2], np.float32),
            v=np.eye(4, dtype=np.float32).reshape(4, 4, 1, 1),
        )
        feeds = {"x": draw(1, 2, 4, 4)}
        ranges = measured(model, feeds)

        got = run(to_unsigned(quantize(model, ranges)), feeds, FUSED)["z"]

        # one channel of +50 sets the step: 50 / 127
        assert np.abs(got[0, 1] - 50).max() <= 50 / 127

    def test_a_weight_that_two_nodes_share_serves_both(self) -> None:
        model = parse(
            """<ir_version: 9, opset_import: ["" : 18]>
            g (float[1, 2, 4, 4] x) => (float[1, 2, 4, 4] y) { h = Conv(x, w)  y = Conv(h, w) }""",
            w=draw(2, 2, 1, 1),
        )

        quantized = quantize(model, measured(model, {"x": draw(1, 2, 4, 4)}))

        onnx.checker.check_model(quantized, full_check=True)
        assert len({n.name for n in quantized.graph.node}) == len(quantized.graph.node)


class TestTheUnsignedDialect:
    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("beyond", [1.0, 5.0])
    def test_is_bit_equal_in_every_dequantized_tensor_and_output(
        self, net: onnx.ModelProto, canonical: onnx.ModelProto, seed: int, beyond: float
    ) -> None:
        # literal evaluation: float convolutions between Q and DQ, nothing fused. ``beyond`` leaves
        # the calibrated range, so saturation must agree as well
        feeds = {"image": beyond * images(seed)}
        inner = [
            node.output[0]
            for node in canonical.graph.node
            if node.op_type == "DequantizeLinear" and node.input[0].endswith(".quantized")
        ]
        assert len(inner) == len(activations(net))

        signed = run(canonical, feeds, inner=inner)
        unsigned = run(to_unsigned(canonical), feeds, inner=inner)

        for name, value in signed.items():
            np.testing.assert_array_equal(unsigned[name], value, err_msg=name)

    @given(
        x=hnp.arrays(
            np.float32, (1, 1, 6, 6), elements=st.floats(-1e4, 1e4, width=32, allow_subnormal=False)
        ),
        amax=st.floats(1e-3, 1e3),
        high=st.floats(2.0**-7, 100, width=32),
        chain=st.sampled_from(
            [
                "r = Identity(x)",
                "r = Relu(x)",
                "r = Clip(x, zero, high)",
                "r = Clip(x, low, high)",
                "r = MaxPool <kernel_shape = [2, 2], pads = [1, 1, 0, 0]> (x)",
                "a = Relu(x) r = MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (a)",
                "a = Clip(x, zero, high) r = MaxPool <kernel_shape = [3, 3], strides = [2, 2]> (a)",
                "a = Clip(x, low, high) r = MaxPool <kernel_shape = [3, 3], strides = [2, 2]> (a)",
            ]
        ),
    )
    @settings(max_examples=80, deadline=None)
    def test_is_bit_equal_behind_every_activation(
        self, x: np.ndarray, amax: float, high: float, chain: str
    ) -> None:
        model = parse(
            f"""<ir_version: 9, opset_import: ["" : 18]>
            g (float[1, 1, 6, 6] x) => (float[a, b, c, d] y) {{ {chain}  y = Conv(r, w) }}""",
            w=np.full((1, 1, 1, 1), 127, np.float32),
            zero=np.array(0, np.float32),
            low=np.array(-1, np.float32),
            high=np.array(high, np.float32),
        )
        canonical = quantize(model, dict.fromkeys(activations(model), amax))

        signed, unsigned = (run(m, {"x": x})["y"] for m in (canonical, to_unsigned(canonical)))

        np.testing.assert_array_equal(unsigned, signed)

    @pytest.mark.parametrize(
        ("activation", "rectifies"),
        [
            ("Relu(x)", True),
            ("Clip(x, zero, six)", True),
            ("Clip(x, one, six)", False),
            ("Clip(x, minus, six)", False),
            ("Clip(x, minus, zero)", False),
            ("Clip(x, zero, zero)", False),
            ("Clip(x, zero)", False),
            ("Sigmoid(x)", False),
        ],
    )
    def test_has_the_zero_point_0_behind_what_rectifies_alone(
        self, activation: str, rectifies: bool
    ) -> None:
        model = parse(
            f"""<ir_version: 9, opset_import: ["" : 18]>
            g (float[1, 1, 6, 6] x) => (float[1, 1, 6, 6] y)
            {{ r = {activation}  y = Conv(r, w) }}""",
            w=np.ones((1, 1, 1, 1), np.float32),
            zero=np.array(0, np.float32),
            one=np.array(1, np.float32),
            minus=np.array(-1, np.float32),
            six=np.array(6, np.float32),
        )

        unsigned = to_unsigned(quantize(model, dict.fromkeys(activations(model), 3.0)))

        (node,) = [n for n in unsigned.graph.node if n.op_type == "QuantizeLinear"]
        assert constant(unsigned, node.input[2]) == (0 if rectifies else 128)

    def test_leaves_weights_and_scales_untouched(self, canonical: onnx.ModelProto) -> None:
        unsigned = to_unsigned(canonical)

        kept = {t.name: t for t in unsigned.graph.initializer}
        for tensor in canonical.graph.initializer:
            if tensor.name != "zero_int8":
                assert kept[tensor.name] == tensor

    def test_fuses_on_onnx_runtime_where_the_canonical_graph_does_not(
        self, canonical: onnx.ModelProto, feeds: dict[str, np.ndarray], tmp_path: Path
    ) -> None:
        run(to_unsigned(canonical), feeds, FUSED, optimized=tmp_path / "u8.onnx")

        fused = Counter(n.op_type for n in onnx.load(tmp_path / "u8.onnx").graph.node)

        assert fused["QLinearConv"] == 8
        # the Add behind layer1 and layer2 is a float output of the graph, so it stays float
        assert fused["QLinearAdd"] == 1
        assert fused["Conv"] == fused["FusedConv"] == 0

    def test_is_within_one_step_of_the_literal_graph_after_each_fused_layer(
        self, ranges: dict[str, float], canonical: onnx.ModelProto, feeds: dict[str, np.ndarray]
    ) -> None:
        # integer kernels round the product of three scales once instead of twice, so a value near
        # the middle of two steps may fall to the other side. One step in one layer; later layers
        # amplify it, so each is looked at alone: its input is the graph's input
        whole = passes.infer_shapes(canonical)
        first = onnx.utils.Extractor(whole).extract_model(["image"], ["MaxPool_0:0.dequantized"])

        literal, fused = (
            run(m, feeds, level)["MaxPool_0:0.dequantized"]
            for m, level in ((deployed(to_unsigned(first)), LITERAL), (to_unsigned(first), FUSED))
        )

        steps = np.abs(literal - fused) / (ranges["MaxPool_0:0"] / 127)
        assert steps.max() < 1.001  # one step, and float32 rounding of q * scale
        assert (steps > 0.5).mean() < 0.01  # rare

    def test_loses_no_more_than_the_canonical_graph_when_all_is_fused(
        self, net: onnx.ModelProto, canonical: onnx.ModelProto, feeds: dict[str, np.ndarray]
    ) -> None:
        want = run(net, feeds)
        signed = run(deployed(canonical), feeds)
        unsigned = run(to_unsigned(canonical), feeds, FUSED)

        for name in want:
            # the same error up to the flipped steps, which are as random as the rest of it
            assert lost(want[name], unsigned[name]) < 1.25 * lost(want[name], signed[name]), name


JOINED = """<ir_version: 9, opset_import: ["" : 18]>
g (float[1, 8, 16, 16] x) => (float[1, 8, 16, 16] y) {
    near = Conv<pads = [1, 1, 1, 1]>(x, near_weight)
    near_gate = Sigmoid(near)
    near_out = Mul(near, near_gate)
    far = Conv<pads = [1, 1, 1, 1]>(near_out, far_weight)
    far_gate = Sigmoid(far)
    far_out = Mul(far, far_gate)
    both = Concat<axis = 1>(near_out, far_out)
    y = Conv(both, both_weight)
}"""


class TestOpenVino:
    @pytest.mark.parametrize("joined", [False, True], ids=["residual", "concat"])
    def test_runs_the_unsigned_graph_with_no_more_loss_than_the_literal_one(
        self, net: onnx.ModelProto, feeds: dict[str, np.ndarray], joined: bool
    ) -> None:
        if joined:  # values of unlike ranges side by side: of signed ones it makes a wrong sum
            weights = {"near": (8, 8, 3, 3), "far": (8, 8, 3, 3), "both": (8, 16, 1, 1)}
            scales = {"near": 0.1, "far": 2.0, "both": 0.3}
            net = parse(
                JOINED, **{f"{n}_weight": draw(*weights[n], scale=scales[n]) for n in weights}
            )
            feeds = {"x": draw(1, 8, 16, 16, seed=1)}
        canonical = quantize(net, measured(net, feeds))
        unsigned = deployed(to_unsigned(canonical))
        engine = OpenVinoEngine(unsigned.SerializeToString(), precision="int8", threads=1)

        want, literal, got = run(net, feeds), run(unsigned, feeds), engine.run(feeds)

        for name in want:
            # as above: its integer kernels flip steps too
            assert lost(want[name], got[name]) < 1.25 * lost(want[name], literal[name]), name


CONV = """<ir_version: 9, opset_import: ["" : 18]>
g (float[n, 6, 5, 5] x) => (float[n, 4, 3, 3] y)
{ y = Conv<group = GROUP>(x, wBIAS) }"""
GEMM = """<ir_version: 9, opset_import: ["" : 18]>
g (float[n, 6] x) => (float[n, 4] y) { y = Gemm<transB = TRANS>(x, w, b) }"""


class TestTheCorrectionOfBiases:
    """What rounding the weights adds to the mean of a node's output is taken off its bias."""

    @pytest.mark.parametrize("biased", [True, False])
    @pytest.mark.parametrize("groups", [1, 2])
    def test_leaves_a_convolution_with_the_mean_that_it_had(
        self, groups: int, biased: bool
    ) -> None:
        constants = {"w": draw(4, 6 // groups, 3, 3)} | ({"b": draw(4, seed=1)} if biased else {})
        text = CONV.replace("GROUP", str(groups)).replace("BIAS", ", b" if biased else "")
        model = parse(text, **constants)
        x = draw(50, 6, 5, 5, seed=2) + np.arange(6, dtype=np.float32)[:, None, None]
        # every position is seen by every tap alike, so that the channel means are all that counts
        x[:] = x.mean(axis=(0, 2, 3), keepdims=True)
        self.check(model, x, x.mean(axis=(0, 2, 3), dtype=np.float64))

    @pytest.mark.parametrize("transposed", [0, 1])
    def test_leaves_a_linear_layer_with_the_mean_that_it_had(self, transposed: int) -> None:
        weight = draw(4, 6) if transposed else draw(6, 4)
        model = parse(GEMM.replace("TRANS", str(transposed)), w=weight, b=draw(4, seed=1))
        x = draw(50, 6, seed=2) + np.arange(6, dtype=np.float32)
        self.check(model, x, x.mean(axis=0, dtype=np.float64))

    def check(self, model: onnx.ModelProto, x: np.ndarray, mean: np.ndarray) -> None:
        (name,) = (node.name for node in model.graph.node)
        quantized = quantize(model, {"x": 10.0}, means={"x": mean})
        plain = quantize(model, {"x": 10.0})
        shift = {}
        for label, graph in (("corrected", quantized), ("plain", plain)):
            # the rounded weight on the unrounded input
            weight = constant(graph, f"{name}.weight.int8").astype(np.float64)
            scale = constant(graph, f"{name}.weight.scale").astype(np.float64)
            node = next(n for n in graph.graph.node if n.name == name)
            axis = 0 if node.op_type == "Conv" or self.transposed(node) else 1
            dense = weight * scale.reshape([-1 if i == axis else 1 for i in range(weight.ndim)])
            bias = constant(graph, node.input[2]) if len(node.input) > 2 else np.zeros(4)
            original = parse_like(model, dense.astype(np.float32), bias.astype(np.float32))
            got, want = (run(m, {"x": x})["y"] for m in (original, model))
            axes = tuple(i for i in range(got.ndim) if i != 1)
            shift[label] = np.abs((got - want).mean(axis=axes, dtype=np.float64)).max()
        assert shift["plain"] > 1e-2  # rounding of the weights alone
        # float32 rounding of sums of 50 terms of up to 20
        assert shift["corrected"] < 1e-5

    @staticmethod
    def transposed(node: onnx.NodeProto) -> bool:
        return any(a.name == "transB" and a.i for a in node.attribute)

    def test_brings_a_whole_net_nearer_to_the_float_one(
        self, net: onnx.ModelProto, feeds: dict[str, np.ndarray], ranges: dict[str, float]
    ) -> None:
        tensors = [name for name in activations(net) if name != "image"]
        probe = onnx.ModelProto()
        probe.CopyFrom(net)
        for name in tensors:
            value = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
            probe.graph.output.append(value)
        seen = run(probe, feeds) | feeds
        means = {
            name: values.mean(axis=(0, 2, 3) if values.ndim == 4 else 0)
            for name, values in seen.items()
            if name in ("image", *tensors)
        }
        want = run(net, feeds)["logits"]
        plain = lost(want, run(quantize(net, ranges), feeds)["logits"])
        assert lost(want, run(quantize(net, ranges, means=means), feeds)["logits"]) < plain

    def test_does_not_touch_a_bias_that_another_node_shares(self) -> None:
        model = parse(
            """<ir_version: 9, opset_import: ["" : 18]>
            g (float[n, 6] x) => (float[n, 4] y, float[n, 4] z)
            { y = Gemm(x, w, b)  z = Gemm(x, v, b) }""",
            w=draw(6, 4),
            v=draw(6, 4, seed=3),
            b=draw(4, seed=1),
        )
        graph = quantize(model, {"x": 3.0}, means={"x": np.ones(6)})
        first, second = (n.input[2] for n in graph.graph.node if n.op_type == "Gemm")
        assert first != second
        assert not np.array_equal(constant(graph, first), constant(graph, second))

    def test_needs_as_many_means_as_channels(self) -> None:
        model = parse(GEMM.replace("TRANS", "0"), w=draw(6, 4), b=draw(4))
        with pytest.raises(QuantizationError, match=r"5 channels .* which has 6"):
            quantize(model, {"x": 3.0}, means={"x": np.ones(5)})


def parse_like(model: onnx.ModelProto, weight: np.ndarray, bias: np.ndarray) -> onnx.ModelProto:
    """The same single node with other constants."""
    other = onnx.ModelProto()
    other.CopyFrom(model)
    (node,) = other.graph.node
    del other.graph.initializer[:]
    other.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    other.graph.initializer.append(numpy_helper.from_array(bias, "b"))
    del node.input[2:]
    node.input.append("b")
    return other

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from engineworks.export import passes
from engineworks.export.ort import TAIL, inverse_silu, quantize_for_ort, silus
from engineworks.export.quantize import KeepFloat, activations, quantize, to_unsigned
from engineworks.runtime.errors import QuantizationError
from engineworks.runtime.tensors import Array
from tests.export.residual_net import FUSED, deployed, residual_net, run

# two layers with SiLU, of which one is also joined, and one without anything behind it
SWISH = """<ir_version: 9, opset_import: ["" : 18]>
g (float[n, 8, 12, 12] x) => (float[n, 8, 6, 6] y, float[n, 16, 6, 6] both) {
    near = Conv<pads = [1, 1, 1, 1]>(x, near_weight, near_bias)
    near_gate = Sigmoid(near)
    near_out = Mul(near, near_gate)
    far = Conv<pads = [1, 1, 1, 1], strides = [2, 2], group = 2>(near_out, far_weight)
    far_gate = Sigmoid(far)
    far_out = Mul(far_gate, far)
    low = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(near_out)
    both = Concat<axis = 1>(low, far_out)
    y = Conv(both, last_weight)
}"""


NEAR, NEAR_OUT = "Conv_0:0", "Mul_0:0"  # as the passes name them


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Array:
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


WEIGHTS = {
    "near_weight": draw(8, 8, 3, 3, seed=1, scale=0.2),
    "near_bias": draw(8, seed=2),
    "far_weight": draw(8, 4, 3, 3, seed=3, scale=0.4),
    "last_weight": draw(8, 16, 1, 1, seed=4, scale=0.3),
}


def parse(text: str, **constants: Array) -> onnx.ModelProto:
    model = onnx.parser.parse_model(text)
    for name, value in constants.items():
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    return passes.name_nodes(passes.infer_shapes(model))


def measured(model: onnx.ModelProto, feeds: dict[str, Array]) -> dict[str, float]:
    """Largest magnitude of every tensor that needs a range."""
    names = {*activations(model), *silus(model)}
    outputs = {value.name for value in model.graph.output}
    values = run(model, feeds, inner=sorted(names - set(feeds) - outputs)) | feeds
    return {name: float(np.abs(values[name]).max()) for name in names}


def lost(want: Array, got: Array) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def silu(x: Array) -> Array:
    x = x.astype(np.float64)
    return np.asarray(x / (1 + np.exp(-x)))


def written(model: onnx.ModelProto, feeds: dict[str, Array]) -> onnx.ModelProto:
    graph = quantize_for_ort(model, measured(model, feeds))
    assert graph is not None
    onnx.checker.check_model(graph)
    return graph


def fused(model: onnx.ModelProto, feeds: dict[str, Array], folder: Path) -> Counter[str]:
    """Operators that ONNX Runtime really runs."""
    run(model, feeds, FUSED, optimized=folder / "optimized.onnx")
    return Counter(n.op_type for n in onnx.load(folder / "optimized.onnx").graph.node)


@pytest.fixture(scope="module")
def net() -> onnx.ModelProto:
    return parse(SWISH, **WEIGHTS)


@pytest.fixture(scope="module")
def feeds() -> dict[str, Array]:
    return {"x": draw(2, 8, 12, 12, seed=5)}


class TestWhatItIsFor:
    def test_needs_ranges_on_both_sides_of_each_silu(self, net: onnx.ModelProto) -> None:
        assert silus(net) == [NEAR, NEAR_OUT, "Conv_1:0", "Mul_1:0"]

    def test_nets_without_silu_keep_the_unsigned_graph(self) -> None:
        model = passes.prepare(residual_net())

        assert silus(model) == []
        assert quantize_for_ort(model, {}) is None

    def test_a_silu_behind_a_convolution_that_stays_float_is_none(
        self, net: onnx.ModelProto
    ) -> None:
        names = frozenset(n.name for n in net.graph.node if n.op_type == "Conv")

        assert silus(net, KeepFloat(nodes=names)) == []
        assert quantize_for_ort(net, {}, KeepFloat(nodes=names)) is None

    @pytest.mark.parametrize(
        "body",
        [
            "g = Sigmoid(h)  s = Mul(h, g)  t = Add(s, g)",  # the gate is read elsewhere
            "g = Sigmoid(h)  s = Mul(h, g)  t = Add(s, h)",  # so is the input
            "g = Sigmoid(h)  t = Mul(x, g)",  # of another tensor
            "g = Tanh(h)  t = Mul(h, g)",
        ],
    )
    def test_what_only_looks_like_silu_is_none(self, body: str) -> None:
        model = parse(
            f"""<ir_version: 9, opset_import: ["" : 18]>
            g (float[1, 8, 4, 4] x) => (float[1, 8, 4, 4] y)
            {{ h = Conv(x, w)  {body}  y = Conv(t, w) }}""",
            w=draw(8, 8, 1, 1),
        )
        assert silus(model) == []

    def test_a_range_that_is_missing_is_named(
        self, net: onnx.ModelProto, feeds: dict[str, Array]
    ) -> None:
        del (less := measured(net, feeds))["Conv_1:0"]

        with pytest.raises(QuantizationError, match="no range for tensor 'Conv_1:0'"):
            quantize_for_ort(net, less)


class TestTheNumbers:
    def test_are_the_canonical_ones_up_to_the_first_silu(
        self, net: onnx.ModelProto, feeds: dict[str, Array]
    ) -> None:
        canonical = quantize(net, measured(net, feeds))

        want, got = (
            run(each, feeds, inner=[NEAR])[NEAR] for each in (canonical, written(net, feeds))
        )

        np.testing.assert_array_equal(got, want)

    @given(
        factor=st.floats(1e-3, 30),
        shift=st.floats(-8, 8),
        beyond=st.sampled_from([1.0, 3.0]),
    )
    @settings(max_examples=40, deadline=None)
    def test_of_a_silu_are_those_of_its_rounded_input(
        self, factor: float, shift: float, beyond: float
    ) -> None:
        weights = WEIGHTS | {
            "near_weight": np.float32(factor) * WEIGHTS["near_weight"],
            "near_bias": np.full(8, shift * min(factor, 1), np.float32),
        }
        net = parse(SWISH, **weights)
        feeds = {"x": draw(1, 8, 12, 12, seed=5)}
        graph, ranges = written(net, feeds), measured(net, feeds)

        shown = {"x": np.float32(beyond) * feeds["x"]}  # ``beyond`` leaves the calibrated range
        got = run(graph, shown, inner=[NEAR, f"{NEAR}.dequantized", NEAR_OUT])

        rounded = got[f"{NEAR}.dequantized"]

        low, high = max(-ranges[NEAR], TAIL), inverse_silu(ranges[NEAR_OUT])
        scale = (high - low) / 255
        zero = float(passes.GraphView(graph.graph).constant(f"{NEAR}.zero"))
        assert abs(zero + low / scale) < 0.501  # rounded; in float32, so a tie may go either way
        x = got[NEAR].astype(np.float64)
        want = scale * (np.clip(np.rint(x / scale) + zero, 0, 255) - zero)
        # the graph divides in float32: near the middle of two steps it may take the other one
        assert np.abs(rounded - want).max() < 1.001 * scale
        assert np.mean(np.abs(rounded - want) > 0.01 * scale) < 0.01
        # float32, of values up to 100
        np.testing.assert_allclose(got[NEAR_OUT], silu(rounded), rtol=1e-5, atol=1e-6)
        inside = (scale * -zero <= x) & (x <= scale * (255 - zero))
        # half a step, times the slope of SiLU, 1.1 at most; 1 % for the float32 above
        assert np.abs(got[NEAR_OUT] - silu(x))[inside].max() < 1.01 * 1.1 * scale / 2

    @pytest.mark.parametrize("factor", [1e-3, 1.0, 10.0])
    def test_lose_little_more_than_the_canonical_ones(self, factor: float) -> None:
        weights = {name: np.float32(factor) * value for name, value in WEIGHTS.items()}
        net = parse(SWISH, **weights)
        feeds = {"x": draw(4, 8, 12, 12, seed=6)}
        want, canonical = run(net, feeds), quantize(net, measured(net, feeds))

        literal, got = run(deployed(canonical), feeds), run(written(net, feeds), feeds, FUSED)

        for name in want:
            # one more rounding per layer, of the same size: a factor of 1.4 if all are alike
            assert lost(want[name], got[name]) < 2 * lost(want[name], literal[name]) < 0.1, name


class TestWhatOnnxRuntimeRuns:
    def test_are_integer_convolutions_and_one_operator_per_silu(
        self, net: onnx.ModelProto, feeds: dict[str, Array], tmp_path: Path
    ) -> None:
        before = fused(to_unsigned(quantize(net, measured(net, feeds))), feeds, tmp_path)
        after = fused(written(net, feeds), feeds, tmp_path)

        assert (before["QLinearConv"], before["Conv"]) == (0, 3)
        # the last one's output is the graph's, in float: it is float throughout
        assert (after["QLinearConv"], after["Conv"] + after["FusedConv"]) == (2, 1)
        assert (after["QuickGelu"], after["Sigmoid"], after["Mul"]) == (2, 0, 0)

    def test_leaves_float_what_nothing_quantizes_and_what_that_takes_the_reason_from(self) -> None:
        model = parse(
            """<ir_version: 9, opset_import: ["" : 18]>
            g (float[1, 8, 4, 4] x) => (float[1, 8, 4, 4] y) {
                a = Conv(x, w)  b = Sigmoid(a)  c = Mul(a, b)  d = Conv(c, w)  e = Relu(d)
                y = Conv(e, w)
            }""",
            w=draw(8, 8, 1, 1, scale=0.5),
        )
        graph = written(model, {"x": draw(1, 8, 4, 4)})

        view = passes.GraphView(graph.graph)
        convs = [n for n in graph.graph.node if n.op_type == "Conv"]
        assert [view.producer[n.input[0]].op_type for n in convs] == [
            "DequantizeLinear",
            "QuickGelu",  # as the last one reads floats, nobody quantizes behind this one
            "Relu",
        ]
        assert [n.input[1] in view.initializers for n in convs] == [False, True, True]

    @pytest.mark.parametrize(
        ("channels", "size", "layer"),
        [
            (3, 8, "Conv<pads = [1, 1, 1, 1]>(x, stem)"),
            (8, 8, "Conv<group = 8>(x, twice)"),
            (8, 1, "Conv(x, wide)"),
        ],
        ids=["colours", "depthwise with a multiplier", "one pixel"],
    )
    def test_leaves_float_what_is_slower_in_integers(
        self, channels: int, size: int, layer: str
    ) -> None:
        model = parse(
            f"""<ir_version: 9, opset_import: ["" : 18]>
            g (float[n, {channels}, {size}, {size}] x) => (float[n, 16, h, w] y)
            {{ a = {layer}  b = Sigmoid(a)  y = Mul(a, b) }}""",
            stem=draw(16, 3, 3, 3),
            twice=draw(16, 1, 1, 1),
            wide=draw(16, 8, 1, 1),
        )
        assert len(silus(model)) == 2
        assert (
            quantize_for_ort(model, dict.fromkeys([*activations(model), *silus(model)], 1.0))
            is None
        )


@given(value=st.floats(1e-6, 1e4))
def test_the_inverse_of_silu_is_found(value: float) -> None:
    x = inverse_silu(value)

    assert silu(np.array(x)) == pytest.approx(value, rel=1e-9)  # 53 bisections, float64

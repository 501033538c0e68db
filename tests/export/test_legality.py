from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from engineworks.export import passes
from engineworks.export.legality import check_legal
from engineworks.export.quantize import quantize, to_unsigned
from engineworks.runtime.errors import QuantizationError
from tests.export.residual_net import images, measured, residual_net

# One legal layer; every test below breaks one thing in it.
LEGAL = {
    "q": "q = QuantizeLinear(x, s, z)",
    "d": "d = DequantizeLinear(q, s, z)",
    "v": "v = DequantizeLinear <axis = 0> (w, ws, wz)",
    "y": "y = Conv(d, v, b)",
}
CONSTANTS = {
    "s": np.array(0.1, np.float32),
    "z": np.array(0, np.int8),
    "w": np.ones((4, 3, 1, 1), np.int8),
    "ws": np.full(4, 0.1, np.float32),
    "wz": np.zeros(4, np.int8),
    "b": np.zeros(4, np.float32),
}


def layer(
    lines: dict[str, str] | None = None,
    *,
    x: str = "float[1, 3, 4, 4] x",
    y: str = "float[1, 4, 4, 4] y",
    **constants: np.ndarray,
) -> onnx.ModelProto:
    body = "\n".join({**LEGAL, **(lines or {})}.values())
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1, "other" : 1]>
        g ({x}) => ({y}) {{ {body} }}"""
    )
    for name, value in {**CONSTANTS, **constants}.items():
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    model = passes.drop_unused(model)
    for node in model.graph.node:
        node.name = f"{node.op_type}_{node.output[0]}"
    return model


def violations(model: onnx.ModelProto) -> list[str]:
    with pytest.raises(QuantizationError) as caught:
        check_legal(model)
    return [line.strip() for line in caught.value.message.splitlines()[1:]]


class TestALegalGraph:
    def test_passes(self) -> None:
        check_legal(layer())

    def test_is_what_quantize_writes(self) -> None:
        net = passes.prepare(residual_net(bn=True))

        check_legal(quantize(net, measured(net, {"image": images()})))

    def test_may_have_its_pairs_in_the_contrib_domain(self) -> None:
        check_legal(
            layer(
                {
                    "q": "q = com.microsoft.QuantizeLinear(x, s, z)",
                    "d": "d = com.microsoft.DequantizeLinear(q, s, z)",
                }
            )
        )

    def test_may_quantize_float_weights_in_the_graph(self) -> None:
        weight = (
            "u = QuantizeLinear <axis = 0> (f, ws, wz) v = DequantizeLinear <axis = 0> (u, ws, wz)"
        )

        check_legal(layer({"v": weight}, f=np.ones((4, 3, 1, 1), np.float32)))

    def test_may_have_one_scale_for_a_whole_weight(self) -> None:
        check_legal(
            layer(ws=np.array(0.1, np.float32), wz=np.array(0, np.int8)),
        )


BIAS = {"y": "c = DequantizeLinear <axis = 0> (bq, ws, bz) y = Conv(d, v, c)"}
HALF = np.array(0.1, np.float16)


class TestAnIllegalGraph:
    @pytest.mark.parametrize(
        ("model", "want"),
        [
            pytest.param(
                layer({"q": "q = QuantizeLinear(x, s)", "d": "d = DequantizeLinear(q, s, u)"},
                      u=np.array(0, np.uint8)),
                [
                    "QuantizeLinear 'QuantizeLinear_q': has no zero point; "
                    "without one the type is uint8",
                    "QuantizeLinear 'QuantizeLinear_q': the quantized type is uint8; "
                    "only int8 is taken",
                    "DequantizeLinear 'DequantizeLinear_d': the quantized type is uint8; "
                    "only int8 is taken",
                ],
                id="implicit zero point",
            ),
            pytest.param(
                layer({"v": "v = DequantizeLinear <axis = 0> (w, ws)"}),
                [
                    "DequantizeLinear 'DequantizeLinear_v': has no zero point; "
                    "without one the type is uint8"
                ],
                id="implicit zero point of a weight",
            ),
            pytest.param(
                layer(z=np.array(3, np.int8)),
                [
                    f"{op} '{op}_{out}': the zero point is not 0; only symmetric quantization is "
                    "taken"
                    for op, out in (("QuantizeLinear", "q"), ("DequantizeLinear", "d"))
                ],
                id="asymmetric",
            ),
            pytest.param(
                layer({"d": "t = Cast <to = 3> (x0) d = DequantizeLinear(q, s, t)"},
                      x0=np.array(0, np.int32)),
                ["DequantizeLinear 'DequantizeLinear_d': zero point 't' is not a constant"],
                id="computed zero point",
            ),
            pytest.param(
                layer(z=np.array(0, np.uint8)),
                [
                    f"{op} '{op}_{out}': the quantized type is uint8; only int8 is taken"
                    for op, out in (("QuantizeLinear", "q"), ("DequantizeLinear", "d"))
                ],
                id="uint8 activation",
            ),
            pytest.param(
                layer(w=np.ones((4, 3, 1, 1), np.uint8), wz=np.zeros(4, np.uint8)),
                ["DequantizeLinear 'DequantizeLinear_v': the quantized type is uint8; "
                 "only int8 is taken"],
                id="uint8 weight",
            ),
            pytest.param(
                layer(z=np.array(0, np.int16)),
                [
                    f"{op} '{op}_{out}': the quantized type is int16; only int8 is taken"
                    for op, out in (("QuantizeLinear", "q"), ("DequantizeLinear", "d"))
                ],
                id="int16 activation",
            ),
            pytest.param(
                layer(BIAS, bq=np.zeros(4, np.int32), bz=np.zeros(4, np.int32)),
                [
                    "DequantizeLinear 'DequantizeLinear_c': dequantizes int32; "
                    "a bias must stay float",
                    "DequantizeLinear 'DequantizeLinear_c': has one scale per channel, "
                    "but Conv 'Conv_y' has no channels",
                    "Conv 'Conv_y': the bias comes from a DequantizeLinear; it must stay float",
                ],
                id="int32 bias",
            ),
            pytest.param(
                layer(ws=np.array([0.1, 0.0, 0.1, 0.1], np.float32)),
                ["DequantizeLinear 'DequantizeLinear_v': a scale is 0.0; all must be positive"],
                id="scale of a dead channel",
            ),
            pytest.param(
                layer(ws=np.array([0.1, np.inf, 0.1, 0.1], np.float32)),
                ["DequantizeLinear 'DequantizeLinear_v': a scale is not finite"],
                id="infinite scale",
            ),
            pytest.param(
                layer({"d": "t = Identity(s) d = DequantizeLinear(q, t, z)"}),
                [
                    "DequantizeLinear 'DequantizeLinear_d': scale 't' is not a constant",
                    "DequantizeLinear 'DequantizeLinear_d': its scale is not that of "
                    "'QuantizeLinear_q'",
                ],
                id="computed scale",
            ),
            pytest.param(
                layer(s=np.full(3, 0.1, np.float32), z=np.zeros(3, np.int8)),
                [
                    f"{op} '{op}_{out}': an activation has 3 scales; "
                    "only weights have one per channel"
                    for op, out in (("QuantizeLinear", "q"), ("DequantizeLinear", "d"))
                ],
                id="activation per channel",
            ),
            pytest.param(
                layer(
                    {"v": "v = DequantizeLinear <axis = 1> (w, ws, wz)"},
                    ws=np.full(3, 0.1, np.float32), wz=np.zeros(3, np.int8),
                ),
                [
                    "DequantizeLinear 'DequantizeLinear_v': has its scales on axis 1; the output "
                    "channels of Conv 'Conv_y' are on axis 0"
                ],
                id="weight axis",
            ),
            pytest.param(
                layer(
                    {"v": "v = DequantizeLinear <axis = 0> (w, ws, wz)", "y": "y = MatMul(d, v)"},
                    x="float[2, 4] x", y="float[2, 3] y", w=np.ones((4, 3), np.int8),
                ),
                [
                    "DequantizeLinear 'DequantizeLinear_v': has its scales on axis 0; the output "
                    "channels of MatMul 'MatMul_y' are on axis 1"
                ],
                id="weight axis of a product",
            ),
            pytest.param(
                layer(ws=np.full(3, 0.1, np.float32), wz=np.zeros(3, np.int8)),
                ["DequantizeLinear 'DequantizeLinear_v': has 3 scales for 4 channels on axis 0"],
                id="scale count",
            ),
            pytest.param(
                layer(wz=np.array(0, np.int8)),
                ["DequantizeLinear 'DequantizeLinear_v': scales have shape [4], zero points []"],
                id="zero point shape",
            ),
            pytest.param(
                layer({"d": "r = Relu(q) d = DequantizeLinear(r, s, z)"}),
                [
                    "QuantizeLinear 'QuantizeLinear_q': the quantized tensor goes into Relu "
                    "'Relu_r'"
                ],
                id="arithmetic on int8",
            ),
            pytest.param(
                layer(y="float[1, 4, 4, 4] y, int8[1, 3, 4, 4] q"),
                [
                    "QuantizeLinear 'QuantizeLinear_q': the quantized tensor is an output of the "
                    "graph"
                ],
                id="int8 output",
            ),
            pytest.param(
                layer({"d": "d = DequantizeLinear(q, s2, z)"}, s2=np.array(0.2, np.float32)),
                [
                    "DequantizeLinear 'DequantizeLinear_d': its scale is not that of "
                    "'QuantizeLinear_q'"
                ],
                id="unlike scales",
            ),
            pytest.param(
                layer(
                    {"v": "", "d": "", "y": "y = QLinearConv(q, s, z, w, ws, wz, s, z)"},
                    y="int8[1, 4, 4, 4] y",
                ),
                [
                    "QuantizeLinear 'QuantizeLinear_q': the quantized tensor goes into "
                    "QLinearConv 'QLinearConv_y'",
                    "QLinearConv 'QLinearConv_y': integer operators are not taken; write "
                    "QuantizeLinear/DequantizeLinear pairs",
                ],
                id="QOperator",
            ),
            pytest.param(
                layer(
                    {"q": "q, s0, z0 = DynamicQuantizeLinear(x)", "d": "", "v": "",
                     "y": "y = MatMulInteger(q, w)"},
                    x="float[2, 4] x", y="int32[2, 3] y", w=np.ones((4, 3), np.int8),
                ),
                [
                    f"{op} '{op}_{out}': integer operators are not taken; write "
                    "QuantizeLinear/DequantizeLinear pairs"
                    for op, out in (("DynamicQuantizeLinear", "q"), ("MatMulInteger", "y"))
                ],
                id="dynamic quantization",
            ),
            pytest.param(
                layer({"y": "h = Conv(d, v, b) y = other.Magic(h)"}),
                ["Magic 'Magic_y': domain 'other' is not known to TensorRT"],
                id="unknown domain",
            ),
            pytest.param(
                layer({"y": "h = Conv(d, v, b) y = Unique(h)"}, y="float[n] y"),
                ["Unique 'Unique_y': TensorRT does not have this operator"],
                id="operator",
            ),
            pytest.param(
                layer({"y": "h = Conv(d, v, b) y = Add(h, c)"}, c=HALF),
                ["Add 'Add_y': its inputs mix float and float16; put a Cast between"],
                id="mixed floats",
            ),
            pytest.param(
                layer({"y": "h = Conv(d, v, b) y = Cast <to = 11> (h)"}, y="double[1, 4, 4, 4] y"),
                ["Cast 'Cast_y': works on float64, which TensorRT does not have"],
                id="float64",
            ),
        ],
    )  # fmt: skip
    def test_is_refused_with_exactly_the_broken_rules(
        self, model: onnx.ModelProto, want: list[str]
    ) -> None:
        assert violations(model) == want

    def test_with_contradicting_shapes_is_refused_as_invalid(self) -> None:
        model = layer({"y": "h = Conv(d, v, b) y = MatMul(h, m)"}, m=np.ones((5, 4), np.float32))

        with pytest.raises(QuantizationError, match="not valid ONNX"):
            check_legal(model)

    def test_that_breaks_many_rules_is_told_all_of_them(self) -> None:
        net = passes.prepare(residual_net(bn=True))
        canonical = quantize(net, measured(net, {"image": images()}))

        assert len(violations(to_unsigned(canonical))) > 20


class TestTensorRT:
    @pytest.mark.trt_builder
    def test_builds_what_quantize_writes(self) -> None:
        trt = pytest.importorskip("tensorrt")
        net = passes.prepare(residual_net(bn=True))
        canonical = quantize(net, measured(net, {"image": images()}))

        logger = trt.Logger(trt.Logger.WARNING)
        builder = trt.Builder(logger)
        network = builder.create_network(0)
        parser = trt.OnnxParser(network, logger)
        parsed = parser.parse(canonical.SerializeToString())

        assert parsed, [parser.get_error(i).desc() for i in range(parser.num_errors)]
        config = builder.create_builder_config()
        profile = builder.create_optimization_profile()
        profile.set_shape("image", (1, 3, 32, 32), (1, 3, 32, 32), (4, 3, 32, 32))
        config.add_optimization_profile(profile)
        assert builder.build_serialized_network(network, config) is not None

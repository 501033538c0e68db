"""Small ONNX graphs, float and INT8, that answer to the drawn pictures."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from engineworks.runtime.tensors import Array
from engineworks.runtime.testing.drawings import OBJECT, SENSOR

STRIDE = 8  # pixels of the input per patch of the tiny graph
WIDTH = 16  # of its features
REFERENCE = 32  # side of the pictures that the tiny encoder takes
_NUM_CANDIDATES = 16
_IMAGE_AMAX, _HIDDEN_AMAX = 3.0, 8.0  # more than drawn images reach, for the INT8 graphs


def tiny_features(
    size: tuple[int, int] = (64, 64), *, zero_point: int | None = None, seed: int = 0
) -> onnx.ModelProto:
    """Two convolutions with drawn weights, then a mean over pixels.

    Args:
        size: (height, width) of the input, multiples of 8.
        zero_point: None for the float graph; 0 for canonical int8 Q/DQ pairs, 128 for the same
            numbers with uint8 activations.
        seed: of the weights.

    Returns:
        images (batch, 3, H, W) float32 -> features (batch, H / 8 * W / 8, 16) float32.
    """
    rng = np.random.default_rng(seed)
    net = _Net(zero_point)
    x = net.trunk(rng)
    x = net.add("AveragePool", "pool", [x], kernel_shape=[2, 2], strides=[2, 2])
    shape = net.constant("shape", np.array([0, WIDTH, -1], np.int64))
    x = net.add("Reshape", "flatten", [x, shape])
    net.add("Transpose", "transpose", [x], output="features", perm=[0, 2, 1])
    patches = size[0] // STRIDE * (size[1] // STRIDE)
    outputs = {"features": ("batch", patches, WIDTH)}
    return net.model({"images": ("batch", 3, *size)}, outputs)


def tiny_maps(
    size: tuple[int, int] = (64, 64), *, zero_point: int | None = None, seed: int = 0
) -> onnx.ModelProto:
    """Two convolutions with drawn weights, then a mean over 2 x 2.

    Args:
        size, zero_point, seed: see ``tiny_features``.

    Returns:
        images (batch, 3, H, W) float32 -> map (batch, 16, H / 8, W / 8) float32.
    """
    net = _Net(zero_point)
    x = net.trunk(np.random.default_rng(seed))
    net.add("AveragePool", "pool", [x], output="map", kernel_shape=[2, 2], strides=[2, 2])
    outputs = {"map": ("batch", WIDTH, size[0] // STRIDE, size[1] // STRIDE)}
    return net.model({"images": ("batch", 3, *size)}, outputs)


def tiny_classifier(
    size: tuple[int, int],
    weight_CF: Array,
    bias_C: Array,
    *,
    zero_point: int | None = None,
    seed: int = 0,
) -> onnx.ModelProto:
    """Two convolutions with drawn weights, a mean over pixels, and a given linear classifier.

    Args:
        size: (height, width) of the input, multiples of 4.
        weight_CF, bias_C: (C, 16) and (C,) of the classifier.
        zero_point, seed: see ``tiny_features``; the classifier is quantized as well.

    Returns:
        images (batch, 3, H, W) -> logits (batch, C), embedding (batch, 16), all float32.
    """
    net = _Net(zero_point)
    x = net.trunk(np.random.default_rng(seed))
    x = net.add("GlobalAveragePool", "pool", [x])
    x = net.add("Flatten", "flatten", [x], output="embedding", axis=1)
    net.linear("classifier", x, weight_CF, bias_C, _HIDDEN_AMAX, output="logits")
    outputs = {"logits": ("batch", len(weight_CF)), "embedding": ("batch", WIDTH)}
    return net.model({"images": ("batch", 3, *size)}, outputs)


def tiny_segment(*, zero_point: int | None = None) -> onnx.ModelProto:
    """The smaller of a target's differences to two references, smoothed, as a logit per pixel.

    min(u, v) = u - relu(u - v), once for what is brighter and once for what is darker.

    Args:
        zero_point: see ``tiny_features``.

    Returns:
        planes (batch, 3, height, width) -> logits (batch, 1, height, width), both float32: 0 where
        the target differs by 15 from both, rising by 0.4 per unit.
    """
    net = _Net(zero_point)
    differences = np.array([[1, -1, 0], [1, 0, -1], [-1, 1, 0], [-1, 0, 1]])
    smoothing = np.outer([1, 2, 1], [1, 2, 1]) / 16
    weight = differences[:, :, None, None] * smoothing
    x = net.conv("conv1", "planes", weight, 1, SENSOR[1], pad=1)
    x = net.add("Relu", "relu1", [x])
    parts = np.array([[1, 0, 0, 0], [1, -1, 0, 0], [0, 0, 1, 0], [0, 0, 1, -1]])
    x = net.conv("conv2", x, parts[:, :, None, None], 1, SENSOR[1])
    x = net.add("Relu", "relu2", [x])
    x = net.conv("conv3", x, 0.4 * np.array([[1, -1, 1, -1]])[:, :, None, None], 1, SENSOR[1])
    bias = net.constant("bias", np.array(-6, np.float32))
    net.add("Add", "add", [x, bias], output="logits")
    sides = ("height", "width")
    outputs = {"logits": ("batch", 1, *sides)}
    return net.model({"planes": ("batch", 3, *sides)}, outputs)


def tiny_encode(*, zero_point: int | None = None) -> onnx.ModelProto:
    """The mean colour of a picture, as the direction in which it lies from grey.

    Args:
        zero_point: see ``tiny_features``.

    Returns:
        images (batch, 3, 32, 32) -> prototypes (batch, 6), both float32: two equal parts.
    """
    net = _Net(zero_point)
    x = net.add("GlobalAveragePool", "pool", [net.cells()])
    x = net.add("Flatten", "flatten", [x], axis=1)
    x = net.unit("unit", x, 1e-6)
    net.add("Concat", "both", [x, x], output="prototypes", axis=1)
    inputs = {"images": ("batch", 3, REFERENCE, REFERENCE)}
    return net.model(inputs, {"prototypes": ("batch", 6)})


def tiny_detect(
    size: tuple[int, int] = (64, 96), *, zero_point: int | None = None
) -> onnx.ModelProto:
    """Places whose 3 x 3 cells of 8 x 8 pixels have the colour of a prototype.

    Args:
        size: (height, width) of the input, multiples of 8.
        zero_point: see ``tiny_features``.

    Returns:
        images (batch, 3, H, W) and prototypes (objects, 6), float32 -> boxes (batch, 16, 4) and
        scores (batch, 16) float32, classes (batch, 16) int64.
    """
    rows, columns = size[0] // STRIDE, size[1] // STRIDE
    net = _Net(zero_point)
    x = net.unit("unit", net.cells(), 0.2)  # what is nearly grey stays short
    flat = net.constant("flat", np.array([0, 0, -1], np.int64))
    x = net.add("Reshape", "flatten", [x, flat])
    x = net.add("Concat", "both", [x, x], axis=1)
    x = net.add("MatMul", "compare", ["prototypes", x])
    map_shape = net.constant("map", np.array([0, 0, rows, columns], np.int64))
    x = net.add("Reshape", "unflatten", [x, map_shape])
    x = net.add(
        *("AveragePool", "smooth", [x]),
        kernel_shape=[3, 3],
        pads=[1, 1, 1, 1],
        count_include_pad=1,
    )
    # two equal parts make a similarity of up to 2
    x = net.add("Mul", "sharpen", [x, net.constant("slope", np.array(10, np.float32))])
    x = net.add("Add", "shift", [x, net.constant("border", np.array(-14, np.float32))])
    x = net.add("Reshape", "list", [net.add("Sigmoid", "sigmoid", [x]), flat])
    axis = net.constant("axis", np.array([1], np.int64))
    best = net.add("ReduceMax", "best", [x, axis], keepdims=0)
    kind = net.add("ArgMax", "kind", [x], axis=1, keepdims=0)
    count = net.constant("count", np.array([_NUM_CANDIDATES], np.int64))
    net.add("TopK", "top", [best, count], output="scores", more=["places"], axis=1)
    centres = STRIDE * (np.indices((columns, rows)).transpose(2, 1, 0) + 0.5)
    half = STRIDE * OBJECT / 2
    grid = np.concatenate([centres - half, centres + half], axis=-1)
    anchors = net.constant("anchors", grid.reshape(-1, 4).astype(np.float32))
    net.add("Gather", "boxes", [anchors, "places"], output="boxes", axis=0)
    net.add("GatherElements", "classes", [kind, "places"], output="classes", axis=1)
    return net.model(
        {"images": ("batch", 3, *size), "prototypes": ("objects", 6)},
        {
            "boxes": ("batch", _NUM_CANDIDATES, 4),
            "scores": ("batch", _NUM_CANDIDATES),
            "classes": ("batch", _NUM_CANDIDATES),
        },
        integers=("classes",),
    )


class _Net:
    """Collects the nodes of a small graph."""

    def __init__(self, zero_point: int | None) -> None:
        self._zero_point = zero_point
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []

    def constant(self, name: str, value: Array) -> str:
        self._constants.append(numpy_helper.from_array(value, name))
        return name

    def add(
        self,
        op_type: str,
        name: str,
        inputs: Sequence[str],
        *,
        output: str | None = None,
        more: Sequence[str] = (),
        **attributes: int | Sequence[int],
    ) -> str:
        """A node; returns its first output's name, ``more`` are those of further ones."""
        output = output or f"{name}.out"
        outputs = [output, *more]
        self._nodes.append(helper.make_node(op_type, inputs, outputs, name=name, **attributes))
        return output

    def trunk(self, rng: np.random.Generator) -> str:
        """Two convolutions: (batch, 3, H, W) ``images`` -> (batch, 16, H / 4, W / 4)."""
        x = self.conv("conv1", "images", rng.normal(0, 0.2, (12, 3, 4, 4)), 4, _IMAGE_AMAX)
        x = self.add("Relu", "relu1", [x])
        x = self.conv("conv2", x, rng.normal(0, 0.3, (WIDTH, 12, 1, 1)), 1, _HIDDEN_AMAX)
        return self.add("Relu", "relu2", [x])

    def cells(self) -> str:
        """Mean colours of ``images`` in cells of 8 x 8 pixels: (batch, 3, H / 8, W / 8)."""
        weight = np.eye(3)[:, :, None, None] * np.full((STRIDE, STRIDE), STRIDE**-2.0)
        return self.conv("cells", "images", weight, STRIDE, 1)

    def unit(self, name: str, x: str, softness: float) -> str:
        """Axis 1 divided by its length, which ``softness`` is added to."""
        axis = self.constant(f"{name}.axis", np.array([1], np.int64))
        length = self.add("ReduceL2", f"{name}.length", [x, axis], keepdims=1)
        soft = self.constant(f"{name}.softness", np.array(softness, np.float32))
        return self.add("Div", name, [x, self.add("Add", f"{name}.sum", [length, soft])])

    def conv(
        self, name: str, x: str, weight: Array, stride: int, amax: float, *, pad: int = 0
    ) -> str:
        """A convolution of ``x``; see ``_quantized``."""
        inputs = self._quantized(name, x, weight, amax)
        kernel, strides, pads = list(weight.shape[2:]), [stride] * 2, [pad] * 4
        return self.add("Conv", name, inputs, kernel_shape=kernel, strides=strides, pads=pads)

    def linear(
        self, name: str, x: str, weight: Array, bias: Array, amax: float, *, output: str
    ) -> str:
        """``x @ weight.T + bias``; see ``_quantized``."""
        inputs = self._quantized(name, x, weight, amax)
        inputs.append(self.constant(f"{name}.bias", bias.astype(np.float32)))
        return self.add("Gemm", name, inputs, output=output, transB=1)

    def _quantized(self, name: str, x: str, weight: Array, amax: float) -> list[str]:
        """``x`` and ``weight``, in a quantized graph behind Q/DQ of the one and DQ of the other."""
        values = weight.astype(np.float32)
        if self._zero_point is None:
            return [x, self.constant(f"{name}.weight", values)]
        dtype = np.int8 if self._zero_point == 0 else np.uint8
        pair = [
            self.constant(f"{x}.scale", np.asarray(amax / 127, np.float32)),
            self.constant(f"{x}.zero", np.asarray(self._zero_point, dtype)),
        ]
        q = self.add("QuantizeLinear", f"{x}.quantize", [x, *pair])
        x = self.add("DequantizeLinear", f"{x}.dequantize", [q, *pair])
        scale = np.abs(values).reshape(len(values), -1).max(axis=1) / np.float32(127)
        steps = np.rint(values / scale.reshape(-1, *[1] * (values.ndim - 1))).astype(np.int8)
        parts = {"int8": steps, "scale": scale, "zero": np.zeros(scale.shape, np.int8)}
        names = [self.constant(f"{name}.weight.{k}", v) for k, v in parts.items()]
        return [x, self.add("DequantizeLinear", f"{name}.weight.dequantize", names, axis=0)]

    def model(
        self,
        inputs: Mapping[str, Sequence[int | str]],
        outputs: Mapping[str, Sequence[int | str]],
        integers: Collection[str] = (),
    ) -> onnx.ModelProto:
        """The graph from inputs to outputs, float32 but those named as integers, int64."""
        ends = [
            [
                helper.make_tensor_value_info(
                    name, TensorProto.INT64 if name in integers else TensorProto.FLOAT, shape
                )
                for name, shape in end.items()
            ]
            for end in (inputs, outputs)
        ]
        graph = helper.make_graph(self._nodes, "tiny", *ends, self._constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        return onnx.shape_inference.infer_shapes(model, strict_mode=True)

"""A small residual net as a timm ResNet is exported: stem, pool, two blocks, a classifier."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from engineworks.export.quantize import activations
from engineworks.runtime.engines import products_overflow
from engineworks.runtime.overflow import narrow

LITERAL = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
FUSED = ort.GraphOptimizationLevel.ORT_ENABLE_ALL


class Builder:
    """Adds torch-like layers to a graph; weights are drawn, activations keep their size."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, np.ndarray] = {}

    def add(self, op_type: str, inputs: list[str], out: str | None = None, **attributes) -> str:
        out = out or f"val_{len(self.nodes)}"
        name = f"node_{op_type}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [out], name=name, **attributes))
        return out

    def constant(self, name: str, value: np.ndarray) -> str:
        self.initializers[name] = np.asarray(value, np.float32)
        return name

    def conv(
        self, path: str, x: str, c_in: int, c_out: int, size: int, *, bn: bool, stride=1
    ) -> str:
        fan = c_in * size * size
        weight = self.rng.normal(0, np.sqrt(2 / fan), (c_out, c_in, size, size))
        inputs = [x, self.constant(f"{path}.weight", weight)]
        if not bn:
            inputs.append(self.constant(f"{path}.bias", self.rng.normal(0, 0.1, c_out)))
        pads = [size // 2] * 4
        y = self.add("Conv", inputs, kernel_shape=[size, size], pads=pads, strides=[stride, stride])
        if bn:
            draws = {
                "weight": self.rng.uniform(0.5, 1.5, c_out),
                "bias": self.rng.normal(0, 0.1, c_out),
                "running_mean": self.rng.normal(0, 0.1, c_out),
                "running_var": self.rng.uniform(0.5, 1.5, c_out),
            }
            named = [self.constant(f"{path}_bn.{key}", value) for key, value in draws.items()]
            y = self.add("BatchNormalization", [y, *named], epsilon=1e-5)
        return y

    def model(self, outputs: dict[str, list[int | str]], image: list[int | str]) -> onnx.ModelProto:
        value = helper.make_tensor_value_info
        graph = helper.make_graph(
            self.nodes,
            "residual",
            [value("image", TensorProto.FLOAT, image)],
            [value(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
            [numpy_helper.from_array(v, k) for k, v in self.initializers.items()],
        )
        opset = helper.make_opsetid("", 18)
        return helper.make_model(graph, opset_imports=[opset], ir_version=9)


def residual_net(seed: int = 0, *, bn: bool = False) -> onnx.ModelProto:
    """image (batch, 3, 32, 32) -> layer1 (batch, 16, 8, 8), layer2 (batch, 24, 4, 4), logits."""
    b = Builder(seed)
    x = b.add("Relu", [b.conv("conv1", "image", 3, 16, 3, bn=bn, stride=2)])
    x = b.add("MaxPool", [x], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    y = b.add("Relu", [b.conv("layer1.0.conv1", x, 16, 16, 3, bn=bn)])
    y = b.conv("layer1.0.conv2", y, 16, 16, 3, bn=bn)
    x = b.add("Relu", [b.add("Add", [y, x])], "layer1")
    y = b.add("Relu", [b.conv("layer2.0.conv1", x, 16, 24, 3, bn=bn, stride=2)])
    y = b.conv("layer2.0.conv2", y, 24, 24, 3, bn=bn)
    short = b.conv("layer2.0.downsample.0", x, 16, 24, 1, bn=bn, stride=2)
    x = b.add("Relu", [b.add("Add", [y, short])])
    y = b.add("Relu", [b.conv("layer2.1.conv1", x, 24, 24, 3, bn=bn)])
    y = b.conv("layer2.1.conv2", y, 24, 24, 3, bn=bn)
    x = b.add("Relu", [b.add("Add", [y, x])], "layer2")
    x = b.add("Flatten", [b.add("GlobalAveragePool", [x])])
    weight = b.constant("fc.weight", b.rng.normal(0, 0.2, (10, 24)))
    bias = b.constant("fc.bias", b.rng.normal(0, 0.1, 10))
    b.add("Gemm", [x, weight, bias], "logits", transB=1)
    shapes = {"layer1": ["batch", 16, 8, 8], "layer2": ["batch", 24, 4, 4], "logits": ["batch", 10]}
    return b.model(shapes, ["batch", 3, 32, 32])


def images(seed: int = 0, num: int = 2) -> np.ndarray:
    """(num, 3, 32, 32) float32 with the size and the smoothness of normalised pictures."""
    coarse = np.random.default_rng(seed).normal(0, 1, (num, 3, 8, 8))
    return np.repeat(np.repeat(coarse, 4, axis=2), 4, axis=3).astype(np.float32)


def deployed(model: onnx.ModelProto) -> onnx.ModelProto:
    """A Q/DQ graph as engines open it on this processor: weights of 7 bits where sums overflow."""
    if not products_overflow("ort"):
        return model
    return onnx.load_from_string(narrow(model.SerializeToString())[0])


def run(
    model: onnx.ModelProto,
    feeds: dict[str, np.ndarray],
    level: ort.GraphOptimizationLevel = LITERAL,
    *,
    inner: list[str] | None = None,
    optimized: Path | None = None,
) -> dict[str, np.ndarray]:
    """Outputs, and the inner tensors asked for; one thread, so sums keep their order."""
    exposed = onnx.ModelProto()
    exposed.CopyFrom(deployed(model) if level == FUSED else model)
    for name in inner or []:
        exposed.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if optimized:
        options.optimized_model_filepath = str(optimized)
    session = ort.InferenceSession(exposed.SerializeToString(), options)
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def measured(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> dict[str, float]:
    """Largest magnitude of every tensor that needs a range."""
    names = activations(model)
    outputs = {value.name for value in model.graph.output}
    inner = [name for name in names if name not in feeds and name not in outputs]
    values = run(model, feeds, inner=inner) | feeds
    return {name: float(np.abs(values[name]).max()) for name in names}

"""Small graphs that the engines' tests run, and what they compute."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from engineworks.runtime.tensors import Array

# smallest, usual and largest size of a free axis in a plan
PROFILE = (1, 2, 16)

ADD_ONE = """<ir_version: 9, opset_import: ["" : 18]>
add_one (float[batch, 3] x, int64[batch] n) => (float[batch, 3] y, int64[batch] m)
<float one = {1.0}, int64 two = {2}> { y = Add(x, one)  m = Add(n, two) }"""

# names that a backend may lose when it merges tensors that are the same
SAME = """<ir_version: 9, opset_import: ["" : 18]>
same (float[batch, 3] x) => (float[batch, 3] y, float[batch, 3] z, float[batch, 3] w)
{ y = Identity(x)  z = Relu(y)  w = Identity(z) }"""


def parse(text: str) -> bytes:
    content: bytes = onnx.parser.parse_model(text).SerializeToString()
    return content


def conv_net() -> tuple[bytes, dict[str, Array]]:
    """conv 3x3 -> relu -> conv 1x1 of stride 2, float32, any batch."""
    rng = np.random.default_rng(0)
    weights = {
        "w0": rng.standard_normal((32, 3, 3, 3)).astype(np.float32),
        "b0": rng.standard_normal(32).astype(np.float32),
        "w1": rng.standard_normal((16, 32, 1, 1)).astype(np.float32),
    }
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w0", "b0"], ["a"], pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["a"], ["r"]),
            helper.make_node("Conv", ["r", "w1"], ["y"], strides=[2, 2]),
        ],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 10, 10])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 16, 5, 5])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return bytes(model.SerializeToString()), weights


def conv_net_in_float64(x_BCHW: Array, weights: dict[str, Array]) -> Array:
    x = np.pad(x_BCHW.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(2, 3))
    hidden = np.einsum("bchwij,ocij->bohw", windows, weights["w0"].astype(np.float64))
    hidden = np.maximum(hidden + weights["b0"][:, None, None], 0)
    return np.asarray(np.einsum("bchw,oc->bohw", hidden, weights["w1"][:, :, 0, 0]))[..., ::2, ::2]


def feeds(batch: int = 2) -> dict[str, Array]:
    """Inputs of ADD_ONE."""
    x = np.arange(3 * batch, dtype=np.float32).reshape(batch, 3)
    return {"x": x, "n": np.arange(batch)}


def ranges(model: bytes) -> dict[str, list[tuple[int, ...]]]:
    """Profile for a graph: input -> its smallest, usual and largest shape."""
    return {
        value.name: [
            tuple(axis.dim_value or size for axis in value.type.tensor_type.shape.dim)
            for size in PROFILE
        ]
        for value in onnx.load_from_string(model).graph.input
    }


def as_plan(model: bytes) -> bytes:
    """Built by the TensorRT that is installed, for the GPU that is here."""
    from engineworks.export.plan import build_plan
    from engineworks.runtime.plans import PlanConfig, ShapeRange

    profile = {name: ShapeRange(*shapes) for name, shapes in ranges(model).items()}
    return build_plan(model, PlanConfig(tf32=False), [profile]).data

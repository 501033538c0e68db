"""INT8 products that would not fit into 16 bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from engineworks.runtime import engines, overflow
from engineworks.runtime.engines import open_engine, products_overflow
from engineworks.runtime.tensors import Array

CHANNELS, OUT = 32, 8
BACKENDS = ("ort", "openvino")


def layer(weights_OCHW: Array, zero: np.generic, *, top: int | None = None) -> bytes:
    """A quantized convolution of steps 1; with ``top``, its input is clipped behind quantizing."""
    values: dict[str, Array] = {
        "scale": np.asarray(1, np.float32),
        "zero": np.asarray(zero),
        "weights": weights_OCHW,
        "steps": np.ones(len(weights_OCHW), np.float32),
        "zeros": np.zeros(len(weights_OCHW), np.int8),
    }
    nodes = [helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"])]
    read = "q"
    if top is not None:
        values["top"] = np.asarray(top, np.uint8)
        nodes.append(helper.make_node("Clip", ["q", "", "top"], ["clipped"]))
        nodes.append(helper.make_node("MaxPool", ["clipped"], ["pooled"], kernel_shape=[1, 1]))
        read = "pooled"
    nodes += [
        helper.make_node("DequantizeLinear", [read, "scale", "zero"], ["dq"]),
        helper.make_node("DequantizeLinear", ["weights", "steps", "zeros"], ["w"], axis=0),
        helper.make_node("Conv", ["dq", "w"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, CHANNELS, 4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, OUT, 4, 4])],
        [numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def weights(limit: int, seed: int = 0) -> Array:
    values = np.random.default_rng(seed).integers(-limit, limit + 1, (OUT, CHANNELS, 1, 1))
    values[0, 0] = limit
    return values.astype(np.int8)


def constants(model: bytes) -> dict[str, Array]:
    graph = onnx.load_from_string(model).graph
    return {value.name: numpy_helper.to_array(value) for value in graph.initializer}


def worst_pair(weights_OCHW: Array, largest: int) -> int:
    """The largest magnitude that two products can add up to."""
    return int(2 * largest * np.abs(weights_OCHW.astype(np.int64)).max())


class TestNarrow:
    @given(st.integers(65, 127), st.integers(0, 2**32 - 1))
    def test_products_fit_into_16_bits_and_weights_move_by_half_a_step_at_most(
        self, limit: int, seed: int
    ) -> None:
        before = weights(limit, seed)
        content, rounded = overflow.narrow(layer(before, np.uint8(128)))
        assert rounded == 1
        found = constants(content)
        halves = next(value for name, value in found.items() if name.endswith(".7bit0"))
        steps = next(value for name, value in found.items() if name.endswith(".7bit1"))
        assert worst_pair(halves, 255) <= np.iinfo(np.int16).max
        moved = halves.astype(np.float64) * steps[:, None, None, None] - before
        assert np.abs(moved).max() <= 1  # of steps of 1 that are steps of 2 now
        assert "weights" not in found

    @pytest.mark.parametrize("zero", [np.int8(0), np.uint8(128), np.uint8(0), np.uint8(3)])
    def test_activations_of_8_bits_need_it(self, zero: np.generic) -> None:
        assert overflow.narrow(layer(weights(127), zero))[1] == 1

    @pytest.mark.parametrize(("top", "rounded"), [(127, 0), (100, 0), (128, 1)])
    def test_unsigned_ones_of_7_bits_do_not(self, top: int, rounded: int) -> None:
        model = layer(weights(127), np.uint8(0), top=top)
        content, found = overflow.narrow(model)
        assert found == rounded
        if not rounded:
            assert constants(content).keys() == constants(model).keys()
        # a clip from another zero point does not bound what is added up
        assert overflow.narrow(layer(weights(127), np.uint8(1), top=top))[1] == 1

    @pytest.mark.parametrize(("zero", "rounded"), [(np.uint8(128), 1), (np.uint8(0), 0)])
    def test_looks_through_what_only_passes_on(self, zero: np.generic, rounded: int) -> None:
        """A convolution behind a join of maps runs in integers, too."""
        model = onnx.load_from_string(layer(weights(127), zero, top=127))
        conv = model.graph.node.pop()
        half = helper.make_node("Split", ["dq"], ["left", "right"], axis=1, num_outputs=2)
        joined = helper.make_node("Concat", ["right", "left"], ["joined"], axis=1)
        conv.input[0] = "joined"
        model.graph.node.extend([half, joined, conv])
        onnx.checker.check_model(model)
        assert overflow.narrow(model.SerializeToString())[1] == rounded

    def test_behind_a_float_layer_weights_stay(self) -> None:
        model = onnx.load_from_string(layer(weights(127), np.uint8(128)))
        conv = model.graph.node.pop()
        gate = helper.make_node("Sigmoid", ["dq"], ["gate"])
        conv.input[0] = "gate"
        model.graph.node.extend([gate, conv])
        assert overflow.narrow(model.SerializeToString())[1] == 0

    def test_weights_of_7_bits_stay(self) -> None:
        assert overflow.narrow(layer(weights(64), np.uint8(128)))[1] == 0

    def test_once_is_enough(self) -> None:
        once, _ = overflow.narrow(layer(weights(127), np.uint8(128)))
        assert overflow.narrow(once)[1] == 0

    def test_a_float_graph_stays(self) -> None:
        model = onnx.load_from_string(layer(weights(127), np.uint8(128)))
        del model.graph.node[:2]
        model.graph.node[-1].input[0] = "x"
        assert overflow.narrow(model.SerializeToString())[1] == 0


@pytest.mark.parametrize("backend", BACKENDS)
class TestWhatAnEngineAnswers:
    def test_is_the_sum_of_the_products(self, backend: str) -> None:
        """On every processor: exact weights where sums fit, weights of 7 bits where they do not."""
        values = weights(127)
        values[:] = np.where(np.arange(OUT) % 2, 127, -127)[:, None, None, None]  # saturates first
        images = np.full((1, CHANNELS, 4, 4), 127, np.float32)
        engine = open_engine(layer(values, np.uint8(128)), backend, precision="int8", threads=1)
        told = engine.run({"x": images})["y"]
        used = 2 * np.rint(values / 2) if products_overflow(backend) else values.astype(float)
        wanted = np.einsum("bchw,oc->bohw", images.astype(np.float64), used[:, :, 0, 0])
        np.testing.assert_allclose(told, wanted, rtol=1e-6)

    def test_a_float_engine_is_left_alone(
        self, backend: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(engines, "products_overflow", lambda _: True)
        values = weights(127)
        images = np.full((1, CHANNELS, 4, 4), 1, np.float32)
        model = onnx.load_from_string(layer(values, np.uint8(128)))
        del model.graph.node[:2]
        model.graph.node[-1].input[0] = "x"
        engine = open_engine(model.SerializeToString(), backend, threads=1)
        wanted = np.einsum("bchw,oc->bohw", images, values[:, :, 0, 0].astype(np.float32))
        np.testing.assert_allclose(engine.run({"x": images})["y"], wanted, rtol=1e-5)


def test_of_a_file_as_of_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "products_overflow", lambda _: True)
    file = tmp_path / "layer.onnx"
    file.write_bytes(layer(weights(127), np.uint8(128)))
    feeds = {"x": np.full((1, CHANNELS, 4, 4), 100, np.float32)}
    answers = [
        open_engine(model, "ort", precision="int8", threads=1).run(feeds)["y"]
        for model in (file, file.read_bytes())
    ]
    np.testing.assert_array_equal(*answers)


def test_vnni_needs_none_of_it() -> None:
    """What the probe finds agrees with what the processor says of itself."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file() or "avx2" not in cpuinfo.read_text():
        pytest.skip("no x86 processor with AVX2, or no /proc")
    flags = set(cpuinfo.read_text().split())
    has = bool(flags & {"avx_vnni", "avx512_vnni"})
    assert [products_overflow(backend) for backend in BACKENDS] == [not has, not has]

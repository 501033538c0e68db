from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from runtime.engines import BACKENDS, Engine, check_backend, open_engine
from runtime.errors import BackendError, EngineError, InputError, UsageError
from runtime.tensors import Array, TensorSpec
from runtime.threads import available_threads

ROOT = Path(__file__).parents[2]

ADD_ONE = """<ir_version: 9, opset_import: ["" : 18]>
add_one (float[batch, 3] x, int64[batch] n) => (float[batch, 3] y, int64[batch] m)
<float one = {1.0}, int64 two = {2}> { y = Add(x, one)  m = Add(n, two) }"""

# names that a backend may lose when it merges tensors that are the same
SAME = """<ir_version: 9, opset_import: ["" : 18]>
same (float[batch, 3] x) => (float[batch, 3] y, float[batch, 3] z, float[batch, 3] w)
{ y = Identity(x)  z = Relu(y)  w = Identity(z) }"""

MANY_DTYPES = """<ir_version: 9, opset_import: ["" : 18]>
dtypes (float[2] f, double[2] d, uint8[2] u, int8[2] i, int32[2] l, float16[2] h)
 => (double[2] a, float[2] b, int8[2] c, uint8[2] e, int64[2] g, float[2] k)
{ a = Cast<to = 11>(f)  b = Cast<to = 1>(d)  c = Cast<to = 3>(u)  e = Cast<to = 2>(i)
  g = Cast<to = 7>(l)  k = Cast<to = 1>(h) }"""


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


class OnDevice:
    """Looks like an array in CUDA memory."""

    __cuda_array_interface__ = {  # noqa: RUF012
        "shape": (2, 3),
        "typestr": "<f4",
        "data": (0, False),
        "version": 3,
    }


def feeds(batch: int = 2) -> dict[str, Array]:
    x = np.arange(3 * batch, dtype=np.float32).reshape(batch, 3)
    return {"x": x, "n": np.arange(batch)}


@pytest.fixture(params=["openvino", "ort"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def add_one(backend: str) -> Iterator[Engine]:
    with closing(open_engine(parse(ADD_ONE), backend, threads=1)) as engine:
        yield engine


class TestAnOpenedGraph:
    def test_says_what_it_takes_and_gives(self, add_one: Engine, backend: str) -> None:
        assert add_one.backend == backend
        for specs, names in ((add_one.inputs, ["x", "n"]), (add_one.outputs, ["y", "m"])):
            assert list(specs) == names
            matrix, vector = specs.values()
            assert (matrix.dtype, vector.dtype) == ("float32", "int64")
            assert isinstance(matrix.shape[0], str) and matrix.shape[1:] == (3,)
            assert len(vector.shape) == 1 and isinstance(vector.shape[0], str)

    def test_runs(self, add_one: Engine) -> None:
        given = feeds()
        got = add_one.run(given)
        assert list(got) == ["y", "m"]
        assert np.array_equal(got["y"], given["x"] + 1) and got["y"].dtype == np.float32
        assert np.array_equal(got["m"], given["n"] + 2) and got["m"].dtype == np.int64

    def test_takes_any_batch_one_after_the_other(self, add_one: Engine) -> None:
        for batch in (2, 1, 7, 2):
            assert np.array_equal(add_one.run(feeds(batch))["y"], feeds(batch)["x"] + 1)

    def test_does_not_care_about_the_order_of_the_feeds(self, add_one: Engine) -> None:
        turned = dict(reversed(feeds().items()))
        assert np.array_equal(add_one.run(turned)["y"], feeds()["x"] + 1)

    def test_opens_from_a_file_too(self, backend: str, tmp_path: Path) -> None:
        path = tmp_path / "graph with a space.onnx"
        path.write_bytes(parse(ADD_ONE))
        with closing(open_engine(path, backend)) as engine:
            assert np.array_equal(engine.run(feeds())["y"], feeds()["x"] + 1)

    def test_keeps_the_names_of_tensors_that_are_the_same(self, backend: str) -> None:
        x = np.array([[-1, 0, 2]], np.float32)
        with closing(open_engine(parse(SAME), backend)) as engine:
            assert list(engine.inputs) == ["x"] and list(engine.outputs) == ["y", "z", "w"]
            got = engine.run({"x": x})
        assert np.array_equal(got["y"], x)
        assert np.array_equal(got["z"], [[0, 0, 2]]) and np.array_equal(got["w"], [[0, 0, 2]])

    def test_keeps_dtypes(self, backend: str) -> None:
        dtypes = {"f": "f4", "d": "f8", "u": "u1", "i": "i1", "l": "i4", "h": "f2"}
        given = {name: np.array([1, 2], dtype) for name, dtype in dtypes.items()}
        with closing(open_engine(parse(MANY_DTYPES), backend)) as engine:
            assert {n: np.dtype(s.dtype) for n, s in engine.inputs.items()} == {
                name: np.dtype(dtype) for name, dtype in dtypes.items()
            }
            got = engine.run(given)
        assert {name: array.dtype.str[1:] for name, array in got.items()} == dict(
            zip("abcegk", ("f8", "f4", "i1", "u1", "i8", "f4"), strict=True)
        )
        assert all(array.tolist() == [1, 2] for array in got.values())


class TestOutputs:
    def test_belong_to_the_caller(self, add_one: Engine) -> None:
        first = add_one.run(feeds())
        kept = first["y"].copy()
        add_one.run({"x": 100 * feeds()["x"], "n": feeds()["n"]})
        assert np.array_equal(first["y"], kept)
        first["y"][:] = -1  # writable
        assert np.array_equal(add_one.run(feeds())["y"], kept)

    def test_outlive_the_engine(self, backend: str) -> None:
        engine = open_engine(parse(ADD_ONE), backend)
        got = engine.run(feeds())["y"]
        engine.close()
        del engine
        assert np.array_equal(got, feeds()["x"] + 1)

    def test_share_no_memory_with_the_feeds_or_each_other(self, backend: str) -> None:
        x = np.ones((1, 3), np.float32)
        with closing(open_engine(parse(SAME), backend)) as engine:
            got = engine.run({"x": x})
        got["y"][:] = 5
        got["z"][:] = 7
        assert np.all(x == 1) and np.all(got["y"] == 5) and np.all(got["w"] == 1)


class TestFeeds:
    def test_need_not_be_contiguous(self, add_one: Engine) -> None:
        x = np.arange(24, dtype=np.float32).reshape(3, 8)
        for strided in (x.T[::2], x[::-1, 1:4], np.broadcast_to(x[:1, :3], (4, 3))):
            n = np.arange(2 * len(strided))[::2]
            got = add_one.run({"x": strided, "n": n})
            assert np.array_equal(got["y"], strided + 1)
            assert np.array_equal(got["m"], n + 2)

    def test_may_be_read_only_and_stay_as_they_are(self, add_one: Engine) -> None:
        given = feeds()
        for array in given.values():
            array.setflags(write=False)
        assert np.array_equal(add_one.run(given)["y"], feeds()["x"] + 1)
        assert np.array_equal(given["x"], feeds()["x"])

    def test_of_another_shape_are_refused_with_both_shapes(self, add_one: Engine) -> None:
        with pytest.raises(InputError, match=r"'x' has shape \(2, 4\).*\(\w+, 3\)") as caught:
            add_one.run(feeds() | {"x": np.zeros((2, 4), np.float32)})
        assert caught.value.fix

    def test_of_another_rank_are_refused_with_both_shapes(self, add_one: Engine) -> None:
        with pytest.raises(InputError, match=r"'x' has shape \(3,\).*\(\w+, 3\)"):
            add_one.run(feeds() | {"x": np.zeros(3, np.float32)})

    @pytest.mark.parametrize("dtype", ["float64", "float16", "uint8"])
    def test_of_another_dtype_are_refused_with_both(self, add_one: Engine, dtype: str) -> None:
        with pytest.raises(InputError, match=f"{dtype}.*float32"):
            add_one.run(feeds() | {"x": np.zeros((2, 3), dtype)})

    def test_that_are_missing_or_unknown_are_named(self, add_one: Engine) -> None:
        with pytest.raises(InputError, match=r"missing \['n'\], unknown \['image'\]"):
            add_one.run({"x": feeds()["x"], "image": feeds()["x"]})

    def test_on_a_device_are_refused(self, add_one: Engine) -> None:
        given: dict[str, Any] = feeds() | {"x": OnDevice()}
        with pytest.raises(EngineError, match=r"\['x'\]") as caught:
            add_one.run(given)
        assert "tensorrt" in str(caught.value.fix)

    def test_with_a_stream_are_refused(self, add_one: Engine) -> None:
        with pytest.raises(EngineError, match="stream"):
            add_one.run(feeds(), stream=0)

    def test_that_the_graph_cannot_run_are_an_error_with_the_backends_words(
        self, add_one: Engine
    ) -> None:
        # two axes that are free in the specs, but must agree
        text = ADD_ONE.replace("m = Add(n, two)", "m = Add(n, n)").replace(
            "y = Add(x, one)", "k = Cast<to = 1>(n)  s = Unsqueeze(k, two)  y = Add(x, s)"
        )
        text = text.replace("int64 two = {2}", "int64[1] two = {1}")
        with closing(open_engine(parse(text), add_one.backend)) as engine:
            with pytest.raises(EngineError, match=r"failed: \S"):
                engine.run({"x": feeds(4)["x"], "n": feeds(3)["n"]})
            # and the engine is still usable
            assert engine.run(feeds())["y"].tolist() == [[0, 1, 2], [4, 5, 6]]


class TestManyThreads:
    def test_may_run_at_once(self, backend: str) -> None:
        model, _ = conv_net()
        rng = np.random.default_rng(1)
        images = [rng.standard_normal((1 + i % 3, 3, 10, 10)).astype(np.float32) for i in range(24)]
        with closing(open_engine(model, backend, threads=2)) as engine:
            alone = [engine.run({"x": image})["y"] for image in images]
            with ThreadPoolExecutor(4) as pool:
                together = list(pool.map(lambda image: engine.run({"x": image})["y"], images * 4))
        for got, want in zip(together, alone * 4, strict=True):
            assert np.array_equal(got, want)


class TestAClosedEngine:
    def test_can_be_closed_again_but_not_run(self, backend: str) -> None:
        engine = open_engine(parse(ADD_ONE), backend)
        engine.run(feeds())
        engine.close()
        engine.close()
        with pytest.raises(EngineError, match="closed") as caught:
            engine.run(feeds())
        assert caught.value.fix


SIGNALS_AFTER_CLOSING = """
import gc, os, signal, sys
from pathlib import Path
from runtime.engines import open_engine

signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
engines = [open_engine(Path(sys.argv[1]), sys.argv[2]) for _ in range(2)]
while engines:  # in the order in which they were opened
    engines.pop(0).close()
    gc.collect()
    os.kill(os.getpid(), signal.SIGUSR1)
"""


def test_signals_are_handled_after_engines_were_closed(backend: str, tmp_path: Path) -> None:
    """OpenVINO's cores take each other's signal stacks away: the process died of Ctrl-C."""
    graph = tmp_path / "graph.onnx"
    graph.write_bytes(parse(ADD_ONE))
    command = [sys.executable, "-c", SIGNALS_AFTER_CLOSING, str(graph), backend]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "handled\nhandled\n"), done.stderr


class TestFloatArithmetic:
    def test_is_float32_on_every_backend(self, backend: str) -> None:
        model, weights = conv_net()
        x = np.random.default_rng(2).standard_normal((2, 3, 10, 10)).astype(np.float32)
        with closing(open_engine(model, backend)) as engine:
            got = engine.run({"x": x})["y"]
        want = conv_net_in_float64(x, weights)
        # sums of 27 and 32 float32 products: a few 1e-7 of the largest; bfloat16 would be 4e-3 off
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())

    def test_agrees_between_the_backends(self) -> None:
        model, _ = conv_net()
        x = np.random.default_rng(3).standard_normal((3, 3, 10, 10)).astype(np.float32)
        with (
            closing(open_engine(model, "ort")) as ort,
            closing(open_engine(model, "openvino")) as openvino,
        ):
            ours, theirs = (engine.run({"x": x})["y"] for engine in (ort, openvino))
        # both are within float32 rounding of the truth, see above
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(ours).max())

    def test_in_bfloat16_is_there_for_the_asking(self) -> None:
        model, weights = conv_net()
        x = np.random.default_rng(2).standard_normal((2, 3, 10, 10)).astype(np.float32)
        with closing(open_engine(model, "openvino", precision="bf16")) as engine:
            got = engine.run({"x": x})["y"]
        want = conv_net_in_float64(x, weights)
        # 8 bits of mantissa: 4e-3 per rounding of inputs, weights and hidden values; where the CPU
        # has no bfloat16 OpenVINO computes in float32, which fits as well
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-2 * np.abs(want).max())


class TestWhatCannotBeOpened:
    @pytest.mark.parametrize("content", [b"", b"not a graph", parse(ADD_ONE)[:-40]])
    def test_a_corrupt_file_is_an_error_that_names_it(
        self, backend: str, tmp_path: Path, content: bytes
    ) -> None:
        path = tmp_path / "graph.onnx"
        path.write_bytes(content)
        with pytest.raises(EngineError, match=r"graph\.onnx") as caught:
            open_engine(path, backend)
        assert caught.value.fix
        with pytest.raises(EngineError, match="the graph"):
            open_engine(content, backend)

    def test_a_missing_file_is_an_error_that_names_it(self, backend: str, tmp_path: Path) -> None:
        with pytest.raises(EngineError, match=r"none\.onnx"):
            open_engine(tmp_path / "none.onnx", backend)

    def test_a_node_that_no_backend_knows_is_an_error(self, backend: str) -> None:
        with pytest.raises(EngineError):
            open_engine(parse(ADD_ONE.replace("Add(x, one)", "Conjure(x, one)")), backend)

    def test_an_unknown_backend_is_a_wrong_option(self) -> None:
        with pytest.raises(UsageError, match="'onnx'") as caught:
            open_engine(parse(ADD_ONE), "onnx")
        assert all(name in str(caught.value.fix) for name in BACKENDS)
        assert caught.value.exit_code == 2

    @pytest.mark.parametrize(
        ("backend", "precision"), [("ort", "bf16"), ("ort", "auto"), ("openvino", "fp16")]
    )
    def test_a_precision_that_the_backend_does_not_have_is_a_wrong_option(
        self, backend: str, precision: str
    ) -> None:
        with pytest.raises(UsageError, match=f"'{backend}'.*'{precision}'") as caught:
            open_engine(parse(ADD_ONE), backend, precision=precision)
        assert "float" in str(caught.value.fix)

    @pytest.mark.parametrize("name", list(BACKENDS))
    def test_a_backend_that_is_not_installed_is_an_error_with_the_install_line(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        find_spec = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda wanted: None if wanted == BACKENDS[name].package else find_spec(wanted),
        )
        with pytest.raises(BackendError, match="not installed") as caught:
            open_engine(parse(ADD_ONE), name)
        assert "pip install" in str(caught.value.fix) and caught.value.exit_code == 1


class TestTheTable:
    @pytest.mark.skipif(
        importlib.util.find_spec("runtime.engines.trt") is not None, reason="the backend is there"
    )
    def test_keeps_the_place_of_a_backend_that_is_yet_to_come(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        find_spec = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda wanted: find_spec("numpy") if wanted == "tensorrt" else find_spec(wanted),
        )
        with pytest.raises(BackendError, match="no such backend yet"):
            check_backend("tensorrt")

    def test_names_the_backends_that_are_usable_here(self, backend: str) -> None:
        assert check_backend(backend) is BACKENDS[backend]
        assert BACKENDS[backend].why_not() is None


class TestASpec:
    spec = TensorSpec(dtype="float32", shape=("batch", 3))

    def test_names_its_free_axes(self) -> None:
        assert self.spec.describe() == "(batch, 3)"

    def test_checks_an_array_on_a_device_by_its_interface(self) -> None:
        self.spec.check("x", OnDevice())
        with pytest.raises(InputError, match=r"\(2, 3\).*\(batch, 4\)"):
            TensorSpec(dtype="float32", shape=("batch", 4)).check("x", OnDevice())


class TestThreads:
    def test_available_are_those_of_the_process(self) -> None:
        assert 1 <= available_threads() <= 4096

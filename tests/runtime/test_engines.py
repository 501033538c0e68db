from __future__ import annotations

import importlib.util
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from engineworks.runtime.engines import BACKENDS, check_backend, open_engine
from engineworks.runtime.errors import BackendError, EngineError, InputError, UsageError
from engineworks.runtime.tensors import TensorSpec
from engineworks.runtime.threads import available_threads
from tests.runtime.nets import ADD_ONE, SAME, conv_net, conv_net_in_float64, feeds, parse

ROOT = Path(__file__).parents[2]

MANY_DTYPES = """<ir_version: 9, opset_import: ["" : 18]>
dtypes (float[2] f, double[2] d, uint8[2] u, int8[2] i, int32[2] l, float16[2] h)
 => (double[2] a, float[2] b, int8[2] c, uint8[2] e, int64[2] g, float[2] k)
{ a = Cast<to = 11>(f)  b = Cast<to = 1>(d)  c = Cast<to = 3>(u)  e = Cast<to = 2>(i)
  g = Cast<to = 7>(l)  k = Cast<to = 1>(h) }"""


@pytest.fixture(params=["openvino", "ort"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class TestAnOpenedGraph:
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


SIGNALS_AFTER_CLOSING = """
import gc, os, signal, sys
from pathlib import Path
from engineworks.runtime.engines import open_engine

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
    def test_names_the_backends_that_are_usable_here(self, backend: str) -> None:
        assert check_backend(backend) is BACKENDS[backend]
        assert BACKENDS[backend].why_not() is None


class OnDevice:
    """Looks like an array in CUDA memory."""

    __cuda_array_interface__ = {  # noqa: RUF012
        "shape": (2, 3),
        "typestr": "<f4",
        "data": (0, False),
        "version": 3,
    }


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


def test_threads_that_end_take_no_infer_request_along(monkeypatch: pytest.MonkeyPatch) -> None:
    openvino = pytest.importorskip("openvino")
    created = []
    create = openvino.CompiledModel.create_infer_request

    def counted(model: object) -> object:
        created.append(request := create(model))
        return request

    monkeypatch.setattr(openvino.CompiledModel, "create_infer_request", counted)
    with closing(open_engine(parse(ADD_ONE), "openvino")) as engine:
        for _ in range(4):
            thread = threading.Thread(target=engine.run, args=(feeds(),))
            thread.start()
            thread.join()
        engine.run(feeds())
    assert len(created) == 1

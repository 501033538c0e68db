"""ONNX Runtime on the GPU: what the contract of all engines does not say."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from typing import Any

import numpy as np
import pytest

from engineworks.runtime.engines import Engine, open_engine
from engineworks.runtime.errors import BackendError, EngineError
from tests.runtime.gpu_stub import Gpu
from tests.runtime.nets import ADD_ONE, feeds, parse

SHAPES = """<ir_version: 9, opset_import: ["" : 18]>
flat (float[batch, 3] x) => (float[n] y)
{ s = Shape(x)  t = ReduceProd<keepdims = 1>(s)  y = Reshape(x, t) }"""


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    device = Gpu()
    device.install("11.4.0.106", monkeypatch)
    monkeypatch.setattr("engineworks.runtime.engines.Backend.why_not", lambda row: None)
    return device


@pytest.fixture
def engine(gpu: Gpu) -> Iterator[Engine]:
    with closing(open_engine(parse(ADD_ONE), "ort-cuda")) as opened:
        yield opened


class TestTheProviders:
    @pytest.mark.parametrize(
        ("backend", "precision", "want"),
        [
            ("ort-cuda", "float", {"CUDAExecutionProvider": {"use_tf32": "0"}}),
            (
                "ort-tensorrt",
                "float",
                {
                    "TensorrtExecutionProvider": {"trt_int8_enable": "0"},
                    "CUDAExecutionProvider": {},
                },
            ),
            (
                "ort-tensorrt",
                "int8",
                {
                    "TensorrtExecutionProvider": {"trt_int8_enable": "1"},
                    "CUDAExecutionProvider": {},
                },
            ),
        ],
    )
    def test_are_named_one_by_one_and_never_the_cpu(
        self, gpu: Gpu, backend: str, precision: str, want: dict[str, dict[str, str]]
    ) -> None:
        open_engine(parse(ADD_ONE), backend, precision=precision).close()
        ((_, *providers),) = gpu.named("Session")
        assert [name for name, _ in providers] == list(want)
        for name, options in providers:
            assert options["device_id"] == "0"
            assert want[name].items() <= options.items()

    @pytest.mark.parametrize(
        ("backend", "lacking"),
        [
            ("ort-cuda", "CUDAExecutionProvider"),
            ("ort-tensorrt", "TensorrtExecutionProvider"),
        ],
    )
    def test_that_do_not_start_are_an_error_and_no_run_on_the_cpu(
        self, gpu: Gpu, backend: str, lacking: str
    ) -> None:
        gpu.lacking = lacking
        with pytest.raises(BackendError, match=f"no working {lacking}, only .*CPU") as caught:
            open_engine(parse(ADD_ONE), backend)
        assert "doctor" in str(caught.value.fix)


class TestNodesOnTheCpu:
    def test_are_refused_by_name(self, gpu: Gpu) -> None:
        gpu.ops_on_cpu = ("Relu",)
        text = ADD_ONE.replace("y = Add(x, one)", "r = Add(x, one)  y = Relu(r)")
        with pytest.raises(EngineError, match=r"1 nodes on the CPU: .*\(Relu\)") as caught:
            open_engine(parse(text), "ort-cuda")
        assert caught.value.fix

    def test_may_compute_shapes_and_can_be_read(self, gpu: Gpu) -> None:
        gpu.ops_on_cpu = ("Shape", "ReduceProd")
        x = np.ones((2, 3), np.float32)
        with closing(open_engine(parse(SHAPES), "ort-cuda")) as engine:
            assert len(engine._engine.cpu_nodes) == 2  # type: ignore[attr-defined]
            assert engine.run({"x": x})["y"].shape == (6,)


class TestDeviceFeeds:
    @pytest.mark.parametrize("told", [False, True])
    def test_are_waited_for(self, gpu: Gpu, engine: Engine, told: bool) -> None:
        producer = gpu.new_stream()
        given: dict[str, Any] = {}
        for name, array in feeds().items():
            address = gpu.allocate(array.nbytes)
            given[name] = _Feed(array.shape, array.dtype.str, address)
            if told:
                given[name].__cuda_array_interface__ |= {"version": 3, "stream": producer.handle}
            flat = array.reshape(-1).view(np.uint8)
            producer.add(partial(np.copyto, gpu.at(address, flat.size), flat))
        got: dict[str, Any] = engine.run(given)
        assert np.array_equal(got["y"].numpy(), feeds()["x"] + 1)
        assert bool(gpu.named("Context.synchronize")) is not told

    def test_give_answers_that_keep_their_session(self, gpu: Gpu, engine: Engine) -> None:
        cuda: Any = sys.modules["engineworks.runtime.engines.cuda"]
        with cuda.device().active():
            given = {
                name: cuda.DeviceTensor(cuda.device(), array.shape, array.dtype.name)
                for name, array in feeds().items()
            }
        got: dict[str, Any] = engine.run(given)
        engine.close()
        assert got["y"].__cuda_array_interface__["version"] == 3
        assert got["y"].numpy().shape == (2, 3)


class _Feed:
    def __init__(self, shape: tuple[int, ...], typestr: str, address: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": typestr,
            "data": (address, False),
            "version": 2,
        }
